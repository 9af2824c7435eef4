"""The train loop: read this first. A step is a function of plan and state; everything else hangs behind five calls.

Objectives, masks and ZeRO stages are not known here. worker.py builds the pieces, launch.py starts the workers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from medim_ray.config.schema import TrainConfig
from medim_ray.data.collate import Columns, micro_batches, to_batch
from medim_ray.data.reader import IMAGE_ID
from medim_ray.data.transforms import View
from medim_ray.draws import name_key, step_draws
from medim_ray.schedules import Schedule
from medim_ray.train.before import BeforeStep, Look
from medim_ray.train.control import Outcome, RunControl
from medim_ray.train.feed import BrokenRows, feed_record, feed_sums
from medim_ray.train.health import NumberGuard
from medim_ray.train.loss_scale import engine_numbers
from medim_ray.train.metrics import peak_bytes, reduce_logs


class Recorder(Protocol):
    """Where the numbers of a step go."""

    def log(self, record: dict[str, Any]) -> None: ...


class Checkpoints(Protocol):
    """Saves the state after a number of steps; collective over the ranks."""

    def save(self, step: int) -> None: ...


@dataclass(kw_only=True)
class Trainer:
    """One rank's pieces. `steps` yields this rank's columns of the steps first_step, first_step + 1, ... in order.

    before_step: looks at the weights that a step begins with, and changes nothing (before.py).
    """

    config: TrainConfig
    seed: int
    engine: Any
    device: torch.device
    views: tuple[View, ...]
    steps: Iterator[Columns]
    lr: Schedule
    weight_decay: Schedule
    guard: NumberGuard
    control: RunControl
    broken: BrokenRows
    recorder: Recorder
    checkpoints: Checkpoints
    before_step: BeforeStep
    first_step: int
    rank: int
    samples_per_epoch: int


def train(run: Trainer) -> Outcome:
    """Steps from `first_step` to the end of the run, to `stop_after`, or to where driver or cluster want it to end; a
    checkpoint is committed at the last one. BadStep where a step has numbers that must not become weights."""
    last = run.config.last_step
    for step in range(run.first_step, last):
        seen, started = run.before_step(step), time.perf_counter()
        columns = next(run.steps)
        waited = time.perf_counter() - started
        logs, sums = train_step(run, step, columns)
        run.recorder.log(record(run, step, seen, logs, sums, time.perf_counter() - started, waited))
        ends = run.control.decide(sums, too_many_broken=run.broken.settle(step, columns, sums))
        if (step + 1) % run.config.checkpoint_every == 0 or step + 1 == last or ends:
            run.checkpoints.save(step + 1)
        if ends and step + 1 < last:
            return Outcome(kind=ends[0], step=step + 1, message=ends[1])
    return Outcome(kind="finished", step=last)


def train_step(run: Trainer, step: int, columns: Columns) -> tuple[dict[str, float], dict[str, float]]:
    """One optimizer step over this rank's share of the global batch; means and sums over all ranks.

    The numbers are reduced and judged before the last backward pass, so that a bad step changes nothing.
    """
    torch.manual_seed(int(step_draws(run.seed, step).integers(f"torch/{run.rank}", 1, 1 << 62)[0, 0]))
    for group in run.engine.optimizer.param_groups:
        group["lr"] = run.lr(step) * group["lr_ratio"] * (step >= group["frozen_steps"])
        group["weight_decay"] = run.weight_decay(step) * group["decay_ratio"]
    sums = {**feed_sums(columns), "samples_key": samples_key(columns)}
    if step in run.guard.omitted:
        return reduce_logs([], {**sums, **run.control.wishes()}, run.device)
    kept = run.guard.state_before(run.engine.module)
    logs: list[dict[str, Tensor]] = []
    parts = list(micro_batches(columns, run.config.local_micro_batch))
    for rows in parts:
        batch = to_batch(rows, run.views, run.device)
        assert batch.step == step, f"the stream is at step {batch.step}, the loop at step {step}"
        output = run.engine(batch)
        logs.append({"loss": output.loss.detach(), **output.logs})
        if len(logs) == len(parts):
            means, sums = reduce_logs(logs, {**sums, **run.control.wishes()}, run.device)
            if not run.guard.passes(step, means, sums["samples_key"], columns):
                run.guard.put_back(run.engine.module, kept)
                return means, sums
        run.engine.backward(output.loss)
        run.engine.step()
    run.engine.module.after_step(step)
    run.guard.check_norm(step, grad_norm(run.engine), sums["samples_key"], columns)
    return means, sums


def grad_norm(engine: Any) -> float | None:
    """The global gradient norm of the last step before clipping; None where the engine has not made a step."""
    norm = engine.get_global_grad_norm()
    return float(norm) if norm is not None else None


def samples_key(columns: Columns) -> float:
    """A number that tells which samples a rank had, whatever their order: the sum of 32 bits of each id's key."""
    return float(sum(name_key(str(image_id)) >> 32 for image_id in columns[IMAGE_ID]))


def record(
    run: Trainer, step: int, seen: Look, logs: dict[str, float], sums: dict[str, float], elapsed: float, waited: float
) -> dict[str, Any]:
    """The line of metrics.jsonl for one step."""
    omitted = run.guard.omitted.get(step)
    words = [*seen.words, *([] if omitted else run.engine.module.warnings(step, logs))]
    return {
        "step": step,
        "epoch": step * run.config.global_batch // run.samples_per_epoch,
        **({"omitted": omitted} if omitted else logs),
        **seen.numbers,
        **({"warnings": words} if words else {}),
        "lr": run.lr(step),
        "grad_norm": None if omitted else grad_norm(run.engine),
        **({} if omitted else engine_numbers(run.engine)),
        "num_workers": run.config.num_workers,
        "samples_key": int(sums["samples_key"]),
        **feed_record(sums),
        "samples_per_s": run.config.global_batch / elapsed,
        "step_s": elapsed,
        "data_wait_ratio": waited / elapsed,
        "peak_bytes": peak_bytes(run.device),
    }
