"""Stage 0: gradients averaged over the ranks while the backward pass still runs, as DistributedDataParallel does.

DeepSpeed copies all gradients into one buffer after the backward pass, sums it, and copies it back. Here a large
gradient is summed in place as soon as it is there, and small ones travel together. The partitions of ZeRO 1 to 3 are
DeepSpeed's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Elements that are worth a sum of their own: on a CPU a copy costs more than a call, on a GPU less.
CPU_BUCKET, GPU_BUCKET = 1 << 18, 25 << 18  # 1 and 25 MiB in float32


class GradientAverage:
    """Takes the place of the engine's own all-reduce; afterwards each `grad` is the mean over the ranks.

    Every rank sums its buckets in the same order, or the wrong ones would meet: the order in which rank 0 had them in
    the first step, which therefore overlaps nothing. A bucket waits for those before it; what is in which bucket never
    changes, so that a run that was resumed adds up as one that was not. A parameter that had no part in a rank's loss
    counts as zero there.
    """

    def __init__(self, engine: Any) -> None:
        trained = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
        self._engine = engine
        self._world_size = dist.get_world_size()
        self._buckets = _buckets(reversed(trained), CPU_BUCKET if engine.device.type == "cpu" else GPU_BUCKET)
        self._order: list[int] = []  # of the buckets, once rank 0 has told it
        self._reset()
        for index, bucket in enumerate(self._buckets):
            for parameter in bucket:
                parameter.register_post_accumulate_grad_hook(lambda _, index=index: self._arrive(index))
        engine.buffered_allreduce_fallback = self._finish

    def _reset(self) -> None:
        self._num_missing = [len(bucket) for bucket in self._buckets]
        self._complete: list[int] = []  # buckets, as they came
        self._under_way: list[tuple[dist.Work, Tensor]] = []  # the first ones of _order, and what is summed

    def _arrive(self, index: int) -> None:
        """Autograd's call: a gradient of a bucket is there, of the last micro-batch or of an earlier one."""
        if not self._engine.is_gradient_accumulation_boundary():
            return
        self._num_missing[index] -= 1
        if self._num_missing[index] == 0:
            self._complete.append(index)
        while len(self._under_way) < len(self._order) and not self._num_missing[self._order[len(self._under_way)]]:
            self._send(self._order[len(self._under_way)])

    def _finish(self, **_: Any) -> None:
        """The engine's call after the backward pass of the last micro-batch."""
        if not self._order:
            self._order = self._agree()
        for index in self._order[len(self._under_way) :]:
            self._send(index)
        for index, (work, summed) in zip(self._order, self._under_way, strict=True):
            work.wait()
            if len(self._buckets[index]) > 1:
                grads = [_grad(parameter) for parameter in self._buckets[index]]
                parts = summed.split([grad.numel() for grad in grads])
                torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(parts, grads, strict=True)])
        self._reset()

    def _agree(self) -> list[int]:
        """What came first on rank 0 goes first everywhere; what had no part there goes last."""
        missing = set(range(len(self._buckets))).difference(self._complete)
        told: list[Any] = [[*self._complete, *sorted(missing)]]
        dist.broadcast_object_list(told, src=0, device=self._engine.device)
        order: list[int] = told[0]
        return order

    def _send(self, index: int) -> None:
        """Divided first, while it is in the cache."""
        grads = [_grad(parameter) for parameter in self._buckets[index]]
        summed = grads[0] if len(grads) == 1 else torch.cat([grad.flatten() for grad in grads])
        work = dist.all_reduce(summed.mul_(1.0 / self._world_size), async_op=True)
        assert work is not None
        self._under_way.append((work, summed))


def _buckets(parameters: Iterable[nn.Parameter], num_elements: int) -> list[list[nn.Parameter]]:
    """Parameters of `num_elements` and more are alone; the others, in their order, until they are as many together."""
    buckets, together = [], list[nn.Parameter]()
    for parameter in parameters:
        if parameter.numel() >= num_elements:
            buckets.append([parameter])
            continue
        together.append(parameter)
        if sum(p.numel() for p in together) >= num_elements:
            buckets.append(together)
            together = []
    return [*buckets, together] if together else buckets


def _grad(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
