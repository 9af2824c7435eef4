"""A mixture of strategies: each sample is masked by one of them, drawn by weight. The strategies live in their modules.

All parts hide int(ratio * N) patches where hidden patches are skipped (on = "input"), so a batch stays rectangular.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from medim_ray.draws import Draws
from medim_ray.masking.anatomy import AnatomyMasking
from medim_ray.masking.base import MASKINGS, Masks, Samples
from medim_ray.masking.block import BlockMasking
from medim_ray.masking.report import ReportMasking
from medim_ray.masking.uniform import UniformMasking
from medim_ray.types import Grid

if TYPE_CHECKING:
    from torch import Tensor

CHOICE = "mask/mixture/choice_B"  # int8: index of the sample's part
PARTS = ("uniform", "block", "anatomy", "kdm", "sdm")


@MASKINGS.register("mixture")
class MixtureMasking:
    """One mask an image (S = 1) of the part that was drawn for it; a part of weight 0 is not planned."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        name: str = "mixture"
        uniform_weight: float = field(default=0.5, metadata={"help": "share of samples with random patches"})
        block_weight: float = field(default=0.0, metadata={"help": "share of samples with block masks"})
        anatomy_weight: float = field(default=0.5, metadata={"help": "share of samples masked by the anatomy prior"})
        kdm_weight: float = field(default=0.0, metadata={"help": "share of samples masked by KDM"})
        sdm_weight: float = field(default=0.0, metadata={"help": "share of samples masked by SDM"})
        ratio: float = field(default=0.5, metadata={"help": "share of the patches that is hidden, or counts as high"})
        diversity: float = field(
            default=0.9, metadata={"help": "of anatomy, KDM and SDM: share of the high patches that is hidden"}
        )
        on: Literal["input", "feature"] = field(
            default="input",
            metadata={"help": "input: hidden patches never reach the encoder; feature: its output is zeroed"},
        )
        negated_weight: float = field(default=1.0, metadata={"help": "of KDM, as in masking.name=kdm"})
        prior: Literal["none", "multiply", "cold_start"] = field(
            default="none", metadata={"help": "of KDM and SDM, as in masking.name=kdm"}
        )
        prior_steps: int = field(default=0, metadata={"help": "global steps of prior=cold_start"})

        def __post_init__(self) -> None:
            for part in PARTS:
                if self.weight(part) < 0:
                    raise ValueError(f"masking.{part}_weight={self.weight(part)}: must be 0 or more")
            if sum(map(self.weight, PARTS)) <= 0:
                raise ValueError("masking: the weights of the mixture are all 0; set at least one above 0")
            if not self.kdm_weight and not self.sdm_weight and (self.prior != "none" or self.negated_weight != 1.0):
                raise ValueError(
                    f"masking.prior={self.prior}, masking.negated_weight={self.negated_weight}: are of KDM and SDM, "
                    "which have no weight here; set masking.kdm_weight or masking.sdm_weight, or leave them out"
                )
            self.report("kdm")

        def report(self, part: Literal["kdm", "sdm"]) -> ReportMasking.Config:
            """KDM or SDM with these numbers; it checks them."""
            return ReportMasking.Config(
                name=part,
                ratio=self.ratio,
                diversity=self.diversity,
                on=self.on,
                negated_weight=self.negated_weight,
                prior=self.prior,
                prior_steps=self.prior_steps,
            )

        def weight(self, part: str) -> float:
            """The weight of one of PARTS."""
            return float(getattr(self, f"{part}_weight"))

    names = ("mixture",)

    def __init__(self, config: Config) -> None:
        self.config = config
        self.on = config.on
        self._parts = [part for part in PARTS if config.weight(part) > 0]
        self.needs_attention = "kdm" in self._parts or "sdm" in self._parts
        self.needs_text = self.needs_attention or "anatomy" in self._parts

    def plan(self, samples: Samples, grid: Grid, draws: Draws) -> dict[str, NDArray[Any]]:
        """The columns of every part, those of part p under "mask/mixture/p/", and CHOICE."""
        columns: dict[str, NDArray[Any]] = {}
        for part in self._parts:
            planned = self._masking(part, grid.num_patches).plan(samples, grid, draws)
            columns |= {f"mask/mixture/{part}/{name}": column for name, column in planned.items()}
        weights = np.array([self.config.weight(part) for part in self._parts])
        edges = np.cumsum(weights)[:-1] / weights.sum()
        columns[CHOICE] = np.searchsorted(edges, draws.uniform("mask/mixture", 1)[:, 0], side="right").astype(np.int8)
        return columns

    def resolve(self, columns: Mapping[str, Tensor], attention_BWN: Tensor | None) -> Masks:
        """Every part for all samples, then each sample's own; a part without a map has 0 there."""
        import torch

        parts = []
        for part in self._parts:
            prefix = f"mask/mixture/{part}/"
            own = {name.removeprefix(prefix): column for name, column in columns.items() if name.startswith(prefix)}
            parts.append(self._masking(part).resolve(dict(columns) | own, attention_BWN))
        choice_1B = columns[CHOICE].long()[None]
        hidden_PBN = torch.cat([masks.hidden_SBN for masks in parts])
        choice_1BN = choice_1B[:, :, None].expand(-1, -1, hidden_PBN.shape[2])
        maps_SBN = None
        if self.needs_text:
            none_1BN = torch.zeros(hidden_PBN[:1].shape, device=hidden_PBN.device)
            maps = [none_1BN if masks.maps_SBN is None else masks.maps_SBN.float() for masks in parts]
            maps_SBN = torch.cat(maps).gather(0, choice_1BN)
        return Masks(
            hidden_SBN=hidden_PBN.gather(0, choice_1BN),
            fallback_SB=torch.cat([masks.fallback_SB for masks in parts]).gather(0, choice_1B),
            maps_SBN=maps_SBN,
        )

    def _masking(self, part: str, num_patches: int | None = None) -> Any:
        """The strategy of a part; for a plan, uniform masking, which rounds, is made to hide int(ratio * N) too."""
        config = self.config
        ratio = config.ratio
        if part == "uniform":
            if num_patches is not None:
                ratio = max(int(num_patches * ratio) / num_patches, 1e-9)
            return UniformMasking(UniformMasking.Config(ratio=ratio, on=config.on))
        if part == "block":
            return BlockMasking(BlockMasking.Config(ratio=ratio, on=config.on))
        if part == "anatomy":
            return AnatomyMasking(AnatomyMasking.Config(ratio=ratio, diversity=config.diversity, on=config.on))
        return ReportMasking(config.report("kdm" if part == "kdm" else "sdm"))
