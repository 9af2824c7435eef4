"""MAE and SimMIM: they learn, look at hidden patches only for the loss, and weigh every sample the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from medim_ray.masking import MASKINGS
from medim_ray.objectives.pixels import patchify, unit_patches, visible_patches
from tests.unit.objectives.batches import batch_for, build, train

UNIFORM = {"name": "uniform", "ratio": 0.75}


def uniform() -> Any:
    return MASKINGS["uniform"](MASKINGS["uniform"].Config())


@pytest.mark.parametrize(("name", "lr"), [("mae", 3e-3), ("simmim", 3e-3)])
def test_overfits(name: str, lr: float) -> None:
    losses = train(build(name, UNIFORM), uniform(), steps=100, lr=lr)
    start, end = losses[0], sum(losses[-10:]) / 10
    assert end < start / 2, f"{start:.3f} -> {end:.3f}"


@pytest.mark.parametrize("name", ["mae", "simmim"])
def test_two_workers_with_half_a_batch_have_the_same_loss(name: str) -> None:
    objective, masking = build(name, UNIFORM), uniform()
    whole = batch_for(masking, objective.encoder.grid, 8, 64)
    parts = []
    for rows in (slice(0, 4), slice(4, 8)):
        part = type(whole)(
            step=0,
            image_ids=whole.image_ids[rows],
            views={"image": whole.views["image"][rows]},
            columns={key: value[rows] for key, value in whole.columns.items()},
        )
        parts.append(objective(part).loss)
    torch.testing.assert_close(torch.stack(parts).mean(), objective(whole).loss, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["mae", "simmim"])
def test_loss_is_of_hidden_patches_and_the_encoder_sees_the_others(name: str) -> None:
    objective, masking = build(name, UNIFORM), uniform()
    batch = batch_for(masking, objective.encoder.grid, 2, 64)
    pixels = batch.views["image"].requires_grad_()
    objective(batch).loss.backward()
    assert pixels.grad is not None
    touched_BN = patchify(pixels.grad, 16).abs().sum(-1) > 0
    assert touched_BN.all(), "hidden patches are the target, visible ones the input"
    hidden_BN = batch.columns["mask/uniform_BN"]
    # Hidden pixels do not reach the prediction: with the target held fixed their gradient vanishes.
    features = objective.encoder(pixels, visible_BK=visible_patches(hidden_BN))
    (gradient,) = torch.autograd.grad(features.patches_BND.pow(2).sum(), pixels)
    assert torch.equal(patchify(gradient, 16).abs().sum(-1) > 0, ~hidden_BN)


def test_logs_the_share_of_hidden_patches() -> None:
    objective = build("mae", UNIFORM)
    logs = objective(batch_for(uniform(), objective.encoder.grid, 2, 64)).logs
    assert logs["mask/uniform/hidden_ratio"] == 0.75
    assert objective.warnings(0, {name: float(value) for name, value in logs.items()}) == []
    assert objective.warnings(0, {"mask/anatomy/fallback_ratio": 0.5}) == []
    assert "anatomy finds no word" in " ".join(objective.warnings(0, {"mask/anatomy/fallback_ratio": 0.6}))


def test_patchify_is_row_by_row() -> None:
    x = torch.arange(64.0).view(1, 1, 8, 8)
    patches = patchify(x, 4)
    assert patches.shape == (1, 4, 16)
    torch.testing.assert_close(patches[0, 1], x[0, 0, :4, 4:].flatten())
    torch.testing.assert_close(unit_patches(patches).mean(-1), torch.zeros(1, 4), atol=1e-6, rtol=0)
    assert torch.isfinite(unit_patches(torch.zeros(1, 4, 16))).all()


@pytest.mark.parametrize(
    ("masking", "encoder", "message"),
    [
        ({"name": "uniform", "on": "feature"}, None, "masking.on=feature"),
        ({"name": "dinov2_block"}, None, "2 masks"),
        ({"name": "kdm", "on": "input"}, None, "text encoder"),
        (UNIFORM, {"name": "resnet18", "image_size": 64}, "ResNet"),
    ],
)
def test_what_does_not_fit_is_refused(masking: dict[str, Any], encoder: dict[str, Any] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("mae", masking, encoder)


def test_unequal_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="hides 1 to 2 patches"):
        visible_patches(torch.tensor([[True, True, False], [True, False, False]]))
    with pytest.raises(ValueError, match="decoder_width=130"):
        build("mae", UNIFORM, decoder_width=130)
