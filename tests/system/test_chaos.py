"""Runs under attack, in Ray clusters of their own: what is killed, stopped, drained or taken away changes no bit.

`make test-chaos` runs them; each takes a minute or two on two cores.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from medim_ray.train.metrics import read_lines, read_metrics
from medim_ray.train.store import CheckpointStore
from tests.system.runs import MAE, SMALL, assert_same_weights

pytestmark = [pytest.mark.system, pytest.mark.chaos]
NUM_STEPS = 12


@pytest.fixture(scope="module")
def straight(phantom_shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbs."""
    run_dir = tmp_path_factory.mktemp("chaos") / "straight"
    assert pretrain(phantom_shards, run_dir).wait(timeout=300) == 0
    return run_dir


def pretrain(shards: str, run_dir: Path, *overrides: str) -> subprocess.Popen[bytes]:
    """`medim-ray pretrain` as a user starts it."""
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


def assert_same_run(run_dir: Path, straight: Path) -> None:
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


@pytest.mark.parametrize("fate", ["removed", "drained"])
def test_a_node_that_goes_away_costs_no_sample(phantom_shards: str, tmp_path: Path, straight: Path, fate: str) -> None:
    """Two nodes of one worker each; one is removed without grace, or drained with a deadline: one worker goes on."""
    command = [sys.executable, "-m", "tests.system.test_chaos", phantom_shards, str(tmp_path / "run"), fate]
    with (tmp_path / "run.log").open("wb") as log:
        done = subprocess.run(command, stdout=log, stderr=log, timeout=500, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, log_of(tmp_path / "run")
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["worlds"][0] == 2 and 1 in told["worlds"], told
    keys = [[r["samples_key"] for r in read_metrics(str(d))] for d in (tmp_path / "run", straight)]
    assert keys[0][:NUM_STEPS] == keys[1], "other samples than planned went into the weights"
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

    def lose() -> None:
        wait_for_steps(run_dir, 4)
        if fate == "drained":
            gcs = ray._raylet.GcsClient(address=cluster.gcs_address)
            deadline_ms = int((time.time() + 30) * 1e3)
            gcs.drain_node(node.node_id, 2, "the spot node is wanted back", deadline_ms)  # 2: preemption
            wait_for_outcome(run_dir)
        cluster.remove_node(node, allow_graceful=False)

    thread = threading.Thread(target=lose, daemon=True)
    thread.start()
    options = ["train.checkpoint_every=3", "train.num_workers=[1, 2]", "train.cpus_per_worker=2", "train.zero=1"]
    # Ray tells of a drain after seconds, so there the run is long enough to be in the middle by then.
    num_steps = NUM_STEPS if fate == "removed" else 10 * NUM_STEPS
    options += [f"train.steps={num_steps}", "train.resize_every_s=1000"]
    launch(config_of(MAE, shards, run_dir, *options))
    thread.join()
    store = CheckpointStore(str(run_dir))
    worlds = [store.open(name).manifest["world_size"] for name in reversed(store.names())]
    (run_dir.parent / "told.json").write_text(json.dumps({"worlds": [2, *worlds]}))
    ray.shutdown()
    cluster.shutdown()


def wait_for_outcome(run_dir: Path) -> None:
    """Until a checkpoint is committed that no schedule asked for, or for as long as there is notice."""
    until = time.monotonic() + 25
    store = CheckpointStore(str(run_dir))
    while time.monotonic() < until and all(store.open(n).step % 3 == 0 for n in store.names() if store.is_committed(n)):
        time.sleep(0.2)


if __name__ == "__main__":
    _lose_a_node(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
