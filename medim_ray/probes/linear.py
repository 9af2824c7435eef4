"""Linear probe of frozen features: standardised logistic regression, patient-grouped, with bootstrap intervals.

Under `SMALL` labelled images: patient-grouped stratified folds, scores out of fold, the penalty chosen by inner folds.
From there on: the shards' own patient-level split, fitted on train, the penalty chosen on val, judged on test.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from medim_ray.probes.bootstrap import Estimate, Floats, auroc, average_precision, bootstrap

SMALL = 1000
_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # scikit-learn's C: the larger, the weaker the penalty
_INNER_FOLDS = 3
_MAX_CLASSES = 10
_VIEW = {"PA": "PA", "AP": "AP", "AP Supine": "AP"}  # projection; lateral and others are not part of the task
_VIEW_CLASSES = ("PA", "AP")


@dataclass(frozen=True, kw_only=True)
class Task:
    """One label as classes. Of two classes the second is the positive one.

    rows_K: the labelled images, as positions in the sequence the task was made from; y_K: their class.
    """

    label: str
    classes: tuple[str, ...]
    rows_K: NDArray[np.int64]
    y_K: NDArray[np.int64]

    def counts(self) -> dict[str, int]:
        """Images of each class."""
        return {name: int((self.y_K == i).sum()) for i, name in enumerate(self.classes)}


@dataclass(frozen=True, kw_only=True)
class ProbeScores:
    """AUROC and AUPRC of one encoder on one task: of the positive class, or the mean over classes against the rest."""

    auroc: Estimate
    auprc: Estimate
    protocol: str
    num_images: int  # that were scored
    num_patients: int


def make_task(label: str, labels: Sequence[Mapping[str, str]], where: str) -> Task:
    """The classes of `label` over the images of a shard set named `where`, whose known labels are `labels`.

    `view` is PA against AP (AP and AP Supine together). ValueError: no image has the label, it has one value only,
    or it is a number with more than ten values.
    """
    found = [row.get(label, "") for row in labels]
    known = [_VIEW.get(value, "") if label == "view" else value for value in found]
    names = sorted({value for value in known if value})
    if not any(found):
        others = sorted({name for row in labels for name in row})
        near = difflib.get_close_matches(label, others, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose among {', '.join(others) or 'none'}"
        raise ValueError(f"probe.labels: no image of {where} has a label {label!r}; {hint}")
    if len(names) > _MAX_CLASSES and all(_is_number(name) for name in names):
        raise ValueError(
            f"probe.labels: {label!r} is a number with {len(names)} values; the linear probe classifies. "
            "Leave it out, or prepare the shards with a label of groups"
        )
    if len(names) < 2:
        read = " (PA, AP and AP Supine are read)" if label == "view" else ""
        raise ValueError(
            f"probe.labels: {label!r} has only the value {', '.join(map(repr, names)) or 'unknown'} in {where}{read}: "
            "a probe needs two classes; leave this label out or prepare more images"
        )
    classes = _VIEW_CLASSES if label == "view" else tuple(sorted(names, key=_by_number))
    rows = np.array([i for i, value in enumerate(known) if value], dtype=np.int64)
    y = np.array([classes.index(known[i]) for i in rows], dtype=np.int64)
    return Task(label=label, classes=classes, rows_K=rows, y_K=y)


def default_labels(counts: Mapping[str, Mapping[str, int]]) -> tuple[str, ...]:
    """`view` and every 0/1 label, from the label counts of a manifest."""
    return tuple(sorted(name for name, values in counts.items() if name == "view" or set(values) <= {"0", "1"}))


def check_protocol(task: Task, patient_ids: Sequence[str], splits: Sequence[str], num_folds: int) -> None:
    """ValueError where the task's images (rows as `task.rows_K`), patients or splits are too few for the protocol."""
    patients_K, splits_K = np.asarray(patient_ids, dtype=str), np.asarray(splits, dtype=str)
    if len(task.y_K) >= SMALL:
        for split in ("train", "val", "test"):
            in_split = task.y_K[splits_K == split]
            if lacking := [name for c, name in enumerate(task.classes) if c not in in_split]:
                raise ValueError(
                    f"probe.labels: the split {split!r} has {len(in_split)} images with {task.label} and none of "
                    f"{', '.join(lacking)}: prepare the shards with a larger split.{split}, or leave the label out"
                )
        return
    for c, name in enumerate(task.classes):
        num = len(set(patients_K[task.y_K == c].tolist()))
        if num < num_folds:
            fix = f"set probe.num_folds to at most {num}, or leave the label out" if num > 1 else "leave the label out"
            raise ValueError(
                f"probe.labels: {task.label}={name} has images of {num} patient{'s' if num != 1 else ''}, fewer than "
                f"probe.num_folds={num_folds}: {fix}"
            )


