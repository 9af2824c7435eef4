"""Clipping of gradients by one norm, or by the norm of each part of the model, at every ZeRO stage.

DeepSpeed clips by the norm of all gradients. DINOv2 clips each submodel by its own norm (PAPERS.md, DINOv2: "clip 3.0
per submodel"). Norms of shards are summed over the ranks by DeepSpeed's own functions, a group of parameters at a time;
so a part is a set of whole groups, and here only the choice of the norm for each group is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Clipping:
    """Installs itself in an engine. Afterwards the engine tells the global norm before clipping, at stage 0 too, where
    DeepSpeed forgets it; `norms` holds the norm of each part, after each step.

    parts: the part of each of the optimizer's groups, by index; None: all are clipped by the global norm. clip_norm: 0
    clips nothing.
    """

    def __init__(self, engine: Any, clip_norm: float, parts: Sequence[str] | None) -> None:
        self._engine, self._clip_norm, self._parts = engine, clip_norm, parts
        self._by_group: list[Tensor] = []
        self.norms: dict[str, float] = {}
        optimizer = engine.optimizer
        stage = engine.zero_optimization_stage()
        if stage == 0:
            if clip_norm:
                engine.clip_fp32_gradients = self._clip_whole
            else:
                optimizer.register_step_pre_hook(self._clip_whole)
        elif parts is not None and stage == 3:
            self._group_norms, self._scale = optimizer._get_norm_groups, optimizer.unscale_and_clip_grads
            optimizer._get_norm_groups, optimizer.unscale_and_clip_grads = self._norms_of_shards, self._clip_shard
        elif parts is not None:
            self._scale = optimizer.unscale_and_clip_grads
            optimizer.scaled_global_norm, optimizer.unscale_and_clip_grads = self._norm_of_flat, self._clip_flat

    def _clip_whole(self, *_: Any) -> None:
        """Stage 0: every rank has all gradients, reduced."""
        optimizer = self._engine.optimizer
        groups = [[p for p in group["params"] if p.grad is not None] for group in optimizer.param_groups]
        norms = [torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]) for group in groups]
        self._by_group = [norm.to(self._engine.device) for norm in norms]
        total = _combined(self._by_group)
        self._tell(scale=1.0)
        for i, group in enumerate(groups):
            if self._clip_norm:
                norm = self._norm_for(i) if self._parts is not None else total
                torch.nn.utils.clip_grads_with_norm_(group, self._clip_norm, norm)
        optimizer._global_grad_norm = total  # where the engine looks for it

    def _norm_of_flat(self, norm_type: int = 2) -> Tensor:
        """Stages 1 and 2: the scaled norm of each group's partitions over all ranks, and of all together."""
        optimizer = self._engine.optimizer
        self._by_group = []
        for i, params in enumerate(optimizer.params_in_partition):
            if optimizer.cpu_offload:
                self._by_group.append(optimizer.complete_grad_norm_calculation_for_cpu_offload(params))
            else:
                self._by_group.append(optimizer.get_grad_norm_direct(optimizer.averaged_gradients[i], params))
        self._tell(scale=float(optimizer.loss_scale))
        return _combined(self._by_group)

    def _clip_flat(self, grads: list[Tensor], total_norm: Tensor) -> None:
        """Stages 1 and 2: DeepSpeed comes group by group with the flat gradient of the own partition."""
        flats = self._engine.optimizer.single_partition_of_fp32_groups
        (group,) = [i for i, flat in enumerate(flats) if flat.grad is grads[0]]
        self._scale(grads, self._norm_for(group))

    def _norms_of_shards(self) -> list[Tensor]:
        """Stage 3: the scaled norm of each sub-group over all ranks; a group has several where it is large."""
        groups = self._group_norms()
        owner = self._engine.optimizer.sub_group_to_group_id
        num_groups = len(self._parts or ())
        self._by_group = [
            _combined([norm for i, norm in enumerate(groups) if owner[i] == group]) for group in range(num_groups)
        ]
        self._tell(scale=float(self._engine.optimizer.loss_scale))
        return list(groups)

    def _clip_shard(self, sub_group: int, total_norm: Tensor) -> None:
        """Stage 3: DeepSpeed comes sub-group by sub-group."""
        self._scale(sub_group, self._norm_for(self._engine.optimizer.sub_group_to_group_id[sub_group]))

    def _norm_for(self, group: int) -> Tensor:
        """The norm that clips a group: that of its part."""
        assert self._parts is not None
        return _combined([norm for i, norm in enumerate(self._by_group) if self._parts[i] == self._parts[group]])

    def _tell(self, scale: float) -> None:
        if self._parts is not None:
            self.norms = {
                part: float(self._norm_for(self._parts.index(part))) / scale for part in dict.fromkeys(self._parts)
            }


def _combined(norms: Sequence[Tensor]) -> Tensor:
    """The norm of vectors from their norms; infinite where one is not finite (DeepSpeed masks those as -1)."""
    from deepspeed.runtime.utils import combine_grad_norm_groups

    combined: Tensor = combine_grad_norm_groups(norms)
    return combined
