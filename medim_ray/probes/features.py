"""Frozen features of images, by several encoders in one pass: Ray Data decodes and crops, a pool of actors encodes.

Through the object store travel uint8 gray centre crops. A row group is one unit of work and is encoded in batches of
its own, so features do not depend on the number of actors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import cv2
import numpy as np
import ray
import torch
from numpy.typing import NDArray

from medim_ray.data.reader import VIEW, crop_views, decode_gray
from medim_ray.data.shards import ShardSet
from medim_ray.data.transforms import Crop
from medim_ray.models.vit import ImageEncoder
from medim_ray.probes.rows import RowList, RowReader, work_items
from medim_ray.probes.stream import item_of, pooled

PIXELS_SIDE = 32
_BATCH = 32

Encode = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""[B, H, W] uint8 gray crops -> [B, d] features."""
MakeEncode = Callable[[str], Encode]
"""Builds an `Encode` on a device ("cpu", "cuda"); sent to the actors, so it must be picklable."""


@dataclass(frozen=True, kw_only=True)
class Features:
    """features: encoder name -> [K, d], rows as `rows`; images_per_s: rate of the pass, start of actors left out."""

    rows: RowList
    features: Mapping[str, NDArray[np.float32]]
    images_per_s: float


def raw_pixels(device: str) -> Encode:
    """The crop averaged over areas down to 32 x 32, as [B, 1024] in [0, 1]."""

    def encode(pixels_BHW: NDArray[np.uint8]) -> NDArray[np.float32]:
        side = (PIXELS_SIDE, PIXELS_SIDE)
        small = [cv2.resize(image_HW, side, interpolation=cv2.INTER_AREA) for image_HW in pixels_BHW]
        return np.stack(small).reshape(len(small), -1).astype(np.float32) / np.float32(255.0)

    return encode


def frozen_encoder(encoder: ImageEncoder) -> MakeEncode:
    """The encoder with its present weights, put into the object store once."""
    weights = ray.put({name: tensor.detach().cpu() for name, tensor in encoder.state_dict().items()})
    return partial(_load_encoder, encoder.config, weights)


def _load_encoder(config: ImageEncoder.Config, weights: Any, device: str) -> Encode:
    encoder = ImageEncoder(replace(config, init="random"))  # the weights come from the object store
    encoder.load_state_dict(ray.get(weights))
    encoder = encoder.float().eval().to(device)

    @torch.no_grad()
    def encode(pixels_BHW: NDArray[np.uint8]) -> NDArray[np.float32]:
        images_B1HW = torch.from_numpy(np.ascontiguousarray(pixels_BHW)).to(device)[:, None].float() / 255.0
        out = encoder(images_B1HW)
        return torch.cat([out.global_BD, out.patches_BND.mean(dim=1)], dim=1).cpu().numpy()

    return encode


def extract(
    shards: ShardSet, rows: RowList, crop: Crop, encoders: Mapping[str, MakeEncode], use_gpu: bool = False
) -> Features:
    """Features of `rows` by each encoder, float32, in the order of `rows`. Needs a running Ray.

    The centre crop of the first view is encoded. use_gpu: one GPU an actor.
    """
    found: dict[str, NDArray[np.float32]] = {}
    started = 0.0
    decode = partial(_decode, reader=RowReader.of(shards, "image_id", "image"), crop=crop)
    arguments = (dict(encoders), "cuda" if use_gpu else "cpu")
    for block in pooled(work_items(rows), _EncodeActor, arguments, use_gpu, before=decode):
        started = started or float(block["started"].min())
        for name in encoders:
            values = block[name]
            target = found.setdefault(name, np.empty((len(rows), values.shape[1]), dtype=np.float32))
            target[block["position"]] = values
    return Features(rows=rows, features=found, images_per_s=len(rows) / max(time.time() - started, 1e-9))


def _decode(batch: dict[str, NDArray[Any]], reader: RowReader, crop: Crop) -> dict[str, NDArray[Any]]:
    """Ray task: one work item to its centre crops."""
    cv2.setNumThreads(1)
    item = item_of(batch)
    images = [decode_gray(row["image"], row["image_id"]) for row in reader(item)]
    plans = dict(crop.plan(np.array([image.shape for image in images]), None))
    pixels = crop_views(images, crop, plans)[f"{VIEW}{crop.views[0].name}"]
    return {"position": np.asarray(item["positions"], dtype=np.int64), "pixels": pixels[:, 0]}


class _EncodeActor:
    """One process of the encoding pool."""

    def __init__(self, encoders: Mapping[str, MakeEncode], device: str) -> None:
        self._encoders = {name: make(device) for name, make in encoders.items()}
        self._started = time.time()

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        pixels = batch["pixels"]
        starts = range(0, len(pixels), _BATCH)
        out = {
            name: np.concatenate([encode(pixels[start : start + _BATCH]) for start in starts])
            for name, encode in self._encoders.items()
        }
        return {"position": batch["position"], "started": np.full(len(pixels), self._started), **out}
