"""What a sweep costs beside its trials: its wall time over the trials' own times divided by how many run at once.

    python -m benchmarks.sweep_overhead --shards shards/phantoms --trials 12 --steps 60

Issue 7's figure: 12 trials of about 60 s on two cores, at most 1.15. The trials are small MAE runs without probes, the
workers of two at once; Ray is started and ended inside the measured time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from medim_ray.studies.execute import execute
from medim_ray.studies.sweep import SweepConfig, check_sweep

RECIPE = Path(__file__).parents[1] / "configs/debug/mae-vit_tiny-2w-z1.yaml"
LIMIT = 1.15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", required=True)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of a trial")
    parser.add_argument("--at-once", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = SweepConfig(
            recipe=str(RECIPE),
            shards=args.shards,
            out=folder,
            overrides=(f"train.steps={args.steps}", "train.num_workers=1", "train.zero=0", "track.aim=false"),
            space={"seed": list(range(args.trials))},
            metric="loss",
        )
        sweep = check_sweep(config)
        began = time.monotonic()
        table, _ = execute(sweep, Console(file=sys.stderr))
        wall_s = time.monotonic() - began
    own_s = [run.seconds for cell in table.cells for run in cell.runs]
    ideal_s = sum(own_s) / args.at_once
    found = {
        "trials": len(own_s),
        "steps": args.steps,
        "at_once": args.at_once,
        "wall_s": round(wall_s, 1),
        "own_s": [round(seconds, 1) for seconds in own_s],
        "ratio": round(wall_s / ideal_s, 3),
        "limit": LIMIT,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
