"""Question: does `medim-ray plan` foretell our own steps? Real objective, real DeepSpeed engine, CPU cores.

    python benchmarks/plan_steps.py --models tiny small base --workers 1 2 --stages 0 1 2 3    measures what is missing
    python benchmarks/plan_steps.py --compare                                                  the table, from the file

One process a worker; each row of --out has what was measured, the machine and the commit, and is not measured again.
Batches are synthetic, so decoding is not in it. Step time is the processor time of the slowest rank, which a busy
neighbour inflates less than wall time (both are kept), beside the rate of a matrix product in the same process before
each step. Memory is the rank's peak resident set, by phase too, beside what the process had before it built the model.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from medim_ray.config.loader import load
from medim_ray.config.schema import RunConfig
from medim_ray.draws import Draws
from medim_ray.masking import MASKINGS
from medim_ray.masking.base import Samples
from medim_ray.models.vit import ImageEncoder
from medim_ray.objectives import OBJECTIVES
from medim_ray.objectives.base import Parts
from medim_ray.plan.clusters import load_cluster
from medim_ray.plan.facts import setting_of
from medim_ray.plan.memory import memory_on
from medim_ray.plan.probe import measure_peak_flops
from medim_ray.plan.step_time import step_time
from medim_ray.plan.workload import workload
from medim_ray.types import Batch

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "configs" / "clusters" / "this_machine.yaml"
OUT = ROOT / "jobs" / "results" / "plan-steps.jsonl"
NUM_WARM, NUM_TIMED = 1, 4
MODELS = ("tiny", "small", "base")
# Configurations (model, workers, stage) whose time a constant cpu_* of constants.yaml was solved from; others judge.
# Memory is judged in every row.
CALIBRATES = {("base", 1, 0), ("tiny", 1, 0), ("small", 1, 1), ("tiny", 1, 3)}


def overrides(model: str, workers: int, stage: int, micro: int) -> list[str]:
    """The run that is measured and planned: MAE at 224 px in float32. Model null has next to no size: what is left is
    the process itself, with all that it loads up to the end of a step."""
    if model == "null":
        size = ["encoder.width=24", "encoder.depth=1", "encoder.num_heads=1", "encoder.image_size=32"]
        return [*size, "objective.decoder_width=16", "objective.decoder_heads=1", *overrides("tiny", workers, stage, 1)]
    return [
        f"encoder.name=vit_{model}_patch16_224",
        f"train.num_workers={workers}",
        f"train.zero={stage}",
        f"train.global_batch={workers * micro}",
        f"data.granules_per_step={workers}",
    ]


def make_batch(config: RunConfig, masking: Any) -> Batch:
    """One rank's synthetic micro-batch with the masks of its strategy."""
    num, size = config.train.local_micro_batch, config.encoder.image_size
    ids = [f"i{row}" for row in range(num)]
    samples = Samples(
        image_ids=ids,
        boxes_B4=np.tile(np.array([0, 0, 1, 1], np.float32), (num, 1)),
        text={},
        mentions=[()] * num,
        steps_B=np.zeros(num, np.int64),
        positions_B=np.arange(num),
        global_batch=num,
        seed=0,
    )
    columns = masking.plan(samples, ImageEncoder.grid_of(config.encoder), Draws.of(0, np.zeros(num, np.int64), ids))
    images = torch.rand(num, 1, size, size, generator=torch.Generator().manual_seed(0))
    return Batch(
        step=0,
        image_ids=tuple(ids),
        views={"image": images},
        columns={key: torch.from_numpy(value) for key, value in columns.items()},
    )


