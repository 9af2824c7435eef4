"""The page, the JSON and the CSV files of a sweep or study, from its table. One self-contained HTML, no network.

OUT/sweep.json or study.json   OUT/table.csv (cells)   OUT/trials.csv (runs)   OUT/report.html
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import fsspec
import yaml

import medim_ray
from medim_ray.data.storage import committed
from medim_ray.studies.effects import axes_of, differences, effects
from medim_ray.studies.figures import Drawing, interval_bar, to_png
from medim_ray.studies.fit import Line, Measured, efficiencies, fit_line
from medim_ray.studies.gallery import templates
from medim_ray.studies.origin import package_commit, this_machine
from medim_ray.studies.outcome import Number, needs_probe, told
from medim_ray.studies.results import STATES, Run, Table, make_table, named, num_done, short, to_csv
from medim_ray.studies.space import MEMBER
from medim_ray.studies.study_figures import columns_of, curves, efficiency, forest, heat_map, parallel, rungs, scaling
from medim_ray.studies.trials import Report
from medim_ray.track.aim_run import repo_of, show_pictures

REPORT = "report.html"
KINDS = ("sweep", "study")
_MAX_FIELDS = 80  # of a heat map
_SHOWN = 6  # numbers beside the metric in a table on screen
# metric -> name of a cell or baseline -> its number less the reference's
Differences = Mapping[str, Mapping[str, Number]]
_PACKAGES = ("medim-ray", "ray", "torch", "deepspeed", "timm", "transformers")


@dataclass(frozen=True, kw_only=True)
class Study:
    """What a table was made for. kind: `sweep` or `study`, the name of its JSON; config: the resolved options.

    reference: name of the cell that the others are compared with, '' for none; report: numbers that stand in the table
    beside its metric; lines: of a scaling study, with their law and the names of (x, y); origin: when, by which commit
    and where its table was made, empty for one that is made now.
    """

    kind: str
    title: str
    question: str
    config: Mapping[str, Any]
    reference: str = ""
    report: Sequence[str] = ()
    lines: Sequence[Line] = ()
    law: str = ""
    line_names: tuple[str, str] = ("", "")
    origin: Mapping[str, str] = field(default_factory=dict)

    def differences(self, table: Table) -> Differences:
        """Metric -> cell or baseline -> its number less the reference's; {} without a reference."""
        if not self.reference:
            return {}
        found = {metric: differences(table, self.reference, metric) for metric in (table.metric, *self.report)}
        return {metric: numbers for metric, numbers in found.items() if numbers}


def write_study(study: Study, table: Table, out: str, aim_repo: str | None = None) -> str:
    """Writes the four files under `out` (any fsspec URL) and returns the page's path. aim_repo: its figures go into an
    Aim run there too ('': the repository that its runs share); RuntimeError where Aim does not take them."""
    origin = study.origin or {
        "written": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "commit": package_commit(),
        "machine": this_machine(),
        "versions": ", ".join(f"{name} {version(name)}" for name in _PACKAGES),
    }
    compared = study.differences(table)
    table_csv = to_csv(table, compared)
    files = {
        f"{study.kind}.json": json.dumps(_tree(study, table, compared, origin), indent=1, default=vars) + "\n",
        "table.csv": table_csv,
        "trials.csv": _trials_csv(table),
        REPORT: _page(study, table, compared, table_csv, origin),
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


def _tree(study: Study, table: Table, compared: Differences, origin: Mapping[str, str]) -> dict[str, Any]:
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
                "step": cell.step,
                "runs": [vars(run) for run in cell.runs],
            }
            for cell in table.cells
        ],
        "baselines": {baseline.name: baseline.numbers for baseline in table.baselines},
        "title": study.title,
        "reference": study.reference,
        "report": study.report,
        "differences": compared,
        "effects": effects(table, axes_of(study.config)),
        "law": study.law,
        "line_names": study.line_names,
        "lines": [line.to_json() for line in study.lines],
    }


def read_study(out: str) -> tuple[Study, Table] | None:
    """What sweep.json or study.json in `out` says; None where neither is there."""
    fs, root = fsspec.core.url_to_fs(out)
    for kind in KINDS:
        path = f"{root.rstrip('/')}/{kind}.json"
        if fs.exists(path):
            try:
                return _from_tree(json.loads(fs.cat_file(path)))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(
                    f"{path} is damaged ({type(error).__name__}: {error}): the command that wrote it writes it anew, "
                    "and repeats no run that is done"
                ) from None
    return None


def _from_tree(tree: Mapping[str, Any]) -> tuple[Study, Table]:
    runs = []
    for run in (run for cell in tree["cells"] for run in cell["runs"]):
        report = vars(Report.from_json(run))
        earlier = tuple(map(Report.from_json, run.get("earlier", ())))
        runs.append(Run(**{**run, **report, "earlier": earlier, "commits": tuple(run.get("commits", ()))}))
    lines = []
    for line in tree.get("lines", ()):
        points = [Measured(x, Number(**number), *rest) for x, number, *rest in line["points"]]
        lines.append(fit_line(line["name"], points, tree["law"], line["hold_out"]))
    x_name, y_name = tree.get("line_names", ("", ""))
    study = Study(
        kind=tree["kind"],
        title=tree["title"],
        question=tree["question"],
        config=tree["config"],
        reference=tree["reference"],
        report=tuple(tree.get("report", ())),
        lines=tuple(lines),
        law=tree.get("law", ""),
        line_names=(x_name, y_name),
        origin={name: tree[name] for name in ("written", "commit", "machine", "versions")},
    )
    return study, make_table(runs, tree["metric"])


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


