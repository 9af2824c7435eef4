"""A cluster as the planner sees it: a typed description (the YAML of configs/clusters) and its resolved numbers.

A number is either the name of an entry of constants.yaml, which has a source, or a number of the user's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from medim_ray.config.loader import load
from medim_ray.plan import constants
from medim_ray.plan.constants import Constant
from medim_ray.plan.probe import measure_peak_flops

Given = float | str


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """configs/clusters/*.yaml. GB are 1e9 bytes; links are counted in one direction."""

    name: str = field(default="", metadata={"help": "a title for the table"})
    gpu: str = field(metadata={"help": "GPU kind of constants.yaml, or cpu-core"})
    num_nodes: int = field(metadata={"help": "nodes"})
    gpus_per_node: int = field(metadata={"help": "GPUs of a node (cores used as devices, for gpu: cpu-core)"})
    cores_per_node: int = field(metadata={"help": "CPU cores of a node that may decode images"})
    intra_node: Given = field(metadata={"help": "link between GPUs of a node: a name, or GB/s of one GPU"})
    inter_node: Given = field(metadata={"help": "network between nodes: a name, or GB/s of a whole node"})
    storage: Given = field(metadata={"help": "reads of the shards: a name, or GB/s of the whole cluster"})
    price_per_gpu_hour: Given | None = field(
        default=None, metadata={"help": "a name, or US dollars; 0 for own machines"}
    )
    grid: Given = field(default="us_2023", metadata={"help": "CO2 of the power: a name, or kg a kWh"})
    pue: Given = field(default="microsoft_2022", metadata={"help": "power of the building over that of the computers"})
    mtbf_gpu_hours: Given = field(default="llama3_2024", metadata={"help": "hours between failures of one GPU"})
    code: str = field(default="medim_ray", metadata={"help": "whose training code runs: medim_ray or dinov2"})
    peak_tflops: Given | None = field(
        default=None, metadata={"help": "peak of one device if not the kind's; probe: measured on this machine"}
    )
    memory_gb: float | None = field(default=None, metadata={"help": "memory of one device if not the kind's"})
    preemptions_per_node_day: float = field(default=0.0, metadata={"help": "spot: preemptions of a node a day"})
    stragglers_per_node_day: float = field(default=0.0, metadata={"help": "times a day that a node turns slow"})
    straggler_slowdown: float = field(default=1.5, metadata={"help": "step time with a slow node over the usual one"})
    straggler_s: float = field(default=1800.0, metadata={"help": "how long a node stays slow, on average"})
    elastic: bool = field(default=True, metadata={"help": "go on with fewer nodes until a lost one is replaced"})
    restart_s: float | None = field(default=None, metadata={"help": "failure to next step; null: constants.yaml"})
    save_s: float | None = field(default=None, metadata={"help": "stop for a checkpoint; null: from its size"})

    def __post_init__(self) -> None:
        for key in ("num_nodes", "gpus_per_node", "cores_per_node"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)}: must be at least 1")
        for key, unit in (("intra_node", "GB/s of one GPU"), ("inter_node", "GB/s of a node"), ("storage", "GB/s")):
            _positive(key, getattr(self, key), f"give {unit} above 0, or one of: {_names(key)}")
        if self.price_per_gpu_hour is None:
            raise ValueError(
                "price_per_gpu_hour is missing: give US dollars (0 for a machine of your own), or one of: "
                f"{_names('price_per_gpu_hour')}"
            )
        if not isinstance(self.price_per_gpu_hour, str) and not 0 <= self.price_per_gpu_hour < math.inf:
            raise ValueError(
                f"price_per_gpu_hour={self.price_per_gpu_hour}: must be 0 or more; use 0 for a machine of your own"
            )
        _positive("mtbf_gpu_hours", self.mtbf_gpu_hours, "give hours above 0, or a name")
        if not isinstance(self.pue, str) and not 1 <= self.pue < math.inf:
            raise ValueError(f"pue={self.pue}: must be at least 1, such as 1.2")
        if not isinstance(self.grid, str) and not self.grid >= 0:
            raise ValueError(f"grid={self.grid}: kilograms of CO2 a kWh, 0 or more")
        for key in ("peak_tflops", "memory_gb", "straggler_s"):
            value = getattr(self, key)
            if isinstance(value, float) and not value > 0:
                raise ValueError(f"{key}={value}: must be above 0")
        for key in ("preemptions_per_node_day", "stragglers_per_node_day", "restart_s", "save_s"):
            value = getattr(self, key)
            if value is not None and not value >= 0:
                raise ValueError(f"{key}={value}: must be 0 or more")
        if not self.straggler_slowdown >= 1:
            raise ValueError(f"straggler_slowdown={self.straggler_slowdown}: at least 1 (1: not slower)")
        if isinstance(self.peak_tflops, str) and self.peak_tflops != "probe":
            raise ValueError(f"peak_tflops={self.peak_tflops!r}: a number of TFLOPS, or probe")


def _positive(key: str, value: Given, fix: str) -> None:
    forever = key == "mtbf_gpu_hours"
    if not isinstance(value, str) and not (value > 0 and (value < math.inf or forever)):
        raise ValueError(f"{key}={value}: must be above 0{'' if forever else ' and finite'}; {fix}")


def _names(table: str) -> str:
    return ", ".join(sorted(name.split(".")[1] for name, _ in constants.all_entries() if name.split(".")[0] == table))


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The resolved description: SI units (bytes, seconds, operations a second). `sources` lists every number used."""

    config: ClusterConfig
    gpu: constants.Gpu
    code: constants.Code
    intra_node: float
    inter_node: float
    storage: float
    price_per_gpu_hour: float
    grid: float
    pue: float
    mtbf_gpu_hours: float
    sources: tuple[Constant, ...]

    @property
    def num_gpus(self) -> int:
        return self.config.num_nodes * self.config.gpus_per_node

    @property
    def title(self) -> str:
        c = self.config
        return c.name or f"{c.num_nodes} x {c.gpus_per_node} {c.gpu}"

    @property
    def memory_bytes(self) -> float:
        """What one device can hold, allocator slack taken off."""
        full = self.gpu.memory_bytes if self.config.memory_gb is None else self.config.memory_gb * 1e9
        return full * constants.assumption("memory_fill_ratio")

    def with_at_most(self, memory_gb: float) -> Cluster:
        """The same cluster where a run uses at most this much of a device (train.device_memory_gb)."""
        full = self.gpu.memory_bytes / 1e9 if self.config.memory_gb is None else self.config.memory_gb
        return replace(self, config=replace(self.config, memory_gb=memory_gb)) if memory_gb < full else self

    @property
    def utilisation(self) -> float:
        """Share of the peak that matrix products reach: one constant for all GPUs, one for CPU cores."""
        return constants.assumption("cpu_utilisation" if self.gpu.is_cpu else "gpu_utilisation")

    def peak_flops(self, precision: str) -> float:
        """Operations a second of one device in this precision."""
        given = self.config.peak_tflops
        if given == "probe":
            return measure_peak_flops(precision)
        if given is not None:
            return float(given) * 1e12
        return self.gpu.peak_fp32 if precision == "fp32" else self.gpu.peak_bf16

    def num_nodes_of(self, num_gpus: int) -> int:
        """Nodes that hold this many GPUs (a cloud bills whole nodes)."""
        return -(-num_gpus // self.config.gpus_per_node)


def load_cluster(file: str | Path, overrides: Sequence[str] = ()) -> Cluster:
    """The cluster of a YAML file with `key=value` overrides; ValueError names file, field and fix."""
    if not Path(file).is_file():
        raise ValueError(f"cluster={file}: there is no such file; give a YAML file like those of configs/clusters")
    try:
        return resolve(load(ClusterConfig, file, overrides))
    except ValueError as error:
        raise ValueError(f"cluster: {error}") from None


def resolve(config: ClusterConfig) -> Cluster:
    """Names become numbers; ValueError lists the known names."""
    assert config.price_per_gpu_hour is not None
    price = constants.number("price_per_gpu_hour", config.price_per_gpu_hour, "cluster.price_per_gpu_hour")
    intra = _link("intra_node", config.intra_node)
    inter = _link("inter_node", config.inter_node)
    storage = _link("storage", config.storage)
    grid = constants.number("grid", config.grid, "cluster.grid")
    pue = constants.number("pue", config.pue, "cluster.pue")
    mtbf = constants.number("mtbf_gpu_hours", config.mtbf_gpu_hours, "cluster.mtbf_gpu_hours")
    return Cluster(
        config=config,
        gpu=constants.gpu(config.gpu),
        code=constants.code(config.code),
        intra_node=intra.value,
        inter_node=inter.value,
        storage=storage.value,
        price_per_gpu_hour=price.value,
        grid=grid.value,
        pue=pue.value,
        mtbf_gpu_hours=mtbf.value,
        sources=(intra, inter, storage, price, grid, pue, mtbf),
    )


def _link(table: str, given: Given) -> Constant:
    """A bandwidth in bytes/s; a number of the user's is in GB/s."""
    if isinstance(given, str):
        return constants.constant(table, given, f"cluster.{table}")
    return constants.number(table, given * 1e9, f"cluster.{table}")
