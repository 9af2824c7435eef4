"""timm's ViT and ResNet with a forward that masks tokens and gives the CLS attention. Behind vit.ImageEncoder.

The only module that imports timm at its top: with torchvision it takes seconds, which drivers and actors need not pay.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import timm
import torch
from timm.layers import Attention, DropPath
from timm.models.resnet import ResNet
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from medim_ray.models.blocks import pick_attention, recomputed
from medim_ray.models.layouts import Weights, detect, resize_patches, to_timm
from medim_ray.models.load import load_weights, read_config, read_state
from medim_ray.models.norms import BatchNorm
from medim_ray.models.packing import Pack, run_packed
from medim_ray.models.vit import HUB, INITS, check_init

if TYPE_CHECKING:
    from medim_ray.models.vit import ImageEncoder

# Parts of a published classifier, or of a self-supervised head, that an encoder without a head has no place for.
_HEAD_KEYS = ("head.", "head_dist.", "fc.", "fc_norm.", "attn_pool.", "mask_token", "dist_token")


class GrayConv(nn.Conv2d):
    """A convolution over three colours that takes a gray image as it is, by its weights' sum over the colours: what it
    gives for the image three times, at a third of the cost."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        gray = x_BCHW.shape[1] == 1
        return self._conv_forward(x_BCHW, self.weight.sum(dim=1, keepdim=True) if gray else self.weight, self.bias)


class TokenViT(VisionTransformer):
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
        wanted_M: Tensor | None,
        more_BCHW: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        x_BLD = self._embed(x_BCHW, hidden_BN, mask_token_D, visible_BK)
        pick_attention(self.blocks, x_BLD)
        run = recomputed if self.grad_checkpointing and self.training else _run
        if more_BCHW is not None:
            assert wanted_M is not None
            pack, x_TD = Pack.of([x_BLD, self._embed(more_BCHW)])
            for block in self.blocks[:-1]:
                x_TD = run(partial(run_packed, block, pack=pack), x_TD)
            return self._wanted(x_TD, pack, wanted_M, run)
        for block in self.blocks[:-1]:
            x_BLD = run(block, x_BLD)
        if wanted_M is not None:
            assert not need_cls_attention
            pack, x_TD = Pack.of([x_BLD])
            return self._wanted(x_TD, pack, wanted_M, run)
        num_prefix = self.num_prefix_tokens
        attention_BN = None
        if need_cls_attention and self.has_class_token:
            x_BLD, attention_BL = run(partial(_with_cls_attention, self.blocks[-1]), x_BLD)
            attention_BN = attention_BL[:, num_prefix:]
        else:
            x_BLD = run(self.blocks[-1], x_BLD)
        x_BLD = self.norm(x_BLD)
        patches_BND = x_BLD[:, num_prefix:]
        global_BD = x_BLD[:, 0] if self.has_class_token else patches_BND.mean(dim=1)
        return global_BD, patches_BND, attention_BN

    def _embed(
        self,
        x_BCHW: Tensor,
        hidden_BN: Tensor | None = None,
        mask_token_D: Tensor | None = None,
        visible_BK: Tensor | None = None,
    ) -> Tensor:
        """[B, L, D] tokens as the first block takes them."""
        x_BHWD = self.patch_embed(x_BCHW.to(self.pos_embed.dtype))
        prefix_P1D, positions_1ND = self._positions(x_BHWD.shape[1], x_BHWD.shape[2])
        x_BND = x_BHWD.flatten(1, 2)
        if hidden_BN is not None and mask_token_D is not None:
            x_BND = torch.where(hidden_BN[:, :, None], mask_token_D.to(x_BND.dtype), x_BND)
        x_BND = x_BND + positions_1ND
        if visible_BK is not None:
            x_BND = x_BND.gather(1, visible_BK[:, :, None].expand(-1, -1, x_BND.shape[2]))
        x_BLD = torch.cat([p_1D.expand(x_BND.shape[0], -1, -1) for p_1D in prefix_P1D] + [x_BND], dim=1)
        tokens_BLD: Tensor = self.norm_pre(self.pos_drop(x_BLD))
        return tokens_BLD

    def _wanted(
        self, x_TD: Tensor, pack: Pack, wanted_M: Tensor, run: Callable[..., Any]
    ) -> tuple[Tensor, Tensor, None]:
        """The last block, by `run`, and the final norm for the CLS tokens of all crops and the patches `wanted_M` of
        those of the first size: [crops, D], [M, D]."""
        assert self.has_class_token
        length, num_prefix = pack.sizes[0][1], self.num_prefix_tokens
        num_patches = length - num_prefix
        wanted_rows_M = wanted_M // num_patches * length + num_prefix + wanted_M % num_patches
        rows_R = torch.cat([pack.first_C, wanted_rows_M])
        x_RD = self.norm(run(partial(run_packed, self.blocks[-1], pack=pack, rows_R=rows_R), x_TD))
        return x_RD[: len(pack.first_C)], x_RD[len(pack.first_C) :], None

    def _positions(self, height: int, width: int) -> tuple[list[Tensor], Tensor]:
        """Prefix tokens with their positions, and the positions of a height x width grid [1, N, D].

        Another grid than the trained one: bicubic, scale (n + 0.1) / N, no antialias (DINOv2, golden notes); by size
        and antialiased for models with registers, as published.
        """
        num_in_table = 0 if self.no_embed_class else self.num_prefix_tokens
        table_1ND = self.pos_embed[:, num_in_table:]
        grid_h, grid_w = self.patch_embed.grid_size
        if (height, width) != (grid_h, grid_w):
            by_size = self.reg_token is not None
            table_1DHW = table_1ND.float().unflatten(1, (grid_h, grid_w)).permute(0, 3, 1, 2)
            table_1DHW = resize_patches(table_1DHW, (height, width), by_size=by_size, antialias=by_size)
            table_1ND = table_1DHW.flatten(2).transpose(1, 2).to(table_1ND.dtype)
        prefix = [token for token in (self.cls_token, self.reg_token) if token is not None]
        if num_in_table and prefix:
            prefix = [torch.cat(prefix, dim=1) + self.pos_embed[:, :num_in_table]]
        return prefix, table_1ND


