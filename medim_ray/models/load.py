"""Weights from files into our modules, strictly: every key is matched, resized, missing or unexpected, and said so.

Reads Hugging Face folders and ids, DINOv2 ("torch hub") files, DINO head files, timm files and our own exports; only
safetensors or torch files without free pickles. The renaming itself is in layouts.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from medim_ray.models.heads_dino import DinoHead
from medim_ray.models.layouts import State, Weights, resize_positions, to_timm

_NAMES = ("model.safetensors", "pytorch_model.bin", "model.pth")


@dataclass(frozen=True)
class LoadReport:
    """What became of every key. `resized` maps a key to its old and new shape."""

    matched: tuple[str, ...] = ()
    resized: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()

    def table(self) -> str:
        """One line a kind with its count, and the keys of all but the matched."""
        lines = [f"matched     {len(self.matched):5d}", f"resized     {len(self.resized):5d}"]
        lines += [f"    {key} {list(old)} -> {list(new)}" for key, (old, new) in self.resized.items()]
        for kind in ("missing", "unexpected"):
            keys: tuple[str, ...] = getattr(self, kind)
            lines += [f"{kind:11s} {len(keys):5d}", *(f"    {key}" for key in keys)]
        return "\n".join(lines)

    def check(self, source: str, allow: Collection[str] = ()) -> LoadReport:
        """Itself; ValueError with the table if a missing or unexpected key starts with none of `allow`."""
        wrong = [key for key in (*self.missing, *self.unexpected) if not key.startswith(tuple(allow))]
        if wrong:
            raise ValueError(
                f"{source} does not fit the model: {len(wrong)} keys are missing or unexpected, e.g. {wrong[0]!r}; "
                f"choose the model it was saved from, or allow these prefixes\n{self.table()}"
            )
        return self


def read_state(source: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint: a file, a folder that holds one, or a Hugging Face id "owner/name".

    A torch file is read with weights_only; wrappers such as "model", "state_dict" and "teacher" are opened.
    """
    path = _locate(source, _NAMES)
    try:
        state: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # torch, pickle and safetensors raise half a dozen classes for an unreadable file
        raise ValueError(f"{path} is no readable checkpoint ({error}); use a .safetensors file") from error
    for wrapper in ("model", "state_dict", "teacher"):
        state = state.get(wrapper, state) if isinstance(state, dict) else state
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__} and no names with tensors; save a state_dict()")
    tensors = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
    bad = [key for key, value in tensors.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if bad:
        raise ValueError(
            f"{path} has NaN or infinite weights in {len(bad)} tensors, e.g. {bad[0]!r}; use an earlier one"
        )
    return tensors


def read_config(source: str | Path) -> dict[str, Any]:
    """The config.json of a folder or a Hugging Face id; empty where there is none, as beside a single file."""
    if Path(source).is_file():
        return {}
    try:
        config = json.loads(_locate(source, ("config.json",)).read_text(encoding="utf-8"))
    except ValueError:  # neither there nor readable as JSON
        return {}
    return config if isinstance(config, dict) else {}


def _locate(source: str | Path, names: tuple[str, ...]) -> Path:
    """A file itself, the first of `names` that a folder has, or names[0] of a Hugging Face id."""
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        for name in names:
            if (path / name).is_file():
                return path / name
        raise ValueError(f"{path} holds none of {', '.join(names)}; name the file itself")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and not str(source).startswith("."):
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(str(source), names[0]))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise ValueError(f"{source}: no such file, and it could not be fetched as a model id ({error})") from None
    raise ValueError(f"{source}: no such file or folder; give a checkpoint's path or a model id owner/name")


def load_backbone(backbone: nn.Module, source: str | Path, allow: Collection[str] = ()) -> tuple[LoadReport, Weights]:
    """Loads a checkpoint into an `ImageEncoder.backbone` (or any timm ViT); also what was read, with its extras.

    The position table is resized to the backbone's grid. ValueError with the full table where keys are missing or
    unexpected and not allowed, or where a shape differs. Nothing is loaded then.
    """
    weights = to_timm(read_state(source))
    return load_weights(backbone, weights, str(source), allow), weights


