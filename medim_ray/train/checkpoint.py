"""The state of a run in files and back: one safetensors file a rank, then the manifest, which commits (store.py).

A file holds flat fragments of named tensors with their place in the full tensor, so any world size and ZeRO stage reads
them back exactly, and nothing is unpickled. Ray and the loop are not known here.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from medim_ray.train import zero
from medim_ray.train.store import SCHEMA_VERSION, Checkpoint, CheckpointStore


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
        known = {name for name, _ in engine.module.named_parameters()}
        known |= {name for name, _ in zero.persistent_buffers(engine.module)}
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
