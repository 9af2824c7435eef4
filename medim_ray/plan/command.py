"""`medim-ray plan`: a recipe and a cluster in, a table, JSON or a page out. The arithmetic is in planner.py."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from medim_ray.config.loader import load
from medim_ray.config.schema import RunConfig
from medim_ray.plan import compare as layouts
from medim_ray.plan import facts, page, tables
from medim_ray.plan.clusters import load_cluster
from medim_ray.plan.compare import Comparison
from medim_ray.plan.constants import OUR_CODE
from medim_ray.plan.curves import Point, curve
from medim_ray.plan.facts import Check
from medim_ray.plan.planner import Plan, make_plan

_OTHER_CODE = (
    "planned as the code {name!r} (drop path, overlap and checkpointing are its own), not as `medim-ray pretrain` runs "
    "it: cluster.code=medim_ray plans that"
)
_LOST_TO = ("saving", "lost", "restarting", "waiting", "slow")


def run_plan(
    recipe_file: str | Path | None,
    overrides: Sequence[str],
    *,
    as_json: bool = False,
    compare: bool = False,
    html: str | Path | None = None,
) -> int:
    """Plans and prints; exit code 0. ValueError with field and fix for bad input.

    overrides: `cluster=FILE` (required), `cluster.key=value`, and dotted options of the recipe. With as_json, stdout
    holds one JSON object and nothing else.
    """
    if html is not None and not str(html).strip():
        raise ValueError("--html is empty: give a file such as plan.html, or a folder such as a run's")
    cluster_file, cluster_overrides, recipe_overrides = split_overrides(overrides)
    config = load(RunConfig, recipe_file, recipe_overrides)
    cluster = load_cluster(cluster_file, cluster_overrides)
    plan = make_plan(config, cluster)
    fact = facts.fact_of(config, cluster.config)
    check = facts.check(fact, config, cluster) if fact is not None else None
    if fact is None and cluster.code.name != OUR_CODE:
        plan = dataclasses.replace(plan, warnings=(*plan.warnings, _OTHER_CODE.format(name=cluster.code.name)))
    comparison = layouts.compare(plan) if compare else None
    points = curve(plan)
    place = page.write_page(plan, points, html, check, comparison) if html is not None else None
    if as_json:
        print(json.dumps(_plain(as_tree(plan, points, check, comparison)), indent=2, allow_nan=False))
        return 0
    console = Console()
    for renderable in tables.render(plan, points, check, comparison):
        console.print(renderable)
    if place is not None:
        console.print(f"page: {place}", soft_wrap=True)
    return 0


def split_overrides(overrides: Sequence[str]) -> tuple[str, list[str], list[str]]:
    """The cluster file, the cluster's overrides (without `cluster.`) and the recipe's."""
    files = [text.partition("=")[2] for text in overrides if text.startswith("cluster=")]
    if len(files) > 1:
        raise ValueError(f"cluster is given {len(files)} times ({', '.join(files)}): give cluster=FILE once")
    if not files or not files[0]:
        raise ValueError(
            "cluster is missing: give cluster=FILE once, such as cluster=configs/clusters/rad_dino_public.yaml"
        )
    own = [text.removeprefix("cluster.") for text in overrides if text.startswith("cluster.")]
    return files[0], own, [text for text in overrides if not text.startswith(("cluster=", "cluster."))]


def _plain(value: Any) -> Any:
    """The same tree with null for what is infinite (no failures, a run that never ends), which JSON has no word for."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_tree(plan: Plan, points: Sequence[Point], check: Check | None, comparison: Comparison | None) -> dict[str, Any]:
    """The plan as plain JSON values. Bytes, seconds, hours; memory is of one GPU at the recipe's micro-batch."""
    g, step, setting = plan.goodput, plan.step, plan.setting
    stages = sorted({stage for stage, _ in plan.memory})
    tree: dict[str, Any] = {
        "hours": plan.hours,
        "days": plan.hours / 24.0,
        "cost": plan.bill.cost,
        "currency": "USD",
        "code": plan.cluster.code.name,
        "gpu_hours": plan.bill.gpu_hours,
        "energy_kwh": plan.bill.energy_kwh,
        "co2_kg": plan.bill.co2_kg,
        "bottleneck": plan.bottleneck.words,
        "bottleneck_kind": plan.bottleneck.kind,
        "lift": plan.bottleneck.lift,
        "fits": plan.fits,
        "warnings": list(plan.warnings),
        "memory_limit_bytes": int(plan.cluster.memory_bytes),
        "memory_bytes": {str(s): int(plan.memory[s, False].total) for s in stages},
        "memory_bytes_checkpointed": {str(s): int(plan.memory[s, True].total) for s in stages},
        "memory_parts": {str(s): dataclasses.asdict(plan.memory[s, False]) for s in stages},
        "largest_micro_batch": {str(s): plan.largest[s, False] for s in stages},
        "largest_micro_batch_checkpointed": {str(s): plan.largest[s, True] for s in stages},
        "step_s": step.total,
        "step_parts": dataclasses.asdict(step),
        "images_per_s": plan.images_per_s,
        "flops_per_image": plan.work.flops(setting.checkpointed),
        "utilisation": plan.cluster.utilisation,
        "mfu": plan.mfu,
        "setting": dataclasses.asdict(setting),
        "num_parameters": {"trained": plan.work.num_trained, "frozen": plan.work.num_frozen},
        "decode_cores": plan.decode_cores,
        "storage_bytes_per_s": plan.storage_bytes_per_s,
        "goodput": {
            "mtbf_hours": g.faults.mtbf_s / 3600.0,
            "save_s": g.faults.save_s,
            "restart_s": g.faults.restart_s,
            "interval_young_s": g.young_s,
            "interval_daly_s": g.daly_s,
            "interval_recipe_s": g.recipe_interval_s,
            "formula": g.formula,
            "simulated": g.simulated,
            "simulated_at_recipe_interval": g.recipe_simulated,
            "lost_to": {k: getattr(g.outcome, k) / g.outcome.wall for k in _LOST_TO},
            "hours": plan.hours_with_failures,
            "cost": plan.bill.cost * plan.hours_with_failures / plan.hours,
        },
        "curve": [dataclasses.asdict(point) for point in points],
        "sources": [dataclasses.asdict(source) for source in tables.sources(plan)],
    }
    if check is not None:
        tree["fact"] = {**dataclasses.asdict(check), "ratio": check.ratio, "sentences": check.sentences()}
    if comparison is not None:
        tree["comparison"] = dataclasses.asdict(comparison)
    return tree
