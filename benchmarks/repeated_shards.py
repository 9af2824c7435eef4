"""Shards of any size in seconds: few phantoms of 512 px, each stored many times under ids of its own. For benchmarks of
the stream, which does not look at what is on an image; no Ray."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa

import medim_ray
from medim_ray.data import shards
from medim_ray.data.encode import RowEncoder
from medim_ray.data.fingerprint import row_checksum
from medim_ray.data.images import ImageEncoder
from medim_ray.data.listing import final_rows
from medim_ray.data.shards import Manifest, OtherFile, describe_file
from medim_ray.data.sources import SOURCES
from medim_ray.data.splits import SplitConfig
from medim_ray.reports.wordpiece import train_tokenizer

ROWS_PER_FILE, GROUP_ROWS = 4096, 64


def repeated_shards(root: Path, num_images: int, num_unique: int = 64, size: int = 512) -> None:
    """Writes a shard set of `num_images` rows, all of the training split, in the sizes that `prepare` uses."""
    source = SOURCES["phantom"](SOURCES["phantom"].Config(num_images=num_unique, size=size))
    plan = final_rows(source.plan(), SplitConfig(), "").drop_columns(["is_given", "key"])
    unique, _ = RowEncoder(source, ImageEncoder(ImageEncoder.Config()))(plan)
    rows = unique.to_pylist()
    fs, path = fsspec.core.url_to_fs(str(root))
    files = tuple(
        shards.write_shard(fs, path, f"train/{number:05d}.parquet", "train", _groups(rows, first, num_images))
        for number, first in enumerate(range(0, num_images, ROWS_PER_FILE))
    )
    manifest = Manifest(
        package_version=medim_ray.__version__,
        config_hash="",
        input_hash="",
        rows_in=num_images,
        rows_out=num_images,
        rows_quarantined=0,
        splits={"train": num_images},
        sources={"phantom": num_images},
        quarantine={},
        flags={},
        patients={"train": num_images},
        labels={},
        intensity={},
        files=files,
        other_files=tuple(_tokenizer(rows, fs, path)),
    )
    shards.write_bytes(fs, path, shards.MANIFEST, manifest.to_json().encode())


def _groups(rows: list[dict[str, object]], first: int, num_images: int) -> Iterator[pa.Table]:
    last = min(first + ROWS_PER_FILE, num_images)
    for start in range(first, last, GROUP_ROWS):
        group = []
        for number in range(start, min(start + GROUP_ROWS, last)):
            row, image_id = rows[number % len(rows)], f"image-{number:07d}"
            checksum = row_checksum(image_id.encode(), row["image"], str(row["report"]).encode())
            group.append(row | {"image_id": image_id, "patient_id": image_id, "split": "train", "checksum": checksum})
        yield pa.Table.from_pylist(group, schema=shards.SCHEMA)


def _tokenizer(rows: list[dict[str, object]], fs: fsspec.AbstractFileSystem, root: str) -> Iterator[OtherFile]:
    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer([str(row["report"]) for row in rows], folder)
        fs.makedirs(f"{root}/{shards.TOKENIZER}", exist_ok=True)
        for file in sorted(Path(folder).iterdir()):
            fs.put_file(str(file), f"{root}/{shards.TOKENIZER}/{file.name}")
            yield describe_file(fs, root, f"{shards.TOKENIZER}/{file.name}")


def main() -> None:
    """python -m benchmarks.repeated_shards OUT NUM"""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("num", type=int)
    args = parser.parse_args()
    repeated_shards(args.out, args.num)


if __name__ == "__main__":
    main()
