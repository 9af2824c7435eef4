"""Masked image modelling without reports: MAE (He et al. 2022) and SimMIM (Xie et al. 2022), the controls of MedIM.

Both losses are means over samples of a mean over the sample's own hidden patches, so that one worker and two with the
same global batch have equal losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn import functional as F

from medim_ray.masking.base import Masking
from medim_ray.models.decoder import MaeDecoder
from medim_ray.models.layouts import MASK_TOKEN
from medim_ray.models.vit import ImageEncoder, MaskToken
from medim_ray.objectives.base import OBJECTIVES, ParameterGroup, Parts, default_groups, default_part
from medim_ray.objectives.pixels import (
    IMAGE_VIEW,
    hidden_mean,
    mask_logs,
    mask_warnings,
    patchify,
    unit_patches,
    visible_patches,
    whole_images,
)
from medim_ray.types import Batch, StepOutput


@OBJECTIVES.register("mae")
class Mae(nn.Module):
    """The encoder sees visible patches only; a light decoder predicts the hidden ones' pixels, normalised by patch.

    Raises ValueError for a masking that is not on the input, has several masks an image or hides unequal numbers.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        name: str = "mae"
        decoder_width: int = field(default=128, metadata={"help": "width of the decoder (He 2022 for ViT-B: 512)"})
        decoder_depth: int = field(default=2, metadata={"help": "blocks of the decoder (He 2022: 8)"})
        decoder_heads: int = field(default=4, metadata={"help": "attention heads of the decoder (He 2022: 16)"})

        def __post_init__(self) -> None:
            for key in ("decoder_width", "decoder_depth", "decoder_heads"):
                if getattr(self, key) < 1:
                    raise ValueError(f"objective.{key}={getattr(self, key)}: must be at least 1")

    needs_text = False
    view = IMAGE_VIEW

    def __init__(self, config: Config, parts: Parts) -> None:
        super().__init__()
        check_parts(config.name, parts)
        self.encoder = encoder = parts.encoder
        self._masking = parts.masking
        self.decoder = MaeDecoder(
            encoder.width,
            encoder.grid,
            encoder.patch_size,
            config.decoder_width,
            config.decoder_depth,
            config.decoder_heads,
        )

    def forward(self, batch: Batch) -> StepOutput:
        images_BCHW, masks = whole_images(batch), self._masking.resolve(batch.columns, None)
        hidden_BN = masks.hidden_SBN[0]
        loss = reconstruction_of_hidden(self.encoder, self.decoder, images_BCHW, hidden_BN)
        return StepOutput(loss=loss, logs=mask_logs(masks, self._masking.names))

    def export_extras(self) -> dict[str, Tensor]:
        return {}

    @staticmethod
    def check_masking(masking: Masking) -> None:
        check_one_input_mask("mae", masking)

    def parameter_groups(self) -> list[ParameterGroup]:
        return default_groups(self)

    def part_of(self, name: str) -> str:
        return default_part(name)

    def after_step(self, step: int) -> None:
        """Nothing to do."""

    def warnings(self, step: int, logs: Mapping[str, float]) -> list[str]:
        """Masks that fall back: the loss tells the rest."""
        return mask_warnings(logs)


@OBJECTIVES.register("simmim")
class SimMim(nn.Module):
    """Hidden patches enter the encoder as a mask token; a linear head predicts their pixels; L1."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        name: str = "simmim"

    needs_text = False
    view = IMAGE_VIEW

    def __init__(self, config: Config, parts: Parts) -> None:
        super().__init__()
        check_parts(config.name, parts)
        self.encoder = parts.encoder
        self._masking = parts.masking
        self.mask_token = MaskToken(parts.encoder.width, parts.encoder.init_extras.get(MASK_TOKEN))
        self.head = nn.Linear(parts.encoder.width, parts.encoder.patch_size**2)

    def forward(self, batch: Batch) -> StepOutput:
        images_BCHW, masks = whole_images(batch), self._masking.resolve(batch.columns, None)
        hidden_BN = masks.hidden_SBN[0]
        features = self.encoder(images_BCHW, hidden_BN=hidden_BN, mask_token_D=self.mask_token())
        predicted_BNP = self.head(features.patches_BND).float()
        error_BN = F.l1_loss(predicted_BNP, target_patches(self.encoder, images_BCHW), reduction="none").mean(dim=-1)
        return StepOutput(loss=hidden_mean(error_BN, hidden_BN), logs=mask_logs(masks, self._masking.names))

    def export_extras(self) -> dict[str, Tensor]:
        return self.mask_token.extras()

    @staticmethod
    def check_masking(masking: Masking) -> None:
        check_one_input_mask("simmim", masking)

    def parameter_groups(self) -> list[ParameterGroup]:
        return default_groups(self)

    def part_of(self, name: str) -> str:
        return default_part(name)

    def after_step(self, step: int) -> None:
        """Nothing to do."""

    def warnings(self, step: int, logs: Mapping[str, float]) -> list[str]:
        """Masks that fall back: the loss tells the rest."""
        return mask_warnings(logs)


def reconstruction_of_hidden(
    encoder: ImageEncoder, decoder: MaeDecoder, images_BCHW: Tensor, hidden_BN: Tensor
) -> Tensor:
    """MAE's loss: the encoder sees the visible patches, the error is that of the hidden ones."""
    visible_BK = visible_patches(hidden_BN)
    features = encoder(images_BCHW, visible_BK=visible_BK)
    predicted_BNP = decoder(features.global_BD, features.patches_BND, visible_BK).float()
    target_BNP = unit_patches(target_patches(encoder, images_BCHW))
    return hidden_mean((predicted_BNP - target_BNP).square().mean(dim=-1), hidden_BN)


def target_patches(encoder: ImageEncoder, images_BCHW: Tensor) -> Tensor:
    """Pixels as the encoder normalises them, patch by patch: [B, N, patch_size ** 2]."""
    return patchify((images_BCHW.float() - encoder.config.mean) / encoder.config.std, encoder.patch_size)


def check_parts(name: str, parts: Parts) -> None:
    """ValueError unless the encoder has tokens and the masking fits."""
    check_one_input_mask(name, parts.masking)
    if not parts.encoder.takes_tokens:
        raise ValueError(f"objective.name={name} hides tokens, which a ResNet has not; use a ViT as encoder.name")


def check_one_input_mask(name: str, masking: Masking) -> None:
    """ValueError unless the masking gives one mask an image, on the input, from no text."""
    if masking.on != "input":
        raise ValueError(f"masking.on={masking.on}: objective.name={name} masks its input; use masking.on=input")
    if len(masking.names) != 1:
        raise ValueError(
            f"masking.name gives {len(masking.names)} masks an image ({', '.join(masking.names)}): "
            f"objective.name={name} takes one; use e.g. masking.name=uniform"
        )
    if masking.needs_attention:
        raise ValueError(
            f"masking.name={masking.names[0]} needs the attention of a text encoder, and objective.name={name} has "
            "none; use masking.name=uniform, or objective.name=medim"
        )
