"""SIGTERM, SIGINT and SIGUSR1 (Slurm's warning) as a request to end in good order, and the exit code that tells it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects the stop signals that this process gets; a second one raises KeyboardInterrupt at once.

    Empty for ever outside the main thread, where Python delivers none: a trial of a sweep is ended by Tune.
    """
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def aside(work: Callable[[], T]) -> Future[T]:
    """Does `work` in a thread of its own, so that the main thread keeps the signals: Ray Train and Tune would block it,
    or put their own handlers over ours. A second signal leaves the thread behind."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # handed on to whoever waits, whatever it is
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def exit_code(number: int) -> int:
    """Of a command that a signal asked to end: SIGUSR1 asks for another turn in the queue (75, EX_TEMPFAIL), the others
    end as a shell tells signals (128 + number)."""
    return os.EX_TEMPFAIL if number == signal.SIGUSR1 else 128 + number
