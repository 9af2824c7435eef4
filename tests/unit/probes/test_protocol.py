"""Shares of the labels: nested, by patient, stratified, the same images judged; what a draw without a class means."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from medim_ray.probes.classify import probe
from medim_ray.probes.knn import knn_scores
from medim_ray.probes.protocol import SMALL, Fold, Protocol, make_protocol
from medim_ray.probes.tasks import NumberTask, Task

OPTIONS: dict[str, Any] = {"num_folds": 3, "num_bootstrap": 100, "seed": 0}


def _task(y: NDArray[np.int64], num_classes: int = 2) -> Task:
    return Task(label="x", classes=tuple("abcdef"[:num_classes]), rows_K=np.arange(len(y)), y_K=y)


def _protocol(num: int, prevalence: float, seed: int, splits: list[str] | None = None) -> Protocol:
    rng = np.random.default_rng(seed)
    y = (rng.random(num) < prevalence).astype(np.int64)
    y[:6], y[-6:] = 1, 0
    patients = [f"p{i // 2}" for i in range(num)]
    return make_protocol(_task(y), patients, splits or ["train"] * num, 3, seed)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), num=st.integers(40, 300), prevalence=st.floats(0.05, 0.9), draw=st.integers(0, 5))
def test_shares_are_nested_whole_patients_and_leave_the_judged_alone(
    seed: int, num: int, prevalence: float, draw: int
) -> None:
    protocol = _protocol(num, prevalence, seed)
    shares = [protocol.share(fraction, seed, draw) for fraction in (0.01, 0.1, 0.5, 1.0)]
    for whole, *folds in zip(protocol.folds, *shares, strict=True):
        for smaller, larger in itertools.pairwise(folds):
            assert set(smaller.train_K) <= set(larger.train_K)
        np.testing.assert_array_equal(folds[-1].train_K, whole.train_K)
        for fold in folds:
            np.testing.assert_array_equal(fold.test_K, whole.test_K)
            mine = protocol.patients_K[fold.train_K]
            assert np.isin(whole.train_K[np.isin(protocol.patients_K[whole.train_K], mine)], fold.train_K).all()
            assert not set(mine) & set(protocol.patients_K[fold.test_K])


def test_a_share_has_the_classes_and_the_size_asked_for_and_other_draws_other_patients() -> None:
    splits = ["train"] * 2000 + ["val"] * 400 + ["test"] * 400
    protocol = _protocol(2800, 0.2, 1, splits)
    of_draw = []
    for draw in range(3):
        (fold,) = protocol.share(0.1, 1, draw)
        of_draw.append(set(protocol.patients_K[fold.train_K]))
        assert len(of_draw[-1]) == pytest.approx(100, abs=1) and len(fold.val_K) == pytest.approx(40, abs=2)
        share = protocol.strata_K[fold.train_K].mean()
        assert share == pytest.approx(protocol.strata_K[:2000].mean(), abs=0.04)
        (least,) = protocol.share(1e-4, 1, draw)
        assert len(set(protocol.patients_K[least.train_K])) == 2, "one patient of each class at least"
    assert len(of_draw[0] & of_draw[1]) < 30
    assert set(protocol.parts) == {"train", "val", "test"} and len(protocol.judged()) == 400


def test_fewer_labels_know_less_and_the_draws_are_told() -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 400)
    features = rng.normal(size=(400, 10))
    features[:, 0] += 1.2 * y
    patients = [f"p{i // 2}" for i in range(400)]
    scores = probe(_task(y), features, patients, ["train"] * 400, **OPTIONS, fractions=(0.02, 0.3, 1.0), num_draws=3)
    assert list(scores.shares) == [0.02, 0.3]
    few, more = scores.shares[0.02], scores.shares[0.3]
    assert 0.5 < few.auroc.value < more.auroc.value < scores.auroc.value + 0.01
    assert len(few.draws["auroc"]) == 3 and np.mean(few.draws["auroc"]) == pytest.approx(few.auroc.value)
    assert few.note == "" and few.num_patients < 8 < more.num_patients < 50
    low, high = few.auroc.interval()
    assert low < few.auroc.value < high


def test_a_draw_of_one_class_only_has_no_value_and_is_told_in_words() -> None:
    """Every patient has one positive image and one of them all the negatives: a small draw may lack the negatives."""
    y = np.array([1] * 60 + [0] * 12, dtype=np.int64)
    patients = [f"p{i % 20}" for i in range(60)] + [f"p{i % 12}" for i in range(12)]
    features = np.random.default_rng(1).normal(size=(72, 4))
    scores = probe(_task(y), features, patients, ["train"] * 72, **OPTIONS, fractions=(0.05,), num_draws=4)
    share = scores.shares[0.05]
    missing = sum(not np.isfinite(value) for value in share.draws["auroc"])
    assert missing > 0 and f"{missing} of 4 draws have a fold whose training images are of one class" in share.note
    assert np.isfinite(scores.auroc.value)


def test_a_number_is_balanced_by_fifths() -> None:
    values = np.random.default_rng(0).normal(50, 20, SMALL - 1)
    task = NumberTask(label="age", rows_K=np.arange(len(values)), values_K=values)
    protocol = make_protocol(task, [str(i) for i in range(len(values))], ["train"] * len(values), 5, 0)
    assert np.bincount(protocol.strata_K).tolist() == pytest.approx([200] * 5, abs=2)
    means = [values[fold.test_K].mean() for fold in protocol.folds]
    assert np.ptp(means) < 2.5


@pytest.mark.parametrize("num", [11, 17, 24])
def test_a_dozen_numbers_are_enough_for_five_folds(num: int) -> None:
    task = NumberTask(label="bmi", rows_K=np.arange(num), values_K=np.linspace(18.0, 40.0, num))
    protocol = make_protocol(task, [f"p{i}" for i in range(num)], ["train"] * num, 5, 0)
    assert sorted(protocol.judged()) == list(range(num)), "each judged once"


def test_knn_is_dinov2s_vote() -> None:
    """Against the formula written out, image by image."""
    rng = np.random.default_rng(3)
    features, y = rng.normal(size=(90, 6)), rng.integers(0, 3, 90)
    fold = Fold(train_K=np.arange(60), val_K=np.zeros(0, dtype=np.int64), test_K=np.arange(60, 90))
    found = knn_scores(features, y, fold, 3)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    for row, image in enumerate(fold.test_K):
        similarity = unit[:60] @ unit[image]
        nearest = np.argsort(-similarity)[:20]
        votes = np.exp(similarity[nearest] / 0.07)
        expected = np.array([votes[y[nearest] == c].sum() for c in range(3)]) / votes.sum()
        np.testing.assert_allclose(found[row], expected / (np.bincount(y[:60]) / 60), rtol=1e-9)
    one_class = Fold(train_K=np.flatnonzero(y == 1)[:5], val_K=fold.val_K, test_K=fold.test_K)
    assert np.isnan(knn_scores(features, y, one_class, 3)).all()
