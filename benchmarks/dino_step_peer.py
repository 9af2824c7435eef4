"""lightly-train's `dinov2` at the sizes of dino_step.py: a step for each line of standard input, its seconds as answer.

Runs in an environment of its own (`make peers`), started by dino_step.py. The method object is stepped by hand, so that
no loader or logger is timed: masks, forward, backward, AdamW, EMA, as in ours.
"""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace
from typing import Any

import torch
from lightly_train._methods.dinov2.dinov2 import DINOv2, DINOv2AdamWViTArgs, DINOv2Args  # type: ignore[import-not-found]
from lightly_train._models.embedding_model import EmbeddingModel  # type: ignore[import-not-found]
from lightly_train._models.package_helpers import get_wrapped_model  # type: ignore[import-not-found]

BATCH, GLOBAL_SIZE, LOCAL_SIZE, NUM_LOCAL = 8, 224, 98, 4


def build() -> tuple[Any, torch.optim.Optimizer]:
    wrapped = get_wrapped_model(
        "dinov2/vits14-noreg",
        num_input_channels=3,
        model_args={"drop_path_rate": 0.0, "img_size": GLOBAL_SIZE},
        load_weights=False,
    )
    method = DINOv2(DINOv2Args(), DINOv2AdamWViTArgs(), EmbeddingModel(wrapped), BATCH, 3)
    method.method_args.weight_decay_start = 0.04
    method.trainer = SimpleNamespace(global_step=0, estimated_stepping_batches=100, max_epochs=1, world_size=1)
    (optimizer,), _ = method.configure_optimizers()
    return method.train(), optimizer


def train_step(method: Any, optimizer: torch.optim.Optimizer, step: int) -> tuple[float, float]:
    """Wall and CPU seconds."""
    method.trainer.global_step = step
    sizes = [GLOBAL_SIZE] * 2 + [LOCAL_SIZE] * NUM_LOCAL
    batch = {"views": [torch.rand(BATCH, 3, size, size) for size in sizes]}
    start, start_cpu = time.perf_counter(), time.process_time()
    optimizer.zero_grad()
    method.training_step_impl(batch, step).loss.backward()
    method.on_before_optimizer_step(optimizer)
    optimizer.step()
    method.on_train_batch_end(None, batch, step)
    return time.perf_counter() - start, time.process_time() - start_cpu


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    method, optimizer = build()
    for step, _ in enumerate(sys.stdin):
        print(*train_step(method, optimizer, step), flush=True)


if __name__ == "__main__":
    main()
