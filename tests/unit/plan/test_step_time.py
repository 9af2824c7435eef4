"""Step time: scaling, rings, overlap, decoding and storage."""

from __future__ import annotations

import dataclasses

import pytest

from medim_ray.config.schema import RunConfig
from medim_ray.plan.clusters import Cluster, resolve
from medim_ray.plan.constants import assumption
from medim_ray.plan.facts import setting_of
from medim_ray.plan.planner import Plan, make_plan
from medim_ray.plan.step_time import Setting, decode_core_s, ring_s, step_time
from medim_ray.plan.workload import Workload, workload
from tests.unit.plan.layouts import GPUS


@pytest.fixture
def work(recipe: RunConfig, gpus: Cluster) -> Workload:
    return workload(recipe, gpus.code)


@pytest.fixture
def setting(recipe: RunConfig) -> Setting:
    return setting_of(recipe)


def test_compute_is_operations_over_peak_times_utilisation(gpus: Cluster, work: Workload, setting: Setting) -> None:
    step = step_time(gpus, work, setting, utilisation=0.5)
    assert step.compute == pytest.approx(32 * work.flops(False) / (0.5 * 312e12))
    assert step_time(gpus, work, setting, utilisation=0.25).compute == pytest.approx(2 * step.compute)


def test_one_gpu_does_not_communicate(gpus: Cluster, work: Workload, setting: Setting) -> None:
    for stage in range(4):
        alone = dataclasses.replace(setting, num_gpus=1, stage=stage)
        assert step_time(gpus, work, alone).communication == 0


def test_a_ring_moves_its_volume_over_the_slowest_link(gpus: Cluster) -> None:
    efficiency = assumption("link_efficiency")
    in_node = ring_s(gpus, 8, 1e9, 0)
    assert in_node == pytest.approx(7 / 8 * 1e9 / (300e9 * efficiency))
    between = ring_s(gpus, 16, 1e9, 0)
    assert between == pytest.approx(15 / 16 * 1e9 / (200e9 * efficiency))
    latency = 14 * assumption("intra_node_latency_s") + assumption("inter_node_latency_s")
    assert ring_s(gpus, 16, 1e9, 3) - between == pytest.approx(3 * latency)


@pytest.mark.parametrize(("stage", "volume"), [(0, 4.0), (1, 2.0), (2, 2.0)])
def test_volumes_of_the_zero_paper(gpus: Cluster, work: Workload, setting: Setting, stage: int, volume: float) -> None:
    single = dataclasses.replace(setting, stage=stage)
    expected = ring_s(gpus, 16, volume * 2 * work.num_trained, 2)
    assert step_time(gpus, work, single).communication == pytest.approx(expected)


def test_stage_two_reduces_at_every_forward_and_stage_one_once(gpus: Cluster, work: Workload, setting: Setting) -> None:
    split = dataclasses.replace(setting, micro_batch=8, accumulation=4)
    by_stage = [step_time(gpus, work, dataclasses.replace(split, stage=s)).communication for s in range(4)]
    assert by_stage[0] == pytest.approx(2 * by_stage[1], rel=0.05)  # float32 gradients
    assert by_stage[2] == pytest.approx(2.5 * by_stage[1], rel=0.05)
    assert by_stage[3] > by_stage[2]


def test_overlap_hides_communication_behind_the_backward_pass(gpus: Cluster, work: Workload, setting: Setting) -> None:
    ours = step_time(gpus, work, dataclasses.replace(setting, stage=2))
    theirs = step_time(resolve(dataclasses.replace(GPUS, code="dinov2")), work, dataclasses.replace(setting, stage=2))
    assert ours.exposed == ours.communication == theirs.communication
    assert theirs.exposed == pytest.approx(0.2 * theirs.communication)


def test_too_few_cores_make_decoding_the_bound(gpus: Cluster, work: Workload, setting: Setting) -> None:
    poor = resolve(dataclasses.replace(GPUS, cores_per_node=9))
    step = step_time(poor, work, setting)
    assert step.decode == pytest.approx(512 * decode_core_s(work) / 2)  # two nodes with one core beside 8 workers
    assert step.total == max(step.decode, step.train)
    assert step_time(gpus, work, setting).decode < step.decode


def test_one_radiograph_costs_a_core_what_was_measured() -> None:
    """STACK.md: 1,200 to 1,390 images per CPU-second for 512 px -> 224 with DCT scaling, 810 with PIL."""
    plain = Workload(
        name="x",
        passes=(),
        num_trained=1,
        num_frozen=0,
        num_tensors=1,
        element_bytes=4,
        views=(),
        reads_text=False,
        image_bytes=0,
        stored_pixels=512**2,
        cut_pixels=512**2 * (224 / 240) ** 2,
    )
    assert 810 < 1 / decode_core_s(plain) < 1390


def test_slow_storage_is_the_bound(work: Workload, setting: Setting) -> None:
    slow = resolve(dataclasses.replace(GPUS, storage=0.001))
    step = step_time(slow, work, setting)
    assert step.total == step.storage > step.train


@pytest.mark.parametrize("cores", [4, 8, 9, 10])
def test_the_cores_that_are_asked_for_lift_the_bottleneck_and_one_less_does_not(recipe: RunConfig, cores: int) -> None:
    def plan_with(num: int) -> Plan:
        return make_plan(recipe, resolve(dataclasses.replace(GPUS, cores_per_node=num)))

    said = plan_with(cores).bottleneck
    assert said.kind == "decode"
    need = int(said.lift.removeprefix("about ").split(" ")[0])
    assert need > cores
    assert plan_with(need).bottleneck.kind != "decode"
    assert plan_with(need - 1).bottleneck.kind == "decode"


def test_the_link_that_is_named_is_the_slowest(recipe: RunConfig) -> None:
    for slow, words in (("intra_node", "in the node"), ("inter_node", "between nodes")):
        said = make_plan(recipe, resolve(dataclasses.replace(GPUS, **{slow: 0.05}))).bottleneck  # type: ignore[arg-type]
        assert said.kind == "communication"
        assert words in said.words and f"a faster link {words}" in said.lift


def test_the_reads_that_are_asked_for_are_more_than_there_are(recipe: RunConfig) -> None:
    enough = make_plan(recipe, resolve(GPUS)).storage_bytes_per_s / 1e9
    said = make_plan(recipe, resolve(dataclasses.replace(GPUS, storage=enough * 0.9999))).bottleneck
    assert said.kind == "storage"
    asked = float(said.lift.split(" ")[0])
    assert asked >= enough
    assert make_plan(recipe, resolve(dataclasses.replace(GPUS, storage=asked))).bottleneck.kind != "storage"


def test_a_ring_has_a_hop_a_gpu(gpus: Cluster) -> None:
    """64 GPUs on 8 nodes: 63 hops, 7 of them between nodes."""
    latency = 56 * assumption("intra_node_latency_s") + 7 * assumption("inter_node_latency_s")
    assert ring_s(gpus, 64, 0.0, 1) == pytest.approx(latency)
