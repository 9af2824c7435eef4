"""Ridge on made features: finds what is there, judged against predicting the mean, in both protocols."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import mean_absolute_error, r2_score

from medim_ray.probes.protocol import SMALL
from medim_ray.probes.regress import mean_error, r_squared, regress
from medim_ray.probes.tasks import NumberTask


@pytest.mark.parametrize("num", [300, SMALL + 200])
def test_ridge_beats_the_mean_where_features_know_and_does_not_where_they_do_not(num: int) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(58, 17, num)
    features = rng.normal(size=(num, 12))
    task = NumberTask(label="age", rows_K=np.arange(num), values_K=values)
    patients = [f"p{i // 2}" for i in range(num)]
    splits = ["train" if i < num - 400 else "val" if i < num - 200 else "test" for i in range(num)]
    for signal in (0.0, 0.1):
        features[:, 0] += signal * values
        found = regress(task, features, patients, splits, num_folds=5, num_bootstrap=200, seed=0)
        better = found.metrics["mae"].minus(found.baseline["mae"])
        low, high = better.interval()
        assert found.baseline["mae"].value == pytest.approx(17 * np.sqrt(2 / np.pi), rel=0.15)
        if signal:
            assert high < -1 and found.metrics["r2"].interval()[0] > 0.5
        else:
            assert low < 0.6 and found.metrics["r2"].value < 0.05
        judged = values[found.judged_K]
        assert found.metrics["r2"].value == pytest.approx(r2_score(judged, found.predicted_K))
        assert found.metrics["mae"].value == pytest.approx(mean_absolute_error(judged, found.predicted_K))
    assert found.num_images == (300 if num < SMALL else 200)


def test_metrics_take_weights_as_scikit_learns_do_and_a_constant_draw_is_undefined() -> None:
    rng = np.random.default_rng(1)
    values, predicted, weights = rng.normal(size=30), rng.normal(size=30), rng.integers(0, 3, (4, 30)).astype(float)
    expected = [r2_score(values, predicted, sample_weight=row) for row in weights]
    np.testing.assert_allclose(r_squared(predicted, values, weights), expected, rtol=1e-9)
    expected = [mean_absolute_error(values, predicted, sample_weight=row) for row in weights]
    np.testing.assert_allclose(mean_error(predicted, values, weights), expected, rtol=1e-9)
    only_one = (np.arange(30) == 3).astype(float)[None]
    assert np.isnan(r_squared(predicted, values, only_one)[0])
