"""How much of the paid time trains: checkpoint interval by Young and Daly, and a simulation of what goes wrong.

Young 1974 (first order) and Daly 2006 (higher order, and the expected wall time with exponential failures). The
simulation (simpy) adds what the formula has no place for: stragglers, spot preemption with notice, elastic resizing.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import simpy

from medim_ray.plan.clusters import Cluster
from medim_ray.plan.constants import assumption
from medim_ray.plan.workload import Workload

DAY_S = 86_400.0
# Losses and slow nodes after which a simulation ends although its run has not: too little is done.
_MOST_EVENTS = 20_000


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What can happen to a run of `num_nodes` nodes. Seconds; rates a second and node.

    save_s: the run stops for a checkpoint. restart_s: failure to next step. notice_s: warning before a preemption.
    replacement_s: mean time until a lost node is replaced. elastic: go on meanwhile with the nodes that are left.
    """

    num_nodes: int
    failure_rate: float
    save_s: float
    restart_s: float
    preemption_rate: float = 0.0
    notice_s: float = 120.0
    replacement_s: float = 600.0
    elastic: bool = True
    straggler_rate: float = 0.0
    straggler_slowdown: float = 1.0
    straggler_s: float = 1800.0

    @property
    def mtbf_s(self) -> float:
        """Mean time between losses of any node, failures and preemptions together."""
        rate = self.num_nodes * (self.failure_rate + self.preemption_rate)
        return 1.0 / rate if rate else math.inf


@dataclass(kw_only=True)
class Outcome:
    """Seconds of a simulated run by what they went to; work: the same run on a perfect cluster without checkpoints, as
    far as it came."""

    work: float
    wall: float = 0.0
    saving: float = 0.0
    lost: float = 0.0
    restarting: float = 0.0
    waiting: float = 0.0
    num_losses: int = 0
    num_resizes: int = 0

    @property
    def goodput(self) -> float:
        """Productive time over wall time."""
        return self.work / self.wall

    @property
    def slow(self) -> float:
        """Seconds lost to fewer nodes and to stragglers."""
        return max(0.0, self.wall - self.work - self.saving - self.lost - self.restarting - self.waiting)


def faults_of(cluster: Cluster, work: Workload, num_gpus: int) -> Faults:
    """The faults of a run on `num_gpus` devices of this cluster."""
    c = cluster.config
    nodes = cluster.num_nodes_of(num_gpus)
    per_node = num_gpus / nodes
    return Faults(
        num_nodes=nodes,
        failure_rate=per_node / (cluster.mtbf_gpu_hours * 3600.0),
        save_s=c.save_s if c.save_s is not None else save_s(work, num_gpus),
        restart_s=c.restart_s if c.restart_s is not None else assumption("restart_s"),
        preemption_rate=c.preemptions_per_node_day / DAY_S,
        notice_s=assumption("preemption_notice_s"),
        replacement_s=assumption("replacement_s"),
        elastic=c.elastic and nodes > 1,
        straggler_rate=c.stragglers_per_node_day / DAY_S,
        straggler_slowdown=c.straggler_slowdown,
        straggler_s=c.straggler_s,
    )


def checkpoint_bytes(work: Workload) -> float:
    """Float32 parameters, both moments and the teacher."""
    return 12.0 * work.num_trained + 4.0 * work.num_frozen


def save_s(work: Workload, num_gpus: int) -> float:
    """Seconds that training stops for a checkpoint; every worker writes its own shard."""
    return checkpoint_bytes(work) / num_gpus / assumption("save_bytes_per_s")


def young_s(mtbf_s: float, save: float) -> float:
    """Young's interval between checkpoints: sqrt(2 * save * MTBF)."""
    return math.sqrt(2.0 * save * mtbf_s)


def daly_s(mtbf_s: float, save: float) -> float:
    """Daly's interval: Young's with the next two terms, and the MTBF itself where saving takes that long."""
    if save >= 2.0 * mtbf_s:
        return mtbf_s
    if math.isinf(mtbf_s):
        return math.inf
    ratio = save / (2.0 * mtbf_s)
    return young_s(mtbf_s, save) * (1.0 + math.sqrt(ratio) / 3.0 + ratio / 9.0) - save


