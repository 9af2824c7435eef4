"""One trial of a sweep or study: pretrain to each rung, probe, report. Runs in a Ray Tune actor; RUNS/HASH/trial.json.

A rung is a step at which the trial reports. Between rungs the run is stopped and started by `train.stop_after`, which
is bit-equal to a straight run, so what a trial has reported is never computed again: a second life replays it.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import fsspec
import yaml
from rich.console import Console

from medim_ray.config.loader import from_tree, to_tree
from medim_ray.config.probe import ProbeConfig
from medim_ray.config.schema import RunConfig
from medim_ray.data.lease import Lease, LeaseTakenError
from medim_ray.data.storage import committed
from medim_ray.studies.outcome import Number, outcome_of
from medim_ray.studies.space import Point, SearchSpace, Trial, make_trial
from medim_ray.train.store import CheckpointStore

RECORD = "trial.json"
LEASE = ".trial-lease"  # in a run folder: one trial works on it at a time
VERSION = 1  # of what a report holds; 1: encoders beside the run, auroc.findings
_LOOK_S = 2.0
_LOG = logging.getLogger(__name__)
ENCODER = "encoder"  # in a run folder: its encoder in timm's layout, for runs that begin from it
State = Literal["running", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class Report:
    """What a trial reported at a rung: an Outcome."""

    step: int
    numbers: Mapping[str, Number]
    gains: Mapping[str, Number]
    baselines: Mapping[str, Mapping[str, Number]] = field(default_factory=dict)

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Report:
        """The report of its JSON."""
        return cls(
            tree["step"],
            _numbers(tree["numbers"]),
            _numbers(tree["gains"]),
            {name: _numbers(found) for name, found in tree.get("baselines", {}).items()},
        )


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a trial came to under one probe; RUNS/HASH/trial.json holds one for each probe that was asked for.

    state: finished = reported at its last step; stopped = by the scheduler of some sweep (TrialJob.record);
    seconds: pretraining and probes, over all lives but those that were killed; attempts: lives since this probe was
    asked for; version: of the code that reported (VERSION); commits: of the package in the lives that trained or
    probed, each once.
    """

    version: int = VERSION
    state: State = "running"
    data_hash: str = ""
    probe: Mapping[str, Any] = field(default_factory=dict)
    reports: tuple[Report, ...] = ()
    seconds: float = 0.0
    attempts: int = 0
    error: str = ""
    commits: tuple[str, ...] = ()

    @property
    def is_done(self) -> bool:
        """No further life is needed."""
        return self.state in ("finished", "stopped")

    def at(self, step: int) -> Report | None:
        """What was reported at a rung."""
        return next((report for report in self.reports if report.step == step), None)

    @property
    def question(self) -> str:
        """The probe as far as it decides the reports: options that were not there yet had their defaults, and where
        features are cached changes none."""
        return _question(json.dumps(self.probe, sort_keys=True)) if self.probe else ""


@functools.cache
def _question(probe: str) -> str:
    """Kept, since a table asks it for every run, and building a configuration takes 15 ms."""
    try:
        known = replace(from_tree(ProbeConfig, json.loads(probe)), cache="")
    except ValueError:  # of an option that there is no more
        return probe
    return json.dumps(to_tree(known), sort_keys=True)


def asked(run_dir: str, data_hash: str, probe: ProbeConfig | None) -> Record:
    """What the records of a run folder say of these shards and this probe (or none): what was trained and spent under
    another one stays, and is probed anew. ValueError where it was trained on other shards."""
    records = read_records(run_dir)
    for record in records:
        if record.data_hash not in ("", data_hash):
            raise ValueError(
                f"{run_dir} was trained on other shards (content {record.data_hash}, now {data_hash}): give another "
                "`runs`, or the same shards"
            )
    spent = max((record.seconds for record in records), default=0.0)
    commits = tuple(dict.fromkeys(commit for record in records for commit in record.commits))
    tree = to_tree(probe) if probe is not None else {}
    new = Record(data_hash=data_hash, probe=tree, seconds=spent, commits=commits)
    current = [record for record in records if record.version == VERSION]
    same = [record for record in current if record.question == new.question]
    # who asks for no probe takes what was reported under any
    same += [replace(record, probe={}) for record in current if probe is None and record.is_done]
    return replace(same[0], data_hash=data_hash) if same else new


