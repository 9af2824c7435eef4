"""The radiologist of the phantoms: a report in English with FINDINGS and IMPRESSION, from the true findings alone.

Four mentions in five name side and zone, one lacks one or both. Never a word about sex, age, body size or the view.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from medim_ray.data.phantom_findings import Finding, endotracheal_gap, nodule_diameter

_FULL_RATIO = 0.8  # mentions that name side and zone
# How a mention names the place: (side told, zone told) -> noun phrases and adjectives; {s} is the side.
_ZONE_NOUNS = {
    "upper": ("{s} upper lung zone", "{s} upper lobe", "{s} upper lung", "{s} lung apex", "upper zone of the {s} lung"),
    "mid": ("{s} mid lung zone", "{s} mid lung", "{s} midlung", "{s} middle lung zone", "mid zone of the {s} lung"),
    "lower": ("{s} lower lung zone", "{s} lower lobe", "{s} lung base", "{s} lower lung", "lower zone of the {s} lung"),
}
_BOTH_NOUNS = {
    "upper": ("both upper lung zones", "the upper lobes bilaterally"),
    "mid": ("both mid lung zones", "the mid lungs bilaterally", "the bilateral perihilar regions"),
    "lower": ("both lung bases", "both lower lung zones", "the lower lobes bilaterally"),
}
_ZONE_ADJECTIVES = {
    "upper": ("{s} upper lobe", "{s} upper lung zone", "{s} apical", "{s} upper zone"),
    "mid": ("{s} mid lung zone", "{s} midlung", "{s} mid zone"),
    "lower": ("{s} lower lobe", "{s} basilar", "{s} lower lung zone", "{s} basal"),
}
_APEX = {"upper": "apical", "mid": "lateral mid zone", "lower": "basilar"}

# Sentences by kind; a second key says whether (side, zone) are told where the words differ with it.
# {where}: noun phrase with article, {adj}: adjective or nothing, {grade}: small / moderate / large, {mild}: its like.
_SENTENCES: dict[str, tuple[str, ...]] = {
    "consolidation": (
        "There is {adj} consolidation.",
        "Focal airspace opacity is seen in {where}.",
        "A patchy area of consolidation is present in {where}.",
        "{adj} airspace consolidation with air bronchograms.",
        "Confluent airspace disease in {where}, concerning for pneumonia.",
        "Ill-defined airspace opacification is noted in {where}.",
        "There is a dense focal consolidation in {where}.",
        "{adj} airspace opacity is compatible with pneumonia.",
        "Patchy consolidative opacity projects over {where}.",
    ),
    "nodule": (
        "A rounded nodule is seen in {where}.",
        "There is a well-circumscribed pulmonary nodule in {where}.",
        "{adj} pulmonary nodule measuring approximately {mm} mm.",
        "A {mm} mm nodular opacity projects over {where}.",
        "Solitary nodule in {where}.",
        "There is a {adj} nodule.",
        "A discrete rounded nodular density of about {mm} mm is noted in {where}.",
        "A solitary pulmonary nodule is identified in {where}.",
    ),
    "atelectasis": (
        "Linear atelectasis is present in {where}.",
        "Platelike atelectasis in {where}.",
        "There is {adj} subsegmental atelectasis.",
        "Band-like opacity in {where}, consistent with atelectasis.",
        "{adj} discoid atelectasis.",
        "Streaky linear opacity in {where} reflects subsegmental atelectasis.",
        "There is mild {adj} linear atelectasis.",
    ),
    "pneumothorax": (
        "There is a {grade} {apex} pneumothorax.",
        "{grade} {apex} pneumothorax is present.",
        "A visceral pleural line is visible in {where}, consistent with a {grade} pneumothorax.",
        "A {grade} pneumothorax is seen in {where}.",
        "Peripheral lucency beyond a pleural line in {where} indicates a pneumothorax.",
        "{apex} pneumothorax with a visible pleural line.",
    ),
    "cardiomegaly": (
        "There is {mild} cardiomegaly.",
        "The heart is {mildly} enlarged.",
        "Cardiac silhouette is {mildly} enlarged.",
        "Enlarged heart.",
        "The cardiac silhouette is enlarged with an increased cardiothoracic ratio.",
        "Heart size is {mildly} increased, consistent with cardiomegaly.",
        "{mild} enlargement of the cardiac silhouette.",
    ),
    "chest tube": (
        "A chest tube is in place with its tip in {where}.",
        "Chest tube terminates in {where}.",
        "There is a {adj} chest tube.",
        "{adj} thoracostomy tube is in place.",
        "A pleural drainage tube projects over {where}.",
    ),
    "endotracheal tube": (
        "The endotracheal tube tip lies {cm} cm above the carina.",
        "Endotracheal tube terminates approximately {cm} cm above the carina.",
        "An endotracheal tube is in satisfactory position.",
        "ET tube in place with its tip {cm} cm above the carina.",
        "The patient is intubated, with the endotracheal tube tip {cm} cm from the carina.",
    ),
}
_BY_TOLD: dict[str, dict[tuple[bool, bool], tuple[str, ...]]] = {
    "effusion": {
        (True, True): (
            "There is a {grade} {s} pleural effusion at the lung base.",
            "{grade} {s} basilar pleural effusion.",
            "Blunting of the {s} costophrenic angle at the lung base, consistent with a {grade} pleural effusion.",
            "A {grade} {s} pleural effusion obscures the lower lung zone.",
            "{grade} {s} effusion layers at the base.",
            "Pleural fluid with a meniscus is seen at the {s} base, indicating a {grade} effusion.",
        ),
        (True, False): (
            "There is a {grade} {s} pleural effusion.",
            "{grade} {s}-sided pleural effusion.",
            "{s} pleural effusion is present.",
        ),
        (False, True): (
            "{grade} pleural effusion at the lung base.",
            "Basilar pleural effusion with a meniscus.",
            "Pleural fluid is seen at the base.",
        ),
        (False, False): (
            "A {grade} pleural effusion is present.",
            "There is {grade} pleural fluid.",
            "Pleural effusion is noted.",
        ),
    },
    "bilateral effusion": {
        (True, True): (
            "There are {grade} bilateral pleural effusions at the lung bases.",
            "{grade} bilateral basilar pleural effusions.",
            "Both costophrenic angles are blunted at the lung bases by {grade} pleural effusions.",
            "Bilateral pleural effusions obscure the lower lung zones.",
        ),
        (True, False): ("There are {grade} bilateral pleural effusions.", "Bilateral pleural effusions are present."),
        (False, True): ("{grade} pleural effusions at the bases.", "Basilar pleural effusions are seen."),
        (False, False): ("{grade} pleural effusions are present.", "Pleural effusions are noted."),
    },
    "mid edema": {
        (True, True): (
            "There is bilateral perihilar haze, consistent with {mild} pulmonary edema.",
            "Bilateral perihilar opacities with a batwing pattern indicate pulmonary edema.",
            "{mild} pulmonary edema with indistinct vessels in both mid lung zones.",
            "Bilateral perihilar vascular congestion and {mild} pulmonary edema.",
            "Hazy opacification in the perihilar regions bilaterally represents pulmonary edema.",
        ),
        (True, False): ("There is {mild} bilateral pulmonary edema.", "Bilateral interstitial pulmonary edema."),
        (False, True): (
            "Perihilar haze is compatible with {mild} pulmonary edema.",
            "{mild} perihilar pulmonary edema.",
        ),
        (False, False): ("There is {mild} pulmonary edema.", "Findings of {mild} interstitial edema are present."),
    },
    "lower edema": {
        (True, True): (
            "{mild} pulmonary edema, most pronounced at both lung bases.",
            "Bilateral basilar haze with septal lines indicates {mild} interstitial edema.",
            "There is {mild} pulmonary edema in both lower lung zones.",
        ),
        (True, False): (
            "There is {mild} bilateral pulmonary edema.",
            "Bilateral interstitial edema with septal lines.",
        ),
        (False, True): ("{mild} basilar interstitial edema.", "Pulmonary edema is most marked at the bases."),
        (False, False): ("There is {mild} pulmonary edema.", "Interstitial edema with septal lines."),
    },
    "pacemaker": {
        (True, True): (
            "A pacemaker generator projects over the {s} upper chest with leads in expected position.",
            "{s} upper chest wall pacemaker with intact leads.",
            "Cardiac pacemaker overlies the {s} upper hemithorax.",
            "A cardiac pacing device is seen in the {s} upper chest wall.",
        ),
        (True, False): ("{s}-sided pacemaker is in place.", "A {s} chest wall pacemaker is noted with intact leads."),
        (False, True): (
            "A pacemaker generator overlies the upper chest wall.",
            "Upper chest wall pacemaker with intact leads.",
        ),
        (False, False): ("A cardiac pacemaker is in place.", "Pacemaker leads are intact."),
    },
}
# What a report says of findings that are absent: sentence -> the kinds that it denies.
_NEGATIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("No pleural effusion or pneumothorax.", ("effusion", "pneumothorax")),
    ("There is no pneumothorax or pleural effusion.", ("effusion", "pneumothorax")),
    ("No focal consolidation, pleural effusion, or pneumothorax.", ("consolidation", "effusion", "pneumothorax")),
    ("No pneumothorax.", ("pneumothorax",)),
    ("No evidence of pneumothorax is seen.", ("pneumothorax",)),
    ("There is no pleural effusion.", ("effusion",)),
    ("No pleural effusion is identified.", ("effusion",)),
    ("The costophrenic angles are sharp, without effusion.", ("effusion",)),
    ("No focal consolidation.", ("consolidation",)),
    ("There is no focal airspace opacity.", ("consolidation",)),
    ("No airspace consolidation to suggest pneumonia.", ("consolidation",)),
    ("No suspicious pulmonary nodule.", ("nodule",)),
    ("No nodule or mass is seen.", ("nodule",)),
    ("No pulmonary edema.", ("edema",)),
    ("There is no evidence of pulmonary edema.", ("edema",)),
    ("No overt edema or focal airspace disease.", ("edema", "consolidation")),
    ("No atelectasis.", ("atelectasis",)),
    ("No cardiomegaly.", ("cardiomegaly",)),
    ("The heart is not enlarged.", ("cardiomegaly",)),
    ("No pacemaker or other implanted device is seen.", ("pacemaker",)),
    ("No support tubes are present.", ("tube",)),
)
_LUNGS = ("consolidation", "nodule", "edema", "atelectasis", "effusion", "pneumothorax")
# Normal anatomy: sentence -> its topic (one sentence a topic) and the kinds that must be absent for it to be true.
_NORMAL: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("The heart size is normal.", "cardiomegaly", ("cardiomegaly",)),
    ("Heart size is within normal limits.", "cardiomegaly", ("cardiomegaly",)),
    ("The cardiomediastinal silhouette is within normal limits.", "cardiomegaly", ("cardiomegaly",)),
    ("Cardiac and mediastinal contours are normal.", "cardiomegaly", ("cardiomegaly",)),
    ("The mediastinal contours are unremarkable.", "mediastinum", ()),
    ("Mediastinum is midline.", "mediastinum", ()),
    ("The trachea is midline.", "mediastinum", ()),
    ("The hilar contours are normal.", "hila", ("edema",)),
    ("Pulmonary vasculature is normal.", "hila", ("edema",)),
    ("The lungs are clear.", "lungs", _LUNGS),
    ("Lungs are clear bilaterally.", "lungs", _LUNGS),
    ("The lungs are well expanded and clear.", "lungs", _LUNGS),
    ("The visualized osseous structures are intact.", "bones", ()),
    ("No acute bony abnormality.", "bones", ()),
    ("The bony thorax is grossly intact.", "bones", ()),
    ("The diaphragm is well defined.", "diaphragm", ("effusion", "consolidation", "atelectasis")),
    ("No free air is seen beneath the diaphragm.", "free air", ()),
)
_CLEAN_IMPRESSIONS = (
    "No acute cardiopulmonary abnormality.",
    "No acute cardiopulmonary process.",
    "No acute disease.",
    "Normal chest radiograph.",
    "No evidence of active disease.",
)
_IMPRESSIONS: dict[str, tuple[str, ...]] = {
    "cardiomegaly": ("Cardiomegaly.", "Enlarged cardiac silhouette.", "{mild} cardiomegaly."),
    "consolidation": ("{adj} pneumonia.", "{adj} consolidation, likely infectious.", "{adj} airspace disease."),
    "nodule": ("{adj} pulmonary nodule.", "{adj} nodule, for which CT is suggested."),
    "atelectasis": ("{adj} atelectasis.", "{adj} subsegmental atelectasis."),
    "pneumothorax": ("{apex} pneumothorax.", "{grade} {apex} pneumothorax."),
    "chest tube": ("{adj} chest tube in place.",),
    "endotracheal tube": ("Endotracheal tube in good position.", "Satisfactory position of the endotracheal tube."),
}


class _Writer:
    """Draws the words of one report."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng

    def pick(self, options: Sequence[str]) -> str:
        return options[int(self._rng.integers(len(options)))]

    def told(self, finding: Finding) -> tuple[bool, bool]:
        """Whether the report tells side and zone of a finding."""
        draw = self._rng.random()
        if draw < _FULL_RATIO or finding.side == "":
            return True, True
        return ((True, False), (False, True), (False, False))[int(self._rng.integers(3))]

    def sentence(self, finding: Finding, told: tuple[bool, bool], *, is_impression: bool = False) -> str:
        """One sentence about a finding that is present."""
        kind = finding.form or finding.kind
        variant = f"bilateral {kind}" if (kind, finding.side) == ("effusion", "bilateral") else kind
        variant = f"{finding.zone} edema" if kind == "edema" else variant
        if variant in _BY_TOLD:
            template = self.pick(_BY_TOLD[variant][told])
        else:
            template = self.pick((_IMPRESSIONS if is_impression else _SENTENCES)[kind])
        return self._fill(template, finding, told)

    def _fill(self, template: str, finding: Finding, told: tuple[bool, bool]) -> str:
        grade = ("small", "moderate", "large")[min(2, int(3 * finding.grade))]
        mild = {"small": "mild", "moderate": "moderate", "large": "severe"}[grade]
        text = template.format(
            s=finding.side,
            where=self._where(finding, told),
            adj=self._adjective(finding, told),
            apex=self._apex(finding, told),
            grade=self.pick(("tiny", "small")) if grade == "small" else grade,
            mild=mild,
            mildly=mild + "ly",
            mm=nodule_diameter(finding),
            cm=endotracheal_gap(finding),
        )
        text = re.sub(r"\s+", " ", text).strip()
        text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
        return text[0].upper() + text[1:]

    def _where(self, finding: Finding, told: tuple[bool, bool]) -> str:
        """Noun phrase for the place, with its article."""
        if finding.side == "":
            return ""
        has_side, has_zone = told
        if finding.side == "bilateral":
            if has_zone:
                return self.pick(_BOTH_NOUNS[finding.zone]) if has_side else self._plain_zone(finding.zone, "s")
            return "both lungs" if has_side else "the lungs"
        if has_zone:
            if not has_side:
                return self._plain_zone(finding.zone, "")
            return "the " + self.pick(_ZONE_NOUNS[finding.zone]).format(s=finding.side)
        return self.pick((f"the {finding.side} lung", f"the {finding.side} hemithorax")) if has_side else "the lung"

    def _plain_zone(self, zone: str, plural: str) -> str:
        if zone == "lower":
            return self.pick((f"the lung base{plural}", f"the lower lung{plural}"))
        return self.pick((f"the {zone} lung zone{plural}", f"the {zone} lung{plural}"))

    def _adjective(self, finding: Finding, told: tuple[bool, bool]) -> str:
        """Adjective for the place; empty where nothing is told."""
        if finding.side == "":
            return ""
        has_side, has_zone = told
        if not has_zone:
            options = (finding.side,) if finding.side == "bilateral" else (finding.side, f"{finding.side}-sided")
            return self.pick(options) if has_side else ""
        if finding.side == "bilateral" and has_side and finding.zone == "lower":
            return self.pick(("bilateral basilar", "bibasilar", "bilateral lower lobe"))
        return self.pick(_ZONE_ADJECTIVES[finding.zone]).format(s=finding.side if has_side else "").strip()

    def _apex(self, finding: Finding, told: tuple[bool, bool]) -> str:
        """Adjective for air in the pleural space."""
        parts = (finding.side if told[0] else "", _APEX[finding.zone] if told[1] and finding.zone else "")
        return " ".join(part for part in parts if part)

    def normals(self, present: set[str]) -> list[str]:
        """True sentences about what is absent or normal, not two on the same thing."""
        denied: set[str] = set()
        sentences: list[str] = []
        limit = int(self._rng.integers(1, 5))
        for i in self._rng.permutation(len(_NEGATIONS)):
            text, kinds = _NEGATIONS[int(i)]
            if not present & set(kinds) and not denied & set(kinds) and len(sentences) < limit:
                sentences.append(text)
                denied |= set(kinds)
        limit = len(sentences) + int(self._rng.integers(0, 4))
        for i in self._rng.permutation(len(_NORMAL)):
            text, topic, kinds = _NORMAL[int(i)]
            if not present & set(kinds) and topic not in denied and len(sentences) < limit:
                sentences.append(text)
                denied.add(topic)
        return sentences


