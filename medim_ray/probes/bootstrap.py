"""Ranking metrics and means with bootstrap intervals over patients, all draws at once. NumPy only; no model, no Ray.

A draw gives each patient a count (a multinomial of the patients), and a metric takes the counts as weights of the
images, so that images of one patient come and go together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_CHUNK = 1 << 22  # numbers held at once by one draw-by-image array


@dataclass(frozen=True)
class Estimate:
    """A value with its bootstrap draws (NaN: the draw lacks a class, or has no image)."""

    value: float
    draws_R: Floats

    def interval(self) -> tuple[float, float]:
        """The central 95 % of the valid draws; NaN where fewer than half of them are valid."""
        if np.isfinite(self.draws_R).mean() < 0.5:
            return float("nan"), float("nan")
        low, high = np.nanpercentile(self.draws_R, [2.5, 97.5])
        return float(low), float(high)

    def minus(self, other: Estimate) -> Estimate:
        """The paired difference; both must come from the same draws of patients."""
        assert len(self.draws_R) == len(other.draws_R)
        return Estimate(self.value - other.value, self.draws_R - other.draws_R)

    def to_json(self) -> dict[str, float | None]:
        """value, low, high; None where undefined."""
        numbers = (self.value, *self.interval())
        return {k: float(v) if np.isfinite(v) else None for k, v in zip(("value", "low", "high"), numbers, strict=True)}


def average(estimates: Sequence[Estimate]) -> Estimate:
    """Mean of several quantities of the same draws of patients; one that is undefined is left out, draw by draw."""
    means = _mean_of_valid(np.array([np.append(estimate.draws_R, estimate.value) for estimate in estimates]))
    return Estimate(float(means[-1]), means[:-1])


def patient_weights(
    patient_ids: Sequence[str], num_draws: int, seed: int, among: Sequence[str] | None = None
) -> Callable[[int, int], Floats]:
    """A function (first draw, last draw) -> [draws, K] weights of the images, reproducible by `seed`.

    among: the patients to draw from, at least those of `patient_ids` (the default); quantities of different images
    whose draws come from the same `among` and `seed` are drawn jointly.
    """
    patients = np.unique(np.asarray(patient_ids if among is None else among, dtype=str))
    patient_K = np.searchsorted(patients, np.asarray(patient_ids, dtype=str))
    num = len(patients)
    counts_RP = np.random.default_rng(seed).multinomial(num, np.full(num, 1.0 / num), size=num_draws)

    def weights(first: int, last: int) -> Floats:
        return counts_RP[first:last, patient_K].astype(np.float64)

    return weights


def bootstrap(
    metric: Callable[[Floats], Floats],
    patient_ids: Sequence[str],
    num_draws: int,
    seed: int,
    among: Sequence[str] | None = None,
) -> Estimate:
    """`metric` maps image weights [R, K] to values [R]; its value at equal weights, and over draws of patients.

    among: see `patient_weights`.
    """
    weights = patient_weights(patient_ids, num_draws, seed, among)
    step = max(1, _CHUNK // max(1, len(patient_ids)))
    draws = [metric(weights(first, min(first + step, num_draws))) for first in range(0, num_draws, step)]
    return Estimate(float(metric(np.ones((1, len(patient_ids))))[0]), np.concatenate(draws))


def auroc(scores_K: Floats, is_positive_K: NDArray[np.bool_], weights_RK: Floats) -> Floats:
    """[R] area under the ROC curve, ties counted half; NaN where a draw lacks positives or negatives."""
    pos_RG, neg_RG = _by_score(scores_K, is_positive_K, weights_RK)
    below_RG = np.cumsum(neg_RG, axis=1) - neg_RG
    pairs_R = pos_RG.sum(axis=1) * neg_RG.sum(axis=1)
    won_R = (pos_RG * (below_RG + 0.5 * neg_RG)).sum(axis=1)
    return np.divide(won_R, pairs_R, out=np.full(len(pairs_R), np.nan), where=pairs_R > 0)


def average_precision(scores_K: Floats, is_positive_K: NDArray[np.bool_], weights_RK: Floats) -> Floats:
    """[R] average precision (step-wise AUPRC, as scikit-learn's); NaN where a draw has no positives or no negatives."""
    pos_RG, neg_RG = (part[:, ::-1] for part in _by_score(scores_K, is_positive_K, weights_RK))
    hits_RG = np.cumsum(pos_RG, axis=1)
    taken_RG = hits_RG + np.cumsum(neg_RG, axis=1)
    precision_RG = np.divide(hits_RG, taken_RG, out=np.zeros_like(hits_RG), where=taken_RG > 0)
    total_R, negatives_R = pos_RG.sum(axis=1), neg_RG.sum(axis=1)
    valid_R = (total_R > 0) & (negatives_R > 0)
    return np.divide((pos_RG * precision_RG).sum(axis=1), total_R, out=np.full(len(total_R), np.nan), where=valid_R)


def macro(metric: Callable[..., Floats], scores_KC: Floats, y_K: NDArray[np.int64], weights_RK: Floats) -> Floats:
    """The positive class of two; else the mean over the classes that a draw holds."""
    num_classes = scores_KC.shape[1]
    classes = (1,) if num_classes == 2 else range(num_classes)
    values_CR = np.stack([metric(scores_KC[:, c], y_K == c, weights_RK) for c in classes])
    return _mean_of_valid(values_CR)


def _mean_of_valid(values_CR: Floats) -> Floats:
    """[R] means over the first axis of what is defined; NaN where nothing is."""
    valid_CR = np.isfinite(values_CR)
    num_R = valid_CR.sum(axis=0)
    total_R = np.where(valid_CR, values_CR, 0.0).sum(axis=0)
    return np.divide(total_R, num_R, out=np.full(len(num_R), np.nan), where=num_R > 0)


def f1_score(predicted_K: NDArray[np.int64], y_K: NDArray[np.int64], num_classes: int, weights_RK: Floats) -> Floats:
    """[R] F1 of the positive class of two, else the mean over the classes that a draw holds; NaN: it holds none."""
    values_CR = []
    for c in (1,) if num_classes == 2 else range(num_classes):
        hits_R = weights_RK @ ((predicted_K == c) & (y_K == c))
        total_R = weights_RK @ (predicted_K == c).astype(np.float64) + weights_RK @ (y_K == c).astype(np.float64)
        in_draw_R = weights_RK @ (y_K == c).astype(np.float64) > 0
        values_CR.append(np.divide(2 * hits_R, total_R, out=np.full(len(total_R), np.nan), where=in_draw_R))
    return _mean_of_valid(np.stack(values_CR))


def mean(values_K: Floats, weights_RK: Floats) -> Floats:
    """[R] weighted mean; NaN where a draw has no image."""
    total_R = weights_RK.sum(axis=1)
    return np.divide(weights_RK @ values_K, total_R, out=np.full(len(total_R), np.nan), where=total_R > 0)


def _by_score(scores_K: Floats, is_positive_K: NDArray[np.bool_], weights_RK: Floats) -> tuple[Floats, Floats]:
    """Weight of positives and of negatives at each distinct score, ascending: two of [R, G]."""
    order_K = np.argsort(scores_K, kind="stable")
    sorted_K = scores_K[order_K]
    starts_G = np.flatnonzero(np.append(True, sorted_K[1:] != sorted_K[:-1]))
    weights_RK, positive_K = weights_RK[:, order_K], is_positive_K[order_K]
    pos_RG = np.add.reduceat(weights_RK * positive_K, starts_G, axis=1)
    neg_RG = np.add.reduceat(weights_RK * ~positive_K, starts_G, axis=1)
    return pos_RG, neg_RG
