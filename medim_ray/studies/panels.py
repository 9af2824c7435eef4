"""Pictures over an image of the mask gallery: heat maps, hidden patches, and the image itself as data URIs."""

from __future__ import annotations

import base64
from dataclasses import dataclass

import cv2
import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray

from medim_ray.studies.figures import squares


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One picture over the image: a map or what is hidden. heat: PNG of the map as a data URI, '' where there is none;
    hidden_HW: the hidden patches, None where the panel shows a map."""

    title: str
    caption: str
    heat: str = ""
    hidden_HW: NDArray[np.bool_] | None = None

    @property
    def hidden(self) -> str:
        """The hidden patches as an SVG path in patch units."""
        return "" if self.hidden_HW is None else squares(self.hidden_HW, self.hidden_HW.shape[1])

    @property
    def ratio(self) -> float:
        """Share of the patches that is hidden, NaN where the panel shows a map."""
        return float("nan") if self.hidden_HW is None else float(self.hidden_HW.mean())


def heat_uri(map_N: NDArray[np.float32], grid_width: int) -> str:
    """A map as a PNG of one pixel a patch, transparent where it is lowest."""
    low, high = float(map_N.min()), float(map_N.max())
    shares = (map_N - low) / (high - low) if high > low else np.zeros_like(map_N)
    rgba = colormaps["inferno"](0.25 + 0.7 * shares)
    rgba[:, 3] = 0.85 * shares
    pixels = np.round(255 * rgba.reshape(-1, grid_width, 4)).astype(np.uint8)
    return picture_uri(".png", pixels[:, :, [2, 1, 0, 3]])


def picture_uri(kind: str, pixels: NDArray[np.uint8]) -> str:
    """Gray, BGR or BGRA pixels as a data URI; kind: '.png' or '.jpg'."""
    done, encoded = cv2.imencode(kind, pixels)
    assert done, f"OpenCV can't write {kind}"
    mime = {".png": "image/png", ".jpg": "image/jpeg"}[kind]
    return f"data:{mime};base64,{base64.b64encode(encoded.tobytes()).decode()}"


def picture_pixels(uri: str) -> NDArray[np.uint8]:
    """The picture of a data URI of this module: gray or RGBA."""
    coded = np.frombuffer(base64.b64decode(uri.partition(",")[2]), dtype=np.uint8)
    decoded = cv2.imdecode(coded, cv2.IMREAD_UNCHANGED)
    assert decoded is not None, "a picture that this module has encoded"
    pixels: NDArray[np.uint8] = decoded.astype(np.uint8, copy=False)
    return pixels if pixels.ndim == 2 else pixels[:, :, [2, 1, 0, 3]]
