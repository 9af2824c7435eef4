"""One trial of a sweep or study: pretrain to each rung, probe, report. Runs in a Ray Tune actor; RUNS/HASH/trial.json.

A rung is a step at which the trial reports. Between rungs the run is stopped and started by `train.stop_after`, which
is bit-equal to a straight run, so what a trial has reported is never computed again: a second life replays it.
"""

from __future__ import annotations

import io
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import fsspec
import yaml
from rich.console import Console

from medim_ray.config.loader import from_tree, to_tree
from medim_ray.config.probe import ProbeConfig
from medim_ray.config.schema import RunConfig
from medim_ray.data.storage import committed
from medim_ray.studies.outcome import Number, outcome_of
from medim_ray.studies.space import Point, SearchSpace, Trial, make_trial

RECORD = "trial.json"
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
    """RUNS/HASH/trial.json. state: stopped = by the scheduler; seconds: pretraining and probes, over all lives;
    attempts: lives since these shards and this probe were asked for."""

    state: State = "running"
    data_hash: str = ""
    probe: Mapping[str, Any] = field(default_factory=dict)
    reports: tuple[Report, ...] = ()
    seconds: float = 0.0
    attempts: int = 0
    error: str = ""

    @property
    def is_done(self) -> bool:
        """No further life is needed."""
        return self.state in ("finished", "stopped")

    def is_done_at(self, rungs: Sequence[int]) -> bool:
        """No further life is needed to have reported at these rungs."""
        return self.is_done and (self.state == "stopped" or all(self.at(rung) is not None for rung in rungs))

    def at(self, step: int) -> Report | None:
        """What was reported at a rung."""
        return next((report for report in self.reports if report.step == step), None)

    def asked(self, run_dir: str, data_hash: str, probe: Mapping[str, Any]) -> Record:
        """The record as far as it answers for these shards and this probe (or none): reports by another probe are
        forgotten and the run is to do; what it trained and spent stays. ValueError where it was trained on others."""
        if self.data_hash not in ("", data_hash):
            raise ValueError(
                f"{run_dir} was trained on other shards (content {self.data_hash}, now {data_hash}): give another "
                "`runs`, or the same shards"
            )
        # an option that was not there when the record was written had its default
        before = {**to_tree(ProbeConfig()), **self.probe} if self.probe else {}
        if (self.is_done and not probe) or json.loads(json.dumps([before])) == json.loads(json.dumps([probe])):
            return replace(self, data_hash=data_hash)
        return Record(data_hash=data_hash, probe=probe, seconds=self.seconds)


def read_record(run_dir: str) -> Record:
    """The record of a trial's run folder; an empty one where it was never started."""
    fs, root = fsspec.core.url_to_fs(run_dir)
    path = f"{root.rstrip('/')}/{RECORD}"
    fs.invalidate_cache()
    if not fs.exists(path):
        return Record()
    tree = json.loads(fs.cat_file(path))
    return Record(**{**tree, "reports": tuple(map(Report.from_json, tree["reports"]))})


def _numbers(tree: Mapping[str, Any]) -> dict[str, Number]:
    """Numbers by name, of their JSON."""
    return {name: Number(**number) for name, number in tree.items()}


def write_record(run_dir: str, record: Record) -> None:
    """Whole or not at all."""
    fs, root = fsspec.core.url_to_fs(run_dir)
    fs.makedirs(root, exist_ok=True)
    with committed(fs, f"{root.rstrip('/')}/{RECORD}", scratch=root) as file:
        file.write(json.dumps(asdict(record), indent=1).encode())


@dataclass(frozen=True, kw_only=True)
class TrialJob:
    """What every trial of a sweep shares; sent to the Tune actors as plain values.

    base: the recipe with the sweep's overrides, as a plain tree; rungs: steps at which a trial reports, () = at its
    end; metric: what is reported to Tune; probe: None where no probe is asked for.
    """

    base: Mapping[str, Any]
    space: SearchSpace
    runs: str
    data_hash: str
    rungs: tuple[int, ...]
    probe: ProbeConfig | None
    metric: str

    def record(self, run_dir: str) -> Record:
        """What the record of a run folder says of what this job asks (`Record.asked`)."""
        return _asked(run_dir, self.data_hash, self.probe)

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


