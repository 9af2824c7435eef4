"""Target `ray` on a real head with token authentication, started as cluster/README.md says, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests

from medim_ray.cli import main
from medim_ray.submit import state
from tests.system.ray_head import Head, Wire, free_ports, running_head

pytestmark = pytest.mark.system
ROOT = Path(__file__).parents[2]
PLANTED = "planted-90bd1e44"
NUM_ROWS = 300_000  # half a minute of tagging, or more


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with running_head() as head:
        yield head


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """State, storage and a small working folder of a test of its own."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MEDIM_RAY_JOBS", str(tmp_path / "jobs.json"))
    monkeypatch.chdir(ROOT)
    work = tmp_path / "work"
    work.mkdir()
    (work / "reports.csv").write_text("uid,findings,impression\n1,Small left pleural effusion.,None\n")
    return ["target=ray", f"storage.root={tmp_path}/storage", f"environment.working_dir={work}"]


def tagging(tmp_path: Path) -> str:
    file = tmp_path / "tag.yaml"
    file.write_text(json.dumps({"name": "tag", "command": ["tag", "reports.csv", "--out", str(tmp_path / "tags.csv")]}))
    return str(file)


def test_jobs_with_a_token_and_what_stands_in_their_way(
    head: Head,
    here: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    submit = ["submit", tagging(tmp_path), f"ray.address={head.jobs}", *here]
    assert main(submit) == 1
    assert "asks for a token and there is none" in capsys.readouterr().err
    wrong = tmp_path / "wrong"
    wrong.write_text("0" * 48)
    assert main([*submit, f"ray.token_file={wrong}"]) == 1
    assert "refuses the token: it is another cluster's" in capsys.readouterr().err
    assert main([*submit, "ray.token_file=/none"]) == 2
    assert "the token file /none can't be read" in capsys.readouterr().err
    assert state.read() == {}, "nothing was sent"

    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(head.token_file))
    assert main([*submit, f"ray.address=http://127.0.0.1:{free_ports(1)[0]}"]) == 1
    assert "no Ray cluster answers at" in capsys.readouterr().err
    assert main(submit) == 0
    said = capsys.readouterr()
    assert "1 reports" in said.out and (tmp_path / "tags.csv").is_file()
    monkeypatch.setenv("MEDIM_RAY_JOBS", str(tmp_path / "elsewhere.json"))  # as from another machine
    assert main(submit) == 0, "the same job is attached to, not doubled"
    jobs = requests.get(f"{head.jobs}/api/jobs/", headers=head.headers, timeout=10)
    assert len(jobs.json()) == 1
    assert head.token_file.read_text().strip() not in jobs.text


def test_a_cluster_of_another_ray_is_refused_before_anything_is_sent(
    here: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    class Old(BaseHTTPRequestHandler):
        """The version answer of a head that runs Ray 2.40; a second Ray can't be installed beside ours."""

        def do_GET(self) -> None:
            asked.append((self.command, self.path))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"version": "4", "ray_version": "2.40.0", "ray_commit": "x"}).encode())

        do_POST = do_PUT = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Old)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_address[1]}"
        assert main(["submit", tagging(tmp_path), f"ray.address={address}", *here]) == 1
    finally:
        server.shutdown()
    assert "runs Ray 2.40.0, this is Ray" in capsys.readouterr().err
    assert {path for _, path in asked} == {"/api/version"}


def test_a_working_folder_over_the_limit_is_refused_before_a_cluster_is_asked(
    here: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "work/weights.bin").write_bytes(os.urandom(1_500_000))
    for more in ([], ["--dry-run"]):
        assert main(["submit", tagging(tmp_path), *here, "ray.max_upload_mb=1", *more]) == 2
        assert "The largest files: weights.bin (1.5 MB)" in capsys.readouterr().err


