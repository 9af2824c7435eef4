"""Does a run fit, and at which ZeRO stage: the planner's memory model on the devices that there are, before the start.

The model and its check against measured peaks are in medim_ray/plan; here are only the devices and the words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import psutil
import torch

from medim_ray.config.schema import RunConfig
from medim_ray.plan.constants import assumption, code
from medim_ray.plan.memory import STAGES, Memory, memory
from medim_ray.plan.workload import workload


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Peak bytes of one worker by ZeRO stage; device_bytes: what one may use, None where that is not known here;
    flops_per_image: operations of the model, forward and backward."""

    by_stage: dict[int, Memory]
    device_bytes: float | None
    flops_per_image: float

    def lowest_stage(self, stages: Sequence[int]) -> int:
        """The lowest of these stages that fits. ValueError: none does, or the devices can't be seen from here."""
        if self.device_bytes is None:
            raise ValueError(
                "train.zero=auto: the memory of the cluster's GPUs can't be seen from this machine; give "
                "train.device_memory_gb, or a stage from 0 to 3 (`medim-ray plan` compares them)"
            )
        for stage in stages:
            if self.by_stage[stage].total <= self.device_bytes:
                return stage
        least = min(self.by_stage[stage].total for stage in stages)
        raise ValueError(
            f"train.zero=auto: a worker needs {_gb(least)} GB at the least and has {_gb(self.device_bytes)}: use a "
            "smaller train.micro_batch (the global batch stays), train.activation_checkpointing=true, more "
            "train.num_workers or a smaller encoder"
        )

    def line(self, stage: int) -> str:
        """What a user reads before the start."""
        need = self.by_stage[stage]
        told = ", ".join(f"{name} {_gb(size)}" for name, size in asdict(need).items() if size >= 5e6)
        others = ", ".join(f"{s}: {_gb(m.total)}" for s, m in self.by_stage.items())
        room = "" if self.device_bytes is None else f" of {_gb(self.device_bytes)}"
        return f"memory a worker at ZeRO {stage}: {_gb(need.total)}{room} GB ({told}); by stage {others}"


def estimate(config: RunConfig) -> Estimate:
    """For the smallest group of workers that the run may have. ValueError where the planner can't model the run."""
    train = config.train
    work = workload(config, code("medim_ray"))
    by_stage = {
        stage: memory(
            work,
            stage=stage,
            num_gpus=train.min_workers,
            micro_batch=train.local_micro_batch,
            checkpointed=train.activation_checkpointing,
            on_cpu=not train.use_gpu,
        )
        for stage in STAGES
    }
    return Estimate(
        by_stage=by_stage, device_bytes=_device_bytes(config), flops_per_image=work.flops(checkpointed=False)
    )


def resolve_stage(config: RunConfig, plan: Estimate) -> RunConfig:
    """`train.zero: auto` as a number."""
    if config.train.zero != "auto":
        return config
    return replace(config, train=replace(config.train, zero=plan.lowest_stage(config.train.possible_stages)))


def _device_bytes(config: RunConfig) -> float | None:
    """What the allocator can fill of a GPU, or of this machine's memory shared by its workers."""
    train = config.train
    if train.device_memory_gb is not None:
        full = train.device_memory_gb * 1e9
    elif train.use_gpu:
        if not torch.cuda.is_available():
            return None
        full = float(torch.cuda.get_device_properties(0).total_memory)
    else:
        full = psutil.virtual_memory().total / train.max_workers
    return full * assumption("memory_fill_ratio")


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f}"