def read_records(run_dir: str) -> list[Record]:
    """The records of a trial's run folder, one a probe, in the order of their first reports; [] where it was never
    started, and, with a warning, where the file is damaged: the trial then goes on from the run's checkpoint, and
    probes it anew."""
    fs, root = fsspec.core.url_to_fs(run_dir)
    path = f"{root.rstrip('/')}/{RECORD}"
    fs.invalidate_cache()
    if not fs.exists(path):
        return []
    try:
        tree = json.loads(fs.cat_file(path))
        trees = tree.get("records", [{"version": 0, **tree}])  # version 0 knew one probe
        return [
            Record(
                **{
                    **each,
                    "reports": tuple(map(Report.from_json, each["reports"])),
                    "commits": tuple(each.get("commits", ())),
                }
            )
            for each in trees
        ]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        _LOG.warning("%s/%s is damaged (%s): its trial is done again from the run's checkpoint", run_dir, RECORD, error)
        return []


def _numbers(tree: Mapping[str, Any]) -> dict[str, Number]:
    """Numbers by name, of their JSON."""
    return {name: Number(**number) for name, number in tree.items()}


def write_record(run_dir: str, record: Record) -> None:
    """Puts a record in the place of that of the same probe, or beside the others; whole or not at all."""
    records = {other.question: other for other in read_records(run_dir)} | {record.question: record}
    fs, root = fsspec.core.url_to_fs(run_dir)
    fs.makedirs(root, exist_ok=True)
    with committed(fs, f"{root.rstrip('/')}/{RECORD}", scratch=root) as file:
        file.write(json.dumps({"records": [asdict(each) for each in records.values()]}, indent=1).encode())


@dataclass(frozen=True, kw_only=True)
class TrialJob:
    """What every trial of a sweep shares; sent to the Tune actors as plain values.

    base: the recipe with the sweep's overrides, as a plain tree; rungs: steps at which a trial reports, () = at its
    end; metric: what is reported to Tune; probe: None where no probe is asked for; may_stop: whether a scheduler ends
    trials early, so that one that was stopped counts as done; commit: of the package, for the records.
    """

    base: Mapping[str, Any]
    space: SearchSpace
    runs: str
    data_hash: str
    rungs: tuple[int, ...]
    probe: ProbeConfig | None
    metric: str
    may_stop: bool = False
    commit: str = ""

    def record(self, config: RunConfig) -> Record:
        """What the records of a run say of what this job asks (`asked`): one that another sweep stopped early, or whose
        place in a population another member took, is still on its way here."""
        record = asked(config.run.dir, self.data_hash, self.probe)
        ended = record.at(config.train.steps) is not None or (self.may_stop and record.state == "stopped")
        return replace(record, state="running") if record.is_done and not ended else record

    def is_done(self, config: RunConfig) -> bool:
        """Nothing is left to do: the run reported at the last of the job's rungs, or was stopped where it may be."""
        record = self.record(config)
        last = self.rungs[-1] if self.rungs else config.train.steps
        return record.is_done or (record.state == "running" and record.at(last) is not None)

    def trial(self, point: Point) -> Trial:
        """The run of a point of the space."""
        with tempfile.TemporaryDirectory(prefix="medim-ray-") as folder:
            recipe = Path(folder) / "recipe.yaml"
            recipe.write_text(yaml.safe_dump(dict(self.base)), encoding="utf-8")
            return make_trial(recipe, (), point, self.runs)


def rung_steps(last: int, first: int, reduction: int) -> tuple[int, ...]:
    """The steps first, first * reduction, … below `last`, and `last`."""
    steps: list[int] = []
    step = first
    while step < last:
        steps.append(step)
        step *= reduction
    return (*steps, last)


def life(
    config: RunConfig, rungs: Sequence[int], probe: ProbeConfig | None, data_hash: str, commit: str = ""
) -> Iterator[Report]:
    """Yields the report of every rung in turn, from the record where it stands there, else by training and probing.

    The record is written before a report is yielded. A rung that the run passed long ago under another probe, and of
    which no checkpoint is left, is passed over. ValueError where the folder holds a trial on other shards, or nothing
    is left of the last rung.
    """
    run_dir = config.run.dir
    record = asked(run_dir, data_hash, probe)
    record = replace(record, state=record.state if record.is_done else "running", attempts=record.attempts + 1)
    write_record(run_dir, record)
    for step in rungs:
        report = record.at(step)
        if report is None:
            record = replace(record, state="running", commits=tuple(dict.fromkeys([*record.commits, commit])))
            write_record(run_dir, record)
            began = time.monotonic()
            try:
                report = _advance(config, step, probe)
            finally:  # what failed was spent too
                record = replace(record, seconds=record.seconds + time.monotonic() - began)
                write_record(run_dir, record)
            if report is None and step < rungs[-1]:
                continue
            if report is None:
                raise ValueError(f"{run_dir} is past step {step}, and its checkpoint of it is gone: give other `runs`")
            reports = sorted((*record.reports, report), key=lambda each: each.step)
            record = replace(record, reports=tuple(reports))
        if step == config.train.steps:
            record = replace(record, state="finished")
        record = replace(record, error="")
        write_record(run_dir, record)
        yield report


