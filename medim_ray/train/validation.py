"""Committed checkpoints are validated while the run goes on, one at a time, by Ray tasks; the best one is kept.

    RUN/validation.jsonl   a line a checkpoint: step, the numbers `validate` asks for, seconds; why some are missing
    RUN/best.json          the checkpoint with the best `validate.best_by` so far; it is not pruned
What a validation is comes from outside (probes/validate.py); whatever fails in it is told and ends nothing.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import fsspec
import ray
from ray import cloudpickle
from rich.console import Console
from rich.markup import escape

from medim_ray.config.schema import RunConfig, ValidateConfig
from medim_ray.data.shards import ShardSet
from medim_ray.data.storage import committed
from medim_ray.train.store import CheckpointStore

VALIDATION_FILE = "validation.jsonl"
BEST = "best.json"
_LOOK_S = 0.5
_TIMES = ("seconds", "began_at")


Run = Callable[[str, str, ValidateConfig], dict[str, Any]]


@dataclass(frozen=True)
class Validate:
    """check: before the run; ValueError where these shards and this objective do not have what `validate` asks for.

    run: of (run folder, checkpoint, config), in a Ray task; name -> number, and `error`: why some are missing.
    FileNotFoundError where the checkpoint was pruned.
    """

    check: Callable[[RunConfig, ShardSet], None]
    run: Run


@contextlib.contextmanager
def validation(
    config: RunConfig, validate: Validate | None, tracker: Any, stopped: list[int], console: Console
) -> Iterator[None]:
    """Validates the checkpoints that are committed inside; at the end it waits for the last ones, unless the run ends
    with an error or `stopped` (the signals received) is not empty."""
    if validate is None or not config.validate.is_asked:
        yield
        return
    watcher = _Watcher(config, validate, tracker, console)
    thread = threading.Thread(target=watcher.run, daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        watcher.end(wait=False)
        raise
    else:
        watcher.end(wait=not stopped)
    finally:
        thread.join()


class _Watcher:
    """The thread: sees new checkpoints, sends a task, writes down what it returns."""

    def __init__(self, config: RunConfig, validate: Validate, tracker: Any, console: Console) -> None:
        self._config, self._tracker, self._console = config, tracker, console
        self._store = CheckpointStore(config.run.dir, config.train.storage_patience_s)
        self._rows = read_validation(config.run.dir)
        # Not in a placement group that this process may be in: a trial of a sweep has room for itself alone.
        options = {"num_cpus": config.validate.num_cpus, "scheduling_strategy": "DEFAULT", "max_retries": 0}
        self._task = ray.remote(**options)(_behind)
        self._run = cloudpickle.dumps(validate.run)
        self._end = threading.Event()
        self._wait = True

    def end(self, wait: bool) -> None:
        """No checkpoint will come any more; with `wait` those that are there are still validated."""
        self._wait = wait
        self._end.set()

    def run(self) -> None:
        while True:
            ending = self._end.is_set()
            name = self._next() if self._wait or not ending else None
            if name is not None:
                self._validate(name)
            elif ending:
                return
            else:
                self._end.wait(_LOOK_S)

    def _next(self) -> str | None:
        """The oldest committed checkpoint that has no line yet."""
        names = _left(self._store, self._rows)
        return names[0] if names else None

    def _validate(self, name: str) -> None:
        began = time.monotonic()
        row: dict[str, Any] = {"checkpoint": name, "step": int(name.split("-")[1]), "began_at": time.time()}
        pending = self._task.remote(self._run, self._config.run.dir, name, self._config.validate)
        while not ray.wait([pending], timeout=_LOOK_S)[0]:
            if self._end.is_set() and not self._wait:
                ray.cancel(pending, force=True)
                return
        try:
            row |= ray.get(pending)
        except Exception as error:  # a validation is a view of the run: whatever fails in it must not end the run
            cause = getattr(error, "cause", None) or error
            pruned = isinstance(cause, FileNotFoundError)
            row["error"] = (
                "it was pruned before: raise train.keep_last or train.checkpoint_every" if pruned else str(cause)
            ).splitlines()[0]
        if "error" in row:
            told = escape(f"{name} was not{' wholly' * bool(numbers_of(row))} validated: {row['error']}")
            self._console.print(f"[yellow]{told}", highlight=False)
        row["seconds"] = round(time.monotonic() - began, 2)
        self._rows.append(row)
        self._write()
        if numbers := numbers_of(row):
            self._tracker.validated.remote(row["step"], numbers)

    def _write(self) -> None:
        key = self._config.validate.best_by
        files = {VALIDATION_FILE: "".join(f"{json.dumps(row)}\n" for row in self._rows)}
        judged = [row for row in self._rows if math.isfinite(row.get(key, math.nan))]
        if judged:
            best = max(judged, key=lambda row: float(row[key]))
            chosen = {"checkpoint": best["checkpoint"], "step": best["step"], "by": key, "value": best[key]}
            files[BEST] = json.dumps(chosen) + "\n"
        fs, root = fsspec.core.url_to_fs(self._config.run.dir)
        for name, text in files.items():
            with committed(fs, f"{root.rstrip('/')}/{name}", scratch=root) as file:
                file.write(text.encode())


def _behind(run: bytes, run_dir: str, checkpoint: str, config: ValidateConfig) -> dict[str, Any]:
    """A validation on cycles that nobody else wants: for the scheduler its core is a free one, so that what wakes up
    (decoding, Ray) goes there and not between the steps of a worker. In a thread, since it can't be undone; with the
    imports, which are seconds of work too."""

    def work() -> dict[str, Any]:
        if hasattr(os, "SCHED_IDLE"):  # Linux
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        validate: Run = cloudpickle.loads(run)
        return validate(run_dir, checkpoint, config)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def unvalidated(config: RunConfig) -> list[str]:
    """The committed checkpoints that have no line yet, the oldest first; [] where no validation is asked for."""
    if not config.validate.is_asked:
        return []
    return _left(CheckpointStore(config.run.dir, config.train.storage_patience_s), read_validation(config.run.dir))


def _left(store: CheckpointStore, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    known = {row["checkpoint"] for row in rows}
    return [name for name in reversed(store.names()) if name not in known and store.is_committed(name)]


def read_validation(run_dir: str) -> list[dict[str, Any]]:
    """The lines of RUN/validation.jsonl."""
    return [json.loads(line) for line in _read(run_dir, VALIDATION_FILE).splitlines()]


def numbers_of(row: Mapping[str, Any]) -> dict[str, float]:
    """What a line of RUN/validation.jsonl says of the encoder."""
    return {key: value for key, value in row.items() if isinstance(value, float) and key not in _TIMES}


def read_best(run_dir: str) -> str:
    """The name of the best checkpoint so far; '' where none was validated."""
    text = _read(run_dir, BEST)
    return str(json.loads(text)["checkpoint"]) if text else ""


def _read(run_dir: str, name: str) -> str:
    fs, root = fsspec.core.url_to_fs(run_dir)
    fs.invalidate_cache()
    try:
        return str(fs.cat_file(f"{root.rstrip('/')}/{name}").decode())
    except FileNotFoundError:
        return ""
