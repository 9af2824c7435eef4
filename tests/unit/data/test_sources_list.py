"""Every source is listed, documented and has its file of configuration; storage without permission is said so."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest

from medim_ray.cli import main
from medim_ray.config.loader import load
from medim_ray.data.images import BadImageError, fetch
from medim_ray.data.ingest import PrepareConfig
from medim_ray.data.sources import SOURCES

ROOT = Path(__file__).parents[3]


def test_the_command_lists_every_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "--list-sources"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(SOURCES) and len(lines) == 19
    assert all(len(line) > 40 for line in lines)


def test_every_source_has_a_file_and_a_line_of_the_table() -> None:
    files = {path.stem: path for path in (ROOT / "configs/sources").glob("*.yaml")}
    table = (ROOT / "medim_ray/data/sources/README.md").read_text()
    assert set(files) == set(SOURCES)
    for name, path in files.items():
        config = load(PrepareConfig, path, [] if name == "phantom" else ["source.path=/data/x"])
        assert config.source.name == name and isinstance(config.source, SOURCES[name].Config)
        assert f"\n| `{name}` |" in table, f"{name} is not in medim_ray/data/sources/README.md"
        assert f"--config configs/sources/{name}.yaml" in path.read_text()


def test_a_wrong_option_names_the_near_one() -> None:
    with pytest.raises(ValueError, match=r"uncertian.*Did you mean 'source\.uncertain'"):
        load(PrepareConfig, ROOT / "configs/sources/chexpert.yaml", ["source.uncertian=ones"])
    with pytest.raises(ValueError, match=r"source\.window='linear' is not one of 'voi', 'percentile', 'none'"):
        load(PrepareConfig, ROOT / "configs/sources/dicom.yaml", ["source.window=linear"])


class _Forbidden(BaseHTTPRequestHandler):
    """An object store that lets nobody in, as S3 says it."""

    def _refuse(self) -> None:
        body = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        self.send_response(403)
        self.send_header("Content-Length", "0" if self.command == "HEAD" else str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_PUT = do_POST = _refuse

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the server's own name
        """Nothing."""


@pytest.fixture
def forbidden_bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Forbidden)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    options = {"key": "k", "secret": "s", "endpoint_url": f"http://127.0.0.1:{server.server_port}"}
    monkeypatch.setitem(fsspec.config.conf, "s3", options)
    yield "s3://closed/data"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_bucket_without_permission(forbidden_bucket: str) -> None:
    for name, path in (
        ("csv", f"{forbidden_bucket}/metadata.csv"),
        ("folder", forbidden_bucket),
        ("dicom", forbidden_bucket),
        ("parquet", f"{forbidden_bucket}/a.parquet"),
        ("webdataset", f"{forbidden_bucket}/a.tar"),
    ):
        with pytest.raises(ValueError, match=r"no permission to read it; check the file's rights or the bucket's cred"):
            SOURCES[name](SOURCES[name].Config(path=path)).plan()
    with pytest.raises(ValueError, match="no permission to read it"):
        SOURCES["nih"](SOURCES["nih"].Config(path=forbidden_bucket))
    with pytest.raises(BadImageError, match="no permission to read the file"):
        fetch(f"{forbidden_bucket}/1.png")
