"""A Ray head with token authentication, started as cluster/README.md says, and a wire to it that can be cut."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import requests


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


@contextlib.contextmanager
def running_head(more: dict[str, str] | None = None, mode: str = "token") -> Iterator[Head]:
    """A head in a folder of its own, whose path is short: sockets."""
    folder = Path(tempfile.mkdtemp(prefix="mr-head-", dir="/tmp"))
    head = Head(folder, more, mode)
    try:
        yield head
    finally:
        head.stop()
        shutil.rmtree(folder, ignore_errors=True)


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
