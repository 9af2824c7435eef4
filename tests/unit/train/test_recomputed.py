"""Activation checkpointing under ZeRO 3, whose hooks gather and free parameters around every module: the same steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from medim_ray.config.schema import TrainConfig
from medim_ray.train.zero import build_engine
from tests.unit.models.test_blocks import CASES
from tests.unit.train.ranks import on_ranks

NAMES = ("mae", "medim", "rad_dino")


def compare(folder: str) -> None:
    for name in NAMES:
        found = []
        for activation_checkpointing in (False, True):
            objective, batch = CASES[name]()
            train = TrainConfig(
                steps=9, zero=3, global_batch=len(batch), lr=1e-3, activation_checkpointing=activation_checkpointing
            )
            engine = build_engine(objective, train)
            numbers = []
            for step in range(2):
                torch.manual_seed(step)
                loss = engine(batch).loss
                engine.backward(loss)
                engine.step()
                numbers += [float(loss.detach()), float(engine.get_global_grad_norm())]
            found.append(numbers)
        assert found[1] == pytest.approx(found[0], rel=1e-6), name
        Path(folder, name).touch()


def test_recomputed_blocks_take_the_same_steps_where_parameters_are_sharded(tmp_path: Path) -> None:
    on_ranks(1, compare, str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == set(NAMES)
