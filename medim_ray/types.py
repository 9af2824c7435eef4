"""The few types that cross package borders, the column names and the shape legend. Imports torch and numpy only.

Shape legend (suffix of a tensor's name):
    B samples of a rank      S masks an image (1, or 2 for KDM + SDM)    N patches, row-major (N = grid_h * grid_w)
    C channels (1: gray)     H, W pixels                                 T tokens    W words (W = T - 1)    D width

Glossary: a *granule* is a run of samples dealt to a rank as a whole; a *global batch* is a fixed run of granules; a
*plan column* is made on the CPU in Ray Data, *resolved* into a mask on the device; a *view* is one crop family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# Columns of a report, encoded by medim_ray.reports.tokens (one row a sample).
TOKEN_IDS = "text/token_ids_BT"  # int64, [CLS] first, padded to T
TOKEN_IS_PAD = "text/token_is_pad_BT"  # bool
WORD_OF_TOKEN = "text/word_of_token_BT"  # int16, -1 for [CLS], [SEP], padding
WORD_IS_PAD = "text/word_is_pad_BW"  # bool
MESH_FLAG = "text/mesh_flag_BW"  # bool: the word lies in a mention of a heading
ASSERTION = "text/assertion_BW"  # int8: 0 no mention, 1 present, 2 absent, 3 uncertain, 4 prior
SENTENCE_ID = "text/sentence_id_BW"  # int16, -1 for padding

BOX = "view/box_B4"  # float32: crop of the first view in fractions of the stored image, (top, left, bottom, right)


@dataclass(frozen=True)
class Grid:
    """The patch grid of the masked view: `height` x `width` patches, numbered row by row."""

    height: int
    width: int

    @property
    def num_patches(self) -> int:
        return self.height * self.width


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's share of one global batch, on the rank's device.

    views: name -> float32 images in [0, 1], gray, [B * crops, 1, H, W], crop-major (all first crops, then all second).
    columns: plan columns by name, first axis B: the text columns above, those of the masking ("mask/..."), `BOX`.
    image_ids, epochs: the samples, in the order of the rows.
    """

    step: int
    image_ids: tuple[str, ...]
    views: Mapping[str, Tensor]
    columns: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.image_ids)


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """What an objective returns: `loss` (scalar, already weighted) and scalar tensors to log, by name."""

    loss: Tensor
    logs: Mapping[str, Tensor] = field(default_factory=dict)


JSON = dict[str, Any]
