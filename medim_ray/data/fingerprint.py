"""Two hashes of stored pixels: one that tells exact copies, one that near copies nearly share. And pairs of the latter.

The perceptual hash is pHash (Zauner, 2010): signs of the 63 lowest frequencies of a 32 x 32 image about their median.
"""

from __future__ import annotations

import hashlib
from itertools import combinations, pairwise

import cv2
import numpy as np
from numpy.typing import NDArray

from medim_ray.data.images import Gray

MAX_DISTANCE = 4
"""Bits of 64 in which near duplicates may differ. Of 180 radiographs no two patients' are nearer than 8; JPEG at
quality 50, a smaller size or another contrast change 4 at most."""

_NUM_BANDS = MAX_DISTANCE + 2  # two of them are then equal in every near pair
_LARGE = 2000  # rows that share a key: more of them are compared with their first ones only


def pixel_hash(image_HW: Gray) -> str:
    """32 hexadecimal digits over size, depth and every pixel."""
    digest = hashlib.blake2b(f"{image_HW.shape} {image_HW.dtype}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(image_HW).data)
    return digest.hexdigest()


def perceptual_hash(image_HW: Gray) -> str:
    """16 hexadecimal digits; brightness, contrast, size and compression change few of their bits."""
    small_HW = cv2.resize(image_HW, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
    low_F = cv2.dct(small_HW)[:8, :8].ravel()
    bits_F = low_F > np.median(low_F[1:])
    bits_F[0] = False  # the mean
    return np.packbits(bits_F).tobytes().hex()


def near_pairs(hashes_N: NDArray[np.uint64], max_pairs: int) -> tuple[NDArray[np.int64], int]:
    """[P, 2] places of pairs whose hashes differ in at most MAX_DISTANCE bits, the nearest first, and their number.

    At most max_pairs of them are returned. hashes_N: different from each other. A pair is found by the two (at least)
    of its bands that are equal, so that no all-pairs comparison is needed; where more than 2,000 hashes share such a
    key, not every pair of them is compared.
    """
    edges = np.linspace(0, 64, _NUM_BANDS + 1).astype(int)
    masks = [((1 << int(b - a)) - 1) << int(a) for a, b in pairwise(edges)]
    found = [np.empty((0, 2), dtype=np.int64)]
    for one, two in combinations(masks, 2):
        keys_N = hashes_N & np.uint64(one | two)
        order_N = np.argsort(keys_N, kind="stable")
        sorted_N = keys_N[order_N]
        starts = np.flatnonzero(np.r_[True, sorted_N[1:] != sorted_N[:-1]])
        lengths = np.diff(np.r_[starts, len(sorted_N)])
        for start, length in zip(starts[lengths > 1], lengths[lengths > 1], strict=True):
            found.append(_close(hashes_N, order_N[start : start + length]))
    pairs_P2 = np.unique(np.concatenate(found), axis=0)
    distance_P = distances(hashes_N, pairs_P2)
    return pairs_P2[np.argsort(distance_P, kind="stable")[:max_pairs]], len(pairs_P2)


def _close(hashes_N: NDArray[np.uint64], rows_K: NDArray[np.int64]) -> NDArray[np.int64]:
    """[P, 2] near pairs among the given rows, the smaller place first."""
    first = rows_K if len(rows_K) <= _LARGE else rows_K[:8]
    distance_FK = np.bitwise_count(hashes_N[first][:, None] ^ hashes_N[rows_K][None, :])
    a, b = np.nonzero(distance_FK <= MAX_DISTANCE)
    pairs_P2 = np.stack([first[a], rows_K[b]], axis=1)
    return pairs_P2[pairs_P2[:, 0] < pairs_P2[:, 1]]


def distances(hashes_N: NDArray[np.uint64], pairs_P2: NDArray[np.int64]) -> NDArray[np.int64]:
    """[P] bits in which the hashes of each pair differ."""
    return np.bitwise_count(hashes_N[pairs_P2[:, 0]] ^ hashes_N[pairs_P2[:, 1]]).astype(np.int64)
