"""Encoders as modules that heads are trained on: maps of four depths, a vector an image, the depth of each weight.

Maps of a ViT come from four evenly spaced blocks, normalised by its own final norm as DINOv2's intermediate layers are;
those of a ResNet are its stages. What a head or a loss is, is not known here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medim_ray.models.vit import ImageEncoder

_BELOW = ("cls_token", "reg_token", "pos_embed", "patch_embed.", "conv1.", "bn1.", "embeddings.", "embedder.")
_BLOCK = re.compile(r"(?:^|\.)(?:blocks|layers|layer|stages)\.?(\d+)\.")


class Trainable(nn.Module):
    """Gray crops [B, 1, H, W] in [0, 1] -> maps and vectors, with gradients.

    widths: channels of the four maps, shallow to deep; is_pyramid: each map has half the side of the one before it,
    else all have the side of the patch grid; num_layers: layers of `layer_of`, the last one holds all above the blocks.
    """

    widths: tuple[int, ...]
    is_pyramid: bool
    num_layers: int

    def maps(self, images_B1HW: Tensor) -> list[Tensor]:
        """Four maps [B, widths[k], h, w]."""
        raise NotImplementedError

    def vectors(self, images_B1HW: Tensor) -> Tensor:
        """[B, 2 D]: the global vector and the mean of the patches, side by side; what linear probes see."""
        raise NotImplementedError

    def layer_of(self, name: str) -> int:
        """0 for embeddings and stem, i + 1 for block i, num_layers - 1 for what lies above the blocks."""
        inner = name.removeprefix("model.").removeprefix("backbone.")
        if inner.startswith(_BELOW):
            return 0
        found = _BLOCK.search(inner)
        if found is None:
            return self.num_layers - 1
        first = (
            1 if inner.startswith("layer") and not inner.startswith(("layer.", "layers.")) else 0
        )  # layer1 of a ResNet
        return int(found[1]) + 1 - first


def evenly(depth: int) -> tuple[int, ...]:
    """Four blocks of `depth`, the last one among them: 2, 5, 8, 11 of twelve."""
    return tuple(max(0, -(-(k + 1) * depth // 4) - 1) for k in range(4))


class OwnEncoder(Trainable):
    """ImageEncoder: a ViT or a ResNet of timm."""

    def __init__(self, encoder: ImageEncoder) -> None:
        super().__init__()
        self.model = encoder
        backbone: Any = encoder.backbone
        if encoder.takes_tokens:
            self._tapped: Sequence[nn.Module] = [backbone.blocks[i] for i in evenly(len(backbone.blocks))]
            self.widths = (encoder.width,) * 4
            self.num_layers = len(backbone.blocks) + 2
        else:
            self._tapped = [backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4]
            self.widths = tuple(int(info["num_chs"]) for info in backbone.feature_info[-4:])
            self.num_layers = 6
        self.is_pyramid = not encoder.takes_tokens

    def maps(self, images_B1HW: Tensor) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        handles = [
            module.register_forward_hook(lambda _m, _i, out, k=k: found.__setitem__(k, out))
            for k, module in enumerate(self._tapped)
        ]
        try:
            self.model(images_B1HW)
        finally:
            for handle in handles:
                handle.remove()
        maps = [found[k] for k in range(len(self._tapped))]
        if self.is_pyramid:
            return maps
        height, width = (side // self.model.patch_size for side in images_B1HW.shape[-2:])
        normed = [self.model.backbone.norm(x_BLD)[:, self.model.num_prefix_tokens :] for x_BLD in maps]
        return [x_BND.transpose(1, 2).unflatten(2, (height, width)) for x_BND in normed]

    def vectors(self, images_B1HW: Tensor) -> Tensor:
        out = self.model(images_B1HW)
        return torch.cat([out.global_BD, out.patches_BND.mean(dim=1)], dim=1)


class HubEncoder(Trainable):
    """A vision model of transformers that gives patch tokens or feature maps; mean_C11, std_C11: of its input."""

    def __init__(self, model: Any, mean_C11: Tensor, std_C11: Tensor) -> None:
        super().__init__()
        self.model = model
        self.mean_C11: Tensor
        self.std_C11: Tensor
        self.register_buffer("mean_C11", mean_C11, persistent=False)
        self.register_buffer("std_C11", std_C11, persistent=False)
        with torch.no_grad():
            size = int(getattr(model.config, "image_size", None) or 224)
            blank_B1HW = torch.zeros(1, 1, size, size, device=mean_C11.device)
            self.num_layers = len(self._states(blank_B1HW)) + 1
            maps = self.maps(blank_B1HW)
        self.widths = tuple(x.shape[1] for x in maps)
        self.is_pyramid = maps[0].shape[-1] > maps[-1].shape[-1]

    def _states(self, images_B1HW: Tensor) -> Sequence[Tensor]:
        """The embedding and the output of every block."""
        pixels = (images_B1HW.expand(-1, 3, -1, -1) - self.mean_C11) / self.std_C11
        states: Sequence[Tensor] = self.model(pixel_values=pixels, output_hidden_states=True).hidden_states
        return states

    def maps(self, images_B1HW: Tensor) -> list[Tensor]:
        states = self._states(images_B1HW)[1:]
        taken = [states[i] for i in evenly(len(states))]
        if taken[0].ndim == 4:
            return taken
        norm = getattr(self.model, "layernorm", nn.Identity())
        side = images_B1HW.shape[-1] // int(self.model.config.patch_size)
        return [norm(x_BLD)[:, -side * side :].transpose(1, 2).unflatten(2, (side, side)) for x_BLD in taken]

    def vectors(self, images_B1HW: Tensor) -> Tensor:
        states: Tensor = self.model(
            pixel_values=(images_B1HW.expand(-1, 3, -1, -1) - self.mean_C11) / self.std_C11
        ).last_hidden_state
        if states.ndim == 4:
            mean_BD = states.flatten(2).mean(dim=2)
            return torch.cat([mean_BD, mean_BD], dim=1)
        side = images_B1HW.shape[-1] // int(self.model.config.patch_size)
        mean_BD = states[:, -side * side :].mean(dim=1)
        return torch.cat([states[:, 0] if states.shape[1] > side * side else mean_BD, mean_BD], dim=1)


class PixelPatches(Trainable):
    """Raw gray patches, as four equal maps; nothing to train. Its vectors are the patch means."""

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        self._patch_size = patch_size
        self.widths, self.is_pyramid, self.num_layers = (patch_size**2,) * 4, False, 1

    def maps(self, images_B1HW: Tensor) -> list[Tensor]:
        return [F.pixel_unshuffle(images_B1HW, self._patch_size)] * 4

    def vectors(self, images_B1HW: Tensor) -> Tensor:
        return F.avg_pool2d(images_B1HW, self._patch_size).flatten(1)
