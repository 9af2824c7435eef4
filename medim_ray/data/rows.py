"""Rows of shard files by their place in the corpus: read a row group at a time, checked, decoded. No Ray in here.

A row that is damaged (bit rot) is replaced by the next entry of the plan that is good, which depends on plan and shards
alone. A file that is gone or cut off is no matter of single rows: it ends the stream with a message.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from numpy.typing import NDArray

from medim_ray.data.fingerprint import row_checksum
from medim_ray.data.plan import Block, RowGroup, StreamPlan

COLUMNS = ("image_id", "image", "report", "height", "width", "checksum")
_JPEG = b"\xff\xd8"  # how a JPEG begins
_REDUCED = {1: cv2.IMREAD_REDUCED_GRAYSCALE_2, 2: cv2.IMREAD_REDUCED_GRAYSCALE_4, 3: cv2.IMREAD_REDUCED_GRAYSCALE_8}
_VERIFY = "`medim-ray shards verify` tells what is damaged; restore it from a copy, or run `medim-ray prepare` again"


class ShardFaultError(ValueError):
    """Files of the shard set are gone or cut off, or too many of their rows are damaged; the message has the fix."""


class BadRowError(ValueError):
    """One row can't be used; the message is the reason."""


@dataclass(frozen=True)
class BrokenRow:
    """A row of the shards that could not be used. shard: path of the file in the set; row: its place in the file;
    image_id: "" where it can't be read either."""

    shard: str
    row: int
    image_id: str
    reason: str


class Row(NamedTuple):
    """A decoded row. image_HW: [H, W] uint8; height, width: of the stored image, which may be larger."""

    image_id: str
    image_HW: NDArray[np.uint8]
    report: str
    height: int
    width: int


def decode_gray(encoded: Any, image_id: str, shrink: float = 1.0) -> NDArray[np.uint8]:
    """[H, W] uint8 of an encoded 8- or 16-bit grayscale image; ValueError names the image if it can't be decoded.

    encoded: anything with a buffer of bytes. shrink: what it will be reduced by at least; a JPEG is decoded at 1/2, 1/4
    or 1/8 of its size where that is no more than this (libjpeg's scaled inverse transform).
    """
    pixels = np.frombuffer(encoded, dtype=np.uint8)
    # Within 2 % of simplejpeg and imagecodecs, which wrap the same library (benchmarks/decoders.py).
    flags = cv2.IMREAD_GRAYSCALE | cv2.IMREAD_ANYDEPTH
    if shrink >= 2 and bytes(pixels[:2]) == _JPEG:
        flags = _REDUCED[min(int(math.log2(shrink)), 3)]
    image = cv2.imdecode(pixels, flags) if pixels.size else None
    if image is None:
        raise ValueError(f"image {image_id!r} can't be decoded: run `medim-ray shards verify` on data.shards")
    if image.dtype == np.uint16:
        image = (image >> 8).astype(np.uint8)
    return image


class ShardFiles(NamedTuple):
    """Files of a split in order. root: folder of the set; paths below it; sizes: bytes that the manifest tells."""

    root: str
    paths: Sequence[str]
    sizes: Sequence[int]
    filesystem: pafs.FileSystem


