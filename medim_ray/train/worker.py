"""What runs in each Ray Train worker: build the pieces, restore, hand them to the loop. The stream starts elsewhere.

The driver verifies the newest checkpoint and tells it to both (launch.py): the controller builds the stream from its
step on, the worker restores it, and the loop checks that both are at the same step.
"""

from __future__ import annotations

import itertools
import logging
import pickle
import queue
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
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
from medim_ray.data.storage import patiently
from medim_ray.plan.probe import worker_peak
from medim_ray.schedules import cosine
from medim_ray.track.tracker import TrackerClient
from medim_ray.train import checkpoint
from medim_ray.train.before import BeforeStep
from medim_ray.train.build import build_crop, build_objective, stream_plan
from medim_ray.train.control import Outcome, RunControl
from medim_ray.train.feed import BrokenRows
from medim_ray.train.health import (
    BadStep,
    NumberGuard,
    norms_before,
    omitted_steps,
    write_bad_step,
    write_batch_plan,
)
from medim_ray.train.loop import Trainer, train
from medim_ray.train.metrics import METRICS, JsonLinesFile, read_metrics
from medim_ray.train.saver import Saver
from medim_ray.train.snapshot_store import SnapshotStore
from medim_ray.train.snapshots import Publisher, snapshot_every
from medim_ray.train.startup import Startup
from medim_ray.train.store import CheckpointStore, Start
from medim_ray.train.throughput import Meter, Pace
from medim_ray.train.validation import read_best
from medim_ray.train.zero import build_engine

_LOG = logging.getLogger(__name__)
_LAST_SAVE_S = 20.0  # for a save that is under way when an exception ends this worker


class RunRecorder:
    """metrics.jsonl and the tracker, on rank 0; nothing on the others. startup: goes into the first record."""

    def __init__(
        self, run_dir: str, first_step: int, tracker: Any, pace: Pace | None, train: TrainConfig, startup: Startup
    ) -> None:
        """pace: None on all ranks but the first. Steps after `first_step` belong to an attempt that was rolled back."""
        self._train = train
        self._startup: Startup | None = startup
        self._words: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._file: JsonLinesFile | None = None
        self._meter: Meter | None = None
        if pace is not None:
            records = read_metrics(run_dir)
            kept = [record for record in records if record["step"] < first_step]
            self._meter = Meter(run_dir, pace, first_step, kept, records[len(kept) :])
            self._file = JsonLinesFile(run_dir, METRICS, kept)
        self.tracker = TrackerClient(tracker) if pace is not None and tracker is not None else None

    def tell(self, words: str) -> None:
        """For the `warnings` of the next record; from any thread."""
        _LOG.warning(words)
        self._words.put(words)

    def log(self, record: dict[str, Any]) -> None:
        if self._file is None or self._meter is None:
            return
        if self._startup is not None:
            self._startup.mark("first step")
            record, self._startup = record | {"startup_s": self._startup.parts}, None
        words = [self._words.get() for _ in range(self._words.qsize())]
        if words:
            record = record | {"warnings": [*record.get("warnings", []), *words]}
        done = record["step"] + 1
        record = self._meter.add(record, done % self._train.checkpoint_every == 0 or done == self._train.last_step)
        if self.tracker is not None:
            record = record | self.tracker.news()
            if self.tracker.dropped:
                record["tracker_dropped"] = self.tracker.dropped
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
    """Checkpoints of this run, written behind it (saver.py); rank 0 removes old ones."""

    def __init__(
        self, config: RunConfig, attempt: int, hashes: dict[str, str], engine: Any, recorder: RunRecorder
    ) -> None:
        self._config, self._engine, self._recorder, self._attempt = config, engine, recorder, attempt
        self._store = CheckpointStore(config.run.dir, config.train.storage_patience_s)
        self._snapshot_every = snapshot_every(config)
        facts = {**hashes, "objective": config.objective.name, "zero": config.train.zero}
        self._saver = Saver(
            self._store,
            attempt,
            facts,
            max_pending=config.train.max_pending_saves,
            # The lines of the steps that a checkpoint has behind it are there when it is.
            before=partial(patiently, recorder.sync, config.train.storage_patience_s),
            committed=self._prune,
            told=recorder.tell,
        )

    def save(self, step: int) -> None:
        started = time.perf_counter()
        self._saver.save(self._engine, step)
        self._recorder.checkpointed(time.perf_counter() - started)

    def finish(self) -> None:
        """RuntimeError where the last save did not commit."""
        started = time.perf_counter()
        self._saver.finish()
        self._recorder.checkpointed(time.perf_counter() - started)

    def settle(self, seconds: float) -> None:
        """Lets what is under way come to its end, for so long."""
        self._saver.settle(seconds)

    def _prune(self, name: str) -> None:
        if dist.get_rank() == 0:
            best = read_best(self._config.run.dir)
            also = [best] if best else []
            self._store.prune(self._config.train.keep_last, name, also, writing_attempt=self._attempt)
            if self._snapshot_every:
                oldest = int(self._store.names()[-1].split("-")[1])
                SnapshotStore(self._config.run.dir).prune(oldest, self._snapshot_every)


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
                "samples_key": bad.samples_key,
                "first_position": bad.step * train.global_batch,
                "num_samples": train.global_batch,
                "policy": train.on_bad_step,
                "omitted": train.on_bad_step != "stop",
            }
            write_bad_step(run_dir, record)


