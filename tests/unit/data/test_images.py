"""Image files of every kind to gray pixels, damaged ones to reasons, and the encoded form of the shards."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from medim_ray.data.images import BadImageError, ImageEncoder, decode, decode_file, decode_mask, fetch


def smooth(height: int = 96, width: int = 80, top: int = 255) -> Any:
    """[height, width] float ramp with a bump, 0 to top."""
    y, x = np.mgrid[0:height, 0:width]
    image = x / width + np.exp(-((y - height / 2) ** 2 + (x - width / 2) ** 2) / 200)
    return (image - image.min()) / (image.max() - image.min()) * top


def file_of(image: Image.Image, fmt: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=fmt, **options)
    return buffer.getvalue()


GRAY = np.rint(smooth()).astype(np.uint8)


def test_gray_files_keep_their_values() -> None:
    for fmt in ("PNG", "BMP", "TIFF"):
        assert np.array_equal(decode_file(file_of(Image.fromarray(GRAY), fmt)), GRAY)


def test_gray_in_colour_clothes_is_the_same_gray() -> None:
    rgb = Image.fromarray(GRAY).convert("RGB")
    opaque = Image.fromarray(GRAY).convert("RGBA")
    palette = Image.fromarray(GRAY).convert("P")
    for image in (rgb, opaque, palette):
        assert np.abs(decode_file(file_of(image)).astype(int) - GRAY).max() <= 1, image.mode


def test_colour_becomes_luma() -> None:
    red = decode_file(file_of(Image.new("RGB", (4, 4), (255, 0, 0))))
    green = decode_file(file_of(Image.new("RGB", (4, 4), (0, 255, 0))))
    assert red[0, 0] == 76 and green[0, 0] in (149, 150)  # ITU-R 601: 0.299 and 0.587


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparent_pixels_are_black(mode: str) -> None:
    image = Image.new(mode, (4, 2), (200, 255) if mode == "LA" else (200, 200, 200, 255))
    image.putpixel((0, 0), (200, 0) if mode == "LA" else (200, 200, 200, 0))
    image.putpixel((1, 0), (200, 128) if mode == "LA" else (200, 200, 200, 128))
    gray = decode_file(file_of(image))
    assert gray[0, 0] == 0 and abs(int(gray[0, 1]) - 100) <= 1 and gray[1, 3] == 200


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to see it upright
    turned = decode_file(file_of(Image.fromarray(GRAY), "JPEG", exif=exif, quality=100))
    assert turned.shape == (80, 96)
    assert np.abs(turned.astype(int) - np.rot90(GRAY, 3)).mean() < 2


def test_sixteen_bits_survive_decoding() -> None:
    deep = np.rint(smooth(top=65535)).astype(np.uint16)
    gray = decode_file(file_of(Image.fromarray(deep)))
    assert gray.dtype == np.uint16 and np.array_equal(gray, deep)


def test_float_files_are_scaled_and_nan_is_refused() -> None:
    values = smooth(top=1).astype(np.float32) * 3.0 - 1.0
    gray = decode_file(file_of(Image.fromarray(values), "TIFF"))
    assert gray.dtype == np.uint16 and gray.min() == 0 and gray.max() == 65535
    values[3, 3] = np.nan
    with pytest.raises(BadImageError, match="finite"):
        decode_file(file_of(Image.fromarray(values), "TIFF"))


def test_a_twelve_bit_file_is_not_stored_almost_black() -> None:
    twelve = np.rint(smooth(top=4095)).astype(np.uint16)
    stored = ImageEncoder(ImageEncoder.Config(longest_side=None)).prepare(twelve)
    assert stored.dtype == np.uint8 and stored.min() == 0 and stored.max() == 255
    assert np.abs(stored.astype(float) - twelve / 4095 * 255).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("keep", [0.05, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("fmt", ["JPEG", "PNG"])
def test_truncated_files_are_found(fmt: str, keep: float) -> None:
    rng = np.random.default_rng(0)
    data = file_of(Image.fromarray(rng.integers(0, 256, (200, 200), dtype=np.uint8)), fmt)
    with pytest.raises(BadImageError, match=r"truncated|damaged|not an image"):
        decode_file(data[: int(len(data) * keep)])


def test_files_that_are_no_images(tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("The heart is normal.")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    for name, reason in (
        ("notes.png", "not an image file"),
        ("empty.png", "empty file"),
        ("folder.png", "a folder"),
        ("absent.png", "file not found"),
        ("x" * 300 + ".png", "can't be read"),
        ("nul\0.png", "can't be read"),
    ):
        with pytest.raises(BadImageError, match=reason):
            decode_file(fetch(f"{tmp_path}/{name}"))
    with pytest.raises(BadImageError, match="no image path"):
        fetch("")


def test_names_with_blanks_and_umlauts(tmp_path: Path) -> None:
    path = tmp_path / "Röntgen bild #1 [a].png"
    path.write_bytes(file_of(Image.fromarray(GRAY)))
    assert np.array_equal(decode_file(fetch(str(path))), GRAY)


@given(height=st.integers(1, 5000), width=st.integers(1, 5000), limit=st.integers(32, 2000), by_longest=st.booleans())
def test_reduced_sizes_meet_the_limit_and_keep_the_ratio(height: int, width: int, limit: int, by_longest: bool) -> None:
    longest, shorter = (limit, None) if by_longest else (None, limit)
    encoder = ImageEncoder(ImageEncoder.Config(longest_side=longest, shorter_side=shorter))
    new_height, new_width = encoder.target_size(height, width)
    pick = max if by_longest else min
    assert pick(new_height, new_width) == min(pick(height, width), limit)
    assert new_height <= height and new_width <= width
    scale = pick(new_height, new_width) / pick(height, width)
    assert abs(new_height - height * scale) <= 1 and abs(new_width - width * scale) <= 1


def test_bspline_passes_through_smooth_pixels_and_keeps_the_depth() -> None:
    deep = np.rint(smooth(400, 300, top=60000)).astype(np.uint16)
    spline, area = (
        ImageEncoder(ImageEncoder.Config(longest_side=None, shorter_side=150, resize=how, format="png", bits=16))
        for how in ("bspline", "area")
    )
    assert spline.prepare(deep).shape == area.prepare(deep).shape == (200, 150)
    assert np.abs(spline.prepare(deep).astype(int) - area.prepare(deep)).max() < 300  # of 65535: both follow the ramp
    sharp = np.zeros((400, 300), np.uint8)
    sharp[:, 150:] = 255
    edge = spline.prepare(sharp)
    assert edge.dtype == np.uint8 and (edge[:, :70] == 0).all() and (edge[:, 80:] == 255).all()  # overshoot is cut off
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (400, 300), dtype=np.uint8)
    assert spline.prepare(noise).std() > 1.3 * area.prepare(noise).std()  # no smoothing before it


@given(height=st.integers(1, 300), width=st.integers(1, 300))
def test_bars_make_a_square_and_masks_follow(height: int, width: int) -> None:
    encoder = ImageEncoder(ImageEncoder.Config(longest_side=64, pad=True, format="png"))
    image = np.full((height, width), 200, np.uint8)
    stored, mask = encoder.prepare(image), decode_mask(encoder.encode_mask(np.ones((height, width), bool)))
    new_height, new_width = encoder.target_size(height, width)
    assert stored.shape == mask.shape == (64, 64) and (stored > 0).sum() == new_height * new_width
    assert np.array_equal(stored > 0, mask)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    assert abs(rows[0] - (63 - rows[-1])) <= 1 and abs(columns[0] - (63 - columns[-1])) <= 1


def test_png_is_lossless_and_jpeg_is_close() -> None:
    png = ImageEncoder(ImageEncoder.Config(format="png"))
    jpeg = ImageEncoder(ImageEncoder.Config())
    assert np.array_equal(decode(png.encode(GRAY).data), GRAY)
    assert np.abs(decode(jpeg.encode(GRAY).data).astype(int) - GRAY).max() <= 8
    encoded = jpeg.encode(GRAY)
    assert (encoded.height, encoded.width, encoded.bits) == (96, 80, 8)
    assert encoded.data == jpeg.encode(GRAY).data


def test_sixteen_bits_are_kept_by_option() -> None:
    encoder = ImageEncoder(ImageEncoder.Config(format="png", bits=16, longest_side=None))
    deep = np.rint(smooth(top=65535)).astype(np.uint16)
    encoded = encoder.encode(encoder.prepare(deep))
    assert encoded.bits == 16 and np.array_equal(decode(encoded.data), deep)
    assert encoder.encode(encoder.prepare(GRAY)).bits == 8


def test_masks_follow_the_image_to_its_size() -> None:
    encoder = ImageEncoder(ImageEncoder.Config(longest_side=100))
    mask = np.zeros((300, 200), dtype=bool)
    mask[150:240, 40:100] = True
    small = decode_mask(encoder.encode_mask(mask))
    assert small.shape == encoder.prepare(np.zeros((300, 200), np.uint8)).shape
    assert abs(small.mean() - mask.mean()) < 0.005 and small[60, 20] and not small[20, 20]
    same = ImageEncoder(ImageEncoder.Config(longest_side=None))
    assert np.array_equal(decode_mask(same.encode_mask(mask)), mask)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shorter_side": 100}, "set the other to null"),
        ({"longest_side": 8}, "longest_side=8"),
        ({"pad": True, "longest_side": None}, "name the side of the square"),
        ({"resize": "cubic"}, "use area or bspline"),
        ({"bits": 16}, "use format=png"),
        ({"quality": 0}, "quality=0"),
        ({"quality": 90, "format": "png"}, "PNG is lossless"),
        ({"format": "gif"}, "use jpeg or png"),
    ],
)
def test_options_that_contradict_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageEncoder.Config(**options)


def test_damaged_shard_bytes_are_no_image() -> None:
    with pytest.raises(ValueError, match="shards verify"):
        decode(b"\xff\xd8 nothing")
