"""Source `nih`: NIH ChestX-ray14 with its labels, test list and boxes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa

from medim_ray.data.sources.base import SOURCES, Row, Sample, described, plain_sample, plan_rows, read_image
from medim_ray.data.sources.files import exists, join, list_files, read_text
from medim_ray.data.sources.published import (
    ViewedConfig,
    box_mask,
    check_root,
    keep_views,
    official,
    person,
    region,
    view_of,
)
from medim_ray.data.sources.tables import columns

_TABLES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
_BOXES = "BBox_List_2017.csv"
FINDINGS = (
    *("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Emphysema", "Fibrosis", "Hernia"),
    *("Infiltration", "Mass", "Nodule", "Pleural_Thickening", "Pneumonia", "Pneumothorax"),
)


@SOURCES.register("nih")
class NihSource:
    """NIH ChestX-ray14: fourteen findings, the official test list, boxes of eight findings as truth.

    Images lie in images_001/images … images_012/images as published, or all in images/.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(ViewedConfig):
        name: str = described("nih", "nih")
        official_split: bool = described(
            True, "test_list.txt is the test set, other patients are dealt 9:1 to train and val; false: by `split`"
        )

    def __init__(self, config: Config) -> None:
        check_root(config, *_TABLES)
        self.config = config
        self.name = config.name

    def plan(self) -> pa.Table:
        """See `Source`. An image that the table lists and no folder holds is a row that can't be read."""
        root = self.config.path
        url = next(url for url in (join(root, name) for name in _TABLES) if exists(url))
        names = ["Image Index", "Finding Labels", "Patient ID", "Patient Age", "Patient Gender", "View Position"]
        table = columns(url, names)
        places = {name.rpartition("/")[2]: name for name in list_files(root) if name.endswith(".png")}
        test = set(read_text(join(root, "test_list.txt")).split()) if self.config.official_split else set()
        rows = []
        for image, labels, patient, age, sex, position in zip(*(table[name] for name in names), strict=True):
            view, found = view_of(position), labels.split("|")
            rows.append(
                Row(
                    image_id=image,
                    location=join(root, places.get(image, f"images/{image}")),
                    patient_id=patient,
                    view=view,
                    split=official(patient, image in test) if self.config.official_split else "",
                    labels={**person(view, sex, age), **{name: str(int(name in found)) for name in FINDINGS}},
                )
            )
        return plan_rows(keep_views(rows, self.config.views, root))

    def sample(self, row: Mapping[str, Any]) -> Sample:
        """See `Source`."""
        picture = read_image(row["location"])
        height, width = picture.image_HW.shape
        truth = [
            lesion
            for finding, boxes in _boxes(self.config.path).get(row["image_id"], {}).items()
            for lesion in region(finding, box_mask(boxes, (height, width)))
        ]
        return plain_sample(row, picture, truth=tuple(truth))


@lru_cache(maxsize=2)
def _boxes(root: str) -> dict[str, dict[str, list[tuple[float, float, float, float]]]]:
    """Image -> finding -> boxes. The header's "Bbox [x,y,w,h]" is unquoted, so that it is four columns."""
    if not exists(join(root, _BOXES)):
        return {}
    table = columns(join(root, _BOXES), ["Image Index", "Finding Label", "Bbox [x", "y", "w", "h]"])
    found: dict[str, dict[str, list[tuple[float, float, float, float]]]] = {}
    for image, finding, *numbers in zip(*table.values(), strict=True):
        x, y, width, height = map(float, numbers)
        name = {"Infiltrate": "Infiltration"}.get(finding, finding)
        found.setdefault(image, {}).setdefault(name, []).append((x, y, x + width, y + height))
    return found
