"""Image encoders: any timm VisionTransformer with learned positions, or a timm ResNet, behind one interface.

Takes gray images in [0, 1]; returns a global vector, patch features and, on demand, the CLS attention that weighs the
patches in MedIM's local term (PAPERS.md, MedIM). It holds no projection, no head and no decoder.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from medim_ray.models.layouts import MASK_TOKEN
from medim_ray.types import Grid

INITS = ("random", "timm")  # values of `init` that are no path
HUB = "hf:"  # and what begins so: an id of the Hugging Face hub


def check_init(init: str) -> None:
    """ValueError where `init` is neither a word, nor an id of the hub, nor a path that is there."""
    if init not in INITS and not init.startswith(HUB) and not Path(init).exists():
        raise ValueError(
            f"encoder.init={init!r}: must be 'random', 'timm', hf:OWNER/NAME or a local checkpoint, and there is no "
            "such path"
        )


class Features(NamedTuple):
    """What an encoder returns (a named tuple, because the hooks of ZeRO-3 walk tuples and not dataclasses).

    global_BD: CLS token after the final norm, or the mean of the patches where there is no CLS token; those of
        `more_BCHW` last.
    patches_BND: patch features after the final norm, row by row; [B, K, D] in the order of `visible_BK` where given,
        [M, D] in the order of `wanted_M` where given.
    cls_attention_BN: float32, last block's attention from CLS to each patch, mean over heads, softmaxed over all
        tokens; None where it was not asked for or there is no CLS token.
    """

    global_BD: Tensor
    patches_BND: Tensor
    cls_attention_BN: Tensor | None = None


class MaskToken(nn.Module):
    """A learned token for hidden positions. A module of its own so that ZeRO-3 gathers it; call it to get [D]."""

    def __init__(self, width: int, first: Tensor | None = None) -> None:
        """first: what it begins as, of `width` numbers; None: random."""
        super().__init__()
        self.token_D = nn.Parameter(torch.empty(width))
        nn.init.normal_(self.token_D, std=0.02)
        if first is not None:
            with torch.no_grad():
                self.token_D.copy_(first.flatten())

    def forward(self) -> Tensor:
        # A copy: ZeRO-3 frees the parameter's own storage when this forward returns.
        return self.token_D.clone()

    def extras(self) -> dict[str, Tensor]:
        """The token as exports and files hold it (layouts.Weights.extras)."""
        return {MASK_TOKEN: self().detach()[None]}


class ImageEncoder(nn.Module):
    """Gray images -> Features. `backbone` is the timm model itself, so its state dict is a timm checkpoint.

    Attributes: grid (patches at `image_size`), width (D), patch_size (pixels), num_prefix_tokens, has_cls,
    takes_tokens (visible_BK and hidden_BN are possible: ViT yes, ResNet no), packs (more_BCHW is possible: a ViT whose
    blocks are not compiled), init_extras (what the file of `init` had besides, by name: a mask token).
    Raises ValueError for unknown names and files, and for an image size that the patch size does not divide.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        name: str = field(
            default="vit_tiny_patch16_224", metadata={"help": "timm name of a ViT with learned positions or a ResNet"}
        )
        image_size: int = field(default=224, metadata={"help": "pixels of the (square) input, a multiple of the patch"})
        init: str = field(
            default="random",
            metadata={
                "help": "'random', 'timm' (weights of that name), hf:OWNER/NAME (a Dinov2Model such as rad-dino) or "
                "a local .safetensors, .pth or folder, in the layout of timm, transformers or the torch hub"
            },
        )
        init_allow: tuple[str, ...] = field(
            default=(),
            metadata={
                "help": "prefixes of keys that a file of init may lack, or have besides; parts of heads always may"
            },
        )
        mean: float = field(default=0.5, metadata={"help": "subtracted from pixels in [0, 1]"})
        std: float = field(default=0.5, metadata={"help": "pixels are divided by it"})
        drop_path: float = field(default=0.0, metadata={"help": "stochastic depth of the last block, in [0, 1)"})
        drop_path_uniform: bool = field(
            default=False,
            metadata={"help": "of all blocks alike (DINOv2); else it rises from 0 at the first (ViT only)"},
        )
        patch_size: int | None = field(default=None, metadata={"help": "ViT only; None: as the name says"})
        width: int | None = field(default=None, metadata={"help": "ViT only; None: as the name says"})
        depth: int | None = field(default=None, metadata={"help": "ViT only; None: as the name says"})
        num_heads: int | None = field(default=None, metadata={"help": "ViT only; None: as the name says"})

        def __post_init__(self) -> None:
            if self.std <= 0:
                raise ValueError(f"encoder.std={self.std}: must be > 0; use e.g. 0.5")
            if not 0 <= self.drop_path < 1:
                raise ValueError(f"encoder.drop_path={self.drop_path}: must lie in [0, 1); use e.g. 0.1")
            if self.image_size < 1:
                raise ValueError(f"encoder.image_size={self.image_size}: must be positive; use e.g. 224")

    def __init__(self, config: Config) -> None:
        from medim_ray.models import backbones  # timm: see there

        super().__init__()
        self.config = config
        self.backbone, self.init_extras = backbones.build(config)
        self.patch_size = backbones.patch_size(self.backbone)
        self.grid = _grid(config, self.patch_size)
        self.width = int(self.backbone.num_features)
        self.takes_tokens = isinstance(self.backbone, backbones.TokenViT)
        self.packs = self.takes_tokens
        self.has_cls = self.takes_tokens and self.backbone.has_class_token
        self.num_prefix_tokens = int(self.backbone.num_prefix_tokens) if self.takes_tokens else 0

    @staticmethod
    def grid_of(config: Config) -> Grid:
        """The patch grid of an encoder without allocating or loading its weights (for mask plans on the CPU)."""
        from medim_ray.models import backbones

        with torch.device("meta"):
            return _grid(config, backbones.patch_size(backbones.create(config)))

    def checkpoint_activations(self) -> None:
        """While it trains, blocks (of a ResNet: its four stages) keep only their inputs for the backward pass."""
        self.backbone.set_grad_checkpointing(True)

    def compile_blocks(self) -> None:
        """Compiles the blocks of a ViT at their first call, but for the last, whose attention is read by hooks; a
        ResNet stays as it is."""
        if self.takes_tokens:
            self.packs = False
            for block in self.backbone.blocks[:-1]:
                block.compile()

    def forward(
        self,
        images_BCHW: Tensor,
        visible_BK: Tensor | None = None,
        need_cls_attention: bool = False,
        hidden_BN: Tensor | None = None,
        mask_token_D: Tensor | None = None,
        wanted_M: Tensor | None = None,
        more_BCHW: Tensor | None = None,
    ) -> Features:
        """Encode `images_BCHW` (float in [0, 1], C = 1; three channels are taken as they are).

        visible_BK: int64 patch indices; only these (and the prefix tokens) pass through the blocks (He et al. 2022).
        hidden_BN, mask_token_D: patches whose embedding is replaced by the token before positions are added.
        wanted_M: int64 places image * N + patch; patches_BND then holds these alone, [M, D], and the last block does
            not compute the others. Needs a CLS token, and no CLS attention.
        more_BCHW: crops of another size that go through the blocks in the same pass (packing.py); their CLS tokens
            follow those of `images_BCHW` in global_BD. Needs `wanted_M`, whose patches are those of `images_BCHW`.
        Sizes other than `image_size` work where the patch divides them: positions are interpolated as DINOv2 does.
        """
        assert (hidden_BN is None) == (mask_token_D is None), "hidden_BN and mask_token_D come together"
        x_BCHW = (images_BCHW - self.config.mean) / self.config.std
        if more_BCHW is not None:
            more_BCHW = (more_BCHW - self.config.mean) / self.config.std
        options = (visible_BK, need_cls_attention, hidden_BN, mask_token_D, wanted_M, more_BCHW)
        return Features(*self.backbone(x_BCHW, *options))


def _grid(config: ImageEncoder.Config, patch_size: int) -> Grid:
    if config.image_size % patch_size:
        below = config.image_size // patch_size * patch_size
        fixes = " or ".join(str(size) for size in (below, below + patch_size) if size)
        raise ValueError(
            f"encoder.image_size={config.image_size}: must be a multiple of the patch size {patch_size} "
            f"of {config.name}; use {fixes}"
        )
    return Grid(config.image_size // patch_size, config.image_size // patch_size)
