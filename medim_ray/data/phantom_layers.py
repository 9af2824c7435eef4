"""Layers of attenuation of the chest phantom: body, lungs, mediastinum, vessels and bones, each a map on the canvas.

Units: the soft tissue of the mediastinum of an average patient has attenuation 1. Coordinates: see phantom_anatomy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator

from medim_ray.data.phantom_anatomy import SIDES, Array, Canvas, Chest

AIR = 0.80  # attenuation that a full depth of aerated lung takes away


@dataclass(kw_only=True)
class Layers:
    """The maps that add up to the projection; findings write into them. All [H, W] on the canvas."""

    body_HW: Array  # soft tissue of trunk, neck, shoulders, arms, breasts
    lung_HW: Array  # depth of aerated lung, 0 to about 1
    heart_HW: Array  # depth of heart and mediastinum in front of the lung, 0 to 1
    vessels_HW: Array
    bones_HW: Array
    added_HW: Array  # what findings add (or, below 0, take away)
    trachea_HW: Array

    def attenuation(self) -> Array:
        """The line integral along the beam, in units of the mediastinum."""
        air_HW = self.lung_HW * (1 - 0.72 * self.heart_HW)
        return (
            self.body_HW
            - AIR * air_HW
            + 0.10 * self.heart_HW
            + self.vessels_HW * (1 - 0.6 * self.heart_HW)
            + self.bones_HW
            - self.trachea_HW
            + self.added_HW
        )


def build_layers(chest: Chest, canvas: Canvas) -> Layers:
    """The healthy chest."""
    lung_HW = lung_depth(chest, canvas)
    return Layers(
        body_HW=_body(chest, canvas),
        lung_HW=lung_HW,
        heart_HW=_heart(chest, canvas),
        vessels_HW=_vessels(chest, canvas) * np.minimum(lung_HW * 4, 1),
        bones_HW=_ribs(chest, canvas) + _shoulders(chest, canvas) + _spine(chest, canvas),
        added_HW=np.zeros_like(lung_HW),
        trachea_HW=_trachea(chest, canvas),
    )


def _ramp(distance_HW: Array, canvas: Canvas, width: float = 0.004) -> Array:
    """0 to 1 over `width` (image sides, at least 1.5 pixels) around distance 0."""
    return np.clip(distance_HW / max(width, 1.5 / canvas.size) + 0.5, 0, 1)


def side_lung(chest: Chest, canvas: Canvas, sign: int) -> Array:
    """Depth of one lung, 0 to 1: round at the ribs, cut by the dome, with the faint recess behind the diaphragm."""
    across_HW = sign * (canvas.u_1W - chest.midline(canvas.v_H1))
    lateral_H1 = chest.lateral(canvas.v_H1)
    floor_1W = chest.diaphragm(np.maximum(sign * canvas.u_1W, 0), sign)
    shell_HW = np.sqrt(np.clip(1 - (across_HW / lateral_H1) ** 2, 0, 1))
    below_HW = canvas.v_H1 - floor_1W
    dome_HW = _ramp(-below_HW, canvas)
    is_recess_HW = (below_HW > -0.004) & (canvas.v_H1 < chest.base + 0.03)
    recess_HW = 0.16 * np.exp(-np.clip(below_HW, 0, 1) / 0.035) * is_recess_HW
    inner_HW = _ramp(across_HW - 0.042, canvas, 0.05)
    top_H1 = np.sqrt(np.clip((canvas.v_H1 - chest.patient.apex) / 0.05, 0, 1))
    return np.asarray(shell_HW * np.maximum(dome_HW, recess_HW) * inner_HW * top_H1, np.float32)


def lung_depth(chest: Chest, canvas: Canvas) -> Array:
    """Depth of both lungs."""
    return side_lung(chest, canvas, -1) + side_lung(chest, canvas, 1)


def _capsule(canvas: Canvas, start: tuple[float, float], end: tuple[float, float], radius: float) -> Array:
    """Depth of a round limb between two points, mirrored on both sides: 0 to 1."""
    u_1W, v_H1 = np.abs(canvas.u_1W), canvas.v_H1
    du, dv = end[0] - start[0], end[1] - start[1]
    along_HW = np.clip(((u_1W - start[0]) * du + (v_H1 - start[1]) * dv) / (du * du + dv * dv), 0, 1)
    away_HW = (u_1W - start[0] - along_HW * du) ** 2 + (v_H1 - start[1] - along_HW * dv) ** 2
    return np.asarray(np.sqrt(np.clip(1 - away_HW / radius**2, 0, 1)), np.float32)


def _body(chest: Chest, canvas: Canvas) -> Array:
    """Trunk, neck, shoulders, arms and breasts."""
    p = chest.patient
    v = canvas.v_H1
    fat = 0.030 + 0.011 * p.build
    trunk = chest.half_width * (1.07 + 0.03 * np.clip(v - 0.75, 0, 0.4)) + fat
    neck = 0.125 + 0.006 * p.build
    widen = np.clip((v - 0.03) / 0.13, 0, 1)
    half_H1 = neck + (trunk - neck) * widen * widen * (3 - 2 * widen)
    depth_H1 = 0.62 + 0.30 * np.clip((v - 0.02) / 0.28, 0, 1) + 0.16 * np.clip((v - 0.70) / 0.2, 0, 1) + 0.05 * p.build
    trunk_HW = depth_H1 * np.clip(1 - (np.abs(canvas.u_1W) / half_H1) ** 2.4, 0, 1) ** 0.42
    thick = 0.40 + 0.05 * p.build
    elbow = (0.66 - 0.10 * chest.arm, 0.62 + 0.2 * chest.arm)
    arms_HW = thick * _capsule(canvas, (0.49, 0.22), elbow, 0.088 + 0.008 * p.build)
    shoulder_HW = (thick + 0.06) * _capsule(canvas, (0.20, 0.155), (0.52, 0.205), 0.115)
    fold_HW = (thick - 0.02) * _capsule(canvas, (0.33, 0.24), (0.42, 0.34), 0.10)
    body_HW = np.maximum(np.maximum(trunk_HW, fold_HW), np.maximum(arms_HW, shoulder_HW))
    body_HW += _breasts(chest, canvas)
    return np.asarray(canvas.blur(body_HW.astype(np.float32), 0.004), np.float32)


def _breasts(chest: Chest, canvas: Canvas) -> Array:
    """Two drops over the lower lungs whose lower edge shows best."""
    p = chest.patient
    radius = 0.135 + 0.02 * p.build
    u_HW = (np.abs(canvas.u_1W) - 0.60 * chest.half_width - 0.02 * p.build) / (1.12 * radius)
    v_H1 = (canvas.v_H1 - chest.dome_v(1) + 0.05) / radius
    stretch_H1 = np.where(v_H1 < 0, v_H1 / 1.7, v_H1)  # the upper edge runs out, the lower one is round
    drop_HW = np.clip(1 - u_HW**2 - stretch_H1**2, 0, 1)
    return np.asarray(0.19 * p.breast * drop_HW**0.6, np.float32)


def _heart(chest: Chest, canvas: Canvas) -> Array:
    """Heart and mediastinum as one contour with rounded edges."""
    right_H1, left_H1 = chest.borders(canvas.v_H1)
    u_HW = canvas.u_1W - 0.6 * chest.midline(canvas.v_H1)
    inside_HW = np.minimum(left_H1 - u_HW, right_H1 + u_HW)
    round_HW = np.clip(inside_HW / 0.075, 0, 1)
    depth_HW = 0.42 * (inside_HW > 0) + 0.58 * (1 - (1 - round_HW) ** 2)
    depth_HW = depth_HW * np.clip(1 - (canvas.v_H1 - chest.dome_v(1) - 0.04) / 0.08, 0, 1)
    return canvas.blur(depth_HW.astype(np.float32), 0.0035)


def _trachea(chest: Chest, canvas: Canvas) -> Array:
    """Air of the trachea, a little to the right of the midline at the arch, and of the main bronchi."""
    p = chest.patient
    carina = p.apex + 0.36 * (chest.dome_v(1) - p.apex)
    v = np.linspace(-0.15, carina, 20)
    u = chest.midline(v) - 0.006 * np.clip((v - 0.1) / 0.2, 0, 1)
    half = 0.0165 * np.ones_like(v)
    tube_N2 = np.concatenate([np.stack([u - half, v], 1), np.stack([u + half, v], 1)[::-1]])
    end = (u[-1], carina)
    right_N2 = np.array([end, (end[0] - 0.045, carina + 0.05), (end[0] - 0.085, carina + 0.085)])
    left_N2 = np.array([end, (end[0] + 0.06, carina + 0.04), (end[0] + 0.1, carina + 0.06)])
    air_HW = 0.24 * canvas.polygons(tube_N2) + 0.10 * canvas.lines(right_N2, left_N2, width=0.02)
    return canvas.blur(air_HW.astype(np.float32), 0.004)


def _vessels(chest: Chest, canvas: Canvas) -> Array:
    """Hila and the branching vessels, thinner towards the ribs; the tree is the patient's own."""
    rng = np.random.Generator(np.random.Philox(key=chest.patient.vessel_key))
    total_HW = np.zeros((canvas.num, canvas.num), np.float32)
    segments, widths = [], []
    height = chest.dome_v(1) - chest.patient.apex
    for sign in (-1, 1):
        hilum = np.array([0.075 if sign < 0 else 0.085, chest.patient.apex + height * (0.50 if sign < 0 else 0.46)])
        segments_N22, widths_N = _tree(rng, hilum, height)
        segments.append(segments_N22 * (sign, 1.0))
        widths.append(widths_N)
    segments_N22, milli_N = np.concatenate(segments), (np.concatenate(widths) * 1000).astype(int)
    for milli in np.unique(milli_N):
        width = float(milli + 0.5) / 1000
        drawn_HW = canvas.lines(*segments_N22[milli_N == milli], width=width, level=11.5 * width + 0.035)
        np.maximum(total_HW, drawn_HW, out=total_HW)
    return canvas.blur(total_HW, 0.0022) * np.float32(chest.patient.vessel_gain)


