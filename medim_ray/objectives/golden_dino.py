"""One DINOv2 step on golden inputs: the objective itself against the numbers of the paper's own code.

Reads dinov2_step_*.npz (PAPERS.md, golden notes). The command line and the table are in check_golden.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from medim_ray.masking.block import StepBlockMasking
from medim_ray.models.heads_dino import DinoHead
from medim_ray.models.layouts import MASK_TOKEN, to_timm
from medim_ray.models.load import load_head_state, load_weights
from medim_ray.models.vit import ImageEncoder
from medim_ray.objectives.base import Parts
from medim_ray.objectives.comparison import Arrays, Comparison
from medim_ray.objectives.rad_dino import RadDino
from medim_ray.types import Batch

# The file's name of a loss -> ours, as displayed by DINOv2.
LOSSES = {
    "out_dino_local_crops_loss": "dino_local",
    "out_dino_global_crops_loss": "dino_global",
    "out_koleo_loss": "koleo",
    "out_ibot_loss": "ibot",
}
CENTRES = {"out_dino_center": "dino_centre_K", "out_ibot_center": "ibot_centre_K"}
TEACHER_TEMPERATURE = 0.05


def dino_names(arrays: Arrays) -> set[str]:
    """Names of the reference quantities of a file."""
    return {key for key in arrays if key.startswith(("out_", "gradnorm_"))}


def dino_outputs(arrays: Arrays) -> list[str]:
    """The quantities that a file must have: losses, centres and the gradient norm of each weight of its student."""
    norms = [key.replace("student.", "gradnorm_", 1) for key in arrays if key.startswith("student.")]
    return ["out_total_backward", *LOSSES, *CENTRES, *norms]


def compare_dino(arrays: Arrays) -> list[Comparison]:
    """Displayed losses and the total that is back-propagated (1e-5), gradient norms (1e-4), centres after the step."""
    objective = build(arrays)
    output = objective(batch_of(arrays))
    output.loss.backward()
    ours = {"out_total_backward": output.loss.detach()} | {key: output.logs[name] for key, name in LOSSES.items()}
    lines = [Comparison(key, LOSSES.get(key, "total"), arrays[key], value.numpy(), 1e-5) for key, value in ours.items()]
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            key = f"gradnorm_{_hub_name(name)}"
            lines.append(Comparison(key, _hub_name(name), arrays[key], parameter.grad.norm().numpy(), 1e-4))
    objective.after_step(0)
    for key, name in CENTRES.items():
        centre_K = getattr(objective, name).numpy()
        lines.append(Comparison(key, name, arrays[key].reshape(-1), centre_K, 1e-6, relative=False))
    return lines


def build(arrays: Arrays) -> RadDino:
    """The objective with the file's student, teacher and centres.

    A file of a Sinkhorn step is known by its centres, which such a step leaves alone.
    """
    tensors = {key: torch.from_numpy(np.array(value)) for key, value in arrays.items() if value.dtype == np.float32}
    num_prototypes, bottleneck = tensors["student.dino_head.last_layer.weight_v"].shape
    hidden, width = tensors["student.dino_head.mlp.0.weight"].shape
    head = DinoHead.Config(num_prototypes=num_prototypes, hidden=hidden, bottleneck=bottleneck)
    config = RadDino.Config(
        head=head,
        centring="sinkhorn" if np.array_equal(arrays["in_dino_center"], arrays["out_dino_center"]) else "centre",
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


def batch_of(arrays: Arrays) -> Batch:
    """The file's crops and masks as a batch."""
    masks_GN = torch.from_numpy(arrays["in_collated_masks"])
    num = len(masks_GN) // 2
    views = {
        "global": torch.from_numpy(arrays["in_collated_global_crops"]),
        "local": torch.from_numpy(arrays["in_collated_local_crops"]),
    }
    columns = {"mask/block_BSN": masks_GN.unflatten(0, (2, num)).transpose(0, 1)}
    return Batch(step=0, image_ids=tuple(f"golden{i}" for i in range(num)), views=views, columns=columns)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _hub_name(name: str) -> str:
    name = name.replace("student_encoder.backbone.", "backbone.").replace("student_dino_head.", "dino_head.")
    return name.replace("mask_token.token_D", "backbone.mask_token")
