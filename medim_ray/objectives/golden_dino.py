"""One DINOv2 step on golden inputs: the objective itself against the numbers of the paper's own code.

Reads dinov2_step_*.npz (PAPERS.md, golden notes). The command line and the table are in check_golden.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medim_ray.masking.block import StepBlockMasking
from medim_ray.models.heads_dino import DinoHead
from medim_ray.models.layouts import MASK_TOKEN, to_timm
from medim_ray.models.load import load_head_state, load_weights
from medim_ray.models.vit import ImageEncoder
from medim_ray.objectives.base import Parts
from medim_ray.objectives.rad_dino import RadDino
from medim_ray.types import Batch

Arrays = Mapping[str, NDArray[Any]]

# The file's name of a loss -> ours, as displayed by DINOv2.
LOSSES = {
    "out_dino_local_crops_loss": "dino_local",
    "out_dino_global_crops_loss": "dino_global",
    "out_koleo_loss": "koleo",
    "out_ibot_loss": "ibot",
}
TEACHER_TEMPERATURE = 0.05


@dataclass(frozen=True)
class Comparison:
    """One number (or the worst one of an array) of the file against ours; `error` must be at most `tolerance`."""

    name: str
    ours: float
    golden: float
    error: float
    tolerance: float


def compare(data: Arrays, centring: str) -> Iterator[Comparison]:
    """Every output of one golden step. centring: "centre" or "sinkhorn", from the file's name."""
    objective = build(data, centring)
    output = objective(batch_of(data))
    output.loss.backward()
    yield _relative("total", float(output.loss.detach()), float(data["out_total_backward"]), 1e-5)
    for golden, ours in LOSSES.items():
        yield _relative(ours, float(output.logs[ours]), float(data[golden]), 1e-5)
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            norm = float(parameter.grad.norm())
            yield _relative(f"gradient {name}", norm, float(data[f"gradnorm_{_hub_name(name)}"]), 1e-4)
    objective.after_step(0)
    for kind in ("dino", "ibot"):
        centre_K = getattr(objective, f"{kind}_centre_K").numpy()
        golden_K = data[f"out_{kind}_center"].reshape(-1)
        worst = int(np.abs(centre_K - golden_K).argmax())
        error = float(abs(centre_K[worst] - golden_K[worst]))
        yield Comparison(f"centre {kind}", float(centre_K[worst]), float(golden_K[worst]), error, 1e-6)


def build(data: Arrays, centring: str) -> RadDino:
    """The objective with the file's student, teacher and centres."""
    tensors = {key: torch.from_numpy(np.array(value)) for key, value in data.items() if value.dtype == np.float32}
    num_prototypes, bottleneck = tensors["student.dino_head.last_layer.weight_v"].shape
    hidden, width = tensors["student.dino_head.mlp.0.weight"].shape
    head = DinoHead.Config(num_prototypes=num_prototypes, hidden=hidden, bottleneck=bottleneck)
    config = RadDino.Config(
        head=head,
        centring="sinkhorn" if centring == "sinkhorn" else "centre",
        teacher_temperature_start=TEACHER_TEMPERATURE,
        teacher_temperature=TEACHER_TEMPERATURE,
    )
    crop = tensors["in_collated_global_crops"]
    encoder = ImageEncoder(
        ImageEncoder.Config(
            name="vit_small_patch14_dinov2",
            image_size=crop.shape[-1],
            mean=0.0,
            std=1.0,
            width=width,
            depth=sum(key.startswith("student.backbone.blocks.") and key.endswith("ls1.gamma") for key in tensors),
            num_heads=3,
        )
    )
    masking = StepBlockMasking(StepBlockMasking.Config())
    parts = Parts(encoder=encoder, text=None, masking=masking, num_steps=10, global_batch=len(crop) // 2)
    objective = RadDino(config, parts)
    for branch, vit, dino_head in (
        ("student.", objective.student_encoder, objective.student_dino_head),
        ("teacher.", objective.encoder, objective.dino_head),
    ):
        weights = to_timm(_below(tensors, f"{branch}backbone."))
        load_weights(vit.backbone, weights, branch)
        load_head_state(dino_head, _below(tensors, f"{branch}dino_head."), branch)
        if branch == "student.":
            objective.mask_token.token_D.data.copy_(weights.extras[MASK_TOKEN][0])
    objective.dino_centre_K.copy_(tensors["in_dino_center"].reshape(-1))
    objective.ibot_centre_K.copy_(tensors["in_ibot_center"].reshape(-1))
    return objective


def batch_of(data: Arrays) -> Batch:
    """The file's crops and masks as a batch."""
    masks_GN = torch.from_numpy(data["in_collated_masks"])
    num = len(masks_GN) // 2
    views = {
        "global": torch.from_numpy(data["in_collated_global_crops"]),
        "local": torch.from_numpy(data["in_collated_local_crops"]),
    }
    columns = {"mask/block_BSN": masks_GN.unflatten(0, (2, num)).transpose(0, 1)}
    return Batch(step=0, image_ids=tuple(f"golden{i}" for i in range(num)), views=views, columns=columns)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _hub_name(name: str) -> str:
    name = name.replace("student_encoder.backbone.", "backbone.").replace("student_dino_head.", "dino_head.")
    return name.replace("mask_token.token_D", "backbone.mask_token")


def _relative(name: str, ours: float, golden: float, tolerance: float) -> Comparison:
    return Comparison(name, ours, golden, abs(ours - golden) / max(abs(golden), 1e-12), tolerance)
