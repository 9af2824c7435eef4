"""Runs to cells: means over seeds, what is not learned, ranks, and the CSV."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from medim_ray.config.loader import load
from medim_ray.config.schema import RunConfig
from medim_ray.studies.listing import print_table
from medim_ray.studies.outcome import Number
from medim_ray.studies.page import Study, write_study
from medim_ray.studies.results import FIRST_WEIGHTS, Run, make_run, make_table, mean_number, num_done, to_csv
from medim_ray.studies.space import Point, Trial
from medim_ray.studies.trials import Record, Report


def _run(ratio: float, seed: int, value: float | None, gain: float = 0.1, state: str = "finished") -> Run:
    known = value is not None
    return Run(
        name=f"{ratio}-{seed}",
        values={"masking.ratio": ratio, "seed": seed},
        state=state,
        error="",
        seconds=60.0,
        step=300,
        numbers={"auroc.mean": Number(value, value - 0.05, value + 0.05)} if known else {},  # type: ignore[operator]
        gains={"auroc.mean": Number(gain, gain - 0.02, gain + 0.02)} if known else {},
    )


def test_a_cell_is_the_mean_over_seeds_with_students_interval() -> None:
    table = make_table([_run(0.5, seed, value) for seed, value in enumerate((0.70, 0.74, 0.72))], "auroc.mean")
    (cell,) = table.cells
    number = cell.numbers["auroc.mean"]
    low, high = stats.t.interval(0.95, 2, loc=0.72, scale=stats.sem([0.70, 0.74, 0.72]))
    assert (number.value, number.low, number.high) == pytest.approx((0.72, low, high))


def test_of_a_single_run_the_interval_over_patients_stays() -> None:
    assert mean_number([Number(0.7, 0.6, 0.8)]) == Number(0.7, 0.6, 0.8)


def test_cells_are_ranked_best_first_and_what_is_not_learned_is_not() -> None:
    runs = [_run(0.25, s, 0.70 + 0.001 * s, gain=0.05 + 0.001 * s) for s in range(3)]
    runs += [_run(0.5, s, 0.80, gain=g) for s, g in enumerate((0.2, -0.1, 0.0))]
    runs += [_run(0.75, s, 0.75 + 0.001 * s, gain=0.06 + 0.001 * s) for s in range(3)]
    cells = make_table(runs, "auroc.mean").cells
    assert [(cell.values["masking.ratio"], cell.rank) for cell in cells] == [(0.75, 1), (0.25, 2), (0.5, None)]
    assert [cell.verdict for cell in cells] == ["", "", "not learned"]


def test_where_less_is_better_the_least_is_first() -> None:
    runs = [
        Run(name=str(x), values={"lr": x}, state="finished", error="", seconds=1, step=1, numbers={"loss": n}, gains={})
        for x, n in ((1, Number(3.0)), (2, Number(1.0)), (3, Number(2.0)))
    ]
    assert [cell.values["lr"] for cell in make_table(runs, "loss").cells] == [2, 3, 1]


def test_a_failed_seed_makes_its_cell_failed_and_unranked() -> None:
    table = make_table([_run(0.5, 0, 0.7), _run(0.5, 1, None, state="failed"), _run(0.25, 0, 0.6)], "auroc.mean")
    assert [(c.values["masking.ratio"], c.rank, c.verdict) for c in table.cells] == [
        (0.25, 1, ""),
        (0.5, None, "failed"),
    ]
    assert table.count("failed") == 1


def test_the_csv_has_a_row_a_cell_with_its_numbers() -> None:
    runs = [_run(ratio, s, 0.6 + ratio / 10 + s / 100) for ratio in (0.25, 0.5) for s in range(2)]
    table = make_table([*runs, _run(0.75, 0, None, state="to do")], "auroc.mean")
    rows = list(csv.DictReader(io.StringIO(to_csv(table))))
    assert [row["masking.ratio"] for row in rows] == ["0.5", "0.25", "0.75"]
    assert float(rows[0]["auroc.mean"]) == pytest.approx(np.mean([0.65, 0.66]))
    assert rows[2]["verdict"] == "to do" and rows[2]["auroc.mean"] == "" and rows[0]["auroc.mean_gain"] == "0.1"


def test_an_error_that_falls_is_learned() -> None:
    gain = Number(-2.0, -3.0, -1.0)
    runs = [
        Run(name="r", values={"seed": 0}, state="finished", error="", seconds=1, step=1,
            numbers={"mae.age": Number(9.0)}, gains={"mae.age": gain})
    ]  # fmt: skip
    assert make_table(runs, "mae.age").cells[0].learned is True


def test_a_trial_that_was_stopped_early_is_no_rival_of_one_that_ran_to_its_end() -> None:
    def run(lr: float, seed: int, *values: float) -> Run:
        reports = [Report(100 * 3**i, {"auroc.mean": Number(value)}, {}) for i, value in enumerate(values)]
        last = reports[-1]
        state = "finished" if last.step == 900 else "stopped"
        return Run(
            name=f"{lr}-{seed}", values={"train.lr": lr, "seed": seed}, state=state, error="", seconds=1.0,
            step=last.step, numbers=last.numbers, gains={}, earlier=tuple(reports[:-1]),
        )  # fmt: skip

    runs = [run(1, 0, 0.9), run(2, 0, 0.5, 0.6, 0.7), run(3, 0, 0.6, 0.8), run(4, 0, 0.6, 0.7, 0.95), run(4, 1, 0.5)]
    cells = make_table(runs, "auroc.mean").cells
    assert [cell.values["train.lr"] for cell in cells] == [2, 3, 1, 4], "the furthest first, then the best"
    assert [cell.verdict for cell in cells] == ["", "stopped at step 300", *["stopped at step 100"] * 2]
    number = cells[-1].numbers["auroc.mean"].value
    assert number == pytest.approx((0.6 + 0.5) / 2), "seeds are averaged at the step that all of them reached"


def test_a_cell_without_the_number_is_not_ranked() -> None:
    """Nor first where less is better: the mean over seeds of which one has none is none."""
    runs = [
        Run(name=f"{lr}{seed}", values={"lr": lr, "seed": seed}, state="finished", error="", seconds=1, step=1,
            numbers={"loss": Number(value)}, gains={})
        for lr, values in ((1, (3.0, 2.0)), (2, (1.0, None))) for seed, value in enumerate(values)
    ]  # fmt: skip
    assert [(cell.values["lr"], cell.rank) for cell in make_table(runs, "loss").cells] == [(1, 1), (2, None)]


def test_seeds_of_which_one_was_stopped_and_that_share_no_step_have_no_mean() -> None:
    runs = [replace(_run(0.5, 0, 0.7), state="stopped", step=50), _run(0.5, 1, 0.8)]
    (cell,) = make_table(runs, "auroc.mean").cells
    assert (cell.numbers, cell.rank, cell.verdict) == ({}, None, "stopped, with no step in common")


def test_a_table_of_seeds_alone_has_a_column_for_the_encoder(tmp_path: Path) -> None:
    beside = {"pixels": {"auroc.mean": Number(0.6)}}
    runs = [replace(_run(0.5, seed, 0.7), values={"seed": seed}, baselines=beside) for seed in range(2)]
    table = make_table(runs, "auroc.mean")
    rows = list(csv.DictReader(io.StringIO(to_csv(table))))
    assert [(row["encoder"], row["verdict"], row["auroc.mean"]) for row in rows] == [
        ("recipe", "", "0.7"),
        ("raw pixels", "baseline", "0.6"),
    ]
    study = Study(kind="sweep", title="t", question="q", config={})
    console = Console(file=io.StringIO(), width=120)
    print_table(study, table, console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    (pixels,) = [line for line in lines if "raw pixels" in line]
    assert [part.strip() for part in pixels.split("│")[1:5]] == ["", "raw pixels", "0.6", ""]
    page = Path(write_study(study, table, str(tmp_path))).read_text()
    assert ">raw pixels</td>" in page and "<th>encoder</th>" in page


def test_a_run_in_two_cells_is_counted_once() -> None:
    beside = {"untrained": {"auroc.mean": Number(0.5)}}
    runs = [replace(_run(0.5, 0, 0.7), name="same", values={"arm": arm, "seed": 0}, baselines=beside) for arm in "ab"]
    other = {"untrained": {"auroc.mean": Number(0.8)}}
    third = replace(_run(0.5, 0, 0.7), values={"arm": "c", "seed": 1}, baselines=other)
    table = make_table([*runs, third], "auroc.mean")
    assert len(table.runs) == table.count("finished") == 2
    number = table.baselines[0].numbers["auroc.mean"]
    assert number.value == pytest.approx(0.65)


def test_encoders_beside_the_runs_are_rows_without_a_rank() -> None:
    def run(arm: str, seed: int) -> Run:
        untrained = Number(0.5 + seed / 100 + (arm == "b") / 10)
        pixels = Number(0.6, 0.55, 0.65 + seed / 1000)
        beside = {"untrained": {"auroc.mean": untrained}, "pixels": {"auroc.mean": pixels}}
        return replace(_run(0.5, seed, 0.7), name=f"{arm}{seed}", values={"arm": arm, "seed": seed}, baselines=beside)

    table = make_table([run(arm, seed) for arm in "ab" for seed in range(2)], "auroc.mean")
    untrained, pixels = table.baselines
    assert untrained.numbers["auroc.mean"].value == pytest.approx((0.5 + 0.6 + 0.51 + 0.61) / 4)
    assert pixels.numbers["auroc.mean"] == Number(0.6, 0.55, 0.65), "the same in all runs: its own interval"
    rows = list(csv.DictReader(io.StringIO(to_csv(table, {"auroc.mean": {"untrained": Number(-0.15)}}))))
    assert [(row["arm"], row["rank"], row["verdict"]) for row in rows[-2:]] == [
        ("untrained", "", "baseline"),
        ("raw pixels", "", "baseline"),
    ]
    assert rows[-2]["auroc.mean_minus_reference"] == "-0.15"


def test_first_weights_of_a_run_that_begins_from_another_are_no_untrained_encoder(tmp_path: Path) -> None:
    baselines = {"untrained": {"auroc.mean": Number(0.6)}, "pixels": {"auroc.mean": Number(0.7)}}
    record = Record(reports=(Report(1, {"auroc.mean": Number(0.8)}, {}, baselines),), attempts=1, state="finished")
    config = load(RunConfig, None, [])
    runs = []
    for arm, init in (("random", "random"), ("ImageNet", "timm")):
        encoder = replace(config.encoder, init=init)
        trial = Trial(point=Point({"arm": arm}, ()), config=replace(config, encoder=encoder))
        runs.append(replace(make_run(trial, record), name=arm))
    assert [set(run.baselines) for run in runs] == [{"untrained", "pixels"}, {FIRST_WEIGHTS, "pixels"}]
    assert {row.name for row in make_table(runs, "auroc.mean").baselines} == {"untrained", FIRST_WEIGHTS, "pixels"}


def test_a_cell_says_of_how_many_of_its_runs_its_numbers_are() -> None:
    runs = [_run(0.5, 0, 0.7), _run(0.5, 1, None, state="failed"), _run(0.25, 0, 0.6)]
    assert {num_done(cell) for cell in make_table(runs, "auroc.mean").cells} == {"1 of 2", "1"}
