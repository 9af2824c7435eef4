"""Seconds of one optimizer step: compute, memory traffic, ZeRO's communication, decoding and storage.

Compute is operations over peak times one stated utilisation. Volumes per stage are those of the ZeRO paper, section 7;
collectives are rings, whose time is latency times hops plus volume over the slowest link. What hides behind the
backward pass is an option of the code that runs (constants.yaml, `codes`).
"""

from __future__ import annotations

from dataclasses import dataclass

from medim_ray.plan.clusters import Cluster
from medim_ray.plan.constants import assumption
from medim_ray.plan.memory import REDUCE_BUCKET
from medim_ray.plan.workload import Workload

# Bytes that AdamW, the gradient norm and clipping read and write for each parameter they own, in float32.
_OPTIMIZER_BYTES = 40.0
_TEACHER_BYTES = 12.0


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a run is laid out: workers (one a GPU), ZeRO stage, images a forward, forwards a step, recomputation."""

    num_gpus: int
    stage: int
    micro_batch: int
    accumulation: int
    checkpointed: bool
    precision: str

    @property
    def global_batch(self) -> int:
        return self.num_gpus * self.micro_batch * self.accumulation


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step.

    dispatch: Python and the engine's hooks, which a GPU's queue hides. communication: all of it; exposed: the part that
    nothing hides. decode and storage run beside the step and matter where they are longer than `train`. crowding: how
    much longer `train` takes where workers take every core, and decoding and Ray run on the same. flops: of one device
    in one step.
    """

    compute: float
    traffic: float
    optimizer: float
    dispatch: float
    communication: float
    exposed: float
    decode: float
    storage: float
    crowding: float
    flops: float

    @property
    def train(self) -> float:
        return self.compute + self.traffic + self.optimizer + self.dispatch + self.exposed

    @property
    def total(self) -> float:
        return max(self.crowding * self.train, self.decode, self.storage)


def step_time(cluster: Cluster, work: Workload, setting: Setting, utilisation: float | None = None) -> StepTime:
    """The step of this setting; `utilisation` in place of the cluster's own constant."""
    rate = cluster.peak_flops(setting.precision) * (cluster.utilisation if utilisation is None else utilisation)
    images = setting.micro_batch * setting.accumulation
    flops = images * work.flops(setting.checkpointed)
    backward = images * (work.flops(setting.checkpointed) - work.forward_flops) / rate
    communication = _communication(cluster, work, setting)
    # On cores the collectives are work of the processor that computes: nothing of them hides.
    overlap = 0.0 if cluster.gpu.is_cpu else cluster.code.overlap[setting.stage]
    hidden = min(overlap * communication, backward)
    own = work.num_trained / (setting.num_gpus if setting.stage else 1)
    kept = work.num_frozen / (setting.num_gpus if setting.stage == 3 else 1)
    return StepTime(
        compute=flops / rate,
        traffic=images * work.moved_bytes / cluster.gpu.memory_bandwidth,
        optimizer=(_OPTIMIZER_BYTES * own + _TEACHER_BYTES * kept) / cluster.gpu.memory_bandwidth,
        dispatch=_dispatch(cluster, work, setting),
        communication=communication,
        exposed=communication - hidden,
        decode=setting.global_batch * decode_core_s(work) / decode_cores(cluster, setting.num_gpus),
        storage=setting.global_batch * stored_bytes(work) / cluster.storage,
        crowding=assumption("cpu_crowding_ratio") if _takes_every_core(cluster, setting.num_gpus) else 1.0,
        flops=flops,
    )


def _takes_every_core(cluster: Cluster, num_gpus: int) -> bool:
    """Workers on CPU cores leave none for what runs beside them."""
    return cluster.gpu.is_cpu and workers_per_node(cluster, num_gpus) >= cluster.config.cores_per_node


