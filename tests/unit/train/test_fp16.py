"""fp16 with a dynamic loss scale, on CPU ranks that are told that they can: torch has the kernels, DeepSpeed's own
check says no. Speed is not looked at; whether a GPU gives the same is not known here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from medim_ray.config.schema import TrainConfig
from medim_ray.train import checkpoint, zero
from medim_ray.train.health import BadStep, NumberGuard
from medim_ray.train.loss_scale import engine_numbers, restore_scaler, scaler_state
from medim_ray.train.store import CheckpointStore
from tests.unit.train.ranks import on_ranks
from tests.unit.train.test_checkpoint import Net, save, tensors

CONFIG = TrainConfig(steps=9, num_workers=2, global_batch=12, precision="fp16", use_gpu=True, lr=1e-2)
STEPS = 6


def engine_of(config: TrainConfig) -> Any:
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    deepspeed.ops.__compatible_ops__ = {}  # as build_engine does without GPUs
    get_accelerator().is_fp16_supported = lambda: True
    torch.manual_seed(0)
    return zero.build_engine(Net(), config)


def train(engine: Any, first: int, last: int) -> list[float]:
    """Losses; the scale is so large at first that some steps are left out."""
    rank, losses = torch.distributed.get_rank(), []
    for step in range(first, last):
        x_BD = torch.randn(12, 7, generator=torch.Generator().manual_seed(step))
        loss = engine(x_BD.chunk(2)[rank].to(next(engine.module.parameters()).dtype))
        engine.backward(40 * loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def stages(folder: str) -> None:
    unsharded = None
    for stage in (0, 1, 2, 3):
        config = replace(CONFIG, zero=stage)
        engine = engine_of(config)
        assert engine_numbers(engine)["loss_scale"] == 2.0**16
        losses = train(engine, 0, STEPS)
        scale = engine_numbers(engine)["loss_scale"]
        assert 1.0 < scale < 2.0**16, f"stage {stage}: no step overflowed, the case is too easy ({scale})"
        save(CheckpointStore(f"{folder}/straight-{stage}"), engine, STEPS)

        url = f"{folder}/stopped-{stage}"
        first = engine_of(config)
        train(first, 0, 2)
        save(CheckpointStore(url), first, 2)
        again = engine_of(config)
        newest = CheckpointStore(url).newest()
        assert newest is not None
        checkpoint.restore(CheckpointStore(url), newest, again)
        assert scaler_state(again) == scaler_state(first)
        train(again, 2, STEPS)
        assert engine_numbers(again)["loss_scale"] == scale
        save(CheckpointStore(url), again, STEPS)
        if stage == 2:  # another kind of stage takes over the scale alone
            other = engine_of(replace(CONFIG, zero=0))
            restore_scaler(other, scaler_state(engine))
            assert engine_numbers(other)["loss_scale"] == scale
            restore_scaler(engine, scaler_state(other))
            assert engine_numbers(engine)["loss_scale"] == scale
        unsharded = unsharded or losses
        assert losses[0] == pytest.approx(unsharded[0], rel=1e-2)


def test_each_stage_scales_the_loss_and_resumes_bit_equal(tmp_path: Path) -> None:
    on_ranks(2, stages, str(tmp_path))
    for stage in (0, 1, 2, 3):
        one, other = tensors(f"{tmp_path}/straight-{stage}"), tensors(f"{tmp_path}/stopped-{stage}")
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), stage
        assert one["first.weight|param"].dtype == torch.float32
        assert all(bool(value.isfinite().all()) for value in one.values())


def test_an_overflow_is_no_bad_step_where_there_is_a_loss_scale() -> None:
    NumberGuard(CONFIG, {}, lambda bad, columns: None).check_norm(0, float("inf"), 7, {})
    with pytest.raises(BadStep):
        NumberGuard(replace(CONFIG, precision="bf16"), {}, lambda bad, columns: None).check_norm(0, float("inf"), 7, {})
