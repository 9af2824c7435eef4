"""Memory by ZeRO stage: the formulas of the ZeRO paper, and what follows from them."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medim_ray.config.loader import load
from medim_ray.config.schema import RunConfig
from medim_ray.objectives import OBJECTIVES
from medim_ray.plan.clusters import Cluster, resolve
from medim_ray.plan.memory import STAGES, fits, largest_micro_batch, lowest_stage, memory
from medim_ray.plan.planner import make_plan
from medim_ray.plan.workload import Workload, workload
from medim_ray.train.fit import estimate
from tests.unit.plan.conftest import RECIPE
from tests.unit.plan.layouts import GPUS

WORK = Workload(
    name="x",
    passes=(),
    num_trained=1_000_000,
    num_frozen=0,
    num_tensors=1,
    element_bytes=2,
    views=(),
    reads_text=False,
    image_bytes=0.0,
    stored_pixels=1.0,
    cut_pixels=1.0,
)


@cache
def real_work(*more: str) -> Workload:
    return workload(load(RunConfig, None, ["encoder.name=vit_small_patch16_224", *more]), resolve(GPUS).code)


@pytest.mark.parametrize(("stage", "formula"), [(1, 2 + 2 + 12 / 8), (2, 2 + 2 / 8 + 12 / 8), (3, (2 + 2 + 12) / 8)])
def test_states_in_bf16_follow_the_zero_paper(stage: int, formula: float) -> None:
    work = dataclasses.replace(WORK, passes=real_work().passes)
    need = memory(work, stage=stage, num_gpus=8, micro_batch=1, checkpointed=False)
    assert need.states == pytest.approx(formula * 1e6)


def test_states_in_fp32_on_one_worker_are_sixteen_bytes_a_parameter() -> None:
    work = dataclasses.replace(WORK, passes=real_work().passes, element_bytes=4)
    need = memory(work, stage=0, num_gpus=1, micro_batch=1, checkpointed=False)
    assert need.states == 16e6
    assert need.buffers == 4e6  # the flat copy that is reduced
    assert need.gathered == 0


def test_a_save_on_its_way_is_a_copy_of_the_state_and_on_a_gpu_the_hosts() -> None:
    work = dataclasses.replace(WORK, passes=real_work().passes, num_frozen=500_000, pending_saves=2)
    layout = {"num_gpus": 4, "micro_batch": 1, "checkpointed": False}
    saves = [memory(work, stage=stage, on_cpu=True, **layout).saves for stage in STAGES]  # type: ignore[arg-type]
    assert saves == [2 * (12e6 + 2e6), *[2 * (3e6 + 2e6)] * 2, 2 * (3e6 + 0.5e6)]
    assert memory(work, stage=0, **layout).saves == 0  # type: ignore[arg-type]


def test_bf16_without_shards_is_autocast_over_float32() -> None:
    """train/zero.py: 4 bytes each for parameters, gradients and both moments, 2 for the 16-bit copies of a forward."""
    work = dataclasses.replace(WORK, passes=real_work().passes)
    need = memory(work, stage=0, num_gpus=8, micro_batch=1, checkpointed=False)
    assert need.states == 16e6
    assert need.gathered == 2e6


def test_the_larger_of_two_moments_is_told() -> None:
    """A large batch peaks in the backward pass; without one the optimizer's step is what is left."""
    work = dataclasses.replace(WORK, passes=real_work().passes, num_trained=10**9, element_bytes=4)
    layout = {"stage": 1, "num_gpus": 8, "checkpointed": False}
    few, many = (memory(work, micro_batch=b, **layout) for b in (1, 4000))  # type: ignore[arg-type]
    assert many.activations > 1e10 > few.activations
    assert few.buffers == many.buffers == 4 * (500e6 + 500e6) + 4e9 / 8  # bucket, its flat copy, the own share
    alone = memory(work, stage=3, num_gpus=1, micro_batch=0, checkpointed=False)
    assert alone.buffers == 4 * 500e6 + 4e9  # the bucket and the flat gradients; fused AdamW makes no temporaries


