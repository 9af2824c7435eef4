"""Progress of a followed job: new lines of its run's metrics.jsonl, where this machine can read the run's folder.

Logs of jobs hold no progress bar, which needs a terminal; what is shown here stays with the one who follows.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import fsspec

from medim_ray.submit.spec import JobSpec

_TAIL_BYTES = 8192


class ProgressTail:
    """The newest record of a run, told once each."""

    def __init__(self, run_dir: str) -> None:
        self._run_dir = run_dir.rstrip("/")
        self._step = -1

    def line(self) -> str:
        """`step 12: loss 1.234, 8.1 samples/s` if there is a newer record than the last time, else ''."""
        try:
            fs, root = fsspec.core.url_to_fs(self._run_dir)
            fs.invalidate_cache()
            text = fs.tail(f"{root}/metrics.jsonl", _TAIL_BYTES).decode(errors="replace")
        except Exception:  # not there yet, not readable from here: the log goes on without
            return ""
        for entry in reversed(text.splitlines()):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                record: dict[str, Any] = json.loads(entry)
                if record["step"] == self._step:
                    return ""
                self._step = record["step"]
                rate = f", {record['samples_per_s']:.1f} samples/s" if "samples_per_s" in record else ""
                return f"step {self._step + 1}: loss {record['loss']:.4g}{rate}"
        return ""


def run_dir_of(spec: JobSpec) -> str:
    """The run folder of a `pretrain` command, '' of other commands or where only its recipe names it."""
    if spec.arguments[0] != "pretrain":
        return ""
    given = [text.removeprefix("run.dir=") for text in spec.arguments if text.startswith("run.dir=")]
    return given[-1] if given else ""


@contextlib.contextmanager
def shown(spec: JobSpec, say: Callable[[str], None] | None = None, every_s: float = 5.0) -> Iterator[None]:
    """Says the progress of a training job every few seconds while the body runs; on stderr unless `say` is given."""
    run_dir = run_dir_of(spec)
    if not run_dir:
        yield
        return
    tell = say or (lambda text: print(f"{spec.name}: {text}", file=sys.stderr, flush=True))
    tail, done = ProgressTail(run_dir), threading.Event()
    tail.line()  # what an earlier attempt reached is no news

    def poll() -> None:
        while not done.wait(every_s):
            if line := tail.line():
                tell(line)

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=every_s)
