"""Delimited tables at any fsspec URL as Arrow tables of strings, with faults named by row and never quoted."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv

from medim_ray.data.sources.base import missing_column
from medim_ray.data.sources.files import read_bytes


def read_table(
    url: str, wanted: Sequence[tuple[str, str]], optional: Sequence[str] = (), option: str = "source.path"
) -> pa.Table:
    """The columns `wanted` [(option that names it, column)] and those `optional` ones that are there, as strings.

    A null is ''. Blanks around a column's name don't count. ValueError: no such file, not UTF-8, a column that is not
    there, rows with another number of fields than the header, no row.
    """
    data = read_bytes(url, option)
    if not data.strip():
        raise ValueError(f"{option}={url} is an empty file: nothing to prepare")
    broken = (
        f"{option}={url} is no CSV in UTF-8 with a header line: convert it, for example by `iconv -f LATIN1 -t UTF-8`"
    )
    try:
        header = data.partition(b"\n")[0].decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(broken) from None
    present = {name.strip(): name for name in reversed(next(csv.reader(io.StringIO(header.strip("\r\n"))), []))}
    present = dict(reversed(present.items()))
    for key, name in wanted:
        if name not in present:
            raise missing_column(key, name, list(present), url)
    names = list(dict.fromkeys([*(name for _, name in wanted), *(name for name in optional if name in present)]))
    bad_rows: list[int] = []

    def note(row: Any) -> str:
        bad_rows.append(row.number)
        return "skip"  # collected and reported together, without the text of the row: it may name a patient

    stored = [present[name] for name in names]
    try:
        table = pacsv.read_csv(
            pa.BufferReader(data),
            read_options=pacsv.ReadOptions(use_threads=False),  # row numbers are known only in one thread
            parse_options=pacsv.ParseOptions(newlines_in_values=True, invalid_row_handler=note),
            convert_options=pacsv.ConvertOptions(
                include_columns=stored, column_types=dict.fromkeys(stored, pa.string()), strings_can_be_null=False
            ),
        )
    except (pa.ArrowInvalid, pa.ArrowKeyError):
        raise ValueError(broken) from None
    if bad_rows:
        lines = ", ".join(str(n) for n in bad_rows[:5])
        raise ValueError(
            f"{len(bad_rows)} rows of {url} have another number of fields than the header "
            f"(row {lines}): quote the fields that hold commas"
        )
    if table.num_rows == 0:
        raise ValueError(f"{option}={url} has a header and no row: nothing to prepare")
    return table.rename_columns(names)


def header_of(url: str) -> list[str]:
    """The column names of a published table, stripped."""
    line = read_bytes(url).partition(b"\n")[0].decode("utf-8-sig", errors="replace")
    return [name.strip() for name in next(csv.reader(io.StringIO(line.strip("\r\n"))), [])]


def columns(url: str, names: Sequence[str], optional: Sequence[str] = ()) -> dict[str, list[str]]:
    """Columns of a published table, stripped strings; those `optional` that are not there are ''."""
    table = read_table(url, [("the published column", name) for name in names], optional)
    lists = {name: [text.strip() for text in table[name].to_pylist()] for name in table.column_names}
    for name in optional:
        lists.setdefault(name, [""] * table.num_rows)
    return lists
