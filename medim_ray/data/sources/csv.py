"""Source `csv`: a table of image files and reports at any fsspec URL, columns named by option."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from medim_ray.data.images import read_gray
from medim_ray.data.sources.base import SOURCES, Sample, absolute, described, missing_column, plan_table


@SOURCES.register("csv")
class CsvSource:
    """One row an image. Paths in the image column are absolute, URLs, or relative to `image_root`."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        name: str = described("csv", "csv")
        path: str = described("", "CSV file, path or fsspec URL, UTF-8 with a header line; .gz, .bz2, .xz are unpacked")
        image_root: str = described("", "folder that image paths are relative to; empty: the folder of the CSV")
        image_column: str = described("file", "column with the path or URL of the image")
        report_column: str = described("notes", "column with the text of the report; empty: there are no reports")
        id_column: str = described("image_id", "column with a unique name of the image; empty: the path is the name")
        patient_column: str = described("patient_id", "column with the patient; empty: every image is its own patient")
        view_column: str = described("view", "column with the view position (PA, AP, ...); empty: unknown")
        split_column: str = described("", "column with train, val or test; empty: patients are dealt by `split`")
        label_columns: tuple[str, ...] = described(("view", "sex", "age"), "columns that are kept as labels")

        def __post_init__(self) -> None:
            if not self.image_column:
                raise ValueError("image_column is empty: name the column with the image paths")
            twice = sorted({c for c in self.label_columns if self.label_columns.count(c) > 1})
            if twice:
                raise ValueError(f"label_columns: {', '.join(twice)} is named twice; name every label once")

    def __init__(self, config: Config) -> None:
        if not config.path:
            raise ValueError("source.path is not set: give the CSV file as source.path=…/metadata.csv")
        self.config = config
        self.name = config.name

    def plan(self) -> pa.Table:
        """See `Source`. ValueError: no such file, a column that is not there, no row, ragged rows."""
        config = self.config
        table = self._read()
        empty = pa.repeat("", table.num_rows)

        def column(name: str) -> Any:
            return pc.utf8_trim_whitespace(table[name]) if name else empty

        files = column(config.image_column)
        image_id = column(config.id_column) if config.id_column else files
        unnamed = pc.sum(pc.equal(image_id, "")).as_py()
        if unnamed:
            raise ValueError(
                f"{unnamed} rows of {config.path} have no image id in {config.id_column or config.image_column!r}: "
                "fill the column or name another one as source.id_column"
            )
        labels = {}
        for name in config.label_columns:
            values = column(name)
            labels[name] = pc.if_else(pc.equal(values, ""), pa.scalar(None, pa.string()), values)
        return plan_table(
            image_id=image_id,
            patient_id=column(config.patient_column),
            location=self._locations(files),
            view=column(config.view_column),
            report=column(config.report_column),
            split=column(config.split_column),
            labels=labels,
        )

    def sample(self, row: Mapping[str, Any]) -> Sample:
        """See `Source`."""
        labels = {name: value for name, value in row["labels"].items() if value is not None}
        return Sample(image_HW=read_gray(row["location"]), view=row["view"], report=row["report"], labels=labels)

    def _read(self) -> pa.Table:
        """The needed columns as strings; a null is ''."""
        config = self.config
        options = {
            f"source.{key}": getattr(config, key)
            for key in ("image_column", "report_column", "id_column", "patient_column", "view_column", "split_column")
        }
        wanted = [(key, name) for key, name in options.items() if name]
        wanted += [("source.label_columns", name) for name in config.label_columns]
        bad_rows: list[int] = []

        def note(row: Any) -> str:
            bad_rows.append(row.number)
            return "skip"  # collected and reported together, without the text of the row: it may name a patient

        try:
            with fsspec.open(config.path, "rb", compression="infer") as file:
                data = file.read()
        except FileNotFoundError:
            raise ValueError(f"source.path={config.path}: there is no such file") from None
        except IsADirectoryError:
            raise ValueError(f"source.path={config.path} is a folder: name the CSV file in it") from None
        if not data.strip():
            raise ValueError(f"source.path={config.path} is an empty file: nothing to prepare")
        try:
            header = data.partition(b"\n")[0].decode("utf-8-sig")
            present = next(csv.reader(io.StringIO(header.strip())), [])
            for key, name in wanted:
                if name not in present:
                    raise missing_column(key, name, present, config.path)
            names = list(dict.fromkeys(name for _, name in wanted))
            table = pacsv.read_csv(
                pa.BufferReader(data),
                read_options=pacsv.ReadOptions(use_threads=False),  # row numbers are known only in one thread
                parse_options=pacsv.ParseOptions(newlines_in_values=True, invalid_row_handler=note),
                convert_options=pacsv.ConvertOptions(
                    include_columns=names, column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False
                ),
            )
        except (pa.ArrowInvalid, UnicodeDecodeError, pa.ArrowKeyError):
            raise ValueError(
                f"source.path={config.path} is no CSV in UTF-8 with a header line: convert it, for example by "
                "`iconv -f LATIN1 -t UTF-8`"
            ) from None
        if bad_rows:
            lines = ", ".join(str(n) for n in bad_rows[:5])
            raise ValueError(
                f"{len(bad_rows)} rows of {config.path} have another number of fields than the header "
                f"(row {lines}): quote the fields that hold commas"
            )
        if table.num_rows == 0:
            raise ValueError(f"source.path={config.path} has a header and no row: nothing to prepare")
        return table

    def _locations(self, files: Any) -> pa.Array:
        root = self.config.image_root or absolute(self.config.path).rpartition("/")[0]
        prefix = absolute(root).rstrip("/") + "/"
        names = files.to_pylist()
        return pa.array(
            [f if f.startswith("/") or "://" in f or "::" in f else prefix + f if f else "" for f in names],
            type=pa.string(),
        )
