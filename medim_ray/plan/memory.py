"""Bytes per device of a run, for each ZeRO stage, with and without activation checkpointing.

The partitioning is that of the ZeRO paper (Rajbhandari et al. 2020, section 5); which copies exist besides, and when,
is read from DeepSpeed 0.19.8, as train/zero.py configures it. `train.zero: auto` is `lowest_stage`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from medim_ray.plan.clusters import Cluster
from medim_ray.plan.constants import assumption
from medim_ray.plan.workload import Workload

STAGES = (0, 1, 2, 3)
# DeepSpeed's defaults, in elements: gradients are reduced in buckets; stage 3 gathers in buckets and keeps what it
# gathered up to a limit.
REDUCE_BUCKET = 500_000_000
MAX_LIVE_PARAMETERS = 1_000_000_000
PREFETCH_BUCKET = 50_000_000


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device at its peak. optimizer: AdamW's moments and the float32 master copy; teacher: frozen
    parameters; gathered: full parameters that stage 3 holds while it computes; buffers: what reducing gradients and the
    optimizer's step take beside, the larger of the two; saves: copies of the state on their way to the storage, which a
    GPU's host holds for it; runtime: the process."""

    parameters: float
    gradients: float
    optimizer: float
    teacher: float
    gathered: float
    buffers: float
    activations: float
    images: float
    saves: float
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
    trained, share = float(work.num_trained), 1.0 / num_gpus
    # Without shards bf16 is autocast over float32 parameters, whose 16-bit copies live as long as the forward pass.
    size = float(work.element_bytes) if stage else 4.0
    casts = 2.0 * trained if stage == 0 and work.element_bytes == 2 else 0.0
    activations, images = micro_batch * work.kept_bytes(checkpointed), micro_batch * work.image_bytes
    reducing = _reducing(trained, size, stage, share, on_cpu)
    stepping = 0.0 if work.offloaded else _stepping(trained, size, stage, share, on_cpu)
    if on_cpu:
        # What is freed in small pieces stays with the C library: activations, and the parameters as they were built,
        # which the flat buffers of ZeRO replace and whose place the activations take over.
        buffers = max(reducing, stepping) + (max(0.0, size * trained - activations) if stage in (1, 2) else 0.0)
    else:
        buffers = max(reducing, stepping - activations - images)
    return Memory(
        parameters=trained * size * (share if stage == 3 else 1.0),
        gradients=trained * size * (1.0 if stage < 2 else share),
        optimizer=0.0 if work.offloaded else 8.0 * trained if stage == 0 else 12.0 * trained * share,
        teacher=4.0 * work.num_frozen * (share if stage == 3 else 1.0),
        gathered=_gathered(trained, size, num_gpus, on_cpu) if stage == 3 else casts,
        buffers=max(buffers, 0.0),
        activations=activations,
        images=images,
        saves=work.pending_saves * _saved(work, stage, share) if on_cpu else 0.0,
        runtime=_runtime(work, on_cpu),
    )


def _gathered(trained: float, size: float, num_gpus: int, on_cpu: bool) -> float:
    """Full parameters at stage 3; gloo gathers a bucket into a buffer of its own (measured: 200 MB for 200 MB)."""
    copy = size * min(trained, PREFETCH_BUCKET) if on_cpu and num_gpus > 1 else 0.0
    return size * min(trained, MAX_LIVE_PARAMETERS) + copy


def _saved(work: Workload, stage: int, share: float) -> float:
    """What a rank writes of a checkpoint, in float32: parameters and both moments, replicas by rank 0 alone."""
    frozen = share if stage == 3 else 1.0
    return 12.0 * work.num_trained * (share if stage else 1.0) + 4.0 * work.num_frozen * frozen


def _runtime(work: Workload, on_cpu: bool) -> float:
    if not on_cpu:
        return assumption("gpu_runtime_bytes")
    return assumption("cpu_runtime_bytes") + (assumption("cpu_text_runtime_bytes") if work.reads_text else 0.0)


def _reducing(trained: float, size: float, stage: int, share: float, on_cpu: bool) -> float:
    """Beside gradients and activations at the end of the backward pass: the bucket that gradients are gathered in (of a
    fixed size; a CPU backs only those pages that are written), the flat copy that is reduced, the own share."""
    if stage == 0:
        return 0.0 if on_cpu else size * trained  # train/averaging.py: in place, or buckets of which all are kept
    flat = size * min(trained, REDUCE_BUCKET)
    bucket = flat if on_cpu else size * REDUCE_BUCKET
    if stage == 3:
        return bucket + flat * (2.0 if on_cpu else 1.0)  # gloo reduces and scatters a further copy
    return bucket + flat + (size * trained * share if stage == 1 else 0.0)


def _stepping(trained: float, size: float, stage: int, share: float, on_cpu: bool) -> float:
    """Beside gradients in the optimizer's step: the own share flat and in float32. Torch's fused AdamW makes no
    temporaries."""
    if stage == 0:
        return 0.0
    bucket = 0.0
    if stage == 3:
        bucket = size * min(trained, REDUCE_BUCKET) if on_cpu else size * REDUCE_BUCKET
    return bucket + 4.0 * trained * share


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
    low, high = 0, int(cluster.memory_bytes / (work.kept_bytes(checkpointed) + work.image_bytes)) + 1
    while high - low > 1:
        middle = (low + high) // 2
        if fits(cluster, work, stage=stage, num_gpus=num_gpus, micro_batch=middle, checkpointed=checkpointed):
            low = middle
        else:
            high = middle
    return low


def lowest_stage(
    cluster: Cluster, work: Workload, stages: Sequence[int], *, num_gpus: int, micro_batch: int, checkpointed: bool
) -> int | None:
    """The lowest of these ZeRO stages at which the micro-batch fits; None where none does."""
    for stage in stages:
        if fits(cluster, work, stage=stage, num_gpus=num_gpus, micro_batch=micro_batch, checkpointed=checkpointed):
            return stage
    return None
