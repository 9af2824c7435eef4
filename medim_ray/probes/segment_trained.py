"""Segmentation by heads that are trained by gradients (models/segmentation.py), below them a frozen or trained encoder.

The rows, the choice of the threshold and what is judged are those of the linear head (segment.py). One Ray task an
encoder; it decodes its own crops. Of a frozen encoder the maps are kept, where they fit into `_MOST_BYTES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from medim_ray.config.probe import SegmentConfig
from medim_ray.data.reader import VIEW
from medim_ray.data.shards import ShardSet
from medim_ray.models.segmentation import build_head, segmentation_loss
from medim_ray.probes.bootstrap import Floats
from medim_ray.probes.features import Source
from medim_ray.probes.rows import RowList, RowReader, centre_columns, work_items
from medim_ray.probes.segment import WHOLE_IMAGE, Segmented, SegmentRows
from medim_ray.probes.segment_linear import best_threshold
from medim_ray.probes.trainable import Trainable
from medim_ray.probes.truth import dice, target_masks
from medim_ray.probes.tune import fit, seeded
from medim_ray.types import BOX

_BATCH = 16
_MOST_BYTES = 2 << 30


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Crops with the masks of every target."""

    pixels_BHW: NDArray[np.uint8]
    masks_BTHW: NDArray[np.bool_]

    def take(self, at: NDArray[np.int64]) -> Labelled:
        """The crops at these positions."""
        return Labelled(pixels_BHW=self.pixels_BHW[at], masks_BTHW=self.masks_BTHW[at])


def segment_trained(
    shards: ShardSet,
    sources: Mapping[str, Source],
    rows: SegmentRows,
    heads: Sequence[str],
    config: SegmentConfig,
    seed: int,
    use_gpu: bool,
) -> dict[str, Segmented]:
    """head -> what it came to with every encoder. Needs a running Ray."""
    # "DEFAULT": as in scoring.py
    remote = ray.remote(num_cpus=0 if use_gpu else 1, num_gpus=float(use_gpu), scheduling_strategy="DEFAULT")(_task)
    reader = RowReader.of(shards, "image_id", "image", "truth")
    shared = ray.put((reader, rows))
    device = "cuda" if use_gpu else "cpu"
    pending = [remote.remote(source, shared, tuple(heads), config, seed, device) for source in sources.values()]
    found = dict(zip(sources, ray.get(pending), strict=True))
    first = next(iter(found.values()))
    return {
        head: Segmented(
            dice_K={(name, t): of[head].dice_K[t] for name, of in found.items() for t in of[head].dice_K}
            | {(WHOLE_IMAGE, t): values for t, values in first[head].whole_K.items()},
            empty_K=first[head].empty_K,
            thresholds={(name, t): of[head].thresholds[t] for name, of in found.items() for t in of[head].thresholds},
            problems=first[head].problems,
        )
        for head in heads
    }


@dataclass(frozen=True, kw_only=True)
class OneEncoder:
    """What a head of one encoder came to, by target; see Segmented."""

    dice_K: Mapping[str, Floats]
    whole_K: Mapping[str, Floats]
    empty_K: Mapping[str, NDArray[np.bool_]]
    thresholds: Mapping[str, float]
    problems: Mapping[str, str]


def _task(
    source: Source, shared: tuple[RowReader, SegmentRows], heads: Sequence[str], config: SegmentConfig, seed: int,
    device: str,
) -> dict[str, OneEncoder]:  # fmt: skip
    """Ray task: every head of one encoder."""
    torch.set_num_threads(1 if device == "cpu" else torch.get_num_threads())
    cv2.setNumThreads(1)
    reader, rows = shared
    learned = np.array([image_id not in rows.chosen for image_id in rows.learned.image_ids])
    every = _read(reader, rows.learned, source, config.targets)
    learn, choose = every.take(np.flatnonzero(learned)), every.take(np.flatnonzero(~learned))
    judged = partial(_blocks, reader, rows.judged, source, config.targets)
    found = {}
    for name in heads:
        encoder = source.make(device).trainable().to(device)
        head, thresholds, problems = train_head(encoder, name, learn, choose, config, seed, device)
        found[name] = _judge(encoder, head, thresholds, problems, judged, len(rows.judged), config.targets, device)
    return found


def train_head(
    encoder: Trainable, name: str, learn: Labelled, choose: Labelled, config: SegmentConfig, seed: int, device: str
) -> tuple[nn.Module, dict[str, float], dict[str, str]]:
    """The head in evaluation mode, the threshold of each target, and target -> why it has none.

    Stops early by the loss on `choose`, on which the thresholds are chosen too. ValueError: fewer images than two.
    """
    if len(learn.pixels_BHW) < 2:
        raise ValueError(f"probe.segment.heads: {name} needs two training images with truth or more")
    with seeded(seed):
        side = learn.pixels_BHW.shape[-1]
        with torch.no_grad():
            maps = encoder.eval().maps(_images(learn.pixels_BHW[:1], device))
        stride = side // maps[-1].shape[-1]
        head = build_head(name, encoder.widths, encoder.is_pyramid, stride, len(config.targets)).to(device)
        maps_of = _maps_of(encoder, learn.pixels_BHW, sum(x.numel() for x in maps), config.tune_encoder, device)

        def loss_of(at: NDArray[np.int64]) -> Tensor:
            masks = torch.from_numpy(learn.masks_BTHW[at]).to(device)
            return segmentation_loss(_enlarged(head(maps_of(at)), side), masks)

        def judge() -> float:
            maps_in = _batches(encoder, choose, device)
            losses = [float(segmentation_loss(_enlarged(head(maps), side), masks)) for maps, masks in maps_in]
            return float(np.mean(losses))

        fit(encoder, head, len(learn.pixels_BHW), loss_of, judge, config.tune, seed, config.tune_encoder)
    return head, *_thresholds(encoder, head, learn, choose, config.targets, device)


