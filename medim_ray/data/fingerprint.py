"""Two hashes of stored pixels: one that tells exact copies, one that near copies nearly share. And pairs of the latter.

The perceptual hash is pHash (Zauner, 2010), twice: 64 bits to find pairs by, 256 to judge them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import combinations, pairwise
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import xxhash
from numpy.typing import NDArray

if TYPE_CHECKING:  # decoding actors load no Pillow
    from medim_ray.data.images import Gray

MAX_DISTANCE = 24
"""Bits of 256 in which near duplicates may differ. Of 180 radiographs no two are nearer than 56 (of two
patients: 60); JPEG at quality 50, 60 % of the size or 15 % more contrast change at most 14."""

_COARSE_DISTANCE = 4  # of 64 bits, by which pairs are looked for: the same changes stay below in 99 of 100
_NUM_BANDS = _COARSE_DISTANCE + 2  # two of them are then equal in every near pair
_NEIGHBOURS = 1000  # rows of one key that a row is compared with, at most


def pixel_hash(image_HW: Gray) -> str:
    """32 hexadecimal digits over size, depth and every pixel (XXH3, 128 bits: fast, and chance finds no collision)."""
    digest = xxhash.xxh3_128(f"{image_HW.shape} {image_HW.dtype}".encode())
    digest.update(np.ascontiguousarray(image_HW).data)
    return digest.hexdigest()


def row_checksum(image_id: Any, image: Any, report: Any) -> int:
    """XXH3 (64 bits, signed) of a row's encoded image and UTF-8 texts: the checksum column of shards."""
    digest = xxhash.xxh3_64()
    for part in (image_id, image, report):
        digest.update(len(memoryview(part)).to_bytes(8, "little"))
        digest.update(part)
    return int.from_bytes(digest.digest(), "big", signed=True)


def perceptual_hash(image_HW: Gray) -> str:
    """80 hexadecimal digits: signs of the 8 x 8 lowest frequencies, then of the 16 x 16 lowest, about their medians.

    Brightness, contrast, size and compression change few of these bits.
    """
    while min(image_HW.shape) >= 256:  # means of 2 x 2 pixels are ten times as fast as one step to 64 x 64
        height, width = (side // 2 for side in image_HW.shape)
        even_HW = image_HW[: 2 * height, : 2 * width]
        image_HW = cv2.resize(even_HW, (width, height), interpolation=cv2.INTER_AREA)
    small_HW = cv2.resize(image_HW, (64, 64), interpolation=cv2.INTER_AREA).astype(np.float32)
    frequencies_HW = cv2.dct(small_HW)
    digits = ""
    for side in (8, 16):
        low_F = frequencies_HW[:side, :side].ravel()
        bits_F = low_F > np.median(low_F[1:])
        bits_F[0] = False  # the mean
        digits += np.packbits(bits_F).tobytes().hex()
    return digits


def parse_hashes(texts: Iterable[str]) -> NDArray[np.uint64]:
    """[N, 5] the 64 and the 256 bits of N perceptual hashes."""
    return np.frombuffer(b"".join(map(bytes.fromhex, texts)), dtype=">u8").astype(np.uint64).reshape(-1, 5)


def near_pairs(hashes_N5: NDArray[np.uint64], max_pairs: int) -> tuple[NDArray[np.int64], int]:
    """[P, 2] places of pairs whose hashes differ in at most MAX_DISTANCE bits, the nearest first, and their number.

    At most max_pairs of them are returned. hashes_N5: different from each other. A pair is found by two of the bands of
    the first 64 bits that are equal, and judged by the other 256, so that no all-pairs comparison is needed; where more
    than 1,000 hashes share such a key, not every pair of them is compared.
    """
    edges = np.linspace(0, 64, _NUM_BANDS + 1).astype(int)
    masks = [((1 << int(b - a)) - 1) << int(a) for a, b in pairwise(edges)]
    found = [np.empty((0, 2), dtype=np.int64)]
    for one, two in combinations(masks, 2):
        found += _close(hashes_N5, hashes_N5[:, 0] & np.uint64(one | two))
    pairs_P2 = np.unique(np.concatenate(found), axis=0)
    distance_P = distances(hashes_N5, pairs_P2)
    return pairs_P2[np.argsort(distance_P, kind="stable")[:max_pairs]], len(pairs_P2)


def _close(hashes_N5: NDArray[np.uint64], keys_N: NDArray[np.uint64]) -> Iterator[NDArray[np.int64]]:
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
        coarse_N = hashes_N5[:, 0]
        pairs_P2 = pairs_P2[np.bitwise_count(coarse_N[pairs_P2[:, 0]] ^ coarse_N[pairs_P2[:, 1]]) <= _COARSE_DISTANCE]
        yield pairs_P2[distances(hashes_N5, pairs_P2) <= MAX_DISTANCE]


def distances(hashes_N5: NDArray[np.uint64], pairs_P2: NDArray[np.int64]) -> NDArray[np.int64]:
    """[P] bits of 256 in which the hashes of each pair differ."""
    differ_P4 = hashes_N5[pairs_P2[:, 0], 1:] ^ hashes_N5[pairs_P2[:, 1], 1:]
    return np.bitwise_count(differ_P4).sum(axis=1, dtype=np.int64)
