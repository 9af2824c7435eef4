"""Promises 2 and 3 for every objective and ZeRO stage, as whole runs: jobs/results/resume.md says which cells were run.

`make test-chaos`, or one cell with `-k mae-z3`. A cell that held at this version of the training code is not run again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from medim_ray.train.launch import launch
from medim_ray.train.metrics import read_metrics
from tests.system.runs import MAE, MEDIM, RAD_DINO, config_of, planned_keys, weights

pytestmark = [pytest.mark.system, pytest.mark.chaos]
ROOT = Path(__file__).parents[2]
ROWS, TABLE = ROOT / "jobs/results/resume.jsonl", ROOT / "jobs/results/resume.md"
RECIPES = {"mae": MAE, "medim": MEDIM, "rad_dino": RAD_DINO}
CELLS = [(objective, stage) for objective in RECIPES for stage in range(4)]
STEPS, STOP = 6, 4  # an epoch of the phantoms is 12 steps: both lie in the middle


def code_version() -> str:
    """Of what a resume depends on: a change to it makes all cells due again."""
    digest = hashlib.blake2b(digest_size=6)
    for folder in ("train", "objectives", "models", "data", "masking"):
        for path in sorted((ROOT / "medim_ray" / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def write(row: dict[str, Any]) -> None:
    """The row and the table of the newest row of each cell."""
    kept = [old for old in rows() if (old["objective"], old["zero"]) != (row["objective"], row["zero"])]
    kept = sorted([*kept, row], key=lambda one: (one["objective"], one["zero"]))
    ROWS.write_text("".join(f"{json.dumps(one)}\n" for one in kept))
    lines = [
        "# Stopped in mid-epoch and resumed, whole runs of two workers (tests/system/test_matrix.py)",
        "",
        f"Tiny ViT of depth 2, phantoms, CPU; {STEPS} steps, stopped after {STOP}; `1 worker`: the stopped run goes on",
        "with one worker, largest difference of a step's loss (an objective whose loss depends on the local batch may",
        "differ).",
        "",
        "| objective | ZeRO | same bits | same samples | 1 worker, loss | date, code |",
        "|---|---|---|---|---|---|",
    ]
    known = {(one["objective"], one["zero"]): one for one in kept}
    for objective, stage in CELLS:
        one = known.get((objective, stage))
        facts = "not run | | | |"
        if one is not None:
            bits = "yes" if not one["differing"] else f"no: {', '.join(one['differing'][:3])}"
            samples = "yes" if one["same_samples"] else "no"
            facts = f"{bits} | {samples} | {one['reshape_loss']:.1e} | {one['date']}, {one['code']} |"
        lines.append(f"| {objective} | {stage} | {facts}")
    TABLE.write_text("\n".join(lines) + "\n")


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(("objective", "stage"), CELLS, ids=[f"{name}-z{stage}" for name, stage in CELLS])
def test_a_run_that_is_stopped_and_resumed(phantom_shards: str, tmp_path: Path, objective: str, stage: int) -> None:
    version = code_version()
    done = [row for row in rows() if (row["objective"], row["zero"], row["code"]) == (objective, stage, version)]
    if done and not done[0]["differing"]:
        pytest.skip(f"held at this code: {TABLE.name}")
    began, recipe = time.monotonic(), RECIPES[objective]
    options = [f"train.steps={STEPS}", f"train.zero={stage}"]

    def run(name: str, *more: str) -> None:
        launch(config_of(recipe, phantom_shards, tmp_path / name, *options, *more))

    run("straight")
    run("stopped", f"train.stop_after={STOP}")
    shutil.copytree(tmp_path / "stopped", tmp_path / "reshaped")
    run("stopped")
    run("reshaped", "train.num_workers=1")
    straight, stopped = weights(tmp_path / "straight"), weights(tmp_path / "stopped")
    records = {name: read_metrics(str(tmp_path / name)) for name in ("straight", "stopped", "reshaped")}
    planned = planned_keys(config_of(recipe, phantom_shards, tmp_path / "straight", *options), STEPS)
    losses = {name: [record["loss"] for record in ones] for name, ones in records.items()}
    row = {
        "objective": objective,
        "zero": stage,
        "differing": sorted(
            name for name in straight.keys() | stopped.keys() if not torch.equal(straight[name], stopped[name])
        ),
        "same_samples": all([record["samples_key"] for record in ones] == planned for ones in records.values()),
        "reshape_loss": max(abs(a - b) for a, b in zip(losses["straight"], losses["reshaped"], strict=True)),
        "seconds": round(time.monotonic() - began),
        "date": datetime.now(UTC).date().isoformat(),
        "code": version,
    }
    write(row)
    assert row["differing"] == [] and row["same_samples"] and losses["stopped"] == losses["straight"], row
    if objective == "mae":
        assert row["reshape_loss"] < 1e-4
