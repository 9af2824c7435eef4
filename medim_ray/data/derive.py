"""Shard sets made of shard sets: several put together (files are copied as they are), or a sample. Knows no Ray."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import medim_ray
from medim_ray.data import shards
from medim_ray.data.duplicates import Hashed, judge, to_json
from medim_ray.data.encode import RowCounts, mean_std, pixel_sums, pooled
from medim_ray.data.fingerprint import parse_hashes
from medim_ray.data.images import decode
from medim_ray.data.output import STORED_COLUMNS, refuse_occupied, remove
from medim_ray.data.shards import HashingFile, Manifest, OtherFile, ShardFile, ShardSet
from medim_ray.data.splits import SPLITS
from medim_ray.data.storage import committed
from medim_ray.data.vocabulary import VocabularyConfig, write_vocabulary

_GROUP_ROWS = 64


def merge(sets: Sequence[ShardSet], out: str, fs: fsspec.AbstractFileSystem, root: str) -> Manifest:
    """Writes all samples of `sets` into the empty folder `root` on `fs`; every byte is checked on its way.

    ValueError: fewer than two sets, one of an older schema, sets of different salts, an image id in two of them, a
    patient in two splits, copies of an image in two splits, a damaged file, an output that is not empty.
    """
    if len(sets) < 2:
        raise ValueError("shards merge: name at least two shard sets")
    for one in sets:
        if one.manifest.schema_version < shards.ROW_VERSION:
            raise ValueError(
                f"{one.url} has schema version {one.manifest.schema_version}, made by an earlier medim-ray: "
                "run `medim-ray prepare` again into a new folder"
            )
    _refuse_salts(sets)
    rows = pa.concat_tables([one.read_rows(None, STORED_COLUMNS) for one in sets])
    _refuse_conflicts(rows)
    copies = _list_of_copies(rows)
    across = json.loads(copies)["num_across_splits"]["exact"]
    if across:
        raise ValueError(
            f"{across} images have exact copies in another split, which leaks them from training into the test: "
            "prepare the sources together, or with duplicates=skip one of them"
        )
    refuse_occupied(out, fs, root)
    try:
        files = tuple(_copied(sets, fs, root))
        quarantine = pa.concat_tables([_quarantine(one) for one in sets])
        others = [
            shards.write_table(fs, root, shards.QUARANTINE, quarantine),
            shards.write_bytes(fs, root, shards.DUPLICATES, copies.encode()),
            *_tokenizer(sets, files, fs, root),
        ]
        manifest = _sum_of(sets, rows, files, tuple(others))
        shards.write_bytes(fs, root, shards.MANIFEST, manifest.to_json().encode())
    except BaseException:
        remove(fs, root, existed=True)
        raise
    _sweep(fs, root)
    return manifest


def sample(one: ShardSet, out: str, fs: fsspec.AbstractFileSystem, root: str, *, num_rows: int, seed: int) -> Manifest:
    """Writes `num_rows` samples, drawn by a hash of image id and `seed` with the shares of the splits kept.

    ValueError: more rows than there are, a damaged file, an output that is not empty.
    """
    total = one.num_rows()
    if not 1 <= num_rows <= total:
        raise ValueError(f"rows={num_rows}: between 1 and the {total} rows of {one.url}")
    rows = one.read_rows(None, STORED_COLUMNS)
    of_files = [name for file in one.files() for name in [file.origin] * file.rows]
    rows = rows.append_column("origin", pa.array(of_files, type=pa.string()))
    key = hashlib.blake2b(f"medim-ray sample {seed}".encode()).digest()
    ranks = [hashlib.blake2b(name.encode(), key=key, digest_size=8).digest() for name in rows["image_id"].to_pylist()]
    # Rows of equal share: the k-th of n rows of a split is at (k + 1/2) / n, whatever the split.
    order = sorted(range(total), key=ranks.__getitem__)
    seen: Counter[str] = Counter()
    splits = rows["split"].to_pylist()
    place = {}
    for row in order:
        place[row] = (seen[splits[row]] + 0.5) / one.num_rows(splits[row])
        seen[splits[row]] += 1
    chosen = sorted(order, key=place.__getitem__)[:num_rows]
    refuse_occupied(out, fs, root)
    try:
        manifest = _write_sample(one, rows.take(pa.array(sorted(chosen))), fs, root, seed)
    except BaseException:
        remove(fs, root, existed=True)
        raise
    _sweep(fs, root)
    return manifest


def _write_sample(one: ShardSet, rows: pa.Table, fs: fsspec.AbstractFileSystem, root: str, seed: int) -> Manifest:
    counts, pixels = RowCounts(), list[tuple[int, int, int, int]]()
    files = []
    for split in SPLITS:
        here = rows.filter(pc.equal(rows["split"], split))
        for number, origin in enumerate(pc.unique(here["origin"]).to_pylist()):  # of a merged set, a file an origin
            wanted = here.filter(pc.equal(here["origin"], origin))["image_id"].combine_chunks()
            groups = _chosen([f for f in one.files(split) if f.origin == origin], one, wanted, counts)
            if split == "train":
                groups = _noting(groups, pixels)
            file = shards.write_shard(fs, root, f"{split}/{number:05d}.parquet", split, groups)
            files.append(replace(file, origin=origin))
    others = [
        shards.write_table(fs, root, shards.QUARANTINE, shards.QUARANTINE_SCHEMA.empty_table()),
        shards.write_bytes(fs, root, shards.DUPLICATES, _list_of_copies(rows).encode()),
        *_tokenizer([one], files, fs, root),
    ]
    old = one.manifest
    num = {split: sum(file.rows for file in files if file.split == split) for split in SPLITS}
    manifest = replace(
        old,
        package_version=medim_ray.__version__,
        schema_version=shards.SCHEMA_VERSION,
        config_hash=_hash_of(old.config_hash, "sample", str(seed), str(rows.num_rows)),
        rows_in=rows.num_rows,
        rows_out=rows.num_rows,
        rows_quarantined=0,
        rows_skipped=0,
        splits=num,
        sources=dict(sorted(counts.sources.items())),
        quarantine={},
        flags=dict(sorted(counts.flags.items())),
        patients=_patients(rows),
        labels={name: dict(sorted(values.items())) for name, values in sorted(counts.labels.items())},
        intensity=mean_std(np.array(pixels, dtype=np.int64).reshape(-1, 4)),
        files=tuple(files),
        other_files=tuple(others),
    )
    shards.write_bytes(fs, root, shards.MANIFEST, manifest.to_json().encode())
    return manifest


def _noting(groups: Iterator[pa.Table], pixels: list[tuple[int, int, int, int]]) -> Iterator[pa.Table]:
    """The same row groups; notes `pixel_sums` of their images."""
    for table in groups:
        pixels.extend(pixel_sums(decode(data)) for data in table["image"].to_pylist())
        yield table


def _chosen(files: Sequence[ShardFile], one: ShardSet, image_ids: pa.Array, counts: RowCounts) -> Iterator[pa.Table]:
    """Row groups of the samples with these ids, in the order of the files."""
    held = shards.SCHEMA.empty_table()
    for file in files:
        with one.arrow_fs().open_input_file(one.path(file)) as raw:
            parquet = pq.ParquetFile(raw)
            for group in range(parquet.num_row_groups):
                here = pc.is_in(parquet.read_row_group(group, columns=["image_id"])["image_id"], image_ids)
                if not pc.any(here).as_py():
                    continue
                table = parquet.read_row_group(group).filter(here)
                for name in shards.SCHEMA.names:
                    if name not in table.column_names:
                        table = table.append_column(name, pa.nulls(table.num_rows, shards.SCHEMA.field(name).type))
                counts.count(table)
                held = pa.concat_tables([held, table.select(shards.SCHEMA.names).cast(shards.SCHEMA)])
                while held.num_rows >= _GROUP_ROWS:
                    yield held.slice(0, _GROUP_ROWS)
                    held = held.slice(_GROUP_ROWS)
    yield held


def _refuse_salts(sets: Sequence[ShardSet]) -> None:
    """One patient would have two ids, and could be in two splits; what an earlier medim-ray wrote can't be told."""
    known = {one.manifest.salt_mark: one.url for one in sets if one.manifest.salt_mark}
    if len(known) > 1:
        first, second, *_ = known.values()
        raise ValueError(
            f"{first} and {second} were prepared with different salts, so one patient may have two ids and be in two "
            "splits: prepare the sources with one salt"
        )


