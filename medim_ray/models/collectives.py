"""Two collectives that gradients pass through, on any backend. Not for metrics: those need no gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone()
        dist.all_reduce(total)
        return total


def num_ranks() -> int:
    """Ranks of the default process group; 1 where there is none."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum of `x` over ranks; the gradient is the sum over ranks of the gradients."""
    return _AllReduceSum.apply(x) if num_ranks() > 1 else x


def all_gather_rows(x_BD: Tensor) -> Tensor:
    """[B, D] of each rank -> [ranks * B, D] in rank order, on every rank; equal B on all ranks.

    A sum of zero-padded blocks: its gradient reaches the rows' own rank from every rank's loss.
    """
    ranks = num_ranks()
    if ranks == 1:
        return x_BD
    padded_RBD = x_BD.new_zeros((ranks, *x_BD.shape))
    padded_RBD = padded_RBD.index_copy(0, torch.tensor([dist.get_rank()], device=x_BD.device), x_BD[None])
    return all_reduce_sum(padded_RBD).flatten(0, 1)
