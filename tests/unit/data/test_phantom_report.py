"""The phantom's reports: true, varied, aligned with the lesions, silent about the patient."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pytest

from medim_ray.data.phantom import _OF_TEXT, FINDINGS, _plan, _rng, render
from medim_ray.data.phantom_findings import Finding
from medim_ray.data.phantom_report import write_report

NUM_STUDIES = 300
# Words that assert a finding, as radiologists write them; "tube" leaves out "support tubes" of the negation.
WORDS = {
    "cardiomegaly": r"cardiomegaly|enlarge\w*|heart size is \w+ increased",
    "effusion": r"effusions?|pleural fluid|blunt\w*",
    "pneumothorax": r"pneumothorax|lucency",
    "consolidation": r"consolidat\w+|airspace|pneumonia",
    "nodule": r"nodul\w+",
    "edema": r"edema|congestion|haze|hazy",
    "atelectasis": r"atelectasis",
    "pacemaker": r"pacemaker|pacing|implanted device",
    "tube": r"tubes?",
}
NEGATIVE = re.compile(r"\b(no|not|without)\b", re.IGNORECASE)
SIDE_WORDS = {"left": r"\bleft\b", "right": r"\bright\b", "bilateral": r"\bbi\w+|\bboth\b|bilaterally"}
ZONE_WORDS = {
    "upper": r"\bupper\b|\bapex\b|\bapical\b",
    "mid": r"\bmid\b|\bmiddle\b|\bmidlung\b|\bmid lungs?\b|\bperihilar\b",
    "lower": r"\blower\b|\bbases?\b|\bbasal\b|\w*basilar\b",
}
UNTOLD = (
    r"\b(male|female|man|woman|men|women|gentleman|lady|boy|girl|he|she|his|her|sex|gender|breasts?|mastectomy|prostate"
    r"|age|aged|old|older|young|elderly|years?|yo|senile|degenerative|obes\w+|habitus|thin|overweight|body|slender"
    r"|PA|AP|supine|portable|erect|upright)\b"
)


@dataclass(frozen=True)
class Told:
    """A study without its pixels."""

    report: str
    sentences: tuple[str, ...]
    lesions: tuple[tuple[Finding, int], ...]  # finding and the number of its sentence
    present: frozenset[str]


@pytest.fixture(scope="module")
def studies() -> list[Told]:
    told = []
    for index in range(NUM_STUDIES):
        findings = _plan(index, 11).findings
        report, sentences, numbers = write_report(findings, _rng(11, _OF_TEXT, index))
        lesions = tuple(zip(findings, numbers, strict=True))
        told.append(Told(report, sentences, lesions, frozenset(finding.kind for finding in findings)))
    return told


def test_render_gives_this_report(studies: list[Told]) -> None:
    for index in range(6):
        study = render(index, seed=11, size=32)
        assert (study.report, study.sentences) == (studies[index].report, studies[index].sentences)
        for lesion, (finding, number) in zip(study.lesions, studies[index].lesions, strict=True):
            assert (lesion.finding, lesion.side, lesion.zone, lesion.sentence) == (
                finding.kind,
                finding.side,
                finding.zone,
                number,
            )


def test_sentences_are_the_report(studies: list[Told]) -> None:
    for study in studies:
        at = 0
        for sentence in study.sentences:
            assert re.fullmatch(r"[A-Z0-9][^.]*\.", sentence), sentence
            at = study.report.index(sentence, at) + len(sentence)
        found = re.fullmatch(r"FINDINGS: (.+) IMPRESSION: (.+)", study.report)
        assert found is not None
        assert " ".join(found.groups()) == " ".join(study.sentences)
        assert "  " not in study.report
        assert not re.search(r"[{}]|\ba [aeiou]|\ban [^aeiou]", study.report), study.report


def test_lesions_point_into_the_findings_section(studies: list[Told]) -> None:
    for study in studies:
        numbers = [number for _, number in study.lesions]
        assert len(set(numbers)) == len(numbers)
        end_of_findings = study.report.index(" IMPRESSION:")
        for finding, number in study.lesions:
            sentence = study.sentences[number]
            assert study.report.index(sentence) < end_of_findings
            assert re.search(WORDS[finding.kind], sentence, re.IGNORECASE), (finding.kind, sentence)
            assert not NEGATIVE.search(sentence), sentence


def test_words_of_absent_findings_are_negated(studies: list[Told]) -> None:
    num_negated = 0
    for study in studies:
        for sentence in study.sentences:
            for name in FINDINGS:
                if not re.search(WORDS[name], sentence, re.IGNORECASE):
                    continue
                if NEGATIVE.search(sentence):
                    num_negated += 1
                    assert name not in study.present, (name, sentence)
                else:
                    assert name in study.present, (name, sentence)
    assert num_negated > NUM_STUDIES


def test_normal_sentences_are_true(studies: list[Told]) -> None:
    for study in studies:
        if re.search(r"lungs are (clear|well expanded and clear)", study.report):
            assert not study.present & set(FINDINGS[1:7])
        if re.search(r"heart size is (normal|within)|silhouette is within|cardiac and mediastinal", study.report, re.I):
            assert "cardiomegaly" not in study.present
        if not study.lesions:
            assert re.search(r"IMPRESSION: (No|Normal) ", study.report)


def test_one_mention_in_five_lacks_side_or_zone(studies: list[Told]) -> None:
    told = []
    for study in studies:
        for finding, number in study.lesions:
            sentence = study.sentences[number]
            sides = {side for side, words in SIDE_WORDS.items() if re.search(words, sentence, re.IGNORECASE)}
            zones = {zone for zone, words in ZONE_WORDS.items() if re.search(words, sentence, re.IGNORECASE)}
            assert sides <= {finding.side}, (finding.side, sentence)
            assert zones <= {finding.zone}, (finding.zone, sentence)
            if finding.side:
                told.append(bool(sides) and bool(zones))
    assert len(told) > 300
    assert 0.14 <= 1 - np.mean(told) <= 0.26


def test_impression_tells_no_other_place(studies: list[Told]) -> None:
    for study in studies:
        impression = study.report.split(" IMPRESSION: ")[1]
        for words, place in ((SIDE_WORDS, "side"), (ZONE_WORDS, "zone")):
            told = {name for name, word in words.items() if re.search(word, impression, re.IGNORECASE)}
            assert told <= {getattr(finding, place) for finding, _ in study.lesions}, impression


def test_report_keeps_silent_about_the_patient(studies: list[Told]) -> None:
    for study in studies:
        assert not re.search(UNTOLD, study.report, re.IGNORECASE), study.report


def test_english_is_varied(studies: list[Told]) -> None:
    firsts = [study.lesions[0][1] == 0 for study in studies if study.lesions]
    assert 0.1 < np.mean(firsts) < 0.7, "the order is shuffled"
    for name in FINDINGS:
        told = {
            re.sub(r"left|right|\d+", "", study.sentences[number]).lower()
            for study in studies
            for finding, number in study.lesions
            if finding.kind == name
        }
        assert len(told) >= 6, name
