"""A cluster that the tests of the planner share."""

from __future__ import annotations

from medim_ray.plan.clusters import ClusterConfig

GPUS = ClusterConfig(
    gpu="a100-80gb-sxm",
    num_nodes=8,
    gpus_per_node=8,
    cores_per_node=96,
    intra_node="nvlink3",
    inter_node="infiniband_hdr_8x200",
    storage="object_store_per_account",
    price_per_gpu_hour=2.0,
)
