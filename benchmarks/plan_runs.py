"""Question: does the plan hold for whole runs, with Ray, decoding and checkpoints around the steps of plan_steps.py?

    python benchmarks/plan_runs.py --shards SHARDS     measures what is missing of ROWS with `medim-ray pretrain`
    python benchmarks/plan_runs.py --compare           the table, from the file

Per row: processor time a step of the busiest Ray Train worker, the largest peak of a worker's resident set, and the
wall time a step and data wait of metrics.jsonl, which on a shared machine say more about the neighbours. The row null
has a model of next to no size: its peak is the process itself (cpu_runtime_bytes) and judges nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from medim_ray.config.loader import load
from medim_ray.config.schema import RunConfig
from medim_ray.plan.clusters import load_cluster
from medim_ray.plan.facts import setting_of
from medim_ray.plan.probe import measure_peak_flops
from medim_ray.plan.step_time import step_time
from medim_ray.plan.workload import workload
from medim_ray.studies.origin import package_commit, this_machine
from medim_ray.train.fit import estimate

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "configs" / "clusters" / "this_machine.yaml"
OUT = ROOT / "jobs" / "results" / "plan-runs.jsonl"
DEMO, MAE = "configs/demo-medim-vit_tiny-2w-z1.yaml", "configs/debug/mae-vit_tiny-2w-z1.yaml"
NUM_WARM = 3


def mae(size: str, workers: int, stage: int) -> list[str]:
    """MAE at 224 px, eight images a worker."""
    return [
        f"encoder.name=vit_{size}_patch16_224",
        "encoder.depth=null",
        "encoder.image_size=224",
        f"train.num_workers={workers}",
        f"train.zero={stage}",
        f"train.global_batch={8 * workers}",
        "train.steps=9",
    ]


NULL = ["encoder.width=24", "encoder.depth=1", "encoder.num_heads=1", "encoder.image_size=32"]
ROWS: dict[str, tuple[str, list[str]]] = {
    "null": (MAE, [*NULL, "objective.decoder_width=16", "objective.decoder_heads=1", "train.steps=12"]),
    "demo: MedIM, ViT-Tiny of 6 blocks, 2 workers, ZeRO 1": (DEMO, ["train.steps=25", "train.checkpoint_every=25"]),
    "MAE, ViT-Tiny, 2 workers, ZeRO 2": (MAE, mae("tiny", 2, 2)),
    "MAE, ViT-Small, 1 worker, ZeRO 1": (MAE, mae("small", 1, 1)),
    "MAE, ViT-Base, 2 workers, ZeRO 0": (MAE, mae("base", 2, 0)),
    "MAE, ViT-Base, 2 workers, ZeRO 3": (MAE, mae("base", 2, 3)),
}


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    """The Ray Train workers below a process."""
    found = []
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any("RayTrainWorker" in word for word in child.cmdline()[:1]):
                found.append(child)
    return found


def peak_of(process: psutil.Process) -> int:
    """The most resident memory that a process has had so far, in bytes."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def measure(file: str, overrides: Sequence[str], shards: str) -> dict[str, Any]:
    """One run of a recipe, watched from outside."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        options = [*overrides, f"data.shards={shards}", f"run.dir={run}"]
        command = [sys.executable, "-m", "medim_ray.cli", "pretrain", "--config", str(ROOT / file), *options]
        job = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        metrics, samples, peak = run / "metrics.jsonl", [], 0
        while job.poll() is None:
            time.sleep(0.1)
            with contextlib.suppress(psutil.Error, OSError):
                workers = workers_of(psutil.Process(job.pid))
                peak = max([peak, *map(peak_of, workers)])
                used = [sum(worker.cpu_times()[:2]) for worker in workers]
                if metrics.exists() and used:
                    samples.append((metrics.read_bytes().count(b"\n"), used))
        if job.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {job.returncode}")
        records = [json.loads(line) for line in metrics.read_text().splitlines()]
    first = next(sample for sample in samples if sample[0] >= NUM_WARM)
    last = next(sample for sample in samples if sample[0] >= samples[-1][0])
    spent = [after - before for before, after in zip(first[1], last[1], strict=True)]
    late = records[NUM_WARM:]
    return {
        "cpu_s": max(spent) / (last[0] - first[0]),
        "wall_s": statistics.median(record["step_s"] for record in late),
        "data_wait_ratio": statistics.median(record["data_wait_ratio"] for record in late),
        "peak_bytes": peak,
        "probe_flops": measure_peak_flops("fp32"),
    }


def origin() -> dict[str, Any]:
    """Where and with what a row was measured."""
    return {
        "machine": this_machine(),
        "load": round(os.getloadavg()[0], 1),
        "versions": {name: version(name) for name in ("torch", "deepspeed", "timm", "ray")},
        "commit": package_commit(),
        "when": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }


def rows_of(out: Path) -> list[dict[str, Any]]:
    """What was measured so far."""
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def compare(rows: Sequence[dict[str, Any]]) -> None:
    """Prints measured over planned, row by row."""
    print("| run | measured s | plan s | ratio | wall s | data wait | measured GB | plan GB | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        file, overrides = ROWS[row["run"]]
        config = load(RunConfig, ROOT / file, overrides)
        cluster = load_cluster(CLUSTER, [f"peak_tflops={row['probe_flops'] / 1e12}"])
        seconds = step_time(cluster, workload(config, cluster.code), setting_of(config)).train
        num_bytes = estimate(config).by_stage[config.train.stage].total
        print(
            f"| {row['run']} | {row['cpu_s']:.3f} | {seconds:.3f} | {row['cpu_s'] / seconds:.2f} | {row['wall_s']:.3f} "
            f"| {row['data_wait_ratio']:.1%} | {row['peak_bytes'] / 1e9:.3f} | {num_bytes / 1e9:.3f} "
            f"| {row['peak_bytes'] / num_bytes:.2f} |"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", help="shards with reports, such as `make demo` prepares")
    parser.add_argument("--only", help="measure the rows whose name has this word")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--compare", action="store_true", help="measure nothing, print the table of --out")
    args = parser.parse_args(arguments)
    if args.compare:
        compare(rows_of(args.out))
        return
    if args.shards is None:
        parser.error("--shards is missing: `medim-ray prepare --config configs/sources/phantom.yaml` makes some")
    done = {row["run"] for row in rows_of(args.out)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name, (file, overrides) in ROWS.items():
        if name in done or (args.only and args.only not in name):
            continue
        row = {"run": name, **origin(), **measure(file, overrides, str(Path(args.shards).resolve()))}
        with args.out.open("a") as out:
            out.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
