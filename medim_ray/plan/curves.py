"""A plan on other numbers of GPUs and with other checkpoint intervals: the curves of the table and the page."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from medim_ray.plan import goodput as gp
from medim_ray.plan.bill import bill
from medim_ray.plan.memory import fits, largest_micro_batch
from medim_ray.plan.planner import Plan, find_bottleneck, simulated_s
from medim_ray.plan.step_time import Setting, step_time

# Losses that the simulation of one point should see, and events after which it ends: rare losses beside many slow nodes
# would take long and change little.
_POINT_LOSSES, _POINT_EVENTS = 200, 4_000


@dataclass(frozen=True, kw_only=True)
class Point:
    """One number of GPUs on a curve. strong: the recipe's global batch; weak: the recipe's images a GPU, so that the
    global batch grows, the number of images stays, and nothing is said about accuracy. goodput: simulated, with
    stragglers, preemptions and resizing."""

    num_gpus: int
    scaling: str
    global_batch: int
    hours: float
    cost: float
    goodput: float
    bottleneck: str


def curve(plan: Plan, most: int = 10_000) -> list[Point]:
    """Hours, cost and goodput against the number of GPUs, up to `most`, with as many nodes as needed; what does not fit
    in memory is left out."""
    sizes = {most, plan.setting.num_gpus, *(1 << k for k in range(most.bit_length()) if 1 << k <= most)}
    images = plan.config.train.steps * plan.setting.global_batch
    points = []
    for num in sorted(sizes):
        strong, weak = _strong(plan, num), _weak(plan, num)
        goodput = _goodput_on(plan, num) if strong or weak else 0.0
        if strong is not None:
            points.append(_point(plan, strong, "strong", plan.config.train.steps, goodput))
        if weak is not None:
            points.append(_point(plan, weak, "weak", images / weak.global_batch, goodput))
    return points


def _weak(plan: Plan, num_gpus: int) -> Setting | None:
    """The recipe's images a GPU on another number of GPUs, None where that does not fit (fewer shards are larger)."""
    weak = dataclasses.replace(plan.setting, num_gpus=num_gpus)
    held = fits(
        plan.cluster,
        plan.work,
        stage=weak.stage,
        num_gpus=num_gpus,
        micro_batch=weak.micro_batch,
        checkpointed=weak.checkpointed,
    )
    return weak if held else None


def _goodput_on(plan: Plan, num_gpus: int) -> float:
    """Simulated at Daly's interval; the plan's own where it is the plan's number of GPUs."""
    if num_gpus == plan.setting.num_gpus:
        return plan.goodput.simulated
    faults = gp.faults_of(plan.cluster, plan.work, num_gpus)
    interval = max(gp.daly_s(faults.mtbf_s, faults.save_s), plan.step.total)
    work = _POINT_LOSSES * faults.mtbf_s
    if not math.isfinite(work):  # no losses: stragglers are all that is left
        work = interval = max(plan.hours * 3600.0, _POINT_LOSSES * (faults.straggler_s + gp.DAY_S))
    return gp.simulate(faults, work, interval, most_events=_POINT_EVENTS).goodput


def _strong(plan: Plan, num_gpus: int) -> Setting | None:
    """The recipe's global batch on another number of GPUs, None where it does not divide or fit."""
    total = plan.setting.global_batch
    if total % num_gpus:
        return None
    share = total // num_gpus
    stage = plan.setting.stage
    room = largest_micro_batch(
        plan.cluster, plan.work, stage=stage, num_gpus=num_gpus, checkpointed=plan.setting.checkpointed
    )
    micro = max((d for d in range(1, min(share, room) + 1) if share % d == 0), default=0)
    if not micro:
        return None
    return dataclasses.replace(plan.setting, num_gpus=num_gpus, micro_batch=micro, accumulation=share // micro)


def _point(plan: Plan, setting: Setting, scaling: str, steps: float, goodput: float) -> Point:
    step = step_time(plan.cluster, plan.work, setting)
    hours = steps * step.total / 3600.0
    return Point(
        num_gpus=setting.num_gpus,
        scaling=scaling,
        global_batch=setting.global_batch,
        hours=hours,
        cost=bill(plan.cluster, setting.num_gpus, hours).cost,
        goodput=goodput,
        bottleneck=find_bottleneck(plan.cluster, setting, step).kind,
    )


def interval_curve(plan: Plan, num: int = 15) -> list[tuple[float, float, float]]:
    """(interval in seconds, goodput by Daly's formula, simulated) around the best interval."""
    g = plan.goodput
    seconds = plan.hours * 3600.0
    points = []
    for k in range(num):
        interval = max(g.daly_s * 10 ** (-1.5 + 3.0 * k / (num - 1)), plan.step.total)
        formula = gp.daly_goodput(interval, g.faults.mtbf_s, g.faults.save_s, g.faults.restart_s)
        outcome = gp.simulate(g.faults, simulated_s(g.faults, seconds), interval)
        points.append((interval, formula, outcome.goodput))
    return points
