"""Numbers that are not numbers: a step is judged before it changes a weight, and told by name where it is bad.

What a run does about a bad step is `train.on_bad_step`; steps that a run leaves out are told in RUN/bad_steps.jsonl.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch
from torch import Tensor, nn

from medim_ray.config.schema import TrainConfig
from medim_ray.data.collate import Columns
from medim_ray.data.reader import IMAGE_ID
from medim_ray.data.storage import committed
from medim_ray.draws import name_key
from medim_ray.train.metrics import read_metrics

BAD_STEPS = "bad_steps.jsonl"
_WINDOW = 64  # gradient norms behind the median
_WARM_UP = 16  # of them before a spike is called one


@dataclass(frozen=True)
class BadStep(Exception):  # noqa: N818 (what happened, not an error of the program)
    """Raised by every rank in the same step, before the update. reason: which terms, or which norm; samples_key: of the
    images of the step on all ranks, as in metrics.jsonl."""

    step: int
    reason: str
    samples_key: int

    def __str__(self) -> str:
        return f"step {self.step}: {self.reason} (samples_key {self.samples_key})"


class NumberGuard:
    """Judges the reduced numbers of a step, so that every rank comes to the same verdict.

    omitted: steps that pass without an update, with the reason; a step that is skipped is added. report: told of each
    bad step and this rank's columns in it. norms: of the gradients of the steps before, so that a run that goes on
    calls the same ones a spike.
    """

    def __init__(
        self,
        train: TrainConfig,
        omitted: dict[int, str],
        report: Callable[[BadStep, Columns], None],
        norms: Sequence[float] = (),
    ) -> None:
        self.omitted = omitted
        self._report = report
        self._spike_factor = train.spike_factor
        self._has_loss_scale = train.precision == "fp16"
        # With accumulation, gradients of earlier micro-batches are in the engine already: then the run goes back.
        self._skips = train.on_bad_step == "skip" and train.accumulation == 1
        self._norms: deque[float] = deque(norms, maxlen=_WINDOW)

    def passes(self, step: int, logs: Mapping[str, float], samples_key: float, columns: Columns) -> bool:
        """Called before the backward pass: False where the step is to be skipped, BadStep where the run goes back or
        ends, because a term of the loss is NaN or infinite."""
        bad = [f"{name} is {value}" for name, value in logs.items() if not math.isfinite(value)]
        if not bad:
            return True
        self._tell(BadStep(step, ", ".join(bad), int(samples_key)), columns, may_skip=self._skips)
        return False

    def state_before(self, module: nn.Module) -> dict[str, Tensor]:
        """What the forward of a step changes and a skipped step must not: statistics of batch norms, where the policy
        may skip."""
        return {name: buffer.clone() for name, buffer in module.named_buffers()} if self._skips else {}

    @torch.no_grad()
    def put_back(self, module: nn.Module, state: Mapping[str, Tensor]) -> None:
        """After a forward whose step is skipped."""
        for name, buffer in module.named_buffers():
            buffer.copy_(state[name])

    def check_norm(self, step: int, norm: float | None, samples_key: float, columns: Columns) -> None:
        """BadStep where the gradient norm is not finite or spikes; called after the update, which going back undoes."""
        if norm is None or (self._has_loss_scale and not math.isfinite(norm)):
            return  # fp16: the update was left out by the engine, which lowers its loss scale
        if not math.isfinite(norm):
            self._tell(BadStep(step, f"grad_norm is {norm}", int(samples_key)), columns)
        if self._spike_factor and len(self._norms) >= _WARM_UP:
            median = statistics.median(self._norms)
            if norm > self._spike_factor * median:
                spike = f"grad_norm {norm:.4g} is over {self._spike_factor:g} times the median {median:.4g}"
                self._tell(BadStep(step, spike, int(samples_key)), columns)
        self._norms.append(norm)

    def _tell(self, bad: BadStep, columns: Columns, may_skip: bool = False) -> None:
        self._report(bad, columns)
        if not may_skip:
            raise bad
        self.omitted[bad.step] = bad.reason


def omitted_steps(run_dir: str) -> dict[int, str]:
    """The steps that a run leaves out, with the reason: those that its policy skipped or went back for."""
    return {record["step"]: record["reason"] for record in read_bad_steps(run_dir) if record["omitted"]}


def norms_before(run_dir: str, step: int) -> list[float]:
    """The gradient norms that a run which goes on at `step` judges by, as metrics.jsonl has them."""
    recorded = (record.get("grad_norm") for record in read_metrics(run_dir) if record["step"] < step)
    return [norm for norm in recorded if isinstance(norm, float) and math.isfinite(norm)][-_WINDOW:]


def read_bad_steps(run_dir: str) -> list[dict[str, Any]]:
    """The records of RUN/bad_steps.jsonl: step, reason, samples_key, first_position and num_samples in the plan, policy
    and omitted."""
    fs, root = fsspec.core.url_to_fs(run_dir)
    path = f"{root.rstrip('/')}/{BAD_STEPS}"
    fs.invalidate_cache()
    if not fs.exists(path):
        return []
    return [json.loads(line) for line in fs.cat_file(path).decode().splitlines()]


def write_batch_plan(run_dir: str, step: int, rank: int, columns: Columns) -> None:
    """RUN/bad_steps/step-S-rank-R.npz: what was planned for each sample, by the key of its id; no pixel, no word."""
    fs, root = fsspec.core.url_to_fs(run_dir)
    folder = f"{root.rstrip('/')}/{Path(BAD_STEPS).stem}"
    fs.makedirs(folder, exist_ok=True)
    plan = {name: value for name, value in columns.items() if name.startswith("mask/") or "boxes" in name}
    keys = np.array([name_key(str(image_id)) for image_id in columns[IMAGE_ID]], dtype=np.uint64)
    with fs.open(f"{folder}/step-{step:08d}-rank-{rank:05d}.npz", "wb") as file:
        np.savez_compressed(file, allow_pickle=False, image_keys=keys, **plan)


def write_bad_step(run_dir: str, record: Mapping[str, Any]) -> None:
    """Adds a record to RUN/bad_steps.jsonl, whole or not at all; one of the same step is replaced."""
    fs, root = fsspec.core.url_to_fs(run_dir)
    path = f"{root.rstrip('/')}/{BAD_STEPS}"
    kept = [old for old in read_bad_steps(run_dir) if old["step"] != record["step"]]
    with committed(fs, path, root) as file:
        file.write("".join(f"{json.dumps(one)}\n" for one in [*kept, dict(record)]).encode())
