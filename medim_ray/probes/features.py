"""Frozen features of images, by several encoders in one pass: Ray Data decodes and crops, a pool of actors encodes.

Through the object store travel uint8 gray centre crops. A row group is one unit of work and is encoded in batches of
its own, so features do not depend on the number of actors. What the encoders are: encoders.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from medim_ray.data.reader import VIEW, crop_views
from medim_ray.data.rows import decode_gray
from medim_ray.data.shards import ShardSet
from medim_ray.data.transforms import Crop
from medim_ray.probes.rows import RowList, RowReader, work_items
from medim_ray.probes.stream import Block, item_of, pooled
from medim_ray.types import BOX

if TYPE_CHECKING:  # tasks that decode load no torch
    from medim_ray.probes.trainable import Trainable

_BATCH = 32
_PIXELS, _NOTES = "pixels/", "annotations/"

Annotate = Callable[[Sequence[Mapping[str, Any]], NDArray[np.float32], int], NDArray[Any]]
"""Rows, their boxes_B4 (fractions of the stored image) and the crop's size -> one array, first axis B."""


class Encoder(Protocol):
    """A frozen encoder on a device."""

    def features(self, pixels_BHW: NDArray[np.uint8]) -> NDArray[np.float32]:
        """[B, d] of uint8 gray crops."""
        ...

    def patches(self, pixels_BHW: NDArray[np.uint8]) -> NDArray[np.float32]:
        """[B, N, d'] of uint8 gray crops, patches of a square grid, row by row."""
        ...

    def trainable(self) -> Trainable:
        """The same encoder as a module with gradients, sharing its weights."""
        ...


@dataclass(frozen=True, kw_only=True)
class Source:
    """An encoder to build and the crop it wants.

    make: from a device ("cpu", "cuda"); it is sent to the actors, so it must be picklable. crop_key: tells equal crops,
    of which an image is cut only one. key: what the features are a function of, besides the images. has_weights: there
    is something to train.
    """

    make: Callable[[str], Encoder]
    crop: Crop
    crop_key: str
    key: str
    has_weights: bool = True


@dataclass(frozen=True, kw_only=True)
class Features:
    """features: encoder name -> [K, d], rows as `rows`; images_per_s: rate of the pass, start of actors left out."""

    rows: RowList
    features: Mapping[str, NDArray[np.float32]]
    images_per_s: float


Blocks = Callable[..., Iterator[Block]]
"""`encoded_here`, or `encoded_blocks` with its `use_gpu`: (shards, rows, sources, actor, more, columns, annotate)."""


def extract(shards: ShardSet, rows: RowList, sources: Mapping[str, Source], use_gpu: bool = False) -> Features:
    """Features of `rows` by each encoder, float32, in the order of `rows`. Needs a running Ray.

    The centre crop of the first view is encoded; an image is decoded once. use_gpu: one GPU an actor.
    """
    return _gathered(encoded_blocks(shards, rows, sources, _EncodeActor, (), use_gpu=use_gpu), rows, sources)


def extract_here(shards: ShardSet, rows: RowList, source: Source) -> NDArray[np.float32]:
    """[K, d] features of `rows` by one encoder, as `extract`, in this process."""
    blocks = encoded_here(shards, rows, {"": source}, _EncodeActor, ())
    return _gathered(blocks, rows, {"": source}).features[""]


def _gathered(blocks: Iterator[Block], rows: RowList, names: Iterable[str]) -> Features:
    found: dict[str, NDArray[np.float32]] = {}
    started = 0.0
    for block in blocks:
        started = started or float(block["started"].min())
        for name in names:
            values = block[name]
            target = found.setdefault(name, np.empty((len(rows), values.shape[1]), dtype=np.float32))
            target[block["position"]] = values
    return Features(rows=rows, features=found, images_per_s=len(rows) / max(time.time() - started, 1e-9))


def encoded_blocks(
    shards: ShardSet,
    rows: RowList,
    sources: Mapping[str, Source],
    actor: type,
    more: tuple[Any, ...],
    columns: Sequence[str] = (),
    annotate: Annotate | None = None,
    *,
    use_gpu: bool,
) -> Iterator[Block]:
    """What `actor(sources, device, *more)` makes of the blocks of `decode_crops`, in any order.

    columns: of the shards, beside id and image, that `annotate` reads.
    """
    crops = {source.crop_key: source.crop for source in sources.values()}
    decode = partial(
        decode_crops, reader=RowReader.of(shards, "image_id", "image", *columns), crops=crops, annotate=annotate
    )
    arguments = (dict(sources), "cuda" if use_gpu else "cpu", *more)
    return pooled(work_items(rows), actor, arguments, use_gpu, before=decode)


def encoded_here(
    shards: ShardSet,
    rows: RowList,
    sources: Mapping[str, Source],
    actor: type,
    more: tuple[Any, ...],
    columns: Sequence[str] = (),
    annotate: Annotate | None = None,
) -> Iterator[Block]:
    """As `encoded_blocks`, in this process and in the order of the shards: for a probe that is one Ray task itself."""
    crops = {source.crop_key: source.crop for source in sources.values()}
    reader = RowReader.of(shards, "image_id", "image", *columns)
    made = actor(dict(sources), "cpu", *more)
    for item in work_items(rows):
        yield made(decode_item(item, reader, crops, annotate))


def decode_crops(batch: Block, reader: RowReader, crops: Mapping[str, Crop], annotate: Annotate | None) -> Block:
    """Ray task: one work item to the centre crops of its images, each with what `annotate` makes of it."""
    cv2.setNumThreads(1)
    return decode_item(item_of(batch), reader, crops, annotate)


def decode_item(
    item: Mapping[str, Any], reader: RowReader, crops: Mapping[str, Crop], annotate: Annotate | None
) -> Block:
    """The centre crops of a work item's images by crop, each with what `annotate` makes of it."""
    rows = reader(item)
    images = [decode_gray(row["image"], row["image_id"]) for row in rows]
    out: Block = {
        "position": np.asarray(item["positions"], dtype=np.int64),
        "image_id": np.array([row["image_id"] for row in rows], dtype=object),
    }
    for key, crop in crops.items():
        plans = dict(crop.plan(np.array([image.shape for image in images]), None))
        columns = crop_views(images, crop, plans)
        out[_PIXELS + key] = columns[f"{VIEW}{crop.views[0].name}"][:, 0]
        if annotate is not None:
            out[_NOTES + key] = annotate(rows, columns[BOX], crop.views[0].size)
    return out


def pixels_of(batch: Mapping[str, NDArray[Any]], source: Source) -> NDArray[np.uint8]:
    """[B, H, W] the crops of a block that this encoder wants."""
    return batch[_PIXELS + source.crop_key]


def annotations_of(batch: Mapping[str, NDArray[Any]], source: Source) -> NDArray[Any]:
    """[B, ...] what `annotate` made for the crops that this encoder wants."""
    return batch[_NOTES + source.crop_key]


class _EncodeActor:
    """One process of the encoding pool."""

    def __init__(self, sources: Mapping[str, Source], device: str) -> None:
        self._sources = sources
        self._encoders = {name: source.make(device) for name, source in sources.items()}
        self._started = time.time()

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        num = len(batch["position"])
        starts = range(0, num, _BATCH)
        out = {}
        for name, encoder in self._encoders.items():
            pixels = pixels_of(batch, self._sources[name])
            out[name] = np.concatenate([encoder.features(pixels[start : start + _BATCH]) for start in starts])
        return {"position": batch["position"], "started": np.full(num, self._started), **out}
