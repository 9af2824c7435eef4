"""Studies: arms that begin from others come after them, differences are paired by seed, and bad files are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medim_ray.config.loader import from_tree, load
from medim_ray.studies.ablate import StudyConfig, _arm, _waves, study_of
from medim_ray.studies.outcome import Number
from medim_ray.studies.page import figures, write_study
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


def test_the_error_falls_and_its_law_is_fitted() -> None:
    sizes = {"10": 10.0, "30": 30.0, "100": 100.0, "300": 300.0}
    config = _config(arms={name: [] for name in sizes}, fit={"law": "power", "x": sizes, "x_name": "images"})
    study = study_of(config, make_table([_run(arm, 0, 0.9 - 0.5 * x**-0.5) for arm, x in sizes.items()], "auroc.mean"))
    (line,) = study.lines
    assert line.fit is not None and line.fit.predicted is not None
    assert line.fit.predicted.value == pytest.approx(0.1 + 0.5 * 300**-0.5, abs=1e-3)
    assert study.line_names == ("images", "1 - auroc.mean")


def test_a_law_without_enough_points_is_a_note_and_no_error() -> None:
    config = _config(fit={"law": "power", "x": {"a": 1, "b": 2}})
    study = study_of(config, make_table([_run("a", 0, 0.7), _run("b", 0, 0.8)], "auroc.mean"))
    assert study.lines[0].fit is None and "has 3 parameters" in study.lines[0].note


def test_an_arm_may_lie_on_several_lines_each_with_its_own_law() -> None:
    rates = {"1": 10.0, "2 weak": 19.0, "2 strong": 15.0}
    x = {"1": 1, "2 weak": 2, "2 strong": 2}
    fit = {"law": "amdahl", "x": x, "hold_out": False, "lines": {"weak": ["1", "2 weak"], "strong": ["1", "2 strong"]}}
    config = _config(arms={name: [] for name in rates}, fit=fit)
    study = study_of(config, make_table([_run(arm, 0, rate) for arm, rate in rates.items()], "auroc.mean"))
    serial = [line.fit and line.fit.parameters["serial"].value for line in study.lines]
    assert serial == pytest.approx([2 * 10 / 19 - 1, 2 * 10 / 15 - 1], abs=1e-5)


def test_an_arm_called_untrained_does_not_hide_the_baseline(tmp_path: Path) -> None:
    runs = [
        replace(_run(arm, seed, value), baselines={"untrained": {"auroc.mean": Number(0.25)}})
        for arm, value in (("untrained", 0.5), ("b", 0.75)) for seed in range(2)
    ]  # fmt: skip
    config = _config(arms={"untrained": [], "b": ["seed=1"]}, reference="b")
    table = make_table(runs, "auroc.mean")
    study = study_of(config, table)
    found = study.differences(table)["auroc.mean"]
    assert (found["arm=untrained"].value, found["untrained"].value) == (-0.25, -0.5)
    (_, differences), (_, values) = figures(study, table)
    assert differences.count(">untrained<") == values.count(">untrained<") == 2


@pytest.mark.parametrize("file", sorted((ROOT / "configs/studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_study_has_a_figure_and_its_table_compares_every_number(file: Path, tmp_path: Path) -> None:
    config = load(StudyConfig, file, [])
    rng = np.random.default_rng(0)
    metrics = (config.metric, *config.report)
    runs = [
        replace(
            _run(arm, seed, 1.0),
            numbers={metric: Number(float(rng.uniform(0.6, 0.9))) for metric in metrics},
            baselines={"untrained": {metric: Number(0.5) for metric in metrics}},
        )
        for arm in config.arms
        for seed in config.seeds
    ]
    table = make_table(runs, config.metric)
    study = study_of(config, table)
    drawn = figures(study, table)
    assert any("paired by seed" in caption for caption, _ in drawn), "what differs from the reference is seen"
    if config.fit.law != "none":
        assert any(config.fit.x_name in svg for _, svg in drawn), "so is the law"
    compared = study.differences(table)
    assert list(compared) == list(metrics), "each number is compared with the reference"
    assert all(len(found) == len(config.arms) for found in compared.values()), "the other arms, and untrained"
    page = Path(write_study(study, table, str(tmp_path))).read_text()
    below = page.partition("<h2>Compared with")[2].partition("</table>")[0]
    others = len(config.arms) - 1
    for metric in metrics:
        assert below.count(f'data-name="{metric}"') == others + 1, "a row an arm, and untrained"


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
        ({"fit": {"law": "amdahl", "x": {"a": 0}}}, "fit.x.a=0: must be above 0"),
        ({"fit": {"x": {"a": 1}, "lines": {"weak": ["a"]}}}, "fit.law=none fits none"),
        ({"fit": {"law": "amdahl", "x": {"a": 1, "b": 2}, "lines": {"weak": ["a"]}}}, "fit.x.b stands in none"),
        ({"fit": {"law": "amdahl", "x": {"a": 1}, "lines": {"weak": ["a", "b"]}}}, r"lines\.weak: 'b' has no place"),
        ({"report": ["dices.lung"]}, "report='dices.lung' is no number"),
        ({"report": ["auroc.mean"]}, "each number once"),
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
