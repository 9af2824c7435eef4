"""The checkpoints of a run as folders: committed or absent. A manifest with checksums is written last; no torch here.

RUN/checkpoints/step-SSSSSSSS-ATTEMPT/{rank-RRRRR.safetensors, manifest.json}
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from medim_ray.data.storage import committed, is_local

SCHEMA_VERSION = 2  # 2: the manifest tells which tensors lie in which file, and the data
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8})-(\d+)$")


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: `step` optimizer steps are done; manifest as written."""

    name: str
    step: int
    manifest: dict[str, Any]


class CheckpointStore:
    """The checkpoints of a run under RUN/checkpoints, on any fsspec filesystem."""

    def __init__(self, run_dir: str) -> None:
        self._fs, root = fsspec.core.url_to_fs(run_dir)
        self.root = f"{root.rstrip('/')}/checkpoints"
        self.is_local = is_local(self._fs)

    def names(self) -> list[str]:
        """Folders of checkpoints, committed or not, newest step first (of one step, the latest attempt first)."""
        self._fs.invalidate_cache()
        if not self._fs.exists(self.root):
            return []
        found = (Path(entry).name for entry in self._fs.ls(self.root, detail=False))
        keyed = [(int(m[1]), int(m[2]), name) for name in found if (m := _NAME.fullmatch(name))]
        return [name for _, _, name in sorted(keyed, reverse=True)]

    def next_name(self, step: int) -> str:
        """A name for step `step` that no attempt has used."""
        attempts = [int(m[2]) for name in self.names() if (m := _NAME.fullmatch(name)) and int(m[1]) == step]
        return f"step-{step:08d}-{max(attempts, default=-1) + 1}"

    def problem(self, name: str) -> str | None:
        """Why a checkpoint can't be used, or None: the manifest is there and every file has its size and checksum."""
        folder = f"{self.root}/{name}"
        try:
            manifest = json.loads(self._fs.cat_file(f"{folder}/{MANIFEST}"))
        except FileNotFoundError:
            return "it was never committed (no manifest)"
        except ValueError:
            return "its manifest is not valid JSON"
        if manifest.get("schema_version") != SCHEMA_VERSION:
            return f"its schema version is {manifest.get('schema_version')}, this package reads {SCHEMA_VERSION}"
        for file, facts in manifest["files"].items():
            try:
                with self._fs.open(f"{folder}/{file}", "rb") as stream:
                    digest = hashlib.file_digest(stream, "blake2b").hexdigest()
            except FileNotFoundError:
                return f"{file} is missing"
            if digest != facts["blake2b"]:
                return f"{file} differs from its checksum"
        return None

    def newest(self, report: Callable[[str], None] = lambda _: None) -> Checkpoint | None:
        """The newest checkpoint that can be used; `report` is told which ones were passed over and why."""
        for name in self.names():
            problem = self.problem(name)
            if problem is None:
                return self.open(name)
            report(f"checkpoint {name} is passed over: {problem}")
        return None

    def is_committed(self, name: str) -> bool:
        """Its manifest is there; whether the files fit it is the question of `problem`."""
        return bool(self._fs.exists(f"{self.root}/{name}/{MANIFEST}"))

    def open(self, name: str) -> Checkpoint:
        """A committed checkpoint by its name; its files are not looked at."""
        manifest = json.loads(self._fs.cat_file(f"{self.root}/{name}/{MANIFEST}"))
        return Checkpoint(name, manifest["step"], manifest)

    def prune(self, keep_last: int, current: str, also: Collection[str] = ()) -> None:
        """Keeps `current`, which was just committed, the `keep_last` - 1 committed ones before it, and `also`.

        Later steps belong to a time line that was rolled back (a damaged newest checkpoint was passed over): they go,
        and so does whatever was never committed.
        """
        names = self.names()
        before = names[names.index(current) + 1 :]
        usable = [name for name in before if self.is_committed(name)]
        for name in set(names) - {current, *usable[: keep_last - 1], *also}:
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm(f"{self.root}/{name}", recursive=True)

    @contextlib.contextmanager
    def local_files(self, name: str) -> Iterator[Callable[[str], Path]]:
        """A function from a file's name to its local path: in place on a local disk, otherwise downloaded when asked
        for, so that a rank fetches what it needs and not the whole checkpoint."""
        if self.is_local:
            yield lambda file: Path(self.root) / name / file
            return
        with tempfile.TemporaryDirectory(prefix="medim-ray-") as folder:

            def fetch(file: str) -> Path:
                local = Path(folder) / file
                self._fs.get_file(f"{self.root}/{name}/{file}", str(local))
                return local

            yield fetch

    def write(self, local: Path, name: str) -> dict[str, Any]:
        """Copies one file into the checkpoint; its bytes and checksum for the manifest."""
        with local.open("rb") as stream:
            digest = hashlib.file_digest(stream, "blake2b").hexdigest()
        self._fs.makedirs(f"{self.root}/{name}", exist_ok=True)
        self._fs.put_file(str(local), f"{self.root}/{name}/{local.name}")
        return {"bytes": local.stat().st_size, "blake2b": digest}

    def commit(self, name: str, manifest: dict[str, Any]) -> None:
        """Writes the manifest: from here on the checkpoint exists."""
        folder = f"{self.root}/{name}"
        with committed(self._fs, f"{folder}/{MANIFEST}", folder) as file:
            file.write(json.dumps(manifest, indent=1).encode())
