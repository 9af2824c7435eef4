"""Question: which decoder is fastest for the JPEGs of a shard set, are its pixels the same, does DCT scaling pay?

    python -m benchmarks.decoders SHARDS [--num 96] [--rounds 15] [--size 224]

Every decoder takes the same encoded bytes to uint8 gray; of each image the fastest of the rounds counts. "crop" adds
MedIM's resize and crop (pad_crop) with the functions of the stream. Differences are to Pillow's pixels, of the crop to
the crop of the image decoded in full.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Callable, Sequence
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

    def of_torchvision(data: bytes) -> Gray:
        pixels: Any = torchvision.io.decode_jpeg(
            torch.frombuffer(bytearray(data), dtype=torch.uint8), torchvision.io.ImageReadMode.GRAY
        )
        return np.asarray(pixels[0])

    known: dict[str, Callable[[bytes], Gray]] = {
        BASE: pillow,
        "OpenCV": lambda data: decode_gray(data, ""),
        "OpenCV, half size": lambda data: decode_gray(data, "", 2.0),
        "imagecodecs": lambda data: np.asarray(imagecodecs.jpeg8_decode(data)),
        "torchvision": of_torchvision,
    }
    try:
        import simplejpeg

        known["simplejpeg"] = lambda data: simplejpeg.decode_jpeg(data, "GRAY")[:, :, 0]
    except ImportError:
        print("simplejpeg: not available here (`make peers` has it)")
    return known


def best_us(work: Callable[[Any], object], items: Sequence[Any], rounds: int) -> float:
    """Microseconds of this thread an item: the mean over the items of their fastest rounds."""
    taken = np.empty((rounds, len(items)))
    for turn in range(rounds):
        for place, item in enumerate(items):
            start = time.thread_time()
            work(item)
            taken[turn, place] = time.thread_time() - start
    return float(taken.min(axis=0).mean()) * 1e6


def main() -> None:
    """Prints a line a decoder and a JSON record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards")
    parser.add_argument("--num", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=15)
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
    reference = [known[BASE](data) for data in images]
    table = {}
    whole = crops(full)
    for name, decode in known.items():
        pixels = [decode(data) for data in images]
        pairs = list(zip(pixels, plan.boxes_BK4, strict=True))
        same = all(np.array_equal(a, b) for a, b in zip(pixels, reference, strict=True))
        apart = np.mean([np.abs(a.astype(int) - b).mean() for a, b in zip(crops(pixels), whole, strict=True)])
        each = best_us(decode, images, args.rounds)
        crop = best_us(lambda pair: cut(pair[0], pair[1][0], args.size), pairs, args.rounds)
        table[name] = {"decode_us": each, "crop_us": crop, "same_pixels": same, "crop_difference": float(apart)}
        print(
            f"{name:22} {each:6.0f} us to decode, {crop:6.0f} us to crop; pixels {'equal' if same else 'differ'}; "
            f"crops differ by {apart:.2f} grey levels"
        )
    names = ("pillow", "opencv-python-headless", "imagecodecs", "torchvision", "numpy")
    versions = {name: version(name) for name in names}
    what = {"num": len(images), "mean_bytes": sum(map(len, images)) / len(images), "size": args.size, "table": table}
    where = {"machine": this_machine(), "versions": versions, "commit": package_commit()}
    print(json.dumps({**what, **where, "when": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")}))


if __name__ == "__main__":
    main()
