"""Pixel truth of lesions: masks cut like the image, shares of patches, maps enlarged again, Dice.

NumPy and OpenCV only: decoding tasks use it, which load neither torch nor a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from medim_ray.data.images import decode_mask
from medim_ray.data.transforms import cut
from medim_ray.probes.bootstrap import Floats

ANY = "any lesion"
PARTS = ("lung", "heart", "rib", "clavicle")  # of the body: no lesions


def is_of(target: str, entry: Mapping[str, Any]) -> bool:
    """Whether an entry of the column `truth` belongs to a target: ANY, or its finding, with side and zone if named.

    `lung` takes every lung; `left lung` and `left upper lung` those entries with this side and zone.
    """
    finding = str(entry["finding"])
    if target == ANY:
        return finding not in PARTS
    words = target.split()
    place, name = words[: len(words) - len(finding.split())], words[len(words) - len(finding.split()) :]
    return name == finding.split() and set(place) <= {entry["side"], entry["zone"]}


def crop_mask(encoded: bytes, box_4: NDArray[np.float32], size: int) -> NDArray[np.bool_]:
    """[size, size] of a mask of the stored image, cut like the image."""
    return cut(decode_mask(encoded).astype(np.uint8) * np.uint8(255), box_4, size) >= 128


def target_masks(
    rows: Sequence[Mapping[str, Any]], boxes_B4: NDArray[np.float32], size: int, targets: Sequence[str]
) -> NDArray[np.bool_]:
    """[B, targets, size, size] union of the lesions of each target in each row's `truth`, cut like the image.

    A mask may have another size than the image: both are cut by the same fractions of their sides. Masks without a
    pixel are no lesion. ValueError names the image whose mask is no image.
    """
    masks = np.zeros((len(rows), len(targets), size, size), dtype=np.bool_)
    for own, row, box_4 in zip(masks, rows, boxes_B4, strict=True):
        for lesion in row["truth"]:
            of = [t for t, target in enumerate(targets) if is_of(target, lesion)]
            if not of:
                continue
            try:
                cut_HW = crop_mask(lesion["mask"], box_4, size)
            except ValueError as error:
                what = f"the mask of {lesion['finding']!r} can't be decoded"
                raise ValueError(f"image {row['image_id']!r}: {what}: {error}") from None
            for t in of:
                own[t] |= cut_HW
    return masks


def patch_shares(mask_HW: NDArray[np.bool_], num_patches: int) -> Floats:
    """[N] share of each patch of a square grid that the mask covers."""
    side = round(num_patches**0.5)
    small = cv2.resize(mask_HW.astype(np.float32), (side, side), interpolation=cv2.INTER_AREA)
    return small.astype(np.float64).ravel()


def enlarged(map_N: Floats, size: int) -> NDArray[np.float32]:
    """[size, size] of a map of a square grid, bilinear."""
    side = round(len(map_N) ** 0.5)
    grid = map_N.reshape(side, side).astype(np.float32)
    return np.asarray(cv2.resize(grid, (size, size), interpolation=cv2.INTER_LINEAR))


def dice(found_HW: NDArray[np.bool_], mask_HW: NDArray[np.bool_]) -> float:
    """2 |A and B| / (|A| + |B|); 1 where both are empty."""
    total = int(found_HW.sum()) + int(mask_HW.sum())
    return 2.0 * int((found_HW & mask_HW).sum()) / total if total else 1.0
