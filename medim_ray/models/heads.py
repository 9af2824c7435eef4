"""Projections of MedIM: features of an encoder -> embeddings of unit norm that images and reports share.

PAPERS.md, MedIM: 768 -> 2048 -> 128 with batch norm, ReLU, batch norm without affine parameters, then L2 norm. DINO's
heads are in heads_dino.py.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from medim_ray.models.norms import build_norm


class Projection(nn.Module):
    """[..., D] -> float32 [..., E] of unit norm. norm: 'batch' (the paper), 'sync_batch' or 'layer'.

    Batch statistics run over all leading axes, as the paper's code does for words and patches.
    """

    def __init__(self, in_width: int, hidden: int, out_width: int, norm: str) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(in_width, hidden),
            build_norm(norm, hidden),
            nn.ReLU(),
            nn.Linear(hidden, out_width),
            build_norm(norm, out_width, affine=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        embedding = self.layers(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        return F.normalize(embedding.float(), dim=-1)
