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
    gpu: str = field(default="", metadata={"help": "GPU kind of constants.yaml, or cpu-core; required"})
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
        if not self.gpu:
            raise ValueError(f"cluster.gpu is missing: use one of: {_names('gpus')}")
        if self.price_per_gpu_hour is None:
            raise ValueError(
                "cluster.price_per_gpu_hour is missing: give US dollars (0 for a machine of your own), or one of: "
                f"{_names('price_per_gpu_hour')}"
            )
        if isinstance(self.peak_tflops, str) and self.peak_tflops != "probe":
            raise ValueError(f"cluster.peak_tflops={self.peak_tflops!r}: a number of TFLOPS, or probe")
        for key, (least, most, meaning) in BOUNDS.items():
            value = getattr(self, key)
            if value is None or isinstance(value, str):
                continue
            if not (least <= value <= most or (key == "mtbf_gpu_hours" and value == math.inf)):
                raise ValueError(f"cluster.{key}={value}: {_rule(key, value)}; give {meaning}{_named(key)}")


# Least and most of each number, and what it is. The most are far above what can be bought, so that a wrong unit shows
# and no plan overflows.
BOUNDS: dict[str, tuple[float, float, str]] = {
    "num_nodes": (1, 1_000_000, "nodes"),
    "gpus_per_node": (1, 10_000, "GPUs of a node, such as 8"),
    "cores_per_node": (1, 100_000, "CPU cores of a node, such as 96"),
    "intra_node": (1e-6, 1e6, "GB/s of one GPU"),
    "inter_node": (1e-6, 1e6, "GB/s of a node"),
    "storage": (1e-6, 1e9, "GB/s of the whole cluster"),
    "price_per_gpu_hour": (0, 1e6, "US dollars an hour and GPU (0 for a machine of your own)"),
    "grid": (0, 100, "kilograms of CO2 a kWh, such as 0.367"),
    "pue": (1, 100, "power of the building over that of its computers, such as 1.2"),
    "mtbf_gpu_hours": (1e-3, 1e12, "hours (inf: no GPU ever fails)"),
    "peak_tflops": (1e-6, 1e9, "TFLOPS of one device"),
    "memory_gb": (1e-6, 1e6, "GB of one device, such as 80"),
    "preemptions_per_node_day": (0, 86_400, "times a day, such as 0.5"),
    "stragglers_per_node_day": (0, 86_400, "times a day, such as 0.5"),
    "straggler_slowdown": (1, 1000, "a factor, such as 1.5 (1: not slower)"),
    "straggler_s": (1e-3, 1e9, "seconds, such as 1800"),
    "restart_s": (0, 1e7, "seconds, such as 55, or null for that of constants.yaml"),
    "save_s": (0, 1e7, "seconds, such as 10, or null for that of the checkpoint's size"),
}


def _rule(key: str, value: float) -> str:
    """What is wrong with a value outside its bounds."""
    least, most, _ = BOUNDS[key]
    if not math.isfinite(value):
        return "must be finite"
    if value > most:
        return f"must be at most {most:,.15g}"
    if least == 0:
        return "must be 0 or more"
    if least == 1:
        return "must be at least 1"
    return "must be above 0" if value <= 0 else f"must be at least {least:g}"


def _named(key: str) -> str:
    return f", or one of: {_names(key)}" if key in constants.tables() else ""


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
    if Path(file).is_dir():
        raise ValueError(f"cluster={file}: this is a folder; give one YAML file like those of configs/clusters")
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
