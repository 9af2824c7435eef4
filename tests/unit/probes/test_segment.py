"""Masks of any size, empty masks, Dice at its edges, and a head on made tokens: it finds what is there, not noise."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from medim_ray.data.transforms import CROPS, PadCrop
from medim_ray.probes.encoders import raw_pixels
from medim_ray.probes.features import Source
from medim_ray.probes.segment import _JudgeActor, _LearnActor, _pick
from medim_ray.probes.segment_linear import Learn, fit_head
from medim_ray.probes.truth import ANY, dice, enlarged, is_of, patch_shares, target_masks

TARGETS = ("pneumothorax", ANY)

WHOLE_BOX = np.array([[0.0, 0.0, 1.0, 1.0]], dtype=np.float32)


def _png(mask: NDArray[Any]) -> bytes:
    return bytes(cv2.imencode(".png", mask.astype(np.uint8) * 255)[1].tobytes())


def _row(**lesions: NDArray[Any] | bytes) -> dict[str, Any]:
    truth = [
        {"finding": name, "side": "", "zone": "", "mask": mask if isinstance(mask, bytes) else _png(mask)}
        for name, mask in lesions.items()
    ]
    return {"image_id": "image-1", "truth": truth}


def test_a_mask_of_another_size_is_cut_by_the_same_fractions_of_its_sides() -> None:
    small, large = np.zeros((40, 40), bool), np.zeros((400, 400), bool)
    small[8:20, 20:32], large[80:200, 200:320] = True, True
    box = np.array([[0.1, 0.25, 0.9, 1.05]], dtype=np.float32)
    found = [target_masks([_row(nodule=mask)], box, 64, TARGETS)[0, TARGETS.index(ANY)] for mask in (small, large)]
    assert dice(*found) > 0.9 and found[0].sum() == pytest.approx(24 * 24, rel=0.15)


def test_empty_masks_are_no_lesion_and_targets_are_unions_of_their_lesions() -> None:
    left, right = np.zeros((2, 32, 32), bool)
    left[4:8, 4:8], right[20:24, 20:28] = True, True
    masks = target_masks(
        [_row(), _row(pneumothorax=np.zeros((32, 32), bool)), _row(pneumothorax=left, nodule=right)],
        np.repeat(WHOLE_BOX, 3, axis=0),
        32,
        TARGETS,
    )
    sums = masks.sum(axis=(2, 3))
    assert sums.tolist() == [[0, 0], [0, 0], [16, 48]]
    with pytest.raises(ValueError, match="image 'image-1': the mask of 'nodule' can't be decoded"):
        target_masks([_row(nodule=b"no image")], WHOLE_BOX, 32, TARGETS)


def test_a_part_of_the_body_is_taken_whole_by_side_or_by_zone_and_is_no_lesion() -> None:
    upper = {"finding": "lung", "side": "left", "zone": "upper"}
    tube = {"finding": "chest tube", "side": "", "zone": ""}
    wanted = ["lung", "left lung", "upper lung", "left upper lung", "right lung", "chest tube", "tube", ANY]
    assert [is_of(target, upper) for target in wanted] == [True, True, True, True, False, False, False, False]
    assert [is_of(target, tube) for target in wanted] == [False] * 5 + [True, False, True]


def test_dice_at_its_edges_and_shares_of_patches() -> None:
    nothing, half = np.zeros((8, 8), bool), np.zeros((8, 8), bool)
    half[:, :4] = True
    assert (dice(nothing, nothing), dice(half, nothing), dice(nothing, half)) == (1.0, 0.0, 0.0)
    assert dice(half, half) == 1.0 and dice(~nothing, half) == pytest.approx(2 / 3)
    half[:, 4] = True
    np.testing.assert_allclose(patch_shares(half, 4), [1, 0.25, 1, 0.25])
    rising = enlarged(np.array([0.0, 1.0, 0.0, 1.0]), 8)
    assert rising.shape == (8, 8) and (np.diff(rising, axis=1) >= 0).all() and np.ptp(rising[:, 0]) == 0


def test_sampled_patches_are_of_lesions_for_half_at_most() -> None:
    order = np.random.default_rng(0).permutation(64)
    share = np.zeros(64)
    for num_lesion, expected in ((0, 0), (3, 3), (30, 8), (60, 12)):
        share[:num_lesion] = 0.5
        picked = _pick(share, order, 16)
        assert len(set(picked)) == 16 and (share[picked] > 0).sum() == expected


def _blobs(num: int, seed: int, visible: bool) -> dict[str, NDArray[Any]]:
    """A block as decode_crops makes it: noise of 64 pixels, with a bright disc where the mask is if it is visible."""
    rng = np.random.default_rng(seed)
    pixels = rng.normal(90, 12, (num, 64, 64))
    masks = np.zeros((num, 2, 64, 64), bool)
    y, x = np.mgrid[:64, :64]
    for i in range(0, num, 2):
        disc = (y - rng.integers(16, 48)) ** 2 + (x - rng.integers(16, 48)) ** 2 < 11**2
        masks[i] = disc
        pixels[i] += 70 * disc * visible
    return {
        "position": np.arange(num),
        "image_id": np.array([f"{seed}-{i}" for i in range(num)], dtype=object),
        "pixels/64": pixels.clip(0, 255).astype(np.uint8),
        "annotations/64": masks,
    }


@pytest.mark.parametrize("visible", [True, False])
def test_a_head_on_gray_patches_finds_bright_discs_and_no_hidden_ones(visible: bool) -> None:
    sources = {
        "pixels": Source(make=raw_pixels(8), crop=CROPS["pad_crop"](PadCrop.Config(), 64), crop_key="64", key="")
    }
    block = _blobs(76, 1, visible)
    chosen = frozenset(str(image_id) for image_id in block["image_id"][60:])
    made = _LearnActor(sources, "cpu", 24, 0, chosen)(block)
    shapes = {len(tokens) for tokens in made["tokens pixels"][:60]}, {len(t) for t in made["tokens pixels"][60:]}
    assert (
        shapes == ({24}, {64}) and made["masks pixels"][0].size == 0 and made["masks pixels"][70].shape == (2, 64, 64)
    )
    learn = Learn(
        tokens_PD=np.concatenate(list(made["tokens pixels"][:60])),
        shares_PT=np.concatenate(list(made["shares pixels"][:60])),
        chosen=list(zip(made["tokens pixels"][60:], made["masks pixels"][60:], strict=True)),
    )
    assert 0.02 < learn.shares_PT.mean() < 0.5
    head = fit_head(learn, 1)
    judged = _JudgeActor(sources, "cpu", TARGETS, {"pixels": {ANY: head}})(_blobs(30, 3, visible))
    has = ~judged[f"empty {ANY}"]
    assert has.tolist() == [i % 2 == 0 for i in range(30)] and "pixels pneumothorax" not in judged
    found, chance = judged[f"pixels {ANY}"][has].mean(), judged[f"whole image {ANY}"][has].mean()
    if visible:
        assert found > 0.75 and judged[f"pixels {ANY}"][~has].mean() > 0.5
    else:
        assert found < chance + 0.05 and chance == pytest.approx(2 * 380 / (64 * 64 + 380), rel=0.1)
