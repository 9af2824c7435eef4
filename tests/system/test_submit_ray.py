"""Target `ray` on a real head with token authentication, started as cluster/README.md says, and what it refuses."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests

from medim_ray.cli import main
from medim_ray.submit import state
from medim_ray.submit.spec import Tls

pytestmark = pytest.mark.system
ROOT = Path(__file__).parents[2]
PLANTED = "planted-90bd1e44"


def free_ports(num: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(num)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]


class Head:
    """A running head: address of its Jobs API and of its GCS, and the file of its token."""

    def __init__(self, folder: Path, more: dict[str, str] | None = None) -> None:
        self._more = more or {}
        self.token_file = folder / "token"
        self.token_file.write_text(f"{os.urandom(24).hex()}\n")
        port, dashboard, client, agent = free_ports(4)
        self.jobs, self.gcs = f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}"
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
        command += ["--node-ip-address=127.0.0.1", f"--port={port}", f"--ray-client-server-port={client}"]
        command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--num-cpus=6"]
        command += [f"--dashboard-agent-listen-port={agent}", "--metrics-export-port=0", f"--temp-dir={folder}/r"]
        command += ["--object-store-memory=150000000"]
        self._log = (folder / "head.log").open("w")
        self._process = subprocess.Popen(
            command, env=self.environment, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True
        )
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            assert self._process.poll() is None, (folder / "head.log").read_text()
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"{self.jobs}/api/version", headers=self.headers, timeout=2).ok:
                    return
            time.sleep(0.3)
        raise AssertionError(f"no head after 90 s:\n{(folder / 'head.log').read_text()}")

    @property
    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        quick = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
        return {**kept, **quick, **self._more, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token_file)}

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token_file.read_text().strip()}"}

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._log.close()


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="mr-head-", dir="/tmp"))
    head = Head(folder)
    try:
        yield head
    finally:
        head.stop()


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
def test_doctor_of_a_cluster(head: Head, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "medim_ray.cli", "doctor", "--cluster"]
    good = subprocess.run(
        [*command, head.gcs, "--storage", str(tmp_path)], env=head.environment, capture_output=True, text=True
    )
    assert good.returncode == 0, good.stdout + good.stderr
    lines = dict(line[5:].split(": ", 1) for line in good.stdout.splitlines())
    assert list(lines) == ["token", "ports", "join", "versions", "clocks", "disk", "memory", "accelerators", "storage",
                           "all-reduce", "data stream"]  # fmt: skip
    assert "wrote a file and read all of them" in lines["storage"] and "MB/s" in lines["data stream"]
    assert not list(tmp_path.iterdir())
    wrong = {**head.environment, "RAY_AUTH_TOKEN_PATH": "", "RAY_AUTH_TOKEN": "0" * 48}
    bad = subprocess.run([*command, head.gcs], env=wrong, capture_output=True, text=True)
    assert bad.returncode == 1 and "FAIL join" in bad.stdout
    none = subprocess.run([*command, f"127.0.0.1:{free_ports(1)[0]}"], env=wrong, capture_output=True, text=True)
    assert none.returncode == 1 and "FAIL ports" in none.stdout


def node_address() -> str:
    import ray

    return str(ray.util.get_node_ip_address())


def certificates(folder: Path) -> Tls:
    """An authority, and a certificate of it for loopback."""
    for command in (
        "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test-authority -keyout ca.key -out ca.crt",
        "req -newkey rsa:2048 -nodes -subj /CN=localhost -keyout node.key -out node.csr",
        "x509 -req -in node.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile san -out node.crt",
    ):
        # Ray takes an address of the machine where it is told 127.0.0.1.
        (folder / "san").write_text(f"subjectAltName=DNS:localhost,IP:127.0.0.1,IP:{node_address()}\n")
        subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)
    return Tls(cert=f"{folder}/node.crt", key=f"{folder}/node.key", ca=f"{folder}/ca.crt")


@pytest.mark.chaos
def test_tls_on_loopback_with_certificates_made_here(tmp_path: Path) -> None:
    tls = certificates(tmp_path)
    folder = Path(tempfile.mkdtemp(prefix="mr-tls-", dir="/tmp"))
    head = Head(folder, tls.variables())
    try:
        context = ssl.create_default_context(cafile=tls.ca)
        context.load_cert_chain(tls.cert, tls.key)
        host, port = head.gcs.split(":")
        with socket.create_connection((host, int(port))) as plain, context.wrap_socket(plain, server_hostname=host):
            pass  # the head shows a certificate of our authority
        command = [sys.executable, "-m", "medim_ray.cli", "doctor"]
        environment = {**head.environment, "RAY_ADDRESS": head.gcs}
        good = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert f"cluster at {head.gcs}, 1 node(s), a task ran" in good.stdout, good.stdout + good.stderr
        in_clear = {k: v for k, v in environment.items() if not k.startswith(("RAY_USE_TLS", "RAY_TLS"))}
        try:
            bad = subprocess.run(command, env=in_clear, capture_output=True, text=True, cwd=tmp_path, timeout=60)
            assert "a task ran" not in bad.stdout
        except subprocess.TimeoutExpired:
            pass  # Ray tries again for long
    finally:
        head.stop()
