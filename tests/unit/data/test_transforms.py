"""Crops: boxes are where they say, zero padding keeps the aspect, the photometric part leaves neighbours alone."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medim_ray.data.photometric import photometric
from medim_ray.data.rows import decode_gray
from medim_ray.data.transforms import CROPS, MultiCrop, PadCrop, cut
from medim_ray.draws import Draws


def draws(num: int) -> Draws:
    return Draws.of(0, np.zeros(num, dtype=np.int64), [str(i) for i in range(num)])


def gradient(height: int, width: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    return np.linspace(0, 255, width, dtype=np.float64)[None].repeat(height, 0).astype(np.uint8)


def test_the_centre_crop_of_a_wide_image_is_the_whole_image_padded_above_and_below() -> None:
    plan = PadCrop(PadCrop.Config(), 64).plan(np.array([[50, 100]]), None)["image"]
    pixels = cut(np.full((50, 100), 200, dtype=np.uint8), plan.boxes_BK4[0, 0], 64)
    assert (pixels[:16] == 0).all() and (pixels[48:] == 0).all() and (pixels[17:47] == 200).all()


def test_random_pad_crops_keep_the_aspect_and_stay_on_the_padded_square() -> None:
    shapes = np.tile(np.array([[300, 200]]), (200, 1))
    boxes = PadCrop(PadCrop.Config(), 64).plan(shapes, draws(200))["image"].boxes_BK4[:, 0]
    sides = (boxes[:, 2:] - boxes[:, :2]) * np.array([300, 200])
    assert np.allclose(sides, 300 * 224 / 240, rtol=1e-5)
    assert boxes[:, 0].min() >= 0 and boxes[:, 2].max() <= 1 + 1e-6
    assert boxes[:, 1].min() >= -0.25 - 1e-6 and boxes[:, 3].max() <= 1.25 + 1e-6
    assert boxes[:, 0].std() > 0.01


def test_a_box_cuts_the_pixels_it_names() -> None:
    image = gradient(80, 160)
    pixels = cut(image, np.array([0.25, 0.5, 0.75, 0.75], dtype=np.float32), 40)
    assert pixels.shape == (40, 40)
    assert abs(int(pixels[20, 0]) - int(image[40, 80])) < 6 and abs(int(pixels[20, -1]) - int(image[40, 119])) < 6
    flipped = cut(image, np.array([0.25, 0.5, 0.75, 0.75], dtype=np.float32), 40, flip=True)
    assert np.array_equal(flipped, pixels[:, ::-1])


def test_multi_crops_have_the_area_they_were_drawn_with() -> None:
    config = MultiCrop.Config(num_local=6, local_size=32, global_area=(0.5, 1.0), local_area=(0.1, 0.3))
    crop = MultiCrop(config, 64)
    plans = crop.plan(np.tile(np.array([[240, 200]]), (300, 1)), draws(300))
    assert [view.name for view in crop.views] == ["global", "local"]
    for name, (low, high) in {"global": (0.5, 1.0), "local": (0.1, 0.3)}.items():
        boxes = plans[name].boxes_BK4
        area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
        assert area.max() <= high + 1e-5 and np.median(area) > low
        assert boxes.min() >= 0 and boxes.max() <= 1 + 1e-6
    assert not plans["global"].flips_BK.any()


def test_photometric_does_not_depend_on_neighbours_and_blurs_where_asked() -> None:
    images = torch.rand(3, 1, 20, 20, generator=torch.Generator().manual_seed(0))
    jitter = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.1, 0.9, 0.8, 0.0], [0.9, 1.1, 1.0, 0.0]])
    together = photometric(images, jitter, blur_radius=3)
    assert torch.allclose(together[0], images[0], atol=1e-6)
    for i in range(3):
        alone = photometric(images[i : i + 1], jitter[i : i + 1], blur_radius=3)
        assert torch.allclose(alone[0], together[i], atol=1e-6)
    assert together[2].diff(dim=-1).abs().mean() < images[2].diff(dim=-1).abs().mean()


def test_solarising_inverts_the_upper_half_of_the_grays() -> None:
    images = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]).expand(2, 1, 1, 5)
    plain, solarised = photometric(images, torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0]]), blur_radius=0)
    torch.testing.assert_close(plain, images[0])
    torch.testing.assert_close(solarised[0, 0], torch.tensor([0.0, 0.25, 0.5, 0.25, 0.0]))


def test_natural_crops_follow_dinov2s_shares_and_radiographs_are_neither_flipped_nor_solarised() -> None:
    num = 2000
    shapes = np.tile(np.array([[240, 200]]), (num, 1))
    plans = CROPS["natural"](CROPS["natural"].Config(num_local=4), 224).plan(shapes, draws(num))
    first, second = plans["global"].jitter_BK4[:, 0], plans["global"].jitter_BK4[:, 1]
    local = plans["local"].jitter_BK4.reshape(-1, 4)
    assert [float((jitter[:, 2] > 0).mean()) for jitter in (first, second, local)] == pytest.approx(
        [1, 0.1, 0.5], abs=0.03
    )
    assert [float(jitter[:, 3].mean()) for jitter in (first, second, local)] == pytest.approx([0, 0.2, 0], abs=0.03)
    assert float((first[:, 0] == 1).mean()) == pytest.approx(0.2, abs=0.03), "a fifth of the crops keeps its brightness"
    assert 1.95 < first[:, 2].max() <= 2.0 and first[:, 2].min() >= 0.1
    assert plans["global"].flips_BK.mean() == pytest.approx(0.5, abs=0.03)
    xray = CROPS["xray"](CROPS["xray"].Config(), 518)
    assert [view.size for view in xray.views] == [518, 196]
    for plan in xray.plan(shapes, draws(num)).values():
        assert not plan.flips_BK.any() and not plan.jitter_BK4[..., 3].any() and plan.jitter_BK4[..., 2].max() <= 1.0


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("multi_crop", {"blur_prob": (0.5, 1.5, 0.5)}, r"blur_prob\[1\]=1.5"),
        ("pad_crop", {"blur_max": -3.0}, r"blur_max=-3.0.*blur_prob=0"),
        ("natural", {"solarise_prob": 2.0}, "solarise_prob=2.0"),
        ("pad_crop", {"resize_ratio": 0.9}, "resize_ratio=0.9"),
        ("pad_crop", {"jitter": 2.0}, "jitter=2.0"),
        ("multi_crop", {"global_area": (0.9, 0.1)}, "global_area"),
        ("multi_crop", {"num_local": -1}, "num_local=-1"),
    ],
)
def test_bad_options_are_named(name: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CROPS[name].Config(**changes)


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(64, 900),
    width=st.integers(64, 900),
    seed=st.integers(0, 99),
    name=st.sampled_from(["pad_crop", "multi_crop", "xray", "natural"]),
)
def test_no_crop_is_reduced_by_less_than_is_told(height: int, width: int, seed: int, name: str) -> None:
    """What decoding at a part of the size relies on."""
    crop = CROPS[name](CROPS[name].Config(name=name), 64)
    draws = Draws.of(seed, np.arange(6), [f"i{k}" for k in range(6)])
    least = min(
        min(float((box[2] - box[0]) * height), float((box[3] - box[1]) * width)) / view.size
        for view in crop.views
        for box in crop.plan(np.tile([height, width], (6, 1)), draws)[view.name].boxes_BK4.reshape(-1, 4)
    )
    assert crop.shrink(height, width) <= least * (1 + 1e-5)


def test_a_jpeg_decoded_at_half_its_size_gives_nearly_the_same_crop() -> None:
    rng = np.random.default_rng(0)
    image = cv2.resize(rng.uniform(0, 255, (12, 10)), (500, 601), interpolation=cv2.INTER_CUBIC)
    image = np.clip(image + rng.normal(scale=3, size=image.shape), 0, 255).astype(np.uint8)
    jpeg, png = (cv2.imencode(ending, image)[1].tobytes() for ending in (".jpg", ".png"))
    full, half = decode_gray(jpeg, "i"), decode_gray(jpeg, "i", shrink=2.5)
    assert (full.shape, half.shape, decode_gray(jpeg, "i", 4.0).shape) == ((601, 500), (301, 250), (151, 125))
    assert decode_gray(png, "i", shrink=2.5).shape == (601, 500), "PNG has no scaled decoding"
    box = np.array([0.05, -0.02, 0.95, 0.98], dtype=np.float32)
    difference = np.abs(cut(full, box, 200).astype(int) - cut(half, box, 200).astype(int))
    # Edges of crops fall on whole pixels, of the full or of the half image: places differ by up to a pixel.
    assert 0 < difference.mean() < 2.0 and difference.max() < 16
