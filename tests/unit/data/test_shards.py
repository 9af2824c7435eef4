"""The shard format: what is written is read back, and every damage is found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medim_ray.cli import main
from medim_ray.data import shards
from medim_ray.data.shards import Manifest, ShardSet, verify, write_shard, write_table


def rows(first: int, num: int, split: str = "train") -> pa.Table:
    values: list[dict[str, Any]] = [
        {
            "image_id": f"i{k}",
            "patient_id": f"{k:016x}",
            "split": split,
            "source": "test",
            "view": "PA",
            "image": cv2.imencode(".png", np.full((4, 5), k % 256, np.uint8))[1].tobytes(),
            "height": 4,
            "width": 5,
            "bits": 8,
            "report": f"Secret words {k}.",
            "sections": dict.fromkeys(shards.SECTIONS, ""),
            "sentences": [f"Secret words {k}."],
            "labels": [("view", "PA")],
            "truth": [{"finding": "nodule", "side": "left", "zone": "upper", "sentence": 0, "mask": b"png"}],
            "flags": [],
            "pixel_hash": f"{k:032x}",
            "perceptual_hash": f"{k * 0x9E3779B97F4A7C15 % 2**64:016x}" * 5,
        }
        for k in range(first, first + num)
    ]
    return pa.Table.from_pylist(values, schema=shards.SCHEMA)


def write_set(root: Path, first: int = 0, salt_mark: str = "") -> Path:
    """13 training and 3 test rows, numbered from `first` and `first` + 20."""
    fs = fsspec.filesystem("file")
    train = [rows(first, 8), rows(first + 8, 0), rows(first + 8, 5)]
    files = (
        write_shard(fs, str(root), "train/00000.parquet", "train", train),
        write_shard(fs, str(root), "test/00000.parquet", "test", [rows(first + 20, 3, "test")]),
    )
    quarantine = write_table(fs, str(root), shards.QUARANTINE, shards.QUARANTINE_SCHEMA.empty_table())
    manifest = Manifest(
        package_version="0",
        config_hash="c",
        input_hash="i",
        rows_in=16,
        rows_out=16,
        rows_quarantined=0,
        splits={"train": 13, "test": 3},
        sources={"test": 16},
        quarantine={},
        flags={},
        patients={"train": 13, "test": 3},
        labels={"view": {"PA": 16}},
        intensity={"mean": 0.1, "std": 0.2, "pixels": 1000},
        files=files,
        other_files=(quarantine,),
        salt_mark=salt_mark,
    )
    (root / shards.MANIFEST).write_text(manifest.to_json())
    return root


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    shard_set = ShardSet.open(str(write_set(tmp_path)))
    assert shard_set.num_rows() == 16 and shard_set.num_rows("train") == 13 and shard_set.num_rows("val") == 0
    assert [f.row_groups for f in shard_set.files()] == [(8, 5), (3,)] and shard_set.label_names == ("view",)
    assert Manifest.from_json(shard_set.manifest.to_json(), "x") == shard_set.manifest
    everything = shard_set.read_rows("train", shards.SCHEMA.names)
    assert everything.to_pylist() == pa.concat_tables([rows(0, 8), rows(8, 5)]).to_pylist()
    assert "image" not in shard_set.read_rows().column_names and shard_set.read_rows("val").num_rows == 0
    with pytest.raises(ValueError, match="columns reports are not in shards"):
        shard_set.read_rows("train", ["reports"])


def test_row_groups_can_be_read_alone(tmp_path: Path) -> None:
    shard_set = ShardSet.open(str(write_set(tmp_path)))
    (file,) = shard_set.files("train")
    parquet = pq.ParquetFile(shard_set.arrow_fs().open_input_file(shard_set.path(file)))
    assert parquet.read_row_group(1, columns=["image_id"])["image_id"].to_pylist() == [f"i{k}" for k in range(8, 13)]


def test_the_same_rows_give_the_same_bytes_and_footers_hold_no_text(tmp_path: Path) -> None:
    one, two = write_set(tmp_path / "one"), write_set(tmp_path / "two")
    for name in ("train/00000.parquet", "test/00000.parquet", shards.QUARANTINE, shards.MANIFEST):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    data = (one / "train/00000.parquet").read_bytes()
    footer = data[-8 - int.from_bytes(data[-8:-4], "little") :]
    assert b"Secret" not in footer and b"i7" in footer


def test_a_whole_set_verifies(tmp_path: Path) -> None:
    root = write_set(tmp_path)
    (root / "notes.json").write_text("{}")
    assert verify(str(root)) == []


def test_every_damage_is_found(tmp_path: Path) -> None:
    root = write_set(tmp_path)
    train, test = root / "train/00000.parquet", root / "test/00000.parquet"
    whole = train.read_bytes()
    for position in (10, len(whole) // 2, len(whole) - 5):
        flipped = bytearray(whole)
        flipped[position] ^= 4
        train.write_bytes(flipped)
        (difference,) = verify(str(root))
        assert difference.startswith("train/00000.parquet: content changed")
    train.write_bytes(whole[:-100])
    assert verify(str(root)) == [f"train/00000.parquet: {len(whole) - 100} bytes instead of {len(whole)}"]
    train.write_bytes(whole)
    (root / "train/00001.parquet").write_bytes(whole)
    test.unlink()
    assert verify(str(root)) == ["test/00000.parquet: missing", "train/00001.parquet: not in the manifest"]


def test_a_changed_manifest_is_found(tmp_path: Path) -> None:
    path = write_set(tmp_path) / shards.MANIFEST
    text = path.read_text()
    path.write_text(text.replace('"rows_in": 16', '"rows_in": 17'))
    (difference,) = verify(str(tmp_path))
    assert "checksum does not fit" in difference
    path.write_text(text[:200])
    with pytest.raises(ValueError, match="damaged"):
        ShardSet.open(str(tmp_path))


@pytest.mark.parametrize(
    ("version", "fix"), [(shards.SCHEMA_VERSION + 1, "update medim-ray"), (0, "run `medim-ray prepare` again")]
)
def test_another_schema_version_says_what_to_do(tmp_path: Path, version: int, fix: str) -> None:
    path = write_set(tmp_path) / shards.MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": version}))
    with pytest.raises(ValueError, match=rf"schema version {version}.*reads 1, 2, 3, 4 and 5: {fix}"):
        ShardSet.open(str(tmp_path))


def test_a_set_with_the_checksums_of_earlier_versions_is_read_and_verified(tmp_path: Path) -> None:
    root = write_set(tmp_path)
    path = root / shards.MANIFEST
    tree = json.loads(path.read_text())
    for file in [*tree["files"], *tree["other_files"]]:
        assert file.pop("checksum").startswith("xxh3_128:")
        file["blake2b"] = hashlib.blake2b((root / file["path"]).read_bytes(), digest_size=32).hexdigest()
    tree["schema_version"] = 3
    del tree["checksum"], tree["salt_mark"]
    tree["checksum"] = shards._checksum(tree)
    path.write_text(json.dumps(tree))
    found = ShardSet.open(str(tmp_path))
    assert verify(str(tmp_path)) == [] and found.manifest.salt_mark == ""
    files = sorted((file["path"], file["blake2b"]) for file in tree["files"])
    assert found.content_hash == hashlib.blake2b(json.dumps(files).encode(), digest_size=6).hexdigest(), "as it was"
    (root / "train/00000.parquet").write_bytes(b"x" * found.files("train")[0].bytes)
    (difference,) = verify(str(tmp_path))
    assert "content changed (now blake2b:" in difference


def test_a_folder_without_manifest_is_no_shard_set(tmp_path: Path) -> None:
    (write_set(tmp_path) / shards.MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"not a finished shard set.*medim-ray prepare"):
        ShardSet.open(str(tmp_path))
    with pytest.raises(ValueError, match="not a finished shard set"):
        verify(str(tmp_path / "nowhere"))


def test_shards_of_the_first_schema_are_read_with_nulls(tmp_path: Path) -> None:
    root = write_set(tmp_path)
    for name in ("train/00000.parquet", "test/00000.parquet"):
        pq.write_table(pq.read_table(root / name).drop_columns(["pixel_hash", "perceptual_hash"]), root / name)
    table = ShardSet.open(str(root)).read_rows("train")
    assert table["pixel_hash"].null_count == 13 and table["image_id"].null_count == 0


def test_a_file_that_is_gone_or_cut_off_is_named_with_what_to_do(tmp_path: Path) -> None:
    root = write_set(tmp_path)
    path = root / "train/00000.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"train/00000.parquet can't be read .*medim-ray shards verify"):
        ShardSet.open(str(root)).read_rows("train")
    path.unlink()
    with pytest.raises(ValueError, match=r"train/00000.parquet is missing.*medim-ray shards verify"):
        ShardSet.open(str(root)).read_rows("train")
    ShardSet.open(str(root)).check_files("test")
    with pytest.raises(ValueError, match=r"train/00000.parquet is missing"):
        ShardSet.open(str(root)).check_files()


def test_a_run_does_not_begin_on_a_shard_that_was_cut_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_set(tmp_path / "shards")
    path = root / "train/00000.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    assert main(["pretrain", f"data.shards={root}", f"run.dir={tmp_path}/run", "train.global_batch=4"]) == 2
    said = capsys.readouterr().err
    assert "train/00000.parquet has" in said and "bytes instead of" in said and not (tmp_path / "run").exists()


def test_a_shard_that_fails_half_way_does_not_appear(tmp_path: Path) -> None:
    def groups() -> Iterator[pa.Table]:
        yield rows(0, 8)
        raise OSError(28, "No space left on device")

    fs = fsspec.filesystem("file")
    with pytest.raises(OSError, match="No space"):
        write_shard(fs, str(tmp_path), "train/00000.parquet", "train", groups())
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
