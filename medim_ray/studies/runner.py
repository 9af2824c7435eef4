"""Trials by Ray Tune: how many at once, which search and scheduler, what ends them. trials.py says what a trial does.

Tune keeps no state that counts: what was done lies in the trials' records, so a killed sweep is simply begun again.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import fsspec
import optuna
import pyarrow.fs as pafs
import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from medim_ray.config.loader import from_tree, to_tree
from medim_ray.config.schema import RunConfig
from medim_ray.data.storage import storage_faults
from medim_ray.session import store_of
from medim_ray.studies.outcome import better_is_higher
from medim_ray.studies.space import Choices, Range, Trial, distinct
from medim_ray.studies.trials import Record, State, TrialJob, trainable, write_record
from medim_ray.train.build import stream_bytes
from medim_ray.train.signals import aside

_TRIAL_CPUS = 0.1  # a trial's own actor only waits for its workers
_DECODE_CPUS = 0.25  # of a decoding actor (data/pipeline.py)
Began = Callable[[Mapping[str, Any]], None]
Ended = Callable[[RunConfig, Record], None]


@dataclass(frozen=True, kw_only=True)
class RunnerConfig:
    """How trials are spread over a cluster; changes no result."""

    max_concurrent: int | None = field(
        default=None, metadata={"help": "trials at once; null: as many as the cluster holds whole worker groups"}
    )
    retries: int = field(default=2, metadata={"help": "times that a failed trial goes on from its checkpoint"})
    hours: float | None = field(default=None, metadata={"help": "this command ends after so long; the same goes on"})
    ray_address: str = field(default="", metadata={"help": "Ray cluster to join; empty: start Ray here"})

    def __post_init__(self) -> None:
        if self.max_concurrent is not None and self.max_concurrent < 1:
            raise ValueError(f"max_concurrent={self.max_concurrent}: at least 1, or null")
        if self.retries < 0:
            raise ValueError(f"retries={self.retries}: must be at least 0")
        if self.hours is not None and not self.hours > 0:
            raise ValueError(f"hours={self.hours}: must be above 0, or null for no bound")


@dataclass(frozen=True, kw_only=True)
class Group:
    """What one run asks of the cluster. workers x (cpus, gpus), the processes beside them, and bytes of the object
    store for its stream."""

    workers: int
    cpus: float
    gpus: float
    beside: float
    stream: int = 0

    @classmethod
    def of(cls, configs: Sequence[RunConfig]) -> Group:
        """The largest of each among the runs."""
        trains = [config.train for config in configs]
        return cls(
            workers=max(train.max_workers for train in trains),
            cpus=max(train.cpus_per_worker for train in trains),
            gpus=max(float(train.use_gpu) for train in trains),
            beside=_TRIAL_CPUS + _DECODE_CPUS * max(config.data.num_actors for config in configs),
            stream=max(stream_bytes(config) for config in configs),
        )

    @property
    def logical_cpus(self) -> int:
        """CPUs of a Ray that is started here, so that as many groups fit as there are cores for their workers."""
        return math.ceil(self._at_once * (self.workers * self.cpus + self.beside)) + 1

    @property
    def store_bytes(self) -> int:
        """Object store of a Ray that is started here, for the streams of those groups."""
        return store_of(self._at_once * self.stream)

    @property
    def _at_once(self) -> int:
        return max(1, int((os.cpu_count() or 1) // (self.workers * self.cpus)))


def concurrency(group: Group, nodes: Sequence[Mapping[str, float]]) -> int:
    """Worker groups that fit side by side, so that none waits for what another one holds a part of.

    nodes: resources of each node. A worker lies on one node; workers of a group may lie on several. 0: not even one.
    """
    slots = sum(_slots(group, node) for node in nodes)
    total = sum(node.get("CPU", 0.0) for node in nodes)
    at_once = slots // group.workers
    while at_once and at_once * (group.workers * group.cpus + group.beside) > total + 1e-9:
        at_once -= 1
    return at_once


def _slots(group: Group, node: Mapping[str, float]) -> int:
    cpus = math.floor(node.get("CPU", 0.0) / group.cpus + 1e-9)
    return min(cpus, math.floor(node.get("GPU", 0.0) / group.gpus + 1e-9)) if group.gpus else cpus


def trials_at_once(group: Group, config: RunnerConfig) -> int:
    """`concurrency` of the present cluster, or `max_concurrent` where that is less.

    ValueError where the cluster holds no whole group.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    most = concurrency(group, nodes)
    if most < 1:
        raise ValueError(
            f"a trial needs {group.workers} workers of {group.cpus:g} CPUs and {group.gpus:g} GPUs, and "
            f"{group.beside:g} CPUs more; the cluster has {[dict(node) for node in nodes]}: use fewer "
            "train.num_workers, or a larger cluster (runner.ray_address)"
        )
    return most if config.max_concurrent is None else min(most, config.max_concurrent)


@dataclass(frozen=True, kw_only=True)
class Search:
    """Which trials there are. `trials`: a list made before; `optuna`: the sampler chooses each from those before it.

    num: trials of Optuna; seed: of its sampler; begun: the values of those that an earlier life began, in their order.
    asha: (first rung, reduction), None to let every trial run to its end. rungs: up to which the trials of a list run,
    () for those of the job.
    """

    kind: Literal["list", "optuna"]
    trials: Sequence[Trial] = ()
    num: int = 0
    seed: int = 0
    begun: Sequence[Mapping[str, Any]] = ()
    asha: tuple[int, int] | None = None
    rungs: tuple[int, ...] = ()


