"""The epoch plan: a permutation a epoch, the same samples in a step whatever the transport, reads by row group."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medim_ray.data.collate import steps_of_rank
from medim_ray.data.plan import RowGroup, StreamPlan
from medim_ray.data.reader import STEP


def make_plan(**changes: int) -> StreamPlan:
    options: dict[str, Any] = {"seed": 3, "global_batch": 8, "granules_per_step": 4, "shuffle_window": 2}
    options |= {"window_steps": 3} | changes
    groups = [RowGroup(file=i // 3, index=i % 3, num_rows=5 + i % 2) for i in range(12)]
    return StreamPlan(groups, **options)


def test_an_epoch_holds_every_image_at_most_once_and_orders_differ() -> None:
    plan = make_plan()
    rows = np.concatenate([plan.step_rows(s) for s in range(plan.steps_per_epoch)])
    assert len(np.unique(rows)) == len(rows) == plan.steps_per_epoch * 8
    assert sorted(plan.epoch_order(0)) == list(range(plan.num_rows))
    assert not np.array_equal(plan.epoch_order(0), plan.epoch_order(1))
    assert not np.array_equal(plan.epoch_order(0), make_plan(seed=4).epoch_order(0))


def test_rows_are_mixed_within_a_window_of_row_groups_only() -> None:
    plan = make_plan(shuffle_window=2)
    groups, _ = plan.locate(plan.epoch_order(0))
    at = 0
    while at < len(groups):
        window = set(groups[at : at + 10])
        num = sum(plan.row_groups[g].num_rows for g in window)
        assert len(window) == 2 and set(groups[at : at + num]) == window
        at += num


@settings(max_examples=30, deadline=None)
@given(
    num_workers=st.sampled_from([1, 2, 4]),
    window_steps=st.integers(1, 5),
    first_step=st.integers(0, 20),
    shuffle_window=st.integers(1, 6),
)
def test_ranks_together_see_the_step_of_the_plan(
    num_workers: int, window_steps: int, first_step: int, shuffle_window: int
) -> None:
    plan = make_plan(window_steps=window_steps, shuffle_window=shuffle_window)
    last_step = first_step + 7
    seen: dict[int, list[int]] = {}
    for rank in range(num_workers):
        dealt = [
            plan.block(k, first_step) for k in range(plan.num_blocks(first_step, last_step)) if k % num_workers == rank
        ]
        blocks = [{STEP: b.steps_K, "row": b.rows_K, "place": b.positions_K} for b in dealt]
        for columns in steps_of_rank(blocks, plan.granules_per_step // num_workers):
            step = int(columns[STEP][0])
            assert np.array_equal(plan.step_rows(step)[columns["place"]], columns["row"])
            seen.setdefault(step, []).extend(columns["row"].tolist())
    for step in range(first_step, last_step):
        assert sorted(seen[step]) == sorted(plan.step_rows(step).tolist())


def test_blocks_are_of_equal_size_and_epochs_follow_steps() -> None:
    plan = make_plan()
    blocks = [plan.block(k, 5) for k in range(plan.num_blocks(5, 16))]
    assert {len(b.rows_K) for b in blocks} == {3 * 2}
    assert all((b.epochs_K == b.steps_K // plan.steps_per_epoch).all() for b in blocks)


def test_fewer_images_than_a_global_batch_is_an_error_with_the_fix() -> None:
    with pytest.raises(ValueError, match="global_batch=8 is larger than the 5 images"):
        StreamPlan([RowGroup(0, 0, 5)], seed=0, global_batch=8, granules_per_step=1, shuffle_window=1, window_steps=1)


def test_a_million_rows_are_planned_in_seconds() -> None:
    groups = [RowGroup(file=0, index=i, num_rows=64) for i in range(1_000_000 // 64)]
    plan = StreamPlan(groups, seed=0, global_batch=64, granules_per_step=4, shuffle_window=16, window_steps=4)
    assert len(np.unique(plan.epoch_order(2))) == plan.num_rows


WEIGHTS = st.lists(st.floats(0.05, 20), min_size=1, max_size=4)


def make_mixed(weights: list[float], sizes: tuple[int, ...] = (90, 17, 30, 8)) -> StreamPlan:
    groups = [
        RowGroup(file=o, index=i, num_rows=min(5, sizes[o] - 5 * i), origin=o)
        for o in range(len(weights))
        for i in range(-(-sizes[o] // 5))
    ]
    return StreamPlan(
        groups, seed=3, global_batch=8, granules_per_step=4, shuffle_window=2, window_steps=3, weights=weights
    )


@settings(max_examples=60, deadline=None)
@given(weights=WEIGHTS)
def test_weights_are_kept_at_every_moment_and_no_row_is_seen_twice_in_a_pass(weights: list[float]) -> None:
    plan = make_mixed(weights)
    origins_R = np.repeat([g.origin for g in plan.row_groups], [g.num_rows for g in plan.row_groups])
    blocks = [plan.block(k, 0) for k in range(plan.num_blocks(0, 30))]
    steps = np.concatenate([b.steps_K for b in blocks])
    rows, passes = (np.concatenate([getattr(b, name) for b in blocks]) for name in ("rows_K", "epochs_K"))
    assert len(set(zip(rows.tolist(), passes.tolist(), strict=True))) == len(rows) == 30 * 8
    for step in range(30):
        seen = origins_R[rows[steps <= step]]
        for origin, share in enumerate(plan.shares):
            assert abs((seen == origin).sum() - share * len(seen)) <= len(weights)
    for origin in range(len(weights)):
        of_origin = origins_R[rows] == origin
        counts = np.bincount(passes[of_origin]) if of_origin.any() else np.array([0])
        assert (counts[:-1] == (origins_R == origin).sum()).all(), "every pass but the last is whole"


def test_a_stream_with_weights_is_a_function_of_the_step() -> None:
    whole, later = make_mixed([3.0, 1.0, 1.0]), make_mixed([3.0, 1.0, 1.0])
    for step in (41, 3, 17):
        assert np.array_equal(whole.step_rows(step), later.step_rows(step))
    block, again = whole.block(2, 6), later.block(0, 9)  # slot 2 of steps 6, 7, 8 and slot 0 of steps 9, 10, 11
    assert np.array_equal(block.rows_K[:2], whole.step_rows(6)[4:6]) and np.array_equal(again.steps_K[:2], [9, 9])


def test_one_origin_of_any_weight_sees_whole_epochs_of_its_rows() -> None:
    plan = make_mixed([2.5], sizes=(40,))
    assert sorted(plan.epoch_order(0)) == list(range(40)) == sorted(plan.epoch_order(1))


def test_a_share_of_the_images_is_nested_and_every_epoch_deals_just_these() -> None:
    groups = [RowGroup(0, i, 10) for i in range(10)]
    kept = {}
    for num in (20, 60, 100):
        plan = StreamPlan(
            groups, seed=3, global_batch=10, granules_per_step=1, shuffle_window=2, window_steps=1, num_kept=num
        )
        assert plan.steps_per_epoch == num // 10
        epochs = [set(plan.epoch_order(epoch).tolist()) for epoch in (0, 1)]
        assert epochs[0] == epochs[1] and len(epochs[0]) == num
        assert plan.epoch_order(0).tolist() != plan.epoch_order(1).tolist()
        kept[num] = epochs[0]
    assert kept[20] < kept[60] < kept[100]
