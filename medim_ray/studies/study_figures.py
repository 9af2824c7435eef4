"""Figures of sweeps and studies: heat map, curve with band, parallel coordinates, scaling with its fit. No files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from medim_ray.studies.figures import CARD, FIRST, INK, LINE, MUTED, SERIES, STYLE, Drawing, to_svg
from medim_ray.studies.fit import Line, efficiencies
from medim_ray.studies.outcome import Number, better_is_higher
from medim_ray.studies.results import Cell, Table

WIDTH, HEIGHT = 7.2, 3.4
_PANELS_ACROSS = 3
_DASHES = ("-", "--", ":")
_DOT: Mapping[str, Any] = {"fmt": "o", "markersize": 4.5, "capsize": 2, "linewidth": 1.3}


def values_of(cells: Sequence[Cell], axis: str) -> list[Any]:
    """The values of an axis, ascending."""
    found = list(dict.fromkeys(cell.values.get(axis, "") for cell in cells))
    return sorted(found) if all(isinstance(value, int | float) for value in found) else sorted(found, key=str)


def heat_map(table: Table, rows: str, columns: str, metric: str) -> Drawing:
    """A metric at each pair of values of two axes; what is not learned or not there is said in the field."""
    ys, xs = values_of(table.cells, rows), values_of(table.cells, columns)
    at = {(cell.values[rows], cell.values[columns]): cell for cell in table.cells}
    known = [n.value for cell in table.cells if (n := cell.numbers.get(metric)) and n.value is not None]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    with rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(max(3.6, 1.25 * len(xs) + 1.2), 0.62 * len(ys) + 0.9), layout="constrained")
        axes = figure.add_subplot()
        for i, y in enumerate(ys):
            for j, x in enumerate(xs):
                _field(axes, at.get((y, x)), metric, (j, i), (low, high))
        axes.set_xlim(0, len(xs))
        axes.set_ylim(len(ys), 0)
        axes.set_xticks(np.arange(len(xs)) + 0.5, [_short(x) for x in xs])
        axes.set_yticks(np.arange(len(ys)) + 0.5, [_short(y) for y in ys])
        axes.set_xlabel(columns)
        axes.set_ylabel(rows)
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(length=0)
        return to_svg(figure, f"{metric} over {rows} and {columns}")


def _field(axes: Any, cell: Cell | None, metric: str, corner: tuple[int, int], scale: tuple[float, float]) -> None:
    x, y = corner
    number = cell.numbers.get(metric) if cell is not None else None
    value = number.value if number is not None else None
    share = 0.0
    if value is not None:
        share = (value - scale[0]) / (scale[1] - scale[0]) if scale[1] > scale[0] else 0.5
        share = share if better_is_higher(metric) else 1 - share
    learned = value is not None and cell is not None and not cell.verdict
    style: dict[str, Any] = {"facecolor": FIRST, "alpha": 0.12 + 0.5 * share} if learned else {"fill": False}
    axes.add_patch(Rectangle((x + 0.03, y + 0.05), 0.94, 0.9, linewidth=0 if learned else 0.8, edgecolor=LINE, **style))
    text = "-" if value is None else f"{value:.3g}"
    axes.text(x + 0.5, y + (0.42 if cell is not None and cell.verdict else 0.5), text, ha="center", va="center")
    if cell is not None and cell.verdict:
        axes.text(x + 0.5, y + 0.72, cell.verdict, ha="center", va="center", fontsize=7, color=MUTED)


def curves(table: Table, x_axis: str, series_axis: str | None) -> Drawing:
    """The metric over a numeric axis, a line with its 95 % band for each value of another axis."""
    names = values_of(table.cells, series_axis) if series_axis else [None]
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        for i, name in enumerate(names):
            cells = [
                c
                for c in table.cells
                if table.metric in c.numbers and (not series_axis or c.values[series_axis] == name)
            ]
            cells.sort(key=lambda cell: cell.values[x_axis])
            _banded(
                axes,
                [(c.values[x_axis], c.numbers[table.metric]) for c in cells],
                i,
                _short(name) if series_axis else "",
            )
        _scale(axes, [cell.values[x_axis] for cell in table.cells])
        axes.set_xlabel(x_axis)
        axes.set_ylabel(table.metric)
        if series_axis:
            axes.legend(title=series_axis, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        return to_svg(figure, f"{table.metric} over {x_axis}")


def rungs(table: Table) -> Drawing:
    """The metric over the steps at which trials reported, a line a run: the best in colour, ends that a scheduler cut
    hollow."""
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        best = next((cell.name for cell in table.cells if cell.rank == 1), "")
        for cell in reversed(table.cells):  # the best on top
            for run in cell.runs:
                found = {step: run.at(step).numbers.get(table.metric) for step in sorted(run.steps)}
                known = [(step, number.value) for step, number in found.items() if number and number.value is not None]
                if not known:
                    continue
                colour, width = (FIRST, 2.0) if cell.name == best else (MUTED, 1.0)
                axes.plot(*zip(*known, strict=True), color=colour, linewidth=width, marker="o", markersize=3)
                if run.state == "stopped":
                    axes.plot(*known[-1], marker="o", markersize=4, color=colour, markerfacecolor=CARD)
        axes.set_xlabel("step")
        axes.set_ylabel(table.metric)
        return to_svg(figure, f"{table.metric} over steps")


def _banded(axes: Any, points: Sequence[tuple[float, Number]], i: int, name: str) -> None:
    known = [(x, n.value, n.low, n.high) for x, n in points if n.value is not None]
    if not known:
        return
    xs, values, lows, highs = (np.array(column, dtype=np.float64) for column in zip(*known, strict=True))
    colour = SERIES[i % len(SERIES)]
    axes.plot(xs, values, marker="o", markersize=4, linewidth=1.6, color=colour, label=name)
    axes.fill_between(xs, lows, highs, color=colour, alpha=0.15, linewidth=0)


def _scale(axes: Any, xs: Sequence[float]) -> None:
    """Ticks at the values that were tried; logarithmic where they span more than a factor of 20."""
    places = sorted(set(xs))
    if places[0] > 0 and places[-1] / places[0] > 20:
        axes.set_xscale("log")
    if len(places) <= 12:
        _at_places(axes, places)


def parallel(table: Table) -> Drawing:
    """A line a cell over all axes to the metric; ranked cells in colour, the others in gray."""
    columns = [*table.axes, table.metric]
    with rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        scales = [_parallel_scale(table, column) for column in columns]
        best = sum(cell.rank is not None for cell in table.cells)
        for cell in reversed(table.cells):
            number = cell.numbers.get(table.metric)
            if number is None or number.value is None:
                continue
            ys = [scale(cell.values.get(axis, "")) for axis, (scale, _) in zip(table.axes, scales[:-1], strict=True)]
            ys.append(scales[-1][0](number.value))
            alpha = 0.25 + 0.7 * (1 - (cell.rank - 1) / max(1, best)) if cell.rank else 0.35
            axes.plot(range(len(columns)), ys, color=FIRST if cell.rank else MUTED, alpha=alpha, linewidth=1.4)
        for i, (_, ticks) in enumerate(scales):
            axes.axvline(i, color=LINE, linewidth=0.8)
            for place, text in ticks:
                axes.text(i, place, f" {text}", fontsize=7, color=INK, va="center")
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks([])
        axes.set_xlim(-0.1, len(columns) - 0.7)
        return to_svg(figure, f"each cell over {', '.join(columns)}")


def _parallel_scale(table: Table, column: str) -> tuple[Any, list[tuple[float, str]]]:
    """value -> height in [0, 1], and the labels beside the axis."""
    if column == table.metric:
        found: list[Any] = [n.value for c in table.cells if (n := c.numbers.get(column)) and n.value is not None]
    else:
        found = values_of(table.cells, column)
    if column != table.metric and not all(isinstance(value, int | float) for value in found):
        places = {value: i / max(1, len(found) - 1) for i, value in enumerate(found)}
        return places.__getitem__, [(place, _short(value)) for value, place in places.items()]
    low, high = (min(found), max(found)) if found else (0.0, 1.0)
    is_log = low > 0 and high / low > 20
    start, stop = (math.log(low), math.log(high)) if is_log else (low, high)

    def height(value: float) -> float:
        at = math.log(value) if is_log else value
        return (at - start) / (stop - start) if stop > start else 0.5

    return height, [(height(value), f"{value:.3g}") for value in dict.fromkeys((low, high))]


def scaling(lines: Sequence[Line], x_name: str, y_name: str) -> Drawing:
    """Measured points with intervals on logarithmic axes, each line's fitted law with its band, the held-out points.

    Every point has a number.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xscale("log")
        if all(float(n.value or 0.0) > 0 for line in lines for _, n, *_ in line.points):
            axes.set_yscale("log")
        for i, line in enumerate(lines):
            colour, dashes = _style(i)
            _law(axes, line, colour if len(lines) > 1 else SERIES[1], dashes)
            measured = line.name or "measured"
            for k, (x, n, _, learned) in enumerate(line.points):
                held_out = line.fit is not None and x == line.fit.held_out_x
                marker = "D" if learned is False else "o"
                axes.errorbar(
                    [x], [float(n.value or 0.0)], yerr=_errors(n), fmt=marker, markersize=5, color=colour, capsize=2,
                    linewidth=1.1,
                    markerfacecolor=CARD if held_out else colour,
                    label="held out of the fit" if held_out and not i else measured if k == 0 else None,
                )  # fmt: skip
        _at_places(axes, [x for line in lines for x, *_ in line.points])
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:.3g}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        axes.set_xlabel(x_name)
        axes.set_ylabel(y_name)
        _legend(axes, len(lines))
        return to_svg(figure, f"{y_name} over {x_name}")


