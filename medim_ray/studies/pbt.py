"""Population-based training (Jaderberg et al. 2017, synchronous): generations of trials, exploit and explore between.

A member is a run. At the end of a generation the worst take over the checkpoint of one of the best, with its values
perturbed, in a run folder named by the lineage; the others go on in theirs. What was decided is in OUT/lineages.json
before the next generation starts, so a killed sweep goes on from there. Tune runs the trials of a generation
(runner.py); its own PBT scheduler keeps its state in the driver, which this command does without.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import fsspec

from medim_ray.data.sources.base import absolute
from medim_ray.data.storage import committed
from medim_ray.draws import step_draws
from medim_ray.studies.outcome import Number, better_is_higher
from medim_ray.studies.runner import Search
from medim_ray.studies.space import MEMBER, SEED, Axis, Choices, Point, Range, SearchSpace, Trial
from medim_ray.studies.trials import Record, TrialJob, read_records, write_record
from medim_ray.train.metrics import METRICS, read_lines
from medim_ray.train.store import MANIFEST, CheckpointStore

LINEAGES = "lineages.json"
POINTER = "pointer.json"  # in a run folder: the checkpoint of another run that it began from
_FACTORS = (0.8, 1.2)


@dataclass(frozen=True, kw_only=True)
class PbtConfig:
    """Population-based training, with search: pbt."""

    every: int = field(default=100, metadata={"help": "steps between two exchanges"})
    exploit_ratio: float = field(
        default=0.25,
        metadata={"help": "share of the population that is replaced by members of the same share at the top"},
    )
    resample_ratio: float = field(
        default=0.25, metadata={"help": "probability that a value is drawn anew, else it goes to 0.8 or 1.2 of itself"}
    )

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every={self.every}: at least 1 step")
        if not 0 < self.exploit_ratio <= 0.5:
            raise ValueError(f"exploit_ratio={self.exploit_ratio}: must lie in (0, 0.5], e.g. 0.25")
        if not 0 <= self.resample_ratio <= 1:
            raise ValueError(f"resample_ratio={self.resample_ratio}: must lie in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class Member:
    """A member in one generation.

    values: of the axes; run: name of its folder; donor, step: the run that this one began from and the step of its
    checkpoint, '' and 0 where it began by itself.
    """

    values: Mapping[str, Any]
    run: str
    donor: str = ""
    step: int = 0


Score = float | None


class Population:
    """The members of every generation so far. Its file is read at the start and written after every exchange."""

    def __init__(self, job: TrialJob, config: PbtConfig, size: int, seed: int, out: str) -> None:
        """ValueError: repetitions in the space, fewer points than members, fewer members than two, or a file of another
        population."""
        if SEED in job.space.keys:
            raise ValueError(
                "space.seed: members of a population are no repetitions of each other; set the seed in overrides"
            )
        if size < 2:
            raise ValueError(f"search=pbt needs num_trials, the size of the population, of 2 or more; it is {size}")
        self.job, self._config, self._seed = job, config, seed
        steps = int(job.base["train"]["steps"])
        if config.every >= steps:
            raise ValueError(f"pbt.every={config.every}: no exchange within train.steps={steps}, use less")
        self.rungs = (*range(config.every, steps, config.every), steps)
        self._fs, root = fsspec.core.url_to_fs(absolute(out))
        self._path = f"{root.rstrip('/')}/{LINEAGES}"
        points = job.space.random(size, seed)
        if len(points) < size:
            raise ValueError(f"num_trials={size}, but space has {len(points)} points: use a range, or fewer members")
        self.generations = [[Member(values=point.values, run=job.trial(point).name) for point in points]]
        if self._fs.exists(self._path):
            self._resume(out)

    def _resume(self, out: str) -> None:
        try:
            tree = json.loads(self._fs.cat_file(self._path))
            begun = [[Member(**member) for member in generation] for generation in tree["generations"]]
            rungs, first = tuple(tree["rungs"]), [member.run for member in begun[0]]
            rule = tree.get("rule", self._rule)  # files of earlier code had none
        except (ValueError, TypeError, KeyError, IndexError):
            raise ValueError(
                f"{self._path} is damaged: give another out, or restore it; without it the population begins anew"
            ) from None
        if rungs != self.rungs or first != [member.run for member in self.generations[0]] or rule != self._rule:
            raise ValueError(
                f"out={out} holds another population ({len(first)} members, exchanges at {list(rungs[:-1])} by "
                f"{rule['metric']}): give another out, or the space, seed, size, metric and pbt that it was begun with"
            )
        self.generations = begun

    @property
    def _rule(self) -> dict[str, Any]:
        """What decides an exchange, beside the space, seed and size, which decide the first generation."""
        return {"metric": self.job.metric, **vars(self._config)}

    def trials(self) -> list[Trial]:
        """The members of the latest generation, with their number as an axis."""
        return self._generation(-1)

    def trial(self, number: int, member: Member) -> Trial:
        """A member as a trial: its folder is that of its lineage."""
        point = self.job.space.point({key: _named(self.job.space, key, value) for key, value in member.values.items()})
        made = self.job.trial(point)
        folder = f"{self.job.runs.rstrip('/')}/{member.run}"
        shown = Point({MEMBER: number, **point.values}, point.overrides)
        return Trial(point=shown, config=replace(made.config, run=replace(made.config.run, dir=folder)))

    def searches(self) -> Iterator[Search]:
        """A generation after the other, from the latest, each made when the one before has run; ends where a signal or
        a budget of hours has cut one, so that nothing is decided by halves."""
        for number in range(len(self.generations) - 1, len(self.rungs)):
            if number == len(self.generations) and not self._exchange(self.rungs[number - 1]):
                return
            yield Search(kind="list", trials=self._generation(number), rungs=self.rungs[: number + 1])

    def _generation(self, number: int) -> list[Trial]:
        return [self.trial(i, member) for i, member in enumerate(self.generations[number])]

    def _exchange(self, rung: int) -> bool:
        """The next generation, with every checkpoint that it begins from in its place, then its file; False where a
        member neither reported nor failed."""
        records = [self.job.record(trial.config) for trial in self.trials()]
        if any(record.at(rung) is None and record.state != "failed" for record in records):
            return False
        scores = [_score(record, rung, self.job.metric) for record in records]
        members = next_members(
            self.generations[-1], scores, rung, self.job, self._config, self._seed, better_is_higher(self.job.metric)
        )
        for i, member in enumerate(members):
            if member.donor and member.run != self.generations[-1][i].run:
                inherit(f"{self.job.runs.rstrip('/')}/{member.donor}", rung, self.trial(i, member).config.run.dir)
        self.generations.append(members)
        with committed(self._fs, self._path, scratch=self._path.rpartition("/")[0]) as file:
            tree = {"rungs": self.rungs, "rule": self._rule, "generations": self.generations}
            file.write(json.dumps(tree, indent=1, default=vars).encode())
        return True


def _score(record: Record, rung: int, metric: str) -> Score:
    report = record.at(rung)
    return None if report is None else report.numbers.get(metric, Number(None)).value


# --- Exploit and explore -------------------------------------------------------------------------------------------


def next_members(
    members: Sequence[Member],
    scores: Sequence[Score],
    rung: int,
    job: TrialJob,
    config: PbtConfig,
    seed: int,
    higher: bool,
) -> list[Member]:
    """The worst `exploit_ratio` of the members (at least one, those without a score first) become perturbed copies of
    members drawn among as many of the best; a function of its arguments. Members stay where nobody has a score."""
    known = [i for i, score in enumerate(scores) if score is not None and math.isfinite(score)]
    order = sorted(known, key=lambda i: ((-1.0 if higher else 1.0) * float(scores[i] or 0.0), i))
    without = [i for i in range(len(members)) if i not in known]
    num = max(1, math.floor(config.exploit_ratio * len(members)))
    best = order[: min(num, max(1, len(order) // 2))]
    worst = [*without, *(i for i in reversed(order) if i not in best)][: max(num, len(without))]
    if not best:
        return list(members)
    after = list(members)
    for i in worst:
        draws_D = step_draws(seed, rung, len(members)).uniform("pbt", 1 + 3 * len(job.space.axes))[i]
        donor = members[best[min(int(float(draws_D[0]) * len(best)), len(best) - 1)]]
        values = {
            axis.key: explored(axis, donor.values[axis.key], [float(u) for u in draws_D[1 + 3 * k :][:3]], config)
            for k, axis in enumerate(job.space.axes)
        }
        point = job.space.point({key: _named(job.space, key, value) for key, value in values.items()})
        after[i] = Member(
            values=point.values, run=lineage(job.trial(point).name, donor.run, rung, i), donor=donor.run, step=rung
        )
    return after


def lineage(run_hash: str, donor: str, step: int, member: int) -> str:
    """The name of a run that goes on as `run_hash` from another run's checkpoint at a step, in a member's place."""
    return hashlib.blake2b(f"{run_hash} {donor} {step} {member}".encode(), digest_size=6).hexdigest()


def explored(axis: Axis, value: Any, draws: Sequence[float], config: PbtConfig) -> Any:
    """A value near the donor's, inside its range, or one drawn anew. draws: three numbers in [0, 1)."""
    resamples, where, direction = draws[0] < config.resample_ratio, draws[1], draws[2] < 0.5
    if isinstance(axis, Choices):
        names = list(axis.options)
        if resamples:
            return names[min(int(where * len(names)), len(names) - 1)]
        at = names.index(_named_of(axis, value)) + (-1 if direction else 1)
        return names[max(0, min(at, len(names) - 1))]
    assert isinstance(axis, Range)
    if resamples:
        return axis.at(where)
    near = min(max(float(value) * _FACTORS[0 if direction else 1], axis.low), axis.high)
    return round(near) if axis.kind == "randint" else near


