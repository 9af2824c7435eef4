"""How fast a run is and where its wall time goes, over all its attempts: the `throughput` block of metrics.jsonl.

RUN/attempts.jsonl tells when the workers of each attempt started and ended; the steps are those of metrics.jsonl. The
loop knows nothing of it: rank 0's recorder feeds a Meter (worker.py), and the report reads both files.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medim_ray.train.metrics import JsonLinesFile, read_records

ATTEMPTS = "attempts.jsonl"
ADDED = ("mfu", "checkpoint_s", "ended_at")  # numbers of a record that the loop does not know
PERCENTILES = (5, 50, 95, 99)
Record = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Pace:
    """What a step is measured against. launched_at: Unix time at which the command began; flops_per_image: operations
    of the model, forward and backward, None where the planner has no model of it; peak_flops: of one worker, a second;
    peak_source: where that comes from."""

    launched_at: float
    flops_per_image: float | None
    num_workers: int
    peak_flops: float
    peak_source: str

    def mfu(self, samples_per_s: float) -> float | None:
        """Model FLOPs utilisation: operations that the model asks for over those that the devices could do. What
        activation checkpointing computes again counts for nothing."""
        if self.flops_per_image is None:
            return None
        return self.flops_per_image * samples_per_s / (self.num_workers * self.peak_flops)


class Meter:
    """Rank 0's account of an attempt: adds to each record what the loop can't know, and writes RUN/attempts.jsonl.

    kept, lost: the records of earlier attempts, from before `first_step` and from after it.
    """

    def __init__(
        self, run_dir: str, pace: Pace, first_step: int, kept: Sequence[Record], lost: Sequence[Record]
    ) -> None:
        self._pace = pace
        self._events = read_records(run_dir, ATTEMPTS)
        self._file = JsonLinesFile(run_dir, ATTEMPTS, self._events)
        self._steps = [_numbers(record) for record in kept]
        self._checkpoint_s = 0.0
        seen = [*kept, *lost]
        self._write(
            {
                "event": "start",
                "launched_at": pace.launched_at,
                "at": time.time(),
                "step": first_step,
                "num_workers": pace.num_workers,
                "last_at": max((float(record.get("ended_at", 0.0)) for record in seen), default=0.0) or None,
                "lost_steps": len(lost),
                "lost_s": sum(float(record["step_s"]) for record in lost),
                "checkpoint_s": sum(float(record.get("checkpoint_s", 0.0)) for record in lost),
                "flops_per_image": pace.flops_per_image,
                "peak_flops": pace.peak_flops,
                "peak_source": pace.peak_source,
            }
        )

    def checkpointed(self, seconds: float) -> None:
        """A checkpoint held the loop up for so long; told with the next record, or with the end."""
        self._checkpoint_s += seconds

    def add(self, record: dict[str, Any], with_block: bool) -> dict[str, Any]:
        """The record of a step with mfu, checkpoint_s (since the one before) and ended_at; and the block of the run so
        far where asked for."""
        full = record | {
            "mfu": self._pace.mfu(record["samples_per_s"]),
            "checkpoint_s": self._checkpoint_s,
            "ended_at": time.time(),
        }
        self._checkpoint_s = 0.0
        self._steps.append(_numbers(full))
        if with_block:
            full["throughput"] = _block(self._steps, self._events, full["ended_at"])
        return full

    def end(self, step: int) -> None:
        """The attempt ends as it should, after `step` optimizer steps."""
        self._write({"event": "end", "at": time.time(), "step": step, "checkpoint_s": self._checkpoint_s})
        self._checkpoint_s = 0.0

    def sync(self) -> None:
        """Publishes the file where the run lies on object storage."""
        self._file.sync()

    def _write(self, event: dict[str, Any]) -> None:
        self._events.append(event)
        self._file.write(event)


def throughput(run_dir: str, records: Sequence[Record]) -> dict[str, Any] | None:
    """The block of a run from its files; None where no step is recorded, or where an older version recorded them.

    samples_per_s: of all steps together. mfu: median over the steps, None without a model of the objective.
    data_wait_ratio: share of the steps' time. step_s_pN: percentiles. wall_s: seconds in which the command ran, over
    all launches. goodput: step time of the steps behind the weights over wall_s. The other seconds: launch_s, from the
    command to the first step; restart_s, from the last sign of life of a group of workers to the first step of the
    next; checkpoint_s, in which a checkpoint held the loop up; lost_s, of steps that were made again.
    """
    events = read_records(run_dir, ATTEMPTS)
    if not records or not events or "ended_at" not in records[-1]:
        return None
    return _block([_numbers(record) for record in records], events, float(records[-1]["ended_at"]))


def _numbers(record: Record) -> dict[str, float]:
    """What the block needs of a record; a step that was left out is no productive one."""
    seconds = float(record["step_s"])
    return {
        "step_s": seconds,
        "productive_s": 0.0 if "omitted" in record else seconds,
        "wait_s": seconds * float(record["data_wait_ratio"]),
        "samples": float(record["samples_per_s"]) * seconds,
        "mfu": float("nan") if record.get("mfu") is None else float(record["mfu"]),
        "checkpoint_s": float(record.get("checkpoint_s", 0.0)),
    }


def _block(steps: Sequence[Mapping[str, float]], events: Sequence[Record], ended_at: float) -> dict[str, Any]:
    total = {name: sum(step[name] for step in steps) for name in steps[0]}
    mfu = [step["mfu"] for step in steps if np.isfinite(step["mfu"])]
    percentiles = np.percentile([step["step_s"] for step in steps], PERCENTILES)
    starts = [event for event in events if event["event"] == "start"]
    wall_s = _wall_s(events, ended_at)
    return {
        "num_steps": len(steps),
        "samples_per_s": total["samples"] / total["step_s"],
        "mfu": float(np.median(mfu)) if mfu else None,
        "data_wait_ratio": total["wait_s"] / total["step_s"],
        **{f"step_s_p{p}": float(value) for p, value in zip(PERCENTILES, percentiles, strict=True)},
        "goodput": total["productive_s"] / wall_s,
        "wall_s": wall_s,
        "launch_s": sum(start["at"] - start["launched_at"] for start in starts if _is_first(start, starts)),
        "restart_s": sum(
            start["at"] - max(start["last_at"] or 0.0, start["launched_at"])
            for start in starts
            if not _is_first(start, starts)
        ),
        "checkpoint_s": total["checkpoint_s"] + sum(event.get("checkpoint_s", 0.0) for event in events),
        "lost_s": sum(start["lost_s"] for start in starts),
        "num_attempts": len(starts),
        "peak_flops": starts[-1]["peak_flops"],
        "peak_source": starts[-1]["peak_source"],
    }


def _is_first(start: Record, starts: Sequence[Record]) -> bool:
    """Whether this attempt is the first one of its launch."""
    return start is next(one for one in starts if one["launched_at"] == start["launched_at"])


def _wall_s(events: Sequence[Record], ended_at: float) -> float:
    """Seconds from the start of each launch to its last sign of life, summed; the time between two launches of a run
    that was stopped is nobody's."""
    spans: dict[float, float] = {}
    launch = 0.0
    for event in events:
        if event["event"] == "start":
            if launch:  # the step that was recorded last tells how long the attempt before lived
                spans[launch] = max(spans[launch], event["last_at"] or 0.0)
            launch = event["launched_at"]
        spans[launch] = max(spans.get(launch, 0.0), event["at"])
    spans[launch] = max(spans[launch], ended_at)
    return sum(end - start for start, end in spans.items())
