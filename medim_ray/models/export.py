"""An encoder as files for other software: timm, Hugging Face transformers, the DINOv2 code ("torch hub"), ONNX.

Writes weights, the configuration that the other side needs, the preprocessing and a model card. Reading: load.py.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fsspec
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from medim_ray.models.layouts import Weights, is_swiglu, to_hf, to_torch_hub
from medim_ray.models.vit import ImageEncoder

WEIGHTS = "model.safetensors"


def export(
    encoder: ImageEncoder,
    format: str,  # noqa: A002 - the name of the command's option
    out: str,
    extras: Mapping[str, Tensor] | None = None,
    facts: Mapping[str, str] | None = None,
    configuration: str = "",
) -> str:
    """Writes `encoder` as `format` into folder `out` (any fsspec URL); returns one line that says what was written.

    format: hf, timm, torch_hub or onnx. extras: what load_backbone returned besides (mask token; CLS token and position
    of models with registers). facts: lines of the model card, e.g. data counts, run hash, licence; configuration: the
    run's, as YAML, for the end of the card.
    Raises ValueError for an unknown format and for an encoder that the format cannot hold.
    """
    if format not in _FORMATS:
        raise ValueError(f"format={format}: must be one of {', '.join(sorted(_FORMATS))}")
    if format != "timm" and not encoder.takes_tokens:
        raise ValueError(f"format={format}: {encoder.config.name} is a ResNet, which only format=timm holds")
    if format != "timm" and not encoder.has_cls:
        raise ValueError(f"format={format}: {encoder.config.name} is no ViT with a CLS token; use format=timm")
    state = {key: value.detach().cpu().float().contiguous() for key, value in encoder.backbone.state_dict().items()}
    with tempfile.TemporaryDirectory(prefix="medim-ray-") as local:
        folder = Path(local)
        usage = _FORMATS[format](encoder, Weights("timm", state, dict(extras or {})), folder)
        (folder / "README.md").write_text(_card(encoder, folder, usage, facts or {}, configuration), encoding="utf-8")
        fs, root = fsspec.core.url_to_fs(out)
        fs.makedirs(root, exist_ok=True)
        names = sorted(path.name for path in folder.iterdir())
        for name in names:
            fs.put_file(str(folder / name), f"{root.rstrip('/')}/{name}")
    return f"{out}: {', '.join(names)} ({format}). {usage}"


def export_timm(encoder: ImageEncoder, out: str) -> str:
    """`export` for timm: DIR/model.safetensors for `timm.create_model(name, checkpoint_path=...)`."""
    return export(encoder, "timm", out)


def _to_timm(encoder: ImageEncoder, weights: Weights, folder: Path) -> str:
    config = encoder.config
    sizes = {"patch_size": config.patch_size, "embed_dim": config.width, "depth": config.depth}
    arguments: dict[str, Any] = {key: value for key, value in sizes.items() if value is not None}
    arguments |= {"num_heads": config.num_heads} if config.num_heads is not None else {}
    if encoder.takes_tokens:
        pool = "token" if encoder.has_cls else ""  # how our backbone has neither a pooling head nor its norm
        arguments |= {"img_size": config.image_size, "dynamic_img_size": True, "global_pool": pool}
    save_file(weights.backbone, folder / WEIGHTS, metadata={"format": "pt"})
    size = [3, config.image_size, config.image_size]
    _write_json(
        folder / "config.json",
        {
            "architecture": config.name,
            "num_classes": 0,
            "num_features": encoder.width,
            "model_args": arguments,
            "pretrained_cfg": {
                "num_classes": 0,
                "input_size": size,
                "fixed_input_size": encoder.takes_tokens,
                "interpolation": "bicubic",
                "crop_pct": 1.0,
                "mean": [config.mean] * 3,
                "std": [config.std] * 3,
            },
        },
    )
    given = "".join(f", {key}={value!r}" for key, value in arguments.items())
    return f'timm.create_model("{config.name}", num_classes=0{given}, checkpoint_path="{WEIGHTS}")'


def _to_hf(encoder: ImageEncoder, weights: Weights, folder: Path) -> str:
    backbone, config = encoder.backbone, encoder.config
    block = backbone.blocks[0]
    packed, registers = is_swiglu(weights.backbone), weights.backbone.get("reg_token")
    if strange := ", ".join(filter(None, (_beyond(backbone, packed), _beyond_hf(backbone, packed)))):
        raise ValueError(f"format=hf: {config.name} has {strange}, which Dinov2Model has not; use format=timm or onnx")
    if backbone.num_prefix_tokens != 1 + (registers.shape[1] if registers is not None else 0):
        raise ValueError(f"format=hf: {config.name} has tokens besides CLS and registers; use format=timm")
    # transformers derives the MLP's width from this whole number; gated ones are two thirds as wide, and twice.
    ratio = round(block.mlp.fc1.out_features / encoder.width * (0.75 if packed else 1.0))
    tree: dict[str, Any] = {
        "architectures": ["Dinov2WithRegistersModel" if registers is not None else "Dinov2Model"],
        "model_type": "dinov2_with_registers" if registers is not None else "dinov2",
        "hidden_size": encoder.width,
        "num_hidden_layers": len(backbone.blocks),
        "num_attention_heads": block.attn.num_heads,
        "mlp_ratio": ratio,
        "hidden_act": "gelu",
        "layer_norm_eps": backbone.norm.eps,
        "image_size": config.image_size,
        "patch_size": encoder.patch_size,
        "num_channels": 3,
        "qkv_bias": block.attn.qkv.bias is not None,
        "layerscale_value": 1.0,
        "use_swiglu_ffn": packed,
        "dtype": "float32",
    }
    if registers is not None:
        tree["num_register_tokens"] = registers.shape[1]
    _write_json(folder / "config.json", tree)
    size = config.image_size
    _write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "BitImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": size},
            "resample": 3,
            "do_center_crop": True,
            "crop_size": {"height": size, "width": size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [config.mean] * 3,
            "image_std": [config.std] * 3,
        },
    )
    save_file(to_hf(weights), folder / WEIGHTS, metadata={"format": "pt"})
    return "transformers.AutoModel.from_pretrained(folder) and AutoImageProcessor.from_pretrained(folder)"


def _beyond(backbone: Any, packed: bool) -> str:
    """What a ViT computes that no DINOv2 does, '' where there is nothing."""
    block = backbone.blocks[0]
    found = {
        "a norm before its blocks": not isinstance(backbone.norm_pre, nn.Identity),
        "norms of queries and keys": not isinstance(block.attn.q_norm, nn.Identity),
        "no bias of the patch embedding": backbone.patch_embed.proj.bias is None,
        "no norm at its end": isinstance(backbone.norm, nn.Identity),
        "another activation than GELU": not packed and not isinstance(block.mlp.act, nn.GELU),
    }
    return ", ".join(name for name, is_so in found.items() if is_so)


def _beyond_hf(backbone: Any, packed: bool) -> str:
    """What the DINOv2 code has options for, and transformers' Dinov2Model has not."""
    block = backbone.blocks[0]
    ratio = block.mlp.fc1.out_features / backbone.embed_dim
    found = {
        "no bias of queries, keys and values": block.attn.qkv.bias is None,
        f"an MLP of {ratio:.3g} times its width": not packed and ratio != round(ratio),
    }
    return ", ".join(name for name, is_so in found.items() if is_so)