@pytest.mark.chaos
def test_stop_resubmit_and_secrets_on_a_cluster(
    head: Head,
    here: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(head.token_file))
    (tmp_path / "key").write_text(PLANTED)
    os.mkfifo(tmp_path / "pipe")  # the job reads what never comes
    file = tmp_path / "long.yaml"
    file.write_text(json.dumps({"name": "long", "command": ["tag", str(tmp_path / "pipe"), "--out", "/tmp/none.csv"]}))
    words = ["submit", str(file), f"ray.address={head.jobs}", *here]
    assert main([*words, "--detach", "environment.secrets={KEY: 'file:" + str(tmp_path / "key") + "'}"]) == 0
    assert main([*words, "retries=1"]) == 2, capsys.readouterr()
    time.sleep(5)
    assert main(["jobs", "stop", "long"]) == 0
    assert main(["jobs", "logs", "long", "--follow"]) != 0
    assert "long: stopped" in capsys.readouterr().err
    submit = ["submit", tagging(tmp_path), f"ray.address={head.jobs}", *here]
    assert main([*submit, "name=bad", "args=[--id-column, none]"]) == 2, "the exit code is the job's"
    assert main([*submit, "name=other", "environment.python=/usr/bin/python3"]) == 78
    assert "has no medim_ray" in capsys.readouterr().out
    info = requests.get(f"{head.jobs}/api/jobs/", headers=head.headers, timeout=10).text
    files = "".join(path.read_text(errors="replace") for path in tmp_path.rglob("*.json"))
    assert PLANTED not in info + files and "KEY" in info


@pytest.mark.chaos
def test_a_job_outlives_the_connection_and_whoever_sent_it(head: Head, here: list[str], tmp_path: Path) -> None:
    wire = Wire(int(head.jobs.rpartition(":")[2]))
    rows = "".join(f"{i},Small left pleural effusion. No pneumothorax.,None\n" for i in range(NUM_ROWS))
    (tmp_path / "many.csv").write_text(f"uid,findings,impression\n{rows}")
    file = tmp_path / "long.yaml"
    command = ["tag", str(tmp_path / "many.csv"), "--out", str(tmp_path / "tags.csv")]
    file.write_text(json.dumps({"name": "outlives", "command": command}))
    start = [sys.executable, "-m", "medim_ray.cli"]
    words = [*start, "submit", str(file), f"ray.address=http://127.0.0.1:{wire.port}", *here]
    environment = {**os.environ, "RAY_AUTH_TOKEN_PATH": str(head.token_file)}
    said = (tmp_path / "said").open("w+")
    first = subprocess.Popen(words, env=environment, cwd=ROOT, stdout=said, stderr=said)

    def wait_for(text: str) -> None:
        deadline = time.monotonic() + 60
        while text not in (tmp_path / "said").read_text():
            assert first.poll() is None and time.monotonic() < deadline, (tmp_path / "said").read_text()
            time.sleep(0.2)

    wait_for("submitted to ray as outlives-")
    time.sleep(5)
    wire.cut()
    wait_for("the job goes on, trying again")
    wire.mend()
    time.sleep(5)
    assert first.poll() is None, "it has found the job again"
    first.kill()
    first.wait()
    follow = subprocess.Popen([*start, "jobs", "logs", "outlives", "--follow"], env=environment, cwd=ROOT, stdout=said)
    assert follow.wait(300) == 0
    assert (tmp_path / "said").read_text().count(f"{NUM_ROWS} reports") == 1
    jobs = requests.get(f"{head.jobs}/api/jobs/", headers=head.headers, timeout=10).json()
    assert sum(job["metadata"]["name"] == "outlives" for job in jobs) == 1
    said.close()


@pytest.mark.chaos
@pytest.mark.parametrize("target", ["local", "ray"])
def test_a_wheel_runs_instead_of_what_is_installed(
    target: str,
    head: Head,
    here: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "medim_ray", tmp_path / "medim_ray", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "medim_ray/__init__.py").open("a") as file:
        file.write('print("this is the wheel")\n')
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "."]
    subprocess.run(pip, cwd=tmp_path, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(head.token_file))
    words = ["submit", tagging(tmp_path), f"ray.address={head.jobs}", *here, f"target={target}", f"name=wheel-{target}"]
    assert main([*words, f"environment.wheel={wheel}"]) == 0
    out = capsys.readouterr().out
    assert "this is the wheel" in out and "1 reports" in out


@pytest.mark.chaos
def test_a_head_that_asks_nobody_for_a_token_is_told_as_such(
    here: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running_head(mode="disabled") as head:
        command = [sys.executable, "-m", "medim_ray.cli", "doctor", "--cluster", head.gcs]
        environment = {**head.environment, "RAY_AUTH_MODE": "token"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
        assert done.returncode == 1 and "FAIL join: RAY_AUTH_MODE=token here, but the head takes all" in done.stdout
        words = ["submit", tagging(tmp_path), f"ray.address={head.jobs}", *here]
        assert main([*words, f"ray.token_file={head.token_file}"]) == 0
        assert "takes jobs without a token, from whoever reaches it" in capsys.readouterr().err