def _advance(config: RunConfig, step: int, probe: ProbeConfig | None) -> Report | None:
    """Pretrains to `step`, probes what stands there, and reads what came of it; None where there is nothing to probe,
    since the run is past it. RuntimeError with what was printed where it failed."""
    from medim_ray.probes.cache import FOLDER
    from medim_ray.probes.command import run_probe
    from medim_ray.probes.watch import MapWatch
    from medim_ray.train.launch import launch

    _export_parent(config.encoder.init)
    said = Console(file=io.StringIO(), width=120, no_color=True)
    try:
        until = replace(config, train=replace(config.train, stop_after=step))
        result = launch(until, said, watch=MapWatch.of_run)
        if result.step < step:
            raise RuntimeError(f"stopped after step {result.step} of {step}: the same command goes on")
        if probe is not None:
            if not CheckpointStore(config.run.dir).committed_at(step):
                return None
            # one cache for all runs: raw pixels, and equal first weights, are probed once
            cache = probe.cache or f"{config.run.dir.rstrip('/').rpartition('/')[0]}/.{FOLDER}"
            run_probe(config.run.dir, replace(probe, cache=cache), said, checkpoint=str(step))
    except Exception as error:
        assert isinstance(said.file, io.StringIO)
        lines = said.file.getvalue().strip().splitlines()[-20:]
        if isinstance(error, ValueError):
            raise
        raise RuntimeError("\n".join([str(error), *lines])) from error
    outcome = outcome_of(config.run.dir, step, probed=probe is not None)
    return Report(step, outcome.numbers, outcome.gains, outcome.baselines)


def _export_parent(init: str) -> None:
    """Writes RUN/encoder where `init` names it and the run has not been exported yet; whole or not at all. ValueError
    where the run is not at its end."""
    from medim_ray.models.export import export
    from medim_ray.train.runs import load_run, read_config

    if Path(init).name != ENCODER or Path(init).exists() or read_config(str(Path(init).parent)) is None:
        return
    run = load_run(str(Path(init).parent))
    if run.step < run.config.train.steps:
        raise ValueError(f"{Path(init).parent} is at step {run.step} of {run.config.train.steps}: let it end first")
    with tempfile.TemporaryDirectory(prefix=f".{ENCODER}-", dir=Path(init).parent) as folder:
        export(run.objective.encoder, "timm", f"{folder}/{ENCODER}", facts={"objective": run.config.objective.name})
        with contextlib.suppress(OSError):  # another child of the run was first
            Path(folder, ENCODER).rename(init)


def trainable(tune_config: dict[str, Any], job: TrialJob) -> None:
    """Entry point of a Tune actor. tune_config: `config` (the tree of a run), or a value for each axis of the space."""
    from ray import tune

    if "config" in tune_config:
        config = from_tree(RunConfig, tune_config["config"])
    else:
        config = job.trial(job.space.point(tune_config)).config
    rungs = job.rungs or (config.train.steps,)
    with _alone(config.run.dir):
        try:
            for report in life(config, rungs, job.probe, job.data_hash, job.commit):
                value = report.numbers.get(job.metric, Number(None)).value
                if value is None:
                    known = ", ".join(sorted(report.numbers))
                    raise ValueError(f"metric={job.metric!r} was not reported by the run; it has {known}")
                tune.report({"step": report.step, job.metric: value})
        except ValueError as error:  # the same would happen again: Tune is not asked to retry
            write_record(config.run.dir, replace(job.record(config), state="failed", error=str(error)))
            tune.report({"step": rungs[-1], job.metric: float("nan")})
        except Exception as error:  # Tune tries again, or not: the reason is told either way
            write_record(config.run.dir, replace(job.record(config), error=str(error)))
            raise


@contextlib.contextmanager
def _alone(run_dir: str) -> Iterator[None]:
    """Waits while another trial works on this run: two equal points of a search, or two sweeps that share runs, come
    one after the other, and the second finds what the first one reported."""
    fs, root = fsspec.core.url_to_fs(run_dir)
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(Lease(fs, f"{root.rstrip('/')}/{LEASE}", what=run_dir))
                break
            except LeaseTakenError:
                time.sleep(_LOOK_S)
        yield
