"""What a configuration is built of, and what is refused once the grid is known."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from medim_ray.config.loader import load
from medim_ray.config.schema import RunConfig
from medim_ray.train.build import build_crop, build_masking, check_crops, check_ratio, stream_bytes
from medim_ray.train.checks import check_numbers
from medim_ray.types import Grid

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", ["uniform", "kdm", "anatomy", "mixture", "block"])
@pytest.mark.parametrize(("ratio", "hidden"), [(0.02, 0), (0.999, 16)])
def test_a_ratio_that_hides_nothing_or_everything_is_refused_with_one_that_works(
    name: str, ratio: float, hidden: int
) -> None:
    config = load(RunConfig, None, [f"masking.name={name}", f"masking.ratio={ratio}"])
    if name != "uniform" and hidden:  # 15 of 16: the others round down
        check_ratio(config, Grid(4, 4))
        return
    with pytest.raises(ValueError, match=rf"masking\.ratio={ratio}: hides {hidden} of the 16 patches") as refused:
        check_ratio(config, Grid(4, 4))
    works = str(refused.value).rpartition("=")[2]
    check_ratio(load(RunConfig, None, [f"masking.name={name}", f"masking.ratio={works}"]), Grid(4, 4))


@pytest.mark.parametrize(
    "key", ["objective.ita_weight", "objective.local_temperature", "masking.negated_weight", "objective.proto_weight"]
)
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_numbers_that_are_not_finite_are_refused(key: str, value: str) -> None:
    config = load(RunConfig, None, ["objective.name=medim", "masking.name=kdm"])
    check_numbers(config)
    with pytest.raises(ValueError, match=rf"{re.escape(key)}={value}: must be a finite number"):
        check_numbers(load(RunConfig, None, ["objective.name=medim", "masking.name=kdm", f"{key}={value}"]))


def test_large_crops_ask_for_a_larger_object_store() -> None:
    options = ["encoder.image_size=518", "crop.num_local=8", "crop.local_size=98", "train.global_batch=64"]
    config = load(RunConfig, ROOT / "configs/debug/rad_dino-vit_tiny-2w-z1.yaml", options)
    rows = config.data.window_steps * 64 // config.granules_per_step
    block = rows * (2 * 518**2 + 8 * 98**2)
    assert stream_bytes(config) == 12 * (config.data.num_actors + config.train.max_workers) * block
    small = load(RunConfig, ROOT / "configs/debug/mae-vit_tiny-2w-z1.yaml", [])
    assert stream_bytes(small) < 512 << 20 < stream_bytes(config)


def test_local_crops_are_whole_patches() -> None:
    config = load(RunConfig, ROOT / "configs/debug/rad_dino-vit_tiny-2w-z1.yaml", ["crop.local_size=60"])
    with pytest.raises(ValueError, match=r"crop\.local_size=60: must be a multiple of the patch size 14 .*; use 56"):
        check_crops(config, Grid(8, 8))
    check_crops(load(RunConfig, ROOT / "configs/debug/mae-vit_tiny-2w-z1.yaml", []), Grid(7, 7))


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        ("rad_dino", ["crop.name=pad_crop"], r"crop\.name=pad_crop: makes image views.*use crop\.name=xray"),
        ("mae", ["crop.name=xray"], r"crop\.name=xray: makes global views.*use crop\.name=pad_crop"),
        ("rad_dino", ["masking.name=anatomy"], r"use masking\.name=dinov2_block"),
        ("mae", ["masking.name=dinov2_block"], r"takes one; use e\.g\. masking\.name=uniform"),
        ("mae", ["masking.on=feature"], r"masking\.on=feature: objective\.name=mae masks its input"),
    ],
)
def test_what_an_objective_cannot_use_is_refused_before_the_start(
    recipe: str, changes: list[str], message: str
) -> None:
    config = load(RunConfig, ROOT / f"configs/debug/{recipe}-vit_tiny-2w-z1.yaml", changes)
    with pytest.raises(ValueError, match=message):
        build_crop(config)
        build_masking(config)
