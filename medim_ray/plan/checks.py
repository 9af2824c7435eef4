"""What a recipe asks of a cluster that can't be had: a ValueError with the field and the fix, before any planning."""

from __future__ import annotations

import math

from medim_ray.config.schema import TrainConfig
from medim_ray.plan.clusters import Cluster
from medim_ray.plan.memory import STAGES, fits, largest_micro_batch
from medim_ray.plan.workload import Workload


def check_workers(train: TrainConfig, cluster: Cluster) -> None:
    """One worker a GPU: there must be enough of them."""
    if train.max_workers > cluster.num_gpus:
        c = cluster.config
        raise ValueError(
            f"train.num_workers={train.max_workers} is more than the {cluster.num_gpus} GPUs of the cluster "
            f"({c.num_nodes} nodes of {c.gpus_per_node}): use train.num_workers={cluster.num_gpus} or less, or "
            f"cluster.num_nodes={cluster.num_nodes_of(train.max_workers)}"
        )


def check_batch(train: TrainConfig, cluster: Cluster, work: Workload) -> None:
    """The micro-batch must fit in memory at one ZeRO stage at least, with activation checkpointing if need be, at the
    fewest workers that the run may have."""
    micro, workers = train.local_micro_batch, train.min_workers
    for stage in STAGES:
        for checkpointed in (False, True):
            if fits(cluster, work, stage=stage, num_gpus=workers, micro_batch=micro, checkpointed=checkpointed):
                return
    best = {
        stage: largest_micro_batch(cluster, work, stage=stage, num_gpus=workers, checkpointed=False) for stage in STAGES
    }
    share = math.gcd(*(train.global_batch // num for num in train.worker_counts))
    stage = max(STAGES, key=lambda s: best[s])
    divisors = [d for d in range(1, share + 1) if share % d == 0 and d <= best[stage]]
    place = f"{cluster.memory_bytes / 1e9:.3g} GB of {cluster.gpu.name}"
    if not divisors:
        raise ValueError(
            f"train.micro_batch={micro}: not even one image fits in {place} at any ZeRO stage: use a larger "
            f"{_memory_field(train, cluster)}, more train.num_workers with train.zero=3, or a smaller encoder.name"
        )
    raise ValueError(
        f"train.micro_batch={micro}: fits in {place} at no ZeRO stage; "
        f"use train.micro_batch={divisors[-1]} with train.zero={stage} (accumulation keeps the global batch)"
    )


def _memory_field(train: TrainConfig, cluster: Cluster) -> str:
    """The option that bounds the memory of a device."""
    if train.device_memory_gb is not None and cluster.config.memory_gb == train.device_memory_gb:
        return "train.device_memory_gb"
    return "cluster.memory_gb" if cluster.config.memory_gb is not None else "cluster.gpu"
