"""Question: does `medim-ray plan` foretell whole runs, with Ray, decoding and checkpoints around plan_steps.py?

    medim-ray ablate --config configs/studies/workers_zero-phantoms.yaml shards=SHARDS out=OUT
    python benchmarks/plan_runs.py OUT                 measures nothing, prints the table of the finished runs below OUT

Run both on a quiet machine, one after the other: the plan measures a core's peak when it is made, and the wall time of
a step counts the neighbours too. Step time is the median wall time of a step, memory the largest peak of a worker.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from medim_ray.config.loader import load
from medim_ray.config.schema import RunConfig
from medim_ray.plan.clusters import load_cluster
from medim_ray.plan.planner import make_plan

CLUSTER = Path(__file__).parents[1] / "configs" / "clusters" / "this_machine.yaml"
NUM_WARM = 3


def rows_of(folder: Path) -> list[dict[str, float]]:
    """Workers, stage, measured and planned seconds a step and bytes a worker of each run below the folder."""
    rows = []
    for metrics in sorted(folder.rglob("metrics.jsonl")):
        config = load(RunConfig, metrics.with_name("config.yaml"), [])
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        steps = [line for line in lines if "step_s" in line]
        if len(steps) <= NUM_WARM or steps[-1]["step"] + 1 < config.train.steps:
            print(f"left out, not finished: {metrics.parent}")
            continue
        plan = make_plan(config, load_cluster(CLUSTER, []))
        rows.append(
            {
                "workers": plan.setting.num_gpus,
                "zero": plan.setting.stage,
                "step_s": statistics.median(line["step_s"] for line in steps[NUM_WARM:]),
                "plan_s": plan.step.total,
                "peak_bytes": max(line.get("peak_bytes", 0) for line in lines),
                "plan_bytes": plan.memory[plan.setting.stage, False].total,
            }
        )
    return sorted(rows, key=lambda row: (row["workers"], row["zero"]))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a run, a sweep or a study")
    rows = rows_of(parser.parse_args(arguments).folder)
    print("| workers | ZeRO | measured s | plan s | ratio | measured GB | plan GB | ratio |")
    print("|" + "---|" * 8)
    for row in rows:
        print(
            f"| {row['workers']} | {row['zero']} | {row['step_s']:.3f} | {row['plan_s']:.3f} "
            f"| {row['step_s'] / row['plan_s']:.2f} | {row['peak_bytes'] / 1e9:.2f} | {row['plan_bytes'] / 1e9:.2f} "
            f"| {row['peak_bytes'] / row['plan_bytes']:.2f} |"
        )


if __name__ == "__main__":
    main()
