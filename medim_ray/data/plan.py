"""The epoch plan: which row of which shard is sample k of global step s. Pure NumPy; reads nothing but the manifest.

An epoch is a permutation that keeps reads sequential: whole row groups are shuffled, and rows are mixed inside a window
of consecutive row groups. The permutation is cut into global batches, a global batch into granules. For transport,
`window_steps` steps form a window, and *block* (window, slot) holds granule `slot` of each of its steps; blocks are
dealt to rank `slot mod num_workers`, so every worker count sees the same samples in the same step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from medim_ray.draws import Draws


@dataclass(frozen=True)
class RowGroup:
    """`num_rows` consecutive rows of a shard file: row group `index` of file number `file`."""

    file: int
    index: int
    num_rows: int


@dataclass(frozen=True)
class Block:
    """The samples of one transport block: `num_steps` granules after each other, in the order of their steps.

    rows: position of each sample in the corpus (running over all row groups); steps, epochs: of each sample;
    positions: place of each sample in its global batch.
    """

    rows_K: NDArray[np.int64]
    positions_K: NDArray[np.int64]
    steps_K: NDArray[np.int64]
    epochs_K: NDArray[np.int64]


class StreamPlan:
    """The samples of every step, as a function of (seed, step) alone.

    Raises ValueError where the corpus has fewer images than one global batch.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        # Where the shards lie is not what they are: their content has a hash of its own (ShardSet.content_hash).
        shards: str = field(
            default="",
            metadata={"help": "folder or fsspec URL written by `medim-ray prepare`", "hashed": False, "fixed": False},
        )
        split: str = field(default="train", metadata={"help": "split of the shards to train on"})
        granules_per_step: int | None = field(
            default=None,
            metadata={
                "help": "granules a global batch is dealt in, a multiple of every worker count; null: 4, 2 or 1",
                "fixed": False,
                "hashed": False,
            },
        )
        shuffle_window: int = field(
            default=16, metadata={"help": "row groups whose rows are mixed with each other in an epoch's order"}
        )
        window_steps: int = field(
            default=4,
            metadata={"help": "optimizer steps carried by one block of the stream", "fixed": False, "hashed": False},
        )
        num_actors: int = field(
            default=1, metadata={"help": "decoding actors of Ray Data", "fixed": False, "hashed": False}
        )
        prefetch_blocks: int = field(
            default=2, metadata={"help": "blocks each worker fetches ahead", "fixed": False, "hashed": False}
        )

        def __post_init__(self) -> None:
            for key in ("shuffle_window", "window_steps", "num_actors", "prefetch_blocks"):
                if getattr(self, key) < 1:
                    raise ValueError(f"{key}={getattr(self, key)}: must be at least 1")
            if self.granules_per_step is not None and self.granules_per_step < 1:
                raise ValueError(f"granules_per_step={self.granules_per_step}: must be at least 1, or null")

    def __init__(
        self,
        row_groups: Sequence[RowGroup],
        *,
        seed: int,
        global_batch: int,
        granules_per_step: int,
        shuffle_window: int,
        window_steps: int,
    ) -> None:
        assert global_batch % granules_per_step == 0
        self.row_groups = tuple(row_groups)
        self.seed = seed
        self.global_batch = global_batch
        self.granules_per_step = granules_per_step
        self.granule = global_batch // granules_per_step
        self.shuffle_window = shuffle_window
        self.window_steps = window_steps
        sizes = np.array([g.num_rows for g in self.row_groups], dtype=np.int64)
        self.starts_G = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.num_rows = int(self.starts_G[-1])
        self.steps_per_epoch = self.num_rows // global_batch
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"train.global_batch={global_batch} is larger than the {self.num_rows} images of the split: "
                f"use train.global_batch of at most {self.num_rows}, or more images"
            )
        self._orders: dict[int, NDArray[np.int64]] = {}

    def epoch_order(self, epoch: int) -> NDArray[np.int64]:
        """[num_rows] corpus rows in the order of this epoch; the last two epochs asked for are kept."""
        if epoch not in self._orders:
            if len(self._orders) > 1:
                del self._orders[min(self._orders)]
            self._orders[epoch] = self._shuffle(epoch)
        return self._orders[epoch]

    def _shuffle(self, epoch: int) -> NDArray[np.int64]:
        num_groups = len(self.row_groups)
        groups = Draws.of(self.seed, np.array([epoch]), ["plan"]).uniform("row_groups", num_groups)[0]
        order_G = np.argsort(groups, kind="stable")
        rows = np.concatenate([np.arange(self.starts_G[g], self.starts_G[g + 1]) for g in order_G])
        window_G = np.arange(num_groups) // self.shuffle_window
        window = np.repeat(window_G, [self.row_groups[g].num_rows for g in order_G])
        keys = Draws.of(self.seed, np.array([epoch]), ["plan"]).uniform("rows", self.num_rows)[0]
        mixed: NDArray[np.int64] = rows[np.lexsort((keys, window))]
        return mixed

    def step_rows(self, step: int) -> NDArray[np.int64]:
        """[global_batch] corpus rows of a global step; the tail of an epoch that fills no global batch is left out."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return self.epoch_order(epoch)[position * self.global_batch : (position + 1) * self.global_batch]

    def num_blocks(self, first_step: int, last_step: int) -> int:
        """Blocks that carry the steps [first_step, last_step); the last window is filled with the steps after it."""
        return -(-(last_step - first_step) // self.window_steps) * self.granules_per_step

    def block(self, index: int, first_step: int) -> Block:
        """Block `index` of a stream that starts at `first_step`."""
        window, slot = divmod(index, self.granules_per_step)
        steps = first_step + window * self.window_steps + np.arange(self.window_steps)
        positions = np.arange(slot * self.granule, (slot + 1) * self.granule)
        steps_K = np.repeat(steps, self.granule)
        return Block(
            rows_K=np.concatenate([self.step_rows(int(s))[positions] for s in steps]),
            positions_K=np.tile(positions, self.window_steps),
            steps_K=steps_K,
            epochs_K=steps_K // self.steps_per_epoch,
        )

    def locate(self, rows_K: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Row group number and row within it, for corpus rows."""
        groups_K = np.searchsorted(self.starts_G, rows_K, side="right") - 1
        return groups_K, rows_K - self.starts_G[groups_K]
