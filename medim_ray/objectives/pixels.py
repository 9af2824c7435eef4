"""What reconstruction objectives share: the image view of a batch, patches of pixels, errors, what masks tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from medim_ray.masking.base import Masks
from medim_ray.types import Batch

IMAGE_VIEW = "image"
_MOST = 0.5  # share of fallbacks that a run is warned of


def whole_images(batch: Batch) -> Tensor:
    """[B, 1, H, W], the view of all objectives but DINO's; ValueError where the crop makes no such view."""
    if IMAGE_VIEW not in batch.views:
        views = ", ".join(sorted(batch.views))
        raise ValueError(f"crop.name makes {views}, the objective needs {IMAGE_VIEW!r}: use crop.name=pad_crop")
    return batch.views[IMAGE_VIEW]


def visible_patches(hidden_BN: Tensor) -> Tensor:
    """Indices [B, K] of the patches that are not hidden, in order; ValueError where their number varies."""
    counts_B = hidden_BN.sum(dim=1)
    least, most = torch.aminmax(counts_B)
    if least != most:
        raise ValueError(
            f"masking hides {int(least)} to {int(most)} patches a sample: skipping hidden patches needs equal numbers; "
            "use masking.name=uniform, or a strategy with masking.on=input"
        )
    return (~hidden_BN).nonzero()[:, 1].view(len(hidden_BN), -1)


def patchify(images_BCHW: Tensor, patch_size: int) -> Tensor:
    """[B, C, H, W] -> [B, N, C * patch_size ** 2], patches row by row."""
    x = images_BCHW.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)  # B C h w p p
    return x.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def unit_patches(patches_BNP: Tensor) -> Tensor:
    """Each patch with mean 0 and variance 1 (He et al. 2022: "normalized pixel values")."""
    var_BN1, mean_BN1 = torch.var_mean(patches_BNP, dim=-1, keepdim=True)
    return (patches_BNP - mean_BN1) / (var_BN1 + 1e-6).sqrt()


def hidden_mean(error_BN: Tensor, hidden_BN: Tensor) -> Tensor:
    """Mean over the hidden patches of each sample, then over samples: a sample weighs the same in any batch."""
    weight_BN = hidden_BN.to(error_BN.dtype)
    return ((error_BN * weight_BN).sum(dim=1) / weight_BN.sum(dim=1).clamp_min(1)).mean()


def mask_logs(masks: Masks, names: Sequence[str]) -> dict[str, Tensor]:
    """By strategy: the share of hidden patches and, where there is a map, the share of samples that fell back."""
    logs = {}
    for place, name in enumerate(names):
        logs[f"mask/{name}/hidden_ratio"] = masks.hidden_SBN[place].float().mean()
        if masks.maps_SBN is not None:
            logs[f"mask/{name}/fallback_ratio"] = masks.fallback_SB[place].float().mean()
    return logs


def mask_warnings(logs: Mapping[str, float]) -> list[str]:
    """Strategies that had no word to go by for most images of a step, in words without numbers: told once a run."""
    return [
        f"{name.split('/')[1]} finds no word to go by in most reports and masks their images at random: are they "
        "empty, or in a language that the vocabulary does not know (text.mesh)?"
        for name, share in logs.items()
        if name.startswith("mask/") and name.endswith("/fallback_ratio") and share > _MOST
    ]
