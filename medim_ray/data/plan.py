"""The epoch plan: which row of which shard is sample k of global step s. Pure NumPy; reads nothing but the manifest.

An epoch is a permutation that keeps reads sequential: whole row groups are shuffled, and rows are mixed inside a window
of consecutive row groups. The permutation is cut into global batches, a global batch into granules. For transport,
`window_steps` steps form a window, and *block* (window, slot) holds granule `slot` of each of its steps; blocks are
dealt to rank `slot mod num_workers`, so every worker count sees the same samples in the same step.

With weights, origins (parts of the corpus) are interleaved by their shares: the j-th sample of origin o comes at time
(j + 1/2) / share, and every origin runs through permutations of its own, pass after pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medim_ray.draws import Draws


@dataclass(frozen=True)
class RowGroup:
    """`num_rows` consecutive rows of a shard file: row group `index` of file number `file`; origin: place in the
    plan's weights."""

    file: int
    index: int
    num_rows: int
    origin: int = 0


@dataclass(frozen=True)
class Block:
    """The samples of one transport block: `num_steps` granules after each other, in the order of their steps.

    rows: position of each sample in the corpus (running over all row groups); steps: of each sample; epochs: how
    often the row was seen before (the epoch; with weights, the pass through its origin); positions: place of each
    sample in its global batch.
    """

    rows_K: NDArray[np.int64]
    positions_K: NDArray[np.int64]
    steps_K: NDArray[np.int64]
    epochs_K: NDArray[np.int64]


