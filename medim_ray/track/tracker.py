"""One actor that shows a run: it keeps the newest record for the progress line and writes Aim; it never blocks.

The training loop does not import aim and does not wait for this actor: rank 0 sends records and forgets them; where the
actor falls behind, records are dropped here and counted. metrics.jsonl stays complete.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from medim_ray.track.aim_run import open_aim_run

_LOG = logging.getLogger(__name__)
VALIDATION = "validation/"  # names of numbers of an earlier checkpoint in a record of metrics.jsonl
_MAX_PENDING = 256  # records: Aim takes some seconds to open, and steps may be short
_MAX_WORDS = 100  # different warnings that are kept for the screen


class Tracker:
    """The actor. A resumed run goes on in the same Aim run.

    Aim is opened for the first record: it takes seconds of a processor, which workers that start need more.
    """

    def __init__(self, aim_repo: str, run_dir: str, params: dict[str, Any]) -> None:
        self._waiting = (aim_repo, run_dir, params) if aim_repo else None
        self._latest: dict[str, Any] | None = None
        self._dropped = 0
        self._startup: dict[str, float] = {}
        self._told: dict[str, int] = {}
        self._run: Any = None
        self._last_step = -1
        self._wish = ""
        self._news: dict[str, Any] = {}

    def _ready(self) -> bool:
        """Is there an Aim run to write to? Opens it at the first call."""
        if self._waiting is not None:
            repo, run_dir, params = self._waiting
            self._waiting = None
            try:
                self._open(repo, run_dir, params)
            except Exception as error:  # Aim is a view: whatever fails in it must not end a run
                _LOG.warning("Aim repository %s can't be used, metrics.jsonl is still written: %s", repo, error)
        return self._run is not None

    def _open(self, aim_repo: str, run_dir: str, params: dict[str, Any]) -> None:
        self._run = open_aim_run(aim_repo, run_dir)
        self._run["config"] = params
        self._last_step = self._run.get("last_step", -1)  # steps that are done again are not shown twice

    def log(self, record: dict[str, Any], dropped: int) -> tuple[str, dict[str, Any]]:
        """A record of metrics.jsonl, and how many the sender has dropped so far; what the workers are asked for (see
        `ask`), and what was validated since the last call."""
        self._startup = record.get("startup_s", self._startup)
        for words in record.get("warnings", []):
            if len(self._told) < _MAX_WORDS:
                self._told.setdefault(words, record["step"])
        self._latest, self._dropped = record, dropped
        if self._ready() and record["step"] > self._last_step:
            with contextlib.suppress(Exception):  # Aim is a view, and the answer below is not
                self._track(record)
        news, self._news = self._news, {}
        return self._wish, news

    def validated(self, step: int, numbers: dict[str, float]) -> None:
        """Numbers of the checkpoint after `step` steps: to Aim, and on to the next record of metrics.jsonl."""
        named = {f"{VALIDATION}{name}": value for name, value in numbers.items()}
        self._news = {f"{VALIDATION}step": step, **named}
        if self._ready():
            for name, value in named.items():
                with contextlib.suppress(Exception):
                    self._run.track(value, name=name, step=step)

    def _track(self, record: dict[str, Any]) -> None:
        self._last_step = self._run["last_step"] = record["step"]
        for name, value in record.items():
            shown = name not in ("step", "epoch", "ended_at") and not name.startswith(VALIDATION)
            if isinstance(value, int | float) and shown:
                with contextlib.suppress(Exception):
                    self._run.track(value, name=name, step=record["step"], epoch=record["epoch"])

    def ask(self, wish: str) -> None:
        """The workers are to commit a checkpoint and end (train/control.py knows the reasons): the answers to `log`
        say so from now on."""
        self._wish = wish

    def begin(self) -> None:
        """A new group of workers starts: nothing is asked of it, and it has logged nothing."""
        self._wish, self._latest = "", None

    def latest(self) -> dict[str, Any] | None:
        """The newest record of this group of workers, for the progress line, with what its start took; `told`: what any
        record warned of so far, with the first step of each."""
        known = {"startup_s": self._startup, "told": self._told}
        return None if self._latest is None else self._latest | known

    def close(self) -> int:
        """Flushes Aim; the number of dropped records."""
        if self._run is not None:
            with contextlib.suppress(Exception):
                self._run.close()
        return self._dropped


def start_tracker(aim_repo: str, run_dir: str, params: dict[str, Any]) -> Any:
    """A handle of a new Tracker actor on this node; it is restarted if it dies."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor = ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=here)(Tracker)
    return actor.remote(aim_repo, run_dir, params)


class TrackerClient:
    """Rank 0's side: sends without waiting, drops where more than `_MAX_PENDING` records are under way."""

    def __init__(self, tracker: Any) -> None:
        self._tracker = tracker
        self._pending: list[Any] = []
        self.dropped = 0  # records so far
        self._wish = ""
        self._news: dict[str, Any] = {}

    def wish(self) -> str:
        """What the newest answer asked the workers for, "" where nothing."""
        self._hear()
        return self._wish

    def news(self) -> dict[str, Any]:
        """What was validated since the last call, for the record of this step."""
        news, self._news = self._news, {}
        return news

    def log(self, record: dict[str, Any]) -> None:
        """Fire and forget."""
        self._hear()
        if len(self._pending) >= _MAX_PENDING:
            self.dropped += 1
            return
        self._pending.append(self._tracker.log.remote(record, self.dropped))

    def _hear(self) -> None:
        """Takes the answers that are there."""
        if not self._pending:
            return
        answered, self._pending = ray.wait(self._pending, num_returns=len(self._pending), timeout=0)
        for answer in answered:
            with contextlib.suppress(ray.exceptions.RayError):  # the actor is a view: it may die and be started again
                wish, news = ray.get(answer)
                self._wish, self._news = wish, self._news | news
