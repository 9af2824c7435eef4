"""DICOM files that other sources list go by the defaults of source `dicom`; headers on storage that stumbles."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import known_implementations

from medim_ray.data.images import BadImageError, fetch
from medim_ray.data.sources import SOURCES
from medim_ray.data.sources.base import Sample
from tests.unit.data.dicom_files import dataset, file_of, gradient

EIGHT = gradient(bits=8)
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"


class StumblingFileSystem(MemoryFileSystem):
    """Files in memory whose opening fails `num_faults` times."""

    protocol = "stumbling"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    num_faults = 0

    def _open(self, path: str, *args: Any, **options: Any) -> Any:
        if StumblingFileSystem.num_faults > 0:
            StumblingFileSystem.num_faults -= 1
            raise TimeoutError("the server did not answer")
        return super()._open(path, *args, **options)


fsspec.register_implementation("stumbling", StumblingFileSystem, clobber=True)


def sample_of(made: Any, row: dict[str, Any]) -> Sample | str:
    try:
        sample: Sample = made.sample(row)
        return sample
    except BadImageError as error:
        return str(error)


def test_a_table_of_dicom_files(tmp_path: Path) -> None:
    files = {
        "foot": file_of(dataset(EIGHT, BodyPartExamined="FOOT")),
        "mr": file_of(dataset(EIGHT, Modality="MR")),
        "capture": file_of(dataset(EIGHT, SOPClassUID=SECONDARY_CAPTURE)),
        "bare": file_of(dataset(EIGHT))[132:],
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "t.csv").write_text("image_id,file\n" + "".join(f"{name},{name}\n" for name in files))
    config = SOURCES["csv"].Config(
        path=str(tmp_path / "t.csv"), patient_column="", report_column="", view_column="", label_columns=()
    )
    made = SOURCES["csv"](config)
    found = {row["image_id"]: sample_of(made, row) for row in made.plan().to_pylist()}
    assert found["foot"] == "body part 'FOOT' is not wanted" and found["mr"] == "modality 'MR' is not wanted"
    capture, bare = found["capture"], found["bare"]
    assert isinstance(capture, Sample) and capture.flags == ("secondary_capture",)
    assert isinstance(bare, Sample) and np.array_equal(bare.image_HW, EIGHT)


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"BurnedInAnnotation": "YES"}, "BurnedInAnnotation is YES: text in the pixels may name the patient"),
        ({"BodyPartExamined": "FOOT"}, "body part 'FOOT' is not wanted"),
    ],
)
def test_a_public_set_of_dicom_files(tags: dict[str, Any], reason: str, tmp_path: Path) -> None:
    (tmp_path / "train-rle.csv").write_text("ImageId, EncodedPixels\n1.2.4, -1\n")
    (tmp_path / "dicom-images-train").mkdir()
    (tmp_path / "dicom-images-train/1.2.4.dcm").write_bytes(file_of(dataset(EIGHT, **tags)))
    made = SOURCES["siim_acr"](SOURCES["siim_acr"].Config(path=str(tmp_path)))
    (row,) = made.plan().to_pylist()
    assert sample_of(made, row) == reason


def test_headers_on_storage_that_stumbles_keep_their_patients() -> None:
    with fsspec.open("stumbling://tree/a.dcm", "wb") as file:
        file.write(file_of(dataset(EIGHT)))
    made = SOURCES["dicom"](SOURCES["dicom"].Config(path="stumbling://tree"))
    (row,) = made.plan().to_pylist()
    assert row["patient_id"] == "patient-7"
    StumblingFileSystem.num_faults = 1
    assert made.plan().to_pylist() == [row]
    StumblingFileSystem.num_faults = 99
    with pytest.raises((RuntimeError, ValueError), match="the storage keeps failing"):
        made.plan()
    StumblingFileSystem.num_faults = 0


def test_one_file_without_an_ending(tmp_path: Path) -> None:
    (tmp_path / "IM0001").write_bytes(file_of(dataset(EIGHT)))
    made = SOURCES["dicom"](SOURCES["dicom"].Config(path=str(tmp_path / "IM0001")))
    (row,) = made.plan().to_pylist()
    assert isinstance(sample_of(made, row), Sample)


def test_a_storage_whose_package_is_missing_ends_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the same for every image there; in quarantine they would be lost."""
    gone = {"class": "no_such_package.FileSystem", "err": "Please install no_such_package"}
    monkeypatch.setitem(known_implementations, "gone", gone)
    with pytest.raises(RuntimeError, match=r"images on gone:// can't be read: Please install no_such_package"):
        fetch("gone://bucket/a.png")
