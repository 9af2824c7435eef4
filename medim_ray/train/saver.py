"""Checkpoints behind the training: a step copies the state, a thread of each rank writes and commits it.

The threads agree by collectives of a process group of their own, in the order of the saves. What can't be written is
told and leaves nothing that counts; the next save tries on, and the last one must succeed. Files: checkpoint.py.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from medim_ray.train.checkpoint import State, copy_state, write_state
from medim_ray.train.store import CheckpointStore, checkpoint_name


class Saver:
    """Collective: made, called and finished by all ranks alike.

    attempt: number of this group of workers (store.checkpoint_name); facts: for the manifest; max_pending: saves that
    may be under way, one more waits within its step; before, committed: called in the thread, on every rank, ahead of
    a save and after its commit; told: gets what a save took or why it failed, in words.
    """

    def __init__(
        self,
        store: CheckpointStore,
        attempt: int,
        facts: dict[str, Any],
        *,
        max_pending: int = 1,
        before: Callable[[], None] = lambda: None,
        committed: Callable[[str], None] = lambda name: None,
        told: Callable[[str], None] = lambda words: None,
    ) -> None:
        self._store, self._attempt, self._facts = store, attempt, facts
        self._before, self._committed, self._told = before, committed, told
        self._group = dist.new_group(backend="gloo")  # CPU tensors, whatever the training uses
        self._room = threading.Semaphore(max_pending)
        self._jobs: queue.Queue[State] = queue.Queue()
        self._spare: queue.SimpleQueue[dict[str, Tensor]] = queue.SimpleQueue()  # of states that are written
        self._failed = ""  # why the newest save that ended did not commit
        self._broken: BaseException | None = None
        threading.Thread(target=self._work, name="saver", daemon=True).start()

    def save(self, engine: Any, step: int) -> None:
        """Copies the state after `step` optimizer steps and returns; waits before where `max_pending` are under way."""
        if self._broken is not None:  # training alone would go on for hours without a checkpoint
            raise RuntimeError("the ranks lost one another while they saved") from self._broken
        began = time.monotonic()
        self._room.acquire()
        waited = time.monotonic() - began
        if waited > 1:
            self._told(
                f"the save of step {step} waited {waited:.0f} s for the one before: the storage is slower than "
                "train.checkpoint_every asks for"
            )
        spare = {} if self._spare.empty() else self._spare.get()
        self._jobs.put(copy_state(engine, step, spare))

    def wait(self) -> str:
        """Until nothing is under way. Why the newest save is not committed, "" where it is or none was asked for."""
        self._jobs.join()
        if self._broken is not None:
            raise RuntimeError("the ranks lost one another while they saved") from self._broken
        return self._failed

    def settle(self, seconds: float) -> None:
        """Waits as `wait` does, not for longer than that, and whatever became of the saves."""
        until = time.monotonic() + seconds
        while self._jobs.unfinished_tasks and time.monotonic() < until:
            time.sleep(0.02)

    def finish(self) -> None:
        """The end of a run: RuntimeError where its last state is not committed."""
        if problem := self.wait():
            raise RuntimeError(f"the last checkpoint could not be written: {problem}")

    def _work(self) -> None:
        while True:
            state = self._jobs.get()
            try:
                if self._broken is None:
                    self._write(state)
            except Exception as error:  # a rank is gone: the training hears of it in its own collectives
                self._broken = error
            finally:
                self._spare.put(state.tensors)
                self._room.release()
                self._jobs.task_done()

    def _write(self, state: State) -> None:
        name = checkpoint_name(state.step, self._attempt)
        self._failed = write_state(self._store, name, state, self._facts, self._before, self._group)
        if self._failed:
            self._told(f"checkpoint {name} was not committed: {self._failed}; the run goes on, the next save tries on")
            return
        try:
            self._committed(name)
        except Exception as error:  # it is committed: what follows must not undo that
            self._told(f"after checkpoint {name}: {type(error).__name__}: {error}")
