"""MedIM's terms as pure functions of embeddings: vectorised, float32, no parameters, no random number.

Source: the code of MedIM (Xie et al. 2024) as told in PAPERS.md, "MedIM" and "golden"; check_golden.py compares.
Embeddings are L2-normalised by the caller.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from medim_ray.objectives.precision import in_float32

MIN_TEMPERATURE = 0.025  # of the local term: scores stay within +-40, and exp of them and their sums within float32


@in_float32
def image_text_contrast(
    images_BD: Tensor, reports_BD: Tensor, temperature: float, all_images_GD: Tensor, all_reports_GD: Tensor, first: int
) -> Tensor:
    """ITA: InfoNCE image -> report plus report -> image (the two directions summed).

    Row i of this rank is row `first` + i of `all_*_GD`, which hold the negatives: the rank's own embeddings (the
    paper) or those gathered over ranks.
    """
    target_B = torch.arange(first, first + len(images_BD), device=images_BD.device)
    to_reports = F.cross_entropy(images_BD @ all_reports_GD.T / temperature, target_B)
    to_images = F.cross_entropy(reports_BD @ all_images_GD.T / temperature, target_B)
    return to_reports + to_images


@in_float32
def retrieval_accuracy(images_BD: Tensor, reports_BD: Tensor, k: int) -> Tensor:
    """Share in [0, 1] of pairs whose partner is among the k most similar, mean of both ways."""
    scores_BB = images_BD @ reports_BD.T
    own_B = scores_BB.diagonal()
    ranks_2B = torch.stack([(scores_BB > own_B[:, None]).sum(dim=1), (scores_BB > own_B[None, :]).sum(dim=0)])
    return (ranks_2B < k).float().mean()


@in_float32
def word_patch_attention(words_BWD: Tensor, patches_BND: Tensor, temperature: float) -> Tensor:
    """[B, W, N], each word's attention over the patches; no gradient (masks are made of it)."""
    with torch.no_grad():
        return torch.bmm(words_BWD / temperature, patches_BND.transpose(1, 2)).softmax(dim=-1)


def attention_entropy_ratio(attention_BWN: Tensor, word_is_pad_BW: Tensor) -> Tensor:
    """Mean entropy of the words' attention over log(N): 1 is uniform, 0 a single patch; 0 where there is no word."""
    entropy_BW = torch.special.entr(attention_BWN).sum(dim=2) / math.log(attention_BWN.shape[2])
    is_word_BW = (~word_is_pad_BW).to(entropy_BW.dtype)
    return (entropy_BW * is_word_BW).sum() / is_word_BW.sum().clamp_min(1)


def clipped_weights(attention_BK: Tensor, of_nonzero: bool) -> Tensor:
    """Attention as weights that sum to 1: clipped to the 10th and 90th percentile of its row; no gradient.

    of_nonzero: zeros (padding words) stay zero and do not count for the percentiles. A row of zeros stays zero.
    """
    attention_BK = attention_BK.detach().float()
    if not of_nonzero:
        low_2B = torch.quantile(attention_BK, attention_BK.new_tensor([0.1, 0.9]), dim=1)
        clipped_BK = attention_BK.clamp(low_2B[0][:, None], low_2B[1][:, None])
    else:
        is_zero_BK = attention_BK == 0
        present_BK = attention_BK.masked_fill(is_zero_BK, torch.nan)
        low_2B = torch.nanquantile(present_BK, attention_BK.new_tensor([0.1, 0.9]), dim=1)
        clipped_BK = attention_BK.clamp(low_2B[0][:, None], low_2B[1][:, None]).masked_fill(is_zero_BK, 0.0)
    return clipped_BK / clipped_BK.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def matched_cross_entropy(queries_BKD: Tensor, keys_BKD: Tensor, weights_BK: Tensor, temperature: float) -> Tensor:
    """Contrast of K queries with K keys of the same sample, position i with position i; mean of the two directions.

    Summed over positions with `weights_BK`, divided by B. Vectors have norm 1 or less, so that with a temperature of
    MIN_TEMPERATURE or more exp needs no shift and serves both directions.
    """
    assert temperature >= MIN_TEMPERATURE, temperature
    queries_BKD = queries_BKD / temperature
    exp_BKK = torch.bmm(queries_BKD, keys_BKD.transpose(1, 2)).exp()
    both_BK = 0.5 * (exp_BKK.sum(dim=2).log() + exp_BKK.sum(dim=1).log())
    own_BK = (queries_BKD * keys_BKD).sum(dim=-1)
    return ((both_BK - own_BK) * weights_BK).sum() / len(weights_BK)


