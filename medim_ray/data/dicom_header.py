"""The header of a DICOM file: the fixed list of fields that may become labels, and nothing else.

A field that holds what its kind can't be is left out: a wrong tag may hold anything. pydicom is imported by whoever
imports this module; pixels are read in dicom.py.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pydicom

from medim_ray.data.images import BadImageError, is_dicom

# pydicom would quote odd values, which may be a patient's, in warnings and logs. Set for the process, because headers
# are read by threads, in which warnings.catch_warnings is not safe.
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
warnings.filterwarnings("ignore", module=r"pydicom\.")
logging.getLogger("pydicom").setLevel(logging.CRITICAL)

FIELDS = {
    "view": "ViewPosition",
    "sex": "PatientSex",
    "age": "PatientAge",
    "modality": "Modality",
    "body_part": "BodyPartExamined",
    "laterality": "ImageLaterality",
    "patient_orientation": "PatientOrientation",
    "manufacturer": "Manufacturer",
    "model": "ManufacturerModelName",
    "detector": "DetectorType",
    "photometric": "PhotometricInterpretation",
    "presentation": "PresentationIntentType",
    "conversion": "ConversionType",
    "pixel_spacing": "PixelSpacing",
    "imager_pixel_spacing": "ImagerPixelSpacing",
    "kvp": "KVP",
    "exposure": "Exposure",
    "bits_stored": "BitsStored",
    "rows": "Rows",
    "columns": "Columns",
}
"""Label name -> the only header fields that can become labels. Names, dates, numbers of the study, free text: never."""
_NAMES = ("manufacturer", "model")
_NUMBERS = ("pixel_spacing", "imager_pixel_spacing", "kvp", "exposure", "bits_stored", "rows", "columns")


_IDENTITY = ["PatientID", "SOPInstanceUID", "SOPClassUID", "BurnedInAnnotation"]
HEADER_KEYWORDS = sorted({*FIELDS.values(), *_IDENTITY, "NumberOfFrames", "SpecificCharacterSet"})
_VITAL = ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "PixelRepresentation", "PixelData")
_SECONDARY_CAPTURE_CLASSES = "1.2.840.10008.5.1.4.1.1.7"


@dataclass(frozen=True, kw_only=True)
class Header:
    """What is read of a header: `fields` are those of FIELDS that are there, as text ("PA", "62", "0.168/0.168").

    patient_id goes into the keyed hash of the plan only.
    """

    patient_id: str
    sop_uid: str
    fields: Mapping[str, str]
    burned_in: bool
    secondary_capture: bool


def read_header(file: Any) -> Header:
    """The header of an open binary file; pixels are not read. BadImageError: no DICOM, or a damaged header."""
    return header_of(open_dataset(file, HEADER_KEYWORDS, stop_before_pixels=True)[0])


def open_dataset(file: Any, keywords: Sequence[str | int], *, stop_before_pixels: bool) -> tuple[Any, bool]:
    """The dataset with `keywords` only, and whether one of them was left out for a value that can't be parsed.

    A file without preamble is read where its first tag looks like DICOM.
    """
    start = file.read(132)
    file.seek(0)
    if not is_dicom(start):
        raise BadImageError("not a DICOM file")
    try:
        dataset = pydicom.dcmread(file, force=True, stop_before_pixels=stop_before_pixels, specific_tags=list(keywords))
        dropped = [name for name in keywords if not _parses(dataset, name)]
        if any(name in dropped for name in _VITAL):
            raise ValueError
        for name in dropped:
            del dataset[pydicom.tag.Tag(name)]
    except Exception as error:  # pydicom raises whatever its parser meets in damaged bytes
        raise BadImageError(f"damaged DICOM header ({type(error).__name__})") from None
    if not any(name in dataset for name in ("Rows", "SOPClassUID", "SOPInstanceUID", "Modality", "PixelData")):
        raise BadImageError("not a DICOM file")
    return dataset, bool(dropped)


def _parses(dataset: Any, name: str | int) -> bool:
    """Whether a value is what its tag says; pydicom parses when it is asked for."""
    try:
        dataset.get(name)
    except Exception:
        return False
    return True


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, pydicom.multival.MultiValue | list | tuple):
        return "/".join(str(part).strip() for part in value)
    return str(value).strip()


def header_of(dataset: Any) -> Header:
    fields = {name: _field(name, _text(dataset.get(keyword))) for name, keyword in FIELDS.items()}
    fields = {name: text for name, text in fields.items() if text}
    return Header(
        patient_id=_text(dataset.get("PatientID")),
        sop_uid=_text(dataset.get("SOPInstanceUID")),
        fields=fields,
        burned_in=_text(dataset.get("BurnedInAnnotation")).upper() in ("YES", "Y"),
        secondary_capture=_text(dataset.get("SOPClassUID")).startswith(_SECONDARY_CAPTURE_CLASSES),
    )


def _field(name: str, text: str) -> str:
    """The text of a header field where it is of the field's kind, else '': a wrong tag may hold anything."""
    if name == "age":
        return _years(text)
    if name in _NAMES:
        return text[:64]
    if name == "sex":
        return text.upper() if text.upper() in ("M", "F", "O") else ""
    if name == "body_part":  # often free text, and what is refused by
        return text if re.fullmatch(r"[\w .,/\\()&+-]{1,64}", text) else "?" * bool(text)
    fits = re.fullmatch(r"[-+.\dEe/]{1,64}" if name in _NUMBERS else r"[A-Z0-9_ /\\-]{1,64}", text.upper())
    return text if fits else ""


def _years(age: str) -> str:
    """Whole years of an age string ("062Y", "011M", "62"); 90 for all above, as the HIPAA safe harbour has it."""
    match = re.fullmatch(r"(\d+)\s*([YMWD]?)", age.strip().upper())
    if not match:
        return ""
    years = int(match[1]) // {"Y": 1, "": 1, "M": 12, "W": 52, "D": 365}[match[2]]
    return str(min(years, 90))
