"""Procedural chest radiographs with reports and pixel truth: the endless embedded corpus. Not a simulator of dose.

`render(index, seed=...)` is a pure function: studies come in blocks of six that hold patients of one to three studies,
and every random number is drawn from a Philox stream keyed by (seed, purpose, patient or study).
Convention of PACS: the patient's left is on the image's right.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import cv2
import numpy as np
from numpy.typing import NDArray

from medim_ray.data.phantom_anatomy import SIDES, Array, Canvas, Chest, Patient, draw_chest, draw_patient, soften
from medim_ray.data.phantom_findings import FINDINGS, Finding, draw_findings, paint
from medim_ray.data.phantom_layers import Layers, build_layers, gastric_bubble, side_lung
from medim_ray.data.phantom_report import write_report

__all__ = ["FINDINGS", "Lesion", "Study", "patient_id", "render", "zone_map"]

VIEWS = ("PA", "AP", "AP Supine")
_BLOCK = 6  # studies; the patients of a block are one of the following lists of their numbers of studies
_BLOCKS = ((1, 2, 3), (3, 2, 1), (2, 2, 2), (1, 1, 1, 3), (1, 1, 2, 2), (3, 1, 1, 1), (2, 1, 1, 1, 1), (1,) * 6)
_MIN_SIZE = 32
# Purposes of the random streams.
_OF_BLOCK, _OF_PATIENT, _OF_STUDY, _OF_FINDINGS, _OF_TEXTURE, _OF_TEXT, _OF_NOISE, _OF_MARKER = range(8)
_OF_LESION = 16  # and the next ones: one stream for each finding of a study


@dataclass(frozen=True, kw_only=True)
class Lesion:
    """One finding of a study as it truly is."""

    finding: str  # one of FINDINGS
    side: str  # 'left', 'right', 'bilateral' or '' (has none: the heart, a tube in the trachea)
    zone: str  # 'upper', 'mid', 'lower' or ''
    sentence: int  # the sentence of `Study.sentences`, in the FINDINGS section, that tells it
    mask_HW: NDArray[np.bool_]  # its pixels; of a pacemaker the generator without the leads


@dataclass(frozen=True, kw_only=True)
class Study:
    """One radiograph with its report and truth."""

    image_id: str
    patient_id: str
    image_HW: NDArray[np.uint8]
    report: str  # "FINDINGS: ... IMPRESSION: ..."
    sentences: tuple[str, ...]  # in order, exact substrings of the report
    lesions: tuple[Lesion, ...]
    labels: dict[str, str]  # each of FINDINGS -> '0' or '1'; view; sex 'M' or 'F'; age in years
    view: str  # one of VIEWS


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """A study before it is drawn."""

    patient_number: int
    chest: Chest
    findings: tuple[Finding, ...]
    turn: float  # degrees
    zoom: float
    shift: tuple[float, float]

    @property
    def patient(self) -> Patient:
        return self.chest.patient

    @cached_property
    def pose_23(self) -> NDArray[np.float64]:
        """Affine map from canonical (u, v) to the image, in image sides."""
        cos, sin = self.zoom * np.cos(np.deg2rad(self.turn)), self.zoom * np.sin(np.deg2rad(self.turn))
        linear = np.array([[cos, -sin], [sin, cos]])
        offset = np.array([0.5, 0.5]) + self.shift - linear @ (0.0, 0.5)
        return np.concatenate([linear, offset[:, None]], 1)


def _rng(seed: int, purpose: int, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, (purpose << 56) + number], np.uint64)))


def _first_study(index: int, seed: int) -> int:
    """The first study of the patient of study `index`; it serves as the patient's number."""
    if index < 0:
        raise ValueError(f"index={index}: the number of a phantom study is 0 or more")
    block, place = divmod(index, _BLOCK)
    sizes = _BLOCKS[int(_rng(seed, _OF_BLOCK, block).integers(len(_BLOCKS)))]
    return block * _BLOCK + max(start for start in (0, *np.cumsum(sizes).tolist()) if start <= place)


def patient_id(index: int, *, seed: int = 0) -> str:
    """The patient of study `index`, without drawing it. Raises ValueError for a negative index."""
    return f"phantom-{seed}-p{_first_study(index, seed):06d}"


