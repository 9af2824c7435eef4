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
from medim_ray.data.transforms import View
from medim_ray.draws import step_draws
from medim_ray.schedules import Schedule
from medim_ray.train.metrics import mean_over_ranks


class Recorder(Protocol):
    """Where the numbers of a step go."""

    def log(self, record: dict[str, Any]) -> None: ...


class Checkpoints(Protocol):
    """Saves the state after a number of steps; collective over the ranks."""

    def save(self, step: int) -> None: ...


@dataclass(kw_only=True)
class Trainer:
    """One rank's pieces. `steps` yields this rank's columns of the steps first_step, first_step + 1, ... in order."""

    config: TrainConfig
    seed: int
    engine: Any
    device: torch.device
    views: tuple[View, ...]
    steps: Iterator[Columns]
    lr: Schedule
    recorder: Recorder
    checkpoints: Checkpoints
    first_step: int
    rank: int
    samples_per_epoch: int


def train(run: Trainer) -> None:
    """Steps from `first_step` to the end of the run or to `stop_after`; a checkpoint is committed at the last one."""
    last = run.config.last_step
    for step in range(run.first_step, last):
        started = time.perf_counter()
        columns = next(run.steps)
        waited = time.perf_counter() - started
        logs = train_step(run, step, columns)
        elapsed = time.perf_counter() - started
        run.recorder.log(record(run, step, logs, elapsed, waited))
        if (step + 1) % run.config.checkpoint_every == 0 or step + 1 == last:
            run.checkpoints.save(step + 1)


def train_step(run: Trainer, step: int, columns: Columns) -> dict[str, float]:
    """One optimizer step over this rank's share of the global batch; the logged means over all ranks."""
    torch.manual_seed(int(step_draws(run.seed, step).integers(f"torch/{run.rank}", 1, 1 << 62)[0, 0]))
    for group in run.engine.optimizer.param_groups:
        group["lr"] = run.lr(step) * group["lr_ratio"] * (step >= group["frozen_steps"])
        group["weight_decay"] = run.config.weight_decay * group["decay_ratio"]
    logs: list[dict[str, Tensor]] = []
    for rows in micro_batches(columns, run.config.local_micro_batch):
        batch = to_batch(rows, run.views, run.device)
        assert batch.step == step, f"the stream is at step {batch.step}, the loop at step {step}"
        output = run.engine(batch)
        run.engine.backward(output.loss)
        run.engine.step()
        logs.append({"loss": output.loss.detach(), **output.logs})
    run.engine.module.after_step(step)
    return mean_over_ranks(logs, run.device)


def record(run: Trainer, step: int, logs: dict[str, float], elapsed: float, waited: float) -> dict[str, Any]:
    """The line of metrics.jsonl for one step."""
    grad_norm = run.engine.get_global_grad_norm()
    return {
        "step": step,
        "epoch": step * run.config.global_batch // run.samples_per_epoch,
        **logs,
        "lr": run.lr(step),
        "grad_norm": float(grad_norm) if grad_norm is not None else None,
        "samples_per_s": run.config.global_batch / elapsed,
        "step_s": elapsed,
        "data_wait_ratio": waited / elapsed,
    }
