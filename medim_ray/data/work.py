"""What an unfinished `prepare` keeps in OUT/.prepare, so that the same command goes on: encoded rows and what they are.

    job.json                 the job it belongs to
    lease.json               who is at work (lease.py)
    parts/NNNNNNN.arrow      the encoded rows of one run of the plan, until every file that needs them is written
    parts/NNNNNNN.json       that they were encoded, and PartFacts; written after them
    files/SPLIT-NNNNN.json   that this file of the set is written: its entry of the manifest and its RowCounts
All of it is a function of the job, so that it does not matter who wrote it. Knows no Ray.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from medim_ray.data import shards
from medim_ray.data.encode import PartFacts, RowCounts
from medim_ray.data.layout import FilePlan
from medim_ray.data.shards import ShardFile
from medim_ray.data.storage import committed, is_local, sizes

_CACHED_PARTS = 3


@dataclass(frozen=True, kw_only=True)
class WrittenFile:
    """A finished file of the set and what its rows added up to."""

    file: ShardFile
    counts: RowCounts

    def to_json(self) -> str:
        """Text for `from_json`."""
        return json.dumps({"file": asdict(self.file), "counts": vars(self.counts)})

    @classmethod
    def from_json(cls, text: str | bytes) -> WrittenFile:
        """The entry that `to_json` wrote."""
        tree = json.loads(text)
        file = ShardFile.from_tree(tree["file"])
        counts = RowCounts()
        counts.add(tree["counts"]["flags"], tree["counts"]["labels"])
        return cls(file=file, counts=counts)


class WorkFolder:
    """Pickled into tasks."""

    def __init__(self, fs: fsspec.AbstractFileSystem, root: str) -> None:
        self.fs, self.root = fs, root
        self.folder = f"{root}/{shards.WORK}"

    @property
    def lease(self) -> str:
        """Path of the lease."""
        return f"{self.folder}/lease.json"

    def job(self) -> dict[str, Any] | None:
        """The unfinished job that lies here, if there is one."""
        self.fs.invalidate_cache()
        try:
            tree: dict[str, Any] = json.loads(self.fs.cat_file(f"{self.folder}/job.json"))
        except FileNotFoundError:
            return None
        return tree

    def begin(self, job: Mapping[str, Any]) -> None:
        """Makes this the folder of `job`."""
        self._write("job.json", json.dumps(job).encode())

    def write_part(self, number: int, rows: pa.Table, facts: PartFacts) -> None:
        """Commits a part: rows first, then that they are there."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, rows.schema) as writer:
            writer.write_table(rows)
        data = sink.getvalue()
        self._write(f"parts/{number:07d}.arrow", data)
        self._write(f"parts/{number:07d}.json", json.dumps({"arrow_bytes": data.size, **vars(facts)}).encode())

    def parts(self) -> tuple[dict[int, PartFacts], set[int]]:
        """The facts of every part that was encoded, and the numbers of those whose rows are (still) here, whole."""
        found = sizes(self.fs, f"{self.folder}/parts")
        names = sorted(name for name in found if name.endswith(".json"))
        facts: dict[int, PartFacts] = {}
        whole: set[int] = set()
        for name, data in zip(names, self._cat([f"parts/{name}" for name in names]), strict=True):
            tree = json.loads(data)
            number = int(name.removesuffix(".json"))
            if found.get(f"{number:07d}.arrow") == tree.pop("arrow_bytes"):
                whole.add(number)
            facts[number] = PartFacts.from_tree(tree)
        return facts, whole

    def has_parts(self) -> bool:
        """Whether anything was encoded; assumed where the storage does not answer."""
        try:
            return any(name.endswith(".json") for name in sizes(self.fs, f"{self.folder}/parts"))
        except Exception:  # whatever the storage raises: nothing may be removed then
            return True

    def drop_parts(self, numbers: Iterable[int]) -> None:
        """Frees the rows of parts that no file needs any more."""
        for number in numbers:
            self.fs.rm(f"{self.folder}/parts/{number:07d}.arrow")

    def write_file(self, plan: FilePlan, parts_K: NDArray[np.int64], places_K: NDArray[np.int64]) -> WrittenFile:
        """Writes one file of the set from rows of parts (row k: place `places_K[k]` of part `parts_K[k]`)."""
        counts = RowCounts()

        def groups() -> Iterator[pa.Table]:
            store, at = _PartStore(self), 0
            for rows in plan.row_groups:
                table = store.rows(parts_K[at : at + rows], places_K[at : at + rows], plan.split)
                counts.count(table)
                yield table
                at += rows

        file = shards.write_shard(self.fs, self.root, plan.path, plan.split, groups())
        written = WrittenFile(file=file, counts=counts)
        self._write(_entry(plan.path), written.to_json().encode())
        return written

    def files(self, plans: Sequence[FilePlan]) -> dict[str, WrittenFile]:
        """Path -> entry of those of the planned files that are written, whole."""
        entries = sizes(self.fs, f"{self.folder}/files")
        listed = [plan for plan in plans if _entry(plan.path).partition("/")[2] in entries]
        if not listed:
            return {}
        there = {f"{split}/{name}": size for split in {p.split for p in listed} for name, size in self._sizes(split)}
        written = {}
        for plan, data in zip(listed, self._cat([_entry(plan.path) for plan in listed]), strict=True):
            entry = WrittenFile.from_json(data)
            if there.get(plan.path) == entry.file.bytes and entry.file.row_groups == plan.row_groups:
                written[plan.path] = entry
        return written

    def remove(self) -> None:
        """The whole folder."""
        self.fs.invalidate_cache()
        if self.fs.exists(self.folder):
            self.fs.rm(self.folder, recursive=True)

    def read_part(self, number: int) -> pa.Table:
        """The rows of a part; from a local disk only what is touched is read."""
        path = f"{self.folder}/parts/{number:07d}.arrow"
        source = pa.memory_map(path) if is_local(self.fs) else pa.BufferReader(self.fs.cat_file(path))
        return pa.ipc.open_file(source).read_all()

    def _sizes(self, split: str) -> Iterable[tuple[str, int]]:
        return sizes(self.fs, f"{self.root}/{split}").items()

    def _cat(self, names: Sequence[str]) -> list[bytes]:
        paths = [f"{self.folder}/{name}" for name in names]
        found = self.fs.cat(paths) if paths else {}
        return [found[path] for path in paths] if isinstance(found, dict) else [found]

    def _write(self, name: str, data: Any) -> None:
        with committed(self.fs, f"{self.folder}/{name}", f"{self.folder}/parts") as file:
            file.write(data)


class _PartStore:
    """Rows of parts, the last few parts kept open."""

    def __init__(self, work: WorkFolder) -> None:
        self._work = work
        self._open: OrderedDict[int, pa.Table] = OrderedDict()

    def rows(self, parts_K: NDArray[np.int64], places_K: NDArray[np.int64], split: str) -> pa.Table:
        """The rows in the order asked for, put into `split`."""
        edges = np.flatnonzero(np.diff(parts_K)) + 1
        runs = zip(np.split(parts_K, edges), np.split(places_K, edges), strict=True)
        tables = [self._part(int(parts[0])).take(pa.array(places)) for parts, places in runs]
        table = pa.concat_tables(tables)
        column = table.schema.get_field_index("split")
        return table.set_column(column, table.schema.field(column), pa.array([split] * table.num_rows, pa.string()))

    def _part(self, number: int) -> pa.Table:
        if number not in self._open:
            self._open[number] = self._work.read_part(number)
            while len(self._open) > _CACHED_PARTS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]


def _entry(path: str) -> str:
    """train/00003.parquet -> files/train-00003.json"""
    return f"files/{path.removesuffix('.parquet').replace('/', '-')}.json"
