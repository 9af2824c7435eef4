"""Sources `chexpert` and `brax`: tables with CheXpert's fourteen labels, and the policies for uncertain ones."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from medim_ray.data.sources.base import SOURCES, Row, Sample, described, plain_sample, plan_rows, read_image
from medim_ray.data.sources.files import exists, join
from medim_ray.data.sources.published import (
    CHEXPERT_LABELS,
    UncertainConfig,
    check_root,
    chexpert_value,
    dicom_sample,
    keep_views,
    person,
    view_of,
)
from medim_ray.data.sources.tables import columns

_SPLITS = {"train.csv": "train", "valid.csv": "val", "test.csv": "test"}
_BRAX_TABLES = ("master_spreadsheet_update.csv", "master_spreadsheet.csv")


@SOURCES.register("chexpert")
class ChexpertSource:
    """CheXpert-v1.0 and CheXpert-v1.0-small: train.csv, valid.csv and, where it lies there, test.csv.

    Labels that the reports do not mention are left out.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(UncertainConfig):
        name: str = described("chexpert", "chexpert")
        official_split: bool = described(True, "train, valid, test as published; false: deal patients by `split`")

    def __init__(self, config: Config) -> None:
        check_root(config, "train.csv", "valid.csv")
        self.config = config
        self.name = config.name

    def plan(self) -> pa.Table:
        """See `Source`."""
        rows: list[Row] = []
        for name, split in _SPLITS.items():
            if exists(join(self.config.path, name)):
                rows += self._table(name, split if self.config.official_split else "")
        return plan_rows(keep_views(rows, self.config.views, self.config.path))

    def sample(self, row: Mapping[str, Any]) -> Sample:
        """See `Source`."""
        return plain_sample(row, read_image(row["location"]))

    def _table(self, name: str, split: str) -> list[Row]:
        about = ("Sex", "Age", "Frontal/Lateral", "AP/PA")
        table = columns(join(self.config.path, name), ["Path", *CHEXPERT_LABELS], about)
        rows = []
        for at, path in enumerate(table["Path"]):
            # Path begins with the name of the release ("CheXpert-v1.0-small/train/patient00001/..."), not of the folder
            inside = re.sub(r"^CheXpert-v1\.0[^/]*/", "", path)
            patient = re.search(r"patient\d+", path)
            side = view_of(table["Frontal/Lateral"][at])
            view = "LATERAL" if side == "LATERAL" else view_of(table["AP/PA"][at]) or side
            stated = {label: chexpert_value(table[label][at], self.config.uncertain) for label in CHEXPERT_LABELS}
            rows.append(
                Row(
                    image_id=inside.rpartition(".")[0],
                    location=join(self.config.path, inside),
                    patient_id=patient[0] if patient else "",
                    view=view,
                    split=split,
                    labels={**person(view, table["Sex"][at], table["Age"][at]), **stated},
                )
            )
        return rows


@SOURCES.register("brax")
class BraxSource:
    """BRAX 1.0/1.1: Brazilian chest radiographs with CheXpert labels; the PNG or the DICOM files.

    There is no official split and no report.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(UncertainConfig):
        name: str = described("brax", "brax")
        images: Literal["png", "dicom"] = described("png", "png (images/) or dicom (Anonymized_DICOMs/)")

    def __init__(self, config: Config) -> None:
        check_root(config, *_BRAX_TABLES)
        self.config = config
        self.name = config.name

    def plan(self) -> pa.Table:
        """See `Source`."""
        urls = [join(self.config.path, name) for name in _BRAX_TABLES]
        path_column = {"png": "PngPath", "dicom": "DicomPath"}[self.config.images]
        about = ("PatientSex", "PatientAge", "ViewPosition")
        url = next(url for url in urls if exists(url))
        table = columns(url, [path_column, "PatientID", *CHEXPERT_LABELS], about)
        rows = []
        for at, path in enumerate(table[path_column]):
            view = view_of(table["ViewPosition"][at])
            stated = {label: chexpert_value(table[label][at], self.config.uncertain) for label in CHEXPERT_LABELS}
            rows.append(
                Row(
                    image_id=path.rpartition(".")[0],
                    location=join(self.config.path, path),
                    patient_id=table["PatientID"][at],
                    view=view,
                    labels={**person(view, table["PatientSex"][at], table["PatientAge"][at]), **stated},
                )
            )
        return plan_rows(keep_views(rows, self.config.views, self.config.path))

    def sample(self, row: Mapping[str, Any]) -> Sample:
        """See `Source`."""
        return dicom_sample(row) if self.config.images == "dicom" else plain_sample(row, read_image(row["location"]))
