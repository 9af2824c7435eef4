"""The projection head of DINO and iBOT: an MLP to a bottleneck, L2 norm, weight-normed prototypes (PAPERS.md, DINOv2).

Parameter names are those of the published head files, so that a head loads without renaming. No loss lives here.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PrototypeLayer(nn.Module):
    """Scores of L2-normalised rows against K prototypes: x . (g v / |v|), torch's fused weight norm.

    It owns both parameters and uses them in its own forward only, so ZeRO-3 gathers them there. The weights are
    normalised rather than the scores scaled: with masked patches there are more rows than a prototype is wide.
    """

    def __init__(self, width: int, num_prototypes: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(num_prototypes, 1))
        self.weight_v = nn.Parameter(torch.empty(num_prototypes, width))
        nn.init.trunc_normal_(self.weight_v, std=0.02)

    def forward(self, x_MD: Tensor) -> Tensor:
        return F.linear(x_MD, torch._weight_norm(self.weight_v, self.weight_g, 0))


class DinoHead(nn.Module):
    """[M, width] -> [M, num_prototypes] scores: an MLP with GELU, its output L2-normalised, then the prototypes."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        num_prototypes: int = field(default=65536, metadata={"help": "prototypes (DINOv2: 65,536; few images: 4,096)"})
        hidden: int = field(default=2048, metadata={"help": "width of the MLP's hidden layers"})
        bottleneck: int = field(default=256, metadata={"help": "width that is L2-normalised before the prototypes"})
        num_layers: int = field(default=3, metadata={"help": "linear layers of the MLP, 1 or more"})

        def __post_init__(self) -> None:
            for key in ("num_prototypes", "hidden", "bottleneck", "num_layers"):
                if getattr(self, key) < 1:
                    raise ValueError(f"head.{key}={getattr(self, key)}: must be at least 1")

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.config = config
        widths = [width, *[config.hidden] * (config.num_layers - 1), config.bottleneck]
        layers: list[nn.Module] = []
        for num_in, num_out in itertools.pairwise(widths):
            layers += [nn.Linear(num_in, num_out), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.last_layer = PrototypeLayer(config.bottleneck, config.num_prototypes)
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x_MD: Tensor) -> Tensor:
        x_MD = self.mlp(x_MD)
        eps = 1e-6 if x_MD.dtype == torch.float16 else 1e-12
        scores_MK: Tensor = self.last_layer(F.normalize(x_MD, dim=-1, eps=eps))
        return scores_MK
