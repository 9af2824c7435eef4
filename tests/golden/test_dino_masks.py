"""Block masks against the statistics of 2,000 masks a row drawn by DINOv2's code (golden/dinov2_masks.npz).

Both sides are samples. Ours is 20 batches of 2,000, so that its own noise hardly counts; a mean may differ by three
standard errors of the difference between two samples of 2,000. The smallest count of 2,000 masks is itself random (one
mask in some thousand stops early), so the golden one must lie within 2 of the range over our 20 batches.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from medim_ray.draws import Draws
from medim_ray.masking.block import block_masks
from medim_ray.types import Grid

GOLDEN = (Path(__file__).parents[2] / "../shared/golden/dinov2_masks.npz").resolve()
BATCH, NUM_BATCHES = 2000, 20

pytestmark = pytest.mark.skipif(not GOLDEN.exists(), reason=f"golden numbers are not here: {GOLDEN}")
ROWS = range(6)


@lru_cache(maxsize=1)
def masks_of(row: int) -> NDArray[np.bool_]:
    """[batch, draw, row, column]"""
    side, _, requested = np.load(GOLDEN)["rows"][row][:3].astype(int)
    hidden = []
    for batch in range(NUM_BATCHES):
        draws = Draws.of(batch, np.zeros(BATCH, dtype=np.int64), [f"mask{i}" for i in range(BATCH)])
        counts = np.full((BATCH, 1), requested, dtype=np.int64)
        hidden.append(block_masks(counts, Grid(side, side), draws, "mask/block").reshape(BATCH, side, side))
    return np.stack(hidden)


@pytest.mark.parametrize("row", ROWS)
def test_means_are_within_three_standard_errors(row: int) -> None:
    data = np.load(GOLDEN)
    want = dict(zip(data["columns"].tolist(), data["rows"][row].tolist(), strict=True))
    hidden = masks_of(row).reshape(BATCH * NUM_BATCHES, *masks_of(row).shape[2:])
    middle = hidden.shape[1] // 2
    ours = {
        "mean_masked": hidden.sum(axis=(1, 2)),
        "p_centre": hidden[:, middle, middle],
        "p_corner": hidden[:, 0, 0],
        "mean_vertical_neighbour_pairs": (hidden[:, 1:] & hidden[:, :-1]).sum(axis=(1, 2)),
    }
    for name, values in ours.items():
        error = values.std() * np.sqrt(2 / BATCH)
        assert abs(values.mean() - want[name]) <= 3 * error, (name, values.mean(), want[name], error)


@pytest.mark.parametrize("row", ROWS)
def test_smallest_and_largest_counts_are_those_of_2000_masks(row: int) -> None:
    data = np.load(GOLDEN)
    want = dict(zip(data["columns"].tolist(), data["rows"][row].tolist(), strict=True))
    counts = masks_of(row).sum(axis=(2, 3))
    assert (abs(counts.max(axis=1) - want["max_masked"]) <= 2).all()
    smallest = counts.min(axis=1)
    assert smallest.min() - 2 <= want["min_masked"] <= smallest.max() + 2
    assert counts.max() <= want["requested"]
