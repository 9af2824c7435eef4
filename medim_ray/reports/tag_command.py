"""The body of `medim-ray tag`: headings and mentions of every report in a CSV file; the command line is in cli.py."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from medim_ray.reports.mesh import Vocabulary
from medim_ray.reports.sections import untold_spans
from medim_ray.reports.tagger import Mention, Tagger, indexed_headings

__all__ = ["TagSummary", "read_reports", "run_tag"]

_LONGEST_FIELD = 2**27  # characters; csv's own limit is 131,072
_ROWS_PER_GROUP = 20_000  # mentions held in memory before a Parquet row group is written


@dataclass(frozen=True)
class TagSummary:
    """What a run of `run_tag` wrote."""

    num_reports: int
    num_mentions: int
    num_without_heading: int


def read_reports(
    path: str, text_columns: Sequence[str], id_column: str, extra_columns: Sequence[str] = ()
) -> tuple[list[str], list[list[str]], list[list[str]]]:
    """(ids, texts of `text_columns`, values of `extra_columns`) of a CSV file with a header; any fsspec URL.

    Raises ValueError for a missing column, an empty file, an empty or repeated id, or a row with too many fields.
    """
    with fsspec.open(path, "rt", encoding="utf-8-sig", errors="replace", newline="") as file:
        csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_FIELD))
        reader = csv.DictReader(file, strict=True)  # a quote that is never closed would swallow the rows after it
        if not reader.fieldnames:
            raise ValueError(
                f"{path}: empty file; it needs a header line with the columns {id_column} and {', '.join(text_columns)}"
            )
        wanted = [id_column, *text_columns, *extra_columns]
        missing = [name for name in wanted if name not in reader.fieldnames]
        if missing:
            raise ValueError(f"{path}: no column {', '.join(missing)}; the file has {', '.join(reader.fieldnames)}")
        rows: dict[str, dict[str, str]] = {}
        first_line: dict[str, int] = {}
        try:
            for row in reader:
                identifier = _checked_id(row, id_column, f"{path}: line {reader.line_num}")
                if identifier in rows:
                    raise ValueError(
                        f"{path}: {id_column} of line {reader.line_num} repeats line {first_line[identifier]}; "
                        "ids must be unique"
                    )
                rows[identifier], first_line[identifier] = row, reader.line_num
        except csv.Error as error:
            raise ValueError(f"{path}: after line {reader.line_num} it is no CSV ({error}): is a quote open?") from None
    if not rows:
        raise ValueError(f"{path}: a header and no reports; nothing to tag")
    texts = [[row[name] or "" for name in text_columns] for row in rows.values()]
    return list(rows), texts, [[row[name] or "" for name in extra_columns] for row in rows.values()]


def _checked_id(row: dict[str, str], id_column: str, place: str) -> str:
    identifier = (row[id_column] or "").strip()
    if not identifier:
        raise ValueError(f"{place} has no {id_column}; every report needs an id")
    if None in row:
        raise ValueError(f"{place} has more fields than the header; quote texts that contain commas")
    return identifier


def run_tag(
    reports_csv: str,
    *,
    text_columns: Sequence[str],
    id_column: str,
    out: str,
    mentions: str | None = None,
    vocabulary: str | None = None,
) -> TagSummary:
    """Tag each report and write `out` (CSV: `<id_column>,headings`, headings joined by ';').

    `mentions` names a Parquet file for every mention: the id, `column` (the text column), start and end in characters
    of that column, text, heading, tree_numbers, category, assertion, side, zone, course, sentence, negated.
    `vocabulary` names an NLM MeSH file, which is added to the bundled terms. All paths are fsspec URLs. Mentions under
    the headings indication, comparison or technique of a whole report are mentions, and give no heading. Errors as in
    `read_reports`; ValueError where a file would be written over another.
    """
    if not text_columns:
        raise ValueError(
            "text_columns is empty; name at least one column with report text, such as findings,impression"
        )
    _check_paths(reports_csv, out, mentions)
    if id_column in _OWN_FIELDS and mentions:
        raise ValueError(
            f"id_column={id_column!r}: the file of mentions has a column of that name; rename it in {reports_csv}"
        )
    chest = Vocabulary.default()
    tagger = Tagger(chest if vocabulary is None else chest.merged(Vocabulary.from_nlm(vocabulary)))
    ids, texts, _ = read_reports(reports_csv, text_columns, id_column)
    num_mentions = num_without = 0
    rows: list[dict[str, Any]] = []
    schema = _mention_schema(id_column)
    writer = pq.ParquetWriter(sink := fsspec.open(mentions, "wb").open(), schema) if mentions else None
    try:
        with fsspec.open(out, "wt", encoding="utf-8", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow([id_column, "headings"])
            for identifier, columns in zip(ids, texts, strict=True):
                found = [tagger.tag(text) for text in columns]
                headings = indexed_headings(
                    [mention for text, group in zip(columns, found, strict=True) for mention in _told(text, group)]
                )
                table.writerow([identifier, ";".join(headings)])
                num_without += not headings
                num_mentions += sum(map(len, found))
                if writer is not None:
                    for name, group in zip(text_columns, found, strict=True):
                        rows += [_mention_row(id_column, identifier, name, mention) for mention in group]
                    if len(rows) >= _ROWS_PER_GROUP:
                        writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                        rows = []
        if writer is not None:
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    finally:
        if writer is not None:
            writer.close()
            sink.close()
    return TagSummary(len(ids), num_mentions, num_without)


def _told(text: str, mentions: list[Mention]) -> list[Mention]:
    """Those of the study itself: not of its indication, comparison or technique."""
    spans = untold_spans(text) if mentions and ":" in text else []
    return [mention for mention in mentions if not any(start <= mention.start < end for start, end in spans)]


def _check_paths(reports_csv: str, out: str, mentions: str | None) -> None:
    """ValueError where two of the files are one."""
    named = {"REPORTS.csv": reports_csv, "--out": out, **({"--mentions": mentions} if mentions else {})}
    places: dict[str, str] = {}
    for option, path in named.items():
        fs, place = fsspec.core.url_to_fs(path)
        key = f"{fs.protocol} {Path(place).resolve() if 'file' in fs.protocol else place}"
        if key in places:
            raise ValueError(f"{option} {path} is the file of {places[key]}, which it would write over; name another")
        places[key] = option


def _mention_schema(id_column: str) -> pa.Schema:
    fields = [(id_column, pa.string()), ("column", pa.string()), ("start", pa.int32()), ("end", pa.int32())]
    fields += [("text", pa.string()), ("heading", pa.string()), ("tree_numbers", pa.list_(pa.string()))]
    fields += [(name, pa.string()) for name in ("category", "assertion", "side", "zone", "course")]
    return pa.schema([*fields, ("sentence", pa.int32()), ("negated", pa.bool_())])


_OWN_FIELDS = frozenset(_mention_schema("").names[1:])


def _mention_row(id_column: str, identifier: str, column: str, mention: Mention) -> dict[str, Any]:
    row = mention._asdict()
    row["tree_numbers"] = list(mention.tree_numbers)
    return {id_column: identifier, "column": column, **row}
