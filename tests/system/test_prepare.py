"""`prepare` on real Ray: every row in exactly one place, the same bytes again, nothing half-written."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from medim_ray.data.images import ImageEncoder, decode, decode_mask
from medim_ray.data.ingest import PrepareConfig, QuarantineConfig, ShardConfig, prepare
from medim_ray.data.shards import MANIFEST, QUARANTINE, ShardSet, verify
from medim_ray.data.sources import SOURCES
from medim_ray.data.splits import SplitConfig

CXR_NOTES = Path(__file__).parents[2] / "../shared/data/cxr_notes/metadata.csv"
pytestmark = [pytest.mark.system, pytest.mark.usefixtures("ray_session")]
NUM = 60


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images of 30 patients, four of them bad, one report empty; a table in metadata.csv."""
    root = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    lines = ["image_id,patient_id,file,view,sex,age,notes,fold"]
    for k in range(NUM):
        pixels = rng.integers(0, 256, (48, 64), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{k}.png")
        report = "" if k == 7 else f"Heart size {k} is normal. No effusion."
        report += " Seen by Zebrowski." if 20 <= k < 28 else ""  # a name in the reports of four patients
        view, fold = "PA" if k % 3 else "AP", "train" if k < 50 else "test"
        lines.append(f"image {k},patient{k // 2},{k}.png,{view},F,{k},{report},{fold}")
    (root / "10.png").write_text("not an image")
    (root / "20.png").write_bytes((root / "20.png").read_bytes()[:1500])
    (root / "30.png").unlink()
    (root / "40.png").unlink()
    (root / "metadata.csv").write_text("\n".join(lines) + "\n")
    return root


def config(corpus: Path, out: Path | str, **changes: Any) -> PrepareConfig:
    options: dict[str, Any] = {
        "source": SOURCES["csv"].Config(path=str(corpus / "metadata.csv")),
        "out": str(out),
        "image": ImageEncoder.Config(longest_side=32),
        "shards": ShardConfig(rows_per_file=12, row_group_rows=4),
        "salt": "pepper",
    }
    return PrepareConfig(**{**options, **changes})


def files_of(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Iterator[Path]:
    """The corpus as shards."""
    out = tmp_path_factory.mktemp("shards") / "out"
    prepare(config(corpus, out))
    yield out


def test_every_row_is_in_exactly_one_place(corpus: Path, prepared: Path) -> None:
    shard_set = ShardSet.open(str(prepared))
    manifest, table = shard_set.manifest, shard_set.read_rows()
    quarantine = pq.read_table(prepared / QUARANTINE).to_pylist()
    ids = table["image_id"].to_pylist() + [row["image_id"] for row in quarantine]
    assert sorted(ids) == sorted(f"image {k}" for k in range(NUM))
    assert [(row["image_id"], row["reason"]) for row in quarantine] == [
        ("image 10", "not an image file"),
        ("image 20", "truncated image file"),
        ("image 30", "file not found"),
        ("image 40", "file not found"),
    ]
    assert quarantine[0]["location"] == str(corpus / "10.png")
    assert (manifest.rows_in, manifest.rows_out, manifest.rows_quarantined) == (60, 56, 4)
    assert manifest.quarantine == {"file not found": 2, "not an image file": 1, "truncated image file": 1}
    assert manifest.flags == {"no_report": 1} and manifest.labels["sex"] == {"F": 56}
    assert verify(str(prepared)) == []


def test_rows_hold_what_went_in(corpus: Path, prepared: Path) -> None:
    shard_set = ShardSet.open(str(prepared))
    rows = {row["image_id"]: row for row in shard_set.read_rows(None, list(shard_set_columns())).to_pylist()}
    row = rows["image 12"]
    stored = decode(row["image"])
    assert stored.shape == (24, 32) == (row["height"], row["width"])
    with Image.open(corpus / "12.png") as image:
        assert abs(stored.mean() - np.asarray(image).mean()) < 3
    assert row["sentences"] == ["Heart size 12 is normal.", "No effusion."]
    assert dict(row["labels"]) == {"age": "12", "sex": "F", "view": "AP"}
    patients = {row["patient_id"] for row in rows.values()}
    assert not any("patient" in patient for patient in patients) and len(patients) == 30
    assert len({(r["patient_id"], r["split"]) for r in rows.values()}) == 30  # no patient straddles


def shard_set_columns() -> tuple[str, ...]:
    return ("image_id", "patient_id", "split", "image", "height", "width", "sentences", "labels")


def test_the_vocabulary_knows_words_of_five_patients_and_no_name(prepared: Path) -> None:
    vocabulary = (prepared / "tokenizer/vocab.txt").read_text().split()
    assert {"heart", "normal", "effusion", "."} <= set(vocabulary)
    assert not [piece for piece in vocabulary if "zeb" in piece or "rowski" in piece]
    assert {f.path for f in ShardSet.open(str(prepared)).manifest.other_files} >= {"tokenizer/tokenizer.json"}


def test_files_and_row_groups_are_cut_as_told(prepared: Path) -> None:
    shard_set = ShardSet.open(str(prepared))
    files = shard_set.files("train")
    assert [file.path for file in files] == [f"train/{k:05d}.parquet" for k in range(len(files))] and len(files) > 2
    for file in shard_set.files():
        parquet = pq.ParquetFile(prepared / file.path)
        groups = tuple(parquet.metadata.row_group(k).num_rows for k in range(parquet.num_row_groups))
        assert groups == file.row_groups and max(groups) <= 4 and len(groups) <= 3
    pixels = [decode(data.as_py()) for data in shard_set.read_rows("train", ["image"])["image"]]
    intensity = np.concatenate([p.ravel() for p in pixels]) / 255
    assert shard_set.manifest.intensity["mean"] == pytest.approx(intensity.mean(), abs=2e-3)  # before and after JPEG
    assert shard_set.manifest.intensity["std"] == pytest.approx(intensity.std(), abs=5e-3)


def test_the_same_job_gives_the_same_bytes(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    prepare(config(corpus, tmp_path / "again"))
    assert files_of(tmp_path / "again") == files_of(prepared)


def test_a_finished_set_is_kept_and_other_options_are_refused(corpus: Path, prepared: Path) -> None:
    before = files_of(prepared)
    summary = prepare(config(corpus, prepared))
    assert summary.already_prepared and "already prepared" in summary.lines()[0]
    assert summary.lines()[-1].startswith("60 rows in = 56 in shards (train ")
    for change in ({"salt": "other"}, {"image": ImageEncoder.Config(longest_side=40)}, {"split": SplitConfig(seed=1)}):
        with pytest.raises(ValueError, match="other options"):
            prepare(config(corpus, prepared, **change))
    assert files_of(prepared) == before


def test_a_changed_source_is_refused(corpus: Path, prepared: Path) -> None:
    table = corpus / "metadata.csv"
    text = table.read_text()
    try:
        table.write_text(text.replace("Heart size 3 ", "Heart size three "))
        with pytest.raises(ValueError, match="rows of the source have changed"):
            prepare(config(corpus, prepared))
    finally:
        table.write_text(text)


def test_too_many_bad_rows_fail_and_leave_nothing(corpus: Path, tmp_path: Path) -> None:
    strict = QuarantineConfig(max_ratio=0.05)
    with pytest.raises(ValueError, match=r"4 of 60 rows can't be read \(2 rows: file not found; .*max_ratio=0.05"):
        prepare(config(corpus, tmp_path / "new" / "out", quarantine=strict))
    assert not (tmp_path / "new" / "out").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="max_ratio"):
        prepare(config(corpus, tmp_path / "empty", quarantine=strict))
    assert list((tmp_path / "empty").iterdir()) == []


def test_faults_of_the_job_write_nothing(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def source(**options: Any) -> Any:
        return SOURCES["csv"].Config(path=str(corpus / "metadata.csv"), **options)

    for options, message in (
        ({"source": source(id_column="patient_id")}, r"30 image ids are not unique: 'patient0' \(2 rows\)"),
        ({"source": source(split_column="view")}, "the split column holds 'AP'"),
        ({"source": source(report_column="report")}, "no such column"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(config(corpus, out, **options))
    with pytest.raises(ValueError, match="out is not set"):
        prepare(config(corpus, ""))
    assert not out.exists()


def test_an_unfinished_or_foreign_folder_is_left_alone(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not empty and holds no finished shard set"):
        prepare(config(corpus, tmp_path))
    assert files_of(tmp_path) == {"thesis.tex": b"years of work"}


def test_storage_that_takes_nothing_is_said_so(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RuntimeError, match=r"file/out can't be used: Not a directory"):
        prepare(config(corpus, tmp_path / "file" / "out"))
    assert files_of(tmp_path) == {"file": b"in the way"}


def test_the_users_split_is_taken(corpus: Path, tmp_path: Path) -> None:
    source = SOURCES["csv"].Config(path=str(corpus / "metadata.csv"), split_column="fold")
    summary = prepare(config(corpus, tmp_path / "out", source=source))
    assert summary.splits == {"train": 46, "val": 0, "test": 10}


def test_a_file_whose_rows_are_all_bad_is_left_out(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("L", (40, 40), 7).save(buffer, "PNG")
    lines = ["file,split"]
    for k in range(8):
        lines.append(f"{k}.png,{'val' if k == 0 else 'train'}")
        if k:
            (tmp_path / f"{k}.png").write_bytes(buffer.getvalue())
    (tmp_path / "t.csv").write_text("\n".join(lines))
    columns = {"report_column": "", "id_column": "", "patient_column": "", "view_column": "", "split_column": "split"}
    source = SOURCES["csv"].Config(path=str(tmp_path / "t.csv"), label_columns=(), **columns)
    summary = prepare(PrepareConfig(source=source, out=str(tmp_path / "o"), quarantine=QuarantineConfig(max_ratio=0.5)))
    assert summary.splits == {"train": 7, "val": 0, "test": 0} and summary.quarantine == {"file not found": 1}
    assert not (tmp_path / "o/val/00000.parquet").exists() and verify(str(tmp_path / "o")) == []
    assert ShardSet.open(str(tmp_path / "o")).manifest.flags == {"no_patient_id": 7, "no_report": 7}


def test_phantoms_are_prepared_with_their_truth(tmp_path: Path) -> None:
    source = SOURCES["phantom"].Config(num_images=40, size=64)
    prepare(PrepareConfig(source=source, out=str(tmp_path / "out"), shards=ShardConfig(row_group_rows=8)))
    rows = ShardSet.open(str(tmp_path / "out")).read_rows(None, ["sentences", "truth", "labels"]).to_pylist()
    lesions = [(row, lesion) for row in rows for lesion in row["truth"]]
    assert len(rows) == 40 and len(lesions) >= 20
    for row, lesion in lesions:
        assert dict(row["labels"])[lesion["finding"]] == "1" and row["sentences"][lesion["sentence"]]
        assert decode_mask(lesion["mask"]).shape == (64, 64)
    assert sum(decode_mask(lesion["mask"]).any() for _, lesion in lesions) >= 0.9 * len(lesions)


@pytest.mark.skipif(not CXR_NOTES.exists(), reason="../shared/data/cxr_notes is not here")
def test_real_radiographs_lose_no_row(tmp_path: Path) -> None:
    summary = prepare(PrepareConfig(source=SOURCES["csv"].Config(path=str(CXR_NOTES)), out=str(tmp_path / "out")))
    assert summary.rows_in == 180 == sum(summary.splits.values()) and summary.quarantine == {}
    assert (tmp_path / "out" / MANIFEST).exists() and verify(str(tmp_path / "out")) == []
