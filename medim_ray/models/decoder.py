"""Decoders that draw pixels from patch features: MAE's light transformer and MedIM's SETR convolutions.

They know shapes only: which patches are hidden, what the target is and what a pixel costs is the objective's matter.
Sources: He et al. 2022 (MAE, section 3); PAPERS.md, MedIM ("Decoder: SETR").
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medim_ray.models.blocks import pick_attention, recomputed
from medim_ray.models.norms import build_norm
from medim_ray.models.vit import MaskToken
from medim_ray.types import Grid


def sine_positions(grid: Grid, width: int) -> Tensor:
    """Fixed 2-D sine-cosine positions [N, width]; half of the channels for the row, half for the column."""
    quarter = width // 4
    rates_Q = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    parts = []
    for place_N in (
        torch.arange(grid.height).repeat_interleave(grid.width),
        torch.arange(grid.width).repeat(grid.height),
    ):
        angles_NQ = place_N[:, None] * rates_Q
        parts += [angles_NQ.sin(), angles_NQ.cos()]
    return torch.cat(parts, dim=1).float()


class MaeDecoder(nn.Module):
    """Visible patch features -> pixels of every patch [B, N, patch_size ** 2].

    Hidden places hold a learned token; all places get fixed positions; the image's global vector leads as a further
    token. Raises ValueError where `width` is not a multiple of 4 and of `num_heads`.
    """

    def __init__(self, in_width: int, grid: Grid, patch_size: int, width: int, depth: int, num_heads: int) -> None:
        from timm.models.vision_transformer import Block  # as late as the encoder's, see backbones.py

        super().__init__()
        if width % 4 or width % num_heads:
            raise ValueError(
                f"objective.decoder_width={width}: must be a multiple of 4 and of objective.decoder_heads={num_heads}"
            )
        self.num_patches = grid.num_patches
        self.project = nn.Linear(in_width, width)
        self.mask_token = MaskToken(width)
        self.positions_ND: Tensor
        self.register_buffer("positions_ND", sine_positions(grid, width), persistent=False)
        self.blocks = nn.Sequential(*(Block(width, num_heads, qkv_bias=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.pixels = nn.Linear(width, patch_size**2)
        self._recomputes = False

    def checkpoint_activations(self) -> None:
        """While it trains, blocks keep only their inputs for the backward pass."""
        self._recomputes = True

    def compile_blocks(self) -> None:
        """Compiles the blocks at their first call."""
        for block in self.blocks:
            block.compile()

    def forward(self, global_BD: Tensor, visible_BKD: Tensor, visible_BK: Tensor) -> Tensor:
        """visible_BK: int64 patch indices of the rows of `visible_BKD`."""
        x_BLD = self.project(torch.cat([global_BD[:, None], visible_BKD], dim=1))
        index_BKD = visible_BK[:, :, None].expand(-1, -1, x_BLD.shape[2])
        full_BND = self.mask_token().to(x_BLD.dtype).expand(len(x_BLD), self.num_patches, -1)
        full_BND = full_BND.scatter(1, index_BKD, x_BLD[:, 1:]) + self.positions_ND.to(x_BLD.dtype)
        x_BLD = torch.cat([x_BLD[:, :1], full_BND], dim=1)
        pick_attention(self.blocks, x_BLD)
        for block in self.blocks:
            x_BLD = recomputed(block, x_BLD) if self._recomputes and self.training else block(x_BLD)
        return self.pixels(self.norm(x_BLD[:, 1:]))


class SetrDecoder(nn.Module):
    """Patch features -> images [S * B, 1, H, W] before tanh, one head a strategy; the trunk is shared.

    A stage is conv3x3, norm, ReLU, nearest x2; one for each factor of two of the patch size (4 for 16 pixels; widths
    512, 256, 128, 64 in the paper, whose last is repeated or whose rest is dropped). What the factors of two leave over
    (a patch of 14 pixels) is resized bilinearly.
    """

    def __init__(
        self, in_width: int, grid: Grid, patch_size: int, widths: tuple[int, ...], num_heads: int, norm: str
    ) -> None:
        super().__init__()
        num_stages = max(1, round(math.log2(patch_size)))
        widths = (*widths, *(widths[-1],) * num_stages)[:num_stages]
        self.grid = grid
        self.image_size = (grid.height * patch_size, grid.width * patch_size)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, padding=1, bias=False), build_norm(norm, after), nn.ReLU())
            for before, after in zip((in_width, *widths), widths, strict=False)
        )
        self.heads = nn.ModuleList(nn.Conv2d(widths[-1], 1, 3, padding=1) for _ in range(num_heads))

    def forward(self, features_SBND: Tensor) -> Tensor:
        """[S, B, N, D] -> [S, B, 1, H, W]; strategy s goes through head s."""
        num_strategies = len(features_SBND)
        x = features_SBND.flatten(0, 1).transpose(1, 2).unflatten(2, (self.grid.height, self.grid.width))
        for stage in self.stages:
            x = F.interpolate(stage(x), scale_factor=2, mode="nearest")
        if x.shape[-2:] != self.image_size:
            x = F.interpolate(x, size=self.image_size, mode="bilinear", align_corners=False)
        parts = x.unflatten(0, (num_strategies, -1))
        return torch.stack([head(part) for head, part in zip(self.heads, parts, strict=True)])
