"""RAD-DINO under DeepSpeed: one loss curve at every ZeRO stage and worker count; a teacher sharded like the student.

Two workers take local and global crops in one pass (`objective.pack`), one worker takes a pass a size: the same curve.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from medim_ray.config.schema import TrainConfig
from medim_ray.masking.block import StepBlockMasking
from medim_ray.models.heads_dino import DinoHead
from medim_ray.models.vit import ImageEncoder
from medim_ray.objectives.base import Parts
from medim_ray.objectives.rad_dino import RadDino
from medim_ray.types import Batch

pytestmark = pytest.mark.system
Results = dict[int, dict[str, tuple[list[float], dict[str, Tensor]]]]
NUM_STEPS, GLOBAL_BATCH = 20, 8
RUNS: list[tuple[int, Literal["fp32", "bf16"]]] = [
    (0, "fp32"),
    (1, "fp32"),
    (2, "fp32"),
    (3, "fp32"),
    (0, "bf16"),
    (3, "bf16"),
]


def objective(pack: Literal["on", "off"]) -> RadDino:
    """Weights away from their start, where all features are alike and Adam follows the signs of rounding errors."""
    torch.manual_seed(0)
    config = ImageEncoder.Config(
        name="vit_small_patch14_dinov2", image_size=56, width=48, depth=2, num_heads=3, drop_path=0.0
    )
    encoder = ImageEncoder(config)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    head = DinoHead.Config(num_prototypes=64, hidden=32, bottleneck=16)
    options = RadDino.Config(head=head, koleo_gather=True, ema_start=0.9, frozen_ratio=0.1, pack=pack)
    masking = StepBlockMasking(StepBlockMasking.Config())
    parts = Parts(encoder=encoder, text=None, masking=masking, num_steps=NUM_STEPS, global_batch=GLOBAL_BATCH)
    return RadDino(options, parts)


def batch(step: int, rank: int, num_ranks: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    rows = slice(rank * GLOBAL_BATCH // num_ranks, (rank + 1) * GLOBAL_BATCH // num_ranks)
    views = {
        name: torch.rand(crops, GLOBAL_BATCH, 1, size, size, generator=generator)[:, rows].flatten(0, 1)
        for name, crops, size in (("global", 2, 56), ("local", 3, 28))
    }
    hidden_BSN = torch.rand(GLOBAL_BATCH, 2, 16, generator=generator) < 0.3
    hidden_BSN[::2, 0] = False
    hidden_BSN[:4, 1] = False  # the first rank of two has unequally many masked patches
    ids = tuple(str(i) for i in range(GLOBAL_BATCH)[rows])
    return Batch(step=step, image_ids=ids, views=views, columns={"mask/block_BSN": hidden_BSN[rows]})


def curve(
    stage: int, precision: Literal["fp32", "bf16"], rank: int, num_ranks: int
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of the steps and the teacher at the end, gathered."""
    import deepspeed

    from medim_ray.train.zero import build_engine

    module = objective(pack="on" if num_ranks > 1 else "off")
    train = TrainConfig(
        steps=NUM_STEPS, num_workers=num_ranks, zero=stage, global_batch=GLOBAL_BATCH, precision=precision
    )
    engine = build_engine(module, train)
    losses = []
    for step in range(NUM_STEPS):
        for group in engine.optimizer.param_groups:
            group["lr"] = 1e-4 * min(1.0, (step + 1) / 5) * group["lr_ratio"] * (step >= group["frozen_steps"])
        output = engine(batch(step, rank, num_ranks))
        engine.backward(output.loss)
        engine.step()
        module.after_step(step)
        loss = output.loss.detach().clone()
        dist.all_reduce(loss)
        losses.append(float(loss) / num_ranks)
    teacher = {}
    for name, parameter in module.encoder.named_parameters():
        if stage == 3:
            assert parameter.numel() == 0, "the teacher is not sharded"
        with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
            assert parameter.dtype == torch.float32
            teacher[name] = parameter.detach().clone()
    return losses, teacher


def _rank(rank: int, num_ranks: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks), "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{num_ranks}", rank=rank, world_size=num_ranks)
    runs = [run for run in RUNS if num_ranks == 2 or run[1] == "fp32"]
    results = {run: curve(*run, rank, num_ranks) for run in runs}
    if rank == 0:
        torch.save(
            {f"{stage} {precision}": result for (stage, precision), result in results.items()},
            f"{folder}/{num_ranks}.pt",
        )
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """By number of ranks, then by "stage precision"."""
    folder = tmp_path_factory.mktemp("zero")
    for num_ranks in (1, 2):
        command = [sys.executable, __file__]
        ranks = [
            subprocess.Popen([*command, str(rank), str(num_ranks), str(folder)], stdout=subprocess.DEVNULL)
            for rank in range(num_ranks)
        ]
        assert [rank.wait(timeout=500) for rank in ranks] == [0] * num_ranks
    return {num_ranks: torch.load(Path(folder) / f"{num_ranks}.pt") for num_ranks in (1, 2)}


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_and_two_workers_at_each_stage_have_one_curve(results: Results, stage: int, num_ranks: int) -> None:
    (one, teacher_one), (other, teacher_other) = results[1]["0 fp32"], results[num_ranks][f"{stage} fp32"]
    assert len(set(one)) == NUM_STEPS
    assert max(abs(a - b) / abs(a) for a, b in zip(one, other, strict=True)) < 1e-4
    for name, value in teacher_one.items():
        torch.testing.assert_close(teacher_other[name], value, rtol=1e-4, atol=1e-5)


def test_bf16_sharded_teacher_follows_the_unsharded_one(results: Results) -> None:
    (one, teacher_one), (two, teacher_two) = results[2]["0 bf16"], results[2]["3 bf16"]
    assert max(abs(a - b) / abs(a) for a, b in zip(one, two, strict=True)) < 0.02
    for name, value in teacher_one.items():
        torch.testing.assert_close(teacher_two[name], value, rtol=0.02, atol=0.005)


if __name__ == "__main__":
    _rank(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
