"""Question: which decoder is fastest for the JPEGs of a shard set, are its pixels the same, does DCT scaling pay?

    python -m benchmarks.decoders SHARDS [--num 256] [--rounds 5] [--size 224]

Every decoder takes the same encoded bytes to uint8 gray; rounds alternate over the decoders. "crop" adds MedIM's resize
and crop (pad_crop) with the functions of the stream. Differences are to Pillow's pixels, of the crop to the crop of the
image decoded in full.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import cv2
import imagecodecs
import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image

from medim_ray.data.rows import decode_gray
from medim_ray.data.shards import ShardSet
from medim_ray.data.transforms import PadCrop, cut
from medim_ray.draws import Draws
from medim_ray.studies.origin import package_commit, this_machine

Gray = NDArray[np.uint8]
BASE = "Pillow"


def decoders() -> dict[str, Callable[[bytes], Gray]]:
    """Name and version -> encoded bytes to [H, W]."""

    def pillow(data: bytes) -> Gray:
        return np.asarray(Image.open(io.BytesIO(data)))

    def opencv(data: bytes) -> Gray:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE | cv2.IMREAD_ANYDEPTH)
        return np.asarray(pixels)

    def of_torchvision(data: bytes) -> Gray:
        pixels: Any = torchvision.io.decode_jpeg(
            torch.frombuffer(bytearray(data), dtype=torch.uint8), torchvision.io.ImageReadMode.GRAY
        )
        return np.asarray(pixels[0])

    known: dict[str, Callable[[bytes], Gray]] = {
        BASE: pillow,
        "OpenCV": opencv,
        "OpenCV, half size": lambda data: decode_gray(data, "", 2.0),
        "imagecodecs": lambda data: np.asarray(imagecodecs.jpeg8_decode(data)),
        "torchvision": of_torchvision,
        "simplejpeg": lambda data: decode_gray(data, ""),
    }
    return known


def seconds(work: Callable[[], object]) -> float:
    """Processor seconds of this thread."""
    start = time.thread_time()
    work()
    return time.thread_time() - start


def main() -> None:
    """Prints a line a decoder and a JSON record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards")
    parser.add_argument("--num", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=224)
    args = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    rows = ShardSet.open(args.shards).read_rows("train", ["image_id", "image"]).slice(0, args.num)
    images: list[bytes] = rows["image"].to_pylist()
    full = [decode_gray(data, "") for data in images]
    draws = Draws.of(0, np.zeros(len(images), dtype=np.int64), rows["image_id"].to_pylist())
    plan = PadCrop(PadCrop.Config(), args.size).plan(np.array([image.shape for image in full]), draws)["image"]

    def crops(pixels: list[Gray]) -> list[Gray]:
        return [cut(image, box[0], args.size) for image, box in zip(pixels, plan.boxes_BK4, strict=True)]

    known = decoders()
    decode_us: dict[str, list[float]] = {name: [] for name in known}
    crop_us: dict[str, list[float]] = {name: [] for name in known}
    pixels: dict[str, list[Gray]] = {}
    for _ in range(args.rounds):
        for name, decode in known.items():
            decode_us[name].append(seconds(lambda d=decode: [d(data) for data in images]) / len(images) * 1e6)  # type: ignore[misc]
            pixels[name] = [decode(data) for data in images]
            crop_us[name].append(seconds(lambda n=name: crops(pixels[n])) / len(images) * 1e6)  # type: ignore[misc]
    table = {}
    whole = crops(full)
    for name in known:
        same = all(np.array_equal(a, b) for a, b in zip(pixels[name], pixels[BASE], strict=True))
        apart = np.mean([np.abs(a.astype(int) - b).mean() for a, b in zip(crops(pixels[name]), whole, strict=True)])
        each, crop = statistics.median(decode_us[name]), statistics.median(crop_us[name])
        table[name] = {"decode_us": each, "crop_us": crop, "same_pixels": same, "crop_difference": float(apart)}
        print(
            f"{name:22} {each:6.0f} us to decode, {crop:6.0f} us to crop; pixels {'equal' if same else 'differ'}; "
            f"crops differ by {apart:.2f} grey levels"
        )
    names = ("pillow", "opencv-python-headless", "imagecodecs", "torchvision", "simplejpeg", "numpy")
    versions = {name: version(name) for name in names}
    what = {"num": len(images), "mean_bytes": sum(map(len, images)) / len(images), "size": args.size, "table": table}
    where = {"machine": this_machine(), "versions": versions, "commit": package_commit()}
    print(json.dumps({**what, **where, "when": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")}))


if __name__ == "__main__":
    main()
