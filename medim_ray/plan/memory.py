"""Bytes per device of a run, for each ZeRO stage, with and without activation checkpointing.

The partitioning is that of the ZeRO paper (Rajbhandari et al. 2020, section 5); which copies exist besides is DeepSpeed
0.19.8 as train/zero.py configures it. `train.zero: auto` is `lowest_stage`.
"""

from __future__ import annotations

from dataclasses import dataclass

from medim_ray.plan.clusters import Cluster
from medim_ray.plan.constants import assumption
from medim_ray.plan.workload import Workload

STAGES = (0, 1, 2, 3)
# DeepSpeed's defaults, in elements: gradients are reduced in buckets, and stage 3 keeps what it gathered up to a limit.
REDUCE_BUCKET = 500_000_000
MAX_LIVE_PARAMETERS = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device. optimizer: AdamW's moments and the float32 master copy; teacher: frozen parameters;
    gathered: full parameters that stage 3 holds while it computes; buffers: gradient buckets; runtime: process."""

    parameters: float
    gradients: float
    optimizer: float
    teacher: float
    gathered: float
    buffers: float
    activations: float
    images: float
    runtime: float

    @property
    def total(self) -> float:
        return sum(getattr(self, name) for name in self.__dataclass_fields__)

    @property
    def states(self) -> float:
        """Parameters, gradients, optimizer and teacher: what does not depend on the batch."""
        return self.parameters + self.gradients + self.optimizer + self.teacher


def memory(
    work: Workload, *, stage: int, num_gpus: int, micro_batch: int, checkpointed: bool, on_cpu: bool = False
) -> Memory:
    """Memory of one of `num_gpus` devices at its peak in a step."""
    assert stage in STAGES
    trained, size, share = float(work.num_trained), float(work.element_bytes), 1.0 / num_gpus
    mixed = work.element_bytes == 2
    parameters = trained * size * (share if stage == 3 else 1.0)
    if stage == 0:
        # bf16 at stage 0 is DeepSpeed's BF16_Optimizer: float32 gradients beside, master and moments partitioned.
        gradients = trained * (size + 4.0) if mixed else 4.0 * trained
        optimizer = 12.0 * trained * share if mixed else 8.0 * trained
    else:
        gradients = trained * size * (1.0 if stage == 1 else share)
        optimizer = 12.0 * trained * share
    buckets = 0.0
    if stage == 0 and num_gpus > 1:
        buckets = size * min(trained, REDUCE_BUCKET)
    elif stage > 0:
        # The bucket, and the float32 gradients of the own share that the optimizer reads. A CPU backs only those pages
        # of the bucket that are written, but its allocator keeps what the copied gradients leave behind.
        used = size * min(trained, REDUCE_BUCKET)
        buckets = (used * (2.0 if stage > 1 else 1.0) if on_cpu else size * REDUCE_BUCKET) + 4.0 * trained * share
    gathered = 0.0
    if stage == 3:
        # Beside the own shard; measured on CPU, where a copy of that remains too.
        gathered = size * min(trained, MAX_LIVE_PARAMETERS) * (1.0 if on_cpu else 1.0 - share)
    return Memory(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        teacher=4.0 * work.num_frozen * (share if stage == 3 else 1.0),
        gathered=gathered,
        buffers=buckets,
        activations=micro_batch * work.kept_bytes(checkpointed),
        images=micro_batch * work.image_bytes,
        runtime=assumption("cpu_runtime_bytes" if on_cpu else "gpu_runtime_bytes"),
    )


def memory_on(
    cluster: Cluster, work: Workload, *, stage: int, num_gpus: int, micro_batch: int, checkpointed: bool
) -> Memory:
    """`memory` on a device of this cluster."""
    return memory(
        work,
        stage=stage,
        num_gpus=num_gpus,
        micro_batch=micro_batch,
        checkpointed=checkpointed,
        on_cpu=cluster.gpu.is_cpu,
    )


def fits(cluster: Cluster, work: Workload, *, stage: int, num_gpus: int, micro_batch: int, checkpointed: bool) -> bool:
    """Whether the peak stays below the device's memory."""
    need = memory_on(cluster, work, stage=stage, num_gpus=num_gpus, micro_batch=micro_batch, checkpointed=checkpointed)
    return need.total <= cluster.memory_bytes


def largest_micro_batch(cluster: Cluster, work: Workload, *, stage: int, num_gpus: int, checkpointed: bool) -> int:
    """Images per forward that a device can hold; 0 where not even one fits."""
    empty = memory_on(cluster, work, stage=stage, num_gpus=num_gpus, micro_batch=0, checkpointed=checkpointed).total
    per_image = work.kept_bytes(checkpointed) + work.image_bytes
    return max(0, int((cluster.memory_bytes - empty) / per_image))


def lowest_stage(cluster: Cluster, work: Workload, *, num_gpus: int, micro_batch: int) -> int | None:
    """The lowest ZeRO stage at which the micro-batch fits without checkpointing; None where none does."""
    for stage in STAGES:
        if fits(cluster, work, stage=stage, num_gpus=num_gpus, micro_batch=micro_batch, checkpointed=False):
            return stage
    return None
