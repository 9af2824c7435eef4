"""The engine starts without compiling anything."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from medim_ray.config.schema import TrainConfig
from medim_ray.train.zero import build_engine
from tests.unit.train.ranks import on_ranks
from tests.unit.train.test_checkpoint import Net


def engine() -> None:
    assert isinstance(build_engine(Net(), TrainConfig(steps=9, zero=2, global_batch=12)).module, nn.Module)


def norms() -> None:
    """One step at each stage, with and without clipping: the same norm, that of the gradient before it is clipped."""
    for clip_norm in (0.0, 1e-3):
        found = []
        for stage in (0, 1, 3):
            torch.manual_seed(0)
            made = build_engine(Net(), TrainConfig(steps=9, zero=stage, global_batch=12, clip_norm=clip_norm))
            made.backward(made(torch.randn(12, 7, generator=torch.Generator().manual_seed(1))))
            made.step()
            found.append(float(made.get_global_grad_norm()))
        assert found == pytest.approx([found[0]] * 3, rel=1e-5) and found[0] > 1e-2


def test_every_stage_tells_the_gradient_norm() -> None:
    on_ranks(1, norms)


def test_no_op_is_compiled_at_the_first_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert "TORCH_EXTENSIONS_DIR" in os.environ
    on_ranks(1, engine)
    assert list(tmp_path.iterdir()) == []
