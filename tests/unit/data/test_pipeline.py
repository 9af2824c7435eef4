"""How often Ray Data's loop turns, and the block numbers that it is given."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from medim_ray.data.pipeline import Rest


def turns(num_turns: int, made_per_turn: int, rest: Rest, already: int = 0) -> tuple[float, int]:
    """Seconds of the last turn, and how many blocks there are after them."""
    made, last = already, 0.0
    for _ in range(num_turns):
        started = time.monotonic()
        made += made_per_turn
        rest.on_execution_step(
            SimpleNamespace(_topology=[SimpleNamespace(metrics=SimpleNamespace(num_tasks_finished=made))])
        )
        last = time.monotonic() - started
    return last, made


def test_turns_are_as_long_as_the_actors_allow() -> None:
    rest = Rest(num_actors=2)
    slow, made = turns(10, 1, rest)  # at most a block an actor: a longer turn lets none run dry
    assert slow == pytest.approx(0.25, abs=0.08)
    fast, _ = turns(5, 20, rest, made)
    assert fast == pytest.approx(0.05, abs=0.04)
