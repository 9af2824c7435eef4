"""Image files of any kind to grayscale pixels, and grayscale pixels to the encoded bytes that shards hold.

Decoding here is the careful one of `medim-ray prepare` (Pillow: palettes, alpha, EXIF, 16 bit, damaged files are
found); shards are decoded by `decode`, which trusts them. DICOM is read in dicom.py.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from medim_ray.data.storage import read_bytes

Gray = NDArray[np.uint8] | NDArray[np.uint16]


class BadImageError(ValueError):
    """One row's image can't be read; the message is the reason that quarantine.parquet states (no pixel, no text)."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """An encoded grayscale image: `data` is a JPEG or PNG file of `height` x `width` pixels with `bits` 8 or 16."""

    data: bytes
    height: int
    width: int
    bits: int


class ImageEncoder:
    """Resizes (never enlarges) and encodes grayscale images of [H, W] uint8 or uint16."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        longest_side: int | None = field(
            default=512,
            metadata={
                "help": "longest side in pixels, larger images are reduced (MedIM trains on 240, 512 leaves room for "
                "crops); null: no limit"
            },
        )
        shorter_side: int | None = field(
            default=None,
            metadata={"help": "shorter side in pixels, as RAD-DINO (518); needs longest_side=null; null: no limit"},
        )
        resize: Literal["area", "bspline"] = field(
            default="area",
            metadata={
                "help": "area: mean over the pixels that become one; bspline: cubic B-spline without smoothing before "
                "it, as RAD-DINO, many times slower"
            },
        )
        pad: bool = field(
            default=False,
            metadata={
                "help": "black bars make a square of longest_side (MedIM's layout); false: the crops pad instead"
            },
        )
        format: Literal["jpeg", "png"] = field(
            default="jpeg", metadata={"help": "jpeg (8 bit, lossy) or png (lossless, 8 or 16 bit)"}
        )
        quality: int | None = field(
            default=None, metadata={"help": "JPEG quality, 1 to 100; null: 95, and the only choice for png"}
        )
        bits: Literal[8, 16] = field(
            default=8, metadata={"help": "16 keeps 16-bit files at 16 bit (png only); 8-bit files stay 8 bit"}
        )

        def __post_init__(self) -> None:
            for key in ("longest_side", "shorter_side"):
                value = getattr(self, key)
                if value is not None and value < 32:
                    raise ValueError(f"{key}={value}: at least 32 pixels, or null for no limit")
            if self.longest_side is not None and self.shorter_side is not None:
                raise ValueError(
                    f"longest_side={self.longest_side} and shorter_side={self.shorter_side}: an image is reduced by "
                    "one of the two; set the other to null"
                )
            if self.resize not in ("area", "bspline"):
                raise ValueError(f"resize={self.resize!r}: use area or bspline")
            if self.pad and self.longest_side is None:
                raise ValueError("pad=true with longest_side=null: name the side of the square as longest_side")
            if self.format not in ("jpeg", "png"):
                raise ValueError(f"format={self.format!r}: use jpeg or png")
            if self.quality is not None and not 1 <= self.quality <= 100:
                raise ValueError(f"quality={self.quality}: JPEG quality is between 1 and 100")
            if self.quality is not None and self.format == "png":
                raise ValueError(f"quality={self.quality} with format=png: PNG is lossless; set quality to null")
            if self.bits not in (8, 16):
                raise ValueError(f"bits={self.bits}: use 8 or 16")
            if self.bits == 16 and self.format != "png":
                raise ValueError("bits=16 with format=jpeg: JPEG holds 8 bits; use format=png")

    def __init__(self, config: Config) -> None:
        self.config = config

    def target_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the reduced image, without bars; the aspect ratio is kept up to rounding."""
        limit, side = self.config.longest_side, max(height, width)
        if self.config.shorter_side is not None:
            limit, side = self.config.shorter_side, min(height, width)
        if limit is None or side <= limit:
            return height, width
        return max(1, round(height * limit / side)), max(1, round(width * limit / side))

    def prepare(self, image_HW: Gray) -> Gray:
        """The pixels that will be stored: reduced, depth as configured, with bars where `pad` says so."""
        height, width = self.target_size(*image_HW.shape)
        if (height, width) != image_HW.shape:
            if self.config.resize == "bspline":
                image_HW = _bspline(image_HW, height, width)
            else:
                image_HW = cv2.resize(image_HW, (width, height), interpolation=cv2.INTER_AREA)
        return self._padded(image_HW if image_HW.dtype == np.uint8 else _stretch(image_HW, self.config.bits))

    def _padded(self, image_HW: Gray) -> Gray:
        """Centred in a black square of `longest_side`, which images that were not reduced don't fill."""
        side = self.config.longest_side
        if not self.config.pad or side is None:
            return image_HW
        height, width = image_HW.shape
        square = np.zeros((side, side), dtype=image_HW.dtype)
        top, left = (side - height) // 2, (side - width) // 2
        square[top : top + height, left : left + width] = image_HW
        return square

    def encode(self, image_HW: Gray) -> Encoded:
        """The file of pixels that `prepare` returned. The same pixels give the same bytes."""
        if self.config.format == "jpeg":
            ok, data = cv2.imencode(".jpg", image_HW, [cv2.IMWRITE_JPEG_QUALITY, self.config.quality or 95])
        else:
            ok, data = cv2.imencode(".png", image_HW)
        assert ok, "OpenCV could not encode a grayscale image"
        height, width = image_HW.shape
        return Encoded(data=data.tobytes(), height=height, width=width, bits=8 * image_HW.dtype.itemsize)

    def encode_mask(self, mask_HW: NDArray[np.bool_]) -> bytes:
        """A 1-bit PNG of a mask of the ORIGINAL image at the stored size (a pixel is on where half of it is)."""
        height, width = self.target_size(*mask_HW.shape)
        pixels_HW = mask_HW.astype(np.uint8) * 255
        if (height, width) != mask_HW.shape:
            pixels_HW = cv2.resize(pixels_HW, (width, height), interpolation=cv2.INTER_AREA)
        padded_HW = self._padded((pixels_HW >= 128).astype(np.uint8) * 255)
        ok, data = cv2.imencode(".png", padded_HW, [cv2.IMWRITE_PNG_BILEVEL, 1])
        assert ok, "OpenCV could not encode a mask"
        encoded: bytes = data.tobytes()
        return encoded