def judged_patients(task: Task, patient_ids: Sequence[str], splits: Sequence[str]) -> set[str]:
    """The patients whose images `probe` scores."""
    if len(task.y_K) < SMALL:
        return set(patient_ids)
    return {patient for patient, split in zip(patient_ids, splits, strict=True) if split == "test"}


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
) -> ProbeScores:
    """Probes the features of the task's images (rows as `task.rows_K`) and judges them on images it was not fitted on.

    among: the patients that bootstrap draws are taken from (see bootstrap.patient_weights). ValueError as
    `check_protocol`.
    """
    check_protocol(task, patient_ids, splits, num_folds)
    patients_K, splits_K = np.asarray(patient_ids, dtype=str), np.asarray(splits, dtype=str)
    assert len(features_KD) == len(task.y_K) == len(patients_K) == len(splits_K)
    features = np.asarray(features_KD, dtype=np.float64)
    if len(task.y_K) < SMALL:
        judged_K, scores = _out_of_fold(task, features, patients_K, num_folds, seed)
        protocol = f"{num_folds} folds by patient, scores out of fold, penalty by inner folds"
    else:
        judged_K, scores = _by_split(task, features, splits_K)
        protocol = "split of the shards by patient: fitted on train, penalty by val, judged on test"
    y, patients = task.y_K[judged_K], patients_K[judged_K].tolist()
    estimates = {
        name: bootstrap(partial(_macro, metric, scores, y), patients, num_bootstrap, seed, among)
        for name, metric in (("auroc", auroc), ("auprc", average_precision))
    }
    return ProbeScores(**estimates, protocol=protocol, num_images=len(judged_K), num_patients=len(set(patients)))


def _macro(metric: Any, scores_KC: Floats, y_K: NDArray[np.int64], weights_RK: Floats) -> Floats:
    """The positive class of two; else the mean over the classes that a draw holds."""
    num_classes = scores_KC.shape[1]
    classes = (1,) if num_classes == 2 else range(num_classes)
    values_CR = np.stack([metric(scores_KC[:, c], y_K == c, weights_RK) for c in classes])
    valid_CR = np.isfinite(values_CR)
    num_R = valid_CR.sum(axis=0)
    total_R = np.where(valid_CR, values_CR, 0.0).sum(axis=0)
    return np.divide(total_R, num_R, out=np.full(len(num_R), np.nan), where=num_R > 0)


def _out_of_fold(
    task: Task, features_KD: Floats, patients_K: NDArray[np.str_], num_folds: int, seed: int
) -> tuple[NDArray[np.int64], Floats]:
    """Every image scored by a model that saw none of its patient."""
    scores = np.zeros((len(task.y_K), len(task.classes)))
    for train, test in _folds(task.y_K, patients_K, num_folds, seed):
        penalty = _best_penalty(
            features_KD[train], task.y_K[train], list(_folds(task.y_K[train], patients_K[train], _INNER_FOLDS, seed))
        )
        scores[test] = _fit_score(features_KD[train], task.y_K[train], features_KD[test], penalty, len(task.classes))
    return np.arange(len(task.y_K)), scores


def _by_split(task: Task, features_KD: Floats, splits_K: NDArray[np.str_]) -> tuple[NDArray[np.int64], Floats]:
    """Fitted on train, penalty chosen on val, the test split scored."""
    train, val, test = (np.flatnonzero(splits_K == name) for name in ("train", "val", "test"))
    rows = np.concatenate([train, val])
    fold = (np.arange(len(train)), np.arange(len(train), len(rows)))
    penalty = _best_penalty(features_KD[rows], task.y_K[rows], [fold])
    return test, _fit_score(features_KD[train], task.y_K[train], features_KD[test], penalty, len(task.classes))


def _folds(
    y_K: NDArray[np.int64], patients_K: NDArray[np.str_], num: int, seed: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    folds = StratifiedGroupKFold(num, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # A class with fewer images than inner folds: the fold without it is left out of the mean below.
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        yield from folds.split(np.zeros(len(y_K)), y_K, patients_K)


def _best_penalty(
    features_KD: Floats, y_K: NDArray[np.int64], folds: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]]
) -> float:
    """The penalty with the best mean AUROC over the folds; of equals the strongest."""
    num_classes = int(y_K.max()) + 1
    means = []
    for penalty in _PENALTIES:
        values = []
        for train, test in folds:
            if len(np.unique(y_K[train])) < 2:
                continue
            scores = _fit_score(features_KD[train], y_K[train], features_KD[test], penalty, num_classes)
            values.append(_macro(auroc, scores, y_K[test], np.ones((1, len(test))))[0])
        values = [value for value in values if np.isfinite(value)]
        means.append(float(np.mean(values)) if values else 0.5)
    return _PENALTIES[int(np.argmax(means))]


def _fit_score(train_KD: Floats, y_K: NDArray[np.int64], test_KD: Floats, penalty: float, num_classes: int) -> Floats:
    """[K, num_classes] logits of the test images in units of the training images' own mean and spread.

    Scores of folds are ranked together: with raw probabilities, a fold with fewer positives would be scored by a model
    that saw more of them, and a probe without any signal would fall below chance. A class that the training images
    lack scores below all others.
    """
    model = make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=1000))
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", ConvergenceWarning
        )  # the weakest penalties are rarely chosen and nearly converge
        model.fit(train_KD, y_K)
    scores = np.full((len(test_KD), num_classes), -1e9)
    logits = [np.asarray(model.decision_function(features)) for features in (train_KD, test_KD)]
    train, test = (np.stack([-values, values], axis=1) if values.ndim == 1 else values for values in logits)
    spread = train.std(axis=0)
    scores[:, model[-1].classes_] = (test - train.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    return scores


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _by_number(value: str) -> tuple[float, str]:
    """Numbers in their order, words after each other in theirs."""
    return (float(value) if _is_number(value) else 0.0, value)
