"""The job `medim-ray prepare`: a source to a shard set, on Ray tasks. The same command continues a killed job.

Three steps, each a function of the one before, each committed file by file: the rows as listed are encoded part by part
(work.py); their hashes decide splits and copies (duplicates.py); files are put together from the parts. The manifest is
written last. So neither the number of CPUs nor interruptions change a byte.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray

from medim_ray.config.loader import leaves
from medim_ray.data import output, shards
from medim_ray.data.encode import PartFacts, RowEncoder
from medim_ray.data.finish import Encoded, Identity, Plan, finish, plan_files
from medim_ray.data.images import ImageEncoder
from medim_ray.data.layout import FilePlan, ShardConfig
from medim_ray.data.lease import Lease
from medim_ray.data.listing import final_rows, little_memory, rows_hash
from medim_ray.data.output import Stored
from medim_ray.data.progress import progress_bar
from medim_ray.data.shards import Manifest, ShardSet
from medim_ray.data.sources import SOURCES
from medim_ray.data.sources.base import Source, absolute
from medim_ray.data.splits import SplitConfig, salt_mark
from medim_ray.data.storage import StorageConfig, filesystem, missing_packages, sources_open_with, storage_faults
from medim_ray.data.summary import SALT_VARIABLE, PrepareSummary, notices_of_copies, summarize
from medim_ray.data.vocabulary import VocabularyConfig
from medim_ray.data.work import WorkFolder, WrittenFile
from medim_ray.session import ray_session

__all__ = ["PrepareConfig", "PrepareSummary", "QuarantineConfig", "ShardConfig", "prepare"]
_LOOK_S = 1.0  # seconds between looks at the lease, where no task ends
_KEPT = "; what was done is kept: run the same command again to go on"

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class QuarantineConfig:
    """When unreadable rows are too many."""

    max_ratio: float = field(
        default=0.1, metadata={"help": "share of unreadable rows above which the job fails", "hashed": False}
    )

    def __post_init__(self) -> None:
        if not 0.0 <= self.max_ratio <= 1.0:
            raise ValueError(f"max_ratio={self.max_ratio}: a share of the rows, between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Everything `medim-ray prepare` is a function of."""

    source: Any = field(
        default_factory=lambda: SOURCES["csv"].Config(name="csv"),
        metadata={"registry": SOURCES, "default_name": "csv", "help": "where images and reports come from"},
    )
    source_storage: StorageConfig = field(default_factory=StorageConfig, metadata={"hashed": False})
    out: str = field(default="", metadata={"help": "folder or fsspec URL for the shards; required", "hashed": False})
    out_storage: StorageConfig = field(default_factory=StorageConfig, metadata={"hashed": False})
    image: ImageEncoder.Config = field(default_factory=ImageEncoder.Config)
    split: SplitConfig = field(default_factory=SplitConfig)
    duplicates: Literal["keep", "skip"] = field(
        default="keep",
        metadata={"help": "exact copies of an image: keep them, in one split, or skip all but one; listed either way"},
    )
    shards: ShardConfig = field(default_factory=ShardConfig)
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)
    quarantine: QuarantineConfig = field(default_factory=QuarantineConfig)
    salt: str = field(
        default="",
        metadata={
            "help": f"secret under which patient ids are hashed; better in the environment, as {SALT_VARIABLE}",
            "hashed": False,
            "secret": True,
        },
    )

    def __post_init__(self) -> None:
        if self.duplicates not in ("keep", "skip"):
            raise ValueError(f"duplicates={self.duplicates!r}: use keep or skip")


def prepare(config: PrepareConfig) -> PrepareSummary:
    """Writes the shard set `config.out`, goes on with an unfinished one, or adds the rows that are new in the source.
    Uses the Ray that is running, or starts one (RAY_ADDRESS is honoured).

    ValueError before anything is written: faults of the source, duplicate image ids, a patient in two splits, an output
    that is in use. ValueError after removing what was written: more than `quarantine.max_ratio` of the rows unreadable.
    RuntimeError: storage that can't be read or written (no permission, disk full); finished parts stay.
    """
    if not config.out:
        raise ValueError("out is not set: give the folder or URL for the shards as out=…")
    if config.out.startswith(("http://", "https://")):
        raise ValueError(f"out={config.out}: a web server can be read only; give a folder, s3://, gs:// or az://")
    salt = config.salt or os.environ.get(SALT_VARIABLE, "")
    source = SOURCES[config.source.name](config.source)
    with _reading(config), little_memory():
        rows = final_rows(source.plan(), config.split, salt)
        job = _job(config, rows, salt)
    out = absolute(config.out)
    fs, root = filesystem(out, config.out_storage, "out_storage")
    with storage_faults(f"out={config.out}"):
        manifest = output.look(out, fs, root, job)
        if manifest is not None and manifest.input_hash == job["input_hash"]:
            ShardSet(config.out, fs, root, manifest).check_files()
            return _already(config, WorkFolder(fs, root), manifest, salt)
        stored = None if manifest is None else output.read_stored(out, fs, root, manifest)
        todo = rows if stored is None else output.new_rows(out, rows, stored)
        existed = fs.exists(root)
    work = WorkFolder(fs, root)
    try:
        with storage_faults(f"out={config.out}", kept=_KEPT), Lease(fs, work.lease, what=f"out={config.out}") as lease:
            finished, notices = None, list[str]()
            if output.look(out, fs, root, job) == manifest:
                output.keep_stored(work, stored)
                work.begin(job)
                finished, notices = _run(config, source, todo, stored, work, lease, job)
                lease.end()
                work.remove()
    except _TooManyUnreadableError as error:
        if stored is None:
            output.remove(fs, root, existed=existed)
        work.remove()
        raise ValueError(str(error)) from None
    except RuntimeError as error:
        if work.has_parts():
            raise
        output.discard(work, existed=existed)
        raise RuntimeError(str(error).removesuffix(_KEPT)) from None
    if finished is None:
        return prepare(config)  # another job wrote the set between the look and the lease
    return summarize(config.out, finished, is_salted=bool(salt), already_prepared=False, notices=notices)


