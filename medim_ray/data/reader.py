"""From a block of the plan to columns: read rows, decode, crop, encode the report, plan the masks. No Ray in here.

One `BlockReader` lives in each decoding actor. It keeps Parquet files open, the row groups of the current shuffle
window, and the encoded reports it has seen.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from numpy.typing import NDArray

from medim_ray import types
from medim_ray.data.plan import Block, StreamPlan
from medim_ray.data.transforms import Crop, CropPlan, cut
from medim_ray.draws import Draws
from medim_ray.masking.base import Masking, Samples
from medim_ray.reports.sections import split_sentences
from medim_ray.reports.tagger import Mention, Tagger
from medim_ray.reports.tokens import EncodedReport, encode

COLUMNS = ("image_id", "image", "report")

# Names of the columns of a block that are not plan columns.
STEP, EPOCH, IMAGE_ID, VIEW = "step", "epoch", "image_id", "view/"


def decode_gray(encoded: bytes, image_id: str) -> NDArray[np.uint8]:
    """[H, W] uint8 of an encoded 8- or 16-bit grayscale image; ValueError names the image if it can't be decoded."""
    image = cv2.imdecode(np.frombuffer(encoded, dtype=np.uint8), cv2.IMREAD_GRAYSCALE | cv2.IMREAD_ANYDEPTH)
    if image is None:
        raise ValueError(f"image {image_id!r} can't be decoded: run `medim-ray shards verify` on data.shards")
    if image.dtype == np.uint16:
        image = (image >> 8).astype(np.uint8)
    return image


class RowStore:
    """Random access to rows of Parquet files, a row group at a time; keeps the last `num_groups` groups it read."""

    def __init__(
        self, files: Sequence[str], filesystem: pafs.FileSystem, columns: Sequence[str], num_groups: int
    ) -> None:
        self._paths = list(files)
        self._filesystem = filesystem
        self._columns = list(columns)
        self._num_groups = num_groups
        self._open: dict[int, pq.ParquetFile] = {}
        self._groups: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()

    def group(self, file: int, index: int) -> pa.Table:
        """Row group `index` of file number `file`, the store's columns only."""
        key = (file, index)
        if key not in self._groups:
            if file not in self._open:
                self._open[file] = pq.ParquetFile(self._filesystem.open_input_file(self._paths[file]))
            self._groups[key] = self._open[file].read_row_group(index, columns=self._columns)
            while len(self._groups) > self._num_groups:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]


class ReportEncoder:
    """Tokens and mentions of a report, computed once per image id and kept for up to `capacity` of them."""

    def __init__(self, tokenizer: Any, num_tokens: int, capacity: int = 50_000) -> None:
        self._tokenizer = tokenizer
        self._num_tokens = num_tokens
        self._tagger = Tagger()
        self._capacity = capacity
        self._seen: OrderedDict[str, tuple[EncodedReport, list[Mention]]] = OrderedDict()

    def __call__(self, image_id: str, report: str) -> tuple[EncodedReport, list[Mention]]:
        if image_id not in self._seen:
            mentions = self._tagger.tag(report)
            encoded = encode(report, self._tokenizer, mentions, split_sentences(report), self._num_tokens)
            self._seen[image_id] = (encoded, mentions)
            if len(self._seen) > self._capacity:
                self._seen.popitem(last=False)
        return self._seen[image_id]


@dataclass(frozen=True, kw_only=True)
class TextRows:
    """The text of B samples: columns of medim_ray.types and the mentions."""

    columns: dict[str, NDArray[Any]]
    mentions: list[list[Mention]]


