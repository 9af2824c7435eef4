"""Question: what does a RAD-DINO step cost on two CPU threads, and where does it go?

Run: python -m benchmarks.dino_step [--peer PYTHON] [--out FILE]. ViT-S/14, 2 x 224 + 4 x 98, batch 8, 65,536
prototypes, fp32.
--peer names the interpreter of an environment with lightly-train (`make peers`); its `dinov2` method is then timed in
turn with ours at the same sizes without drop path, and paired ratios are printed. --out gets them as a JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from medim_ray.draws import Draws
from medim_ray.masking.base import Samples
from medim_ray.masking.block import StepBlockMasking
from medim_ray.models.heads_dino import DinoHead
from medim_ray.models.vit import ImageEncoder
from medim_ray.objectives.base import Parts
from medim_ray.objectives.rad_dino import RadDino
from medim_ray.studies.origin import package_commit, this_machine
from medim_ray.types import Batch, Grid

BATCH, GLOBAL_SIZE, LOCAL_SIZE, NUM_LOCAL = 8, 224, 98, 4
PEER = Path(__file__).with_name("dino_step_peer.py")


def build() -> tuple[RadDino, torch.optim.Optimizer]:
    torch.manual_seed(0)
    encoder = ImageEncoder(ImageEncoder.Config(name="vit_small_patch14_dinov2", image_size=GLOBAL_SIZE))
    masking = StepBlockMasking(StepBlockMasking.Config())
    config = RadDino.Config(head=DinoHead.Config())
    objective = RadDino(config, Parts(encoder=encoder, text=None, masking=masking, num_steps=100, global_batch=BATCH))
    groups = [{"params": list(group.parameters)} for group in objective.parameter_groups()]
    return objective, torch.optim.AdamW(groups, lr=1e-4, fused=True)  # as train/zero.py


def make_batch(step: int) -> Batch:
    samples = Samples(
        image_ids=[f"image{i}" for i in range(BATCH)],
        boxes_B4=np.tile(np.array([0, 0, 1, 1], dtype=np.float32), (BATCH, 1)),
        text={},
        mentions=[()] * BATCH,
        steps_B=np.full(BATCH, step),
        positions_B=np.arange(BATCH),
        global_batch=BATCH,
        seed=0,
    )
    draws = Draws.of(0, samples.steps_B, samples.image_ids)
    columns = StepBlockMasking(StepBlockMasking.Config()).plan(samples, Grid(16, 16), draws)
    views = {
        "global": torch.rand(2 * BATCH, 1, GLOBAL_SIZE, GLOBAL_SIZE),
        "local": torch.rand(NUM_LOCAL * BATCH, 1, LOCAL_SIZE, LOCAL_SIZE),
    }
    tensors = {name: torch.from_numpy(column) for name, column in columns.items()}
    return Batch(step=step, image_ids=tuple(samples.image_ids), views=views, columns=tensors)


def train_step(objective: RadDino, optimizer: torch.optim.Optimizer, step: int) -> tuple[float, float]:
    """Wall and CPU seconds of one whole step: masks, forward, backward, AdamW, EMA."""
    start, start_cpu = time.perf_counter(), time.process_time()
    optimizer.zero_grad()
    objective(make_batch(step)).loss.backward()
    optimizer.step()
    objective.after_step(step)
    return time.perf_counter() - start, time.process_time() - start_cpu


def ask(peer: subprocess.Popen[str]) -> tuple[float, float]:
    """Wall and CPU seconds of one step of the peer."""
    assert peer.stdin is not None and peer.stdout is not None
    peer.stdin.write("step\n")
    peer.stdin.flush()
    wall, cpu = peer.stdout.readline().split()
    return float(wall), float(cpu)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", help="python of an environment with lightly-train")
    parser.add_argument("--out", type=Path, help="jobs/results/dino_step.jsonl")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="with 1, CPU seconds are comparable on a busy machine")
    parser.add_argument("--profile", action="store_true", help="print the costliest operators instead")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    objective, optimizer = build()
    train_step(objective, optimizer, 0)
    if args.profile:
        with profile(activities=[ProfilerActivity.CPU]) as record:
            train_step(objective, optimizer, 1)
        print(record.key_averages().table(sort_by="self_cpu_time_total", row_limit=18, max_name_column_width=40))
        return
    peer = None
    if args.peer:
        peer = subprocess.Popen(
            [args.peer, PEER, str(args.threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    if peer is not None:
        ask(peer)  # the first step of a process allocates
    pairs = []
    for step in range(1, args.steps + 1):
        ours = train_step(objective, optimizer, step)
        line = f"step {step}: ours {ours[0]:.2f} s ({ours[1]:.2f} CPU s)"
        if peer is not None:
            theirs = ask(peer)
            pairs.append((ours, theirs))
            wall, cpu = (mine / other for mine, other in zip(ours, theirs, strict=True))
            line += f", lightly-train {theirs[0]:.2f} s ({theirs[1]:.2f} CPU s), ratio {wall:.3f} (CPU {cpu:.3f})"
        print(line, flush=True)
    if pairs:
        wall, cpu = (statistics.median(ours[i] / theirs[i] for ours, theirs in pairs) for i in range(2))
        print(f"median ratio of {len(pairs)} pairs: {wall:.3f} (CPU {cpu:.3f})")
        row = {
            "commit": package_commit(),
            "machine": this_machine(),
            "torch": torch.__version__,
            "threads": args.threads,
            "wall_and_cpu_s": [{"ours": ours, "lightly_train": theirs} for ours, theirs in pairs],
            "median_ratio": {"wall": round(wall, 3), "cpu": round(cpu, 3)},
        }
        if args.out is not None:
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
    if peer is not None and peer.stdin is not None:
        peer.stdin.close()
        peer.wait(timeout=60)


if __name__ == "__main__":
    main()
