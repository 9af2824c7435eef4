"""Schedules: the four golden curves of DINOv2 are in tests/golden; here the properties and the errors."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medim_ray.schedules import cosine, linear_warmup, tabulate


@given(
    base=st.floats(1e-6, 1.0),
    final=st.floats(0.0, 1.0),
    frozen=st.integers(0, 5),
    warmup=st.integers(0, 9),
    rest=st.integers(1, 50),
)
def test_cosine_stays_between_its_ends_and_moves_one_way(
    base: float, final: float, frozen: int, warmup: int, rest: int
) -> None:
    num_steps = frozen + warmup + rest
    values = tabulate(cosine(base, final, num_steps, warmup, 0.0, frozen), num_steps)
    assert (values[:frozen] == 0).all()
    assert (values[frozen : frozen + warmup] <= base * (1 + 1e-12)).all()
    tail = values[frozen + warmup :]
    assert tail[0] == pytest.approx(base)
    assert tail.min() >= min(base, final) - 1e-12
    assert tail.max() <= max(base, final) + 1e-12
    steps = tail[1:] - tail[:-1]
    assert (steps * (final - base) >= -1e-15).all()


def test_warmup_ends_on_the_base_and_the_end_is_kept() -> None:
    schedule = cosine(0.004, 1e-6, 100, warmup_steps=10)
    assert schedule(0) == 0.0
    assert schedule(9) == pytest.approx(0.004)
    assert schedule(10) == pytest.approx(0.004)
    assert schedule(100) == schedule(10**6) == 1e-6


def test_teacher_temperature_is_a_line_then_flat() -> None:
    values = tabulate(linear_warmup(0.04, 0.07, 4), 6)
    assert values.tolist() == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07, 0.07])
    assert linear_warmup(0.04, 0.07, 0)(0) == 0.07


def test_parts_longer_than_the_run_are_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match="num_steps=10 cannot hold warmup_steps=8 and frozen_steps=5"):
        cosine(1.0, 0.0, 10, warmup_steps=8, frozen_steps=5)
