"""Question: what do probes during training cost a step, where a CPU is free for them?

    python -m benchmarks.validation_cost --shards SHARDS [--pairs 3] [--out jobs/results/validation_cost.jsonl]

One worker on one thread (MAE, ViT-Small, batch 8); the other core holds Ray and the decoding, and is free beside them.
A pair is the same run without and with validation of each checkpoint, and a third run beside a process of the same
priority that does nothing but matrix products while nobody validates. Median step time of the steps after the first
checkpoint, for all three; a validation is under way in nearly all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from medim_ray.studies.origin import package_commit, this_machine
from medim_ray.train.validation import read_validation

STEPS, EVERY = 60, 12
SIDES = ("without", "validated", "neighbour")
_NEIGHBOUR = "import torch; torch.set_num_threads(1); x = torch.rand(1024, 1024)\nwhile True: x @ x"
_VALIDATION = ["validate.labels=[view,pneumothorax]", "validate.num_images=400"]


def step_seconds(shards: str, side: str) -> tuple[float, int]:
    """Median step time of one run, and how many validations it had."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        options = [f"data.shards={shards}", f"run.dir={folder}", "encoder.name=vit_small_patch16_224"]
        options += [f"train.steps={STEPS}", f"train.checkpoint_every={EVERY}", "train.num_workers=1", "train.zero=0"]
        options += ["train.global_batch=8", "track.aim=false", *(_VALIDATION if side == "validated" else [])]
        beside = subprocess.Popen([sys.executable, "-c", _NEIGHBOUR], env=environment) if side == "neighbour" else None
        try:
            command = [sys.executable, "-m", "medim_ray.cli", "pretrain", *options]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        finally:
            if beside is not None:
                beside.kill()
                beside.wait()
        records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        return statistics.median(record["step_s"] for record in records[EVERY:]), len(read_validation(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--out", type=Path, help="gets the ratios as a JSON line")
    args = parser.parse_args()
    ratios: dict[str, list[float]] = {side: [] for side in SIDES[1:]}
    for pair in range(args.pairs):
        found = {side: step_seconds(args.shards, side) for side in (SIDES if pair % 2 == 0 else SIDES[::-1])}
        for side, each in ratios.items():
            each.append(found[side][0] / found["without"][0])
        line = ", ".join(f"{side} {found[side][0]:.3f} s" for side in SIDES)
        print(f"pair {pair}: {line}; {found['validated'][1]} validations", flush=True)
    for side, each in ratios.items():
        print(f"{side} / without: {statistics.median(each):.3f} ({', '.join(f'{ratio:.3f}' for ratio in each)})")
    if args.out is not None:
        row = {"commit": package_commit(), "machine": this_machine(), "step_time_over_without": ratios}
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
