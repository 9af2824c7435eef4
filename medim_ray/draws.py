"""Counter-based random numbers: every value is a pure function of (seed, epoch, image id, purpose, position).

Nothing here has a state, so a draw does not depend on batch neighbours, worker count, order or retries. The mixing
function is the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), applied to a whole granule at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64 finaliser, elementwise; uint64 in, uint64 out, same shape."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def name_key(name: str) -> int:
    """64-bit key of a name (an image id, a purpose): the first eight bytes of its BLAKE2b digest."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class Draws:
    """The random numbers of B samples.

    `keys_B` (uint64) already holds seed, epoch and image id; a purpose such as "crop" or "mask/uniform" selects an
    independent stream of each sample.
    """

    keys_B: NDArray[np.uint64]

    @classmethod
    def of(cls, seed: int, epochs_B: NDArray[np.int64], image_ids: Sequence[str]) -> Draws:
        """Draws of samples `image_ids`, sample i in its epoch `epochs_B[i]`, of the run with this seed."""
        ids_B = np.fromiter((name_key(i) for i in image_ids), dtype=np.uint64, count=len(image_ids))
        with np.errstate(over="ignore"):
            run_B = _mix(np.full(len(image_ids), seed, dtype=np.int64).view(np.uint64) + _GAMMA)
            epoch_B = _mix(run_B ^ epochs_B.astype(np.uint64) * _GAMMA + _GAMMA)
            return cls(_mix(epoch_B ^ ids_B))

    def uniform(self, purpose: str, num: int) -> NDArray[np.float64]:
        """[B, num] values in [0, 1), 53 random bits each."""
        with np.errstate(over="ignore"):
            stream_B = _mix(self.keys_B ^ np.uint64(name_key(purpose)))
            counter_K = np.arange(1, num + 1, dtype=np.uint64) * _GAMMA
            bits_BK = _mix(stream_B[:, None] + counter_K[None, :])
        return (bits_BK >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def integers(self, purpose: str, num: int, high: NDArray[np.int64] | int) -> NDArray[np.int64]:
        """[B, num] integers in [0, high); `high` is one number or one a sample, [B]."""
        high_B1 = np.broadcast_to(np.asarray(high, dtype=np.int64), self.keys_B.shape)[:, None]
        return np.minimum((self.uniform(purpose, num) * high_B1).astype(np.int64), high_B1 - 1)


def step_draws(seed: int, step: int, count: int = 1) -> Draws:
    """Draws that belong to a GLOBAL step rather than to a sample (DINOv2's stratified mask ratios): `count` streams."""
    return Draws.of(seed, np.full(count, step, dtype=np.int64), [f"step/{i}" for i in range(count)])
