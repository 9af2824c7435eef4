"""From a block of the plan to columns: read rows, decode, crop, encode the report, plan the masks. No Ray in here.

One `BlockReader` lives in each decoding actor. It keeps Parquet files open, the row groups of the current shuffle
window (rows.py), and the encoded reports it has seen.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from medim_ray import types
from medim_ray.data.plan import Block, StreamPlan
from medim_ray.data.rows import PlannedRows, ShardFiles
from medim_ray.data.texts import ReportEncoder, text_rows
from medim_ray.data.transforms import Crop, CropPlan, cut
from medim_ray.draws import Draws
from medim_ray.masking.base import Masking, Samples

# Names of the columns of a block that are not plan columns. BROKEN: JSON list of the rows that this sample stands in
# for (rows.BrokenRow), "" for most. SECONDS: [K, stages] seconds that the block has cost, shared out over its samples.
STEP, EPOCH, IMAGE_ID, VIEW, BROKEN, SECONDS = "step", "epoch", "image_id", "view/", "broken", "seconds"
STAGES = ("read", "decode", "crop", "text", "plan", "cpu")  # cpu: processor seconds of all of them


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
        columns[f"{VIEW}{view.name}/jitter_BK4"] = plan.jitter_BK4
        columns[f"{VIEW}{view.name}/boxes_BK4"] = plan.boxes_BK4
    columns[types.BOX] = plans[crop.views[0].name].boxes_BK4[:, 0]
    return columns


class BlockReader:
    """Callable: a Block of the plan -> its columns, first axis = its samples in order."""

    def __init__(
        self,
        plan: StreamPlan,
        files: ShardFiles,
        crop: Crop,
        masking: Masking,
        grid: types.Grid,
        reports: ReportEncoder | None,
        max_broken_ratio: float,
        decode: Literal["full", "scaled"],
    ) -> None:
        self._plan, self._crop, self._masking, self._grid, self._reports = plan, crop, masking, grid, reports
        self._read = PlannedRows(plan, files, max_broken_ratio, crop.shrink if decode == "scaled" else None)

    def __call__(self, block: Block) -> dict[str, NDArray[Any]]:
        cv2.setNumThreads(1)  # an actor is one core; more come from more actors
        cpu = time.thread_time()
        read = self._read(block)
        laps = [time.perf_counter()]
        block, images, image_ids = read.block, [row.image_HW for row in read.rows], [row.image_id for row in read.rows]
        draws = Draws.of(self._plan.seed, block.epochs_K, image_ids)
        plans = dict(self._crop.plan(np.array([(row.height, row.width) for row in read.rows]), draws))
        laps.append(time.perf_counter())
        columns = crop_views(images, self._crop, plans)
        laps.append(time.perf_counter())
        text = text_rows(self._reports, image_ids, [row.report for row in read.rows])
        laps.append(time.perf_counter())
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
        masks = self._masking.plan(samples, self._grid, draws)
        laps.append(time.perf_counter())
        crop_plan_s, crop_s, text_s, mask_plan_s = np.diff(laps)
        stages = [read.read_s, read.decode_s, crop_s, text_s, crop_plan_s + mask_plan_s, time.thread_time() - cpu]
        return {
            STEP: block.steps_K,
            EPOCH: block.epochs_K,
            IMAGE_ID: np.array(image_ids, dtype=object),
            BROKEN: np.array([json.dumps(met) if met else "" for met in read.broken_records()], dtype=object),
            SECONDS: np.tile(np.array(stages, dtype=np.float32) / len(images), (len(images), 1)),
            **columns,
            **text.columns,
            **masks,
        }
