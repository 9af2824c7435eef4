"""Several hosts for real: network namespaces with addresses of their own; a head without work, three workers, a client.

A job goes in by the Jobs API from the client's host; in the middle one worker's cable is pulled; the job ends right.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from medim_ray.train.metrics import read_metrics
from medim_ray.train.store import CheckpointStore

pytestmark = [pytest.mark.system, pytest.mark.chaos]
ROOT = Path(__file__).parents[2]
HOSTS = {"head": "10.77.0.1", "one": "10.77.0.2", "two": "10.77.0.3", "three": "10.77.0.4", "client": "10.77.0.5"}
STEPS = 160  # some 60 s: the third host takes ten of them to start
# Hosts have one storage here, but not one folder for temporary files. Nor one table of processes: a driver joins the
# raylet that it finds in it, so that a job on a worker would take the head's address for its own.
OWN_TEMP = 'mkdir -p "$0" "$1" && mount --bind "$0" "$1" && shift && exec "$@"'
OWN_PROCESSES = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def why_not() -> str:
    """Why namespaces can't be made here; '' where they can."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "needs root and the program ip (iproute2)"
    try:
        ip("netns", "add", "mr-probe")
        ip("netns", "del", "mr-probe")
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not allowed here: {error.stderr.strip()}"
    return ""


class Network:
    """Namespaces mr-HOST, each with one cable eth0 to a switch in the namespace mr-switch, and what runs in them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.temp = folder, folder / "r"
        self.token_file = folder / "token"
        self.token_file.write_text(f"{os.urandom(24).hex()}\n")
        self._processes: list[subprocess.Popen[bytes]] = []
        ip("netns", "add", "mr-switch")
        ip("-n", "mr-switch", "link", "add", "switch", "type", "bridge")
        ip("-n", "mr-switch", "link", "set", "switch", "up")
        for host, address in HOSTS.items():
            space = f"mr-{host}"
            ip("netns", "add", space)
            ip("-n", "mr-switch", "link", "add", f"to-{host}", "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("-n", "mr-switch", "link", "set", f"to-{host}", "master", "switch", "up")
            ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "lo", "up")
            ip("-n", space, "link", "set", "eth0", "up")

    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        return {
            **kept,
            "HOME": str(self.folder),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_file),
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
            "RAY_health_check_period_ms": "1000",  # a node is given up after some seconds, not half a minute
            "RAY_health_check_timeout_ms": "2000",
            "RAY_health_check_failure_threshold": "4",
            "MEDIM_RAY_JOBS": str(self.folder / "jobs.json"),
            "OMP_NUM_THREADS": "1",
        }

    def start(self, host: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        with (self.folder / f"{host}.log").open("ab") as log:
            process = subprocess.Popen(
                [
                    *("ip", "netns", "exec", f"mr-{host}", *OWN_PROCESSES),
                    *("bash", "-c", OWN_TEMP, str(self.folder / host), str(self.temp), *command),
                ],
                env=self.environment(),
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def ray(self, host: str, *options: str) -> None:
        start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        start += [f"--node-ip-address={HOSTS[host]}", "--object-store-memory=100000000", "--metrics-export-port=0"]
        self.start(host, [*start, *options])

    def log(self, host: str) -> str:
        return (self.folder / f"{host}.log").read_text(errors="replace")

    def wait_for(self, host: str, text: str, timeout_s: float = 90) -> None:
        deadline = time.monotonic() + timeout_s
        while text not in self.log(host):
            assert time.monotonic() < deadline, self.log(host)
            time.sleep(0.2)

    def pull_cable(self, host: str) -> None:
        ip("-n", "mr-switch", "link", "set", f"to-{host}", "down")

    def close(self) -> None:
        for process in reversed(self._processes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        time.sleep(3)
        for host in HOSTS:
            pids = subprocess.run(["ip", "netns", "pids", f"mr-{host}"], capture_output=True, text=True).stdout.split()
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        for space in ("switch", *HOSTS):
            subprocess.run(["ip", "netns", "del", f"mr-{space}"], capture_output=True)


@pytest.fixture
def network() -> Iterator[Network]:
    if reason := why_not():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="mr-net-", dir="/tmp"))
    network = Network(folder)
    try:
        yield network
    finally:
        network.close()


def test_a_job_from_a_third_host_outlives_a_worker_whose_cable_is_pulled(network: Network) -> None:
    temp = f"--temp-dir={network.temp}"
    network.ray("head", "--head", "--port=6379", "--num-cpus=0", f"--dashboard-host={HOSTS['head']}", temp)
    network.wait_for("head", "Ray runtime started")
    join = [f"--address={HOSTS['head']}:6379", "--num-cpus=3"]
    network.ray("one", *join, '--resources={"stable": 1}')
    network.ray("two", *join)
    for host in ("one", "two"):
        network.wait_for(host, "Ray runtime started")
    storage = network.folder / "storage"
    submit = [sys.executable, "-m", "medim_ray.cli", "submit"]
    there = ["target=ray", f"ray.address=http://{HOSTS['head']}:8265", f"storage.root={storage}"]
    there += ["ray.entrypoint_resources={stable: 1}"]
    assert network.start("client", [*submit, "jobs/prepare-small.yaml", *there]).wait(300) == 0, network.log("client")
    args = f"args=[train.steps={STEPS}, train.checkpoint_every=4]"
    job = network.start("client", [*submit, "jobs/pretrain-medim-small.yaml", "name=cut", *there, args])
    run = storage / "runs/cut"
    deadline = time.monotonic() + 300
    while not (newest := CheckpointStore(str(run)).newest()) or newest.step < 4:
        assert job.poll() is None and time.monotonic() < deadline, network.log("client")
        time.sleep(0.5)
    network.ray("three", *join)  # only now, so that a worker is on two
    network.wait_for("three", "Ray runtime started")
    network.pull_cable("two")
    assert job.wait(500) == 0, network.log("client")[-4000:]
    assert "going on from step" in network.log("client"), "the cable was pulled after the end"
    newest = CheckpointStore(str(run)).newest()
    assert newest is not None and newest.step == STEPS
    assert [record["step"] for record in read_metrics(str(run))] == list(range(STEPS))
    assert json.loads((network.folder / "jobs.json").read_text())["cut"]["target"] == "ray"