def text_rows(encoder: ReportEncoder | None, image_ids: Sequence[str], reports: Sequence[str]) -> TextRows:
    """Encodes the reports of a granule; no columns where the run has no text encoder."""
    if encoder is None:
        return TextRows(columns={}, mentions=[[] for _ in image_ids])
    rows = [encoder(image_id, report) for image_id, report in zip(image_ids, reports, strict=True)]
    fields: dict[str, Callable[[EncodedReport], NDArray[Any]]] = {
        types.TOKEN_IDS: lambda e: e.token_ids_T,
        types.TOKEN_IS_PAD: lambda e: e.token_is_pad_T,
        types.WORD_OF_TOKEN: lambda e: e.word_of_token_T,
        types.WORD_IS_PAD: lambda e: e.word_is_pad_W,
        types.MESH_FLAG: lambda e: e.mesh_flag_W,
        types.ASSERTION: lambda e: e.assertion_W,
        types.SENTENCE_ID: lambda e: e.sentence_id_W,
    }
    columns = {name: np.stack([get(e) for e, _ in rows]) for name, get in fields.items()}
    return TextRows(columns=columns, mentions=[m for _, m in rows])


def crop_views(images: Sequence[NDArray[np.uint8]], crop: Crop, plans: dict[str, CropPlan]) -> dict[str, NDArray[Any]]:
    """View columns of B decoded images: pixels [B, crops, size, size] uint8, jitter and boxes."""
    columns: dict[str, NDArray[Any]] = {}
    for view in crop.views:
        plan = plans[view.name]
        pixels = np.empty((len(images), view.num_crops, view.size, view.size), dtype=np.uint8)
        for i, image in enumerate(images):
            for k in range(view.num_crops):
                pixels[i, k] = cut(image, plan.boxes_BK4[i, k], view.size, bool(plan.flips_BK[i, k]))
        columns[f"{VIEW}{view.name}"] = pixels
        columns[f"{VIEW}{view.name}/jitter_BK3"] = plan.jitter_BK3
        columns[f"{VIEW}{view.name}/boxes_BK4"] = plan.boxes_BK4
    columns[types.BOX] = plans[crop.views[0].name].boxes_BK4[:, 0]
    return columns


class BlockReader:
    """Callable: a Block of the plan -> its columns, first axis = its samples in order."""

    def __init__(
        self,
        plan: StreamPlan,
        files: Sequence[str],
        filesystem: pafs.FileSystem,
        crop: Crop,
        masking: Masking,
        grid: types.Grid,
        reports: ReportEncoder | None,
    ) -> None:
        self._plan, self._crop, self._masking, self._grid, self._reports = plan, crop, masking, grid, reports
        columns = COLUMNS if reports is not None else COLUMNS[:2]
        self._store = RowStore(files, filesystem, columns, num_groups=2 * plan.window_groups)

    def __call__(self, block: Block) -> dict[str, NDArray[Any]]:
        rows = self._rows(block.rows_K)
        image_ids = [row["image_id"] for row in rows]
        images = [decode_gray(row["image"], row["image_id"]) for row in rows]
        draws = Draws.of(self._plan.seed, block.epochs_K, image_ids)
        plans = dict(self._crop.plan(np.array([image.shape for image in images]), draws))
        columns = crop_views(images, self._crop, plans)
        text = text_rows(self._reports, image_ids, [row.get("report", "") for row in rows])
        samples = Samples(
            image_ids=image_ids,
            boxes_B4=columns[types.BOX],
            more_boxes_BK4=plans[self._crop.views[0].name].boxes_BK4[:, 1:],
            text=text.columns,
            mentions=text.mentions,
            steps_B=block.steps_K,
            positions_B=block.positions_K,
            global_batch=self._plan.global_batch,
            seed=self._plan.seed,
        )
        return {
            STEP: block.steps_K,
            EPOCH: block.epochs_K,
            IMAGE_ID: np.array(image_ids, dtype=object),
            **columns,
            **text.columns,
            **self._masking.plan(samples, self._grid, draws),
        }

    def _rows(self, rows_K: NDArray[np.int64]) -> list[dict[str, Any]]:
        """Rows of the corpus in the order asked for, each row group touched once."""
        groups_K, within_K = self._plan.locate(rows_K)
        rows: list[dict[str, Any]] = [{} for _ in rows_K]
        for group in np.unique(groups_K):
            where = np.flatnonzero(groups_K == group)
            row_group = self._plan.row_groups[group]
            table = self._store.group(row_group.file, row_group.index).take(pa.array(within_K[where]))
            for place, row in zip(where, table.to_pylist(), strict=True):
                rows[place] = row
        return rows
