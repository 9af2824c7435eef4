"""Guided iBOT masks: DINOv2's counts, the report's places by each crop's own box, blocks where nothing is told."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from medim_ray.draws import Draws
from medim_ray.masking.base import Samples
from medim_ray.masking.block import StepBlockMasking, step_counts_of
from medim_ray.masking.dino_report import GUIDED, HIDDEN, DinoReportMasking
from medim_ray.masking.prior import prior_maps
from medim_ray.types import ASSERTION, MESH_FLAG, SENTENCE_ID, WORD_IS_PAD
from tests.unit.masking.test_anatomy import GRID, samples_of

RIGHT, NOTHING = "There is a right upper lobe consolidation.", "Comparison is made with the prior study."


def with_crops(samples: Samples, second: tuple[float, ...]) -> Samples:
    boxes = np.tile(np.array([[second]], np.float32), (len(samples), 1, 1))
    return dataclasses.replace(samples, more_boxes_BK4=boxes)


def planned(samples: Samples, **options: object) -> tuple[np.ndarray, np.ndarray]:
    masking = DinoReportMasking(DinoReportMasking.Config(crop_ratio=1.0, **options))  # type: ignore[arg-type]
    draws = Draws.of(1, np.zeros(len(samples), np.int64), samples.image_ids)
    columns = masking.plan(samples, GRID, draws)
    masks = masking.resolve({name: torch.from_numpy(value) for name, value in columns.items()}, None)
    assert np.array_equal(masks.hidden_SBN.numpy().transpose(1, 0, 2), columns[HIDDEN])
    assert np.array_equal(masks.fallback_SB.numpy().T, columns[HIDDEN].any(axis=2) & ~columns[GUIDED])
    return columns[HIDDEN], columns[GUIDED]


def test_counts_are_dinov2s_and_places_are_the_reports() -> None:
    samples = with_crops(samples_of(*[RIGHT] * 16), (0.0, 0.0, 1.0, 1.0))
    hidden_BSN, guided_BS = planned(samples, guide="report", diversity=1.0)
    counts_BS = step_counts_of(samples, 2, GRID.num_patches, StepBlockMasking.Config(crop_ratio=1.0))
    assert np.array_equal(hidden_BSN.sum(axis=2), counts_BS) and guided_BS.all()
    prior_BN = prior_maps(samples, GRID)
    for hidden_N, prior_N in zip(hidden_BSN[:, 0], prior_BN, strict=True):
        if hidden_N.sum() <= (prior_N > 0).sum():
            assert prior_N[hidden_N].min() >= prior_N[~hidden_N].max() - 1e-6


def test_each_crop_has_its_own_box() -> None:
    # The second crop is the half of the image on which the right lung is not: nothing told lies there.
    samples = with_crops(samples_of(*[RIGHT] * 8), (0.0, 0.6, 1.0, 1.0))
    hidden_BSN, guided_BS = planned(samples, guide="report")
    assert guided_BS[:, 0].all()
    seen_B = prior_maps(dataclasses.replace(samples, boxes_B4=samples.crop_boxes(1)), GRID).any(axis=1)
    assert np.array_equal(guided_BS[:, 1], seen_B)
    assert hidden_BSN[:, 1].any(axis=1).all(), "a crop without a place has blocks"


def test_a_report_without_a_place_has_dinov2s_blocks() -> None:
    samples = with_crops(samples_of(*[NOTHING] * 6), (0.0, 0.0, 0.7, 0.7))
    hidden_BSN, guided_BS = planned(samples)
    assert not guided_BS.any()
    draws = Draws.of(1, np.zeros(len(samples), np.int64), samples.image_ids)
    blocks = StepBlockMasking(StepBlockMasking.Config(crop_ratio=1.0)).plan(samples, GRID, draws)
    assert np.array_equal(hidden_BSN, blocks["mask/block_BSN"])


def test_with_a_snapshot_each_crop_has_the_highest_patches_of_its_own_attention() -> None:
    num, num_words = 8, 3
    samples = with_crops(samples_of(*[RIGHT] * num), (0.0, 0.0, 1.0, 1.0))
    text = {
        WORD_IS_PAD: np.tile([False, False, True], (num, 1)),
        MESH_FLAG: np.tile([False, True, False], (num, 1)),  # KDM: word 1; SDM: words 0 and 1
        ASSERTION: np.zeros((num, num_words), np.int8),
        SENTENCE_ID: np.tile(np.array([0, 0, -1], np.int16), (num, 1)),
    }
    text[MESH_FLAG][0] = False  # nothing for KDM to go by
    samples = dataclasses.replace(samples, text=text)
    masking = DinoReportMasking(DinoReportMasking.Config(crop_ratio=1.0, diversity=1.0, snapshot_run="runs/medim"))
    draws = Draws.of(1, np.zeros(num, np.int64), samples.image_ids)
    columns = masking.plan(samples, GRID, draws)
    assert not columns[GUIDED].any()
    attention = [
        torch.rand(num, num_words, GRID.num_patches, generator=torch.Generator().manual_seed(k)) for k in (0, 1)
    ]
    made = masking.attend(columns, attention)
    assert made[GUIDED].tolist() == [[False, True]] + [[True, True]] * (num - 1)
    assert np.array_equal(made[HIDDEN][0, 0], columns[HIDDEN][0, 0]), "blocks, where there is no word"
    counts_BS = step_counts_of(samples, 2, GRID.num_patches, StepBlockMasking.Config(crop_ratio=1.0))
    assert np.array_equal(made[HIDDEN].sum(axis=2)[1:], counts_BS[1:])
    for i in range(1, num):
        for crop, map_N in enumerate((attention[0][i, 1].numpy(), attention[1][i, :2].sum(0).numpy())):
            hidden_N = made[HIDDEN][i, crop]
            assert map_N[hidden_N].min() > map_N[~hidden_N].max()


@pytest.mark.parametrize(("options", "message"), [({"diversity": 0.0}, "diversity=0.0"), ({"guide": "x"}, "guide='x'")])
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DinoReportMasking.Config(**options)  # type: ignore[arg-type]
