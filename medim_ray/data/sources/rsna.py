"""Source `rsna`: the RSNA Pneumonia Detection Challenge of 2018, with its boxes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import pyarrow as pa

from medim_ray.data.sources.base import SOURCES, Row, Sample, described, plan_rows
from medim_ray.data.sources.files import exists, extension, join, list_files, read_bytes
from medim_ray.data.sources.published import PublishedConfig, box_mask, check_root, dicom_sample
from medim_ray.data.sources.tables import columns

_LABELS, _CLASSES = "stage_2_train_labels.csv", "stage_2_detailed_class_info.csv"
_PATIENTS = "pneumonia-challenge-dataset-mappings_2018.json"
_FOLDERS = ("stage_2_train_images", "stage_2_test_images")
Box = tuple[float, float, float, float]


@SOURCES.register("rsna")
class RsnaSource:
    """RSNA Pneumonia (stage 2): DICOM files, pneumonia and its boxes; the test images are rows without labels.

    The challenge's "patientId" names an image. Its patients are known only where RSNA's mapping to NIH ChestX-ray14
    lies beside the tables. View, sex and age come from the headers.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PublishedConfig):
        name: str = described("rsna", "rsna")

    def __init__(self, config: Config) -> None:
        check_root(config, _LABELS)
        self.config = config
        self.name = config.name

    def plan(self) -> pa.Table:
        """See `Source`. An image that the table lists and no folder holds is a row that can't be read."""
        root = self.config.path
        pneumonia = {image: bool(boxes) for image, boxes in _boxes(root).items()}
        classes = self._classes()
        patients = self._patients()
        found = {
            name.rpartition(".")[0]: f"{folder}/{name}"
            for folder in _FOLDERS
            if exists(join(root, folder))
            for name in list_files(join(root, folder))
            if extension(name) == "dcm"
        }
        places = {**{image: f"{_FOLDERS[0]}/{image}.dcm" for image in pneumonia}, **found}
        return plan_rows(
            [
                Row(
                    image_id=image,
                    location=join(root, place),
                    patient_id=patients.get(image, ""),
                    labels={
                        "Pneumonia": str(int(pneumonia[image])) if image in pneumonia else "",
                        "class": classes.get(image, ""),
                    },
                )
                for image, place in places.items()
            ]
        )

    def sample(self, row: Mapping[str, Any]) -> Sample:
        """See `Source`."""
        return dicom_sample(row, {"Pneumonia": partial(box_mask, _boxes(self.config.path).get(row["image_id"], []))})

    def _classes(self) -> dict[str, str]:
        if not exists(join(self.config.path, _CLASSES)):
            return {}
        table = columns(join(self.config.path, _CLASSES), ["patientId", "class"])
        return dict(zip(table["patientId"], table["class"], strict=True))

    def _patients(self) -> dict[str, str]:
        """The patient of NIH ChestX-ray14 by image of the challenge ("00000001_000.png" is of patient 1)."""
        if not exists(join(self.config.path, _PATIENTS)):
            return {}
        entries = json.loads(read_bytes(join(self.config.path, _PATIENTS)))
        return {entry["subset_img_id"]: str(int(entry["img_id"].partition("_")[0])) for entry in entries}


@lru_cache(maxsize=2)
def _boxes(root: str) -> dict[str, list[Box]]:
    """Image -> boxes, [] for images without pneumonia; several rows an image."""
    table = columns(join(root, _LABELS), ["patientId", "x", "y", "width", "height", "Target"])
    found: dict[str, list[Box]] = {}
    for image, *numbers, target in zip(*table.values(), strict=True):
        boxes = found.setdefault(image, [])
        if target == "1":
            x, y, width, height = map(float, numbers)
            boxes.append((x, y, x + width, y + height))
    return found
