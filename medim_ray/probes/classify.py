"""Classification from frozen features: linear and k-NN probes of one label, on all and on shares of its labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medim_ray.probes.bootstrap import (
    Estimate,
    Floats,
    auroc,
    average,
    average_precision,
    bootstrap,
    f1_score,
    macro,
    mean,
)
from medim_ray.probes.knn import knn_scores
from medim_ray.probes.linear import linear_scores
from medim_ray.probes.protocol import Fold, Protocol, make_protocol
from medim_ray.probes.tasks import Task

METRICS: Mapping[str, Callable[..., Floats]] = {"auroc": auroc, "auprc": average_precision}
Scores = Callable[[Fold], Floats]


@dataclass(frozen=True, kw_only=True)
class Share:
    """A probe that learned from a fraction of the labels: means over its draws, and what each draw gave.

    draws: metric -> its value in each draw, NaN where a draw holds one class only; num_images, num_patients: learned
    from, of a fold and draw on average. note: what there is to say about draws without a value.
    """

    auroc: Estimate
    auprc: Estimate
    draws: Mapping[str, tuple[float, ...]]
    num_images: float
    num_patients: float
    note: str


@dataclass(frozen=True, kw_only=True)
class ProbeScores:
    """AUROC, AUPRC and F1 of one encoder on one task: of the positive class, or the mean over classes against the rest.

    accuracy, f1: of the class that the linear probe predicts, at its own even odds: no threshold is chosen.

    judged_K: the images scored, as positions in the task; scores_KC: what the linear probe gave them; predicted_K: the
    class it predicts, -1 where it has none; probability_K: of the positive class of two, else of that class; parts:
    where every image of the task stands (Protocol.parts). knn: the same metrics of the k-NN probe; shares: fraction ->
    Share.
    """

    auroc: Estimate
    auprc: Estimate
    accuracy: Estimate
    f1: Estimate
    protocol: str
    num_images: int  # that were scored
    num_patients: int
    judged_K: NDArray[np.int64]
    scores_KC: Floats
    predicted_K: NDArray[np.int64]
    probability_K: Floats
    parts: tuple[str, ...]
    knn: Mapping[str, Estimate] = field(default_factory=dict)
    shares: Mapping[float, Share] = field(default_factory=dict)


def probe(
    task: Task,
    features_KD: NDArray[np.floating[Any]],
    patient_ids: Sequence[str],
    splits: Sequence[str],
    *,
    num_folds: int,
    num_bootstrap: int,
    seed: int,
    among: Sequence[str] | None = None,
    fractions: Sequence[float] = (1.0,),
    num_draws: int = 3,
    known: dict[str, Floats] | None = None,
) -> ProbeScores:
    """Probes the features of the task's images (rows as `task.rows_K`) and judges them on images it was not fitted on.

    among: the patients that bootstrap draws are taken from (see bootstrap.patient_weights). fractions below 1 are
    learned from `num_draws` times each. known: scores of the judged images by name, taken where they are there and put
    there where they are not (cache.py). ValueError as `protocol.check_protocol`.
    """
    protocol = make_protocol(task, patient_ids, splits, num_folds, seed)
    assert len(features_KD) == len(task.y_K) == len(protocol.patients_K)
    features, num_classes = np.asarray(features_KD, dtype=np.float64), len(task.classes)

    def linear(fold: Fold) -> Floats:
        return linear_scores(features, task.y_K, protocol, fold, num_classes, seed)

    def nearest(fold: Fold) -> Floats:
        return knn_scores(features, task.y_K, fold, num_classes)

    known = {} if known is None else known
    draws: dict[str, Any] = {"num_bootstrap": num_bootstrap, "seed": seed, "among": among}
    found = judge(task, protocol, linear, fractions=fractions, num_draws=num_draws, known=known, **draws)
    if "knn" not in known:
        known["knn"] = score_folds(protocol.folds, nearest, len(task.y_K), num_classes)[found.judged_K]
    neighbours = known["knn"]
    patients = protocol.patients_K[found.judged_K].tolist()
    return replace(found, knn=estimates(neighbours, task.y_K[found.judged_K], patients, num_bootstrap, seed, among))


def judge(
    task: Task,
    protocol: Protocol,
    score: Scores,
    *,
    num_bootstrap: int,
    seed: int,
    among: Sequence[str] | None,
    fractions: Sequence[float],
    num_draws: int,
    known: dict[str, Floats],
) -> ProbeScores:
    """What `score` comes to: from a fold to [test, num_classes + 2], as linear.linear_scores.

    Options as of `probe`; no k-NN.
    """
    num_classes = len(task.classes)
    judged_K = np.sort(protocol.judged())
    patients = protocol.patients_K[judged_K].tolist()
    estimate = partial(estimates, y_K=task.y_K[judged_K], patients=patients, num=num_bootstrap, seed=seed, among=among)

    def scored(name: str, folds: Sequence[Fold]) -> Floats:
        if name not in known:
            known[name] = score_folds(folds, score, len(task.y_K), num_classes + 2)[judged_K]
        return known[name]

    found = scored("all", protocol.folds)
    scores, predicted = found[:, :num_classes], np.nan_to_num(found[:, -2], nan=-1).astype(np.int64)
    y = task.y_K[judged_K]
    decided = {
        "accuracy": bootstrap(partial(mean, (predicted == y).astype(np.float64)), patients, num_bootstrap, seed, among),
        "f1": bootstrap(partial(f1_score, predicted, y, num_classes), patients, num_bootstrap, seed, among),
    }
    shares = {}
    for fraction in fractions:
        if fraction < 1:
            drawn = [protocol.share(fraction, seed, draw) for draw in range(num_draws)]
            each = [scored(f"{fraction:g} {draw}", folds) for draw, folds in enumerate(drawn)]
            shares[fraction] = _share([estimate(values[:, :num_classes]) for values in each], drawn, protocol)
    return ProbeScores(
        **estimate(scores),
        **decided,
        protocol=protocol.words,
        num_images=len(judged_K),
        num_patients=len(set(patients)),
        judged_K=judged_K,
        scores_KC=scores,
        predicted_K=predicted,
        probability_K=found[:, -1],
        parts=protocol.parts,
        knn={},
        shares=shares,
    )


def score_folds(folds: Sequence[Fold], score: Scores, num: int, width: int) -> Floats:
    """[num, width] scores of each fold's test images put where the images stand; NaN where none was judged."""
    every = np.full((num, width), np.nan)
    for fold in folds:
        every[fold.test_K] = score(fold)
    return every


