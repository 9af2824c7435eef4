"""Weights in and out: transformers' own random models, the DINOv2 layout, head files, timm; and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from medim_ray.models.export import export, export_timm
from medim_ray.models.heads_dino import DinoHead
from medim_ray.models.layouts import MASK_TOKEN, to_hf, to_timm, to_torch_hub
from medim_ray.models.load import load_backbone, load_head, load_head_state, load_weights, read_state
from medim_ray.models.vit import ImageEncoder

NAMES = {
    (False, False): "vit_small_patch14_dinov2",
    (False, True): "vit_giant_patch14_dinov2",
    (True, False): "vit_small_patch14_reg4_dinov2",
    (True, True): "vit_giant_patch14_reg4_dinov2",
}


def tiny_encoder(name: str = "vit_small_patch14_dinov2", image_size: int = 56, depth: int = 2) -> ImageEncoder:
    config = ImageEncoder.Config(name=name, image_size=image_size, width=48, depth=depth, num_heads=3)
    return ImageEncoder(config).eval()


def save_peer(folder: Path, registers: bool, swiglu: bool, image_size: int = 518) -> torch.nn.Module:
    """A model that transformers initialises itself, with every weight moved off its initial constant."""
    torch.manual_seed(3)
    sizes = {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": image_size,
        "patch_size": 14,
        "use_swiglu_ffn": swiglu,
    }
    peer = (
        Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes))
        if registers
        else Dinov2Model(Dinov2Config(**sizes))
    )
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    peer.save_pretrained(folder)
    return peer.eval()


@pytest.mark.parametrize("image_size", [518, 224])
@pytest.mark.parametrize(("registers", "swiglu"), [(False, False), (True, False), (True, True)])
def test_features_are_those_of_transformers(tmp_path: Path, registers: bool, swiglu: bool, image_size: int) -> None:
    peer = save_peer(tmp_path, registers, swiglu)
    encoder = tiny_encoder(NAMES[registers, swiglu], image_size)
    report, _ = load_backbone(encoder.backbone, tmp_path)
    assert not report.missing and not report.unexpected
    assert list(report.resized) == ([] if image_size == 518 else ["pos_embed"])
    by_option = ImageEncoder(replace(encoder.config, init=str(tmp_path))).backbone.state_dict()
    assert all(torch.equal(value, by_option[key]) for key, value in encoder.backbone.state_dict().items())
    images = torch.rand(2, 1, image_size, image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = encoder(images)
        theirs = peer(((images - 0.5) / 0.5).expand(-1, 3, -1, -1)).last_hidden_state
    num_prefix = 1 + 4 * registers
    assert (ours.global_BD - theirs[:, 0]).abs().max() < 1e-5
    assert (ours.patches_BND - theirs[:, num_prefix:]).abs().max() < 1e-5


def test_a_hub_id_is_read_from_the_local_cache_and_an_unknown_one_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layout of the cache as huggingface_hub leaves it after a download; nothing is asked of the network."""
    repository, commit = tmp_path / "models--some-lab--chest-dino", "0" * 40
    save_peer(repository / "snapshots" / commit, registers=False, swiglu=False, image_size=56)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = tiny_encoder().config
    by_id = ImageEncoder(replace(config, init="hf:some-lab/chest-dino")).backbone.state_dict()
    by_folder = ImageEncoder(replace(config, init=str(repository / "snapshots" / commit))).backbone.state_dict()
    assert by_id.keys() == by_folder.keys() and all(torch.equal(by_id[key], by_folder[key]) for key in by_id)
    with pytest.raises(ValueError, match=r"3 attention heads, the encoder 4; use encoder\.num_heads=3"):
        ImageEncoder(replace(config, init="hf:some-lab/chest-dino", num_heads=4))
    with pytest.raises(ValueError, match=r"encoder.init='hf:some-lab/other'.*could not be fetched as a model id"):
        ImageEncoder(replace(config, init="hf:some-lab/other"))


