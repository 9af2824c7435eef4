"""Names and shapes of published ViT checkpoints, both ways, as pure functions of state dicts.

The middle is timm's layout, which is that of our `ImageEncoder.backbone`. Known besides: the DINOv2 code's own
("torch hub") and Hugging Face's Dinov2Model / Dinov2WithRegistersModel as saved to a file. No file is read here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

State = Mapping[str, Tensor]
Layout = Literal["hf", "torch_hub", "timm", "run"]

MASK_TOKEN = "mask_token"  # [1, D]
CLS_TOKEN, CLS_POSITION = "cls_token", "cls_position"  # [1, 1, D] each

# (Hugging Face, timm) names of a block's parts; query, key and value are one matrix in timm.
_BLOCK = (
    ("norm1", "norm1"),
    ("norm2", "norm2"),
    ("attention.output.dense", "attn.proj"),
    ("layer_scale1.lambda1", "ls1.gamma"),
    ("layer_scale2.lambda1", "ls2.gamma"),
    ("mlp.fc1", "mlp.fc1"),
    ("mlp.fc2", "mlp.fc2"),
    ("mlp.weights_in", "mlp.fc1"),
    ("mlp.weights_out", "mlp.fc2"),
)
_STEM = (
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.register_tokens", "reg_token"),
    ("layernorm", "norm"),
)


@dataclass(frozen=True)
class Weights:
    """A backbone in timm's layout, where it came from, and what timm has no place for.

    extras: MASK_TOKEN; for models with registers also the CLS token and its position before timm adds them up, so that
    they can be written out again bit for bit.
    """

    layout: Layout
    backbone: dict[str, Tensor]
    extras: dict[str, Tensor] = field(default_factory=dict)


def detect(state: State) -> Layout:
    """The layout of a state dict by its keys; ValueError where there is no ViT in it."""
    if any(key.endswith("embeddings.patch_embeddings.projection.weight") for key in state):
        return "hf"
    if "encoder.backbone.patch_embed.proj.weight" in state:
        return "run"
    if any(key.endswith("patch_embed.proj.weight") for key in state):
        hub = any(key.endswith((MASK_TOKEN, "register_tokens")) or ".mlp.w12." in key for key in state)
        return "torch_hub" if hub or any("backbone." in key for key in state) else "timm"
    raise ValueError(f"no ViT in this checkpoint: no patch embedding among its {len(state)} keys {list(state)[:4]}")


def to_timm(state: State) -> Weights:
    """Any known layout -> Weights. Keys that the layout does not know stay as they are: the loader reports them."""
    layout = detect(state)
    if layout == "hf":
        return _fold(layout, _from_hf(_strip(state, r"^(dinov2|dinov2_with_registers)\.")))
    if layout == "run":
        kept = {key: value for key, value in state.items() if key.startswith("encoder.backbone.")}
        return Weights(layout, _strip(kept, r"^encoder\.backbone\."))
    if layout == "timm":
        return Weights(layout, dict(state))
    trees = [tree for tree in ("teacher.", "student.") if f"{tree}backbone.patch_embed.proj.weight" in state]
    prefix = f"{trees[0] if trees else ''}backbone."
    if any(key.startswith(prefix) for key in state):  # a training checkpoint: the teacher's backbone, no heads
        state = {key: value for key, value in state.items() if key.startswith(prefix)}
    return _fold(layout, _from_hub(_strip(state, rf"^({re.escape(prefix)})")))


def to_torch_hub(weights: Weights) -> dict[str, Tensor]:
    """Weights -> the DINOv2 code's layout; the mask token is 0 where none is known."""
    state = _unfold(weights)
    packed = is_swiglu(state)
    renamed = {}
    for key, value in state.items():
        if packed:
            key = key.replace(".mlp.fc1.", ".mlp.w12.").replace(".mlp.fc2.", ".mlp.w3.")
        renamed["register_tokens" if key == "reg_token" else key] = value
    return renamed


def to_hf(weights: Weights) -> dict[str, Tensor]:
    """Weights -> the file layout of Dinov2Model or, with registers, Dinov2WithRegistersModel.

    A ViT without layer scale gets scales of 1, which change nothing; the mask token is 0 where none is known.
    """
    state = _unfold(weights)
    packed = is_swiglu(state)
    renamed = {f"embeddings.{MASK_TOKEN}": state.pop(MASK_TOKEN)}
    for hf, timm in _STEM:
        renamed |= {hf + key[len(timm) :]: value for key, value in state.items() if _is(key, timm)}
    blocks: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        if match := re.match(r"blocks\.(\d+)\.(.+)", key):
            blocks.setdefault(int(match[1]), {})[match[2]] = value
    for index, block in sorted(blocks.items()):
        prefix = f"encoder.layer.{index}."
        for hf, timm in _BLOCK:
            if hf.startswith("mlp.") and hf.startswith("mlp.weights_") != packed:
                continue
            renamed |= {prefix + hf + key[len(timm) :]: value for key, value in block.items() if _is(key, timm)}
        for kind in ("weight", "bias"):
            for name, part in zip(("query", "key", "value"), block[f"attn.qkv.{kind}"].chunk(3), strict=True):
                renamed[f"{prefix}attention.attention.{name}.{kind}"] = part
        for scale in ("layer_scale1.lambda1", "layer_scale2.lambda1"):
            renamed.setdefault(prefix + scale, torch.ones_like(block["norm1.weight"]))
    return {key: value.contiguous() for key, value in renamed.items()}


