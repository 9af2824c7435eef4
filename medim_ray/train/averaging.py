"""Stage 0: gradients averaged over the ranks while the backward pass still runs, as DistributedDataParallel does.

DeepSpeed copies all gradients into one buffer after the backward pass, sums it, and copies it back. Here each large
gradient is summed in place as soon as it is there, and the small ones travel together. Gradients only: partitions
(ZeRO 1 to 3) are DeepSpeed's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_LARGE = 1 << 18  # elements of a gradient that travels alone: 1 MiB in float32


class GradientAverage:
    """Takes the place of the engine's own all-reduce; afterwards each `grad` is the mean over the ranks.

    Every rank sums in the same order, or the wrong tensors would meet: the order in which rank 0 had them in the first
    step, which therefore overlaps nothing. A gradient waits for those before it. The sums do not depend on the order.
    A parameter that had no part in a rank's loss counts as zero there.
    """

    def __init__(self, engine: Any) -> None:
        parameters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
        self._engine = engine
        self._world_size = dist.get_world_size()
        self._large = [parameter for parameter in parameters if parameter.numel() >= _LARGE]
        self._small = [parameter for parameter in parameters if parameter.numel() < _LARGE]
        self._order: list[int] = []  # indices into _large, once rank 0 has told them
        self._arrived: dict[int, None] = {}  # those whose gradient is there, as they came
        self._sums: list[dist.Work] = []  # under way, for the first gradients of _order
        for index, parameter in enumerate(self._large):
            parameter.register_post_accumulate_grad_hook(lambda _, index=index: self._arrive(index))
        engine.buffered_allreduce_fallback = self._finish

    def _arrive(self, index: int) -> None:
        """Autograd's call: a gradient is complete, of the last micro-batch or of an earlier one."""
        if not self._engine.is_gradient_accumulation_boundary():
            return
        self._arrived[index] = None
        while len(self._sums) < len(self._order) and self._order[len(self._sums)] in self._arrived:
            self._sums.append(self._sum(_grad(self._large[self._order[len(self._sums)]])))

    def _finish(self, **_: Any) -> None:
        """The engine's call after the backward pass of the last micro-batch."""
        if not self._order:
            self._order = self._agree()
        for index in self._order[len(self._sums) :]:
            self._sums.append(self._sum(_grad(self._large[index])))
        small = [_grad(parameter) for parameter in self._small]
        if small:
            together = torch.cat([grad.flatten() for grad in small])
            self._sum(together).wait()
            parts = together.split([grad.numel() for grad in small])
            torch._foreach_copy_(small, [part.view_as(grad) for part, grad in zip(parts, small, strict=True)])
        for work in self._sums:
            work.wait()
        self._sums, self._arrived = [], {}

    def _agree(self) -> list[int]:
        """What came first on rank 0 goes first everywhere; what had no part there goes last."""
        missing = (index for index in range(len(self._large)) if index not in self._arrived)
        told: list[Any] = [[*self._arrived, *missing]]
        dist.broadcast_object_list(told, src=0, device=self._engine.device)
        order: list[int] = told[0]
        return order

    def _sum(self, grad: Tensor) -> dist.Work:
        """Divided first, while it is in the cache."""
        work = dist.all_reduce(grad.mul_(1.0 / self._world_size), async_op=True)
        assert work is not None
        return work


def _grad(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
