"""The stream through real Ray Data: one order for every worker count, and masks that draw nothing."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medim_ray.config.loader import load
from medim_ray.config.schema import RunConfig
from medim_ray.data.collate import Columns, steps_of_rank, to_batch
from medim_ray.data.pipeline import execution_options, train_stream
from medim_ray.data.reader import IMAGE_ID, STEP
from medim_ray.data.shards import ShardSet
from medim_ray.train.build import build_crop, build_masking, stream_plan
from medim_ray.train.stream import reader_factory
from medim_ray.types import TOKEN_IDS, Batch

pytestmark = pytest.mark.system
LAST = 14


def config_of(shards: str, *overrides: str) -> RunConfig:
    recipe = Path("configs/debug/medim-vit_tiny-2w-z1.yaml")
    return load(RunConfig, recipe, [f"data.shards={shards}", "data.window_steps=3", *overrides])


def first_batch(config: RunConfig) -> Batch:
    plan = stream_plan(config, ShardSet.open(config.data.shards))
    dataset = train_stream(plan, reader_factory(config, ShardSet.open(config.data.shards)), 0, 2, 1)
    blocks = dataset.iter_batches(batch_size=None, batch_format="numpy")
    columns = next(steps_of_rank(blocks, plan.granules_per_step))
    return to_batch(columns, build_crop(config).views, torch.device("cpu"))


@pytest.mark.usefixtures("ray_session")
def test_a_shard_that_is_gone_ends_the_stream_with_its_name(phantom_shards: str, tmp_path: Path) -> None:
    shutil.copytree(phantom_shards, tmp_path / "shards")
    config = config_of(str(tmp_path / "shards"))
    shards = ShardSet.open(config.data.shards)
    gone = shards.files("train")[0]
    Path(shards.path(gone)).unlink()
    with pytest.raises(Exception, match=rf"ShardFaultError: data.shards: {gone.path} is missing: .*shards verify"):
        first_batch(config)


def numpy_words() -> Any:
    """The state of NumPy's global generator, which nothing may touch."""
    return np.random.get_state(legacy=False)["state"]["key"].copy()  # noqa: NPY002


@pytest.mark.usefixtures("ray_session")
def test_plan_columns_arrive_and_the_worker_draws_nothing_for_a_mask(phantom_shards: str) -> None:
    config = config_of(phantom_shards)
    batch = first_batch(config)
    assert len(batch) == config.train.global_batch
    assert batch.views["image"].shape == (8, 1, 112, 112) and float(batch.views["image"].min()) >= 0.0
    assert [name for name in batch.columns if name.startswith("mask/")]
    masking = build_masking(config)
    num_words = batch.columns[TOKEN_IDS].shape[1] - 1
    attention_BWN = torch.rand(8, num_words, 49, generator=torch.Generator().manual_seed(0)).softmax(dim=2)
    torch_state, numpy_state = torch.get_rng_state(), numpy_words()
    masks = masking.resolve(batch.columns, attention_BWN)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(numpy_words(), numpy_state)
    torch.manual_seed(99)
    assert torch.equal(masking.resolve(batch.columns, attention_BWN).hidden_SBN, masks.hidden_SBN)
    assert masks.hidden_SBN.shape == (2, 8, 49) and masks.hidden_SBN.any()


def rows_of_rank(blocks: Iterable[Columns], slots: int) -> list[tuple[int, str, dict[str, float]]]:
    """(step, image id, sums of its crop and mask columns) of what one rank gets, in order."""
    seen = []
    for columns in steps_of_rank(blocks, slots):
        masks = {k: v for k, v in columns.items() if k.startswith(("mask/", "view/"))}
        for i, image_id in enumerate(columns[IMAGE_ID]):
            sums = {k: float(np.asarray(v[i], dtype=np.float64).sum()) for k, v in masks.items()}
            seen.append((int(columns[STEP][i]), str(image_id), sums))
    return seen


@pytest.mark.usefixtures("ray_session")
def test_worker_counts_and_late_starts_see_the_same_crops_and_masks(phantom_shards: str) -> None:
    """Dealt as Ray Train deals it; that training gets what is planned is told by test_train.py."""
    runs: dict[tuple[int, int], list[Any]] = {}
    for num_workers, first_step in ((1, 0), (2, 0), (4, 0), (2, 5)):
        config = config_of(phantom_shards, f"train.num_workers={num_workers}", "data.granules_per_step=4")
        shards = ShardSet.open(phantom_shards)
        stream = train_stream(stream_plan(config, shards), reader_factory(config, shards), first_step, LAST, 1)
        stream.context.execution_options.preserve_order = execution_options().preserve_order
        splits = stream.streaming_split(num_workers, equal=True)
        blocks = [split.iter_batches(batch_size=None, batch_format="numpy") for split in splits]
        with ThreadPoolExecutor(num_workers) as pool:  # a rank each: they wait for one another
            ranks = list(pool.map(partial(rows_of_rank, slots=config.granules_per_step // num_workers), blocks))
        assert all(rank and [s for s, *_ in rank] == sorted(s for s, *_ in rank) for rank in ranks)
        rows = sorted((row for rank in ranks for row in rank if row[0] < LAST), key=lambda row: (row[0], row[1]))
        runs[num_workers, first_step] = rows
    straight = runs[1, 0]
    assert len(straight) == LAST * 8
    assert runs[2, 0] == straight and runs[4, 0] == straight
    assert runs[2, 5] == [row for row in straight if row[0] >= 5]
