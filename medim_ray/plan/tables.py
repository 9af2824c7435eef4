"""The plan in a terminal, with rich. Numbers come from planner.py; nothing is computed here but units."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from medim_ray.plan import constants
from medim_ray.plan.compare import Comparison
from medim_ray.plan.constants import Constant
from medim_ray.plan.curves import Point
from medim_ray.plan.facts import Check
from medim_ray.plan.planner import Plan

_SHOWN_ROWS, _SHOWN_UNFIT = 30, 6


def render(
    plan: Plan, points: Sequence[Point], check: Check | None, comparison: Comparison | None
) -> Iterator[RenderableType]:
    """Summary, memory, curve, comparison, fact, notes; in the order of reading."""
    yield summary(plan)
    yield memory_table(plan)
    yield curve_table(points)
    if comparison is not None:
        yield comparison_table(comparison)
    if check is not None:
        yield Text("\n".join(check.sentences()))
    for warning in plan.warnings:
        yield Text(f"warning: {warning}", style="yellow")
    yield Text(notes(plan), style="dim")


def sources(plan: Plan) -> list[Constant]:
    """Every number of constants.yaml that this plan used: the device's, the cluster's, and the assumptions."""
    return [
        *constants.gpu_numbers(plan.cluster.gpu.name),
        *plan.cluster.sources,
        *constants.assumptions(on_cpu=plan.cluster.gpu.is_cpu),
    ]


def _table(title: str, caption: str | None = None) -> Table:
    """Narrow enough for 80 columns, so that no number is cut."""
    return Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)


def summary(plan: Plan) -> Table:
    """Time, money, the bottleneck and goodput."""
    table = _table(f"{plan.cluster.title}: {plan.config.train.steps:,} steps of {plan.setting.global_batch:,}")
    table.add_column("what", no_wrap=True)
    table.add_column("value")
    g, s, t, code = plan.goodput, plan.setting, plan.step, plan.cluster.code.name
    rows = [
        (
            "layout",
            f"{s.num_gpus} x {plan.cluster.gpu.name}, ZeRO {s.stage}, {s.micro_batch} images x {s.accumulation}",
        ),
        ("code", code if code == constants.OUR_CODE else f"{code} (not our trainer)"),
        ("time without failures", span(plan.hours)),
        ("step", f"{t.total:.4g} s, {plan.images_per_s:,.1f} images/s"),
        (
            "of it",
            f"products {t.compute:.3g}, other {t.traffic + t.optimizer + t.dispatch:.3g}, "
            f"communication {t.exposed:.3g} (all {t.communication:.3g}) s",
        ),
        ("utilisation", f"{plan.cluster.utilisation:.3f} in products, {plan.mfu:.3f} of the peak over the step"),
        ("bottleneck", plan.bottleneck.words),
        ("what would lift it", plan.bottleneck.lift),
        (
            "decoding",
            f"{plan.decode_cores:,.1f} cores keep up; {_free_cores(plan)}",
        ),
        (
            "storage",
            f"{plan.storage_bytes_per_s / 1e9:.3g} GB/s of reads keep up; there are {plan.cluster.storage / 1e9:.3g}",
        ),
        ("cost", f"{plan.bill.cost:,.0f} USD for {plan.bill.gpu_hours:,.0f} GPU-hours"),
        ("energy", f"{plan.bill.energy_kwh:,.1f} kWh, {plan.bill.co2_kg:,.1f} kg CO2 (rated power, an upper bound)"),
        ("time between losses", f"{g.faults.mtbf_s / 3600:,.1f} h for {g.faults.num_nodes} nodes"),
        (
            "checkpoint every",
            f"{g.daly_s:,.0f} s by Daly{' (longer than the run)' if g.daly_s > plan.hours * 3600 else ''}, "
            f"{g.young_s:,.0f} s by Young; the recipe's "
            f"{plan.config.train.checkpoint_every} steps are {g.recipe_interval_s:,.0f} s",
        ),
        (
            "goodput",
            f"{g.formula:.4f} by the formula, {g.simulated:.4f} simulated, "
            f"{g.recipe_simulated:.4f} at the recipe's interval",
        ),
        ("time with failures", _span_with_failures(plan)),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def span(hours: float) -> str:
    """A time in the unit that suits it."""
    if hours < 0.05:
        return f"{hours * 3600:,.3g} s"
    return f"{hours:,.2f} h = {hours / 24:,.2f} days" if hours >= 24 else f"{hours:,.2f} h"


def _span_with_failures(plan: Plan) -> str:
    if math.isinf(plan.hours_with_failures):
        return "never ends: nodes are lost faster than the run comes forward"
    return span(plan.hours_with_failures)


def _free_cores(plan: Plan) -> str:
    """What is left for decoding beside one core a worker."""
    num, cluster = plan.setting.num_gpus, plan.cluster
    cores = cluster.num_nodes_of(num) * cluster.config.cores_per_node
    if cores > num:
        return f"{cores - num:,} are free beside {num:,} workers"
    return f"none is free, as {num:,} workers take all {cores:,} (half a core a node is planned)"


def memory_table(plan: Plan) -> Table:
    """Gigabytes of one GPU by stage; "most": images that fit; "ckpt": with activation checkpointing."""
    micro = plan.setting.micro_batch
    table = _table(
        f"Memory of one GPU in GB at {micro} images; {plan.cluster.memory_bytes / 1e9:.1f} GB can be used (!: more)",
        caption="most: images that fit; ckpt: the total with activation checkpointing, and the images that then fit",
    )
    heads = ["ZeRO", "params", "grads", "optim.", "teacher", "other", "activ.", "total", "most"]
    for head in [*heads, "ckpt", "most"]:
        table.add_column(head, justify="right")
    for stage in sorted({stage for stage, _ in plan.memory}):
        plain, again = plan.memory[stage, False], plan.memory[stage, True]
        sizes = [
            plain.parameters,
            plain.gradients,
            plain.optimizer,
            plain.teacher,
            plain.gathered + plain.buffers + plain.saves + plain.runtime,
            plain.activations + plain.images,
        ]
        table.add_row(
            str(stage),
            *(f"{size / 1e9:.2f}" for size in sizes),
            _fit(plain.total, plan),
            str(plan.largest[stage, False]),
            _fit(again.total, plan),
            str(plan.largest[stage, True]),
        )
    return table


def _fit(total: float, plan: Plan) -> str:
    return f"{total / 1e9:.2f}" + ("" if total <= plan.cluster.memory_bytes else " !")


def curve_table(points: Sequence[Point]) -> Table:
    """Hours, cost and simulated goodput against GPUs."""
    table = _table("More or fewer GPUs (strong: the same global batch; weak: the same images a GPU, fewer steps)")
    for head in ("GPUs", "scaling", "global batch", "hours", "USD", "goodput", "bound by"):
        table.add_column(head, justify="right")
    for p in points:
        table.add_row(
            f"{p.num_gpus:,}",
            p.scaling,
            f"{p.global_batch:,}",
            f"{p.hours:,.3g}",
            f"{p.cost:,.0f}",
            f"{p.goodput:.4f}",
            p.bottleneck,
        )
    return table


def comparison_table(comparison: Comparison) -> Table:
    """Layouts by time: the fastest that fit, the cheapest wherever it stands, and some that do not fit."""
    ranked = sorted(comparison.rows, key=lambda row: (row.hours, row.stage))
    fitting = [row for row in ranked if row.fits]
    shown = fitting[:_SHOWN_ROWS]
    named = [row for row in fitting if row is comparison.cheapest or row.recipe]
    shown += [row for row in named if not any(row is other for other in shown)]
    unfit = [row for row in ranked if not row.fits]
    shown += sorted(unfit, key=lambda row: not row.recipe)[:_SHOWN_UNFIT]
    table = _table(
        f"Layouts by time, those that fit first ({len(shown)} of {len(ranked)}, {len(fitting)} fit; --json has all)"
    )
    for head in ("GPUs", "ZeRO", "images", "accum.", "ckpt", "GB", "fits", "hours", "USD", ""):
        table.add_column(head, justify="right")
    for row in shown:
        marks = [name for name in ("fastest", "cheapest") if row is getattr(comparison, name)]
        marks += ["recipe"] * row.recipe
        table.add_row(
            str(row.num_gpus),
            str(row.stage),
            str(row.micro_batch),
            str(row.accumulation),
            "yes" if row.checkpointed else "no",
            f"{row.memory_bytes / 1e9:.2f}",
            "yes" if row.fits else "no",
            f"{row.hours:,.2f}",
            f"{row.cost:,.0f}",
            ", ".join(marks),
        )
    return table


def notes(plan: Plan) -> str:
    """What the numbers rest on."""
    lines = [
        f"{source.name} = {source.value:g}: {source.source}"
        + (f" ({source.date}, {source.status})" if source.date else "")
        for source in sources(plan)
    ]
    return "Numbers used (all in medim_ray/plan/constants.yaml):\n  " + "\n  ".join(lines)
