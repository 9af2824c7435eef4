"""Sentences that short-sentence collections hide: run-on negation, lower case, structured reports, slashes, hedges.

Written for this test from general radiology usage; none is taken from a report.
"""

from __future__ import annotations

import pytest

from medim_ray.reports.tagger import Tagger

TAGGER = Tagger()
PTX, EFF, CM = "Pneumothorax", "Pleural Effusion", "Cardiomegaly"
ATE, PNA, EDE = "Pulmonary Atelectasis", "Pneumonia", "Pulmonary Edema"
OPA, NOD, CON = "Opacity", "Nodule", "Consolidation"
CHALLENGE: dict[str, list[tuple[str, dict[str, str]]]] = {
    "an independent statement after a comma or and": [
        ("No pneumothorax or effusion, heart is enlarged.", {PTX: "absent", EFF: "absent", CM: "present"}),
        ("Lungs clear, no effusion, mild cardiomegaly.", {EFF: "absent", CM: "present"}),
        ("No pneumothorax, left basilar atelectasis is present.", {PTX: "absent", ATE: "present"}),
        ("No consolidations, cardiomegaly is noted.", {CON: "absent", CM: "present"}),
        ("No edema and the heart is enlarged.", {EDE: "absent", CM: "present"}),
        ("No edema - heart is enlarged.", {EDE: "absent", CM: "present"}),
        ("No acute findings, stable left granuloma.", {"Granuloma": "prior"}),
        ("No evidence of effusion, with mild bibasilar atelectasis.", {EFF: "absent", ATE: "present"}),
        ("Lungs are clear of infiltrate bilaterally, with left effusion.", {"Infiltrate": "absent", EFF: "present"}),
        ("Without edema, the heart is enlarged.", {EDE: "absent", CM: "present"}),
    ],
    "a list stays a list": [
        ("No pneumothorax, effusion, or edema.", {PTX: "absent", EFF: "absent", EDE: "absent"}),
        ("No pneumothorax, effusion, or edema is seen.", {PTX: "absent", EFF: "absent", EDE: "absent"}),
        ("No consolidation, large effusion, or pneumothorax.", {CON: "absent", EFF: "absent", PTX: "absent"}),
        ("No consolidation, small effusion or pneumothorax.", {CON: "absent", EFF: "absent", PTX: "absent"}),
        ("No pleural effusion and pneumothorax is identified.", {EFF: "absent", PTX: "absent"}),
        (
            "There is no pneumothorax, pleural effusion, focal consolidation.",
            {PTX: "absent", EFF: "absent", CON: "absent"},
        ),
    ],
    "structured": [
        ("Pneumothorax: none.", {PTX: "absent"}),
        ("Effusion: No", {EFF: "absent"}),
        ("Lung nodules: none", {NOD: "absent"}),
        ("Consolidation: Absent", {CON: "absent"}),
        ("Pneumothorax - none", {PTX: "absent"}),
        ("Pneumothorax: not seen", {PTX: "absent"}),
        ("Pneumothorax: No evidence.", {PTX: "absent"}),
        ("Pneumothorax: small, left", {PTX: "present"}),
        ("Heart: Enlarged.", {CM: "present"}),
        ("Pleura: No effusion.", {EFF: "absent"}),
    ],
    "slashes": [
        ("r/o pneumonia", {PNA: "uncertain"}),
        ("h/o tuberculosis", {"Tuberculosis": "prior"}),
        ("w/o pneumothorax", {PTX: "absent"}),
        ("Atelectasis and/or pneumonia", {ATE: "present", PNA: "present"}),  # as indexers read it
    ],
    "hedges": [
        ("Atelectasis, less likely pneumonia.", {ATE: "present", PNA: "absent"}),
        ("Pneumonia cannot be entirely ruled out.", {PNA: "uncertain"}),
        ("Pneumonia could be considered.", {PNA: "uncertain"}),
        ("Left effusion possible.", {EFF: "uncertain"}),
        ("Cardiomegaly and possible effusion.", {CM: "present", EFF: "uncertain"}),
        ("Doubt pneumonia.", {PNA: "uncertain"}),
        ("? pneumonia", {PNA: "uncertain"}),
        ("Low likelihood of pneumonia.", {PNA: "uncertain"}),
        ("Nothing to suggest pneumonia.", {PNA: "absent"}),
    ],
    "spellings of no": [
        ("Neg for pneumonia", {PNA: "absent"}),
        ("Unremarkable for effusion or pneumothorax.", {EFF: "absent", PTX: "absent"}),
        ("Pneumothorax negative.", {PTX: "absent"}),
        ("(-) pneumothorax", {PTX: "absent"}),
        ("Removed PICC.", {"Catheters, Indwelling": "absent"}),
        ("Resolved left effusion.", {EFF: "absent"}),
        ("Kein Pneumothorax.", {PTX: "absent"}),
        ("Sem pneumothorax.", {PTX: "absent"}),
    ],
    "earlier studies": [
        ("Nodule not seen on the prior study.", {NOD: "present"}),
        ("Left nodule, not seen previously.", {NOD: "present"}),
        ("Left effusion which was not present on the prior study.", {EFF: "present"}),
        ("History of lung cancer, now with new right upper lobe mass.", {"Mass": "present"}),
        ("Status post right lobectomy with left effusion.", {EFF: "present"}),
        ("The effusion has nearly resolved.", {EFF: "present"}),
        ("No interval increase in the left effusion.", {EFF: "prior"}),
        ("No worsening of effusion.", {EFF: "prior"}),
        ("Interval clearing of pneumonia with small residual opacity.", {PNA: "absent", OPA: "prior"}),
        ("No significant interval change in the large right pneumothorax.", {PTX: "prior"}),
        ("The effusion has not changed.", {EFF: "prior"}),
        ("Unchanged cardiomegaly and new left effusion.", {CM: "prior", EFF: "present"}),
    ],
    "no findings at all": [
        ("Mass effect on the trachea.", {"Mass": ""}),
        ("Body mass index elevated.", {"Mass": ""}),
    ],
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [pytest.param(*pair, id=f"{kind}: {pair[0]}") for kind, pairs in CHALLENGE.items() for pair in pairs],
)
def test_assertion(text: str, expected: dict[str, str]) -> None:
    found = {mention.heading: mention.assertion for mention in TAGGER.tag(text) if mention.category != "anatomy"}
    assert {heading: found.get(heading, "") for heading in expected} == expected


def test_lower_case_and_title_case_are_read_alike() -> None:
    text = "No pneumothorax. The heart is enlarged. Small left effusion. Nodule of approx. 2.5 cm. Old granuloma."
    assert TAGGER.headings(text.lower()) == TAGGER.headings(text) != []


@pytest.mark.parametrize(
    ("text", "side"),
    [
        ("Pleural effusions are small, left greater than right.", "bilateral"),
        ("Bilateral effusions, left larger than right.", "bilateral"),
        ("Right effusion, larger than left.", "bilateral"),
    ],
)
def test_compared_sides_are_both_and_no_course(text: str, side: str) -> None:
    (mention,) = (mention for mention in TAGGER.tag(text) if mention.heading == EFF)
    assert (mention.side, mention.course) == (side, "")
