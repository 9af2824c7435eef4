"""What the public datasets share: their configuration, canonical views, sexes and ages, CheXpert labels, boxes, masks.

Labels are text: "1" stated present, "0" stated absent, left out where nothing is known. No dataset is described here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medim_ray.data.images import BadImageError, fetch
from medim_ray.data.sources.base import Picture, Row, Sample, Truth, chest_radiograph, described, plain_sample
from medim_ray.data.sources.files import exists, join
from medim_ray.data.splits import SplitConfig, split_of

CHEXPERT_LABELS = (
    *("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema"),
    *("Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture"),
    "Support Devices",
)
_VIEWS = {
    **dict.fromkeys(("L", "LL", "RL", "LAT", "LATERAL"), "LATERAL"),
    **dict.fromkeys(("AP", "AP SUPINE", "AP ERECT", "AP_HORIZONTAL", "AP HORIZONTAL"), "AP"),
    **dict.fromkeys(("PA",), "PA"),
    **dict.fromkeys(("UNK", "UNKNOWN", "POSTEROANTERIOR OR ANTEROPOSTERIOR"), ""),
}


@dataclass(frozen=True, kw_only=True)
class PublishedConfig:
    """A dataset in its published layout."""

    path: str = described("", "root folder of the dataset as published, path or fsspec URL")


@dataclass(frozen=True, kw_only=True)
class ViewedConfig(PublishedConfig):
    """A dataset whose table states the view of each image."""

    views: tuple[str, ...] = described((), "views that are rows: PA, AP, LATERAL, FRONTAL, ...; []: all")


@dataclass(frozen=True, kw_only=True)
class UncertainConfig(ViewedConfig):
    """A dataset with the labels of the CheXpert labeler."""

    uncertain: Literal["ignore", "zeros", "ones", "multiclass"] = described(
        "ignore", "uncertain labels: ignore (unknown), zeros, ones, multiclass (-1)"
    )


def check_root(config: PublishedConfig, *needed: str) -> None:
    """ValueError: no path, or none of the files `needed` (alternatives, relative) is there."""
    if not config.path:
        raise ValueError("source.path is not set: give the root folder of the dataset as source.path=…")
    if needed and not any(exists(join(config.path, name)) for name in needed):
        raise ValueError(
            f"source.path={config.path} holds no {' or '.join(needed)}: give the dataset's root folder, unpacked as "
            "medim_ray/data/sources/README.md lists it"
        )


def keep_views(rows: Iterable[Row], views: Sequence[str], path: str) -> list[Row]:
    """The rows of the wanted views. ValueError where none is left."""
    rows = list(rows)
    wanted = {view_of(view) for view in views}
    kept = [row for row in rows if row.view in wanted] if views else rows
    if not kept:
        found = ", ".join(sorted({row.view or "unknown" for row in rows})) or "none"
        raise ValueError(f"source.views={list(views)}: no image of {path} has such a view; its views are {found}")
    return kept


def view_of(text: str) -> str:
    """PA, AP, LATERAL, FRONTAL, another view in capitals, or '' for unknown."""
    name = text.strip().upper()
    return _VIEWS.get(name, name)


def person(view: str, sex: str, age: str) -> dict[str, str]:
    """The labels view, sex (M, F) and age (whole years, 90 for all above); unknown ones are ''."""
    letter = sex.strip().upper()[:1]
    match = re.match(r"\d+", age.strip())
    years = int(match[0]) if match else None
    if match and age.strip().upper().endswith(("M", "D", "W")):  # "011M": months
        years = 0
    known = years is not None and years < 130
    return {
        "view": view,
        "sex": letter if letter in ("M", "F") else "",
        "age": str(min(years or 0, 90)) if known else "",
    }


def chexpert_value(text: str, uncertain: str) -> str:
    """A cell of a CheXpert label as "1", "0", "-1" (multiclass only) or ''. blank: not mentioned.

    The policies are U-Ignore, U-Zeroes, U-Ones and U-MultiClass of Irvin et al., CheXpert, section 3.
    """
    value = text.strip().removesuffix(".0")
    if value == "-1":
        return {"ignore": "", "zeros": "0", "ones": "1", "multiclass": "-1"}[uncertain]
    return value if value in ("0", "1") else ""


def common_labels(findings: Iterable[Iterable[str]], min_images: int) -> list[str]:
    """The names that at least `min_images` of the images have, sorted."""
    counts = Counter(name for names in findings for name in names)
    return sorted(name for name, num in counts.items() if num >= min_images)


def official(patient_id: str, held_out: bool) -> str:
    """The split of a row in a dataset that publishes a test list only: patients of the rest are dealt 9:1."""
    return "test" if held_out else split_of(patient_id, SplitConfig(train=0.9, val=0.1, test=0.0))


def box_mask(boxes: Iterable[tuple[float, float, float, float]], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """[H, W] true inside one of the boxes (x0, y0, x1, y1 in pixels of the file; parts outside are cut off)."""
    mask_HW = np.zeros(shape, dtype=np.bool_)
    for x0, y0, x1, y1 in boxes:
        top, left = max(0, round(y0)), max(0, round(x0))
        mask_HW[top : max(top, round(y1)), left : max(left, round(x1))] = True
    return mask_HW


def rle_mask(codes: Iterable[str], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """[H, W] union of run-length codes "skip length skip length ...", counted down the columns (SIIM-ACR's form).

    "-1" and '' are empty. BadImageError: a code that is none, or that leaves the image.
    """
    height, width = shape
    mask_N = np.zeros(height * width, dtype=np.bool_)
    for code in codes:
        try:
            numbers = [int(part) for part in code.split()]
        except ValueError:
            raise BadImageError("mask code that is no run lengths") from None
        if numbers in ([], [-1]):
            continue
        at = 0
        if len(numbers) % 2:
            raise BadImageError("mask code of an odd number of values")
        for skip, length in zip(numbers[::2], numbers[1::2], strict=True):
            at += skip
            if skip < 0 or length < 0 or at + length > mask_N.size:
                raise BadImageError("mask code that leaves the image")
            mask_N[at : at + length] = True
            at += length
    return mask_N.reshape(width, height).T


def region(finding: str, mask_HW: NDArray[np.bool_]) -> tuple[Truth, ...]:
    """The truth of a finding, its boxes or masks as one; () where no pixel is marked."""
    marked = (Truth(finding=finding, side="", zone="", sentence="", mask_HW=mask_HW),)
    return marked if mask_HW.any() else ()


def dicom_sample(row: Mapping[str, Any], regions: Mapping[str, Any] | None = None) -> Sample:
    """The sample of a DICOM file by the defaults of source `dicom`; view, sex and age of its header where the plan has
    none.

    regions: finding -> function of the image's (height, width) that gives its mask.
    """
    radiograph = chest_radiograph(fetch(row["location"]))
    height, width = radiograph.image_HW.shape
    truth = [t for finding, mask in (regions or {}).items() for t in region(finding, mask((height, width)))]
    fields = radiograph.header.fields
    labels = person(view_of(fields.get("view", "")), fields.get("sex", ""), fields.get("age", ""))
    picture = Picture(radiograph.image_HW, radiograph.flags)
    return plain_sample(row, picture, more_labels=labels, truth=tuple(truth))
