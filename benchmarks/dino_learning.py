"""Question: does RAD-DINO learn on phantoms with a small batch, and what do the large-batch settings make of it?

For every arm and seed one `medim-ray pretrain`, validated at each checkpoint by linear and k-NN probes, and one
`medim-ray probe` beside the weights that the run began with. A run that has its result.json is not run again, one that
was cut goes on from its checkpoint: repeat the command until the table is there. Means over seeds, 95 % t-intervals.

    python -m benchmarks.dino_learning SHARDS OUT [--seeds 0 1 2] [--steps 200] [--arms mae small-batch ...]
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.learning import FINDINGS, parse, with_interval
from medim_ray.config.loader import load
from medim_ray.config.schema import RunConfig
from medim_ray.train.validation import read_validation

CONFIGS = Path(__file__).parents[1] / "configs/debug"
LABELS = ("view", *FINDINGS)
NUM_CHECKPOINTS = 4
BATCH = 16
# What configs/rad_dino-vit_base-64w-z2.yaml has for 2,560 images a step, but for the number of prototypes (65,536
# there: on a CPU they alone would take most of the step).
_LARGE_BATCH = [
    *("objective.centring=centre", "objective.koleo_gather=false", "objective.ema_start=0.992"),
    *("objective.head.num_prototypes=8192", "train.lr=1.0e-3", "train.weight_decay_end=0.4"),
]
# The settings of configs/rad_dino-vit_base-2w-z1.yaml, as far as they depend on the batch.
_SMALL_BATCH = ["objective.centring=sinkhorn", "objective.koleo_gather=true", "objective.ema_start=0.99"]
ARMS = {
    "mae": ("mae-vit_tiny-2w-z1.yaml", []),
    "small-batch": ("rad_dino-vit_tiny-2w-z1.yaml", _SMALL_BATCH),
    "large-batch": ("rad_dino-vit_tiny-2w-z1.yaml", _LARGE_BATCH),
    "report-masks": ("rad_dino-vit_tiny-2w-z1.yaml", [*_SMALL_BATCH, "masking.name=dinov2_report"]),
}


@dataclass(frozen=True)
class Run:
    """validation: a row a checkpoint; mean: over the labels, of result.json; last: of metrics.jsonl; warnings: of the
    run."""

    validation: list[dict[str, Any]]
    mean: dict[str, Any]
    last: dict[str, Any]
    warnings: list[str]


def run_one(arm: str, seed: int, args: argparse.Namespace) -> Run:
    """One run, which is made where it is missing."""
    folder = Path(args.out) / f"{arm}-{args.steps}-seed{seed}"
    recipe, overrides = ARMS[arm]
    result = folder / "result.json"
    if not result.exists():
        options = [f"data.shards={args.shards}", f"run.dir={folder}", f"seed={seed}", "track.aim=false"]
        options += [f"train.steps={args.steps}", f"train.checkpoint_every={max(1, args.steps // NUM_CHECKPOINTS)}"]
        options += [f"train.keep_last={NUM_CHECKPOINTS}", f"train.global_batch={BATCH}"]
        options += [f"validate.labels=[{','.join(LABELS)}]", "validate.num_images=480", *overrides]
        began = time.monotonic()
        tool = [sys.executable, "-m", "medim_ray.cli"]
        command = [*tool, "pretrain", "--config", str(CONFIGS / recipe), *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        asked = [f"probe.labels=[{','.join(LABELS)}]", "probe.num_bootstrap=100", "probe.tasks=[labels]"]
        subprocess.run([*tool, "probe", f"run={folder}", *asked], check=True, stdout=subprocess.DEVNULL)
        print(f"{arm} seed {seed}: {time.monotonic() - began:.0f} s", flush=True)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    told = [f"step {record['step']}: {words}" for record in records for words in record.get("warnings", [])]
    return Run(read_validation(str(folder)), json.loads(result.read_text())["mean"], records[-1], told)


def curve_table(results: dict[str, list[Run]]) -> list[str]:
    """Mean AUROC over the labels at each checkpoint, linear and k-NN."""
    steps = [row["step"] for row in next(iter(results.values()))[0].validation]
    lines = [f"| arm | probe | {' | '.join(f'step {step}' for step in steps)} |", "|---" * (2 + len(steps)) + "|"]
    for arm, runs in results.items():
        for probe, key in (("linear", "mean"), ("k-NN", "knn_mean")):
            columns = zip(*([row.get(key) for row in run.validation] for run in runs), strict=True)
            lines.append(f"| {arm} | {probe} | {' | '.join(with_interval(column) for column in columns)} |")
    return lines


def rise_table(results: dict[str, list[Run]]) -> list[str]:
    """What the training changed, in pairs by seed; and how far from uniform the student's assignments were at last."""
    lines = [
        "| arm | linear, last - first | k-NN, last - first | linear, trained - untrained | student entropy / log K |"
    ]
    lines.append("|---|---|---|---|---|")
    for arm, runs in results.items():
        rises = [
            with_interval([run.validation[-1][key] - run.validation[0][key] for run in runs])
            for key in ("mean", "knn_mean")
        ]
        gains = [
            run.mean["encoders"]["trained"]["auroc"]["value"] - run.mean["encoders"]["untrained"]["auroc"]["value"]
            for run in runs
        ]
        recipe, overrides = ARMS[arm]
        head = getattr(load(RunConfig, CONFIGS / recipe, overrides).objective, "head", None)
        entropies = [run.last["student_entropy"] / math.log(head.num_prototypes) if head else None for run in runs]
        flat = with_interval(entropies)
        lines.append(f"| {arm} | {' | '.join(rises)} | {with_interval(gains)} | {flat} |")
    return lines


def end_table(results: dict[str, list[Run]]) -> list[str]:
    """The last checkpoint beside the weights that the run began with, and raw pixels, on all images."""
    lines = ["| arm | encoder | linear AUROC | k-NN AUROC |", "|---|---|---|---|"]
    for arm, runs in results.items():
        for encoder in ("trained", "untrained", "pixels"):
            linear = with_interval([run.mean["encoders"][encoder]["auroc"]["value"] for run in runs])
            nearest = with_interval([run.mean["knn"]["encoders"][encoder]["auroc"]["value"] for run in runs])
            lines.append(f"| {arm} | {encoder} | {linear} | {nearest} |")
    return lines


def main() -> None:
    args = parse(__doc__, "--arms", list(ARMS))
    results = {arm: [run_one(arm, seed, args) for seed in args.seeds] for arm in args.arms}
    head = f"{args.steps} steps of {BATCH} images, seeds {', '.join(map(str, args.seeds))}; mean over the labels "
    head += f"{', '.join(LABELS)}; mean +- 95 % t-interval over seeds.\n"
    told = [
        f"{arm}, seed {seed}, {run.warnings[0]}"
        for arm, runs in results.items()
        for seed, run in zip(args.seeds, runs, strict=True)
        if run.warnings
    ]
    text = "\n".join([head, *curve_table(results), "", *rise_table(results), "", *end_table(results), "", *told])
    (Path(args.out) / "dino_learning.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
