"""The paragraph about waiting names the stage that the numbers point at, and says nothing where nothing waits."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from medim_ray.config.schema import RunConfig
from medim_ray.studies.waiting import why_it_waits

CONFIG = RunConfig()
TWO = replace(CONFIG, data=replace(CONFIG.data, num_actors=2))


def records(wait: float, step_s: float = 1.0, **seconds: float) -> list[dict[str, Any]]:
    stages = dict.fromkeys(("read", "decode", "crop", "text", "plan", "cpu"), 0.01) | seconds
    one = {"data_wait_ratio": wait, "step_s": step_s, **{f"stream_{k}_s": v for k, v in stages.items()}}
    start = one | {"data_wait_ratio": 0.9}  # the stream fills: not what is judged
    return [start, start, *[one | {"step": step} for step in range(10)]]


def test_nothing_is_said_of_runs_that_do_not_wait_or_tell_no_seconds() -> None:
    assert why_it_waits(records(0.05, decode=5.0), TWO) == ""
    assert why_it_waits(records(0.5)[:2], TWO) == "" and why_it_waits([], TWO) == ""
    assert why_it_waits([{"data_wait_ratio": 0.5, "step_s": 1.0}] * 5, TWO) == ""


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        ({"decode": 1.7, "cpu": 1.7}, r"stage decode: 9\d% .*data.num_actors=4 \(now 2\)"),
        ({"read": 1.6, "decode": 0.3, "cpu": 0.4}, r"stage read: .*storage is slow.*shards.row_group_bytes"),
        ({"text": 1.5, "decode": 0.2, "cpu": 1.7}, r"stage text: .*tokenises and tags"),
        ({"plan": 1.5, "decode": 0.2, "cpu": 1.7}, r"stage plan: .*masks"),
        ({"decode": 1.8, "cpu": 0.9}, r"are the cores: .*gets 4\d% of one.*Add CPUs"),
        ({"decode": 0.5, "cpu": 0.5}, r"is the transfer: .*2 decoding actors work 27% .*data.window_steps below 4"),
    ],
)
def test_the_stage_that_limits_is_named_with_what_to_change(seconds: dict[str, float], told: str) -> None:
    text = why_it_waits(records(0.4, **seconds), TWO)
    assert re.search(told, text), text
    assert text.startswith("Steps wait 40% of their time for data.")
