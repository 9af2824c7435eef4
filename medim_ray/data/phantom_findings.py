"""Findings of the chest phantom: which ones a study has and where, and how each changes the layers of attenuation.

Each painter returns the finding's ground truth on the canvas. No words here: the report is in phantom_report.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from medim_ray.data.phantom_anatomy import SIDES, ZONES, Canvas, Chest, Patient
from medim_ray.data.phantom_layers import AIR, Layers, side_lung

FINDINGS = (
    "cardiomegaly",
    "effusion",
    "pneumothorax",
    "consolidation",
    "nodule",
    "edema",
    "atelectasis",
    "pacemaker",
    "tube",
)
_ACUTE = ("effusion", "pneumothorax", "consolidation", "nodule", "edema", "atelectasis", "tube")
_MAX_FINDINGS = 4
_WIDTH_CM = 36  # of a film


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One finding before it is drawn: kind, true place ('' = has none) and what painter and report must agree on."""

    kind: str
    side: str = ""
    zone: str = ""
    grade: float = 0.5  # 0 small or mild, 1 large or severe
    form: str = ""  # 'chest tube' or 'endotracheal tube'; '' for other kinds


def draw_findings(patient: Patient, view: str, rng: np.random.Generator) -> tuple[Finding, ...]:
    """Between 0 and 4 findings of different kinds: what the patient always has, and what this study adds."""
    kinds = ["cardiomegaly"] * patient.is_heart_enlarged + ["pacemaker"] * (patient.pacemaker_side != "")
    num_acute = min(int(rng.choice(4, p=[0.28, 0.31, 0.25, 0.16])), _MAX_FINDINGS - len(kinds))
    kinds += [_ACUTE[i] for i in rng.permutation(len(_ACUTE))[:num_acute]]
    return tuple(_locate(kind, patient, view, rng) for kind in kinds)


def _locate(kind: str, patient: Patient, view: str, rng: np.random.Generator) -> Finding:
    """Side, zone and grade of one finding; every zone is equally likely unless the disease prefers one."""
    grade = float(rng.random())
    side = ("left", "right")[int(rng.integers(2))]
    zone = ZONES[int(rng.integers(3))]
    is_bilateral = bool(rng.random() < 0.2)
    pick = float(rng.random())
    if kind == "cardiomegaly":
        return Finding(kind=kind, grade=grade)
    if kind == "pacemaker":
        return Finding(kind=kind, side=patient.pacemaker_side, zone="upper", grade=grade)
    if kind == "effusion":
        return Finding(kind=kind, side="bilateral" if is_bilateral else side, zone="lower", grade=grade)
    if kind == "edema":
        return Finding(kind=kind, side="bilateral", zone="mid" if pick < 0.7 else "lower", grade=grade)
    if kind == "pneumothorax":
        return Finding(kind=kind, side=side, zone="upper" if pick < 0.6 else zone, grade=grade)
    if kind == "atelectasis" and is_bilateral:
        return Finding(kind=kind, side="bilateral", zone="lower" if pick < 0.7 else "mid", grade=grade)
    if kind == "tube":
        if view != "PA" and pick < 0.6:  # nobody stands for a PA film with a tube in the trachea
            return Finding(kind=kind, grade=grade, form="endotracheal tube")
        return Finding(kind=kind, side=side, zone=zone, grade=grade, form="chest tube")
    return Finding(kind=kind, side=side, zone=zone, grade=grade)


@dataclass(frozen=True, kw_only=True)
class _Scene:
    layers: Layers
    chest: Chest
    canvas: Canvas
    rng: np.random.Generator


