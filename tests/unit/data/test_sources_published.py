"""Public datasets of images in tables, each from a small tree in exactly the published layout."""

from __future__ import annotations

import gzip
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medim_ray.data.images import BadImageError
from medim_ray.data.sources import SOURCES
from medim_ray.data.sources.base import Sample
from medim_ray.data.sources.published import CHEXPERT_LABELS, chexpert_value, official, person, view_of
from medim_ray.reports.sections import split_sections


def source(name: str, path: Path | str, **options: Any) -> Any:
    return SOURCES[name](SOURCES[name].Config(path=str(path), **options))


def by_id(made: Any) -> dict[str, dict[str, Any]]:
    return {row["image_id"]: row for row in made.plan().to_pylist()}


def samples_of(made: Any) -> dict[str, Sample | str]:
    found: dict[str, Sample | str] = {}
    for image_id, row in by_id(made).items():
        try:
            found[image_id] = made.sample(row)
        except BadImageError as error:
            found[image_id] = str(error)
    return found


def known(row: dict[str, Any]) -> dict[str, str]:
    return {name: value for name, value in row["labels"].items() if value is not None}


def image(path: Path, value: int = 9, bits: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((50, 40), value, np.uint8 if bits == 8 else np.uint16)
    Image.fromarray(pixels).save(path)


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def chexpert_row(**stated: str) -> str:
    return ",".join(stated.get(name.replace(" ", "_"), "") for name in CHEXPERT_LABELS)


def test_what_the_tables_mean() -> None:
    assert [view_of(v) for v in ("pa", "AP Supine", "AP_horizontal", "LL", "L", "Frontal", "COSTAL", "")] == [
        *("PA", "AP", "AP", "LATERAL", "LATERAL", "FRONTAL", "COSTAL", "")
    ]
    assert person("PA", "Female", "058Y") == {"view": "PA", "sex": "F", "age": "58"}
    assert person("", "Unknown", "") == {"view": "", "sex": "", "age": ""}
    assert [person("", "", age)["age"] for age in ("011M", "103", "411Y", "85 or more", "4.0")] == [
        "0",
        "90",
        "",
        "85",
        "4",
    ]
    policies = ("ignore", "zeros", "ones", "multiclass")
    assert [chexpert_value("-1.0", policy) for policy in policies] == ["", "0", "1", "-1"]
    assert [chexpert_value(text, "ones") for text in ("1.0", "0.0", "", "1")] == ["1", "0", "", "1"]
    dealt = [official(f"p{k}", k % 10 == 0) for k in range(1000)]
    assert dealt.count("test") == 100 and 60 < dealt.count("val") < 130


@pytest.mark.parametrize(
    "name", sorted(set(SOURCES) - {"csv", "dicom", "folder", "parquet", "hf", "phantom", "webdataset"})
)
def test_every_dataset_refuses_another_folder_and_no_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("nothing of a dataset")
    with pytest.raises(ValueError, match=r"source\.path is not set"):
        source(name, "")
    with pytest.raises(ValueError, match=r"holds (no|neither) .*"):
        source(name, tmp_path).plan()
    assert len(SOURCES[name].__doc__ or "") > 40


# ---- MIMIC-CXR-JPG


@pytest.fixture
def mimic(tmp_path: Path) -> Path:
    """Three studies of two patients, four images, one of them absent; tables packed as published."""
    root = tmp_path / "mimic-cxr-jpg/2.1.0"
    rows = [
        ("02aa804e-bde0afdd", "10000032", "50414267", "PA", "train"),
        ("174413ec-4ec4c1f7", "10000032", "50414267", "LATERAL", "train"),
        ("2a2277a9-b0ded155", "10000032", "53189527", "AP", "train"),
        ("68b5c4b1-227d0485", "11000001", "54577367", "", "validate"),
    ]
    about, order = "PerformedProcedureStepDescription", sorted(CHEXPERT_LABELS)
    stated = ({"Edema": "-1.0", "No Finding": "1.0"}.get(name, "") for name in order)
    tables = {
        "metadata": [f"dicom_id,subject_id,study_id,{about},ViewPosition,Rows,Columns,StudyDate,StudyTime"]
        + [f'{d},{p},{s},"CHEST (PA AND LAT)",{v},3056,2544,21800506,213014.531' for d, p, s, v, _ in rows],
        "split": ["dicom_id,study_id,subject_id,split"] + [f"{d},{s},{p},{x}" for d, p, s, _, x in rows],
        "chexpert": [f"subject_id,study_id,{','.join(order)}", f"10000032,50414267,{','.join(stated)}"],
    }
    for name, lines in tables.items():
        put(root / f"mimic-cxr-2.0.0-{name}.csv.gz", "\n".join(lines) + "\n")
    for d, p, s, _, _ in rows[:3]:
        image(root / f"files/p{p[:2]}/p{p}/s{s}/{d}.jpg")
    return root


REPORT = "                                 FINAL REPORT\n FINDINGS: \n \n No effusion.\n \n IMPRESSION: \n \n Normal.\n"


def test_mimic_cxr_with_reports_from_the_zip(mimic: Path) -> None:
    with zipfile.ZipFile(mimic / "mimic-cxr-reports.zip", "w") as archive:
        archive.writestr("files/p10/p10000032/s50414267.txt", REPORT)
        archive.writestr("files/p10/p10000032/s99999999.txt", "of no image here")
    made = source("mimic_cxr", mimic)
    rows = by_id(made)
    pa, absent = rows["02aa804e-bde0afdd"], rows["68b5c4b1-227d0485"]
    assert pa["location"] == f"{mimic}/files/p10/p10000032/s50414267/02aa804e-bde0afdd.jpg"
    assert (
        split_sections(pa["report"]).findings == "No effusion." and pa["report"] == rows["174413ec-4ec4c1f7"]["report"]
    )
    assert (pa["patient_id"], pa["split"], pa["view"]) == ("10000032", "train", "PA")
    assert known(pa) == {"view": "PA", "No Finding": "1"} and absent["split"] == "validate" and absent["report"] == ""
    assert known(by_id(source("mimic_cxr", mimic, uncertain="ones"))["02aa804e-bde0afdd"])["Edema"] == "1"
    samples = samples_of(made)
    assert samples["68b5c4b1-227d0485"] == "file not found" and isinstance(samples["02aa804e-bde0afdd"], Sample)
    frontal = by_id(source("mimic_cxr", mimic, views=("PA", "AP"), official_split=False))
    assert {row["view"] for row in frontal.values()} == {"PA", "AP"} and {row["split"] for row in frontal.values()} == {
        ""
    }


def test_mimic_cxr_in_an_archive(mimic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named as a relative path, and read from another folder, as tasks are."""
    put(mimic / "mimic-cxr-reports/files/p10/p10000032/s50414267.txt", REPORT)
    shutil.make_archive(str(tmp_path / "mimic"), "zip", mimic)
    monkeypatch.chdir(tmp_path)
    made = source("mimic_cxr", "zip://::mimic.zip")
    rows = by_id(made)
    assert [bool(row["report"]) for row in rows.values()] == [True, True, False, False]
    monkeypatch.chdir("/")
    assert isinstance(made.sample(rows["02aa804e-bde0afdd"]), Sample)


def test_mimic_cxr_reports_in_folders_or_none(mimic: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no report of these studies.*source\.reports_path"):
        source("mimic_cxr", mimic).plan()
    assert {row["report"] for row in by_id(source("mimic_cxr", mimic, reports_path="none")).values()} == {""}
    put(tmp_path / "reports/files/p10/p10000032/s53189527.txt", REPORT)
    rows = by_id(source("mimic_cxr", mimic, reports_path=str(tmp_path / "reports")))
    assert [bool(row["report"]) for row in rows.values()] == [False, False, True, False]
    (mimic / "mimic-cxr-reports.zip").write_bytes(b"PK\3\4 cut")
    with pytest.raises(ValueError, match="is no zip file, or was cut off"):
        source("mimic_cxr", mimic).plan()
    with pytest.raises(ValueError, match=r"source.views=.*its views are AP, LATERAL, PA, unknown"):
        source("mimic_cxr", mimic, views=("COSTAL",), reports_path="none").plan()


# ---- CheXpert, BRAX


def test_chexpert(tmp_path: Path) -> None:
    root = tmp_path / "CheXpert small"
    head = f"Path,Sex,Age,Frontal/Lateral,AP/PA,{','.join(CHEXPERT_LABELS)}\n"
    base = "CheXpert-v1.0-small"
    uncertain = chexpert_row(Edema="-1.0", Cardiomegaly="1.0", Fracture="0.0")
    put(
        root / "train.csv",
        head
        + f"{base}/train/patient00001/study1/view1_frontal.jpg,Female,68,Frontal,AP,{uncertain}\n"
        + f"{base}/train/patient00001/study1/view2_lateral.jpg,Female,68,Lateral,,{uncertain}\n",
    )
    put(
        root / "valid.csv",
        head + f"{base}/valid/patient64541/study1/view1_frontal.jpg,Male,73,Frontal,PA,{chexpert_row()}\n",
    )
    image(root / "train/patient00001/study1/view1_frontal.jpg")
    made = source("chexpert", root)
    rows = by_id(made)
    first = rows["train/patient00001/study1/view1_frontal"]
    assert (first["patient_id"], first["split"], first["view"]) == ("patient00001", "train", "AP")
    assert known(first) == {"view": "AP", "sex": "F", "age": "68", "Cardiomegaly": "1", "Fracture": "0"}
    assert rows["train/patient00001/study1/view2_lateral"]["view"] == "LATERAL"
    assert rows["valid/patient64541/study1/view1_frontal"]["split"] == "val"
    assert isinstance(samples_of(made)["train/patient00001/study1/view1_frontal"], Sample)
    for policy, value in (("zeros", "0"), ("ones", "1"), ("multiclass", "-1")):
        labels = known(by_id(source("chexpert", root, uncertain=policy))["train/patient00001/study1/view1_frontal"])
        assert labels["Edema"] == value


@pytest.mark.parametrize("table", ["master_spreadsheet_update.csv", "master_spreadsheet.csv"])
def test_brax(table: str, tmp_path: Path) -> None:
    place = "id_0000ac2f-4f9b/Study_92612097.12990/Series_91447/image-81013-0"
    head = f",DicomPath,PngPath,PatientID,PatientSex,PatientAge,AccessionNumber,StudyDate,{','.join(CHEXPERT_LABELS)}"
    line = f"0,Anonymized_DICOMs/{place}.dcm,images/{place}.png,id_0000ac2f-4f9b,F,85 or more,Study_1,3000-01-01,"
    line += f"{chexpert_row(Cardiomegaly='1.0', Pneumonia='-1.0')},L,2000,2000,Philips"
    put(tmp_path / table, f"{head},ViewPosition,Rows,Columns,Manufacturer\n{line}\n")
    image(tmp_path / f"images/{place}.png")
    ((name, row),) = by_id(source("brax", tmp_path)).items()
    assert name == f"images/{place}" and row["patient_id"] == "id_0000ac2f-4f9b"
    assert known(row) == {"view": "LATERAL", "sex": "F", "age": "85", "Cardiomegaly": "1"}
    assert isinstance(samples_of(source("brax", tmp_path))[name], Sample)
    (dicom,) = by_id(source("brax", tmp_path, images="dicom")).values()
    assert dicom["location"] == f"{tmp_path}/Anonymized_DICOMs/{place}.dcm"


# ---- NIH ChestX-ray14


@pytest.mark.parametrize(("table", "ages"), [("Data_Entry_2017_v2020.csv", "58"), ("Data_Entry_2017.csv", "058Y")])
def test_nih(table: str, ages: str, tmp_path: Path) -> None:
    head = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position"
    head += ",OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"
    rest = ",2682,2749,0.143,0.143,"
    put(
        tmp_path / table,
        f"{head}\n00000001_000.png,Cardiomegaly|Effusion,0,1,{ages},M,PA{rest}\n"
        f"00000001_001.png,No Finding,1,1,{ages},M,AP{rest}\n00000002_000.png,Mass,0,2,411Y,F,PA{rest}\n",
    )
    put(tmp_path / "test_list.txt", "00000002_000.png\n")
    put(tmp_path / "train_val_list.txt", "00000001_000.png\n00000001_001.png\n")
    put(
        tmp_path / "BBox_List_2017.csv",
        "Image Index,Finding Label,Bbox [x,y,w,h],,,\n00000001_000.png,Effusion,10.2,20.4,15.0,10.0,,,\n"
        "00000001_000.png,Effusion,30,0,20,5,,,\n00000002_000.png,Infiltrate,1,1,1,1,,,\n",
    )
    image(tmp_path / "images_001/images/00000001_000.png")
    image(tmp_path / "images_002/images/00000002_000.png")
    made = source("nih", tmp_path)
    rows = by_id(made)
    first = rows["00000001_000.png"]
    assert first["location"] == f"{tmp_path}/images_001/images/00000001_000.png" and first["patient_id"] == "1"
    assert first["labels"]["Cardiomegaly"] == "1" and first["labels"]["Mass"] == "0" and first["labels"]["age"] == "58"
    assert rows["00000002_000.png"]["split"] == "test" and rows["00000002_000.png"]["labels"]["age"] is None
    assert {rows["00000001_000.png"]["split"], rows["00000001_001.png"]["split"]} in ({"train"}, {"val"})
    samples = samples_of(made)
    assert samples["00000001_001.png"] == "file not found"
    sample = samples["00000001_000.png"]
    assert isinstance(sample, Sample)
    (truth,) = sample.truth
    expected = np.zeros((50, 40), bool)
    expected[20:30, 10:25] = True
    expected[0:5, 30:40] = True  # the part of the box outside the image is cut off
    assert truth.finding == "Effusion" and np.array_equal(truth.mask_HW, expected)


# ---- PadChest


def test_padchest(tmp_path: Path) -> None:
    head = ",ImageID,ImageDir,StudyDate_DICOM,StudyID,PatientID,PatientBirth,PatientSex_DICOM,ViewPosition_DICOM"
    head += ",Projection,MethodProjection,Pediatric,ReportID,Report,MethodLabel,Labels,Localizations"
    head += ",LabelsLocalizationsBySentence"
    one = "216840111366964012819207061112010307142602253_04-014-084.png"
    two = "216840111366964012283393834152009033140208626_00-059-118.png"
    report = "sin hallazgos patologicos . cambio pulmonar cronico severo ."
    labels = """"['normal', ' Cardiomegaly ']",[],[]"""
    lines = [
        f"0,{one},0,20140915,S1,P1,1930.0,M,POSTEROANTERIOR,PA,Manual,No,1,{report},Physician,{labels}",
        f"""1,{two},54.0,20140915,S2,P2,,F,,AP_horizontal,Manual,No,2,,RNN_model,"['exclude']",[],[]""",
    ]
    put(tmp_path / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv", "\n".join([head, *lines]) + "\n")
    image(tmp_path / f"0/{one}", value=30000, bits=16)
    made = source("padchest", tmp_path, min_images=1)
    rows = by_id(made)
    assert rows[one]["location"] == f"{tmp_path}/0/{one}" and rows[two]["location"] == f"{tmp_path}/54/{two}"
    assert rows[one]["report"] == report and split_sections(report).body == report
    assert known(rows[one]) == {"view": "PA", "sex": "M", "age": "84", "normal": "1", "cardiomegaly": "1"}
    assert known(rows[two]) == {"view": "AP", "sex": "F"}
    sample = samples_of(made)[one]
    assert isinstance(sample, Sample) and sample.image_HW.dtype == np.uint16 and sample.image_HW[0, 0] == 30000
    assert known(by_id(source("padchest", tmp_path))[one]) == {"view": "PA", "sex": "M", "age": "84"}


# ---- COVID


@pytest.mark.parametrize(("train", "has_val"), [("train.txt", True), ("train_COVIDx9A.txt", False)])
def test_covidx(train: str, has_val: bool, tmp_path: Path) -> None:
    kinds = ("positive", "negative") if has_val else ("COVID-19", "normal")
    put(
        tmp_path / train,
        f"379 1e64990d1b40c1758a2aaa9c7f7a85_jumbo.jpeg {kinds[0]} cohen\n"
        f"COVID 7 COVID-7(1).png {kinds[0]} sirm\nabc def.png {kinds[1]}\n",
    )
    put(tmp_path / train.replace("train", "test"), f"379 x.png {kinds[1]} rsna\n")
    if has_val:
        put(tmp_path / "val.txt", "v1 v.png negative bimcv\n")
    image(tmp_path / "train/COVID-7(1).png")
    made = source("covidx", tmp_path)
    rows = by_id(made)
    assert len(rows) == 3 + 1 + has_val and rows["test/x.png"]["split"] == "test"
    odd = rows["train/COVID-7(1).png"]
    assert odd["patient_id"] == "sirm COVID 7" and known(odd) == {"class": kinds[0], "COVID-19": "1", "origin": "sirm"}
    assert rows["train/def.png"]["patient_id"] == "abc" and known(rows["train/def.png"])["COVID-19"] == "0"
    assert odd["split"] == "train" if has_val else odd["split"] in ("train", "val")
    assert isinstance(samples_of(made)["train/COVID-7(1).png"], Sample)
    put(tmp_path / train, "a line\n")
    with pytest.raises(ValueError, match=rf"line 1 of {train} is not of the form"):
        made.plan()


def test_covid19_image_data_collection(tmp_path: Path) -> None:
    head = "patientid,offset,sex,age,finding,RT_PCR_positive,survival,intubated,intubation_present,went_icu,in_icu"
    head += ",needed_supplemental_O2,extubated,temperature,pO2_saturation,leukocyte_count,neutrophil_count"
    head += ",lymphocyte_count,view,modality,date,location,folder,filename,doi,url,license,clinical_notes,other_notes,"

    def line(**cells: str) -> str:
        return ",".join(f'"{cells.get(name, "")}"' for name in head.split(","))

    xray = {"patientid": "2", "sex": "M", "age": "65", "modality": "X-ray", "folder": "images", "survival": "Y"}
    lines = [
        line(**xray, finding="Pneumonia/Viral/COVID-19", view="PA", filename="a.jpg", clinical_notes="Day 3, \nfever."),
        line(**xray, finding="todo", view="AP Supine", filename="b.png"),
        line(patientid="3", modality="CT", view="Axial", filename="ct.nii.gz", folder="volumes"),
    ]
    put(tmp_path / "metadata.csv", "\n".join([head, *lines]) + "\n")
    image(tmp_path / "images/a.jpg")
    made = source("covid19_images", tmp_path)
    rows = by_id(made)
    assert list(rows) == ["a.jpg", "b.png"] and rows["a.jpg"]["report"] == "Day 3, \nfever."
    assert known(rows["a.jpg"]) == {
        "view": "PA",
        "sex": "M",
        "age": "65",
        "finding": "Pneumonia/Viral/COVID-19",
        "COVID-19": "1",
        "survival": "1",
    }
    assert rows["b.png"]["view"] == "AP" and rows["b.png"]["labels"]["COVID-19"] is None
    assert isinstance(samples_of(made)["a.jpg"], Sample)
