"""Target `kuberay` without a cluster: what is refused, and what kubectl's complaints become."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from medim_ray.cli import main
from medim_ray.submit import state
from medim_ray.submit.base import NO_PACKAGE
from medim_ray.submit.kuberay import _status_of

ROOT = Path(__file__).parents[3]
SUBMIT = ["submit", str(ROOT / "jobs/pretrain-medim-small.yaml"), "target=kuberay", "storage.root=s3://medim"]
CONFIG = """\
apiVersion: v1
kind: Config
clusters: [{name: none, cluster: {server: "https://127.0.0.1:1"}}]
contexts: [{name: none, context: {cluster: none, user: none}}]
users: [{name: none, user: {token: none}}]
current-context: none
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDIM_RAY_JOBS", str(tmp_path / "jobs.json"))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config").write_text(CONFIG)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    monkeypatch.chdir(ROOT)


def test_an_image_is_needed_and_a_cluster_is_no_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(SUBMIT) == 2
    assert "environment.image is empty" in capsys.readouterr().err
    assert main([*SUBMIT, "environment.image=m:1", "kuberay.kind=cluster"]) == 2
    assert "is a cluster, not a job" in capsys.readouterr().err
    assert main([*SUBMIT, "environment.image=m:1", "storage.root=/mnt/medim"]) == 2
    assert "storage.root=/mnt/medim: no claim is mounted there" in capsys.readouterr().err
    assert main([*SUBMIT, "storage.root=/mnt/medim", "--dry-run"]) == 0
    assert "no claim is mounted there" in capsys.readouterr().out
    assert state.read() == {}


def test_no_kubectl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main([*SUBMIT, "environment.image=m:1"]) == 1
    assert "kubectl is not on this machine" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_no_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SUBMIT, "environment.image=m:1"]) == 1
    assert "Kubernetes can't be reached" in capsys.readouterr().err
    assert main([*SUBMIT, "environment.image=m:1", "kuberay.context=nowhere"]) == 2
    assert "kuberay.context" in capsys.readouterr().err
    assert state.read() == {}


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ({}, ("pending", None, "")),
        ({"jobDeploymentStatus": "Suspended"}, ("pending", None, "Suspended")),
        ({"jobStatus": "RUNNING", "jobDeploymentStatus": "Running"}, ("running", None, "Running")),
        ({"jobStatus": "SUCCEEDED", "jobDeploymentStatus": "Complete"}, ("succeeded", 0, "Complete")),
        (
            {"jobStatus": "FAILED", "message": "Job entrypoint command failed with exit code 3, last available logs …"},
            ("failed", 3, "Job entrypoint command failed with exit code 3"),
        ),
        ({"jobStatus": "RUNNING", "jobDeploymentStatus": "Failed"}, ("failed", 1, "Failed")),
    ],
)
def test_states_and_exit_codes(status: dict[str, str], expected: tuple[str, int | None, str]) -> None:
    got = _status_of({"status": status})
    assert (got.state, got.exit_code, got.reason) == expected


def test_an_image_without_the_package_is_told_as_such() -> None:
    log = "python: Error while finding module specification (ModuleNotFoundError: No module named 'medim_ray')"
    message = f"Job entrypoint command failed with exit code 1, last available logs (truncated to 20,000 chars):\n{log}"
    got = _status_of({"status": {"jobStatus": "FAILED", "jobDeploymentStatus": "Failed", "message": message}})
    assert got.exit_code == NO_PACKAGE and "environment.image has no medim_ray" in got.reason


def test_what_was_stopped_is_told_from_what_waits_in_a_queue() -> None:
    waits = {"metadata": {"annotations": {}}, "status": {"jobStatus": "", "jobDeploymentStatus": "Suspended"}}
    stopped = {**waits, "metadata": {"annotations": {"medim-ray/stopped": "true"}}}
    assert (_status_of(waits).state, _status_of(stopped).state) == ("pending", "stopped")