def daly_goodput(interval: float, mtbf_s: float, save: float, restart: float) -> float:
    """Productive over wall time with exponential failures, checkpoints `interval` seconds apart (Daly)."""
    if math.isinf(mtbf_s):
        return interval / (interval + save) if math.isfinite(interval) else 1.0
    exponent = (interval + save) / mtbf_s
    if exponent + restart / mtbf_s > 600.0:
        return 0.0
    return interval / (mtbf_s * math.exp(restart / mtbf_s) * math.expm1(exponent))


def simulate(
    faults: Faults, work_s: float, interval_s: float, seed: int = 0, most_events: int = _MOST_EVENTS
) -> Outcome:
    """`work_s` seconds of work, a checkpoint after each `interval_s` of it, under `faults`; one seeded run. After
    `most_events` losses and slow nodes it ends where it is."""
    run = _Run(faults, Outcome(work=work_s), min(interval_s, work_s), np.random.default_rng(seed), most_events)
    environment = simpy.Environment()
    run.start(environment)
    environment.run(until=run.process | run.hopeless)
    run.outcome.wall = environment.now
    if run.process.is_alive:
        # Work since the last checkpoint counts where nothing can take it away.
        run.outcome.work = run.saved + (0.0 if run.outcome.num_losses else run.done)
    return run.outcome


