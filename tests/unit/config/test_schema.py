"""RunConfig: groups that do not fit each other are refused with the value and the fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from medim_ray.config.loader import describe, load, run_hash
from medim_ray.config.schema import RunConfig
from medim_ray.models.vit import ImageEncoder
from medim_ray.train.build import build_masking

RECIPE = Path(__file__).parents[3] / "configs/debug/medim-vit_tiny-2w-z1.yaml"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.num_workers=[8, 64]", "train.global_batch=64"], "use a narrower range, e.g. \\[8, 9\\]"),
        (["train.global_batch=9"], "global_batch=9 is not divisible by num_workers=2.*use global_batch=10"),
        (["train.micro_batch=3"], r"micro_batch=3 does not divide the 4 images of a worker"),
        (["data.granules_per_step=3"], "data.granules_per_step=3 is not divisible by train.num_workers=2"),
        (["data.granules_per_step=6"], "train.global_batch=8 is not divisible by data.granules_per_step=6"),
        (["train.zero=4"], "zero=4: ZeRO stages are 0, 1, 2 and 3"),
        (["train.precision=fp8"], "train.precision='fp8' is not one of 'fp32', 'bf16'"),
        (["train.stop_after=0"], "stop_after=0: must be at least 1"),
        (["train.step=3"], "unknown key 'train.step'. Did you mean 'train.steps'"),
        (["masking.ratio=1.5"], "masking.ratio=1.5"),
        (["objective.name=medium"], "unknown objective 'medium'. Did you mean 'medim'"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_fix(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(RunConfig, RECIPE, overrides)


def test_an_image_size_that_the_patch_does_not_divide_is_refused() -> None:
    config = load(RunConfig, RECIPE, ["encoder.image_size=110"])
    with pytest.raises(ValueError, match=r"encoder.image_size=110.*multiple of the patch size 16.*use 96 or 112"):
        ImageEncoder.grid_of(config.encoder)


def test_masks_that_need_reports_are_refused_without_a_text_encoder() -> None:
    config = load(RunConfig, RECIPE, ["objective.name=mae", "masking.on=input"])
    with pytest.raises(ValueError, match=r"masking.name=kdm.sdm needs the attention of a text encoder"):
        build_masking(config)


def test_the_hash_is_that_of_the_result_not_of_the_place() -> None:
    one = load(RunConfig, RECIPE)
    same = [
        "run.dir=elsewhere",
        "data.shards=moved",
        "train.stop_after=3",
        "track.aim=false",
        "data.prefetch_blocks=9",
        "data.num_actors=2",
    ]
    assert run_hash(load(RunConfig, RECIPE, same)) == run_hash(one)
    for other in ("seed=1", "train.lr=1", "masking.ratio=0.6", "train.steps=31"):
        assert run_hash(load(RunConfig, RECIPE, [other])) != run_hash(one), other


def test_accumulation_is_derived() -> None:
    config = load(RunConfig, RECIPE, ["train.micro_batch=2"])
    assert (config.train.local_micro_batch, config.train.accumulation) == (2, 2)


def test_every_option_says_what_it_means() -> None:
    silent = [key for key, _, _, meaning in describe(RunConfig) if not meaning and ".name" not in key]
    assert not silent
