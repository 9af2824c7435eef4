"""Source `csv`: a table of image files and reports at any fsspec URL, columns named by option."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from medim_ray.data.sources.base import SOURCES, Sample, absolute, described, plain_sample, plan_table, read_image
from medim_ray.data.sources.tables import read_tables


@SOURCES.register("csv")
class CsvSource:
    """A table (CSV) of image or DICOM files and reports, columns by option.

    One row an image. Paths in the image column are absolute, URLs, or relative to `image_root`.
    """

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
        pieces, unnamed = [], 0
        for table in self._read():  # piece by piece: a million rows fit in little memory
            piece = self._plan_of(table)
            unnamed += pc.sum(pc.equal(piece["image_id"], "")).as_py() or 0
            pieces.append(piece)
        if unnamed:
            raise ValueError(
                f"{unnamed} rows of {config.path} have no image id in {config.id_column or config.image_column!r}: "
                "fill the column or name another one as source.id_column"
            )
        return pa.concat_tables(pieces)

    def _plan_of(self, table: pa.Table) -> pa.Table:
        config = self.config
        empty = pa.repeat("", table.num_rows)

        def column(name: str) -> Any:
            return pc.utf8_trim_whitespace(table[name]) if name else empty

        files = column(config.image_column)
        labels = {}
        for name in config.label_columns:
            values = column(name)
            labels[name] = pc.if_else(pc.equal(values, ""), pa.scalar(None, pa.string()), values)
        return plan_table(
            image_id=column(config.id_column) if config.id_column else files,
            patient_id=column(config.patient_column),
            location=self._locations(files),
            view=column(config.view_column),
            report=column(config.report_column),
            split=column(config.split_column),
            labels=labels,
        )

    def sample(self, row: Mapping[str, Any]) -> Sample:
        """See `Source`."""
        return plain_sample(row, read_image(row["location"]))

    def _read(self) -> Iterator[pa.Table]:
        """The needed columns as strings; a null is ''."""
        config = self.config
        options = {
            f"source.{key}": getattr(config, key)
            for key in ("image_column", "report_column", "id_column", "patient_column", "view_column", "split_column")
        }
        wanted = [(key, name) for key, name in options.items() if name]
        wanted += [("source.label_columns", name) for name in config.label_columns]
        return read_tables(config.path, wanted)

    def _locations(self, files: Any) -> Any:
        root = self.config.image_root or absolute(self.config.path).rpartition("/")[0]
        prefix = absolute(root).rstrip("/") + "/"
        is_whole = pc.match_substring_regex(files, r"^/|^$|://")
        return pc.if_else(is_whole, files, pc.binary_join_element_wise(prefix, files, ""))
