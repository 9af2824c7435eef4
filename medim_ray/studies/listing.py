"""The ranked table of a sweep or study on a terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from medim_ray.studies.effects import axes_of, effects
from medim_ray.studies.outcome import Number, told
from medim_ray.studies.page import Study
from medim_ray.studies.results import Baseline, Cell, Table, named, num_done, short


def print_table(study: Study, table: Table, console: Console) -> None:
    """The ranked table on a terminal, and below it what each axis does."""
    shown = RichTable(title=f"ranked by {table.metric}: mean [95 % interval]")
    shown.add_column("rank", justify="right")
    for column in table.columns:
        shown.add_column(escape(column), no_wrap=True)
    gains = any(table.metric in cell.gains for cell in table.cells)
    shown.add_column(table.metric, no_wrap=True)
    if gains:
        shown.add_column("minus untrained", no_wrap=True)
    compared = study.differences(table)
    if compared:
        shown.add_column(f"minus {study.reference}", no_wrap=True)
    shown.add_column("runs", justify="right")
    shown.add_column("", no_wrap=True)
    for row in table.rows:
        shown.add_row(*map(escape, _row(study, table, row, gains, compared)))
    console.print(shown)
    for metric in study.report:
        console.print(_beside(study, table, metric, compared.get(metric, {})))
    for effect in effects(table, axes_of(study.config)):
        console.print(
            f"{effect.axis}: {effect.value} less {effect.reference}, all else equal: {table.metric} "
            f"{told(effect.difference)} ({effect.num_pairs} pairs)"
        )


def _beside(study: Study, table: Table, metric: str, compared: Mapping[str, Number]) -> RichTable:
    """A further number of the rows."""
    shown = RichTable(title=metric)
    shown.add_column("", no_wrap=True)
    shown.add_column(escape(metric), no_wrap=True)
    if compared:
        shown.add_column(escape(f"minus {study.reference}"), no_wrap=True)
    for row in table.rows:
        cells = [named(row), told(row.numbers.get(metric))]
        if compared:
            cells.append("reference" if row.name == study.reference else told(compared.get(row.name)))
        shown.add_row(*map(escape, cells))
    return shown


def _row(
    study: Study, table: Table, row: Cell | Baseline, gains: bool, compared: Mapping[str, Mapping[str, Number]]
) -> list[str]:
    cell = row if isinstance(row, Cell) else None
    out = [str(cell.rank or "") if cell else "", *map(short, table.place(row)), told(row.numbers.get(table.metric))]
    if gains:
        out.append(told(cell.gains.get(table.metric)) if cell else "")
    if compared:
        difference = compared.get(table.metric, {}).get(row.name)
        out.append("reference" if row.name == study.reference else told(difference))
    return [*out, num_done(cell) if cell else "", cell.verdict if cell else "baseline"]