def run_trials(
    job: TrialJob,
    search: Search,
    group: Group,
    config: RunnerConfig,
    began: Began,
    ended: Ended,
    received: Sequence[int] = (),
    left_s: float | None = None,
) -> None:
    """Runs what is not done yet, in the Ray that is running. What came of it stands in the trials' records.

    began: called on the driver with the axis values of a trial that Optuna chose; ended: with every trial that ended.
    received: once it holds a signal (train/signals.py), all trials end where they are; their records stay open. So they
    do after `left_s` seconds, where it is given.
    """
    job = replace(job, rungs=search.rungs) if search.rungs else job
    param_space, searcher, num = _what(job, search)
    if not num:
        return
    name = f"tune-{uuid.uuid4().hex[:8]}"
    with storage_faults(f"runs={job.runs}"):
        fs, root = fsspec.core.url_to_fs(job.runs)
        fs.makedirs(f"{root.rstrip('/')}/.tune/{name}", exist_ok=True)
    tuner = tune.Tuner(
        tune.with_resources(partial(trainable, job=job), {"CPU": _TRIAL_CPUS}),
        param_space=param_space,
        tune_config=tune.TuneConfig(
            metric=job.metric,
            mode=_mode(job),
            num_samples=num if searcher is not None else 1,
            max_concurrent_trials=trials_at_once(group, config),
            search_alg=searcher,
            scheduler=_scheduler(job, search),
            time_budget_s=left_s,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=f"{root.rstrip('/')}/.tune",
            storage_filesystem=pafs.PyFileSystem(pafs.FSSpecHandler(fs)),
            failure_config=tune.FailureConfig(max_failures=config.retries),
            callbacks=[_Told(job, began, ended)],
            stop=_Asked(received),
            verbose=0,
        ),
    )
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what failed is told in the table, with its reason
    with contextlib.redirect_stdout(io.StringIO()):  # Tune announces itself there whatever its verbosity
        aside(tuner.fit).result()


def _what(job: TrialJob, search: Search) -> tuple[dict[str, Any], OptunaSearch | None, int]:
    """Tune's parameters, its search algorithm and the number of trials that are left to do."""
    if search.kind == "optuna":
        return _by_optuna(job, search)
    # With ASHA the finished trials take part again, by replaying what they reported: its rungs are made of them.
    replayed = search.asha is not None
    todo = [trial for trial in distinct(search.trials) if replayed or not job.is_done(trial.config)]
    return {"config": tune.grid_search([to_tree(trial.config) for trial in todo])}, None, len(todo)


def _by_optuna(job: TrialJob, search: Search) -> tuple[dict[str, Any], OptunaSearch | None, int]:
    """TPE over the axes. Trials that were begun before come first: those that are done replay what they reported."""
    if len(search.begun) >= search.num and all(job.is_done(_config(job, values)) for values in search.begun):
        return {}, None, 0
    searcher = OptunaSearch(
        {axis.key: _distribution(axis) for axis in job.space.axes},
        metric=job.metric,
        mode=_mode(job),
        sampler=optuna.samplers.TPESampler(seed=search.seed + len(search.begun)),
        points_to_evaluate=[dict(values) for values in search.begun],
    )
    return {}, searcher, search.num


def _config(job: TrialJob, values: Mapping[str, Any]) -> RunConfig:
    return job.trial(job.space.point(values)).config


def _distribution(axis: Choices | Range) -> optuna.distributions.BaseDistribution:
    if isinstance(axis, Choices):
        return optuna.distributions.CategoricalDistribution(list(axis.options))
    if axis.kind == "randint":
        return optuna.distributions.IntDistribution(int(axis.low), int(axis.high))
    return optuna.distributions.FloatDistribution(axis.low, axis.high, log=axis.kind == "loguniform")


def _scheduler(job: TrialJob, search: Search) -> ASHAScheduler | None:
    if search.asha is None:
        return None
    first, reduction = search.asha
    return ASHAScheduler(time_attr="step", max_t=job.rungs[-1], grace_period=first, reduction_factor=reduction)


def _mode(job: TrialJob) -> str:
    return "max" if better_is_higher(job.metric) else "min"


class _Asked(tune.Stopper):
    """Ends all trials once a signal was received."""

    def __init__(self, received: Sequence[int]) -> None:
        self._received = received

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return bool(self._received)


class _Told(tune.Callback):
    """Keeps the records true where a trial could not: stopped by the scheduler, or failed for good."""

    def __init__(self, job: TrialJob, began: Began, ended: Ended) -> None:
        self._job, self._began, self._ended = job, began, ended
        self._started: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune stores its callbacks to restore an experiment by, which is never done here

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if "config" not in trial.config and trial.trial_id not in self._started:  # not one that is tried again
            self._started.add(trial.trial_id)
            self._began(trial.config)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(trial, "stopped")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if trial.status == "ERROR":  # not one that is tried again
            self._end(trial, "failed")

    def _end(self, trial: Any, state: State) -> None:
        config = self._config(trial)
        record = self._job.record(config)
        # Without a scheduler nobody was stopped: the trial is at the end of a generation.
        if record.state == "running" and (state == "failed" or self._job.may_stop):
            error = record.error or "the trial's process was lost" if state == "failed" else ""
            record = replace(record, state=state, error=error)
            write_record(config.run.dir, record)
        self._ended(config, record)

    def _config(self, trial: Any) -> RunConfig:
        if "config" in trial.config:
            return from_tree(RunConfig, trial.config["config"])
        return _config(self._job, trial.config)
