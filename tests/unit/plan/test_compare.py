"""Layouts side by side: the recipe's own among them, and none better than those that are marked."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medim_ray.config.loader import load
from medim_ray.config.schema import RunConfig
from medim_ray.plan.clusters import Cluster, resolve
from medim_ray.plan.compare import compare, worker_counts
from medim_ray.plan.planner import make_plan
from tests.unit.plan.conftest import RECIPE
from tests.unit.plan.layouts import GPUS


def of_nodes(num_nodes: int, code: str = "dinov2") -> Cluster:
    return resolve(dataclasses.replace(GPUS, num_nodes=num_nodes, code=code))


@pytest.mark.parametrize("num_nodes", [3, 8, 2500])
@pytest.mark.parametrize("batch", [("train.global_batch=512",), ("train.global_batch=2912", "train.micro_batch=13")])
def test_the_recipe_is_listed_and_nothing_beats_what_is_marked(num_nodes: int, batch: tuple[str, ...]) -> None:
    """Clusters whose halves do not divide the batch, and a batch with few powers of two."""
    plan = make_plan(load(RunConfig, None, [*RECIPE, *batch]), of_nodes(num_nodes))
    found = compare(plan)
    (own,) = [row for row in found.rows if row.recipe]
    assert (own.hours, own.cost, own.fits) == (plan.hours, plan.bill.cost, plan.fits)
    assert found.fastest is not None and found.cheapest is not None
    fitting = [row for row in found.rows if row.fits]
    assert found.fastest.hours == min(row.hours for row in fitting) <= plan.hours
    assert found.cheapest.cost == min(row.cost for row in fitting) <= plan.bill.cost
    assert len(found.rows) < 2000
    assert all(row.num_gpus * row.micro_batch * row.accumulation == plan.setting.global_batch for row in found.rows)


def test_the_largest_micro_batch_that_fits_is_listed() -> None:
    plan = make_plan(load(RunConfig, None, [*RECIPE, "train.num_workers=8", "train.micro_batch=8"]), of_nodes(8))
    for stage in range(4):
        sizes = [r.micro_batch for r in compare(plan).rows if r.num_gpus == 8 and r.stage == stage and r.fits]
        most = max(d for d in range(1, plan.largest[stage, True] + 1) if 64 % d == 0)
        assert max(sizes) == most


def test_layouts_are_compared_with_and_without_checkpointing() -> None:
    rows = compare(make_plan(load(RunConfig, None, [*RECIPE, "train.activation_checkpointing=true"]), of_nodes(8))).rows
    assert {row.checkpointed for row in rows} == {False, True}
    assert [row.checkpointed for row in rows if row.recipe] == [True]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40_000), st.integers(1, 12_000), st.data())
def test_worker_counts_divide_the_batch_and_hold_the_recipe(total: int, num_gpus: int, data: st.DataObject) -> None:
    divisors = [d for d in range(1, min(total, num_gpus) + 1) if total % d == 0]
    own = data.draw(st.sampled_from(divisors))
    counts = worker_counts(total, num_gpus, own)
    assert {1, own, divisors[-1]} <= set(counts) <= set(divisors)
    assert len(counts) <= 30
