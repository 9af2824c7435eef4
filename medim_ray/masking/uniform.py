"""Uniform masks: the same number of random patches of every image. The control of every guided strategy (He 2022).

The plan finishes the mask, so nothing is left to resolve; no model and no text is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from medim_ray.draws import Draws
from medim_ray.masking.base import MASKINGS, Masks, Samples
from medim_ray.types import Grid

if TYPE_CHECKING:
    from torch import Tensor


@MASKINGS.register("uniform")
class UniformMasking:
    """Hides exactly round(ratio * N) random patches of each sample."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        name: str = "uniform"
        ratio: float = field(default=0.75, metadata={"help": "share of the patches that is hidden (He 2022: 0.75)"})
        on: Literal["input", "feature"] = field(
            default="input",
            metadata={"help": "input: hidden patches never reach the encoder; feature: its output is zeroed"},
        )

        def __post_init__(self) -> None:
            if not 0.0 < self.ratio < 1.0:
                raise ValueError(f"masking.ratio={self.ratio}: must lie between 0 and 1, e.g. 0.75")
            if self.on not in ("input", "feature"):
                raise ValueError(f"masking.on={self.on!r}: must be 'input' or 'feature'")

    names = ("uniform",)
    needs_text = False
    needs_attention = False

    def __init__(self, config: Config) -> None:
        self.config = config
        self.on = config.on

    def plan(self, samples: Samples, grid: Grid, draws: Draws) -> dict[str, NDArray[Any]]:
        """{"mask/uniform_BN": bool}."""
        count = round(grid.num_patches * self.config.ratio)
        noise_BN = draws.uniform("mask/uniform", grid.num_patches)
        hidden_BN = np.zeros(noise_BN.shape, dtype=np.bool_)
        np.put_along_axis(hidden_BN, np.argpartition(noise_BN, count - 1, axis=1)[:, :count], True, axis=1)
        return {"mask/uniform_BN": hidden_BN}

    def resolve(self, columns: Mapping[str, Tensor], attention_BWN: Tensor | None) -> Masks:
        hidden_1BN = columns["mask/uniform_BN"].bool()[None]
        return Masks(hidden_SBN=hidden_1BN, fallback_SB=hidden_1BN.new_zeros(hidden_1BN.shape[:2]))
