"""How a stored radiograph becomes the views of a sample: boxes are drawn for a whole granule, pixels stay uint8 gray.

Geometry runs on the CPU in Ray Data; the photometric part (brightness, contrast, blur, solarising) travels as four
numbers a crop and is applied on the device (photometric.py). MedIM: longest side to 240, zero pad, random crop 224,
jitter and blur. DINOv2: 2 global and n local crops of random area and aspect.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from medim_ray.draws import Draws
from medim_ray.registry import Registry


@dataclass(frozen=True)
class View:
    """One crop family: `num_crops` square crops of `size` pixels a sample; `blur_radius` bounds their blur kernel."""

    name: str
    num_crops: int
    size: int
    blur_radius: int


@dataclass(frozen=True, kw_only=True)
class CropPlan:
    """Crops of one view for B samples.

    boxes_BK4: (top, left, bottom, right) in fractions of the stored image; may reach outside it (zero padding).
    flips_BK: mirrored left to right. jitter_BK4: brightness factor, contrast factor, blur sigma in pixels (0: none), 1
    where it is solarised.
    """

    boxes_BK4: NDArray[np.float32]
    flips_BK: NDArray[np.bool_]
    jitter_BK4: NDArray[np.float32]


class Crop(Protocol):
    """A recipe of views. Constructed as `cls(config, image_size)`, registered in CROPS."""

    views: tuple[View, ...]

    def plan(self, shapes_B2: NDArray[np.int64], draws: Draws | None) -> Mapping[str, CropPlan]:
        """Crops by view name for images of (height, width) `shapes_B2`; draws None: the centre, nothing random."""
        ...

    def shrink(self, height: int, width: int) -> float:
        """The least factor by which any crop of such an image is reduced; below 1 where one is enlarged."""
        ...


CROPS: Registry[Any] = Registry("crop")
_LEAST_BLUR = 0.1  # sigma in pixels (DINOv2)
_PLAIN = np.array([1.0, 1.0, 0.0, 0.0], dtype=np.float32)  # nothing is changed


def _check_shares(**shares: float) -> None:
    for key, value in shares.items():
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{key}={value}: must lie between 0 and 1")


def _check_blur(blur_max: float) -> None:
    if blur_max < _LEAST_BLUR:
        raise ValueError(f"crop.blur_max={blur_max}: must be at least {_LEAST_BLUR} pixels; for none use blur_prob=0")


def _jitter(
    draws: Draws,
    purpose: str,
    strength: float,
    blur_max: float,
    blur_probs: Sequence[float],
    jitter_prob: float = 1.0,
    solarise_probs: Sequence[float] | None = None,
) -> NDArray[np.float32]:
    """[B, K, 4] brightness and contrast factors in 1 +- strength, a blur sigma, 0 with 1 - its crop's share, and 1
    where the crop is solarised; one share for each of the K crops."""
    num = len(blur_probs)
    factors = 1.0 + strength * (2.0 * draws.uniform(f"{purpose}/jitter", 2 * num) - 1.0).reshape(-1, num, 2)
    if jitter_prob < 1.0:
        is_plain_BK = draws.uniform(f"{purpose}/is_jittered", num) >= jitter_prob
        factors = np.where(is_plain_BK[:, :, None], 1.0, factors)
    blur = draws.uniform(f"{purpose}/blur", 2 * num)
    sigma_BK = _LEAST_BLUR + (blur_max - _LEAST_BLUR) * blur[:, num:]
    sigma_BK = np.where(blur[:, :num] < np.asarray(blur_probs), sigma_BK, 0.0)
    solarised_BK = np.zeros_like(sigma_BK)
    if solarise_probs is not None and any(solarise_probs):
        solarised_BK += draws.uniform(f"{purpose}/solarise", num) < np.asarray(solarise_probs)
    return np.concatenate([factors, np.stack([sigma_BK, solarised_BK], axis=2)], axis=2).astype(np.float32)


@CROPS.register("pad_crop")
class PadCrop:
    """MedIM: the whole image, longest side a little larger than the crop, padded to a square, cropped at random."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        name: str = "pad_crop"
        resize_ratio: float = field(
            default=240 / 224, metadata={"help": "longest side after resizing over the crop's side (paper: 240/224)"}
        )
        jitter: float = field(default=0.2, metadata={"help": "brightness and contrast vary by up to this share"})
        blur_prob: float = field(default=0.5, metadata={"help": "share of crops that are blurred"})
        blur_max: float = field(default=1.0, metadata={"help": "largest sigma of the blur, in pixels of the crop"})

        def __post_init__(self) -> None:
            _check_shares(jitter=self.jitter, blur_prob=self.blur_prob)
            _check_blur(self.blur_max)
            if self.resize_ratio < 1.0:
                raise ValueError(f"resize_ratio={self.resize_ratio}: the crop must fit, use a ratio of at least 1")

    def __init__(self, config: Config, image_size: int) -> None:
        self.config = config
        self.views = (View("image", 1, image_size, math.ceil(3 * config.blur_max)),)

    def plan(self, shapes_B2: NDArray[np.int64], draws: Draws | None) -> Mapping[str, CropPlan]:
        num = len(shapes_B2)
        ratio = self.config.resize_ratio if draws is not None else 1.0
        # In units of the longest side the crop has side 1/ratio and moves over the padded unit square.
        extent_B2 = shapes_B2 / shapes_B2.max(axis=1, keepdims=True)
        place_B2 = draws.uniform("crop/place", 2) if draws is not None else np.full((num, 2), 0.5)
        start_B2 = place_B2 * (1.0 - 1.0 / ratio) - (1.0 - extent_B2) / 2.0
        boxes_B4 = np.concatenate([start_B2, start_B2 + 1.0 / ratio], axis=1) / np.tile(extent_B2, 2)
        if draws is None:
            jitter = np.tile(_PLAIN, (num, 1, 1))
        else:
            jitter = _jitter(draws, "crop", self.config.jitter, self.config.blur_max, [self.config.blur_prob])
        boxes = boxes_B4[:, None, :].astype(np.float32)
        return {"image": CropPlan(boxes_BK4=boxes, flips_BK=np.zeros((num, 1), bool), jitter_BK4=jitter)}

    def shrink(self, height: int, width: int) -> float:
        return max(height, width) / self.config.resize_ratio / self.views[0].size


