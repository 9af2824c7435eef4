"""Draws are pure functions of (seed, epoch, image id, purpose), uniform, and independent of neighbours."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from medim_ray.draws import Draws, step_draws


@given(st.lists(st.text(min_size=1, max_size=8), min_size=2, max_size=6, unique=True), st.integers(0, 2**31))
def test_a_sample_draws_the_same_alone_and_in_any_company(ids: list[str], seed: int) -> None:
    epochs = np.arange(len(ids))
    together = Draws.of(seed, epochs, ids).uniform("crop", 5)
    for i, name in enumerate(ids):
        alone = Draws.of(seed, epochs[i : i + 1], [name]).uniform("crop", 5)
        assert np.array_equal(alone[0], together[i])


def test_seed_epoch_id_and_purpose_each_change_every_value() -> None:
    base = Draws.of(1, np.array([0]), ["a"]).uniform("crop", 100)
    others = [
        Draws.of(2, np.array([0]), ["a"]).uniform("crop", 100),
        Draws.of(1, np.array([1]), ["a"]).uniform("crop", 100),
        Draws.of(1, np.array([0]), ["b"]).uniform("crop", 100),
        Draws.of(1, np.array([0]), ["a"]).uniform("mask", 100),
    ]
    for other in others:
        assert not np.any(base == other)


def test_values_are_uniform_and_uncorrelated_between_samples_and_positions() -> None:
    values = Draws.of(7, np.zeros(400, dtype=np.int64), [f"image-{i}" for i in range(400)]).uniform("noise", 500)
    assert values.min() >= 0.0 and values.max() < 1.0
    assert stats.kstest(values.ravel(), "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(values[:, :-1].ravel(), values[:, 1:].ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(values[:-1].ravel(), values[1:].ravel())[0, 1]) < 0.01


def test_a_prefix_does_not_depend_on_how_many_are_drawn() -> None:
    draws = Draws.of(0, np.array([3]), ["x"])
    assert np.array_equal(draws.uniform("p", 10)[:, :4], draws.uniform("p", 4))


def test_integers_stay_below_their_bound() -> None:
    draws = Draws.of(0, np.zeros(50, dtype=np.int64), [str(i) for i in range(50)])
    values = draws.integers("sentence", 200, np.arange(1, 51))
    assert (values >= 0).all() and (values < np.arange(1, 51)[:, None]).all()
    assert set(values[4]) == set(range(5))


def test_step_draws_differ_by_step() -> None:
    assert step_draws(0, 5).uniform("ratio", 1) != step_draws(0, 6).uniform("ratio", 1)
