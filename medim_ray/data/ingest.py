"""The job `medim-ray prepare`: a source to a shard set, read and encoded by Ray Data tasks.

The driver lists the rows and cuts them into row groups and files; one task encodes a row group, another writes a file.
Each file is a function of its rows, so the bytes do not depend on the number of CPUs. The manifest is written last.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import DataContext, Dataset

import medim_ray
from medim_ray.data import shards
from medim_ray.data.encode import NO_PATIENT, NO_REPORT, Facts, RowEncoder
from medim_ray.data.images import ImageEncoder
from medim_ray.data.listing import final_rows, table_hash
from medim_ray.data.output import occupied, remove, same_set, storage_faults
from medim_ray.data.progress import progress_bar, quiet
from medim_ray.data.shards import Manifest, OtherFile, ShardFile
from medim_ray.data.sources import SOURCES
from medim_ray.data.sources.base import absolute
from medim_ray.data.splits import SPLITS, SplitConfig, hash_patient
from medim_ray.data.vocabulary import VocabularyConfig, write_vocabulary

SALT_VARIABLE = "MEDIM_RAY_SALT"


@dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """How rows are cut into files."""

    rows_per_file: int = field(
        default=4096,
        metadata={"help": "rows of a Parquet file, a multiple of row_group_rows (4096 of 512 px: 200 MB)"},
    )
    row_group_rows: int = field(
        default=64,
        metadata={"help": "rows of a row group: encoded by one task, read at once by the training stream"},
    )

    def __post_init__(self) -> None:
        if self.row_group_rows < 1:
            raise ValueError(f"row_group_rows={self.row_group_rows}: at least 1")
        if self.rows_per_file < 1 or self.rows_per_file % self.row_group_rows:
            up = -(-max(self.rows_per_file, 1) // self.row_group_rows) * self.row_group_rows
            raise ValueError(
                f"rows_per_file={self.rows_per_file} is not a multiple of row_group_rows={self.row_group_rows}: "
                f"use rows_per_file={up}"
            )

    @property
    def groups_per_file(self) -> int:
        """Row groups of a full file."""
        return self.rows_per_file // self.row_group_rows


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
    out: str = field(default="", metadata={"help": "folder or fsspec URL for the shards; required", "hashed": False})
    image: ImageEncoder.Config = field(default_factory=ImageEncoder.Config)
    split: SplitConfig = field(default_factory=SplitConfig)
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


@dataclass(frozen=True, kw_only=True)
class PrepareSummary:
    """What `prepare` did; rows_in = sum of `splits` + sum of `quarantine`."""

    out: str
    rows_in: int
    splits: dict[str, int]
    quarantine: dict[str, int]
    notices: tuple[str, ...]
    already_prepared: bool

    def lines(self) -> list[str]:
        """The last lines that the command prints."""
        kept, lost = sum(self.splits.values()), sum(self.quarantine.values())
        assert self.rows_in == kept + lost, "rows went missing"
        lines = [f"already prepared, nothing to do: {self.out}"] if self.already_prepared else []
        lines += [f"note: {notice}" for notice in self.notices]
        lines += [f"quarantine: {num} rows: {reason}" for reason, num in self.quarantine.items()]
        by_split = ", ".join(f"{split} {num}" for split, num in self.splits.items())
        lines.append(f"{self.rows_in} rows in = {kept} in shards ({by_split}) + {lost} in quarantine")
        return lines


def prepare(config: PrepareConfig) -> PrepareSummary:
    """Writes the shard set `config.out`. Uses the Ray that is running, or starts one (RAY_ADDRESS is honoured).

    ValueError before anything is written: faults of the source, duplicate image ids, a patient in two splits, an output
    that is in use. ValueError after removing what was written: more than `quarantine.max_ratio` of the rows unreadable.
    RuntimeError, likewise: storage that can't be written (no permission, disk full).
    """
    if not config.out:
        raise ValueError("out is not set: give the folder or URL for the shards as out=…")
    salt = config.salt or os.environ.get(SALT_VARIABLE, "")
    source = SOURCES[config.source.name](config.source)
    rows = final_rows(source.plan(), config.split, salt)
    config_hash, input_hash = _config_hash(config, salt), table_hash(rows)
    fs, root = fsspec.core.url_to_fs(absolute(config.out))
    root = root.rstrip("/")
    with storage_faults(config.out):
        if occupied(fs, root):
            manifest = same_set(config.out, config_hash, input_hash)
            return _summary(config, manifest, salt, already_prepared=True)
        existed = fs.exists(root)
    try:
        encoder = RowEncoder(source, ImageEncoder(config.image))
        with _ray(), storage_faults(config.out):
            fs.makedirs(root, exist_ok=True)
            files, facts = _encode(rows, encoder, config.shards, fs, root)
            manifest = _finish(config, rows, files, facts, fs, root, hashes=(config_hash, input_hash))
    except BaseException:  # also Ctrl-C: nothing half-written stays
        remove(fs, root, existed=existed)
        raise
    return _summary(config, manifest, salt, already_prepared=False)


def _config_hash(config: PrepareConfig, salt: str) -> str:
    """Over the options that shape the rows; the salt enters through what it makes of a fixed word."""
    tree = {key: asdict(getattr(config, key)) for key in ("source", "image", "split", "shards", "vocabulary")}
    tree["format"] = {"schema": shards.SCHEMA_VERSION, "salt": hash_patient("medim-ray", salt)}
    return hashlib.blake2b(json.dumps(tree, sort_keys=True).encode(), digest_size=8).hexdigest()


@contextlib.contextmanager
def _ray() -> Iterator[None]:
    """A running Ray; one that is started here ends here."""
    if ray.is_initialized():
        yield
        return
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="WARNING")
    try:
        yield
    finally:
        ray.shutdown()


def _encode(
    rows: pa.Table, encoder: RowEncoder, config: ShardConfig, fs: fsspec.AbstractFileSystem, root: str
) -> tuple[list[ShardFile], Facts]:
    """Encodes and writes all rows; the files in order and what the rows added up to."""
    counter = ray.remote(num_cpus=0)(_Counter).remote()
    context = DataContext.get_current().copy()
    context.execution_options.preserve_order = True  # a file is a run of consecutive row groups
    context.enable_progress_bars = False  # they count blocks; ours counts images
    context.raise_original_map_exception = True  # so that a full disk is an OSError here too
    with (
        DataContext.current(context),
        quiet("ray.data"),
        progress_bar("prepare", rows.num_rows, partial(_done, counter)),
    ):
        dataset = _dataset(rows, config).map_batches(
            partial(_encode_groups, encoder=encoder, counter=counter), batch_size=None, batch_format="pyarrow"
        )
        dataset = dataset.map_batches(
            partial(_write_file, fs=fs, root=root),
            batch_size=config.groups_per_file,
            batch_format="pyarrow",
            num_cpus=0.5,  # waits for storage; and another size than above keeps Ray from fusing the two
        )
        results = sorted(dataset.iter_rows(), key=lambda row: row["order"])
    facts = Facts()
    for result in results:
        facts.add(Facts.from_json(result["facts"]))
    facts.quarantined.sort()
    files = [ShardFile(**json.loads(result["file"])) for result in results]
    return [file for file in files if file.rows], facts


def _dataset(rows: pa.Table, config: ShardConfig) -> Dataset:
    """One block a row group: its number, its file, its split and its rows of the plan (as an Arrow stream).

    The last block of a split carries empty groups that complete its last file, so that a file is always a batch of
    `groups_per_file` rows of this dataset.
    """
    blocks: list[pa.Table] = []
    order = 0
    for split in SPLITS:
        of_split = rows.filter(pc.equal(rows["split"], split))
        for start in range(0, of_split.num_rows, config.row_group_rows):
            number = start // config.rows_per_file
            plans = [_to_ipc(of_split.slice(start, config.row_group_rows))]
            if start + config.row_group_rows >= of_split.num_rows:
                plans += [b""] * (-(start // config.row_group_rows + 1) % config.groups_per_file)
            file = f"{split}/{number:05d}.parquet"
            columns = {
                "order": pa.array(range(order, order + len(plans)), type=pa.int64()),
                "file": pa.array([file] * len(plans), type=pa.string()),
                "split": pa.array([split] * len(plans), type=pa.string()),
                "plan": pa.array(plans, type=pa.large_binary()),
            }
            blocks.append(pa.table(columns))
            order += len(plans)
    return ray.data.from_arrow(blocks)


def _encode_groups(groups: pa.Table, encoder: RowEncoder, counter: Any) -> pa.Table:
    """Ray task: plan rows of row groups to shard rows (as an Arrow stream) and facts (as JSON)."""
    rows, facts = [], []
    for plan in groups["plan"].to_pylist():
        table, fact = encoder(_from_ipc(plan)) if plan else (shards.SCHEMA.empty_table(), Facts())
        rows.append(_to_ipc(table))
        facts.append(fact.to_json())
        counter.add.remote(table.num_rows + len(fact.quarantined))
    columns = {name: groups[name] for name in ("order", "file", "split")}
    return pa.table(
        {**columns, "rows": pa.array(rows, type=pa.large_binary()), "facts": pa.array(facts, pa.large_string())}
    )


def _write_file(groups: pa.Table, fs: fsspec.AbstractFileSystem, root: str) -> pa.Table:
    """Ray task: the row groups of one file to storage; the file's entry of the manifest and the sum of the facts."""
    (path,), (split,) = set(groups["file"].to_pylist()), set(groups["split"].to_pylist())
    facts = Facts()
    for text in groups["facts"].to_pylist():
        facts.add(Facts.from_json(text))
    tables = (_from_ipc(data.as_buffer()) for data in groups["rows"])
    file = shards.write_shard(fs, root, path, split, tables)
    if not file.rows:
        fs.rm(f"{root}/{path}")  # every row went to quarantine
    order = groups["order"][0].as_py()
    return pa.table({"order": [order], "file": [json.dumps(asdict(file))], "facts": [facts.to_json()]})


