"""Checkpoint intervals and the simulation of failures, against formulas."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medim_ray.plan.goodput import Faults, Outcome, daly_goodput, daly_s, simulate, young_s

HOUR = 3600.0
# One node that is replaced at once: what Daly's formula describes.
DALY = Faults(num_nodes=1, failure_rate=1 / (5 * HOUR), save_s=60.0, restart_s=300.0, replacement_s=1e-6, elastic=False)


def mean_goodput(faults: Faults, work_s: float, interval_s: float, runs: int = 8) -> float:
    return sum(simulate(faults, work_s, interval_s, seed).goodput for seed in range(runs)) / runs


def parts(outcome: Outcome) -> float:
    known = outcome.saving + outcome.lost + outcome.restarting + outcome.waiting
    return outcome.work + known + outcome.slow


def test_young_and_daly_agree_where_saving_is_cheap() -> None:
    assert young_s(10_000.0, 2.0) == 200.0
    assert daly_s(1e6, 1.0) == pytest.approx(young_s(1e6, 1.0), rel=0.01)
    assert daly_s(10.0, 30.0) == 10.0


@settings(max_examples=50, deadline=None)
@given(mtbf=st.floats(600, 1e6), save=st.floats(0.5, 60))
def test_dalys_interval_is_the_best_one_of_his_formula(mtbf: float, save: float) -> None:
    best = daly_s(mtbf, save)
    at_best = daly_goodput(best, mtbf, save, 30.0)
    assert at_best >= daly_goodput(best * 1.3, mtbf, save, 30.0)
    assert at_best >= daly_goodput(best / 1.3, mtbf, save, 30.0)


@pytest.mark.parametrize("factor", [0.3, 1.0, 3.0])
def test_the_simulation_agrees_with_dalys_formula(factor: float) -> None:
    interval = factor * daly_s(DALY.mtbf_s, DALY.save_s)
    simulated = mean_goodput(DALY, 1000 * HOUR, interval)
    assert simulated == pytest.approx(daly_goodput(interval, DALY.mtbf_s, DALY.save_s, DALY.restart_s), abs=0.01)


def test_without_faults_only_checkpoints_cost_time() -> None:
    calm = dataclasses.replace(DALY, failure_rate=0.0)
    outcome = simulate(calm, 1000.0, 100.0)
    # Nine checkpoints of 60 s; the end of the run is not one of them.
    assert outcome.wall == pytest.approx(1000.0 + 9 * 60.0)
    assert outcome.num_losses == outcome.lost == 0
    assert math.isinf(calm.mtbf_s)


def test_a_seed_gives_one_outcome() -> None:
    assert simulate(DALY, 100 * HOUR, HOUR, 3) == simulate(DALY, 100 * HOUR, HOUR, 3)
    assert simulate(DALY, 100 * HOUR, HOUR, 3) != simulate(DALY, 100 * HOUR, HOUR, 4)


def test_a_preemption_with_notice_loses_no_work() -> None:
    spot = Faults(
        num_nodes=4, failure_rate=0.0, save_s=30.0, restart_s=60.0, preemption_rate=2 / 86_400, notice_s=120.0
    )
    warned = simulate(spot, 200 * HOUR, HOUR, 1)
    assert warned.num_losses > 20
    assert warned.lost == 0.0
    sudden = simulate(dataclasses.replace(spot, notice_s=10.0), 200 * HOUR, HOUR, 1)
    assert sudden.lost > 0.0


def test_elastic_runs_beat_waiting_where_nodes_come_back_slowly() -> None:
    faults = Faults(
        num_nodes=8, failure_rate=1 / (100 * HOUR), save_s=10.0, restart_s=60.0, replacement_s=2 * HOUR, elastic=True
    )
    interval = daly_s(faults.mtbf_s, faults.save_s)
    waiting = dataclasses.replace(faults, elastic=False)
    assert mean_goodput(faults, 300 * HOUR, interval) > mean_goodput(waiting, 300 * HOUR, interval) + 0.05
    outcome = simulate(faults, 300 * HOUR, interval)
    assert outcome.waiting == 0.0
    assert outcome.num_resizes > 0
    assert simulate(waiting, 300 * HOUR, interval).waiting > 0.0


def test_stragglers_slow_the_run_by_their_share_of_the_time() -> None:
    slow = Faults(
        num_nodes=10,
        failure_rate=0.0,
        save_s=0.0,
        restart_s=0.0,
        straggler_rate=1 / 86_400,
        straggler_slowdown=2.0,
        straggler_s=600.0,
    )
    goodput = mean_goodput(slow, 500 * HOUR, HOUR, runs=3)
    share = 1 - math.exp(-10 * 600 / 86_400)  # of the time with at least one slow node
    assert goodput == pytest.approx(1 - share / 2, abs=0.01)


def test_a_run_that_cannot_come_forward_is_given_up() -> None:
    """Each of 16 nodes goes every 17 s, a restart takes 55 s: nothing is ever trained, and the simulation ends."""
    storm = Faults(num_nodes=16, failure_rate=0.0, save_s=1.0, restart_s=55.0, preemption_rate=1 / 17)
    outcome = simulate(storm, 100 * HOUR, HOUR)
    assert outcome.goodput < 0.01
    assert parts(outcome) == pytest.approx(outcome.wall)
    assert outcome.restarting + outcome.waiting > 0.9 * outcome.wall
    assert daly_goodput(60.0, 1.0, 1.0, 1e9) == 0.0


def test_the_parts_of_an_outcome_add_up() -> None:
    faults = dataclasses.replace(
        DALY, num_nodes=4, elastic=True, replacement_s=600.0, preemption_rate=1e-5, straggler_rate=1e-5
    )
    outcome = simulate(faults, 300 * HOUR, HOUR, 5)
    assert parts(outcome) == pytest.approx(outcome.wall)
    assert outcome.slow > 0


def test_goodput_falls_with_the_number_of_nodes() -> None:
    values = []
    for nodes in (1, 100, 1250):
        mtbf = 50_000 / 8 * HOUR / nodes
        values.append(daly_goodput(daly_s(mtbf, 20.0), mtbf, 20.0, 60.0))
    assert values[0] > values[1] > values[2] > 0.9
