"""Target `ray` on a real head with token authentication, started as cluster/README.md says, and what it refuses."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
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

    def __init__(self, folder: Path, more: dict[str, str] | None = None, mode: str = "token") -> None:
        self._more = {**(more or {}), "RAY_AUTH_MODE": mode}
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
        return {**kept, **quick, **self._more, "RAY_AUTH_TOKEN_PATH": str(self.token_file)}

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


class Wire:
    """A port of our own that leads to another one, until it is cut, and again after it is mended."""

    def __init__(self, to: int) -> None:
        self._to, (self.port,) = to, free_ports(1)
        self._ends: list[socket.socket] = []
        self.mend()

    def mend(self) -> None:
        self._server = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._server,), daemon=True).start()

    def cut(self) -> None:
        for end in [self._server, *self._ends]:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._ends.clear()

    def _accept(self, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, far = server.accept()[0], socket.create_connection(("127.0.0.1", self._to))
                self._ends += [near, far]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._copy, args=pair, daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


@pytest.mark.chaos
def test_a_job_outlives_the_connection_and_whoever_sent_it(head: Head, here: list[str], tmp_path: Path) -> None:
    wire = Wire(int(head.jobs.rpartition(":")[2]))
    os.mkfifo(tmp_path / "pipe")  # the job ends when we write to it
    file = tmp_path / "long.yaml"
    command = ["tag", str(tmp_path / "pipe"), "--out", str(tmp_path / "tags.csv")]
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
    (tmp_path / "pipe").write_text("uid,findings,impression\n1,Small left pleural effusion.,None\n")
    assert follow.wait(60) == 0
    assert (tmp_path / "said").read_text().count("1 reports") == 1
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
def test_doctor_of_a_cluster(head: Head, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "medim_ray.cli", "doctor", "--cluster"]
    good = subprocess.run(
        [*command, head.gcs, "--storage", str(tmp_path)], env=head.environment, capture_output=True, text=True
    )
    assert good.returncode == 0, good.stdout + good.stderr
    lines = dict(line[5:].split(": ", 1) for line in good.stdout.splitlines())
    on_nodes = ["versions", "clocks", "disk", "memory", "accelerators", "storage", "all-reduce", "data stream"]
    assert list(lines) == ["token", "ports", "join", "nodes", *on_nodes]
    assert "wrote a file and read all of them" in lines["storage"] and "MB/s" in lines["data stream"]
    assert not list(tmp_path.iterdir())


@pytest.mark.chaos
def test_a_head_that_asks_nobody_for_a_token_is_told_as_such(
    here: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(tempfile.mkdtemp(prefix="mr-open-", dir="/tmp"))
    head = Head(folder, mode="disabled")
    try:
        command = [sys.executable, "-m", "medim_ray.cli", "doctor", "--cluster", head.gcs]
        environment = {**head.environment, "RAY_AUTH_MODE": "token"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
        assert done.returncode == 1 and "FAIL join: RAY_AUTH_MODE=token here, but the head takes all" in done.stdout
        words = ["submit", tagging(tmp_path), f"ray.address={head.jobs}", *here]
        assert main([*words, f"ray.token_file={head.token_file}"]) == 0
        assert "takes jobs without a token, from whoever reaches it" in capsys.readouterr().err
    finally:
        head.stop()


RELABEL = """
import json, sys
from ray._raylet import GcsClient
client = GcsClient(address=sys.argv[1])
facts = json.loads(client.internal_kv_get(b"CLUSTER_METADATA", b"cluster")) | {"ray_version": sys.argv[2]}
client.internal_kv_put(b"CLUSTER_METADATA", json.dumps(facts).encode(), True, b"cluster")
"""


@pytest.mark.chaos
def test_doctor_tells_what_keeps_us_from_a_cluster(head: Head, tmp_path: Path) -> None:
    token = head.token_file.read_text().strip()
    bare = {k: v for k, v in head.environment.items() if not k.startswith("RAY_AUTH")} | {"HOME": str(tmp_path)}

    def doctor(environment: dict[str, str], address: str = head.gcs) -> str:
        command = [sys.executable, "-m", "medim_ray.cli", "doctor", "--cluster", address]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
        assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
        return done.stdout

    refused = "FAIL join: the head asks for a token, and ours is missing or another cluster's"
    assert refused in doctor({**bare, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 48})
    none = doctor(bare)
    assert "FAIL token: no token: whoever reaches the cluster may run code" in none and refused in none
    half = doctor({**bare, "RAY_AUTH_TOKEN": token})
    assert "FAIL token: there is a token, but RAY_AUTH_MODE is not token here" in half and refused in half
    lost = doctor({**bare, "RAY_AUTH_MODE": "token"})
    assert "FAIL token: RAY_AUTH_MODE=token and no token" in lost and "FAIL join: there is no token" in lost
    assert "FAIL ports" in doctor(bare, f"127.0.0.1:{free_ports(1)[0]}")
    import ray

    for version in ("2.40.0", ray.__version__):  # and back: the head is not ours alone
        relabel = [sys.executable, "-c", RELABEL, head.gcs, version]
        subprocess.run(relabel, env=head.environment, check=True, capture_output=True)
        if version != ray.__version__:
            other = doctor(head.environment)
            assert "FAIL join: Version mismatch" in other and "Ray: 2.40.0" in other, other


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
