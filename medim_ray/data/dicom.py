"""DICOM files to gray pixels: stored -> modality (rescale) -> window -> MONOCHROME1 inverted, as PS3.3 C.11 orders.

Multi-frame files and what is no radiograph are refused with a reason. Headers are read in dicom_header.py. pydicom is
imported by whoever imports this module.
"""

from __future__ import annotations

import io
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image
from pydicom.encaps import generate_frames
from pydicom.pixels import apply_modality_lut, apply_voi_lut, pixel_array
from pydicom.uid import (
    JPEG2000,
    UID,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
)

from medim_ray.data.dicom_header import HEADER_KEYWORDS, Header, header_of, open_dataset
from medim_ray.data.images import BadImageError, Gray

Window = Literal["voi", "percentile", "none"]
PERCENTILES = (0.5, 99.5)
SECONDARY_CAPTURE, TAGS_REPAIRED, WINDOW_IGNORED = "secondary_capture", "dicom_tags_repaired", "dicom_window_ignored"

_PIXELS = [
    *("SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit"),
    *("ModalityLUTSequence", "RescaleIntercept", "RescaleSlope", "RescaleType", "VOILUTSequence", "WindowCenter"),
    *("WindowWidth", "VOILUTFunction", "PixelData", "ExtendedOffsetTable", "ExtendedOffsetTableLengths"),
    *("RedPaletteColorLookupTableDescriptor", "RedPaletteColorLookupTableData"),
    *("GreenPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableData"),
    *("BluePaletteColorLookupTableDescriptor", "BluePaletteColorLookupTableData"),
]
_OVERLAY_BIT = 0x60000102


@dataclass(frozen=True, kw_only=True)
class Radiograph:
    """A decoded file: pixels [H, W] (uint8 for up to 8 stored bits, else uint16), its header, what is odd about it."""

    image_HW: Gray
    header: Header
    flags: tuple[str, ...]


def decode_dicom(data: bytes, *, window: Window) -> Radiograph:
    """The radiograph in a DICOM file's bytes.

    window: `voi` applies the file's own window or VOI LUT where it has one that fits, `percentile` cuts at
    PERCENTILES, `none` keeps the rescaled values. BadImageError: the reason why there is no image.
    """
    if not data:
        raise BadImageError("empty file")
    try:
        return _decode(data, window)
    except BadImageError:
        raise
    except Exception as error:  # tags of impossible kinds get far before something stumbles over them
        raise BadImageError(f"damaged DICOM file ({type(error).__name__})") from None


def _decode(data: bytes, window: Window) -> Radiograph:
    keywords: list[str | int] = [*HEADER_KEYWORDS, *_PIXELS, _OVERLAY_BIT]
    dataset, dropped = open_dataset(io.BytesIO(data), keywords, stop_before_pixels=False)
    header = header_of(dataset)
    flags = [SECONDARY_CAPTURE] if header.secondary_capture else []
    flags += [TAGS_REPAIRED] if _repair(dataset) or dropped else []
    stored_HW, repaired = _stored(dataset)
    flags += [TAGS_REPAIRED] if repaired else []
    image_HW, ignored = _shown(dataset, stored_HW, window)
    flags += [WINDOW_IGNORED] if ignored else []
    return Radiograph(image_HW=image_HW, header=header, flags=tuple(dict.fromkeys(flags)))


def refuse_burned_in(header: Header) -> None:
    """BadImageError where the header says that text (often the patient's name) is part of the pixels."""
    if header.burned_in:
        raise BadImageError("BurnedInAnnotation is YES: text in the pixels may name the patient")


def refuse_other(header: Header, *, body_parts: Sequence[str], modalities: Sequence[str]) -> None:
    """BadImageError where body part or modality is stated and none of those wanted (no wish: everything passes).

    A body part passes where it contains a wanted word; accents and case don't count.
    """
    part, modality = header.fields.get("body_part", ""), header.fields.get("modality", "").upper()
    plain = unicodedata.normalize("NFKD", part).encode("ascii", "ignore").decode().upper()
    if part and body_parts and not any(word.upper() in plain for word in body_parts):
        raise BadImageError(f"body part {re.sub('[^A-Z0-9 _-]', '?', plain)[:16]!r} is not wanted")
    if modality and modalities and modality not in modalities:
        raise BadImageError(f"modality {re.sub('[^A-Z0-9]', '?', modality)[:8]!r} is not wanted")


