"""Who is trained on and who is judged: patient-level folds or the shards' own split, and nested shares of the labels.

Under `SMALL` labelled images: patient-grouped stratified folds, each image judged out of its fold. From there on: the
shards' split, trained on train, options chosen on val, judged on test. No patient is ever on both sides.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold

from medim_ray.probes.tasks import NumberTask, Task

SMALL = 1000
_INNER_FOLDS = 3
_NUM_STRATA = 5  # of a number: fifths, or as few parts as have an image for every fold
Rows = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Fold:
    """Positions among a task's images. val_K: judged while options are chosen, empty: inner folds of train_K are."""

    train_K: Rows
    val_K: Rows
    test_K: Rows


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """folds: each image is in test_K at most once. parts: where each of the task's images stands, as published: the
    fold in which it is judged, or its split. strata_K: what folds and shares are balanced by."""

    folds: tuple[Fold, ...]
    parts: tuple[str, ...]
    strata_K: Rows
    patients_K: NDArray[np.str_]
    words: str

    def judged(self) -> Rows:
        """The images that are scored, in the order of the folds."""
        return np.concatenate([fold.test_K for fold in self.folds])

    def share(self, fraction: float, seed: int, draw: int) -> tuple[Fold, ...]:
        """The folds with this fraction of the patients on the side that is learned from; what is judged stays.

        A draw puts the patients in an order; a fold takes from each stratum the first of them, at least one, so that a
        smaller fraction of the same draw lies inside a larger one.
        """
        patients, patient_K = np.unique(self.patients_K, return_inverse=True)
        rank_P = np.random.default_rng([seed, draw]).permutation(len(patients))
        # a patient with images of several strata counts with the last: the positive class of two
        stratum_P = np.zeros(len(patients), dtype=np.int64)
        np.maximum.at(stratum_P, patient_K, self.strata_K)

        def some(rows: Rows) -> Rows:
            here = np.unique(patient_K[rows])
            here = here[np.argsort(rank_P[here])]
            kept = [_first_share(here[stratum_P[here] == s], fraction) for s in np.unique(stratum_P[here])]
            return rows[np.isin(patient_K[rows], np.concatenate([np.zeros(0, dtype=np.int64), *kept]))]

        return tuple(replace(fold, train_K=some(fold.train_K), val_K=some(fold.val_K)) for fold in self.folds)


def _first_share(patients_P: Rows, fraction: float) -> Rows:
    return patients_P[: max(1, round(fraction * len(patients_P)))]


def make_protocol(
    task: Task | NumberTask, patient_ids: Sequence[str], splits: Sequence[str], num_folds: int, seed: int
) -> Protocol:
    """The protocol of a task whose images (rows as `task.rows_K`) have these patients and splits.

    ValueError as `check_protocol`.
    """
    check_protocol(task, patient_ids, splits, num_folds)
    patients_K, splits_K = np.asarray(patient_ids, dtype=str), np.asarray(splits, dtype=str)
    strata_K = strata(task, num_folds)
    none = np.zeros(0, dtype=np.int64)
    if len(strata_K) < SMALL:
        folds = tuple(
            Fold(train_K=train, val_K=none, test_K=test)
            for train, test in patient_folds(strata_K, patients_K, num_folds, seed)
        )
        parts = np.empty(len(strata_K), dtype=object)
        for i, fold in enumerate(folds):
            parts[fold.test_K] = f"fold {i}"
        words = f"{num_folds} folds by patient, scores out of fold, penalty by inner folds"
    else:
        train, val, test = (np.flatnonzero(splits_K == name) for name in ("train", "val", "test"))
        folds, parts = (Fold(train_K=train, val_K=val, test_K=test),), splits_K
        words = "split of the shards by patient: fitted on train, penalty by val, judged on test"
    return Protocol(folds=folds, parts=tuple(map(str, parts)), strata_K=strata_K, patients_K=patients_K, words=words)


def strata(task: Task | NumberTask, num_folds: int) -> Rows:
    """[K] the class of each image; of a number the fifth that it lies in, or the half or third of few images."""
    if isinstance(task, Task):
        return task.y_K
    num = max(1, min(_NUM_STRATA, len(task.values_K) // num_folds))
    edges = np.quantile(task.values_K, np.arange(1, num) / num)
    return np.searchsorted(np.unique(edges), task.values_K, side="right").astype(np.int64)


def judged_patients(task: Task | NumberTask, patient_ids: Sequence[str], splits: Sequence[str]) -> set[str]:
    """The patients whose images are scored."""
    if len(task.rows_K) < SMALL:
        return set(patient_ids)
    return {patient for patient, split in zip(patient_ids, splits, strict=True) if split == "test"}


def check_protocol(task: Task | NumberTask, patient_ids: Sequence[str], splits: Sequence[str], num_folds: int) -> None:
    """ValueError where the task's images (rows as `task.rows_K`), patients or splits are too few for the protocol."""
    patients_K, splits_K = np.asarray(patient_ids, dtype=str), np.asarray(splits, dtype=str)
    if len(task.rows_K) >= SMALL:
        for split in ("train", "val", "test"):
            where_K = splits_K == split
            if isinstance(task, Task):
                lacking = [name for c, name in enumerate(task.classes) if c not in task.y_K[where_K]]
            else:
                lacking = [] if where_K.any() else ["them"]
            if lacking:
                raise ValueError(
                    f"probe.labels: the split {split!r} has {where_K.sum()} images with {task.label} and none of "
                    f"{', '.join(lacking)}: prepare the shards with a larger split.{split}, or leave the label out"
                )
        return
    groups = enumerate(task.classes) if isinstance(task, Task) else [(-1, "")]
    for c, name in groups:
        of_class_K = patients_K[task.y_K == c] if isinstance(task, Task) else patients_K
        num = len(set(of_class_K.tolist()))
        if num < num_folds:
            fix = f"set probe.num_folds to at most {num}, or leave the label out" if num > 1 else "leave the label out"
            raise ValueError(
                f"probe.labels: {task.label}{f'={name}' if name else ''} has images of {num} "
                f"patient{'s' if num != 1 else ''}, fewer than probe.num_folds={num_folds}: {fix}"
            )


def patient_folds(strata_K: Rows, patients_K: NDArray[np.str_], num: int, seed: int) -> Iterator[tuple[Rows, Rows]]:
    """Stratified folds that keep a patient's images together."""
    folds = StratifiedGroupKFold(num, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # A class with fewer images than inner folds: the fold without it is left out of the mean over folds.
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        yield from folds.split(np.zeros(len(strata_K)), strata_K, patients_K)


def choosing_folds(protocol: Protocol, fold: Fold, seed: int) -> list[tuple[Rows, Rows]]:
    """(learned from, judged) pairs for the choice of a penalty: train and val, or inner folds of train.

    None where too few patients are left for inner folds.
    """
    if len(fold.val_K):
        return [(fold.train_K, fold.val_K)]
    patients, strata_K = protocol.patients_K[fold.train_K], protocol.strata_K[fold.train_K]
    num = min(_INNER_FOLDS, len(np.unique(patients)), int(np.bincount(strata_K).max(initial=0)))
    if num < 2:
        return []
    pairs = patient_folds(strata_K, patients, num, seed)
    return [(fold.train_K[train], fold.train_K[test]) for train, test in pairs]
