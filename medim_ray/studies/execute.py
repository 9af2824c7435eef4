"""An experiment (sweep or study) from its list of trials to its table: the lease, Ray, a line a trial, the files.

Run again, it goes on: what is done stands in the trials' records (trials.py), and no trial that is done is repeated.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import fsspec
from rich.console import Console

from medim_ray.config.schema import RunConfig
from medim_ray.data.lease import Lease
from medim_ray.data.sources.base import absolute
from medim_ray.data.storage import storage_faults
from medim_ray.session import ray_session
from medim_ray.studies.listing import print_table
from medim_ray.studies.page import REPORT, Study, write_study
from medim_ray.studies.results import Run, Table, make_run, make_table
from medim_ray.studies.runner import Group, RunnerConfig, Search, run_trials, trials_at_once
from medim_ray.studies.space import Trial, steps_of
from medim_ray.studies.trials import Record, TrialJob
from medim_ray.train.runs import LEASE
from medim_ray.train.signals import exit_code, stop_signals


class Options(Protocol):
    """What the configurations of sweeps and studies have in common. out: where the files go."""

    @property
    def out(self) -> str: ...
    @property
    def runner(self) -> RunnerConfig: ...


class Experiment(Protocol):
    """A checked sweep or study. job: what its trials share; group: what one asks of Ray."""

    @property
    def config(self) -> Options: ...
    @property
    def job(self) -> TrialJob: ...
    @property
    def group(self) -> Group: ...

    def trials(self) -> Sequence[Trial]:
        """The trials that are known by now."""
        ...

    def searches(self) -> Iterable[Search]:
        """What is run, one after the other; a search may be made of what came of the one before."""
        ...

    def began(self, values: Mapping[str, Any]) -> None:
        """Notes a trial that the search chose."""
        ...

    def study(self, table: Table) -> Study:
        """What the page says beside the table."""
        ...

    def size(self) -> str:
        """How many trials there are, in words."""
        ...


def execute(experiment: Experiment, console: Console) -> tuple[Table, int]:
    """Runs the trials that are not done and writes the experiment's files after each; the table, and the signal that
    ended it before the end, 0 where none did.

    ValueError for what the user can mend. A trial that fails is a row of the table; it ends nothing.
    """
    out = absolute(experiment.config.out)
    with storage_faults(f"out={experiment.config.out}"):
        fs, root = fsspec.core.url_to_fs(out)
        with (
            Lease(fs, f"{root.rstrip('/')}/{LEASE}", what=f"out={experiment.config.out}"),
            ray_session(
                experiment.config.runner.ray_address, experiment.group.logical_cpus, experiment.group.store_bytes
            ),
            stop_signals() as received,  # after Ray's start, which puts a handler of its own over ours
        ):
            at_once = trials_at_once(experiment.group, experiment.config.runner)
            console.print(f"{_progress(experiment, table_of(experiment))}; {at_once} at once", highlight=False)

            def ended(config: RunConfig, record: Record) -> None:
                table = _write(experiment, out)
                console.print(_line(experiment, table, config, record), highlight=False, markup=False)

            runner = experiment.config.runner
            ends = None if runner.hours is None else time.monotonic() + runner.hours * 3600
            for search in experiment.searches():
                left_s = None if ends is None else ends - time.monotonic()
                if received or (left_s is not None and left_s <= 0):
                    break
                run_trials(experiment.job, search, experiment.group, runner, experiment.began, ended, received, left_s)
            return _write(experiment, out), received[0] if received else 0


def command(experiment: Experiment, dry_run: bool) -> int:
    """`medim-ray sweep` and `medim-ray ablate`, once the experiment is checked. dry_run: the trials are listed only.

    Exit code 0: every trial is done; 1: some failed, or a budget ended the command before them; that of a signal
    which ended it (train/signals.py): the same command goes on.
    """
    console = Console(file=sys.stdout, soft_wrap=True)
    if dry_run:
        for line in dry_lines(experiment):
            console.print(line, highlight=False, markup=False)
        return 0
    table, signal_number = execute(experiment, console)
    wide = Console()
    print_table(experiment.study(table), table, wide if wide.is_terminal else Console(width=140))
    console.print(f"{experiment.config.out.rstrip('/')}/{REPORT}", highlight=False)
    if signal_number:
        return exit_code(signal_number)
    return int(any(cell.state not in ("finished", "stopped") for cell in table.cells))


def table_of(experiment: Experiment) -> Table:
    """What is known by now; ValueError where a run of these trials was trained on other shards."""
    return make_table(map(partial(_run, experiment), experiment.trials()), experiment.job.metric)


def _run(experiment: Experiment, trial: Trial) -> Run:
    return make_run(trial, experiment.job.record(trial.config))


def _write(experiment: Experiment, out: str) -> Table:
    table = table_of(experiment)
    write_study(experiment.study(table), table, out)
    return table


def _progress(experiment: Experiment, table: Table) -> str:
    """`27 trials, 12 done`."""
    return f"{experiment.size()}, {table.count('finished') + table.count('stopped')} done"


def dry_lines(experiment: Experiment) -> list[str]:
    """A line a trial: its hash, whether it is done, its values; then what they come to."""
    lines = []
    for trial in experiment.trials():
        state = _run(experiment, trial).state
        lines.append(f"{trial.name}  {state:8}  {', '.join(f'{k}={v}' for k, v in trial.point.values.items())}")
    steps = steps_of(experiment.trials())
    group = experiment.group
    needs = f"{group.workers} workers of {group.cpus:g} CPUs and {group.gpus:g} GPUs a trial"
    return [*lines, f"{experiment.size()}, {steps:,} optimizer steps, {needs}"]


def _line(experiment: Experiment, table: Table, config: RunConfig, record: Record) -> str:
    """`masking.ratio=0.5, seed=1: auroc.mean 0.71 [130 s; 27 trials, 12 done]`."""
    name = config.run.dir.rstrip("/").rpartition("/")[2]
    values = next(run.values for run in table.runs if run.name == name)
    metric = experiment.job.metric
    number = record.reports[-1].numbers.get(metric) if record.reports else None
    told = f"{metric} {number.value:.4g}" if number is not None and number.value is not None else record.state
    why = f": {record.error.strip().splitlines()[0]}" if record.error.strip() else ""
    early = ", stopped early" if record.state == "stopped" else ""
    where = ", ".join(f"{key}={value}" for key, value in values.items())
    return f"{where}: {told}{early}{why} [{record.seconds:.0f} s; {_progress(experiment, table)}]"
