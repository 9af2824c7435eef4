"""The linear head of the segmentation probe: a ridge regression of the share of a patch that a target covers.

A task of Ray fits one; it loads NumPy and OpenCV, no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medim_ray.probes.bootstrap import Floats
from medim_ray.probes.truth import dice, enlarged

_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # times the number of patches, on standardised tokens
_NUM_THRESHOLDS = 24


@dataclass(frozen=True, kw_only=True)
class Head:
    """A linear head of one encoder for one target: share of a patch = (token - mean_D) @ weights_D + offset."""

    weights_D: Floats
    mean_D: Floats
    offset: float
    threshold: float

    def __call__(self, tokens_BND: NDArray[np.floating[Any]]) -> Floats:
        """[B, N] maps."""
        found: Floats = (np.asarray(tokens_BND, dtype=np.float64) - self.mean_D) @ self.weights_D + self.offset
        return found


@dataclass(frozen=True, kw_only=True)
class Learn:
    """What the heads of one encoder learn from: patches [P, D] with the share of each target, and for the choice of
    penalty and threshold whole images, tokens [N, D] and masks [targets, H, W]."""

    tokens_PD: NDArray[Any]
    shares_PT: NDArray[Any]
    chosen: Sequence[tuple[NDArray[Any], NDArray[Any]]]


def fit_head(learn: Learn, target: int) -> Head:
    """The head whose penalty and threshold give the best mean Dice over the chosen images with the lesion."""
    tokens_PD, share_P = learn.tokens_PD.astype(np.float64), learn.shares_PT[:, target].astype(np.float64)
    mean_D, spread_D = tokens_PD.mean(axis=0), tokens_PD.std(axis=0)
    scale_D = np.where(spread_D > 1e-9, spread_D, 1.0)
    standard_PD = (tokens_PD - mean_D) / scale_D
    gram_DD = standard_PD.T @ standard_PD
    product_D = standard_PD.T @ (share_P - share_P.mean())
    best: tuple[float, Head] | None = None
    for penalty in _PENALTIES[::-1]:  # of equals the strongest
        weights_D = np.linalg.solve(gram_DD + penalty * len(share_P) * np.eye(len(gram_DD)), product_D) / scale_D
        head = Head(weights_D=weights_D, mean_D=mean_D, offset=float(share_P.mean()), threshold=0.0)
        threshold, value = _best_threshold(head, learn, target)
        if best is None or value > best[0]:
            best = value, Head(weights_D=weights_D, mean_D=mean_D, offset=head.offset, threshold=threshold)
    assert best is not None
    return best[1]


def _best_threshold(head: Head, learn: Learn, target: int) -> tuple[float, float]:
    """The threshold with the best mean Dice over the chosen images with the lesion, and that Dice."""
    return best_threshold(
        [
            (enlarged(head(tokens_ND), masks.shape[-1]), masks[target])
            for tokens_ND, masks in learn.chosen
            if masks[target].any()
        ]
    )


def best_threshold(pairs: Sequence[tuple[NDArray[Any], NDArray[np.bool_]]]) -> tuple[float, float]:
    """The threshold of maps with the best mean Dice against masks, none of them empty, and that Dice."""
    values = np.concatenate([found[mask] for found, mask in pairs])
    tried = np.unique(np.quantile(values, np.linspace(0.02, 0.98, _NUM_THRESHOLDS)))
    means = [float(np.mean([dice(found >= cut_at, mask) for found, mask in pairs])) for cut_at in tried]
    return float(tried[int(np.argmax(means))]), max(means)
