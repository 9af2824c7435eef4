"""The stream through real Ray Data: one order for every worker count, and masks that draw nothing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch

from medim_ray.config.loader import load
from medim_ray.config.schema import RunConfig
from medim_ray.data import pipeline
from medim_ray.data.collate import Columns, steps_of_rank, to_batch
from medim_ray.data.pipeline import execution_options, train_stream
from medim_ray.data.reader import IMAGE_ID, STEP
from medim_ray.data.shards import ShardSet
from medim_ray.train.build import build_crop, build_masking, stream_plan
from medim_ray.train.stream import reader_factory
from medim_ray.types import TOKEN_IDS, Batch

pytestmark = pytest.mark.system
LAST = 14
WORKERS = re.compile(r"ray::(MapWorker|StreamingRepartition)")  # processes of the stream, by their titles
LONG = 36  # steps, three epochs, in which decoders are killed


def config_of(shards: str, *overrides: str) -> RunConfig:
    recipe = Path("configs/debug/medim-vit_tiny-2w-z1.yaml")
    return load(RunConfig, recipe, [f"data.shards={shards}", "data.window_steps=3", *overrides])


def first_batch(config: RunConfig, last_step: int = 2) -> Batch:
    plan = stream_plan(config, ShardSet.open(config.data.shards))
    dataset = train_stream(plan, reader_factory(config, ShardSet.open(config.data.shards)), 0, last_step, 1)
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


Row = tuple[int, str, dict[str, float]]


def rows_of_rank(blocks: Iterable[Columns], slots: int, pause_s: float = 0.0) -> list[Row]:
    """(step, image id, sums of its crop and mask columns) of what one rank gets, in order; a step takes pause_s."""
    seen = []
    for columns in steps_of_rank(blocks, slots):
        time.sleep(pause_s)
        masks = {k: v for k, v in columns.items() if k.startswith(("mask/", "view/"))}
        for i, image_id in enumerate(columns[IMAGE_ID]):
            sums = {k: float(np.asarray(v[i], dtype=np.float64).sum()) for k, v in masks.items()}
            seen.append((int(columns[STEP][i]), str(image_id), sums))
    return seen


def dealt(shards: str, num_workers: int, first_step: int, last_step: int, prefetch: int, num_actors: int) -> list[Row]:
    """What all ranks together get of these steps, dealt as Ray Train deals it."""
    config = config_of(shards, f"train.num_workers={num_workers}", "data.granules_per_step=4")
    opened = ShardSet.open(shards)
    plan = stream_plan(config, opened)
    stream = train_stream(plan, reader_factory(config, opened), first_step, last_step, num_actors)
    stream.context.execution_options.preserve_order = execution_options().preserve_order
    splits = stream.streaming_split(num_workers, equal=True)
    options = {"batch_size": None, "batch_format": "numpy", "prefetch_batches": prefetch}
    blocks = [split.iter_batches(**options) for split in splits]
    slots = config.granules_per_step // num_workers
    pause_s = 0.0 if last_step == LAST else 0.1
    with ThreadPoolExecutor(num_workers) as pool:  # a rank each: they wait for one another
        ranks = list(pool.map(partial(rows_of_rank, slots=slots, pause_s=pause_s), blocks))
    assert all(rank and [s for s, *_ in rank] == sorted(s for s, *_ in rank) for rank in ranks)
    return sorted((row for rank in ranks for row in rank if row[0] < last_step), key=lambda row: (row[0], row[1]))


@pytest.mark.usefixtures("ray_session")
def test_worker_counts_and_late_starts_see_the_same_crops_and_masks(phantom_shards: str) -> None:
    """That training gets what is planned is told by test_train.py."""
    runs = {key: dealt(phantom_shards, *key, LAST, 1, 1) for key in ((1, 0), (2, 0), (4, 0), (2, 5))}
    straight = runs[1, 0]
    assert len(straight) == LAST * 8
    assert runs[2, 0] == straight and runs[4, 0] == straight
    assert runs[2, 5] == [row for row in straight if row[0] >= 5]


@pytest.mark.usefixtures("ray_session")
def test_a_run_of_a_million_steps_begins_like_a_short_one(phantom_shards: str) -> None:
    """With an object for each of its millions of blocks it would not begin within the session's time."""
    config = config_of(phantom_shards)
    short, long = (first_batch(config, last_step) for last_step in (2, 1_000_000))
    assert long.image_ids == short.image_ids
    assert torch.equal(long.views["image"], short.views["image"])


