"""UPerNet and SETR learn a phantom's lung where an untrained linear head does not; empty masks and other sizes."""

from __future__ import annotations

from functools import cache

import cv2
import numpy as np
import pytest
import torch

from medim_ray.config.probe import SegmentConfig, TuneConfig
from medim_ray.data.phantom import render, zone_map
from medim_ray.models.vit import ImageEncoder
from medim_ray.probes.segment_trained import Labelled, predict, train_head
from medim_ray.probes.trainable import OwnEncoder
from medim_ray.probes.truth import dice, target_masks

SIZE = 64
TARGETS = ("lung", "right upper lung", "nothing")


@cache
def _phantoms(first: int, num: int) -> Labelled:
    """Masks of half the images' size, cut like them; no image shows the third target."""
    images, masks = [], []
    for index in range(first, first + num):
        zones = zone_map(index, size=SIZE // 2)
        png = [bytes(cv2.imencode(".png", (zones == k).astype(np.uint8) * 255)[1].tobytes()) for k in range(1, 7)]
        places = [(side, zone) for side in ("right", "left") for zone in ("upper", "mid", "lower")]
        truth = [
            {"finding": "lung", "side": side, "zone": zone, "mask": mask}
            for (side, zone), mask in zip(places, png, strict=True)
        ]
        whole = np.array([[0.0, 0.0, 1.0, 1.0]], dtype=np.float32)
        images.append(render(index, size=SIZE).image_HW)
        masks.append(target_masks([{"image_id": str(index), "truth": truth}], whole, SIZE, TARGETS)[0])
    return Labelled(pixels_BHW=np.stack(images), masks_BTHW=np.stack(masks))


def _dice(head: str, steps: int, encoder: bool = False) -> tuple[float, float, dict[str, str], OwnEncoder]:
    """Mean Dice of lung and right upper lung on 16 images, trained on 16 others; what has no head; the encoder."""
    torch.manual_seed(0)
    config = ImageEncoder.Config(
        name="vit_tiny_patch16_224", image_size=SIZE, patch_size=8, width=48, depth=4, num_heads=3
    )
    own = OwnEncoder(ImageEncoder(config))
    tune = TuneConfig(steps=steps, batch=8, lr=1e-3 if encoder else 3e-3)
    asked = SegmentConfig(targets=TARGETS, tune=tune, tune_encoder=encoder)
    trained, thresholds, problems = train_head(own, head, _phantoms(0, 16), _phantoms(100, 6), asked, 0, "cpu")
    judged = _phantoms(200, 16)
    found = predict(own, trained, judged.pixels_BHW, "cpu")
    values = [
        float(np.mean([dice(found[i, t] >= thresholds[name], judged.masks_BTHW[i, t]) for i in range(16)]))
        for t, name in enumerate(TARGETS[:2])
    ]
    return values[0], values[1], problems, own


@pytest.mark.parametrize(("head", "encoder"), [("upernet", False), ("setr", False), ("setr", True)])
def test_a_head_learns_the_lung_from_16_images_beyond_the_untrained_linear_one(head: str, encoder: bool) -> None:
    lung, upper, problems, _ = _dice(head, 16 if head == "upernet" else 40, encoder)
    first_lung, first_upper, _, _ = _dice("linear", 1)
    assert lung > 0.85 > 0.7 > first_lung, "one step of a linear head marks nearly everything"
    assert upper > 0.55 > 0.3 > first_upper
    assert problems == {"nothing": "no training image shows it"}


def test_a_frozen_encoder_stays_as_it_was_and_a_tuned_one_does_not() -> None:
    torch.manual_seed(0)
    before = _dice("linear", 1)[3].state_dict()
    frozen, tuned = (_dice("linear", 4, encoder)[3].state_dict() for encoder in (False, True))
    assert all(torch.equal(before[name], frozen[name]) for name in before)
    moved = [name for name in before if not torch.equal(before[name], tuned[name])]
    assert any("blocks.0." in name for name in moved) and any("patch_embed" in name for name in moved)


def test_masks_that_are_all_empty_give_no_head_and_say_why() -> None:
    """The images that a threshold is chosen on show it; those that are learned from do not, and the other way round."""
    learn, choose = _phantoms(0, 16), _phantoms(100, 6)
    empty = [
        Labelled(pixels_BHW=of.pixels_BHW, masks_BTHW=np.zeros_like(of.masks_BTHW)[:, :1]) for of in (learn, choose)
    ]
    full = [Labelled(pixels_BHW=of.pixels_BHW, masks_BTHW=of.masks_BTHW[:, :1]) for of in (learn, choose)]
    config = SegmentConfig(targets=("lung",), tune=TuneConfig(steps=1))
    torch.manual_seed(0)
    own = OwnEncoder(ImageEncoder(ImageEncoder.Config(name="resnet18", image_size=SIZE)))
    for pair, why in (((empty[0], full[1]), "no training image shows it"), ((full[0], empty[1]), "chosen on shows it")):
        _, thresholds, problems = train_head(own, "setr", *pair, config, 0, "cpu")
        assert not thresholds and why in problems["lung"]
    with pytest.raises(ValueError, match="needs two training images"):
        train_head(own, "setr", full[0].take(np.array([0])), full[1], config, 0, "cpu")
