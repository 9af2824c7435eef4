"""What follows when the workers of a run end: done, once more, or an error; a budget for each kind of failure.

Ray Train starts a group of workers an attempt (launch.py); that the next one goes on exactly is the checkpoints' part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import ray.exceptions
from ray.train import PreemptionError, TrainingFailedError

from medim_ray.config.schema import TrainConfig
from medim_ray.train.control import Outcome

_MOST_REWINDS = 8  # to one checkpoint, each for another bad step
Kind = Literal["preemption", "loss", "error", "numbers", "data", "growth"]


@dataclass(frozen=True)
class Failure:
    """Why an attempt ended early; growth is no fault. rank: of the worker that is to blame, where one is; details: its
    traceback."""

    kind: Kind
    rank: int | None
    message: str
    details: str = field(default="", compare=False)

    def __str__(self) -> str:
        who = "" if self.rank is None else f"worker {self.rank}: "
        return f"{who}{self.message}"


def of_outcome(outcome: Outcome) -> Failure | None:
    """The failure that the workers told of themselves, None where they ended as they should."""
    kinds: dict[str, Kind] = {
        "preempted": "preemption",
        "resized": "growth",
        "bad_step": "numbers",
        "broken_rows": "data",
    }
    kind = kinds.get(outcome.kind)
    return None if kind is None else Failure(kind, None, outcome.message)


def of_error(error: TrainingFailedError) -> Failure:
    """The failure behind Ray Train's exception.

    Where one worker is lost the others fail in their collectives, so a loss is told before an exception.
    """
    if isinstance(error, PreemptionError):
        return Failure("preemption", None, f"{len(error.preemption_info.preempted_node_ids)} nodes go away")
    worker_failures: Mapping[int, Exception] = getattr(error, "worker_failures", {})
    for rank, one in sorted(worker_failures.items()):
        inner = getattr(one, "health_check_failure", one)
        if isinstance(inner, ray.exceptions.RayActorError) and inner.preempted:
            return Failure("preemption", rank, "its node was taken away")
    for one in (*worker_failures.values(), error):
        for line in str(one).splitlines():
            _, name, message = line.partition("ShardFaultError: ")  # raised in a decoding actor, told as text by Ray
            if name:
                return Failure("data", None, message.strip())
    for rank, one in sorted(worker_failures.items()):
        inner = getattr(one, "health_check_failure", one)
        if isinstance(inner, ray.exceptions.RayActorError):
            return Failure("loss", rank, "its process or node is gone")
        if "HealthCheck" in type(one).__name__:
            return Failure("loss", rank, f"it hangs: {_headline(one)}")
    for rank, one in sorted(worker_failures.items()):
        return Failure("error", rank, _headline(one), str(one).strip())
    return Failure("error", None, _headline(error), str(error).strip())


def _headline(error: Exception) -> str:
    """The line that names the exception: the first one after the last frame of a traceback, else the last line."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    frames = [i for i, line in enumerate(lines) if line.lstrip().startswith('File "')]
    after = [line for line in lines[frames[-1] + 1 :] if line and not line[0].isspace()] if frames else []
    return (after or lines[-1:])[0].strip()


@dataclass
class Budgets:
    """Counts failures and says when it is enough. The budgets are those of TrainConfig; -1: no bound."""

    train: TrainConfig
    _spent: dict[Kind, int] = field(default_factory=dict)
    _error_step: int = -1
    _gone_back: dict[int, int] = field(default_factory=dict)

    def exhausted_by(self, failure: Failure, step: int) -> str | None:
        """Counts `failure` after `step` committed steps; why the run ends now, or None: once more."""
        if failure.kind == "error" and step != self._error_step:
            # Progress was made since the last one: it is not the same step that fails.
            self._error_step, self._spent["error"] = step, 0
        self._spent[failure.kind] = spent = self._spent.get(failure.kind, 0) + 1
        if failure.kind == "numbers":
            if self.train.on_bad_step == "stop":
                return "train.on_bad_step=stop"
            # A step that is left out can't fail again; but where each one after it does, the checkpoint is to blame.
            self._gone_back[step] = num = self._gone_back.get(step, 0) + 1
            return None if num < _MOST_REWINDS else f"the run went back to step {step} {num} times: it has diverged"
        if failure.kind == "data":
            return "trying again would meet the same shards"
        if failure.kind == "growth":
            return None
        if failure.kind == "error":
            enough = spent >= self.train.max_errors
            return f"the same step failed {spent} times (train.max_errors)" if enough else None
        option = {"preemption": "max_preemptions", "loss": "max_failures"}[failure.kind]
        bound: int = getattr(self.train, option)
        return f"train.{option}={bound} is spent" if 0 <= bound < spent else None
