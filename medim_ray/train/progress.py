"""What a user sees of a run while it goes: one line that moves in a terminal, lines now and then in a log file."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import ray
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from medim_ray.train.startup import describe_startup
from medim_ray.train.throughput import ADDED

_LOG_EVERY_S = 10.0


@contextlib.contextmanager
def progress(last_step: int, done: int, tracker: Any, console: Console) -> Iterator[None]:
    """Step, loss terms, rate, data-wait share and time left, as the tracker knows them."""
    bar = Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        # Last, and the only one that gives way in a narrow terminal.
        TextColumn("{task.fields[terms]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
        console=console,
        refresh_per_second=2,
        disable=not console.is_terminal,
        expand=True,
    )
    task = bar.add_task("pretrain", total=last_step, completed=done, terms="starting workers")
    stop = threading.Event()
    told_words: set[str] = set()
    told_starts: list[dict[str, float]] = []

    def show() -> int:
        with contextlib.suppress(ray.exceptions.RayError):
            record = ray.get(tracker.latest.remote(), timeout=5)
            if record is not None:
                for words, step in record["told"].items():
                    if words not in told_words:  # once a launch; metrics.jsonl has every step
                        told_words.add(words)
                        console.print(f"[yellow]step {step}: {escape(words)}", highlight=False)
                if record["startup_s"] not in told_starts:
                    told_starts.append(record["startup_s"])
                    console.print(describe_startup(record["startup_s"]), highlight=False, soft_wrap=True)
                bar.update(task, completed=record["step"] + 1, terms=describe(record))
                return int(record["step"]) + 1
        return 0

    def poll() -> None:
        told, next_line = done, time.monotonic()
        while not stop.wait(0.5):
            step = show()
            if not console.is_terminal and step > told and time.monotonic() >= next_line:
                told, next_line = step, time.monotonic() + _LOG_EVERY_S
                _line(step)

    def _line(step: int) -> None:
        terms = bar.tasks[0].fields["terms"]
        console.print(f"step {step}/{last_step} {terms}", soft_wrap=True, highlight=False, markup=False)

    thread = threading.Thread(target=poll, daemon=True)
    with bar:
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            step = show()
            if step and not console.is_terminal:
                _line(step)


def describe(record: dict[str, Any]) -> str:
    """The loss, the rate and the data-wait share, then the other terms for as long as there is room."""
    if "omitted" in record:
        return f"left out: {record['omitted']}"
    hidden = {"loss", "lr", "grad_norm", "data_wait_ratio", *ADDED}
    # Seconds are for metrics.jsonl; names with a slash are details of another number.
    shown = [k for k in record if k not in hidden and "/" not in k and not k.endswith("_s")]
    terms = [f"{k} {record[k]:.3g}" for k in shown if isinstance(record[k], float)]
    rates = [f"{record['samples_per_s']:.1f} samples/s", f"wait {record['data_wait_ratio']:.0%}"]
    return " ".join([f"loss {record['loss']:.4g}", *rates, *terms])
