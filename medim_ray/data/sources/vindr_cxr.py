"""Source `vindr_cxr`: VinDr-CXR of PhysioNet or Kaggle, with the votes of its readers and their boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import pyarrow as pa

from medim_ray.data.sources.base import SOURCES, Row, Sample, described, plan_rows
from medim_ray.data.sources.files import exists, join
from medim_ray.data.sources.published import PublishedConfig, box_mask, check_root, dicom_sample, official
from medim_ray.data.sources.tables import columns, header_of

_RENAMED = {"Other disease": "Other diseases"}  # the test table's spelling
_ABOUT = ("image_id", "rad_id")
_SPLITS = ("train", "test")
_KAGGLE = "train.csv"
Box = tuple[float, float, float, float]


@SOURCES.register("vindr_cxr")
class VindrCxrSource:
    """VinDr-CXR 1.0: DICOM files, 28 findings by three readers (train) or by consensus (test), boxes as truth.

    A finding's boxes are the union of all readers' boxes, kept where the readers' label is 1. Of the Kaggle release
    (train.csv), a reader's vote is a box, and the test images, which have no labels, are left out.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PublishedConfig):
        name: str = described("vindr_cxr", "vindr_cxr")
        readers: Literal["majority", "any", "all"] = described(
            "majority", "how many of an image's readers make a finding 1: more than half, any, or all"
        )
        official_split: bool = described(
            True, "test as published, training images are dealt 9:1 to train and val; false: by `split`"
        )

    def __init__(self, config: Config) -> None:
        check_root(config, "annotations/image_labels_train.csv", "annotations/image_labels_test.csv", _KAGGLE)
        self.config = config
        self.name = config.name

    def plan(self) -> pa.Table:
        """See `Source`. The dataset names no patients: every image is its own."""
        rows = []
        for split in _SPLITS:
            for image, votes in _votes(self.config.path, split).items():
                given = official(image, split == "test") if self.config.official_split else ""
                location = join(self.config.path, f"{split}/{image}.dicom")
                labels = {name: str(int(self._agreed(values))) for name, values in votes.items()}
                rows.append(Row(image_id=image, location=location, split=given, labels=labels))
        return plan_rows(rows)

    def sample(self, row: Mapping[str, Any]) -> Sample:
        """See `Source`."""
        boxes: dict[str, list[Box]] = {}
        for split in _SPLITS:
            boxes.update(_boxes(self.config.path, split).get(row["image_id"], {}))
        kept = {name: partial(box_mask, found) for name, found in boxes.items() if row["labels"].get(name) == "1"}
        return dicom_sample(row, kept)

    def _agreed(self, votes: Sequence[bool]) -> bool:
        need = {"majority": len(votes) // 2 + 1, "any": 1, "all": len(votes)}[self.config.readers]
        return sum(votes) >= need


def _votes(root: str, split: str) -> dict[str, dict[str, list[bool]]]:
    """Image -> finding -> one vote a reader; {} where the table is not there."""
    url = join(root, f"annotations/image_labels_{split}.csv")
    if not exists(url):
        return _kaggle_votes(root) if split == "train" else {}
    findings = [name for name in header_of(url) if name and name not in _ABOUT]
    table = columns(url, ["image_id", *findings])
    found: dict[str, dict[str, list[bool]]] = {}
    for image, *values in zip(*table.values(), strict=True):
        votes = found.setdefault(image, {})
        for name, value in zip(findings, values, strict=True):
            votes.setdefault(_RENAMED.get(name, name), []).append(value.removesuffix(".0") == "1")
    return found


def _kaggle_votes(root: str) -> dict[str, dict[str, list[bool]]]:
    """The same from a table of boxes, in which every reader of an image has at least one row."""
    if not exists(join(root, _KAGGLE)):
        return {}
    table = columns(join(root, _KAGGLE), ["image_id", "class_name", "rad_id"])
    named: dict[str, dict[str, set[str]]] = {}  # image -> reader -> findings
    for image, name, reader in zip(*table.values(), strict=True):
        named.setdefault(image, {}).setdefault(reader, set()).add(name)
    findings = sorted(set(table["class_name"]))
    return {
        image: {name: [name in found for found in readers.values()] for name in findings}
        for image, readers in named.items()
    }


@lru_cache(maxsize=4)
def _boxes(root: str, split: str) -> dict[str, dict[str, list[Box]]]:
    """Image -> finding -> boxes of all readers; images without one have rows without numbers."""
    names = (f"annotations/annotations_{split}.csv", *([_KAGGLE] if split == "train" else []))
    url = next((url for url in (join(root, name) for name in names) if exists(url)), "")
    if not url:
        return {}
    table = columns(url, ["image_id", "class_name", "x_min", "y_min", "x_max", "y_max"])
    found: dict[str, dict[str, list[Box]]] = {}
    for image, name, *corners in zip(*table.values(), strict=True):
        if all(corners):
            x0, y0, x1, y1 = map(float, corners)
            found.setdefault(image, {}).setdefault(_RENAMED.get(name, name), []).append((x0, y0, x1, y1))
    return found
