"""Shard sets of shard sets: nothing is lost, nothing leaks, every checksum holds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medim_ray.cli import main
from medim_ray.config.loader import load
from medim_ray.config.schema import RunConfig
from medim_ray.data.images import decode
from medim_ray.data.shards import SCHEMA, ShardSet, verify
from medim_ray.train.build import stream_plan
from tests.unit.data.test_shards import write_set


def run(*args: str | Path) -> int:
    return main(["shards", *map(str, args)])


def test_a_merged_set_holds_the_bytes_of_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = write_set(tmp_path / "a"), write_set(tmp_path / "b c", first=100)
    assert run("merge", one, two, f"out={tmp_path}/out") == 0
    assert "32 rows (train 26, test 6) in 4 files" in capsys.readouterr().out
    assert verify(str(tmp_path / "out")) == [] and run("verify", tmp_path / "out") == 0
    assert (tmp_path / "out/train/00001.parquet").read_bytes() == (two / "train/00000.parquet").read_bytes()
    merged, manifest = (
        ShardSet.open(str(tmp_path / "out")).read_rows("train", SCHEMA.names),
        ShardSet.open(str(one)).manifest,
    )
    both = [ShardSet.open(str(part)).read_rows("train", SCHEMA.names) for part in (one, two)]
    assert merged.to_pylist() == pa.concat_tables(both).to_pylist()
    assert ShardSet.open(str(tmp_path / "out")).manifest.labels["view"]["PA"] == 2 * manifest.labels["view"]["PA"]
    assert run("merge", one, two, f"out={tmp_path}/out") == 2
    assert "is not empty" in capsys.readouterr().err


def test_a_run_mixes_a_merged_set_by_weight(tmp_path: Path) -> None:
    assert (
        run("merge", write_set(tmp_path / "mimic"), write_set(tmp_path / "own", first=100), f"out={tmp_path}/out") == 0
    )
    options = ["train.global_batch=4", f"data.shards={tmp_path}/out"]
    config = load(RunConfig, None, [*options, "data.weights={mimic: 3, own: 1}"])
    plan = stream_plan(config, ShardSet.open(f"{tmp_path}/out"))
    rows = np.concatenate([plan.step_rows(step) for step in range(100)])
    assert plan.shares == (0.75, 0.25) and ((rows < 13).sum(), (rows >= 13).sum()) == (300, 100)
    for weights, message in (("{mimic: 3}", "the origins in .*: mimic, own"), ("{mimic: 0}", "mimic=0.*above 0")):
        with pytest.raises(ValueError, match=message):
            stream_plan(load(RunConfig, None, [*options, f"data.weights={weights}"]), ShardSet.open(f"{tmp_path}/out"))
    with pytest.raises(ValueError, match="it is no merged set"):
        stream_plan(config, ShardSet.open(str(tmp_path / "own")))


def test_sets_that_share_images_or_leak_are_not_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_set(tmp_path / "a")
    for first, message in ((0, "16 image ids are in more than one set"), (12, "in more than one set")):
        other = write_set(tmp_path / f"b{first}", first=first)
        assert run("merge", one, other, f"out={tmp_path}/out") == 2
        assert message in capsys.readouterr().err
    for column, message in (
        ("patient_id", "patients are in one split here"),
        ("pixel_hash", "copies in another split"),
    ):
        write_set(tmp_path / column, first=100)
        swap = {f"{0:016x}": f"{120:016x}", f"{0:032x}": f"{120:032x}"}
        _rewrite(tmp_path / column, column, {new: old for old, new in swap.items()})
        assert run("merge", one, tmp_path / column, f"out={tmp_path}/out") == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_sets_of_different_salts_are_not_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    salts = {"a": "one", "b": "two", "c": "one", "old": ""}
    sets = [write_set(tmp_path / name, 100 * k, salt) for k, (name, salt) in enumerate(salts.items())]
    assert run("merge", *sets[:2], f"out={tmp_path}/out") == 2
    assert "were prepared with different salts, so one patient may have two ids" in capsys.readouterr().err
    for others, mark in ((sets[2], "one"), (sets[3], "")):
        assert run("merge", sets[0], others, f"out={tmp_path}/out{mark}") == 0
        assert ShardSet.open(f"{tmp_path}/out{mark}").manifest.salt_mark == mark


def test_a_sample_of_a_merged_set_knows_its_origins(tmp_path: Path) -> None:
    parts = [write_set(tmp_path / name, 100 * k) for k, name in enumerate(("mimic", "own", "third"))]
    assert run("merge", *parts, f"out={tmp_path}/all") == 0
    assert run("sample", f"{tmp_path}/all", f"out={tmp_path}/part", "rows=24") == 0
    part = ShardSet.open(f"{tmp_path}/part")
    assert verify(part.url) == [] and part.num_rows() == 24
    assert {file.origin for file in part.files("train")} == {"mimic", "own", "third"}
    for file in part.files():
        with part.arrow_fs().open_input_file(part.path(file)) as raw:
            ids = pq.read_table(raw, columns=["image_id"])["image_id"].to_pylist()
        assert len(ids) == file.rows > 0
        assert {int(name[1:]) // 100 for name in ids} == {("mimic", "own", "third").index(file.origin)}


def _rewrite(root: Path, column: str, values: dict[str, str]) -> None:
    """Other values in the test file; merge looks at checksums when it copies, after the conflicts."""
    path = root / "test/00000.parquet"
    table = pq.read_table(path)
    changed = pa.array([values.get(value, value) for value in table[column].to_pylist()])
    pq.write_table(table.set_column(table.schema.get_field_index(column), column, changed), path)


def test_a_damaged_file_is_not_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = write_set(tmp_path / "a"), write_set(tmp_path / "b", first=100)
    data = bytearray((two / "train/00000.parquet").read_bytes())
    data[len(data) // 3] ^= 1  # among the pixels
    (two / "train/00000.parquet").write_bytes(data)
    assert run("merge", one, two, f"out={tmp_path}/out") == 2
    assert "train/00000.parquet" in capsys.readouterr().err
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


def test_a_sample_keeps_the_shares_and_is_a_function_of_the_seed(tmp_path: Path) -> None:
    one = write_set(tmp_path / "a")
    ids = []
    for name, seed in (("x", 0), ("y", 0), ("z", 1)):
        assert run("sample", one, f"out={tmp_path}/{name}", "rows=8", f"seed={seed}") == 0
        assert verify(str(tmp_path / name)) == []
        part = ShardSet.open(str(tmp_path / name))
        assert part.num_rows() == 8 and part.num_rows("test") in (1, 2)
        full = {row["image_id"]: row for row in ShardSet.open(str(one)).read_rows(None, SCHEMA.names).to_pylist()}
        rows = part.read_rows(None, SCHEMA.names).to_pylist()
        assert all(full[row["image_id"]] == row for row in rows)
        pixels = np.concatenate([decode(row["image"]).ravel() for row in rows if row["split"] == "train"]) / 255
        assert part.manifest.intensity["pixels"] == pixels.size
        assert part.manifest.intensity["mean"] == pytest.approx(pixels.mean())
        ids.append([row["image_id"] for row in rows])
    assert ids[0] == ids[1] != ids[2]
    assert (tmp_path / "x/train/00000.parquet").read_bytes() == (tmp_path / "y/train/00000.parquet").read_bytes()
    assert run("sample", one, f"out={tmp_path}/w", "rows=17") == 2


def test_stats_say_what_a_set_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_set(tmp_path / "a")
    assert run("stats", one, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["splits"] == {"train": 13, "test": 3} and found["files"]["num_row_groups"] == 3
    assert run("stats", one) == 0
    assert "rows: 16 in = 16 in shards + 0 in quarantine + 0 skipped as duplicates" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["merge", "{set}", "out=x"], "at least two"),
        (["merge", "{set}", "{set}"], "out is not set"),
        (["sample", "{set}", "{set}", "out=x"], "name one shard set"),
        (["stats", "{set}", "out=x"], "writes nothing"),
        (["stats", "{set}/no"], "not a finished shard set"),
        (["verify", "gs://x/y"], "pip install gcsfs"),
    ],
)
def test_wrong_calls_say_what_is_wrong(
    args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_set(tmp_path / "a")
    assert run(*(arg.replace("{set}", str(root)) for arg in args)) == 2
    captured = capsys.readouterr()
    assert message in captured.err + captured.out