def rank_main(rank: int, world: int, port: int, arguments: list[str], out: str) -> None:
    """One worker: a few steps, its times and its peak into `out`.rank."""
    os.environ |= {
        "DS_ACCELERATOR": "cpu",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    import deepspeed
    import timm  # noqa: F401

    import medim_ray.train.worker  # noqa: F401  what a Ray Train worker has in memory
    from medim_ray.train.zero import build_engine

    dist.init_process_group("gloo", rank=rank, world_size=world)
    assert deepspeed.__version__
    base = psutil.Process().memory_info().rss
    config = load(RunConfig, None, arguments)
    masking = MASKINGS[config.masking.name](config.masking)
    torch.manual_seed(0)
    parts = Parts(
        encoder=ImageEncoder(config.encoder),
        text=None,
        masking=masking,
        num_steps=config.train.steps,
        global_batch=config.train.global_batch,
    )
    phases = dict.fromkeys(("build", "forward", "backward", "step"), 0)
    engine = build_engine(OBJECTIVES[config.objective.name](config.objective, parts), config.train)
    take_peak(phases, "build")
    batch, wall, cpu, probes = make_batch(config, masking), [], [], []
    for step in range(NUM_WARM + NUM_TIMED):
        probes.append(measure_peak_flops.__wrapped__("fp32", seconds=0.15))
        started, started_cpu = time.perf_counter(), time.process_time()
        output = engine(batch)
        take_peak(phases, "forward")
        engine.backward(output.loss)
        take_peak(phases, "backward")
        engine.step()
        take_peak(phases, "step")
        if step >= NUM_WARM:
            wall.append(time.perf_counter() - started)
            cpu.append(time.process_time() - started_cpu)
    numbers = {
        "wall_s": min(wall),
        "cpu_s": statistics.median(cpu),
        "peak_bytes": max(phases.values()),
        "phase_bytes": phases,
        "base_bytes": base,
        "probe_flops": statistics.median(probes[NUM_WARM:]),
    }
    Path(f"{out}.{rank}").write_text(json.dumps(numbers))
    dist.barrier()
    dist.destroy_process_group()


def take_peak(phases: dict[str, int], phase: str) -> None:
    """Notes the peak of the resident set since the last call, and lets the kernel count anew (man 5 proc)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    phases[phase] = max(phases[phase], peak)
    Path("/proc/self/clear_refs").write_text("5")


def measure(arguments: list[str], workers: int) -> dict[str, Any]:
    """The rank with the most processor time a step, and the largest peak over the ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/out"
        spawn(rank_main, (workers, port, arguments, out), nprocs=workers)
        ranks = [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(workers)]
    slowest: dict[str, Any] = max(ranks, key=lambda rank: rank["cpu_s"])
    return slowest | {key: max(rank[key] for rank in ranks) for key in ("wall_s", "peak_bytes", "base_bytes")}


def machine() -> dict[str, Any]:
    """Where and with what a row was measured."""
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True)
    return {
        "machine": f"{os.cpu_count()} cores, {cpu.partition(': ')[2] or platform.machine()}",
        "load": round(os.getloadavg()[0], 1),
        "versions": {name: version(name) for name in ("torch", "deepspeed", "timm", "ray")},
        "commit": commit.stdout.strip(),
        "when": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }


def rows_of(out: Path) -> list[dict[str, Any]]:
    """What was measured so far."""
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def planned(row: dict[str, Any]) -> tuple[float, float]:
    """Seconds and bytes that the plan gives for a row, at the row's probe and with the constants as shipped."""
    cluster = load_cluster(CLUSTER, [f"peak_tflops={row['probe_flops'] / 1e12}"])
    config = load(RunConfig, None, overrides(row["model"], row["workers"], row["zero"], row["micro"]))
    work, setting = workload(config, cluster.code), setting_of(config)
    need = memory_on(
        cluster,
        work,
        stage=setting.stage,
        num_gpus=setting.num_gpus,
        micro_batch=setting.micro_batch,
        checkpointed=False,
    )
    return step_time(cluster, work, setting).train, need.total - need.saves  # nothing is saved here


def against_plan(rows: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], float, float]]:
    """(row, planned seconds, planned bytes) in the order of the table; the rows null are what cpu_runtime_bytes is."""
    judged = [row for row in rows if row["model"] in MODELS]
    judged.sort(key=lambda r: (MODELS.index(r["model"]), r["workers"], r["zero"], r["micro"]))
    return [(row, *planned(row)) for row in judged]


def name_of(row: dict[str, Any]) -> tuple[str, int, int]:
    """Model, workers, stage."""
    return (row["model"], row["workers"], row["zero"])


def calibrates(row: dict[str, Any]) -> bool:
    """Whether a constant of constants.yaml was solved from this row's time."""
    return name_of(row) in CALIBRATES


def error(plan: float, measured: float) -> float:
    """The plan's error against the measurement, as a share of it."""
    return plan / measured - 1.0


def compare(rows: Sequence[dict[str, Any]]) -> None:
    """Prints measured over planned and the plan's error against the measurement, row by row."""
    heads = ["model", "workers", "ZeRO"]
    heads += ["measured s", "plan s", "ratio", "error", "measured GB", "plan GB", "ratio", "error", "time"]
    print(f"| {' | '.join(heads)} |")
    print("|" + "---|" * len(heads))
    for row, seconds, num_bytes in against_plan(rows):
        print(
            f"| ViT-{row['model'].capitalize()} | {row['workers']} | {row['zero']} "
            f"| {row['cpu_s']:.3f} | {seconds:.3f} | {row['cpu_s'] / seconds:.2f} "
            f"| {100 * error(seconds, row['cpu_s']):+.0f} % "
            f"| {row['peak_bytes'] / 1e9:.3f} | {num_bytes / 1e9:.3f} | {row['peak_bytes'] / num_bytes:.2f} "
            f"| {100 * error(num_bytes, row['peak_bytes']):+.0f} % "
            f"| {'calibrates time' if calibrates(row) else 'judges'} |"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--stages", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--micro", type=int, default=8)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--compare", action="store_true", help="measure nothing, print the table of --out")
    args = parser.parse_args(arguments)
    if args.compare:
        compare(rows_of(args.out))
        return
    done = {(row["model"], row["workers"], row["zero"], row["micro"]) for row in rows_of(args.out)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for model in args.models:
        for workers in args.workers:
            for stage in args.stages:
                if (model, workers, stage, args.micro) in done:
                    continue
                row = {"model": model, "workers": workers, "zero": stage, "micro": args.micro, **machine()}
                row |= measure(overrides(model, workers, stage, args.micro), workers)
                with args.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
