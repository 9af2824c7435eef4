"""What runs in each Ray Train worker: build the pieces, restore, hand them to the loop. The stream starts elsewhere.

The controller builds the stream from the newest checkpoint at every start of the worker group (launch.py); the worker
restores the same checkpoint, and the loop checks that both are at the same step.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from medim_ray.config.loader import from_tree, run_hash
from medim_ray.config.schema import RunConfig, TrainConfig
from medim_ray.data.collate import Columns, steps_of_rank
from medim_ray.data.reader import STEP
from medim_ray.data.shards import ShardSet
from medim_ray.plan.probe import worker_peak
from medim_ray.schedules import cosine
from medim_ray.track.tracker import TrackerClient
from medim_ray.train import checkpoint
from medim_ray.train.build import build_crop, build_objective, stream_plan
from medim_ray.train.control import Outcome, RunControl
from medim_ray.train.feed import BrokenRows
from medim_ray.train.health import BadStep, NumberGuard, omitted_steps, write_bad_step, write_batch_plan
from medim_ray.train.loop import Trainer, train
from medim_ray.train.metrics import METRICS, JsonLinesFile, read_metrics
from medim_ray.train.store import CheckpointStore
from medim_ray.train.throughput import Meter, Pace
from medim_ray.train.validation import read_best
from medim_ray.train.zero import build_engine

_LOG = logging.getLogger(__name__)


class RunRecorder:
    """metrics.jsonl and the tracker, on rank 0; nothing on the others."""

    def __init__(self, run_dir: str, first_step: int, tracker: Any, pace: Pace | None, train: TrainConfig) -> None:
        """pace: None on all ranks but the first. Steps after `first_step` belong to an attempt that was rolled back."""
        self._train = train
        self._file: JsonLinesFile | None = None
        self._meter: Meter | None = None
        if pace is not None:
            records = read_metrics(run_dir)
            kept = [record for record in records if record["step"] < first_step]
            self._meter = Meter(run_dir, pace, first_step, kept, records[len(kept) :])
            self._file = JsonLinesFile(run_dir, METRICS, kept)
        self.tracker = TrackerClient(tracker) if pace is not None and tracker is not None else None

    def log(self, record: dict[str, Any]) -> None:
        if self._file is None or self._meter is None:
            return
        done = record["step"] + 1
        record = self._meter.add(record, done % self._train.checkpoint_every == 0 or done == self._train.last_step)
        if self.tracker is not None:
            record = record | self.tracker.news()
        self._file.write(record)
        if self.tracker is not None:
            self.tracker.log(record)

    def checkpointed(self, seconds: float) -> None:
        """A checkpoint held the loop up for so long."""
        if self._meter is not None:
            self._meter.checkpointed(seconds)

    def end(self, step: int) -> None:
        """The workers of this attempt end as they should, after `step` optimizer steps."""
        if self._meter is not None:
            self._meter.end(step)
        self.sync()

    def sync(self) -> None:
        """Publishes the files where the run lies on object storage."""
        if self._file is not None and self._meter is not None:
            self._file.sync()
            self._meter.sync()


class RunCheckpoints:
    """Commits checkpoints of this run and prunes old ones."""

    def __init__(self, config: RunConfig, hashes: dict[str, str], engine: Any, recorder: RunRecorder) -> None:
        self._config, self._engine, self._recorder = config, engine, recorder
        self._store = CheckpointStore(config.run.dir)
        self._facts = {
            **hashes,
            "objective": config.objective.name,
            "zero": config.train.zero,
        }

    def save(self, step: int) -> None:
        started = time.perf_counter()
        self._recorder.sync()
        name = checkpoint.save(self._store, self._engine, step, self._facts)
        if dist.get_rank() == 0:
            best = read_best(self._config.run.dir)
            self._store.prune(self._config.train.keep_last, name, also=[best] if best else [])
        ray.train.report({"step": step, "checkpoint": name})
        self._recorder.checkpointed(time.perf_counter() - started)


class BadStepReport:
    """Keeps what is known of a bad step in the run folder: rank 0 the record, every rank its batch plan."""

    def __init__(self, config: RunConfig, rank: int) -> None:
        self._config, self._rank = config, rank

    def __call__(self, bad: BadStep, columns: Columns) -> None:
        run_dir, train = self._config.run.dir, self._config.train
        write_batch_plan(run_dir, bad.step, self._rank, columns)
        if self._rank == 0:
            record = {
                "step": bad.step,
                "reason": bad.reason,
                "first_position": bad.step * train.global_batch,
                "num_samples": train.global_batch,
                "policy": train.on_bad_step,
                "omitted": train.on_bad_step != "stop",
            }
            write_bad_step(run_dir, record)


def train_worker(settings: dict[str, Any], blocks: Iterable[Columns]) -> Outcome:
    """Trains on this rank's blocks. settings: config (plain tree), tracker (actor handle), launched_at (Unix time at
    which the command began), flops_per_image (None where the planner has no model of the run)."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    asked = from_tree(RunConfig, settings["config"])
    config = of_this_group(asked, dist.get_world_size())
    shards = ShardSet.open(config.data.shards)
    device = ray.train.torch.get_device()
    objective = build_objective(config, shards)
    engine = build_engine(objective, config.train)  # type: ignore[arg-type]
    store = CheckpointStore(config.run.dir)
    newest = checkpoint.agree_on_newest(store, _LOG.warning)
    if newest is not None:
        checkpoint.restore(store, newest, engine)
    first_step = newest.step if newest is not None else 0
    rank = dist.get_rank()
    hashes = {"run_hash": run_hash(asked), "data_hash": shards.content_hash}  # as config.yaml has them
    pace = _pace(settings, config.train, device) if rank == 0 else None
    recorder = RunRecorder(config.run.dir, first_step, settings["tracker"], pace, config.train)
    plan = stream_plan(config, shards)
    run = Trainer(
        config=config.train,
        seed=config.seed,
        engine=engine,
        device=device,
        views=build_crop(config).views,
        steps=_steps(blocks, first_step, config.granules_per_step // config.train.max_workers),
        lr=cosine(
            config.train.lr,
            config.train.min_lr,
            config.train.steps,
            warmup_steps=round(config.train.warmup_ratio * config.train.steps),
        ),
        weight_decay=cosine(config.train.weight_decay, _end_of_decay(config.train), config.train.steps),
        guard=NumberGuard(config.train, _omitted(config.run.dir), BadStepReport(config, rank)),
        control=RunControl(recorder.tracker),
        broken=BrokenRows(config.run.dir, shards.num_rows(config.data.split), config.data.max_broken_ratio),
        recorder=recorder,
        checkpoints=RunCheckpoints(config, hashes, engine, recorder),
        first_step=first_step,
        rank=rank,
        samples_per_epoch=plan.steps_per_epoch * plan.global_batch,
    )
    try:
        outcome = train(run)
    except BadStep as bad:
        outcome = Outcome(kind="bad_step", step=first_step, message=str(bad))
    recorder.end(outcome.step)
    return outcome


def _pace(settings: dict[str, Any], train: TrainConfig, device: torch.device) -> Pace:
    """What the steps of this attempt are measured against; measures the device where no table has it."""
    peak, source = worker_peak(device, train.precision)
    return Pace(
        launched_at=settings["launched_at"],
        flops_per_image=settings["flops_per_image"],
        num_workers=train.max_workers,
        peak_flops=peak,
        peak_source=source,
    )


def of_this_group(config: RunConfig, world_size: int) -> RunConfig:
    """The configuration with the number of workers that there are; the images of a forward stay those of the largest
    group, so that losses within a forward do not depend on the size of the group."""
    train = replace(config.train, num_workers=world_size, micro_batch=config.train.local_micro_batch)
    return replace(config, data=replace(config.data, granules_per_step=config.granules_per_step), train=train)


def _end_of_decay(train: TrainConfig) -> float:
    return train.weight_decay if train.weight_decay_end is None else train.weight_decay_end


def _omitted(run_dir: str) -> dict[int, str]:
    """Collective: the steps that the run leaves out, as rank 0 reads them."""
    steps = [omitted_steps(run_dir) if dist.get_rank() == 0 else {}]
    dist.broadcast_object_list(steps)
    return steps[0]


def _steps(blocks: Iterable[Columns], first_step: int, slots_per_rank: int) -> Iterator[Columns]:
    """This rank's columns, step by step; AssertionError where the stream does not begin at `first_step`."""
    steps = steps_of_rank(blocks, slots_per_rank)
    first = next(steps)
    assert np.all(first[STEP] == first_step), "the stream and the checkpoint are at different steps"
    return itertools.chain([first], steps)
