"""The loop on one rank with a real DeepSpeed engine: bad numbers, skipped steps, stops. Ray is not needed for these."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medim_ray.config.schema import TrainConfig
from medim_ray.data.collate import Columns
from medim_ray.data.reader import BROKEN, EPOCH, IMAGE_ID, SECONDS, STAGES, STEP, VIEW
from medim_ray.data.transforms import View
from medim_ray.draws import name_key
from medim_ray.objectives.base import ParameterGroup, default_groups
from medim_ray.train.attempts import Budgets, of_outcome
from medim_ray.train.before import BeforeStep
from medim_ray.train.control import PREEMPTION, RESIZE, STOP, WARNED, RunControl
from medim_ray.train.feed import BrokenRows, read_quarantine
from medim_ray.train.health import BadStep, NumberGuard, norms_before
from medim_ray.train.loop import Trainer, train
from medim_ray.train.metrics import METRICS, JsonLinesFile
from medim_ray.train.zero import build_engine
from medim_ray.types import Batch, StepOutput
from tests.unit.train.ranks import on_ranks

STEPS, BAD = 8, 3
CONFIG = TrainConfig(steps=STEPS, global_batch=4, checkpoint_every=100, zero=1)


class Mean(nn.Module):
    """Learns the mean of the pixels; an image of 255s in step BAD makes its loss infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Linear(1, 1)
        self.norm = nn.BatchNorm1d(1)

    def forward(self, batch: Batch) -> StepOutput:
        images_B1HW = batch.views["image"]
        self.norm(images_B1HW.mean(dim=(2, 3)))  # its statistics change in the forward, and its weights not at all
        error_B = (self.level(images_B1HW.mean(dim=(2, 3))) - 0.5).square().mean(dim=1)
        loss = error_B.mean() + torch.where(images_B1HW.amax() >= 1.0, torch.inf, 0.0)
        return StepOutput(loss=loss, logs={"error": error_B.detach().mean()})

    def parameter_groups(self) -> list[ParameterGroup]:
        return default_groups(self)

    def after_step(self, step: int) -> None: ...

    def warnings(self, step: int, logs: Mapping[str, float]) -> list[str]:
        return ["step two"] if step == 2 else []


