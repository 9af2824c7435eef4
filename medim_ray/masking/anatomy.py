"""Masks from anatomy alone: hide the places that the report tells, by heading, side and zone. No model is needed.

The map is that of prior.py; threshold, diversity and counts are the law of report.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from medim_ray.draws import Draws
from medim_ray.masking.base import MASKINGS, Masks, Samples
from medim_ray.masking.prior import prior_maps
from medim_ray.masking.report import ReportMasking, draw_sentences
from medim_ray.types import Grid

if TYPE_CHECKING:
    from torch import Tensor

PRIOR = "mask/anatomy/prior_BSN"  # float32: density of the prior on each patch, 0 everywhere without a place
NOISE = "mask/anatomy/noise_BSN"  # float32 in [0, 1): which patches of a class are hidden
_NAMES = {"report": ("anatomy",), "sentence": ("anatomy_sentence",), "both": ("anatomy", "anatomy_sentence")}


@MASKINGS.register("anatomy")
class AnatomyMasking:
    """Hides by the prior of the whole report, of one random sentence (drawn as SDM draws it), or both (S = 2).

    A text that tells of no place falls back to random patches.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        name: str = "anatomy"
        of: Literal["report", "sentence", "both"] = field(
            default="report",
            metadata={"help": "report: all that the report tells (as KDM); sentence: one random sentence (as SDM)"},
        )
        ratio: float = field(default=0.5, metadata={"help": "share of the patches that counts as high"})
        diversity: float = field(
            default=0.9, metadata={"help": "share of the high patches, and 1 - share of the others, that is hidden"}
        )
        on: Literal["input", "feature"] = field(
            default="input",
            metadata={"help": "input: hidden patches never reach the encoder; feature: its output is zeroed"},
        )

        def __post_init__(self) -> None:
            if self.of not in _NAMES:
                raise ValueError(f"masking.of={self.of!r}: must be report, sentence or both")
            self.law()

        def law(self) -> ReportMasking.Config:
            """The law of KDM with these numbers; it checks them."""
            return ReportMasking.Config(ratio=self.ratio, diversity=self.diversity, on=self.on)

    needs_text = True
    needs_attention = False

    def __init__(self, config: Config) -> None:
        self.config = config
        self.on = config.on
        self.names: tuple[str, ...] = _NAMES[config.of]

    def plan(self, samples: Samples, grid: Grid, draws: Draws) -> dict[str, NDArray[Any]]:
        """The prior of each mask and its noise: columns PRIOR and NOISE."""
        priors, noise = [], []
        for name in self.names:
            sentences_B = draw_sentences(samples, draws) if name == "anatomy_sentence" else None
            priors.append(prior_maps(samples, grid, sentences_B))
            noise.append(draws.uniform(f"mask/{name}", grid.num_patches).astype(np.float32))
        return {PRIOR: np.stack(priors, axis=1), NOISE: np.stack(noise, axis=1)}

    def resolve(self, columns: Mapping[str, Tensor], attention_BWN: Tensor | None) -> Masks:
        """Masks from prior and noise; the attention is not looked at."""
        from medim_ray.masking.selection import select_hidden

        maps_BSN = columns[PRIOR].float()
        has_place_BS = (maps_BSN > 0).any(dim=2)
        hidden_BSN, fallback_BS = select_hidden(maps_BSN, columns[NOISE].float(), has_place_BS, self.config.law())
        return Masks(
            hidden_SBN=hidden_BSN.transpose(0, 1),
            fallback_SB=fallback_BS.transpose(0, 1),
            maps_SBN=maps_BSN.transpose(0, 1),
        )