def _tree(
    rng: np.random.Generator, hilum: NDArray[np.floating], height: float
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Segments [N, 2, 2] and widths [N] of one lung's vessels on the side u > 0, grown generation by generation."""
    angles = np.deg2rad(np.array([-75, -52, -30, -8, 14, 34, 54, 72, 86, -62, 44, 64])) + rng.normal(0, 0.10, 12)
    tips_N2 = hilum + np.stack([rng.uniform(-0.02, 0.02, 12), rng.uniform(-0.03, 0.06, 12)], 1)
    widths = rng.uniform(0.0075, 0.0135, 12)
    segments, thickness = [], []
    for generation in range(11):
        step = height * 0.048 * rng.uniform(0.8, 1.2, len(angles))
        ends_N2 = tips_N2 + step[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
        segments.append(np.stack([tips_N2, ends_N2], 1))
        thickness.append(widths)
        forks = (rng.random(len(angles)) < 0.34) & (generation > 0) & (len(angles) < 70)
        turn = rng.normal(0, 0.13, len(angles)) + 0.02
        spread = rng.uniform(0.35, 0.75, len(angles))
        shrink = np.where(forks, 0.78, 0.90)
        angles = np.concatenate([angles + turn - 0.5 * spread * forks, (angles + 0.6 * spread)[forks]])
        tips_N2 = np.concatenate([ends_N2, ends_N2[forks]])
        widths = np.concatenate([widths * shrink, (widths * 0.68)[forks]])
    return np.concatenate(segments), np.concatenate(thickness)


def _band(path_N2: NDArray[np.floating], half_N: NDArray[np.floating]) -> tuple[NDArray[np.floating], ...]:
    """Outline of a band around a path, and its two edges."""
    tangent_N2 = np.gradient(path_N2, axis=0)
    tangent_N2 /= np.linalg.norm(tangent_N2, axis=1, keepdims=True) + 1e-9
    normal_N2 = np.stack([-tangent_N2[:, 1], tangent_N2[:, 0]], 1) * half_N[:, None]
    upper_N2, lower_N2 = path_N2 + normal_N2, path_N2 - normal_N2
    return np.concatenate([upper_N2, lower_N2[::-1]]), upper_N2, lower_N2


def _ribs(chest: Chest, canvas: Canvas) -> Array:
    """Ten pairs of ribs: tilted rings in space, of which the back arc shows crisp and the front arc faint."""
    p = chest.patient
    bands: dict[str, list[NDArray[np.floating]]] = {"back": [], "front": [], "back edge": [], "front edge": []}
    spacing = (chest.dome_v(1) + chest.dome_rise - p.apex) / 9.6
    for k in range(10):
        start = p.apex - 0.012 + k * spacing
        drop = p.rib_drop * (0.55 + 0.45 * min(k, 5) / 5)
        reach = float(chest.lateral(np.array([start + 0.42 * drop]))[0]) + 0.009
        for part, (low, high) in {"back": (6, 96), "front": (90, 138 - 3 * k)}.items():
            theta = np.deg2rad(np.linspace(low, high, 26))
            out, turn = np.sin(theta), (1 - np.cos(theta)) / 2
            v = start + drop * turn + 0.014 * out - 0.016 * np.exp(-(((theta - 0.35) / 0.3) ** 2))
            half = p.rib_width * (1.0 if part == "back" else 1.12) * np.minimum(1, 0.7 + theta / 1.5)
            for sign in (-1, 1):
                path_N2 = np.stack([sign * (reach * out) + chest.midline(v), v], 1)
                outline, upper, lower = _band(path_N2, half)
                bands[part].append(outline)
                bands[f"{part} edge"] += [upper, lower]
    back_HW = 0.095 * canvas.polygons(*bands["back"]) + 0.07 * canvas.lines(*bands["back edge"], width=0.0035)
    front_HW = 0.05 * canvas.polygons(*bands["front"]) + 0.035 * canvas.lines(*bands["front edge"], width=0.0035)
    across_HW = np.abs(canvas.u_1W) / (chest.lateral(canvas.v_H1) + 0.02)
    tangent_HW = 1 + 0.8 * np.clip((across_HW - 0.8) / 0.2, 0, 1) ** 2  # the beam runs along the bone at the side
    calcium = 1.1 - 0.004 * p.age
    return np.asarray(canvas.blur((back_HW + front_HW).astype(np.float32), 0.0024) * tangent_HW * calcium, np.float32)


def _shoulders(chest: Chest, canvas: Canvas) -> Array:
    """Clavicles, scapulae and the upper ends of the humeri."""
    p = chest.patient
    lift = 0.03 * (1 - chest.scapula) + p.clavicle_tilt
    knots = np.array([(0.028, 0.235), (0.09, 0.222), (0.18, 0.19), (0.27, 0.16), (0.36, 0.138), (0.43, 0.142)])
    knots[:, 1] += p.apex - 0.10 - lift * np.linspace(0.4, 1.2, len(knots))
    u = np.linspace(knots[0, 0], knots[-1, 0], 24)
    path_N2 = np.stack([u, PchipInterpolator(knots[:, 0], knots[:, 1])(u)], 1)
    half_N = 0.0125 + 0.006 * np.exp(-(((u - 0.03) / 0.03) ** 2)) + 0.003 * np.clip((u - 0.3) / 0.1, 0, 1)
    away = 0.085 * chest.scapula
    blade = [(0.285, 0.19), (0.262, 0.26), (0.275, 0.36), (0.315, 0.47), (0.345, 0.46), (0.375, 0.36), (0.415, 0.27)]
    blade_N2 = np.add([*blade, (0.40, 0.21)], (away, 0.0))
    spine_N2 = np.add([(0.27, 0.255), (0.34, 0.215), (0.42, 0.16)], (away, 0.0))
    angle = np.linspace(0, 2 * np.pi, 24)
    head_N2 = np.stack([0.485 + 0.046 * np.cos(angle), 0.205 + 0.046 * np.sin(angle)], 1)
    elbow = (0.66 - 0.10 * chest.arm, 0.62 + 0.2 * chest.arm)
    shaft_N2 = np.array([(0.495, 0.225), (0.52, 0.29), elbow])
    layer_HW = np.zeros((canvas.num, canvas.num), np.float32)
    for sign in SIDES.values():
        mirror = (sign, 1.0)
        outline, upper, lower = (points * mirror for points in _band(path_N2, half_N))
        layer_HW += 0.13 * canvas.polygons(outline) + 0.075 * canvas.lines(upper, lower, width=0.004)
        layer_HW += 0.035 * canvas.polygons(blade_N2 * mirror)
        layer_HW += 0.05 * canvas.lines(blade_N2 * mirror, spine_N2 * mirror, width=0.006)
        layer_HW += 0.15 * canvas.polygons(head_N2 * mirror) + 0.15 * canvas.lines(shaft_N2 * mirror, width=0.034)
    return canvas.blur(layer_HW, 0.003)


def _spine(chest: Chest, canvas: Canvas) -> Array:
    """Vertebral bodies with disc spaces, pedicles and spinous processes."""
    v = canvas.v_H1
    u_HW = canvas.u_1W - chest.midline(v)
    half_H1 = 0.034 + 0.014 * np.clip(v, 0, 1)
    spacing = 0.058 + 0.012 * np.clip(v, 0, 1)
    phase_H1 = 2 * np.pi * v / spacing
    column_HW = np.clip((half_H1 - np.abs(u_HW)) / 0.006, 0, 1)
    disc_H1 = np.clip((np.cos(phase_H1) - 0.55) / 0.3, 0, 1)
    pedicle_HW = np.exp(-(((np.abs(u_HW) - 0.6 * half_H1) / 0.007) ** 2)) * np.clip(np.cos(phase_H1 - 2.2), 0, 1) ** 2
    process_HW = np.exp(-((u_HW / 0.006) ** 2)) * np.clip(np.cos(phase_H1 + 2.4), 0, 1)
    edge_HW = np.exp(-(((np.abs(u_HW) - half_H1) / 0.004) ** 2))
    layer_HW = column_HW * (0.13 - 0.05 * disc_H1) + 0.06 * pedicle_HW + 0.05 * process_HW + 0.03 * edge_HW
    return canvas.blur(layer_HW.astype(np.float32), 0.002)


def gastric_bubble(chest: Chest, canvas: Canvas, rng: np.random.Generator) -> Array:
    """Air in the stomach under the left dome: what it takes away, [H, W]."""
    size = chest.patient.bubble
    u, v = rng.uniform(0.13, 0.20), chest.dome_v(1) + rng.uniform(0.045, 0.075)
    half_u, half_v = size * rng.uniform(0.035, 0.06), size * rng.uniform(0.018, 0.032)
    if size == 0:
        return np.zeros((canvas.num, canvas.num), np.float32)
    round_HW = np.clip(1 - ((canvas.u_1W - u) / half_u) ** 2 - ((canvas.v_H1 - v) / half_v) ** 2, 0, 1)
    return np.asarray(0.26 * round_HW**0.5, np.float32)
