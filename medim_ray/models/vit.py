"""Image encoders: any timm VisionTransformer with learned positions, or a timm ResNet, behind one interface.

Takes gray images in [0, 1]; returns a global vector, patch features and, on demand, the CLS attention that weighs the
patches in MedIM's local term (PAPERS.md, MedIM). It holds no projection, no head and no decoder.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors.torch import load_file
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torch.nn import functional as F

from medim_ray.models.norms import BatchNorm
from medim_ray.types import Grid

INITS = ("random", "timm")  # values of `init` that are no path

# Parts of a published classifier, or of a self-supervised head, that an encoder without a head has no place for.
_HEAD_KEYS = ("head.", "head_dist.", "fc.", "fc_norm.", "attn_pool.", "mask_token", "dist_token")


class Features(NamedTuple):
    """What an encoder returns (a named tuple, because the hooks of ZeRO-3 walk tuples and not dataclasses).

    global_BD: CLS token after the final norm, or the mean of the patches where there is no CLS token.
    patches_BND: patch features after the final norm, row by row; [B, K, D] in the order of `visible_BK` where given.
    cls_attention_BN: float32, last block's attention from CLS to each patch, mean over heads, softmaxed over all
        tokens; None where it was not asked for or there is no CLS token.
    """

    global_BD: Tensor
    patches_BND: Tensor
    cls_attention_BN: Tensor | None = None


class MaskToken(nn.Module):
    """A learned token for hidden positions. A module of its own so that ZeRO-3 gathers it; call it to get [D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token_D = nn.Parameter(torch.empty(width))
        nn.init.normal_(self.token_D, std=0.02)

    def forward(self) -> Tensor:
        # A copy: ZeRO-3 frees the parameter's own storage when this forward returns.
        return self.token_D.clone()


class ImageEncoder(nn.Module):
    """Gray images -> Features. `backbone` is the timm model itself, so its state dict is a timm checkpoint.

    Attributes: grid (patches at `image_size`), width (D), patch_size (pixels), num_prefix_tokens, has_cls,
    takes_tokens (visible_BK and hidden_BN are possible: ViT yes, ResNet no).
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
            metadata={"help": "'random', 'timm' (weights of that name), or a local .safetensors, .pth or folder"},
        )
        mean: float = field(default=0.5, metadata={"help": "subtracted from pixels in [0, 1]"})
        std: float = field(default=0.5, metadata={"help": "pixels are divided by it"})
        drop_path: float = field(default=0.0, metadata={"help": "stochastic depth of the last block, in [0, 1)"})
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
        super().__init__()
        self.config = config
        self.backbone = _build(config)
        self.patch_size = _patch_size(self.backbone)
        self.grid = _grid(config, self.patch_size)
        self.width = int(self.backbone.num_features)
        self.takes_tokens = isinstance(self.backbone, _TokenViT)
        self.has_cls = self.takes_tokens and self.backbone.has_class_token
        self.num_prefix_tokens = int(self.backbone.num_prefix_tokens) if self.takes_tokens else 0

    @staticmethod
    def grid_of(config: Config) -> Grid:
        """The patch grid of an encoder without allocating or loading its weights (for mask plans on the CPU)."""
        with torch.device("meta"):
            return _grid(config, _patch_size(_create(config)))

    def forward(
        self,
        images_BCHW: Tensor,
        visible_BK: Tensor | None = None,
        need_cls_attention: bool = False,
        hidden_BN: Tensor | None = None,
        mask_token_D: Tensor | None = None,
    ) -> Features:
        """Encode `images_BCHW` (float in [0, 1], C = 1; three channels are taken as they are).

        visible_BK: int64 patch indices; only these (and the prefix tokens) pass through the blocks (He et al. 2022).
        hidden_BN, mask_token_D: patches whose embedding is replaced by the token before positions are added.
        Sizes other than `image_size` work where the patch divides them: positions are interpolated as DINOv2 does.
        """
        assert (hidden_BN is None) == (mask_token_D is None), "hidden_BN and mask_token_D come together"
        x_BCHW = ((images_BCHW - self.config.mean) / self.config.std).expand(-1, 3, -1, -1)
        return Features(*self.backbone(x_BCHW, visible_BK, need_cls_attention, hidden_BN, mask_token_D))


class _TokenViT(VisionTransformer):
    """timm's ViT with a forward that masks tokens.

    Everything happens inside this module's own forward because it owns positions and CLS: ZeRO-3 gathers a module's
    direct parameters only there.
    """

    def forward(
        self,
        x_BCHW: Tensor,
        visible_BK: Tensor | None,
        need_cls_attention: bool,
        hidden_BN: Tensor | None,
        mask_token_D: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        x_BHWD = self.patch_embed(x_BCHW.to(self.pos_embed.dtype))
        prefix_P1D, positions_1ND = self._positions(x_BHWD.shape[1], x_BHWD.shape[2])
        x_BND = x_BHWD.flatten(1, 2)
        if hidden_BN is not None and mask_token_D is not None:
            x_BND = torch.where(hidden_BN[:, :, None], mask_token_D.to(x_BND.dtype), x_BND)
        x_BND = x_BND + positions_1ND
        if visible_BK is not None:
            x_BND = x_BND.gather(1, visible_BK[:, :, None].expand(-1, -1, x_BND.shape[2]))
        x_BLD = torch.cat([p_1D.expand(x_BND.shape[0], -1, -1) for p_1D in prefix_P1D] + [x_BND], dim=1)
        x_BLD = self.norm_pre(self.pos_drop(x_BLD))
        for block in self.blocks[:-1]:
            x_BLD = block(x_BLD)
        num_prefix = self.num_prefix_tokens
        attention_BN = None
        if need_cls_attention and self.has_class_token:
            x_BLD, attention_BL = _with_cls_attention(self.blocks[-1], x_BLD)
            attention_BN = attention_BL[:, num_prefix:]
        else:
            x_BLD = self.blocks[-1](x_BLD)
        x_BLD = self.norm(x_BLD)
        patches_BND = x_BLD[:, num_prefix:]
        global_BD = x_BLD[:, 0] if self.has_class_token else patches_BND.mean(dim=1)
        return global_BD, patches_BND, attention_BN

    def _positions(self, height: int, width: int) -> tuple[list[Tensor], Tensor]:
        """Prefix tokens with their positions, and the positions of a height x width grid [1, N, D].

        Another grid than the trained one: bicubic, scale (n + 0.1) / N, no antialias (DINOv2, golden notes).
        """
        num_in_table = 0 if self.no_embed_class else self.num_prefix_tokens
        table_1ND = self.pos_embed[:, num_in_table:]
        grid_h, grid_w = self.patch_embed.grid_size
        if (height, width) != (grid_h, grid_w):
            table_1DHW = table_1ND.float().unflatten(1, (grid_h, grid_w)).permute(0, 3, 1, 2)
            scale = ((height + 0.1) / grid_h, (width + 0.1) / grid_w)
            table_1DHW = F.interpolate(table_1DHW, scale_factor=scale, mode="bicubic")
            assert table_1DHW.shape[-2:] == (height, width)
            table_1ND = table_1DHW.flatten(2).transpose(1, 2).to(table_1ND.dtype)
        prefix = [token for token in (self.cls_token, self.reg_token) if token is not None]
        if num_in_table and prefix:
            prefix = [torch.cat(prefix, dim=1) + self.pos_embed[:, :num_in_table]]
        return prefix, table_1ND


class _MapResNet(ResNet):
    """timm's ResNet with the same forward: its last feature map, row by row, is the patches; no tokens to mask."""

    def forward(
        self,
        x_BCHW: Tensor,
        visible_BK: Tensor | None,
        need_cls_attention: bool,
        hidden_BN: Tensor | None,
        mask_token_D: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        assert visible_BK is None and hidden_BN is None, "a ResNet has no tokens; objectives check takes_tokens"
        x_BCHW = x_BCHW.to(next(self.parameters()).dtype, memory_format=torch.channels_last)
        patches_BND = self.forward_features(x_BCHW).flatten(2).transpose(1, 2)
        return patches_BND.mean(dim=1), patches_BND, None


def _with_cls_attention(block: nn.Module, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
    """Run a timm block; also its attention from token 0 to all tokens [B, L], float32, mean over heads.

    Queries and keys are taken where the block itself hands them to q_norm and k_norm: fused attention stays in use and
    nothing is computed twice.
    """
    attn: Any = block.attn
    taken: dict[str, Tensor] = {}
    handles = [
        attn.q_norm.register_forward_hook(lambda _m, _i, q_BHLd: taken.update(q=q_BHLd)),
        attn.k_norm.register_forward_hook(lambda _m, _i, k_BHLd: taken.update(k=k_BHLd)),
    ]
    try:
        out_BLD = block(x_BLD)
    finally:
        for handle in handles:
            handle.remove()
    query_BH1d = taken["q"][:, :, :1].float() / math.sqrt(taken["q"].shape[-1])
    weights_BHL = (query_BH1d @ taken["k"].float().transpose(-2, -1)).squeeze(2).softmax(dim=-1)
    return out_BLD, weights_BHL.mean(dim=1)


def _create(config: ImageEncoder.Config, pretrained: bool = False) -> Any:
    """The timm model of `config` as one of our two classes; ValueError where it is neither."""
    if not timm.is_model(config.name):
        near = difflib.get_close_matches(config.name, timm.list_models(), n=3)
        raise ValueError(f"encoder.name={config.name!r} is no timm model; near: {', '.join(near) or 'none'}")
    sizes = {
        "patch_size": config.patch_size,
        "width": config.width,
        "depth": config.depth,
        "num_heads": config.num_heads,
    }
    sizes = {option: value for option, value in sizes.items() if value is not None}
    common = {"num_classes": 0, "drop_path_rate": config.drop_path, "pretrained": pretrained}
    entry = timm.model_entrypoint(config.name).__module__
    if entry.endswith(".resnet"):
        for option, value in sizes.items():
            raise ValueError(f"encoder.{option}={value}: {config.name} has fixed sizes; leave {option} out")
        model = timm.create_model(config.name, norm_layer=BatchNorm, **common)
        # timm builds by name and offers no place for a subclass; ours adds methods only, no state.
        model.__class__ = _MapResNet
        return model
    if "width" in sizes:
        sizes["embed_dim"] = sizes.pop("width")
    model = None
    if entry.endswith((".vision_transformer", ".deit")):
        model = timm.create_model(
            config.name, img_size=config.image_size, dynamic_img_size=True, global_pool="", **common, **sizes
        )
    if type(model) is not VisionTransformer or model.pos_embed is None:
        raise ValueError(
            f"encoder.name={config.name!r}: must be a timm VisionTransformer with learned positions or a ResNet; "
            "use e.g. vit_base_patch16_224, deit_base_patch16_224, vit_base_patch14_dinov2 or resnet50"
        )
    model.__class__ = _TokenViT
    return model


def _build(config: ImageEncoder.Config) -> Any:
    model = _create(config, pretrained=config.init == "timm")
    if config.init not in INITS:
        _load(model, config.init)
    return model


def _load(model: nn.Module, init: str) -> None:
    """Load a local checkpoint strictly: parts of heads may be left over, nothing may be missing."""
    path = Path(init)
    if path.is_dir():
        candidates = [path / name for name in ("model.safetensors", "pytorch_model.bin", "model.pth")]
        path = next((p for p in candidates if p.is_file()), candidates[0])
    if not path.is_file():
        raise ValueError(
            f"encoder.init={init!r}: must be 'random', 'timm' or a local checkpoint, and {path} is no file"
        )
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # torch, pickle and safetensors raise half a dozen classes for an unreadable file
        raise ValueError(f"encoder.init={init!r}: {path} is unreadable ({error}); use a .safetensors file") from error
    for wrapper in ("model", "state_dict", "teacher"):
        state = state.get(wrapper, state)
    if isinstance(model, VisionTransformer):
        state = checkpoint_filter_fn(state, model, interpolation="bicubic")
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # shapes
        raise ValueError(
            f"encoder.init={init!r}: does not fit encoder.name ({error}); choose the matching name"
        ) from None
    unexpected = [key for key in unexpected if not key.startswith(_HEAD_KEYS)]
    if missing or unexpected:
        raise ValueError(
            f"encoder.init={init!r}: does not fit encoder.name: {len(missing)} keys are missing {missing[:5]}, "
            f"{len(unexpected)} are unknown {unexpected[:5]}; choose the name that the file was saved from"
        )


def _patch_size(backbone: Any) -> int:
    if isinstance(backbone, VisionTransformer):
        return int(backbone.patch_embed.patch_size[0])
    return int(backbone.feature_info[-1]["reduction"])


def _grid(config: ImageEncoder.Config, patch_size: int) -> Grid:
    if config.image_size % patch_size:
        below = config.image_size // patch_size * patch_size
        fixes = " or ".join(str(size) for size in (below, below + patch_size) if size)
        raise ValueError(
            f"encoder.image_size={config.image_size}: must be a multiple of the patch size {patch_size} "
            f"of {config.name}; use {fixes}"
        )
    return Grid(config.image_size // patch_size, config.image_size // patch_size)
