"""Crops of several sizes through a timm block in one pass: every layer but the attention sees their tokens as one
matrix, and a token attends to those of its own crop.

A transformer block is few large products and many small ones; packed, crops of 98 pixels ride along with those of 224.
Attention runs once for each size, by the faster kernel and without a mask (DINOv2's code does this with a
block-diagonal mask, which only some kernels take).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from medim_ray.models.blocks import attention


@dataclass(frozen=True)
class Pack:
    """Where tokens of crops lie. sizes: (crops, tokens a crop) of each size in turn; crop_T: the crop of a token;
    first_C: the row of each crop's first token."""

    sizes: tuple[tuple[int, int], ...]
    crop_T: Tensor
    first_C: Tensor

    @classmethod
    def of(cls, groups: Sequence[Tensor]) -> tuple[Pack, Tensor]:
        """From tokens [B, L, D] of each size to the pack and its matrix [T, D]."""
        sizes = tuple((len(group), group.shape[1]) for group in groups)
        x_TD = torch.cat([group.flatten(0, 1) for group in groups])
        lengths_C = torch.tensor([length for num, length in sizes for _ in range(num)], device=x_TD.device)
        crop_T = torch.repeat_interleave(lengths_C, output_size=len(x_TD))
        return cls(sizes, crop_T, lengths_C.cumsum(0) - lengths_C), x_TD


def run_packed(block: Any, x_TD: Tensor, pack: Pack, rows_R: Tensor | None = None) -> Tensor:
    """A timm Block on packed tokens: [T, D], or [R, D] of the rows `rows_R` alone.

    All tokens are attended to; with `rows_R`, what follows the attention is computed for these alone, which with few of
    them saves three quarters of the block. The numbers are those of the block run on each size by itself. Stochastic
    depth drops whole crops, drawn for all sizes together.
    """
    attn = block.attn
    qkv_T3Hd = attn.qkv(block.norm1(x_TD)).unflatten(1, (3, attn.num_heads, attn.head_dim))
    parts = qkv_T3Hd.split([num * length for num, length in pack.sizes])
    y_RC = torch.cat([_attend(attn, part.unflatten(0, size)) for part, size in zip(parts, pack.sizes, strict=True)])
    x_RD, crop_R = x_TD, pack.crop_T
    if rows_R is not None:
        y_RC, x_RD, crop_R = (values.index_select(0, rows_R) for values in (y_RC, x_RD, crop_R))

    def drop(path: nn.Module, values_RD: Tensor) -> Tensor:
        if isinstance(path, nn.Identity) or not path.training:
            return values_RD
        return values_RD * path(values_RD.new_ones(len(pack.first_C), 1)).index_select(0, crop_R)

    x_RD = x_RD + drop(block.drop_path1, block.ls1(attn.proj_drop(attn.proj(attn.norm(y_RC)))))
    return x_RD + drop(block.drop_path2, block.ls2(block.mlp(block.norm2(x_RD))))


def _attend(attn: Any, qkv_BL3Hd: Tensor) -> Tensor:
    """[B * L, H * d] what the tokens of crops of one size take from each other."""
    query_BHLd, key_BHLd, value_BHLd = qkv_BL3Hd.permute(2, 0, 3, 1, 4).unbind(0)
    dropout = attn.attn_drop.p if attn.training else 0.0
    out_BHLd = attention(attn.q_norm(query_BHLd), attn.k_norm(key_BHLd), value_BHLd, dropout)
    return out_BHLd.transpose(1, 2).flatten(2).flatten(0, 1)
