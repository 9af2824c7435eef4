"""Paired differences: what one axis of a grid does, all else equal, and every cell less the reference of a study."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medim_ray.studies.outcome import Number
from medim_ray.studies.results import Run, Table, mean_number, reports_of
from medim_ray.studies.space import SEED, Choices, SearchSpace


@dataclass(frozen=True, kw_only=True)
class Effect:
    """difference: the metric with `value` less that with `reference`, mean over `num_pairs` pairs of runs that differ
    in nothing else, with a 95 % t-interval: over the seeds, or where there is one seed over the pairs."""

    axis: str
    value: str
    reference: str
    difference: Number
    num_pairs: int


def axes_of(config: Mapping[str, Any]) -> dict[str, list[str]]:
    """The axes of a grid with their values in the order of its YAML, without the seed; {} for other searches."""
    if config.get("search") != "grid":
        return {}
    return {
        axis.key: [str(axis.shown(name)) for name in axis.options]
        for axis in SearchSpace.parse(config["space"]).axes
        if isinstance(axis, Choices) and axis.key != SEED and len(axis.options) > 1
    }


def effects(table: Table, axes: Mapping[str, Sequence[str]]) -> list[Effect]:
    """A line a value but the first of each axis; values that no pair of finished runs tells of are left out."""
    return [
        effect
        for axis, (first, *others) in axes.items()
        for value in others
        if (effect := _effect(table, axis, value, first)) is not None
    ]


def differences(table: Table, reference: str, metric: str) -> dict[str, Number]:
    """Name of a cell or baseline -> its metric less that of the cell `reference`: mean over the seeds that both have,
    with a 95 % t-interval. A baseline is that of the reference's own runs. {} where the reference has no such number.
    """
    cells = {cell.name: {run.values.get(SEED): run for run in cell.runs if run.is_done} for cell in table.cells}
    base = cells.pop(reference, {})
    found = {
        name: [_less(run, base[seed], metric) for seed, run in of_seed.items() if seed in base]
        for name, of_seed in cells.items()
    }
    for baseline in table.baselines:
        beside = [(run.baselines.get(baseline.name, {}), run.numbers) for run in base.values()]
        found[baseline.name] = [_minus(of_baseline, of_run, metric) for of_baseline, of_run in beside]
    known = {name: [Number(pair) for pair in pairs if pair is not None] for name, pairs in found.items()}
    return {name: mean_number(pairs) for name, pairs in known.items() if pairs}


def _less(run: Run, other: Run, metric: str) -> float | None:
    """The metric of a run less that of another, at the same step where one of them was stopped early (`reports_of`);
    None where one of them has none."""
    reports = reports_of([run, other])
    return _minus(reports[0].numbers, reports[1].numbers, metric) if reports else None


def _minus(numbers: Mapping[str, Number], others: Mapping[str, Number], metric: str) -> float | None:
    value, other = (of_run.get(metric, Number(None)).value for of_run in (numbers, others))
    return None if value is None or other is None else value - other


def _effect(table: Table, axis: str, value: str, reference: str) -> Effect | None:
    sides: dict[str, dict[tuple[str, str], Run]] = {value: {}, reference: {}}
    for cell in table.cells:
        shown = str(cell.values.get(axis))
        if shown in sides:
            rest = ", ".join(f"{key}={cell.values[key]}" for key in cell.values if key != axis)
            sides[shown] |= {(str(run.values.get(SEED)), rest): run for run in cell.runs if run.is_done}
    by_seed: dict[str, list[float]] = {}
    for seed, rest in sides[value].keys() & sides[reference].keys():
        pair = _less(sides[value][seed, rest], sides[reference][seed, rest], table.metric)
        if pair is not None:
            by_seed.setdefault(seed, []).append(pair)
    pairs = [difference for differences in by_seed.values() for difference in differences]
    if not pairs:
        return None
    repeated = [statistics.mean(differences) for differences in by_seed.values()] if len(by_seed) > 1 else pairs
    return Effect(
        axis=axis,
        value=value,
        reference=reference,
        difference=mean_number([Number(difference) for difference in repeated]),
        num_pairs=len(pairs),
    )
