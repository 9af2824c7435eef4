"""The folder that a job writes into: empty, or holding a set or the unfinished work of just this job. Knows no Ray."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from medim_ray.data import shards
from medim_ray.data.listing import rows_hash
from medim_ray.data.shards import Manifest, OtherFile, ShardSet
from medim_ray.data.splits import SPLITS
from medim_ray.data.storage import committed
from medim_ray.data.work import WorkFolder

STORED_COLUMNS = ("image_id", "patient_id", "split", "pixel_hash", "perceptual_hash")


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What a finished set holds of earlier rows. rows: STORED_COLUMNS of every sample; quarantine: the table;
    copies: the groups of exact copies in duplicates.json; lists: both files as they are."""

    manifest: Manifest
    rows: pa.Table
    quarantine: pa.Table
    copies: list[dict[str, Any]]
    lists: dict[str, bytes]


def look(out: str, fs: fsspec.AbstractFileSystem, root: str, job: Mapping[str, Any]) -> Manifest | None:
    """The manifest of the finished set at `out` that the same options made, None where there is no set yet.

    ValueError where anything else lies there: other files, a set or unfinished work of other options or rows.
    """
    fix = f"choose another out=, or remove {out}"
    fs.invalidate_cache()
    manifest: Manifest | None = None
    if fs.exists(f"{root}/{shards.MANIFEST}"):
        manifest = ShardSet.open(out, fs).manifest
        if manifest.schema_version < shards.ROW_VERSION:
            raise ValueError(
                f"out={out} holds shards of schema version {manifest.schema_version}, made by an earlier medim-ray; "
                f"they stay readable, nothing can be added: {fix}"
            )
        if manifest.config_hash != job["config_hash"]:
            raise ValueError(f"out={out} holds shards that were prepared with other options: {fix}")
    unfinished = WorkFolder(fs, root).job()
    if unfinished is None:
        if manifest is None and _names(fs, root) - {shards.WORK}:
            raise ValueError(f"out={out} is not empty and holds no finished shard set: {fix}")
        return manifest
    if unfinished["config_hash"] != job["config_hash"]:
        before, now = unfinished["options"], job["options"]
        changed = [key for key in sorted(before | now) if before.get(key) != now.get(key)] or ["the salt"]
        shown = "; ".join(f"{key} was {before[key]!r}, is {now[key]!r}" if key in now else key for key in changed[:5])
        raise ValueError(
            f"out={out} holds an unfinished `prepare` with other options ({shown}): go back to them, or {fix}"
        )
    if unfinished["input_hash"] != job["input_hash"] and (manifest is None or manifest.input_hash != job["input_hash"]):
        raise ValueError(
            f"out={out} holds an unfinished `prepare` of the same options, but the rows of the source have changed: "
            f"finish it with the rows that it began with and add the new ones then, or {fix}"
        )
    return manifest


def read_stored(out: str, fs: fsspec.AbstractFileSystem, root: str, manifest: Manifest) -> Stored:
    """What the set holds; ValueError where a file of it is gone or damaged."""
    rows = ShardSet(out, fs, root, manifest).read_rows(None, STORED_COLUMNS)
    lists: dict[str, bytes] = {}
    for file in manifest.other_files:
        if file.path in (shards.QUARANTINE, shards.DUPLICATES):
            kept = f"{root}/{shards.WORK}/{_kept_name(file)}"
            lists[file.path] = fs.cat_file(kept if fs.exists(kept) else f"{root}/{file.path}")
            sink = shards.HashingFile(shards.Nowhere(), shards.checksum_kind(file))
            sink.write(lists[file.path])
            if sink.checksum() != file.checksum:
                raise ValueError(f"{out}: {file.path} was changed: restore it; medim-ray shards verify {out}")
    return Stored(
        manifest=manifest,
        rows=rows,
        quarantine=pq.read_table(pa.BufferReader(lists[shards.QUARANTINE])),
        copies=json.loads(lists[shards.DUPLICATES])["exact"],
        lists=lists,
    )


def keep_stored(work: WorkFolder, stored: Stored | None) -> None:
    """Copies the lists that the job will write anew: killed between these and the manifest, it goes on from them."""
    for file in stored.manifest.other_files if stored is not None else ():
        if stored is not None and file.path in stored.lists:
            with committed(work.fs, f"{work.folder}/{_kept_name(file)}", work.folder) as copy:
                copy.write(stored.lists[file.path])


def _kept_name(file: OtherFile) -> str:
    return f"stored-{file.checksum.partition(':')[2][:16]}"


def discard(work: WorkFolder, *, existed: bool) -> None:
    """Removes what a job left that got nowhere; its storage may be out of order."""
    with contextlib.suppress(Exception):
        work.remove()
    if not existed:
        with contextlib.suppress(Exception):
            work.fs.rmdir(work.root)


def new_rows(out: str, rows: pa.Table, stored: Stored) -> pa.Table:
    """The rows that the set does not have yet; ValueError where rows that it has were changed or are gone."""
    columns = (stored.rows["image_id"], stored.quarantine["image_id"])
    skipped = pa.array([name for group in stored.copies for name in group["skipped"]], type=pa.string())
    known = pa.concat_arrays([*(chunk for column in columns for chunk in column.chunks), skipped])
    is_old = pc.is_in(rows["image_id"], known)
    old = rows.filter(is_old)
    if old.num_rows != len(known) or rows_hash(old) != stored.manifest.input_hash:
        raise ValueError(
            f"out={out} holds shards of the same options, but the rows of the source have changed (rows can be added, "
            f"not changed or taken away): choose another out=, or remove {out}"
        )
    return rows.filter(pc.invert(is_old))


def bind_to_stored(rows: pa.Table, stored: Stored) -> tuple[pa.Table, np.ndarray[Any, np.dtype[np.bool_]]]:
    """New rows of patients that are in the set go to the splits they have there; and which rows these are."""
    places = pc.index_in(rows["patient_id"], stored.rows["patient_id"].combine_chunks())
    is_bound_N = pc.is_valid(places).to_numpy(zero_copy_only=False)
    splits = pc.coalesce(stored.rows["split"].take(places), rows["split"])
    bound = rows.set_column(rows.schema.get_field_index("split"), "split", splits)
    order_N = np.lexsort((bound["key"].to_numpy(), pc.index_in(bound["split"], pa.array(SPLITS)).to_numpy()))
    return bound.take(pa.array(order_N)), is_bound_N[order_N]


def refuse_occupied(out: str, fs: fsspec.AbstractFileSystem, root: str) -> None:
    """ValueError where anything lies at `out`."""
    fs.invalidate_cache()
    if _names(fs, root):
        raise ValueError(f"out={out} is not empty: choose another out=, or remove {out}")


def _names(fs: fsspec.AbstractFileSystem, root: str) -> set[str]:
    """What lies in `root`."""
    try:
        found = [name.rstrip("/") for name in fs.ls(root, detail=False)]
    except (FileNotFoundError, NotADirectoryError):  # the second is told when the folder is made
        return set()
    return {name.rpartition("/")[2] for name in found if name != root}


def remove(fs: fsspec.AbstractFileSystem, root: str, *, existed: bool) -> None:
    """Removes what a job wrote into `root`, which held no set before; the folder too where it did not exist."""
    for name in (*SPLITS, shards.TOKENIZER, shards.QUARANTINE, shards.DUPLICATES, shards.WORK):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            fs.rm(f"{root}/{name}", recursive=True)
    if not existed:
        with contextlib.suppress(OSError):  # something of others lies there by now; object stores have no folders
            fs.rmdir(root)