@CROPS.register("multi_crop")
class MultiCrop:
    """DINOv2: 2 global and `num_local` local crops of random area and aspect; the defaults are for radiographs
    (larger areas, light blur, no flip, since side matters). A side longer than the image's is cut to it, where DINOv2
    draws again: crops of long narrow images are smaller and squarer than told."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        name: str = "multi_crop"
        num_local: int = field(default=8, metadata={"help": "local crops a sample"})
        local_size: int = field(default=98, metadata={"help": "side of a local crop in pixels"})
        global_area: tuple[float, float] = field(
            default=(0.5, 1.0), metadata={"help": "area of a global crop over the image's"}
        )
        local_area: tuple[float, float] = field(
            default=(0.05, 0.5), metadata={"help": "area of a local crop over the image's"}
        )
        flip_prob: float = field(default=0.0, metadata={"help": "share of crops mirrored left to right"})
        jitter: float = field(default=0.2, metadata={"help": "brightness and contrast vary by up to this share"})
        jitter_prob: float = field(default=1.0, metadata={"help": "share of crops that vary so"})
        blur_prob: tuple[float, float, float] = field(
            default=(0.3, 0.3, 0.3),
            metadata={"help": "share blurred of the first, of the second global, of local crops"},
        )
        solarise_prob: float = field(
            default=0.0, metadata={"help": "share of the second global crops whose upper half of grays is inverted"}
        )
        blur_max: float = field(default=1.0, metadata={"help": "largest sigma of the blur, in pixels of the crop"})

        def __post_init__(self) -> None:
            shares = {f"blur_prob[{i}]": share for i, share in enumerate(self.blur_prob)}
            _check_shares(flip_prob=self.flip_prob, jitter=self.jitter, jitter_prob=self.jitter_prob, **shares)
            _check_shares(solarise_prob=self.solarise_prob)
            _check_blur(self.blur_max)
            if self.num_local < 0 or self.local_size < 1:
                raise ValueError(f"num_local={self.num_local}, local_size={self.local_size}: at least 0 and 1")
            for key in ("global_area", "local_area"):
                low, high = getattr(self, key)
                if not 0.0 < low <= high <= 1.0:
                    raise ValueError(f"{key}=[{low}, {high}]: needs 0 < low <= high <= 1")

    def __init__(self, config: Config, image_size: int) -> None:
        self.config = config
        radius = math.ceil(3 * config.blur_max)
        views = (View("global", 2, image_size, radius), View("local", config.num_local, config.local_size, radius))
        self.views = tuple(view for view in views if view.num_crops)

    def plan(self, shapes_B2: NDArray[np.int64], draws: Draws | None) -> Mapping[str, CropPlan]:
        areas = {"global": self.config.global_area, "local": self.config.local_area}
        return {v.name: self._plan_view(v, areas[v.name], shapes_B2, draws) for v in self.views}

    def shrink(self, height: int, width: int) -> float:
        areas = {"global": self.config.global_area[0], "local": self.config.local_area[0]}
        # The side that the smallest area has at the aspect that shortens it most, or all of a narrow image.
        sides = {name: min(math.sqrt(0.75 * area * height * width), height, width) for name, area in areas.items()}
        return min(sides[view.name] / view.size for view in self.views)

    def _plan_view(
        self, view: View, area: tuple[float, float], shapes_B2: NDArray[np.int64], draws: Draws | None
    ) -> CropPlan:
        num, crops = len(shapes_B2), view.num_crops
        if draws is None:
            boxes = np.tile(np.array([0.0, 0.0, 1.0, 1.0], dtype=np.float32), (num, crops, 1))
            jitter = np.tile(_PLAIN, (num, crops, 1))
            return CropPlan(boxes_BK4=boxes, flips_BK=np.zeros((num, crops), bool), jitter_BK4=jitter)
        purpose = f"crop/{view.name}"
        area_BK = area[0] + (area[1] - area[0]) * draws.uniform(f"{purpose}/area", crops)
        aspect_BK = np.exp(
            math.log(4 / 3) * (2.0 * draws.uniform(f"{purpose}/aspect", crops) - 1.0)
        )  # height / width, pixels
        shape_ratio_B1 = (shapes_B2[:, 0] / shapes_B2[:, 1])[:, None]
        height_BK = np.minimum(np.sqrt(area_BK * aspect_BK / shape_ratio_B1), 1.0)
        width_BK = np.minimum(np.sqrt(area_BK / aspect_BK * shape_ratio_B1), 1.0)
        place = draws.uniform(f"{purpose}/place", 2 * crops)
        top_BK, left_BK = place[:, :crops] * (1.0 - height_BK), place[:, crops:] * (1.0 - width_BK)
        boxes = np.stack([top_BK, left_BK, top_BK + height_BK, left_BK + width_BK], axis=2).astype(np.float32)
        flips = draws.uniform(f"{purpose}/flip", crops) < self.config.flip_prob
        c, is_global = self.config, view.name == "global"
        blurred = c.blur_prob[:2] if is_global else c.blur_prob[2:] * crops
        solarised = (0.0, c.solarise_prob) if is_global else None
        jitter = _jitter(draws, purpose, c.jitter, c.blur_max, blurred, c.jitter_prob, solarised)
        return CropPlan(boxes_BK4=boxes, flips_BK=flips, jitter_BK4=jitter)


@CROPS.register("xray")
class XrayCrop(MultiCrop):
    """Radiographs at 518 pixels, after RAD-DINO's paper as far as it is known: local crops of 196, larger areas, light
    blur, no flip and no solarising."""

    @dataclass(frozen=True, kw_only=True)
    class Config(MultiCrop.Config):
        name: str = "xray"
        local_size: int = field(default=196, metadata={"help": "side of a local crop in pixels"})


@CROPS.register("natural")
class NaturalCrop(MultiCrop):
    """DINOv2's own augmentation; of its colour jitter what gray images can have (no saturation, hue or graying)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(MultiCrop.Config):
        name: str = "natural"
        global_area: tuple[float, float] = field(
            default=(0.32, 1.0), metadata={"help": "area of a global crop over the image's"}
        )
        local_area: tuple[float, float] = field(
            default=(0.05, 0.32), metadata={"help": "area of a local crop over the image's"}
        )
        flip_prob: float = field(default=0.5, metadata={"help": "share of crops mirrored left to right"})
        jitter: float = field(default=0.4, metadata={"help": "brightness and contrast vary by up to this share"})
        jitter_prob: float = field(default=0.8, metadata={"help": "share of crops that vary so"})
        blur_prob: tuple[float, float, float] = field(
            default=(1.0, 0.1, 0.5),
            metadata={"help": "share blurred of the first, of the second global, of local crops"},
        )
        blur_max: float = field(default=2.0, metadata={"help": "largest sigma of the blur, in pixels of the crop"})
        solarise_prob: float = field(
            default=0.2, metadata={"help": "share of the second global crops whose upper half of grays is inverted"}
        )


