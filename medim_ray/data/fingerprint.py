"""Two hashes of stored pixels: one that tells exact copies, one that near copies nearly share. And pairs of the latter.

The perceptual hash is pHash (Zauner, 2010): signs of the 63 lowest frequencies of a 32 x 32 image about their median.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise

import cv2
import numpy as np
import xxhash
from numpy.typing import NDArray

from medim_ray.data.images import Gray

MAX_DISTANCE = 4
"""Bits of 64 in which near duplicates may differ. Of 180 radiographs no two patients' are nearer than 8; JPEG at
quality 50, 60 % of the size or 15 % more contrast change at most 4 in 99 of 100 (6 in one)."""

_NUM_BANDS = MAX_DISTANCE + 2  # two of them are then equal in every near pair
_NEIGHBOURS = 1000  # rows of one key that a row is compared with, at most


def pixel_hash(image_HW: Gray) -> str:
    """32 hexadecimal digits over size, depth and every pixel (XXH3, 128 bits: fast, and chance finds no collision)."""
    digest = xxhash.xxh3_128(f"{image_HW.shape} {image_HW.dtype}".encode())
    digest.update(np.ascontiguousarray(image_HW).data)
    return digest.hexdigest()


def perceptual_hash(image_HW: Gray) -> str:
    """16 hexadecimal digits; brightness, contrast, size and compression change few of their bits."""
    while min(image_HW.shape) >= 256:  # means of 2 x 2 pixels are ten times as fast as one step to 32 x 32
        height, width = (side // 2 for side in image_HW.shape)
        even_HW = image_HW[: 2 * height, : 2 * width]
        image_HW = cv2.resize(even_HW, (width, height), interpolation=cv2.INTER_AREA)
    small_HW = cv2.resize(image_HW.astype(np.float32), (32, 32), interpolation=cv2.INTER_AREA)
    low_F = cv2.dct(small_HW)[:8, :8].ravel()
    bits_F = low_F > np.median(low_F[1:])
    bits_F[0] = False  # the mean
    return np.packbits(bits_F).tobytes().hex()


def near_pairs(hashes_N: NDArray[np.uint64], max_pairs: int) -> tuple[NDArray[np.int64], int]:
    """[P, 2] places of pairs whose hashes differ in at most MAX_DISTANCE bits, the nearest first, and their number.

    At most max_pairs of them are returned. hashes_N: different from each other. A pair is found by the two (at least)
    of its bands that are equal, so that no all-pairs comparison is needed; where more than 1,000 hashes share such a
    key, not every pair of them is compared.
    """
    edges = np.linspace(0, 64, _NUM_BANDS + 1).astype(int)
    masks = [((1 << int(b - a)) - 1) << int(a) for a, b in pairwise(edges)]
    found = [np.empty((0, 2), dtype=np.int64)]
    for one, two in combinations(masks, 2):
        found += _close(hashes_N, hashes_N & np.uint64(one | two))
    pairs_P2 = np.unique(np.concatenate(found), axis=0)
    distance_P = distances(hashes_N, pairs_P2)
    return pairs_P2[np.argsort(distance_P, kind="stable")[:max_pairs]], len(pairs_P2)


def _close(hashes_N: NDArray[np.uint64], keys_N: NDArray[np.uint64]) -> Iterator[NDArray[np.int64]]:
    """[P, 2] near pairs among rows of the same key, the smaller place first."""
    order_N = np.argsort(keys_N, kind="stable")
    sorted_N = keys_N[order_N]
    here = np.arange(len(sorted_N))
    for step in range(1, _NEIGHBOURS):  # rows of one key lie side by side: the next one, the one after that, ...
        here = here[: np.searchsorted(here, len(sorted_N) - step)]
        here = here[sorted_N[here] == sorted_N[here + step]]
        if not len(here):
            return
        pairs_P2 = np.stack([order_N[here], order_N[here + step]], axis=1)
        yield pairs_P2[distances(hashes_N, pairs_P2) <= MAX_DISTANCE]


def distances(hashes_N: NDArray[np.uint64], pairs_P2: NDArray[np.int64]) -> NDArray[np.int64]:
    """[P] bits in which the hashes of each pair differ."""
    return np.bitwise_count(hashes_N[pairs_P2[:, 0]] ^ hashes_N[pairs_P2[:, 1]]).astype(np.int64)
