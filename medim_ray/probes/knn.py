"""k-nearest-neighbour probe: cosine similarity, votes weighted by exp(similarity / temperature), as DINOv2 does.

Source: DINOv2's knn evaluation, k = 20, temperature 0.07. No option is fitted.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medim_ray.probes.bootstrap import Floats
from medim_ray.probes.protocol import Fold

NUM_NEIGHBOURS = 20
TEMPERATURE = 0.07
_CHUNK = 1024  # test images at once


def knn_scores(features_KD: Floats, y_K: NDArray[np.int64], fold: Fold, num_classes: int) -> Floats:
    """[test, num_classes] share of the neighbours' votes over the class's share of the training images.

    The division puts folds with more and with fewer positives on one scale; within a fold of two classes it changes no
    order. All training images vote where there are fewer than k. NaN where the training images are of one class only.
    """
    train_y = y_K[fold.train_K]
    if len(np.unique(train_y)) < 2:
        return np.full((len(fold.test_K), num_classes), np.nan)
    unit_KD = features_KD / np.maximum(np.linalg.norm(features_KD, axis=1, keepdims=True), 1e-12)
    train_KD = unit_KD[fold.train_K]
    num = min(NUM_NEIGHBOURS, len(train_KD))
    share_C = np.bincount(train_y, minlength=num_classes) / len(train_y)
    votes = []
    for first in range(0, len(fold.test_K), _CHUNK):
        similarity_QK = unit_KD[fold.test_K[first : first + _CHUNK]] @ train_KD.T
        nearest_Qk = np.argpartition(-similarity_QK, num - 1, axis=1)[:, :num]
        near_Qk = np.take_along_axis(similarity_QK, nearest_Qk, axis=1)
        weight_Qk = np.exp((near_Qk - near_Qk.max(axis=1, keepdims=True)) / TEMPERATURE)
        weight_Qk /= weight_Qk.sum(axis=1, keepdims=True)
        is_class_QkC = train_y[nearest_Qk][:, :, None] == np.arange(num_classes)
        votes.append((weight_Qk[:, :, None] * is_class_QkC).sum(axis=1))
    votes_QC = np.concatenate(votes) if votes else np.zeros((0, num_classes))
    return np.divide(votes_QC, share_C, out=np.full_like(votes_QC, -1e9), where=share_C > 0)
