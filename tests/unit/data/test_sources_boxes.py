"""Public datasets of DICOM files with boxes and masks, each from a small tree in exactly the published layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medim_ray.data.encode import RowEncoder
from medim_ray.data.images import BadImageError, ImageEncoder, decode_mask
from medim_ray.data.listing import final_rows
from medim_ray.data.sources.base import Sample
from medim_ray.data.sources.published import box_mask, rle_mask
from medim_ray.data.splits import SplitConfig
from tests.unit.data.dicom_files import dataset, file_of, gradient
from tests.unit.data.test_sources_published import by_id, known, put, samples_of, source


def dicom(path: Path, **tags: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(file_of(dataset(gradient(48, 64, bits=8), **tags)))


def truth_of(sample: Sample | str) -> dict[str, Any]:
    assert isinstance(sample, Sample)
    return {truth.finding: truth.mask_HW for truth in sample.truth}


def code_of(mask_HW: Any) -> str:
    """The published form: down the columns, each skip counted from the end of the run before."""
    flat = np.concatenate([[0], mask_HW.T.ravel().astype(int), [0]])
    starts, ends = np.flatnonzero(np.diff(flat) == 1), np.flatnonzero(np.diff(flat) == -1)
    skips = starts - np.concatenate([[0], ends[:-1]])[: len(starts)]
    return " ".join(f"{skip} {end - start}" for skip, start, end in zip(skips, starts, ends, strict=True)) or "-1"


@given(height=st.integers(1, 12), width=st.integers(1, 12), seed=st.integers(0, 1000), share=st.floats(0, 1))
def test_run_lengths_give_the_mask_back(height: int, width: int, seed: int, share: float) -> None:
    mask_HW = np.random.default_rng(seed).random((height, width)) < share
    assert np.array_equal(rle_mask([code_of(mask_HW)], (height, width)), mask_HW)


def test_the_published_example_of_a_code() -> None:
    mask_HW = rle_mask(["387620 23 996 33 986 43"], (1024, 1024))  # from the description of SIIM-ACR
    column, row = divmod(387620, 1024)
    assert mask_HW[row : row + 23, column].all() and mask_HW.sum() == 23 + 33 + 43
    assert not mask_HW[row + 23, column] and not mask_HW[row - 1, column]
    assert mask_HW[row + 23 + 996 - 1024 : row + 52 + 996 - 1020, column + 1].any()


@pytest.mark.parametrize("code", ["1 2 3", "a b", "0 999999", "-5 2"])
def test_codes_that_are_none(code: str) -> None:
    with pytest.raises(BadImageError, match="mask code"):
        rle_mask([code], (10, 10))


def test_boxes_outside_the_image_are_cut() -> None:
    assert box_mask([(-5, -5, 3, 2), (8, 8, 100, 100), (4, 4, 4, 9)], (10, 10)).sum() == 6 + 4


FINDINGS = ("Aortic enlargement", "Cardiomegaly", "No finding")


@pytest.fixture
def vindr(tmp_path: Path) -> Path:
    votes = {"aa": ("110", "010", "000"), "bb": ("001", "001", "001")}  # a reader's votes for each of FINDINGS
    lines = [f"image_id,rad_id,{','.join(FINDINGS)}"]
    lines += [f"{name},R{k},{','.join(bits)}" for name, readers in votes.items() for k, bits in enumerate(readers)]
    put(tmp_path / "annotations/image_labels_train.csv", "\n".join(lines) + "\n")
    put(tmp_path / "annotations/image_labels_test.csv", f"image_id,{','.join(FINDINGS)},Other disease\ncc,0,1,0,1\n")
    boxes = "image_id,rad_id,class_name,x_min,y_min,x_max,y_max\n"
    boxes += "aa,R0,Cardiomegaly,10,10,20,20\naa,R1,Cardiomegaly,15,10,30,18.4\naa,R0,Aortic enlargement,0,0,5,5\n"
    boxes += "bb,R0,No finding,,,,\n"
    put(tmp_path / "annotations/annotations_train.csv", boxes)
    put(
        tmp_path / "annotations/annotations_test.csv",
        "image_id,class_name,x_min,y_min,x_max,y_max\ncc,Cardiomegaly,1,1,3,3\n",
    )
    dicom(tmp_path / "train/aa.dicom", PhotometricInterpretation="MONOCHROME1", BodyPartExamined=None)
    dicom(tmp_path / "train/bb.dicom")
    dicom(tmp_path / "test/cc.dicom")
    return tmp_path


def test_vindr_readers_and_boxes(vindr: Path) -> None:
    rows = by_id(source("vindr_cxr", vindr))
    assert known(rows["aa"]) == {"Aortic enlargement": "0", "Cardiomegaly": "1", "No finding": "0"}
    assert known(rows["cc"])["Other diseases"] == "1" and known(rows["bb"])["No finding"] == "1"
    assert rows["cc"]["split"] == "test" and {rows["aa"]["split"], rows["bb"]["split"]} <= {"train", "val"}
    assert rows["aa"]["location"] == f"{vindr}/train/aa.dicom"
    samples = samples_of(source("vindr_cxr", vindr))
    expected = np.zeros((48, 64), bool)
    expected[10:20, 10:20] = True
    expected[10:18, 15:30] = True
    masks = truth_of(samples["aa"])
    assert list(masks) == ["Cardiomegaly"] and np.array_equal(masks["Cardiomegaly"], expected)
    assert truth_of(samples["bb"]) == {} and truth_of(samples["cc"])["Cardiomegaly"].sum() == 4
    sample = samples["aa"]
    assert isinstance(sample, Sample) and np.array_equal(sample.image_HW, 255 - gradient(48, 64, bits=8))
    assert sample.view == "PA" and sample.labels["sex"] == "F"
    for readers, value in (("any", "1"), ("all", "0")):
        row = by_id(source("vindr_cxr", vindr, readers=readers))["aa"]
        assert known(row)["Aortic enlargement"] == value
        assert set(truth_of(source("vindr_cxr", vindr, readers=readers).sample(row))) == (
            {"Aortic enlargement", "Cardiomegaly"} if readers == "any" else set()
        )
    assert {row["split"] for row in by_id(source("vindr_cxr", vindr, official_split=False)).values()} == {""}


def test_vindr_of_kaggle(tmp_path: Path) -> None:
    put(
        tmp_path / "train.csv",
        "image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max\n"
        "aa,Cardiomegaly,3,R9,10,10,20,20\naa,Cardiomegaly,3,R8,15,10,30,18\naa,Nodule/Mass,8,R8,0,0,5,5\n"
        "aa,No finding,14,R7,,,,\nbb,No finding,14,R8,,,,\nbb,No finding,14,R9,,,,\nbb,No finding,14,R10,,,,\n",
    )
    dicom(tmp_path / "train/aa.dicom")
    made = source("vindr_cxr", tmp_path)
    rows = by_id(made)
    assert known(rows["aa"]) == {"Cardiomegaly": "1", "No finding": "0", "Nodule/Mass": "0"}
    assert known(rows["bb"])["No finding"] == "1" and rows["aa"]["split"] in ("train", "val")
    samples = samples_of(made)
    assert set(truth_of(samples["aa"])) == {"Cardiomegaly"} and samples["bb"] == "file not found"


def test_rsna(tmp_path: Path) -> None:
    labels = "patientId,x,y,width,height,Target\n0004cfab,,,,,0\n00436515,10.0,5.0,20.0,30.0,1\n00436515,40,5,10,10,1\n"
    put(tmp_path / "stage_2_train_labels.csv", labels + "absent,,,,,0\n")
    put(
        tmp_path / "stage_2_detailed_class_info.csv",
        "patientId,class\n0004cfab,No Lung Opacity / Not Normal\n00436515,Lung Opacity\n00436515,Lung Opacity\n",
    )
    for name in ("0004cfab", "00436515"):
        dicom(tmp_path / f"stage_2_train_images/{name}.dcm", SOPClassUID="1.2.840.10008.5.1.4.1.1.7", ViewPosition="AP")
    dicom(tmp_path / "stage_2_test_images/0000a175.dcm")
    made = source("rsna", tmp_path)
    rows, samples = by_id(made), samples_of(made)
    assert set(rows) == {"0004cfab", "00436515", "absent", "0000a175"} and samples["absent"] == "file not found"
    assert known(rows["00436515"]) == {"Pneumonia": "1", "class": "Lung Opacity"} and known(rows["0000a175"]) == {}
    mask = truth_of(samples["00436515"])["Pneumonia"]
    assert mask.sum() == 20 * 30 + 100 and mask[5:35, 10:30].all() and mask[5:15, 40:50].all()
    sample = samples["0004cfab"]
    assert isinstance(sample, Sample) and sample.truth == () and sample.flags == ("secondary_capture",)
    assert sample.view == "AP" and sample.labels == {
        "Pneumonia": "0",
        "class": "No Lung Opacity / Not Normal",
        "view": "AP",
        "sex": "F",
        "age": "62",
    }
    assert {row["patient_id"] for row in rows.values()} == {""}
    mapping = [{"subset_img_id": "0004cfab", "img_id": "00012345_003.png", "orig_labels": ["No Finding"]}]
    put(tmp_path / "pneumonia-challenge-dataset-mappings_2018.json", json.dumps(mapping))
    assert by_id(made)["0004cfab"]["patient_id"] == "12345"


@pytest.mark.parametrize(
    ("table", "column"), [("train-rle.csv", " EncodedPixels"), ("stage_2_train.csv", "EncodedPixels")]
)
def test_siim_acr(table: str, column: str, tmp_path: Path) -> None:
    left, right = np.zeros((2, 48, 64), bool)
    left[5:10, 40:50] = True
    right[5:12, 10:14] = True
    lines = [f"ImageId,{column}", f"1.2.3, {code_of(left)}", f"1.2.3, {code_of(right)}", "1.2.4, -1", "1.2.5, -1"]
    put(tmp_path / table, "\n".join(lines) + "\n")
    for uid in ("1.2.3", "1.2.4"):
        dicom(tmp_path / f"dicom-images-train/{uid}.100/{uid}.200/{uid}.dcm", SOPInstanceUID=uid)
    dicom(tmp_path / "dicom-images-test/1.2.9.100/1.2.9.200/1.2.9.dcm")
    made = source("siim_acr", tmp_path)
    rows, samples = by_id(made), samples_of(made)
    assert {name: known(row) for name, row in rows.items()} == {
        "1.2.3": {"Pneumothorax": "1"},
        "1.2.4": {"Pneumothorax": "0"},
        "1.2.5": {"Pneumothorax": "0"},
        "1.2.9": {},
    }
    assert np.array_equal(truth_of(samples["1.2.3"])["Pneumothorax"], left | right)
    assert truth_of(samples["1.2.4"]) == {} and samples["1.2.5"] == "file not found"
    rows_out, facts = RowEncoder(made, ImageEncoder(ImageEncoder.Config(format="png")))(
        final_rows(made.plan(), SplitConfig(), "salt")
    )
    stored = {row["image_id"]: row for row in rows_out.to_pylist()}  # as they go into the shards
    assert np.array_equal(decode_mask(stored["1.2.3"]["truth"][0]["mask"]), left | right)
    assert set(stored) == {"1.2.3", "1.2.4", "1.2.9"} and [entry[1] for entry in facts.quarantined] == ["1.2.5"]
    put(tmp_path / "wrong" / table, f"ImageId,{column}\n1.2.4, 5000 3\n")
    dicom(tmp_path / "wrong/1.2.4.dcm")
    assert samples_of(source("siim_acr", tmp_path / "wrong")) == {"1.2.4": "mask code that leaves the image"}


@pytest.mark.parametrize("ending", ["", ".dcm"])
def test_candid_ptx(ending: str, tmp_path: Path) -> None:
    mask = np.zeros((48, 64), bool)
    mask[5:10, 40:50] = True
    one, two = "8.5.323.1", "7.8.081.2"
    put(
        tmp_path / "Pneumothorax_reports.csv",
        "SOPInstanceUID,StudyInstanceUID,filename,EncodedPixels,Report\n"
        f'{one},s,P00012_20100101_1,{code_of(mask)},"Left pneumothorax,\nsmall."\n{one},s,P00012_20100101_1,0 3,again\n'
        f"{two},s,P00013_20100101_1,-1,No pneumothorax.\n",
    )
    put(tmp_path / "chest_tube.csv", f"anon_SOPUID,mask_rle\n{two},0 48\n{one},-1\n")
    dicom(tmp_path / f"dataset/{one}{ending}")
    dicom(tmp_path / f"dataset/{two}{ending}")
    made = source("candid_ptx", tmp_path)
    rows, samples = by_id(made), samples_of(made)
    assert rows[one]["patient_id"] == "P00012" and rows[one]["report"] == "Left pneumothorax,\nsmall."
    assert known(rows[one]) == {"Pneumothorax": "1", "Chest Tube": "0"} and known(rows[two])["Chest Tube"] == "1"
    mask[0:3, 0] = True
    assert np.array_equal(truth_of(samples[one])["Pneumothorax"], mask)
    assert truth_of(samples[two])["Chest Tube"][:, 0].all() and "Pneumothorax" not in truth_of(samples[two])
    assert "Rib Fracture" not in known(rows[one])
    put(tmp_path / "acute_rib_fracture.csv", f"anon_SOPUID,mask_rle\n{one},0 1\n")
    assert known(by_id(source("candid_ptx", f"{tmp_path}/"))[one])["Rib Fracture"] == "1"