class _TooManyUnreadableError(Exception):
    """What `quarantine.max_ratio` does not allow."""


@contextlib.contextmanager
def _reading(config: PrepareConfig) -> Iterator[None]:
    """Faults of the storage of the source, in plain words; its options apply within."""
    path = getattr(config.source, "path", "")
    with sources_open_with(config.source_storage), missing_packages(path), storage_faults(f"source.path={path}"):
        yield


def _job(config: PrepareConfig, rows: pa.Table, salt: str) -> dict[str, Any]:
    """What an unfinished job is known by."""
    options = {key: value for key, value, meta in leaves(config) if meta.get("hashed", True)}
    options = json.loads(json.dumps(options))
    tree = {**options, "format": {"schema": shards.ROW_VERSION, "salt": salt_mark(salt)}}
    digest = hashlib.blake2b(json.dumps(tree, sort_keys=True).encode(), digest_size=8).hexdigest()
    return {"config_hash": digest, "input_hash": rows_hash(rows), "salt_mark": salt_mark(salt), "options": options}


def _already(config: PrepareConfig, work: WorkFolder, manifest: Manifest, salt: str) -> PrepareSummary:
    """Nothing to do, but for what a job that was killed after its last step has left."""
    if work.job() is not None:
        with Lease(work.fs, work.lease, what=f"out={config.out}") as lease:
            lease.end()
            work.remove()
    return summarize(config.out, manifest, is_salted=bool(salt), already_prepared=True)


def _run(
    config: PrepareConfig,
    source: Source,
    rows: pa.Table,
    stored: Stored | None,
    work: WorkFolder,
    lease: Lease,
    job: Mapping[str, Any],
) -> tuple[Manifest, list[str]]:
    """The three steps; manifest and notices. rows: those that are not stored."""
    is_bound_N = None
    if stored is not None:
        rows, is_bound_N = output.bind_to_stored(rows, stored)
    part_rows = config.shards.row_group_rows or 64
    facts, whole = work.parts()
    num_before = _num_rows(facts)
    with ray_session(object_store_memory=None):
        encode = _Encode(config, RowEncoder(source, ImageEncoder(config.image)), rows, part_rows, work, lease)
        todo = set(range(-(-rows.num_rows // part_rows))) - facts.keys()
        facts |= encode(todo, num_done=num_before)
        quarantined = [reason for part in facts.values() for *_, reason in part.quarantined]
        _refuse_too_many(config, facts, rows.num_rows, Counter(quarantined))
        encoded = Encoded(rows=rows, part_rows=part_rows, facts=facts, is_bound_N=is_bound_N)
        plan = plan_files(encoded, config.duplicates, config.shards, stored)
        written = work.files(plan.files)
        lost = plan.parts_of(file for file in plan.files if file.path not in written) - whole - todo
        encode(lost, num_done=rows.num_rows - len(lost) * part_rows)
        written |= _write_files(plan, written, work, lease)
    lease.check()
    identity = Identity(
        source=config.source.name,
        config_hash=job["config_hash"],
        input_hash=job["input_hash"],
        salt_mark=job["salt_mark"],
        rule=config.duplicates,
        vocabulary=config.vocabulary,
    )
    manifest = finish(identity, plan, written, stored, work)
    notices = []
    if num_before:
        notices.append(f"went on with an unfinished job: {num_before} of {rows.num_rows} rows were done")
    if stored is not None:
        new_files = ", ".join(file.path for file in plan.files)
        notices.append(f"added {rows.num_rows} new rows to the {stored.manifest.rows_in} that were there: {new_files}")
    return manifest, [*notices, *notices_of_copies(plan.verdict)]


def _num_rows(facts: Mapping[int, PartFacts]) -> int:
    return sum(len(part.places) + len(part.quarantined) for part in facts.values())


def _refuse_too_many(
    config: PrepareConfig, facts: Mapping[int, PartFacts], num_rows: int, reasons: Counter[str]
) -> None:
    """More rows are unreadable than allowed."""
    lost = sum(reasons.values())
    if lost <= config.quarantine.max_ratio * num_rows:
        return
    shown = "; ".join(
        f"{num} rows: {reason}" for reason, num in sorted(reasons.items(), key=lambda r: (-r[1], r[0]))[:5]
    )
    first = min(entry for part in facts.values() for entry in part.quarantined)
    raise _TooManyUnreadableError(
        f"{lost} of {num_rows} rows can't be read ({shown}), more than "
        f"quarantine.max_ratio={config.quarantine.max_ratio} allows. The first is "
        f"image {first[1]!r}. Check the paths of the source, or allow more"
    )


def _in_tasks(
    items: Sequence[Any], task: Callable[[Any], T], lease: Lease, done: Callable[[T], int], bar: _Bar
) -> Iterator[T]:
    """One Ray task an item, two for every CPU under way; results as they come. Plain tasks, since a job has two rounds
    of them and an execution of Ray Data brings actors of its own. done: what a result adds to the bar."""
    if not items:
        return
    task_ref, waiting, pending = ray.put(task), iter(items), list[Any]()
    num_done = bar.num_done
    with progress_bar(bar.name, bar.total, lambda: num_done, bar.unit):
        try:
            while True:
                most = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))  # of a cluster that may grow or shrink
                pending += [_task.remote(task_ref, item) for item in islice(waiting, max(0, most - len(pending)))]
                if not pending:
                    return
                ready, pending = ray.wait(pending, timeout=_LOOK_S, fetch_local=True)
                lease.check()
                for ref in ready:
                    result = ray.get(ref)
                    num_done += done(result)
                    yield result
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, RuntimeError):
                raise  # `storage_faults` adds what was kept to those of tasks alone
            raise error.cause from None  # so that a full disk is an OSError here too
        finally:
            for ref in pending:
                ray.cancel(ref)
            if pending:  # what runs on must not write where the caller cleans up
                ray.wait(pending, num_returns=len(pending), timeout=60)


