"""Block masks: rectangles of random area and aspect until a count of patches is hidden (BEiT; DINOv2 for iBOT).

The law of a mask is the one of DINOv2's code; we leave it in two places only: random numbers are counter-based, and a
whole granule is drawn at once, a mask being rows of bits. Which crops are masked, and how much, is a law of the batch
(`step_counts`). Nothing here needs a model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from medim_ray.draws import Draws, step_draws
from medim_ray.masking.base import MASKINGS, Masks, Samples
from medim_ray.types import Grid

if TYPE_CHECKING:
    from torch import Tensor

MIN_BLOCK = 4  # patches: the smallest area that is drawn while as many are still to hide
ASPECT = 0.3  # height / width is log-uniform in [ASPECT, 1 / ASPECT]
NUM_TRIES = 10  # failures in a row after which a mask is left as it is
_CHUNK = 32  # tries whose random numbers are drawn together
_WORD = 64
_LOW_BITS = np.array([(1 << n) - 1 for n in range(_WORD + 1)], dtype=np.uint64)


def block_masks(num_hidden_BG: NDArray[np.int64], grid: Grid, draws: Draws, purpose: str) -> NDArray[np.bool_]:
    """Block masks of G crops of B samples: bool [B, G, N], True = hidden.

    A mask hides at most `num_hidden_BG` patches, and a few less where NUM_TRIES rectangles in a row did not fit: 0.1
    fewer in the mean, as in DINOv2. Each try draws an area uniform in [MIN_BLOCK, patches still to hide], an aspect and
    a place; it counts if the rectangle is smaller than the grid both ways and hides at least one new patch and at most
    as many as are still to hide.
    """
    num_samples, num_crops = num_hidden_BG.shape
    words_M = _BitMasks(num_samples * num_crops, grid)
    missing_M = num_hidden_BG.reshape(-1).astype(np.int64)
    tries_M = np.full(missing_M.shape, NUM_TRIES)
    active_A = np.flatnonzero(missing_M > 0)
    step = 0
    while active_A.size:
        if step % _CHUNK == 0:
            flat = draws.uniform(f"{purpose}/{step // _CHUNK}", num_crops * _CHUNK * 4)
            chunk_M = flat.reshape(num_samples * num_crops, _CHUNK, 4)
        missing_A = missing_M[active_A]
        new_A = words_M.try_blocks(active_A, missing_A, chunk_M[active_A, step % _CHUNK])
        missing_A = missing_A - new_A
        tries_A = np.where(new_A > 0, NUM_TRIES, tries_M[active_A] - 1)
        missing_M[active_A], tries_M[active_A] = missing_A, tries_A
        active_A = active_A[(missing_A > 0) & (tries_A > 0)]
        step += 1
    return words_M.unpacked().reshape(num_samples, num_crops, grid.num_patches)


class _BitMasks:
    """M masks as rows of 64-bit words, so that a rectangle is one bit pattern repeated over some rows."""

    def __init__(self, num: int, grid: Grid) -> None:
        self._grid = grid
        self._offsets_K = np.arange(0, grid.width, _WORD)
        self._rows_H = np.arange(grid.height)
        self._words_MHK = np.zeros((num, grid.height, len(self._offsets_K)), dtype="<u8")

    def try_blocks(
        self, active_A: NDArray[np.int64], limit_A: NDArray[np.int64], draws_A4: NDArray[np.float64]
    ) -> NDArray[np.int64]:
        """One rectangle for each mask in `active_A`; the number of patches newly hidden, 0 where it was refused."""
        height, width = self._grid.height, self._grid.width
        side_A = np.sqrt(MIN_BLOCK + draws_A4[:, 0] * (limit_A - MIN_BLOCK))
        stretch_A = np.exp((draws_A4[:, 1] - 0.5) * -math.log(ASPECT))  # the root of the aspect
        high_A = np.rint(side_A * stretch_A).astype(np.int64)
        wide_A = np.rint(side_A / stretch_A).astype(np.int64)
        top_A = (draws_A4[:, 2] * (height - high_A + 1)).astype(np.int64)
        left_A = (draws_A4[:, 3] * (width - wide_A + 1)).astype(np.int64)
        bits_AK = (
            _LOW_BITS[np.clip((left_A + wide_A)[:, None] - self._offsets_K, 0, _WORD)]
            & ~_LOW_BITS[np.clip(left_A[:, None] - self._offsets_K, 0, _WORD)]
        )
        inside_AH = (self._rows_H >= top_A[:, None]) & (self._rows_H < (top_A + high_A)[:, None])
        old_AHK = self._words_MHK[active_A]
        block_AHK = np.where(inside_AH[:, :, None], bits_AK[:, None, :], np.uint64(0))
        new_A = np.bitwise_count(block_AHK & ~old_AHK).sum(axis=(1, 2), dtype=np.int64)
        counts_A = (high_A < height) & (wide_A < width) & (new_A <= limit_A)
        self._words_MHK[active_A[counts_A]] = (old_AHK | block_AHK)[counts_A]
        return np.where(counts_A, new_A, 0)

    def unpacked(self) -> NDArray[np.bool_]:
        """bool [M, H, W]."""
        bits_MHW = np.unpackbits(self._words_MHK.view(np.uint8), axis=-1, bitorder="little")
        return bits_MHW[:, :, : self._grid.width].view(np.bool_)


def step_counts(
    seed: int, step: int, num_crops: int, num_patches: int, config: StepBlockMasking.Config
) -> NDArray[np.int64]:
    """Patches to hide in each global crop of global step `step`, [num_crops], crop-major; 0 for the crops left whole.

    DINOv2: exactly int(num_crops * crop_ratio) crops are masked; the range of ratios is cut into as many equal strata
    and each masked crop draws from one of them; then all crops are shuffled. DINOv2 does so for the batch of a rank; we
    do it for the global batch, so that the masks do not depend on the number of workers.
    """
    draws = step_draws(seed, step)
    num_masked = int(num_crops * config.crop_ratio)
    edges = np.linspace(config.min_ratio, config.max_ratio, num_masked + 1)
    ratios = edges[:-1] + draws.uniform("mask/block/ratio", num_masked)[0] * np.diff(edges)
    counts = np.zeros(num_crops, dtype=np.int64)
    counts[:num_masked] = (num_patches * ratios).astype(np.int64)
    return counts[np.argsort(draws.uniform("mask/block/shuffle", num_crops)[0], kind="stable")]


def step_counts_of(
    samples: Samples, num_crops: int, num_patches: int, config: StepBlockMasking.Config
) -> NDArray[np.int64]:
    """`step_counts` for `num_crops` crops of these samples, [B, num_crops]; they may be of several global steps."""
    counts_BS = np.zeros((len(samples), num_crops), dtype=np.int64)
    for step in np.unique(samples.steps_B):
        counts_SG = step_counts(samples.seed, int(step), num_crops * samples.global_batch, num_patches, config)
        here_B = samples.steps_B == step
        counts_BS[here_B] = counts_SG.reshape(num_crops, -1)[:, samples.positions_B[here_B]].T
    return counts_BS


@MASKINGS.register("block")
class BlockMasking:
    """One block mask a sample with the same count for all: int(N * ratio), short masks filled with random patches (so
    that an encoder can skip a fixed number)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        name: str = "block"
        ratio: float = field(default=0.5, metadata={"help": "share of the patches that is hidden"})
        on: Literal["input", "feature"] = field(
            default="input",
            metadata={"help": "input: hidden patches never reach the encoder; feature: its output is zeroed"},
        )

        def __post_init__(self) -> None:
            if not 0.0 < self.ratio < 1.0:
                raise ValueError(f"masking.ratio={self.ratio}: must lie between 0 and 1, e.g. 0.5")

    needs_text = False
    needs_attention = False
    names: tuple[str, ...] = ("block",)

    def __init__(self, config: Config) -> None:
        self.config = config
        self.on: str = config.on

    def plan(self, samples: Samples, grid: Grid, draws: Draws) -> dict[str, NDArray[Any]]:
        """{"mask/block_BSN": bool, S = 1}."""
        count = int(grid.num_patches * self.config.ratio)
        hidden_BSN = block_masks(np.full((len(samples), 1), count, dtype=np.int64), grid, draws, "mask/block")
        short_K = np.flatnonzero(hidden_BSN.sum(axis=(1, 2)) < count)
        noise_KN = Draws(draws.keys_B[short_K]).uniform("mask/block/fill", grid.num_patches)
        noise_KN[hidden_BSN[short_K, 0]] = -1.0  # what the blocks hide stays hidden
        hidden_KN = np.zeros(noise_KN.shape, dtype=np.bool_)
        np.put_along_axis(hidden_KN, np.argsort(noise_KN, axis=1)[:, :count], True, axis=1)
        hidden_BSN[short_K, 0] = hidden_KN
        return {"mask/block_BSN": hidden_BSN}

    def resolve(self, columns: Mapping[str, Tensor], attention_BWN: Tensor | None) -> Masks:
        return _whole(columns)


