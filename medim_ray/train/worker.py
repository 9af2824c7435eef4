"""What runs in each Ray Train worker: build the pieces, restore, hand them to the loop. The stream starts elsewhere.

The controller builds the stream from the newest checkpoint at every start of the worker group (launch.py); the worker
restores the same checkpoint, and the loop checks that both are at the same step.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch.distributed as dist

from medim_ray.config.loader import from_tree, run_hash
from medim_ray.config.schema import RunConfig
from medim_ray.data.collate import Columns, steps_of_rank
from medim_ray.data.reader import STEP
from medim_ray.data.shards import ShardSet
from medim_ray.schedules import cosine
from medim_ray.track.tracker import TrackerClient
from medim_ray.train import checkpoint
from medim_ray.train.build import build_crop, build_objective, stream_plan
from medim_ray.train.loop import Trainer, train
from medim_ray.train.metrics import MetricsFile
from medim_ray.train.store import CheckpointStore
from medim_ray.train.zero import build_engine

_LOG = logging.getLogger(__name__)


class RunRecorder:
    """metrics.jsonl and the tracker, on rank 0; nothing on the others."""

    def __init__(self, run_dir: str, first_step: int, tracker: Any, is_first: bool) -> None:
        self._file = MetricsFile(run_dir, first_step) if is_first else None
        self._tracker = TrackerClient(tracker) if is_first and tracker is not None else None

    def log(self, record: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(record)
        if self._tracker is not None:
            self._tracker.log(record)

    def sync(self) -> None:
        """Publishes the metrics file where the run lies on object storage."""
        if self._file is not None:
            self._file.sync()


class RunCheckpoints:
    """Commits checkpoints of this run and prunes old ones."""

    def __init__(self, config: RunConfig, data_hash: str, engine: Any, recorder: RunRecorder) -> None:
        self._config, self._engine, self._recorder = config, engine, recorder
        self._store = CheckpointStore(config.run.dir)
        self._facts = {
            "run_hash": run_hash(config),
            "data_hash": data_hash,
            "objective": config.objective.name,
            "zero": config.train.zero,
        }

    def save(self, step: int) -> None:
        self._recorder.sync()
        name = checkpoint.save(self._store, self._engine, step, self._facts)
        if dist.get_rank() == 0:
            self._store.prune(self._config.train.keep_last, name)
        ray.train.report({"step": step, "checkpoint": name})


def train_worker(settings: dict[str, Any], blocks: Iterable[Columns]) -> None:
    """Trains on this rank's blocks. settings: config (plain tree), tracker (actor handle)."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    config = from_tree(RunConfig, settings["config"])
    shards = ShardSet.open(config.data.shards)
    device = ray.train.torch.get_device()
    objective = build_objective(config, shards)
    engine = build_engine(objective, config.train)  # type: ignore[arg-type]
    store = CheckpointStore(config.run.dir)
    newest = checkpoint.agree_on_newest(store, _LOG.warning)
    if newest is not None:
        checkpoint.restore(store, newest, engine)
    first_step = newest.step if newest is not None else 0
    rank, world_size = dist.get_rank(), dist.get_world_size()
    recorder = RunRecorder(config.run.dir, first_step, settings["tracker"], rank == 0)
    plan = stream_plan(config, shards)
    run = Trainer(
        config=config.train,
        seed=config.seed,
        engine=engine,
        device=device,
        views=build_crop(config).views,
        steps=_steps(blocks, first_step, config.granules_per_step // world_size),
        lr=cosine(
            config.train.lr,
            config.train.min_lr,
            config.train.steps,
            warmup_steps=round(config.train.warmup_ratio * config.train.steps),
        ),
        recorder=recorder,
        checkpoints=RunCheckpoints(config, shards.content_hash, engine, recorder),
        first_step=first_step,
        rank=rank,
        samples_per_epoch=plan.steps_per_epoch * plan.global_batch,
    )
    if rank == 0:
        num_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
        _LOG.info(json.dumps({"parameters": num_parameters, "first_step": first_step, "workers": world_size}))
    train(run)


def _steps(blocks: Iterable[Columns], first_step: int, slots_per_rank: int) -> Iterator[Columns]:
    """This rank's columns, step by step; AssertionError where the stream does not begin at `first_step`."""
    steps = steps_of_rank(blocks, slots_per_rank)
    first = next(steps)
    assert np.all(first[STEP] == first_step), "the stream and the checkpoint are at different steps"
    return itertools.chain([first], steps)