def load_weights(backbone: nn.Module, weights: Weights, source: str, allow: Collection[str] = ()) -> LoadReport:
    """`load_backbone` for weights in memory."""
    own = backbone.state_dict()
    state, resized = dict(weights.backbone), {}
    table, want = state.get("pos_embed"), own.get("pos_embed")
    same_tokens = ("reg_token" in state) == ("reg_token" in own)  # else the tables differ in more than the grid
    if same_tokens and table is not None and want is not None and table.shape[1] != want.shape[1]:
        side = int(backbone.patch_embed.grid_size[0])  # type: ignore[union-attr, index]
        num_prefix = want.shape[1] - side * side
        registers = "reg_token" in state
        state["pos_embed"] = resize_positions(table, num_prefix, side, weights.layout, antialias=registers)
        resized["pos_embed"] = (tuple(table.shape), tuple(want.shape))
    return _load(backbone, state, resized, source, allow)


def load_head(head: DinoHead, source: str | Path, part: str = "", allow: Collection[str] = ()) -> LoadReport:
    """Loads a DINO or iBOT head file (mlp.N.weight, last_layer.weight_g, last_layer.weight_v, any common prefix).

    part: dino_head or ibot_head: of a file that holds more than one head, such as a training checkpoint, this one; the
    teacher's where student and teacher have it.
    """
    return load_head_state(head, _part(read_state(source), part), str(source), allow)


def _part(state: State, part: str) -> State:
    """What is below `part`, the teacher's first; the whole state where nothing is, as in a head's own file."""
    prefixes = {match[1] for key in state if (match := re.match(rf"(.*\b{part}\.)", key))} if part else set()
    if not prefixes:
        return state
    prefix = min(prefixes, key=lambda prefix: ("teacher." not in prefix, prefix))
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def load_head_state(head: DinoHead, state: State, source: str, allow: Collection[str] = ()) -> LoadReport:
    """`load_head` for a state in memory. Newer torch calls the two weights parametrizations; one plain weight is split
    into its length and itself."""
    renamed = {}
    for key, value in state.items():
        key = re.sub(r"^(module\.|student\.|teacher\.|dino_head\.|ibot_head\.|head\.)+", "", key)
        key = key.replace("last_layer.parametrizations.weight.original0", "last_layer.weight_g")
        key = key.replace("last_layer.parametrizations.weight.original1", "last_layer.weight_v")
        if key in renamed:
            heads = sorted(name[: -len(key)].rstrip(".") for name in state if name.endswith(key))
            raise ValueError(
                f"{source} holds several heads ({', '.join(heads)}); save the one to load into its own file"
            )
        renamed[key] = value
    if "last_layer.weight" in renamed:
        plain = renamed.pop("last_layer.weight")
        renamed |= {"last_layer.weight_v": plain, "last_layer.weight_g": plain.norm(dim=1, keepdim=True)}
    return _load(head, renamed, {}, source, allow)


def _load(
    module: nn.Module,
    state: dict[str, Tensor],
    resized: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
    source: str,
    allow: Collection[str],
) -> LoadReport:
    own = module.state_dict()
    shared = [key for key in own if key in state]
    wrong = [
        f"{k} {list(state[k].shape)} instead of {list(own[k].shape)}" for k in shared if state[k].shape != own[k].shape
    ]
    if wrong:
        raise ValueError(f"{source} does not fit the model: {'; '.join(wrong[:5])}; choose the model it was saved from")
    report = LoadReport(
        matched=tuple(key for key in shared if key not in resized),
        resized=resized,
        missing=tuple(key for key in own if key not in state),
        unexpected=tuple(key for key in state if key not in own),
    ).check(source, allow)
    module.load_state_dict({key: state[key] for key in shared}, strict=False)
    return report
