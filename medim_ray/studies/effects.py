"""Paired differences: what one axis of a grid does, all else equal, and every cell less the reference of a study."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medim_ray.studies.outcome import Number
from medim_ray.studies.results import Table, mean_number
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
    cells = {
        cell.name: _by_seed({run.values.get(SEED): run.numbers for run in cell.runs if run.is_done}, metric)
        for cell in table.cells
    }
    base = cells.pop(reference, {})
    runs = [run for cell in table.cells if cell.name == reference for run in cell.runs if run.is_done]
    rows = {
        **cells,
        **{
            baseline.name: _by_seed(
                {run.values.get(SEED): run.baselines.get(baseline.name, {}) for run in runs}, metric
            )
            for baseline in table.baselines
        },
    }
    pairs = {
        name: [Number(value - base[seed]) for seed, value in of_seed.items() if seed in base]
        for name, of_seed in rows.items()
    }
    return {name: mean_number(found) for name, found in pairs.items() if found}


def _by_seed(numbers: Mapping[Any, Mapping[str, Number]], metric: str) -> dict[Any, float]:
    found = {seed: of_run.get(metric) for seed, of_run in numbers.items()}
    return {seed: number.value for seed, number in found.items() if number is not None and number.value is not None}


def _effect(table: Table, axis: str, value: str, reference: str) -> Effect | None:
    sides: dict[str, dict[tuple[str, str], float]] = {value: {}, reference: {}}
    for cell in table.cells:
        rest = ", ".join(f"{key}={cell.values[key]}" for key in cell.values if key != axis)
        for run in cell.runs:
            number = run.numbers.get(table.metric)
            side = sides.get(str(cell.values.get(axis)))
            if side is not None and run.is_done and number is not None and number.value is not None:
                side[str(run.values.get(SEED)), rest] = number.value
    by_seed: dict[str, list[float]] = {}
    for seed, rest in sides[value].keys() & sides[reference].keys():
        by_seed.setdefault(seed, []).append(sides[value][seed, rest] - sides[reference][seed, rest])
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
