"""Rows to files: every row once, in order, and no file or row group beyond its limit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medim_ray.data.layout import ShardConfig, cut

MIB = 2**20


@given(
    sizes=st.lists(st.integers(1, 400), max_size=200),
    rows_per_file=st.sampled_from([None, 12, 36]),
    file_bytes=st.sampled_from([None, 1500, 5000]),
    row_group_rows=st.sampled_from([None, 4, 6]),
    row_group_bytes=st.sampled_from([None, 700]),
)
def test_every_row_lies_in_one_file_within_the_limits(
    sizes: list[int],
    rows_per_file: int | None,
    file_bytes: int | None,
    row_group_rows: int | None,
    row_group_bytes: int | None,
) -> None:
    if row_group_bytes is None and row_group_rows is None:
        row_group_rows = 4
    config = ShardConfig(
        rows_per_file=rows_per_file,
        file_bytes=file_bytes,
        row_group_rows=row_group_rows,
        row_group_bytes=row_group_bytes,
    )
    files = cut("val", np.array(sizes, dtype=np.int64), config, first_number=3)
    assert [file.path for file in files] == [f"val/{3 + k:05d}.parquet" for k in range(len(files))]
    at = 0
    for file in files:
        assert file.first == at and min(file.row_groups) > 0
        for rows in file.row_groups:
            held = sum(sizes[at : at + rows])
            assert rows <= config.max_group_rows and (rows == 1 or held <= (row_group_bytes or held))
            at += rows
        of_file = sizes[file.first : at]
        assert len(of_file) <= config.max_rows
        assert len(file.row_groups) == 1 or sum(of_file) <= (file_bytes or sum(of_file))
    assert at == len(sizes)


def test_files_of_128_mib_and_row_groups_of_8_mib() -> None:
    sizes = np.random.default_rng(0).integers(25_000, 55_000, 40_000)
    config = ShardConfig(file_bytes=128 * MIB, row_group_bytes=8 * MIB)
    files = cut("train", sizes, config, first_number=0)
    held = [sizes[f.first : f.first + sum(f.row_groups)].sum() for f in files]
    assert all(112 * MIB < size <= 128 * MIB for size in held[:-1])
    groups = np.concatenate([f.row_groups[:-1] for f in files])
    assert (groups * 40_000 > 7 * MIB).all() and (groups * 40_000 < 9 * MIB).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows_per_file": 100}, r"rows_per_file=100 is not a multiple of row_group_rows=64: use rows_per_file=128"),
        ({"file_bytes": 0}, "file_bytes=0: at least 1"),
        ({"file_bytes": MIB, "row_group_bytes": 2 * MIB}, "a file holds whole row groups"),
    ],
)
def test_limits_that_do_not_fit_say_so(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShardConfig(**options)
