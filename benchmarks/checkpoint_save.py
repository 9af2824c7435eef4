"""What a step pays for a checkpoint: the copy that it waits for, beside writing and committing it, on one rank.

`python -m benchmarks.checkpoint_save [FOLDER]`: 28 million parameters with AdamW (mae with ViT-Small), saved to FOLDER;
paired, so that a busy machine slows both sides alike.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from medim_ray.train.saver import Saver
from medim_ray.train.store import CheckpointStore

NUM_PAIRS = 7


def engine() -> Any:
    """What DeepSpeed's engine is to a checkpoint at ZeRO 0."""
    module = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(27)))
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 1024)).sum().backward()
    optimizer.step()
    no_scale = {"torch_autocast_z0_gradscaler": None, "fp16_enabled": lambda: False}
    return SimpleNamespace(module=module, optimizer=optimizer, **no_scale)


def main(folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/.meeting", rank=0, world_size=1)
    store, trained = CheckpointStore(folder), engine()
    saver = Saver(store, 0, {}, committed=lambda name: store.prune(1, name))
    pairs = []
    for step in range(1, NUM_PAIRS + 1):
        began = time.perf_counter()
        saver.save(trained, step)
        copied = time.perf_counter()
        saver.finish()
        pairs.append((copied - began, time.perf_counter() - began))
    in_step, whole = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    num_bytes = sum(file["bytes"] for file in store.open(store.names()[0]).manifest["files"].values())
    print(f"{num_bytes / 1e6:.0f} MB: {in_step:.3f} s in the step, {whole:.3f} s to the commit, ratio {ratio:.2f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as here:
            main(here)
