"""The contenders of stream.py, one a process: asked for a number of samples a line, answers with what they have cost.

`Work` is what each of them does to a batch; only MedIM's own stream goes through its reader, which does the same.
"""

from __future__ import annotations

import json
import os
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.process_tree import tree_seconds
from medim_ray.config.loader import load
from medim_ray.config.schema import RunConfig
from medim_ray.data.reader import SECONDS, STAGES, crop_views
from medim_ray.data.rows import decode_gray
from medim_ray.data.shards import ShardSet
from medim_ray.data.texts import ReportEncoder, text_rows
from medim_ray.draws import Draws
from medim_ray.masking.base import Samples
from medim_ray.models.vit import ImageEncoder
from medim_ray.train.build import build_crop, build_masking, needs_text, open_tokenizer, stream_bytes, stream_plan
from medim_ray.types import BOX

Columns = Mapping[str, NDArray[Any]]
Rows = tuple[Sequence[str], Sequence[Any], Sequence[str]]  # ids, encoded images, reports
RECIPES = {
    "medim": ("configs/debug/medim-vit_tiny-2w-z1.yaml", 256, ("encoder.image_size=224",)),
    "rad_dino": (
        "configs/debug/rad_dino-vit_tiny-2w-z1.yaml",
        64,
        ("encoder.image_size=518", "crop.num_local=8", "crop.local_size=98"),
    ),
}


def config_of(recipe: str, shards: str, actors: int) -> RunConfig:
    """The debug recipe with the sizes of the large one, four granules a step."""
    path, batch, options = RECIPES[recipe]
    common = [f"data.shards={shards}", "data.granules_per_step=4", f"train.global_batch={batch}"]
    return load(RunConfig, Path(path), [*common, f"data.num_actors={actors}", "train.num_workers=1", *options])


class Work:
    """Callable: the rows of a batch -> its columns, as MedIM's reader makes them."""

    def __init__(self, config: RunConfig) -> None:
        shards = ShardSet.open(config.data.shards)
        self._crop, self._masking = build_crop(config), build_masking(config)
        self._grid = ImageEncoder.grid_of(config.encoder)
        self._reports = None
        if needs_text(config):
            self._reports = ReportEncoder(open_tokenizer(config, shards), config.text.num_tokens)
        self.batch = config.train.global_batch
        self._step = 0

    def __call__(self, rows: Rows) -> Columns:
        cv2.setNumThreads(1)
        image_ids, encoded, reports = rows
        self._step += 1
        draws = Draws.of(1, np.full(len(image_ids), self._step), image_ids)
        images = [decode_gray(data, image_id) for data, image_id in zip(encoded, image_ids, strict=True)]
        plans = dict(self._crop.plan(np.array([image.shape for image in images]), draws))
        columns = crop_views(images, self._crop, plans)
        text = text_rows(self._reports, image_ids, reports)
        samples = Samples(
            image_ids=image_ids,
            boxes_B4=columns[BOX],
            more_boxes_BK4=plans[self._crop.views[0].name].boxes_BK4[:, 1:],
            text=text.columns,
            mentions=text.mentions,
            steps_B=np.full(len(image_ids), self._step),
            positions_B=np.arange(len(image_ids)),
            global_batch=self.batch,
            seed=1,
        )
        return {**columns, **text.columns, **self._masking.plan(samples, self._grid, draws)}


class ShardBatches:
    """Batch k of an epoch that goes through the row groups in random order: what the loop and the DataLoader read."""

    def __init__(self, config: RunConfig, work: Work) -> None:
        shards = ShardSet.open(config.data.shards)
        self._paths = [shards.path(file) for file in shards.files()]
        groups = [(f, g) for f, file in enumerate(shards.files()) for g in range(len(file.row_groups) - 1)]
        self._groups = [groups[i] for i in np.random.default_rng(0).permutation(len(groups))]
        self._work, self._open = work, dict[int, pq.ParquetFile]()
        self._each = max(1, work.batch // 64)

    def __len__(self) -> int:
        return len(self._groups) * 64 // self._work.batch

    def __getitem__(self, index: int) -> Columns:
        first = index * self._work.batch // 64
        tables = [self._read(*key) for key in self._groups[first : first + self._each]]
        table = pa.concat_tables(tables).combine_chunks()
        rows = slice(index * self._work.batch % 64, index * self._work.batch % 64 + self._work.batch)
        ids, reports = (table[name].to_pylist()[rows] for name in ("image_id", "report"))
        return self._work((ids, table["image"].to_pylist()[rows], reports))

    def _read(self, file: int, group: int) -> pa.Table:
        if file not in self._open:
            self._open[file] = pq.ParquetFile(self._paths[file])
        return self._open[file].read_row_group(group, columns=["image_id", "image", "report"])


def bare(config: RunConfig, work: Work, workers: int) -> Iterator[Columns]:
    """One process, no framework."""
    batches = ShardBatches(config, work)
    while True:
        for index in range(len(batches)):
            yield batches[index]


def medim(config: RunConfig, work: Work, workers: int) -> Iterator[Columns]:
    """MedIM's stream as a rank gets it."""
    from medim_ray.data.collate import steps_of_rank
    from medim_ray.data.pipeline import execution_options, train_stream
    from medim_ray.session import ray_session, store_of
    from medim_ray.train.stream import reader_factory

    os.environ["RAY_DATA_DISABLE_PROGRESS_BARS"] = "1"
    shards = ShardSet.open(config.data.shards)
    plan, factory = stream_plan(config, shards), reader_factory(config, shards)
    with ray_session(num_cpus=2, object_store_memory=store_of(stream_bytes(config))):
        yield {}  # Ray is up: from here on the clock runs
        stream = train_stream(plan, factory, 0, 4000, workers)
        stream.context.execution_options.preserve_order = execution_options().preserve_order
        (split,) = stream.streaming_split(1, equal=True)
        blocks = split.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=config.data.prefetch_blocks)
        yield from steps_of_rank(blocks, plan.granules_per_step)


