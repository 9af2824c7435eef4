"""The tagger: what is found, whether it is there, where, and what an indexer would index."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medim_ray.reports.mesh import Heading, Vocabulary
from medim_ray.reports.tagger import Mention, Tagger

TAGGER = Tagger()


def findings(text: str) -> dict[str, str]:
    """Heading -> assertion of what is not anatomy (the last mention of a heading wins)."""
    return {mention.heading: mention.assertion for mention in TAGGER.tag(text) if mention.category != "anatomy"}


def only(text: str, heading: str) -> Mention:
    (mention,) = (mention for mention in TAGGER.tag(text) if mention.heading == heading)
    return mention


@pytest.mark.parametrize(
    ("text", "heading", "matched"),
    [
        ("Patchy opacities.", "Opacity", "opacities"),
        ("Both lungs", "Lung", "lungs"),
        ("cardiac", "Heart", "cardiac"),
        ("Mild pulmonary edema", "Pulmonary Edema", "pulmonary edema"),
        ("CONGESTIVE HEART FAILURE", "Heart Failure", "CONGESTIVE HEART FAILURE"),
        ("two pneumothoraces", "Pneumothorax", "pneumothoraces"),
        ("T-spine", "Thoracic Vertebrae", "T-spine"),
        ("a COPD patient", "Pulmonary Disease, Chronic Obstructive", "COPD"),
    ],
)
def test_plural_adjective_and_longest_forms(text: str, heading: str, matched: str) -> None:
    mention = only(text, heading)
    assert mention.text == matched == text[mention.start : mention.end]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No pneumothorax or pleural effusion.", {"Pneumothorax": "absent", "Pleural Effusion": "absent"}),
        ("Negative for pneumothorax.", {"Pneumothorax": "absent"}),
        ("Lungs are clear of infiltrates.", {"Infiltrate": "absent"}),
        ("Pneumothorax is not seen.", {"Pneumothorax": "absent"}),
        ("The pneumothorax has resolved.", {"Pneumothorax": "absent"}),
        ("Neither effusion nor edema.", {"Pleural Effusion": "absent", "Pulmonary Edema": "absent"}),
        ("No pneumothorax, but a small effusion.", {"Pneumothorax": "absent", "Pleural Effusion": "present"}),
        ("No effusion; cardiomegaly.", {"Pleural Effusion": "absent", "Cardiomegaly": "present"}),
        ("No effusion. Cardiomegaly.", {"Pleural Effusion": "absent", "Cardiomegaly": "present"}),
        ("no pneumothorax the lungs are hyperinflated", {"Pneumothorax": "absent", "Lung": "present"}),
        ("Pneumonia cannot be excluded.", {"Pneumonia": "uncertain"}),
        ("Opacity may represent atelectasis.", {"Opacity": "present", "Pulmonary Atelectasis": "uncertain"}),
        ("Atelectasis versus pneumonia", {"Pulmonary Atelectasis": "uncertain", "Pneumonia": "uncertain"}),
        ("Effusion?", {"Pleural Effusion": "uncertain"}),
        ("Unchanged cardiomegaly.", {"Cardiomegaly": "prior"}),
        ("Atelectasis is unchanged from prior.", {"Pulmonary Atelectasis": "prior"}),
        ("No change in moderate cardiomegaly.", {"Cardiomegaly": "prior"}),
        ("History of pneumonia.", {"Pneumonia": "prior"}),
        ("Opacity compatible with atelectasis.", {"Opacity": "present", "Pulmonary Atelectasis": "present"}),
        ("Likely atelectasis rather than pneumonia.", {"Pulmonary Atelectasis": "present", "Pneumonia": "absent"}),
        ("The vascular markings are normal.", {"Markings": "absent"}),
        ("The aorta is tortuous and the lungs are clear.", {"Aorta": "present"}),
        ("Heart is not enlarged.", {"Cardiomegaly": "absent"}),
    ],
)
def test_assertions(text: str, expected: dict[str, str]) -> None:
    assert findings(text) == expected


@pytest.mark.parametrize(
    ("text", "negated"),
    [
        ("No pneumothorax in the lungs.", {"pneumothorax", "lungs"}),
        ("No left lower lobe pneumonia.", {"lower lobe", "pneumonia"}),
        ("Left lower lobe pneumonia is not seen.", {"lower lobe", "pneumonia"}),
        ("The lungs are clear without effusion.", {"effusion"}),
        ("The lungs have cleared.", set()),
        ("No effusion, the heart is enlarged.", {"effusion"}),
    ],
)
def test_anatomy_is_present_in_a_negated_statement_and_marked_as_part_of_it(text: str, negated: set[str]) -> None:
    mentions = TAGGER.tag(text)
    assert {mention.text for mention in mentions if mention.negated} == negated
    assert {mention.assertion for mention in mentions if mention.category == "anatomy"} == {"present"}


@pytest.mark.parametrize(
    ("text", "heading", "side", "zone"),
    [
        ("Left lower lobe pneumonia", "Pneumonia", "left", "lower"),
        ("Right lung is clear and left lung has an opacity.", "Opacity", "left", ""),
        ("Right apical pneumothorax", "Pneumothorax", "right", "apical"),
        ("Opacity at the left lung base.", "Opacity", "left", "basal"),
        ("Bibasilar atelectasis", "Pulmonary Atelectasis", "bilateral", "basal"),
        ("Opacities in the right upper lobe and left base.", "Opacity", "bilateral", "upper"),
        ("Perihilar opacities", "Opacity", "", "perihilar"),
        ("No pneumothorax but small right effusion", "Pneumothorax", "", ""),
        ("Right base opacity, likely atelectasis", "Pulmonary Atelectasis", "right", "basal"),
        ("Cardiomegaly with left effusion", "Cardiomegaly", "", ""),
        ("RUL nodule", "Nodule", "right", "upper"),
    ],
)
def test_side_and_zone(text: str, heading: str, side: str, zone: str) -> None:
    mention = only(text, heading)
    assert (mention.side, mention.zone) == (side, zone)


@pytest.mark.parametrize(
    ("text", "course"),
    [("New effusion.", "new"), ("Effusion, improved.", "improved"), ("Stable effusion.", "stable"), ("Effusion.", "")],
)
def test_course(text: str, course: str) -> None:
    assert only(text, "Pleural Effusion").course == course


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The heart and lungs are normal. No effusion.", []),
        ("Low lung volumes with flattened diaphragms.", ["Lung", "Diaphragm"]),
        ("Lung volumes are mildly decreased.", ["Lung"]),
        ("The thoracic aorta is tortuous and calcified.", ["Aorta, Thoracic", "Calcinosis"]),
        ("Degenerative changes are noted within the thoracic spine.", ["Thoracic Vertebrae"]),
        ("Degenerative endplate changes of the thoracic spine.", ["Thoracic Vertebrae"]),
        ("Degenerative changes of the thoracolumbar spine.", ["Thoracic Vertebrae", "Lumbar Vertebrae"]),
        ("Degenerative spurring of the thoracic spine.", ["Osteophyte"]),
        ("Calcified right lower lobe granuloma.", ["Calcified Granuloma"]),
        ("Blunting of the costophrenic XXXX.", ["Costophrenic Angle"]),
        ("The heart is mildly enlarged.", ["Cardiomegaly"]),
        ("Hilar adenopathy.", ["Lymphadenopathy", "Lung"]),
        ("Stable small effusion. Effusion again seen.", ["Pleural Effusion"]),
        ("Possible pneumonia.", []),
        ("History of pneumonia.", []),
        ("Left PICC with tip in the SVC.", ["Catheters, Indwelling"]),
        ("Prominent interstitial opacities.", ["Opacity"]),
    ],
)
def test_headings_are_what_an_indexer_would_index(text: str, expected: list[str]) -> None:
    assert TAGGER.headings(text) == expected


def test_mentions_know_their_sentence() -> None:
    mentions = TAGGER.tag("1. Clear lungs. 2. Seen by Dr. Lee. Cardiomegaly.")
    assert [(mention.heading, mention.sentence) for mention in mentions] == [("Lung", 0), ("Cardiomegaly", 2)]


def test_an_own_vocabulary_replaces_the_bundled_one() -> None:
    vocabulary = Vocabulary({"Goiter": Heading("Goiter", "finding", ("struma",), ("C19.874",))}, "test")
    (mention,) = Tagger(vocabulary).tag("Large struma, heart enlarged.")
    assert (mention.heading, mention.tree_numbers) == ("Goiter", ("C19.874",))


@pytest.mark.parametrize(
    "text", ["", " \n\t", "XXXX", "XXXX XXXX.", "_" * 80, "心脏增大。无气胸。", "." * 5000, "1. 2. 3."]
)
def test_text_without_content_has_no_mentions(text: str) -> None:
    assert TAGGER.tag(text) == []
    assert TAGGER.headings(text) == []


def test_foreign_language_gives_at_most_the_words_it_shares() -> None:
    assert TAGGER.headings("Cardiomegalia leve. Sin derrame. Parénquima sin alteraciones.") == []


def test_html_and_tabs_do_not_hide_terms_or_shift_offsets() -> None:
    text = "<p>No&nbsp;<b>pneumothorax</b></p>\t<p>cardiomegaly</p>"
    assert findings(text) == {"Pneumothorax": "absent", "Cardiomegaly": "present"}
    assert only(text, "Pneumothorax").text == "pneumothorax"


def test_letters_that_grow_when_lowered_do_not_shift_offsets() -> None:
    assert only("\u0130\u0130\u0130 Pneumothorax", "Pneumothorax").text == "Pneumothorax"


def test_five_thousand_words_in_one_sentence() -> None:
    mentions = TAGGER.tag("no left effusion with stable opacity " * 850)
    assert len(mentions) == 1700
    assert {mention.assertion for mention in mentions if mention.heading == "Pleural Effusion"} == {"absent"}


WORDS = """no left lungs enlarged heart may represent effusion with stable , . ; ? calcified granuloma degenerative
spine or normal not seen the prominent <p> XXXX 1."""


@settings(max_examples=300)
@given(st.lists(st.sampled_from(WORDS.split()), max_size=40).map(" ".join) | st.text())
def test_any_text_gives_mentions_that_are_slices_of_it(text: str) -> None:
    mentions = TAGGER.tag(text)
    assert all(text[mention.start : mention.end] == mention.text != "" for mention in mentions)
    assert [mention.sentence for mention in mentions] == sorted(mention.sentence for mention in mentions)
    assert {mention.assertion for mention in mentions} <= {"present", "absent", "uncertain", "prior"}
    assert set(TAGGER.headings(text)) <= {mention.heading for mention in mentions if mention.category != "anatomy"}


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        (
            "There is consolidation in the right upper lobe and ground-glass opacities in both lower lobes.",
            [("right", "upper"), ("bilateral", "lower")],
        ),
        (
            "Small effusions at both bases and a nodule in the left upper lobe.",
            [("bilateral", "basal"), ("left", "upper")],
        ),
        ("Right upper lobe consolidation and left basilar atelectasis.", [("right", "upper"), ("left", "basal")]),
        ("Left lower lobe consolidation and effusion.", [("left", "lower"), ("left", "lower")]),
        ("Left and right basilar opacities in the lower lobes.", [("bilateral", "basal")]),
    ],
)
def test_two_findings_in_a_sentence_have_each_their_own_place(report: str, expected: list[tuple[str, str]]) -> None:
    findings = [mention for mention in Tagger().tag(report) if mention.category == "finding"]
    assert [(mention.side, mention.zone) for mention in findings] == expected
