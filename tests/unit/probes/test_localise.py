"""The yardsticks of localisation on maps whose worth is known."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from medim_ray.probes.bootstrap import Estimate
from medim_ray.probes.localise import RATIO, Localisation, ModelMaps, judge_map, patch_counts
from medim_ray.probes.truth import crop_mask
from medim_ray.types import Grid

GRID = Grid(14, 14)
PATCH_PIXELS = 16 * 16


def _lesion() -> np.ndarray:
    mask = np.zeros((224, 224), dtype=bool)
    mask[35:75, 130:170] = True
    return mask


def test_a_map_of_the_lesion_reaches_the_ceiling() -> None:
    counts = patch_counts([_lesion()], GRID)
    area, lift = judge_map(torch.from_numpy(counts).float() + 0.001 * torch.arange(196), counts, PATCH_PIXELS, "a")
    assert area > 0.99
    assert lift == pytest.approx(44 / 49 * 4, abs=0.25), "int(0.9 * 49) of the 49 high patches are hidden, of 196"


def test_the_inverse_map_is_far_below_chance() -> None:
    counts = patch_counts([_lesion()], GRID)
    area, lift = judge_map(0.001 * torch.arange(196) - torch.from_numpy(counts).float(), counts, PATCH_PIXELS, "a")
    assert area < 0.01 and lift < 0.5


def test_random_maps_are_at_chance_on_average() -> None:
    counts = patch_counts([_lesion()], GRID)
    generator = torch.Generator().manual_seed(0)
    numbers = [judge_map(torch.rand(196, generator=generator), counts, PATCH_PIXELS, str(i)) for i in range(300)]
    area, lift = np.mean(numbers, axis=0)
    assert area == pytest.approx(0.5, abs=0.03) and lift == pytest.approx(1.0, abs=0.08)


def test_a_flat_map_is_exactly_at_chance_by_area_and_hides_as_many_patches_as_uniform() -> None:
    area, lift = judge_map(torch.ones(196), np.full(196, PATCH_PIXELS // 2), PATCH_PIXELS, "a")
    assert area == pytest.approx(0.5) and lift == pytest.approx(1.0)


def test_every_map_hides_the_share_of_uniform_masking_exactly() -> None:
    """A lesion that covers every patch alike is hidden at the ratio, whatever the map."""
    maps = torch.rand(20, 196, generator=torch.Generator().manual_seed(1))
    lifts = [judge_map(row, np.full(196, 7), PATCH_PIXELS, "a")[1] for row in maps]
    np.testing.assert_allclose(lifts, 1.0)
    assert RATIO == 0.25


def test_patch_counts_are_of_the_union_and_row_by_row() -> None:
    masks = [np.zeros((6, 6), dtype=bool) for _ in range(2)]
    masks[0][0, :4] = True
    masks[1][0, 2:5] = True
    assert patch_counts(masks, Grid(2, 3)).tolist() == [2, 2, 1, 0, 0, 0]


def test_a_mask_is_cut_like_its_image() -> None:
    """The upper right quarter of a mask of another size than the crop."""
    mask = np.zeros((100, 100), dtype=np.uint8)
    mask[:50, 50:] = 1
    encoded = cv2.imencode(".png", mask)[1].tobytes()
    cut = crop_mask(encoded, np.array([0.0, 0.5, 0.5, 1.0], dtype=np.float32), 64)
    assert cut.shape == (64, 64) and cut.all()


def test_maps_at_or_below_chance_are_warned_of_in_words() -> None:
    def estimate(value: float, spread: float) -> Estimate:
        return Estimate(value, value + spread * np.linspace(-1, 1, 101))

    found = Localisation(
        note="",
        num_images=9,
        num_patients=9,
        left_out={},
        estimates={
            "kdm": {"trained": {"map_auroc": estimate(0.3, 0.05), "lesion_lift": estimate(1.0, 0.2)}},
            "sdm": {"trained": {"map_auroc": estimate(0.8, 0.05), "lesion_lift": estimate(2.0, 0.2)}},
        },
    )
    below, at = found.warnings()
    assert "KDM map AUROC 0.30" in below and "below chance" in below
    assert "KDM lesion lift 1.00" in at and "not above chance" in at
    assert len(found.warnings()) == 2


def test_attention_that_adds_nothing_to_the_prior_is_said_to() -> None:
    values = np.linspace(0.7, 0.9, 101)
    good = {"map_auroc": Estimate(0.8, values), "lesion_lift": Estimate(2.0, 2 * values)}
    better = {"map_auroc": Estimate(0.85, values + 0.05), "lesion_lift": Estimate(2.0, 2 * values)}
    sources = {"trained": good, "prior": good, "both": better}
    found = Localisation(note="", num_images=9, num_patients=9, left_out={}, estimates={"kdm": sources})
    (line,) = found.warnings()
    assert line.startswith("KDM lesion lift") and "does not beat the prior alone" in line
    assert found.to_json()["both_minus_prior"]["kdm"]["map_auroc"]["low"] == pytest.approx(0.05)


def test_an_objective_without_words_has_no_maps() -> None:
    assert "Linear" in ModelMaps.of_no_use(torch.nn.Linear(1, 1))