def _tensors(columns: Columns) -> dict[str, Any]:
    """For torch's workers: tensors travel through shared memory."""
    import torch

    return {name: torch.from_numpy(values) for name, values in columns.items()}


class _TensorBatches(ShardBatches):
    def __getitem__(self, index: int) -> Any:
        if index >= len(self):
            raise IndexError
        return _tensors(super().__getitem__(index))


def dataloader(config: RunConfig, work: Work, workers: int) -> Iterator[Columns]:
    """torch DataLoader over whole batches, which are made in its workers: its fastest shape."""
    from torch.utils.data import DataLoader

    dataset: Any = _TensorBatches(config, work)
    loader: Any = DataLoader(dataset, batch_size=None, num_workers=workers, persistent_workers=True)
    while True:
        yield from loader


def _rows_of(shards: str) -> Iterator[dict[str, Any]]:
    """The rows of the shard set, for the copies in the peers' formats."""
    one = ShardSet.open(shards)
    for file in one.files():
        for batch in pq.ParquetFile(one.path(file)).iter_batches(500, columns=["image_id", "image", "report"]):
            yield from batch.to_pylist()


def webdataset(config: RunConfig, work: Work, workers: int) -> Iterator[Columns]:
    """WebDataset over tars of 500 images, batches made in the workers of its loader."""
    import webdataset as wds

    folder = Path(f"{config.data.shards}-wds")
    if not folder.exists():
        folder.mkdir()
        tar: tarfile.TarFile | None = None
        for number, row in enumerate(_rows_of(config.data.shards)):
            if number % 500 == 0:
                if tar is not None:
                    tar.close()
                tar = tarfile.open(folder / f"{number // 500:05d}.tar", "w")  # noqa: SIM115
            assert tar is not None
            for ending, data in (("jpg", row["image"]), ("txt", row["report"].encode())):
                info = tarfile.TarInfo(f"{row['image_id']}.{ending}")
                info.size = len(data)
                tar.addfile(info, BytesIO(data))
        assert tar is not None
        tar.close()

    def collate(samples: list[tuple[bytes, bytes, str]]) -> dict[str, Any]:
        images, texts, keys = zip(*samples, strict=True)
        return _tensors(work((keys, images, [text.decode() for text in texts])))

    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    dataset = wds.WebDataset(urls, resampled=True, shardshuffle=False).shuffle(1000).to_tuple("jpg", "txt", "__key__")
    loader = wds.WebLoader(
        dataset.batched(work.batch, collation_fn=collate, partial=False), batch_size=None, num_workers=workers
    )
    yield from loader


def mosaicml(config: RunConfig, work: Work, workers: int) -> Iterator[Columns]:
    """mosaicml-streaming over local MDS shards, batches made in the workers of a DataLoader."""
    from streaming import MDSWriter, StreamingDataset
    from torch.utils.data import DataLoader

    folder = Path(f"{config.data.shards}-mds")
    if not folder.exists():
        with MDSWriter(out=str(folder), columns={"image_id": "str", "image": "bytes", "report": "str"}) as out:
            for row in _rows_of(config.data.shards):
                out.write(row)

    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        names = ("image_id", "image", "report")
        ids, images, reports = ([sample[name] for sample in samples] for name in names)
        return _tensors(work((ids, images, reports)))

    dataset = StreamingDataset(local=str(folder), shuffle=True, batch_size=work.batch)
    loader: Any = DataLoader(
        dataset, batch_size=work.batch, num_workers=workers, collate_fn=collate, drop_last=True, persistent_workers=True
    )
    while True:
        yield from loader


def serve(batches: Iterator[Columns], num_first: int, started: float) -> None:
    """Answers each line, a number of samples, with wall and processor seconds."""
    first = next(batches)
    num = num_first if not len(first) else len(next(iter(first.values())))
    print(json.dumps({"first_batch_s": time.perf_counter() - started, "batch": num}), flush=True)
    cpu = tree_seconds()
    for line in sys.stdin:
        begun, left, seconds = time.perf_counter(), int(line), np.zeros(len(STAGES))
        while left > 0:
            columns = next(batches)
            left -= num
            if SECONDS in columns:
                seconds += columns[SECONDS].sum(axis=0)
        # Since the last answer, which is this turn's lead: see stream.py.
        cpu, before = tree_seconds(), cpu
        answer = {"wall_s": time.perf_counter() - begun, "cpu_s": cpu - before}
        stages = {name: round(float(value), 3) for name, value in zip(STAGES, seconds, strict=True)}
        print(json.dumps({**answer, "stages_s": stages}), flush=True)


def main() -> None:
    """python -m benchmarks.stream_contenders NAME SHARDS RECIPE WORKERS"""
    name, shards, recipe, workers = sys.argv[1:]
    kinds: dict[str, Callable[[RunConfig, Work, int], Iterator[Columns]]] = {
        "bare": bare,
        "medim": medim,
        "dataloader": dataloader,
        "webdataset": webdataset,
        "mosaicml": mosaicml,
    }
    config = config_of(recipe, shards, int(workers))
    batches = kinds[name](config, Work(config), int(workers))
    try:
        if name == "medim":
            next(batches)
        serve(batches, config.train.global_batch, time.perf_counter())
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), flush=True)


if __name__ == "__main__":
    main()
