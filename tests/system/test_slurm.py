"""Jobs on a real Slurm of two nodes on this machine, which the tests start and stop. No mock: sbatch, srun, requeue."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from ray._private.services import find_gcs_addresses

from medim_ray.cli import main
from medim_ray.submit import state
from medim_ray.train.checkpoint import load_weights
from medim_ray.train.store import CheckpointStore

pytestmark = pytest.mark.system
ROOT = Path(__file__).parents[2]
TWO_NODES = ROOT / "cluster/slurm/two-nodes"
MISSING = [name for name in ("munged", "slurmctld", "slurmd", "sbatch", "unshare") if shutil.which(name) is None]
needs_slurm = pytest.mark.skipif(
    bool(MISSING) or os.geteuid() != 0,
    reason=f"a Slurm of its own needs root, and here {', '.join(MISSING) or 'nothing'} is missing: see .ci/run",
)
PLANTED = "planted-7f3a91c2"
DOCTOR = ["submit", "jobs/doctor.yaml", "target=slurm", "slurm.signal_s=10"]
PRETRAIN = ["submit", "jobs/pretrain-medim-small.yaml", "target=slurm", "slurm.signal_s=10"]


def start(folder: Path, port: int, unshared: str = "") -> Path:
    environment = {**os.environ, "UNSHARED": unshared}
    done = subprocess.run(
        [TWO_NODES, "start", folder, str(port)], env=environment, stdout=subprocess.PIPE, stderr=None, text=True
    )
    assert done.returncode == 0, f"Slurm did not start, see {folder}/*.log"
    return folder / "slurm.conf"


@pytest.fixture(scope="module")
def slurm() -> Iterator[Path]:
    """A Slurm of two nodes for the tests of this file."""
    folder = Path(tempfile.mkdtemp(prefix="mr-slurm-", dir="/tmp"))  # short: sockets
    try:
        yield start(folder, 16810)
    finally:
        subprocess.run([TWO_NODES, "stop", folder], check=True)
        shutil.rmtree(folder)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Storage and state of a test of its own; the override that names the storage."""
    monkeypatch.setenv("MEDIM_RAY_JOBS", str(tmp_path / "jobs.json"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(ROOT)
    return f"storage.root={tmp_path}/storage"


def log_of(name: str, storage: Path) -> str:
    record = state.read()[name]
    return (storage / "storage/jobs" / f"{name}-{record.hash[:8]}-{record.attempt}" / "log").read_text()


@needs_slurm
def test_a_job_on_two_nodes_is_one_job_and_leaves_nothing_behind(
    slurm: Path, here: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_CONF", str(slurm))
    monkeypatch.setenv("MY_SECRET", PLANTED)
    words = [*DOCTOR, here, "environment.secrets={MY_SECRET: env}"]
    assert main(words) == 0, capsys.readouterr()
    said = capsys.readouterr()
    assert "2 node(s), a task ran" in said.out and "succeeded, exit code 0" in said.err
    number = state.read()["doctor"].handle
    assert main(words) == 0
    assert f"already submitted as {number}, succeeded" in capsys.readouterr().err
    shown = subprocess.run(["scontrol", "show", "job", number], capture_output=True, text=True, check=True).stdout
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"log", "job.sh", "exit_code"} == {path.name for path in files if "jobs" in path.parts[-3:]}
    assert PLANTED not in shown + said.out + said.err + "".join(path.read_text() for path in files)
    assert not Path(f"/tmp/mr-{number}").exists()
    for more, message in (
        (["slurm.partition=nowhere"], "no such partition|invalid partition.*this cluster has debug"),
        (["resources.nodes=9"], "sbatch refuses the job"),
    ):
        assert main([*DOCTOR, here, "name=other", *more]) == 2
        assert re.search(message, capsys.readouterr().err)
    assert main([*DOCTOR, here, "name=long", "time_limit_s=7200", "--detach"]) == 0  # its partition allows an hour
    for _ in range(100):
        main(["jobs", "status", "long"])
        if "time_limit_s is over what the partition allows" in (told := capsys.readouterr().out):
            break
        time.sleep(0.2)
    assert "pending" in told and "give less, or another slurm.partition" in told
    assert main(["jobs", "stop", "long"]) == 0


@needs_slurm
def test_slurm_that_is_down_is_told_as_such(
    slurm: Path, here: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    down = tmp_path / "down.conf"  # no controller listens there
    down.write_text(slurm.read_text().replace("SlurmctldPort=16810", "SlurmctldPort=16819"))
    monkeypatch.setenv("SLURM_CONF", str(down))
    assert main([*DOCTOR, here]) == 1
    assert "Slurm is down" in capsys.readouterr().err
    assert state.read() == {}
    monkeypatch.setenv("PATH", "/nowhere")
    assert main([*DOCTOR, here]) == 1
    assert "is not on this machine: submit from a login node" in capsys.readouterr().err


@pytest.mark.chaos
@needs_slurm
def test_a_failed_head_start_is_a_failed_job(
    slurm: Path, here: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_CONF", str(slurm))
    tls = "tls={cert: /none/c.pem, key: /none/k.pem, ca: /none/ca.pem}"
    assert main([*DOCTOR, here, tls, "slurm.start_timeout_s=60"]) == 1
    said = capsys.readouterr()
    assert "head did not start" in said.out or "nodes came up" in said.out
    assert "doctor: failed, exit code 1" in said.err


@pytest.mark.chaos
@needs_slurm
def test_a_symmetric_run_passes_the_exit_code_on(
    slurm: Path, here: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if find_gcs_addresses():
        pytest.skip("`ray symmetric-run` ends every Ray of its machine, and one is running here")
    monkeypatch.setenv("SLURM_CONF", str(slurm))
    words = [here, "slurm.symmetric=true", "resources.nodes=1"]
    assert main([*DOCTOR, *words]) == 0, capsys.readouterr()
    assert "1 node(s), a task ran" in capsys.readouterr().out
    file = tmp_path / "file"
    file.touch()
    assert main([*DOCTOR, *words, "name=bad", f"command=[checkpoint, verify, {file}]"]) == 2
    assert "bad: failed, exit code 2" in capsys.readouterr().err


@pytest.mark.chaos
@needs_slurm
def test_an_interpreter_without_the_package_is_told_as_such(
    slurm: Path, here: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_CONF", str(slurm))
    assert main([*DOCTOR, here, "environment.python=/usr/bin/python3"]) == 78
    assert "has no medim_ray" in capsys.readouterr().out


@pytest.mark.chaos
@needs_slurm
def test_storage_that_a_node_does_not_see_is_told_before_anything_runs(
    here: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = tmp_path / "storage"
    storage.mkdir()
    folder = Path(tempfile.mkdtemp(prefix="mr-slurm-", dir="/tmp"))
    try:
        monkeypatch.setenv("SLURM_CONF", str(start(folder, 16820, unshared=str(storage))))
        assert main([*DOCTOR, here]) == 1
        assert "storage.root is not shared by all nodes" in capsys.readouterr().out
    finally:
        subprocess.run([TWO_NODES, "stop", folder], check=True)


@pytest.mark.chaos
@needs_slurm
def test_two_jobs_at_once_have_a_cluster_each(
    slurm: Path, here: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", str(slurm))
    of_the_cluster = f"command=[doctor, --cluster, auto, --storage, {tmp_path}]"
    for name, more in (("one", "tags.size=small"), ("two", of_the_cluster)):
        assert main([*DOCTOR, here, f"name={name}", more, "--detach"]) == 0
    for name in ("one", "two"):
        assert main(["jobs", "logs", name, "--follow"]) == 0, log_of(name, tmp_path)
    one, two = log_of("one", tmp_path), log_of("two", tmp_path)
    assert "2 node(s), a task ran" in one and "join: 2 node(s)" in two, "each sees its own two nodes, not four"
    (at,) = re.findall(r"cluster at (\S+),", one)
    assert at not in two
    assert "each of 2 node(s) wrote a file and read all of them" in two
    assert re.search(r"ok   all-reduce: gloo, 2 nodes, \d+ MB/s", two)


@pytest.mark.chaos
@needs_slurm
def test_an_array_has_a_cluster_and_a_log_a_task(
    slurm: Path, here: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_CONF", str(slurm))
    assert main([*DOCTOR, here, "slurm.array=3-4", "resources.nodes=1"]) == 0
    out = capsys.readouterr().out
    assert out.count("== task") == 2 and out.count(", 1 node(s), a task ran") == 2


@pytest.mark.chaos
@needs_slurm
def test_nodes_of_two_kinds_are_one_cluster(
    slurm: Path, here: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_CONF", str(slurm))
    kinds = ["resources.nodes=1", "resources.decode_nodes=1", "resources.decode_cpus=2", "resources.decode_memory_gb=2"]
    assert main([*DOCTOR, here, *kinds]) == 0
    assert "2 node(s), a task ran" in capsys.readouterr().out


def weights(run_dir: Path, step: int = 12) -> dict[str, torch.Tensor]:
    store = CheckpointStore(str(run_dir))
    newest = store.newest()
    assert newest is not None and newest.step == step
    return load_weights(store, newest)


def wait_for_checkpoint(run_dir: Path, step: int, timeout_s: float = 240) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        newest = CheckpointStore(str(run_dir)).newest()
        if newest is not None and newest.step >= step:
            return
        time.sleep(0.2)
    raise AssertionError(f"{run_dir} has no checkpoint of step {step} after {timeout_s} s")


def cancel(name: str) -> None:
    assert main(["jobs", "stop", name]) == 0
    assert main(["jobs", "resubmit", name]) == 0


def requeue(name: str) -> None:
    subprocess.run(["scontrol", "requeue", state.read()[name].handle], check=True)
    assert main(["jobs", "logs", name, "--follow"]) == 0


@pytest.fixture(scope="module")
def straight(slurm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, torch.Tensor]]]:
    """Storage with shards prepared on Slurm, and the weights of a run on two nodes that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(slurm))
        patch.setenv("MEDIM_RAY_JOBS", str(folder / "jobs.json"))
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.chdir(ROOT)
        storage = f"storage.root={folder}/storage"
        assert main(["submit", "jobs/prepare-small.yaml", "target=slurm", "slurm.signal_s=10", storage]) == 0
        assert main([*PRETRAIN, storage, "name=straight"]) == 0
        yield folder, weights(folder / "storage/runs/straight")


@pytest.mark.chaos
@needs_slurm
@pytest.mark.parametrize("way", [cancel, requeue])
def test_what_is_interrupted_goes_on_bit_equal(
    straight: tuple[Path, dict[str, torch.Tensor]], way: Callable[[str], None]
) -> None:
    folder, expected = straight
    name = way.__name__.replace("_", "-")
    run = folder / "storage/runs" / name
    assert main([*PRETRAIN, f"storage.root={folder}/storage", f"name={name}", "--detach"]) == 0
    wait_for_checkpoint(run, 2)
    way(name)
    got = weights(run)
    assert expected.keys() == got.keys() and all(torch.equal(expected[key], got[key]) for key in got)
    log = log_of(name, folder)
    assert "resuming" in log, f"it did not go on from a checkpoint:\n{log}"


@pytest.mark.chaos
@needs_slurm
def test_the_time_limit_is_told_in_time_and_the_job_goes_on_after_a_requeue(
    straight: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    folder, _ = straight
    long = [f"storage.root={folder}/storage", "args=[train.steps=450, train.checkpoint_every=50]"]
    assert main([PRETRAIN[0], PRETRAIN[1], "target=local", "name=no-limit", *long]) == 0
    # Slurm counts in minutes, and its notice may come half a minute early: with 40 s of it, after 110 to 140 s.
    assert main([*PRETRAIN, "name=limit", *long, "time_limit_s=180", "slurm.signal_s=40", "retries=9"]) == 0
    log = log_of("limit", folder)
    assert "unfinished, back into the queue (1 of 9)" in log and "start 2" in log and "resuming" in log, log
    expected, got = (weights(folder / "storage/runs" / name, step=450) for name in ("no-limit", "limit"))
    assert expected.keys() == got.keys() and all(torch.equal(expected[key], got[key]) for key in got)
