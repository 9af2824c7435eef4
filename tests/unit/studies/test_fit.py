"""Scaling laws: known ones are found again, the held-out point is predicted, and too few points are refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from medim_ray.studies.fit import Measured, efficiencies, fit_law, fit_line
from medim_ray.studies.outcome import Number


def _points(xs: list[float], ys: list[float], half: float) -> list[Measured]:
    return [Measured(x, Number(y, y - half, y + half)) for x, y in zip(xs, ys, strict=True)]


def test_all_points_of_the_largest_x_are_held_out() -> None:
    xs, ys = [1.0, 3.0, 10.0, 30.0, 100.0, 100.0], [0.5, 0.4, 0.33, 0.3, 0.9, 0.7]
    fit = fit_law("power", _points(xs, ys, 0.01), hold_out=True)
    four = fit_law("power", _points(xs[:4], ys[:4], 0.01), hold_out=False)
    assert fit.parameters == four.parameters and fit.held_out_x == 100.0
    assert fit.measured is not None
    assert fit.measured.value == pytest.approx(0.8) and fit.measured.low is None
    with pytest.raises(ValueError, match="3 parameters and points at 2 x beside the one held out"):
        fit_law("power", _points([1.0, 1.0, 3.0, 9.0], [0.5, 0.4, 0.3, 0.2], 0.01), hold_out=True)


def test_an_interval_over_seeds_counts_as_students() -> None:
    """The stated interval of a prediction is as wide as predictions scatter, not twice that."""
    rng = np.random.default_rng(1)
    xs = np.array([30.0, 60.0, 120.0, 240.0, 480.0, 960.0])
    predicted, widths = [], []
    for _ in range(25):
        points = []
        for x in xs:
            seeds = 0.2 + x**-0.5 + rng.normal(0, 0.01, 3)
            half = 4.303 * float(seeds.std(ddof=1)) / 3**0.5
            mean = float(seeds.mean())
            points.append(Measured(float(x), Number(mean, mean - half, mean + half), num_runs=3))
        found = fit_law("power", points, hold_out=True).predicted
        assert found is not None and found.value and found.low is not None and found.high is not None
        predicted.append(found.value)
        widths.append(found.high - found.low)
    assert np.mean(widths) == pytest.approx(3.92 * np.std(predicted), rel=0.35)


def test_points_at_the_level_of_the_untrained_encoder_are_told() -> None:
    points = [
        point._replace(learned=point.x > 3) for point in _points([1.0, 3.0, 10.0, 30.0], [0.5, 0.4, 0.3, 0.25], 0.01)
    ]
    line = fit_line("", points, "power", hold_out=False)
    assert line.not_learned == [1.0, 3.0] and line.to_json()["points"][0][2:] == [1, False]


def test_a_power_law_with_a_floor_is_found_and_its_held_out_point_predicted() -> None:
    xs = [1.0, 3.0, 10.0, 30.0, 100.0, 300.0]
    ys = [0.1 + 0.4 * x**-0.5 for x in xs]
    fit = fit_law("power", _points(xs, ys, 0.002), hold_out=True)
    found = {name: number.value for name, number in fit.parameters.items()}
    assert found == pytest.approx({"floor": 0.1, "scale": 0.4, "exponent": 0.5}, abs=1e-4)
    assert fit.held_out_x == 300.0 and fit.predicted is not None and fit.measured is not None
    assert fit.predicted.value == pytest.approx(ys[-1], abs=1e-4)
    assert fit.predicted.low is not None and fit.predicted.high is not None
    assert fit.predicted.low <= ys[-1] <= fit.predicted.high


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    xs = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]
    hits = 0
    for _ in range(15):
        ys = [0.1 + 0.4 * x**-0.5 + 0.01 * rng.standard_normal() for x in xs]
        exponent = fit_law("power", _points(xs, ys, 0.0196), hold_out=False).parameters["exponent"]
        assert exponent.low is not None and exponent.high is not None
        hits += exponent.low <= 0.5 <= exponent.high
    assert hits >= 11, "15 draws at 95 %: fewer than 11 hits come once in a thousand times"


def test_the_serial_fraction_of_a_speed_up_is_found() -> None:
    xs = [1.0, 2.0, 4.0, 8.0]
    points = _points(xs, [100 * n / (1 + 0.05 * (n - 1)) for n in xs], 0.5)
    fit = fit_law("amdahl", points, hold_out=False)
    assert fit.parameters["serial"].value == pytest.approx(0.05, abs=1e-6)
    assert fit.parameters["rate"].value == pytest.approx(100)


def test_the_largest_point_is_not_seen_by_the_fit_that_predicts_it() -> None:
    xs, ys = [1.0, 3.0, 10.0, 30.0, 100.0], [0.5, 0.4, 0.3, 0.25, 0.2]
    one = fit_law("power", _points(xs, ys, 0.01), hold_out=True)
    other = fit_law("power", _points(xs, [*ys[:-1], 0.9], 0.01), hold_out=True)
    assert one.parameters == other.parameters and one.measured != other.measured


def test_points_without_intervals_take_the_scatter_around_the_law_and_two_of_them_none() -> None:
    rng = np.random.default_rng(1)
    rates = [
        Measured(n, Number(100 * n / (1 + 0.05 * (n - 1)) * (1 + 0.03 * rng.standard_normal()))) for n in (1, 2, 4, 8)
    ]
    serial = fit_law("amdahl", rates, hold_out=False).parameters["serial"]
    assert serial.low is not None and serial.high is not None and serial.low < serial.high, "one seed is no certainty"
    exact = fit_law("amdahl", rates[:2], hold_out=False)
    assert exact.parameters["serial"].low is None and exact.band(np.array([2.0]))[1][0] == pytest.approx(
        rates[1][1].value
    )
    assert json.dumps(exact.to_json()), "unknown ends are null"


def test_an_error_that_rises_with_the_data_has_no_exponent() -> None:
    with pytest.raises(ValueError, match="does not fall with x"):
        fit_law("power", _points([1.0, 3.0, 10.0, 30.0], [0.2, 0.25, 0.3, 0.35], 0.01), hold_out=False)


def test_the_efficiency_is_the_rate_for_each_worker_as_a_share_of_the_first() -> None:
    shares = efficiencies([Measured(2.0, Number(20.0, 19.0, 21.0)), Measured(8.0, Number(40.0, 36.0, 44.0))])
    assert shares == [(2.0, Number(1.0, 0.95, 1.05)), (8.0, Number(0.5, 0.45, 0.55))]
    assert efficiencies([]) == []


@pytest.mark.parametrize(
    ("xs", "hold_out", "message"),
    [([1.0, 2.0], False, "3 parameters and points at 2 x"), ([1.0, 2.0, 3.0], True, "beside the one held out"),
     ([0.0, 1.0, 2.0, 3.0], False, "above 0")],
)  # fmt: skip
def test_what_no_law_can_be_fitted_to_is_refused(xs: list[float], hold_out: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_law("power", _points(xs, [0.5] * len(xs), 0.1), hold_out=hold_out)
