"""DINO, iBOT and KoLeo losses and the two ways to centre teacher scores, as pure functions of scores and features.

Formulas: DINOv2 (Oquab et al., 2023; PAPERS.md, "DINOv2" and the golden notes). What is summed over the batch is summed
over all ranks. No module, no state, no schedule lives here. Shapes: M rows, K prototypes, S or T crops, B images.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from medim_ray.models.collectives import all_gather_rows, all_reduce_sum, num_ranks
from medim_ray.objectives.precision import in_float32

SINKHORN_ITERATIONS = 3
_EPS = 1e-8
_TINY = 1e-30
_ROWS = 8  # of scores that are worked on together: with 65,536 prototypes 2 MB


@torch.no_grad()
def centred_softmax(scores_MK: Tensor, centre_K: Tensor, temperature: float) -> Tensor:
    """Teacher probabilities [M, K]: softmax of (scores - centre) / temperature, in float32.

    Float32 scores are overwritten: with many prototypes a fresh matrix costs more than the arithmetic.
    """
    out_MK = scores_MK.float()
    for part in out_MK.split(_ROWS):
        torch.sub(part, centre_K, out=part).mul_(1.0 / temperature)
        part.sub_(part.amax(dim=-1, keepdim=True)).exp_()
        part.div_(part.sum(dim=-1, keepdim=True))
    return out_MK


@torch.no_grad()
def sinkhorn(scores_MK: Tensor, temperature: float) -> Tensor:
    """Teacher probabilities [M, K], rows sum to 1 (to 0 where all weights of a row underflow): three Sinkhorn-Knopp
    iterations over the rows of all ranks.

    Prototypes get equal shares of the rows, rows equal weights. Ranks may hold different M, also 0. The largest score
    is subtracted first, which the normalisation cancels, so that small temperatures do not overflow.
    """
    scores_MK = scores_MK.float() / temperature
    weights_MK = (scores_MK - _largest(scores_MK)).exp()
    num_rows = all_reduce_sum(weights_MK.new_tensor(float(len(weights_MK)))).clamp(min=1.0)
    weights_MK /= all_reduce_sum(weights_MK.sum()).clamp(min=_TINY)
    for _ in range(SINKHORN_ITERATIONS):
        # A prototype that no row comes near may have a sum of exactly 0 in float32: it keeps its zeros.
        weights_MK /= (all_reduce_sum(weights_MK.sum(dim=0)) * weights_MK.shape[1]).clamp(min=_TINY)
        weights_MK /= (weights_MK.sum(dim=1, keepdim=True) * num_rows).clamp(min=_TINY)
    return weights_MK * num_rows


def _largest(x: Tensor) -> Tensor:
    """The largest element over all ranks; a rank may hold none."""
    largest = x.max() if x.numel() else x.new_tensor(-torch.inf)
    if num_ranks() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.clamp(min=-1e30)


class _SoftCrossEntropy(torch.autograd.Function):
    """Sum over rows of weight * cross-entropy of softmax(scores / temperature) against targets that sum to 1.

    A few rows at a time, which stay in the cache; the gradient is made in one matrix, not in five.
    """

    @staticmethod
    def forward(ctx: Any, scores_MK: Tensor, targets_MK: Tensor, weights_M: Tensor, temperature: float) -> Tensor:
        lse_M = torch.empty(len(scores_MK), dtype=torch.float32, device=scores_MK.device)
        agreement_M = torch.empty_like(lse_M)
        for i, (part, targets) in enumerate(zip(scores_MK.split(_ROWS), targets_MK.split(_ROWS), strict=True)):
            rows, logits = slice(i * _ROWS, (i + 1) * _ROWS), part.float() * (1.0 / temperature)
            lse_M[rows] = logits.logsumexp(dim=-1)
            agreement_M[rows] = torch.einsum("mk,mk->m", logits, targets)
        ctx.save_for_backward(scores_MK, targets_MK, weights_M, lse_M)
        ctx.temperature = temperature
        return ((lse_M - agreement_M) * weights_M).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        scores_MK, targets_MK, weights_M, lse_M = ctx.saved_tensors
        out_MK, scale_M1 = torch.empty_like(scores_MK), (weights_M * (grad / ctx.temperature))[:, None]
        for i, (part, targets) in enumerate(zip(scores_MK.split(_ROWS), targets_MK.split(_ROWS), strict=True)):
            rows = slice(i * _ROWS, (i + 1) * _ROWS)
            logits = part.float() * (1.0 / ctx.temperature)
            out_MK[rows] = logits.sub_(lse_M[rows, None]).exp_().sub_(targets).mul_(scale_M1[rows])
        return out_MK, None, None, None


def dino_loss(student_SBK: Tensor, teacher_TBK: Tensor, temperature: float) -> Tensor:
    """Sum over all pairs of a student crop and a teacher crop of the batch mean of their cross-entropy.

    The cross-entropy is linear in the targets and in the student's scores, so the S * T pairs cost one product.
    """
    student_SBK = student_SBK.float()
    normaliser = torch.logsumexp(student_SBK / temperature, dim=-1).sum()
    agreement = (student_SBK.sum(dim=0) * teacher_TBK.sum(dim=0)).sum() / temperature
    return (len(teacher_TBK) * normaliser - agreement) / student_SBK.shape[1]


@in_float32
def ibot_loss(scores_MK: Tensor, targets_MK: Tensor, weights_M: Tensor, num_crops: int, temperature: float) -> Tensor:
    """Cross-entropy of the masked patches: summed with `weights_M` (1 / masked patches of the own crop), divided by the
    number of ALL global crops, masked or not. 0 where nothing is masked."""
    total: Tensor = _SoftCrossEntropy.apply(scores_MK, targets_MK, weights_M, temperature)
    return total / num_crops


@in_float32
def koleo_loss(features_BD: Tensor, gather: bool) -> tuple[Tensor, Tensor]:
    """KoLeo: mean of -log(distance to the nearest neighbour of the batch) of L2-normalised features; also the mean
    distance (no gradient).

    gather: neighbours come from all ranks (equal B on each), not from the own rank only as in DINOv2. Needs two rows.
    """
    rows_BD = F.normalize(features_BD.float(), eps=_EPS, dim=-1)
    others_GD = all_gather_rows(rows_BD) if gather else rows_BD
    own = dist.get_rank() * len(rows_BD) if gather and num_ranks() > 1 else 0
    with torch.no_grad():
        similarity_BG = rows_BD @ others_GD.T
        index_B = torch.arange(len(rows_BD), device=rows_BD.device)
        similarity_BG[index_B, index_B + own] = -1.0
        nearest_B = similarity_BG.argmax(dim=1)
    distances_B = torch.linalg.vector_norm(rows_BD - others_GD[nearest_B] + _EPS, dim=-1)
    return -torch.log(distances_B + _EPS).mean(), distances_B.detach().mean()


@torch.no_grad()
def entropy(probabilities_MK: Tensor) -> Tensor:
    """Mean entropy in nats of rows that sum to 1; log K is a collapse to uniform, 0 a collapse to one prototype."""
    return torch.special.entr(probabilities_MK).sum(dim=-1).mean()


@torch.no_grad()
@in_float32
def effective_rank(features_BD: Tensor) -> Tensor:
    """Participation ratio of the covariance's eigenvalues, (sum)^2 / sum of squares: from 1 to min(B - 1, D)."""
    centred_BD = (features_BD - features_BD.mean(dim=0)).float()
    gram_BB = centred_BD @ centred_BD.T
    return gram_BB.trace().square() / gram_BB.square().sum().clamp(min=_TINY)