def train_worker(settings: dict[str, Any], blocks: Iterable[Columns]) -> Outcome:
    """Trains on this rank's blocks. settings: config (plain tree), tracker (actor handle), start (Start), startup
    (Startup), launched_at (Unix time at which the command began), flops_per_image (None where the planner has no model
    of the run), watch (a pickled Watch of launch.py, or None)."""
    startup: Startup = settings["startup"]
    startup.mark("imports of the worker")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    asked = from_tree(RunConfig, settings["config"])
    config = of_this_group(asked, dist.get_world_size())
    shards = ShardSet.open(config.data.shards)
    device = ray.train.torch.get_device()
    objective = build_objective(config, shards)
    engine = build_engine(objective, config.train)  # type: ignore[arg-type]
    startup.mark("model and DeepSpeed")
    start: Start = settings["start"]
    if start.checkpoint:
        store = CheckpointStore(config.run.dir, config.train.storage_patience_s)
        checkpoint.restore(store, store.open(start.checkpoint), engine)
        startup.mark("restoring")
    first_step = start.step
    rank = dist.get_rank()
    hashes = {"run_hash": run_hash(asked), "data_hash": shards.content_hash}  # as config.yaml has them
    pace = _pace(settings, config.train, device) if rank == 0 else None
    startup.mark("probing the device")
    recorder = RunRecorder(config.run.dir, first_step, settings["tracker"], pace, config.train, startup)
    checkpoints = RunCheckpoints(config, start.attempt, hashes, engine, recorder)
    plan = stream_plan(config, shards)
    steps = _steps(blocks, first_step, config.granules_per_step // config.train.max_workers)
    startup.mark("waiting for the first batch")
    run = Trainer(
        config=config.train,
        seed=config.seed,
        engine=engine,
        device=device,
        views=build_crop(config).views,
        steps=steps,
        lr=cosine(
            config.train.lr,
            config.train.min_lr,
            config.train.steps,
            warmup_steps=round(config.train.warmup_ratio * config.train.steps),
        ),
        weight_decay=cosine(config.train.weight_decay, _end_of_decay(config.train), config.train.steps),
        guard=_guard(config, first_step, rank),
        control=RunControl(recorder.tracker),
        broken=BrokenRows(config.run.dir, shards.num_rows(config.data.split), config.data.max_broken_ratio),
        recorder=recorder,
        checkpoints=checkpoints,
        before_step=_before_step(config, objective, settings["watch"], rank),
        first_step=first_step,
        rank=rank,
        samples_per_epoch=plan.steps_per_epoch * plan.global_batch,
    )
    try:
        outcome = train(run)
        checkpoints.finish()
    except BadStep as bad:
        checkpoints.settle(config.train.storage_patience_s)
        outcome = Outcome(kind="bad_step", step=first_step, message=str(bad))
    except Exception:
        checkpoints.settle(_LAST_SAVE_S)  # or the next group would begin further back
        raise
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


def _before_step(config: RunConfig, objective: Any, watch: bytes | None, rank: int) -> BeforeStep:
    """What a rank does before a step: publish a snapshot, look at the maps, where the run has such."""
    look = pickle.loads(watch)(config, objective) if watch else None
    publish = None
    if every := snapshot_every(config):
        publish = Publisher(SnapshotStore(config.run.dir), every, objective, rank)
    return BeforeStep(publish, look, config.maps.every)


def of_this_group(config: RunConfig, world_size: int) -> RunConfig:
    """The configuration with the number of workers that there are; the images of a forward stay those of the largest
    group, so that losses within a forward do not depend on the size of the group."""
    train = replace(config.train, num_workers=world_size, micro_batch=config.train.local_micro_batch)
    return replace(config, data=replace(config.data, granules_per_step=config.granules_per_step), train=train)


def _end_of_decay(train: TrainConfig) -> float:
    return train.weight_decay if train.weight_decay_end is None else train.weight_decay_end


def _guard(config: RunConfig, first_step: int, rank: int) -> NumberGuard:
    """Collective: with the steps that the run leaves out and the norms before `first_step`, as rank 0 reads them."""
    known: list[Any] = [{}, []]
    if rank == 0:
        known[0] = omitted_steps(config.run.dir)
        if config.train.spike_factor:
            known[1] = norms_before(config.run.dir, first_step)
    dist.broadcast_object_list(known)
    omitted, norms = known
    return NumberGuard(config.train, omitted, BadStepReport(config, rank), norms)


def _steps(blocks: Iterable[Columns], first_step: int, slots_per_rank: int) -> Iterator[Columns]:
    """This rank's columns, step by step; AssertionError where the stream does not begin at `first_step`."""
    steps = steps_of_rank(blocks, slots_per_rank)
    first = next(steps)
    assert np.all(first[STEP] == first_step), "the stream and the checkpoint are at different steps"
    return itertools.chain([first], steps)
