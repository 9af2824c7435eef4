"""The maps of a run while it goes on: a fixed small batch is judged every few steps, by the yardsticks of localise.py.

On images with truth map AUROC and lesion lift, else proxies: agreement with the anatomy prior and, where lungs are
boxed (`maps.lung_boxes`), lung lift. Draws nothing, changes nothing: training with it and without are bit-equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from medim_ray.config.schema import RunConfig
from medim_ray.data.collate import to_batch
from medim_ray.data.rows import decode_gray
from medim_ray.data.shards import ShardSet
from medim_ray.data.texts import ReportEncoder, TextRows
from medim_ray.masking.prior import patch_maps, places_of
from medim_ray.probes.localise import BOTH, CHANCE, ModelMaps, Question, judge_map, kdm_masking, questions
from medim_ray.probes.lung_lift import lung_shares, read_rows
from medim_ray.probes.rows import Columns, RowReader, centre_columns
from medim_ray.train.before import Look
from medim_ray.train.build import build_crop, report_encoder
from medim_ray.types import BOX, SENTENCE_ID, WORD_IS_PAD, Grid

_SPLITS = ("val", "test", "train")  # held out where there is something held out
_GROUPS = 8  # row groups of a split that are looked through for images with truth
_AT_ONCE = 4  # images in one forward pass
_HIGH = 0.25  # share of the patches that the prior is said to mark
_AGREEMENT, _LUNGS = "prior_agreement", "lung_lift"
_CHANCE = {**CHANCE, _AGREEMENT: 0.5, _LUNGS: 1.0}
_WORDS = {
    "map_auroc": "map AUROC against the lesions",
    "lesion_lift": "lesion lift",
    _AGREEMENT: "agreement with the anatomy prior",
    _LUNGS: "lung lift",
}
_SOURCES = {"trained": "", "prior": "prior_", BOTH: "both_"}  # in the names of metrics.jsonl


class MapWatch:
    """Call it on every rank alike: under ZeRO-3 its forward gathers parameters. The numbers are the rank's own; those
    of rank 0 are written, whose running statistics of batch norms are also those of checkpoints.

    rows: image_id, image, report, truth and, where the lungs are boxed, boxes; judged at their centre crops.
    """

    def __init__(
        self, config: RunConfig, objective: Any, reports: ReportEncoder, rows: Sequence[dict[str, Any]]
    ) -> None:
        self._objective, self._maps = objective, ModelMaps(objective)
        crop, grid = build_crop(config), objective.encoder.grid
        self._columns, text = centre_columns(rows, crop, reports)
        self._views = crop.views
        asked = questions(rows, self._columns, text, kdm_masking(config), grid, crop.views[0].size)
        self._image_ids = [row["image_id"] for row in rows]
        asked += _sentences(rows, self._columns, text, grid)
        self._asked = [question for question in asked if question.words_W.any()]
        self._lungs = [_lungs(row, self._columns[BOX][i], grid) for i, row in enumerate(rows)]
        self._text = text

    @classmethod
    def of_run(cls, config: RunConfig, objective: Any) -> MapWatch | None:
        """The watch of a run; None where it has no maps, or its images no truth and no report."""
        if not config.maps.every or ModelMaps.of_no_use(objective):
            return None
        shards = ShardSet.open(config.data.shards)
        boxes = config.maps.lung_boxes
        rows = _boxed_rows(boxes, config.maps.num_images) if boxes else watched_rows(shards, config.maps.num_images)
        reports = report_encoder(config, shards)
        return cls(config, objective, reports, rows) if rows else None

    @torch.no_grad()
    def __call__(self) -> Look:
        """Numbers under maps/<strategy>/..., and what they say in words."""
        was_training = self._objective.training
        self._objective.eval()
        try:
            attention_BWN = torch.cat([self._attention(first) for first in range(0, len(self._image_ids), _AT_ONCE)])
        finally:
            self._objective.train(was_training)
        found: dict[str, dict[int, list[float]]] = {}
        for question in self._asked:
            for name, value in self._judge(question, attention_BWN):
                found.setdefault(f"maps/{question.strategy}/{name}", {}).setdefault(question.row, []).append(value)
        means = {name: [float(np.mean(values)) for values in images.values()] for name, images in found.items()}
        return Look(
            numbers={name: float(np.mean(values)) for name, values in means.items()},
            words=[line for name, values in means.items() if (line := in_words(name, values))],
        )

    def _attention(self, first: int) -> Tensor:
        """[b, W, N] of the images from `first` on: few at once, so that a look is not where a worker's memory peaks."""
        columns = {name: values[first : first + _AT_ONCE] for name, values in self._columns.items()}
        batch = to_batch(columns, self._views, next(self._objective.parameters()).device)
        return self._maps(batch, self._text).float().cpu()

    def _judge(self, question: Question, attention_BWN: Tensor) -> Iterator[tuple[str, float]]:
        """(name, value) of each yardstick that the question's image has."""
        image_id = self._image_ids[question.row]
        maps = question.maps({"trained": attention_BWN})
        is_judged = not question.problem
        if is_judged:
            for source, prefix in _SOURCES.items():
                numbers = judge_map(maps[source], question.pixels_N, question.patch_pixels, image_id)
                yield from zip((f"{prefix}map_auroc", f"{prefix}lesion_lift"), numbers, strict=True)
        if question.prior_N.max() > question.prior_N.min() and question.words_W.any():
            edge = np.quantile(question.prior_N, 1 - _HIGH)
            marked_N = (question.prior_N > edge).astype(np.int64) * question.patch_pixels
            if marked_N.any():
                yield _AGREEMENT, judge_map(maps["trained"], marked_N, question.patch_pixels, image_id)[0]
        lungs_N = self._lungs[question.row]
        if lungs_N is not None and question.words_W.any():
            yield _LUNGS, judge_map(maps["trained"], lungs_N, 256, image_id)[1]


