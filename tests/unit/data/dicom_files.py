"""DICOM files made in tests: one from pixels and tags, and the same in a compressed transfer syntax (by GDCM)."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import gdcm
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian


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


def compressed(data: bytes, syntax: str, folder: Path) -> bytes:
    """The file in another transfer syntax, named as GDCM does ("JPEG2000Lossless")."""
    (folder / "in.dcm").write_bytes(data)
    reader = gdcm.ImageReader()
    reader.SetFileName(str(folder / "in.dcm"))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
    change.SetInput(reader.GetImage())
    assert change.Change(), syntax
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(folder / "out.dcm"))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    return (folder / "out.dcm").read_bytes()
