"""Sources `covidx` (COVIDx CXR) and `covid19_images` (the COVID-19 Image Data Collection)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from medim_ray.data.sources.base import SOURCES, Row, Sample, described, plain_sample, plan_rows, read_image
from medim_ray.data.sources.files import exists, join, read_text
from medim_ray.data.sources.published import (
    PublishedConfig,
    ViewedConfig,
    check_root,
    keep_views,
    official,
    person,
    view_of,
)
from medim_ray.data.sources.tables import columns

_CLASSES = ("positive", "negative", "normal", "pneumonia", "COVID-19")
_LISTS = {  # split -> lists of the releases, newest first
    "train": ("train.txt", "train_COVIDx9B.txt", "train_COVIDx9A.txt", "train_COVIDx8B.txt", "train_COVIDx8A.txt"),
    "val": ("val.txt",),
    "test": ("test.txt", "test_COVIDx9B.txt", "test_COVIDx9A.txt", "test_COVIDx8B.txt", "test_COVIDx8A.txt"),
}


@SOURCES.register("covidx")
class CovidxSource:
    """COVIDx CXR (2 to 4; lists of 8 and 9): folders train, val, test and their lists.

    Labels are `class` as published and COVID-19 as 1 or 0. A release without val.txt has its training patients dealt
    9:1.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PublishedConfig):
        name: str = described("covidx", "covidx")
        official_split: bool = described(True, "the published lists; false: deal patients by `split`")

    def __init__(self, config: Config) -> None:
        check_root(config, *_LISTS["train"])
        self.config = config
        self.name = config.name

    def plan(self) -> pa.Table:
        """See `Source`. ValueError: a line that is none of the list."""
        root, rows = self.config.path, []
        has_val = exists(join(root, "val.txt"))
        for split, names in _LISTS.items():
            name = next((name for name in names if exists(join(root, name))), "")
            for number, line in enumerate(read_text(join(root, name)).splitlines() if name else (), 1):
                if not line.strip():
                    continue
                patient, file, kind, origin = _fields(line, name, number)
                is_covid = kind in ("positive", "COVID-19")
                held_out = split == "test"
                given = split if has_val else official(f"{origin} {patient}", held_out)
                rows.append(
                    Row(
                        image_id=f"{split}/{file}",
                        location=join(root, f"{split}/{file}"),
                        patient_id=f"{origin} {patient}".strip(),  # sources number their patients on their own
                        split=given if self.config.official_split else "",
                        labels={
                            "class": kind,
                            "COVID-19": str(int(is_covid)),
                            "origin": origin,
                        },
                    )
                )
        return plan_rows(rows)

    def sample(self, row: Mapping[str, Any]) -> Sample:
        """See `Source`."""
        return plain_sample(row, read_image(row["location"]))


def _fields(line: str, name: str, number: int) -> tuple[str, str, str, str]:
    """(patient, file, class, origin) of "patient file class [origin]"; names of patients may hold blanks."""
    parts = line.split()
    if len(parts) >= 4 and parts[-2] in _CLASSES:
        return " ".join(parts[:-3]), parts[-3], parts[-2], parts[-1]
    if len(parts) >= 3 and parts[-1] in _CLASSES:
        return " ".join(parts[:-2]), parts[-2], parts[-1], ""
    raise ValueError(f"line {number} of {name} is not of the form `patient file class origin`")


@SOURCES.register("covid19_images")
class Covid19ImagesSource:
    """COVID-19 Image Data Collection (Cohen et al.): metadata.csv and images/; radiographs with clinical notes.

    Rows of CT are left out. There is no official split.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(ViewedConfig):
        name: str = described("covid19_images", "covid19_images")

    def __init__(self, config: Config) -> None:
        check_root(config, "metadata.csv")
        self.config = config
        self.name = config.name

    def plan(self) -> pa.Table:
        """See `Source`. `finding` is the published path ("Pneumonia/Viral/COVID-19")."""
        root = self.config.path
        about = ("sex", "age", "survival", "folder", "clinical_notes")
        table = columns(join(root, "metadata.csv"), ["patientid", "finding", "view", "modality", "filename"], about)
        rows = []
        for at, file in enumerate(table["filename"]):
            if table["modality"][at] != "X-ray":
                continue
            view, finding = view_of(table["view"][at]), table["finding"][at]
            labels = {
                **person(view, table["sex"][at], table["age"][at]),
                "finding": "" if finding == "todo" else finding,
                "COVID-19": "" if finding in ("", "todo", "Unknown") else str(int("COVID-19" in finding)),
                "survival": {"Y": "1", "N": "0"}.get(table["survival"][at], ""),
            }
            rows.append(
                Row(
                    image_id=file,
                    location=join(root, f"{table['folder'][at] or 'images'}/{file}"),
                    patient_id=table["patientid"][at],
                    view=view,
                    report=table["clinical_notes"][at],
                    labels=labels,
                )
            )
        return plan_rows(keep_views(rows, self.config.views, root))

    def sample(self, row: Mapping[str, Any]) -> Sample:
        """See `Source`."""
        return plain_sample(row, read_image(row["location"]))