def in_words(name: str, values: Sequence[float]) -> str:
    """What a user should hear of a map at or below chance, by a 95 % interval over images; '' where nothing."""
    strategy, metric = name.split("/")[1:]
    if metric not in _CHANCE:
        return ""
    chance, mean = _CHANCE[metric], float(np.mean(values))
    half = 1.96 * float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    told = f"{strategy.upper()} {_WORDS[metric]} is"
    if mean + half < chance:
        return f"{told} below chance ({chance}): the map lights what it should not"
    return "" if mean - half > chance else f"{told} not above chance ({chance}): the map does not localise"


def _sentences(rows: Sequence[Mapping[str, Any]], columns: Columns, text: TextRows, grid: Grid) -> list[Question]:
    """SDM's questions of images without truth: each sentence that tells of a place."""
    found = []
    for i, row in enumerate(rows):
        spoken = {mention.sentence for mention in text.mentions[i]} if not row["truth"] else set()
        for k in sorted(spoken):
            places = places_of(mention for mention in text.mentions[i] if mention.sentence == k)
            words_W = (columns[SENTENCE_ID][i] == k) & ~columns[WORD_IS_PAD][i]
            question = Question(
                row=i,
                strategy="sdm",
                words_W=words_W.astype(np.float32),
                prior_N=patch_maps([places], columns[BOX][i : i + 1], grid)[0],
                pixels_N=np.zeros(grid.num_patches, dtype=np.int64),
                patch_pixels=1,
                problem="no truth",
            )
            found += [question] if places else []
    return found


def _lungs(row: Mapping[str, Any], box_4: NDArray[np.float32], grid: Grid) -> NDArray[np.int64] | None:
    """[N] how many of 256 points of each patch lie in the boxes of the lungs; None where there is none in the crop."""
    if not row.get("boxes"):
        return None
    shape = decode_gray(row["image"], row["image_id"]).shape
    inside_N = np.rint(256 * lung_shares(row["boxes"], shape, box_4, grid)).astype(np.int64)
    return inside_N if inside_N.any() else None


def _boxed_rows(path: str, num: int) -> list[dict[str, Any]]:
    rows = read_rows(path, path.rpartition("/")[0] or ".", "notes")
    return [{**row, "truth": []} for row in rows[:num]]


def watched_rows(shards: ShardSet, num: int) -> list[dict[str, Any]]:
    """The first `num` images with truth of the first split that has any, or with a report where none has truth.

    Looks through a few row groups only, so that a start takes no longer where the set is large.
    """
    items: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for split in _SPLITS:
        for wants_truth in (True, False):
            if not items[wants_truth]:
                items[wants_truth] = _first_items(shards, split, wants_truth, num)
        if items[True]:
            break
    reader = RowReader.of(shards, "image_id", "image", "report", "truth")
    return [row for item in items[True] or items[False] for row in reader(item)]


def _first_items(shards: ShardSet, split: str, wants_truth: bool, num: int) -> list[dict[str, Any]]:
    """Work items of the first `num` rows of a split that have truth, or a report."""
    items: list[dict[str, Any]] = []
    filesystem, looked = shards.arrow_fs(), 0
    for place, file in enumerate(shards.files()):
        if file.split != split or num <= 0 or looked >= _GROUPS:
            continue
        with filesystem.open_input_file(shards.path(file)) as stream:
            parquet = pq.ParquetFile(stream)
            for group in range(min(len(file.row_groups), _GROUPS - looked)):
                table = parquet.read_row_group(group, columns=["report", "truth.list.element.finding"])
                column = table["truth"].combine_chunks().value_lengths() if wants_truth else table["report"]
                kept = [i for i, value in enumerate(column.to_pylist()) if value][:num]
                num -= len(kept)
                looked += 1
                if kept:
                    items.append({"file": place, "group": group, "rows": kept})
    return items