@dataclass
class _Run:
    """The training job and what happens to it, as simpy processes on one clock."""

    faults: Faults
    outcome: Outcome
    interval: float
    rng: np.random.Generator
    most_events: int
    num_alive: int = 0
    num_slow: int = 0
    saved: float = 0.0  # work behind the last checkpoint
    done: float = 0.0  # work since
    saving: float = 0.0  # seconds of the checkpoint that is being written
    process: Any = None
    hopeless: Any = None
    num_events: int = 0
    _pending: list[str] = field(default_factory=list)

    def start(self, env: simpy.Environment) -> None:
        self.num_alive = self.faults.num_nodes
        self.process = env.process(self._train(env))
        self.hopeless = env.event()
        for cause, rate in (("failure", self.faults.failure_rate), ("preemption", self.faults.preemption_rate)):
            if rate:
                env.process(self._losses(env, cause, rate))
        if self.faults.straggler_rate and self.faults.straggler_slowdown > 1.0:
            env.process(self._stragglers(env))

    @property
    def speed(self) -> float:
        """Work done a second of wall time: fewer nodes are slower, and one slow node slows all."""
        share = self.num_alive / self.faults.num_nodes
        return share / (self.faults.straggler_slowdown if self.num_slow else 1.0)

    def _train(self, env: simpy.Environment) -> Generator[simpy.Event, Any, None]:
        while self.saved + self.done < self.outcome.work:
            causes = yield from self._work(env)
            while causes:
                causes = yield from self._recover(env, causes)

    def _work(self, env: simpy.Environment) -> Generator[simpy.Event, Any, list[str]]:
        """Work and checkpoints until the end or a loss; returns what ended it early, [] at the end of the work.

        One event for the whole stretch: `_advance` says what was done when it is interrupted.
        """
        while True:
            started, speed = env.now, self.speed
            num_saves = math.ceil((self.outcome.work - self.saved) / self.interval - 1e-9) - 1
            left = (self.outcome.work - self.saved - self.done) / speed + num_saves * self.faults.save_s - self.saving
            try:
                yield env.timeout(max(left, 0.0))
            except simpy.Interrupt as interrupt:
                self._advance(env.now - started, speed)
                if interrupt.cause == "speed":
                    continue
                warned = interrupt.cause == "preemption" and self.faults.notice_s >= self.faults.save_s
                if warned or interrupt.cause == "join":
                    # A last checkpoint before the node goes, or before the job restarts with one node more.
                    self.outcome.saving += self.faults.save_s
                    yield from self._undisturbed(env, self.faults.save_s)
                    self.saved += self.done
                else:
                    self.outcome.lost += self.done / speed
                self.done = self.saving = 0.0
                return [str(interrupt.cause), *self._drain()]
            self.outcome.saving += num_saves * self.faults.save_s - self.saving
            self.saved, self.done = self.outcome.work, 0.0
            return []

    def _advance(self, elapsed: float, speed: float) -> None:
        """What `elapsed` seconds at `speed` add to the state: whole cycles of work and checkpoint, and a rest."""
        save = self.faults.save_s
        first = (self.interval - self.done) / speed + save - self.saving
        if elapsed >= first:
            elapsed -= first
            cycle = self.interval / speed + save
            more = int(elapsed / cycle)
            self.outcome.saving += (1 + more) * save - self.saving
            self.saved += (1 + more) * self.interval
            self.done = self.saving = 0.0
            elapsed -= more * cycle
        working = min(elapsed, (self.interval - self.done) / speed)
        self.done += working * speed
        self.saving += elapsed - working
        self.outcome.saving += elapsed - working

    def _recover(self, env: simpy.Environment, causes: list[str]) -> Generator[simpy.Event, Any, list[str]]:
        """Account for lost and returned nodes, wait where the run is not elastic, restart. Returns what broke that."""
        self._account(env, causes)
        needed = 1 if self.faults.elastic else self.faults.num_nodes
        while self.num_alive < needed:
            started = env.now
            yield from self._undisturbed(env, self.faults.replacement_s / 10.0)
            self.outcome.waiting += env.now - started
            self._account(env, self._drain())
        end = env.now + self.faults.restart_s
        while env.now < end:
            started = env.now
            try:
                yield env.timeout(end - env.now)
            except simpy.Interrupt as interrupt:
                if interrupt.cause != "speed":
                    return [str(interrupt.cause), *self._drain()]
            finally:
                self.outcome.restarting += env.now - started
        return self._drain()

    def _account(self, env: simpy.Environment, causes: list[str]) -> None:
        for cause in causes:
            if cause == "join":
                self.outcome.num_resizes += 1
                self.num_alive += 1
            elif self.num_alive:  # no node, nothing to lose
                self.outcome.num_losses += 1
                self.num_alive -= 1
                env.process(self._replacement(env))

    def _undisturbed(self, env: simpy.Environment, seconds: float) -> Generator[simpy.Event, Any, None]:
        """Wait; what happens meanwhile is kept for later."""
        end = env.now + seconds
        while env.now < end:
            try:
                yield env.timeout(end - env.now)
            except simpy.Interrupt as interrupt:
                if interrupt.cause != "speed":
                    self._pending.append(str(interrupt.cause))

    def _drain(self) -> list[str]:
        causes, self._pending = self._pending, []
        return causes

    def _tell(self, cause: str) -> None:
        self.num_events += 1
        if self.num_events == self.most_events:
            self.hopeless.succeed()
        if self.process.is_alive:
            self.process.interrupt(cause)

    def _losses(self, env: simpy.Environment, cause: str, rate: float) -> Generator[simpy.Event, Any, None]:
        while True:
            yield env.timeout(self.rng.exponential(1.0 / (rate * max(self.num_alive, 1))))
            self._tell(cause)

    def _replacement(self, env: simpy.Environment) -> Generator[simpy.Event, Any, None]:
        yield env.timeout(self.rng.exponential(self.faults.replacement_s))
        self._tell("join")

    def _stragglers(self, env: simpy.Environment) -> Generator[simpy.Event, Any, None]:
        while True:
            yield env.timeout(self.rng.exponential(1.0 / (self.faults.straggler_rate * self.faults.num_nodes)))
            env.process(self._slow_node(env))

    def _slow_node(self, env: simpy.Environment) -> Generator[simpy.Event, Any, None]:
        self.num_slow += 1
        self._tell("speed")
        yield env.timeout(self.rng.exponential(self.faults.straggler_s))
        self.num_slow -= 1
        self._tell("speed")
