"""Checkpoints that are committed or absent: one safetensors file a rank, then a manifest with checksums, last.

A file holds flat fragments of named tensors with their place in the full tensor, so any world size and ZeRO stage reads
them back exactly, and nothing is unpickled. Torch and fsspec only; Ray and the loop are not known here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from medim_ray.train import zero

SCHEMA_VERSION = 1
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
        self.is_local = "file" in (self._fs.protocol if isinstance(self._fs.protocol, tuple) else (self._fs.protocol,))

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
                manifest = json.loads(self._fs.cat_file(f"{self.root}/{name}/{MANIFEST}"))
                return Checkpoint(name, manifest["step"], manifest)
            report(f"checkpoint {name} is passed over: {problem}")
        return None

    def prune(self, keep_last: int) -> None:
        """Deletes all but the newest `keep_last` committed checkpoints, and whatever was never committed."""
        committed = [n for n in self.names() if self._fs.exists(f"{self.root}/{n}/{MANIFEST}")]
        for name in set(self.names()) - set(committed[:keep_last]):
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm(f"{self.root}/{name}", recursive=True)

    @contextlib.contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:
        """The checkpoint's folder as local files: in place on a local disk, downloaded otherwise."""
        if self.is_local:
            yield Path(self.root) / name
            return
        with tempfile.TemporaryDirectory(prefix="medim-ray-") as folder:
            self._fs.get(f"{self.root}/{name}/", folder, recursive=True)
            yield Path(folder)

    def write(self, local: Path, name: str) -> dict[str, Any]:
        """Copies one file into the checkpoint; its entry for the manifest."""
        with local.open("rb") as stream:
            digest = hashlib.file_digest(stream, "blake2b").hexdigest()
        self._fs.makedirs(f"{self.root}/{name}", exist_ok=True)
        self._fs.put_file(str(local), f"{self.root}/{name}/{local.name}")
        return {local.name: {"bytes": local.stat().st_size, "blake2b": digest}}

    def commit(self, name: str, manifest: dict[str, Any]) -> None:
        """Writes the manifest: from here on the checkpoint exists."""
        target = f"{self.root}/{name}/{MANIFEST}"
        self._fs.pipe_file(f"{target}.partial", json.dumps(manifest, indent=1).encode())
        self._fs.mv(f"{target}.partial", target)


def save(store: CheckpointStore, engine: Any, step: int, facts: dict[str, Any]) -> str:
    """Collective: commits the state after `step` optimizer steps; returns the checkpoint's name on every rank."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    names = [store.next_name(step) if rank == 0 else ""]
    dist.broadcast_object_list(names)
    name = names[0]
    tensors: dict[str, Tensor] = {}
    index: dict[str, Any] = {}
    for fragment in zero.fragments(engine, own=True):
        index[fragment.name] = {"start": fragment.start, "shape": fragment.shape}
        for kind, tensor in fragment.tensors.items():
            tensors[f"{fragment.name}|{kind}"] = tensor.detach().cpu().clone()
    with tempfile.TemporaryDirectory(prefix="medim-ray-") as folder:
        file = Path(folder) / f"rank-{rank:05d}.safetensors"
        save_file(tensors, file, metadata={"index": json.dumps(index)})
        entry = store.write(file, name)
    entries: list[Any] = [None] * world_size
    dist.all_gather_object(entries, entry)
    if rank == 0:
        files = {file: facts for one in entries for file, facts in one.items()}
        store.commit(
            name,
            {
                "schema_version": SCHEMA_VERSION,
                "step": step,
                "world_size": world_size,
                "optimizer_step": zero.optimizer_step(engine),
                **facts,
                "files": files,
            },
        )
    dist.barrier()
    return name


class SavedTensors:
    """Named tensors of a checkpoint folder, read by range from the files of all ranks."""

    def __init__(self, folder: Path) -> None:
        self._files = [safe_open(path, framework="pt") for path in sorted(folder.glob("rank-*.safetensors"))]
        self._pieces: dict[str, list[tuple[int, Any]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.kinds: dict[str, list[str]] = {}
        for file in self._files:
            index = json.loads(file.metadata()["index"])
            for key in file.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                name, kind = key.rsplit("|", 1)
                self._pieces.setdefault(key, []).append((index[name]["start"], file))
                self.shapes[name] = tuple(index[name]["shape"])
                if kind not in self.kinds.setdefault(name, []):
                    self.kinds[name].append(kind)

    def read(self, name: str, kind: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of a flattened tensor; ValueError where the checkpoint lacks any of them."""
        key = f"{name}|{kind}"
        parts: list[Tensor] = []
        at = start
        for piece_start, file in sorted(self._pieces.get(key, []), key=lambda piece: piece[0]):
            piece = file.get_slice(key)
            piece_end = piece_start + piece.get_shape()[0]
            if piece_start <= at < min(piece_end, start + numel):
                parts.append(piece[at - piece_start : min(piece_end, start + numel) - piece_start])
                at += len(parts[-1])
        if at != start + numel:
            raise ValueError(f"the checkpoint holds no {kind} of {name!r} for elements {at} to {start + numel}")
        return torch.cat(parts) if parts else torch.empty(0)

    def full(self, name: str) -> Tensor:
        """A parameter or buffer in its full shape."""
        kind = "buffer" if "buffer" in self.kinds[name] else "param"
        shape = self.shapes[name]
        return self.read(name, kind, 0, int(torch.Size(shape).numel())).view(shape)


@torch.no_grad()
def restore(store: CheckpointStore, checkpoint: Checkpoint, engine: Any) -> None:
    """Collective: the whole state of `checkpoint` into the engine, at any world size and stage.

    ValueError where a tensor is missing, has another shape, or is unknown to the model: the configuration differs.
    """
    with store.local_copy(checkpoint.name) as folder:
        saved = SavedTensors(folder)
        held: set[str] = set()
        for fragment in zero.fragments(engine, own=False):
            shape = saved.shapes.get(fragment.name)
            if shape != fragment.shape:
                found = f"has shape {list(shape)}" if shape is not None else "is absent"
                raise ValueError(
                    f"checkpoint {checkpoint.name}: {fragment.name!r} {found}, the model wants {list(fragment.shape)}; "
                    "resume with the configuration of the run (config.yaml) or choose another run.dir"
                )
            for kind, tensor in fragment.tensors.items():
                part = saved.read(fragment.name, kind, fragment.start, fragment.numel)
                tensor.copy_(part.to(tensor.device, tensor.dtype))
            held.add(fragment.name)
        known = {name for name, _ in engine.module.named_parameters()} | {n for n, _ in engine.module.named_buffers()}
        if unknown := sorted(set(saved.shapes) - known):
            raise ValueError(
                f"checkpoint {checkpoint.name} holds tensors that the model lacks: {', '.join(unknown[:5])}"
            )
    zero.adopt(engine, checkpoint.manifest["optimizer_step"])


def load_weights(store: CheckpointStore, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every parameter and buffer in full, by its name in the objective, fp32 where training kept fp32."""
    with store.local_copy(checkpoint.name) as folder:
        saved = SavedTensors(folder)
        return {name: saved.full(name).clone() for name in saved.shapes}
