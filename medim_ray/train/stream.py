"""What Ray's own processes carry of a run: light to unpickle; heavy pieces are imported in the process that works."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ray.data import Dataset

from medim_ray.config.loader import to_tree
from medim_ray.data.pipeline import ReaderFactory, train_stream
from medim_ray.data.plan import StreamPlan
from medim_ray.train.store import CheckpointStore

if TYPE_CHECKING:
    from medim_ray.config.schema import RunConfig
    from medim_ray.data.reader import BlockReader


def _reader(tree: dict[str, Any]) -> BlockReader:
    from medim_ray.train.build import make_reader

    return make_reader(tree)


def reader_factory(config: RunConfig) -> ReaderFactory:
    """The reader of this configuration, built in the decoding actor that calls the factory."""
    return partial(_reader, to_tree(config))


def run_worker(settings: dict[str, Any]) -> None:
    """Entry point of a Ray Train worker, see worker.train_worker."""
    from medim_ray.train.worker import train_worker

    train_worker(settings)


@dataclass(frozen=True)
class StreamFactory:
    """Called by Ray Train at every start of the worker group: the stream from the newest checkpoint on."""

    plan: StreamPlan
    make_reader: ReaderFactory
    run_dir: str
    last_step: int
    num_actors: int

    def __call__(self) -> Dataset:
        newest = CheckpointStore(self.run_dir).newest()
        first_step = newest.step if newest is not None else 0
        return train_stream(self.plan, self.make_reader, first_step, self.last_step, self.num_actors)
