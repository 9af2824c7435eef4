"""The vectorised metrics equal scikit-learn's, weighted and unweighted, and the interval covers what it should."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.metrics import f1_score as reference_f1

from medim_ray.probes.bootstrap import (
    Estimate,
    auroc,
    average,
    average_precision,
    bootstrap,
    f1_score,
    mean,
    patient_weights,
)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), num=st.integers(4, 60), num_values=st.integers(1, 20))
def test_metrics_equal_scikit_learns_with_ties_and_weights(seed: int, num: int, num_values: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, num_values, num).astype(float)
    positive = rng.random(num) < 0.4
    positive[:2] = [True, False]
    weights = rng.integers(0, 3, (5, num)).astype(float)
    weights[:, :2] = 1
    for metric, reference in ((auroc, roc_auc_score), (average_precision, average_precision_score)):
        expected = [reference(positive, scores, sample_weight=row) for row in weights]
        np.testing.assert_allclose(metric(scores, positive, weights), expected, rtol=1e-10)


def test_a_draw_without_a_class_is_nan_and_left_out_of_the_interval() -> None:
    scores, positive = np.array([0.1, 0.9, 0.4]), np.array([False, True, False])
    weights = np.array([[1.0, 1.0, 1.0], [1.0, 0.0, 1.0], [0.0, 2.0, 0.0]])
    values = auroc(scores, positive, weights)
    assert values[0] == 1.0 and np.isnan(values[1:]).all()
    assert np.isnan(average_precision(scores, positive, weights)[1:]).all()
    assert Estimate(1.0, np.array([0.5, np.nan, 0.7, 0.6])).to_json()["low"] == pytest.approx(0.505)
    assert Estimate(1.0, np.array([0.5, np.nan, np.nan])).to_json() == {"value": 1.0, "low": None, "high": None}


def test_images_of_a_patient_come_and_go_together() -> None:
    weights = patient_weights(["a", "b", "a", "c", "b"], 200, seed=1)(0, 200)
    np.testing.assert_array_equal(weights[:, 0], weights[:, 2])
    np.testing.assert_array_equal(weights[:, 1], weights[:, 4])
    assert (weights[:, [0, 1, 3]].sum(axis=1) == 3).all()


def test_interval_of_a_mean_has_the_width_of_the_patients_not_of_the_images() -> None:
    rng = np.random.default_rng(0)
    of_patient = rng.normal(size=200)
    once = bootstrap(partial(mean, of_patient), [str(i) for i in range(200)], 2000, seed=3)
    # each patient ten times over: ten times the images, not a bit more knowledge
    tenfold = bootstrap(
        partial(mean, np.repeat(of_patient, 10)), np.repeat(np.arange(200), 10).astype(str).tolist(), 2000, seed=3
    )
    expected = 2 * 1.96 * of_patient.std() / np.sqrt(200)
    for estimate in (once, tenfold):
        low, high = estimate.interval()
        assert high - low == pytest.approx(expected, rel=0.1)


def test_chunks_do_not_change_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    values, patients = np.arange(30.0), [str(i // 2) for i in range(30)]
    whole = bootstrap(partial(mean, values), patients, 50, seed=9)
    monkeypatch.setattr("medim_ray.probes.bootstrap._CHUNK", 100)
    np.testing.assert_array_equal(bootstrap(partial(mean, values), patients, 50, seed=9).draws_R, whole.draws_R)


def test_paired_difference_of_equal_encoders_is_exactly_zero() -> None:
    values, patients = np.arange(20.0), [str(i) for i in range(20)]
    one, other = (bootstrap(partial(mean, values), patients, 100, seed=0) for _ in range(2))
    assert one.minus(other).to_json() == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_draws_among_the_same_patients_are_joint_whatever_images_are_judged() -> None:
    """Two labels on other images of the same patients: their mean has the interval of correlated quantities."""
    of_patient = np.random.default_rng(0).normal(size=50)
    everyone = [f"{i:02d}" for i in range(50)]
    one = bootstrap(partial(mean, of_patient), everyone, 400, 1, among=everyone)
    np.testing.assert_array_equal(one.draws_R, bootstrap(partial(mean, of_patient), everyone, 400, 1).draws_R)
    twice = bootstrap(partial(mean, np.repeat(of_patient, 2)), np.repeat(everyone, 2).tolist(), 400, 1, among=everyone)
    np.testing.assert_allclose(average([one, twice]).draws_R, one.draws_R)
    few = bootstrap(partial(mean, of_patient[:30]), everyone[:30], 400, 1, among=everyone)
    assert np.corrcoef(one.draws_R, few.draws_R)[0, 1] > 0.5


def test_an_average_leaves_out_what_is_undefined_draw_by_draw() -> None:
    nan = float("nan")
    found = average([Estimate(0.4, np.array([0.2, nan, nan])), Estimate(0.6, np.array([0.4, 0.5, nan]))])
    assert found.value == pytest.approx(0.5)
    np.testing.assert_allclose(found.draws_R, [0.3, 0.5, nan])


@pytest.mark.parametrize("num_classes", [2, 4])
def test_f1_equals_scikit_learns_with_weights(num_classes: int) -> None:
    rng = np.random.default_rng(4)
    y, predicted = rng.integers(0, num_classes, (2, 80))
    weights = rng.integers(0, 3, (6, 80)).astype(float)
    kind = "binary" if num_classes == 2 else "macro"
    expected = [reference_f1(y, predicted, average=kind, sample_weight=row) for row in weights]
    np.testing.assert_allclose(f1_score(predicted, y, num_classes, weights), expected, rtol=1e-9)
    never = np.zeros(80, dtype=np.int64)
    assert f1_score(never, y, 2, np.ones((1, 80)))[0] == 0.0, "the class is there and never predicted"
    assert np.isnan(f1_score(predicted, never, 2, np.ones((1, 80)))[0]), "the class is not there"
