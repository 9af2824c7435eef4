"""The plan of one run on one cluster: all that is printed, drawn or written is a field of `Plan`. No output here."""

from __future__ import annotations

import math
from dataclasses import dataclass

from medim_ray.config.schema import RunConfig, TrainConfig
from medim_ray.plan import goodput as gp
from medim_ray.plan.bill import Bill, bill
from medim_ray.plan.checks import check_batch, check_workers
from medim_ray.plan.clusters import Cluster
from medim_ray.plan.memory import STAGES, Memory, fits, largest_micro_batch, lowest_stage, memory_on
from medim_ray.plan.step_time import (
    Setting,
    StepTime,
    decode_core_s,
    decode_cores,
    slowest_link,
    step_time,
    stored_bytes,
    workers_per_node,
)
from medim_ray.plan.workload import Workload, workload

# Losses that a simulation should see: the work is repeated until it has, so that rare failures count too.
_LOSSES = 300


@dataclass(frozen=True, kw_only=True)
class Bottleneck:
    """What bounds the step: its kind, a sentence, and what would lift it."""

    kind: str
    words: str
    lift: str


@dataclass(frozen=True, kw_only=True)
class Goodput:
    """Failures: seconds, and productive time over wall time by Daly's formula and by simulation."""

    faults: gp.Faults
    young_s: float
    daly_s: float
    recipe_interval_s: float
    formula: float
    simulated: float
    recipe_simulated: float
    outcome: gp.Outcome


@dataclass(frozen=True, kw_only=True)
class Plan:
    """memory, largest: by (stage, checkpointed). hours: wall time of train.steps without failures."""

    config: RunConfig
    cluster: Cluster
    work: Workload
    setting: Setting
    step: StepTime
    hours: float
    bill: Bill
    memory: dict[tuple[int, bool], Memory]
    largest: dict[tuple[int, bool], int]
    bottleneck: Bottleneck
    goodput: Goodput
    warnings: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the recipe fits as it stands: its stage, micro-batch and activation checkpointing."""
        asked = self.config.train.activation_checkpointing
        return self.memory[self.setting.stage, asked].total <= self.cluster.memory_bytes

    @property
    def hours_with_failures(self) -> float:
        """Wall time with failures; infinite where nodes are lost faster than the run comes forward."""
        return self.hours / self.goodput.simulated if self.goodput.simulated else math.inf

    @property
    def images_per_s(self) -> float:
        return self.setting.global_batch / self.step.total

    @property
    def mfu(self) -> float:
        """Operations of the model over what the devices could do in the whole step."""
        return self.step.flops / self.step.total / self.cluster.peak_flops(self.setting.precision)

    @property
    def decode_cores(self) -> float:
        """Cores that keep up with the devices."""
        return decode_core_s(self.work) * self.setting.global_batch / self.step.train

    @property
    def storage_bytes_per_s(self) -> float:
        """Reads that keep up with the devices."""
        return stored_bytes(self.work) * self.setting.global_batch / self.step.train


def make_plan(config: RunConfig, cluster: Cluster) -> Plan:
    """The plan; ValueError with field and fix where the run can't be had on this cluster."""
    check_workers(config.train, cluster)
    if config.train.device_memory_gb is not None:
        cluster = cluster.with_at_most(config.train.device_memory_gb)
    work = workload(config, cluster.code)
    check_batch(config.train, cluster, work)
    setting, warnings = _setting(config.train, cluster, work)
    step = step_time(cluster, work, setting)
    hours = config.train.steps * step.total / 3600.0
    gpus, micro = setting.num_gpus, setting.micro_batch
    fewest = config.train.min_workers  # where a device holds most; train/fit.py looks at the same number
    both = [(stage, checkpointed) for stage in STAGES for checkpointed in (False, True)]
    return Plan(
        config=config,
        cluster=cluster,
        work=work,
        setting=setting,
        step=step,
        hours=hours,
        bill=bill(cluster, gpus, hours),
        memory={
            (s, c): memory_on(cluster, work, stage=s, num_gpus=fewest, micro_batch=micro, checkpointed=c)
            for s, c in both
        },
        largest={(s, c): largest_micro_batch(cluster, work, stage=s, num_gpus=fewest, checkpointed=c) for s, c in both},
        bottleneck=find_bottleneck(cluster, setting, step),
        goodput=_goodput(config.train, cluster, work, setting, step),
        warnings=tuple(warnings),
    )


def _stage(train: TrainConfig, cluster: Cluster, work: Workload) -> int:
    """The recipe's stage; for `auto` the lowest that fits, the last one where none does."""
    if train.zero != "auto":
        return train.zero
    stage = lowest_stage(
        cluster,
        work,
        train.possible_stages,
        num_gpus=train.min_workers,
        micro_batch=train.local_micro_batch,
        checkpointed=train.activation_checkpointing,
    )
    return train.possible_stages[-1] if stage is None else stage


