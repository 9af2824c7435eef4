"""Question: does `medim-ray plan` foretell our own steps? Real objective, real DeepSpeed engine, CPU cores.

One process a worker; prints measured over planned step time and peak memory by model, number of workers and ZeRO stage.

    python benchmarks/plan_steps.py --models tiny small base --workers 1 2 --stages 0 1 2 3

Batches are synthetic, so decoding is not in it. Step time is the processor time of the slowest rank, which a busy
neighbour inflates less than wall time (both are printed). Memory is the rank's peak resident set.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
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
from medim_ray.plan.step_time import step_time
from medim_ray.plan.workload import workload
from medim_ray.types import Batch

CLUSTER = Path(__file__).parents[1] / "configs" / "clusters" / "this_machine.yaml"
NUM_WARM, NUM_TIMED = 1, 3


def overrides(model: str, workers: int, stage: int, micro: int) -> list[str]:
    """The run that is measured and planned: MAE at 224 px in float32."""
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
    import medim_ray.train.worker  # noqa: F401  what a Ray Train worker has in memory
    from medim_ray.train.zero import build_engine

    dist.init_process_group("gloo", rank=rank, world_size=world)
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
    engine = build_engine(OBJECTIVES[config.objective.name](config.objective, parts), config.train)
    batch, wall, cpu = make_batch(config, masking), [], []
    for step in range(NUM_WARM + NUM_TIMED):
        started, started_cpu = time.perf_counter(), time.process_time()
        output = engine(batch)
        engine.backward(output.loss)
        engine.step()
        if step >= NUM_WARM:
            wall.append(time.perf_counter() - started)
            cpu.append(time.process_time() - started_cpu)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    Path(f"{out}.{rank}").write_text(json.dumps({"wall": min(wall), "cpu": statistics.median(cpu), "peak": peak}))
    dist.barrier()
    dist.destroy_process_group()


def measure(arguments: list[str], workers: int) -> dict[str, float]:
    """Slowest wall and processor time of a step and the largest peak over the ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/out"
        spawn(rank_main, (workers, port, arguments, out), nprocs=workers)
        ranks = [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(workers)]
    return {key: max(rank[key] for rank in ranks) for key in ("wall", "cpu", "peak")}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["tiny", "small", "base"])
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--stages", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--micro", type=int, default=8)
    args = parser.parse_args(arguments)
    cluster = load_cluster(CLUSTER)
    print(f"peak {cluster.peak_flops('fp32') / 1e9:.1f} GFLOPS a core, utilisation {cluster.utilisation:.3f}")
    print("model  workers zero   wall_s    cpu_s planned_s  cpu/plan   peak_GB planned_GB  peak/plan")
    for model in args.models:
        for workers in args.workers:
            for stage in args.stages:
                options = overrides(model, workers, stage, args.micro)
                config = load(RunConfig, None, options)
                work, setting = workload(config, cluster.code), setting_of(config)
                planned = step_time(cluster, work, setting).train
                need = memory_on(
                    cluster, work, stage=stage, num_gpus=workers, micro_batch=args.micro, checkpointed=False
                ).total
                got = measure(options, workers)
                times = f"{got['wall']:8.3f} {got['cpu']:8.3f} {planned:9.3f} {got['cpu'] / planned:9.2f}"
                sizes = f"{got['peak'] / 1e9:9.3f} {need / 1e9:10.3f} {got['peak'] / need:10.2f}"
                print(f"{model:6} {workers:7} {stage:4} {times} {sizes}", flush=True)


if __name__ == "__main__":
    main()
