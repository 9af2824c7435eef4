"""Block masks: counts, independence of neighbours, and DINOv2's law over a global step. Statistics: tests/golden."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from medim_ray.draws import Draws
from medim_ray.masking.base import MASKINGS, Samples
from medim_ray.masking.block import BlockMasking, StepBlockMasking, block_masks
from medim_ray.types import Grid


def draws_of(num: int, seed: int = 1, epoch: int = 0) -> Draws:
    return Draws.of(seed, np.full(num, epoch), [f"image{i}" for i in range(num)])


def samples_of(steps_B: NDArray[np.int64], positions_B: NDArray[np.int64], global_batch: int) -> Samples:
    num = len(steps_B)
    return Samples(
        image_ids=[f"image{i}" for i in range(num)],
        boxes_B4=np.tile(np.array([0, 0, 1, 1], dtype=np.float32), (num, 1)),
        text={},
        mentions=[()] * num,
        steps_B=steps_B,
        positions_B=positions_B,
        global_batch=global_batch,
        seed=7,
    )


@settings(max_examples=40, deadline=None)
@given(height=st.integers(3, 40), width=st.integers(3, 90), ratio=st.floats(0.02, 0.8), seed=st.integers(0, 2**31))
def test_a_mask_never_hides_more_than_asked_and_rarely_much_less(
    height: int, width: int, ratio: float, seed: int
) -> None:
    count = int(height * width * ratio)
    hidden = block_masks(np.full((5, 2), count), Grid(height, width), draws_of(5, seed), "t")
    assert hidden.shape == (5, 2, height * width)
    assert (hidden.sum(axis=2) <= count).all()
    if ratio < 0.5 and 0.5 <= height / width <= 2.0 and min(height, width) >= 7:
        assert hidden.sum() >= 10 * (0.8 * count - 1)


def patch_by_patch(count: int, grid: Grid, key: Draws) -> NDArray[np.bool_]:
    """The law for one mask, without bits and without neighbours, from the same random numbers."""
    mask = np.zeros((grid.height, grid.width), dtype=bool)
    numbers = np.concatenate([key.uniform(f"t/{i}", 128).reshape(32, 4) for i in range(40)])
    tries = 10
    for area, aspect, top, left in numbers:
        missing = count - int(mask.sum())
        if missing <= 0 or tries == 0:
            break
        side, stretch = np.sqrt(4 + area * (missing - 4)), np.exp((0.5 - aspect) * np.log(0.3))
        height, width = round(side * stretch), round(side / stretch)
        tries -= 1
        if height >= grid.height or width >= grid.width:
            continue
        rows = slice(int(top * (grid.height - height + 1)), None)
        columns = slice(int(left * (grid.width - width + 1)), None)
        block = mask[rows, columns][:height, :width]
        if 0 < (~block).sum() <= missing:
            block[:] = True
            tries = 10
    return mask.reshape(-1)


@pytest.mark.parametrize("grid", [Grid(14, 14), Grid(20, 100), Grid(7, 64), Grid(9, 65)])
def test_bit_rows_equal_a_patch_by_patch_replay(grid: Grid) -> None:
    draws, count = draws_of(30), int(grid.num_patches * 0.45)
    hidden = block_masks(np.full((30, 1), count), grid, draws, "t")[:, 0]
    for i in range(30):
        np.testing.assert_array_equal(hidden[i], patch_by_patch(count, grid, Draws(draws.keys_B[i : i + 1])))


def test_a_mask_depends_on_its_own_sample_only() -> None:
    draws = draws_of(12)
    counts = np.arange(24).reshape(12, 2) * 3
    whole = block_masks(counts, Grid(14, 14), draws, "t")
    some = np.array([7, 2, 9])
    np.testing.assert_array_equal(whole[some], block_masks(counts[some], Grid(14, 14), Draws(draws.keys_B[some]), "t"))
    assert not np.array_equal(whole, block_masks(counts, Grid(14, 14), draws, "other purpose"))


def test_hidden_patches_come_in_blocks() -> None:
    hidden = block_masks(np.full((200, 1), 76), Grid(16, 16), draws_of(200), "t").reshape(200, 16, 16)
    pairs = (hidden[:, 1:] & hidden[:, :-1]).sum(axis=(1, 2)).mean()
    chance = 15 * 16 * (76 / 256) ** 2
    assert pairs > 2.5 * chance


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75, 0.9])
def test_block_strategy_hides_the_same_count_in_every_sample(ratio: float) -> None:
    strategy = MASKINGS["block"](BlockMasking.Config(ratio=ratio))
    grid = Grid(14, 14)
    columns = strategy.plan(samples_of(np.zeros(64, np.int64), np.arange(64), 64), grid, draws_of(64))
    masks = strategy.resolve({k: torch.from_numpy(v) for k, v in columns.items()}, None)
    assert masks.hidden_SBN.shape == (1, 64, 196)
    assert set(masks.hidden_SBN.sum(dim=2).flatten().tolist()) == {int(196 * ratio)}
    assert not masks.fallback_SB.any()
    assert masks.hidden_SBN.float().mean(dim=1).std() > 0.01


def test_dinov2_law_over_a_global_step_is_exact_and_free_of_granules() -> None:
    strategy = StepBlockMasking(StepBlockMasking.Config())
    grid, batch = Grid(16, 16), 21
    steps = np.repeat([4, 5], batch)
    samples = samples_of(steps, np.tile(np.arange(batch), 2), batch)
    draws = draws_of(2 * batch)
    hidden_BSN = strategy.plan(samples, grid, draws)["mask/block_BSN"]
    for step in (4, 5):
        counts = hidden_BSN[steps == step].sum(axis=2).ravel()
        masked = np.sort(counts[counts > 0])
        assert len(masked) == int(2 * batch * 0.5)
        edges = np.linspace(0.1, 0.5, len(masked) + 1) * 256
        assert (masked <= np.ceil(edges[1:])).all()
        assert (masked >= np.floor(edges[:-1]) - 8).all()  # a mask may fall short, rarely by more than one or two
        assert np.mean(masked >= np.floor(edges[:-1]) - 1) > 0.9
    assert not np.array_equal(hidden_BSN[:batch].any(axis=2), hidden_BSN[batch:].any(axis=2))

    # The granule of samples 10 to 15 of step 5 alone gets the same masks.
    part = slice(batch + 10, batch + 16)
    alone = strategy.plan(
        Samples(
            image_ids=samples.image_ids[part],
            boxes_B4=samples.boxes_B4[part],
            text={},
            mentions=samples.mentions[part],
            steps_B=steps[part],
            positions_B=samples.positions_B[part],
            global_batch=batch,
            seed=7,
        ),
        grid,
        Draws(draws.keys_B[part]),
    )["mask/block_BSN"]
    np.testing.assert_array_equal(hidden_BSN[part], alone)


def test_wrong_ratios_say_option_value_and_rule() -> None:
    with pytest.raises(ValueError, match=r"masking\.ratio=1\.0: must lie between 0 and 1"):
        BlockMasking.Config(ratio=1.0)
    with pytest.raises(ValueError, match=r"masking\.min_ratio=0\.6, masking\.max_ratio=0\.5"):
        StepBlockMasking.Config(min_ratio=0.6)