def _to_ipc(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _from_ipc(data: Any) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()


def _done(counter: Any) -> int | None:
    with contextlib.suppress(ray.exceptions.RayError):
        num: int = ray.get(counter.done.remote(), timeout=5)
        return num
    return None


class _Counter:
    """Actor: images done, for the progress bar. Losing it loses nothing."""

    def __init__(self) -> None:
        self._done = 0

    def add(self, num: int) -> None:
        self._done += num

    def done(self) -> int:
        return self._done


def _finish(
    config: PrepareConfig,
    rows: pa.Table,
    files: list[ShardFile],
    facts: Facts,
    fs: fsspec.AbstractFileSystem,
    root: str,
    hashes: tuple[str, str],
) -> Manifest:
    """Quarantine, tokenizer, manifest. ValueError where more rows are unreadable than allowed."""
    rows_in, lost = rows.num_rows, len(facts.quarantined)
    reasons = Counter(reason for *_, reason in facts.quarantined)
    if lost > config.quarantine.max_ratio * rows_in:
        shown = "; ".join(f"{num} rows: {reason}" for reason, num in reasons.most_common(5))
        raise ValueError(
            f"{lost} of {rows_in} rows can't be read ({shown}), more than "
            f"quarantine.max_ratio={config.quarantine.max_ratio} allows. The first is "
            f"image {facts.quarantined[0][1]!r}. Check the paths of the source, or allow more"
        )
    others = [_write_quarantine(facts, fs, root), *write_vocabulary(files, config.vocabulary, fs, root)]
    gone = {image_id for _, image_id, _, _ in facts.quarantined}
    columns = (rows[name].to_pylist() for name in ("split", "patient_id", "image_id"))
    kept = {(split, patient) for split, patient, image_id in zip(*columns, strict=True) if image_id not in gone}
    splits = {split: sum(f.rows for f in files if f.split == split) for split in SPLITS}
    manifest = Manifest(
        package_version=medim_ray.__version__,
        config_hash=hashes[0],
        input_hash=hashes[1],
        rows_in=rows_in,
        rows_out=sum(splits.values()),
        rows_quarantined=lost,
        splits=splits,
        sources={config.source.name: sum(splits.values())},
        quarantine=dict(sorted(reasons.items())),
        flags=dict(sorted(facts.flags.items())),
        patients={split: sum(s == split for s, _ in kept) for split in SPLITS},
        labels={name: dict(sorted(counts.items())) for name, counts in sorted(facts.labels.items())},
        intensity=facts.mean_std(),
        files=tuple(files),
        other_files=tuple(others),
    )
    assert manifest.rows_in == manifest.rows_out + manifest.rows_quarantined, "rows went missing"
    with fs.open(f"{root}/{shards.MANIFEST}", "wb") as file:
        file.write(manifest.to_json().encode())
    return manifest


def _write_quarantine(facts: Facts, fs: fsspec.AbstractFileSystem, root: str) -> OtherFile:
    names = shards.QUARANTINE_SCHEMA.names
    rows = [dict(zip(names, entry[1:], strict=True)) for entry in facts.quarantined]
    return shards.write_table(fs, root, shards.QUARANTINE, pa.Table.from_pylist(rows, schema=shards.QUARANTINE_SCHEMA))


def _summary(config: PrepareConfig, manifest: Manifest, salt: str, *, already_prepared: bool) -> PrepareSummary:
    notices = []
    if not salt:
        notices.append(f"patient ids are hashed without a secret; set {SALT_VARIABLE} before sharing the shards")
    if num := manifest.flags.get(NO_PATIENT):
        notices.append(f"{num} rows have no patient id: each counts as a patient of its own")
    if num := manifest.flags.get(NO_REPORT):
        notices.append(f"{num} rows have no report; they are kept, flagged {NO_REPORT!r}")
    if not any(file.path.startswith(f"{shards.TOKENIZER}/") for file in manifest.other_files):
        notices.append(
            "the training reports share too few words for a vocabulary: text.name=bert can't use these shards"
        )
    return PrepareSummary(
        out=config.out,
        rows_in=manifest.rows_in,
        splits=manifest.splits,
        quarantine=manifest.quarantine,
        notices=tuple(notices),
        already_prepared=already_prepared,
    )