def _plan(index: int, seed: int) -> _Plan:
    """Everything about study `index` but its pixels and words."""
    if index < 0:
        raise ValueError(f"index={index}: the number of a phantom study is 0 or more")
    first = _first_study(index, seed)
    patient = draw_patient(_rng(seed, _OF_PATIENT, first))
    rng = _rng(seed, _OF_STUDY, index)
    patient = replace(patient, age=patient.age + patient.years_between * (index - first))
    view = str(rng.choice(VIEWS, p=[0.58, 0.26, 0.16]))
    return _Plan(
        patient_number=first,
        chest=draw_chest(patient, view, rng),
        findings=draw_findings(patient, view, _rng(seed, _OF_FINDINGS, index)),
        turn=float(np.clip(rng.normal(0, 1.6 if view == "PA" else 2.6), -6, 6)),
        zoom=float(rng.uniform(0.96, 1.18)),
        shift=(float(np.clip(rng.normal(0, 0.022), -0.05, 0.05)), float(np.clip(rng.normal(0, 0.022), -0.05, 0.05))),
    )


def _to_image(plan: _Plan, canvas: Canvas, layer_HW: NDArray[np.float32]) -> Array:
    """Turns, scales and shifts a map of the canvas into the image."""
    linear_22, offset_2 = plan.pose_23[:, :2], plan.pose_23[:, 2]
    # pixel j of the canvas has its centre at u = (j + 0.5 - num / 2) / size; pixel j of the image at (j + 0.5) / size
    origin_2 = np.array([0.5 - canvas.num / 2, 0.5 - canvas.num / 2]) / canvas.size + (0.0, 0.5)
    start_2 = (linear_22 @ origin_2 + offset_2) * canvas.size - 0.5
    matrix_23 = np.concatenate([linear_22, start_2[:, None]], 1)
    square = (canvas.size, canvas.size)
    square = (canvas.size, canvas.size)
    warped_HW = cv2.warpAffine(layer_HW, matrix_23, square, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(warped_HW, np.float32)


def _expose(attenuation_HW: Array, plan: _Plan, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Beer-Lambert law, scattered light, photons, logarithm and window: gray values."""
    size = attenuation_HW.shape[0]
    is_ap = plan.chest.view != "PA"
    strength = rng.uniform(2.3, 2.8)
    scatter_ratio = rng.uniform(0.25, 0.5) + (rng.uniform(0.1, 0.35) if is_ap else 0) + 0.05 * plan.patient.build
    photons = rng.uniform(0.5, 1.2) * (0.6 if is_ap else 1.0) * 2.6e4 * (256 / size) ** 2
    lift, gamma = rng.uniform(0.04, 0.20), rng.uniform(0.85, 1.2)
    low_percent, high_percent = rng.uniform(1, 4), rng.uniform(96.5, 99)
    direct_HW = np.exp(-strength * attenuation_HW)
    light_HW = direct_HW + scatter_ratio * soften(np.minimum(direct_HW, 0.5), 0.09 * size)
    grain_HW = rng.standard_normal((size, size), dtype=np.float32)
    light_HW = np.maximum(light_HW + np.sqrt(light_HW / photons) * soften(grain_HW, 0.0022 * size), 1e-4)
    dense_HW = -np.log(light_HW)
    middle = dense_HW[int(0.12 * size) : int(0.9 * size), int(0.12 * size) : int(0.88 * size)]
    low, high = np.percentile(middle[::2, ::2], [low_percent, high_percent])
    low -= lift * (high - low)
    gray_HW = np.clip((dense_HW - low) / (high - low), 0, 1) ** gamma
    return np.asarray(np.round(255 * gray_HW), np.uint8)


def _mark(image_HW: NDArray[np.uint8], rng: np.random.Generator) -> None:
    """The side marker of lead and the edges of the collimator, as on some films; in place."""
    size = image_HW.shape[0]
    side, has_marker, has_edges = ("left", "right")[int(rng.integers(2))], rng.random() < 0.5, rng.random() < 0.25
    across, down = rng.uniform(0.04, 0.10), rng.uniform(0.06, 0.14)
    edges = np.round(rng.uniform(0, 0.025, 4) * size).astype(int)
    if has_edges:
        top, bottom, left, right = edges
        image_HW[:top] = image_HW[size - bottom :] = 0
        image_HW[:, :left] = image_HW[:, size - right :] = 0
    if has_marker:
        x = (1 - across - 0.04 if side == "left" else across) * size
        scale, line = 0.0026 * size, max(1, round(0.006 * size))
        place = (round(x), round(down * size))
        cv2.putText(image_HW, side[0].upper(), place, cv2.FONT_HERSHEY_SIMPLEX, scale, 245, line, cv2.LINE_AA)


def render(index: int, *, seed: int = 0, size: int = 256) -> Study:
    """Study number `index` of the endless corpus `seed`, as a `size` x `size` image.

    A pure function of its arguments, in any order of calls. The report and the findings do not depend on `size`.
    Raises ValueError for a negative index or a size under 32.
    """
    if size < _MIN_SIZE:
        raise ValueError(f"size={size}: a phantom needs at least {_MIN_SIZE} pixels a side")
    plan = _plan(index, seed)
    canvas = Canvas(size=size)
    layers = build_layers(plan.chest, canvas)
    _enliven(layers, plan, canvas, _rng(seed, _OF_TEXTURE, index))
    masks = []
    for k, finding in enumerate(plan.findings):
        mask_HW = paint(finding, layers, plan.chest, canvas, _rng(seed, _OF_LESION + k, index))
        masks.append(_to_image(plan, canvas, mask_HW.astype(np.float32)) > 0.5)
    noise = _rng(seed, _OF_NOISE, index)
    image_HW = _expose(_to_image(plan, canvas, layers.attenuation()), plan, noise)
    _mark(image_HW, _rng(seed, _OF_MARKER, index))
    report, sentences, told = write_report(plan.findings, _rng(seed, _OF_TEXT, index))
    present = {finding.kind for finding in plan.findings}
    return Study(
        image_id=f"phantom-{seed}-{index:06d}",
        patient_id=patient_id(index, seed=seed),
        image_HW=image_HW,
        report=report,
        sentences=sentences,
        lesions=tuple(
            Lesion(finding=f.kind, side=f.side, zone=f.zone, sentence=sentence, mask_HW=mask_HW)
            for f, sentence, mask_HW in zip(plan.findings, told, masks, strict=True)
        ),
        labels={name: str(int(name in present)) for name in FINDINGS}
        | {"view": plan.chest.view, "sex": plan.patient.sex, "age": str(plan.patient.age)},
        view=plan.chest.view,
    )


def _enliven(layers: Layers, plan: _Plan, canvas: Canvas, rng: np.random.Generator) -> None:
    """What differs from film to film without meaning: texture of the lung, of the fat and bowel gas; in place."""
    grainy_HW = 0.016 * canvas.texture(rng, grain=0.018) + 0.012 * canvas.texture(rng, grain=0.009)
    layers.added_HW += grainy_HW * np.minimum(layers.lung_HW * 1.5, 1)
    cloudy_HW = 0.03 * canvas.texture(rng, grain=0.16)  # uneven breath and perfusion
    layers.added_HW += cloudy_HW * np.minimum(layers.lung_HW * 1.5, 1)
    layers.body_HW *= 1 + 0.025 * canvas.texture(rng, grain=0.12)
    layers.added_HW -= gastric_bubble(plan.chest, canvas, rng)


def zone_map(index: int, *, seed: int = 0, size: int = 256) -> NDArray[np.uint8]:
    """Zones of the hemithoraces of study `index`, [size, size]: 0 outside, 1-3 right upper, mid, lower, 4-6 left.

    It covers the lungs in front of and behind the heart, down to the costophrenic angles.
    """
    plan = _plan(index, seed)
    canvas = Canvas(size=size)
    zones_HW = np.zeros((size, size), np.uint8)
    for side, sign in SIDES.items():
        edges = plan.chest.zone_edges(sign)
        lung_HW = (side_lung(plan.chest, canvas, sign) > 0.02).astype(np.float32)
        for k in range(3):
            band_H1 = (canvas.v_H1 >= edges[k]) & (canvas.v_H1 < (edges[k + 1] if k < 2 else edges[k + 1] + 0.1))
            inside_HW = _to_image(plan, canvas, (lung_HW * band_H1).astype(np.float32)) > 0.5
            zones_HW[inside_HW] = 1 + k + (3 if side == "left" else 0)
    return zones_HW
