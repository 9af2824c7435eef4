"""What a RunConfig asks of a device for one image: passes, parameters, pixels. One function an objective.

The objective itself is built on torch's meta device, so parameter counts are exact and no weight is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from medim_ray.config.schema import RunConfig
from medim_ray.data.transforms import CROPS, View
from medim_ray.masking import MASKINGS
from medim_ray.models.text import TextEncoder
from medim_ray.objectives import OBJECTIVES
from medim_ray.objectives.base import Parts
from medim_ray.plan.constants import OUR_CODE, Code, assumption
from medim_ray.plan.flops import Pass, Vit, meta_encoder, mlp_pass, traced_pass, vit_of, vit_pass

# Bytes that a row of prototype scores keeps per prototype: two tensors in the model's format, scores, scores over
# temperature and targets in float32, and their product while it is summed (objectives/dino_losses.py).
_SCORE_FLOAT32_BYTES = 16
# Tokens of the vocabulary: that of `prepare` (reports/wordpiece.py), and Bio_ClinicalBERT's.
_VOCABULARY = {"bert": 2_000, "hf": 28_996}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One image of a run.

    passes: what is computed for it. num_trained, num_frozen: parameters with and without gradient (an EMA teacher);
    frozen ones are float32; num_tensors: both. views: the crops that are cut for it. reads_text: a report belongs to
    it. image_bytes: its pixels on the device. stored_pixels: of the image in the shard; cut_pixels: source pixels
    under all crops. offloaded: float32 parameters and moments are in the host's memory. pending_saves: checkpoints that
    may be on their way to the storage.
    """

    name: str
    passes: tuple[Pass, ...]
    num_trained: int
    num_frozen: int
    num_tensors: int
    element_bytes: int
    views: tuple[View, ...]
    reads_text: bool
    image_bytes: float
    stored_pixels: float
    cut_pixels: float
    offloaded: bool = False
    pending_saves: int = 0

    def flops(self, checkpointed: bool) -> float:
        """Operations of one image, forward and backward; with checkpointing some passes run forward twice."""
        again = sum(p.recomputed_flops for p in self.passes) if checkpointed else 0.0
        return sum(p.forward_flops + p.backward_flops for p in self.passes) + again

    @property
    def forward_flops(self) -> float:
        """Operations of one image up to the loss."""
        return sum(p.forward_flops for p in self.passes)

    @property
    def moved_bytes(self) -> float:
        return sum(p.moved_bytes for p in self.passes)

    def kept_bytes(self, checkpointed: bool) -> float:
        """Activations of one image at their peak: what is kept, and the one block that is being computed."""
        if checkpointed:
            return sum(p.kept_checkpointed_bytes for p in self.passes) + max(p.block_bytes for p in self.passes)
        passing = (p.block_bytes for p in self.passes if not p.backward_flops)
        return sum(p.kept_bytes for p in self.passes) + max(passing, default=0.0)


def workload(config: RunConfig, code: Code) -> Workload:
    """The work of one image of this run, as `code` would do it; ValueError for an objective without a rule."""
    name = config.objective.name
    if name not in _PASSES:
        raise ValueError(f"objective.name={name!r}: plan knows the work of {', '.join(sorted(_PASSES))}")
    module = _meta_objective(config)
    crop: Any = CROPS[config.crop.name](config.crop, config.encoder.image_size)
    views: tuple[View, ...] = crop.views
    element_bytes = 4 if config.train.precision == "fp32" else 2
    parameters = list(module.parameters())
    stored = _stored_side(views) ** 2
    return Workload(
        name=name,
        passes=tuple(_PASSES[name](config, module, code, element_bytes)),
        num_trained=sum(p.numel() for p in parameters if p.requires_grad),
        num_frozen=sum(p.numel() for p in parameters if not p.requires_grad),
        num_tensors=len(parameters),
        element_bytes=element_bytes,
        views=views,
        reads_text=OBJECTIVES[name].needs_text,
        image_bytes=4.0 * sum(v.num_crops * v.size**2 for v in views),
        stored_pixels=stored,
        cut_pixels=stored * sum(v.num_crops * _mean_area(config.crop, v) for v in views),
        offloaded=config.train.offload_optimizer,
        pending_saves=config.train.max_pending_saves if code.name == OUR_CODE else 0,
    )


def _meta_objective(config: RunConfig) -> Any:
    cls = OBJECTIVES[config.objective.name]
    masking: Any = MASKINGS[config.masking.name](config.masking)
    with torch.device("meta"):
        text = TextEncoder(_text_config(config), _VOCABULARY[config.text.name]) if cls.needs_text else None
        return cls(
            config.objective,
            Parts(
                encoder=meta_encoder(config.encoder),
                text=text,
                masking=masking,
                num_steps=config.train.steps,
                global_batch=config.train.global_batch,
            ),
        )