def _repair(dataset: Any) -> bool:
    """Fills tags that can be known, in place; whether one was missing or wrong. BadImageError: one that can't be."""
    if "PixelData" not in dataset or not dataset.PixelData:
        raise BadImageError("no pixel data, or cut off before their end")
    try:
        frames = int(dataset.get("NumberOfFrames") or 1)
        height, width = int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0)
    except (TypeError, ValueError):
        raise BadImageError("Rows, Columns or NumberOfFrames is no number") from None
    if frames > 1:
        raise BadImageError(f"multi-frame file ({frames} frames)")
    if height < 1 or width < 1:
        raise BadImageError("no Rows or Columns")
    if height * width > (Image.MAX_IMAGE_PIXELS or 1 << 27):
        raise BadImageError(f"more than {Image.MAX_IMAGE_PIXELS} pixels")
    before = {name: dataset.get(name) for name in _DEFAULTS}
    samples = int(before["SamplesPerPixel"] or 1)
    for name, default in _DEFAULTS.items():
        if dataset.get(name) in (None, ""):
            setattr(dataset, name, default)
    if "BitsAllocated" not in dataset or dataset.BitsAllocated not in (8, 16, 32):
        length = len(dataset.PixelData)
        dataset.BitsAllocated = 16 if length >= 2 * height * width * samples else 8
    if not 1 <= int(dataset.get("BitsStored") or 0) <= dataset.BitsAllocated:
        dataset.BitsStored = dataset.BitsAllocated
    if samples == 1 and not str(dataset.PhotometricInterpretation).startswith(("MONOCHROME", "PALETTE")):
        dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.HighBit = dataset.BitsStored - 1
    return bool(_syntax_repaired(dataset) or any(dataset.get(name) != value for name, value in before.items()))


_DEFAULTS: dict[str, Any] = {
    "SamplesPerPixel": 1,
    "PhotometricInterpretation": "MONOCHROME2",
    "PixelRepresentation": 0,
    "BitsAllocated": None,
    "BitsStored": None,
}


def _syntax_repaired(dataset: Any) -> bool:
    """Sets a transfer syntax that is missing or that the pixel data contradict, in place; whether it did."""
    if getattr(dataset, "file_meta", None) is None:
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
    named = UID(str(dataset.file_meta.get("TransferSyntaxUID") or ""))
    encapsulated = named.is_transfer_syntax and named.is_encapsulated
    found = _compression(bytes(dataset.PixelData[:4096]))
    if found is None:
        if named.is_transfer_syntax and not encapsulated:
            return False
        values = int(dataset.Rows) * int(dataset.Columns) * int(dataset.SamplesPerPixel)
        if len(dataset.PixelData) < values * int(dataset.BitsAllocated) // 8:
            raise BadImageError(f"damaged pixel data ({named.name or 'no transfer syntax'})")
        implicit, little = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
        return True
    if encapsulated and (not found or _same_codec(named, found)):
        return False
    if not found:
        raise BadImageError("compressed pixel data without a transfer syntax")
    dataset.file_meta.TransferSyntaxUID = found
    return True


def _compression(start: bytes) -> str | None:
    """The transfer syntax that encapsulated pixel data show by their marks; '': unknown, None: not encapsulated."""
    if start[:4] != b"\xfe\xff\x00\xe0":
        return None
    at = 8 + int.from_bytes(start[4:8], "little") + 8  # after the offset table and the header of the first fragment
    stream = start[at:]
    if stream[:4] == b"\xff\x4f\xff\x51":
        return str(JPEG2000)
    if stream[:2] != b"\xff\xd8":
        return ""
    frame = re.search(rb"\xff([\xc0\xc1\xc3\xf7])", stream)
    kinds = {b"\xc0": JPEGBaseline8Bit, b"\xc1": JPEGExtended12Bit, b"\xc3": JPEGLossless, b"\xf7": JPEGLSLossless}
    return str(kinds[frame[1]]) if frame else ""


