"""Anatomy of the chest phantom: who the patient is, how the chest lies in one study, and its layers of attenuation.

Everything lives in canonical coordinates: u runs to the image's right (the patient's LEFT side), v downwards, both in
units of the image side at scale 1, u = 0 on the midline. No findings and no exposure here.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator

Array = NDArray[np.float32]
SIDES = {"right": -1, "left": 1}  # sign of u: the patient's left lies on the image's right
ZONES = ("upper", "mid", "lower")
MARGIN_RATIO = 0.125  # the canvas exceeds the image by this on each side, so that a turned image has no empty corner
_SUBPIXEL_BITS = 4  # cv2 takes fixed-point coordinates


@dataclass(frozen=True, kw_only=True)
class Patient:
    """What all studies of one patient share. Lengths in image sides; `build` is body size in standard deviations."""

    sex: str
    age: int  # at the first study
    years_between: int  # from study to study
    build: float
    half_width: float  # of the rib cage, inside
    apex: float  # v of the lung apex
    dome: float  # v of the top of the left diaphragm at full inspiration
    dome_step: float  # how much higher the right dome stands
    dome_drop: float  # depth of the costophrenic angle below the dome
    heart_ratio: float  # cardiothoracic ratio on a PA film
    is_heart_enlarged: bool
    heart_long: float  # how low the apex of the heart lies
    heart_right: float  # share of its width on the right of the midline
    knob: float  # how far the aortic knob stands out
    scoliosis: float
    rib_drop: float
    rib_width: float
    clavicle_tilt: float
    breast: float  # thickness relative to the chest wall; 0 for men but for some fat
    bubble: float  # size of the gastric air bubble, 0 = not seen
    vessel_gain: float
    vessel_key: int
    pacemaker_side: str  # '' = none


def draw_patient(rng: np.random.Generator) -> Patient:
    """Draws a patient; `rng` belongs to the patient alone."""
    is_male = bool(rng.random() < 0.54)
    age = int(np.clip(rng.normal(58, 17), 18, 95))
    build = float(np.clip(rng.normal(0, 1), -2, 2.2))
    elder = (age - 58) / 17
    is_enlarged = bool(rng.random() < 0.20 + 0.03 * elder)
    has_pacemaker = bool(rng.random() < 0.17 + 0.04 * elder)
    return Patient(
        sex="M" if is_male else "F",
        age=age,
        years_between=int(rng.integers(2)),
        build=build,
        half_width=float(rng.normal(0.348 if is_male else 0.336, 0.014)),
        apex=float(rng.normal(0.115, 0.012)),
        dome=float(rng.normal(0.762 if is_male else 0.748, 0.022) - 0.008 * build),
        dome_step=float(rng.uniform(0.008, 0.035)),
        dome_drop=float(rng.uniform(0.085, 0.125)),
        heart_ratio=float(rng.uniform(0.515, 0.61) if is_enlarged else rng.uniform(0.40, 0.505) + 0.006 * elder),
        is_heart_enlarged=is_enlarged,
        heart_long=float(rng.normal(0, 0.018)),
        heart_right=float(rng.uniform(0.27, 0.39)),
        knob=float(np.clip(rng.normal(0.068, 0.006) + 0.007 * elder, 0.052, 0.095)),
        scoliosis=float(rng.normal(0, 0.005)),
        rib_drop=float(rng.uniform(0.17, 0.25)),
        rib_width=float(rng.uniform(0.0105, 0.0135)),
        clavicle_tilt=float(rng.normal(0, 0.02)),
        breast=float(np.clip((0.14 if is_male else 0.65) * (1 + 0.4 * build + rng.normal(0, 0.4)), 0, 1.3)),
        bubble=float(rng.uniform(0.6, 1.2) if rng.random() < 0.55 else 0),
        vessel_gain=float(rng.uniform(0.7, 1.4)),
        vessel_key=int(rng.integers(2**62)),
        pacemaker_side=("left" if rng.random() < 0.75 else "right") if has_pacemaker else "",
    )


def soften(layer_HW: Array, pixels: float) -> Array:
    """Gaussian blur of a square map, sigma in pixels (at least 0.3); wide ones are done on a smaller grid."""
    if pixels < 8:
        return np.asarray(cv2.GaussianBlur(layer_HW, (0, 0), max(pixels, 0.3)), np.float32)
    full = layer_HW.shape[0]
    num = max(4, full // int(pixels // 2))
    small = cv2.resize(layer_HW, (num, num), interpolation=cv2.INTER_AREA)
    small = cv2.GaussianBlur(small, (0, 0), pixels * num / full, borderType=cv2.BORDER_REPLICATE)
    return np.asarray(cv2.resize(small, (full, full), interpolation=cv2.INTER_CUBIC), np.float32)


class Canvas:
    """The pixel grid in canonical coordinates: `num` x `num` pixels of side 1 / `size`, u along W, v along H."""

    def __init__(self, *, size: int) -> None:
        self.size = size
        self.num = 2 * round(size * (0.5 + MARGIN_RATIO))
        offsets = ((np.arange(self.num) + 0.5 - self.num / 2) / size).astype(np.float32)
        self.u_1W: Array = offsets[None, :]
        self.v_H1: Array = offsets[:, None] + np.float32(0.5)

    def to_pixels(self, points_N2: NDArray[np.floating]) -> NDArray[np.int32]:
        """Points (u, v), last axis 2, as fixed-point pixel coordinates for cv2 drawing."""
        pixels_N2 = (np.asarray(points_N2) - (0.0, 0.5)) * self.size + self.num / 2 - 0.5
        return np.asarray(np.round(pixels_N2 * 2**_SUBPIXEL_BITS), np.int32)

    def polygons(self, *outlines: NDArray[np.floating]) -> Array:
        """Coverage in [0, 1] of filled outlines, each [N, 2] of (u, v), with smooth edges."""
        layer_HW = np.zeros((self.num, self.num), np.uint8)
        for outline_N2 in outlines:
            cv2.fillPoly(layer_HW, [self.to_pixels(outline_N2)], 255, cv2.LINE_AA, _SUBPIXEL_BITS)
        return np.asarray(layer_HW / np.float32(255), np.float32)

    def lines(self, *paths: NDArray[np.floating], width: float, level: float = 1.0) -> Array:
        """Coverage of open polylines of the given width (in image sides); thinner than a pixel means fainter."""
        layer_HW = np.zeros((self.num, self.num), np.uint8)
        points = [self.to_pixels(path_N2) for path_N2 in paths]
        pixels = width * self.size
        gray = round(255 * min(1.0, pixels))
        cv2.polylines(layer_HW, points, False, gray, max(1, round(pixels)), cv2.LINE_AA, _SUBPIXEL_BITS)
        return np.asarray(layer_HW * np.float32(level / 255), np.float32)

    def blur(self, layer_HW: Array, sigma: float) -> Array:
        """Gaussian blur, sigma in image sides."""
        return soften(layer_HW, sigma * self.size)

    def texture(self, rng: np.random.Generator, *, grain: float) -> Array:
        """Smooth noise, mean 0, standard deviation about 1, correlation length `grain` (in image sides).

        The draw does not depend on the size of the image: the same study looks alike at 112 and at 512 pixels.
        """
        num = round((1 + 2 * MARGIN_RATIO) / grain) + 4
        coarse: Array = rng.standard_normal((num, num), dtype=np.float32)
        fine_HW = cv2.resize(coarse, (self.num, self.num), interpolation=cv2.INTER_CUBIC)
        return np.asarray(1.4 * fine_HW, np.float32)


@dataclass(frozen=True, kw_only=True)
class Chest:
    """The chest of one study: the patient as the view and the breath shape it."""

    patient: Patient
    view: str
    dome_rise: float  # shallow breath and supine position lift both domes
    heart_scale: float  # magnification of the heart in AP views
    half_width: float
    scapula: float  # how far the shoulder blades are turned off the lungs
    arm: float

    @property
    def base(self) -> float:
        """v of the costophrenic angles."""
        return self.dome_v(1) + self.patient.dome_drop

    def dome_v(self, sign: int) -> float:
        """v of the top of a diaphragm dome; `sign` as in SIDES."""
        p = self.patient
        return p.dome - self.dome_rise - (p.dome_step if sign < 0 else 0.0)

    def lateral(self, v: NDArray[np.floating]) -> Array:
        """Inner half-width of the rib cage at heights v."""
        t = np.clip((v - self.patient.apex) / (0.86 - self.patient.apex), 0, 1)
        rise = np.maximum(1 - (1 - t) ** 3.0, 0) ** 0.56
        return np.asarray(0.05 + (self.half_width - 0.05) * rise, np.float32)

    def diaphragm(self, across: NDArray[np.floating], sign: int) -> Array:
        """v of the diaphragm of one side at distances `across` from the midline."""
        centre = 0.47 * self.half_width
        out = np.maximum(across - centre, 0) / (self.half_width - centre)
        inward = np.maximum(centre - across, 0) / centre
        drop = self.patient.dome_drop
        return np.asarray(self.dome_v(sign) + drop * (out**2.3 + 0.35 * inward**2), np.float32)

    def zone_edges(self, sign: int) -> tuple[float, float, float, float]:
        """v of the apex, of the two borders between the zones, and of the costophrenic angle."""
        apex, dome = self.patient.apex, self.dome_v(sign)
        return apex, apex + (dome - apex) / 3, apex + 2 * (dome - apex) / 3, dome + self.patient.dome_drop

    def midline(self, v: NDArray[np.floating]) -> Array:
        """u of the spine at heights v."""
        return np.asarray(self.patient.scoliosis * np.sin(5.5 * v + 0.4), np.float32)

    def borders(self, v: NDArray[np.floating]) -> tuple[Array, Array]:
        """Right and left border of heart and mediastinum, as distances from the midline, at heights v (same shape)."""
        p = self.patient
        width = 2 * self.half_width * p.heart_ratio * self.heart_scale
        right, left = p.heart_right * width, (1 - p.heart_right) * width
        top, low = p.apex, self.dome_v(1) + p.heart_long
        span = low - top

        def curve(heights: tuple[float, ...], borders: tuple[float, ...]) -> Array:
            """A smooth border; heights from 0 at the apex of the lung to 1 at the apex of the heart."""
            x_of_v = PchipInterpolator(top + span * np.array(heights), borders)
            return np.asarray(x_of_v(np.clip(v, top - 0.3, low + 0.3)), np.float32)

        right_v = curve(  # neck, superior vena cava, right atrium, diaphragm
            (-0.6, 0.0, 0.2, 0.38, 0.5, 0.62, 0.8, 0.95, 1.1, 1.6),
            (0.066, 0.060, 0.057, 0.058, 0.062, 0.8 * right + 0.01, right, 0.93 * right, 0.72 * right, 0.5 * right),
        )
        trunk = 0.085 + 0.25 * (left - 0.13)
        left_v = curve(  # neck, arch of the aorta, pulmonary trunk, left ventricle, diaphragm
            (-0.6, 0.0, 0.14, 0.25, 0.335, 0.43, 0.56, 0.72, 0.89, 1.02, 1.2, 1.6),
            (0.066, 0.06, 0.058, p.knob, 0.84 * p.knob, 0.066, trunk, *(left * np.array([0.72, 1, 0.95, 0.6, 0.4]))),
        )
        return right_v, left_v

    def place(self, rng: np.random.Generator, side: str, zone: str, radius: float) -> tuple[float, float]:
        """A point (u, v), uniform over the free lung of the zone, about `radius` away from its borders."""
        sign = SIDES[side]
        edges = self.zone_edges(sign)
        z = ZONES.index(zone)
        low, high = edges[z], edges[z + 1]
        points_N2 = rng.random((64, 2))
        v_N = low + (high - low) * points_N2[:, 0]
        right_N, left_N = self.borders(v_N)
        inner_N = np.maximum((left_N if sign > 0 else right_N) + 0.5 * radius, 0.07)
        outer_N = self.lateral(v_N) - radius - 0.012
        across_N = 0.07 + (self.half_width - 0.07) * points_N2[:, 1]
        floor_N = self.diaphragm(across_N, sign) - radius - 0.012
        is_free_N = (across_N > inner_N) & (across_N < outer_N) & (v_N < np.minimum(floor_N, high - 0.5 * radius))
        is_free_N &= v_N > low + (radius + 0.015 if zone == "upper" else 0.5 * radius)
        if is_free_N.any():
            pick = int(np.argmax(is_free_N))
            return sign * float(across_N[pick]), float(v_N[pick])
        middle = np.array([0.5 * (low + min(high, self.dome_v(sign)))])  # a lesion as big as its zone
        borders = self.borders(middle)
        inner = float((borders[1] if sign > 0 else borders[0])[0])
        return sign * 0.5 * (inner + float(self.lateral(middle)[0])), float(middle[0])


def draw_chest(patient: Patient, view: str, rng: np.random.Generator) -> Chest:
    """The chest of a study; the view magnifies the heart, lifts the diaphragm and leaves the scapulae on the lungs."""
    is_ap, is_supine = view != "PA", view == "AP Supine"
    return Chest(
        patient=patient,
        view=view,
        dome_rise=float(rng.uniform(0, 0.03) + (rng.uniform(0.0, 0.045) if is_ap else 0) + (0.015 if is_supine else 0)),
        heart_scale=float(rng.uniform(0.98, 1.02) * (rng.uniform(1.04, 1.12) if is_ap else 1)),
        half_width=patient.half_width * float(rng.uniform(0.985, 1.015)),
        scapula=float(rng.uniform(0.0, 0.6) if is_ap else rng.uniform(0.4, 1.1)),
        arm=float(rng.uniform(0.3, 1.0) if is_supine else rng.uniform(0.0, 0.7)),
    )
