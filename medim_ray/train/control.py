"""Who may end a run early, and how the ranks agree on it: driver, signals, preemption. No loss and no engine here.

A rank puts its wish into the reduction that the step's logs make anyway (metrics.py); so every rank learns of it in the
same step, commits a checkpoint and returns. What the driver does next is in attempts.py.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any, Literal

import ray
import ray.train

STOP, RESIZE, WARNED, PREEMPTION = "stop", "resize", "warned", "preemption"  # names of the flags in the reduction
_PREEMPTION_EVERY_S = 2.0


@dataclass(frozen=True)
class Outcome:
    """What a worker returns. kind: finished (train.steps or stop_after), stopped (asked to), preempted (its node goes
    away), resized (a larger group has room), bad_step (health.py), broken_rows (feed.py). step: optimizer steps that
    are committed."""

    kind: Literal["finished", "stopped", "preempted", "resized", "bad_step", "broken_rows"]
    step: int
    message: str = ""


_sigterm = threading.Event()


def catch_sigterm() -> None:
    """Called in the main thread of a worker: from now on SIGTERM asks for a checkpoint, and the second one ends it."""

    def note(number: int, frame: Any) -> None:
        if _sigterm.is_set():
            sys.exit(128 + number)
        _sigterm.set()

    signal.signal(signal.SIGTERM, note)


class RunControl:
    """One rank's view. `wishes` goes into the reduction of a step, `decide` reads its sum.

    mailbox: on rank 0, tells what the driver wants, STOP or RESIZE (TrackerClient); None on the others.
    """

    def __init__(self, mailbox: Any | None) -> None:
        self._mailbox = mailbox
        self._next_look = time.monotonic()

    def wishes(self) -> dict[str, float]:
        """{STOP, RESIZE: the driver asked for it, WARNED: this worker got SIGTERM, PREEMPTION: it is time to ask Ray},
        as numbers to be summed."""
        wish = self._mailbox.wish() if self._mailbox is not None else ""
        look = self._mailbox is not None and time.monotonic() >= self._next_look
        if look:
            self._next_look = time.monotonic() + _PREEMPTION_EVERY_S
        asked = {name: float(wish == name) for name in (STOP, RESIZE)}
        return {**asked, WARNED: float(_sigterm.is_set()), PREEMPTION: float(look)}

    def decide(
        self, sums: dict[str, float], too_many_broken: str = ""
    ) -> tuple[Literal["stopped", "preempted", "resized", "broken_rows"], str] | None:
        """Collective in the sense that every rank calls it with the same values: how the run ends now, if it does."""
        if too_many_broken:
            return "broken_rows", too_many_broken
        if sums[STOP]:
            return "stopped", "asked to stop"
        if sums[WARNED]:
            return "preempted", f"{sums[WARNED]:.0f} workers got SIGTERM"
        if sums[RESIZE]:
            return "resized", "there is room for more workers"
        if sums[PREEMPTION]:
            # A barrier over the ranks, so it is asked seldom and by all in the same step.
            info = ray.train.get_preemption_info()
            if info is not None:
                left = "" if info.deadline_ms is None else f", {info.deadline_ms / 1e3 - time.time():.0f} s left"
                return "preempted", f"{len(info.preempted_node_ids)} nodes go away{left}"
        return None
