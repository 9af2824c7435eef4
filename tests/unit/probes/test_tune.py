"""Learning rates by depth, batches, early stopping; and maps of four depths of ViT, ResNet and Hugging Face models."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn

from medim_ray.config.probe import SegmentConfig, TuneConfig
from medim_ray.models.vit import ImageEncoder
from medim_ray.probes.trainable import HubEncoder, OwnEncoder, PixelPatches, Trainable, evenly
from medim_ray.probes.tune import fit, parameter_groups, schedule


def _vit(depth: int = 3) -> OwnEncoder:
    config = ImageEncoder.Config(
        name="vit_tiny_patch16_224", image_size=32, patch_size=8, width=24, depth=depth, num_heads=2
    )
    return OwnEncoder(ImageEncoder(config))


def _hub() -> HubEncoder:
    config = transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )
    mean, std = torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.2)
    return HubEncoder(transformers.Dinov2Model(config).eval(), mean, std)


def _ratios(encoder: Trainable, config: TuneConfig) -> dict[str, float]:
    of = {
        id(p): group["lr_ratio"]
        for group in parameter_groups(encoder, nn.Linear(2, 2), config, True)
        for p in group["params"]
    }
    return {name: of[id(p)] for name, p in encoder.named_parameters()}


def test_learning_rates_fall_layer_by_layer_from_the_head_down() -> None:
    config = TuneConfig(layer_decay=0.5)
    found = _ratios(_vit(), config)
    expected = {"norm.": 0.5, "blocks.2.": 0.25, "blocks.1.": 0.125, "blocks.0.": 0.0625, "patch_embed.": 0.03125}
    expected |= {"pos_embed": 0.03125, "cls_token": 0.03125}
    for part, ratio in expected.items():
        own = [value for name, value in found.items() if name.startswith(f"model.backbone.{part}")]
        assert own and set(own) == {ratio}, part
    hub = _ratios(_hub(), config)
    assert {value for name, value in hub.items() if "layer.2." in name or "layers.2." in name} == {0.25}
    assert {value for name, value in hub.items() if "embeddings." in name} == {0.03125}
    resnet = _ratios(OwnEncoder(ImageEncoder(ImageEncoder.Config(name="resnet18", image_size=32))), config)
    assert {value for name, value in resnet.items() if ".layer4." in name} == {0.25}
    assert {value for name, value in resnet.items() if ".layer1." in name} == {0.5**5}
    assert {value for name, value in resnet.items() if name.startswith("model.backbone.conv1")} == {0.5**6}


def test_biases_and_norms_do_not_decay_and_a_frozen_encoder_has_no_group() -> None:
    groups = parameter_groups(_vit(), nn.Linear(2, 2), TuneConfig(weight_decay=0.1), True)
    for group in groups:
        assert {p.ndim > 1 for p in group["params"]} == {group["weight_decay"] == 0.1}
    frozen = parameter_groups(_vit(), nn.Linear(2, 2), TuneConfig(), False)
    assert sum(len(group["params"]) for group in frozen) == 2


def test_maps_have_four_depths_on_the_patch_grid_or_at_the_strides_of_a_resnet() -> None:
    assert evenly(12) == (2, 5, 8, 11) and evenly(2) == (0, 0, 1, 1) and evenly(24) == (5, 11, 17, 23)
    images = torch.rand(2, 1, 64, 64)
    resnet = OwnEncoder(ImageEncoder(ImageEncoder.Config(name="resnet18", image_size=64)))
    assert [tuple(x.shape) for x in resnet.maps(images)] == [
        (2, 64, 16, 16), (2, 128, 8, 8), (2, 256, 4, 4), (2, 512, 2, 2)
    ]  # fmt: skip
    assert resnet.is_pyramid and resnet.widths == (64, 128, 256, 512)
    vit, hub, pixels = _vit().eval(), _hub(), PixelPatches(8)
    for encoder, side in ((vit, 32), (hub, 28), (pixels, 32)):
        maps = encoder.maps(images[:, :, :side, :side])
        assert not encoder.is_pyramid and tuple(x.shape[1] for x in maps) == encoder.widths
    with torch.no_grad():
        inside = images[:, :, :32, :32]
        out = vit.model(inside)
        torch.testing.assert_close(vit.maps(inside)[3].flatten(2).transpose(1, 2), out.patches_BND)
        expected = torch.cat([out.global_BD, out.patches_BND.mean(1)], dim=1)
        torch.testing.assert_close(vit.vectors(inside), expected)
    gray = pixels.maps(images)[0][0, :, 1, 2].reshape(8, 8)
    torch.testing.assert_close(gray, images[0, 0, 8:16, 16:24])


def test_training_stops_without_gain_and_keeps_the_best_weights() -> None:
    """What is judged has its least value at the second look of ten."""
    head, encoder = nn.Linear(2, 1), PixelPatches(8)
    seen: list[float] = []
    states: list[dict[str, Tensor]] = []

    def judge() -> float:
        states.append({name: value.clone() for name, value in head.state_dict().items()})
        seen.append(float(abs(len(seen) - 2)))
        return seen[-1]

    batches: list[NDArray[np.int64]] = []

    def loss_of(at: NDArray[np.int64]) -> Tensor:
        batches.append(at)
        return head(torch.ones(len(at), 2)).square().mean() + 1.0

    done = fit(encoder, head, 10, loss_of, judge, TuneConfig(steps=100, batch=4), 0, False)
    assert (done.best, done.step, done.steps) == (0.0, 20, 50) and seen == [2.0, 1.0, 0.0, 1.0, 2.0, 3.0]
    assert all(torch.equal(value, states[2][name]) for name, value in head.state_dict().items())
    assert {len(at) for at in batches} == {4} and sorted(set(np.concatenate(batches))) == list(range(10))
    assert len(set(np.concatenate(batches[:2]))) == 8, "an epoch sees no image twice"


def test_the_learning_rate_warms_up_and_ends_near_zero() -> None:
    rates = [schedule(step, 100) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and rates[99] < 0.001 and rates[10:] == sorted(rates[10:], reverse=True)


def test_options_out_of_range_name_the_rule() -> None:
    for wrong, message in (
        ({"layer_decay": 0.0}, "layer_decay=0.0: must lie in"), ({"batch": 1}, "of 2 images"), ({"lr": 0.0}, "lr=0.0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            TuneConfig(**wrong)
    with pytest.raises(ValueError, match="'vitdet' is none of linear, upernet, setr"):
        SegmentConfig(heads=("vitdet",))
