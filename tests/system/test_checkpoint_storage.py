"""Saves of one rank against real storage that fails: an S3 server (moto) behind a faulty proxy, a disk that is full."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import s3fs
import torch
import torch.distributed as dist
from torch import nn

from medim_ray.train.checkpoint import load_weights
from medim_ray.train.saver import Saver
from medim_ray.train.store import CheckpointStore
from medim_ray.train.zero import MOMENTS
from tests.system.faulty_proxy import FaultyProxy, faulty_lake

pytestmark = pytest.mark.system
UNAVAILABLE = (503, "SlowDown", "Reduce your request rate.")
FULL = (400, "QuotaExceeded", "The bucket is full")


@pytest.fixture(scope="module")
def proxy() -> Iterator[FaultyProxy]:
    with faulty_lake() as faulty:
        yield faulty


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    meeting = tmp_path_factory.mktemp("ranks") / "meeting"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def engine_of(num_columns: int = 50) -> Any:
    """What DeepSpeed's engine is to a checkpoint at ZeRO 0: a module and torch's AdamW, after a step."""
    module = nn.Linear(num_columns, 1000)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, num_columns)).sum().backward()
    optimizer.step()
    assert all(kind in optimizer.state[module.weight] for kind in MOMENTS)
    no_scale = {"torch_autocast_z0_gradscaler": None, "fp16_enabled": lambda: False}
    return SimpleNamespace(module=module, optimizer=optimizer, **no_scale)


def saver_of(store: CheckpointStore, words: list[str]) -> Saver:
    return Saver(store, store.next_attempt(), {}, committed=lambda name: store.prune(2, name), told=words.append)


@pytest.mark.parametrize("outage_s", [2.0, pytest.param(60.0, marks=pytest.mark.chaos)])
def test_an_outage_in_the_save_is_sat_out(proxy: FaultyProxy, outage_s: float) -> None:
    store, words = CheckpointStore(f"s3://lake/outage-{outage_s:g}", patience_s=120.0), list[str]()
    saver, engine = saver_of(store, words), engine_of()
    until = time.monotonic() + outage_s
    proxy.judge, before = (lambda *request: UNAVAILABLE if time.monotonic() < until else None), proxy.seen["503"]
    began = time.monotonic()
    saver.save(engine, 1)
    assert time.monotonic() - began < 1, "the step waited for the storage"
    saver.finish()
    assert time.monotonic() > until and proxy.seen["503"] - before >= 2 and words == []
    assert store.problem("step-00000001-0") is None
    proxy.judge = lambda *request: UNAVAILABLE if "manifest" in request[2] and time.monotonic() < until + 2 else None
    newest = store.newest(words.append)
    assert newest is not None and newest.step == 1 and words == [], "an outage was taken for damage"
    proxy.judge = lambda *request: None


def test_a_save_that_the_storage_refuses_does_not_count_and_the_next_one_tries_on(proxy: FaultyProxy) -> None:
    store, words = CheckpointStore("s3://lake/refused", patience_s=5.0), list[str]()
    saver, engine = saver_of(store, words), engine_of()
    saver.save(engine, 1)
    saver.settle(60)
    # The file is taken and the manifest is not: what is there must not count.
    proxy.judge = lambda number, method, path: FULL if method == "PUT" and "manifest" in path else None
    saver.save(engine, 2)
    saver.settle(60)
    proxy.judge = lambda *request: None
    assert [w for w in words if w.startswith("checkpoint step-00000002-0 was not committed")], words
    assert "bucket is full" in words[0]
    newest = store.newest()
    assert newest is not None and newest.step == 1
    saver.save(engine, 3)
    saver.finish()
    assert store.names() == ["step-00000003-0", "step-00000001-0"], "what was refused is left behind"


def test_damage_on_the_storage_is_passed_over_with_the_reason(proxy: FaultyProxy) -> None:
    store, said = CheckpointStore("s3://lake/damaged"), list[str]()
    saver, engine, fs = saver_of(store, []), engine_of(), s3fs.S3FileSystem()
    saver._committed = lambda name: None  # keeps all three
    for step in (1, 2, 3):
        saver.save(engine, step)
        saver.finish()
    newest, before, _ = (f"{store.root}/{name}/rank-00000.safetensors" for name in store.names())
    data = bytearray(fs.cat_file(newest))
    data[len(data) // 2] ^= 1
    fs.pipe_file(newest, bytes(data))
    fs.rm_file(before)
    found = store.newest(said.append)
    assert found is not None and found.step == 1
    assert said == [
        "checkpoint step-00000003-0 is passed over: rank-00000.safetensors differs from its checksum",
        "checkpoint step-00000002-0 is passed over: rank-00000.safetensors is missing",
    ]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no disk of a given size can be mounted here (needs root)")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_full_disk_is_told_and_the_next_save_with_room_counts(small_disk: Path) -> None:
    store, words = CheckpointStore(str(small_disk)), list[str]()
    saver, engine = saver_of(store, words), engine_of()  # 612 kB a checkpoint
    saver.save(engine, 1)
    saver.settle(30)
    saver.save(engine, 2)
    saver.settle(30)
    assert "step-00000002-0 was not committed: rank 0: " in words[0] and "No space left on device" in words[0]
    assert store.names() == ["step-00000001-0"], "half a checkpoint is left on the full disk"
    newest = store.newest()
    assert newest is not None and newest.step == 1
    with pytest.raises(RuntimeError, match=r"the last checkpoint could not be written: .*No space left"):
        saver.finish()
    store.remove("step-00000001-0")
    saver.save(engine, 3)
    saver.finish()
    assert store.names() == ["step-00000003-0"]


def test_the_copy_is_made_in_the_step(tmp_path: Path) -> None:
    store, engine, gate = CheckpointStore(str(tmp_path)), engine_of(), threading.Event()
    expected = engine.module.weight.detach().clone()
    saver = Saver(store, 0, {}, before=lambda: assert_open(gate))
    saver.save(engine, 1)
    with torch.no_grad():
        engine.module.weight.zero_()
    assert store.names() == []
    gate.set()
    saver.finish()
    assert torch.equal(load_weights(store, store.open("step-00000001-0"))["weight"], expected)


def assert_open(gate: threading.Event) -> None:
    assert gate.wait(30)