_FAMILIES = (
    {str(JPEG2000), str(JPEG2000Lossless)},
    {str(JPEGBaseline8Bit), str(JPEGExtended12Bit)},
    {str(JPEGLossless), str(JPEGLosslessSV1)},
    {str(JPEGLSLossless), str(JPEGLSNearLossless)},
)


def _same_codec(named: UID, found: str) -> bool:
    known = [family for family in _FAMILIES if str(named) in family or found in family]
    return not any(str(named) in family for family in known) or any({str(named), found} <= family for family in known)


_PILLOW = {str(uid) for uid in (JPEGBaseline8Bit, JPEG2000, JPEG2000Lossless)}
_LIBJPEG = {str(uid) for uid in (JPEGExtended12Bit, JPEGLossless, JPEGLosslessSV1)}
_CHARLS = {str(uid) for uid in (JPEGLSLossless, JPEGLSNearLossless)}


def _decoded(dataset: Any, syntax: UID) -> NDArray[Any]:
    """Stored values of any type and shape.

    JPEG lossless, JPEG-LS and 12-bit JPEG are decoded by imagecodecs (libjpeg-turbo, CharLS), not by a plugin of
    pydicom: GDCM ends the process on some damaged streams, pylibjpeg's libjpeg is GPL.
    """
    if str(syntax) not in _LIBJPEG | _CHARLS:
        plugin = "pillow" if str(syntax) in _PILLOW else ""
        values: NDArray[Any] = pixel_array(dataset, decoding_plugin=plugin)
        return values
    import imagecodecs

    (frame,) = generate_frames(dataset.PixelData, number_of_frames=1)
    decode = imagecodecs.jpegls_decode if str(syntax) in _CHARLS else imagecodecs.jpeg8_decode
    values = decode(frame)
    if values.shape[:2] != (dataset.Rows, dataset.Columns) or frame.rstrip(b"\0")[-2:] != b"\xff\xd9":
        raise ValueError("another size than the header says, or cut off")
    if dataset.PixelRepresentation and values.ndim == 2:  # the codec knows no signs
        sign = 1 << (int(dataset.BitsStored) - 1)
        values = ((values.astype(np.int32) & (2 * sign - 1)) ^ sign) - sign
    return values


def _stored(dataset: Any) -> tuple[NDArray[Any], bool]:
    """Stored values [H, W], colour as luma (ITU-R 601); whether more bits were used than the header says."""
    syntax, bits = UID(str(dataset.file_meta.TransferSyntaxUID)), int(dataset.BitsStored)
    if not syntax.is_encapsulated and not dataset.PixelRepresentation:
        dataset.BitsStored = dataset.BitsAllocated  # or else pydicom cuts what the header does not tell of
    try:
        values = _decoded(dataset, syntax)
    except (NotImplementedError, RuntimeError, AttributeError, KeyError) as error:
        if isinstance(error, NotImplementedError) or re.search("missing|does not support", str(error)):
            raise BadImageError(f"no decoder for {syntax.name}") from None
        raise BadImageError(f"damaged pixel data ({syntax.name})") from None
    except Exception:  # each codec has errors of its own
        raise BadImageError(f"damaged or short pixel data ({syntax.name})") from None
    dataset.BitsStored = bits
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        values = pydicom.pixels.apply_color_lut(values, dataset)
        values = (values >> 8 if values.dtype == np.uint16 else values).astype(np.uint8)
    if values.ndim == 3 and values.shape[2] == 3:
        kind = np.uint8 if values.dtype.itemsize == 1 else np.uint16
        return cv2.cvtColor(np.ascontiguousarray(values.astype(kind)), cv2.COLOR_RGB2GRAY), False
    if values.ndim != 2:
        raise BadImageError(f"pixels of {values.ndim} dimensions")
    if values.dtype.kind == "u" and int(values.max()) >= 1 << bits:
        if dataset.get(_OVERLAY_BIT):  # a drawing in the bits above the image
            return values & values.dtype.type((1 << bits) - 1), False
        dataset.BitsStored = int(values.max()).bit_length()
        return values, True
    return values, False