def _setting(train: TrainConfig, cluster: Cluster, work: Workload) -> tuple[Setting, list[str]]:
    """The recipe's layout. Where it does not fit as it stands, that is said, and activation checkpointing is planned if
    it then fits."""
    stage, micro = _stage(train, cluster, work), train.local_micro_batch
    held = {"stage": stage, "num_gpus": train.min_workers}
    checkpointed, warnings = train.activation_checkpointing, []
    if not fits(cluster, work, micro_batch=micro, checkpointed=checkpointed, **held):
        best = largest_micro_batch(cluster, work, checkpointed=checkpointed, **held)
        others = [
            s
            for s in train.possible_stages
            if fits(cluster, work, micro_batch=micro, checkpointed=checkpointed, **{**held, "stage": s})
        ]
        checkpointed = checkpointed or fits(cluster, work, micro_batch=micro, checkpointed=True, **held)
        warnings.append(
            f"train.micro_batch={micro} does not fit at train.zero={stage}: "
            + (f"train.zero={others[0]} holds it; " if others else "")
            + f"at train.zero={stage} at most train.micro_batch={best}"
            + ("; hours are those with train.activation_checkpointing=true" if checkpointed else "")
        )
    if train.offload_optimizer:
        warnings.append("train.offload_optimizer=true: memory is planned with it, the time of the host's steps is not")
    setting = Setting(
        num_gpus=train.max_workers,
        stage=stage,
        micro_batch=micro,
        accumulation=train.accumulation,
        checkpointed=checkpointed,
        precision=train.precision,
    )
    return setting, warnings


def find_bottleneck(cluster: Cluster, setting: Setting, step: StepTime) -> Bottleneck:
    """The first thing that bounds the step, in words."""
    device = "CPU cores" if cluster.gpu.is_cpu else "GPUs"
    if step.decode > step.train and step.decode >= step.storage:
        busy = workers_per_node(cluster, setting.num_gpus)
        free = decode_cores(cluster, setting.num_gpus) / cluster.num_nodes_of(setting.num_gpus)
        need = busy + math.ceil(free * step.decode / step.train)
        return Bottleneck(
            kind="decode",
            words=f"decoding: the {device} wait for images {_share(step.train, step.decode)} of the time",
            lift=f"about {need} cores a node instead of {cluster.config.cores_per_node} (the workers take {busy}), "
            "decoding on CPU-only nodes, or smaller stored images",
        )
    if step.storage > step.train:
        return Bottleneck(
            kind="storage",
            words=f"storage: the {device} wait for reads {_share(step.train, step.storage)} of the time",
            lift=f"{_up(cluster.storage * step.storage / step.train / 1e9)} GB/s of reads "
            f"(now {cluster.storage / 1e9:.6g}), or the shards on local disks",
        )
    parts = {
        "compute": step.compute,
        "memory bandwidth": step.traffic + step.optimizer,
        "communication": step.exposed,
        "dispatch": step.dispatch,
    }
    kind = max(parts, key=lambda name: parts[name])
    percent = f"{100 * parts[kind] / step.train:.0f} % of a step"
    if kind == "compute":
        lift = f"more {device} (up to train.global_batch={setting.global_batch}), a faster kind"
        if setting.precision == "fp32" and not cluster.gpu.is_cpu:
            lift += ", train.precision=bf16"
        return Bottleneck(kind=kind, words=f"compute: matrix products take {percent}", lift=lift)
    if kind == "communication":
        link, _ = slowest_link(cluster, setting.num_gpus)
        return Bottleneck(
            kind=kind,
            words=f"communication: ZeRO {setting.stage} over the link {link} takes {percent}",
            lift=f"a faster link {link}, a lower train.zero, a larger train.micro_batch with fewer workers",
        )
    if kind == "dispatch":
        return Bottleneck(
            kind=kind,
            words=f"dispatch: Python between the operations and ZeRO's hooks take {percent}",
            lift="a larger train.micro_batch, a lower train.zero; the model is small for the work around it",
        )
    return Bottleneck(
        kind=kind,
        words=f"memory bandwidth: norms, sums and the optimizer take {percent}",
        lift="train.precision=bf16, a larger train.micro_batch, a kind with more bandwidth",
    )


def _up(value: float) -> str:
    """Three digits, rounded up, so that what is asked for is enough."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return f"{math.ceil(value / unit) * unit:.6g}"


def _share(train: float, total: float) -> str:
    return f"{100 * (1 - train / total):.0f} %"


def _goodput(train: TrainConfig, cluster: Cluster, work: Workload, setting: Setting, step: StepTime) -> Goodput:
    faults = gp.faults_of(cluster, work, setting.num_gpus)
    seconds = train.steps * step.total
    daly = gp.daly_s(faults.mtbf_s, faults.save_s)
    interval = max(daly, step.total) if math.isfinite(daly) else seconds
    own = train.checkpoint_every * step.total
    outcome = gp.simulate(faults, simulated_s(faults, seconds), interval)
    return Goodput(
        faults=faults,
        young_s=gp.young_s(faults.mtbf_s, faults.save_s),
        daly_s=daly,
        recipe_interval_s=own,
        formula=gp.daly_goodput(interval, faults.mtbf_s, faults.save_s, faults.restart_s),
        simulated=outcome.goodput,
        recipe_simulated=gp.simulate(faults, simulated_s(faults, seconds), own).goodput,
        outcome=outcome,
    )


def simulated_s(faults: gp.Faults, seconds: float) -> float:
    """Work to simulate: the run's, or enough of such runs to see what rarely happens."""
    return max(seconds, _LOSSES * faults.mtbf_s) if math.isfinite(faults.mtbf_s) else seconds
