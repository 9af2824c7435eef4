"""The checkpoints of a run as folders: committed or absent. A manifest with checksums is written last; no torch here.

RUN/checkpoints/step-SSSSSSSS-ATTEMPT/{rank-RRRRR.safetensors, manifest.json}
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import xxhash

from medim_ray.data.storage import committed, is_local, patiently

SCHEMA_VERSION = 2  # 2: the manifest tells which tensors lie in which file, and the data
MANIFEST = "manifest.json"
# Key of a file's checksum in the manifest -> what makes it. Against bit rot, not against forgery: 30 times as fast as
# BLAKE2b, of which a checkpoint of ViT-B with its moments took 1.4 s; earlier checkpoints have that.
_CHECKSUM = "xxh3_128"
_CHECKSUMS: dict[str, Callable[[], Any]] = {_CHECKSUM: xxhash.xxh3_128, "blake2b": hashlib.blake2b}
_OWN = "checksum"  # key of the manifest: of all its others
_NAME = re.compile(r"step-(\d{8})-(\d+)$")
T = TypeVar("T")


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: `step` optimizer steps are done; manifest as written."""

    name: str
    step: int
    manifest: dict[str, Any]


@dataclass(frozen=True)
class Start:
    """What a group of workers begins with, as the driver found it: a checkpoint that it has verified ("": none), the
    steps behind it, and the number of the group's attempt."""

    checkpoint: str
    step: int
    attempt: int


def checkpoint_name(step: int, attempt: int) -> str:
    """The folder of the state after `step` optimizer steps. attempt: of the group of workers that saves it; no two
    groups of a run have the same number, so none writes into a folder of another one."""
    return f"step-{step:08d}-{attempt}"


