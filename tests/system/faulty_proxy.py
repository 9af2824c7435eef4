"""A real HTTP server that passes requests on to another one, and fails some of them as storage does on a bad day."""

from __future__ import annotations

import http.client
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import s3fs
from moto.server import ThreadedMotoServer

ERROR = (
    '<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message>'
    "<RequestId>1</RequestId></Error>"
)
Fault = tuple[int, str, str]
SLOW, CUT = "slow", "cut"

Judge = Callable[[int, str, str], "Fault | str | None"]
"""(number of the request, method, path) -> an error to answer with, SLOW, CUT, or None."""


class FaultyProxy:
    """`judge` may be changed at any time; `seen` counts what was done to requests."""

    def __init__(self, host: str, port: int) -> None:
        self.judge: Judge = lambda number, method, path: None
        self.seen: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._number = 0
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def _pass(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                chunked = "chunked" in self.headers.get("Transfer-Encoding", "")
                body = self._chunks() if chunked else self.rfile.read(length)
                fault = proxy._judge(self.command, self.path)
                if isinstance(fault, tuple):
                    status, code, message = fault
                    self._answer(status, ERROR.format(code=code, message=message).encode(), {})
                    return
                if fault == SLOW:
                    time.sleep(0.4)
                upstream = http.client.HTTPConnection(host, port, timeout=30)
                headers = {
                    k: v for k, v in self.headers.items() if k.lower() not in ("connection", "transfer-encoding")
                }
                headers["Content-Length"] = str(len(body))
                upstream.request(self.command, self.path, body=body, headers=headers)
                answer = upstream.getresponse()
                data = answer.read()
                kept = {k: v for k, v in answer.getheaders() if k.lower() not in ("connection", "transfer-encoding")}
                upstream.close()
                self._answer(answer.status, data, kept, cut=fault == CUT)

            def _chunks(self) -> bytes:
                parts = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)

            def _answer(self, status: int, data: bytes, headers: dict[str, str], cut: bool = False) -> None:
                self.send_response_only(status)
                for name, value in headers.items():
                    if name.lower() != "content-length" or self.command == "HEAD":
                        self.send_header(name, value)
                if self.command != "HEAD":
                    self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data[: len(data) // 2] if cut else data)
                if cut:
                    self.wfile.flush()
                    self.close_connection = True

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def _judge(self, method: str, path: str) -> Fault | str | None:
        with self._lock:
            self._number += 1
            fault = self.judge(self._number, method, path)
            self.seen[str(fault[0]) if isinstance(fault, tuple) else fault or "passed"] += 1
            return fault

    @contextmanager
    def running(self) -> Iterator[FaultyProxy]:
        """Listens while the body runs."""
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()


@contextmanager
def faulty_lake() -> Iterator[FaultyProxy]:
    """s3://lake on a server of its own behind such a proxy, for this process and those that it starts."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch, FaultyProxy(*server.get_host_and_port()).running() as faulty:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "of the tests")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", faulty.url)
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("lake")
        yield faulty
        faulty.judge = lambda *request: None
        s3fs.S3FileSystem().rm("lake", recursive=True)  # moto's servers in one process share what they hold
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()
