"""The page, the JSON and the CSV files of a sweep or study, from its table. One self-contained HTML, no network.

OUT/sweep.json or study.json   OUT/table.csv (cells)   OUT/trials.csv (runs)   OUT/report.html
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import fsspec
import yaml
from rich.console import Console
from rich.table import Table as RichTable

import medim_ray
from medim_ray.data.storage import committed
from medim_ray.studies.effects import axes_of, effects
from medim_ray.studies.figures import Drawing, interval_bar, to_png
from medim_ray.studies.fit import Fit, fit_law
from medim_ray.studies.gallery import templates
from medim_ray.studies.origin import package_commit, this_machine
from medim_ray.studies.outcome import Number
from medim_ray.studies.results import STATES, Cell, Run, Table, make_table, to_csv
from medim_ray.studies.study_figures import columns_of, curves, heat_map, parallel, scaling
from medim_ray.track.aim_run import repo_of, show_pictures

REPORT = "report.html"
KINDS = ("sweep", "study")
_MAX_FIELDS = 80  # of a heat map
_SHOWN = 6  # numbers beside the metric in a table on screen
_PACKAGES = ("medim-ray", "ray", "torch", "deepspeed", "timm", "transformers")


@dataclass(frozen=True, kw_only=True)
class Study:
    """What a table was made for. kind: `sweep` or `study`, the name of its JSON; config: the resolved options.

    differences: cell -> its metric minus the reference's, paired by seed; reference: its name; fit: of the scaling law
    over `fit_points` (x, number); note: why there is none; origin: when, by which commit and where its table was made,
    empty for one that is made now.
    """

    kind: str
    title: str
    question: str
    config: Mapping[str, Any]
    reference: str = ""
    differences: Mapping[str, Number] = field(default_factory=dict)
    fit: Fit | None = None
    fit_points: Sequence[tuple[float, Number]] = ()
    fit_names: tuple[str, str] = ("", "")
    note: str = ""
    origin: Mapping[str, str] = field(default_factory=dict)


def write_study(study: Study, table: Table, out: str, aim_repo: str | None = None) -> str:
    """Writes the four files under `out` (any fsspec URL) and returns the page's path. aim_repo: its figures go into an
    Aim run there too ('': the repository that its runs share); RuntimeError where Aim does not take them."""
    origin = study.origin or {
        "written": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "commit": package_commit(),
        "machine": this_machine(),
        "versions": ", ".join(f"{name} {version(name)}" for name in _PACKAGES),
    }
    files = {
        f"{study.kind}.json": json.dumps(_tree(study, table, origin), indent=1, default=vars) + "\n",
        "table.csv": to_csv(table),
        "trials.csv": _trials_csv(table),
        REPORT: _page(study, table, origin),
    }
    fs, root = fsspec.core.url_to_fs(out)
    root = root.rstrip("/")
    for name, text in files.items():
        with committed(fs, f"{root}/{name}", scratch=root) as file:
            file.write(text.encode())
    if aim_repo is not None:
        pictures = ((caption, to_png(drawing)) for caption, drawing in figures(study, table))
        show_pictures(repo_of(out, aim_repo), out, pictures, step=0)
    return f"{out.rstrip('/')}/{REPORT}"


def _tree(study: Study, table: Table, origin: Mapping[str, str]) -> dict[str, Any]:
    return {
        "schema_version": 1,
        **origin,
        "kind": study.kind,
        "question": study.question,
        "config": study.config,
        "metric": table.metric,
        "axes": table.axes,
        "cells": [
            {
                "rank": cell.rank,
                "values": cell.values,
                "verdict": cell.verdict,
                "learned": cell.learned,
                "numbers": cell.numbers,
                "gains": cell.gains,
                "runs": [vars(run) for run in cell.runs],
            }
            for cell in table.cells
        ],
        "title": study.title,
        "reference": study.reference,
        "differences": study.differences,
        "effects": effects(table, axes_of(study.config)),
        "fit": study.fit.to_json() if study.fit else None,
        "fit_points": study.fit_points,
        "fit_names": study.fit_names,
        "note": study.note,
    }


def read_study(out: str) -> tuple[Study, Table] | None:
    """What sweep.json or study.json in `out` says; None where neither is there."""
    fs, root = fsspec.core.url_to_fs(out)
    for kind in KINDS:
        path = f"{root.rstrip('/')}/{kind}.json"
        if fs.exists(path):
            return _from_tree(json.loads(fs.cat_file(path)))
    return None


def _from_tree(tree: Mapping[str, Any]) -> tuple[Study, Table]:
    runs = [
        Run(**{**run, "numbers": _numbers(run["numbers"]), "gains": _numbers(run["gains"])})
        for cell in tree["cells"]
        for run in cell["runs"]
    ]
    points = [(x, Number(**number)) for x, number in tree["fit_points"]]
    law = tree["fit"] and fit_law(tree["fit"]["law"], points, hold_out="held_out" in tree["fit"])
    study = Study(
        kind=tree["kind"],
        title=tree["title"],
        question=tree["question"],
        config=tree["config"],
        reference=tree["reference"],
        differences=_numbers(tree["differences"]),
        fit=law or None,
        fit_points=tuple(points),
        fit_names=(tree["fit_names"][0], tree["fit_names"][1]),
        note=tree["note"],
        origin={name: tree[name] for name in ("written", "commit", "machine", "versions")},
    )
    return study, make_table(runs, tree["metric"])


def _numbers(tree: Mapping[str, Any]) -> dict[str, Number]:
    return {name: Number(**number) for name, number in tree.items()}


def _trials_csv(table: Table) -> str:
    names = table.metrics
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    runs = [run for cell in table.cells for run in cell.runs]
    axes = list(dict.fromkeys(axis for run in runs for axis in run.values))
    writer.writerow(["run", *axes, "state", "step", "seconds", *names, "error"])
    for run in runs:
        numbers = [run.numbers.get(name, Number(None)).value for name in names]
        cells = ["" if value is None else f"{value:.6g}" for value in numbers]
        values = [run.values.get(axis, "") for axis in axes]
        writer.writerow([run.name, *values, run.state, run.step, f"{run.seconds:.1f}", *cells, run.error])
    return out.getvalue()


def _page(study: Study, table: Table, origin: Mapping[str, str]) -> str:
    known = [cell.numbers[table.metric] for cell in table.cells if table.metric in cell.numbers]
    edges = [part for n in known for part in (n.value, n.low, n.high) if part is not None] or [0.0, 1.0]
    room = 0.05 * (max(edges) - min(edges)) or 0.5
    counts = [(str(table.count(state)), state) for state in STATES if table.count(state)]
    seconds = sum(run.seconds for cell in table.cells for run in cell.runs)
    return (
        templates()
        .get_template("study.html.j2")
        .render(
            study=study,
            table=table,
            origin=origin,
            package=medim_ray.__version__,
            counts=counts,
            seconds=seconds,
            bar=lambda number: interval_bar(vars(number), min(edges) - room, max(edges) + room, None, "trained"),
            shown=table.metrics[1 : _SHOWN + 1],
            figures=figures(study, table),
            effects=effects(table, axes_of(study.config)),
            told=told,
            config=yaml.safe_dump(dict(study.config), sort_keys=False, allow_unicode=True),
            errors=[(run.name, run.error) for cell in table.cells for run in cell.runs if run.error],
            csv=to_csv(table),
        )
    )


def figures(study: Study, table: Table) -> list[tuple[str, Drawing]]:
    """(caption, SVG) of what can be drawn of this table."""
    if not any(table.metric in cell.numbers for cell in table.cells):
        return []
    made: list[tuple[str, Drawing]] = []
    if study.fit_points:
        caption = "Measured points with 95 % intervals"
        caption += ", the fitted law with its band" if study.fit else ""
        made.append((caption, scaling(study.fit_points, study.fit, *study.fit_names)))
    axes = columns_of(table)
    numeric = [axis for axis, is_number in axes.items() if is_number]
    if len(axes) == 2:
        rows, columns = sorted(axes, key=lambda axis: axes[axis])
        if len(table.cells) <= _MAX_FIELDS:
            made.append((f"{table.metric} over {rows} and {columns}", heat_map(table, rows, columns)))
    if numeric and len(axes) <= 2 and not study.fit_points:
        other = next((axis for axis in axes if axis != numeric[0]), None)
        made.append(("Means over seeds with 95 % bands", curves(table, numeric[0], other)))
    if len(axes) > 2:
        made.append(("Each line is a cell; gray ones are not ranked", parallel(table)))
    return made


def told(number: Number | None, digits: int = 3) -> str:
    """`0.712 [0.68, 0.74]`; a dash where undefined."""
    if number is None or number.value is None:
        return "-"
    if number.low is None or number.high is None:
        return f"{number.value:.{digits}g}"
    return f"{number.value:.{digits}g} [{number.low:.{digits}g}, {number.high:.{digits}g}]"


def print_table(study: Study, table: Table, console: Console) -> None:
    """The ranked table on a terminal, and below it what each axis does."""
    shown = RichTable(title=f"ranked by {table.metric}: mean [95 % interval]")
    shown.add_column("rank", justify="right")
    for axis in table.axes:
        shown.add_column(axis, no_wrap=True)
    gains = any(table.metric in cell.gains for cell in table.cells)
    shown.add_column(table.metric, no_wrap=True)
    if gains:
        shown.add_column("minus untrained", no_wrap=True)
    if study.differences:
        shown.add_column(f"minus {study.reference}", no_wrap=True)
    shown.add_column("runs", justify="right")
    shown.add_column("", no_wrap=True)
    for cell in table.cells:
        shown.add_row(*_row(study, table, cell, gains))
    console.print(shown)
    for effect in effects(table, axes_of(study.config)):
        console.print(
            f"{effect.axis}: {effect.value} less {effect.reference}, all else equal: {table.metric} "
            f"{told(effect.difference)} ({effect.num_pairs} pairs)"
        )


def _row(study: Study, table: Table, cell: Cell, gains: bool) -> list[str]:
    row = ["" if cell.rank is None else str(cell.rank), *(str(cell.values.get(axis, "")) for axis in table.axes)]
    row.append(told(cell.numbers.get(table.metric)))
    if gains:
        row.append(told(cell.gains.get(table.metric)))
    if study.differences:
        row.append("reference" if cell.name == study.reference else told(study.differences.get(cell.name)))
    return [*row, str(len(cell.runs)), cell.verdict]
