"""Source `mimic_cxr`: MIMIC-CXR-JPG with the reports of MIMIC-CXR and the official split."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import pyarrow as pa

from medim_ray.data.sources.base import SOURCES, Row, Sample, absolute, described, plain_sample, plan_rows, read_image
from medim_ray.data.sources.files import asked, decode_text, exists, join, list_files, read_texts
from medim_ray.data.sources.published import (
    CHEXPERT_LABELS,
    UncertainConfig,
    check_root,
    chexpert_value,
    keep_views,
    view_of,
)
from medim_ray.data.sources.tables import columns
from medim_ray.data.storage import opened

_TABLE = "mimic-cxr-2.0.0-{}.csv"
_REPORTS_ZIP = "mimic-cxr-reports.zip"


@SOURCES.register("mimic_cxr")
class MimicCxrSource:
    """MIMIC-CXR-JPG 2.0/2.1 with the MIMIC-CXR reports, CheXpert labels and the official split.

    A study's report and labels go with each of its images.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(UncertainConfig):
        name: str = described("mimic_cxr", "mimic_cxr")
        reports_path: str = described(
            "", f"folder or {_REPORTS_ZIP} with files/p10/p…/s….txt; empty: looked for in path; none: do without"
        )
        labeler: Literal["chexpert", "negbio"] = described("chexpert", "whose labels: chexpert or negbio")
        official_split: bool = described(True, "train, validate, test as published; false: deal patients by `split`")

    def __init__(self, config: Config) -> None:
        check_root(config, *_names("metadata"))
        self.config = config
        self.name = config.name

    def plan(self) -> pa.Table:
        """See `Source`. ValueError: a table that is not there, no report where reports are asked for."""
        path = self.config.path
        table = columns(self._url("metadata"), ["dicom_id", "subject_id", "study_id", "ViewPosition"])
        splits = self._splits() if self.config.official_split else {}
        labels = self._labels()
        rows = [
            Row(
                image_id=image,
                location=join(path, f"files/{_study(patient, study)}/{image}.jpg"),
                patient_id=patient,
                view=view_of(view),
                split=splits.get(image, ""),
                labels={"view": view_of(view), **labels.get(study, {})},
            )
            for image, patient, study, view in zip(*table.values(), strict=True)
        ]
        rows = keep_views(rows, self.config.views, path)
        reports = self._reports(sorted({_study_of(row) for row in rows}))
        return plan_rows([replace(row, report=reports.get(_study_of(row), "")) for row in rows])

    def sample(self, row: Mapping[str, Any]) -> Sample:
        """See `Source`."""
        return plain_sample(row, read_image(row["location"]))

    def _url(self, table: str) -> str:
        """A table lies there packed as published, or unpacked."""
        packed, unpacked = (join(self.config.path, name) for name in _names(table))
        return packed if exists(packed) else unpacked

    def _splits(self) -> dict[str, str]:
        table = columns(self._url("split"), ["dicom_id", "split"])
        return dict(zip(table["dicom_id"], table["split"], strict=True))

    def _labels(self) -> dict[str, dict[str, str]]:
        table = columns(self._url(self.config.labeler), ["study_id", *CHEXPERT_LABELS])
        found = {}
        for study, *values in zip(*table.values(), strict=True):
            stated = (chexpert_value(value, self.config.uncertain) for value in values)
            found[study] = {name: value for name, value in zip(CHEXPERT_LABELS, stated, strict=True) if value}
        return found

    def _reports(self, studies: list[str]) -> dict[str, str]:
        """Text by study (p10/p10000032/s50414267)."""
        given, root = self.config.reports_path, self.config.path
        if given == "none":
            return {}
        places = [given] if given else [join(root, _REPORTS_ZIP), join(root, "mimic-cxr-reports"), root]
        for place in places:
            found = _zipped(place, studies) if place.partition("::")[0].endswith(".zip") else _in_folder(place, studies)
            if found:
                return found
        raise ValueError(
            f"no report of these studies in {' or '.join(places)} (files/p10/p…/s….txt): download {_REPORTS_ZIP} of "
            "MIMIC-CXR and name it as source.reports_path=…, or source.reports_path=none"
        )


def _names(table: str) -> tuple[str, str]:
    return f"{_TABLE.format(table)}.gz", _TABLE.format(table)


def _study(patient: str, study: str) -> str:
    return f"p{patient[:2]}/p{patient}/s{study}"


def _study_of(row: Row) -> str:
    return "/".join(row.location.partition("::")[0].split("/")[-4:-1])


def _zipped(url: str, studies: list[str]) -> dict[str, str]:
    if not exists(url):
        return {}

    def read() -> dict[str, str]:
        with opened(absolute(url)) as file, zipfile.ZipFile(file) as archive:
            present = {name.partition("files/")[2]: name for name in archive.namelist() if name.endswith(".txt")}
            wanted = {study: present[f"{study}.txt"] for study in studies if f"{study}.txt" in present}
            return {study: decode_text(archive.read(name)) for study, name in wanted.items()}

    try:
        return asked(url, read, "source.reports_path")
    except zipfile.BadZipFile:
        raise ValueError(f"{url} is no zip file, or was cut off: download it again") from None


def _in_folder(url: str, studies: list[str]) -> dict[str, str]:
    root = join(url, "files")
    if not exists(root):
        return {}
    present = {name for name in list_files(root) if name.endswith(".txt")}
    wanted = [study for study in studies if f"{study}.txt" in present]
    return dict(zip(wanted, read_texts([join(root, f"{study}.txt") for study in wanted]), strict=True))