@pytest.mark.usefixtures("ray_session")
def test_a_block_is_one_block_however_large(phantom_shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Data cuts what is larger than its target, here a thousandth of a block."""
    config = config_of(phantom_shards)
    whole = first_batch(config)
    monkeypatch.setattr(ray.data.DataContext.get_current(), "target_max_block_size", 1000)
    again = first_batch(config)
    assert again.image_ids == whole.image_ids and torch.equal(again.views["image"], whole.views["image"])


@pytest.mark.chaos
def test_killed_decoders_and_a_lost_node_change_no_sample_and_no_mask(phantom_shards: str, tmp_path: Path) -> None:
    """1 and 2 workers, two prefetch depths; decoding processes are killed at random and one raylet in mid-stream."""
    told = tmp_path / "told.json"
    command = [sys.executable, "-m", "tests.system.test_stream", phantom_shards, str(told)]
    done = subprocess.run(command, timeout=600, check=False, cwd=Path(__file__).parents[2], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    cases = json.loads(told.read_text())
    assert [(case["workers"], case["prefetch"]) for case in cases] == [(1, 1), (1, 4), (2, 1), (2, 4)]
    for case in cases:
        assert case["killed"] >= 2 and case["node_lost"], case
        assert case["same"], f"another order or other masks: {case}"


def attack(shards: str, told: Path) -> None:
    """In a process of its own: a head without CPUs and two nodes that decode, on which decoders die."""
    from ray.cluster_utils import Cluster

    config, opened = config_of(shards, "data.granules_per_step=4"), ShardSet.open(shards)
    plan, read = stream_plan(config, opened), reader_factory(config, opened)()
    blocks = [read(plan.block(i, 0)) for i in range(plan.num_blocks(0, LONG))]
    planned = rows_of_rank(blocks, config.granules_per_step)
    planned = sorted((row for row in planned if row[0] < LONG), key=lambda row: (row[0], row[1]))

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="WARNING")
    cases = []
    pipeline._CHAPTER = 8
    for seed, (num_workers, prefetch) in enumerate([(1, 1), (1, 4), (2, 1), (2, 4)]):
        pipeline._FEW = 0 if prefetch == 4 else 1024  # the block numbers cut from chapters, as in a long run, or not
        node = cluster.add_node(num_cpus=1)
        killer = Killer(cluster, node, np.random.default_rng(seed))
        killer.start()
        rows = dealt(shards, num_workers, 0, LONG, prefetch, num_actors=3)  # Ray fills a node by half before the next
        killer.end()
        facts = {"workers": num_workers, "prefetch": prefetch, "killed": killer.num_killed}
        cases.append({**facts, "node_lost": killer.node_lost, "same": rows == planned})
        told.write_text(json.dumps(cases))
    ray.shutdown()
    cluster.shutdown()


class Killer(threading.Thread):
    """Kills three processes that decode or cut chapters at random times, and the node after the second one. More of
    them would kill each new one before it has decoded anything, on a busy machine."""

    def __init__(self, cluster: Any, node: Any, rng: np.random.Generator) -> None:
        super().__init__(daemon=True)
        self._cluster, self._node, self._rng = cluster, node, rng
        self._stop_now = threading.Event()
        self.num_killed, self.node_lost = 0, False

    def run(self) -> None:
        while self.num_killed < 3 and not self._stop_now.wait(float(self._rng.uniform(0.5, 2.0))):
            below = psutil.Process().children(recursive=True)
            at_work = [process for process in below if WORKERS.search(" ".join(command_of(process)))]
            if not at_work:
                continue
            at_work[int(self._rng.integers(len(at_work)))].kill()
            self.num_killed += 1
            if self.num_killed == 2:
                self._cluster.remove_node(self._node, allow_graceful=False)
                self.node_lost = True

    def end(self) -> None:
        self._stop_now.set()
        self.join()
        if not self.node_lost:
            self._cluster.remove_node(self._node, allow_graceful=False)


def command_of(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


if __name__ == "__main__":
    attack(sys.argv[1], Path(sys.argv[2]))
