"""`medim-ray ablate`: a study, which is a table of runs: named arms of one recipe, times seeds, against a reference.

An arm may begin from another arm's run (`encoder.init=run:ARM`). A scaling law is fitted over the arms by option.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from medim_ray.config.loader import load, to_tree
from medim_ray.config.probe import ProbeConfig
from medim_ray.config.schema import RunConfig
from medim_ray.data.sources.base import absolute
from medim_ray.studies.execute import command
from medim_ray.studies.fit import LAWS, Measured, fit_line
from medim_ray.studies.origin import package_commit
from medim_ray.studies.outcome import (
    Number,
    better_is_higher,
    check_metric,
    check_report,
    check_reported,
    needs_probe,
)
from medim_ray.studies.page import Study
from medim_ray.studies.results import Table
from medim_ray.studies.runner import Group, RunnerConfig, Search
from medim_ray.studies.space import SEED, Point, SearchSpace, Trial, distinct, make_trial
from medim_ray.studies.sweep import find_recipe, open_shards
from medim_ray.studies.trials import ENCODER, TrialJob
from medim_ray.train.checks import check

ARM = "arm"
_RUN = re.compile(r"=run:(.+)$")


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """A scaling law over the arms. power: of the error (1 - the metric, or the metric where less is better)."""

    law: Literal["none", "power", "amdahl"] = field(default="none", metadata={"help": "none, power or amdahl"})
    x: dict[str, float] = field(default_factory=dict, metadata={"help": "arm -> its place: images, workers"})
    x_name: str = field(default="x", metadata={"help": "what x counts, for the figure"})
    lines: dict[str, tuple[str, ...]] = field(
        default_factory=dict, metadata={"help": "name -> arms of one line, each with a law of its own; empty: one line"}
    )
    hold_out: bool = field(default=True, metadata={"help": "predict the largest x from the others"})

    def __post_init__(self) -> None:
        if self.law != "none" and not self.x:
            raise ValueError(f"law={self.law} needs x: a number for each arm, e.g. x: {{10 %: 40, 100 %: 400}}")
        if self.law == "none" and self.lines:
            raise ValueError("fit.lines is set, but fit.law=none fits none: use power or amdahl, or leave it out")
        for arm, x in self.x.items():
            if not 0 < x < math.inf:
                raise ValueError(f"fit.x.{arm}={x:g}: must be above 0, such as a number of images or workers")
        on_lines = {arm for arms in self.lines.values() for arm in arms}
        if self.lines and (left := [arm for arm in self.x if arm not in on_lines]):
            raise ValueError(f"fit.x.{left[0]} stands in none of fit.lines: name it there, or leave it out of fit.x")
        for name, arms in self.lines.items():
            if strange := [arm for arm in arms if arm not in self.x]:
                raise ValueError(f"lines.{name}: {strange[0]!r} has no place in fit.x; there are {', '.join(self.x)}")
        assert self.law in ("none", *LAWS)


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Options of `medim-ray ablate`."""

    question: str = field(default="", metadata={"help": "what the study asks, for its page"})
    recipe: str = field(metadata={"help": "YAML file of `pretrain`; from this file, or from the working folder"})
    shards: str = field(default="", metadata={"help": "data.shards of every run"})
    out: str = field(metadata={"help": "folder or fsspec URL of tables and figures"})
    runs: str = field(default="", metadata={"help": "folder of the runs, which studies may share; empty: OUT/runs"})
    overrides: tuple[str, ...] = field(default=(), metadata={"help": "key=value of the recipe, for every run"})
    arms: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "NAME -> [key=value], or {recipe: FILE, overrides: [key=value]}; encoder.init=run:NAME"},
    )
    reference: str = field(default="", metadata={"help": "arm that the others are compared with, paired by seed"})
    seeds: tuple[int, ...] = field(default=(0, 1, 2), metadata={"help": "each arm is run with each"})
    metric: str = field(default="auroc.mean", metadata={"help": "what is ranked: auroc.LABEL, loss, samples_per_s"})
    report: tuple[str, ...] = field(
        default=(), metadata={"help": "more numbers of each arm, each compared with the reference too: mae.age, loss"}
    )
    fit: FitConfig = field(default_factory=FitConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    runner: RunnerConfig = field(default_factory=RunnerConfig)

    def __post_init__(self) -> None:
        check_metric(self.metric, "metric")
        check_report(self.report, self.metric)
        if not self.arms:
            raise ValueError("arms is empty: name at least one, e.g. arms: {without MIM: [objective.…=0]}")
        for name, arm in self.arms.items():
            overrides = _overrides(arm)
            unknown = set(arm) - {"recipe", "overrides"} if isinstance(arm, Mapping) else set()
            is_list = isinstance(overrides, list | tuple) and all(isinstance(text, str) for text in overrides)
            if unknown or not is_list:
                raise ValueError(f"arms.{name}={arm!r}: a list of overrides, or {{recipe: FILE, overrides: [...]}}")
        if self.reference and self.reference not in self.arms:
            raise ValueError(f"reference={self.reference!r} is none of the arms {', '.join(self.arms)}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)}: at least one, each once")
        if strange := [name for name in self.fit.x if name not in self.arms]:
            raise ValueError(f"fit.x.{strange[0]}: no such arm; there are {', '.join(self.arms)}")


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """A checked study, an `Experiment`. waves: trials; a wave begins from runs of those before it. parents: name of a
    run -> those that it begins from."""

    config: StudyConfig
    job: TrialJob
    waves: Sequence[Sequence[Trial]]
    parents: Mapping[str, Sequence[Trial]]
    group: Group

    def trials(self) -> Sequence[Trial]:
        """All runs."""
        return [trial for wave in self.waves for trial in wave]

    def searches(self) -> Iterator[Search]:
        """One a wave: of its runs those whose parents have come to their end; where one failed, or a budget cut it, its
        children are left to do."""
        for wave in self.waves:
            ready = [t for t in wave if all(self.job.is_done(parent.config) for parent in self.parents[t.name])]
            yield Search(kind="list", trials=ready)

    def began(self, values: Mapping[str, Any]) -> None:
        """Nothing: all runs are known."""

    def size(self) -> str:
        """`15 runs of 5 arms`."""
        return f"{len(distinct(self.trials()))} runs of {len(self.config.arms)} arms"

    def study(self, table: Table) -> Study:
        """The page."""
        return study_of(self.config, table)


def study_of(config: StudyConfig, table: Table) -> Study:
    """What a study's page says beside the table: what it asks, its reference, and the lines of a scaling law."""
    study = Study(
        kind="study",
        title=f"Study {config.out.rstrip('/').rpartition('/')[2]}",
        question=config.question or f"{', '.join(config.arms)}: {config.metric}",
        config=to_tree(config),
        reference=f"{ARM}={config.reference}" if config.reference else "",
        report=config.report,
    )
    return study if config.fit.law == "none" else _with_fit(study, table, config)


def _with_fit(study: Study, table: Table, config: StudyConfig) -> Study:
    law = config.fit.law
    assert law != "none"
    as_error = law == "power" and better_is_higher(config.metric)
    cells = {cell.values[ARM]: cell for cell in table.cells}
    numbers = {arm: cell.numbers.get(config.metric, Number(None)) for arm, cell in cells.items()}
    lines = []
    for name, arms in (config.fit.lines or {"": tuple(config.fit.x)}).items():
        points = []
        for arm in (arm for arm in arms if arm in cells and numbers[arm].value is not None):
            number = _error(numbers[arm]) if as_error else numbers[arm]
            points.append(Measured(config.fit.x[arm], number, cells[arm].num_done, cells[arm].learned))
        lines.append(fit_line(name, points, law, config.fit.hold_out))
    y_name = f"1 - {config.metric}" if as_error else config.metric
    return replace(study, lines=tuple(lines), law=law, line_names=(config.fit.x_name, y_name))


def _error(number: Number) -> Number:
    return Number(*(None if part is None else 1.0 - part for part in (number.value, number.high, number.low)))


def check_study(config: StudyConfig, file: str | None = None) -> Ablation:
    """Every run of the study, built and checked; ValueError names the arm at fault."""
    runs = absolute(config.runs or f"{config.out.rstrip('/')}/runs")
    if "://" in runs and (child := next((name for name in config.arms if _parents(config, name)), "")):
        raise ValueError(
            f"arms.{child} begins from another arm's run, whose encoder is read as a file, and runs={runs} is none: "
            "give a folder that every node sees"
        )
    shards = [f"data.shards={absolute(config.shards)}"] if config.shards else []
    made: dict[tuple[str, int], Trial] = {}
    parents: dict[str, list[Trial]] = {}
    waves: list[list[Trial]] = []
    for names in _waves(config):
        wave = []
        for seed in config.seeds:
            for name in names:
                recipe, overrides = _arm(config, name, file)
                overrides = [_resolved(text, seed, made) for text in overrides]
                point = Point({ARM: name, SEED: seed}, (*overrides, f"seed={seed}"))
                try:
                    trial = make_trial(recipe, [*config.overrides, *shards], point, runs)
                    check(_without_parent(trial.config))
                except ValueError as error:
                    raise ValueError(f"arms.{name}: {error}") from None
                made[name, seed] = trial
                parents[trial.name] = [made[parent, seed] for parent in _parents(config, name)]
                wave.append(trial)
        waves.append(wave)
    first = next(iter(made.values()))
    for (name, _), trial in made.items():
        if trial.config.data.shards != first.config.data.shards:
            raise ValueError(
                f"arms.{name}: data.shards={trial.config.data.shards!r}, of another {first.config.data.shards!r}; "
                "the arms of a study learn from one shard set; merge them (`medim-ray shards merge`) and choose by "
                "data.leave_out or data.weights"
            )
    stored = open_shards(first.config)
    check_reported([config.metric, *config.report], config.probe, stored)
    job = TrialJob(
        base={},
        space=SearchSpace(()),
        runs=runs,
        data_hash=stored.content_hash,
        rungs=(),
        probe=config.probe if needs_probe([config.metric, *config.report]) else None,
        metric=config.metric,
        commit=package_commit(),
    )
    group = Group.of([trial.config for trial in made.values()])
    return Ablation(config=config, job=job, waves=waves, parents=parents, group=group)


def _arm(config: StudyConfig, name: str, file: str | None) -> tuple[str, list[str]]:
    arm = config.arms[name]
    recipe = arm.get("recipe", config.recipe) if isinstance(arm, Mapping) else config.recipe
    return find_recipe(str(recipe), file), list(_overrides(arm))


def _overrides(arm: Any) -> Any:
    """The overrides of an arm, which is their list or a mapping that holds it."""
    return arm.get("overrides", []) if isinstance(arm, Mapping) else arm


def _parents(config: StudyConfig, name: str) -> list[str]:
    return [match.group(1) for text in _overrides(config.arms[name]) if (match := _RUN.search(text))]


def _waves(config: StudyConfig) -> list[list[str]]:
    """The arms in an order in which each comes after those that it begins from."""
    waves: list[list[str]] = []
    left = list(config.arms)
    done: set[str] = set()
    while left:
        ready = [name for name in left if done.issuperset(_parents(config, name))]
        if not ready:
            parent = next(p for p in _parents(config, left[0]) if p not in done)
            raise ValueError(
                f"arms.{left[0]}: begins from run:{parent}, which is "
                + ("in a circle with it" if parent in config.arms else f"none of the arms {', '.join(config.arms)}")
            )
        waves.append(ready)
        done.update(ready)
        left = [name for name in left if name not in done]
    return waves


def _resolved(text: str, seed: int, made: Mapping[tuple[str, int], Trial]) -> str:
    """`key=run:ARM` as the encoder of that arm's run with the same seed."""
    match = _RUN.search(text)
    if match is None:
        return text
    return f"{text[: match.start()]}={made[match.group(1), seed].config.run.dir}/{ENCODER}"


def _without_parent(config: RunConfig) -> RunConfig:
    """For the checks before a start: where the run that an arm begins from is not there yet, neither is the arm's."""
    init, folder = config.encoder.init, config.run.dir
    is_parent = Path(init).name == ENCODER and Path(init).parents[1] == Path(folder).parent
    if not is_parent or Path(init).exists():
        return config
    unborn = replace(config.run, dir=f"{folder}.unborn")
    return replace(config, encoder=replace(config.encoder, init="random"), run=unborn)


def ablate(file: str | None, overrides: Sequence[str], dry_run: bool) -> int:
    """The command; its exit code is that of execute.command."""
    return command(check_study(load(StudyConfig, file, overrides), file), dry_run)