def estimates(
    scores_KC: Floats,
    y_K: NDArray[np.int64],
    patients: Sequence[str],
    num: int,
    seed: int,
    among: Sequence[str] | None = None,
) -> dict[str, Estimate]:
    """AUROC and AUPRC with bootstrap draws over patients; undefined (NaN) where an image has no score."""
    if not np.isfinite(scores_KC).all():
        nothing = Estimate(float("nan"), np.full(num, np.nan))
        return dict.fromkeys(METRICS, nothing)
    return {
        name: bootstrap(partial(macro, metric, scores_KC, y_K), patients, num, seed, among)
        for name, metric in METRICS.items()
    }


def _share(found: Sequence[Mapping[str, Estimate]], drawn: Sequence[Sequence[Fold]], protocol: Protocol) -> Share:
    """Means over the draws that have a value."""
    folds = [fold for folds in drawn for fold in folds]
    learned = [np.concatenate([fold.train_K, fold.val_K]) for fold in folds]
    num_without = sum(not np.isfinite(one["auroc"].value) for one in found)
    note = ""
    if num_without:
        note = (
            f"{num_without} of {len(found)} draws have a fold whose training images are of one class only: "
            "they have no value and are left out of the mean"
        )
    return Share(
        **{metric: average([one[metric] for one in found]) for metric in METRICS},
        draws={metric: tuple(one[metric].value for one in found) for metric in METRICS},
        num_images=float(np.mean([len(rows) for rows in learned])),
        num_patients=float(np.mean([len(set(protocol.patients_K[rows].tolist())) for rows in learned])),
        note=note,
    )