def _thresholds(
    encoder: Trainable, head: nn.Module, learn: Labelled, choose: Labelled, targets: Sequence[str], device: str
) -> tuple[dict[str, float], dict[str, str]]:
    """The threshold of each target, chosen as the linear head's, and target -> why it has none."""
    thresholds, problems = {}, {}
    found = predict(encoder, head, choose.pixels_BHW, device)
    for t, target in enumerate(targets):
        with_K = [i for i, masks in enumerate(choose.masks_BTHW) if masks[t].any()]
        if not learn.masks_BTHW[:, t].any():
            problems[target] = "no training image shows it"
        elif not with_K:
            problems[target] = "no training image that the threshold is chosen on shows it"
        else:
            thresholds[target] = best_threshold([(found[i, t], choose.masks_BTHW[i, t]) for i in with_K])[0]
    return thresholds, problems


@torch.no_grad()
def predict(encoder: Trainable, head: nn.Module, pixels_BHW: NDArray[np.uint8], device: str) -> NDArray[np.float32]:
    """[B, T, H, W] probabilities at the size of the crops."""
    side = pixels_BHW.shape[-1]
    parts = []
    for start in range(0, len(pixels_BHW), _BATCH):
        logits = head(encoder.maps(_images(pixels_BHW[start : start + _BATCH], device)))
        parts.append(_enlarged(logits, side).sigmoid().float().cpu().numpy())
    return np.concatenate(parts)


def _judge(
    encoder: Trainable, head: nn.Module, thresholds: Mapping[str, float], problems: Mapping[str, str],
    blocks: Callable[[], Iterator[tuple[NDArray[np.int64], Labelled]]], num: int, targets: Sequence[str], device: str,
) -> OneEncoder:  # fmt: skip
    """Dice of each judged image, block by block."""
    dices = {target: np.full(num, np.nan) for target in thresholds}
    wholes = {target: np.full(num, np.nan) for target in targets}
    empties = {target: np.zeros(num, dtype=np.bool_) for target in targets}
    for at, block in blocks():
        found = predict(encoder, head, block.pixels_BHW, device)
        for t, target in enumerate(targets):
            masks = block.masks_BTHW[:, t]
            empties[target][at] = ~masks.any(axis=(1, 2))
            wholes[target][at] = [dice(np.ones_like(mask), mask) for mask in masks]
            if target in thresholds:
                maps = found[:, t] >= thresholds[target]
                dices[target][at] = [dice(*pair) for pair in zip(maps, masks, strict=True)]
    return OneEncoder(
        dice_K=dices, whole_K=wholes, empty_K=empties, thresholds=dict(thresholds), problems=dict(problems)
    )


# --- Images --------------------------------------------------------------------------------------------------------


def _blocks(
    reader: RowReader, rows: RowList, source: Source, targets: Sequence[str]
) -> Iterator[tuple[NDArray[np.int64], Labelled]]:
    """Row group by row group: positions in `rows`, and the crops that the encoder wants with their masks."""
    name = source.crop.views[0].name
    for item in work_items(rows):
        stored = reader(item)
        columns, _ = centre_columns(stored, source.crop, None)
        masks = target_masks(stored, columns[BOX], source.crop.views[0].size, targets)
        pixels: NDArray[np.uint8] = columns[f"{VIEW}{name}"][:, 0]
        yield np.asarray(item["positions"], dtype=np.int64), Labelled(pixels_BHW=pixels, masks_BTHW=masks)


def _read(reader: RowReader, rows: RowList, source: Source, targets: Sequence[str]) -> Labelled:
    """All of `rows` in their order."""
    blocks = list(_blocks(reader, rows, source, targets))
    order = np.argsort(np.concatenate([at for at, _ in blocks]))
    return Labelled(
        pixels_BHW=np.concatenate([block.pixels_BHW for _, block in blocks])[order],
        masks_BTHW=np.concatenate([block.masks_BTHW for _, block in blocks])[order],
    )


def _images(pixels_BHW: NDArray[np.uint8], device: str) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels_BHW)).to(device)[:, None].float() / 255.0


def _enlarged(logits_BTHW: Tensor, side: int) -> Tensor:
    return F.interpolate(logits_BTHW.float(), size=(side, side), mode="bilinear", align_corners=False)


def _batches(encoder: Trainable, of: Labelled, device: str) -> Iterator[tuple[list[Tensor], Tensor]]:
    for start in range(0, len(of.pixels_BHW), _BATCH):
        part = slice(start, start + _BATCH)
        yield encoder.maps(_images(of.pixels_BHW[part], device)), torch.from_numpy(of.masks_BTHW[part]).to(device)


def _maps_of(
    encoder: Trainable, pixels_BHW: NDArray[np.uint8], num_an_image: int, trains: bool, device: str
) -> Callable[[NDArray[np.int64]], list[Tensor]]:
    """From positions of images to their maps: with gradients where the encoder is trained, else from memory if it has
    room for them in half precision, else by another forward."""
    if trains:
        return lambda at: encoder.maps(_images(pixels_BHW[at], device))

    @torch.no_grad()
    def forward(at: NDArray[np.int64]) -> list[Tensor]:
        return encoder.maps(_images(pixels_BHW[at], device))

    num = len(pixels_BHW)
    if 2 * num_an_image * num > _MOST_BYTES:
        return forward
    parts = [forward(np.arange(start, min(start + _BATCH, num))) for start in range(0, num, _BATCH)]
    kept = [torch.cat([part[k].half() for part in parts]) for k in range(len(parts[0]))]
    return lambda at: [x[torch.from_numpy(at).to(device)].float() for x in kept]