def write_report(findings: Sequence[Finding], rng: np.random.Generator) -> tuple[str, tuple[str, ...], tuple[int, ...]]:
    """The report, its sentences in order, and for each finding the number of the sentence that tells it.

    An IMPRESSION repeats findings in other words and tells no more of their place than the sentence in FINDINGS did.
    """
    writer = _Writer(rng)
    told = [writer.told(finding) for finding in findings]
    body: list[tuple[str, int]] = []  # sentence and the finding that it tells, -1 = none
    body += [(writer.sentence(finding, told[k]), k) for k, finding in enumerate(findings)]
    body += [(text, -1) for text in writer.normals({finding.kind for finding in findings})]
    if rng.random() < 0.8:
        body = [body[int(i)] for i in rng.permutation(len(body))]
    numbers = [0] * len(findings)
    for position, (_, k) in enumerate(body):
        if k >= 0:
            numbers[k] = position
    impression = [
        writer.sentence(finding, told[k], is_impression=True)
        for k, finding in enumerate(findings)
        if len(findings) == 1 or rng.random() < 0.75
    ]
    if not findings:
        impression = [writer.pick(_CLEAN_IMPRESSIONS)]
    elif not impression:
        impression = ["Findings as described above."]
    sentences = tuple(text for text, _ in body) + tuple(impression)
    report = f"FINDINGS: {' '.join(text for text, _ in body)} IMPRESSION: {' '.join(impression)}"
    return report, sentences, tuple(numbers)