class StreamPlan:
    """The samples of every step, as a function of (seed, step) alone.

    num_kept: of that many images, drawn by the seed; None: of all. Raises ValueError where there are fewer images than
    one global batch.
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
        fraction: float = field(
            default=1.0,
            metadata={"help": "share of the split's images, drawn by `seed`; a smaller share lies inside a larger one"},
        )
        num_images: int | None = field(
            default=None, metadata={"help": "images of the split, drawn like `fraction`; null: as many as it says"}
        )
        leave_out: tuple[str, ...] = field(
            default=(), metadata={"help": "origins of a merged shard set that are not trained on"}
        )
        weights: dict[str, float] = field(
            default_factory=dict,
            metadata={
                "help": "origin of a merged shard set (the folder name it had) -> its share of the samples, any scale; "
                "all origins or none; empty: as many as there are"
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
        decode: Literal["full", "scaled"] = field(
            default="full",
            metadata={
                "help": "scaled: JPEGs are decoded at 1/2, 1/4 or 1/8 of their size where every crop is reduced by as "
                "much anyway: faster, other pixels (by 1.4 grey levels on average, benchmarks/decoders.py)"
            },
        )
        max_broken_ratio: float = field(
            default=0.01,
            metadata={
                "help": "share of the split's rows that may turn out damaged (each is replaced by the next good entry "
                "of the plan, RUN/quarantine.jsonl lists them) before the run stops",
                "fixed": False,
                "hashed": False,
            },
        )

        def __post_init__(self) -> None:
            for key in ("shuffle_window", "window_steps", "num_actors", "prefetch_blocks"):
                if getattr(self, key) < 1:
                    raise ValueError(f"{key}={getattr(self, key)}: must be at least 1")
            if not 0 < self.fraction <= 1:
                raise ValueError(f"fraction={self.fraction}: a share of the images, above 0 and at most 1")
            if self.decode not in ("full", "scaled"):
                raise ValueError(f"decode={self.decode!r}: use full or scaled")
            if not 0 <= self.max_broken_ratio < 1:
                raise ValueError(f"max_broken_ratio={self.max_broken_ratio}: a share of the rows, from 0 to below 1")
            if self.num_images is not None and (self.num_images < 1 or self.fraction < 1):
                raise ValueError(f"num_images={self.num_images}: at least 1, and fraction=1 beside it")
            for name, weight in self.weights.items():
                if not 0 < weight < float("inf"):
                    raise ValueError(f"weights.{name}={weight}: must be above 0; leave a set out of the merge instead")
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
        weights: Sequence[float] = (),
        num_kept: int | None = None,
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
        total = int(self.starts_G[-1])
        self.num_rows = total if num_kept is None else num_kept
        assert 0 < self.num_rows <= total
        self._is_kept = np.ones(total, dtype=np.bool_)
        if self.num_rows < total:
            ranks = np.argsort(Draws.of(seed, np.array([0]), ["plan"]).uniform("kept", total)[0], kind="stable")
            self._is_kept[ranks[self.num_rows :]] = False
        self.steps_per_epoch = self.num_rows // global_batch
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"train.global_batch={global_batch} is larger than the {self.num_rows} images of the split: "
                f"use train.global_batch of at most {self.num_rows}, or more images"
            )
        assert not weights or {g.origin for g in self.row_groups} == set(range(len(weights)))
        self.shares = tuple(weight / sum(weights) for weight in weights)
        self._orders: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    @property
    def window_groups(self) -> int:
        """Row groups that are being read from at any time."""
        return self.shuffle_window * max(1, len(self.shares))

    def epoch_order(self, epoch: int) -> NDArray[np.int64]:
        """[num_rows] corpus rows in the order of this epoch; with weights, [steps_per_epoch * global_batch]."""
        return self._order(epoch)[0]

    def _order(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows and passes of an epoch; the last two epochs asked for are kept."""
        if epoch not in self._orders:
            if len(self._orders) > 1:
                del self._orders[min(self._orders)]
            if self.shares:
                self._orders[epoch] = self._interleave(epoch)
            else:
                rows = self._shuffle(epoch, np.arange(len(self.row_groups)), "plan")
                self._orders[epoch] = (rows, np.full(self.num_rows, epoch, dtype=np.int64))
        return self._orders[epoch]

    def _shuffle(self, epoch: int, groups_G: NDArray[np.int64], purpose: str) -> NDArray[np.int64]:
        """The rows of these row groups: groups in random order, rows mixed within windows of them."""
        draws = Draws.of(self.seed, np.array([epoch]), [purpose])
        order_G = groups_G[np.argsort(draws.uniform("row_groups", len(groups_G))[0], kind="stable")]
        rows = np.concatenate([np.arange(self.starts_G[g], self.starts_G[g + 1]) for g in order_G])
        window_G = np.arange(len(groups_G)) // self.shuffle_window
        window = np.repeat(window_G, [self.row_groups[g].num_rows for g in order_G])
        rows, window = rows[self._is_kept[rows]], window[self._is_kept[rows]]
        keys = draws.uniform("rows", len(rows))[0]
        mixed: NDArray[np.int64] = rows[np.lexsort((keys, window))]
        return mixed

    def _interleave(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows and passes of an epoch with weights: samples [first, last) of an endless stream of all origins."""
        first = epoch * self.steps_per_epoch * self.global_batch
        last = first + self.steps_per_epoch * self.global_batch
        times, rows, passes, before = [], [], [], 0
        for origin, share in enumerate(self.shares):
            # Sample n of the stream comes at a time that differs from n by less than the number of origins.
            low = max(0, int(share * (first - len(self.shares))) - 2)
            ordinals = np.arange(low, int(share * (last + len(self.shares))) + 3)
            before += low
            groups_G = np.array([i for i, g in enumerate(self.row_groups) if g.origin == origin])
            num_rows = sum(int(self._is_kept[self.starts_G[g] : self.starts_G[g + 1]].sum()) for g in groups_G)
            of_pass = {
                number: self._shuffle(number, groups_G, f"plan/{origin}")
                for number in range(low // num_rows, int(ordinals[-1]) // num_rows + 1)
            }
            times.append((ordinals + 0.5) / share)
            passes.append(ordinals // num_rows)
            starts = np.concatenate([of_pass[number] for number in sorted(of_pass)])
            rows.append(starts[ordinals - (low // num_rows) * num_rows])
        order = np.argsort(np.concatenate(times), kind="stable")[first - before : last - before]
        return np.concatenate(rows)[order], np.concatenate(passes)[order]

    def step_rows(self, step: int) -> NDArray[np.int64]:
        """[global_batch] corpus rows of a global step; the tail of an epoch that fills no global batch is left out."""
        return self._step(step)[0]

    def _step(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        epoch, position = divmod(step, self.steps_per_epoch)
        rows, passes = self._order(epoch)
        batch = slice(position * self.global_batch, (position + 1) * self.global_batch)
        return rows[batch], passes[batch]

    def substitutes(self, step: int, position: int) -> Iterator[tuple[int, int]]:
        """(row, epoch) of the entries that stand in, one after the other, for the one at `position` of `step`: those
        at the same place of the following steps, round the epoch. So no batch gets an image twice as long as another
        one will do, and broken neighbours get different ones."""
        epoch, place = divmod(step, self.steps_per_epoch)
        rows, passes = self._order(epoch)
        for k in range(1, self.steps_per_epoch * self.global_batch):
            at = (place + k) % self.steps_per_epoch
            entry = at * self.global_batch + (position + k // self.steps_per_epoch) % self.global_batch
            yield int(rows[entry]), int(passes[entry])

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
            rows_K=np.concatenate([self._step(int(s))[0][positions] for s in steps]),
            positions_K=np.tile(positions, self.window_steps),
            steps_K=steps_K,
            epochs_K=np.concatenate([self._step(int(s))[1][positions] for s in steps]),
        )

    def locate(self, rows_K: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Row group number and row within it, for corpus rows."""
        groups_K = np.searchsorted(self.starts_G, rows_K, side="right") - 1
        return groups_K, rows_K - self.starts_G[groups_K]
