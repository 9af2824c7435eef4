"""Report-guided masks for iBOT: DINOv2's law of which crops are masked and how much, the report's of where.

Beyond both papers. Each global crop has the anatomy prior of its own box (prior.py), which needs no text encoder; or,
with a snapshot_run, the word-to-patch attention of a finished MedIM run on that crop: KDM and SDM. Where the text tells
of no place inside the crop, or has no word to go by, the mask is DINOv2's blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from medim_ray.draws import Draws
from medim_ray.masking.base import MASKINGS, Masks, Samples
from medim_ray.masking.block import StepBlockMasking, block_masks, step_counts_of
from medim_ray.masking.prior import prior_maps
from medim_ray.masking.report import draw_sentences, words_of_mentions, words_of_sentences
from medim_ray.types import Grid

if TYPE_CHECKING:
    from torch import Tensor

HIDDEN = "mask/dinov2_report_BSN"  # bool
WORDS = "mask/dinov2_report/words_BSW"  # float32: weight of each word's attention row, with a snapshot_run
NOISE = "mask/dinov2_report/noise_BSN"  # float32 in [0, 1): which patches of a class are hidden, with a snapshot_run
COUNTS = "mask/dinov2_report/counts_BS"  # int32: patches to hide, with a snapshot_run
GUIDED = "mask/dinov2_report/guided_BS"  # bool: the report told where; False for blocks and for crops left whole


@MASKINGS.register("dinov2_report")
class DinoReportMasking:
    """Masks of the two global crops (S = 2): as many patches as DINOv2 would hide, `diversity` of them where prior or
    attention are highest.

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
            metadata={"help": "share of the hidden patches that are the map's highest; the rest is random"},
        )
        snapshot_run: str = field(
            default="",
            metadata={
                "help": "a finished MedIM run, whose attention on each crop guides in place of the anatomy prior"
            },
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
        """Columns HIDDEN and GUIDED; the number of hidden patches is exact where the report guides.

        With a snapshot_run they are DINOv2's blocks until `attend` has seen the crops; WORDS, NOISE and COUNTS go along
        for it.
        """
        counts_BS = step_counts_of(samples, len(self.names), grid.num_patches, self.config.law())
        blocks_BSN = block_masks(counts_BS, grid, draws, "mask/block")
        noise_BSN = np.stack([draws.uniform(f"mask/{name}", grid.num_patches) for name in self.names], axis=1)
        sentences_B = draw_sentences(samples, draws) if self.config.guide != "report" else None
        guides = [self._sentences_of(crop, sentences_B) for crop in range(len(self.names))]
        if self.config.snapshot_run:
            words = [
                words_of_mentions(samples, 1.0) if chosen_B is None else words_of_sentences(samples, chosen_B)
                for chosen_B in guides
            ]
            return {
                HIDDEN: blocks_BSN,
                GUIDED: np.zeros(counts_BS.shape, dtype=np.bool_),
                WORDS: np.stack(words, axis=1),
                NOISE: noise_BSN.astype(np.float32),
                COUNTS: counts_BS.astype(np.int32),
            }
        priors = [
            prior_maps(replace(samples, boxes_B4=samples.crop_boxes(crop)), grid, chosen_B)
            for crop, chosen_B in enumerate(guides)
        ]
        return self._guided(np.stack(priors, axis=1), noise_BSN, counts_BS, blocks_BSN)

    def attend(self, columns: Mapping[str, NDArray[Any]], attention_KBWN: Sequence[Tensor]) -> dict[str, NDArray[Any]]:
        """HIDDEN and GUIDED from plan columns and the snapshot's attention on each of the global crops."""
        maps = [
            np.einsum("bw,bwn->bn", columns[WORDS][:, crop], attention_BWN.float().cpu().numpy())
            for crop, attention_BWN in enumerate(attention_KBWN)
        ]
        return self._guided(np.stack(maps, axis=1), columns[NOISE], columns[COUNTS], columns[HIDDEN])

    def _sentences_of(self, crop: int, sentences_B: NDArray[np.int16] | None) -> NDArray[np.int16] | None:
        """The sentences that guide a crop; None: the whole reports do."""
        return None if self.config.guide == "both" and crop == 0 else sentences_B

    def _guided(
        self,
        maps_BSN: NDArray[np.float32],
        noise_BSN: NDArray[Any],
        counts_BS: NDArray[Any],
        blocks_BSN: NDArray[np.bool_],
    ) -> dict[str, NDArray[Any]]:
        """Masks where the maps are highest; the blocks where a map is 0 everywhere."""
        guided_BS = maps_BSN.any(axis=2) & (counts_BS > 0)
        chosen = [
            _highest(maps_BSN[:, crop], noise_BSN[:, crop], counts_BS[:, crop], self.config.diversity)
            for crop in range(len(self.names))
        ]
        hidden_BSN = np.where(guided_BS[:, :, None], np.stack(chosen, axis=1), blocks_BSN)
        return {HIDDEN: hidden_BSN, GUIDED: guided_BS}

    def resolve(self, columns: Mapping[str, Tensor], attention_BWN: Tensor | None) -> Masks:
        """Plan or snapshot have finished the masks; a crop that is masked without guidance is a fallback."""
        hidden_SBN = columns[HIDDEN].bool().transpose(0, 1)
        is_guided_SB = columns[GUIDED].bool().transpose(0, 1)
        return Masks(hidden_SBN=hidden_SBN, fallback_SB=hidden_SBN.any(dim=2) & ~is_guided_SB)


def _highest(
    maps_BN: NDArray[np.float32], noise_BN: NDArray[Any], counts_B: NDArray[Any], diversity: float
) -> NDArray[np.bool_]:
    """bool [B, N], `counts_B` of each row: int(diversity * count) of the patches where the map is highest (ties by
    noise; never where it is 0), the others at random among the rest."""
    num_high_B = np.minimum((counts_B * diversity).astype(np.int64), (maps_BN > 0).sum(axis=1))
    place_BN = np.argsort(np.lexsort((noise_BN, -maps_BN), axis=1), axis=1)
    high_BN = place_BN < num_high_B[:, None]
    rest_BN = np.argsort(np.argsort(np.where(high_BN, 2.0, noise_BN), axis=1), axis=1)
    chosen_BN: NDArray[np.bool_] = high_BN | (rest_BN < (counts_B - num_high_B)[:, None])
    return chosen_BN