@ray.remote(num_cpus=1)
def _task(task: Callable[[Any], T], item: Any) -> T:
    return task(item)


@dataclass(frozen=True)
class _Bar:
    """A progress bar that begins at `num_done` of `total`."""

    name: str
    total: int
    num_done: int = 0
    unit: str = "images"


class _Encode:
    """Callable: numbers of parts -> their facts, after their rows were committed."""

    def __init__(
        self, config: PrepareConfig, encoder: RowEncoder, rows: pa.Table, part_rows: int, work: WorkFolder, lease: Lease
    ) -> None:
        self._config, self._encoder, self._part_rows, self._work = config, encoder, part_rows, work
        self._lease, self._num_rows = lease, rows.num_rows
        self._rows = ray.put(rows.drop_columns(["is_given", "key"]))  # tasks on this node share it

    def __call__(self, parts: Collection[int], num_done: int) -> dict[int, PartFacts]:
        task = partial(
            _encode_part,
            rows=self._rows,
            part_rows=self._part_rows,
            encoder=self._encoder,
            work=self._work,
            storage=self._config.source_storage,
        )
        bar = _Bar("prepare", self._num_rows, num_done)
        return dict(_in_tasks(sorted(parts), task, self._lease, lambda result: _num_rows(dict([result])), bar))


def _encode_part(
    part: int, rows: Any, part_rows: int, encoder: RowEncoder, work: WorkFolder, storage: StorageConfig
) -> tuple[int, PartFacts]:
    """Ray task: encodes and commits one part; its facts."""
    plan = ray.get(rows).slice(part * part_rows, part_rows)
    with sources_open_with(storage):
        table, facts = encoder(plan)
    work.write_part(part, table, facts)
    return part, facts


def _write_files(
    plan: Plan, written: Mapping[str, WrittenFile], work: WorkFolder, lease: Lease
) -> dict[str, WrittenFile]:
    """Writes the files that are not written; frees parts as soon as nobody needs them."""
    todo = [file for file in plan.files if file.path not in written]
    waiting = Counter(part for file in todo for part in plan.parts_of([file]))
    items = [(file, *plan.rows_of(file)) for file in todo]
    done: dict[str, WrittenFile] = {}
    bar = _Bar("write", len(todo), unit="files")
    for entry in _in_tasks(items, partial(_write_file, work=work), lease, lambda entry: 1, bar):
        done[entry.file.path] = entry
        parts = plan.parts_of(file for file in todo if file.path == entry.file.path)
        waiting.subtract(parts)
        work.drop_parts(part for part in parts if not waiting[part])
    return done


def _write_file(item: tuple[FilePlan, NDArray[np.int64], NDArray[np.int64]], work: WorkFolder) -> WrittenFile:
    """Ray task: puts one file of the set together; its entry."""
    return work.write_file(*item)
