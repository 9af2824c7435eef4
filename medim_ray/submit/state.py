"""The jobs that were submitted from here, in one small JSON file under a lock. No daemon: targets are asked."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from medim_ray.submit.base import Record

VARIABLE = "MEDIM_RAY_JOBS"


def state_file() -> Path:
    """$MEDIM_RAY_JOBS, or ~/.medim-ray/jobs.json."""
    return Path(os.environ.get(VARIABLE) or Path.home() / ".medim-ray" / "jobs.json")


@contextlib.contextmanager
def locked() -> Iterator[dict[str, Record]]:
    """The newest record of each job name, to read and change; written back whole, or not at all after an error.

    Held while a job is sent, so that the same spec submitted twice at once is one job.
    """
    path = state_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        records = read()
        before = dict(records)
        yield records
        if records != before:
            _write(path, records)


def read() -> dict[str, Record]:
    """The records without the lock. ValueError where the file is not ours."""
    path = state_file()
    if not path.exists():
        return {}
    try:
        entries = json.loads(path.read_text())
        return {name: Record(**entry) for name, entry in entries.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no file of jobs ({error}): move it away, or set {VARIABLE} to another") from None


def _write(path: Path, records: dict[str, Record]) -> None:
    text = json.dumps({name: record.to_json() for name, record in records.items()}, indent=1)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text + "\n")
    Path(file.name).replace(path)
