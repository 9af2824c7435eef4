"""Gradients of stage 0 on two real ranks against plain torch on the whole batch, and that they travel early."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from medim_ray.config.schema import TrainConfig
from medim_ray.objectives.base import ParameterGroup, default_groups
from medim_ray.train import averaging, zero
from tests.unit.train.ranks import on_ranks

CONFIG = TrainConfig(steps=9, num_workers=2, global_batch=8, zero=0, clip_norm=0.0, weight_decay=0.0)
WIDTH, STEPS = 512, 3


class Uneven(nn.Module):
    """Two large matrices of which one has a part in the loss of some samples only, and vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.rare = nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH)
        assert self.last.weight.numel() >= averaging.CPU_BUCKET

    def forward(self, x_BD: Tensor) -> Tensor:
        """A batch of positive first elements goes through `rare`, another does not touch it."""
        features = self.first(x_BD).tanh()
        rare = self.rare(features).square().mean() if bool((x_BD[:, 0] > 0).all()) else 0.0
        loss: Tensor = rare + (self.last(features) - 1).square().mean()
        return loss

    def parameter_groups(self) -> list[ParameterGroup]:
        return default_groups(self)


def batch(step: int) -> Tensor:
    """The first half of the rows goes through `rare`: rank 0."""
    rows = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(step))
    rows[:, 0] = rows[:, 0].abs() * torch.tensor([1.0] * 4 + [-1.0] * 4)
    return rows


def reference(accumulation: int) -> dict[str, Tensor]:
    """AdamW's first moments after the steps: linear in the gradients."""
    torch.manual_seed(0)
    module = Uneven()
    optimizer = torch.optim.AdamW(module.parameters(), lr=CONFIG.lr, betas=CONFIG.betas, weight_decay=0.0)
    for step in range(STEPS):
        optimizer.zero_grad()
        parts = batch(step).chunk(2 * accumulation)
        torch.stack([module(part) for part in parts]).mean().backward()
        optimizer.step()
    return {name: optimizer.state[p]["exp_avg"].clone() for name, p in module.named_parameters()}


def compare() -> None:
    for accumulation in (1, 2):
        check(replace(CONFIG, micro_batch=4 // accumulation))


def check(config: TrainConfig) -> None:
    torch.manual_seed(0)
    module = Uneven()
    under_way: list[int] = []  # buckets, when the last gradient of a backward pass is there
    engine = zero.build_engine(module, config)
    average: Any = engine.buffered_allreduce_fallback.__self__
    module.first.weight.register_post_accumulate_grad_hook(lambda _: under_way.append(len(average._under_way)))
    rank = torch.distributed.get_rank()
    for step in range(STEPS):
        for micro in batch(step).chunk(2)[rank].chunk(config.accumulation):
            engine.backward(engine(micro))
            engine.step()
    moments = reference(config.accumulation)
    for fragment in zero.fragments(engine, own=False):
        expected = moments[fragment.name].flatten()
        torch.testing.assert_close(fragment.tensors["exp_avg"], expected, rtol=1e-4, atol=1e-7)
    last_micro = under_way[config.accumulation - 1 :: config.accumulation]
    # Rank 1 has no gradient for `rare`: only `last`, which is there before it on rank 0, can go ahead.
    assert last_micro[0] == 0, under_way
    assert min(last_micro[1:]) >= 3 if rank == 0 else set(last_micro[1:]) == {1}, under_way
    assert set(under_way) - set(last_micro) <= {0}, "a gradient travelled before its last micro-batch"


def test_gradients_are_means_over_the_ranks_and_travel_during_the_backward_pass() -> None:
    on_ranks(2, compare)