def decode(data: bytes) -> Gray:
    """[H, W] uint8 or uint16 of an image from a shard. ValueError where the bytes are no image."""
    image_HW = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    if image_HW is None or image_HW.ndim != 2:
        raise ValueError(f"{len(data)} bytes are no grayscale image: run `medim-ray shards verify`")
    return image_HW


def decode_mask(data: bytes) -> NDArray[np.bool_]:
    """[H, W] bool of a mask from a shard's `truth` column."""
    return decode(data) > 0


def fetch(url: str) -> bytes:
    """The bytes of one row's file at any fsspec URL; remote storage that stumbles is asked again.

    BadImageError: the file can't be read. RuntimeError: its storage keeps failing, or needs a package that is not
    installed.
    """
    if not url:
        raise BadImageError("no image path")
    try:
        return read_bytes(url)
    except ImportError as error:  # it is the same for every image there, and a package mends it
        raise RuntimeError(f"images on {url.partition('://')[0]}:// can't be read: {error}") from None
    except FileNotFoundError:
        raise BadImageError("file not found") from None
    except PermissionError:
        raise BadImageError("no permission to read the file") from None
    except IsADirectoryError:
        raise BadImageError("a folder, not a file") from None
    except (OSError, ValueError) as error:  # a name too long or with NUL, a broken disk or link
        raise BadImageError(f"file can't be read: {type(error).__name__}") from None


def is_dicom(start: bytes) -> bool:
    """Whether a file that begins with these bytes (132 of them, if it has as many) is DICOM, perhaps without preamble:
    then it begins with the first tag of a dataset, group 0002 or 0008 with a small element, little or big endian."""
    return start[128:132] == b"DICM" or (
        len(start) >= 8
        and (
            (start[:2] in (b"\x02\x00", b"\x08\x00") and start[3:4] == b"\x00")
            or (start[:2] == b"\x00\x08" and start[2:3] == b"\x00")
        )
    )


def decode_file(data: bytes) -> Gray:
    """[H, W] uint8 or uint16 of an image file's bytes: upright (EXIF), luma of colour (ITU-R 601), alpha over black.

    16 bits stay 16 bits as stored, without scaling. BadImageError: empty, no image, truncated, damaged, too large.
    """
    if not data:
        raise BadImageError("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            image.load()  # decodes every pixel: Pillow raises where the data ends too early
            return _to_gray(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise BadImageError("not an image file") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise BadImageError(f"more than {Image.MAX_IMAGE_PIXELS} pixels") from None
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        if isinstance(error, BadImageError):
            raise
        reason = "truncated" if "truncated" in str(error) else "damaged"
        raise BadImageError(f"{reason} image file") from None


def _to_gray(image: Image.Image) -> Gray:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _wide_to_gray(np.asarray(image))
    if image.mode in ("LA", "PA", "RGBA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))  # outside the body a radiograph is black
        image = Image.alpha_composite(black, image)
    if image.mode not in ("1", "L"):
        image = image.convert("RGB")  # palettes, CMYK, YCbCr, Lab, HSV
    gray_HW: NDArray[np.uint8] = np.asarray(image.convert("L"))
    return gray_HW


def _wide_to_gray(values_HW: NDArray[Any]) -> NDArray[np.uint16]:
    """Modes I and F: whole values that fit 16 bits are kept, others are scaled to fit."""
    if not np.isfinite(values_HW).all():
        raise BadImageError("pixels that are no finite numbers")
    low, high = float(values_HW.min()), float(values_HW.max())
    if low >= 0 and high <= 65535 and values_HW.dtype.kind in "iu":
        return values_HW.astype(np.uint16)
    scale = 65535.0 / (high - low) if high > low else 0.0
    return np.rint((values_HW.astype(np.float64) - low) * scale).astype(np.uint16)


def _bspline(image_HW: Gray, height: int, width: int) -> Gray:
    """Reduced by a cubic B-spline through the pixels, sampled at the centres of the new ones."""
    from scipy import ndimage  # takes a third of a second, and only this option needs it

    factors = (height / image_HW.shape[0], width / image_HW.shape[1])
    values_HW = ndimage.zoom(image_HW.astype(np.float32), factors, order=3, mode="grid-mirror", grid_mode=True)
    assert values_HW.shape == (height, width)
    return np.rint(np.clip(values_HW, 0, np.iinfo(image_HW.dtype).max)).astype(image_HW.dtype)


def _stretch(image_HW: Gray, bits: int) -> Gray:
    """Darkest to brightest pixel over the full range of 8 or 16 bits (RAD-DINO's min-max): 16-bit files rarely use
    theirs, a 12-bit radiograph would be almost black. One value everywhere becomes 0."""
    low, high = int(image_HW.min()), int(image_HW.max())
    top = 255 if bits == 8 else 65535
    scaled_HW = np.rint((image_HW.astype(np.float64) - low) * (top / max(high - low, 1)))
    return scaled_HW.astype(np.uint8) if bits == 8 else scaled_HW.astype(np.uint16)
