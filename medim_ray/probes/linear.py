"""Linear probe of frozen features: standardised logistic regression under the protocol of protocol.py.

The penalty is chosen where the protocol says; a class that a training set lacks scores below all others.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from medim_ray.probes.bootstrap import Floats, auroc, macro
from medim_ray.probes.protocol import Fold, Protocol, Rows, choosing_folds

_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # scikit-learn's C: the larger, the weaker the penalty
_TYPICAL = 1e-2  # where nothing is there to choose by


def linear_scores(
    features_KD: Floats, y_K: NDArray[np.int64], protocol: Protocol, fold: Fold, num_classes: int, seed: int
) -> Floats:
    """[test, num_classes + 2] scores of the fold's test images, the class that the model predicts, and a probability:
    of the positive class of two, else of the class predicted.

    NaN where the training images are of one class only.
    """
    if len(np.unique(y_K[fold.train_K])) < 2:
        return np.full((len(fold.test_K), num_classes + 2), np.nan)
    penalty = _best_penalty(features_KD, y_K, choosing_folds(protocol, fold, seed), num_classes)
    return _fit_score(features_KD[fold.train_K], y_K[fold.train_K], features_KD[fold.test_K], penalty, num_classes)


def _best_penalty(
    features_KD: Floats, y_K: NDArray[np.int64], pairs: Sequence[tuple[Rows, Rows]], num_classes: int
) -> float:
    """The penalty with the best mean AUROC over the pairs; of equals the strongest."""
    means = []
    for penalty in _PENALTIES:
        values = []
        for train, test in pairs:
            if len(np.unique(y_K[train])) < 2:
                continue
            scores = _fit_score(features_KD[train], y_K[train], features_KD[test], penalty, num_classes)
            values.append(macro(auroc, scores[:, :num_classes], y_K[test], np.ones((1, len(test))))[0])
        values = [value for value in values if np.isfinite(value)]
        if not values:
            return _TYPICAL
        means.append(float(np.mean(values)))
    return _PENALTIES[int(np.argmax(means))]


def _fit_score(train_KD: Floats, y_K: NDArray[np.int64], test_KD: Floats, penalty: float, num_classes: int) -> Floats:
    """[K, num_classes + 2] logits of the test images in units of the training images' own mean and spread; the class
    and a probability, as linear_scores.

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
    logits = [np.asarray(model.decision_function(features)) for features in (train_KD, test_KD)]
    train, test = (np.stack([-values, values], axis=1) if values.ndim == 1 else values for values in logits)
    known: NDArray[np.int64] = model[-1].classes_
    return in_units_of_training(train, test, model.predict_proba(test_KD), known, num_classes)


def in_units_of_training(
    train_KC: Floats, test_KC: Floats, probability_KC: Floats, classes: NDArray[np.int64], num_classes: int
) -> Floats:
    """[test, num_classes + 2]: logits of `classes` less their mean over the training images, over their spread there;
    -1e9 for other classes; the class with the largest logit; its probability, of two classes that of the second."""
    scores = np.full((len(test_KC), num_classes + 2), -1e9)
    spread = train_KC.std(axis=0)
    scores[:, classes] = (test_KC - train_KC.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    scores[:, -2] = classes[np.argmax(test_KC, axis=1)]
    scores[:, -1] = probability_KC[:, 1] if num_classes == 2 else probability_KC.max(axis=1)
    return scores
