"""Do word-to-patch maps light the lesion that the words tell of? Map AUROC and lesion lift on images with truth.

KDM: the map of all MeSH words against the union of the lesions that the report tells. SDM: the map of each sentence
that tells a lesion, against its lesions. Lesion lift = share of the lesion's pixels that the strategy's law hides at
ratio 0.25, as many patches as uniform masking, over the share of all patches hidden (chance 1.0).
Beside the attention stand the anatomy prior alone and both multiplied: only what beats the prior was learned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medim_ray import types
from medim_ray.config.schema import RunConfig
from medim_ray.data.collate import to_batch
from medim_ray.data.texts import TextRows
from medim_ray.draws import Draws
from medim_ray.masking.prior import patch_maps, places_of
from medim_ray.masking.report import WORDS, ReportMasking
from medim_ray.masking.selection import select_hidden
from medim_ray.probes.bootstrap import Estimate, auroc, bootstrap, mean
from medim_ray.probes.models import StoredModels
from medim_ray.probes.rows import (
    Columns,
    RowList,
    RowReader,
    centre_columns,
    centre_samples,
    has_truth,
    list_rows,
    work_items,
)
from medim_ray.probes.stream import item_of, pooled
from medim_ray.probes.truth import crop_mask
from medim_ray.reports.tagger import Mention
from medim_ray.train.runs import LoadedRun
from medim_ray.types import Batch, Grid

RATIO = 0.25
CHANCE = {"map_auroc": 0.5, "lesion_lift": 1.0}
PRIOR, BOTH = "prior", "both"  # sources beside the runs: the anatomy prior alone, and the trained attention times it
_NAMES = {"map_auroc": "map AUROC", "lesion_lift": "lesion lift"}
_NUM_DRAWS = 32  # of the law's noise; the share hidden is their mean
_HELD_OUT = ("val", "test")


class WordMaps(Protocol):
    """A map of the patches for each word, from the attention of a model."""

    def __call__(self, batch: Batch, text: TextRows) -> Tensor:
        """[B, W, N] float, not negative; rows of padding words are ignored."""
        ...


@dataclass(frozen=True, kw_only=True)
class Localisation:
    """estimates: strategy -> source of the maps -> metric (`map_auroc`, `lesion_lift`); note: why there are none.

    left_out: images with truth that a strategy could not be judged on, by reason.
    """

    note: str
    num_images: int
    num_patients: int
    estimates: Mapping[str, Mapping[str, Mapping[str, Estimate]]]
    left_out: Mapping[str, int]

    def warnings(self, source: str = "trained") -> list[str]:
        """Sentences about maps of `source` that are at or below chance."""
        lines = []
        for strategy, sources in self.estimates.items():
            for metric, chance in CHANCE.items():
                estimate = sources[source][metric]
                low, high = estimate.interval()
                name = f"{strategy.upper()} {_NAMES[metric]} {estimate.value:.2f} [{low:.2f}, {high:.2f}]"
                if high < chance:
                    lines.append(f"{name} is below chance ({chance}): the map lights what is not the lesion")
                elif not low > chance:
                    lines.append(f"{name} is not above chance ({chance}): the map does not localise")
                if BOTH in sources and not sources[BOTH][metric].minus(sources[PRIOR][metric]).interval()[0] > 0:
                    lines.append(
                        f"{strategy.upper()} {_NAMES[metric]} of attention and anatomy prior does not beat the "
                        "prior alone: nothing was learned beyond it"
                    )
        return lines

    def to_json(self) -> dict[str, Any]:
        """For result.json."""
        return {
            "note": self.note,
            "num_images": self.num_images,
            "num_patients": self.num_patients,
            "ratio": RATIO,
            "left_out": dict(self.left_out),
            "strategies": {
                strategy: {
                    source: {metric: estimate.to_json() for metric, estimate in metrics.items()}
                    for source, metrics in sources.items()
                }
                for strategy, sources in self.estimates.items()
            },
            "trained_minus_untrained": {
                strategy: {m: sources["trained"][m].minus(sources["untrained"][m]).to_json() for m in CHANCE}
                for strategy, sources in self.estimates.items()
                if {"trained", "untrained"} <= set(sources)
            },
            "both_minus_prior": {
                strategy: {m: sources[BOTH][m].minus(sources[PRIOR][m]).to_json() for m in CHANCE}
                for strategy, sources in self.estimates.items()
                if {BOTH, PRIOR} <= set(sources)
            },
            "warnings": self.warnings() if self.estimates else [],
        }


def localise(runs: Mapping[str, LoadedRun], num_bootstrap: int, seed: int) -> Localisation:
    """Judges the maps of each of `runs` (by name; the same configuration, other weights) on held-out images with truth.

    Needs a running Ray. Without truth, or without a text encoder, the result holds a note instead of numbers.
    """
    run = next(iter(runs.values()))
    note, rows = _judged_rows(run)
    if note:
        return Localisation(note=note, num_images=0, num_patients=0, estimates={}, left_out={})
    columns = ("image_id", "image", "report", "truth")
    arguments = (StoredModels.of(runs), RowReader.of(run.shards, *columns))
    blocks = list(pooled(work_items(rows), _Judge, arguments, run.config.train.use_gpu))
    merged = {key: np.concatenate([block[key] for block in blocks]) for key in blocks[0]}
    sources = (*runs, PRIOR, *([BOTH] if "trained" in runs else []))
    return _summarise(merged, rows, sources, num_bootstrap, seed)


def _judged_rows(run: LoadedRun) -> tuple[str, RowList]:
    """Why there is nothing to judge, or '' and the held-out images with truth."""
    every = list_rows(run.shards)
    none = every.take([])
    if problem := ModelMaps.of_no_use(run.objective):
        return problem, none
    with_truth = np.flatnonzero(has_truth(run.shards)).tolist()
    if not with_truth:
        return "no ground truth in these shards", none
    held_out = every.take([i for i in with_truth if every.splits[i] in _HELD_OUT])
    if not len(held_out):
        return "no held-out image (split val or test) of these shards has ground truth", none
    return "", held_out


class ModelMaps:
    """The word-to-patch attention of an objective that aligns words with patches."""

    def __init__(self, objective: Any) -> None:
        self._objective = objective

    @staticmethod
    def of_no_use(objective: Any) -> str:
        """Why an objective has no such attention, '' where it has."""
        if not hasattr(objective, "word_projection"):
            return f"this run's objective ({type(objective).__name__}) aligns no words with patches: no maps to judge"
        return ""

    def __call__(self, batch: Batch, text: TextRows) -> Tensor:
        attention_BWN: Tensor = self._objective.attention(batch)
        return attention_BWN


class _Judge:
    """Actor: images of a work item to one row for each (image, source, strategy) it can judge."""

    def __init__(self, stored: StoredModels, reader: RowReader) -> None:
        self._models, self._reader = stored.open(), reader
        self._sources: dict[str, WordMaps] = {name: ModelMaps(one) for name, one in self._models.objectives.items()}
        self._grid = next(iter(self._models.objectives.values())).encoder.grid
        self._kdm = kdm_masking(self._models.config)

    def __call__(self, block: Columns) -> Columns:
        item = item_of(block)
        models = self._models
        rows = self._reader(item)
        columns, text = centre_columns(rows, models.crop, models.reports)
        batch = to_batch(columns, models.crop.views, models.device)
        asked = questions(rows, columns, text, self._kdm, self._grid, models.crop.views[0].size)
        out: list[tuple[int, str, str, float, float, str]] = []
        attentions = {source: maps(batch, text).float().cpu() for source, maps in self._sources.items()}
        for q in asked:
            for source, map_N in q.maps(attentions).items():
                numbers = (float("nan"), float("nan"))
                if not q.problem:
                    numbers = judge_map(map_N, q.pixels_N, q.patch_pixels, rows[q.row]["image_id"])
                out.append((int(item["positions"][q.row]), source, q.strategy, *numbers, q.problem))
        names = ("position", "source", "strategy", "map_auroc", "lesion_lift", "problem")
        kinds = (np.int64, object, object, np.float64, np.float64, object)
        return {name: np.array([row[i] for row in out], dtype=kinds[i]) for i, name in enumerate(names)}


@dataclass(frozen=True, kw_only=True)
class Question:
    """A map to be judged: words_W weighs the words' maps; pixels_N counts the lesion's pixels in each patch.

    prior_N: the anatomy prior of the same words, 1 everywhere where they tell no place.

    problem: why it can't be judged, '' where it can.
    """

    row: int
    strategy: str
    words_W: NDArray[np.float32]
    prior_N: NDArray[np.float32]
    pixels_N: NDArray[np.int64]
    patch_pixels: int
    problem: str

    def maps(self, attentions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """[N] by source: of each attention [B, W, N], of the prior alone, and of the trained one times the prior."""
        maps = {source: torch.from_numpy(self.words_W) @ maps_BWN[self.row] for source, maps_BWN in attentions.items()}
        maps[PRIOR] = torch.from_numpy(self.prior_N)
        if "trained" in maps:
            maps[BOTH] = maps["trained"] * maps[PRIOR]
        return maps


def questions(
    rows: Sequence[Mapping[str, Any]], columns: Columns, text: TextRows, kdm: ReportMasking, grid: Grid, size: int
) -> list[Question]:
    """KDM: one a report; SDM: one for each sentence that tells a lesion."""
    kdm_words_BW = mention_words(kdm, columns, text, grid)
    sentence_BW, is_pad_BW = columns[types.SENTENCE_ID], columns[types.WORD_IS_PAD]
    found = []
    for i, row in enumerate(rows):
        told: dict[int, list[NDArray[np.bool_]]] = {}
        for lesion in row["truth"]:
            if lesion["sentence"] >= 0:
                mask_HW = crop_mask(lesion["mask"], columns[types.BOX][i], size)
                told.setdefault(int(lesion["sentence"]), []).append(mask_HW)
        mentions = text.mentions[i]
        asked: list[tuple[str, NDArray[np.float32], Sequence[Mention], list[NDArray[np.bool_]]]] = [
            (
                "sdm",
                ((sentence_BW[i] == k) & ~is_pad_BW[i]).astype(np.float32),
                [mention for mention in mentions if mention.sentence == k],
                masks,
            )
            for k, masks in told.items()
        ]
        asked.append(("kdm", kdm_words_BW[i], mentions, [mask for masks in told.values() for mask in masks]))
        for strategy, words_W, spoken, masks in asked:
            prior_N = patch_maps([places_of(spoken)], columns[types.BOX][i : i + 1], grid)[0]
            pixels_N = patch_counts(masks, grid) if masks else np.zeros(grid.num_patches, dtype=np.int64)
            problem = ""
            if not masks:
                problem = "no sentence tells a lesion"
            elif not words_W.any():
                problem = "no word to go by within the token limit"
            elif not pixels_N.any():
                problem = "lesion outside the crop or under a pixel"
            found.append(
                Question(
                    row=i,
                    strategy=strategy,
                    words_W=words_W,
                    prior_N=prior_N if prior_N.any() else np.ones_like(prior_N),
                    pixels_N=pixels_N,
                    patch_pixels=size * size // grid.num_patches,
                    problem=problem,
                )
            )
    return found


def kdm_masking(config: RunConfig) -> ReportMasking:
    """KDM with the run's options where the run masks by reports, else with the paper's."""
    own = config.masking if isinstance(config.masking, ReportMasking.Config) else ReportMasking.Config()
    return ReportMasking(ReportMasking.Config(name="kdm", negated_weight=own.negated_weight))


def mention_words(kdm: ReportMasking, columns: Columns, text: TextRows, grid: Grid) -> NDArray[np.float32]:
    """[B, W] KDM's weight of each word."""
    samples, draws = centre_samples(columns, text, seed=0)
    words_BSW: NDArray[np.float32] = kdm.plan(samples, grid, draws)[WORDS]
    return words_BSW[:, 0]