def _dispatch(cluster: Cluster, work: Workload, setting: Setting) -> float:
    """Seconds of Python between operations, of the copies in ZeRO's hooks, and of gathering and releasing each tensor
    at stage 3; a GPU's queue hides them."""
    if not cluster.gpu.is_cpu:
        return 0.0
    hooks = work.num_trained * assumption("cpu_zero_s_per_parameter") if setting.stage else 0.0
    if setting.stage == 3:
        hooks += work.num_tensors * assumption("cpu_zero3_s_per_tensor")
    return setting.accumulation * (assumption("cpu_dispatch_s") + hooks)


def decode_core_s(work: Workload) -> float:
    """Seconds of one core to decode and crop one image in a Ray Data actor."""
    decode = work.stored_pixels / 1e6 * assumption("decode_s_per_megapixel")
    crop = work.cut_pixels / 1e6 * assumption("crop_s_per_megapixel")
    return (decode + crop) * assumption("stream_overhead_ratio")


def stored_bytes(work: Workload) -> float:
    """Bytes of one image in the shards."""
    return work.stored_pixels * assumption("bytes_per_stored_pixel")


def decode_cores(cluster: Cluster, num_gpus: int) -> float:
    """Cores that decode, over all nodes in use. A worker takes one core; workers on CPU cores leave at least half a
    core a node, since the system shares what it has."""
    return cluster.num_nodes_of(num_gpus) * max(
        cluster.config.cores_per_node - workers_per_node(cluster, num_gpus), 0.5
    )


def workers_per_node(cluster: Cluster, num_gpus: int) -> int:
    """Workers of the fullest node."""
    return -(-num_gpus // cluster.num_nodes_of(num_gpus))


def _communication(cluster: Cluster, work: Workload, setting: Setting) -> float:
    """Seconds of all collectives of one step."""
    if setting.num_gpus == 1:
        return 0.0
    size = float(work.element_bytes) if setting.stage else 4.0  # stage 0: autocast over float32 parameters
    gradients = work.num_trained * size
    parameters = work.num_trained * size
    teacher = 4.0 * work.num_frozen
    buckets = max(1, -(-work.num_trained // REDUCE_BUCKET))
    forwards = setting.accumulation
    # In units of one reduce-scatter or all-gather over the ring: an all-reduce is both.
    if setting.stage == 0:
        volume, rings = 2.0 * gradients, 2 * buckets
    elif setting.stage == 1:
        volume, rings = gradients + parameters, 2 * buckets
    elif setting.stage == 2:
        volume, rings = forwards * gradients + parameters, (forwards + 1) * buckets
    else:
        # Parameters are gathered for the forward and the backward pass, the teacher's for its forward; the depth of
        # the gathers is that of prefetch buckets of 5e7 elements.
        volume = forwards * (2.0 * parameters + teacher + gradients)
        rings = forwards * (3 * max(1, -(-work.num_trained // 50_000_000)) + buckets)
    return ring_s(cluster, setting.num_gpus, volume, rings)


def ring_s(cluster: Cluster, num_gpus: int, volume: float, num_rings: int) -> float:
    """Seconds to pass `volume` bytes round one ring of all GPUs in `num_rings` reduce-scatters or all-gathers.

    A GPU sends over its own link in a node, a whole node over its network. Each piece passes all other GPUs: one hop a
    GPU, of which the hops between nodes are one less than there are nodes. Trees, which NCCL takes for small volumes on
    many nodes, have fewer hops: the latency is an upper bound there.
    """
    nodes = cluster.num_nodes_of(num_gpus)
    hops = (num_gpus - nodes) * assumption("intra_node_latency_s") + (nodes - 1) * assumption("inter_node_latency_s")
    bandwidth = slowest_link(cluster, num_gpus)[1] * assumption("link_efficiency")
    return volume * (num_gpus - 1) / num_gpus / bandwidth + num_rings * hops


def slowest_link(cluster: Cluster, num_gpus: int) -> tuple[str, float]:
    """Where the ring's slowest link is ("in the node" or "between nodes"), and its bytes a second."""
    links = []
    if min(num_gpus, cluster.config.gpus_per_node) > 1:
        links.append(("in the node", cluster.intra_node))
    if cluster.num_nodes_of(num_gpus) > 1:
        links.append(("between nodes", cluster.inter_node))
    return min(links, key=lambda link: link[1], default=("in the node", cluster.intra_node))
