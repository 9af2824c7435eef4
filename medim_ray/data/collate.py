"""From the blocks of a rank to Batches: granules back into steps, pixels to float on the device. Draws nothing.

Every random number of a batch was drawn in Ray Data and arrives as a column.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medim_ray.data.photometric import photometric
from medim_ray.data.reader import BROKEN, EPOCH, IMAGE_ID, SECONDS, STEP, VIEW
from medim_ray.data.transforms import View
from medim_ray.types import Batch

Columns = Mapping[str, NDArray[Any]]


def steps_of_rank(blocks: Iterable[Columns], slots_per_rank: int) -> Iterator[Columns]:
    """Columns of one rank's share of each step, in the order of the steps.

    blocks: the rank's blocks in order; `slots_per_rank` consecutive ones form a window, and each holds one granule of
    every step of the window.
    """
    window: list[Columns] = []
    for block in blocks:
        window.append(block)
        if len(window) < slots_per_rank:
            continue
        starts = np.unique(window[0][STEP], return_index=True)[1]
        for columns in window:
            assert np.array_equal(columns[STEP], window[0][STEP]), "blocks of one window carry different steps"
        for start, end in zip(starts, [*starts[1:], len(window[0][STEP])], strict=True):
            yield {k: np.concatenate([columns[k][start:end] for columns in window]) for k in window[0]}
        window = []


def micro_batches(columns: Columns, micro_batch: int) -> Iterator[Columns]:
    """The rows of a rank's step in forwards of `micro_batch`."""
    num_rows = len(columns[STEP])
    assert num_rows % micro_batch == 0
    for start in range(0, num_rows, micro_batch):
        yield {k: v[start : start + micro_batch] for k, v in columns.items()}


def to_batch(columns: Columns, views: tuple[View, ...], device: torch.device) -> Batch:
    """Columns of B samples as a Batch on `device`: crop-major float views with the photometric part applied."""
    (step,) = np.unique(columns[STEP])
    images: dict[str, Tensor] = {}
    for view in views:
        pixels = _tensor(columns[f"{VIEW}{view.name}"], device).transpose(0, 1).flatten(0, 1)
        jitter = _tensor(columns[f"{VIEW}{view.name}/jitter_BK4"], device).transpose(0, 1).flatten(0, 1)
        images[view.name] = photometric(pixels[:, None].float() / 255.0, jitter, view.blur_radius)
    skip = {STEP, EPOCH, IMAGE_ID, BROKEN, SECONDS} | {f"{VIEW}{view.name}" for view in views}
    return Batch(
        step=int(step),
        image_ids=tuple(str(i) for i in columns[IMAGE_ID]),
        views=images,
        columns={k: _tensor(v, device) for k, v in columns.items() if k not in skip},
    )


def _tensor(array: NDArray[Any], device: torch.device) -> Tensor:
    """A copy on the device; Arrow's buffers are read-only."""
    return torch.from_numpy(np.array(array)).to(device, non_blocking=True)
