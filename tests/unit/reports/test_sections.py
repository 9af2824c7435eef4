"""Sections and sentences: headings, abbreviations, wrapped lines, and offsets that always fit."""

import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medim_ray.reports.sections import Report, blank_markup, split_sections, split_sentences

MIMIC_STYLE = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___ year old man with fever.  Dr. ___ asks for pneumonia.

 TECHNIQUE:  Two views of the chest.

 COMPARISON:  ___.

 FINDINGS:

 The lungs are clear.
 No pneumothorax.

 The heart is enlarged.

 IMPRESSION:

 1.  Cardiomegaly.
 2.  No pneumonia.
"""


def test_headed_report_gives_its_sections_without_technique() -> None:
    report = split_sections(MIMIC_STYLE)
    assert report.indication == "___ year old man with fever.  Dr. ___ asks for pneumonia."
    assert report.comparison == "___."
    assert report.findings == "The lungs are clear.\n No pneumothorax.\n\n The heart is enlarged."
    assert report.impression == "1.  Cardiomegaly.\n 2.  No pneumonia."
    assert report.body == ""


def test_text_after_a_blank_line_under_comparison_is_body() -> None:
    report = split_sections("INDICATION: cough.\n\nCOMPARISON: None.\n\nThe lungs are clear.\nIMPRESSION: Normal.")
    assert (report.comparison, report.body, report.impression) == ("None.", "The lungs are clear.", "Normal.")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Lungs are clear.", Report(body="Lungs are clear.")),
        ("Findings: clear. Impression: normal.", Report(findings="clear.", impression="normal.")),
        ("FINDINGS: XXXX. IMPRESSION: XXXX XXXX", Report(findings="XXXX.", impression="XXXX XXXX")),
        ("FINDINGS AND IMPRESSION: clear", Report(findings="clear")),
        ("History: cough\nCONCLUSION: normal", Report(indication="cough", impression="normal")),
        ("IMPRESSION\nNormal chest.\nFINDINGS\nClear.", Report(impression="Normal chest.", findings="Clear.")),
        ("XXXX", Report(body="XXXX")),
        ("_" * 80, Report(body="_" * 80)),
        ("", Report()),
        (" \t\r\n", Report()),
        ("<p><b>FINDINGS:</b>&nbsp;clear</p><p>IMPRESSION: small</p>", Report(findings="clear", impression="small")),
        (
            "The findings: as before were compared with XXXX.",
            Report(body="The findings: as before were compared with XXXX."),
        ),
    ],
)
def test_sections_of_short_texts(text: str, expected: Report) -> None:
    assert split_sections(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1. No effusion. 2. Stable.", ["1. No effusion.", "2. Stable."]),
        ("Seen by Dr. Smith today. Clear.", ["Seen by Dr. Smith today.", "Clear."]),
        ("Dr. J. Smith was told at 3 p.m. today.", ["Dr. J. Smith was told at 3 p.m. today."]),
        ("A 2.5 cm nodule vs. scar. Heart normal.", ["A 2.5 cm nodule vs. scar.", "Heart normal."]),
        ("XXXX XXXX. XXXX opacities.", ["XXXX XXXX.", "XXXX opacities."]),
        ("Told Dr. XXXX. Clear lungs.", ["Told Dr. XXXX.", "Clear lungs."]),
        ("No effusion.Heart is normal.", ["No effusion.", "Heart is normal."]),
        ("Lungs are clear\nHeart is normal\n- no effusion", ["Lungs are clear", "Heart is normal", "- no effusion"]),
        ("Clear.. Normal. .", ["Clear..", "Normal. ."]),
        ("Wedging of T12. No fracture.", ["Wedging of T12.", "No fracture."]),
        ("Clear\n\nnormal", ["Clear", "normal"]),
        ("<p>Clear</p><p>normal</p>", ["Clear</p>", "normal</p>"]),
        ("Effusion?\tYes!", ["Effusion?", "Yes!"]),
        ("", []),
        ("_" * 80, ["_" * 80]),
    ],
)
def test_sentences_of_short_texts(text: str, expected: list[str]) -> None:
    if text.startswith("<p>"):
        assert [blank_markup(sentence.text).strip() for sentence in split_sentences(text)] == ["Clear", "normal"]
    else:
        assert [sentence.text for sentence in split_sentences(text)] == expected


def test_a_wrapped_line_goes_on_although_the_next_begins_with_a_capital() -> None:
    text = "There is a moderate opacity in the lower zone of the left lung and the left\nPICC ends in the atrium."
    assert len(split_sentences(text)) == 1


def test_five_thousand_words_without_a_full_stop_are_one_sentence() -> None:
    assert len(split_sentences("opacity " * 5000)) == 1


@given(st.text(alphabet=st.sampled_from(list("aA. \n1XDr,!?<b>&;\t\r-()é_\u2028"))))
def test_sentences_are_slices_in_order_and_cover_every_visible_character(text: str) -> None:
    sentences = split_sentences(text)
    assert all(text[sentence.start : sentence.end] == sentence.text for sentence in sentences)
    assert all(one.end <= two.start for one, two in pairwise(sentences))
    covered = {place for sentence in sentences for place in range(sentence.start, sentence.end)}
    assert all(place in covered for place, char in enumerate(blank_markup(text)) if not char.isspace())


@given(st.text())
def test_markup_is_blanked_in_place(text: str) -> None:
    assert len(blank_markup(text)) == len(text)
    assert blank_markup("no <XXXX> and < 5 mm") == "no <XXXX> and < 5 mm"
    split_sections(text)


def test_a_one_line_indication_does_not_swallow_the_findings() -> None:
    report = split_sections("INDICATION: fall\nLungs are clear.\nNo fracture.")
    assert (report.indication, report.body) == ("fall", "Lungs are clear.\nNo fracture.")
    headed = split_sections("INDICATION: fall\nfrom a ladder\nFINDINGS: No fracture.")
    assert (headed.indication, headed.body, headed.findings) == ("fall\nfrom a ladder", "", "No fracture.")


def test_a_list_number_after_a_heading_is_no_sentence() -> None:
    texts = [sentence.text for sentence in split_sentences("FINDINGS: 1. Left effusion. 2. Clear lungs.")]
    assert texts == ["FINDINGS: 1. Left effusion.", "2. Clear lungs."]


def test_text_without_capitals_is_split_at_its_stops() -> None:
    texts = [sentence.text for sentence in split_sentences("no effusion. nodule of 5 mm. in size. seen by dr. xxxx.")]
    assert texts == ["no effusion.", "nodule of 5 mm. in size.", "seen by dr. xxxx."]
    mixed = "The nodule is seen best on view no. four. It is small. then stable."
    assert [one.text for one in split_sentences(mixed)][-1] == "It is small. then stable."


def test_open_comments_take_no_time() -> None:
    begin = time.process_time()
    split_sentences("<!--" * 20_000)
    assert time.process_time() - begin < 1.0
