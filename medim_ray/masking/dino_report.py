"""Report-guided masks for iBOT: DINOv2's law of which crops are masked and how much, the report's of where.

Beyond both papers. Each global crop has the anatomy prior of its own box (prior.py); where the text tells of no place,
or of none inside the crop, the mask is DINOv2's blocks. No text encoder is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from medim_ray.draws import Draws
from medim_ray.masking.base import MASKINGS, Masks, Samples
from medim_ray.masking.block import StepBlockMasking, block_masks, step_counts_of
from medim_ray.masking.prior import prior_maps
from medim_ray.masking.report import draw_sentences
from medim_ray.types import Grid

if TYPE_CHECKING:
    from torch import Tensor

HIDDEN = "mask/dinov2_report_BSN"  # bool
GUIDED = "mask/dinov2_report/guided_BS"  # bool: the report told where; False for blocks and for crops left whole


@MASKINGS.register("dinov2_report")
class DinoReportMasking:
    """Masks of the two global crops (S = 2): as many patches as DINOv2 would hide, `diversity` of them where the prior
    is highest.

    guide: both crops by the whole report (as KDM), by one random sentence (as SDM), or one by each.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        name: str = "dinov2_report"
        guide: Literal["report", "sentence", "both"] = field(
            default="both",
            metadata={
                "help": "report: all that it tells (as KDM); sentence: one random sentence (as SDM); both: one each"
            },
        )
        diversity: float = field(
            default=0.9,
            metadata={"help": "share of the hidden patches that are the prior's highest; the rest is random"},
        )
        crop_ratio: float = field(default=0.5, metadata={"help": "share of the global crops of a step that is masked"})
        min_ratio: float = field(default=0.1, metadata={"help": "smallest share of hidden patches in a masked crop"})
        max_ratio: float = field(default=0.5, metadata={"help": "largest share of hidden patches in a masked crop"})

        def __post_init__(self) -> None:
            if self.guide not in ("report", "sentence", "both"):
                raise ValueError(f"masking.guide={self.guide!r}: must be report, sentence or both")
            if not 0.0 < self.diversity <= 1.0:
                raise ValueError(f"masking.diversity={self.diversity}: must lie in (0, 1], e.g. 0.9")
            self.law()

        def law(self) -> StepBlockMasking.Config:
            """DINOv2's law with these numbers; it checks them."""
            return StepBlockMasking.Config(
                crop_ratio=self.crop_ratio, min_ratio=self.min_ratio, max_ratio=self.max_ratio
            )

    on: str = "input"
    needs_text = True
    needs_attention = False
    names: tuple[str, ...] = ("global0", "global1")

    def __init__(self, config: Config) -> None:
        self.config = config

    def plan(self, samples: Samples, grid: Grid, draws: Draws) -> dict[str, NDArray[Any]]:
        """Columns HIDDEN and GUIDED; the number of hidden patches is exact where the report guides."""
        counts_BS = step_counts_of(samples, len(self.names), grid.num_patches, self.config.law())
        hidden_BSN = block_masks(counts_BS, grid, draws, "mask/block")
        guided_BS = np.zeros(counts_BS.shape, dtype=np.bool_)
        sentences_B = draw_sentences(samples, draws) if self.config.guide != "report" else None
        for crop, name in enumerate(self.names):
            by_report = self.config.guide == "report" or (self.config.guide == "both" and crop == 0)
            crop_samples = replace(samples, boxes_B4=samples.crop_boxes(crop))
            prior_BN = prior_maps(crop_samples, grid, None if by_report else sentences_B)
            guided_BS[:, crop] = prior_BN.any(axis=1) & (counts_BS[:, crop] > 0)
            noise_BN = draws.uniform(f"mask/{name}", grid.num_patches)
            chosen_BN = _highest(prior_BN, noise_BN, counts_BS[:, crop], self.config.diversity)
            hidden_BSN[:, crop] = np.where(guided_BS[:, crop, None], chosen_BN, hidden_BSN[:, crop])
        return {HIDDEN: hidden_BSN, GUIDED: guided_BS}

    def resolve(self, columns: Mapping[str, Tensor], attention_BWN: Tensor | None) -> Masks:
        """The plan has finished the masks; a crop that is masked without guidance is a fallback."""
        hidden_SBN = columns[HIDDEN].bool().transpose(0, 1)
        is_guided_SB = columns[GUIDED].bool().transpose(0, 1)
        return Masks(hidden_SBN=hidden_SBN, fallback_SB=hidden_SBN.any(dim=2) & ~is_guided_SB)


def _highest(
    prior_BN: NDArray[np.float32], noise_BN: NDArray[np.float64], counts_B: NDArray[np.int64], diversity: float
) -> NDArray[np.bool_]:
    """bool [B, N], `counts_B` of each row: int(diversity * count) of the patches where the prior is highest (ties by
    noise; never where it is 0), the others at random among the rest."""
    num_high_B = np.minimum((counts_B * diversity).astype(np.int64), (prior_BN > 0).sum(axis=1))
    place_BN = np.argsort(np.lexsort((noise_BN, -prior_BN), axis=1), axis=1)
    high_BN = place_BN < num_high_B[:, None]
    rest_BN = np.argsort(np.argsort(np.where(high_BN, 2.0, noise_BN), axis=1), axis=1)
    chosen_BN: NDArray[np.bool_] = high_BN | (rest_BN < (counts_B - num_high_B)[:, None])
    return chosen_BN
