"""A progress bar for work that is counted elsewhere: a thread asks how much is done."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        return Text(f"{task.finished_speed or task.speed or 0.0:.1f} {self._unit}/s")


@contextlib.contextmanager
def progress_bar(name: str, total: int, done: Callable[[], int | None], unit: str = "images") -> Iterator[None]:
    """A bar, rate and time left on a terminal while the body runs; `done` may say None where it does not know."""
    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), _Rate(unit), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task(name, total=total)
        stop = threading.Event()

        def poll() -> None:
            while not stop.wait(0.5):
                progress.update(task, completed=done())

        thread = threading.Thread(target=poll, daemon=True)
        thread.start()
        try:
            yield
            progress.update(task, completed=total)
        finally:
            stop.set()
            thread.join()


@contextlib.contextmanager
def quiet(logger: str) -> Iterator[None]:
    """Errors only: they are raised as well, and the rest (plans, timings, paths of log files) is no news for a user."""
    level = logging.getLogger(logger).level
    logging.getLogger(logger).setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.getLogger(logger).setLevel(level)
