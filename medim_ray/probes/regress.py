"""Regression from frozen features: standardised ridge under the protocol of protocol.py, judged by MAE and R²."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from medim_ray.probes.bootstrap import Estimate, Floats, bootstrap, mean
from medim_ray.probes.protocol import Fold, choosing_folds, make_protocol
from medim_ray.probes.tasks import NumberTask

_PENALTIES = (1e5, 1e4, 1e3, 1e2, 1e1)  # Ridge's alpha, the strongest first
_TYPICAL = 1e3  # where nothing is there to choose by


@dataclass(frozen=True, kw_only=True)
class NumberScores:
    """MAE (in the label's unit) and R² of one encoder; `baseline` is MAE and R² of predicting the training mean.

    judged_K, predicted_K: the images judged, as positions in the task, and what was predicted; parts: Protocol.parts.
    """

    metrics: Mapping[str, Estimate]
    baseline: Mapping[str, Estimate]
    protocol: str
    num_images: int
    num_patients: int
    judged_K: NDArray[np.int64]
    predicted_K: Floats
    parts: tuple[str, ...]


def regress(
    task: NumberTask,
    features_KD: NDArray[np.floating[Any]],
    patient_ids: Sequence[str],
    splits: Sequence[str],
    *,
    num_folds: int,
    num_bootstrap: int,
    seed: int,
    among: Sequence[str] | None = None,
) -> NumberScores:
    """As classify.probe, for a number. ValueError as `protocol.check_protocol`."""
    protocol = make_protocol(task, patient_ids, splits, num_folds, seed)
    features, values_K = np.asarray(features_KD, dtype=np.float64), task.values_K
    assert len(features) == len(values_K) == len(protocol.patients_K)
    predicted, expected = np.full(len(values_K), np.nan), np.full(len(values_K), np.nan)
    for fold in protocol.folds:
        predicted[fold.test_K] = _predict(features, values_K, fold, choosing_folds(protocol, fold, seed))
        expected[fold.test_K] = values_K[fold.train_K].mean()
    judged_K = np.sort(protocol.judged())
    patients = protocol.patients_K[judged_K].tolist()
    found = [
        {
            name: bootstrap(partial(metric, guess[judged_K], values_K[judged_K]), patients, num_bootstrap, seed, among)
            for name, metric in (("mae", mean_error), ("r2", r_squared))
        }
        for guess in (predicted, expected)
    ]
    return NumberScores(
        metrics=found[0],
        baseline=found[1],
        protocol=protocol.words,
        num_images=len(judged_K),
        num_patients=len(set(patients)),
        judged_K=judged_K,
        predicted_K=predicted[judged_K],
        parts=protocol.parts,
    )


def mean_error(predicted_K: Floats, values_K: Floats, weights_RK: Floats) -> Floats:
    """[R] mean absolute error."""
    return mean(np.abs(predicted_K - values_K), weights_RK)


def r_squared(predicted_K: Floats, values_K: Floats, weights_RK: Floats) -> Floats:
    """[R] share of the variance explained, below 0 where the mean of the judged images does better; NaN where all
    values of a draw are equal."""
    centre_R = mean(values_K, weights_RK)
    squared_R = weights_RK @ np.square(values_K) - weights_RK.sum(axis=1) * np.square(centre_R)
    left_R = weights_RK @ np.square(predicted_K - values_K)
    ratio_R = np.divide(left_R, squared_R, out=np.full(len(left_R), np.nan), where=squared_R > 1e-9)
    return 1.0 - ratio_R


def _predict(
    features_KD: Floats, values_K: Floats, fold: Fold, pairs: Sequence[tuple[NDArray[Any], NDArray[Any]]]
) -> Floats:
    """The fold's test images by the penalty with the smallest error over the pairs; of equals the strongest."""
    penalty = _TYPICAL
    if pairs:
        errors = [
            np.mean([np.abs(_fit(features_KD, values_K, *pair, alpha) - values_K[pair[1]]).mean() for pair in pairs])
            for alpha in _PENALTIES
        ]
        penalty = _PENALTIES[int(np.argmin(errors))]
    return _fit(features_KD, values_K, fold.train_K, fold.test_K, penalty)


def _fit(features_KD: Floats, values_K: Floats, train: NDArray[Any], test: NDArray[Any], penalty: float) -> Floats:
    model = make_pipeline(StandardScaler(), Ridge(alpha=penalty))
    model.fit(features_KD[train], values_K[train])
    return np.asarray(model.predict(features_KD[test]), dtype=np.float64)
