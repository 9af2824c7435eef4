"""`prepare` against a real S3 server (moto on loopback), on good and on bad days: the bytes of a local disk."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import fsspec
import numpy as np
import pytest
from moto.server import ThreadedMotoServer
from PIL import Image

from medim_ray.data.images import ImageEncoder
from medim_ray.data.ingest import PrepareConfig, ShardConfig, prepare
from medim_ray.data.lease import Lease
from medim_ray.data.shards import WORK, ShardSet, verify
from medim_ray.data.sources import SOURCES
from medim_ray.data.storage import StorageConfig, filesystem
from tests.system.faulty_proxy import CUT, SLOW, FaultyProxy

# Before Ray starts: its processes inherit them, as on a cluster whose nodes have credentials.
os.environ.setdefault("AWS_ACCESS_KEY_ID", "of the tests")
os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "of the tests")
os.environ.setdefault("AWS_DEFAULT_REGION", "us-east-1")
pytestmark = [pytest.mark.system, pytest.mark.usefixtures("ray_session")]
NUM = 24


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images of 12 patients and their table; names with spaces and umlauts."""
    root = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    lines = ["image_id,patient_id,file,view,sex,age,notes"]
    for k in range(NUM):
        Image.fromarray(rng.integers(0, 256, (64, 64), dtype=np.uint8)).save(root / f"Bild {k} ü.png")
        lines.append(f"i{k},p{k // 2},Bild {k} ü.png,PA,F,{k},Heart size {k} is normal. No effusion.")
    (root / "metadata.csv").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="module")