class RowStore:
    """Row groups of Parquet files; the last `num_groups` that were read are kept, and as many files open.

    num_read: row groups read so far.
    """

    def __init__(self, files: ShardFiles, columns: Sequence[str], num_groups: int) -> None:
        self._files = files
        self._columns = list(columns)
        self._num_groups = num_groups
        self._open: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], pa.Table | BadRowError] = OrderedDict()
        self.num_read = 0

    def group(self, file: int, index: int) -> pa.Table:
        """Row group `index` of file number `file`, those of the store's columns that it has.

        BadRowError: its bytes are there, but damaged beyond reading. ShardFaultError: the file is gone or cut off.
        """
        key = (file, index)
        if key not in self._groups:
            self.num_read += 1
            self._groups[key] = self._read(file, index)
            while len(self._groups) > self._num_groups:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        table = self._groups[key]
        if isinstance(table, BadRowError):
            raise table
        return table

    def _read(self, file: int, index: int) -> pa.Table | BadRowError:
        try:
            return self._table(self._file(file), index)
        except (pa.ArrowException, OSError):
            # Damaged bytes, or storage that failed just now? Only what was read whole may be judged.
            self._open.pop(file, None)
            data = self._bytes(file)
            try:
                return self._table(self._parquet(pa.BufferReader(data), file), index)
            except (pa.ArrowException, OSError):
                return BadRowError("its row group can't be read")

    def _table(self, parquet: pq.ParquetFile, index: int) -> pa.Table:
        present = [name for name in self._columns if name in parquet.schema_arrow.names]
        table = parquet.read_row_group(index, columns=present, use_threads=False).combine_chunks()
        if table.num_rows != parquet.metadata.row_group(index).num_rows:
            raise pa.ArrowInvalid("rows are missing")
        return table

    def _file(self, number: int) -> pq.ParquetFile:
        if number not in self._open:
            self._open[number] = self._parquet(self._input(number), number)
            while len(self._open) > self._num_groups:
                self._open.popitem(last=False)[1].close(force=True)
        self._open.move_to_end(number)
        return self._open[number]

    def _parquet(self, source: Any, number: int) -> pq.ParquetFile:
        try:
            parquet = pq.ParquetFile(source, pre_buffer=True)
            if "checksum" in parquet.schema_arrow.names:
                return parquet
            source.seek(0)  # a set of an earlier schema: pages have checksums there, rows have none
            return pq.ParquetFile(source, pre_buffer=True, page_checksum_verification=True)
        except pa.ArrowInvalid:
            raise ShardFaultError(f"{self._name(number)} is damaged at its end: {_VERIFY}") from None

    def _input(self, number: int) -> Any:
        """The open file; ShardFaultError where it is not what the manifest tells."""
        try:
            source = self._files.filesystem.open_input_file(f"{self._files.root}/{self._files.paths[number]}")
        except FileNotFoundError:
            raise ShardFaultError(f"{self._name(number)} is missing: {_VERIFY}") from None
        if source.size() != self._files.sizes[number]:
            has, told = source.size(), self._files.sizes[number]
            raise ShardFaultError(f"{self._name(number)} has {has} bytes instead of {told}: {_VERIFY}")
        return source

    def _bytes(self, number: int) -> pa.Buffer:
        with self._input(number) as source:
            return source.read_buffer()

    def _name(self, number: int) -> str:
        return f"data.shards: {self._files.paths[number]}"


def row_of(table: pa.Table, place: int) -> tuple[str, pa.Buffer, str]:
    """Image id, encoded image and report of a row; BadRowError where its checksum does not fit."""
    values = [table.column(name).chunk(0)[place] for name in ("image_id", "image", "report")]
    if not all(value.is_valid for value in values):
        raise BadRowError("a value is missing")
    if "checksum" in table.column_names:
        stored = table.column("checksum").chunk(0)[place]
        if stored.is_valid and stored.as_py() != row_checksum(*(value.as_buffer() for value in values)):
            raise BadRowError("its checksum does not fit")
    image_id, image, report = values
    try:
        return image_id.as_py(), image.as_buffer(), report.as_py()
    except UnicodeDecodeError:
        raise BadRowError("its text is no UTF-8") from None


@dataclass(kw_only=True)
class Read:
    """The rows of a block. block: what was read, broken rows replaced; broken: place in the block -> rows that could
    not be used there; read_s, decode_s: seconds."""

    rows: list[Row]
    block: Block
    broken: dict[int, list[BrokenRow]]
    read_s: float
    decode_s: float

    def broken_records(self) -> list[list[dict[str, Any]]]:
        """`broken` as plain values, a list a place."""
        return [[asdict(one) for one in self.broken.get(place, [])] for place in range(len(self.rows))]


