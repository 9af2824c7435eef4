"""MedIM (Xie et al. 2024): align images with reports, and reconstruct images whose report-guided parts are hidden.

    loss = ita + local + proto + 5 * (MSE under KDM + MSE under SDM), weights by option (PAPERS.md, MedIM, "Objective")

The formulas are in losses.py, the masks in medim_ray.masking. ITA and MGCA are this objective with some weights 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from medim_ray.draws import Draws
from medim_ray.masking.base import Masking, Masks
from medim_ray.masking.report import ABSENT
from medim_ray.models.collectives import all_gather_rows, num_ranks
from medim_ray.models.decoder import MaeDecoder, SetrDecoder
from medim_ray.models.heads import Projection
from medim_ray.models.text import TextEncoder, TextFeatures
from medim_ray.models.vit import Features, ImageEncoder, MaskToken
from medim_ray.objectives import losses
from medim_ray.objectives.base import OBJECTIVES, ParameterGroup, Parts, default_groups, default_part
from medim_ray.objectives.mae import reconstruction_of_hidden
from medim_ray.objectives.pixels import IMAGE_VIEW, mask_logs, mask_warnings, visible_patches, whole_images
from medim_ray.types import ASSERTION, MESH_FLAG, TOKEN_IDS, TOKEN_IS_PAD, WORD_OF_TOKEN, Batch, StepOutput


class Prototypes(nn.Module):
    """K directions that images and reports are assigned to; call it to get them at unit norm, float32 [K, E]."""

    def __init__(self, num: int, width: int) -> None:
        super().__init__()
        self.directions_KD = nn.Parameter(torch.randn(num, width) / math.sqrt(width))

    def forward(self) -> Tensor:
        return F.normalize(self.directions_KD.float(), dim=1)


class WarmUp(nn.Module):
    """The masked autoencoder (He et al. 2022) of MedIM's first steps, with a light decoder of its own."""

    def __init__(self, encoder: ImageEncoder) -> None:
        super().__init__()
        self.decoder = MaeDecoder(encoder.width, encoder.grid, encoder.patch_size, width=128, depth=2, num_heads=4)

    def forward(self, encoder: ImageEncoder, batch: Batch) -> Tensor:
        """Error of the hidden patches, which are drawn by (step, image id), whatever the rank and the seed."""
        images_BCHW = whole_images(batch)
        num_patches = encoder.grid.num_patches
        draws = Draws.of(0, np.full(len(batch), batch.step, dtype=np.int64), batch.image_ids)
        order_BN = np.argsort(draws.uniform("objective/warm_up", num_patches), axis=1)
        hidden_BN = torch.from_numpy(order_BN < int(0.75 * num_patches)).to(images_BCHW.device)
        return reconstruction_of_hidden(encoder, self.decoder, images_BCHW, hidden_BN)


_WARM_UP_STEPS = 20  # before a flat attention is told: it starts flat


