"""Question: what do probes during training cost a step, where a CPU is free for them?

    python -m benchmarks.validation_cost --shards SHARDS [--free-cpu 1] [--out jobs/results/validation_cost.jsonl]

One run of one worker on one thread (MAE, ViT-Small, batch 8). Each checkpoint is validated; a pair is the median step
time while a validation is under way, over that of the steps between its end and the next checkpoint. Paired in time: a
shared machine drifts by more than the answer. --free-cpu N: everything but the validations keeps off that CPU, at all
times; without it the scheduler spreads the worker, Ray, the decoding and the validations over all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from medim_ray.config.loader import load
from medim_ray.config.schema import RunConfig
from medim_ray.probes.validate import VALIDATE, validate
from medim_ray.studies.origin import package_commit, this_machine
from medim_ray.train.launch import launch
from medim_ray.train.metrics import read_metrics
from medim_ray.train.validation import read_validation

STEPS, EVERY = 400, 50
_LEAST = 5  # steps on each side of a pair
_VALIDATION = ["validate.labels=[view,pneumothorax]", "validate.num_images=100"]


def _on_cpu(cpu: int, *of_checkpoint: Any) -> dict[str, Any]:
    """A validation on one CPU."""
    os.sched_setaffinity(0, {cpu})
    return validate(*of_checkpoint)


def step_seconds(shards: str, steps: int, free_cpu: int | None) -> list[tuple[float, float]]:
    """(median step time beside a validation, after it) of each checkpoint of one run."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    probe = VALIDATE
    if free_cpu is not None:
        os.sched_setaffinity(0, os.sched_getaffinity(0) - {free_cpu})  # Ray and all that it starts inherit it
        probe = replace(VALIDATE, run=partial(_on_cpu, free_cpu))
    with tempfile.TemporaryDirectory() as folder:
        options = [f"data.shards={shards}", f"run.dir={folder}", "encoder.name=vit_small_patch16_224"]
        options += [f"train.steps={steps}", f"train.checkpoint_every={EVERY}", "train.num_workers=1", "train.zero=0"]
        options += ["train.global_batch=8", "track.aim=false", *_VALIDATION]
        launch(load(RunConfig, None, options), validate=probe)
        rows = [row for row in read_validation(folder) if "error" not in row]
        times = [(record["ended_at"], float(record["step_s"])) for record in read_metrics(folder)]
    pairs = []
    for i, row in enumerate(rows):
        end = row["began_at"] + row["seconds"]
        following = rows[i + 1]["began_at"] if i + 1 < len(rows) else float("inf")
        beside = [step_s for at, step_s in times if row["began_at"] + step_s <= at <= end]
        after = [step_s for at, step_s in times if end + step_s <= at <= following]
        if min(len(beside), len(after)) >= _LEAST:
            pairs.append((statistics.median(beside), statistics.median(after)))
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--free-cpu", type=int, help="CPU that is left to validations")
    parser.add_argument("--out", type=Path, help="gets the ratios as a JSON line")
    args = parser.parse_args()
    pairs = step_seconds(args.shards, args.steps, args.free_cpu)
    if not pairs:
        raise SystemExit("no validation ended before the next checkpoint: fewer images, or more steps between them")
    for beside, after in pairs:
        print(f"beside a validation {beside:.3f} s, after it {after:.3f} s: {beside / after:.3f}", flush=True)
    ratios = [beside / after for beside, after in pairs]
    print(f"median {statistics.median(ratios):.3f} of {len(ratios)}")
    if args.out:
        with args.out.open("a") as file:
            facts = {"commit": package_commit(), "machine": this_machine(), "free_cpu": args.free_cpu is not None}
            facts["beside_over_after"] = ratios
            file.write(f"{json.dumps(facts)}\n")


if __name__ == "__main__":
    main()
