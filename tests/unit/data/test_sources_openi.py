"""Open-i: the Indiana University collection as XML reports and as the pair of CSV tables."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import pytest

from medim_ray.data.sources.base import Sample
from medim_ray.reports.sections import split_sections
from tests.unit.data.test_sources_published import by_id, image, known, put, samples_of, source

XML = """<?xml version="1.0" encoding="utf-8"?>
<eCitation><meta type="rr"/><uId id="CXR{n}"/><MedlineCitation><Article><Abstract>
<AbstractText Label="COMPARISON">None.</AbstractText><AbstractText Label="INDICATION">Chest pain</AbstractText>
<AbstractText Label="FINDINGS">{findings}</AbstractText><AbstractText Label="IMPRESSION">Normal.</AbstractText>
</Abstract></Article></MedlineCitation><MeSH>{mesh}</MeSH>
{images}</eCitation>"""
PARENT = """<parentImage id="{0}"><figureId>F1</figureId><caption>PA and lateral</caption>
<panel><url>/hadoop/storage/radiology/extract/{0}.jpg</url></panel></parentImage>"""


def test_openi_xml(tmp_path: Path) -> None:
    names = ("CXR1_1_IM-0001-3001", "CXR1_1_IM-0001-4001")
    both = "".join(PARENT.format(name) for name in names)
    put(
        tmp_path / "ecgen-radiology/1.xml",
        XML.format(n=1, findings="Heart &lt;normal&gt; in size.", mesh="<major>normal</major>", images=both),
    )
    mesh = "<major>Cardiomegaly/mild</major><major>Cardiomegaly/borderline</major><automatic>edema</automatic>"
    put(
        tmp_path / "ecgen-radiology/2.xml",
        XML.format(n=2, findings="", mesh=mesh, images=PARENT.format("CXR2_IM-0652-1001")),
    )
    put(tmp_path / "ecgen-radiology/3.xml", XML.format(n=3, findings="No image.", mesh="", images=""))
    image(tmp_path / f"NLMCXR_png/{names[0]}.png")
    made = source("openi", tmp_path, min_images=1)
    rows = by_id(made)
    assert list(rows) == [*names, "CXR2_IM-0652-1001"]
    assert rows[names[0]]["patient_id"] == rows[names[1]]["patient_id"] == "CXR1"
    assert split_sections(rows[names[0]]["report"]).findings == "Heart <normal> in size."
    assert known(rows[names[0]]) == {"normal": "1", "Cardiomegaly": "0"}
    assert known(rows["CXR2_IM-0652-1001"]) == {"normal": "0", "Cardiomegaly": "1"}
    samples = samples_of(made)
    assert isinstance(samples[names[0]], Sample) and samples[names[1]] == "file not found"
    put(tmp_path / "ecgen-radiology/4.xml", "<eCitation><uId")
    with pytest.raises(ValueError, match=r"4.xml is no XML, or was cut off"):
        made.plan()


REAL_REPORTS = Path(__file__).parents[3] / "../shared/data/openi/reports.csv"


def csv_pair(root: Path, reports: str, uids: Sequence[str]) -> None:
    put(root / "indiana_reports.csv", reports)
    lines = ["uid,filename,projection"]
    for uid in uids:
        for number, projection in ((4001, "Frontal"), (3001, "Lateral")):
            name = f"{uid}_IM-0001-{number}.dcm.png"
            lines.append(f"{uid},{name},{projection}")
            image(root / f"images/images_normalized/{name}", value=int(uid) % 256)
    put(root / "indiana_projections.csv", "\n".join(lines) + "\n")


def test_openi_csv_pair(tmp_path: Path) -> None:
    head = "uid,MeSH,Problems,image,indication,comparison,findings,impression\n"
    reports = head + "1,normal,normal,Xray,Positive TB test,None.,Clear lungs.,Normal.\n"
    reports += '7,"Opacity/lung/base;Cardiomegaly/mild",Opacity;Cardiomegaly,Xray,Pain,,"Opacity, left.",\n'
    csv_pair(tmp_path, reports, ["1", "7"])
    made = source("openi", tmp_path, min_images=2, views=("Frontal",))
    rows = by_id(made)
    assert list(rows) == ["1_IM-0001-4001", "7_IM-0001-4001"] and rows["7_IM-0001-4001"]["view"] == "FRONTAL"
    assert rows["1_IM-0001-4001"]["report"] == (
        "INDICATION: Positive TB test\n\nCOMPARISON: None.\n\nFINDINGS: Clear lungs.\n\nIMPRESSION: Normal."
    )
    assert known(rows["7_IM-0001-4001"]) == {"view": "FRONTAL", "normal": "0"}
    everything = by_id(source("openi", tmp_path, min_images=2))
    assert known(everything["7_IM-0001-3001"]) == {
        "view": "LATERAL",
        "normal": "0",
        "Opacity": "1",
        "Cardiomegaly": "1",
    }
    assert all(isinstance(sample, Sample) for sample in samples_of(made).values())


@pytest.mark.skipif(not REAL_REPORTS.exists(), reason="../shared/data/openi is not here")
def test_openi_with_the_real_reports(tmp_path: Path) -> None:
    csv_pair(tmp_path, "", [])
    text = REAL_REPORTS.read_text()
    (tmp_path / "indiana_reports.csv").write_text(text)
    uids = [row["uid"] for row in csv.DictReader(io.StringIO(text))]
    lines = ["uid,filename,projection", *(f"{uid},{uid}_IM-0001-4001.dcm.png,Frontal" for uid in uids)]
    put(tmp_path / "indiana_projections.csv", "\n".join(lines) + "\n")
    rows = by_id(source("openi", tmp_path))
    assert len(rows) == 1924 and sum(bool(row["report"]) for row in rows.values()) > 1900
    cardiomegaly = sum(row["labels"]["Cardiomegaly"] == "1" for row in rows.values())
    assert 100 < cardiomegaly < 400 and sum(row["labels"]["normal"] == "1" for row in rows.values()) > 500
