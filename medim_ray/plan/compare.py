"""ZeRO stage x micro-batch x GPUs: what fits, what is fastest, what is cheapest. The global batch stays as it is.

Workers and micro-batches are a bounded choice of divisors in which the recipe's own layout always is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from medim_ray.plan.bill import bill
from medim_ray.plan.clusters import Cluster
from medim_ray.plan.memory import STAGES, largest_micro_batch, memory_on
from medim_ray.plan.planner import Plan
from medim_ray.plan.step_time import Setting, step_time
from medim_ray.plan.workload import Workload

# Layouts listed at most: worker counts, and micro-batches of a worker beside the recipe's and the largest that fit.
_MOST_COUNTS, _MOST_SIZES = 24, 4


@dataclass(frozen=True, kw_only=True)
class Row:
    """One layout. hours and cost are those it would have, also where it does not fit. recipe: it is the plan's own."""

    num_gpus: int
    stage: int
    micro_batch: int
    accumulation: int
    checkpointed: bool
    memory_bytes: float
    fits: bool
    hours: float
    cost: float
    recipe: bool


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All layouts; the fastest and the cheapest of those that fit (None: none fits). Ties go to fewer GPUs, then to the
    lower stage."""

    rows: tuple[Row, ...]
    fastest: Row | None
    cheapest: Row | None


def compare(plan: Plan) -> Comparison:
    """Layouts of this recipe on up to all GPUs of the cluster; with activation checkpointing where the code has it."""
    rows = tuple(_row(plan, setting) for setting in _settings(plan))
    fitting = [row for row in rows if row.fits]
    return Comparison(
        rows=rows,
        fastest=min(fitting, key=lambda row: (row.hours, row.cost, row.num_gpus, row.stage), default=None),
        cheapest=min(fitting, key=lambda row: (row.cost, row.hours, row.num_gpus, row.stage), default=None),
    )


def _settings(plan: Plan) -> Iterator[Setting]:
    own, total = plan.setting, plan.setting.global_batch
    for num in worker_counts(total, plan.cluster.num_gpus, own.num_gpus):
        share = total // num
        for micro in _micro_batches(plan.cluster, plan.work, num, share, own.micro_batch):
            for stage in STAGES:
                for checkpointed in (False, True):
                    yield Setting(
                        num_gpus=num,
                        stage=stage,
                        micro_batch=micro,
                        accumulation=share // micro,
                        checkpointed=checkpointed,
                        precision=own.precision,
                    )


def _row(plan: Plan, setting: Setting) -> Row:
    num, micro = setting.num_gpus, setting.micro_batch
    key = (setting.stage, setting.checkpointed)
    if (num, micro) == (plan.setting.num_gpus, plan.setting.micro_batch):
        need = plan.memory[key].total  # the plan's own, which looks at the fewest workers of an elastic run
    else:
        need = memory_on(
            plan.cluster, plan.work, stage=key[0], num_gpus=num, micro_batch=micro, checkpointed=key[1]
        ).total
    hours = plan.config.train.steps * step_time(plan.cluster, plan.work, setting).total / 3600.0
    return Row(
        num_gpus=num,
        stage=setting.stage,
        micro_batch=micro,
        accumulation=setting.accumulation,
        checkpointed=setting.checkpointed,
        memory_bytes=need,
        fits=need <= plan.cluster.memory_bytes,
        hours=hours,
        cost=bill(plan.cluster, num, hours).cost,
        recipe=setting == plan.setting,
    )


def worker_counts(global_batch: int, num_gpus: int, own: int) -> list[int]:
    """Divisors of the batch up to the cluster's GPUs, ascending: all of them, or the least, the most, the recipe's own,
    its neighbours and others evenly between (by rank)."""
    counts = [num for num in _divisors(global_batch) if num <= num_gpus]
    chosen = set(_spread(counts, _MOST_COUNTS))
    place = counts.index(own)
    return sorted(chosen | set(counts[max(place - 1, 0) : place + 2]) | set(counts[-3:]))


def _micro_batches(cluster: Cluster, work: Workload, num_gpus: int, share: int, own: int) -> list[int]:
    """Divisors of a worker's share, descending: the largest that fits for each stage, the recipe's own, the whole share
    and some between."""
    sizes = _divisors(share)
    chosen = {share, *_spread(sizes, _MOST_SIZES)} | ({own} & set(sizes))
    for stage in STAGES:
        for again in (False, True):
            most = largest_micro_batch(cluster, work, stage=stage, num_gpus=num_gpus, checkpointed=again)
            chosen |= set([size for size in sizes if size <= most][-1:])
    return sorted(chosen, reverse=True)


def _divisors(number: int) -> list[int]:
    """Ascending."""
    low = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*low, *(number // d for d in low)})


def _spread(values: list[int], num: int) -> list[int]:
    """At most `num` of the values, evenly by rank, with the first and the last."""
    if len(values) <= num:
        return values
    return [values[round(k * (len(values) - 1) / (num - 1))] for k in range(num)]
