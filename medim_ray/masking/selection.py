"""The law of report-guided masks on the device: which patches are high, which of them are hidden. One batched sort.

MedIM's code (PAPERS.md, MedIM, "Masking"). Imported by `resolve` alone, because it needs torch.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from medim_ray.masking.report import ReportMasking


def high_patches(maps_XN: Tensor, ratio: float) -> Tensor:
    """bool [..., N]: strictly above the value at descending index int(N * ratio) (the paper's law: ties are low)."""
    num_patches = maps_XN.shape[-1]
    # kthvalue counts from 1 and from the smallest; it is several times faster than topk.
    threshold_X1 = maps_XN.kthvalue(num_patches - int(num_patches * ratio), dim=-1, keepdim=True).values
    return maps_XN > threshold_X1


@functools.cache
def _shares(num_patches: int, diversity: float) -> Tensor:
    """How many of n high patches and of the others are hidden, for n = 0 to N: [N + 1, 2].

    In Python's float arithmetic, as the paper's code: of 98 and 98, 88 and 9 = int((1 - 0.9) * 98).
    """
    counts = [(int(diversity * n), int((1 - diversity) * (num_patches - n))) for n in range(num_patches + 1)]
    return torch.tensor(counts)


@torch.no_grad()
def select_hidden(
    maps_XN: Tensor, noise_XN: Tensor, has_word_X: Tensor, config: ReportMasking.Config
) -> tuple[Tensor, Tensor]:
    """Hidden patches bool [..., N] and fallback rows bool [...], all rows at once.

    Noise in [0, 1) orders the patches of a class. One sort puts the high ones first, so the first few of the high and
    the first few of the low are two runs of sorted places. Rows without a word, or with a flat map, fall back.
    """
    num_patches = maps_XN.shape[-1]
    count = int(num_patches * config.ratio)
    high_XN = high_patches(maps_XN, config.ratio) & has_word_X[..., None]
    num_high_X1 = high_XN.sum(dim=-1, keepdim=True)
    fallback_X1 = num_high_X1 == 0
    shares_N2 = _shares(num_patches, config.diversity).to(maps_XN.device)
    take_high_X1, take_low_X1 = shares_N2[num_high_X1].unbind(-1)
    if config.on == "input":
        take_low_X1 = torch.minimum(count - take_high_X1, num_patches - num_high_X1)
        take_high_X1 = count - take_low_X1
    elif config.fallback != "paper":
        in_fallback = count if config.fallback == "uniform" else 0
        take_low_X1 = torch.where(fallback_X1, in_fallback, take_low_X1)
    order_XN = (noise_XN + (~high_XN)).argsort(dim=-1, stable=True)
    place_N = torch.arange(num_patches, device=maps_XN.device)
    taken_XN = (place_N < take_high_X1) | ((place_N >= num_high_X1) & (place_N < num_high_X1 + take_low_X1))
    hidden_XN = torch.zeros_like(high_XN).scatter_(-1, order_XN, taken_XN)
    return hidden_XN, fallback_X1.squeeze(-1)
