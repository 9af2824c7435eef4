"""Small batches for objective tests: images with something to learn, reports that say what is in them, mask plans."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from medim_ray import types
from medim_ray.draws import Draws
from medim_ray.masking import MASKINGS
from medim_ray.masking.base import Masking, Samples
from medim_ray.models.text import TextEncoder
from medim_ray.models.vit import ImageEncoder
from medim_ray.objectives import OBJECTIVES
from medim_ray.objectives.base import Parts
from medim_ray.types import Batch, Grid

VOCABULARY = 40
TOKENS = 16


def images(num: int, size: int) -> torch.Tensor:
    """Smooth gray images with one bright blob each; float in [0, 1], [num, 1, size, size]."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:size, 0:size] / size
    out = np.zeros((num, 1, size, size), np.float32)
    for i in range(num):
        cy, cx = rng.uniform(0.2, 0.8, 2)
        out[i, 0] = 0.3 + 0.2 * np.sin(4 * x + i) + 0.5 * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / 0.01)
    return torch.from_numpy(out).clamp(0, 1)


def report_columns(num: int, empty_row: int | None = None) -> dict[str, np.ndarray[Any, Any]]:
    """Two sentences of five and six one-piece words, different for each sample; the first two words are flagged."""
    rng = np.random.default_rng(1)
    words = 11
    columns: dict[str, np.ndarray[Any, Any]] = {
        types.TOKEN_IDS: np.zeros((num, TOKENS), np.int64),
        types.TOKEN_IS_PAD: np.ones((num, TOKENS), bool),
        types.WORD_OF_TOKEN: np.full((num, TOKENS), -1, np.int16),
        types.WORD_IS_PAD: np.ones((num, TOKENS - 1), bool),
        types.MESH_FLAG: np.zeros((num, TOKENS - 1), bool),
        types.ASSERTION: np.zeros((num, TOKENS - 1), np.int8),
        types.SENTENCE_ID: np.full((num, TOKENS - 1), -1, np.int16),
    }
    for row in range(num):
        count = 0 if row == empty_row else words
        columns[types.TOKEN_IDS][row, : count + 2] = [2, *rng.integers(5, VOCABULARY, count), 3]
        columns[types.TOKEN_IS_PAD][row, : count + 2] = False
        columns[types.WORD_OF_TOKEN][row, 1 : count + 1] = np.arange(count)
        columns[types.WORD_IS_PAD][row, :count] = False
        columns[types.MESH_FLAG][row, : min(2, count)] = True
        columns[types.ASSERTION][row, : min(2, count)] = 1
        columns[types.SENTENCE_ID][row, :count] = np.repeat([0, 1], [5, 6])[:count]
    return columns


def batch_for(
    masking: Masking, grid: Grid, num: int, size: int, step: int = 0, empty_row: int | None = None, first: int = 0
) -> Batch:
    """`num` samples in epoch `step` with the columns of `masking`; from sample `first` on."""
    ids = [f"i{row}" for row in range(num)]
    text = report_columns(num, empty_row)
    samples = Samples(
        image_ids=ids,
        boxes_B4=np.tile(np.array([0, 0, 1, 1], np.float32), (num, 1)),
        text=text,
        mentions=[()] * num,
        steps_B=np.full(num, step, np.int64),
        positions_B=np.arange(num),
        global_batch=num,
        seed=0,
    )
    columns = text | masking.plan(samples, grid, Draws.of(0, np.full(num, step, np.int64), ids))
    return Batch(
        step=step,
        image_ids=tuple(ids[first:]),
        views={"image": images(num, size)[first:]},
        columns={key: torch.from_numpy(value)[first:] for key, value in columns.items()},
    )


def build(objective: str, masking: dict[str, Any], encoder: dict[str, Any] | None = None, **options: Any) -> Any:
    """An objective on a tiny encoder (64 px, 16 patches), from seed 0."""
    torch.manual_seed(0)
    cls = OBJECTIVES[objective]
    sizes = encoder or {"image_size": 64, "width": 48, "depth": 2, "num_heads": 3}
    strategy = MASKINGS[masking["name"]]
    parts = Parts(
        encoder=ImageEncoder(ImageEncoder.Config(**sizes)),
        text=TextEncoder(TextEncoder.Config(num_tokens=TOKENS, width=32), VOCABULARY) if cls.needs_text else None,
        masking=strategy(strategy.Config(**masking)),
        num_steps=100,
        global_batch=32,
    )
    return cls(cls.Config(name=objective, **options), parts)


def train(objective: Any, masking: Masking, steps: int, lr: float, num: int = 32, size: int = 64) -> list[float]:
    """Losses of `steps` AdamW steps on the same `num` samples with the same masks."""
    groups = [
        {"params": list(group.parameters), "frozen": group.frozen_steps} for group in objective.parameter_groups()
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    losses = []
    batch = batch_for(masking, objective.encoder.grid, num, size)
    for step in range(steps):
        output = objective(dataclasses.replace(batch, step=step))
        optimizer.zero_grad()
        output.loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.0 if step < group["frozen"] else lr
        optimizer.step()
        objective.after_step(step)
        losses.append(output.loss.item())
    return losses
