"""Who may write into a folder: one job at a time, on any storage, without a clock that all machines share.

The holder counts up in a small file. Another job on the same machine looks whether the holder's process lives; one on
another machine watches whether the count moves. A holder that crashed is so found out in seconds.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import fsspec
import psutil

from medim_ray.data.storage import committed, has_folders, is_local


class LeaseTakenError(ValueError):
    """A living job holds the lease."""


class Lease:
    """Context manager: holds `path` and renews it every `renew_s` seconds; LeaseTakenError where a living job holds it.

    patience_s: how long the count of a job on another machine must stand still before that job counts as dead.
    """

    def __init__(
        self,
        fs: fsspec.AbstractFileSystem,
        path: str,
        *,
        what: str,
        place: str = "",
        renew_s: float = 4.0,
        patience_s: float = 20.0,
    ) -> None:
        self._fs, self._path, self._what = fs, path, what
        self._renew_s, self._patience_s = renew_s, patience_s
        self._scratch = path.rpartition("/")[0]
        process = psutil.Process()
        self._holder: dict[str, Any] = {
            "owner": uuid.uuid4().hex,
            "place": place or _place(),
            "host": socket.gethostname(),
            "pid": process.pid,
            "started": process.create_time(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            "beat": 0,
        }
        self._stop = threading.Event()
        self._lost = False

    def __enter__(self) -> Lease:
        self._take()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.end()
        with contextlib.suppress(Exception):
            if not self._lost and self._owner() == self._holder["owner"]:
                self._fs.rm(self._path)

    def end(self) -> None:
        """No more beats: nothing is written from now on, as before the folder is removed."""
        self._stop.set()
        self._thread.join()

    def check(self) -> None:
        """RuntimeError where another job took the folder over (this one was silent for too long)."""
        if self._lost:
            raise RuntimeError(
                f"{self._what} was taken over by another job while this one stood still: it goes on there"
            )

    def _take(self) -> None:
        while True:
            other = self._read()
            if other is None:
                if self._create():
                    return
                continue
            if other.get("owner") == self._holder["owner"]:
                return  # made by a request that was repeated because its answer was lost
            if self._is_dead(other):
                self._write()
                break
        if not is_local(self._fs):
            time.sleep(1.0)  # two that take over at once: the one that wrote last has it
        if self._owner() != self._holder["owner"]:
            raise self._refusal(self._read() or {})

    def _is_dead(self, other: dict[str, Any]) -> bool:
        """True: the holder is gone; False: it let go of the lease; LeaseTakenError: it lives."""
        if other.get("place") == self._holder["place"]:
            try:
                alive = abs(psutil.Process(other["pid"]).create_time() - other["started"]) < 1.0
            except (psutil.Error, KeyError):
                alive = False
            if alive:
                raise self._refusal(other)
            return True
        until = time.monotonic() + self._patience_s
        while time.monotonic() < until:
            time.sleep(min(1.0, self._patience_s / 5))
            now = self._read()
            if now is None:
                return False
            if (now.get("owner"), now.get("beat")) != (other.get("owner"), other.get("beat")):
                raise self._refusal(now)
        return True

    def _refusal(self, other: dict[str, Any]) -> LeaseTakenError:
        return LeaseTakenError(
            f"{self._what} is being written by another job (process {other.get('pid', '?')} on "
            f"{other.get('host', '?')}, since {other.get('since', '?')}): wait for it to end, or choose another folder"
        )

    def _create(self) -> bool:
        """Whether the file is now ours; False: somebody was faster."""
        if has_folders(self._fs):
            self._fs.makedirs(self._scratch, exist_ok=True)
        try:
            self._fs.pipe_file(self._path, self._data(), mode="create")
        except OSError:  # not always a FileExistsError
            if self._read() is None:
                raise
            return False
        return self._owner() == self._holder["owner"]

    def _renew(self) -> None:
        while not self._stop.wait(self._renew_s):
            with contextlib.suppress(Exception):  # a storage that fails for a moment: the next beat tells
                if self._owner() != self._holder["owner"]:
                    self._lost = True
                    return
                self._holder["beat"] += 1
                self._write()

    def _data(self) -> bytes:
        return json.dumps(self._holder).encode()

    def _write(self) -> None:
        with committed(self._fs, self._path, self._scratch) as file:
            file.write(self._data())

    def _owner(self) -> str | None:
        return (self._read() or {}).get("owner")

    def _read(self) -> dict[str, Any] | None:
        """The holder; None where there is none, {} for one that is just being written."""
        self._fs.invalidate_cache()
        try:
            tree = json.loads(self._fs.cat_file(self._path))
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return tree if isinstance(tree, dict) else {}


def _place() -> str:
    """A machine and its set of process numbers (a container has its own)."""
    processes = Path("/proc/self/ns/pid")
    number = str(processes.readlink()) if processes.exists() else ""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''} {number}"
