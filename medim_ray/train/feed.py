"""What the stream tells beside its samples: seconds of its stages, and broken rows, which RUN/quarantine.jsonl lists.

Both travel as columns of the samples that a step is made of, so they are counted once, whatever is decoded ahead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import fsspec
import torch.distributed as dist

from medim_ray.data.collate import Columns
from medim_ray.data.reader import BROKEN, SECONDS, STAGES
from medim_ray.data.rows import too_many
from medim_ray.data.storage import committed
from medim_ray.train.metrics import read_records

QUARANTINE = "quarantine.jsonl"
BROKEN_ROWS = "broken_rows"  # in metrics.jsonl: samples of the step that stand in for a broken row
STREAM_SECONDS = tuple(f"stream_{stage}_s" for stage in STAGES)  # what a step's samples have cost, over all actors


def feed_sums(columns: Columns) -> dict[str, float]:
    """This rank's share of a step's numbers, to be summed over the ranks."""
    seconds = columns[SECONDS].sum(axis=0, dtype="float64")
    broken = sum(1 for text in columns[BROKEN] if text)
    return {BROKEN_ROWS: float(broken), **dict(zip(STREAM_SECONDS, seconds.tolist(), strict=True))}


def feed_record(sums: Mapping[str, float]) -> dict[str, Any]:
    """The same, summed, for metrics.jsonl."""
    return {BROKEN_ROWS: int(sums[BROKEN_ROWS]), **{name: sums[name] for name in STREAM_SECONDS}}


class BrokenRows:
    """The broken rows that this group of workers has met; the same on every rank.

    num_rows: of the split; max_ratio: share of them that may be broken (data.max_broken_ratio). Rows that an earlier
    group met stay listed, but count only when they are met again: they may have been restored.
    """

    def __init__(self, run_dir: str, num_rows: int, max_ratio: float) -> None:
        self._run_dir, self._num_rows, self._max_ratio = run_dir, num_rows, max_ratio
        self._met: set[tuple[str, int]] = set()

    def settle(self, step: int, columns: Columns, sums: Mapping[str, float]) -> str:
        """Quarantines the broken rows of a step; why the run must end now, "" where it need not. Collective in steps
        that have any."""
        if not sums[BROKEN_ROWS]:
            return ""
        own = [record for text in columns[BROKEN] if text for record in json.loads(text)]
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, own)
        met = {(one["shard"], one["row"]): {**one, "step": step} for records in gathered for one in records}
        if met.keys() - self._met and dist.get_rank() == 0:
            listed = {(one["shard"], one["row"]): one for one in read_quarantine(self._run_dir)}
            rows = met | listed  # the step in which a row was met first stays
            write_quarantine(self._run_dir, [rows[key] for key in sorted(rows)])
        self._met |= met.keys()
        if len(self._met) <= self._max_ratio * self._num_rows:
            return ""
        return too_many(len(self._met), self._num_rows, self._max_ratio, min(self._met)[0])


def read_quarantine(run_dir: str) -> list[dict[str, Any]]:
    """The records of RUN/quarantine.jsonl: shard, row, image_id, reason, step in which it was met first."""
    return read_records(run_dir, QUARANTINE)


def write_quarantine(run_dir: str, records: list[dict[str, Any]]) -> None:
    """RUN/quarantine.jsonl, whole or not at all."""
    fs, root = fsspec.core.url_to_fs(run_dir)
    with committed(fs, f"{root.rstrip('/')}/{QUARANTINE}", root) as file:
        file.write("".join(f"{json.dumps(one)}\n" for one in records).encode())
