"""Folder, dicom, parquet, hf and webdataset on small data made here, and how they refuse."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from medim_ray.data.images import BadImageError
from medim_ray.data.sources import SOURCES, columnar
from medim_ray.data.sources.base import PLAN_COLUMNS, Sample
from medim_ray.data.sources.files import list_files
from tests.unit.data.dicom_files import dataset, file_of, gradient


def source(name: str, path: Path | str, **options: Any) -> Any:
    return SOURCES[name](SOURCES[name].Config(path=str(path), **options))


def png(value: int = 9, size: tuple[int, int] = (40, 50)) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", size, value).save(buffer, "PNG")
    return buffer.getvalue()


def rows_of(made: Any) -> list[dict[str, Any]]:
    plan = made.plan()
    assert plan.column_names == list(PLAN_COLUMNS)
    rows: list[dict[str, Any]] = plan.to_pylist()
    return rows


def samples_of(made: Any) -> list[Sample | str]:
    """The sample of every row as another process reads it, or the reason why there is none."""
    found: list[Sample | str] = []
    for row in rows_of(made):
        try:
            found.append(pickle.loads(pickle.dumps(made)).sample(row))
        except BadImageError as error:
            found.append(str(error))
    return found


def put(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


# ---- files


def test_links_in_a_circle_end_and_every_file_is_listed_once(tmp_path: Path) -> None:
    put(tmp_path / "a/Röntgen bild #1 [x].png", png())
    put(tmp_path / "b.png", png())
    put(tmp_path / ".hidden/c.png", png())
    put(tmp_path / "a/._junk.png", b"junk")
    (tmp_path / "a/up").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path / "a")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "self.png").symlink_to(tmp_path / "self.png")
    os.mkfifo(tmp_path / "pipe.png")
    found = list_files(str(tmp_path))
    assert sorted(name.rpartition("/")[2] for name in found) == [
        "Röntgen bild #1 [x].png",
        "b.png",
        "gone.png",
        "self.png",
    ]
    made = source("folder", tmp_path)
    reasons = [sample for sample in samples_of(made) if isinstance(sample, str)]
    assert len(rows_of(made)) == 4 and reasons == ["file not found", "file can't be read: OSError"]


def test_folders_that_give_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    put(tmp_path / "scans/a.dcm", b"x")
    put(tmp_path / "file.png", png())
    for name, path, message in (
        ("folder", tmp_path / "absent", "no such file or folder"),
        ("folder", tmp_path / "empty", "holds 0 files and no image"),
        ("folder", tmp_path / "scans", "for DICOM use configs/sources/dicom.yaml"),
        ("folder", tmp_path / "file.png", "is a file: name the folder"),
        ("dicom", tmp_path / "empty", "is empty"),
        ("parquet", tmp_path / "scans", "no file that ends in .parquet"),
        ("webdataset", tmp_path / "scans", "no file that ends in .tar"),
        ("hf", tmp_path / "scans", "holds no dataset"),
    ):
        with pytest.raises(ValueError, match=message):
            source(name, path).plan()
    for name in ("folder", "dicom", "parquet", "webdataset", "hf"):
        with pytest.raises(ValueError, match=r"source\.path is not set"):
            source(name, "")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    put(tmp_path / "locked/a.png", png())
    (tmp_path / "locked").chmod(0)
    try:
        with pytest.raises(ValueError, match="no permission to read it"):
            source("folder", tmp_path).plan()
    finally:
        (tmp_path / "locked").chmod(0o755)


def test_other_file_systems_are_listed_by_fsspec() -> None:
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.pipe({"/sources-test/a b/1.png": png(3), "/sources-test/a b/1.txt": b"Clear.", "/sources-test/.x/2.png": png()})
    try:
        made = source("folder", "memory://sources-test")
        (row,) = rows_of(made)
        assert row["image_id"] == "a b/1.png" and row["report"] == "Clear."
        assert made.sample(row).image_HW[0, 0] == 3
    finally:
        fs.rm("/sources-test", recursive=True)


def test_archives_are_folders(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("in/1.png", png(4))
    (sample,) = samples_of(source("folder", f"zip://in::{tmp_path}/a.zip"))
    assert isinstance(sample, Sample) and sample.image_HW[0, 0] == 4


def test_importing_the_sources_stays_light() -> None:
    heavy = ("pydicom", "gdcm", "scipy", "pandas", "torch", "ray", "datasets")
    code = f"import sys, medim_ray.data.sources; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# ---- folder


def test_a_folder_with_reports_and_columns_in_its_paths(tmp_path: Path) -> None:
    put(tmp_path / "train/effusion/p1_a.png", png())
    put(tmp_path / "train/effusion/p1_a.txt", "Ergu\xdf links.".encode("latin-1"))
    put(tmp_path / "test/normal/p2_b.jpg", png())
    put(tmp_path / "test/normal/p2_b.txt", b"\xef\xbb\xbfClear.")
    put(tmp_path / "notes.txt", "no image of this name")
    pattern = "(?P<split>[^/]+)/(?P<finding>[^/]+)/(?P<patient>[^_]+)_"
    one, two = rows_of(source("folder", tmp_path, path_pattern=pattern))
    assert (one["image_id"], one["patient_id"], one["split"]) == ("test/normal/p2_b.jpg", "p2", "test")
    assert one["report"] == "Clear." and two["report"] == "Erguß links."
    assert two["labels"] == {"finding": "effusion"} and two["location"] == f"{tmp_path}/train/effusion/p1_a.png"
    assert [row["report"] for row in rows_of(source("folder", tmp_path, reports=False))] == ["", ""]
    with pytest.raises(ValueError, match=r"does not fit 1 of 2 paths: 'test/normal/p2_b.jpg'"):
        source("folder", tmp_path, path_pattern="train/(?P<finding>[^/]+)").plan()
    for bad in ("(", "no groups"):
        with pytest.raises(ValueError, match="path_pattern="):
            source("folder", tmp_path, path_pattern=bad)


# ---- dicom


def test_a_dicom_tree(tmp_path: Path) -> None:
    pixels = gradient(bits=8)
    put(tmp_path / "p/IM1", file_of(dataset(pixels, SOPInstanceUID="1.1")))
    put(tmp_path / "p/same.dcm", file_of(dataset(pixels, SOPInstanceUID="1.2", PatientID="other")))
    put(tmp_path / "q/same uid.dcm", file_of(dataset(255 - pixels, SOPInstanceUID="1.2", PatientID="other")))
    put(tmp_path / "q/burned.dcm", file_of(dataset(pixels, SOPInstanceUID="1.3", BurnedInAnnotation="YES")))
    put(tmp_path / "q/knee.dcm", file_of(dataset(pixels, SOPInstanceUID="1.4", BodyPartExamined="KNEE")))
    put(tmp_path / "q/broken.dcm", b"\0" * 200)
    put(tmp_path / "q/DICOMDIR", b"\0" * 200)
    put(tmp_path / "q/readme.txt", "not an image")
    made = source("dicom", tmp_path)
    rows = rows_of(made)
    ids = [row["image_id"] for row in rows]
    assert {"1.1", "1.3", "1.4", "q/broken.dcm"} < set(ids) and len(set(ids)) == len(rows) == 6
    shared = [i for i in ids if i.startswith("1.2-")]
    assert len(shared) == 2 and [row["patient_id"] for row in rows if row["image_id"] in shared] == ["other"] * 2
    by_id = dict(zip(ids, samples_of(made), strict=True))
    assert by_id["1.3"] == "BurnedInAnnotation is YES: text in the pixels may name the patient"
    assert by_id["1.4"] == "body part 'KNEE' is not wanted" and by_id["q/broken.dcm"] == "not a DICOM file"
    assert [by_id[i].flags for i in shared] == [("shared_sop_uid",)] * 2
    first = by_id["1.1"]
    assert isinstance(first, Sample) and np.array_equal(first.image_HW, pixels) and first.flags == ()
    assert first.labels == {"view": "PA", "sex": "F", "age": "62", "modality": "DX"} and first.view == "PA"
    # the ids do not depend on where the tree lies, nor on the order in which files are found
    (tmp_path / "moved").mkdir()
    for name in ("p", "q"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    assert [row["image_id"] for row in rows_of(source("dicom", tmp_path / "moved"))] == ids


def test_dicom_options(tmp_path: Path) -> None:
    data = file_of(dataset(gradient(), bits=12, BurnedInAnnotation="YES", BodyPartExamined="KNEE", Modality="CT"))
    put(tmp_path / "a.dcm", data)
    put(tmp_path / "b.ima", data)
    put(tmp_path / "list.txt", f"# chosen\na.dcm\n{tmp_path}/b.ima\na.dcm\nabsent.dcm\n")
    keep: dict[str, Any] = {"burned_in": "keep", "body_parts": (), "modalities": (), "fields": ("modality", "rows")}
    one, two, three = samples_of(source("dicom", tmp_path / "list.txt", **keep))
    assert isinstance(one, Sample) and isinstance(two, Sample) and three == "file not found"
    assert one.flags == ("burned_in_annotation", "shared_sop_uid") and one.labels == {"modality": "CT", "rows": "48"}
    assert len(rows_of(source("dicom", tmp_path, pattern="*.dcm"))) == 1
    assert len(rows_of(source("dicom", tmp_path / "b.ima"))) == 1
    with pytest.raises(ValueError, match=r"'PatientName' is never read from a header; those that can be are view, sex"):
        source("dicom", tmp_path, fields=("PatientName",))
    with pytest.raises(ValueError, match=r"none like source\.pattern"):
        source("dicom", tmp_path, pattern="*.xyz").plan()


def test_dicom_files_in_a_table(tmp_path: Path) -> None:
    put(tmp_path / "a.dcm", file_of(dataset(gradient(bits=8), PhotometricInterpretation="MONOCHROME1")))
    put(tmp_path / "b.dcm", file_of(dataset(gradient(bits=8), BurnedInAnnotation="YES")))
    header = "image_id,patient_id,file,view,sex,age,notes\n"
    put(tmp_path / "t.csv", header + "a,p,a.dcm,PA,F,3,Clear.\nb,p,b.dcm,PA,F,3,Clear.\n")
    one, two = samples_of(source("csv", tmp_path / "t.csv"))
    assert isinstance(one, Sample) and np.array_equal(one.image_HW, 255 - gradient(bits=8)) and one.report == "Clear."
    assert isinstance(two, str) and two.startswith("BurnedInAnnotation is YES")


# ---- parquet


def test_parquet_with_bytes_in_several_files(tmp_path: Path) -> None:
    for part in range(2):
        table = pa.table(
            {
                "image": [png(10 * part + k) for k in range(5)],
                "report": [f"Report {part}-{k}." for k in range(5)],
                "patient_id": [k // 2 for k in range(5)],
                "sex": ["F", None, "M", "", "F"],
                "score": [0.0, 1.0, float("nan"), None, 2.5],
            }
        )
        (tmp_path / f"d/part {part}.parquet").parent.mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / f"d/part {part}.parquet", row_group_size=2)
    made = source("parquet", tmp_path / "d", label_columns=("sex", "score"))
    rows = rows_of(made)
    assert [row["image_id"] for row in rows[:2]] == ["part 0.parquet:0", "part 0.parquet:1"] and len(rows) == 10
    assert rows[5]["labels"] == {"sex": "F", "score": "0"} and rows[7]["labels"] == {"sex": "M", "score": None}
    assert rows[9]["report"] == "Report 1-4." and rows[9]["patient_id"] == "2"
    values = [sample.image_HW[0, 0] for sample in samples_of(made) if isinstance(sample, Sample)]
    assert values == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]
    assert len(rows_of(source("parquet", tmp_path / "d/part 0.parquet"))) == 5


def test_parquet_with_paths_and_missing_images(tmp_path: Path) -> None:
    put(tmp_path / "img/a.png", png(7))
    struct = pa.array([{"bytes": png(8), "path": None}, {"bytes": None, "path": "img/a.png"}, None])
    pq.write_table(pa.table({"image": struct}), tmp_path / "struct.parquet")
    pq.write_table(pa.table({"path": ["img/a.png", None], "text": ["Clear.", None]}), tmp_path / "paths.pq")
    one, two, three = samples_of(source("parquet", tmp_path / "struct.parquet"))
    assert isinstance(one, Sample) and isinstance(two, Sample) and three == "no image in this row"
    assert (one.image_HW[0, 0], two.image_HW[0, 0]) == (8, 7)
    one, two = samples_of(source("parquet", tmp_path / "paths.pq"))
    assert isinstance(one, Sample) and one.report == "Clear." and two == "no image path"


def test_parquet_that_does_not_fit(tmp_path: Path) -> None:
    pq.write_table(pa.table({"pixels": [png()], "text": ["x"]}), tmp_path / "t.parquet")
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "none.parquet")
    put(tmp_path / "cut.parquet", (tmp_path / "t.parquet").read_bytes()[:-20])
    for name, options, message in (
        ("t.parquet", {}, r"no column with images by a usual name.*Its columns: pixels, text"),
        ("t.parquet", {"image_column": "pixel"}, r"source.image_column='pixel'.*Did you mean 'pixels'\?"),
        ("t.parquet", {"image_column": "pixels", "report_column": "report"}, "source.report_column='report'"),
        ("none.parquet", {}, "has columns and no row"),
        ("cut.parquet", {}, "is no Parquet or Arrow file, or was cut off"),
        ("absent.parquet", {}, "no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            source("parquet", tmp_path / name, **options).plan()
    pq.write_table(pa.table({"image": [3]}), tmp_path / "int.parquet")
    with pytest.raises(ValueError, match="holds int64: it must hold the bytes"):
        source("parquet", tmp_path / "int.parquet").plan()


def test_parquet_with_huge_row_groups_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columnar, "_MAX_GROUP", 1 << 20)  # of 256 MiB, for the time it takes to write them
    table = pa.table({"image": [bytes(1 << 18)] * 10})
    for name, size in (("big.parquet", 10), ("small.parquet", 3)):
        pq.write_table(table, tmp_path / name, row_group_size=size, use_dictionary=False)
    with pytest.raises(ValueError, match=r"row groups of 10 images \(2 MiB\).*row_group_size=100"):
        source("parquet", tmp_path / "big.parquet").plan()
    assert source("parquet", tmp_path / "small.parquet").plan().num_rows == 10


# ---- hf

FEATURES = {
    "image": {"_type": "Image"},
    "text": {"dtype": "string", "_type": "Value"},
    "label": {"names": ["normal", "pneumonia"], "_type": "ClassLabel"},
}


def hf_table(values: list[int]) -> pa.Table:
    table = pa.table(
        {
            "image": [{"bytes": png(v), "path": f"{v}.png"} for v in values],
            "text": [f"Report {v}." for v in values],
            "label": [v % 2 for v in values],
        }
    )
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": FEATURES}})})


def save_to_disk(folder: Path, values: list[int]) -> None:
    """As Dataset.save_to_disk lays it out: Arrow streams of a few batches, state.json, dataset_info.json."""
    folder.mkdir(parents=True)
    name = "data-00000-of-00001.arrow"
    table = hf_table(values)
    with pa.ipc.new_stream(str(folder / name), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    put(folder / "state.json", json.dumps({"_data_files": [{"filename": name}], "_split": "train"}))
    put(folder / "dataset_info.json", json.dumps({"features": FEATURES}))


def test_a_dataset_that_save_to_disk_wrote(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "one", [1, 2, 3, 4, 5])
    made = source("hf", tmp_path / "one")
    rows = rows_of(made)
    assert {row["split"] for row in rows} == {""} and rows[2]["image_id"] == "data-00000-of-00001.arrow:2"
    assert [row["labels"]["label"] for row in rows] == ["pneumonia", "normal", "pneumonia", "normal", "pneumonia"]
    samples = [sample for sample in samples_of(made) if isinstance(sample, Sample)]
    assert [sample.image_HW[0, 0] for sample in samples] == [1, 2, 3, 4, 5] and samples[4].report == "Report 5."
    for split, values in (("train", [1, 2, 3]), ("test", [4])):
        save_to_disk(tmp_path / "dict" / split, values)
    put(tmp_path / "dict/dataset_dict.json", json.dumps({"splits": ["train", "test"]}))
    assert [row["split"] for row in rows_of(source("hf", tmp_path / "dict"))] == ["train"] * 3 + ["test"]
    assert {row["split"] for row in rows_of(source("hf", tmp_path / "dict", official_split=False))} == {""}
    put(tmp_path / "one/state.json", json.dumps({"_data_files": [], "_indices_data_files": [{"filename": "i.arrow"}]}))
    with pytest.raises(ValueError, match="flatten_indices"):
        made.plan()


def test_a_dataset_as_parquet_files(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    pq.write_table(hf_table([1, 2]), tmp_path / "data/train-00000-of-00001.parquet")
    pq.write_table(hf_table([3]), tmp_path / "data/validation-00000-of-00001.parquet")
    put(tmp_path / "README.md", "a card")
    made = source("hf", tmp_path)
    assert [row["split"] for row in rows_of(made)] == ["train", "train", "validation"]
    assert [s.image_HW[0, 0] for s in samples_of(made) if isinstance(s, Sample)] == [1, 2, 3]
    with pytest.raises(ValueError, match="copy the folder to disk"):
        source("hf", "s3://bucket/data")


# ---- webdataset


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def three(path: Path) -> Path:
    members: dict[str, bytes] = {}
    for k in range(3):
        about = {"patient_id": f"p{k}", "view": "PA", "age": 40 + k}
        members |= {
            f"a/{k}.png": png(k, (200, 200)),
            f"a/{k}.txt": b"Clear.",
            f"a/{k}.json": json.dumps(about).encode(),
        }
    return write_tar(path, members)


def test_tars_of_samples(tmp_path: Path) -> None:
    three(tmp_path / "shard 0.tar")
    write_tar(tmp_path / "shard 1.tar", {"b.seg.png": png(1), "b.txt": b"No image.", "c.jpg": png(5), "._c.jpg": b"x"})
    made = source("webdataset", tmp_path)
    rows = rows_of(made)
    assert [row["image_id"] for row in rows] == [f"shard 0.tar:a/{k}" for k in range(3)] + [
        "shard 1.tar:b",
        "shard 1.tar:c",
    ]
    assert rows[1] | {"location": ""} == {
        "image_id": "shard 0.tar:a/1",
        "location": "",
        "patient_id": "p1",
        "view": "PA",
        "report": "Clear.",
        "split": "",
        "labels": {"view": "PA", "age": "41"},
    }
    samples = samples_of(made)
    assert samples[3] == "no image of this key in the tar"
    assert [s.image_HW[0, 0] for s in samples if isinstance(s, Sample)] == [0, 1, 2, 5]
    assert rows_of(source("webdataset", tmp_path, image_column="jpg"))[0]["location"] == ""
    with pytest.raises(ValueError, match=r"source.report_column='rapport'.*Its columns: txt, patient_id, view, age"):
        source("webdataset", tmp_path, report_column="rapport").plan()


@pytest.mark.parametrize("keep", [0.2, 0.4, 0.5, 0.6, 0.62, 0.9])
def test_a_tar_that_was_cut_gives_what_came_before(keep: float, tmp_path: Path) -> None:
    data = three(tmp_path / "whole.tar").read_bytes()
    put(tmp_path / "cut/a.tar", data[: int(len(data.rstrip(b"\0")) * keep)])
    samples = samples_of(source("webdataset", tmp_path / "cut"))
    whole = [sample for sample in samples if isinstance(sample, Sample)]
    assert len(whole) == len(samples) - 1 and samples[-1] == "the tar was cut off in this sample: it has no end mark"
    assert [sample.image_HW[0, 0] for sample in whole] == list(range(len(whole)))


def test_tars_that_are_none(tmp_path: Path) -> None:
    import gzip

    put(tmp_path / "a.tar", gzip.compress(three(tmp_path / "whole.tar").read_bytes()))
    put(tmp_path / "b.tar", "no tar" * 200)
    put(tmp_path / "c/empty.tar", b"\0" * 10240)
    for name, message in (("a.tar", "unpack it with gunzip"), ("b.tar", "is no tar file"), ("c", "are empty")):
        with pytest.raises(ValueError, match=message):
            source("webdataset", tmp_path / name).plan()
    with pytest.raises(ValueError, match="the ending of the images"):
        source("webdataset", tmp_path, image_column="image")
