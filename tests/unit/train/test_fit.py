"""`train.zero: auto` takes the lowest stage that fits, and says what is missing where none does."""

from __future__ import annotations

from pathlib import Path

import pytest

from medim_ray.config.loader import load
from medim_ray.config.schema import RunConfig
from medim_ray.train.fit import estimate, resolve_stage

RECIPE = Path(__file__).parents[3] / "configs/medim-vit_base-8w-z1.yaml"


def config(*overrides: str) -> RunConfig:
    return load(RunConfig, RECIPE, ["train.zero=auto", "train.use_gpu=true", *overrides])


def test_less_memory_means_a_higher_stage() -> None:
    need = {stage: memory.total for stage, memory in estimate(config("train.device_memory_gb=80")).by_stage.items()}
    assert need[0] > need[1] > need[2] > need[3] or need[0] > need[3]
    stages = []
    for gigabytes in (80.0, need[0] / 1e9, (need[0] + min(need[1], need[2])) / 2e9 / 0.95):
        run = config(f"train.device_memory_gb={gigabytes}")
        stages.append(resolve_stage(run, estimate(run)).train.stage)
    assert stages[0] == 0 and stages[1] > 0 and stages == sorted(stages)


def test_what_fits_nowhere_and_what_cannot_be_seen_are_told() -> None:
    run = config("train.device_memory_gb=0.5")
    with pytest.raises(ValueError, match=r"needs .* GB at the least and has 0.4\d: use a smaller train.micro_batch"):
        resolve_stage(run, estimate(run))
    with pytest.raises(ValueError, match=r"can't be seen from this machine; give train\.device_memory_gb"):
        resolve_stage(config(), estimate(config()))


def test_a_stage_that_is_given_stays() -> None:
    run = load(RunConfig, RECIPE)
    assert resolve_stage(run, estimate(run)) is run
    assert f"ZeRO {run.train.stage}" in estimate(run).line(run.train.stage)