@in_float32
def local_alignment(
    words_BWD: Tensor,
    patches_BND: Tensor,
    word_is_pad_BW: Tensor,
    word_weights_BW: Tensor,
    patch_weights_BN: Tensor,
    temperature: float,
    normalise_patch_context: bool,
) -> tuple[Tensor, Tensor]:
    """The local term, and the word -> patch attention [B, W, N] it uses (detached).

    Words are matched with what they attend to in the image, and patches with what they attend to in the report.
    Padding words are classes of the word half (their weight is 0) and masked in the patch half.
    normalise_patch_context: the paper's code does it for ResNets and not for ViTs. A report without a word adds 0.
    """
    assert temperature >= MIN_TEMPERATURE, temperature
    exp_BWN = torch.bmm(words_BWD / temperature, patches_BND.transpose(1, 2)).exp()
    # A softmax is exp over its sum. The sum cancels in a context that is normalised; the other one is a column more.
    word_context_BWD = F.normalize(torch.bmm(exp_BWN, patches_BND), dim=-1)
    word_half = matched_cross_entropy(words_BWD, word_context_BWD, word_weights_BW, temperature)
    is_word_BW1 = (~word_is_pad_BW)[:, :, None].to(words_BWD.dtype)
    values_BWE = torch.cat([words_BWD * is_word_BW1, is_word_BW1], dim=2)
    context_BNE = torch.bmm(exp_BWN.transpose(1, 2), values_BWE)
    has_word_B1 = is_word_BW1.amax(dim=1)
    patch_context_BND = context_BNE[:, :, :-1] / (context_BNE[:, :, -1:] + (1 - has_word_B1)[:, :, None])
    if normalise_patch_context:
        patch_context_BND = F.normalize(patch_context_BND, dim=-1)
    patch_half = matched_cross_entropy(patches_BND, patch_context_BND, patch_weights_BN * has_word_B1, temperature)
    with torch.no_grad():
        attention_BWN = exp_BWN / exp_BWN.sum(dim=2, keepdim=True)
    return word_half + patch_half, attention_BWN


def word_keys(token_ids_BT: Tensor, word_of_token_BT: Tensor, num_words: int) -> Tensor:
    """int64 [B, W]: equal for words of the same pieces; 0 where there is no word."""
    is_piece_BT = word_of_token_BT >= 0
    hashed_BT = (token_ids_BT.long() + 1) * 6364136223846793005 * is_piece_BT  # of Knuth's MMIX; wraps around
    keys_BW = hashed_BT.new_zeros(len(hashed_BT), num_words)
    return keys_BW.scatter_add_(1, word_of_token_BT.long().clamp_min(0), hashed_BT)


@in_float32
def word_contrast(
    words_BWD: Tensor, patches_BND: Tensor, keys_BW: Tensor, is_told_BW: Tensor, temperature: float, most: int = 8
) -> Tensor:
    """Cross-report contrast, beyond the paper: of all patches of the batch, a word attends to those of its own image.

    -log of the share that a softmax over the patches of all images gives to the own one, mean over the words told (the
    first `most` of a report). Images whose report tells the same word (by `keys_BW`) are left out. 0 without a word.
    """
    row_R, word_R = (is_told_BW & (is_told_BW.cumsum(dim=1) <= most)).nonzero(as_tuple=True)
    if not len(row_R):
        return 0.0 * patches_BND.sum()
    told_RD = words_BWD[row_R, word_R] / temperature
    scores_RB = (told_RD @ patches_BND.flatten(0, 1).T).unflatten(1, patches_BND.shape[:2]).logsumexp(dim=2)
    key_R11 = keys_BW[row_R, word_R][:, None, None]
    is_told_RB = ((keys_BW[None] == key_R11) & is_told_BW[None]).any(dim=2)
    own_RB = torch.arange(len(words_BWD), device=row_R.device)[None] == row_R[:, None]
    return F.cross_entropy(scores_RB.masked_fill(is_told_RB & ~own_RB, -torch.inf), row_R)


@torch.no_grad()
def sinkhorn(scores_BK: Tensor, epsilon: float, num_iterations: int) -> Tensor:
    """Assignment of B samples to K prototypes, each sample's row summing to 1 (Caron et al. 2020)."""
    # Dividing by the total makes any common shift drop out; the largest score keeps exp finite.
    q_BK = ((scores_BK.float() - scores_BK.max()) / epsilon).exp()
    q_BK = q_BK / q_BK.sum()
    num_samples, num_prototypes = q_BK.shape
    for _ in range(num_iterations):
        q_BK = q_BK / (q_BK.sum(dim=0, keepdim=True) * num_prototypes)
        q_BK = q_BK / (q_BK.sum(dim=1, keepdim=True) * num_samples)
    return q_BK * num_samples


@in_float32
def prototype_prediction(
    images_BD: Tensor,
    reports_BD: Tensor,
    prototypes_KD: Tensor,
    temperature: float,
    epsilon: float,
    num_iterations: int = 3,
) -> Tensor:
    """Swapped prediction: each modality predicts the other's assignment to the L2-normalised prototypes."""
    prototypes_KD = F.normalize(prototypes_KD, dim=1)
    image_scores_BK, report_scores_BK = images_BD @ prototypes_KD.T, reports_BD @ prototypes_KD.T
    image_q_BK = sinkhorn(image_scores_BK, epsilon, num_iterations)
    report_q_BK = sinkhorn(report_scores_BK, epsilon, num_iterations)
    from_image = F.cross_entropy(image_scores_BK / temperature, report_q_BK)
    from_report = F.cross_entropy(report_scores_BK / temperature, image_q_BK)
    return 0.5 * (from_image + from_report)


def reconstruction(decoded_SBCHW: Tensor, images_BCHW: Tensor) -> Tensor:
    """[S] mean squared error of tanh(decoder output) against the whole normalised image, one a strategy."""
    return (decoded_SBCHW.float().tanh() - images_BCHW.float()).square().mean(dim=(1, 2, 3, 4))