def _shown(dataset: Any, stored_HW: NDArray[Any], window: Window) -> tuple[Gray, bool]:
    """The values as they are to be seen, bright is dense; whether a window of the file was unusable."""
    mono = str(dataset.PhotometricInterpretation).startswith("MONOCHROME")
    padding_HW = _padding(dataset, stored_HW) if mono else None
    values_HW, ignored = stored_HW, False
    if mono:
        values_HW = _rescaled(dataset, stored_HW)
        if window == "voi":
            values_HW, ignored = _voi(dataset, values_HW)
        elif window == "percentile":
            inside = values_HW if padding_HW is None else values_HW[~padding_HW]
            low, high = np.percentile(inside, PERCENTILES) if inside.size else (0, 0)
            values_HW = np.clip(values_HW, low, high) if high > low else values_HW
    image_HW = _to_unsigned(values_HW, int(dataset.BitsStored))
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        depth = 8 if image_HW.dtype == np.uint8 else min(int(dataset.BitsStored), 16)
        top = max(int(image_HW.max()), (1 << depth) - 1)
        image_HW = top - image_HW  # of its own type: top is the largest value or above
    if padding_HW is not None and padding_HW.any() and not padding_HW.all():
        image_HW[padding_HW] = image_HW[~padding_HW].min()
    return image_HW, ignored


def _padding(dataset: Any, stored_HW: NDArray[Any]) -> NDArray[np.bool_] | None:
    """Pixels outside the image (PixelPaddingValue), which windows must not see; None: the file has none."""
    value, limit = dataset.get("PixelPaddingValue"), dataset.get("PixelPaddingRangeLimit")
    if not isinstance(value, int):
        return None
    low, high = (value, value) if not isinstance(limit, int) else sorted((value, limit))
    mask_HW: NDArray[np.bool_] = (stored_HW >= low) & (stored_HW <= high)
    return mask_HW


def _rescaled(dataset: Any, stored_HW: NDArray[Any]) -> NDArray[Any]:
    slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
    if "ModalityLUTSequence" not in dataset and slope in (None, 1) and intercept in (None, 0):
        return stored_HW
    try:
        values_HW: NDArray[Any] = apply_modality_lut(stored_HW, dataset)
    except Exception:
        raise BadImageError("rescale values or modality LUT are no numbers") from None
    if not np.isfinite(values_HW).all():
        raise BadImageError("rescale makes pixels that are no finite numbers")
    return values_HW


def _voi(dataset: Any, values_HW: NDArray[Any]) -> tuple[NDArray[Any], bool]:
    """The values through the file's first window; (unchanged, True) where that can't be used or leaves one gray."""
    if "VOILUTSequence" not in dataset and ("WindowWidth" not in dataset or "WindowCenter" not in dataset):
        return values_HW, False
    try:
        windowed_HW: NDArray[Any] = apply_voi_lut(values_HW, dataset)
    except Exception:  # a width of 0, text for a number, a LUT shorter than it says
        return values_HW, True
    # One gray, or two as a window of width 1 leaves of many: what was meant is not known.
    num_left, num_before = (_num_grays(image_HW) for image_HW in (windowed_HW, values_HW))
    return (values_HW, True) if num_left < min(3, num_before) else (windowed_HW, False)


def _num_grays(image_HW: NDArray[Any]) -> int:
    """1, 2, or 3 for more."""
    low, high = image_HW.min(), image_HW.max()
    if low == high:
        return 1
    return 2 if ((image_HW == low) | (image_HW == high)).all() else 3


def _to_unsigned(values_HW: NDArray[Any], bits: int) -> Gray:
    """Whole values that fit are kept; others are stretched over the full range of 8 or 16 bits."""
    kind: type[Any] = np.uint8 if bits <= 8 else np.uint16
    top = np.iinfo(kind).max
    low, high = float(values_HW.min()), float(values_HW.max())
    if values_HW.dtype.kind in "iu" and high - low <= top:
        shift = int(low) if low < 0 or high > top else 0
        return (values_HW.astype(np.int64) - shift).astype(kind)
    scaled_HW = (values_HW.astype(np.float64) - low) * (top / (high - low) if high > low else 0.0)
    return np.rint(scaled_HW).astype(kind)
