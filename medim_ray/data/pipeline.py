"""The stream of a run as ONE Ray Data execution: block numbers -> decoding actors -> ranks. Imports ray.

Order: every block holds the same number of rows, `preserve_order` keeps blocks in the plan's order, and streaming_split
deals block k to rank k mod n. The consumer puts the granules of a window back into steps (collate.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy, DataContext, Dataset, ExecutionOptions, TaskPoolStrategy
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.interfaces import BlockEntry, BlockSlice, RefBundle
from ray.data._internal.logical.interfaces import LogicalOperator, LogicalPlan
from ray.data._internal.logical.operators import InputData, StreamingRepartition
from ray.data._internal.stats import DatasetStats
from ray.data.block import BlockAccessor

from medim_ray.data.plan import StreamPlan

if TYPE_CHECKING:  # the processes that only pass blocks on need no decoder, tokenizer or torch
    from medim_ray.data.reader import BlockReader

_FEW = 4096  # block numbers that reach the actors one by one: 0.1 ms each when the stream begins
_CHAPTER = 256  # block numbers that travel together where there are more
_IN_FLIGHT = 4  # blocks that an actor is told to make, the one that it makes included

ReaderFactory = Callable[[], "BlockReader"]
Attend = Callable[[dict[str, NDArray[Any]]], Mapping[str, NDArray[Any]]]
"""Adds columns that need a model to those of a block."""


class Rest(ExecutionCallback):
    """Ray Data's loop over its tasks costs milliseconds a turn, and turns at once where a task has a result that nobody
    wants yet: for ever where the stream is ahead of the training (Ray 2.60). Here a turn is as long as it can be while
    an actor makes no more than one block in it, so that none comes to the end of the blocks that it is told to make."""

    _SHORTEST_S, _LONGEST_S = 0.05, 0.25

    def __init__(self, num_actors: int) -> None:
        self._num_actors, self._num_made = num_actors, 0
        self._turn_s, self._next = self._SHORTEST_S, 0.0

    def on_execution_step(self, executor: Any) -> None:
        num_made = sum(op.metrics.num_tasks_finished for op in executor._topology)
        is_slow = num_made - self._num_made <= self._num_actors
        self._turn_s = min(self._turn_s * 1.25, self._LONGEST_S) if is_slow else max(self._turn_s / 2, self._SHORTEST_S)
        self._num_made = num_made
        time.sleep(max(0.0, self._next - time.monotonic()))
        self._next = time.monotonic() + self._turn_s


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
    # True multi-threading: an actor has one call at a time, and without it that one is made in a thread of its own.
    pool = ActorPoolStrategy(
        size=num_actors, max_tasks_in_flight_per_actor=_IN_FLIGHT, enable_true_multi_threading=True
    )
    blocks = _numbers(plan.num_blocks(first_step, last_step)).map_batches(
        _DecodeActor,
        fn_constructor_args=(make_reader, plan, first_step),
        batch_size=1,
        batch_format="numpy",
        compute=pool,
        num_cpus=0.25,
    )
    blocks.context.target_max_block_size = None  # above 192 MiB a block would be cut, and its parts dealt to two ranks
    blocks.context.memory_usage_poll_interval_s = None  # a thread for each block
    blocks.context.custom_execution_callback_classes = [partial(Rest, num_actors)]
    if make_attend is None:
        return blocks
    return blocks.map_batches(
        _AttendActor,
        fn_constructor_args=(make_attend,),
        batch_size=None,  # whole blocks
        batch_format="numpy",
        compute=pool,
        num_cpus=0.2,  # another number than the decoders': Ray Data would fuse the two stages into one process
    )


def _numbers(num_blocks: int) -> Dataset:
    """The numbers of the blocks, each a block of Ray Data. Many travel as chapters and are cut by a task while they are
    used: a long run has millions, and would begin after minutes."""
    context = DataContext.get_current().copy()
    size = 1 if num_blocks <= _FEW else _CHAPTER
    bundles: Any = _Numbers(num_blocks, size)  # Ray Data says list, and asks for no more than a sequence
    dag: LogicalOperator = InputData(bundles)
    if size > 1:
        # What `repartition(target_num_rows_per_block=1)` makes, which can't be told to ask for no CPU: where all belong
        # to workers, it would wait for ever.
        dag = StreamingRepartition(
            input_dependencies=[dag],
            target_num_rows_per_block=1,
            ray_remote_args={"num_cpus": 0},
            compute=TaskPoolStrategy(1),
        )
    return Dataset(LogicalPlan(dag, context), context, DatasetStats(metadata={}, parent=None))


class _Numbers(Sequence[RefBundle]):
    """0, 1, 2, ... as bundles of `size` rows, each cut from ONE object when it is asked for.

    To iterate gives the object as a whole, of which Ray Data takes the sums.
    """

    def __init__(self, num: int, size: int) -> None:
        table = pa.table({"id": np.arange(num)})
        metadata = BlockAccessor.for_block(table).get_metadata()
        self._num, self._size, self._schema = num, size, table.schema
        self._entry = BlockEntry(ray.put(table), metadata)

    def __len__(self) -> int:
        return -(-self._num // self._size)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            assert index == slice(None), "Ray Data copies it, and cuts nothing out of it"
            return self
        first = index * self._size
        return self._bundle(first, min(first + self._size, self._num))

    def __iter__(self) -> Iterator[RefBundle]:
        yield self._bundle(0, self._num)

    def _bundle(self, first: int, end: int) -> RefBundle:
        rows = BlockSlice(first, end)
        return RefBundle(blocks=(self._entry,), slices=(rows,), schema=self._schema, owns_blocks=False)


def execution_options() -> ExecutionOptions:
    """Blocks reach the ranks in the order of the plan."""
    return ExecutionOptions(preserve_order=True)
