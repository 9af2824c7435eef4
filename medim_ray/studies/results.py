"""Trials to a table: repetitions (seeds) become one cell with a mean and an interval, cells are ranked by a metric.

A cell whose probe does not beat the untrained encoder is "not learned": it stands in the table and is not ranked.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from scipy.stats import t as student

from medim_ray.probes.encoders import UNTRAINED
from medim_ray.studies.outcome import Number, better_is_higher
from medim_ray.studies.space import SEED, Trial
from medim_ray.studies.trials import Record, Report

STATES = ("finished", "stopped", "running", "failed", "to do")
DONE = STATES[:2]
FIRST_WEIGHTS = "first weights"  # of runs that begin from another encoder, in the place of UNTRAINED


@dataclass(frozen=True, kw_only=True)
class Run:
    """One trial in the table. step, numbers, gains, baselines: of its last report; earlier: those before it; commits:
    of the code that made it, none where that was not noted yet."""

    name: str
    values: Mapping[str, Any]
    state: str
    error: str
    seconds: float
    step: int
    numbers: Mapping[str, Number]
    gains: Mapping[str, Number]
    baselines: Mapping[str, Mapping[str, Number]] = field(default_factory=dict)
    earlier: Sequence[Report] = ()
    commits: Sequence[str] = ()

    @property
    def is_done(self) -> bool:
        """It has numbers that count."""
        return self.state in DONE

    @property
    def steps(self) -> set[int]:
        """The steps at which the run reported."""
        return {self.step, *(report.step for report in self.earlier)}

    def at(self, step: int) -> Run | Report:
        """What the run reported at one of its steps."""
        return next((report for report in self.earlier if report.step == step), self)


def reports_of(runs: Sequence[Run]) -> list[Run | Report]:
    """What is compared of these runs: their last reports, or where a scheduler stopped one of them early, those of the
    last step that all have reported; [] where there is none."""
    if not any(run.state == "stopped" for run in runs):
        return list(runs)
    shared = set.intersection(*(run.steps for run in runs))
    return [run.at(max(shared)) for run in runs] if shared else []


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Runs that differ in their seed only. numbers, gains: means over the done runs with 95 % intervals, at `step`: the
    last one that all of them have reported, which is the end unless a scheduler stopped one early.

    learned: the metric beats that of the encoder before pretraining with its whole interval; None where the metric has
    no such gain, or no run is finished. rank: from 1, None where the cell is not ranked.
    """

    name: str
    values: Mapping[str, Any]
    runs: Sequence[Run]
    numbers: Mapping[str, Number]
    gains: Mapping[str, Number]
    step: int
    learned: bool | None
    rank: int | None

    @property
    def state(self) -> str:
        """The least finished state among the runs."""
        return max((run.state for run in self.runs), key=STATES.index)

    @property
    def num_done(self) -> int:
        """Runs that its numbers are means over."""
        return sum(run.is_done for run in self.runs)

    @property
    def verdict(self) -> str:
        """What a table says of the cell beside its numbers."""
        if self.state in ("failed", "to do", "running"):
            return self.state
        if self.learned is False:
            return "not learned"
        if self.state != "stopped":
            return ""
        return f"stopped at step {self.step}" if self.step else "stopped, with no step in common"


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """An encoder that every run is probed beside (untrained, pixels, timm:…): a row of the table without a rank.

    numbers: means over seeds of the means over the cells, whose crops, architecture or first weights may differ.
    """

    name: str
    numbers: Mapping[str, Number]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells, the ranked ones first and best first. axes: names of the axes without the seed."""

    metric: str
    axes: Sequence[str]
    cells: Sequence[Cell]
    baselines: Sequence[Baseline] = ()

    @property
    def rows(self) -> Sequence[Cell | Baseline]:
        """The cells, then the baselines."""
        return [*self.cells, *self.baselines]

    @property
    def runs(self) -> list[Run]:
        """All runs; one that stands in several cells once."""
        return list({run.name: run for cell in self.cells for run in cell.runs}.values())

    def count(self, state: str) -> int:
        """Runs in a state."""
        return sum(run.state == state for run in self.runs)

    @property
    def columns(self) -> Sequence[str]:
        """Headers of what tells the rows apart: the axes, or one column where there are none."""
        return self.axes or ["encoder"]

    def place(self, row: Cell | Baseline) -> list[Any]:
        """What stands below `columns`: the values of a cell; the name of a baseline, in the first one."""
        if isinstance(row, Cell) and self.axes:
            return [row.values.get(axis, "") for axis in self.axes]
        return [named(row), *[""] * (len(self.columns) - 1)]

    @property
    def metrics(self) -> list[str]:
        """Every number that some cell has, the metric of the table first."""
        names = sorted({name for cell in self.cells for name in cell.numbers})
        return [self.metric] * (self.metric in names) + [name for name in names if name != self.metric]


def named(row: Cell | Baseline) -> str:
    """A row as people say it: the name of an arm, the values of a cell, an encoder beside them."""
    if isinstance(row, Cell):
        return ", ".join(str(value) for value in row.values.values()) if len(row.values) == 1 else row.name
    return {"pixels": "raw pixels"}.get(row.name, row.name)


def num_done(cell: Cell) -> str:
    """How many runs a cell's numbers are means over: `3`, or `2 of 3`."""
    return str(cell.num_done) if cell.num_done == len(cell.runs) else f"{cell.num_done} of {len(cell.runs)}"