def _text_config(config: RunConfig) -> TextEncoder.Config:
    """The report encoder without its files: a model of transformers is planned as BERT-base (Bio_ClinicalBERT)."""
    if config.text.name == "bert":
        return config.text
    return dataclasses.replace(config.text, name="bert", path=None, width=768, depth=12, num_heads=12)


def _stored_side(views: tuple[View, ...]) -> float:
    """Side of a stored image: that of `prepare`'s default, or what the largest crop needs."""
    return max(assumption("stored_side"), float(max(view.size for view in views)))


def _mean_area(crop: Any, view: View) -> float:
    """Mean share of the stored image under one crop of the view."""
    options = {f.name: getattr(crop, f.name) for f in dataclasses.fields(crop)}
    area = options.get(f"{view.name}_area")
    if area is not None:
        return (area[0] + area[1]) / 2
    return 1.0 / float(options["resize_ratio"]) ** 2


def _drop_path_share(config: RunConfig, code: Code) -> float:
    """Share of the samples that a block of the student computes (uniform over the depth where the code skips)."""
    return 1.0 - config.encoder.drop_path if code.drop_path_skips else 1.0


def _need_vit(encoder: Any, name: str) -> Vit:
    vit = vit_of(encoder)
    if vit is None:
        raise ValueError(f"encoder.name={encoder.config.name}: objective {name} needs a ViT, e.g. vit_base_patch16_224")
    return vit