@OBJECTIVES.register("medim")
class MedIM(nn.Module):
    """The five terms; one whose weight is 0 is not computed. One mask an image or two, from any masking strategy.

    masking.on = "feature" (the paper): the encoder sees the whole image and its hidden patch features are zeroed.
    "input": a second pass of the encoder computes visible patches only, and the decoder gets a mask token elsewhere.
    Raises ValueError for weights that leave no use for reports, and for input masking of a ResNet.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        name: str = "medim"
        ita_weight: float = field(default=1.0, metadata={"help": "weight of the image-report contrast"})
        local_weight: float = field(default=1.0, metadata={"help": "weight of the word-patch alignment"})
        proto_weight: float = field(default=1.0, metadata={"help": "weight of the prototype prediction"})
        reconstruction_weight: float = field(default=5.0, metadata={"help": "weight of each strategy's pixel error"})
        word_contrast_weight: float = field(
            default=0.0,
            metadata={
                "help": "weight of the cross-report word contrast, which the paper has not (losses.word_contrast)"
            },
        )
        mae_ratio: float = field(
            default=0.0,
            metadata={
                "help": "share of the steps, the first ones, in which the image encoder learns alone, as a masked "
                "autoencoder with 75 % of the patches hidden at random (the paper: 0)"
            },
        )
        ita_temperature: float = field(default=0.07, metadata={"help": "temperature of the image-report contrast"})
        local_temperature: float = field(
            default=0.1, metadata={"help": "temperature of the word-patch attention and of its contrast"}
        )
        proto_temperature: float = field(default=0.2, metadata={"help": "temperature of prototype predictions"})
        sinkhorn_epsilon: float = field(default=0.05, metadata={"help": "sharpness of prototype assignments"})
        num_prototypes: int = field(default=500, metadata={"help": "prototypes"})
        prototype_freeze_ratio: float = field(
            default=0.02, metadata={"help": "share of the steps with frozen prototypes (paper: epoch 0 of 50)"}
        )
        projection_hidden: int = field(default=2048, metadata={"help": "hidden width of the projections"})
        projection_dim: int = field(default=128, metadata={"help": "width of the embeddings"})
        norm: Literal["batch", "sync_batch", "layer"] = field(
            default="batch", metadata={"help": "norm in projections and decoder (paper: batch, of the own rank)"}
        )
        gather_negatives: bool = field(
            default=False, metadata={"help": "the image-report contrast sees the reports of all ranks"}
        )
        decoder_widths: tuple[int, ...] = field(
            default=(512, 256, 128, 64),
            metadata={
                "help": "channels of the decoder's stages, each x2 in size: as many as the patch size has factors of "
                "two; a longer list is cut, a shorter one goes on with its last"
            },
        )

        @property
        def embeds_reports(self) -> bool:
            """Whole images and reports lie in one space."""
            return self.ita_weight > 0 or self.proto_weight > 0

        def __post_init__(self) -> None:
            weights = ("ita_weight", "local_weight", "proto_weight", "reconstruction_weight", "word_contrast_weight")
            for key in weights:
                if getattr(self, key) < 0:
                    raise ValueError(f"objective.{key}={getattr(self, key)}: must be 0 or more")
            if not any(getattr(self, key) for key in weights):
                raise ValueError(f"objective: {', '.join(weights)} are all 0; nothing is left to learn")
            for key in ("ita_temperature", "proto_temperature", "sinkhorn_epsilon"):
                if getattr(self, key) <= 0:
                    raise ValueError(f"objective.{key}={getattr(self, key)}: must be above 0")
            if self.local_temperature < losses.MIN_TEMPERATURE:
                raise ValueError(
                    f"objective.local_temperature={self.local_temperature}: must be at least {losses.MIN_TEMPERATURE}, "
                    "the paper uses 0.1"
                )
            for key in ("prototype_freeze_ratio", "mae_ratio"):
                if not 0 <= getattr(self, key) <= 1:
                    raise ValueError(f"objective.{key}={getattr(self, key)}: must lie in [0, 1]")
            for key in ("num_prototypes", "projection_hidden", "projection_dim"):
                if getattr(self, key) < 1:
                    raise ValueError(f"objective.{key}={getattr(self, key)}: must be at least 1")
            if self.norm not in ("batch", "sync_batch", "layer"):
                raise ValueError(f"objective.norm={self.norm!r}: must be batch, sync_batch or layer")
            if not self.decoder_widths or min(self.decoder_widths) < 1:
                raise ValueError(f"objective.decoder_widths={self.decoder_widths}: one positive width a stage")

    needs_text = True
    view = IMAGE_VIEW

    def __init__(self, config: Config, parts: Parts) -> None:
        super().__init__()
        self.config = config
        self.encoder, self._masking = parts.encoder, parts.masking
        assert isinstance(parts.text, TextEncoder)
        self.text = parts.text
        has_decoder = config.reconstruction_weight > 0
        needs_attention = has_decoder and parts.masking.needs_attention
        trains_local = config.local_weight > 0 or config.word_contrast_weight > 0
        has_local = trains_local or needs_attention
        if not config.embeds_reports and not has_local:
            raise ValueError(
                "objective: only reconstruction_weight is above 0, and masking.name="
                f"{'+'.join(parts.masking.names)} needs no attention, so no report is used; use objective.name=mae"
            )
        self._has_global, self._has_local = config.embeds_reports, has_local
        sizes = (config.projection_hidden, config.projection_dim, config.norm)
        if self._has_global:
            self.image_projection = Projection(self.encoder.width, *sizes)
            self.report_projection = Projection(self.text.width, *sizes)
        if has_local:
            # Without a local term nothing trains them: the attention is that of random projections.
            self.patch_projection = Projection(self.encoder.width, *sizes).requires_grad_(trains_local)
            self.word_projection = Projection(self.text.width, *sizes).requires_grad_(trains_local)
        self.prototypes = Prototypes(config.num_prototypes, config.projection_dim) if config.proto_weight else None
        self._num_frozen = round(config.prototype_freeze_ratio * parts.num_steps)
        if has_decoder:
            encoder, num_masks = self.encoder, len(parts.masking.names)
            self.decoder = SetrDecoder(
                encoder.width, encoder.grid, encoder.patch_size, config.decoder_widths, num_masks, config.norm
            )
            if parts.masking.on == "input":
                if not encoder.takes_tokens:
                    raise ValueError("masking.on=input: a ResNet cannot skip hidden patches; use masking.on=feature")
                self.mask_token = MaskToken(encoder.width)
        self._mae_steps = round(config.mae_ratio * parts.num_steps)
        if self._mae_steps:
            if not self.encoder.takes_tokens:
                raise ValueError(f"objective.mae_ratio={config.mae_ratio}: hides tokens, which a ResNet has not; use 0")
            self.warm_up = WarmUp(self.encoder)

    def forward(self, batch: Batch) -> StepOutput:
        config = self.config
        if batch.step < self._mae_steps:
            loss = self.warm_up(self.encoder, batch)
            return StepOutput(loss=loss, logs={"mae": loss.detach()})
        images_BCHW = whole_images(batch)
        columns = batch.columns
        image = self.encoder(images_BCHW, need_cls_attention=config.local_weight > 0)
        report = self.text(columns[TOKEN_IDS], columns[TOKEN_IS_PAD], columns[WORD_OF_TOKEN])
        terms: dict[str, Tensor] = {}
        logs: dict[str, Tensor] = {}
        if self._has_global:
            self._add_global(image, report, terms, logs)
        attention_BWN = self._add_local(image, report, columns, terms, logs) if self._has_local else None
        if config.reconstruction_weight > 0:
            masks = self._masking.resolve(columns, attention_BWN)
            self._add_reconstruction(images_BCHW, image, masks, terms, logs)
        loss = torch.stack(list(terms.values())).sum()
        return StepOutput(loss=loss, logs={name: value.detach() for name, value in logs.items()})

    @torch.no_grad()
    def attention(self, batch: Batch) -> Tensor:
        """[B, W, N] word -> patch attention on the whole images, and nothing else of a step (probes, snapshots)."""
        columns = batch.columns
        report = self.text(columns[TOKEN_IDS], columns[TOKEN_IS_PAD], columns[WORD_OF_TOKEN])
        return losses.word_patch_attention(
            self.word_projection(report.words_BWD),
            self.patch_projection(self.encoder(whole_images(batch)).patches_BND),
            self.config.local_temperature,
        )

    def _add_global(
        self, image: Features, report: TextFeatures, terms: dict[str, Tensor], logs: dict[str, Tensor]
    ) -> None:
        """ITA and the prototypes, both on the global embeddings."""
        config = self.config
        images_BD, reports_BD = self.image_projection(image.global_BD), self.report_projection(report.global_BD)
        for k in (1, 5):
            logs[f"acc{k}"] = losses.retrieval_accuracy(images_BD.detach(), reports_BD.detach(), k)
        if config.ita_weight > 0:
            all_images_GD, all_reports_GD, first = images_BD, reports_BD, 0
            if config.gather_negatives and num_ranks() > 1:
                all_images_GD, all_reports_GD = all_gather_rows(images_BD), all_gather_rows(reports_BD)
                first = dist.get_rank() * len(images_BD)
            logs["ita"] = losses.image_text_contrast(
                images_BD, reports_BD, config.ita_temperature, all_images_GD, all_reports_GD, first
            )
            terms["ita"] = config.ita_weight * logs["ita"]
        if self.prototypes is not None:
            logs["proto"] = losses.prototype_prediction(
                images_BD, reports_BD, self.prototypes(), config.proto_temperature, config.sinkhorn_epsilon
            )
            terms["proto"] = config.proto_weight * logs["proto"]

    def _add_local(
        self,
        image: Features,
        report: TextFeatures,
        columns: Mapping[str, Tensor],
        terms: dict[str, Tensor],
        logs: dict[str, Tensor],
    ) -> Tensor:
        """The local terms that have a weight; the word -> patch attention [B, W, N] in any case."""
        config = self.config
        patches_BND, words_BWD = self.patch_projection(image.patches_BND), self.word_projection(report.words_BWD)
        if config.local_weight > 0:
            # Without CLS (a ResNet) all patches weigh the same.
            cls_BN = image.cls_attention_BN
            cls_BN = cls_BN if cls_BN is not None else patches_BND.new_ones(patches_BND.shape[:2])
            logs["local"], attention_BWN = losses.local_alignment(
                words_BWD,
                patches_BND,
                report.word_is_pad_BW,
                losses.clipped_weights(report.cls_attention_BW, of_nonzero=True),
                losses.clipped_weights(cls_BN, of_nonzero=False),
                config.local_temperature,
                normalise_patch_context=not self.encoder.takes_tokens,
            )
            terms["local"] = config.local_weight * logs["local"]
        else:
            attention_BWN = losses.word_patch_attention(words_BWD, patches_BND, config.local_temperature)
        if config.word_contrast_weight > 0:
            is_told_BW = columns[MESH_FLAG].bool() & (columns[ASSERTION] != ABSENT) & ~report.word_is_pad_BW
            keys_BW = losses.word_keys(columns[TOKEN_IDS], columns[WORD_OF_TOKEN], is_told_BW.shape[1])
            logs["word_contrast"] = losses.word_contrast(
                words_BWD, patches_BND, keys_BW, is_told_BW, config.local_temperature
            )
            terms["word_contrast"] = config.word_contrast_weight * logs["word_contrast"]
        logs["attention_entropy_ratio"] = losses.attention_entropy_ratio(attention_BWN, report.word_is_pad_BW)
        return attention_BWN

    def _add_reconstruction(
        self, images_BCHW: Tensor, image: Features, masks: Masks, terms: dict[str, Tensor], logs: dict[str, Tensor]
    ) -> None:
        """Pixel errors of all strategies in one pass of the decoder, against the WHOLE image in [-1, 1]."""
        if self._masking.on == "feature":
            features_SBND = image.patches_BND * (~masks.hidden_SBN)[:, :, :, None].to(image.patches_BND.dtype)
        else:
            features_SBND = self._visible_features(images_BCHW, masks.hidden_SBN)
        errors_S = losses.reconstruction(self.decoder(features_SBND), 2 * images_BCHW.float() - 1)
        names = self._masking.names
        logs |= {f"reconstruction/{name}": error for name, error in zip(names, errors_S, strict=True)}
        logs |= mask_logs(masks, names)
        terms["reconstruction"] = self.config.reconstruction_weight * errors_S.sum()

    def _visible_features(self, images_BCHW: Tensor, hidden_SBN: Tensor) -> Tensor:
        """Features [S, B, N, D] of an encoder that sees visible patches only; a mask token at the hidden ones."""
        hidden_MN = hidden_SBN.flatten(0, 1)
        visible_MK = visible_patches(hidden_MN)
        seen_MKD = self.encoder(images_BCHW.repeat(len(hidden_SBN), 1, 1, 1), visible_BK=visible_MK).patches_BND
        tokens_MND = self.mask_token().to(seen_MKD.dtype).expand(*hidden_MN.shape, -1)
        full_MND = tokens_MND.scatter(1, visible_MK[:, :, None].expand(-1, -1, seen_MKD.shape[2]), seen_MKD)
        return full_MND.unflatten(0, hidden_SBN.shape[:2])

    def export_extras(self) -> dict[str, Tensor]:
        """None: its mask token stands for features, not for patches."""
        return {}

    @staticmethod
    def check_masking(masking: Masking) -> None:
        """Any will do."""

    def parameter_groups(self) -> list[ParameterGroup]:
        """As usual, but the prototypes stand still during the first steps."""
        if self.prototypes is None:
            return default_groups(self)
        frozen = self.prototypes.directions_KD
        groups = [
            ParameterGroup(
                parameters=tuple(p for p in group.parameters if p is not frozen), decay_ratio=group.decay_ratio
            )
            for group in default_groups(self)
        ]
        return [*groups, ParameterGroup(parameters=(frozen,), frozen_steps=self._num_frozen)]

    def part_of(self, name: str) -> str:
        return default_part(name)

    def after_step(self, step: int) -> None:
        """Nothing to do."""

    def warnings(self, step: int, logs: Mapping[str, float]) -> list[str]:
        """Attention that looks everywhere alike, or reports without a word, make of KDM and SDM random masks."""
        told = mask_warnings(logs)
        if step < self._mae_steps + _WARM_UP_STEPS or logs.get("attention_entropy_ratio", 0.0) < 0.99:
            return told
        return [*told, "the attention of words on patches is all but uniform: KDM and SDM hide patches at random"]
