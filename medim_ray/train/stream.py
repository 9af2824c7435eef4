"""What Ray's own processes carry of a run: light to unpickle; heavy pieces are imported in the process that works."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import ray.train
from ray.data import Dataset

from medim_ray.data.pipeline import Attend, ReaderFactory, train_stream
from medim_ray.data.plan import StreamPlan
from medim_ray.train.snapshot_store import SnapshotStore

if TYPE_CHECKING:
    from medim_ray.config.schema import RunConfig
    from medim_ray.data.shards import ShardSet
    from medim_ray.train.control import Outcome


T = TypeVar("T")


def reader_factory(config: RunConfig, shards: ShardSet) -> ReaderFactory:
    """The reader of this configuration as bytes: the processes on its way to the decoding actors load none of it."""
    from medim_ray.train.build import make_reader

    return partial(pickle.loads, pickle.dumps(make_reader(config, shards)))


def attend_factory(config: RunConfig) -> Callable[[], Attend] | None:
    """The second pool of the stream as bytes, where the masking takes its attention from snapshots."""
    from medim_ray.train.snapshots import make_attender

    attender = make_attender(config)
    return None if attender is None else partial(pickle.loads, pickle.dumps(attender))


def run_worker(settings: dict[str, Any]) -> Outcome:
    """Entry point of a Ray Train worker. settings: those of train_worker."""
    settings["startup"].mark("starting the workers")
    blocks = ray.train.get_dataset_shard("train").iter_batches(
        batch_size=None, batch_format="numpy", prefetch_batches=settings["config"]["data"]["prefetch_blocks"]
    )
    blocks = early(blocks)
    from medim_ray.train.worker import train_worker

    return train_worker(settings, blocks)


def early(items: Iterable[T]) -> Iterator[T]:
    """The same items; the first is asked for at once, in a thread: decoding starts while the worker still imports."""
    rest = iter(items)
    pool = ThreadPoolExecutor(1)
    first = pool.submit(next, rest)
    pool.shutdown(wait=False)
    return itertools.chain((future.result() for future in [first]), rest)


@dataclass(frozen=True)
class StreamFactory:
    """Called by Ray Train when it starts a group of workers: the stream of the steps [first_step, last_step).

    make_attend, snapshot_every: of masking.attention=snapshot; 0 where the snapshots are not those of the run itself.
    """

    plan: StreamPlan
    make_reader: ReaderFactory
    first_step: int
    last_step: int
    num_actors: int
    make_attend: Callable[[], Attend] | None
    run_dir: str
    snapshot_every: int

    def __call__(self) -> Dataset:
        if self.snapshot_every:
            SnapshotStore(self.run_dir).begin(self.first_step, self.snapshot_every)
        steps = (self.first_step, self.last_step)
        return train_stream(self.plan, self.make_reader, *steps, self.num_actors, self.make_attend)