@pytest.mark.parametrize(("registers", "swiglu"), list(NAMES))
def test_hf_ours_hf_is_equal_bit_for_bit(tmp_path: Path, registers: bool, swiglu: bool) -> None:
    save_peer(tmp_path / "in", registers, swiglu, image_size=56)
    encoder = tiny_encoder(NAMES[registers, swiglu])
    _, weights = load_backbone(encoder.backbone, tmp_path / "in")
    export(encoder, "hf", str(tmp_path / "out"), extras=weights.extras)
    before, after = load_file(tmp_path / "in/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_tiny_patch16_224"])
def test_exported_folder_works_with_auto_classes(tmp_path: Path, name: str) -> None:
    size = 56 if "14" in name else 64
    torch.manual_seed(1)
    encoder = tiny_encoder(name, size)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    export(encoder, "hf", str(tmp_path), facts={"run_hash": "abc"})
    pixels = np.random.default_rng(0).integers(0, 256, (size, size), dtype=np.uint8)
    inputs = AutoImageProcessor.from_pretrained(tmp_path)(images=Image.fromarray(pixels), return_tensors="pt")
    with torch.no_grad():
        theirs = AutoModel.from_pretrained(tmp_path).eval()(**inputs).last_hidden_state
        ours = encoder(torch.from_numpy(pixels)[None, None].float() / 255)
    assert (ours.global_BD - theirs[:, 0]).abs().max() < 1e-5
    assert (ours.patches_BND - theirs[:, encoder.num_prefix_tokens :]).abs().max() < 1e-5
    card = (tmp_path / "README.md").read_text()
    assert "run_hash: abc" in card and "sha256 of model.safetensors" in card


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_timm_loads_its_export_strictly(tmp_path: Path, name: str) -> None:
    encoder = ImageEncoder(ImageEncoder.Config(name=name, image_size=64)).eval()
    export_timm(encoder, str(tmp_path))
    size = {"img_size": 64} if encoder.takes_tokens else {}
    by_name = timm.create_model(name, num_classes=0, checkpoint_path=str(tmp_path / "model.safetensors"), **size).eval()
    by_folder = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = encoder(images).global_BD
        inputs = ((images - 0.5) / 0.5).expand(-1, 3, -1, -1)
        for model in (by_name, by_folder):
            assert (model(inputs) - ours).abs().max() < 1e-5


def test_onnx_gives_the_same_tokens_at_any_batch_size(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="format=onnx is optional: onnx, onnxscript, onnxruntime")
    torch.manual_seed(4)
    encoder = tiny_encoder("vit_small_patch14_reg4_dinov2")
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    export(encoder, "onnx", str(tmp_path))
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    for num in (1, 3):
        images = torch.rand(num, 1, 56, 56, generator=torch.Generator().manual_seed(num))
        cls, patches = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            ours = encoder(images)
        np.testing.assert_allclose(cls, ours.global_BD.numpy(), atol=1e-4)
        np.testing.assert_allclose(patches, ours.patches_BND.numpy(), atol=1e-4)


@pytest.mark.parametrize(("registers", "swiglu"), list(NAMES))
def test_torch_hub_layout_goes_out_and_comes_back(tmp_path: Path, registers: bool, swiglu: bool) -> None:
    torch.manual_seed(2)
    encoder, other = tiny_encoder(NAMES[registers, swiglu]), tiny_encoder(NAMES[registers, swiglu])
    mask_token = torch.randn(1, 48)
    export(encoder, "torch_hub", str(tmp_path), extras={MASK_TOKEN: mask_token})
    state = load_file(tmp_path / "model.safetensors")
    assert state["pos_embed"].shape == (1, 17, 48), "the DINOv2 code keeps a position for CLS"
    assert ("register_tokens" in state) == registers
    assert ("blocks.0.mlp.w12.weight" in state) == swiglu
    _, weights = load_backbone(other.backbone, tmp_path)
    assert torch.equal(weights.extras[MASK_TOKEN], mask_token)
    for key, value in encoder.backbone.state_dict().items():
        assert torch.equal(other.backbone.state_dict()[key], value), key


