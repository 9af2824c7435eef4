"""How many worker groups fit side by side, so that none waits for what another holds a part of."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medim_ray.config.loader import load, to_tree
from medim_ray.config.probe import ProbeConfig
from medim_ray.config.schema import RunConfig
from medim_ray.session import store_of
from medim_ray.studies.runner import Group, Search, _what, concurrency
from medim_ray.studies.space import Point, SearchSpace, make_trial
from medim_ray.studies.trials import Record, Report, TrialJob, write_record
from medim_ray.train.build import stream_bytes

RECIPE = Path(__file__).parents[3] / "configs/debug/medim-vit_tiny-2w-z1.yaml"


def _group(workers: int, cpus: float = 1.0, gpus: float = 0.0) -> Group:
    return Group(workers=workers, cpus=cpus, gpus=gpus, beside=0.35)


def test_a_group_never_counts_parts_of_nodes_that_hold_no_whole_worker() -> None:
    nodes = [{"CPU": 7.0}, {"CPU": 7.0}]
    assert concurrency(_group(2, cpus=4.0), nodes) == 1, "14 CPUs, but one worker of four a node"
    assert concurrency(_group(1, cpus=4.0), nodes) == 2
    assert concurrency(_group(1, cpus=8.0), nodes) == 0


def test_the_streams_of_all_groups_have_room_in_the_object_store(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(RunConfig, RECIPE, ["encoder.image_size=448"])
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    group = Group.of([load(RunConfig, RECIPE, []), config])
    assert group.stream == stream_bytes(config) and group.store_bytes == store_of(8 // group.workers * group.stream)


def test_gpus_bound_it_where_workers_ask_for_them() -> None:
    nodes = [{"CPU": 64.0, "GPU": 8.0}] * 2 + [{"CPU": 64.0}]
    assert concurrency(_group(8, gpus=1.0), nodes) == 2
    assert concurrency(_group(16, gpus=1.0), nodes) == 1
    assert concurrency(_group(17, gpus=1.0), nodes) == 0


def test_the_processes_beside_the_workers_have_room_too() -> None:
    assert concurrency(_group(1), [{"CPU": 2.0}]) == 1, "2 x 1.35 CPUs are more than 2"
    assert concurrency(_group(1), [{"CPU": 2.7}]) == 2


@given(st.integers(1, 6), st.sampled_from([0.5, 1.0, 2.0]), st.lists(st.integers(1, 16), min_size=1, max_size=4))
def test_all_groups_that_are_let_in_fit_at_once(workers: int, cpus: float, sizes: list[int]) -> None:
    group = _group(workers, cpus)
    nodes = [{"CPU": float(size)} for size in sizes]
    at_once = concurrency(group, nodes)
    assert at_once * workers <= sum(int(size // cpus) for size in sizes)
    assert at_once * (workers * cpus + group.beside) <= sum(sizes) + 1e-6


@given(st.integers(1, 8), st.sampled_from([0.5, 1.0, 2.0]))
def test_a_ray_that_is_started_here_holds_at_least_one_group(workers: int, cpus: float) -> None:
    group = _group(workers, cpus)
    assert concurrency(group, [{"CPU": float(group.logical_cpus)}]) >= 1


def test_a_finished_trial_is_done_for_the_probe_and_shards_that_it_was_asked_with(tmp_path: Path) -> None:
    trial = make_trial(RECIPE, (), Point({}, ()), str(tmp_path))
    probe = ProbeConfig(labels=("view",))
    reports = (Report(trial.config.train.steps, {}, {}),)
    record = Record(state="finished", data_hash="abc", probe=to_tree(probe), reports=reports, attempts=1)
    write_record(trial.config.run.dir, record)
    job = TrialJob(
        base={}, space=SearchSpace(()), runs=str(tmp_path), data_hash="abc", rungs=(), probe=probe, metric="auroc.mean"
    )
    search = Search(kind="list", trials=[trial])
    assert _what(job, search)[2] == 0
    assert _what(replace(job, probe=replace(probe, tasks=("labels", "retrieve"))), search)[2] == 1
    with pytest.raises(ValueError, match="trained on other shards"):
        _what(replace(job, data_hash="def"), search)
