"""Work items through a Ray Data actor pool: where probes start Ray work. Knows neither models nor images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy, DataContext

from medim_ray.data.progress import quiet

Block = dict[str, NDArray[Any]]


def pooled(
    items: Sequence[dict[str, Any]],
    actor: type,
    actor_args: tuple[Any, ...],
    use_gpu: bool,
    before: Callable[[Block], Block] | None = None,
) -> Iterator[Block]:
    """What instances of `actor` make of the items, one block an item, in any order. Needs a running Ray.

    An instance is built once a process as `actor(*actor_args)` and called with a block: the item as columns of one row,
    or what `before` made of it in a task of its own. The pool has one actor a GPU, or one for two CPUs.
    """
    resources = ray.cluster_resources()
    num_actors = int(resources.get("GPU", 1)) if use_gpu else max(1, int(resources["CPU"]) // 2)
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    with DataContext.current(context), quiet("ray.data"):
        stream = ray.data.from_items(list(items), override_num_blocks=len(items))
        if before is not None:
            stream = stream.map_batches(before, batch_size=1, batch_format="numpy", num_cpus=0.25)
        stream = stream.map_batches(
            actor,
            fn_constructor_args=actor_args,
            batch_size=None,
            batch_format="numpy",
            compute=ActorPoolStrategy(min_size=1, max_size=min(num_actors, len(items))),
            num_cpus=0 if use_gpu else 0.75,  # with one task before it: a single CPU
            num_gpus=1 if use_gpu else 0,
        )
        yield from stream.iter_batches(batch_size=None, batch_format="numpy")


def item_of(block: Block) -> dict[str, Any]:
    """The single work item that a block carries."""
    (num,) = {len(np.atleast_1d(values)) for values in block.values()}
    assert num == 1, f"a block of {num} work items"
    return {key: values[0] for key, values in block.items()}
