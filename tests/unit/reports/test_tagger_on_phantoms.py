"""Side, zone and absence against the truth that the phantom's report writer put into words."""

import numpy as np

from medim_ray.data.phantom_findings import Finding
from medim_ray.data.phantom_report import write_report
from medim_ray.reports.tagger import Tagger

HEADINGS = {
    "consolidation": {"Consolidation", "Airspace Disease", "Opacity", "Pneumonia"},
    "nodule": {"Nodule", "Opacity", "Density"},
    "atelectasis": {"Pulmonary Atelectasis"},
    "pneumothorax": {"Pneumothorax"},
    "effusion": {"Pleural Effusion"},
}
ZONES = {"upper": {"upper", "apical"}, "mid": {"middle", "perihilar"}, "lower": {"lower", "basal"}}


def draw_finding(rng: np.random.Generator) -> Finding:
    kind = list(HEADINGS)[int(rng.integers(len(HEADINGS)))]
    zone = {"effusion": "lower", "pneumothorax": "upper"}.get(kind) or list(ZONES)[int(rng.integers(3))]
    return Finding(kind=kind, side=("left", "right")[int(rng.integers(2))], zone=zone, grade=float(rng.random()))


def test_sides_and_zones_that_are_told_are_the_true_ones() -> None:
    tagger, rng = Tagger(), np.random.default_rng(5)
    num_found = num_sides = num_right_sides = num_zones = num_right_zones = 0
    for _ in range(1000):
        finding = draw_finding(rng)
        _, sentences, numbers = write_report([finding], rng)
        mentions = [
            mention for mention in tagger.tag(sentences[numbers[0]]) if mention.heading in HEADINGS[finding.kind]
        ]
        num_found += any(mention.assertion in ("present", "uncertain") for mention in mentions)
        sides = {mention.side for mention in mentions} - {""}
        zones = {mention.zone for mention in mentions} - {""}
        num_sides += bool(sides)
        num_right_sides += sides == {finding.side}
        num_zones, num_right_zones = (
            num_zones + bool(zones),
            num_right_zones + (bool(zones) and zones <= ZONES[finding.zone]),
        )
    assert num_found == 1000
    assert num_sides > 830  # the writer tells the side of 87 in 100, the zone of as many or more
    assert num_zones > 830
    assert num_right_sides >= 0.99 * num_sides
    assert num_right_zones >= 0.99 * num_zones


def test_what_is_absent_in_a_clean_phantom_is_never_indexed() -> None:
    tagger, rng = Tagger(), np.random.default_rng(6)
    assert {heading for _ in range(200) for heading in tagger.headings(write_report([], rng)[0])} == set()
