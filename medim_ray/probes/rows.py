"""Which images of a shard set a probe looks at, and their centre crops: a list on the driver, work items for Ray tasks.

Unlike training, a probe sees each image once, in the order of the shards, without any random number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from numpy.typing import NDArray

from medim_ray import types
from medim_ray.data.reader import EPOCH, IMAGE_ID, STEP, crop_views
from medim_ray.data.rows import decode_gray
from medim_ray.data.shards import ShardSet
from medim_ray.data.texts import ReportEncoder, TextRows, text_rows
from medim_ray.data.transforms import Crop
from medim_ray.draws import Draws
from medim_ray.masking.base import Samples

Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class RowList:
    """Images of a shard set in its order. place: (file, row group, row in it) of each."""

    image_ids: tuple[str, ...]
    patient_ids: tuple[str, ...]
    splits: tuple[str, ...]
    sources: tuple[str, ...]
    labels: tuple[Mapping[str, str], ...]
    place_K3: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.image_ids)

    def where(self, keep: Callable[[str, Mapping[str, str]], bool]) -> RowList:
        """The images whose (split, labels) pass `keep`."""
        at = [i for i, key in enumerate(zip(self.splits, self.labels, strict=True)) if keep(*key)]
        return self.take(at)

    def take(self, at: Sequence[int]) -> RowList:
        """The images at these positions."""
        return RowList(
            image_ids=tuple(self.image_ids[i] for i in at),
            patient_ids=tuple(self.patient_ids[i] for i in at),
            splits=tuple(self.splits[i] for i in at),
            sources=tuple(self.sources[i] for i in at),
            labels=tuple(self.labels[i] for i in at),
            place_K3=self.place_K3[np.asarray(at, dtype=np.int64)],
        )


def list_rows(shards: ShardSet) -> RowList:
    """Every image of a shard set; reads ids, splits and labels only."""
    table = shards.read_rows(columns=["image_id", "patient_id", "split", "source", "labels"])
    places = [
        (f, g, row)
        for f, file in enumerate(shards.files())
        for g, num in enumerate(file.row_groups)
        for row in range(num)
    ]
    return RowList(
        image_ids=tuple(table["image_id"].to_pylist()),
        patient_ids=tuple(table["patient_id"].to_pylist()),
        splits=tuple(table["split"].to_pylist()),
        sources=tuple(table["source"].to_pylist()),
        labels=tuple(dict(labels) for labels in table["labels"].to_pylist()),
        place_K3=np.array(places, dtype=np.int64).reshape(-1, 3),
    )


def sources_with_truth(shards: ShardSet) -> set[str]:
    """The sources of which some image carries lesion masks."""
    sources = shards.read_rows(columns=["source"])["source"].to_pylist()
    return {sources[i] for i in np.flatnonzero(has_truth(shards))}


def has_truth(shards: ShardSet) -> NDArray[np.bool_]:
    """Which images of `list_rows(shards)` carry lesion masks; reads the names of the lesions only."""
    found = [np.zeros(0, dtype=np.bool_)]
    filesystem = shards.arrow_fs()
    for file in shards.files():
        with filesystem.open_input_file(shards.path(file)) as stream:
            truth = pq.ParquetFile(stream).read(columns=["truth.list.element.finding"])["truth"]
        found += [chunk.value_lengths().to_numpy(zero_copy_only=False) > 0 for chunk in truth.chunks]
    return np.concatenate(found)


@dataclass(frozen=True)
class RowReader:
    """Reads the rows of a work item; cheap to send to a task."""

    files: tuple[str, ...]
    filesystem: pafs.FileSystem
    columns: tuple[str, ...]

    @classmethod
    def of(cls, shards: ShardSet, *columns: str) -> RowReader:
        """A reader of the named columns."""
        return cls(tuple(shards.path(file) for file in shards.files()), shards.arrow_fs(), columns)

    def __call__(self, item: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Rows of one row group, in the order of the shards."""
        with self.filesystem.open_input_file(self.files[int(item["file"])]) as file:
            table = pq.ParquetFile(file).read_row_group(int(item["group"]), columns=list(self.columns))
        rows: list[dict[str, Any]] = table.take(pa.array(np.asarray(item["rows"], dtype=np.int64))).to_pylist()
        return rows


def work_items(rows: RowList) -> list[dict[str, Any]]:
    """One item a row group: file, group, rows in it, and the positions of these rows in `rows`."""
    groups: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
    for position, (file, group, row) in enumerate(rows.place_K3.tolist()):
        within, positions = groups.setdefault((file, group), ([], []))
        within.append(row)
        positions.append(position)
    return [{"file": f, "group": g, "rows": within, "positions": at} for (f, g), (within, at) in groups.items()]


def centre_columns(
    rows: Sequence[Mapping[str, Any]], crop: Crop, reports: ReportEncoder | None
) -> tuple[Columns, TextRows]:
    """The columns of a block of the stream (medim_ray.data.reader) for `rows`, cut at the centre, at step 0."""
    images = [decode_gray(row["image"], row["image_id"]) for row in rows]
    plans = dict(crop.plan(np.array([image.shape for image in images]), None))
    image_ids = [row["image_id"] for row in rows]
    text = text_rows(reports, image_ids, [row.get("report", "") for row in rows])
    steps = np.zeros(len(rows), dtype=np.int64)
    columns: Columns = {
        STEP: steps,
        EPOCH: steps,
        IMAGE_ID: np.array(image_ids, dtype=object),
        **crop_views(images, crop, plans),
        **text.columns,
    }
    return columns, text


def centre_samples(columns: Columns, text: TextRows, seed: int) -> tuple[Samples, Draws]:
    """What a masking plans from, for the rows of `centre_columns`: epoch 0, one global batch."""
    image_ids = [str(image_id) for image_id in columns[IMAGE_ID]]
    zeros = np.zeros(len(image_ids), dtype=np.int64)
    samples = Samples(
        image_ids=image_ids,
        boxes_B4=columns[types.BOX],
        more_boxes_BK4=columns[types.BOX][:, None],  # the second global crop is the centre, too
        text=text.columns,
        mentions=text.mentions,
        steps_B=zeros,
        positions_B=np.arange(len(image_ids)),
        global_batch=len(image_ids),
        seed=seed,
    )
    return samples, Draws.of(seed, zeros, image_ids)
