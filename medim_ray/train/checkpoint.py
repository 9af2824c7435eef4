"""The state of a run in files and back: one safetensors file a rank, then the manifest, which commits (store.py).

A file holds flat fragments of named tensors with their place in the full tensor, so any world size and ZeRO stage reads
them back exactly, and nothing is unpickled. Ray and the loop are not known here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from medim_ray.train import loss_scale, zero
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
        index[fragment.name] = {
            "start": fragment.start,
            "numel": fragment.numel,
            "shape": fragment.shape,
            "kinds": list(fragment.tensors),
        }
        for kind, tensor in fragment.tensors.items():
            tensors[f"{fragment.name}|{kind}"] = tensor.detach().cpu().clone()
    with tempfile.TemporaryDirectory(prefix="medim-ray-") as folder:
        file = Path(folder) / f"rank-{rank:05d}.safetensors"
        save_file(tensors, file)
        entry = store.write(file, name) | {"tensors": index}
    entries: list[Any] = [None] * world_size
    dist.all_gather_object(entries, {file.name: entry})
    if rank == 0:
        files = {file: facts for one in entries for file, facts in one.items()}
        store.commit(
            name,
            {
                "schema_version": SCHEMA_VERSION,
                "step": step,
                "world_size": world_size,
                "optimizer_step": zero.optimizer_step(engine),
                "loss_scale": loss_scale.scaler_state(engine),
                **facts,
                "files": files,
            },
        )
    dist.barrier()
    return name


class SavedTensors:
    """Named tensors of a checkpoint, read by range from the files of all ranks; a file is opened when it is needed.

    files: as in the manifest; local: from a file's name to its local path.
    """

    def __init__(self, files: Mapping[str, Any], local: Callable[[str], Path]) -> None:
        self._local = local
        self._open: dict[str, Any] = {}
        self._pieces: dict[str, list[tuple[int, int, str]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.kinds: dict[str, list[str]] = {}
        for file, facts in sorted(files.items()):
            for name, piece in facts["tensors"].items():
                self.shapes[name], self.kinds[name] = tuple(piece["shape"]), piece["kinds"]
                for kind in piece["kinds"]:
                    place = (piece["start"], piece["start"] + piece["numel"], file)
                    self._pieces.setdefault(f"{name}|{kind}", []).append(place)

    def read(self, name: str, kind: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of a flattened tensor; ValueError where the checkpoint lacks any of them."""
        key = f"{name}|{kind}"
        parts: list[Tensor] = []
        at = start
        for piece_start, piece_end, file in sorted(self._pieces.get(key, [])):
            if piece_start <= at < min(piece_end, start + numel):
                if file not in self._open:
                    self._open[file] = safe_open(self._local(file), framework="pt")
                piece = self._open[file].get_slice(key)
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


def agree_on_newest(store: CheckpointStore, report: Callable[[str], None]) -> Checkpoint | None:
    """Collective: the newest checkpoint that can be used. Rank 0 verifies it, once for all."""
    names: list[str | None] = [None]
    if dist.get_rank() == 0:
        newest = store.newest(report)
        names = [newest.name if newest is not None else None]
    dist.broadcast_object_list(names)
    return store.open(names[0]) if names[0] is not None else None


@torch.no_grad()
def restore(store: CheckpointStore, checkpoint: Checkpoint, engine: Any) -> None:
    """Collective: the whole state of `checkpoint` into the engine, at any world size and stage.

    ValueError where a tensor is missing, has another shape, or is unknown to the model: the configuration differs.
    """
    with store.local_files(checkpoint.name) as local:
        saved = SavedTensors(checkpoint.manifest["files"], local)
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
    if state := checkpoint.manifest.get("loss_scale"):
        loss_scale.restore_scaler(engine, state)


def load_weights(store: CheckpointStore, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every parameter and buffer in full, by its name in the objective, fp32 where training kept fp32."""
    with store.local_files(checkpoint.name) as local:
        saved = SavedTensors(checkpoint.manifest["files"], local)
        return {name: saved.full(name).clone() for name in saved.shapes}
