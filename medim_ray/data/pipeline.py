"""The stream of a run as ONE Ray Data execution: block numbers -> decoding actors -> ranks. Imports ray.

Order: every block holds the same number of rows, `preserve_order` keeps blocks in the plan's order, and streaming_split
deals block k to rank k mod n. The consumer puts the granules of a window back into steps (collate.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy, Dataset, ExecutionOptions, TaskPoolStrategy
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.logical.interfaces import LogicalPlan
from ray.data._internal.logical.operators import StreamingRepartition
from ray.data.read_api import from_blocks

from medim_ray.data.plan import StreamPlan

if TYPE_CHECKING:  # the processes that only pass blocks on need no decoder, tokenizer or torch
    from medim_ray.data.reader import BlockReader

_FEW = 1024  # block numbers, of which each may be an object
_CHAPTER = 256  # block numbers in one object

ReaderFactory = Callable[[], "BlockReader"]
Attend = Callable[[dict[str, NDArray[Any]]], Mapping[str, NDArray[Any]]]
"""Adds columns that need a model to those of a block."""


class Rest(ExecutionCallback):
    """Ray Data's loop over its tasks takes at least 50 ms a turn. Where a stream is ahead of the training it finds
    tasks with results that nobody wants yet, and would turn at once, for ever: a whole core for nothing (Ray 2.60)."""

    _TURN_S = 0.05  # where a task is still at work, Ray itself waits for up to 100 ms

    def __init__(self) -> None:
        self._next = 0.0

    def on_execution_step(self, executor: Any) -> None:
        time.sleep(max(0.0, self._next - time.monotonic()))
        self._next = time.monotonic() + self._TURN_S


class _DecodeActor:
    """One process of the decoding pool: builds its reader once, then turns block numbers into columns."""

    def __init__(self, make_reader: ReaderFactory, plan: StreamPlan, first_step: int) -> None:
        self._reader, self._plan, self._first_step = make_reader(), plan, first_step

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        (index,) = batch["id"]
        return self._reader(self._plan.block(int(index), self._first_step))


class _AttendActor:
    """One process of the second pool: builds its model once, then adds what it sees to each block."""

    def __init__(self, make_attend: Callable[[], Attend]) -> None:
        self._attend = make_attend()

    def __call__(self, batch: dict[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        return self._attend(batch)


def train_stream(
    plan: StreamPlan,
    make_reader: ReaderFactory,
    first_step: int,
    last_step: int,
    num_actors: int,
    make_attend: Callable[[], Attend] | None = None,
) -> Dataset:
    """Blocks of the steps [first_step, last_step), to be split over the ranks by Ray Train.

    Each output block is one block of the plan, `plan.window_steps * plan.granule` rows. make_attend: a second pool of
    as many actors, with a model, whose maps join the columns.
    """
    blocks = _numbers(plan.num_blocks(first_step, last_step)).map_batches(
        _DecodeActor,
        fn_constructor_args=(make_reader, plan, first_step),
        batch_size=1,
        batch_format="numpy",
        compute=ActorPoolStrategy(size=num_actors),
        num_cpus=0.25,
    )
    blocks.context.target_max_block_size = None  # above 192 MiB a block would be cut, and its parts dealt to two ranks
    blocks.context.custom_execution_callback_classes = [Rest]
    if make_attend is None:
        return blocks
    return blocks.map_batches(
        _AttendActor,
        fn_constructor_args=(make_attend,),
        batch_size=None,  # whole blocks
        batch_format="numpy",
        compute=ActorPoolStrategy(size=num_actors),
        num_cpus=0.2,  # another number than the decoders': Ray Data would fuse the two stages into one process
    )


def _numbers(num_blocks: int) -> Dataset:
    """The numbers of the blocks, one a block of Ray Data. Many are cut from chapters while they are used: a long run
    has millions of blocks, and with an object for each it would begin after minutes."""
    size = 1 if num_blocks <= _FEW else _CHAPTER
    every = range(num_blocks)
    chapters = from_blocks([pa.table({"id": np.array(every[i : i + size])}) for i in range(0, num_blocks, size)])
    if size == 1:
        return chapters
    # What `repartition(target_num_rows_per_block=1)` makes, which can't be told to ask for no CPU: where all belong to
    # workers, it would wait for ever.
    rows = StreamingRepartition(
        input_dependencies=[chapters._logical_plan.dag],
        target_num_rows_per_block=1,
        ray_remote_args={"num_cpus": 0},
        compute=TaskPoolStrategy(1),
    )
    return Dataset._from_parent(chapters, LogicalPlan(rows, chapters.context))


def execution_options() -> ExecutionOptions:
    """Blocks reach the ranks in the order of the plan."""
    return ExecutionOptions(preserve_order=True)
