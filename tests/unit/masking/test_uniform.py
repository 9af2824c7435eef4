"""Uniform masks: exact counts, a function of the sample alone, every patch equally often."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medim_ray.draws import Draws
from medim_ray.masking import MASKINGS
from medim_ray.masking.base import Samples
from medim_ray.masking.uniform import UniformMasking
from medim_ray.types import Grid


def plan(ids: list[str], ratio: float, grid: Grid, epoch: int = 0) -> np.ndarray[Any, Any]:
    num = len(ids)
    samples = Samples(
        image_ids=ids,
        boxes_B4=np.tile(np.array([0, 0, 1, 1], np.float32), (num, 1)),
        text={},
        mentions=[()] * num,
        steps_B=np.zeros(num, np.int64),
        positions_B=np.arange(num),
        global_batch=num,
        seed=0,
    )
    masking = UniformMasking(UniformMasking.Config(ratio=ratio))
    columns = masking.plan(samples, grid, Draws.of(0, np.full(num, epoch, np.int64), ids))
    masks = masking.resolve({key: torch.from_numpy(value) for key, value in columns.items()}, None)
    assert masks.hidden_SBN.shape == (1, num, grid.num_patches) and not masks.fallback_SB.any()
    return masks.hidden_SBN[0].numpy()


@settings(max_examples=30, deadline=None)
@given(st.floats(0.05, 0.95), st.integers(2, 20), st.integers(2, 20))
def test_every_row_hides_exactly_the_rounded_share(ratio: float, height: int, width: int) -> None:
    hidden_BN = plan([f"i{k}" for k in range(5)], ratio, Grid(height, width))
    assert (hidden_BN.sum(axis=1) == round(ratio * (height * width))).all()


def test_a_mask_depends_on_its_sample_and_epoch_only() -> None:
    ids, grid = [f"i{k}" for k in range(8)], Grid(7, 7)
    together = plan(ids, 0.75, grid)
    alone = plan(ids[5:6], 0.75, grid)
    assert (together[5] == alone[0]).all()
    assert (plan(ids, 0.75, grid, epoch=1) != together).any(axis=1).all()


def test_every_patch_is_hidden_equally_often() -> None:
    share_N = plan([f"i{k}" for k in range(4000)], 0.75, Grid(7, 7)).mean(axis=0)
    assert np.abs(share_N - 37 / 49).max() < 5 * (0.25 * 0.75 / 4000) ** 0.5


@pytest.mark.parametrize("options", [{"ratio": 0.0}, {"ratio": 1.0}, {"on": "output"}])
def test_bad_options(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="masking"):
        MASKINGS["uniform"].Config(**options)
