"""Activation checkpointing and compiled blocks change memory and time, not losses, gradients, masks or statistics."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medim_ray.masking import MASKINGS
from medim_ray.models.blocks import attention, checkpoint_activations, pick_attention
from medim_ray.models.vit import ImageEncoder
from medim_ray.types import Batch
from tests.unit.objectives import test_rad_dino as dino
from tests.unit.objectives.batches import batch_for, build
from tests.unit.objectives.test_medim import BOTH, medim, strategy

UNIFORM = {"name": "uniform", "ratio": 0.5}
VIT = {"image_size": 64, "width": 48, "depth": 3, "num_heads": 3, "drop_path": 0.3}


def mae_parts() -> tuple[Any, Batch]:
    objective = build("mae", UNIFORM, VIT)
    return objective, batch_for(MASKINGS["uniform"](MASKINGS["uniform"].Config()), objective.encoder.grid, 4, 64)


def medim_parts(**encoder: Any) -> tuple[Any, Batch]:
    objective = medim(encoder=encoder)
    return objective, batch_for(strategy(**BOTH), objective.encoder.grid, 4, 64)


def dino_parts() -> tuple[Any, Batch]:
    return dino.make(drop_path=0.4), dino.make_batch()


CASES: dict[str, Callable[[], tuple[Any, Batch]]] = {
    "mae": mae_parts,
    "medim": lambda: medim_parts(**VIT),
    "medim-resnet": lambda: medim_parts(name="resnet18", image_size=64),
    "rad_dino": dino_parts,
}


def kept_bytes(run: Callable[[], Tensor], own: nn.Module) -> tuple[Tensor, int]:
    """The result, and the bytes of the activations that autograd keeps for it."""
    parameters = {p.untyped_storage().data_ptr() for p in own.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return result, sum(kept.values())


@pytest.mark.parametrize("name", CASES)
def test_recomputed_blocks_give_the_same_step(name: str) -> None:
    plain, batch = CASES[name]()
    again = copy.deepcopy(plain)
    checkpoint_activations(again)
    results = []
    for objective in (plain, again):
        objective.train()
        torch.manual_seed(7)
        loss, num_bytes = kept_bytes(lambda: objective(batch).loss, objective)  # noqa: B023 (called at once)
        loss.backward()
        drawn = torch.rand(1)
        results.append((loss.detach(), num_bytes, drawn))
    (loss, num_bytes, drawn), (loss_again, num_bytes_again, drawn_again) = results
    torch.testing.assert_close(loss_again, loss, rtol=1e-6, atol=0)
    assert num_bytes_again < 0.8 * num_bytes
    assert torch.equal(drawn, drawn_again), "the generator is where it would have been"
    gradients = 0
    for (key, one), other in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), key
        if one.grad is not None and other.grad is not None:
            gradients += 1
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-6, atol=1e-8, msg=key)
    assert gradients > 10
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), again.buffers(), strict=True)), "moved twice"


def test_a_frozen_or_evaluated_model_is_not_recomputed() -> None:
    objective, batch = medim_parts(**VIT)
    checkpoint_activations(objective)
    objective.eval()
    _, evaluated = kept_bytes(lambda: objective(batch).loss, objective)
    objective.train()
    _, training = kept_bytes(lambda: objective(batch).loss, objective)
    assert training < evaluated


def test_plain_attention_stands_in_on_a_cpu_in_16_bits_alone() -> None:
    blocks = ImageEncoder(ImageEncoder.Config(image_size=64, width=48, depth=2, num_heads=3)).backbone.blocks
    for x_BLD, half, fused in (
        (torch.zeros(1, 50, 48), False, True),
        (torch.zeros(1, 50, 48), True, False),
        (torch.zeros(1, 50, 48, dtype=torch.bfloat16), False, False),
        (torch.zeros(1, 513, 48), True, True),  # memory grows by the square
        (torch.zeros(1, 50, 48, device="meta"), True, True),
    ):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            pick_attention(blocks, x_BLD)
        assert [block.attn.fused_attn for block in blocks] == [fused] * 2
    query, key, value = torch.randn(3, 2, 3, 50, 16, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = attention(query, key, value)
    torch.testing.assert_close(plain.float(), attention(query, key, value), rtol=0.02, atol=0.02)
