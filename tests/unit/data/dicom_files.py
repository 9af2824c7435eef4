"""DICOM files made in tests: one from pixels and tags, and the same in another transfer syntax."""

from __future__ import annotations

import io
from functools import partial
from typing import Any

import imagecodecs
import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    JPEG2000,
    UID,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)


def gradient(height: int = 48, width: int = 64, bits: int = 12, seed: int = 0) -> Any:
    """[height, width] of `bits` bits: a ramp with noise, so that no two pixels in a row are alike."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    ramp = (x / (width - 1) + y / (height - 1)) / 2 * ((1 << bits) - 1) * 0.9
    values = np.rint(ramp + rng.uniform(0, (1 << bits) * 0.1 - 1, (height, width)))
    return values.astype(np.uint8 if bits <= 8 else np.uint16)


def dataset(pixels: Any, bits: int = 0, **tags: Any) -> Dataset:
    """A digital radiograph of the chest; `tags` replace or add elements, None removes one."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = "1.2.826.0.1.3680043.8.498.1"
    ds.PatientID, ds.PatientName, ds.PatientSex, ds.PatientAge = "patient-7", "Secret^Name", "F", "062Y"
    ds.StudyDate, ds.AccessionNumber, ds.StudyDescription = "20200102", "A77", "seen by Dr Secret"
    ds.Modality, ds.BodyPartExamined, ds.ViewPosition = "DX", "CHEST", "PA"
    ds.Rows, ds.Columns = pixels.shape[:2]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated = pixels.dtype.itemsize * 8
    ds.BitsStored = bits or ds.BitsAllocated
    ds.HighBit = ds.BitsStored - 1
    ds.PixelRepresentation = int(pixels.dtype.kind == "i")
    ds.PixelData = pixels.tobytes()
    for name, value in tags.items():
        if value is None:
            delattr(ds, name)
        else:
            setattr(ds, name, value)
    return ds


def file_of(ds: Dataset) -> bytes:
    """The bytes of a DICOM file, with preamble and meta header."""
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def compressed(data: bytes, syntax: UID) -> bytes:
    """The file in another transfer syntax; lossy ones at high quality."""
    ds = pydicom.dcmread(io.BytesIO(data))
    pixels, bits = ds.pixel_array, ds.BitsStored
    ds.file_meta.TransferSyntaxUID = syntax
    if syntax == RLELossless:
        ds.compress(RLELossless, pixels, generate_instance_uid=False)
    elif syntax.is_encapsulated:
        jpeg = partial(imagecodecs.jpeg8_encode, pixels, bitspersample=bits)
        frames = {
            JPEGBaseline8Bit: partial(jpeg, level=95),
            JPEGExtended12Bit: partial(jpeg, level=95),
            JPEGLossless: partial(jpeg, lossless=True, predictor=6),
            JPEGLosslessSV1: partial(jpeg, lossless=True, predictor=1),
            JPEGLSLossless: partial(imagecodecs.jpegls_encode, pixels),
            JPEGLSNearLossless: partial(imagecodecs.jpegls_encode, pixels, level=2),
            JPEG2000Lossless: partial(imagecodecs.jpeg2k_encode, pixels, codecformat="j2k", bitspersample=bits),
            JPEG2000: partial(imagecodecs.jpeg2k_encode, pixels, codecformat="j2k", level=40, reversible=False),
        }
        ds.PixelData = encapsulate([frames[syntax]()])
    return file_of(ds)