def patch_counts(masks: Sequence[NDArray[np.bool_]], grid: Grid) -> NDArray[np.int64]:
    """[N] pixels of the union of the masks in each patch."""
    union_HW = np.logical_or.reduce(masks)
    rows, columns = union_HW.shape[0] // grid.height, union_HW.shape[1] // grid.width
    return union_HW.reshape(grid.height, rows, grid.width, columns).sum(axis=(1, 3)).ravel()


def judge_map(map_N: Tensor, pixels_N: NDArray[np.int64], patch_pixels: int, image_id: str) -> tuple[float, float]:
    """Pixel AUROC of the map (each pixel has its patch's value) and lesion lift, for one map.

    pixels_N: lesion pixels in each patch of `patch_pixels` pixels, at least one in all.
    """
    values = map_N.double().numpy()
    weights = np.concatenate([pixels_N, patch_pixels - pixels_N]).astype(np.float64)
    is_lesion = np.arange(2 * len(values)) < len(values)
    area = float(auroc(np.tile(values, 2), is_lesion, weights[None])[0])
    config = ReportMasking.Config(name="kdm", ratio=RATIO, on="input")
    noise_RN = Draws.of(0, np.arange(_NUM_DRAWS), [image_id] * _NUM_DRAWS).uniform("probe/lift", len(values))
    hidden_RN, _ = select_hidden(
        map_N.float().expand(_NUM_DRAWS, -1),
        torch.from_numpy(noise_RN).float(),
        torch.ones(_NUM_DRAWS, dtype=torch.bool),
        config,
    )
    share = float((hidden_RN.numpy() * pixels_N).sum() / (_NUM_DRAWS * pixels_N.sum()))
    return area, share / (int(len(values) * RATIO) / len(values))


