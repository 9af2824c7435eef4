"""What an axis does: pairs of runs that differ in nothing else, over seeds, in the order of the YAML."""

from __future__ import annotations

import pytest

from medim_ray.studies.effects import axes_of, differences, effects
from medim_ray.studies.outcome import Number
from medim_ray.studies.results import Run, Table, make_table
from medim_ray.studies.space import SearchSpace
from medim_ray.studies.trials import Report

SPACE = {
    "masking.ratio": [0.5, 0.25],
    "strategy": {"choices": {"uniform": ["masking.name=uniform"], "KDM": ["masking.name=kdm"]}},
    "seed": [0, 1, 2],
}


def run_of(ratio: float, strategy: str, seed: int, state: str = "finished") -> Run:
    """KDM gains 0.02 + seed / 100, a ratio of 0.25 loses 0.1 with uniform and nothing with KDM."""
    gain = (strategy == "KDM") * (0.02 + seed / 100) - 0.1 * (strategy == "uniform" and ratio == 0.25)
    return Run(
        name=f"{ratio}{strategy}{seed}",
        values={"masking.ratio": ratio, "strategy": strategy, "seed": seed},
        state=state,
        error="",
        seconds=1.0,
        step=1,
        numbers={"auroc.mean": Number(0.6 + seed + gain)} if state == "finished" else {},
        gains={},
    )


def table_of(seeds: int, failed: tuple[float, str, int] | None = None) -> Table:
    points = [(r, s, k) for r in (0.25, 0.5) for s in ("KDM", "uniform") for k in range(seeds)]
    return make_table(
        [run_of(*point, state="failed" if point == failed else "finished") for point in points], "auroc.mean"
    )


def test_axes_are_those_of_a_grid_in_its_order() -> None:
    assert axes_of({"search": "grid", "space": SPACE}) == {
        "masking.ratio": ["0.5", "0.25"],
        "strategy": ["uniform", "KDM"],
    }
    assert axes_of({"search": "optuna", "space": {"train.lr": {"loguniform": [1e-4, 1e-2]}}}) == {}
    assert axes_of({"arms": {}}) == {}, "a study has its own reference"
    odd = {"train.clip": [None, 1.0], "rate": {"choices": {"1e-4": ["train.lr=1e-4"], "high": ["train.lr=1e-3"]}}}
    (point, *_) = SearchSpace.parse(odd).grid()
    levels = axes_of({"search": "grid", "space": odd})
    assert [str(value) for value in point.values.values()] == [values[0] for values in levels.values()], "as tables say"


def test_differences_are_paired_within_seeds() -> None:
    ratio, strategy = effects(table_of(3), axes_of({"search": "grid", "space": SPACE}))
    assert (ratio.value, ratio.reference, ratio.num_pairs) == ("0.25", "0.5", 6)
    assert ratio.difference.value == pytest.approx(-0.05) and ratio.difference.high == pytest.approx(-0.05)
    # each seed: 0.02 + seed / 100 at both ratios, and 0.1 more at 0.25; the seeds' own level drops out
    assert strategy.difference.value == pytest.approx(0.03 + 0.05)
    assert strategy.difference.low == pytest.approx(0.08 - 4.302653 * 0.01 / 3**0.5)


def test_a_failed_run_takes_its_pair_out_and_nothing_is_told_of_nothing() -> None:
    axes = axes_of({"search": "grid", "space": SPACE})
    ratio, strategy = effects(table_of(3, failed=(0.25, "uniform", 0)), axes)
    assert ratio.num_pairs == strategy.num_pairs == 5
    assert strategy.difference.value == pytest.approx((0.02 + 0.08 + 0.09) / 3)
    single, _ = effects(table_of(1), axes)  # over the pairs, where there is one seed
    assert single.num_pairs == 2 and single.difference.value == pytest.approx(-0.05)
    assert single.difference.high is not None and single.difference.high > 0
    assert effects(make_table([], "auroc.mean"), axes) == []


def test_a_run_that_was_stopped_early_is_compared_at_the_step_that_both_reached() -> None:
    def run(ratio: float, seed: int, *values: float, state: str = "finished") -> Run:
        reports = [Report(50 * 3**i, {"auroc.mean": Number(value)}, {}) for i, value in enumerate(values)]
        last = reports[-1]
        return Run(
            name=f"{ratio}{seed}", values={"masking.ratio": ratio, "seed": seed}, state=state, error="", seconds=1.0,
            step=last.step, numbers=last.numbers, gains={}, earlier=tuple(reports[:-1]),
        )  # fmt: skip

    runs = [run(0.5, 0, 0.60, 0.70), run(0.5, 1, 0.61, 0.71)]
    runs += [run(0.25, 0, 0.58, state="stopped"), run(0.25, 1, 0.60, 0.75)]
    table = make_table(runs, "auroc.mean")
    axes = {"masking.ratio": ["0.5", "0.25"]}
    (effect,) = effects(table, axes)
    assert effect.difference.value == pytest.approx((-0.02 + 0.04) / 2)
    found = differences(table, "masking.ratio=0.5", "auroc.mean")
    assert found["masking.ratio=0.25"].value == pytest.approx((-0.02 + 0.04) / 2)


def test_runs_of_different_lengths_that_ended_are_compared_at_their_ends() -> None:
    runs = [
        Run(name=str(steps), values={"train.steps": steps, "seed": 0}, state="finished", error="", seconds=1.0,
            step=steps, numbers={"auroc.mean": Number(value)}, gains={})
        for steps, value in ((100, 0.6), (300, 0.7))
    ]  # fmt: skip
    (effect,) = effects(make_table(runs, "auroc.mean"), {"train.steps": ["100", "300"]})
    assert effect.difference.value == pytest.approx(0.1)


def test_differences_from_a_reference_are_paired_by_seed_and_leave_out_what_failed() -> None:
    values = {"a": (0.70, 0.80, 0.60), "b": (0.72, 0.82, None)}
    runs = [
        Run(
            name=f"{arm}{seed}",
            values={"arm": arm, "seed": seed},
            state="failed" if value is None else "finished",
            error="",
            seconds=1.0,
            step=1,
            numbers={} if value is None else {"auroc.mean": Number(value)},
            gains={},
            baselines={}
            if value is None
            else {"untrained": {"auroc.mean": Number(value - (0.1 if arm == "a" else 0.3))}},
        )
        for arm, row in values.items()
        for seed, value in enumerate(row)
    ]
    found = differences(make_table(runs, "auroc.mean"), "arm=a", "auroc.mean")
    assert set(found) == {"arm=b", "untrained"}
    ends = (found["arm=b"].value, found["arm=b"].low)
    assert ends == pytest.approx((0.02, 0.02)), "both pairs differ by the same: no spread"
    assert found["untrained"].value == pytest.approx(-0.1), "the untrained encoder of the reference's own runs"
    assert differences(make_table(runs, "auroc.mean"), "arm=a", "loss") == {}