def is_swiglu(state: State) -> bool:
    """Whether the MLPs are gated (timm's packed form, its first layer twice as wide as the second takes)."""
    return state["blocks.0.mlp.fc1.weight"].shape[0] == 2 * state["blocks.0.mlp.fc2.weight"].shape[1]


def resize_positions(table_1LD: Tensor, num_prefix: int, side: int, layout: Layout, antialias: bool) -> Tensor:
    """A position table for a grid of `side` x `side` patches; the first `num_prefix` rows belong to tokens.

    Each layout's own bicubic law, so that features agree with it: Hugging Face and all models with registers
    (`antialias`) by size, DINOv2 without registers by the scale (side + 0.1) / old side.
    """
    prefix, table = table_1LD[:, :num_prefix], table_1LD[:, num_prefix:]
    old = round(table.shape[1] ** 0.5)
    if old * old != table.shape[1]:
        raise ValueError(f"pos_embed has {table.shape[1]} positions of patches: not a square grid")
    table = table.float().unflatten(1, (old, old)).permute(0, 3, 1, 2)
    table = resize_patches(table, (side, side), by_size=layout == "hf" or antialias, antialias=antialias)
    return torch.cat([prefix, table.flatten(2).transpose(1, 2).to(prefix.dtype)], dim=1)


def resize_patches(table_1DHW: Tensor, size: tuple[int, int], by_size: bool, antialias: bool) -> Tensor:
    """Bicubic to `size`; else than by size, by the scale (n + 0.1) / old, which DINOv2 takes against rounding."""
    if by_size:
        return F.interpolate(table_1DHW, size=size, mode="bicubic", align_corners=False, antialias=antialias)
    scale = tuple((new + 0.1) / old for new, old in zip(size, table_1DHW.shape[-2:], strict=True))
    resized = F.interpolate(table_1DHW, scale_factor=scale, mode="bicubic")
    assert resized.shape[-2:] == size
    return resized


def _is(key: str, name: str) -> bool:
    return key == name or key.startswith(name + ".")


def _strip(state: State, pattern: str) -> dict[str, Tensor]:
    return {re.sub(pattern, "", key): value for key, value in state.items()}


def _from_hub(state: State) -> dict[str, Tensor]:
    renamed = {}
    for key, value in state.items():
        key = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key)  # FSDP checkpoints group blocks in chunks
        key = key.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")
        renamed["reg_token" if key == "register_tokens" else key] = value
    return renamed


def _from_hf(state: State) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    qkv: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        if match := re.match(r"encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(\w+)$", key):
            qkv.setdefault(f"blocks.{match[1]}.attn.qkv.{match[3]}", {})[match[2]] = value
            continue
        new = key
        if match := re.match(r"encoder\.layer\.(\d+)\.(.+)", key):
            hf, timm = next(((h, t) for h, t in _BLOCK if _is(match[2], h)), ("", ""))
            new = f"blocks.{match[1]}.{timm}{match[2][len(hf) :]}" if hf else key
        elif key == f"embeddings.{MASK_TOKEN}":
            new = MASK_TOKEN
        else:
            hf, timm = next(((h, t) for h, t in _STEM if _is(key, h)), ("", ""))
            new = timm + key[len(hf) :] if hf else key
        renamed[new] = value
    for key, parts in qkv.items():
        if len(parts) == 3:
            renamed[key] = torch.cat([parts["query"], parts["key"], parts["value"]])
    return renamed


def _fold(layout: Layout, state: dict[str, Tensor]) -> Weights:
    """Takes out what timm has no place for; timm's models with registers keep no position for CLS, so it is added."""
    extras = {MASK_TOKEN: state.pop(MASK_TOKEN)} if MASK_TOKEN in state else {}
    if "reg_token" in state and {"cls_token", "pos_embed"} <= set(state):
        extras[CLS_TOKEN], extras[CLS_POSITION] = state["cls_token"], state["pos_embed"][:, :1]
        state["cls_token"] = extras[CLS_TOKEN] + extras[CLS_POSITION]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    return Weights(layout, state, extras)


def _unfold(weights: Weights) -> dict[str, Tensor]:
    """The reverse of `_fold`: an unchanged CLS token is split as it was, another one gets position 0."""
    state = dict(weights.backbone)
    state[MASK_TOKEN] = weights.extras.get(MASK_TOKEN, torch.zeros_like(state["cls_token"][0]))
    if "reg_token" in state:
        token = state["cls_token"]
        position = torch.zeros_like(token)
        if CLS_TOKEN in weights.extras:
            old, old_position = weights.extras[CLS_TOKEN], weights.extras[CLS_POSITION]
            if torch.equal(old + old_position, token):
                token, position = old, old_position
        state["cls_token"], state["pos_embed"] = token, torch.cat([position, state["pos_embed"]], dim=1)
    return state
