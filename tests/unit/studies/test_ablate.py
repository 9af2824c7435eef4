"""Studies: arms that begin from others come after them, differences are paired by seed, and bad files are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from medim_ray.config.loader import from_tree, load
from medim_ray.studies.ablate import StudyConfig, _arm, _waves, _with_fit, differences
from medim_ray.studies.outcome import Number
from medim_ray.studies.page import Study
from medim_ray.studies.results import Run, make_table
from medim_ray.studies.space import Point, SearchSpace, make_trial
from medim_ray.studies.sweep import load_sweep

ROOT = Path(__file__).parents[3]


def _config(**more: Any) -> StudyConfig:
    return from_tree(StudyConfig, {"recipe": "r.yaml", "out": "out", "arms": {"a": [], "b": ["seed=1"]}, **more})


def _run(arm: str, seed: int, value: float | None) -> Run:
    return Run(
        name=f"{arm}{seed}",
        values={"arm": arm, "seed": seed},
        state="failed" if value is None else "finished",
        error="",
        seconds=1.0,
        step=1,
        numbers={} if value is None else {"auroc.mean": Number(value)},
        gains={},
    )


def test_an_arm_comes_after_the_one_that_it_begins_from() -> None:
    arms = {"c": ["encoder.init=run:b b"], "a": [], "b b": {"recipe": "x.yaml", "overrides": ["encoder.init=run:a"]}}
    assert _waves(_config(arms=arms)) == [["a"], ["b b"], ["c"]]


@pytest.mark.parametrize(
    ("arms", "message"),
    [({"a": ["encoder.init=run:z"]}, "begins from run:z, which is none of the arms a"),
     ({"a": ["encoder.init=run:b"], "b": ["encoder.init=run:a"]}, "in a circle")],
)  # fmt: skip
def test_what_begins_from_nothing_is_refused(arms: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _waves(_config(arms=arms))


def test_differences_are_paired_by_seed_and_leave_out_what_failed() -> None:
    values = {"a": (0.70, 0.80, 0.60), "b": (0.72, 0.82, None)}
    table = make_table([_run(arm, s, v) for arm, row in values.items() for s, v in enumerate(row)], "auroc.mean")
    (number,) = differences(table, "a").values()
    assert number.value == pytest.approx(0.02)
    assert number.low is not None and number.low == pytest.approx(0.02), "both pairs differ by the same: no spread"


def test_the_error_falls_and_its_law_is_fitted() -> None:
    sizes = {"10": 10.0, "30": 30.0, "100": 100.0, "300": 300.0}
    config = _config(arms={name: [] for name in sizes}, fit={"law": "power", "x": sizes, "x_name": "images"})
    table = make_table([_run(arm, 0, 0.9 - 0.5 * x**-0.5) for arm, x in sizes.items()], "auroc.mean")
    study = _with_fit(Study(kind="study", title="", question="", config={}), table, config)
    assert study.fit is not None and study.fit.predicted is not None
    assert study.fit.predicted.value == pytest.approx(0.1 + 0.5 * 300**-0.5, abs=1e-3)
    assert study.fit_names == ("images", "1 - auroc.mean")


def test_a_law_without_enough_points_is_a_note_and_no_error() -> None:
    config = _config(fit={"law": "power", "x": {"a": 1, "b": 2}})
    table = make_table([_run("a", 0, 0.7), _run("b", 0, 0.8)], "auroc.mean")
    study = _with_fit(Study(kind="study", title="", question="", config={}), table, config)
    assert study.fit is None and "No law was fitted" in study.note


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"arms": {}}, "arms is empty"),
        ({"arms": {"a": "seed=1"}}, "a list of overrides"),
        ({"arms": {"a": {"recipes": "x"}}}, "a list of overrides"),
        ({"reference": "z"}, "none of the arms a, b"),
        ({"seeds": []}, "at least one"),
        ({"seeds": [1, 1]}, "each once"),
        ({"metric": "aurok.mean"}, "did you mean 'auroc.mean'"),
        ({"fit": {"law": "power"}}, "needs x"),
        ({"fit": {"law": "power", "x": {"z": 1}}}, "no such arm"),
    ],
)
def test_what_is_no_study_is_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _config(**more)


@pytest.mark.parametrize("file", sorted((ROOT / "configs/studies").glob("*.yaml")), ids=lambda f: f.stem)
def test_every_arm_of_the_shipped_studies_is_a_run(file: Path) -> None:
    config = load(StudyConfig, file)
    for name in config.arms:
        recipe, overrides = _arm(config, name, str(file))
        overrides = [text.replace("run:", "/runs/") for text in overrides]
        make_trial(recipe, config.overrides, Point({"arm": name}, tuple(overrides)), "/runs")
    assert _waves(config)


@pytest.mark.parametrize("file", sorted((ROOT / "configs/sweeps").glob("*-*.yaml")), ids=lambda f: f.stem)
def test_every_corner_of_the_shipped_sweeps_is_a_run(file: Path) -> None:
    config = load_sweep(str(file), [])
    trials = [
        make_trial(config.recipe, config.overrides, p, "/runs") for p in SearchSpace.parse(config.space).corners()
    ]
    assert len({trial.name for trial in trials}) == len(trials)