@MASKINGS.register("dinov2_block")
class StepBlockMasking:
    """DINOv2's masks of the two global crops (S = 2): half of the crops of a global step are masked, by stratified
    ratios. iBOT replaces hidden patches by its mask token; nothing is skipped, so counts may differ."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        name: str = "dinov2_block"
        crop_ratio: float = field(default=0.5, metadata={"help": "share of the global crops of a step that is masked"})
        min_ratio: float = field(default=0.1, metadata={"help": "smallest share of hidden patches in a masked crop"})
        max_ratio: float = field(default=0.5, metadata={"help": "largest share of hidden patches in a masked crop"})

        def __post_init__(self) -> None:
            if not 0.0 <= self.crop_ratio <= 1.0:
                raise ValueError(f"masking.crop_ratio={self.crop_ratio}: must lie in [0, 1], DINOv2 uses 0.5")
            if not 0.0 < self.min_ratio <= self.max_ratio < 1.0:
                raise ValueError(
                    f"masking.min_ratio={self.min_ratio}, masking.max_ratio={self.max_ratio}: "
                    "need 0 < min_ratio <= max_ratio < 1, DINOv2 uses 0.1 and 0.5"
                )

    on: str = "input"
    needs_text = False
    needs_attention = False
    names: tuple[str, ...] = ("global0", "global1")

    def __init__(self, config: Config) -> None:
        self.config = config

    def plan(self, samples: Samples, grid: Grid, draws: Draws) -> dict[str, NDArray[Any]]:
        """{"mask/block_BSN": bool, S = 2}; samples of several global steps may be planned together."""
        counts_BS = step_counts_of(samples, len(self.names), grid.num_patches, self.config)
        return {"mask/block_BSN": block_masks(counts_BS, grid, draws, "mask/block")}

    def resolve(self, columns: Mapping[str, Tensor], attention_BWN: Tensor | None) -> Masks:
        return _whole(columns)


def _whole(columns: Mapping[str, Tensor]) -> Masks:
    """Masks that the plan has finished."""
    hidden_SBN = columns["mask/block_BSN"].bool().transpose(0, 1)
    return Masks(hidden_SBN=hidden_SBN, fallback_SB=hidden_SBN.new_zeros(hidden_SBN.shape[:2]))
