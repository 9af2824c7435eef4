"""What csv and phantom list, and how they refuse."""

from __future__ import annotations

import gzip
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medim_ray.data import phantom
from medim_ray.data.sources import SOURCES
from medim_ray.data.sources.base import PLAN_COLUMNS

CXR_NOTES = Path(__file__).parents[3] / "../shared/data/cxr_notes/metadata.csv"
HEADER = "image_id,patient_id,file,view,sex,age,notes\n"


def csv_source(path: Path | str, **options: Any) -> Any:
    return SOURCES["csv"](SOURCES["csv"].Config(path=str(path), **options))


def write(tmp_path: Path, text: str, name: str = "table.csv") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_table_becomes_a_plan(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        HEADER
        + 'a,p1,images/a.png, PA ,F,50,"Two lines,\nwith a ""comma""."\n'
        + "b,p1,/abs/b.png,AP,,,\n"
        + "c,,s3://bucket/c.png,,M,?,Clear.\n",
    )
    plan = csv_source(path).plan()
    assert plan.column_names == list(PLAN_COLUMNS)
    rows = plan.to_pylist()
    assert [r["location"] for r in rows] == [f"{tmp_path}/images/a.png", "/abs/b.png", "s3://bucket/c.png"]
    assert rows[0]["report"] == 'Two lines,\nwith a "comma".' and rows[0]["view"] == "PA"
    assert rows[1]["labels"] == {"view": "AP", "sex": None, "age": None} and rows[1]["report"] == ""
    assert [r["patient_id"] for r in rows] == ["p1", "p1", ""] and {r["split"] for r in rows} == {""}


def test_columns_by_option_and_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "pfad;x,Größe,teil\nein bild.png,3,test\n", "tabelle.csv")
    monkeypatch.chdir(tmp_path)
    options = {"report_column": "", "id_column": "", "patient_column": "", "view_column": "", "split_column": "teil"}
    (row,) = csv_source("tabelle.csv", image_column="pfad;x", label_columns=("Größe",), **options).plan().to_pylist()
    assert row["location"] == f"{tmp_path}/ein bild.png" and row["image_id"] == "ein bild.png"
    assert row["labels"] == {"Größe": "3"} and row["split"] == "test" and row["report"] == ""
    other = csv_source("tabelle.csv", image_column="pfad;x", image_root="gs://b/x/", label_columns=(), **options).plan()
    assert other.to_pylist()[0]["location"] == "gs://b/x/ein bild.png"
    assert other.to_pylist()[0]["labels"] == {}


def test_gzip_and_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "table.csv.gz"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + HEADER.encode() + b"a,p,f.png,PA,F,50,Clear.\r\n"))
    assert csv_source(path).plan().to_pylist()[0]["image_id"] == "a"


def test_a_missing_column_names_the_nearest_and_those_present(tmp_path: Path) -> None:
    path = write(tmp_path, HEADER.replace("notes", "note_text") + "a,p,f.png,PA,F,50,Clear.\n")
    with pytest.raises(ValueError, match=r"source.report_column='notes'.*Did you mean 'note_text'\?.*patient_id, file"):
        csv_source(path).plan()
    with pytest.raises(ValueError, match=r"source.label_columns='finding'"):
        csv_source(path, report_column="", label_columns=("finding",)).plan()


def test_ragged_rows_are_numbered_and_not_quoted(tmp_path: Path) -> None:
    path = write(tmp_path, HEADER + "a,p,f.png,PA,F,50,Clear.\nb,p,g.png,PA,F,50,Mrs Secret, aged 50\n")
    with pytest.raises(ValueError, match=r"1 rows .* \(row 3\)") as error:
        csv_source(path).plan()
    assert "Secret" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty file"),
        (b"\n\n", "empty file"),
        (HEADER.encode(), "no row"),
        (HEADER.encode() + b"a,p,f.png,PA,F,50,caf\xe9\n", "UTF-8"),
        (HEADER.encode() + b",p,f.png,PA,F,50,x\n", "1 rows .* have no image id"),
    ],
)
def test_tables_that_are_none(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "table.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        csv_source(tmp_path / "table.csv").plan()


def test_paths_that_are_no_table(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        csv_source(tmp_path / "absent.csv").plan()
    with pytest.raises(ValueError, match="is a folder"):
        csv_source(tmp_path).plan()
    with pytest.raises(ValueError, match=r"source\.path is not set"):
        csv_source("")


def test_a_sample_is_read_in_another_process(tmp_path: Path) -> None:
    Image.new("L", (40, 50), 9).save(tmp_path / "f.png")
    source = csv_source(write(tmp_path, HEADER + "a,p,f.png,PA,F,,Clear.\n"))
    (row,) = source.plan().to_pylist()
    sample = pickle.loads(pickle.dumps(source)).sample(row)
    assert sample.image_HW.shape == (50, 40) and sample.image_HW[0, 0] == 9
    assert sample.labels == {"view": "PA", "sex": "F"} and sample.report == "Clear."


@pytest.mark.skipif(not CXR_NOTES.exists(), reason="../shared/data/cxr_notes is not here")
def test_the_defaults_fit_the_shared_table() -> None:
    plan = csv_source(CXR_NOTES).plan()
    assert plan.num_rows == 180 and len(set(plan["patient_id"].to_pylist())) == 111
    assert sum(bool(text) for text in plan["report"].to_pylist()) == 147
    assert all(Path(p).is_file() for p in plan["location"].to_pylist())


def test_phantom_plan_agrees_with_what_is_drawn() -> None:
    source = SOURCES["phantom"](SOURCES["phantom"].Config(num_images=12, seed=3, size=64))
    rows = source.plan().to_pylist()
    for index, row in enumerate(rows):
        study = phantom.render(index, seed=3, size=64)
        assert (row["image_id"], row["patient_id"]) == (study.image_id, study.patient_id)
        sample = source.sample(row)
        assert np.array_equal(sample.image_HW, study.image_HW) and sample.report == study.report
        assert [t.sentence for t in sample.truth] == [study.sentences[lesion.sentence] for lesion in study.lesions]
    longer = SOURCES["phantom"](SOURCES["phantom"].Config(num_images=20, seed=3)).plan()
    assert longer.slice(0, 12).to_pylist() == rows


def test_unknown_sources_list_the_known() -> None:
    with pytest.raises(ValueError, match=r"Did you mean 'phantom'.*csv, .*phantom"):
        SOURCES["phantoms"]


def test_a_phantom_has_the_zones_of_its_lungs_as_truth_where_they_are_asked_for() -> None:
    plain, more = (
        SOURCES["phantom"](SOURCES["phantom"].Config(num_images=3, size=64, anatomy=anatomy))
        for anatomy in (False, True)
    )
    lesions, both = (source.sample({"location": "2"}).truth for source in (plain, more))
    assert [entry.finding for entry in both[: len(lesions)]] == [entry.finding for entry in lesions]
    zones = {(entry.side, entry.zone): entry.mask_HW for entry in both[len(lesions) :]}
    assert len(zones) == 6 and {entry.finding for entry in both[len(lesions) :]} == {"lung"}
    expected = phantom.zone_map(2, size=64)
    assert (sum(zones.values()) == (expected > 0)).all() and (zones["left", "lower"] == (expected == 6)).all()