class Records:
    """What the loop hands on."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []
        self.saved: list[int] = []

    def log(self, record: dict[str, Any]) -> None:
        self.logs.append(record)

    def save(self, step: int) -> None:
        self.saved.append(step)


class Mailbox:
    """Asks for a stop once `after` steps are logged."""

    def __init__(self, records: Records, after: int) -> None:
        self._records, self._after = records, after

    def wish(self) -> str:
        return STOP if len(self._records.logs) >= self._after else ""


def steps(bad: bool, broken: Mapping[int, list[dict[str, Any]]], first: int = 0) -> Iterator[Columns]:
    for step in range(first, STEPS):
        pixels = np.random.default_rng(step).integers(0, 200, (4, 1, 2, 2), dtype=np.uint8)
        if bad and step == BAD:
            pixels[0] = 255
        yield {
            STEP: np.full(4, step),
            EPOCH: np.zeros(4, dtype=np.int64),
            IMAGE_ID: np.array([f"{step}-{i}" for i in range(4)], dtype=object),
            BROKEN: np.array([json.dumps(broken[step]) if step in broken else "", "", "", ""], dtype=object),
            SECONDS: np.full((4, len(STAGES)), 0.5, dtype=np.float32),
            f"{VIEW}image": pixels,
            f"{VIEW}image/jitter_BK4": np.tile(np.array([1, 1, 0, 0], dtype=np.float32), (4, 1, 1)),
            "mask/uniform_BN": np.zeros((4, 4), dtype=np.bool_),
        }


def trainer(
    config: TrainConfig,
    bad: bool,
    omitted: dict[int, str],
    stop_after: int | None = None,
    broken: Mapping[int, list[dict[str, Any]]] = MappingProxyType({}),
    run_dir: str = "memory://run",
) -> tuple[Trainer, Records, list[BadStep]]:
    torch.manual_seed(0)
    records, told = Records(), list[BadStep]()
    run = Trainer(
        config=config,
        seed=1,
        engine=build_engine(Mean(), config),
        device=torch.device("cpu"),
        views=(View("image", 1, 2, 1),),
        steps=steps(bad, broken),
        lr=lambda step: 1e-2,
        weight_decay=lambda step: 0.1,
        guard=NumberGuard(config, omitted, lambda bad, columns: told.append(bad)),
        control=RunControl(None if stop_after is None else Mailbox(records, stop_after)),
        broken=BrokenRows(run_dir, num_rows=40, max_ratio=0.05),
        recorder=records,
        checkpoints=records,
        before_step=BeforeStep(None, None, every=0),
        first_step=0,
        rank=0,
        samples_per_epoch=4 * STEPS,
    )
    run.control._next_look = float("inf")  # Ray is not there to be asked about preemption
    return run, records, told


def weights(run: Trainer) -> list[Tensor]:
    """Parameters, and the statistics of the batch norm."""
    return [t.detach().clone() for t in run.engine.module.state_dict().values()]


def broken_rows(folder: str) -> None:
    rows = [{"shard": "train/00000.parquet", "row": row, "image_id": f"i{row}", "reason": "r"} for row in range(3)]
    met = {1: rows[:1], 3: rows[:2]}
    run, records, _ = trainer(CONFIG, bad=False, omitted={}, broken=met, run_dir=folder)
    assert train(run).kind == "finished"
    assert [r["broken_rows"] for r in records.logs] == [0, 1, 0, 1, 0, 0, 0, 0]
    assert records.logs[0]["stream_decode_s"] == 2.0, "the seconds of four samples"
    assert read_quarantine(folder) == [{**rows[0], "step": 1}, {**rows[1], "step": 3}]

    run, records, _ = trainer(CONFIG, bad=False, omitted={}, broken=met | {5: rows}, run_dir=folder)
    outcome = train(run)
    assert (outcome.kind, outcome.step, records.saved) == ("broken_rows", 6, [6])
    assert "3 of 40 rows" in outcome.message and "data.max_broken_ratio=0.05" in outcome.message
    assert [one["step"] for one in read_quarantine(folder)] == [1, 3, 5]
    failure = of_outcome(outcome)
    assert failure is not None and Budgets(CONFIG).exhausted_by(failure, 6)
    Path(folder, "done").touch()


def policies(folder: str) -> None:
    run, records, told = trainer(CONFIG, bad=True, omitted={})
    key = sum(name_key(f"{BAD}-{i}") >> 32 for i in range(4))
    with pytest.raises(BadStep, match=rf"step {BAD}: loss is inf.* \(samples_key {key}\)"):
        train(run)
    assert [r["step"] for r in records.logs] == list(range(BAD)) and len(told) == 1 and records.saved == []
    assert [r.get("warnings") for r in records.logs] == [None, None, ["step two"]]
    before = weights(run)
    assert all(bool(w.isfinite().all()) for w in before), "the bad step changed a weight"

    skipping, records, told = trainer(replace(CONFIG, on_bad_step="skip"), bad=True, omitted={})
    assert train(skipping).kind == "finished" and records.saved == [STEPS]
    assert [r["step"] for r in records.logs if "omitted" in r] == [BAD] and "loss" not in records.logs[BAD]
    # A run that was told beforehand, as after going back, ends with the same weights.
    told_before, records, told = trainer(CONFIG, bad=True, omitted={BAD: "loss is inf"})
    assert train(told_before).kind == "finished" and not told
    assert all(torch.equal(a, b) for a, b in zip(weights(skipping), weights(told_before), strict=True))

    accumulating = replace(CONFIG, on_bad_step="skip", micro_batch=2)
    run, _, told = trainer(accumulating, bad=True, omitted={})
    with pytest.raises(BadStep):
        train(run)

    run, records, _ = trainer(CONFIG, bad=False, omitted={}, stop_after=2)
    outcome = train(run)
    assert (outcome.kind, outcome.step, records.saved) == ("stopped", 3, [3])
    broken_rows(folder)


def test_policies_for_bad_steps_broken_rows_and_stops(tmp_path: Path) -> None:
    on_ranks(1, policies, str(tmp_path))
    assert (tmp_path / "done").exists()


def test_a_spike_is_measured_against_the_median_of_what_came_before() -> None:
    guard = NumberGuard(replace(CONFIG, spike_factor=10.0), {}, lambda bad, columns: None)
    with pytest.raises(BadStep, match="grad_norm is nan"):
        guard.check_norm(0, float("nan"), 7, {})
    for step in range(15):
        guard.check_norm(step, 1000.0 if step == 3 else 1.0, 7, {})  # too early to know
    guard.check_norm(15, 9.0, 7, {})
    with pytest.raises(BadStep, match="grad_norm 11 is over 10 times the median 1"):
        guard.check_norm(16, 11.0, 7, {})


def test_a_run_that_goes_on_calls_the_same_norms_a_spike(tmp_path: Path) -> None:
    config = replace(CONFIG, spike_factor=10.0)
    straight = NumberGuard(config, {}, lambda bad, columns: None)
    norms = [1.0 + 0.1 * (step % 7) for step in range(80)]
    file = JsonLinesFile(str(tmp_path), METRICS, [])
    for step, norm in enumerate(norms):
        straight.check_norm(step, norm, 7, {})
        file.write({"step": step, "grad_norm": norm} if step != 5 else {"step": 5, "grad_norm": None})
    file.write({"step": 80, "grad_norm": float("inf")})
    file.write({"step": 90, "grad_norm": 1.0})  # of an attempt that was rolled back
    resumed = NumberGuard(config, {}, lambda bad, columns: None, norms_before(str(tmp_path), 81))
    assert list(resumed._norms) == list(straight._norms) == norms[-64:]
    with pytest.raises(BadStep, match=r"grad_norm 14 is over 10 times the median 1\.3"):
        resumed.check_norm(81, 14.0, 7, {})


def test_wishes_are_summed_by_name() -> None:
    control = RunControl(None)
    assert set(control.wishes()) == {"stop", "resize", "warned", "preemption"} and not any(control.wishes().values())
    none = dict.fromkeys((STOP, RESIZE, WARNED, PREEMPTION), 0.0)
    assert control.decide(none | {STOP: 1.0, RESIZE: 1.0}) == ("stopped", "asked to stop")
    assert control.decide(none | {WARNED: 2.0}) == ("preempted", "2 workers got SIGTERM")
    assert control.decide(none | {RESIZE: 1.0}) == ("resized", "there is room for more workers")
    assert control.decide(none) is None
