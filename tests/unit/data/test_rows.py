"""Rows that turn out damaged: replaced by the plan alone, told by shard and row; files that are gone end the stream."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from medim_ray.data.fingerprint import row_checksum
from medim_ray.data.plan import RowGroup, StreamPlan
from medim_ray.data.rows import COLUMNS, PlannedRows, RowStore, ShardFaultError, ShardFiles
from medim_ray.data.shards import SCHEMA

FILES, GROUPS, ROWS, SIDE = 2, 3, 8, 24
NUM = FILES * GROUPS * ROWS


def image_of(row: int) -> bytes:
    pixels = np.random.default_rng(row).integers(0, 255, (SIDE, SIDE), dtype=np.uint8)
    return bytes(cv2.imencode(".jpg", pixels)[1].tobytes())


def row_values(row: int, checked: bool) -> dict[str, object]:
    image_id, report = f"i{row}", f"Report {row}."
    checksum = row_checksum(image_id.encode(), image_of(row), report.encode()) if checked else None
    values: dict[str, object] = {"image_id": image_id, "image": image_of(row), "report": report, "checksum": checksum}
    return values | {"height": SIDE, "width": SIDE}


def write(root: Path, checked: bool = True) -> ShardFiles:
    paths = []
    for file in range(FILES):
        schema = pa.schema([SCHEMA.field(name) for name in COLUMNS if checked or name != "checksum"])
        path = root / f"{file}.parquet"
        options = {"write_statistics": ["image_id"], "use_dictionary": False, "write_page_checksum": True}
        compression = {"image": "none", "image_id": "zstd", "report": "zstd"}  # as shards are written
        with pq.ParquetWriter(path, schema, compression=compression, **options) as out:
            for group in range(GROUPS):
                first = (file * GROUPS + group) * ROWS
                rows = [row_values(row, checked) for row in range(first, first + ROWS)]
                out.write_table(pa.Table.from_pylist(rows, schema=schema))
        paths.append(path)
    return ShardFiles(str(root), [p.name for p in paths], [p.stat().st_size for p in paths], pafs.LocalFileSystem())


def plan_of(window_steps: int = 2, granules: int = 4) -> StreamPlan:
    groups = [RowGroup(file=i // GROUPS, index=i % GROUPS, num_rows=ROWS) for i in range(FILES * GROUPS)]
    return StreamPlan(
        groups, seed=5, global_batch=8, granules_per_step=granules, shuffle_window=2, window_steps=window_steps
    )


def flip(root: Path, row: int) -> None:
    """One bit in the middle of the stored image."""
    path = root / f"{row // (GROUPS * ROWS)}.parquet"
    data, image = bytearray(path.read_bytes()), image_of(row)
    data[data.index(image) + len(image) // 2] ^= 4
    path.write_bytes(bytes(data))


def ids_of(plan: StreamPlan, files: ShardFiles, first_step: int, last_step: int, ratio: float = 0.2) -> list[list[str]]:
    """Image ids of each global step, as one reader gets them."""
    reader, ids = PlannedRows(plan, files, ratio), [[""] * plan.global_batch for _ in range(last_step)]
    for index in range(plan.num_blocks(first_step, last_step)):
        read = reader(plan.block(index, first_step))
        for row, step, position in zip(read.rows, read.block.steps_K, read.block.positions_K, strict=True):
            if step < last_step:
                ids[step][position] = row.image_id
    return ids[first_step:]


def test_a_damaged_row_is_replaced_by_the_same_entry_for_every_transport_and_start(tmp_path: Path) -> None:
    files, last = write(tmp_path), 12  # two epochs of six steps
    clean = ids_of(plan_of(), files, 0, last)
    broken = [3, 17, 30]
    for row in broken:
        flip(tmp_path, row)
    straight = ids_of(plan_of(), files, 0, last)
    for window_steps, granules, first in ((1, 4, 0), (3, 2, 0), (4, 1, 0), (2, 4, 5), (3, 8, 9)):
        assert ids_of(plan_of(window_steps, granules), files, first, last) == straight[first:]
    names = {f"i{row}" for row in broken}
    for step in range(last):
        assert not names & set(straight[step]), "a broken row went into a batch"
        assert len(set(straight[step])) == 8, "an image twice in a batch"
        changed = [k for k in range(8) if straight[step][k] != clean[step][k]]
        assert {clean[step][k] for k in changed} == names & set(clean[step]), "only broken rows are replaced"
        for k in changed:  # by the entry at the same place of the next step of the epoch, where that is good
            next_id = clean[step // 6 * 6 + (step + 1) % 6][k]
            assert next_id in names or straight[step][k] == next_id


def test_shard_row_and_reason_are_told_of_each_broken_row(tmp_path: Path) -> None:
    files = write(tmp_path)
    flip(tmp_path, 30)
    plan = plan_of(window_steps=6, granules=1)
    read = PlannedRows(plan, files, 0.2)(plan.block(0, 0))
    (met,) = [records for records in read.broken_records() if records]
    assert met == [{"shard": "1.parquet", "row": 6, "image_id": "i30", "reason": "its checksum does not fit"}]
    assert json.loads(json.dumps(met)) == met and read.read_s > 0 and read.decode_s > 0


def test_an_image_that_no_longer_decodes_is_a_broken_row(tmp_path: Path) -> None:
    files = write(tmp_path)
    table = pq.read_table(tmp_path / "0.parquet").to_pylist()
    for row, image in ((5, b"no image"), (6, image_of(6)[:40]), (7, b"")):
        checksum = row_checksum(f"i{row}".encode(), image, f"Report {row}.".encode())
        table[row] |= {"image": image, "checksum": checksum}
    rows = pa.Table.from_pylist(table, schema=pq.read_schema(tmp_path / "0.parquet"))
    pq.write_table(rows, tmp_path / "0.parquet", row_group_size=ROWS)
    files = files._replace(sizes=[p.stat().st_size for p in sorted(tmp_path.glob("*.parquet"))])
    plan = plan_of(window_steps=6, granules=1)
    met = PlannedRows(plan, files, 0.2)(plan.block(0, 0)).broken.values()
    assert {(one.image_id, one.reason) for (one, *_) in met} == {
        (f"i{row}", "its image can't be decoded") for row in (5, 6, 7)
    }


def test_too_many_broken_rows_stop_with_the_fix(tmp_path: Path) -> None:
    files = write(tmp_path)
    for row in (1, 2, 3):
        flip(tmp_path, row)
    assert ids_of(plan_of(), files, 0, 6, ratio=3 / NUM)
    with pytest.raises(ShardFaultError, match=r"3 of 48 rows.*data.max_broken_ratio=0.05.*shards verify.*allow more"):
        ids_of(plan_of(), files, 0, 6, ratio=0.05)
    for row in range(4, NUM):
        flip(tmp_path, row)
    flip(tmp_path, 0)
    with pytest.raises(ShardFaultError, match="no row of the split can be used"):
        ids_of(plan_of(), files, 0, 6, ratio=1.0)


def test_shards_without_row_checksums_are_judged_by_those_of_their_pages(tmp_path: Path) -> None:
    files = write(tmp_path, checked=False)
    clean = ids_of(plan_of(), files, 0, 6)
    flip(tmp_path, 17)
    plan = plan_of(window_steps=6, granules=1)
    read = PlannedRows(plan, files, 0.2)(plan.block(0, 0))
    rows = {one.row for met in read.broken.values() for one in met}
    assert rows == set(range(16, 24)), "the row group of the damaged page"
    assert {one.reason for met in read.broken.values() for one in met} == {"its row group can't be read"}
    assert {i for ids in clean for i in ids} - {f"i{row}" for row in rows} == {row.image_id for row in read.rows}


def test_files_that_are_gone_or_cut_off_are_told_apart_from_broken_rows(tmp_path: Path) -> None:
    files, path = write(tmp_path), tmp_path / "1.parquet"
    data = path.read_bytes()
    path.write_bytes(data[:-300])
    with pytest.raises(ShardFaultError, match=rf"1.parquet has {len(data) - 300} bytes instead of {len(data)}.*verify"):
        ids_of(plan_of(), files, 0, 6)
    path.write_bytes(data[:-300] + bytes(300))
    with pytest.raises(ShardFaultError, match=r"1.parquet is damaged at its end.*verify"):
        ids_of(plan_of(), files, 0, 6)
    path.unlink()
    with pytest.raises(ShardFaultError, match=r"1.parquet is missing.*verify"):
        ids_of(plan_of(), files, 0, 6)


def test_row_groups_are_read_once_an_epoch_and_one_after_the_other(tmp_path: Path) -> None:
    files = write(tmp_path)
    reads: list[tuple[int, int]] = []

    class Counting(RowStore):
        def _read(self, file: int, index: int) -> pa.Table:
            reads.append((file, index))
            return super()._read(file, index)

    plan = plan_of(window_steps=1)
    reader = PlannedRows(plan, files, 0.0)
    reader.store = Counting(files, COLUMNS, num_groups=2 * plan.window_groups)
    for index in range(plan.num_blocks(0, 6)):
        reader(plan.block(index, 0))
    assert Counter(reads) == dict.fromkeys([(f, g) for f in range(FILES) for g in range(GROUPS)], 1)
    order = [plan.row_groups[g] for g in dict.fromkeys(plan.locate(plan.epoch_order(0))[0].tolist())]
    windows = [{(one.file, one.index) for one in order[at : at + 2]} for at in range(0, len(order), 2)]
    assert [set(reads[at : at + 2]) for at in range(0, len(reads), 2)] == windows, (
        "reads follow the windows of the plan"
    )
    assert reader.store.num_read == FILES * GROUPS