def _rad_dino(config: RunConfig, module: Any, code: Code, element_bytes: int) -> list[Pass]:
    """Student on two global and n local crops, teacher forward on the global ones; heads on CLS and masked patches."""
    vit = _need_vit(module.encoder, "rad_dino")
    size, crop, objective = config.encoder.image_size, config.crop, config.objective
    share = _drop_path_share(config, code)
    num_patches = (size // vit.patch_size) ** 2
    tokens = float(vit.num_tokens(size))
    passes = [
        vit_pass(
            vit, "student, global", tokens, 2, num_patches=num_patches, element_bytes=element_bytes, block_share=share
        ),
        vit_pass(
            vit, "teacher, global", tokens, 2, num_patches=num_patches, element_bytes=element_bytes, trained=False
        ),
    ]
    if crop.num_local:
        passes.append(
            vit_pass(
                vit,
                "student, local",
                float(vit.num_tokens(crop.local_size)),
                crop.num_local,
                num_patches=(crop.local_size // vit.patch_size) ** 2,
                element_bytes=element_bytes,
                block_share=share,
            )
        )
    masking = config.masking
    masked = 2 * masking.crop_ratio * (masking.min_ratio + masking.max_ratio) / 2 * num_patches
    head = objective.head
    widths = [vit.width, *[head.hidden] * (head.num_layers - 1), head.bottleneck, head.num_prototypes]
    row_bytes = _SCORE_FLOAT32_BYTES * head.num_prototypes
    for who, rows, trained in (
        ("student heads, CLS", 2 + crop.num_local, True),
        ("student heads, masked patches", masked, True),
        ("teacher heads", 2 + masked, False),
    ):
        passes.append(
            mlp_pass(who, widths, rows, element_bytes=element_bytes, row_bytes=row_bytes * trained, trained=trained)
        )
    return passes


def _visible_ratio(config: RunConfig) -> float:
    """Share of the patches that the encoder sees, for maskings with a fixed ratio."""
    return 1.0 - float(config.masking.ratio)


def _mae(config: RunConfig, module: Any, code: Code, element_bytes: int) -> list[Pass]:
    """The encoder on visible patches, the decoder on all places, one linear layer at each end of it."""
    vit = _need_vit(module.encoder, "mae")
    num_patches = module.encoder.grid.num_patches
    num_visible = num_patches - round(num_patches * (1.0 - _visible_ratio(config)))
    objective = config.objective
    decoder = dataclasses.replace(
        vit,
        width=objective.decoder_width,
        depth=objective.decoder_depth,
        num_heads=objective.decoder_heads,
        mlp_width=4 * objective.decoder_width,
        layer_scale=False,
    )
    pixels = vit.patch_size**2
    return [
        vit_pass(
            vit,
            "encoder, visible patches",
            float(num_visible + vit.num_prefix_tokens),
            1,
            num_patches=num_patches,
            element_bytes=element_bytes,
            block_share=_drop_path_share(config, code),
        ),
        mlp_pass("decoder, projection", [vit.width, decoder.width], num_visible + 1.0, element_bytes=element_bytes),
        vit_pass(decoder, "decoder, all patches", num_patches + 1.0, 1, num_patches=0, element_bytes=element_bytes),
        mlp_pass("decoder, pixels", [decoder.width, pixels], num_patches, element_bytes=element_bytes),
    ]


def _simmim(config: RunConfig, module: Any, code: Code, element_bytes: int) -> list[Pass]:
    """The encoder on all places, a linear layer to pixels."""
    vit = _need_vit(module.encoder, "simmim")
    num_patches = module.encoder.grid.num_patches
    pixels = vit.patch_size**2
    return [
        vit_pass(
            vit,
            "encoder",
            float(num_patches + vit.num_prefix_tokens),
            1,
            num_patches=num_patches,
            element_bytes=element_bytes,
            block_share=_drop_path_share(config, code),
        ),
        mlp_pass("pixels", [vit.width, pixels], num_patches, element_bytes=element_bytes),
    ]


def _medim(config: RunConfig, module: Any, code: Code, element_bytes: int) -> list[Pass]:
    """Image and report encoder, four projections, the alignment, and the decoder on one or two masked copies."""
    encoder, objective, text = module.encoder, config.objective, module.text
    num_patches, num_words = encoder.grid.num_patches, config.text.num_tokens - 1
    passes = [_image_pass(config, module, code, element_bytes), _text_pass(config, text, element_bytes)]
    sizes = [objective.projection_hidden, objective.projection_dim]
    if objective.ita_weight or objective.proto_weight:
        for name, width in (("image projection", encoder.width), ("report projection", text.width)):
            passes.append(mlp_pass(name, [width, *sizes], 1.0, element_bytes=element_bytes))
    if objective.local_weight or (objective.reconstruction_weight and module._masking.needs_attention):
        trained = objective.local_weight > 0
        for name, width, rows in (
            ("patch projection", encoder.width, num_patches),
            ("word projection", text.width, num_words),
        ):
            passes.append(mlp_pass(name, [width, *sizes], rows, element_bytes=element_bytes, trained=trained))
        # Word x patch scores, the attended vectors and their contrast, in float32 and in both directions.
        wide = [objective.projection_dim, num_patches, objective.projection_dim, num_words]
        passes.append(mlp_pass("alignment", wide, 2.0 * num_words, element_bytes=4, trained=trained))
    if objective.reconstruction_weight:
        passes += _reconstruction_passes(config, module, code, element_bytes)
    return passes


def _image_pass(config: RunConfig, module: Any, code: Code, element_bytes: int) -> Pass:
    """The whole image through a ViT or a ResNet."""
    encoder, size = module.encoder, config.encoder.image_size
    vit = vit_of(encoder)
    if vit is None:
        return traced_pass(
            "image encoder",
            lambda: encoder(torch.empty(1, 1, size, size)).patches_BND,
            list(encoder.parameters()),
            element_bytes,
        )
    return vit_pass(
        vit,
        "image encoder",
        float(vit.num_tokens(size)),
        1,
        num_patches=encoder.grid.num_patches,
        element_bytes=element_bytes,
        block_share=_drop_path_share(config, code),
    )


def _text_pass(config: RunConfig, text: Any, element_bytes: int) -> Pass:
    """The report through a BERT, whose block has the products of a ViT's."""
    bert = text.model.config
    shape = Vit(
        width=bert.hidden_size,
        depth=bert.num_hidden_layers,
        num_heads=bert.num_attention_heads,
        mlp_width=bert.intermediate_size,
        patch_size=1,
        num_prefix_tokens=0,
        layer_scale=False,
    )
    tokens = float(config.text.num_tokens)
    trained = config.text.trainable
    return vit_pass(shape, "report encoder", tokens, 1, num_patches=0, element_bytes=element_bytes, trained=trained)


def _reconstruction_passes(config: RunConfig, module: Any, code: Code, element_bytes: int) -> list[Pass]:
    """The decoder on every masked copy; with input masking also the encoder on the visible patches of each."""
    encoder, num_masks = module.encoder, len(module._masking.names)
    num_patches = encoder.grid.num_patches
    decoder = traced_pass(
        "decoder",
        lambda: module.decoder(torch.empty(num_masks, 1, num_patches, encoder.width, requires_grad=True)),
        list(module.decoder.parameters()),
        element_bytes,
    )
    if module._masking.on == "feature":
        return [decoder]
    vit = _need_vit(encoder, "medim")
    again = vit_pass(
        vit,
        "image encoder, visible patches",
        num_patches * _visible_ratio(config) + vit.num_prefix_tokens,
        num_masks,
        num_patches=num_patches,
        element_bytes=element_bytes,
        block_share=_drop_path_share(config, code),
    )
    return [decoder, again]


_PASSES: dict[str, Callable[[RunConfig, Any, Code, int], list[Pass]]] = {
    "mae": _mae,
    "medim": _medim,
    "rad_dino": _rad_dino,
    "simmim": _simmim,
}
