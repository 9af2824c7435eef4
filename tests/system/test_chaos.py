"""Runs under attack, in Ray clusters of their own: what is killed, stopped, drained or taken away changes no bit.

`make test-chaos` runs them; each takes a minute or two on two cores.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import psutil
import pytest
import s3fs

from medim_ray.train.metrics import read_lines, read_metrics
from medim_ray.train.runs import open_config
from medim_ray.train.store import CheckpointStore
from tests.system.faulty_proxy import FaultyProxy, faulty_lake
from tests.system.runs import MAE, SMALL, assert_same_weights, planned_keys

pytestmark = [pytest.mark.system, pytest.mark.chaos]
NUM_STEPS = 12


@pytest.fixture(scope="module")
def straight(phantom_shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbs."""
    run_dir = tmp_path_factory.mktemp("chaos") / "straight"
    assert pretrain(phantom_shards, run_dir).wait(timeout=300) == 0
    return run_dir


def pretrain(shards: str, run_dir: Path, *overrides: str) -> subprocess.Popen[bytes]:
    """`medim-ray pretrain` as a user starts it; its log is beside the local folder `run_dir`."""
    options = [f"data.shards={shards}", f"run.dir={run_dir}", f"train.steps={NUM_STEPS}", "train.checkpoint_every=3"]
    command = [sys.executable, "-m", "medim_ray.cli", "pretrain", "--config", str(MAE), *options, *SMALL, *overrides]
    with (run_dir.parent / f"{run_dir.name}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def wait_for_steps(run_dir: Path, num_steps: int, timeout_s: float = 240.0) -> None:
    until = time.monotonic() + timeout_s
    while len(read_lines(str(run_dir))) < num_steps:
        assert time.monotonic() < until, f"no step {num_steps} in {timeout_s:.0f} s"
        time.sleep(0.005)


def workers_below(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    below = psutil.Process(process.pid).children(recursive=True)
    return sorted((p for p in below if "RayTrainWorker" in " ".join(p.cmdline())), key=lambda p: p.pid)


def log_of(run_dir: Path) -> str:
    return (run_dir.parent / f"{run_dir.name}.log").read_text()


def assert_same_run(run_dir: Path | str, straight: Path) -> None:
    assert_same_weights(straight, run_dir)
    ours, theirs = (
        [(r["step"], r["samples_key"], r["loss"]) for r in read_metrics(str(d))] for d in (run_dir, straight)
    )
    assert ours == theirs


def test_a_driver_killed_in_mid_epoch_goes_on_by_the_same_command(
    phantom_shards: str, tmp_path: Path, straight: Path
) -> None:
    first = pretrain(phantom_shards, tmp_path / "run")
    wait_for_steps(tmp_path / "run", 5)
    below = psutil.Process(first.pid).children(recursive=True)
    first.kill()
    first.wait()
    psutil.wait_procs(below, timeout=60)
    assert len(read_lines(str(tmp_path / "run"))) < NUM_STEPS
    assert pretrain(phantom_shards, tmp_path / "run").wait(timeout=300) == 0
    assert_same_run(tmp_path / "run", straight)


@pytest.mark.parametrize(("signal_number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, os.EX_TEMPFAIL)])
def test_a_driver_that_is_told_to_stop_commits_first(
    phantom_shards: str, tmp_path: Path, straight: Path, signal_number: int, code: int
) -> None:
    first = pretrain(phantom_shards, tmp_path / "run")
    wait_for_steps(tmp_path / "run", 2)
    first.send_signal(signal_number)
    assert first.wait(timeout=120) == code
    newest = CheckpointStore(str(tmp_path / "run")).newest()
    assert newest is not None and newest.step == len(read_lines(str(tmp_path / "run"))) < NUM_STEPS
    assert pretrain(phantom_shards, tmp_path / "run").wait(timeout=300) == 0
    assert_same_run(tmp_path / "run", straight)


def test_a_worker_that_gets_sigterm_commits_and_is_replaced(
    phantom_shards: str, tmp_path: Path, straight: Path
) -> None:
    run = pretrain(phantom_shards, tmp_path / "run", "train.checkpoint_every=100")
    wait_for_steps(tmp_path / "run", 3)
    workers_below(run)[-1].terminate()
    assert run.wait(timeout=300) == 0
    assert "got SIGTERM: going on from step" in log_of(tmp_path / "run")
    assert_same_run(tmp_path / "run", straight)


def test_a_worker_that_hangs_is_named_and_replaced(phantom_shards: str, tmp_path: Path, straight: Path) -> None:
    run = pretrain(phantom_shards, tmp_path / "run", "train.hang_timeout_s=8")
    wait_for_steps(tmp_path / "run", 4)
    worker = workers_below(run)[-1]
    worker.suspend()
    try:
        assert run.wait(timeout=300) == 0
    finally:
        if worker.is_running():
            worker.kill()
    assert "it hangs" in log_of(tmp_path / "run")
    assert_same_run(tmp_path / "run", straight)


def test_a_damaged_newest_checkpoint_is_passed_over_and_named(
    phantom_shards: str, tmp_path: Path, straight: Path
) -> None:
    assert pretrain(phantom_shards, tmp_path / "run", "train.stop_after=7").wait(timeout=300) == 0
    newest = CheckpointStore(str(tmp_path / "run")).newest()
    assert newest is not None
    file = tmp_path / "run" / "checkpoints" / newest.name / "rank-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert pretrain(phantom_shards, tmp_path / "run").wait(timeout=300) == 0
    assert f"{newest.name} is passed over: rank-00001.safetensors differs from its checksum" in log_of(tmp_path / "run")
    assert_same_run(tmp_path / "run", straight)


@pytest.fixture
def lake(phantom_shards: str) -> Iterator[FaultyProxy]:
    """s3://lake with the shards."""
    with faulty_lake() as faulty:
        s3fs.S3FileSystem().put(f"{phantom_shards}/", "lake/shards/", recursive=True)
        yield faulty


def test_a_run_on_a_bucket_that_stumbles_stops_and_goes_on_bit_equal(
    lake: FaultyProxy, tmp_path: Path, straight: Path
) -> None:
    """Shards, checkpoints and metrics on s3://; every twentieth request is answered by 503, and once all are."""
    outage: list[float] = []

    def stumble(number: int, method: str, path: str) -> tuple[int, str, str] | None:
        if method == "PUT" and "step-00000003" in path and not outage:
            outage.append(time.monotonic())  # the first save meets a storage that is down
        down = bool(outage) and time.monotonic() < outage[0] + 5
        return (503, "SlowDown", "Reduce your request rate.") if down or number % 20 == 0 else None

    lake.judge, before = stumble, lake.seen["503"]
    options = ["run.dir=s3://lake/run"]
    assert pretrain("s3://lake/shards", tmp_path / "run", *options, "train.stop_after=7").wait(timeout=400) == 0
    assert pretrain("s3://lake/shards", tmp_path / "run", *options).wait(timeout=400) == 0, log_of(tmp_path / "run")
    lake.judge = lambda *request: None
    assert outage and lake.seen["503"] - before > 20
    assert_same_run("s3://lake/run", straight)
    assert "resuming s3://lake/run from step-00000007-0" in log_of(tmp_path / "run")


@pytest.mark.parametrize("fate", ["removed", "drained", "replaced"])
def test_a_node_that_goes_away_costs_no_sample(phantom_shards: str, tmp_path: Path, straight: Path, fate: str) -> None:
    """Two nodes of one worker each; one is removed without grace, or drained with a deadline: one worker goes on; where
    another node takes its place, two do."""
    command = [sys.executable, "-m", "tests.system.test_chaos", phantom_shards, str(tmp_path / "run"), fate]
    with (tmp_path / "run.log").open("wb") as log:
        done = subprocess.run(command, stdout=log, stderr=log, timeout=500, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, log_of(tmp_path / "run")
    records = read_metrics(str(tmp_path / "run"))
    worlds = [num for num, _ in groupby(record["num_workers"] for record in records)]
    assert worlds == ([2, 1, 2] if fate == "replaced" else [2, 1]), log_of(tmp_path / "run")
    planned = planned_keys(open_config(str(tmp_path / "run")), len(records))
    assert [record["samples_key"] for record in records] == planned, "other samples than planned went into the weights"
    assert [record["step"] for record in records] == list(range(len(planned)))
    if fate == "replaced":
        assert "there is room for more workers: going on from step" in log_of(tmp_path / "run")
        return
    if fate == "drained":
        assert "1 nodes go away" in log_of(tmp_path / "run")
        return  # a run of another length has other learning rates
    losses = [[r["loss"] for r in read_metrics(str(d))] for d in (tmp_path / "run", straight)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def _lose_a_node(shards: str, run_dir: Path, fate: str) -> None:
    """In a process of its own: a cluster, a run with one or two workers, the loss of a node."""
    import threading

    import ray
    from ray.cluster_utils import Cluster

    from medim_ray.train.launch import launch
    from tests.system.runs import config_of

    # A worker fits on each; on the head there is room for decoding besides.
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3})
    node = cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="WARNING")
    joined: list[subprocess.Popen[bytes]] = []

    def lose() -> None:
        wait_for_steps(run_dir, 4)
        while not CheckpointStore(str(run_dir)).committed_step():
            time.sleep(0.02)
        if fate == "drained":
            gcs = ray._raylet.GcsClient(address=cluster.gcs_address)
            deadline_ms = int((time.time() + 30) * 1e3)
            gcs.drain_node(node.node_id, 2, "the spot node is wanted back", deadline_ms)  # 2: preemption
            wait_for_outcome(run_dir)
        cluster.remove_node(node, allow_graceful=False)
        if fate == "replaced":
            wait_for_workers(run_dir, 1)
            joined.append(join(cluster.address, num_cpus=2))
            wait_for_workers(run_dir, 2)
            os.kill(os.getpid(), signal.SIGTERM)  # enough was seen

    thread = threading.Thread(target=lose, daemon=True)
    thread.start()
    options = ["train.checkpoint_every=3", "train.num_workers=[1, 2]", "train.cpus_per_worker=2", "train.zero=1"]
    # Ray tells of a drain, or of a node, after seconds: there the run is long enough to be in the middle by then.
    num_steps = {"removed": NUM_STEPS, "drained": 10 * NUM_STEPS, "replaced": 1000 * NUM_STEPS}[fate]
    options += [f"train.steps={num_steps}", f"train.resize_every_s={2 if fate == 'replaced' else 1000}"]
    launch(config_of(MAE, shards, run_dir, *options))
    thread.join()
    for one in joined:
        one.terminate()
        one.wait()
    ray.shutdown()
    cluster.shutdown()


def join(address: str, num_cpus: int) -> subprocess.Popen[bytes]:
    """One more node, by a command: Cluster.add_node works in a main thread only, where the run is."""
    node = ["start", f"--address={address}", f"--num-cpus={num_cpus}", f"--object-store-memory={150 << 20}", "--block"]
    return subprocess.Popen([sys.executable, "-m", "ray.scripts.scripts", *node])


def wait_for_workers(run_dir: Path, num_workers: int) -> None:
    """Until the run makes its steps with so many workers."""
    until = time.monotonic() + 240
    while [record["num_workers"] for record in read_metrics(str(run_dir))[-1:]] != [num_workers]:
        assert time.monotonic() < until, f"no step with {num_workers} workers"
        time.sleep(0.2)


def wait_for_outcome(run_dir: Path) -> None:
    """Until a checkpoint is committed that no schedule asked for, or for as long as there is notice."""
    until = time.monotonic() + 25
    store = CheckpointStore(str(run_dir))
    while time.monotonic() < until and all(store.open(n).step % 3 == 0 for n in store.names() if store.is_committed(n)):
        time.sleep(0.2)


if __name__ == "__main__":
    _lose_a_node(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
