"""The engine starts without compiling anything."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from torch import nn

from medim_ray.config.schema import TrainConfig
from medim_ray.train.zero import build_engine
from tests.unit.train.ranks import on_ranks
from tests.unit.train.test_checkpoint import Net


def engine() -> None:
    assert isinstance(build_engine(Net(), TrainConfig(steps=9, zero=2, global_batch=12)).module, nn.Module)


def test_no_op_is_compiled_at_the_first_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert "TORCH_EXTENSIONS_DIR" in os.environ
    on_ranks(1, engine)
    assert list(tmp_path.iterdir()) == []
