"""Saves behind the training: the state of their step, bounded, committed by all ranks or not at all."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessException

from medim_ray.train import checkpoint
from medim_ray.train.saver import Saver
from medim_ray.train.store import CheckpointStore
from tests.unit.train.ranks import on_ranks
from tests.unit.train.test_checkpoint import build, step, tensors

SLOW_S = 0.6


class SlowStore(CheckpointStore):
    """A storage that takes SLOW_S for a file."""

    def write(self, name: str, file: str, chunks: Callable[[], Iterable[memoryview]]) -> dict[str, Any]:
        time.sleep(SLOW_S)
        return super().write(name, file, chunks)


def no_files_above(num_bytes: int) -> None:
    """The kernel refuses what this process writes beyond that (EFBIG)."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


def save_slowly(folder: str) -> None:
    """Two ranks at ZeRO 1: saves of the steps 1, 2 and 3 while the weights move on."""
    words: list[str] = []
    engine = build(2, 1)
    saver = Saver(SlowStore(f"{folder}/slow"), 0, {}, told=words.append)
    took = []
    for number in range(3):
        step(engine, number)
        began = time.monotonic()
        saver.save(engine, number + 1)
        took.append(time.monotonic() - began)
    names = CheckpointStore(f"{folder}/slow").names()
    saver.finish()
    if dist.get_rank() == 0:
        Path(folder, "slow.json").write_text(json.dumps({"took": took, "names": names}))

    straight = build(2, 1)
    for number in range(3):
        step(straight, number)
        at_once = Saver(CheckpointStore(f"{folder}/at-once-{number + 1}"), 0, {})
        at_once.save(straight, number + 1)
        at_once.finish()


def save_where_one_rank_cannot(folder: str) -> None:
    """Rank 1 can't write its file in the save of step 2; nor in the last one."""
    engine, words = build(2, 1), list[str]()
    store = CheckpointStore(f"{folder}/failing")
    saver = Saver(store, 0, {}, told=words.append)
    for number in range(4):
        step(engine, number)
        if dist.get_rank() == 1:
            no_files_above(100 if number in (1, 3) else resource.RLIM_INFINITY)
        saver.save(engine, number + 1)
        saver.settle(60)
        if dist.get_rank() == 0:
            Path(folder, f"names-{number + 1}").write_text(json.dumps(store.names()))
        dist.barrier()
    with pytest.raises(RuntimeError, match=r"the last checkpoint could not be written: rank 1: .*File too large"):
        saver.finish()
    no_files_above(resource.RLIM_INFINITY)
    Path(folder, f"words-{dist.get_rank()}").write_text(json.dumps(words))


def both(folder: str) -> None:
    save_slowly(folder)
    save_where_one_rank_cannot(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saver")
    on_ranks(2, both, str(folder))
    return folder


def test_a_save_holds_the_state_of_its_step_and_the_step_does_not_wait_for_the_storage(saved: Path) -> None:
    told = json.loads((saved / "slow.json").read_text())
    assert told["took"][0] < SLOW_S / 2, "the first save has nothing to wait for"
    assert min(told["took"][1:]) > SLOW_S / 2, "train.max_pending_saves=1 was passed"
    assert told["names"] == ["step-00000002-0", "step-00000001-0"], "the third one has begun before its turn"
    store = CheckpointStore(str(saved / "slow"))
    for name in store.names():
        assert store.problem(name) is None
        one = store.open(name)
        with store.local_files(name) as local:
            ours = checkpoint.SavedTensors(one.manifest["files"], local)
            theirs = tensors(str(saved / f"at-once-{one.step}"))
            for key, value in theirs.items():
                tensor, kind = key.split("|")
                assert torch.equal(ours.read(tensor, kind, 0, value.numel()), value), f"{key} of {name}"


def test_a_save_that_one_rank_cannot_write_is_told_and_leaves_nothing(saved: Path) -> None:
    names = [json.loads((saved / f"names-{step}").read_text()) for step in (1, 2, 3, 4)]
    assert names[0] == names[1] == ["step-00000001-0"], "an unfinished folder is left"
    assert names[2] == names[3] == ["step-00000003-0", "step-00000001-0"], "the next save did not try on"
    for rank in (0, 1):
        first, second = json.loads((saved / f"words-{rank}").read_text())
        assert first.startswith("checkpoint step-00000002-0 was not committed: rank 1: ") and "File too large" in first
        assert "step-00000004-0" in second


def die_in_the_save(folder: str) -> None:
    """Rank 1 is killed when its second file is half written."""

    class Deadly(CheckpointStore):
        def write(self, name: str, file: str, chunks: Callable[[], Iterable[memoryview]]) -> dict[str, Any]:
            def pieces() -> Iterable[memoryview]:
                for piece in chunks():
                    yield piece
                    if dist.get_rank() == 1 and "step-00000002" in name:
                        os.kill(os.getpid(), signal.SIGKILL)

            return super().write(name, file, pieces)

    engine = build(2, 1)
    saver = Saver(Deadly(folder), 0, {})
    for number in range(2):
        step(engine, number)
        saver.save(engine, number + 1)
    saver.finish()


def go_on(folder: str) -> None:
    engine, said = build(1, 1), list[str]()
    store = CheckpointStore(folder)
    newest = store.newest(said.append)
    assert newest is not None and newest.step == 1
    assert said == ["checkpoint step-00000002-0 is passed over: it was never committed (no manifest)"]
    checkpoint.restore(store, newest, engine)
    step(engine, 1)
    saver = Saver(store, store.next_attempt(), {}, committed=lambda name: store.prune(2, name))
    saver.save(engine, 2)
    saver.finish()
    assert store.names() == ["step-00000002-1", "step-00000001-0"]


def test_after_a_kill_in_the_save_the_run_goes_on_before_it_and_sweeps_what_is_left(tmp_path: Path) -> None:
    with pytest.raises(ProcessException):
        on_ranks(2, die_in_the_save, str(tmp_path))
    left = {path.parent.name for path in (tmp_path / "checkpoints").glob("*/*.tmp")}
    assert left == {"step-00000002-0"}, "the kill did not come in the middle of a file"
    on_ranks(1, go_on, str(tmp_path))
