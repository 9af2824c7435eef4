"""ZeRO stage x micro-batch x GPUs: what fits, what is fastest, what is cheapest. The global batch stays as it is."""

from __future__ import annotations

from dataclasses import dataclass

from medim_ray.config.schema import RunConfig
from medim_ray.plan.bill import bill
from medim_ray.plan.clusters import Cluster
from medim_ray.plan.memory import STAGES, memory_on
from medim_ray.plan.step_time import Setting, step_time
from medim_ray.plan.workload import workload


@dataclass(frozen=True, kw_only=True)
class Row:
    """One layout. hours and cost are those it would have, also where it does not fit."""

    num_gpus: int
    stage: int
    micro_batch: int
    accumulation: int
    checkpointed: bool
    memory_bytes: float
    fits: bool
    hours: float
    cost: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All layouts; the fastest and the cheapest of those that fit (None: none fits). Ties go to the lower stage."""

    rows: tuple[Row, ...]
    fastest: Row | None
    cheapest: Row | None


def compare(config: RunConfig, cluster: Cluster) -> Comparison:
    """Every layout of this recipe on whole divisors of the cluster, with and without activation checkpointing."""
    work = workload(config, cluster.code)
    total, rows = config.train.global_batch, []
    for num in _worker_counts(cluster, total):
        for micro in _micro_batches(total // num):
            for stage in STAGES:
                for checkpointed in (False, True):
                    setting = Setting(
                        num_gpus=num,
                        stage=stage,
                        micro_batch=micro,
                        accumulation=total // num // micro,
                        checkpointed=checkpointed,
                        precision=config.train.precision,
                    )
                    need = memory_on(
                        cluster, work, stage=stage, num_gpus=num, micro_batch=micro, checkpointed=checkpointed
                    ).total
                    hours = config.train.steps * step_time(cluster, work, setting).total / 3600.0
                    rows.append(
                        Row(
                            num_gpus=num,
                            stage=stage,
                            micro_batch=micro,
                            accumulation=setting.accumulation,
                            checkpointed=checkpointed,
                            memory_bytes=need,
                            fits=need <= cluster.memory_bytes,
                            hours=hours,
                            cost=bill(cluster, num, hours).cost,
                        )
                    )
    fitting = [row for row in rows if row.fits]
    return Comparison(
        rows=tuple(rows),
        fastest=min(fitting, key=lambda row: row.hours, default=None),
        cheapest=min(fitting, key=lambda row: (row.cost, row.hours), default=None),
    )


def _worker_counts(cluster: Cluster, global_batch: int) -> list[int]:
    """All GPUs, a half, a quarter and so on to one, where the batch divides."""
    counts, num = [], cluster.num_gpus
    while num >= 1:
        if global_batch % num == 0:
            counts.append(num)
        num //= 2
    return counts or [1]


def _micro_batches(share: int) -> list[int]:
    """The images of a worker at once, in halves as long as they divide."""
    sizes = [share]
    while sizes[-1] % 2 == 0 and len(sizes) < 5:
        sizes.append(sizes[-1] // 2)
    return sizes
