"""`medim-ray tag`: the files that it writes and the tables that it refuses."""

import csv
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest

from medim_ray.reports.tag_command import run_tag

REPORTS = [
    {"uid": "1", "findings": "No pneumothorax. Left effusion.", "impression": "Stable cardiomegaly.\nLeft effusion."},
    {"uid": "2", "findings": "", "impression": ""},
    {"uid": "b", "findings": "Clear lungs.", "impression": "XXXX"},
]


def write_csv(path: Path, rows: list[dict[str, str]]) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def test_headings_and_mentions_are_written(tmp_path: Path) -> None:
    reports = write_csv(tmp_path / "reports.csv", REPORTS)
    out, mentions = str(tmp_path / "tags.csv"), str(tmp_path / "mentions.parquet")
    summary = run_tag(reports, text_columns=["findings", "impression"], id_column="uid", out=out, mentions=mentions)
    assert Path(out).read_text() == "uid,headings\n1,Pleural Effusion;Cardiomegaly\n2,\nb,\n"
    rows = pq.read_table(mentions).to_pylist()
    assert (summary.num_reports, summary.num_mentions, summary.num_without_heading) == (3, len(rows), 2)
    assert len(rows) == 5
    texts = {row["uid"]: row for row in REPORTS}
    assert all(texts[row["uid"]][row["column"]][row["start"] : row["end"]] == row["text"] for row in rows)
    first = rows[0]
    assert (first["heading"], first["assertion"], first["category"]) == ("Pneumothorax", "absent", "finding")
    assert {row["side"] for row in rows if row["heading"] == "Pleural Effusion"} == {"left"}


def test_nlm_file_gives_tree_numbers_to_the_bundled_terms(tmp_path: Path) -> None:
    reports = write_csv(tmp_path / "reports.csv", REPORTS)
    trees = tmp_path / "mtrees2025.bin"
    trees.write_text("Pneumothorax;C08.528.778\n")
    mentions = str(tmp_path / "mentions.parquet")
    out = str(tmp_path / "tags.csv")
    run_tag(reports, text_columns=["findings"], id_column="uid", out=out, mentions=mentions, vocabulary=str(trees))
    numbers = {row["heading"]: row["tree_numbers"] for row in pq.read_table(mentions).to_pylist()}
    assert numbers == {"Pneumothorax": ["C08.528.778"], "Pleural Effusion": [], "Lung": []}


def test_urls_are_read_and_written() -> None:
    with fsspec.open("memory://tag/reports.csv", "wt") as file:
        file.write("study,text\ns1,Cardiomegaly\n")
    run_tag("memory://tag/reports.csv", text_columns=["text"], id_column="study", out="memory://tag/tags.csv")
    with fsspec.open("memory://tag/tags.csv", "rt") as file:
        assert file.read() == "study,headings\ns1,Cardiomegaly\n"


@pytest.mark.parametrize(
    ("content", "columns", "message"),
    [
        ("", ["text"], "empty file"),
        ("uid,text\n", ["text"], "no reports"),
        ("uid,text\n1,a\n", ["findings"], "no column findings; the file has uid, text"),
        ("id,text\n1,a\n", ["text"], "no column uid"),
        ("uid,text\n1,a\n2,b\n1,c\n", ["text"], "uid of line 4 repeats line 2"),
        ("uid,text\n,a\n", ["text"], "line 2 has no uid"),
        ("uid,text\n1,clear, no effusion\n", ["text"], "line 2 has more fields"),
        ('uid,text\n1,"a\n2,b\n', ["text"], "after line 1 it is no CSV"),
        ("uid,text\n1,a\n", [], "text_columns is empty"),
    ],
)
def test_bad_tables_are_refused_before_anything_is_written(
    tmp_path: Path, content: str, columns: list[str], message: str
) -> None:
    path, out = tmp_path / "reports.csv", tmp_path / "tags.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        run_tag(str(path), text_columns=columns, id_column="uid", out=str(out))
    assert not out.exists()


def test_no_file_is_written_over_another_and_ids_keep_their_column(tmp_path: Path) -> None:
    reports = write_csv(tmp_path / "reports.csv", REPORTS)
    before = Path(reports).read_text()
    for out, mentions, names in ((reports, None, "--out"), (str(tmp_path / "t.csv"), str(tmp_path / "t.csv"), "--m")):
        with pytest.raises(ValueError, match=names + ".*would write over"):
            run_tag(reports, text_columns=["findings"], id_column="uid", out=out, mentions=mentions)
    assert Path(reports).read_text() == before
    named = write_csv(tmp_path / "named.csv", [{"text": "1", "findings": "Effusion."}])
    out, mentions = str(tmp_path / "o.csv"), str(tmp_path / "m.parquet")
    with pytest.raises(ValueError, match="id_column='text'"):
        run_tag(named, text_columns=["findings"], id_column="text", out=out, mentions=mentions)


def test_an_open_quote_is_refused_and_a_long_text_is_not(tmp_path: Path) -> None:
    out = str(tmp_path / "o.csv")
    broken = tmp_path / "broken.csv"
    broken.write_text('uid,findings\n1,"Effusion.\n2,Nodule.\n')
    with pytest.raises(ValueError, match=r"is no CSV.*is a quote open"):
        run_tag(str(broken), text_columns=["findings"], id_column="uid", out=out)
    long = write_csv(tmp_path / "long.csv", [{"uid": "1", "findings": "Clear. " * 30_000 + "Effusion."}])
    run_tag(long, text_columns=["findings"], id_column="uid", out=out)
    assert Path(out).read_text() == "uid,headings\n1,Pleural Effusion\n"


def test_what_was_asked_or_seen_before_is_no_heading(tmp_path: Path) -> None:
    text = "INDICATION: CHF, pneumonia.\r\n\r\nCOMPARISON: study with left pneumothorax.\r\n\r\nFINDINGS: Cardiomegaly."
    reports = write_csv(tmp_path / "reports.csv", [{"uid": "1", "report": text}])
    mentions = str(tmp_path / "m.parquet")
    run_tag(reports, text_columns=["report"], id_column="uid", out=str(tmp_path / "o.csv"), mentions=mentions)
    assert (tmp_path / "o.csv").read_text() == "uid,headings\n1,Cardiomegaly\n"
    assert "Pneumothorax" in {row["heading"] for row in pq.read_table(mentions).to_pylist()}