def cut(image_HW: NDArray[np.uint8], box_4: NDArray[np.float32], size: int, flip: bool = False) -> NDArray[np.uint8]:
    """The box of an image (fractions, may reach outside: zeros there), resized to [size, size] uint8.

    Area averaging where it shrinks, bicubic where it enlarges.
    """
    height, width = image_HW.shape
    top, bottom = float(box_4[0]) * height, float(box_4[2]) * height
    left, right = float(box_4[1]) * width, float(box_4[3]) * width
    inside_top, inside_bottom = max(round(top), 0), min(round(bottom), height)
    inside_left, inside_right = max(round(left), 0), min(round(right), width)
    scale_y, scale_x = size / (bottom - top), size / (right - left)
    y0, y1 = round((inside_top - top) * scale_y), round((inside_bottom - top) * scale_y)
    x0, x1 = round((inside_left - left) * scale_x), round((inside_right - left) * scale_x)
    y0, y1, x0, x1 = max(y0, 0), min(y1, size), max(x0, 0), min(x1, size)
    method = cv2.INTER_AREA if scale_y * scale_x < 1.0 else cv2.INTER_CUBIC
    piece = cv2.resize(
        image_HW[inside_top:inside_bottom, inside_left:inside_right], (x1 - x0, y1 - y0), interpolation=method
    )
    if (y1 - y0, x1 - x0) != (size, size):
        padded = np.zeros((size, size), dtype=np.uint8)
        padded[y0:y1, x0:x1] = piece
        piece = padded
    return np.ascontiguousarray(piece[:, ::-1]) if flip else piece
