"""Operations, memory traffic and kept activations of the passes of one image, from shapes alone.

A pass is one module run over one image. Matrix products are counted as two operations a multiply-add; the rules per
transformer block are written out in `vit_pass` and checked against torch's own counters in the tests.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from medim_ray.models.vit import ImageEncoder

# Elements per token and unit of width that a pre-norm block (timm) keeps for its backward pass: the inputs of both
# norms and of both MLP activations, what enters each linear layer, and q, k, v; layer scale keeps its two inputs.
KEPT_PER_TOKEN = 16
KEPT_PER_TOKEN_LAYERSCALE = 18
# Elements read and written by the parts of a block that are not matrix products: norms 2 x 2, residual sums 2 x 3, GELU
# 8; backwards 2 x 3 and 2 x 3 and 12. Layer scale adds 4 and 8.
MOVED_FORWARD, MOVED_BACKWARD = 18, 24
MOVED_FORWARD_LAYERSCALE, MOVED_BACKWARD_LAYERSCALE = 22, 32


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One module over one image of the batch.

    forward_flops, backward_flops: operations; backward 0 for a teacher. moved_bytes: traffic of everything that is not
    a matrix product, forward and backward. kept_bytes: activations kept for the backward pass, and the same with
    activation checkpointing (block inputs only); block_bytes: what one recomputed block needs beside those.
    """

    name: str
    forward_flops: float
    backward_flops: float
    moved_bytes: float
    kept_bytes: float
    kept_checkpointed_bytes: float
    block_bytes: float

    @property
    def recomputed_flops(self) -> float:
        """Forward operations that checkpointing repeats: those of passes that it keeps less of."""
        return self.forward_flops if self.kept_checkpointed_bytes < self.kept_bytes else 0.0


@dataclass(frozen=True, kw_only=True)
class Vit:
    """The shape of a timm ViT: D, blocks, heads, MLP width, patch side, CLS and register tokens, layer scale or not."""

    width: int
    depth: int
    num_heads: int
    mlp_width: int
    patch_size: int
    num_prefix_tokens: int
    layer_scale: bool

    def num_tokens(self, image_size: int) -> int:
        """Patches of a square image and the prefix tokens."""
        return (image_size // self.patch_size) ** 2 + self.num_prefix_tokens


def meta_encoder(config: ImageEncoder.Config) -> ImageEncoder:
    """The encoder with its shapes but without memory or weights (torch's meta device)."""
    sizes = {name: getattr(config, name) for name in config.__dataclass_fields__ if name != "init"}
    with torch.device("meta"):
        return ImageEncoder(ImageEncoder.Config(init="random", **sizes))


def vit_of(encoder: ImageEncoder) -> Vit | None:
    """The shape of the encoder's ViT, None for a ResNet."""
    backbone: Any = encoder.backbone
    if not encoder.takes_tokens:
        return None
    block = backbone.blocks[0]
    return Vit(
        width=encoder.width,
        depth=len(backbone.blocks),
        num_heads=int(block.attn.num_heads),
        mlp_width=int(block.mlp.fc1.out_features),
        patch_size=encoder.patch_size,
        num_prefix_tokens=encoder.num_prefix_tokens,
        layer_scale=not isinstance(block.ls1, nn.Identity),
    )


def vit_pass(
    vit: Vit,
    name: str,
    num_tokens: float,
    num_crops: int,
    *,
    num_patches: float,
    element_bytes: int,
    trained: bool = True,
    block_share: float = 1.0,
) -> Pass:
    """`num_crops` crops of `num_tokens` tokens through the ViT.

    num_patches: patches that the embedding projects, of gray pixels (all patches, also where only some tokens go on).
    block_share: share of the samples that a block computes (drop path that skips), 1 otherwise.
    """
    width, tokens = vit.width, num_tokens * num_crops * block_share
    products = 2.0 * (4 * width * width + 2 * width * vit.mlp_width)
    attention = 4.0 * num_tokens * width
    blocks = vit.depth * tokens * (products + attention)
    embed = 2.0 * vit.patch_size**2 * width * num_patches * num_crops
    # Units of width: 12 of the 16 do not depend on the MLP; its hidden layer is kept twice.
    wide = vit.mlp_width / width
    kept = (KEPT_PER_TOKEN_LAYERSCALE if vit.layer_scale else KEPT_PER_TOKEN) - 8 + 2 * wide
    forward = (MOVED_FORWARD_LAYERSCALE if vit.layer_scale else MOVED_FORWARD) - 8 + 2 * wide
    backward = (MOVED_BACKWARD_LAYERSCALE if vit.layer_scale else MOVED_BACKWARD) - 12 + 3 * wide
    moved = forward + (backward if trained else 0.0)
    inputs = element_bytes * float(vit.patch_size) ** 2 * num_patches * num_crops
    ends = inputs + element_bytes * width * num_tokens * num_crops
    per_block = element_bytes * tokens * (kept * width + vit.num_heads / 3)
    return Pass(
        name=name,
        forward_flops=blocks + embed,
        backward_flops=2.0 * blocks + embed if trained else 0.0,
        moved_bytes=element_bytes * vit.depth * tokens * moved * width + (2.0 if trained else 1.0) * ends,
        kept_bytes=(vit.depth * per_block + ends) if trained else 0.0,
        kept_checkpointed_bytes=element_bytes * vit.depth * tokens * width + ends if trained else 0.0,
        # Without a backward pass nothing is kept, but the largest block is alive for a moment.
        block_bytes=per_block,
    )


def mlp_pass(
    name: str, widths: list[int], num_rows: float, *, element_bytes: int, row_bytes: float = 0.0, trained: bool = True
) -> Pass:
    """Rows through linear layers of these widths with an activation between them; row_bytes: kept beside them a row."""
    flops = sum(2.0 * a * b for a, b in itertools.pairwise(widths)) * num_rows
    kept = num_rows * (element_bytes * (widths[0] + 2.0 * sum(widths[1:-1]) + 2.0 * widths[-1]) + row_bytes)
    return Pass(
        name=name,
        forward_flops=flops,
        backward_flops=2.0 * flops if trained else 0.0,
        moved_bytes=kept * (2.0 if trained else 1.0),
        kept_bytes=kept if trained else 0.0,
        kept_checkpointed_bytes=kept if trained else 0.0,
        block_bytes=0.0 if trained else kept,
    )


def traced_pass(name: str, run: Callable[[], Tensor], parameters: list[nn.Parameter], element_bytes: int) -> Pass:
    """The pass of modules without a formula (convolutions), counted while `run` computes ONE image on meta tensors.

    run: forward of the modules, returns any tensor that depends on all of them.
    """
    own = {p.untyped_storage()._cdata for p in parameters}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with FlopCounterMode(display=False) as forward:
            out = run()
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
    num_bytes = sum(kept.values()) * element_bytes / 4
    return Pass(
        name=name,
        forward_flops=float(forward.get_total_flops()),
        backward_flops=float(backward.get_total_flops()),
        moved_bytes=3.0 * num_bytes,
        kept_bytes=num_bytes,
        kept_checkpointed_bytes=num_bytes,
        block_bytes=0.0,
    )