class MapResNet(ResNet):
    """timm's ResNet with the same forward: its last feature map, row by row, is the patches; no tokens to mask."""

    def forward(
        self,
        x_BCHW: Tensor,
        visible_BK: Tensor | None,
        need_cls_attention: bool,
        hidden_BN: Tensor | None,
        mask_token_D: Tensor | None,
        wanted_M: Tensor | None,
        more_BCHW: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        for of_tokens in (visible_BK, hidden_BN, wanted_M, more_BCHW):
            assert of_tokens is None, "a ResNet has no tokens; objectives check takes_tokens"
        x_BCHW = x_BCHW.to(next(self.parameters()).dtype, memory_format=torch.channels_last)
        run = recomputed if self.grad_checkpointing and self.training else _run
        x_BCHW = self.maxpool(self.act1(self.bn1(self.conv1(x_BCHW))))
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x_BCHW = run(layer, x_BCHW)
        patches_BND = x_BCHW.flatten(2).transpose(1, 2)
        return patches_BND.mean(dim=1), patches_BND, None


def _run(block: Callable[[Tensor], Any], x: Tensor) -> Any:
    return block(x)


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


def create(config: ImageEncoder.Config, pretrained: bool = False) -> Any:
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
        if config.drop_path_uniform:
            sizes["drop_path_uniform"] = True
        for option, value in sizes.items():
            raise ValueError(f"encoder.{option}={value}: {config.name} has fixed sizes; leave {option} out")
        model = timm.create_model(config.name, norm_layer=BatchNorm, **common)
        # timm builds by name and offers no place for a subclass; ours adds methods only, no state.
        model.__class__ = MapResNet
        _take_gray(model)
        return model
    if "width" in sizes:
        sizes["embed_dim"] = sizes.pop("width")
    model = None
    if entry.endswith((".vision_transformer", ".deit")):
        model = timm.create_model(
            config.name, img_size=config.image_size, dynamic_img_size=True, global_pool="", **common, **sizes
        )
    if type(model) is not VisionTransformer or model.pos_embed is None or not all(map(_is_plain, model.blocks)):
        raise ValueError(
            f"encoder.name={config.name!r}: must be a timm VisionTransformer with learned positions and plain "
            "pre-norm blocks, or a ResNet; "
            "use e.g. vit_base_patch16_224, deit_base_patch16_224, vit_base_patch14_dinov2 or resnet50"
        )
    model.__class__ = TokenViT
    if config.drop_path and config.drop_path_uniform:
        for block in model.blocks:
            block.drop_path1, block.drop_path2 = DropPath(config.drop_path), DropPath(config.drop_path)
    _take_gray(model)
    return model


def _is_plain(block: Any) -> bool:
    """Whether it is a block as packing.py runs it: not parallel, post-norm, gated or with differential attention."""
    return type(block) is Block and type(block.attn) is Attention and block.attn.gate is None


def _take_gray(model: nn.Module) -> None:
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    assert type(first) is nn.Conv2d and first.in_channels == 3
    first.__class__ = GrayConv


def build(config: ImageEncoder.Config) -> tuple[Any, dict[str, Tensor]]:
    """The backbone with its first weights; and what the file of these has besides (Weights.extras)."""
    model = create(config, pretrained=config.init == "timm")
    return model, _load(model, config) if config.init not in INITS else {}


def _load(model: nn.Module, config: ImageEncoder.Config) -> dict[str, Tensor]:
    """Load `config.init` strictly: parts of heads may be left over, nothing may be missing but what `init_allow` names.
    What is besides a backbone in it: see Weights.extras.

    Positions of another grid are resized by the law of the file's own software: DINOv2's or transformers' (load.py),
    timm's for files in timm's layout.
    """
    init = config.init
    check_init(init)
    allow = (*_HEAD_KEYS, *config.init_allow)
    try:
        state = read_state(init.removeprefix(HUB))
        _check_heads(model, init)
        if isinstance(model, VisionTransformer) and detect(state) == "timm":
            filtered = checkpoint_filter_fn(state, model, interpolation="bicubic")
            load_weights(model, Weights("timm", filtered), "the file", allow)
        elif isinstance(model, VisionTransformer):
            weights = to_timm(state)
            load_weights(model, weights, "the file", allow)
            return weights.extras
        elif any(key.endswith("conv1.weight") for key in state):
            load_weights(model, Weights("timm", state), "the file", allow)
        else:
            raise ValueError("holds no ResNet, and encoder.name is one; choose the matching name")
    except ValueError as error:
        raise ValueError(
            f"encoder.init={init!r}: {error}\nencoder.name must be what it was saved from; encoder.init_allow may name "
            "prefixes of keys that are missing or left over"
        ) from None
    return {}


def _check_heads(model: nn.Module, init: str) -> None:
    """ValueError where the config.json of a folder or an id tells of another number of attention heads: the shapes
    agree, what is computed does not."""
    if not isinstance(model, VisionTransformer):
        return
    told = read_config(init.removeprefix(HUB)).get("num_attention_heads")
    own = model.blocks[0].attn.num_heads
    if told is not None and told != own:
        raise ValueError(f"its config.json has {told} attention heads, the encoder {own}; use encoder.num_heads={told}")


def patch_size(backbone: Any) -> int:
    if isinstance(backbone, VisionTransformer):
        return int(backbone.patch_embed.patch_size[0])
    return int(backbone.feature_info[-1]["reduction"])