def short(value: Any) -> str:
    """An axis value for people: four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def make_run(trial: Trial, record: Record) -> Run:
    """A trial with what its record says."""
    last = record.reports[-1] if record.reports else None
    return Run(
        name=trial.name,
        values=trial.point.values,
        state=record.state if record.attempts else "to do",
        error=record.error,
        seconds=record.seconds,
        step=last.step if last else 0,
        numbers=last.numbers if last else {},
        gains=last.gains if last else {},
        baselines=_renamed(last.baselines, trial) if last else {},
        earlier=record.reports[:-1],
        commits=record.commits,
    )


def _renamed(baselines: Mapping[str, Mapping[str, Number]], trial: Trial) -> Mapping[str, Mapping[str, Number]]:
    """What a run began with is an untrained encoder only where its first weights were drawn at random."""
    if trial.config.encoder.init == "random":
        return baselines
    return {FIRST_WEIGHTS if name == UNTRAINED else name: numbers for name, numbers in baselines.items()}


def make_table(runs: Iterable[Run], metric: str) -> Table:
    """The ranked table of these runs. Cells with a run that was stopped early come after those that ran to their end,
    the furthest first: a metric of half the steps is no rival of one of all."""
    runs = list(runs)
    groups: dict[str, list[Run]] = {}
    for run in runs:
        values = {key: value for key, value in run.values.items() if key != SEED}
        groups.setdefault(", ".join(f"{key}={value}" for key, value in values.items()) or "recipe", []).append(run)
    cells = [_cell(name, members, metric) for name, members in groups.items()]
    sign = -1.0 if better_is_higher(metric) else 1.0

    def order(cell: Cell) -> tuple[bool, bool, int, float]:
        number = cell.numbers.get(metric, Number(None)).value
        is_short = cell.state == "stopped"
        furthest = -cell.step if is_short else 0
        return _unranked(cell, metric), is_short, furthest, sign * number if number is not None else 0.0

    cells.sort(key=order)
    ranked = [cell if _unranked(cell, metric) else replace(cell, rank=place) for place, cell in enumerate(cells, 1)]
    axes = list(dict.fromkeys(key for cell in cells for key in cell.values))
    table = Table(metric=metric, axes=axes, cells=ranked)
    return replace(table, baselines=_baselines(table.runs))


def _unranked(cell: Cell, metric: str) -> bool:
    return cell.state not in DONE or cell.learned is False or cell.numbers.get(metric, Number(None)).value is None


def _cell(name: str, runs: Sequence[Run], metric: str) -> Cell:
    done = reports_of([run for run in runs if run.is_done])
    gains = _means([report.gains for report in done])
    gain = gains.get(metric)
    return Cell(
        name=name,
        values={key: value for key, value in runs[0].values.items() if key != SEED},
        runs=runs,
        numbers=_means([report.numbers for report in done]),
        gains=gains,
        step=min((report.step for report in done), default=0),
        learned=None if gain is None or gain.value is None else _is_gain(gain, metric),
        rank=None,
    )


def _baselines(runs: Sequence[Run]) -> list[Baseline]:
    rows: dict[str, dict[str, list[tuple[Any, Number]]]] = {}
    for run in runs:
        for name, numbers in run.baselines.items() if run.is_done else ():
            for metric, number in numbers.items():
                rows.setdefault(name, {}).setdefault(metric, []).append((run.values.get(SEED), number))
    return [
        Baseline(name=name, numbers={metric: _mean_of_seeds(found) for metric, found in metrics.items()})
        for name, metrics in rows.items()
    ]


def _mean_of_seeds(rows: Sequence[tuple[Any, Number]]) -> Number:
    """Of one value in all runs the number itself, with its interval over patients; else the mean over seeds of those
    over cells."""
    numbers = [number for _, number in rows if number.value is not None]
    if all(number.value == numbers[0].value for number in numbers[1:]):
        return numbers[0] if numbers else Number(None)
    of_seed: dict[Any, list[float]] = {}
    for seed, number in rows:
        if number.value is not None:
            of_seed.setdefault(seed, []).append(number.value)
    return mean_number([Number(statistics.mean(values)) for values in of_seed.values()])


def _is_gain(gain: Number, metric: str) -> bool:
    """The whole interval lies on the better side of 0."""
    if gain.low is None or gain.high is None:
        return False
    return gain.low > 0 if better_is_higher(metric) else gain.high < 0


def _means(rows: Sequence[Mapping[str, Number]]) -> dict[str, Number]:
    """Means over repetitions, of the numbers that all of them have."""
    names = [name for name in (rows[0] if rows else {}) if all(name in row for row in rows)]
    return {name: mean_number([row[name] for row in rows]) for name in names}


def mean_number(numbers: Sequence[Number]) -> Number:
    """Mean and 95 % t-interval over repetitions; of a single one its own value and interval."""
    if len(numbers) == 1:
        return numbers[0]
    values = [number.value for number in numbers if number.value is not None]
    if len(values) < len(numbers):
        return Number(None)
    mean = statistics.mean(values)
    half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return Number(mean, mean - half, mean + half)


def to_csv(table: Table, differences: Mapping[str, Mapping[str, Number]] | None = None) -> str:
    """A row a cell: axes, verdict, rank, number of done runs, and value, low, high of every number and gain, and of the
    `differences` from a reference (metric -> name of the cell -> number); then a row a baseline, without rank."""
    metrics, differences = table.metrics, differences or {}
    gains = [name for name in metrics if any(name in cell.gains for cell in table.cells)]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = [*metrics, *(f"{name}_gain" for name in gains), *(f"{name}_minus_reference" for name in differences)]
    columns = [f"{name}{part}" for name in names for part in ("", "_low", "_high")]
    writer.writerow(["rank", *table.columns, "verdict", "runs", *columns])
    for row in table.rows:
        numbers = [row.numbers.get(name, Number(None)) for name in metrics]
        if isinstance(row, Cell):
            head = [row.rank or "", *table.place(row), row.verdict, row.num_done]
            numbers += [row.gains.get(name, Number(None)) for name in gains]
        else:
            head = ["", *table.place(row), "baseline", ""]
            numbers += [Number(None)] * len(gains)
        numbers += [of_metric.get(row.name, Number(None)) for of_metric in differences.values()]
        told = ("" if part is None else f"{part:.6g}" for n in numbers for part in (n.value, n.low, n.high))
        writer.writerow([*head, *told])
    return out.getvalue()
