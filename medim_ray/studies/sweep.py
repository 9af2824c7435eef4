"""`medim-ray sweep`: a search over dotted keys of `pretrain` against a probe, by Ray Tune. Writes OUT/sweep.json.

The command is stateless: run again it goes on, and repeats no trial that is done (RUNS/HASH/trial.json).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import fsspec

from medim_ray.config.loader import load, to_tree
from medim_ray.config.probe import ProbeConfig
from medim_ray.config.schema import RunConfig
from medim_ray.data.shards import ShardSet
from medim_ray.data.sources.base import absolute
from medim_ray.data.storage import committed, storage_faults
from medim_ray.studies.execute import command
from medim_ray.studies.origin import package_commit
from medim_ray.studies.outcome import check_metric, check_report, check_reported, needs_probe
from medim_ray.studies.page import Study
from medim_ray.studies.pbt import PbtConfig, Population
from medim_ray.studies.results import Table
from medim_ray.studies.runner import Group, RunnerConfig, Search
from medim_ray.studies.space import MAX_CHECKED, SearchSpace, Trial, distinct, steps_of
from medim_ray.studies.trials import TrialJob, rung_steps
from medim_ray.train.checks import check

BEGUN = "begun.json"


@dataclass(frozen=True, kw_only=True)
class AshaConfig:
    """Asynchronous successive halving: at each rung only the best 1 / reduction of the trials go on."""

    first: int | None = field(default=None, metadata={"help": "steps of the first rung; null: no early stopping"})
    reduction: int = field(default=3, metadata={"help": "each rung has so many times the steps of the one before"})

    def __post_init__(self) -> None:
        if self.first is not None and self.first < 1:
            raise ValueError(f"first={self.first}: steps of the first rung, at least 1, or null")
        if self.reduction < 2:
            raise ValueError(f"reduction={self.reduction}: must be at least 2")


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Options of `medim-ray sweep`."""

    recipe: str = field(metadata={"help": "YAML file of `pretrain`; from this file, or from the working folder"})
    shards: str = field(default="", metadata={"help": "data.shards of every trial"})
    out: str = field(metadata={"help": "folder or fsspec URL of tables and figures"})
    runs: str = field(default="", metadata={"help": "folder of the runs, which sweeps may share; empty: OUT/runs"})
    overrides: tuple[str, ...] = field(default=(), metadata={"help": "key=value of the recipe, for every trial"})
    space: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "axis -> [values] | {choices: {NAME: [key=value]}} | {uniform|loguniform|randint: [low, high]}"
        },
    )
    metric: str = field(default="auroc.mean", metadata={"help": "what is ranked: auroc.LABEL, lesion_lift.kdm, loss"})
    report: tuple[str, ...] = field(default=(), metadata={"help": "more numbers of each trial, as columns: mae.age"})
    search: Literal["grid", "random", "optuna", "pbt"] = field(
        default="grid", metadata={"help": "how points are chosen"}
    )
    num_trials: int | None = field(
        default=None, metadata={"help": "random: cells (each with every seed); optuna: trials; pbt: members; grid: all"}
    )
    max_steps: int | None = field(
        default=None, metadata={"help": "budget of optimizer steps over all trials; null: no bound"}
    )
    seed: int = field(default=0, metadata={"help": "of random and optuna"})
    asha: AshaConfig = field(default_factory=AshaConfig)
    pbt: PbtConfig = field(default_factory=PbtConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    runner: RunnerConfig = field(default_factory=RunnerConfig)

    def __post_init__(self) -> None:
        check_metric(self.metric, "metric")
        check_report(self.report, self.metric)
        if self.search == "grid" and self.num_trials is not None:
            raise ValueError("num_trials is set, but search=grid runs every point: use search=random, or leave it out")
        if self.search != "grid" and (self.num_trials is None or self.num_trials < 1):
            raise ValueError(f"search={self.search} needs num_trials, at least 1; it is {self.num_trials}")
        if self.search == "pbt" and (self.asha.first is not None or self.max_steps is not None):
            raise ValueError("search=pbt has generations of its own: leave asha.first and max_steps out")
        if self.search != "pbt" and self.pbt != PbtConfig():
            raise ValueError(f"pbt is set, but search={self.search} has no population: use search=pbt, or leave it out")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps={self.max_steps}: must be at least 1, or null")


class Begun:
    """OUT/begun.json: axis values of the trials that Optuna chose, in their order; what a second life begins with.

    values: those that lie in the present space; others stay in the file, and are no trials of this search.
    """

    def __init__(self, out: str, space: SearchSpace) -> None:
        """ValueError where the file is damaged."""
        with storage_faults(f"out={out}"):
            self._fs, root = fsspec.core.url_to_fs(absolute(out))
            self._path = f"{root.rstrip('/')}/{BEGUN}"
            noted: list[Mapping[str, Any]] = []
            if self._fs.exists(self._path):
                noted = read_list(self._fs, self._path)
        self.values = [values for values in noted if space.holds(values)]
        self._elsewhere = [values for values in noted if not space.holds(values)]
        self._left = list(self.values)  # to begin again in this life

    def add(self, values: Mapping[str, Any]) -> None:
        """Notes the values of a trial that begins, unless it is one of an earlier life. The sampler may choose the same
        values twice: those are two trials of its budget, and one run."""
        if dict(values) in self._left:
            self._left.remove(dict(values))
            return
        self.values.append(dict(values))
        with committed(self._fs, self._path, scratch=self._path.rpartition("/")[0]) as file:
            file.write(json.dumps([*self._elsewhere, *self.values], indent=1).encode())


def read_list(fs: fsspec.AbstractFileSystem, path: str) -> list[Mapping[str, Any]]:
    """A file that holds a JSON list of mappings; ValueError that names it where it does not."""
    try:
        found = json.loads(fs.cat_file(path))
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise ValueError(f"{path} is damaged: remove it, and the search begins anew; runs that are done stay done")
    return found


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A checked sweep, an `Experiment`. listed: the trials of grid and random; left_out: those over `max_steps`;
    most_steps: of a trial; begun: the trials that Optuna has chosen; population: of search=pbt, else None."""

    config: SweepConfig
    job: TrialJob
    listed: Sequence[Trial]
    left_out: int
    most_steps: int
    group: Group
    begun: Begun
    population: Population | None = None

    @property
    def num_optuna(self) -> int:
        """Trials of Optuna, within the budget of steps, as if each were the longest."""
        num = self.config.num_trials or 0
        return num if self.config.max_steps is None else min(num, self.config.max_steps // self.most_steps)

    def trials(self) -> Sequence[Trial]:
        """Those of the list, those that Optuna has chosen by now, or the latest generation of a population."""
        if self.population is not None:
            return self.population.trials()
        if self.config.search != "optuna":
            return self.listed
        chosen = [self.job.trial(self.job.space.point(values)) for values in self.begun.values]
        return distinct(chosen)

    def searches(self) -> Iterable[Search]:
        """One search, or one a generation."""
        if self.population is not None:
            return self.population.searches()
        config = self.config
        asha = (config.asha.first, config.asha.reduction) if config.asha.first is not None else None
        if config.search != "optuna":
            return [Search(kind="list", trials=self.listed, asha=asha)]
        return [Search(kind="optuna", num=self.num_optuna, seed=config.seed, begun=self.begun.values, asha=asha)]

    def began(self, values: Mapping[str, Any]) -> None:
        """Notes a trial of Optuna."""
        self.begun.add(values)

    def study(self, table: Table) -> Study:
        """The page's words."""
        question = f"{self.config.search} over {' x '.join(self.job.space.keys)}, ranked by {self.config.metric}"
        title = f"Sweep {self.config.out.rstrip('/').rpartition('/')[2]}"
        return Study(
            kind="sweep", title=title, question=question, config=to_tree(self.config), report=self.config.report
        )

    def size(self) -> str:
        """`27 trials`."""
        if self.config.search == "optuna":
            return f"{self.num_optuna} trials by optuna{self._unchecked()}"
        if self.population is not None:
            return f"{len(self.population.generations[0])} members, {len(self.population.rungs)} generations"
        left_out = f" ({self.left_out} more are left out by max_steps)" if self.left_out else ""
        return f"{len(distinct(self.listed))} trials{left_out}{self._unchecked()}"

    def _unchecked(self) -> str:
        num = self.job.space.num_corners
        if num <= MAX_CHECKED:
            return ""
        return (
            f" ({num:,} combinations in the space, of which {MAX_CHECKED:,} were checked, and every value of each axis)"
        )


def load_sweep(file: str | None, overrides: Sequence[str]) -> SweepConfig:
    """The configuration of a sweep, its recipe found."""
    config = load(SweepConfig, file, overrides)
    return replace(config, recipe=find_recipe(config.recipe, file))


def find_recipe(recipe: str, file: str | None) -> str:
    """A recipe as named in `file`: looked for beside it, then from the working folder."""
    beside = Path(file).parent / recipe if file is not None else Path(recipe)
    return str(beside if beside.exists() else recipe)


def check_sweep(config: SweepConfig) -> Sweep:
    """Every configuration that the sweep can make, built and checked; ValueError names the point at fault."""
    shards = absolute(config.shards) if config.shards else ""
    base = load(RunConfig, config.recipe, [*config.overrides, *([f"data.shards={shards}"] if shards else [])])
    space = SearchSpace.parse(config.space)
    probe = config.probe if needs_probe([config.metric, *config.report]) else None
    stored = open_shards(base)
    job = TrialJob(
        base=to_tree(base),
        space=space,
        runs=absolute(config.runs or f"{config.out.rstrip('/')}/runs"),
        data_hash=stored.content_hash,
        rungs=rung_steps(base.train.steps, config.asha.first, config.asha.reduction) if config.asha.first else (),
        probe=probe,
        metric=config.metric,
        may_stop=config.asha.first is not None,
        commit=package_commit(),
    )
    corners = [job.trial(point) for point in space.corners()]
    if len({trial.config.data.shards for trial in corners}) > 1:
        raise ValueError("space has data.shards: the trials of a sweep learn from one shard set; give it as shards=")
    if config.asha.first is not None and config.asha.first > base.train.steps:
        raise ValueError(f"asha.first={config.asha.first}: must be at most train.steps={base.train.steps}")
    if len({trial.config.train.steps for trial in corners}) > 1 and config.asha.first is not None:
        raise ValueError("asha.first is set, but space has train.steps: rungs need one number of steps for all trials")
    for axis in space.axes:
        rest = {key: value for key, value in corners[0].point.values.items() if key != axis.key}
        along = [trial for trial in corners if rest.items() <= trial.point.values.items()]
        if len(along) > 1 and len({trial.name for trial in along}) == 1:
            raise ValueError(f"space.{axis.key}: its values change nothing that a run reports, leave it out")
    checked: set[str] = set()
    for trial in corners:
        if trial.name not in checked:
            check(trial.config)
            checked.add(trial.name)
    check_reported([config.metric, *config.report], config.probe, stored)
    trials, left_out = _within_budget(config, _points(config, job))
    most_steps = max(trial.config.train.steps for trial in corners)
    if config.max_steps is not None and not (trials or config.max_steps >= most_steps):
        raise ValueError(f"max_steps={config.max_steps}: not one trial fits, they take up to {most_steps} steps")
    return Sweep(
        config=config,
        job=job,
        listed=trials,
        left_out=left_out,
        most_steps=most_steps,
        group=Group.of([trial.config for trial in corners]),
        begun=Begun(config.out, space),
        population=Population(job, config.pbt, config.num_trials or 0, config.seed, config.out)
        if config.search == "pbt"
        else None,
    )


def open_shards(base: RunConfig) -> ShardSet:
    """The shards of every run; ValueError where none are given, or they can't be read."""
    if not base.data.shards:
        raise ValueError("shards is empty: give what `medim-ray prepare` wrote, e.g. shards=shards/cxr")
    with storage_faults(f"shards={base.data.shards}"):
        return ShardSet.open(base.data.shards)


def _points(config: SweepConfig, job: TrialJob) -> list[Trial]:
    """The trials in their order; [] for Optuna and populations. Two points may be one run: it is run once and stands in
    both cells."""
    if config.search in ("optuna", "pbt"):
        return []
    num = config.num_trials or 0
    points = job.space.grid() if config.search == "grid" else job.space.random(num, config.seed)
    return [job.trial(point) for point in points]


def _within_budget(config: SweepConfig, trials: Sequence[Trial]) -> tuple[list[Trial], int]:
    """The first trials whose steps fit into `max_steps` together, and how many do not."""
    kept: list[Trial] = []
    for trial in trials:
        if config.max_steps is not None and steps_of([*kept, trial]) > config.max_steps:
            break
        kept.append(trial)
    return kept, len(trials) - len(kept)


def sweep(file: str | None, overrides: Sequence[str], dry_run: bool) -> int:
    """The command; its exit code is that of execute.command."""
    return command(check_sweep(load_sweep(file, overrides)), dry_run)