class CheckpointStore:
    """The checkpoints of a run under RUN/checkpoints, on any fsspec filesystem.

    patience_s: how long a storage that fails for a moment is asked again (besides what its client does by itself).
    """

    def __init__(self, run_dir: str, patience_s: float = 0.0) -> None:
        self._fs, root = fsspec.core.url_to_fs(run_dir)
        self.root = f"{root.rstrip('/')}/checkpoints"
        self._is_local = is_local(self._fs)
        self._patience_s = patience_s

    def _ask(self, do: Callable[[], T]) -> T:
        return patiently(do, self._patience_s)

    def names(self) -> list[str]:
        """Folders of checkpoints, committed or not, newest step first (of one step, the latest attempt first)."""

        def listing() -> list[str]:
            self._fs.invalidate_cache()
            return list(self._fs.ls(self.root, detail=False)) if self._fs.exists(self.root) else []

        found = (Path(entry).name for entry in self._ask(listing))
        keyed = [(int(m[1]), int(m[2]), name) for name in found if (m := _NAME.fullmatch(name))]
        return [name for _, _, name in sorted(keyed, reverse=True)]

    def next_attempt(self) -> int:
        """A number that no group of workers has used so far."""
        return max((_attempt(name) for name in self.names()), default=-1) + 1

    def problem(self, name: str) -> str | None:
        """Why a checkpoint can't be used, or None: the manifest is there and every file has its size and checksum."""
        folder = f"{self.root}/{name}"
        try:
            manifest = self.manifest(name)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return "it was never committed (no manifest)"
        except ValueError as error:
            return str(error)
        if manifest.get("schema_version") != SCHEMA_VERSION:
            return f"its schema version is {manifest.get('schema_version')}, this package reads {SCHEMA_VERSION}"
        for file, facts in manifest["files"].items():
            kind = next((kind for kind in _CHECKSUMS if kind in facts), "")
            if not kind:
                return f"the manifest has no checksum of {file} that this package makes ({', '.join(_CHECKSUMS)})"
            try:
                digest = self._ask(partial(self._digest, f"{folder}/{file}", kind))
            except FileNotFoundError:
                return f"{file} is missing"
            except OSError as error:
                if error.errno != errno.EIO:  # anything else may be no fault of this checkpoint
                    raise
                return f"{file} can't be read ({error.strerror})"
            if digest != facts[kind]:
                return f"{file} differs from its checksum"
        return None

    def manifest(self, name: str) -> dict[str, Any]:
        """What a committed checkpoint says of itself. ValueError, as a sentence on it, where it is not as written."""
        text = self._ask(lambda: self._fs.cat_file(f"{self.root}/{name}/{MANIFEST}"))
        try:
            manifest = json.loads(text)
        except ValueError:
            raise ValueError("its manifest is not valid JSON") from None
        if not isinstance(manifest, dict):
            raise ValueError("its manifest is not valid JSON")
        own = manifest.pop(_OWN, None)
        if own is not None and own != _digest_of(manifest):  # there is none in those of earlier code
            raise ValueError("its manifest differs from its checksum")
        if manifest.get("schema_version") == SCHEMA_VERSION:
            if not isinstance(manifest.get("files"), dict) or "step" not in manifest:
                raise ValueError("its manifest lacks its step or its files")
            if manifest["step"] != _step(name):
                raise ValueError(f"its manifest is that of step {manifest['step']}: it was renamed")
        return manifest

    def _digest(self, path: str, kind: str) -> str:
        with self._fs.open(path, "rb") as stream:
            return hashlib.file_digest(stream, _CHECKSUMS[kind]).hexdigest()

    def newest(self, report: Callable[[str], None] = lambda _: None) -> Checkpoint | None:
        """The newest checkpoint that can be used; `report` is told which ones were passed over and why. ValueError: a
        newer medim-ray wrote it; passed over, it would be pruned as something that was rolled back."""
        for name in self.names():
            problem = self.problem(name)
            if problem is None:
                return self.open(name)
            if self.is_newer(name):
                raise ValueError(f"{self.root}/{name}: {problem}: update medim-ray, or choose another run.dir")
            report(f"checkpoint {name} is passed over: {problem}")
        return None

    def is_newer(self, name: str) -> bool:
        """Whether a medim-ray wrote it whose checkpoints this one can't read."""
        try:
            version = self.manifest(name).get("schema_version")
        except (OSError, ValueError):
            return False
        return isinstance(version, int) and version > SCHEMA_VERSION

    def is_committed(self, name: str) -> bool:
        """Its manifest is there; whether the files fit it is the question of `problem`."""
        return bool(self._ask(lambda: self._fs.exists(f"{self.root}/{name}/{MANIFEST}")))

    def committed_at(self, step: int) -> str:
        """The name of the newest committed checkpoint of a step, "" where there is none; no file is looked at."""
        found = (name for name in self.names() if _step(name) == step)
        return next((name for name in found if self.is_committed(name)), "")

    def committed_step(self) -> int:
        """Optimizer steps behind the newest committed checkpoint, 0 where there is none; no file is looked at."""
        return next((_step(name) for name in self.names() if self.is_committed(name)), 0)

    def open(self, name: str) -> Checkpoint:
        """A committed checkpoint by its name; its files are not looked at. ValueError: its manifest is damaged."""
        manifest = self.manifest(name)
        return Checkpoint(name, manifest["step"], manifest)

    def prune(
        self, keep_last: int, current: str, also: Collection[str] = (), *, writing_attempt: int | None = None
    ) -> None:
        """Keeps `current`, which was just committed, the `keep_last` - 1 committed ones of earlier steps, and `also`.

        Later steps, and the same one of an earlier attempt, belong to a time line that was rolled back (a damaged
        newest checkpoint was passed over): they go, and so does whatever was never committed; but what the group of
        `writing_attempt` is still writing stays.
        """
        names = self.names()
        at = names.index(current)
        usable = [name for name in names[at + 1 :] if _step(name) < _step(current) and self.is_committed(name)]
        writing = [name for name in names[:at] if _attempt(name) == writing_attempt]
        for name in set(names) - {current, *usable[: keep_last - 1], *writing, *also}:
            self.remove(name)

    def remove(self, name: str) -> None:
        """Removes a checkpoint, the manifest first: what is left of it if this is cut short does not count. Of a link
        only the link goes."""
        if self._is_local and Path(self.root, name).is_symlink():
            Path(self.root, name).unlink(missing_ok=True)
            return

        def gone() -> None:
            manifest = f"{self.root}/{name}/{MANIFEST}"
            for path, recursive in ((manifest, self._is_local), (f"{self.root}/{name}", True)):
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    self._fs.rm(path, recursive=recursive)

        self._ask(gone)

    @contextlib.contextmanager
    def local_files(self, name: str) -> Iterator[Callable[[str], Path]]:
        """A function from a file's name to its local path: in place on a local disk, otherwise downloaded when asked
        for, so that a rank fetches what it needs and not the whole checkpoint."""
        if self._is_local:
            yield lambda file: Path(self.root) / name / file
            return
        with tempfile.TemporaryDirectory(prefix="medim-ray-") as folder:

            def fetch(file: str) -> Path:
                local = Path(folder) / file
                self._ask(lambda: self._fs.get_file(f"{self.root}/{name}/{file}", str(local)))
                return local

            yield fetch

    def write(self, name: str, file: str, chunks: Callable[[], Iterable[memoryview]]) -> dict[str, Any]:
        """Writes one file of a checkpoint; its bytes and checksum for the manifest. chunks: called for each try."""
        folder = f"{self.root}/{name}"

        def once() -> dict[str, Any]:
            digest, num_bytes = _CHECKSUMS[_CHECKSUM](), 0
            with committed(self._fs, f"{folder}/{file}", folder) as out:
                for chunk in chunks():
                    digest.update(chunk)
                    out.write(chunk)
                    num_bytes += chunk.nbytes
            return {"bytes": num_bytes, _CHECKSUM: digest.hexdigest()}

        return self._ask(once)

    def commit(self, name: str, manifest: dict[str, Any]) -> None:
        """Writes the manifest, with a checksum of its own: from here on the checkpoint exists."""
        folder = f"{self.root}/{name}"
        text = json.dumps({**manifest, _OWN: _digest_of(manifest)}, indent=1).encode()

        def once() -> None:
            with committed(self._fs, f"{folder}/{MANIFEST}", folder) as out:
                out.write(text)

        self._ask(once)


def _digest_of(manifest: dict[str, Any]) -> str:
    """Of what a manifest says, however it is laid out."""
    return xxhash.xxh3_128(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _step(name: str) -> int:
    return int(name.split("-")[1])


def _attempt(name: str) -> int:
    return int(name.rpartition("-")[2])
