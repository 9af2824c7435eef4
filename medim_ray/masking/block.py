"""Block masks: rectangles of random area and aspect until a count of patches is hidden (BEiT; DINOv2 for iBOT).

The law of a mask is the one of DINOv2's code; we leave it in two places only: random numbers are counter-based, drawn
for a whole granule at once, and a mask is the bits of an integer. Which crops are masked, and how much, is a law of the
batch (`step_counts`). Nothing here needs a model.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
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


def block_masks(num_hidden_BG: NDArray[np.int64], grid: Grid, draws: Draws, purpose: str) -> NDArray[np.bool_]:
    """Block masks of G crops of B samples: bool [B, G, N], True = hidden.

    A mask hides at most `num_hidden_BG` patches, and a few less where NUM_TRIES rectangles in a row did not fit: 0.1
    fewer in the mean, as in DINOv2. Each try draws an area uniform in [MIN_BLOCK, patches still to hide], an aspect and
    a place; it counts if the rectangle is smaller than the grid both ways and hides at least one new patch and at most
    as many as are still to hide.
    """
    num_samples, num_crops = num_hidden_BG.shape
    chunks: list[list[Any]] = []

    def tries(mask: int, chunk: int) -> Any:
        if chunk == len(chunks):
            flat = draws.uniform(f"{purpose}/{chunk}", num_crops * _CHUNK * 4)
            drawn_MC4 = flat.reshape(num_samples * num_crops, _CHUNK, 4)
            # The second number becomes the root of the aspect.
            drawn_MC4[:, :, 1] = np.exp((drawn_MC4[:, :, 1] - 0.5) * -math.log(ASPECT))
            chunks.append(drawn_MC4.tolist())
        return chunks[chunk][mask]

    num_bytes = -(-int(grid.num_patches) // 8)
    packed = b"".join(
        _block_mask(count, grid, partial(tries, mask)).to_bytes(num_bytes, "little")
        for mask, count in enumerate(num_hidden_BG.ravel().tolist())
    )
    bits_MN = np.unpackbits(np.frombuffer(packed, np.uint8).reshape(-1, num_bytes), axis=1, bitorder="little")
    return bits_MN[:, : grid.num_patches].astype(np.bool_).reshape(num_samples, num_crops, grid.num_patches)


def _block_mask(count: int, grid: Grid, tries: Callable[[int], Any]) -> int:
    """One mask as an integer, bit n = patch n; tries(k): numbers of the tries from k * _CHUNK on.

    An integer of as many bits as patches makes of a rectangle one shift and one product, and of a count one call: at
    these sizes faster than any array, and as fast for one mask as for hundreds.
    """
    height, width = int(grid.height), int(grid.width)  # NumPy's integers have 64 bits
    columns = _columns(height, width)
    hidden, missing, left_tries, step = 0, count, NUM_TRIES, 0
    while missing > 0 and left_tries > 0:
        if step % _CHUNK == 0:
            drawn = tries(step // _CHUNK)
        area, stretch, down, right = drawn[step % _CHUNK]
        step += 1
        side = math.sqrt(MIN_BLOCK + area * (missing - MIN_BLOCK))
        high, wide = round(side * stretch), round(side / stretch)
        if high < height and wide < width:
            place = int(down * (height - high + 1)) * width + int(right * (width - wide + 1))
            joined = hidden | (columns[high] * ((1 << wide) - 1)) << place
            new = joined.bit_count() - (count - missing)
            if 0 < new <= missing:
                hidden, missing, left_tries = joined, missing - new, NUM_TRIES
                continue
        left_tries -= 1
    return hidden


@functools.cache
def _columns(height: int, width: int) -> list[int]:
    """A column of h patches from the first corner down, for h = 0 to the grid's height, as bits."""
    return [sum(1 << (row * width) for row in range(high)) for high in range(height + 1)]


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