def proxy(corpus: Path) -> Iterator[FaultyProxy]:
    """The corpus in s3://lake/in, behind a proxy that can fail."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    fs, _ = filesystem("s3://lake", StorageConfig(endpoint=f"http://{host}:{port}"), "x")
    fs.mkdir("lake")
    fs.put(f"{corpus}/", "lake/in/", recursive=True)
    with FaultyProxy(host, port).running() as faulty:
        yield faulty
    server.stop()


def config(source: str, out: str, proxy: FaultyProxy | None = None, **options: Any) -> PrepareConfig:
    storage = StorageConfig() if proxy is None else StorageConfig(endpoint=proxy.url)
    return PrepareConfig(
        source=SOURCES["csv"].Config(path=f"{source}/metadata.csv"),
        source_storage=storage if source.startswith("s3") else StorageConfig(),
        out=out,
        out_storage=storage if out.startswith("s3") else StorageConfig(),
        image=ImageEncoder.Config(format="png"),
        shards=ShardConfig(rows_per_file=8, row_group_rows=4),
        salt="pepper",
        **options,
    )


@pytest.fixture(scope="module")
def local(corpus: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> dict[str, bytes]:
    """The samples as they are prepared on a local disk."""
    out = tmp_path_factory.mktemp("local") / "out"
    prepare(config(str(corpus), str(out)))
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.parquet")}


def parquet_of(proxy: FaultyProxy, root: str) -> dict[str, bytes]:
    fs, _ = filesystem(root, StorageConfig(endpoint=proxy.url), "x")
    fs.invalidate_cache()
    names = [name for name in fs.find(root) if name.endswith(".parquet")]
    return {name.removeprefix(root.removeprefix("s3://") + "/"): fs.cat_file(name) for name in names}


def bad_day(number: int, method: str, path: str) -> Any:
    """About every eighth request goes wrong."""
    kinds = [(500, "InternalError", "oh"), (503, "SlowDown", "Reduce your request rate."), SLOW, CUT]
    fault: Any = random.Random(number).choice([*kinds, *[None] * 28])
    return SLOW if fault == CUT and method == "HEAD" else fault


def test_on_a_bad_day_the_bytes_are_those_of_a_local_disk(proxy: FaultyProxy, local: dict[str, bytes]) -> None:
    proxy.judge, before = bad_day, proxy.seen.copy()
    summary = prepare(config("s3://lake/in", "s3://lake/bad/day", proxy))
    proxy.judge = lambda *request: None
    happened = proxy.seen - before
    assert min(happened[kind] for kind in ("500", "503", SLOW, CUT)) >= 2, happened
    assert sum(summary.splits.values()) == NUM and summary.quarantine == {}
    assert parquet_of(proxy, "s3://lake/bad/day") == local
    fs, root = filesystem("s3://lake/bad/day", StorageConfig(endpoint=proxy.url), "x")
    assert verify("s3://lake/bad/day", fs) == [] and not fs.exists(f"{root}/{WORK}")
    assert ShardSet.open("s3://lake/bad/day", fs).read_rows().num_rows == NUM
    assert prepare(config("s3://lake/in", "s3://lake/bad/day", proxy)).already_prepared


def test_an_outage_ends_the_job_and_the_same_command_goes_on(proxy: FaultyProxy, local: dict[str, bytes]) -> None:
    stored: list[str] = []

    def full(number: int, method: str, path: str) -> Any:
        """Takes a few parts, then nothing more."""
        if method == "PUT" and "/parts/" in path:
            stored.append(path)
            return (400, "QuotaExceeded", "The bucket is full") if len(stored) > 8 else None
        return None

    proxy.judge = full
    with pytest.raises(RuntimeError, match=r"out=s3://lake/full can't be used: .*the same command again to go on"):
        prepare(config("s3://lake/in", "s3://lake/full", proxy))
    images: list[str] = []

    def count(number: int, method: str, path: str) -> Any:
        if method == "GET" and path.endswith(".png"):
            images.append(path)

    proxy.judge = count
    summary = prepare(config("s3://lake/in", "s3://lake/full", proxy))
    proxy.judge = lambda *request: None
    assert any("went on with an unfinished job" in notice for notice in summary.notices)
    assert 0 < len(set(images)) < NUM and parquet_of(proxy, "s3://lake/full") == local


def test_buckets_without_permission_or_that_are_not_there(proxy: FaultyProxy, corpus: Path, tmp_path: Path) -> None:
    proxy.judge = lambda number, method, path: (403, "AccessDenied", "Access Denied") if "/secret" in path else None
    with pytest.raises(RuntimeError, match=r"out=s3://secret/x can't be used: no permission"):
        prepare(config(str(corpus), "s3://secret/x", proxy))
    with pytest.raises(ValueError, match=r"source.path=s3://secret/in/metadata.csv: no permission"):
        prepare(config("s3://secret/in", str(tmp_path / "out"), proxy))
    proxy.judge = lambda *request: None
    with pytest.raises(RuntimeError, match="out=s3://nobodys/x can't be used: The specified bucket does not exist"):
        prepare(config(str(corpus), "s3://nobodys/x", proxy))
    assert not (tmp_path / "out").exists()


def test_one_lease_a_bucket_folder(proxy: FaultyProxy) -> None:
    fs, _ = filesystem("s3://lake", StorageConfig(endpoint=proxy.url), "x")

    def lease(place: str) -> Lease:
        return Lease(fs, "lake/leased/lease.json", what="out", place=place, renew_s=0.1, patience_s=1.0)

    with lease("here") as held:
        with pytest.raises(ValueError, match="being written by another job"), lease("elsewhere"):
            pass
        held.check()
        left = fs.cat_file("lake/leased/lease.json")
    fs.pipe_file("lake/leased/lease.json", left)  # as a crashed job leaves it
    with lease("elsewhere") as taken:
        taken.check()
    assert not fs.exists("lake/leased/lease.json")


class Web(SimpleHTTPRequestHandler):
    """A folder on the web."""

    def log_message(self, *args: Any) -> None:
        pass


def test_a_source_on_the_web_stumbles_goes_down_and_comes_back(
    corpus: Path, local: dict[str, bytes], tmp_path: Path
) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Web, directory=str(corpus)))
    Thread(target=server.serve_forever, daemon=True).start()
    out = tmp_path / "out"

    def down(number: int, method: str, path: str) -> Any:
        return (503, "x", "down") if "/Bild%207" in path else None

    def stumble(number: int, method: str, path: str) -> Any:
        if number % 3 or path.endswith(".csv"):
            return None
        return CUT if method == "GET" and number % 2 else (500, "x", "oh")

    try:
        with FaultyProxy("127.0.0.1", server.server_address[1]).running() as web:
            web.judge = down
            with pytest.raises(RuntimeError, match=r"the storage keeps failing \(HTTP status 503\); .* go on"):
                prepare(config(web.url, str(out)))
            web.judge, before = stumble, web.seen.copy()
            summary = prepare(config(web.url, str(out)))
            happened = web.seen - before
            assert happened["500"] + happened[CUT] >= 2 and summary.quarantine == {}
    finally:
        server.shutdown()
        server.server_close()
    assert {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.parquet")} == local


def test_what_is_missing_for_a_protocol_is_named(corpus: Path, tmp_path: Path) -> None:
    for out, message in (
        ("gs://bucket/x", r"gs:// needs a package that is not installed: pip install gcsfs"),
        ("az://bucket/x", r"az:// needs a package that is not installed: pip install adlfs"),
        ("sss://bucket/x", "unknown protocol; use a path, s3://"),
        ("http://127.0.0.1/x", "a web server can be read only"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(config(str(corpus), out))
    with pytest.raises(ValueError, match=r"gs://bucket/in/metadata.csv: gs:// needs a package .*pip install gcsfs"):
        prepare(config("gs://bucket/in", str(tmp_path / "out")))
    with pytest.raises(ValueError, match=r"out_storage.profile is set, but .* is on no object store"):
        prepare(
            PrepareConfig(
                source=SOURCES["csv"].Config(path=str(corpus / "metadata.csv")),
                out=str(tmp_path / "out"),
                out_storage=StorageConfig(profile="me"),
            )
        )
    assert fsspec.config.conf.get("s3", {}).get("anon") is None
