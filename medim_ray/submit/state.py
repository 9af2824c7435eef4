"""The jobs that were submitted from here, in one small JSON file under a lock. No daemon: targets are asked."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.with_suffix(".lock").open("w")
    except OSError as error:
        raise ValueError(f"{path} can't be written ({error.strerror}): set {VARIABLE} to a file that can") from None
    with file as lock:
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
        return {name: _checked(Record(**entry)) for name, entry in entries.items()}
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise ValueError(f"{path} is no file of jobs ({error}): move it away, or set {VARIABLE} to another") from None


def _checked(record: Record) -> Record:
    texts = (record.name, record.hash, record.target, record.handle)
    if not all(isinstance(text, str) for text in texts) or not isinstance(record.spec, dict):
        raise TypeError(f"the record of {record.name!r} is damaged")
    return replace(record, attempt=int(record.attempt), submitted_at=float(record.submitted_at))


def _write(path: Path, records: dict[str, Record]) -> None:
    text = json.dumps({name: record.to_json() for name, record in records.items()}, indent=1)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text + "\n")
    Path(file.name).replace(path)
