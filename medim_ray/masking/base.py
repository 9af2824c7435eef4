"""What a masking strategy is: a plan on the CPU and a resolution on the device. No strategy lives here.

`plan` runs in Ray Data, a granule at a time, and does all that needs no model: word flags, sentence choice, blocks,
pre-drawn noise. `resolve` is batched and on the device: it turns plan columns and, for some strategies, the
word-to-patch attention into masks, and draws no random number.
Only `resolve` imports torch: plans run in decoding actors, which start faster and stay smaller without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from medim_ray.draws import Draws
from medim_ray.registry import Registry
from medim_ray.reports.tagger import Mention
from medim_ray.types import Grid

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What a plan may look at, for B samples of a granule; never pixels.

    boxes_B4: first crop in fractions of the stored image (top, left, bottom, right); more_boxes_BK4: the further crops
    of the same view, K of them, where there are any.
    text: the text columns of medim_ray.types, [B, ...], or empty where the run has no text encoder.
    mentions: the tagger's mentions of each report (empty tuples where there is no text).
    steps_B, positions_B: global step and place in the global batch, for laws that belong to a global batch; such a law
    draws from medim_ray.draws.step_draws(seed, step) and knows `global_batch`.
    """

    image_ids: Sequence[str]
    boxes_B4: NDArray[np.float32]
    text: Mapping[str, NDArray[Any]]
    mentions: Sequence[Sequence[Mention]]
    steps_B: NDArray[np.int64]
    positions_B: NDArray[np.int64]
    global_batch: int
    seed: int
    more_boxes_BK4: NDArray[np.float32] | None = None

    def crop_boxes(self, crop: int) -> NDArray[np.float32]:
        """[B, 4] the box of crop number `crop` of the first view."""
        if crop == 0:
            return self.boxes_B4
        assert self.more_boxes_BK4 is not None, "the view has one crop"
        boxes_B4: NDArray[np.float32] = self.more_boxes_BK4[:, crop - 1]
        return boxes_B4

    def __len__(self) -> int:
        return len(self.image_ids)


@dataclass(frozen=True, kw_only=True)
class Masks:
    """hidden_SBN: bool, True = hidden; fallback_SB: bool, the strategy had nothing to work on and used its fallback;
    maps_SBN: float, the relevance map that was thresholded, or None where the strategy has no map."""

    hidden_SBN: Tensor
    fallback_SB: Tensor
    maps_SBN: Tensor | None = None


class Masking(Protocol):
    """A strategy. Its class holds a frozen `Config`; it is registered in MASKINGS under the names of `masking.name`."""

    names: tuple[str, ...]  # one a mask: ("uniform",), ("kdm", "sdm"); S = len(names)
    on: str  # "input": hidden patches never reach the encoder; "feature": encoder outputs are multiplied by 0
    needs_text: bool  # the plan reads text columns and mentions
    needs_attention: bool  # resolve wants word-to-patch attention

    def plan(self, samples: Samples, grid: Grid, draws: Draws) -> dict[str, NDArray[Any]]:
        """Columns with first axis B, names starting with "mask/", numeric dtypes."""
        ...

    def resolve(self, columns: Mapping[str, Tensor], attention_BWN: Tensor | None) -> Masks:
        """Masks from plan columns (with the text columns beside them); attention rows of padding words are ignored."""
        ...


MASKINGS: Registry[Any] = Registry("masking")
