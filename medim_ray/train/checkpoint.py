"""The state of a run in files and back: one safetensors file a rank, then the manifest, which commits (store.py).

A file holds flat fragments of named tensors with their place in the full tensor, so any world size and ZeRO stage reads
them back exactly, and nothing is unpickled. Ray and the loop are not known here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from medim_ray.train import loss_scale, zero
from medim_ray.train.store import SCHEMA_VERSION, Checkpoint, CheckpointStore

_PIECE_BYTES = 4 << 20  # written at a time: a larger one would hold up the training thread (a copy keeps the GIL)
_DTYPES = {  # the names of the format
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class State:
    """One rank's part of the training state after a step, copied: nothing that the next step changes."""

    step: int
    optimizer_step: float
    loss_scale: dict[str, Any]
    tensors: dict[str, Tensor]  # "name|kind" -> flat, on the host
    index: dict[str, Any]  # name -> its place in the full tensor, as the manifest has it


@torch.no_grad()
def copy_state(engine: Any, step: int, spare: Mapping[str, Tensor]) -> State:
    """What this rank has to save of the state after `step` optimizer steps; the one part of a save that a step waits
    for. spare: tensors of a state that is written, to be filled again (fresh memory costs more than the copy)."""
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
            key = f"{fragment.name}|{kind}"
            room = spare.get(key)
            if room is None or (room.shape, room.dtype) != (tensor.shape, tensor.dtype):
                room = torch.empty(tensor.shape, dtype=tensor.dtype)
            tensors[key] = room.copy_(tensor)
    return State(step, zero.optimizer_step(engine), loss_scale.scaler_state(engine), tensors, index)


def write_state(
    store: CheckpointStore, name: str, state: State, facts: dict[str, Any], before: Callable[[], None], group: Any
) -> str:
    """Collective over `group`: every rank calls `before` and writes its file, then rank 0 the manifest, which commits.

    Returns why there is no such checkpoint, in words and on every rank; "" where it is committed.
    """
    rank = dist.get_rank()
    file = f"rank-{rank:05d}.safetensors"
    entry: dict[str, Any] = {}
    problem = ""
    try:
        before()
        entry = store.write(name, file, lambda: _serialized(state.tensors)) | {"tensors": state.index}
    except Exception as error:  # whatever it is, the other ranks wait to hear of it
        problem = f"rank {rank}: {_words(error)}"
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (file, entry, problem), group=group)
    problem = "; ".join(told for *_, told in parts if told)
    if rank == 0:
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "step": state.step,
            "world_size": len(parts),
            "optimizer_step": state.optimizer_step,
            "loss_scale": state.loss_scale,
            **facts,
            "files": {file: entry for file, entry, _ in parts},
        }
        try:
            if problem:
                store.remove(name)
            else:
                store.commit(name, manifest)
        except Exception as error:
            problem = problem or _words(error)
    verdict = [problem]
    dist.broadcast_object_list(verdict, group=group)
    return verdict[0]


def _words(error: Exception) -> str:
    """The first line of an error, after its kind where that says more."""
    text = next(iter(str(error).splitlines()), "")
    return text if isinstance(error, OSError) and text else f"{type(error).__name__}: {text}"


def _serialized(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """The bytes of a safetensors file in pieces, without a second copy of the tensors (the package would make one)."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # keeps each one aligned
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for _, tensor in ordered:
        data = tensor.contiguous().view(torch.uint8).numpy().data
        for at in range(0, len(data), _PIECE_BYTES):
            yield data[at : at + _PIECE_BYTES]


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
