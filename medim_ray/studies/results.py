"""Trials to a table: repetitions (seeds) become one cell with a mean and an interval, cells are ranked by a metric.

A cell whose probe does not beat the untrained encoder is "not learned": it stands in the table and is not ranked.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from scipy.stats import t as student

from medim_ray.studies.outcome import Number, better_is_higher
from medim_ray.studies.space import SEED, Trial
from medim_ray.studies.trials import Record

STATES = ("finished", "stopped", "running", "failed", "to do")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One trial in the table. step: of its last report."""

    name: str
    values: Mapping[str, Any]
    state: str
    error: str
    seconds: float
    step: int
    numbers: Mapping[str, Number]
    gains: Mapping[str, Number]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Runs that differ in their seed only. numbers, gains: means over the finished runs with 95 % intervals.

    learned: the metric beats the untrained encoder's with its whole interval; None where the metric
    has no such gain, or no run is finished. rank: from 1, None where the cell is not ranked.
    """

    name: str
    values: Mapping[str, Any]
    runs: Sequence[Run]
    numbers: Mapping[str, Number]
    gains: Mapping[str, Number]
    learned: bool | None
    rank: int | None

    @property
    def state(self) -> str:
        """The least finished state among the runs."""
        return max((run.state for run in self.runs), key=STATES.index)

    @property
    def verdict(self) -> str:
        """What a table says of the cell beside its numbers."""
        if self.state in ("failed", "to do", "running"):
            return self.state
        return "not learned" if self.learned is False else "stopped early" if self.state == "stopped" else ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells, the ranked ones first and best first. axes: names of the axes without the seed."""

    metric: str
    axes: Sequence[str]
    cells: Sequence[Cell]

    def count(self, state: str) -> int:
        """Runs in a state."""
        return sum(run.state == state for cell in self.cells for run in cell.runs)

    @property
    def metrics(self) -> list[str]:
        """Every number that some cell has, the metric of the table first."""
        names = sorted({name for cell in self.cells for name in cell.numbers})
        return [self.metric] * (self.metric in names) + [name for name in names if name != self.metric]


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
    )


def make_table(runs: Iterable[Run], metric: str) -> Table:
    """The ranked table of these runs."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        values = {key: value for key, value in run.values.items() if key != SEED}
        groups.setdefault(", ".join(f"{key}={value}" for key, value in values.items()) or "recipe", []).append(run)
    cells = [_cell(name, members, metric) for name, members in groups.items()]
    sign = -1.0 if better_is_higher(metric) else 1.0

    def order(cell: Cell) -> tuple[bool, float]:
        number = cell.numbers.get(metric, Number(None)).value
        return _unranked(cell, metric), sign * number if number is not None else 0.0

    cells.sort(key=order)
    ranked = [cell if _unranked(cell, metric) else replace(cell, rank=place) for place, cell in enumerate(cells, 1)]
    axes = list(dict.fromkeys(key for cell in cells for key in cell.values))
    return Table(metric=metric, axes=axes, cells=ranked)


def _unranked(cell: Cell, metric: str) -> bool:
    return cell.state not in ("finished", "stopped") or cell.learned is False or metric not in cell.numbers


def _cell(name: str, runs: Sequence[Run], metric: str) -> Cell:
    done = [run for run in runs if run.state in ("finished", "stopped")]
    gains = _means([run.gains for run in done])
    gain = gains.get(metric)
    return Cell(
        name=name,
        values={key: value for key, value in runs[0].values.items() if key != SEED},
        runs=runs,
        numbers=_means([run.numbers for run in done]),
        gains=gains,
        learned=None if gain is None or gain.value is None else _is_gain(gain, metric),
        rank=None,
    )


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


def to_csv(table: Table) -> str:
    """A row a cell: axes, verdict, rank, number of finished runs, and value, low, high of every number and gain."""
    metrics = table.metrics
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    parts = ("", "_low", "_high")
    names = [f"{name}{part}" for name in metrics for part in parts]
    names += [f"{name}_gain{part}" for name in metrics if _has_gain(table, name) for part in parts]
    writer.writerow(["rank", *table.axes, "verdict", "runs", *names])
    for cell in table.cells:
        numbers = [cell.numbers.get(name, Number(None)) for name in metrics]
        numbers += [cell.gains.get(name, Number(None)) for name in metrics if _has_gain(table, name)]
        done = sum(run.state in ("finished", "stopped") for run in cell.runs)
        writer.writerow(
            [
                cell.rank or "",
                *(cell.values.get(axis, "") for axis in table.axes),
                cell.verdict,
                done,
                *("" if part is None else f"{part:.6g}" for n in numbers for part in (n.value, n.low, n.high)),
            ]
        )
    return out.getvalue()


def _has_gain(table: Table, name: str) -> bool:
    return any(name in cell.gains for cell in table.cells)