def _refuse_conflicts(rows: pa.Table) -> None:
    counts = pc.value_counts(rows["image_id"].combine_chunks())
    twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values").to_pylist()
    if twice:
        raise ValueError(
            f"{len(twice)} image ids are in more than one set, the first is {twice[0]!r}: drop one of them"
        )
    places = rows.select(["patient_id", "split"]).group_by(["patient_id", "split"]).aggregate([])
    patients = pc.value_counts(places["patient_id"].combine_chunks())
    num = pc.sum(pc.greater(patients.field("counts"), 1)).as_py()
    if num:
        raise ValueError(
            f"{num} patients are in one split here and in another there, which leaks them from training into the test: "
            "prepare the sources together, with one salt and one split"
        )


def _list_of_copies(rows: pa.Table) -> str:
    known = rows.filter(pc.is_valid(rows["pixel_hash"]))  # a set of schema version 1 has none
    num = known.num_rows
    hashed = Hashed(
        image_ids=known["image_id"],
        patients=known["patient_id"],
        pixel_hashes=known["pixel_hash"],
        perceptual_N5=parse_hashes(known["perceptual_hash"].to_pylist()),
        splits_N=pc.index_in(known["split"], pa.array(SPLITS)).to_numpy().astype(np.int8),
        is_stored_N=np.ones(num, dtype=np.bool_),
        is_given_N=np.zeros(num, dtype=np.bool_),
        is_bound_N=np.zeros(num, dtype=np.bool_),
    )
    return to_json(hashed, judge(hashed, "keep"), "keep")