def _summarise(found: Columns, rows: RowList, sources: Sequence[str], num_bootstrap: int, seed: int) -> Localisation:
    """Means over images (an image's sentences averaged first), intervals over patients."""
    judged = found["problem"] == ""
    estimates: dict[str, dict[str, dict[str, Estimate]]] = {}
    images: set[int] = set()
    for strategy in ("kdm", "sdm"):
        for source in sources:
            own = judged & (found["strategy"] == strategy) & (found["source"] == source)
            positions, inverse = np.unique(found["position"][own], return_inverse=True)
            if not len(positions):
                continue
            images.update(positions.tolist())
            patients = [rows.patient_ids[i] for i in positions]
            num = np.bincount(inverse)
            for metric in CHANCE:
                values = np.bincount(inverse, weights=found[metric][own]) / num
                of_source = estimates.setdefault(strategy, {}).setdefault(source, {})
                of_source[metric] = bootstrap(partial(mean, values), patients, num_bootstrap, seed)
    first = found["source"] == sources[0]
    left_out = Counter(
        f"{strategy}: {problem}"
        for strategy, problem in zip(found["strategy"][first], found["problem"][first], strict=True)
        if problem
    )
    return Localisation(
        note="" if estimates else "no map of a held-out image could be judged",
        num_images=len(images),
        num_patients=len({rows.patient_ids[i] for i in images}),
        estimates=estimates,
        left_out=dict(sorted(left_out.items())),
    )
