"""The folder that a job writes into: taken only where it is empty, or holds just what the job would write."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import fsspec

from medim_ray.data import shards
from medim_ray.data.shards import Manifest, ShardSet
from medim_ray.data.sources.base import absolute
from medim_ray.data.splits import SPLITS


def occupied(fs: fsspec.AbstractFileSystem, root: str) -> bool:
    """Whether anything lies in `root`."""
    fs.invalidate_cache()
    try:
        return any(name.rstrip("/") != root for name in fs.ls(root, detail=False))
    except (FileNotFoundError, NotADirectoryError):  # the second is told when the folder is made
        return False


def same_set(out: str, config_hash: str, input_hash: str) -> Manifest:
    """The manifest of a finished set that the same options and rows made; ValueError for anything else at `out`."""
    fix = f"choose another out=, or remove {out}"
    fs, root = fsspec.core.url_to_fs(absolute(out))
    if not fs.exists(f"{root.rstrip('/')}/{shards.MANIFEST}"):
        raise ValueError(f"out={out} is not empty and holds no finished shard set (an interrupted `prepare`?): {fix}")
    manifest = ShardSet.open(absolute(out)).manifest
    if manifest.config_hash != config_hash:
        raise ValueError(f"out={out} holds shards that were prepared with other options: {fix}")
    if manifest.input_hash != input_hash:
        raise ValueError(f"out={out} holds shards of the same options, but the rows of the source have changed: {fix}")
    return manifest


@contextlib.contextmanager
def storage_faults(out: str) -> Iterator[None]:
    """A RuntimeError in plain words for an OSError, whether it was raised here or in a Ray task."""
    try:
        yield
    except OSError as error:
        cause = getattr(error, "cause", error)  # where Ray wrapped it
        raise RuntimeError(f"out={out} can't be used: {cause.strerror or cause}; nothing was left there") from None


def remove(fs: fsspec.AbstractFileSystem, root: str, *, existed: bool) -> None:
    """Removes what a job wrote into `root`, which was empty before; the folder too where it did not exist."""
    for name in (*SPLITS, shards.TOKENIZER, shards.QUARANTINE, shards.MANIFEST):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            fs.rm(f"{root}/{name}", recursive=True)
    if not existed:
        with contextlib.suppress(OSError):  # something of others lies there by now; object stores have no folders
            fs.rmdir(root)