def test_a_cpu_keeps_what_was_freed_and_backs_only_what_is_written() -> None:
    work = dataclasses.replace(WORK, passes=real_work().passes, element_bytes=4)
    layout = {"stage": 2, "num_gpus": 1, "micro_batch": 0, "checkpointed": False}
    gpu, cpu = (memory(work, on_cpu=on_cpu, **layout) for on_cpu in (False, True))  # type: ignore[arg-type]
    assert gpu.buffers > 4 * 500e6 > cpu.buffers
    assert cpu.buffers == 2 * 4e6 + 4e6  # the bucket and its flat copy; the parameters as they were built


def test_a_report_encoder_brings_its_library() -> None:
    work = dataclasses.replace(WORK, passes=real_work().passes)
    layout = {"stage": 0, "num_gpus": 1, "micro_batch": 0, "checkpointed": False, "on_cpu": True}
    runtime = [memory(dataclasses.replace(work, reads_text=t), **layout).runtime for t in (False, True)]  # type: ignore[arg-type]
    assert runtime[1] - runtime[0] == pytest.approx(65e6)


def test_a_teacher_costs_four_bytes_and_is_shared_at_stage_three() -> None:
    work = dataclasses.replace(WORK, passes=real_work().passes, num_frozen=500_000)
    teacher = [memory(work, stage=s, num_gpus=4, micro_batch=1, checkpointed=False).teacher for s in STAGES]
    assert teacher == [2e6, 2e6, 2e6, 0.5e6]


def test_parameters_are_counted_from_the_objective_itself() -> None:
    config = load(RunConfig, None, ["objective.name=mae", "encoder.name=vit_small_patch16_224"])
    work = workload(config, resolve(GPUS).code)
    assert work.num_frozen == 0
    # timm: 21.67 M without the classifier; the decoder of two blocks of width 128 is small beside it.
    assert 21.6e6 < work.num_trained < 22.6e6


def test_a_rad_dino_run_has_a_teacher_as_large_as_its_student(recipe: RunConfig, gpus: Cluster) -> None:
    work = workload(recipe, gpus.code)
    width = 768
    assert work.num_trained - work.num_frozen == width  # the mask token is the student's alone
    assert set(OBJECTIVES) >= {"mae", "rad_dino"}


@settings(max_examples=30, deadline=None)
@given(
    stage=st.sampled_from(STAGES),
    num=st.sampled_from([1, 2, 8, 64]),
    checkpointed=st.booleans(),
    precision=st.sampled_from(["fp32", "bf16"]),
)
def test_the_largest_micro_batch_fits_and_the_next_does_not(
    stage: int, num: int, checkpointed: bool, precision: str
) -> None:
    cluster = resolve(GPUS)
    work = real_work(f"train.precision={precision}")
    layout = {"stage": stage, "num_gpus": num, "checkpointed": checkpointed}
    most = largest_micro_batch(cluster, work, **layout)  # type: ignore[arg-type]
    assert most > 0
    assert fits(cluster, work, micro_batch=most, **layout)  # type: ignore[arg-type]
    assert not fits(cluster, work, micro_batch=most + 1, **layout)  # type: ignore[arg-type]


def test_checkpointing_saves_memory_and_costs_a_forward_pass() -> None:
    work = real_work("objective.name=mae")
    assert work.kept_bytes(True) < work.kept_bytes(False) / 2
    assert 1.2 < work.flops(True) / work.flops(False) < 1.35


def test_the_lowest_stage_that_fits_rises_with_the_model(gpus: Cluster) -> None:
    work = dataclasses.replace(WORK, passes=real_work().passes, num_trained=10**9)
    layout = {"num_gpus": 64, "micro_batch": 1, "checkpointed": False}
    assert lowest_stage(gpus, work, STAGES, **layout) == 0  # type: ignore[arg-type]
    assert lowest_stage(gpus, work, (1, 2, 3), **layout) == 1  # type: ignore[arg-type]
    large = dataclasses.replace(work, num_trained=9 * 10**9)
    assert lowest_stage(gpus, large, STAGES, **layout) in (1, 2)  # type: ignore[arg-type, operator]
    larger = dataclasses.replace(work, num_trained=40 * 10**9)
    assert lowest_stage(gpus, larger, STAGES, **layout) == 3  # type: ignore[arg-type]
    assert lowest_stage(gpus, dataclasses.replace(work, num_trained=10**13), STAGES, **layout) is None  # type: ignore[arg-type]


