"""Files appear whole or not at all, options reach the right protocol, and only what may pass is asked for again."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import fsspec
import pytest
from botocore.exceptions import NoCredentialsError
from fsspec.config import conf
from yarl import URL

from medim_ray.data.storage import (
    StorageConfig,
    committed,
    filesystem,
    patiently,
    retried,
    sizes,
    sources_open_with,
    storage_faults,
)


def test_what_is_not_finished_does_not_appear(tmp_path: Path) -> None:
    for fs, root in ((fsspec.filesystem("file"), str(tmp_path)), (fsspec.filesystem("memory"), "/here")):
        path, scratch = f"{root}/a/b.bin", f"{root}/scratch"
        with pytest.raises(KeyboardInterrupt), committed(fs, path, scratch) as file:
            file.write(b"half")
            raise KeyboardInterrupt
        assert sizes(fs, root) == {}
        for data in (b"whole", b"again, over the old one"):
            with committed(fs, path, scratch) as file:
                file.write(data)
            assert fs.cat_file(path) == data and sizes(fs, root) == {"a/b.bin": len(data)}


def test_options_reach_their_protocol_and_leak_nowhere() -> None:
    storage = StorageConfig(endpoint="http://127.0.0.1:9000", anonymous=True)
    assert storage.options("s3") == {"endpoint_url": "http://127.0.0.1:9000", "profile": None, "anon": True}
    assert storage.options("gs") == {"endpoint_url": "http://127.0.0.1:9000", "token": "anon"}
    assert storage.options("az") == {"account_host": "127.0.0.1:9000", "anon": True} and storage.options("file") == {}
    before = dict(conf)
    with sources_open_with(storage):
        assert fsspec.filesystem("s3").anon and fsspec.filesystem("s3").endpoint_url == "http://127.0.0.1:9000"
        out, root = filesystem("s3://bucket/out/", StorageConfig(), "out_storage")
        assert not out.anon and out.endpoint_url is None and root == "bucket/out"
    assert dict(conf) == before and not fsspec.filesystem("s3").anon


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"endpoint": "localhost:9000"}, "a URL, such as http://localhost:9000"),
        ({"profile": "me", "anonymous": True}, "credentials or none"),
    ],
)
def test_options_that_make_no_sense_say_so(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StorageConfig(**options)


def status(code: int) -> Exception:
    request = aiohttp.RequestInfo(URL("http://x"), "GET", None, URL("http://x"))  # type: ignore[arg-type]
    return aiohttp.ClientResponseError(request, (), status=code)


def failing(times: int, error: Exception) -> Callable[[], bytes]:
    calls = iter(range(100))

    def read() -> bytes:
        if next(calls) < times:
            raise error
        return b"data"

    return read


@pytest.mark.parametrize("error", [status(503), status(429), TimeoutError("slow"), ConnectionResetError("cut")])
def test_what_passes_is_waited_for(error: Exception) -> None:
    assert retried("http://x/1.png", failing(1, error)) == b"data"


def test_what_is_called_not_found_is_looked_into() -> None:
    gone = FileNotFoundError("http://x/1.png")
    gone.__cause__ = status(503)
    assert retried("http://x/1.png", failing(1, gone)) == b"data"
    gone.__cause__ = status(404)
    with pytest.raises(FileNotFoundError):
        retried("http://x/1.png", failing(1, gone))


def test_what_does_not_pass_stops_the_job_instead_of_losing_the_row() -> None:
    with pytest.raises(RuntimeError, match="the storage keeps failing"):
        retried("http://x/1.png", failing(9, status(500)))


@pytest.mark.parametrize(
    ("url", "error", "raised"),
    [
        ("http://x/1.png", status(404), FileNotFoundError),
        ("http://x/1.png", status(403), PermissionError),
        ("s3://x/1.png", FileNotFoundError("x"), FileNotFoundError),
        ("s3://x/1.png", PermissionError("x"), PermissionError),
        ("/x/1.png", TimeoutError("a broken disk"), TimeoutError),
        ("s3://x/1.png", NoCredentialsError(), NoCredentialsError),
    ],
)
def test_what_lasts_is_told_at_once(url: str, error: Exception, raised: type[Exception]) -> None:
    with pytest.raises(raised):
        retried(url, failing(1, error))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), "out=x can't be used: No space left on device; kept"),
        (PermissionError(13, "Access Denied"), r"out=x can't be used: no permission \(Access Denied\); kept"),
    ],
)
def test_faults_are_told_in_plain_words(error: Exception, message: str) -> None:
    with pytest.raises(RuntimeError, match=message), storage_faults("out=x", kept="; kept"):
        raise error
    with pytest.raises(KeyError), storage_faults("out=x"):
        raise KeyError("a fault of ours")


def test_patience_is_for_what_may_pass_and_has_an_end() -> None:
    busy = OSError(errno.EBUSY, "Reduce your request rate.")
    assert patiently(failing(2, busy), patience_s=5.0) == b"data"
    began = time.monotonic()
    with pytest.raises(OSError, match="Reduce"):
        patiently(failing(99, busy), patience_s=0.5)
    assert time.monotonic() - began < 1.0
    for lasting in (OSError(errno.ENOSPC, "disk full"), PermissionError(errno.EACCES, "no"), FileNotFoundError("x")):
        with pytest.raises(type(lasting)):
            patiently(failing(1, lasting), patience_s=60.0)
    assert time.monotonic() - began < 5.0
