"""Clipping by the norm of each part, on two real ranks at every ZeRO stage, against plain torch on the whole batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medim_ray.config.schema import TrainConfig
from medim_ray.objectives.base import ParameterGroup, default_groups, default_part, split_by_part
from medim_ray.train import zero
from tests.unit.objectives import test_rad_dino as dino
from tests.unit.train.ranks import on_ranks

CONFIG = TrainConfig(steps=9, num_workers=2, global_batch=12, clip_norm=0.05, clip_by="part", weight_decay=0.0)
# Gradients of very different sizes: two parts are clipped, by different norms, and one is not.
SCALES = {"backbone": 1.0, "head": 30.0, "tail": 1e-3}
STEPS = 3


class ThreeParts(nn.Module):
    """Matrices and vectors in each part, of sizes that two ranks do not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 5))
        self.head = nn.Linear(5, 3)
        self.tail = nn.Linear(5, 1)

    def forward(self, x_BD: Tensor) -> Tensor:
        features = self.backbone(x_BD)
        detached = features.detach()
        loss: Tensor = SCALES["backbone"] * features.square().mean()
        loss = loss + SCALES["head"] * (self.head(detached) - 1).square().mean()
        return loss + SCALES["tail"] * self.tail(detached).square().mean()

    def parameter_groups(self) -> list[ParameterGroup]:
        return default_groups(self)

    def part_of(self, name: str) -> str:
        return default_part(name)


def batch(step: int) -> Tensor:
    return torch.randn(12, 7, generator=torch.Generator().manual_seed(step))


def reference(by_part: bool) -> tuple[dict[str, Tensor], dict[str, float]]:
    """AdamW's first moments after the steps, which are linear in the clipped gradients, and the last step's norms."""
    torch.manual_seed(0)
    module = ThreeParts()
    optimizer = torch.optim.AdamW(module.parameters(), lr=CONFIG.lr, betas=CONFIG.betas, weight_decay=0.0)
    norms = {}
    for step in range(STEPS):
        optimizer.zero_grad()
        module(batch(step)).backward()
        parts = {name: list(child.parameters()) for name, child in module.named_children()}
        grads = {name: [p.grad for p in part if p.grad is not None] for name, part in parts.items()}
        norms = {name: float(torch.nn.utils.get_total_norm(grad)) for name, grad in grads.items()}
        for part in parts.values() if by_part else [list(module.parameters())]:
            torch.nn.utils.clip_grad_norm_(part, CONFIG.clip_norm)
        optimizer.step()
    state = optimizer.state
    return {name: state[p]["exp_avg"].clone() for name, p in module.named_parameters()}, norms


def compare(config: TrainConfig, folder: str) -> None:
    torch.manual_seed(0)
    engine = zero.build_engine(ThreeParts(), config)
    rank = torch.distributed.get_rank()
    for step in range(STEPS):
        for micro in batch(step).chunk(2)[rank].chunk(config.accumulation):
            engine.backward(engine(micro))
            engine.step()
    by_part = config.clip_by == "part"
    moments, norms = reference(by_part)
    what = f"{config.clip_by}, stage {config.stage}, offload {config.offload_optimizer}"
    elements = 0
    for piece in zero.fragments(engine, own=False):
        expected = moments[piece.name].flatten()[piece.start : piece.start + piece.numel]
        torch.testing.assert_close(
            piece.tensors["exp_avg"],
            expected,
            rtol=2e-5,
            atol=1e-9,
            msg=lambda m: f"{what}, {piece.name}: {m}",  # noqa: B023
        )
        elements += piece.numel
    assert elements > 90, what
    total = sum(norm**2 for norm in norms.values()) ** 0.5
    assert float(engine.get_global_grad_norm()) == pytest.approx(total, rel=1e-5), what
    assert engine.clipping.norms == pytest.approx(norms if by_part else {}, rel=1e-5), what
    if rank == 0:
        Path(folder, what).touch()


def all_stages(folder: str) -> None:
    import deepspeed

    for stage in (0, 1, 2, 3):
        compare(replace(CONFIG, zero=stage), folder)
        compare(replace(CONFIG, zero=stage, clip_by="global"), folder)
    compare(replace(CONFIG, zero=2, micro_batch=3), folder)
    deepspeed.ops.__compatible_ops__ = {}  # as build_engine does without GPUs: these run on the CPU all the same
    for stage in (1, 2, 3):
        compare(replace(CONFIG, zero=stage, offload_optimizer=True, use_gpu=True), folder)


def test_each_stage_clips_as_one_process_does(tmp_path: Path) -> None:
    moments, norms = reference(by_part=True)
    clipped = [name for name, norm in norms.items() if norm > CONFIG.clip_norm]
    assert clipped == ["backbone", "head"], "the case does not tell parts from a whole"
    assert any(not torch.allclose(moments[name], value, rtol=0.01) for name, value in reference(False)[0].items())
    on_ranks(2, all_stages, str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 11


def test_the_parts_of_rad_dino_are_dinov2s_submodels() -> None:
    objective: Any = dino.make(separate_heads=True)
    split = split_by_part(objective, objective.parameter_groups())
    assert {part for part, _ in split} == {"student_encoder", "student_dino_head", "student_ibot_head"}
    together = [id(p) for _, group in split for p in group.parameters]
    assert len(set(together)) == len(together) == sum(p.requires_grad for p in objective.parameters())
    (mask_token,) = [part for part, g in split for p in g.parameters if p is objective.mask_token.token_D]
    assert mask_token == "student_encoder"
    assert default_part("mask_token.token_D") == "encoder" and default_part("decoder.blocks.0.x") == "decoder"


def test_clipping_by_part_needs_a_norm() -> None:
    with pytest.raises(ValueError, match=r"clip_by=part with clip_norm=0: nothing is clipped; give the norm"):
        TrainConfig(clip_by="part", clip_norm=0.0)