def paint(
    finding: Finding, layers: Layers, chest: Chest, canvas: Canvas, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Writes the finding into `layers` and returns its pixels, [H, W] on the canvas."""
    scene = _Scene(layers=layers, chest=chest, canvas=canvas, rng=rng)
    if finding.side == "bilateral" and finding.kind != "edema":
        return _PAINTERS[finding.kind](scene, finding, "left") | _PAINTERS[finding.kind](scene, finding, "right")
    return _PAINTERS[finding.kind](scene, finding, finding.side)


def _cardiomegaly(scene: _Scene, finding: Finding, side: str) -> NDArray[np.bool_]:
    """The enlarged heart is already part of the chest; its pixels are the cardiac silhouette above the diaphragm."""
    chest, v_H1 = scene.chest, scene.canvas.v_H1
    top = chest.patient.apex + 0.46 * (chest.dome_v(1) - chest.patient.apex)
    floor_1W = np.where(
        scene.canvas.u_1W > 0,
        chest.diaphragm(np.abs(scene.canvas.u_1W), 1),
        chest.diaphragm(np.abs(scene.canvas.u_1W), -1),
    )
    return np.asarray((scene.layers.heart_HW > 0.35) & (v_H1 > top) & (v_H1 < floor_1W))


def _effusion(scene: _Scene, finding: Finding, side: str) -> NDArray[np.bool_]:
    """Fluid over the dome whose surface climbs along the ribs (meniscus); supine, part of it spreads as a haze."""
    chest, canvas, layers, sign = scene.chest, scene.canvas, scene.layers, SIDES[side]
    lung_HW = side_lung(chest, canvas, sign)
    across_HW = sign * canvas.u_1W
    corner = chest.dome_v(sign) + chest.patient.dome_drop
    depth = (0.055 + 0.11 * finding.grade) * scene.rng.uniform(0.9, 1.1)
    surface_HW = corner - depth - 0.55 * depth * np.exp(-(chest.lateral(canvas.v_H1) - across_HW) / 0.045)
    surface_HW += 0.006 * np.sin(12 * across_HW + scene.rng.uniform(0, 6))
    fluid_HW = np.clip((canvas.v_H1 - surface_HW) / 0.022, 0, 1) * (across_HW > 0)
    mask_HW = (fluid_HW > 0.5) & (lung_HW > 0.06) & (canvas.v_H1 > chest.zone_edges(sign)[2])
    layers.added_HW += AIR * lung_HW * fluid_HW * (1 - 0.72 * layers.heart_HW) * 0.93
    layers.vessels_HW *= 1 - 0.8 * fluid_HW
    if chest.view == "AP Supine":
        veil_HW = np.clip((canvas.v_H1 - chest.zone_edges(sign)[1]) / 0.3, 0, 1) * lung_HW * (1 - fluid_HW)
        layers.added_HW += (0.06 + 0.08 * finding.grade) * veil_HW
    return np.asarray(mask_HW)


def _pneumothorax(scene: _Scene, finding: Finding, side: str) -> NDArray[np.bool_]:
    """Air without vessels between the ribs and a fine pleural line."""
    chest, canvas, layers, sign = scene.chest, scene.canvas, scene.layers, SIDES[side]
    low, high = chest.zone_edges(sign)[ZONES.index(finding.zone)], chest.zone_edges(sign)[ZONES.index(finding.zone) + 1]
    v_H1 = canvas.v_H1
    gap = 0.028 + 0.045 * finding.grade
    if finding.zone == "upper":
        sink = 0.035 + 0.06 * finding.grade
        fade_H1 = np.clip(1 - (v_H1 - low) / (1.15 * (high - low)), 0, 1)
        pleura_H1 = chest.lateral(v_H1 - sink * np.sqrt(fade_H1)) - gap * np.sqrt(fade_H1)
        pleura_H1 = np.where(v_H1 < low + sink, -1, pleura_H1)
    else:
        centre = scene.rng.uniform(low + 0.4 * (high - low), high - 0.4 * (high - low))
        bump_H1 = np.clip(1 - ((v_H1 - centre) / (0.58 * (high - low))) ** 2, 0, 1) ** 0.7
        pleura_H1 = chest.lateral(v_H1) - 1.1 * gap * bump_H1
    across_HW = sign * (canvas.u_1W - chest.midline(v_H1))
    lung_HW = side_lung(chest, canvas, sign)
    is_air_HW = (across_HW > pleura_H1) & (lung_HW > 0.03) & (v_H1 < chest.diaphragm(np.abs(canvas.u_1W), sign))
    air_HW = canvas.blur(is_air_HW.astype(np.float32), 0.003)
    layers.vessels_HW *= 1 - 0.95 * air_HW
    layers.added_HW -= (0.13 + 0.04 * finding.grade) * air_HW * np.minimum(lung_HW * 2, 1)
    inside_HW = (lung_HW > 0.1) & ~is_air_HW
    contour_HW = cv2.morphologyEx(is_air_HW.astype(np.uint8), cv2.MORPH_DILATE, np.ones((3, 3), np.uint8)) * inside_HW
    thickness = 1.5 * 0.004 * canvas.size  # the line keeps its weight at any resolution
    layers.added_HW += 0.17 * min(1.5, thickness) * canvas.blur(contour_HW.astype(np.float32), 0.0022)
    return np.asarray(is_air_HW)


def _consolidation(scene: _Scene, finding: Finding, side: str) -> NDArray[np.bool_]:
    """A patch with ragged borders and, in the larger ones, air bronchograms."""
    chest, canvas, layers = scene.chest, scene.canvas, scene.layers
    radius = 0.045 + 0.035 * finding.grade
    u, v = chest.place(scene.rng, side, finding.zone, radius)
    angle, stretch = scene.rng.uniform(0, np.pi), scene.rng.uniform(1.05, 1.4)
    along_HW = (canvas.u_1W - u) * np.cos(angle) + (canvas.v_H1 - v) * np.sin(angle)
    across_HW = -(canvas.u_1W - u) * np.sin(angle) + (canvas.v_H1 - v) * np.cos(angle)
    far_HW = np.sqrt((along_HW / stretch) ** 2 + (across_HW * stretch) ** 2) / radius
    ragged_HW = far_HW + 0.22 * canvas.texture(scene.rng, grain=0.035) + 0.10 * canvas.texture(scene.rng, grain=0.014)
    patch_HW = np.clip((1.35 - ragged_HW) / 0.75, 0, 1) * (far_HW < 1.6)
    lung_HW = side_lung(chest, canvas, SIDES[side])
    density = scene.rng.uniform(0.24, 0.34) + 0.08 * finding.grade
    bronchi = [np.array([(u, v)]) + radius * scene.rng.normal(0, 0.35, (2, 2)) for _ in range(3)]
    patch_HW = np.asarray(patch_HW * (1 - 0.35 * canvas.lines(*bronchi, width=0.006)), np.float32)
    layers.added_HW += density * canvas.blur(patch_HW, 0.003) * np.minimum(lung_HW * 2.2, 1)
    return np.asarray((patch_HW > 0.4) & (lung_HW > 0.12))


def _nodule(scene: _Scene, finding: Finding, side: str) -> NDArray[np.bool_]:
    """A round, sharply bounded shadow."""
    canvas = scene.canvas
    radius = nodule_diameter(finding) / (20 * _WIDTH_CM)
    u, v = scene.chest.place(scene.rng, side, finding.zone, radius)
    wobble = scene.rng.normal(0, 0.04, 2)
    angle_HW = np.arctan2(canvas.v_H1 - v, canvas.u_1W - u)
    edge_HW = 1 + wobble[0] * np.cos(3 * angle_HW) + wobble[1] * np.sin(2 * angle_HW)
    far_HW = np.hypot(canvas.u_1W - u, canvas.v_H1 - v) / (radius * edge_HW)
    ball_HW = np.clip(1 - far_HW**2, 0, 1) ** 0.4
    scene.layers.added_HW += scene.rng.uniform(0.28, 0.40) * canvas.blur(ball_HW.astype(np.float32), 0.002)
    return np.asarray(far_HW < 1)


def _edema(scene: _Scene, finding: Finding, side: str) -> NDArray[np.bool_]:
    """Haze around the hila (or at the bases), blurred and full vessels, septal lines at the lower ribs."""
    chest, canvas, layers, rng = scene.chest, scene.canvas, scene.layers, scene.rng
    low, high = chest.zone_edges(1)[1:3]
    centre_v = (0.5 * (low + high) if finding.zone == "mid" else high + 0.035) + rng.uniform(-0.03, 0.02)
    mask_HW = np.zeros((canvas.num, canvas.num), bool)
    for sign in SIDES.values():
        spread_u, spread_v = rng.uniform(0.065, 0.105), rng.uniform(0.075, 0.115)
        centre_u = (0.125 if finding.zone == "mid" else 0.17) + rng.uniform(-0.02, 0.03)
        wing_HW = np.exp(
            -0.5 * (((sign * canvas.u_1W - centre_u) / spread_u) ** 2 + ((canvas.v_H1 - centre_v) / spread_v) ** 2)
        )
        lung_HW = side_lung(chest, canvas, sign) * (canvas.v_H1 < chest.diaphragm(np.abs(canvas.u_1W), sign))
        mottle_HW = 1 + 0.26 * canvas.texture(rng, grain=0.03) + 0.16 * canvas.texture(rng, grain=0.012)
        haze_HW = wing_HW * np.minimum(lung_HW * 1.8, 1)
        layers.added_HW += (
            rng.uniform(0.8, 1.2)
            * (0.08 + 0.10 * finding.grade)
            * (haze_HW * np.clip(mottle_HW, 0.2, 2)).astype(np.float32)
        )
        mask_HW |= haze_HW > 0.55
        levels = rng.uniform(chest.zone_edges(sign)[2], chest.dome_v(sign) + 0.02, 6)
        outer = chest.lateral(levels) - 0.006
        septa = [np.array([(sign * x, y), (sign * (x - 0.028), y + 0.003)]) for x, y in zip(outer, levels, strict=True)]
        layers.added_HW += 0.07 * canvas.lines(*septa, width=0.004)
    layers.vessels_HW = canvas.blur(layers.vessels_HW, 0.004) * np.float32(1.25)
    return mask_HW


def _atelectasis(scene: _Scene, finding: Finding, side: str) -> NDArray[np.bool_]:
    """One or two plates seen from the edge: nearly level bands."""
    chest, canvas = scene.chest, scene.canvas
    length = 0.10 + 0.06 * finding.grade
    u, v = chest.place(scene.rng, side, finding.zone, 0.03)
    mask_HW = np.zeros((canvas.num, canvas.num), bool)
    lung_HW = side_lung(chest, canvas, SIDES[side])
    for plate in range(1 + int(scene.rng.random() < 0.4)):
        tilt = np.deg2rad(scene.rng.uniform(-24, 24))
        half_width = scene.rng.uniform(0.0095, 0.014) * (1 - 0.25 * plate)
        v += 0.032 * plate
        du, dv = canvas.u_1W - u, canvas.v_H1 - v
        along_HW = du * np.cos(tilt) + dv * np.sin(tilt)
        across_HW = -du * np.sin(tilt) + dv * np.cos(tilt) - 0.12 * along_HW**2 / length
        profile_HW = np.exp(-0.5 * (across_HW / (0.62 * half_width)) ** 2)
        profile_HW *= np.clip((0.5 * length - np.abs(along_HW)) / 0.02, 0, 1)
        plate_HW = profile_HW * np.minimum(lung_HW * 2, 1)
        scene.layers.added_HW += scene.rng.uniform(0.30, 0.42) * plate_HW.astype(np.float32)
        mask_HW |= (profile_HW > 0.3) & (lung_HW > 0.08)
    return mask_HW


def _pacemaker(scene: _Scene, finding: Finding, side: str) -> NDArray[np.bool_]:
    """Generator under the collar bone and leads to the heart. The truth is the generator: its place is what is told."""
    chest, canvas, rng, sign = scene.chest, scene.canvas, scene.rng, SIDES[side]
    apex, edge = chest.zone_edges(sign)[:2]
    u, v = sign * rng.uniform(0.16, 0.25), rng.uniform(apex + 0.085, edge - 0.02)
    width, height, tilt = rng.uniform(0.028, 0.034), rng.uniform(0.023, 0.029), rng.uniform(-0.5, 0.5)
    angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    corner_N2 = np.stack([np.sign(np.cos(angle)) * np.abs(np.cos(angle)) ** 0.6 * width,
                          np.sign(np.sin(angle)) * np.abs(np.sin(angle)) ** 0.6 * height], 1)  # fmt: skip
    turn_22 = np.array([[np.cos(tilt), np.sin(tilt)], [-np.sin(tilt), np.cos(tilt)]])
    box_HW = canvas.polygons(corner_N2 @ turn_22 + (u, v))
    core_HW = canvas.polygons(0.6 * corner_N2 @ turn_22 + (u, v + 0.004))
    low = chest.dome_v(1)
    vein = [(u - sign * 0.7 * width, v - 0.6 * height), (sign * 0.10, apex + 0.075), (-0.012, apex + 0.13)]
    cava = [(-0.042, apex + 0.20), (-0.045, apex + 0.55 * (low - apex))]
    ventricle = _smooth([*vein, *cava, (-0.03, low - 0.09), (0.03, low - 0.045), (0.085, low - 0.03)])
    leads = [ventricle]
    if rng.random() < 0.6:
        leads.append(np.add(_smooth([*vein, *cava, (-0.035, low - 0.17), (-0.055, low - 0.20)]), (0.005, 0.003)))
    layer_HW = 0.55 * box_HW + 0.45 * core_HW + 0.42 * canvas.lines(*leads, width=0.005)
    scene.layers.added_HW += canvas.blur(layer_HW.astype(np.float32), 0.0015)
    return np.asarray(box_HW > 0.5)


def _smooth(knots: list[tuple[float, float]]) -> NDArray[np.floating]:
    """A smooth path through the corners of a polygon (Chaikin's corner cutting, three rounds)."""
    path_N2 = np.array(knots)
    for _ in range(3):
        near_N2 = 0.75 * path_N2[:-1] + 0.25 * path_N2[1:]
        next_N2 = 0.25 * path_N2[:-1] + 0.75 * path_N2[1:]
        inner_N2 = np.stack([near_N2, next_N2], 1).reshape(-1, 2)
        path_N2 = np.concatenate([path_N2[:1], inner_N2, path_N2[-1:]])
    return path_N2


def _tube(scene: _Scene, finding: Finding, side: str) -> NDArray[np.bool_]:
    """A tube through the ribs or one in the trachea: a pale band with a dense stripe."""
    chest, canvas, rng = scene.chest, scene.canvas, scene.rng
    path_N2: NDArray[np.floating]
    if finding.form == "endotracheal tube":
        carina = chest.patient.apex + 0.36 * (chest.dome_v(1) - chest.patient.apex)
        tip = carina - endotracheal_gap(finding) / _WIDTH_CM
        v_N = np.linspace(-0.2, tip, 12)
        path_N2 = np.stack([chest.midline(v_N) + 0.004 * np.sin(8 * v_N), v_N], 1)
        width = 0.017
    else:
        sign = SIDES[side]
        u, v = min((chest.place(rng, side, finding.zone, 0.02) for _ in range(2)), key=lambda tip: abs(tip[0]))
        low, high = (chest.zone_edges(sign)[ZONES.index(finding.zone) + k] for k in (0, 1))
        enter = float(np.clip(v + rng.uniform(0.0, 0.12), low + 0.11, high - 0.04))
        wall = sign * float(chest.lateral(np.array([enter]))[0])
        bend = (0.45 * wall + 0.55 * u, max(low + 0.02, v - rng.uniform(-0.02, 0.05)))
        path_N2 = _smooth([(wall + sign * 0.05, enter + 0.06), (wall + sign * 0.01, enter + 0.02), bend, (u, v)])
        width = 0.016
    band_HW = canvas.lines(path_N2, width=width)
    stripe_HW = canvas.lines(np.add(path_N2, (0.0, 0.003 if finding.side else 0.0)), width=0.005)
    scene.layers.added_HW += canvas.blur(0.24 * band_HW + 0.40 * stripe_HW, 0.0015)
    is_inside_HW = True if finding.side == "" else side_lung(chest, canvas, SIDES[side]) > 0.02
    return np.asarray((band_HW > 0.5) & is_inside_HW)


def nodule_diameter(finding: Finding) -> int:
    """Diameter of a nodule, whole mm, 17 to 30."""
    return 17 + round(13 * finding.grade)


def endotracheal_gap(finding: Finding) -> int:
    """Distance of the tip of an endotracheal tube above the carina, whole cm, 2 to 6."""
    return 2 + round(4 * finding.grade)


_PAINTERS: dict[str, Callable[[_Scene, Finding, str], NDArray[np.bool_]]] = {
    "cardiomegaly": _cardiomegaly,
    "effusion": _effusion,
    "pneumothorax": _pneumothorax,
    "consolidation": _consolidation,
    "nodule": _nodule,
    "edema": _edema,
    "atelectasis": _atelectasis,
    "pacemaker": _pacemaker,
    "tube": _tube,
}
