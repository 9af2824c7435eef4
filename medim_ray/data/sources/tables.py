"""Delimited tables at any fsspec URL as Arrow tables of strings, with faults named by row and never quoted."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv

from medim_ray.data.sources.base import absolute, missing_column
from medim_ray.data.sources.files import read_bytes, readable
from medim_ray.data.storage import opened, retried


def read_table(
    url: str, wanted: Sequence[tuple[str, str]], optional: Sequence[str] = (), option: str = "source.path"
) -> pa.Table:
    """The columns `wanted` [(option that names it, column)] and those `optional` ones that are there, as strings.

    A null is ''. Blanks around a column's name don't count. ValueError: no such file, not UTF-8, a column that is not
    there, rows with another number of fields than the header, no row.
    """
    return pa.concat_tables(read_tables(url, wanted, optional, option))


def read_tables(
    url: str, wanted: Sequence[tuple[str, str]], optional: Sequence[str] = (), option: str = "source.path"
) -> Iterator[pa.Table]:
    """What `read_table` returns, piece by piece: a table of millions of rows need not be in memory as it is."""
    with readable(url, option), contextlib.ExitStack() as files:
        file = opened(absolute(url), compression="infer")
        yield from _read(retried(url, lambda: _Rejoined(files.enter_context(file))), url, wanted, optional, option)


class _Rejoined:
    """A file whose first megabyte was read, and is read again: servers and packed files can't go back."""

    closed = False

    def __init__(self, file: Any) -> None:
        self._file = file
        self.head: bytes = file.read(1 << 20)
        self._at = 0

    def read(self, num: int = -1) -> bytes:
        """The next bytes."""
        if self._at < len(self.head):
            data = self.head[self._at :] if num < 0 else self.head[self._at : self._at + num]
            self._at += len(data)
            return data
        rest: bytes = self._file.read(num)
        return rest

    def close(self) -> None:
        """Called by PyArrow; the file below is closed by its owner."""
        self.closed = True


def _read(
    file: _Rejoined, url: str, wanted: Sequence[tuple[str, str]], optional: Sequence[str], option: str
) -> Iterator[pa.Table]:
    if not file.head.strip():
        raise ValueError(f"{option}={url} is an empty file: nothing to prepare")
    broken = (
        f"{option}={url} is no CSV in UTF-8 with a header line: convert it, for example by `iconv -f LATIN1 -t UTF-8`"
    )
    try:
        header = file.head.partition(b"\n")[0].decode("utf-8-sig")
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
        reader = pacsv.open_csv(
            pa.PythonFile(file, mode="r"),
            read_options=pacsv.ReadOptions(use_threads=False),  # row numbers are known only in one thread
            parse_options=pacsv.ParseOptions(newlines_in_values=True, invalid_row_handler=note),
            convert_options=pacsv.ConvertOptions(
                include_columns=stored, column_types=dict.fromkeys(stored, pa.string()), strings_can_be_null=False
            ),
        )
        num_rows = 0
        for batch in reader:
            num_rows += batch.num_rows
            yield pa.Table.from_batches([batch]).rename_columns(names)
    except (pa.ArrowInvalid, pa.ArrowKeyError):
        raise ValueError(broken) from None
    if bad_rows:
        lines = ", ".join(str(n) for n in bad_rows[:5])
        raise ValueError(
            f"{len(bad_rows)} rows of {url} have another number of fields than the header "
            f"(row {lines}): quote the fields that hold commas"
        )
    if num_rows == 0:
        raise ValueError(f"{option}={url} has a header and no row: nothing to prepare")


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
