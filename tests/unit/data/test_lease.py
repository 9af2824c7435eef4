"""One job at a time: a living holder is respected, a dead one is found out, and losing the lease is noticed."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import pytest

from medim_ray.data.lease import Lease

FS = fsspec.filesystem("file")
HOLD = """
import sys, time, fsspec
from medim_ray.data.lease import Lease
with Lease(fsspec.filesystem("file"), sys.argv[1], what="out=x"):
    print("held", flush=True)
    time.sleep(60)
"""


def lease(path: Path, place: str = "") -> Lease:
    return Lease(FS, str(path), what="out=x", place=place, renew_s=0.05, patience_s=0.5)


def test_the_second_of_one_machine_is_refused_at_once_and_a_killed_one_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "work" / "lease.json"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with (
            pytest.raises(ValueError, match=rf"out=x is being written by another job \(process {holder.pid} on"),
            lease(path),
        ):
            pass
        holder.kill()
        holder.wait()
    before = time.monotonic()
    with lease(path):
        assert json.loads(path.read_text())["pid"] != holder.pid
    assert not path.exists() and time.monotonic() - before < 0.5


def test_the_life_of_a_holder_elsewhere_is_told_by_its_count(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    with lease(path, place="elsewhere") as other:
        with pytest.raises(ValueError, match="being written by another job"), lease(path):
            pass
        other.check()
    with lease(path, place="elsewhere"):
        text = path.read_text()
    path.write_text(text)  # as a crashed job leaves it
    with lease(path) as taken:
        taken.check()
        assert json.loads(path.read_text())["place"] != "elsewhere"


def test_a_lease_that_was_taken_over_is_noticed_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    with lease(path) as mine:
        holder = {**json.loads(path.read_text()), "owner": "somebody else"}
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            path.write_text(json.dumps(holder))
            time.sleep(0.1)
            try:
                mine.check()
            except RuntimeError as error:
                assert "taken over by another job" in str(error)
                break
        else:
            pytest.fail("not noticed")
    assert json.loads(path.read_text())["owner"] == "somebody else"


def test_of_many_at_once_one_gets_it(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    held: list[int] = []
    refused: list[int] = []
    together = threading.Barrier(8)

    def run(number: int) -> None:
        together.wait()
        try:
            with lease(path, place=f"machine {number}"):
                held.append(number)
                done.wait(5)
        except ValueError:
            refused.append(number)

    done = threading.Event()
    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 30
    while len(refused) < 7 and time.monotonic() < deadline:
        time.sleep(0.02)
    done.set()
    for thread in threads:
        thread.join()
    assert len(held) == 1 and len(refused) == 7
