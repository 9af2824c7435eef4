"""Segmentation from patch tokens: Dice of targets with pixel truth. Here the linear head, beside raw gray patches.

It is a ridge regression of the share of a patch that the target covers; its map is enlarged bilinearly and cut at a
threshold. Penalty and threshold are chosen on patients of the training split that no head is fitted on; judged are the
held-out images (val and test). Heads that are trained by gradients: segment_trained.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from medim_ray.config.probe import SegmentConfig
from medim_ray.data.shards import ShardSet
from medim_ray.draws import Draws
from medim_ray.probes.bootstrap import Estimate, Floats, bootstrap, mean
from medim_ray.probes.features import (
    Annotate,
    Blocks,
    Source,
    annotations_of,
    encoded_blocks,
    encoded_here,
    pixels_of,
)
from medim_ray.probes.results import compared
from medim_ray.probes.rows import RowList, list_rows, sources_with_truth
from medim_ray.probes.segment_linear import Head, Learn, fit_head
from medim_ray.probes.truth import dice, enlarged, patch_shares, target_masks

HELD_OUT = ("val", "test")
Truth = tuple[tuple[str, ...], Annotate]  # columns that encoded_blocks reads, and what it makes of them
MAX_IMAGES = 2000  # of the training split that the head sees
MAX_CHOOSING = 64  # images that penalty and threshold are chosen on
_NUM_PATCHES = 20_000  # that the head is fitted on
_BATCH = 32
WHOLE_IMAGE = "whole image"
TOKENS = "tokens"  # the one encoder of `dice_here`


@dataclass(frozen=True, kw_only=True)
class SegmentRows:
    """The images of the probe: learned from and judged; chosen: ids of those of the former that a head is chosen on.

    note: why there are none, or what was left out.
    """

    learned: RowList
    chosen: frozenset[str]
    judged: RowList
    note: str


def segment(
    shards: ShardSet,
    sources: Mapping[str, Source],
    config: SegmentConfig,
    num_bootstrap: int,
    seed: int,
    use_gpu: bool = False,
) -> dict[str, Any]:
    """`segmentation` of result.json: `targets` by the linear head, `heads` by the others. Needs a running Ray.

    Where there is nothing to judge, `note` says why and `targets` is empty.
    """
    rows = segment_rows(shards, list_rows(shards), seed)
    out: dict[str, Any] = {"note": rows.note, "num_images": 0, "num_patients": 0, "targets": {}, "heads": {}}
    if not len(rows.judged):
        return out
    out |= {"num_images": len(rows.judged), "num_patients": len(set(rows.judged.patient_ids))}
    tell = partial(_told, config.targets, list(sources), rows.judged.patient_ids, num_bootstrap, seed)
    if "linear" in config.heads and not config.tune_encoder:
        out["targets"] = tell(_linear(shards, sources, rows, config.targets, seed, _on_ray(use_gpu)))
    trained = [head for head in config.heads if head != "linear" or config.tune_encoder]
    if trained:
        from medim_ray.probes.segment_trained import segment_trained

        found = segment_trained(shards, sources, rows, trained, config, seed, use_gpu)
        suffix = "_tuned" if config.tune_encoder else ""
        out["heads"] = {f"{head}{suffix}": tell(of_head) for head, of_head in found.items()}
    return out


@dataclass(frozen=True, kw_only=True)
class Segmented:
    """What one kind of head came to on the judged images.

    dice_K: by (encoder, target), with WHOLE_IMAGE as an encoder that marks every pixel; empty_K: images without the
    target; problems: why a target has no head.
    """

    dice_K: Mapping[tuple[str, str], Floats]
    empty_K: Mapping[str, NDArray[np.bool_]]
    thresholds: Mapping[tuple[str, str], float]
    problems: Mapping[str, str]


def _told(
    targets: Sequence[str], names: Sequence[str], patients: Sequence[str], num_bootstrap: int, seed: int, of: Segmented
) -> dict[str, Any]:
    """`targets` of result.json."""
    judge = partial(_judged, patients=patients, num_bootstrap=num_bootstrap, seed=seed)
    told = {}
    for target in targets:
        empty_K = of.empty_K[target]
        problem = of.problems.get(target) or ("no held-out image shows it" if empty_K.all() else "")
        judged = {"encoders": {}} if problem else {
            **compared({name: judge(of.dice_K[name, target], empty_K) for name in names}),
            "whole_image": judge(of.dice_K[WHOLE_IMAGE, target], empty_K)["dice"].to_json(),
            "thresholds": {name: of.thresholds[name, target] for name in names},
        }  # fmt: skip
        num_empty = int(empty_K.sum())
        facts = {"note": problem, "num_with": len(empty_K) - num_empty, "num_without": num_empty}
        told[target] = {**facts, **judged}
    return told


def dice_here(shards: ShardSet, source: Source, rows: RowList, targets: Sequence[str], seed: int) -> dict[str, float]:
    """`dice_TARGET` -> mean Dice of held-out images that show it, of those in `rows`, by the linear head: the probe in
    this process. ValueError where there is nothing to learn from or to judge.
    """
    found = check_segmentation(shards, rows, targets, seed)
    of = _linear(shards, {TOKENS: source}, found, targets, seed, _HERE)
    for target in targets:
        problem = of.problems.get(target) or ("no held-out image shows it" if of.empty_K[target].all() else "")
        if problem:
            raise ValueError(f"validate.segment: {target!r} among {len(rows)} images: {problem}")
    return {f"dice_{target}": float(of.dice_K[TOKENS, target][~of.empty_K[target]].mean()) for target in targets}


def check_segmentation(shards: ShardSet, rows: RowList, targets: Sequence[str], seed: int = 0) -> SegmentRows:
    """The images that are learned from and judged; ValueError where there are none. What their masks show is seen
    later."""
    found = segment_rows(shards, rows, seed)
    if not len(found.judged):
        raise ValueError(f"validate.segment={list(targets)}, among {len(rows)} images: {found.note}")
    return found


@dataclass(frozen=True, kw_only=True)
class Work:
    """How the linear head's work is done. blocks: encodes images; fit: a head for each (what it learns from, target)
    pair."""

    blocks: Blocks
    fit: Callable[[Sequence[tuple[Learn, int]]], list[Head]]


def _on_ray(use_gpu: bool) -> Work:
    """By a pool of actors, then a task a head."""
    return Work(blocks=partial(encoded_blocks, use_gpu=use_gpu), fit=_fit_on_ray)


def _fit_on_ray(asked: Sequence[tuple[Learn, int]]) -> list[Head]:
    remote = ray.remote(num_cpus=1, scheduling_strategy="DEFAULT")(fit_head)  # as in scoring.py
    refs = {key: ray.put(learn) for key, learn in {id(learn): learn for learn, _ in asked}.items()}
    heads: list[Head] = ray.get([remote.remote(refs[id(learn)], target) for learn, target in asked])
    return heads


_HERE = Work(blocks=encoded_here, fit=lambda asked: [fit_head(*one) for one in asked])


def _linear(
    shards: ShardSet,
    sources: Mapping[str, Source],
    rows: SegmentRows,
    targets: Sequence[str],
    seed: int,
    work: Work,
) -> Segmented:
    """The linear head on frozen tokens."""
    truth = (("truth",), partial(target_masks, targets=tuple(targets)))
    heads, problems = _fit_heads(shards, sources, rows, targets, truth, seed, work)
    found: dict[str, NDArray[Any]] = {}
    for block in work.blocks(shards, rows.judged, sources, _JudgeActor, (tuple(targets), heads), *truth):
        for key, values in block.items():
            found.setdefault(key, np.zeros(len(rows.judged), dtype=values.dtype))[block["position"]] = values
    pairs = [(name, target) for name in (*sources, WHOLE_IMAGE) for target in targets]
    return Segmented(
        dice_K={(name, target): found[key] for name, target in pairs if (key := f"{name} {target}") in found},
        empty_K={target: found[f"empty {target}"] for target in targets},
        thresholds={(name, target): head.threshold for name in heads for target, head in heads[name].items()},
        problems=problems,
    )


def _judged(
    dice_K: Floats, empty_K: NDArray[np.bool_], patients: Sequence[str], num_bootstrap: int, seed: int
) -> dict[str, Estimate]:
    """dice: over images with the lesion; dice_with_empty: over all, an empty map of an image without it counts 1."""
    among = sorted(set(patients))
    with_K = np.flatnonzero(~empty_K).tolist()
    own = [patients[i] for i in with_K]
    return {
        "dice": bootstrap(partial(mean, dice_K[with_K]), own, num_bootstrap, seed, among),
        "dice_with_empty": bootstrap(partial(mean, dice_K), patients, num_bootstrap, seed, among),
    }


# --- Rows ------------------------------------------------------------------------------------------------


def segment_rows(shards: ShardSet, every: RowList, seed: int) -> SegmentRows:
    """Those of `every` whose sources have pixel truth; there, an image without lesions is one that has none.

    A fifth of the patients of train, at most MAX_CHOOSING images, is chosen on.
    """
    sources = sources_with_truth(shards)
    at = [i for i, source in enumerate(every.sources) if source in sources]
    train = [i for i in at if every.splits[i] == "train"]
    order = Draws.of(seed, np.zeros(len(train), dtype=np.int64), [every.patient_ids[i] for i in train])
    of_patient = order.uniform("probe/segment", 1)[:, 0] if train else np.zeros(0)
    chosen = [i for i, draw in zip(train, of_patient, strict=True) if draw < 0.2]
    fitted = [i for i, draw in zip(train, of_patient, strict=True) if draw >= 0.2]
    judged = [i for i in at if every.splits[i] in HELD_OUT]
    note = ""
    if not at:
        note = "no ground truth in these shards"
    elif not judged or not chosen or not fitted:
        note = "too few images with ground truth in the splits train, val and test"
        judged = []
    elif len(fitted) > MAX_IMAGES:
        note = f"the head is fitted on {MAX_IMAGES} of {len(fitted)} training images"
    chosen = spread(chosen, MAX_CHOOSING)
    return SegmentRows(
        learned=every.take(sorted([*spread(fitted, MAX_IMAGES), *chosen])),
        chosen=frozenset(every.image_ids[i] for i in chosen),
        judged=every.take(judged),
        note=note,
    )


def spread(at: Sequence[int], most: int) -> list[int]:
    """At most `most` of them, evenly spread over the shards."""
    if len(at) <= most:
        return list(at)
    return [at[i] for i in np.linspace(0, len(at) - 1, most).round().astype(int)]


# --- Fitting -------------------------------------------------------------------------------------------------------


def _fit_heads(
    shards: ShardSet,
    sources: Mapping[str, Source],
    rows: SegmentRows,
    targets: Sequence[str],
    truth: Truth,
    seed: int,
    work: Work,
) -> tuple[dict[str, dict[str, Head]], dict[str, str]]:
    """encoder -> target -> head, and target -> why it has none."""
    learned = _learned(shards, sources, rows, truth, seed, work.blocks)
    asked = {}
    problems: dict[str, str] = {}
    for name, learn in learned.items():
        for t, target in enumerate(targets):
            if not learn.shares_PT[:, t].any():
                problems[target] = "no training image shows it"
            elif not any(masks[t].any() for _, masks in learn.chosen):
                problems[target] = "no training image that the threshold is chosen on shows it"
            else:
                asked[name, target] = (learn, t)
    heads: dict[str, dict[str, Head]] = {name: {} for name in sources}
    for (name, target), head in zip(asked, work.fit(list(asked.values())), strict=True):
        heads[name][target] = head
    return heads, problems


def _learned(
    shards: ShardSet, sources: Mapping[str, Source], rows: SegmentRows, truth: Truth, seed: int, encoded: Blocks
) -> dict[str, Learn]:
    """By encoder, in the order of the shards, so that a fit is a function of the images."""
    chosen = rows.chosen
    num_a_row = max(4, _NUM_PATCHES // (len(rows.learned) - len(chosen)))
    arguments = (num_a_row, seed, chosen)
    blocks = list(encoded(shards, rows.learned, sources, _LearnActor, arguments, *truth))
    images = [
        {key: values[i] for key, values in block.items()} for block in blocks for i in range(len(block["position"]))
    ]
    images.sort(key=lambda image: int(image["position"]))
    fitted = [image for image in images if image["image_id"] not in chosen]
    return {
        name: Learn(
            tokens_PD=np.concatenate([image[f"tokens {name}"] for image in fitted]),
            shares_PT=np.concatenate([image[f"shares {name}"] for image in fitted]),
            chosen=[
                (image[f"tokens {name}"], image[f"masks {name}"]) for image in images if image["image_id"] in chosen
            ],
        )
        for name in sources
    }


# --- Actors --------------------------------------------------------------------------------------------------------


class _Tokens:
    """One process of the pool: tokens and target masks of a block, for each encoder."""

    def __init__(self, sources: Mapping[str, Source], device: str) -> None:
        self._sources = sources
        self._encoders = {name: source.make(device) for name, source in sources.items()}

    def _of(self, name: str, batch: Mapping[str, NDArray[Any]]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """[B, N, D] tokens and [B, targets, H, W] masks."""
        source = self._sources[name]
        pixels = pixels_of(batch, source)
        starts = range(0, len(pixels), _BATCH)
        tokens = np.concatenate([self._encoders[name].patches(pixels[start : start + _BATCH]) for start in starts])
        return tokens, annotations_of(batch, source)


class _LearnActor(_Tokens):
    """Images that heads learn from. Of one that is chosen on: all patches and the masks; of others a few patches."""

    def __init__(
        self, sources: Mapping[str, Source], device: str, num_a_row: int, seed: int, chosen: frozenset[str]
    ) -> None:
        super().__init__(sources, device)
        self._num, self._seed, self._chosen = num_a_row, seed, chosen

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        image_ids = [str(image_id) for image_id in batch["image_id"]]
        out: dict[str, NDArray[Any]] = {"position": batch["position"], "image_id": batch["image_id"]}
        draws = Draws.of(self._seed, np.zeros(len(image_ids), dtype=np.int64), image_ids)
        for name in self._sources:
            tokens_BND, masks = self._of(name, batch)
            order_BN = np.argsort(draws.uniform("probe/patches", tokens_BND.shape[1]), axis=1)
            columns: dict[str, list[Any]] = {"tokens": [], "shares": [], "masks": []}
            for image_id, tokens_ND, of_image, order_N in zip(image_ids, tokens_BND, masks, order_BN, strict=True):
                shares_NT = np.stack([patch_shares(mask, len(tokens_ND)) for mask in of_image], axis=1)
                is_chosen = image_id in self._chosen
                picked = order_N if is_chosen else _pick(shares_NT.max(axis=1), order_N, self._num)
                picked = np.sort(picked)
                columns["tokens"].append(tokens_ND[picked].astype(np.float16))
                columns["shares"].append(shares_NT[picked].astype(np.float32))
                columns["masks"].append(of_image if is_chosen else of_image[:, :0, :0])
            out |= {f"{key} {name}": _ragged(values) for key, values in columns.items()}
        return out


def _ragged(values: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """One column of arrays that differ in size."""
    column = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):  # at once, NumPy would stack arrays of one size
        column[i] = value
    return column


def _pick(share_N: Floats, order_N: NDArray[np.int64], num: int) -> NDArray[np.int64]:
    """`num` patches in a drawn order, at most half of them of lesions unless there are too few others."""
    num = min(num, len(order_N))
    lesion, other = order_N[share_N[order_N] > 0], order_N[share_N[order_N] == 0]
    num_lesion = max(min(num // 2, len(lesion)), num - len(other))
    return np.concatenate([lesion[:num_lesion], other[: num - num_lesion]])


class _JudgeActor(_Tokens):
    """Dice of every head on each image, and of the whole crop."""

    def __init__(
        self,
        sources: Mapping[str, Source],
        device: str,
        targets: tuple[str, ...],
        heads: Mapping[str, Mapping[str, Head]],
    ) -> None:
        super().__init__(sources, device)
        self._targets, self._heads = targets, heads

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        out: dict[str, NDArray[Any]] = {"position": batch["position"]}
        for i, name in enumerate(self._sources):
            tokens_BND, masks = self._of(name, batch)
            for t, target in enumerate(self._targets):
                own = masks[:, t]
                if i == 0:  # the crop of the run itself
                    out[f"empty {target}"] = np.array([not mask.any() for mask in own])
                    out[f"{WHOLE_IMAGE} {target}"] = np.array([dice(np.ones_like(mask), mask) for mask in own])
                if target in self._heads[name]:
                    head = self._heads[name][target]
                    found = [enlarged(map_N, own.shape[-1]) >= head.threshold for map_N in head(tokens_BND)]
                    out[f"{name} {target}"] = np.array([dice(*pair) for pair in zip(found, own, strict=True)])
        return out