def test_teacher_of_a_chunked_training_checkpoint_is_taken(tmp_path: Path) -> None:
    encoder, other = tiny_encoder(), tiny_encoder()
    hub = to_torch_hub(to_timm(encoder.backbone.state_dict()))
    state = {f"teacher.backbone.{key.replace('blocks.', 'blocks.0.')}": value for key, value in hub.items()}
    state |= {f"student.backbone.{key}": torch.zeros_like(value) for key, value in hub.items()}
    state["teacher.dino_head.last_layer.weight_g"] = torch.ones(8, 1)
    torch.save({"model": state}, tmp_path / "training.pth")
    load_backbone(other.backbone, tmp_path / "training.pth")
    assert torch.equal(other.backbone.blocks[1].attn.qkv.weight, encoder.backbone.blocks[1].attn.qkv.weight)


def test_our_own_checkpoint_loads_and_positions_are_resized(tmp_path: Path) -> None:
    encoder, larger = tiny_encoder(), tiny_encoder(image_size=70)
    state = {f"encoder.{key}": value.clone() for key, value in encoder.state_dict().items()}
    save_file({**state, "decoder.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    report, _ = load_backbone(larger.backbone, tmp_path)
    assert report.resized == {"pos_embed": ((1, 17, 48), (1, 26, 48))}
    # The table for 70 pixels is the one that the encoder of 56 pixels uses when it is given 70.
    images = torch.rand(1, 1, 70, 70, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (encoder(images).patches_BND - larger(images).patches_BND).abs().max() < 1e-5


def test_missing_and_unexpected_keys_are_listed_and_only_allowed_ones_pass(tmp_path: Path) -> None:
    encoder, deeper = tiny_encoder(), tiny_encoder(depth=3)
    save_file(encoder.backbone.state_dict() | {"extra.bias": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"unexpected +1\n +extra\.bias") as caught:
        load_backbone(deeper.backbone, tmp_path / "weights.safetensors")
    assert "blocks.2.attn.qkv.weight" in str(caught.value)
    untouched = {key: value.clone() for key, value in deeper.state_dict().items()}
    assert all(torch.equal(untouched[key], value) for key, value in deeper.state_dict().items())
    report, _ = load_backbone(deeper.backbone, tmp_path / "weights.safetensors", allow=("blocks.2.", "extra."))
    assert report.unexpected == ("extra.bias",) and len(report.missing) == 14
    assert torch.equal(deeper.backbone.norm.weight, encoder.backbone.norm.weight)


def test_another_width_is_refused_with_the_shapes() -> None:
    encoder = tiny_encoder()
    wide = ImageEncoder(ImageEncoder.Config(name="vit_small_patch14_dinov2", image_size=56, depth=2))
    with pytest.raises(ValueError, match=r"cls_token \[1, 1, 48\] instead of \[1, 1, 384\]"):
        load_weights(wide.backbone, to_timm(encoder.backbone.state_dict()), "file")


def test_files_that_are_no_vit_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="holds none of model"):
        read_state(tmp_path)
    with pytest.raises(ValueError, match="no ViT in this checkpoint"):
        to_timm({"layer.weight": torch.zeros(1)})
    torch.save({"model": Path}, tmp_path / "pickle.pth")
    with pytest.raises(ValueError, match="no readable checkpoint"):
        read_state(tmp_path / "pickle.pth")


@pytest.mark.parametrize("form", ["weight_norm", "parametrized", "plain"])
def test_head_files_of_every_form_give_the_same_scores(tmp_path: Path, form: str) -> None:
    config = DinoHead.Config(num_prototypes=20, hidden=24, bottleneck=8)
    torch.manual_seed(0)
    head, other = DinoHead(config, 16), DinoHead(config, 16)
    with torch.no_grad():
        head.last_layer.weight_g.uniform_(0.5, 2.0)
    state = {f"dino_head.{key}": value.clone() for key, value in head.state_dict().items()}
    g, v = state.pop("dino_head.last_layer.weight_g"), state.pop("dino_head.last_layer.weight_v")
    last = {
        "weight_norm": {"weight_g": g, "weight_v": v},
        "parametrized": {"parametrizations.weight.original0": g, "parametrizations.weight.original1": v},
        "plain": {"weight": g * v / v.norm(dim=1, keepdim=True)},
    }[form]
    save_file(state | {f"dino_head.last_layer.{key}": value for key, value in last.items()}, tmp_path / "h.safetensors")
    load_head(other, tmp_path / "h.safetensors")
    rows = torch.randn(5, 16)
    torch.testing.assert_close(other(rows), head(rows))
    with pytest.raises(ValueError, match="missing"):
        load_head_state(other, {"mlp.0.weight": head.state_dict()["mlp.0.weight"]}, "half a head")


@pytest.mark.parametrize("form", ["hub", "training", "hf"])
@pytest.mark.parametrize("registers", [False, True])
def test_encoder_init_takes_every_layout_by_one_law_of_positions(tmp_path: Path, form: str, registers: bool) -> None:
    name = NAMES[registers, False]
    encoder = tiny_encoder(name)
    weights = to_timm(encoder.backbone.state_dict())
    token = torch.randn(1, 48)
    weights.extras[MASK_TOKEN] = token
    hub = to_torch_hub(weights)
    state = {
        "hub": hub,
        "training": {f"teacher.backbone.{key.replace('blocks.', 'blocks.0.')}": value for key, value in hub.items()},
        "hf": to_hf(weights),
    }[form]
    torch.save(state, tmp_path / "weights.pth")
    options: dict[str, Any] = {"name": name, "width": 48, "depth": 2, "num_heads": 3}
    options["init"] = str(tmp_path / "weights.pth")
    for size in (56, 70):
        begun = ImageEncoder(ImageEncoder.Config(image_size=size, **options)).eval()
        other = tiny_encoder(name, image_size=size)
        load_backbone(other.backbone, tmp_path / "weights.pth")
        for key, value in other.backbone.state_dict().items():
            assert torch.equal(begun.backbone.state_dict()[key], value), key
        assert torch.equal(begun.init_extras[MASK_TOKEN], token)


def test_a_model_with_registers_resizes_positions_as_transformers_does_at_any_size(tmp_path: Path) -> None:
    peer = save_peer(tmp_path, registers=True, swiglu=False, image_size=56)
    name = NAMES[True, False]
    config = ImageEncoder.Config(name=name, image_size=56, width=48, depth=2, num_heads=3, init=str(tmp_path))
    encoder = ImageEncoder(config).eval()
    images = torch.rand(2, 1, 42, 42, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = peer(((images - 0.5) / 0.5).expand(-1, 3, -1, -1)).last_hidden_state
        features = encoder(images)
    torch.testing.assert_close(features.global_BD, expected[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.patches_BND, expected[:, 5:], rtol=1e-4, atol=1e-5)


def test_what_a_file_lacks_or_has_besides_passes_only_where_it_is_allowed(tmp_path: Path) -> None:
    encoder = tiny_encoder()
    state = to_hf(to_timm(encoder.backbone.state_dict()))
    path = tmp_path / "weights.safetensors"
    save_file({**state, "classifier.weight": torch.zeros(2, 96)}, path)
    options: dict[str, Any] = {"name": NAMES[False, False], "image_size": 56, "width": 48, "depth": 2, "num_heads": 3}
    with pytest.raises(ValueError, match=r"(?s)encoder\.init=.*'classifier\.weight'.*encoder\.init_allow"):
        ImageEncoder(ImageEncoder.Config(init=str(path), **options))
    begun = ImageEncoder(ImageEncoder.Config(init=str(path), init_allow=("classifier.",), **options))
    assert torch.equal(begun.backbone.norm.weight, encoder.backbone.norm.weight)


def test_files_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    plain, registered = tiny_encoder(), tiny_encoder(NAMES[True, False])
    options: dict[str, Any] = {"name": NAMES[False, False], "image_size": 56, "width": 48, "depth": 2}
    for number, content in enumerate((torch.zeros(2), [1], {"model": [1]}, {"model": torch.zeros(2)})):
        torch.save(content, tmp_path / f"{number}.pth")
        with pytest.raises(ValueError, match=r"holds a (Tensor|list) and no names with tensors"):
            read_state(tmp_path / f"{number}.pth")
    state = plain.backbone.state_dict()
    torch.save({**state, "norm.bias": torch.full((48,), torch.nan)}, tmp_path / "nan.pth")
    with pytest.raises(ValueError, match=r"NaN or infinite weights in 1 tensors, e\.g\. 'norm\.bias'"):
        read_state(tmp_path / "nan.pth")
    torch.save(to_torch_hub(to_timm(registered.backbone.state_dict())), tmp_path / "registers.pth")
    with pytest.raises(ValueError, match=r"encoder\.init=.*does not fit the model"):
        ImageEncoder(ImageEncoder.Config(num_heads=3, init=str(tmp_path / "registers.pth"), **options))
    export(plain, "hf", str(tmp_path / "hf"))
    with pytest.raises(ValueError, match=r"3 attention heads, the encoder 4; use encoder\.num_heads=3"):
        ImageEncoder(ImageEncoder.Config(num_heads=4, init=str(tmp_path / "hf"), **options))


def test_a_training_checkpoint_gives_the_head_that_is_asked_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = DinoHead.Config(num_prototypes=20, hidden=24, bottleneck=8)
    parts = ("student.dino_head", "student.ibot_head", "teacher.dino_head", "teacher.ibot_head")
    heads = {part: DinoHead(config, 16) for part in parts}
    state = {f"{part}.{key}": value.clone() for part, head in heads.items() for key, value in head.state_dict().items()}
    torch.save({"model": {**state, "teacher.backbone.cls_token": torch.zeros(1, 1, 16)}}, tmp_path / "training.pth")
    for part in ("dino_head", "ibot_head"):
        head = DinoHead(config, 16)
        load_head(head, tmp_path / "training.pth", part)
        wanted = heads[f"teacher.{part}"].state_dict()
        assert all(torch.equal(value, wanted[key]) for key, value in head.state_dict().items())


def test_a_file_of_two_heads_is_refused(tmp_path: Path) -> None:
    head = DinoHead(DinoHead.Config(num_prototypes=20, hidden=24, bottleneck=8), 16)
    state = {
        f"{name}.{key}": value.clone()
        for name in ("dino_head", "ibot_head")
        for key, value in head.state_dict().items()
    }
    with pytest.raises(ValueError, match=r"holds several heads \(dino_head, ibot_head\)"):
        load_head_state(head, state, "both.safetensors")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("vit_base_patch16_clip_224", "a norm before its blocks"),
        ("vit_base_patch16_clip_quickgelu_224", "another activation than GELU"),
        ("vit_base_patch16_224_miil", "no bias of queries, keys and values"),
    ],
)
def test_what_transformers_cannot_compute_is_not_written(tmp_path: Path, name: str, what: str) -> None:
    encoder = ImageEncoder(ImageEncoder.Config(name=name, image_size=32, width=48, depth=1, num_heads=3))
    with pytest.raises(ValueError, match=rf"format=hf: {name} has .*{what}.*use format=timm"):
        export(encoder, "hf", str(tmp_path / "out"))
    if "bias" not in what:
        with pytest.raises(ValueError, match=rf"format=torch_hub: {name} has .*{what}.*DINOv2 code.*use timm"):
            export(encoder, "torch_hub", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["vit_little_patch16_reg4_gap_256", "vit_base_patch16_siglip_224"])
def test_a_vit_without_a_cls_token_loads_in_timm(tmp_path: Path, name: str) -> None:
    encoder = ImageEncoder(ImageEncoder.Config(name=name, image_size=32, width=48, depth=1, num_heads=3)).eval()
    export(encoder, "timm", str(tmp_path))
    peer = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = peer.forward_features(((images - 0.5) / 0.5).expand(-1, 3, -1, -1))
        patches = encoder(images).patches_BND
    torch.testing.assert_close(tokens[:, -patches.shape[1] :], patches, rtol=1e-4, atol=1e-5)


def test_the_card_ends_with_the_configuration(tmp_path: Path) -> None:
    export(tiny_encoder(), "torch_hub", str(tmp_path), configuration="seed: 0\nencoder:\n  name: vit\n")
    assert (
        (tmp_path / "README.md")
        .read_text()
        .endswith("## Configuration\n\n    seed: 0\n    encoder:\n      name: vit\n")
    )
