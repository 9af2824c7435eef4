"""ImageEncoder: equal to timm where timm can do it, and right where it cannot (visible patches, mask token, CLS)."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

from medim_ray.models.packing import Pack, run_packed
from medim_ray.models.vit import ImageEncoder, MaskToken
from medim_ray.types import Grid

TINY = {"image_size": 64, "width": 48, "depth": 2, "num_heads": 3}


def tiny(**options: object) -> ImageEncoder:
    torch.manual_seed(0)
    return ImageEncoder(ImageEncoder.Config(**{**TINY, **options})).eval()  # type: ignore[arg-type]


def images(num: int = 2, size: int = 64) -> torch.Tensor:
    return torch.rand(num, 1, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "deit_tiny_patch16_224"])
def test_features_equal_timms_own(name: str) -> None:
    size = 56 if "patch14" in name else 64
    encoder = tiny(name=name, image_size=size, mean=0.3, std=0.2)
    x_BCHW = ((images(size=size) - 0.3) / 0.2).expand(-1, 3, -1, -1)
    reference_BLD = VisionTransformer.forward_features(encoder.backbone, x_BCHW)
    features = encoder(images(size=size))
    torch.testing.assert_close(features.global_BD, reference_BLD[:, 0])
    torch.testing.assert_close(features.patches_BND, reference_BLD[:, encoder.num_prefix_tokens :])
    assert features.cls_attention_BN is None
    assert features.patches_BND.shape[1] == encoder.grid.num_patches == 16


def test_state_dict_is_timms() -> None:
    reference = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=112)
    encoder = ImageEncoder(ImageEncoder.Config(image_size=112))
    assert encoder.backbone.state_dict().keys() == reference.state_dict().keys()


def test_all_patches_visible_is_the_full_image_and_order_is_kept() -> None:
    encoder = tiny()
    full = encoder(images())
    order_BK = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(s)) for s in (0, 1)])
    shuffled = encoder(images(), visible_BK=order_BK)
    torch.testing.assert_close(shuffled.global_BD, full.global_BD)
    expected_BND = full.patches_BND.gather(1, order_BK[:, :, None].expand(-1, -1, 48))
    torch.testing.assert_close(shuffled.patches_BND, expected_BND)


def test_wanted_patches_are_those_of_the_whole_image_with_gradients_and_draws() -> None:
    wanted_M = torch.tensor([3, 0, 17, 31])
    for options in ({}, {"name": "vit_small_patch14_reg4_dinov2", "image_size": 56, "drop_path": 0.5}):
        encoder = tiny(**options).train().double()  # a norm magnifies the rounding of small tokens
        results = []
        for places in (None, wanted_M):
            encoder.zero_grad()
            torch.manual_seed(5)  # stochastic depth
            out = encoder(images(2, encoder.config.image_size).double(), wanted_M=places)
            rows_MD = out.patches_BND.flatten(0, 1)[wanted_M] if places is None else out.patches_BND
            (out.global_BD.pow(3).sum() + rows_MD.pow(3).sum()).backward()  # a norm's squares have no gradient
            gradients = [p.grad for p in encoder.parameters() if p.grad is not None]
            results.append((out.global_BD, rows_MD, *gradients))
        torch.testing.assert_close(*results)
    none = encoder(images(2, 56).double(), wanted_M=wanted_M[:0])
    assert none.patches_BND.shape == (0, 48) and none.global_BD.shape == (2, 48)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
@pytest.mark.parametrize("recompute", [False, True])
def test_crops_of_two_sizes_in_one_pass_are_those_of_two_passes(name: str, recompute: bool) -> None:
    size = 56 if "patch14" in name else 64
    encoder = tiny(name=name, image_size=size).train().double()
    if recompute:
        encoder.checkpoint_activations()
    wanted_M, large, small = torch.tensor([3, 0, 17]), images(2, size).double(), images(5, size // 2).double()
    results = []
    for packed in (False, True):
        encoder.zero_grad()
        first = encoder(large, wanted_M=wanted_M, more_BCHW=small if packed else None)
        cls_BD = first.global_BD
        if not packed:
            cls_BD = torch.cat([cls_BD, encoder(small, wanted_M=wanted_M[:0]).global_BD])
        assert cls_BD.shape == (7, 48)
        ((cls_BD.pow(3) * torch.arange(7)[:, None]).sum() + first.patches_BND.pow(3).sum()).backward()
        results.append((cls_BD, first.patches_BND, *(p.grad for p in encoder.parameters() if p.grad is not None)))
    torch.testing.assert_close(*results)


def test_stochastic_depth_drops_whole_crops_of_a_pack_as_often_as_it_should() -> None:
    block = tiny(drop_path=0.5).train().backbone.blocks[-1]
    assert block.drop_path1.drop_prob == 0.5
    groups = [torch.randn(300, 4, 48), torch.randn(200, 2, 48)]
    pack, x_TD = Pack.of(groups)
    torch.nn.init.zeros_(block.mlp.fc2.weight)  # of the two residuals only the attention's is left
    torch.nn.init.zeros_(block.mlp.fc2.bias)
    moved_T = (run_packed(block, x_TD, pack) - x_TD).abs().sum(dim=1) > 0
    share = []
    for of_size in moved_T.split([1200, 400]):
        by_crop = of_size.unflatten(0, (300 if len(of_size) == 1200 else 200, -1))
        assert (by_crop == by_crop[:, :1]).all()  # a crop is dropped whole or kept whole
        share.append(float(by_crop[:, 0].float().mean()))
    assert all(abs(one - 0.5) < 4 * (0.25 / 200) ** 0.5 for one in share)


def test_blocks_that_can_not_be_packed_are_refused() -> None:
    with pytest.raises(ValueError, match=r"vit_small_patch16_18x2_224.*plain pre-norm blocks"):
        ImageEncoder(ImageEncoder.Config(name="vit_small_patch16_18x2_224"))


def test_hidden_pixels_reach_nothing_with_visible_patches() -> None:
    encoder, visible_BK = tiny(), torch.tensor([[0, 1, 5]]).expand(2, -1)
    x_BCHW = images()
    other_BCHW = x_BCHW.clone()
    other_BCHW[:, :, 32:] = 0.9  # patches 8 to 15
    changed_BCHW = x_BCHW.clone()
    changed_BCHW[:, :, :16, :16] = 0.9  # patch 0
    features, same, changed = (encoder(x, visible_BK=visible_BK) for x in (x_BCHW, other_BCHW, changed_BCHW))
    assert features.patches_BND.shape == (2, 3, 48)
    torch.testing.assert_close(same.global_BD, features.global_BD, rtol=0, atol=0)
    assert not torch.allclose(changed.global_BD, features.global_BD)


def test_mask_token_replaces_before_positions() -> None:
    encoder = tiny()
    token = MaskToken(48)
    hidden_BN = torch.zeros(2, 16, dtype=torch.bool)
    hidden_BN[:, 8:] = True
    other_BCHW = images()
    other_BCHW[:, :, 32:] = 0.9
    a = encoder(images(), hidden_BN=hidden_BN, mask_token_D=token())
    b = encoder(other_BCHW, hidden_BN=hidden_BN, mask_token_D=token())
    torch.testing.assert_close(a.patches_BND, b.patches_BND, rtol=0, atol=0)
    # Positions come after the token, so hidden patches still differ from each other.
    assert (a.patches_BND[0, 8] - a.patches_BND[0, 9]).abs().max() > 1e-3
    a.patches_BND.sum().backward()
    assert token.token_D.grad is not None and token.token_D.grad.abs().sum() > 0


def test_cls_attention_is_that_of_the_last_block() -> None:
    encoder = tiny()
    features = encoder(images(), need_cls_attention=True)
    plain = encoder(images())
    torch.testing.assert_close(features.patches_BND, plain.patches_BND, rtol=0, atol=0)

    backbone = encoder.backbone
    x_BLD = backbone._pos_embed(backbone.patch_embed(((images() - 0.5) / 0.5).expand(-1, 3, -1, -1)))
    x_BLD = backbone.blocks[0](x_BLD)
    qkv_3BHLd = (
        backbone.blocks[1].attn.qkv(backbone.blocks[1].norm1(x_BLD)).view(2, 17, 3, 3, 16).permute(2, 0, 3, 1, 4)
    )
    weights_BHLL = (qkv_3BHLd[0] @ qkv_3BHLd[1].transpose(-2, -1) / 4.0).softmax(-1)
    torch.testing.assert_close(features.cls_attention_BN, weights_BHLL.mean(1)[:, 0, 1:])


def test_another_size_interpolates_positions_as_dinov2() -> None:
    encoder = tiny(mean=0.0, std=1.0)
    assert encoder(images(size=96)).patches_BND.shape == (2, 36, 48)
    table_1DHW = encoder.backbone.pos_embed[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    expected_1DHW = F.interpolate(table_1DHW, scale_factor=(6.1 / 4, 6.1 / 4), mode="bicubic", antialias=False)
    _, positions_1ND = encoder.backbone._positions(6, 6)
    torch.testing.assert_close(positions_1ND, expected_1DHW.flatten(2).transpose(1, 2))


def test_resnet_gives_its_last_map() -> None:
    torch.manual_seed(0)
    encoder = ImageEncoder(ImageEncoder.Config(name="resnet18", image_size=64)).eval()
    features = encoder(images(), need_cls_attention=True)
    reference_BDHW = encoder.backbone.forward_features(((images() - 0.5) / 0.5).expand(-1, 3, -1, -1))
    assert encoder.grid == Grid(2, 2) and encoder.width == 512 and not encoder.takes_tokens
    torch.testing.assert_close(features.patches_BND, reference_BDHW.flatten(2).transpose(1, 2))
    assert features.cls_attention_BN is None


def test_grid_of_needs_no_weights() -> None:
    assert ImageEncoder.grid_of(ImageEncoder.Config(name="vit_base_patch14_dinov2", image_size=518)) == Grid(37, 37)
    assert ImageEncoder.grid_of(ImageEncoder.Config(name="resnet50", image_size=224)) == Grid(7, 7)


def test_local_weights_load_and_positions_resize(tmp_path: Path) -> None:
    torch.manual_seed(3)
    saved = timm.create_model("vit_tiny_patch16_224", img_size=64, embed_dim=48, depth=2, num_heads=3, num_classes=5)
    save_file(saved.state_dict(), tmp_path / "model.safetensors")
    torch.save({"model": saved.state_dict()}, tmp_path / "w.pth")
    for init in (str(tmp_path), str(tmp_path / "w.pth")):
        encoder = tiny(init=init)
        torch.testing.assert_close(encoder.backbone.blocks[1].mlp.fc1.weight, saved.blocks[1].mlp.fc1.weight)
        torch.testing.assert_close(encoder.backbone.pos_embed, saved.pos_embed)
    larger = tiny(init=str(tmp_path), image_size=96)
    assert larger.backbone.pos_embed.shape == (1, 37, 48)
    torch.testing.assert_close(larger.backbone.pos_embed[:, 0], saved.pos_embed[:, 0])


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    state = tiny().backbone.state_dict()
    state.pop("blocks.1.norm1.weight")
    save_file(state, tmp_path / "missing.safetensors")
    with pytest.raises(ValueError, match=r"1 keys are missing or unexpected, e\.g\. 'blocks\.1\.norm1\.weight'"):
        tiny(init=str(tmp_path / "missing.safetensors"))
    save_file(tiny(width=24).backbone.state_dict(), tmp_path / "narrow.safetensors")
    with pytest.raises(ValueError, match=r"does not fit the model: cls_token"):
        tiny(init=str(tmp_path / "narrow.safetensors"))
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(ValueError, match="is no readable checkpoint"):
        tiny(init=str(tmp_path / "text.safetensors"))
    with pytest.raises(ValueError, match="and there is no such path"):
        tiny(init=str(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 100}, r"image_size=100: must be a multiple of the patch size 16 .* use 96 or 112"),
        ({"name": "vit_tny_patch16_224"}, "vit_tiny_patch16_224"),
        ({"name": "swin_tiny_patch4_window7_224"}, "VisionTransformer with learned positions"),
        ({"name": "resnet18"}, "fixed sizes"),
        ({"std": 0.0}, "std"),
        ({"drop_path": 1.0}, "drop_path"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**options)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18", "resnet18d"])
def test_gray_images_give_the_features_and_gradients_of_three_equal_colours(name: str) -> None:
    encoder = ImageEncoder(ImageEncoder.Config(name=name, image_size=64)).train(False)
    first = next(module for module in encoder.modules() if isinstance(module, torch.nn.Conv2d))
    found = []
    for pixels in (images(), images().expand(-1, 3, -1, -1)):
        encoder.zero_grad()
        features = encoder(pixels)
        (features.global_BD.square().sum() + features.patches_BND.square().sum()).backward()
        assert first.weight.grad is not None and first.weight.shape[1] == 3
        found.append((features.patches_BND.detach(), first.weight.grad.clone()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_drop_path_rises_over_the_blocks_or_is_the_same_in_all() -> None:
    rates = {}
    for uniform in (False, True):
        config = ImageEncoder.Config(name="deit_tiny_patch16_224", depth=4, drop_path=0.3, drop_path_uniform=uniform)
        blocks = ImageEncoder(config).backbone.blocks
        for name in ("drop_path1", "drop_path2"):
            rates[uniform, name] = [getattr(getattr(block, name), "drop_prob", 0.0) for block in blocks]
    assert rates[True, "drop_path1"] == rates[True, "drop_path2"] == [0.3] * 4
    assert rates[False, "drop_path1"] == rates[False, "drop_path2"] == pytest.approx([0.0, 0.1, 0.2, 0.3])