def life(config: RunConfig, rungs: Sequence[int], probe: ProbeConfig | None, data_hash: str) -> Any:
    """Yields the report of every rung in turn, from the record where it stands there, else by training and probing.

    The record is written before a report is yielded. ValueError where the folder holds a trial on other shards.
    """
    run_dir = config.run.dir
    record = _asked(run_dir, data_hash, probe)
    record = replace(record, state=record.state if record.is_done else "running", attempts=record.attempts + 1)
    write_record(run_dir, record)
    for step in rungs:
        report = record.at(step)
        if report is None:
            began = time.monotonic()
            report = _advance(config, step, probe)
            seconds = record.seconds + time.monotonic() - began
            record = replace(record, reports=(*record.reports, report), seconds=seconds)
        record = replace(record, state="finished" if step == rungs[-1] else "running", error="")
        write_record(run_dir, record)
        yield report


def _asked(run_dir: str, data_hash: str, probe: ProbeConfig | None) -> Record:
    return read_record(run_dir).asked(run_dir, data_hash, to_tree(probe) if probe is not None else {})


def _advance(config: RunConfig, step: int, probe: ProbeConfig | None) -> Report:
    """Pretrains to `step`, probes, and reads what came of it. RuntimeError with what was printed where it failed."""
    from medim_ray.probes.cache import FOLDER
    from medim_ray.probes.command import run_probe
    from medim_ray.probes.watch import MapWatch
    from medim_ray.train.launch import launch

    _export_parent(config.encoder.init)
    said = Console(file=io.StringIO(), width=120, no_color=True)
    try:
        launch(replace(config, train=replace(config.train, stop_after=step)), said, watch=MapWatch.of_run)
        if probe is not None:
            # one cache for all runs: raw pixels, and equal first weights, are probed once
            cache = probe.cache or f"{config.run.dir.rstrip('/').rpartition('/')[0]}/.{FOLDER}"
            run_probe(config.run.dir, replace(probe, cache=cache), said)
    except Exception as error:
        assert isinstance(said.file, io.StringIO)
        lines = said.file.getvalue().strip().splitlines()[-20:]
        if isinstance(error, ValueError):
            raise
        raise RuntimeError("\n".join([str(error), *lines])) from error
    outcome = outcome_of(config.run.dir, probed=probe is not None)
    return Report(step, outcome.numbers, outcome.gains, outcome.baselines)


def _export_parent(init: str) -> None:
    """Writes RUN/encoder where `init` names it and the run has not been exported yet."""
    from medim_ray.models.export import export
    from medim_ray.train.runs import load_run, read_config

    if Path(init).name != ENCODER or Path(init).exists() or read_config(str(Path(init).parent)) is None:
        return
    run = load_run(str(Path(init).parent))
    export(run.objective.encoder, "timm", init, facts={"objective": run.config.objective.name})


def trainable(tune_config: dict[str, Any], job: TrialJob) -> None:
    """Entry point of a Tune actor. tune_config: `config` (the tree of a run), or a value for each axis of the space."""
    from ray import tune

    if "config" in tune_config:
        config = from_tree(RunConfig, tune_config["config"])
    else:
        config = job.trial(job.space.point(tune_config)).config
    rungs = job.rungs or (config.train.steps,)
    try:
        for report in life(config, rungs, job.probe, job.data_hash):
            value = report.numbers.get(job.metric, Number(None)).value
            if value is None:
                known = ", ".join(sorted(report.numbers))
                raise ValueError(f"metric={job.metric!r} was not reported by the run; it has {known}")
            tune.report({"step": report.step, job.metric: value})
    except ValueError as error:  # the same would happen again: Tune is not asked to retry
        write_record(config.run.dir, replace(read_record(config.run.dir), state="failed", error=str(error)))
        tune.report({"step": rungs[-1], job.metric: float("nan")})
    except Exception as error:  # Tune tries again, or not: the reason is told either way
        write_record(config.run.dir, replace(read_record(config.run.dir), error=str(error)))
        raise
