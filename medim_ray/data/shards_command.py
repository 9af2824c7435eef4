"""`medim-ray shards verify|stats|merge|sample`: what is printed, and how shard sets are opened. Knows no Ray."""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import fsspec

from medim_ray.config.loader import load
from medim_ray.data import derive, shards
from medim_ray.data.shards import ShardSet
from medim_ray.data.sources.base import absolute
from medim_ray.data.storage import StorageConfig, filesystem, has_folders, storage_faults


@dataclass(frozen=True, kw_only=True)
class ShardsRoot:
    """Options of `medim-ray shards`."""

    out: str = field(default="", metadata={"help": "merge, sample: folder or URL to write"})
    rows: int = field(default=100, metadata={"help": "sample: rows to draw"})
    seed: int = field(default=0, metadata={"help": "sample: another seed draws other rows"})
    storage: StorageConfig = field(default_factory=StorageConfig)


def run_shards(action: str, items: Sequence[str], *, as_json: bool = False) -> int:
    """items: shard sets and key=value options of ShardsRoot. Prints; exit code 1 where `verify` finds a difference."""
    urls = [item for item in items if not re.match(r"[a-z_.]+=", item)]
    root = load(ShardsRoot, None, [item for item in items if item not in urls])
    writes = action in ("merge", "sample")
    if not urls or (len(urls) > 1 and action != "merge"):
        raise ValueError(f"shards {action}: name {'the shard sets' if action == 'merge' else 'one shard set'}")
    if writes and not root.out:
        raise ValueError(f"shards {action}: out is not set; give the folder or URL to write as out=…")
    if root.out and not writes:
        raise ValueError(f"shards {action} writes nothing: leave out= away")
    with storage_faults(", ".join(urls)):
        if action == "verify":
            return _verify(urls[0], root)
        sets = [_open(url, root) for url in urls]
        if action == "stats":
            found = stats(sets[0])
            print(json.dumps(found, ensure_ascii=False) if as_json else "\n".join(stats_lines(found)))
            return 0
        fs, path = _file_system(root.out, root)
        if action == "merge":
            manifest = derive.merge(sets, root.out, fs, path)
        else:
            manifest = derive.sample(sets[0], root.out, fs, path, num_rows=root.rows, seed=root.seed)
    by_split = ", ".join(f"{split} {num}" for split, num in manifest.splits.items())
    print(f"{root.out}: {manifest.rows_out} rows ({by_split}) in {len(manifest.files)} files")
    return 0


def _file_system(url: str, root: ShardsRoot) -> tuple[fsspec.AbstractFileSystem, str]:
    """The options of `storage` hold for object stores; a local set beside them has no use for them."""
    fs, path = filesystem(absolute(url), StorageConfig(), "storage")
    return (fs, path) if has_folders(fs) else filesystem(absolute(url), root.storage, "storage")


def _open(url: str, root: ShardsRoot) -> ShardSet:
    fs, _ = _file_system(url, root)
    return ShardSet.open(absolute(url), fs)


def _verify(url: str, root: ShardsRoot) -> int:
    fs, _ = _file_system(url, root)
    try:
        differences = shards.verify(absolute(url), fs)
    except ValueError as error:
        differences = [str(error)]
    for line in differences:
        print(line)
    if not differences:
        print(f"{url}: {_open(url, root).num_rows()} rows, every checksum holds")
    return 1 if differences else 0


def stats(one: ShardSet) -> dict[str, Any]:
    """What the manifest and the list of copies say; no sample is read."""
    manifest = one.manifest
    tree = {
        field.name: getattr(manifest, field.name)
        for field in dataclasses.fields(manifest)
        if field.name not in ("files", "other_files")
    }
    sizes = [file.bytes for file in manifest.files]
    groups = [rows for file in manifest.files for rows in file.row_groups]
    tree["files"] = {
        "num": len(sizes),
        "bytes": sum(sizes),
        "median_bytes": int(statistics.median(sizes)) if sizes else 0,
        "num_row_groups": len(groups),
        "median_row_group_rows": int(statistics.median(groups)) if groups else 0,
    }
    copies = one.exact_duplicates()
    tree["duplicates"] = {
        "num_groups": len(copies),
        "num_images": sum(len(group["images"]) for group in copies),
        "num_across_splits": sum(group["across_splits"] for group in copies),
    }
    return tree


def stats_lines(found: dict[str, Any]) -> list[str]:
    """The same for reading."""

    def listed(counts: dict[str, int], most: int = 8) -> str:
        top = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        more = f", … ({len(top)} values)" if len(top) > most else ""
        return ", ".join(f"{name} {num}" for name, num in top[:most]) + more

    files, copies = found["files"], found["duplicates"]
    mib = 2**20
    lines = [
        f"rows: {found['rows_in']} in = {found['rows_out']} in shards + {found['rows_quarantined']} in quarantine "
        f"+ {found['rows_skipped']} skipped as duplicates",
        f"splits: {', '.join(f'{split} {num}' for split, num in found['splits'].items())}",
        f"patients: {', '.join(f'{split} {num}' for split, num in found['patients'].items())}",
        f"sources: {listed(found['sources'])}",
        f"files: {files['num']}, {files['bytes'] / mib:.1f} MiB, median {files['median_bytes'] / mib:.2f} MiB; "
        f"{files['num_row_groups']} row groups, median {files['median_row_group_rows']} rows",
        f"exact copies: {copies['num_images']} images in {copies['num_groups']} groups, "
        f"{copies['num_across_splits']} groups across splits",
    ]
    if found["intensity"]:
        lines.append(
            f"intensity of training pixels: {found['intensity']['mean']:.4f} ± {found['intensity']['std']:.4f}"
        )
    lines += [f"flag {name}: {num}" for name, num in found["flags"].items()]
    lines += [f"quarantine: {num} rows: {reason}" for reason, num in found["quarantine"].items()]
    lines += [f"label {name}: {listed(values)}" for name, values in found["labels"].items()]
    return lines