def _law(axes: Any, line: Line, colour: str, dashes: str) -> None:
    """The fitted law over the line's points, with its band."""
    if line.fit is None:
        return
    xs = np.geomspace(line.points[0][0], line.points[-1][0], 60)
    low, middle, high = line.fit.band(xs)
    label = line.fit.formula if not line.name else None
    axes.plot(xs, middle, color=colour, linewidth=1.6, linestyle=dashes, label=label)
    axes.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)


def _style(i: int) -> tuple[str, str]:
    """Colour and dashes of the i-th line: other dashes where the colours begin again."""
    return SERIES[i % len(SERIES)], _DASHES[i // len(SERIES) % len(_DASHES)]


def _at_places(axes: Any, xs: Sequence[float]) -> None:
    """Ticks at the places that were tried, and nowhere else."""
    axes.xaxis.set_major_locator(FixedLocator(sorted(set(xs))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _legend(axes: Any, num_lines: int) -> None:
    """Inside for one line, beside the axes for more."""
    beside = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if num_lines > 1 else {}
    axes.legend(frameon=False, **beside)


def efficiency(lines: Sequence[Line], x_name: str) -> Drawing:
    """Rate for each worker over the number of workers, as a share of that of the fewest; 1: a perfect scaling."""
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xscale("log")
        axes.axhline(1.0, color=LINE, linewidth=1.2)
        for i, line in enumerate(lines):
            known = [(n, share.value) for n, share in efficiencies(line.points)]
            xs, shares = [n for n, _ in known], [float(share or 0.0) for _, share in known]
            colour, dashes = _style(i)
            axes.plot(xs, shares, "o", linestyle=dashes, color=colour, markersize=4, linewidth=1.6, label=line.name)
        _at_places(axes, [x for line in lines for x, *_ in line.points])
        axes.set_ylim(0.0, None)
        axes.set_xlabel(x_name)
        axes.set_ylabel("efficiency")
        if any(line.name for line in lines):
            _legend(axes, len(lines))
        return to_svg(figure, f"efficiency over {x_name}")


def forest(panels: Sequence[tuple[str, Mapping[str, Number]]], names: Mapping[str, str], zero: bool) -> Drawing:
    """A dot with its interval for each row, a panel for each metric. zero: numbers are differences, with a line at 0.

    panels: (metric, row -> number), at least one with a number; rows are those of all panels, in the first one's order,
    and stand under their `names`.
    """
    rows = list(dict.fromkeys(name for _, numbers in panels for name in numbers))
    across = min(len(panels), _PANELS_ACROSS)
    down = math.ceil(len(panels) / across)
    with rc_context({**STYLE, "axes.grid.axis": "x"}):
        figure = Figure(figsize=(WIDTH, down * (0.26 * len(rows) + 0.75)), layout="constrained")
        grid = figure.subplots(down, across, squeeze=False, sharey=True)
        for axes, (metric, numbers) in zip(grid.flat, panels, strict=False):
            if zero:
                axes.axvline(0.0, color=MUTED, linewidth=1.0)
            for place, name in enumerate(rows):
                number = numbers.get(name, Number(None))
                if number.value is not None:
                    axes.errorbar([number.value], [place], xerr=_errors(number), color=FIRST, **_DOT)
            axes.set_title(metric, fontsize=9, color=INK)
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.set_ylim(len(rows) - 0.5, -0.5)
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_visible(False)
        for axes in grid[:, 0]:
            axes.set_yticks(range(len(rows)), [_short(names[name], 32) for name in rows])
        return to_svg(figure, ("differences of " if zero else "") + ", ".join(metric for metric, _ in panels))


def _errors(number: Number) -> list[list[float]] | None:
    """Lengths of the error bar below and above, as matplotlib takes them."""
    if number.value is None or number.low is None or number.high is None:
        return None
    return [[max(0.0, number.value - number.low)], [max(0.0, number.high - number.value)]]


def _short(value: Any, most: int = 22) -> str:
    """At most so many characters; what names have in common is mostly in front, so the middle is left out."""
    text = f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
    return text if len(text) <= most else f"{text[: most - 9]}…{text[-8:]}"


def columns_of(table: Table) -> Mapping[str, bool]:
    """Axis -> whether its values are numbers, of the axes with more than one value."""
    return {
        axis: all(isinstance(value, int | float) for value in values_of(table.cells, axis))
        for axis in table.axes
        if len(values_of(table.cells, axis)) > 1
    }
