"""Segmentation heads on feature maps of four depths: linear, SETR with progressive upsampling, UPerNet; and their loss.

Sources: PAPERS.md (RAD-DINO's and MedIM's downstream tasks); UPerNet's pyramid is transformers' own, the neck that
makes a pyramid of a ViT's maps is BEiT's (Bao et al. 2022, appendix). Encoders and images are not known here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEADS = ("linear", "upernet", "setr")
_FOCAL, _GAMMA = 10.0, 2.0  # 10 * focal - log(dice), MedIM's SIIM task; focal as Lin et al. 2017


def build_head(name: str, widths: Sequence[int], is_pyramid: bool, patch_size: int, num_targets: int) -> nn.Module:
    """The head called `name` (one of HEADS): four maps [B, widths[k], h, w] -> logits [B, T, H, W] of its own size."""
    if name == "linear":
        return LinearHead(widths[-1], num_targets)
    if name == "setr":
        return SetrHead(widths[-1], patch_size, num_targets)
    assert name == "upernet", name
    return UperNet(widths, is_pyramid, num_targets)


def inner_width(width: int, most: int = 512) -> int:
    """Channels inside a head: two thirds of the encoder's, at least 16 and at most 512 (the papers', for 768)."""
    return max(16, min(most, width * 2 // 3 // 16 * 16))


class LinearHead(nn.Module):
    """One weight a channel of the deepest map, and target."""

    def __init__(self, width: int, num_targets: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width, affine=False)
        self.classifier = nn.Conv2d(width, num_targets, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        out: Tensor = self.classifier(self.norm(maps[-1]))
        return out


class SetrHead(nn.Module):
    """SETR-PUP (Zheng et al. 2021): [conv3x3, norm, ReLU, bilinear x2] on the deepest map, channels halved each time.

    Stages up to a quarter of the input's side: the logits are enlarged from there.
    """

    def __init__(self, width: int, patch_size: int, num_targets: int) -> None:
        super().__init__()
        num_stages = max(1, round(math.log2(patch_size)) - 2)
        inner = [max(16, inner_width(width) >> k) for k in range(num_stages)]
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU())
            for before, after in zip([width, *inner], inner, strict=False)
        )
        self.classifier = nn.Conv2d(inner[-1], num_targets, 3, padding=1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        x = maps[-1]
        for stage in self.stages:
            x = F.interpolate(stage(x), scale_factor=2, mode="bilinear", align_corners=False)
        out: Tensor = self.classifier(x)
        return out


class UperNet(nn.Module):
    """UPerNet's pyramid pooling and feature pyramid (transformers) on four maps, at strides 4, 8, 16 and 32.

    Maps of one size (a ViT's) become such a pyramid: x4 and x2 by transposed convolutions, as they are, halved.
    """

    def __init__(self, widths: Sequence[int], is_pyramid: bool, num_targets: int) -> None:
        from transformers import UperNetConfig
        from transformers.models.upernet.modeling_upernet import UperNetHead

        super().__init__()
        self.neck: nn.ModuleList | None = None
        inner = inner_width(widths[-1] // (4 if is_pyramid else 1))
        if not is_pyramid:
            first, second, third, last = widths
            norm = nn.BatchNorm2d(inner)
            self.neck = nn.ModuleList([
                nn.Sequential(nn.ConvTranspose2d(first, inner, 2, 2), norm, nn.GELU(),
                              nn.ConvTranspose2d(inner, inner, 2, 2)),
                nn.ConvTranspose2d(second, inner, 2, 2),
                nn.Conv2d(third, inner, 1),
                nn.Sequential(nn.Conv2d(last, inner, 1), nn.MaxPool2d(2, ceil_mode=True)),
            ])  # fmt: skip
            widths = (inner,) * 4
        config = UperNetConfig(hidden_size=inner, num_labels=num_targets)
        self.head = UperNetHead(config, list(widths))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        if self.neck is not None:
            maps = [step(x) for step, x in zip(self.neck, maps, strict=True)]
        out: Tensor = self.head(list(maps))
        return out


def segmentation_loss(logits_BTHW: Tensor, masks_BTHW: Tensor) -> Tensor:
    """10 * focal - log(dice), MedIM's for SIIM; dice soft, of each target over the batch, 1 where both are empty."""
    truth = masks_BTHW.to(logits_BTHW.dtype)
    entropy = F.binary_cross_entropy_with_logits(logits_BTHW, truth, reduction="none")
    focal = ((1.0 - torch.exp(-entropy)) ** _GAMMA * entropy).mean()
    found = logits_BTHW.sigmoid()
    common_T = (found * truth).sum(dim=(0, 2, 3))
    total_T = found.sum(dim=(0, 2, 3)) + truth.sum(dim=(0, 2, 3))
    dice_T = (2.0 * common_T + 1.0) / (total_T + 1.0)
    return _FOCAL * focal - dice_T.log().mean()
