"""An Aim server that dies in the middle of a run: the loop sends on without waiting, and what is lost is counted."""

from __future__ import annotations

import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

from medim_ray.track.tracker import _MAX_PENDING, TrackerClient, start_tracker

pytestmark = [pytest.mark.system, pytest.mark.usefixtures("ray_session")]
STEP_S, NUM_STEPS = 0.02, 150


def server(repo: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A remote Aim server of this machine, once it listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    aim = [str(Path(sys.executable).with_name("aim"))]
    subprocess.run([*aim, "init", "--repo", str(repo), "-y"], check=True, stdout=subprocess.DEVNULL)
    command = [*aim, "server", "--host", "127.0.0.1", "--port", str(port), "--repo", str(repo)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    for _ in range(600):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return process, f"aim://127.0.0.1:{port}"
        time.sleep(0.1)
    raise AssertionError("the Aim server does not listen")


def send(client: TrackerClient, first: int) -> list[float]:
    """Seconds that the loop spends in `log` for each of NUM_STEPS steps."""
    spent = []
    for step in range(first, first + NUM_STEPS):
        started = time.perf_counter()
        client.log({"step": step, "epoch": 0, "loss": 1.0 / (step + 1), "grad_norm": 1.0})
        spent.append(time.perf_counter() - started)
        time.sleep(STEP_S)
    return spent


def test_a_dead_server_holds_up_no_step(tmp_path: Path) -> None:
    (tmp_path / "repo").mkdir()
    (tmp_path / "run").mkdir()
    process, repo = server(tmp_path / "repo")
    try:
        tracker = start_tracker(repo, str(tmp_path / "run"), {"seed": 1})
        client = TrackerClient(tracker)
        client.log({"step": 0, "epoch": 0, "loss": 1.0})
        assert ray.get(tracker.latest.remote(), timeout=120)["step"] == 0
        assert (tmp_path / "run" / "aim_run").exists(), "the run was not opened on the server"
        alive = send(client, 1)
    finally:
        process.kill()
        process.wait()
    dead = send(client, 1 + NUM_STEPS)
    # Not a race of milliseconds: a call that waited for the server would take its time-outs, seconds each.
    assert statistics.median(dead) < max(0.05 * STEP_S, 3 * statistics.median(alive)) and max(dead) < 1.0
    assert len(client._pending) <= _MAX_PENDING
    ray.kill(tracker)


def test_a_tracker_that_hangs_is_dropped_from_and_the_losses_are_counted() -> None:
    class Hung:
        def log(self, record: dict[str, int], dropped: int) -> tuple[bool, dict[str, int]]:
            time.sleep(3600)
            return False, {}

    tracker = ray.remote(num_cpus=0)(Hung).remote()
    client = TrackerClient(tracker)
    for step in range(_MAX_PENDING + 10):
        client.log({"step": step})
    assert len(client._pending) == _MAX_PENDING and client.dropped == 10
    ray.kill(tracker)
