"""Each finding of the phantom changes the attenuation where its mask says, and only about there."""

from __future__ import annotations

import numpy as np
import pytest

from medim_ray.data.phantom_anatomy import Canvas, Chest, draw_chest, draw_patient
from medim_ray.data.phantom_findings import Finding, draw_findings, nodule_diameter, paint
from medim_ray.data.phantom_layers import build_layers

CANVAS = Canvas(size=160)
# kind -> sign of the change, and the least mean change inside the mask (the lung's air is worth 0.80)
CHANGES = {
    "effusion": (1, 0.15),
    "pneumothorax": (-1, 0.05),
    "consolidation": (1, 0.12),
    "nodule": (1, 0.12),
    "edema": (1, 0.05),
    "atelectasis": (1, 0.10),
    "pacemaker": (1, 0.5),
    "tube": (1, 0.05),
}


def chest(seed: int, view: str = "PA") -> Chest:
    rng = np.random.default_rng(seed)
    return draw_chest(draw_patient(rng), view, rng)


PLACES = {"effusion": ("lower",), "edema": ("mid", "lower"), "pacemaker": ("upper",)}  # others: anywhere


@pytest.mark.parametrize(
    ("kind", "zone"), [(kind, zone) for kind in CHANGES for zone in PLACES.get(kind, ("upper", "mid", "lower"))]
)
def test_a_finding_changes_its_pixels(kind: str, zone: str) -> None:
    sign, least = CHANGES[kind]
    for seed, grade in enumerate((0.0, 0.5, 1.0)):
        side = "bilateral" if kind == "edema" else ("left", "right")[seed % 2]
        finding = Finding(kind=kind, side=side, zone=zone, grade=grade, form="chest tube" if kind == "tube" else "")
        place = chest(seed)
        layers = build_layers(place, CANVAS)
        before_HW = layers.attenuation()
        mask_HW = paint(finding, layers, place, CANVAS, np.random.default_rng(seed + 10))
        change_HW = sign * (layers.attenuation() - before_HW)
        assert change_HW[mask_HW].mean() >= least
        assert np.mean(change_HW[mask_HW] > 0) > 0.85
        if kind not in ("edema", "effusion"):  # these two run out softly
            assert np.abs(change_HW[~mask_HW]).mean() < 0.05 * change_HW[mask_HW].mean()


def test_larger_grade_is_a_larger_lesion() -> None:
    for kind in ("effusion", "consolidation", "nodule", "pneumothorax"):
        zone = "lower" if kind == "effusion" else "upper"
        areas = []
        for grade in (0.0, 1.0):
            place = chest(2)
            layers = build_layers(place, CANVAS)
            finding = Finding(kind=kind, side="right", zone=zone, grade=grade)
            areas.append(paint(finding, layers, place, CANVAS, np.random.default_rng(1)).sum())
        assert areas[1] > 1.3 * areas[0], kind


def test_a_nodule_is_as_wide_as_told() -> None:
    finding = Finding(kind="nodule", side="left", zone="mid", grade=0.7)
    place = chest(3)
    mask_HW = paint(finding, build_layers(place, CANVAS), place, CANVAS, np.random.default_rng(0))
    width_mm = 2 * np.sqrt(mask_HW.sum() / np.pi) / CANVAS.size * 360
    assert width_mm == pytest.approx(nodule_diameter(finding), rel=0.1)


def test_an_enlarged_heart_is_over_half_the_chest_on_a_pa_film() -> None:
    ratios: dict[bool, list[float]] = {False: [], True: []}
    for seed in range(150):
        place = chest(seed)
        right, left = (edge.max() for edge in place.borders(np.linspace(0.3, place.dome_v(1), 60)))
        ratios[place.patient.is_heart_enlarged].append((right + left) / (2 * place.half_width))
    assert np.quantile(ratios[False], 0.95) < 0.53 < np.median(ratios[True])
    assert min(ratios[True]) > np.median(ratios[False])


def test_ap_views_magnify_the_heart_and_lift_the_diaphragm() -> None:
    widths, domes = {}, {}
    for view in ("PA", "AP Supine"):
        chests = [chest(seed, view) for seed in range(40)]
        widths[view] = np.mean([c.heart_scale for c in chests])
        domes[view] = np.mean([c.dome_v(1) for c in chests])
    assert widths["AP Supine"] > widths["PA"] + 0.03
    assert domes["AP Supine"] < domes["PA"] - 0.02
    assert all(chest(seed).dome_v(-1) < chest(seed).dome_v(1) for seed in range(20)), "the right dome stands higher"


def test_no_tracheal_tube_on_a_pa_film_and_never_more_than_four_findings() -> None:
    for seed in range(400):
        rng = np.random.default_rng(seed)
        patient = draw_patient(rng)
        findings = draw_findings(patient, "PA", rng)
        assert len(findings) <= 4
        assert len({finding.kind for finding in findings}) == len(findings)
        assert all(finding.form != "endotracheal tube" for finding in findings)
