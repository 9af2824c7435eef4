"""Operations and kept activations against torch's own counters."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from medim_ray.models.vit import ImageEncoder
from medim_ray.plan.flops import Vit, meta_encoder, mlp_pass, traced_pass, vit_of, vit_pass


def shape_of(config: ImageEncoder.Config) -> Vit:
    vit = vit_of(meta_encoder(config))
    assert vit is not None
    return vit


@pytest.mark.parametrize(
    ("name", "size"), [("vit_tiny_patch16_224", 224), ("vit_base_patch14_dinov2", 518), ("vit_large_patch16_224", 96)]
)
def test_operations_of_a_vit_are_those_that_torch_counts(name: str, size: int) -> None:
    config = ImageEncoder.Config(name=name, image_size=size)
    vit = shape_of(config)
    planned = vit_pass(
        vit, "x", vit.num_tokens(size), 2, num_patches=(size // vit.patch_size) ** 2, element_bytes=4, trained=True
    )
    encoder = meta_encoder(config)
    with FlopCounterMode(display=False) as forward:
        features = encoder(torch.empty(2, 1, size, size, device="meta"))
    with FlopCounterMode(display=False) as backward:
        (features.global_BD.sum() + features.patches_BND.sum()).backward()
    assert planned.forward_flops == forward.get_total_flops()
    assert planned.backward_flops == backward.get_total_flops()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_dinov2"])
def test_kept_activations_of_a_vit_are_those_that_autograd_saves(name: str) -> None:
    config = ImageEncoder.Config(name=name, image_size=112, depth=3)
    encoder, num_images, sizes = ImageEncoder(config), 2, dict[int, int]()
    parameters = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features = encoder(torch.rand(num_images, 1, 112, 112, generator=torch.Generator().manual_seed(0)))
    vit = shape_of(config)
    planned = vit_pass(
        vit, "x", vit.num_tokens(112), 1, num_patches=(112 // vit.patch_size) ** 2, element_bytes=4, trained=True
    )
    assert features.global_BD.requires_grad
    summed_colours = 4 * vit.width * vit.patch_size**2  # of the patch embedding's weights, whatever the batch
    assert planned.kept_bytes * num_images == pytest.approx(sum(sizes.values()) - summed_colours, rel=0.03)


def test_a_teacher_keeps_nothing_and_has_no_backward_pass() -> None:
    vit = shape_of(ImageEncoder.Config())
    teacher = vit_pass(vit, "teacher", 197, 2, num_patches=196, element_bytes=2, trained=False)
    student = vit_pass(vit, "student", 197, 2, num_patches=196, element_bytes=2)
    assert teacher.kept_bytes == teacher.backward_flops == teacher.recomputed_flops == 0
    assert teacher.forward_flops == student.forward_flops
    assert student.recomputed_flops == student.forward_flops
    assert student.kept_checkpointed_bytes < student.kept_bytes / 8


def test_drop_path_that_skips_samples_scales_the_blocks_only() -> None:
    vit = shape_of(ImageEncoder.Config())
    whole = vit_pass(vit, "x", 197, 1, num_patches=0, element_bytes=4)
    part = vit_pass(vit, "x", 197, 1, num_patches=0, element_bytes=4, block_share=0.6)
    assert part.forward_flops == pytest.approx(0.6 * whole.forward_flops)
    embedded = vit_pass(vit, "x", 197, 1, num_patches=196, element_bytes=4, block_share=0.6)
    assert embedded.forward_flops - part.forward_flops == 2 * 16**2 * 192 * 196


def test_an_mlp_and_a_traced_module_agree() -> None:
    planned = mlp_pass("mlp", [32, 64, 8], 10, element_bytes=4)
    layers = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8)).to("meta")
    traced = traced_pass(
        "mlp", lambda: layers(torch.empty(10, 32, requires_grad=True)), list(layers.parameters()), element_bytes=4
    )
    assert planned.forward_flops == traced.forward_flops == 2 * 10 * (32 * 64 + 64 * 8)
    assert planned.backward_flops == traced.backward_flops
    assert traced.kept_bytes == 4 * 10 * (32 + 64 + 64)


def test_a_resnet_has_no_tokens() -> None:
    assert vit_of(meta_encoder(ImageEncoder.Config(name="resnet18"))) is None


def test_the_meta_encoder_takes_no_memory_and_reads_no_weights() -> None:
    encoder = meta_encoder(dataclasses.replace(ImageEncoder.Config(), init="/no/such/file.safetensors"))
    assert {p.device.type for p in encoder.parameters()} == {"meta"}
