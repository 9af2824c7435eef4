"""Sources `siim_acr` and `candid_ptx`: DICOM files and masks as run-length codes, several rows an image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import pyarrow as pa

from medim_ray.data.sources.base import SOURCES, Row, Sample, described, plan_rows
from medim_ray.data.sources.files import exists, extension, join, list_files
from medim_ray.data.sources.published import PublishedConfig, check_root, dicom_sample, rle_mask
from medim_ray.data.sources.tables import columns

_SIIM_TABLES = ("stage_2_train.csv", "train-rle.csv")
_CANDID_TABLE = "Pneumothorax_reports.csv"
_CANDID_MASKS = {  # finding -> tables that may hold its masks (name, image column, code column)
    "Pneumothorax": ((_CANDID_TABLE, "SOPInstanceUID", "EncodedPixels"),),
    "Chest Tube": (("chest_tube.csv", "anon_SOPUID", "mask_rle"),),
    "Rib Fracture": (
        ("acute_rib_fracture.csv", "anon_SOPUID", "mask_rle"),
        ("Rib_fracture_mask_rle.csv", "anon_SOPUID", "mask_rle"),
    ),
}


@SOURCES.register("siim_acr")
class SiimAcrSource:
    """SIIM-ACR Pneumothorax: DICOM files in any depth below the root, masks as truth.

    Files that the table does not list (the test set) are rows without labels. There is no official split; view, sex
    and age come from the headers.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PublishedConfig):
        name: str = described("siim_acr", "siim_acr")

    def __init__(self, config: Config) -> None:
        check_root(config, *_SIIM_TABLES)
        self.config = config
        self.name = config.name

    def plan(self) -> pa.Table:
        """See `Source`. An image that the table lists and no folder holds is a row that can't be read."""
        root, codes = self.config.path, _siim_codes(self.config.path)
        found = {n.rpartition("/")[2].rpartition(".")[0]: n for n in list_files(root) if extension(n) == "dcm"}
        places = {**{image: f"dicom-images-train/{image}.dcm" for image in codes}, **found}
        rows = []
        for image, place in places.items():
            label = str(int(any(code != "-1" for code in codes[image]))) if image in codes else ""
            rows.append(Row(image_id=image, location=join(root, place), labels={"Pneumothorax": label}))
        return plan_rows(rows)

    def sample(self, row: Mapping[str, Any]) -> Sample:
        """See `Source`."""
        codes = _siim_codes(self.config.path).get(row["image_id"], ())
        return dicom_sample(row, {"Pneumothorax": partial(rle_mask, codes)})


@SOURCES.register("candid_ptx")
class CandidPtxSource:
    """CANDID-PTX: DICOM files named by SOPInstanceUID, reports, masks of pneumothorax, chest tube and rib fracture.

    Chest tube and rib fracture are labelled where their table lies beside the reports. There is no official split.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PublishedConfig):
        name: str = described("candid_ptx", "candid_ptx")

    def __init__(self, config: Config) -> None:
        check_root(config, _CANDID_TABLE)
        self.config = config
        self.name = config.name

    def plan(self) -> pa.Table:
        """See `Source`. One row an image; its patient is the beginning of `filename` ("P00012_…")."""
        root = self.config.path
        table = columns(join(root, _CANDID_TABLE), ["SOPInstanceUID", "filename", "Report"])
        first: dict[str, tuple[str, str]] = {}
        for image, name, report in zip(*table.values(), strict=True):
            first.setdefault(image, (name.partition("_")[0], report))
        places = {}
        for name in list_files(root):
            base = name.rpartition("/")[2]
            places[base.removesuffix(".dcm") if extension(base) == "dcm" else base] = name
        codes = {finding: _candid_codes(root, finding) for finding in _CANDID_MASKS}
        rows = []
        for image, (patient, report) in first.items():
            labels = {
                finding: str(int(any(code not in ("", "-1") for code in found.get(image, ()))))
                for finding, found in codes.items()
                if found is not None
            }
            location = join(root, places.get(image, f"dataset/{image}"))
            rows.append(Row(image_id=image, location=location, patient_id=patient, report=report, labels=labels))
        return plan_rows(rows)

    def sample(self, row: Mapping[str, Any]) -> Sample:
        """See `Source`."""
        codes = {finding: _candid_codes(self.config.path, finding) or {} for finding in _CANDID_MASKS}
        masks = {finding: partial(rle_mask, found.get(row["image_id"], ())) for finding, found in codes.items()}
        return dicom_sample(row, masks)


@lru_cache(maxsize=2)
def _siim_codes(root: str) -> dict[str, list[str]]:
    """Image -> its run-length codes; "-1": no pneumothorax."""
    name = next(name for name in _SIIM_TABLES if exists(join(root, name)))
    return _codes(join(root, name), "ImageId", "EncodedPixels")


@lru_cache(maxsize=6)
def _candid_codes(root: str, finding: str) -> dict[str, list[str]] | None:
    """Image -> its run-length codes; None: the table is not there."""
    for name, image_column, code_column in _CANDID_MASKS[finding]:
        if exists(join(root, name)):
            return _codes(join(root, name), image_column, code_column)
    return None


def _codes(url: str, image_column: str, code_column: str) -> dict[str, list[str]]:
    table = columns(url, [image_column, code_column])
    found: dict[str, list[str]] = {}
    for image, code in zip(*table.values(), strict=True):
        found.setdefault(image, []).append(code)
    return found