def _to_torch_hub(encoder: ImageEncoder, weights: Weights, folder: Path) -> str:
    if strange := _beyond(encoder.backbone, is_swiglu(weights.backbone)):
        raise ValueError(
            f"format=torch_hub: {encoder.config.name} has {strange}, which the DINOv2 code has not; use timm"
        )
    save_file(to_torch_hub(weights), folder / WEIGHTS, metadata={"format": "pt"})
    return "model.load_state_dict(safetensors.torch.load_file('model.safetensors')) on the DINOv2 code's ViT"


class _TokensOnly(nn.Module):
    """What an ONNX file computes: gray images in [0, 1] -> CLS [B, D] and patches [B, N, D]."""

    def __init__(self, encoder: ImageEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images_B1HW: Tensor) -> tuple[Tensor, Tensor]:
        features = self.encoder(images_B1HW)
        return features.global_BD, features.patches_BND


def _to_onnx(encoder: ImageEncoder, weights: Weights, folder: Path) -> str:
    if importlib.util.find_spec("onnxscript") is None:  # torch's exporter imports it
        raise ValueError("format=onnx: needs the packages of the extra: pip install 'medim-ray[onnx]'")
    size = encoder.config.image_size
    was_training = encoder.training
    images = torch.zeros(2, 1, size, size, device=next(encoder.parameters()).device)
    torch.onnx.export(
        _TokensOnly(encoder).eval(),
        (images,),
        folder / "model.onnx",
        input_names=["images"],
        output_names=["cls", "patches"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    encoder.train(was_training)
    return f"input images [batch, 1, {size}, {size}] in [0, 1]; outputs cls and patches"


def _card(encoder: ImageEncoder, folder: Path, usage: str, facts: Mapping[str, str], configuration: str) -> str:
    lines = ["# Image encoder for chest radiographs", "", "Pretrained with medim-ray.", "", f"    {usage}", ""]
    lines += [f"- {key}: {value}" for key, value in facts.items()]
    config = encoder.config
    lines += [
        f"- architecture: {config.name}, {encoder.width} features, patches of {encoder.patch_size} pixels",
        f"- input: {config.image_size} x {config.image_size} pixels, gray repeated to three channels, in [0, 1], "
        f"minus {config.mean}, divided by {config.std}",
    ]
    for path in sorted(folder.iterdir()):
        with path.open("rb") as stream:
            lines.append(f"- sha256 of {path.name}: {hashlib.file_digest(stream, 'sha256').hexdigest()}")
    lines += [
        "",
        "The licence and the terms of use of the training data apply to these weights; check them before sharing. "
        "Not a medical device; not for diagnosis.",
        "",
    ]
    if configuration:
        lines += ["## Configuration", "", *(f"    {line}" for line in configuration.splitlines()), ""]
    return "\n".join(lines)


def _write_json(path: Path, tree: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


_FORMATS: dict[str, Callable[[ImageEncoder, Weights, Path], str]] = {
    "hf": _to_hf,
    "timm": _to_timm,
    "torch_hub": _to_torch_hub,
    "onnx": _to_onnx,
}