def _page(study: Study, table: Table, compared: Differences, table_csv: str, origin: Mapping[str, str]) -> str:
    known = [row.numbers[table.metric] for row in table.rows if table.metric in row.numbers]
    edges = [part for n in known for part in (n.value, n.low, n.high) if part is not None] or [0.0, 1.0]
    room = 0.05 * (max(edges) - min(edges)) or 0.5
    counts = [(str(table.count(state)), state) for state in STATES if table.count(state)]
    seconds = sum(run.seconds for run in table.runs)
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
            shown=study.report or table.metrics[1 : _SHOWN + 1],
            differences=compared,
            efficiencies=_efficiencies(study),
            named=named,
            num_done=num_done,
            made_at=_made_at(table),
            probed=needs_probe([table.metric, *study.report]),
            short=short,
            is_clear=_is_clear,
            figures=figures(study, table),
            effects=effects(table, axes_of(study.config)),
            told=told,
            config=yaml.safe_dump(dict(study.config), sort_keys=False, allow_unicode=True),
            errors=[(run.name, run.error) for run in table.runs if run.error],
            csv=table_csv,
        )
    )


def _made_at(table: Table) -> str:
    """`27 runs at a1b2c3, 3 at a1b2c3 and d4e5f6`: the commits by which the runs were trained and probed."""
    counts = Counter(" and ".join(filter(None, run.commits)) for run in table.runs if run.is_done)
    told = [f"{num} run{'s' * (num > 1)} at {commits}" for commits, num in sorted(counts.items()) if commits]
    unknown = [f"{counts['']} from before commits were noted"] if counts[""] else []
    return ", ".join([*told, *unknown])


def _efficiencies(study: Study) -> list[tuple[str, float, Number, Number]]:
    """(line, x, rate, efficiency) of the points of a speed-up; [] for other studies."""
    if study.law != "amdahl":
        return []
    return [
        (line.name, x, rate, share)
        for line in study.lines
        for (x, rate, *_), (_, share) in zip(line.points, efficiencies(line.points), strict=False)
    ]


def figures(study: Study, table: Table) -> list[tuple[str, Drawing]]:
    """(caption, SVG) of what can be drawn of this table."""
    if not any(table.metric in cell.numbers for cell in table.cells):
        return []
    made: list[tuple[str, Drawing]] = []
    lines = [line for line in study.lines if line.points]
    if lines:
        caption = "Measured points with 95 % intervals where there are repetitions"
        caption += ", the fitted law with its band" if any(line.fit for line in lines) else ""
        made.append((caption, scaling(lines, *study.line_names)))
    if study.law == "amdahl" and any(len(line.points) > 1 for line in lines):
        x_name, y_name = study.line_names
        caption = f"Efficiency: {y_name} for each of {x_name}, as a share of that of the fewest"
        made.append((caption, efficiency(lines, x_name)))
    names = {row.name: named(row) for row in table.rows}
    compared = study.differences(table)
    if compared:
        caption = f"Each less {names[study.reference]}, paired by seed, with 95 % intervals"
        made.append((caption, forest(list(compared.items()), names, zero=True)))
    if any(len(run.steps) > 1 for run in table.runs):
        made.append(
            (f"{table.metric} at each step that was reported, a line a run; the best is drawn thick", rungs(table))
        )
    axes = {axis: is_number for axis, is_number in columns_of(table).items() if axis != MEMBER}
    numeric = [axis for axis, is_number in axes.items() if is_number]
    if len(axes) == 2:
        rows, columns = sorted(axes, key=lambda axis: axes[axis])
        if len(table.cells) <= _MAX_FIELDS:
            for metric in (table.metric, *study.report):
                if any(metric in cell.numbers for cell in table.cells):
                    made.append((f"{metric} over {rows} and {columns}", heat_map(table, rows, columns, metric)))
    if numeric and len(axes) <= 2 and not lines:
        other = next((axis for axis in axes if axis != numeric[0]), None)
        made.append(("Means over seeds with 95 % bands", curves(table, numeric[0], other)))
    if len(axes) > 2:
        made.append(("Each line is a cell; gray ones are not ranked", parallel(table)))
    if not made or compared:
        found = [
            (metric, {row.name: row.numbers[metric] for row in table.rows if metric in row.numbers})
            for metric in (table.metric, *study.report)
        ]
        caption = "Means over seeds with 95 % intervals; of a single run its own interval over patients"
        made.append((caption, forest([(metric, panel) for metric, panel in found if panel], names, zero=False)))
    return made


def _is_clear(number: Number | None) -> bool:
    """A difference whose whole interval lies on one side of 0."""
    return number is not None and number.low is not None and number.high is not None and number.low * number.high > 0