def _copied(sets: Sequence[ShardSet], fs: fsspec.AbstractFileSystem, root: str) -> Iterator[ShardFile]:
    """Copies every file under the next number of its split; ValueError where its checksum does not fit."""
    for split in SPLITS:
        number = 0
        for one in sets:
            for file in one.files(split):
                path = f"{split}/{number:05d}.parquet"
                number += 1
                with (
                    one.fs.open(one.path(file), "rb") as source,
                    committed(fs, f"{root}/{path}", _scratch(root)) as raw,
                ):
                    sink = HashingFile(raw, shards.checksum_kind(file))
                    while block := source.read(1 << 22):
                        sink.write(block)
                    if sink.checksum() != file.checksum:
                        raise ValueError(f"{one.url}: {file.path} is damaged: run `medim-ray shards verify {one.url}`")
                yield replace(file, path=path, origin=file.origin or one.root.rpartition("/")[2])


def _quarantine(one: ShardSet) -> pa.Table:
    with one.fs.open(f"{one.root}/{shards.QUARANTINE}", "rb") as file:
        return pq.read_table(file)


def _tokenizer(
    sets: Sequence[ShardSet], files: Sequence[ShardFile], fs: fsspec.AbstractFileSystem, root: str
) -> list[OtherFile]:
    """The vocabulary of the sets where they have the same, a new one elsewhere."""
    first = sets[0].tokenizer()
    if any(one.tokenizer() != first for one in sets[1:]):
        return write_vocabulary(files, VocabularyConfig(), fs, root)
    return [shards.write_bytes(fs, root, path, content) for path, content in first.items()]


def _sum_of(
    sets: Sequence[ShardSet], rows: pa.Table, files: tuple[ShardFile, ...], others: tuple[OtherFile, ...]
) -> Manifest:
    manifests = [one.manifest for one in sets]
    counts = RowCounts()
    for manifest in manifests:
        counts.add(manifest.flags, manifest.labels)

    def total(name: str) -> dict[str, int]:
        summed: Counter[str] = Counter()
        for manifest in manifests:
            summed.update(getattr(manifest, name))
        return dict(summed)

    return Manifest(
        package_version=medim_ray.__version__,
        config_hash=_hash_of(*(manifest.config_hash for manifest in manifests)),
        input_hash=_hash_of(*(manifest.input_hash for manifest in manifests)),
        rows_in=sum(manifest.rows_in for manifest in manifests),
        rows_out=rows.num_rows,
        rows_quarantined=sum(manifest.rows_quarantined for manifest in manifests),
        rows_skipped=sum(manifest.rows_skipped for manifest in manifests),
        splits=total("splits"),
        sources=total("sources"),
        quarantine=dict(sorted(total("quarantine").items())),
        flags=dict(sorted(counts.flags.items())),
        patients=_patients(rows),
        labels={name: dict(sorted(values.items())) for name, values in sorted(counts.labels.items())},
        intensity=pooled([manifest.intensity for manifest in manifests]),
        files=files,
        other_files=others,
        salt_mark=manifests[0].salt_mark if len({manifest.salt_mark for manifest in manifests}) == 1 else "",
    )


def _patients(rows: pa.Table) -> dict[str, int]:
    return {split: len(pc.unique(rows.filter(pc.equal(rows["split"], split))["patient_id"])) for split in SPLITS}


def _hash_of(*parts: str) -> str:
    return hashlib.blake2b(" ".join(parts).encode(), digest_size=8).hexdigest()


def _scratch(root: str) -> str:
    return f"{root}/{shards.WORK}"


def _sweep(fs: fsspec.AbstractFileSystem, root: str) -> None:
    """The folder of what was not finished, now empty."""
    fs.invalidate_cache()
    if fs.exists(_scratch(root)):
        fs.rm(_scratch(root), recursive=True)
