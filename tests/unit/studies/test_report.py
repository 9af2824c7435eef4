"""From records of metrics.jsonl to charts: what is shown, what is a gap, and what is said where there is nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medim_ray.studies.report import _duration, chart_groups, pace, planned, series


def _records(num: int) -> list[dict[str, object]]:
    return [
        {
            "step": i,
            "epoch": 0,
            "ita": 2.0,
            "loss": 3.0 - 0.1 * i,
            "mask/kdm/hidden_ratio": 0.5,
            "lr": 1e-3,
            "grad_norm": None,
            "samples_per_s": 10.0 + i,
            "step_s": 0.5,
            "data_wait_ratio": 0.25,
            "mfu": 0.4,
            "ended_at": 1e9,
            "throughput": {"goodput": 0.5},
            "warnings": ["in words"],
        }
        for i in range(num)
    ]


def test_the_loss_comes_first_and_every_number_has_its_place() -> None:
    loss, throughput, optimiser = chart_groups(_records(11))
    assert [chart.name for chart in loss.charts] == ["loss", "ita", "mask/kdm/hidden_ratio"]
    assert loss.charts[0].summary == "last 2" and loss.note == ""
    assert [chart.summary for chart in throughput.charts] == ["median 15.0", "median 40.0%", "median 25.0%"]
    assert [chart.name for chart in optimiser.charts] == ["learning rate"], "a number that was never there has no panel"


def test_numbers_that_are_not_finite_are_gaps_and_said_in_words() -> None:
    records = _records(6)
    records[3]["loss"], records[4]["loss"] = "nan", "inf"
    steps, values = series(records, "loss")
    assert steps.tolist() == [0, 1, 2, 3, 4, 5] and np.isnan(values[3:5]).all() and values[5] == pytest.approx(2.5)
    note = chart_groups(records)[0].note
    assert "not finite at 2 steps, first at step 3" in note


def test_no_record_gives_a_sentence_and_no_panel() -> None:
    for group in chart_groups([]):
        assert group.note and not group.charts


def test_throughput_is_told_in_words() -> None:
    seconds = {"wall_s": 100.0, "launch_s": 20.0, "restart_s": 0.0, "checkpoint_s": 5.0, "lost_s": 0.0}
    steps = {f"step_s_p{p}": 0.5 for p in (5, 50, 95, 99)}
    block = {"samples_per_s": 12.0, "mfu": 0.31, "data_wait_ratio": 0.02, "goodput": 0.75, "num_attempts": 1}
    told = dict(pace({**block, **seconds, **steps, "peak_flops": 8.5e10, "peak_source": "measured"}))
    assert told["Throughput"] == "12.0 images/s, 2.0% of it waiting for data, 31.0% of 0.085 TFLOPS a worker (measured)"
    assert told["Goodput"] == (
        "75.0% of 1 min 40 s in steps that count; 20.0 s from the command to the first step, 5.0 s in checkpoints; "
        "1 attempt"
    )
    assert pace(None) == []


def test_a_plan_beside_the_report_is_linked(tmp_path: Path) -> None:
    assert planned(str(tmp_path)) == []
    (tmp_path / "plan.html").touch()
    ((name, link),) = planned(f"{tmp_path}/")
    assert name == "Plan" and 'href="plan.html"' in link


@pytest.mark.parametrize(("seconds", "text"), [(3.21, "3.2 s"), (61, "1 min 01 s"), (3660, "1 h 01 min")])
def test_durations(seconds: float, text: str) -> None:
    assert _duration(seconds) == text
