"""Encoded rows to files and row groups: a function of their order and sizes alone. Knows no storage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

_ROWS_PER_FILE, _ROW_GROUP_ROWS = 4096, 64


@dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """How rows are cut into files; where rows and bytes are given, what is reached first ends a file or row group."""

    rows_per_file: int | None = field(
        default=None,
        metadata={"help": "rows of a Parquet file; null: 4096 (of 512 px: 200 MB), no limit where file_bytes is set"},
    )
    row_group_rows: int | None = field(
        default=None,
        metadata={"help": "rows of a row group, read at once by the stream; null: 64, or as row_group_bytes says"},
    )
    file_bytes: int | None = field(
        default=None,
        metadata={"help": "bytes of a Parquet file, e.g. 134217728 (128 MiB); null: as rows_per_file says"},
    )
    row_group_bytes: int | None = field(
        default=None,
        metadata={"help": "bytes of a row group, e.g. 8388608 (8 MiB, one request to an object store); null: by rows"},
    )

    def __post_init__(self) -> None:
        for key in ("rows_per_file", "row_group_rows", "file_bytes", "row_group_bytes"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key}={value}: at least 1, or null")
        if self.row_group_bytes is None:
            up = -(-self.max_rows // self.max_group_rows) * self.max_group_rows
            if self.rows_per_file is not None and up != self.rows_per_file:
                raise ValueError(
                    f"rows_per_file={self.rows_per_file} is not a multiple of row_group_rows={self.max_group_rows}: "
                    f"use rows_per_file={up}"
                )
        elif self.file_bytes is not None and self.row_group_bytes > self.file_bytes:
            raise ValueError(
                f"row_group_bytes={self.row_group_bytes} is more than file_bytes={self.file_bytes}: a file holds whole "
                "row groups; use a fraction of file_bytes"
            )

    @property
    def max_rows(self) -> int:
        """Rows after which a file ends."""
        return self.rows_per_file or (_ROWS_PER_FILE if self.file_bytes is None else 2**62)

    @property
    def max_group_rows(self) -> int:
        """Rows after which a row group ends."""
        return self.row_group_rows or (_ROW_GROUP_ROWS if self.row_group_bytes is None else 2**62)


@dataclass(frozen=True, kw_only=True)
class FilePlan:
    """A file to write: the rows [first, first + sum(row_groups)) of its split, in these row groups."""

    path: str
    split: str
    first: int
    row_groups: tuple[int, ...]


def cut(split: str, num_bytes_N: NDArray[np.int64], config: ShardConfig, first_number: int) -> list[FilePlan]:
    """The files of the N rows of a split, numbered from `first_number`; num_bytes_N: what each row takes."""
    groups = _groups(num_bytes_N, config)
    before_N = np.concatenate([[0], np.cumsum(num_bytes_N)]).tolist()
    files: list[FilePlan] = []
    first, held = 0, list[int]()

    def close() -> None:
        nonlocal first, held
        path = f"{split}/{first_number + len(files):05d}.parquet"
        files.append(FilePlan(path=path, split=split, first=first, row_groups=tuple(held)))
        first, held = first + sum(held), []

    for rows in groups:
        end = first + sum(held) + rows
        too_large = config.file_bytes is not None and before_N[end] - before_N[first] > config.file_bytes
        if held and (too_large or end - first > config.max_rows):
            close()
        held.append(rows)
    if held:
        close()
    return files


def _groups(num_bytes_N: NDArray[np.int64], config: ShardConfig) -> Sequence[int]:
    """Rows of each row group."""
    if config.row_group_bytes is None:
        whole, rest = divmod(len(num_bytes_N), config.max_group_rows)
        return [config.max_group_rows] * whole + ([rest] if rest else [])
    groups, rows, held = [], 0, 0
    for size in num_bytes_N.tolist():
        if rows and (held + size > config.row_group_bytes or rows == min(config.max_group_rows, config.max_rows)):
            groups.append(rows)
            rows, held = 0, 0
        rows, held = rows + 1, held + size
    return [*groups, rows] if rows else groups