def _named(space: SearchSpace, key: str, value: Any) -> Any:
    """A value as `SearchSpace.point` takes it: of choices, the name of the option."""
    axis = next(axis for axis in space.axes if axis.key == key)
    return _named_of(axis, value) if isinstance(axis, Choices) else value


def _named_of(axis: Choices, value: Any) -> str:
    """The option that a table shows as `value`: a number stands for its text."""
    return str(value) if str(value) in axis.options else json.dumps(value)


# --- The checkpoint pointer ----------------------------------------------------------------------------------------


def inherit(donor_dir: str, step: int, run_dir: str) -> None:
    """Makes `run_dir` a run that stands where `donor_dir` stood after `step` steps: RUN/pointer.json, the donor's
    reports and metrics up to there, and its checkpoint, manifest last. Done again after a kill, it does
    what is missing.

    ValueError where the donor has no checkpoint of this step.
    """
    store = CheckpointStore(run_dir)
    if any(store.is_committed(name) for name in store.names()):
        return
    donor = CheckpointStore(donor_dir)
    name = donor.committed_at(step)
    if not name:
        raise ValueError(
            f"{donor_dir} has no checkpoint of step {step} to go on from: it was removed; begin the sweep anew"
        )
    fs, root = fsspec.core.url_to_fs(run_dir)
    root = root.rstrip("/")
    fs.makedirs(root, exist_ok=True)
    pointer = {"donor": donor_dir, "checkpoint": name, "step": step}
    with committed(fs, f"{root}/{POINTER}", scratch=root) as file:
        file.write(json.dumps(pointer, indent=1).encode())
    for record in read_records(donor_dir):
        reports = tuple(report for report in record.reports if report.step <= step)
        kept = Record(version=record.version, data_hash=record.data_hash, probe=record.probe, reports=reports)
        write_record(run_dir, kept)
    lines = [line for line in read_lines(donor_dir) if json.loads(line)["step"] < step]
    fs.pipe_file(f"{root}/{METRICS}", "".join(f"{line}\n" for line in lines).encode())
    folder = f"{store.root}/{name}"
    if fs.exists(folder):
        fs.rm(folder, recursive=True)
    fs.makedirs(folder, exist_ok=True)
    for file_name in (*donor.open(name).manifest["files"], MANIFEST):
        fs.cp_file(f"{donor.root}/{name}/{file_name}", f"{folder}/{file_name}")