class PlannedRows:
    """Callable: a block of the plan -> its decoded rows, each row group touched once.

    max_broken_ratio: share of the corpus; ShardFaultError where this reader alone has met more broken rows than that.
    shrink: (height, width) -> what an image will be reduced by at least; None: it is decoded in full.
    """

    def __init__(
        self,
        plan: StreamPlan,
        files: ShardFiles,
        max_broken_ratio: float,
        shrink: Callable[[int, int], float] | None = None,
    ) -> None:
        self._plan, self._files, self._max_broken_ratio, self._shrink = plan, files, max_broken_ratio, shrink
        self.store = RowStore(files, COLUMNS, num_groups=2 * plan.window_groups)
        self._broken: dict[tuple[int, int], BrokenRow] = {}
        self._decode_s = 0.0

    def __call__(self, block: Block) -> Read:
        started, self._decode_s = time.perf_counter(), 0.0
        rows_K, epochs_K = block.rows_K.copy(), block.epochs_K.copy()
        rows: list[Row | None] = [None] * len(rows_K)
        broken: dict[int, list[BrokenRow]] = {}
        groups_K, within_K = self._plan.locate(rows_K)
        for place in np.argsort(groups_K, kind="stable").tolist():
            try:
                rows[place] = self._row(int(groups_K[place]), int(within_K[place]))
            except BadRowError as error:
                broken[place] = [self._note(int(groups_K[place]), int(within_K[place]), error)]
        for place, met in broken.items():
            step, position = int(block.steps_K[place]), int(block.positions_K[place])
            for row, epoch in self._plan.substitutes(step, position):
                group, within = (int(value[0]) for value in self._plan.locate(np.array([row])))
                try:
                    rows[place], rows_K[place], epochs_K[place] = self._row(group, within), row, epoch
                    break
                except BadRowError as error:
                    met.append(self._note(group, within, error))
        good = [row for row in rows if row is not None]
        if len(good) < len(rows):
            raise ShardFaultError(f"data.shards: no row of the split can be used: {_VERIFY}")
        return Read(
            rows=good,
            block=replace(block, rows_K=rows_K, epochs_K=epochs_K),
            broken=broken,
            read_s=time.perf_counter() - started - self._decode_s,
            decode_s=self._decode_s,
        )

    def _row(self, group: int, within: int) -> Row:
        if (group, within) in self._broken:
            raise BadRowError(self._broken[group, within].reason)
        row_group = self._plan.row_groups[group]
        table = self.store.group(row_group.file, row_group.index)
        image_id, encoded, report = row_of(table, within)
        height, width = (table.column(name).chunk(0)[within].as_py() for name in ("height", "width"))
        started = time.perf_counter()
        try:
            image_HW = decode_gray(encoded, image_id, self._shrink(height, width) if self._shrink else 1.0)
        except (ValueError, cv2.error):
            raise BadRowError("its image can't be decoded") from None
        finally:
            self._decode_s += time.perf_counter() - started
        times = max(1, round(height / len(image_HW)))  # 1, 2, 4 or 8
        if times > 8 or not all(
            0 <= side * times - stored < times for side, stored in zip(image_HW.shape, (height, width), strict=True)
        ):
            raise BadRowError("its image has another size than is told")
        return Row(image_id, image_HW, report, height, width)

    def _note(self, group: int, within: int, error: BadRowError) -> BrokenRow:
        """Remembers a row that can't be used; ShardFaultError where that makes them too many."""
        key, total = (group, within), int(self._plan.starts_G[-1])
        if key not in self._broken:
            row_group = self._plan.row_groups[group]
            before = int(self._plan.starts_G[group] - self._plan.starts_G[group - row_group.index])
            image_id = self._image_id(row_group, within)
            path = self._files.paths[row_group.file]
            self._broken[key] = BrokenRow(path, before + within, image_id, str(error))
        if len(self._broken) > self._max_broken_ratio * total:
            shard = self._broken[key].shard
            raise ShardFaultError(too_many(len(self._broken), total, self._max_broken_ratio, shard))
        return self._broken[key]

    def _image_id(self, row_group: RowGroup, within: int) -> str:
        """The id of a broken row, as far as it can be read."""
        try:
            found = self.store.group(row_group.file, row_group.index).column("image_id").chunk(0)[within].as_py()
        except (BadRowError, UnicodeDecodeError):
            return ""
        return str(found or "")


def too_many(num: int, total: int, max_ratio: float, shard: str) -> str:
    """What a run is told that stops for its broken rows; shard: where one of them lies."""
    return (
        f"{num} of {total} rows of data.shards are broken, more than data.max_broken_ratio={max_ratio:g} allows "
        f"(one lies in {shard}): {_VERIFY}; or allow more of them"
    )
