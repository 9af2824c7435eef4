"""A plan on other numbers of GPUs."""

from __future__ import annotations

import dataclasses

import pytest

from medim_ray.config.loader import load
from medim_ray.config.schema import RunConfig
from medim_ray.plan.clusters import resolve
from medim_ray.plan.curves import curve
from medim_ray.plan.planner import make_plan
from tests.unit.plan.conftest import RECIPE
from tests.unit.plan.layouts import GPUS


def test_goodput_on_the_curve_is_simulated_and_the_plans_own_at_its_size() -> None:
    config = load(RunConfig, None, RECIPE)
    calm = {p.num_gpus: p.goodput for p in curve(make_plan(config, resolve(GPUS)), 1024)}
    plan = make_plan(config, resolve(dataclasses.replace(GPUS, stragglers_per_node_day=4)))
    slow = {p.num_gpus: p.goodput for p in curve(plan, 1024)}
    assert slow[16] == plan.goodput.simulated < 0.95
    assert all(slow[num] < calm[num] for num in slow)
    assert slow[1] > slow[64] > slow[1024]
    # One slow node slows all: at 128 nodes one is slow nearly always, and the step takes 1.5 times as long.
    assert slow[1024] == pytest.approx(1 / 1.5, abs=0.02)


def test_stragglers_cost_the_same_where_nothing_ever_fails() -> None:
    never = dataclasses.replace(GPUS, stragglers_per_node_day=4, mtbf_gpu_hours=float("inf"))
    points = curve(make_plan(load(RunConfig, None, RECIPE), resolve(never)), 1024)
    assert points[-1].goodput == pytest.approx(1 / 1.5, abs=0.02)


def test_what_does_not_fit_is_on_neither_curve() -> None:
    """At stage 3 a device holds less the more there are."""
    options = [*RECIPE, "train.zero=3", "train.num_workers=64", "train.global_batch=1024"]
    config = load(RunConfig, None, options)
    need = make_plan(config, resolve(GPUS)).memory[3, False].total / 1e9
    tight = resolve(dataclasses.replace(GPUS, memory_gb=need * 1.002 / 0.95))
    weak = [p.num_gpus for p in curve(make_plan(config, tight), 1024) if p.scaling == "weak"]
    assert min(weak) > 1 and 64 in weak and 1024 in weak