def test_gloo_gathers_into_a_buffer_of_its_own() -> None:
    """Measured with two processes: gathering 200 MB takes 200 MB more, and none is gathered for one worker."""

    def gathered(num_gpus: int, on_cpu: bool) -> float:
        layout = {"stage": 3, "num_gpus": num_gpus, "micro_batch": 1, "checkpointed": False}
        return memory(WORK, on_cpu=on_cpu, **layout).gathered  # type: ignore[arg-type]

    assert gathered(2, True) == 2 * gathered(1, True) == 2 * gathered(2, False)


def test_an_elastic_run_is_judged_at_its_fewest_workers_as_the_trainer_does(gpus: Cluster) -> None:
    options = ["train.num_workers=[2,4]", "train.global_batch=24", "train.precision=bf16", "train.zero=3"]
    config = load(RunConfig, None, ["encoder.name=vit_small_patch16_224", *options])
    plan, trainer = make_plan(config, gpus), estimate(config)
    least = memory(plan.work, stage=3, num_gpus=2, micro_batch=6, checkpointed=False)
    assert plan.memory[3, False] == least
    assert trainer.by_stage[3].optimizer == least.optimizer
    assert plan.setting.num_gpus == 4


def test_a_run_may_use_less_of_a_device_and_never_more(gpus: Cluster) -> None:
    def room(*more: str) -> float:
        return make_plan(
            load(RunConfig, None, ["encoder.name=vit_small_patch16_224", *more]), gpus
        ).cluster.memory_bytes

    assert room("train.device_memory_gb=20") == room() / 4 == room("train.device_memory_gb=500") / 4
    with pytest.raises(ValueError, match=r"larger train\.device_memory_gb"):
        room("train.device_memory_gb=1")


def test_a_batch_that_fits_only_with_checkpointing_is_planned_with_it_and_said_not_to_fit() -> None:
    """80 images at 518 px; with the option the same recipe fits as it stands."""
    options = ["encoder.image_size=518", "train.num_workers=1", "train.global_batch=80"]
    plan = make_plan(load(RunConfig, None, [*RECIPE, *options]), resolve(GPUS))
    assert plan.setting.checkpointed and not plan.fits
    assert "hours are those with train.activation_checkpointing=true" in plan.warnings[0]
    asked = make_plan(load(RunConfig, None, [*RECIPE, *options, "train.activation_checkpointing=true"]), resolve(GPUS))
    assert asked.fits and not asked.warnings and asked.step == plan.step
    with pytest.raises(ValueError, match=r"at no ZeRO stage; use train\.micro_batch="):
        make_plan(load(RunConfig, None, [*RECIPE, *options[:-1], "train.global_batch=8000"]), resolve(GPUS))


def test_an_offloaded_optimizer_takes_nothing_of_the_device(gpus: Cluster) -> None:
    options = ["train.use_gpu=true", "train.zero=1", "train.num_workers=2"]
    on, off = (real_work(*options, f"train.offload_optimizer={value}") for value in ("false", "true"))
    layout = {"stage": 1, "num_gpus": 2, "micro_batch": 1, "checkpointed": False}
    here, there = memory(on, **layout), memory(off, **layout)  # type: ignore[arg-type]
    assert here.optimizer == 12.0 * on.num_trained / 2 and there.optimizer == 0.0
    assert there.total <= here.total - here.optimizer
    plan = make_plan(load(RunConfig, None, [*RECIPE, *options, "train.offload_optimizer=true"]), gpus)
    assert "the time of the host's steps is not" in plan.warnings[-1]
