"""Question: what does vectorising MedIM's losses and masks give over a direct implementation, sample by sample?

Loss and masks without encoders, forward and backward, one thread; paired runs in one process. Both sides get the same
embeddings, must agree on the loss, and hide the same numbers of patches.

    python benchmarks/medim_objective.py [--batch 64] [--patches 196] [--tokens 112] [--width 128] [--pairs 5]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from medim_ray.masking.report import ReportMasking
from medim_ray.masking.selection import select_hidden
from medim_ray.objectives import losses


@dataclass
class Inputs:
    images_BD: Tensor
    reports_BD: Tensor
    patches_BND: Tensor
    words_BWD: Tensor
    prototypes_KD: Tensor
    cls_to_word_BW: Tensor
    cls_to_patch_BN: Tensor
    word_is_pad_BW: Tensor
    flags_SBW: Tensor
    noise_SBN: Tensor

    def leaves(self) -> list[Tensor]:
        return [self.images_BD, self.reports_BD, self.patches_BND, self.words_BWD, self.prototypes_KD]


def make_inputs(batch: int, patches: int, tokens: int, width: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def unit(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, generator=generator), dim=-1).requires_grad_()

    words = tokens - 1
    lengths_B = torch.randint(20, words, (batch,), generator=generator)
    is_pad_BW = torch.arange(words) >= lengths_B[:, None]
    attention_BW = torch.rand(batch, words, generator=generator).masked_fill(is_pad_BW, 0.0)
    flags_SBW = (torch.rand(2, batch, words, generator=generator) < 0.2).float().masked_fill(is_pad_BW, 0.0)
    flags_SBW[:, :, 0] = 1.0
    return Inputs(
        unit(batch, width),
        unit(batch, width),
        unit(batch, patches, width),
        unit(batch, words, width),
        unit(500, width),
        attention_BW,
        torch.rand(batch, patches, generator=generator),
        is_pad_BW,
        flags_SBW,
        torch.rand(2, batch, patches, generator=generator),
    )


def ours(x: Inputs) -> tuple[Tensor, Tensor]:
    local, attention_BWN = losses.local_alignment(
        x.words_BWD,
        x.patches_BND,
        x.word_is_pad_BW,
        losses.clipped_weights(x.cls_to_word_BW, of_nonzero=True),
        losses.clipped_weights(x.cls_to_patch_BN, of_nonzero=False),
        temperature=0.1,
        normalise_patch_context=False,
    )
    ita = losses.image_text_contrast(x.images_BD, x.reports_BD, 0.07, x.images_BD, x.reports_BD, first=0)
    proto = losses.prototype_prediction(x.images_BD, x.reports_BD, x.prototypes_KD, 0.2, 0.05)
    maps_SBN = torch.einsum("sbw,bwn->sbn", x.flags_SBW, attention_BWN)
    has_word_SB = torch.ones(maps_SBN.shape[:2], dtype=torch.bool)
    hidden_SBN, _ = select_hidden(maps_SBN, x.noise_SBN, has_word_SB, ReportMasking.Config())
    return ita + local + proto, hidden_SBN


def direct(x: Inputs) -> tuple[Tensor, Tensor]:
    """The same, written sample by sample."""
    batch = len(x.images_BD)
    labels_B = torch.arange(batch)
    scores_BB = x.images_BD @ x.reports_BD.T / 0.07
    loss = F.cross_entropy(scores_BB, labels_B) + F.cross_entropy(scores_BB.T, labels_B)
    prototypes_KD = F.normalize(x.prototypes_KD, dim=1)
    scores = [embedding_BD @ prototypes_KD.T for embedding_BD in (x.images_BD, x.reports_BD)]
    codes = [direct_sinkhorn(score_BK.detach()) for score_BK in scores]
    for score_BK, code_BK in zip(scores, reversed(codes), strict=True):
        loss = loss - 0.5 * (code_BK * F.log_softmax(score_BK / 0.2, dim=1)).sum(dim=1).mean()
    hidden_SBN = torch.zeros(2, batch, x.patches_BND.shape[1], dtype=torch.bool)
    for b in range(batch):
        words_WD, patches_ND, is_pad_W = x.words_BWD[b], x.patches_BND[b], x.word_is_pad_BW[b]
        attention_WN = (words_WD @ patches_ND.T / 0.1).softmax(dim=-1)
        context_WD = F.normalize(attention_WN @ patches_ND, dim=-1)
        back_NW = (patches_ND @ words_WD.T / 0.1).masked_fill(is_pad_W, -torch.inf).softmax(dim=-1)
        present_W = x.cls_to_word_BW[b] > 0
        weights_W = torch.zeros_like(x.cls_to_word_BW[b])
        weights_W[present_W] = direct_clip(x.cls_to_word_BW[b][present_W])
        halves = (
            (words_WD, context_WD, weights_W / weights_W.sum()),
            (patches_ND, back_NW @ words_WD, direct_clip(x.cls_to_patch_BN[b])),
        )
        for queries_KD, keys_KD, weights_K in halves:
            similarity_KK = queries_KD @ keys_KD.T / 0.1
            labels_K = torch.arange(len(similarity_KK))
            for logits_KK in (similarity_KK, similarity_KK.T):
                terms_K = F.cross_entropy(logits_KK, labels_K, reduction="none")
                loss = loss + 0.5 * (terms_K * weights_K / weights_K.sum()).sum() / batch
        for strategy in range(2):
            hidden_SBN[strategy, b] = direct_mask(x.flags_SBW[strategy, b], attention_WN.detach())
    return loss, hidden_SBN


def direct_clip(attention_K: Tensor) -> Tensor:
    return attention_K.clip(torch.quantile(attention_K, 0.1), torch.quantile(attention_K, 0.9))


def direct_sinkhorn(scores_BK: Tensor) -> Tensor:
    q_KB = (scores_BK / 0.05).exp().T
    q_KB = q_KB / q_KB.sum()
    for _ in range(3):
        q_KB = q_KB / q_KB.sum(dim=1, keepdim=True) / q_KB.shape[0]
        q_KB = q_KB / q_KB.sum(dim=0, keepdim=True) / q_KB.shape[1]
    return (q_KB * q_KB.shape[1]).T


def direct_mask(flags_W: Tensor, attention_WN: Tensor) -> Tensor:
    map_N = attention_WN[flags_W > 0].sum(dim=0)
    threshold = map_N.sort(descending=True).values[len(map_N) // 2]
    high, low = (map_N > threshold).nonzero()[:, 0], (map_N <= threshold).nonzero()[:, 0]
    hidden_N = torch.zeros(len(map_N), dtype=torch.bool)
    hidden_N[high[torch.randperm(len(high))[: int(0.9 * len(high))]]] = True
    hidden_N[low[torch.randperm(len(low))[: int((1 - 0.9) * len(low))]]] = True
    return hidden_N


def timed(x: Inputs, run: Callable[[Inputs], tuple[Tensor, Tensor]]) -> tuple[float, float, Tensor]:
    for leaf in x.leaves():
        leaf.grad = None
    start_s = time.perf_counter()
    loss, hidden_SBN = run(x)
    loss.backward()
    return time.perf_counter() - start_s, loss.item(), hidden_SBN


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 64), ("patches", 196), ("tokens", 112), ("width", 128), ("pairs", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    x = make_inputs(options.batch, options.patches, options.tokens, options.width)
    _, direct_loss, direct_hidden = timed(x, direct)
    gradients = [leaf.grad.clone() for leaf in x.leaves() if leaf.grad is not None]
    _, our_loss, our_hidden = timed(x, ours)
    assert abs(our_loss - direct_loss) < 1e-5 * abs(direct_loss), (our_loss, direct_loss)
    assert torch.equal(direct_hidden.sum(-1), our_hidden.sum(-1)), "other numbers of hidden patches"
    for leaf, gradient in zip(x.leaves(), gradients, strict=True):
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-3, atol=1e-6)

    pairs = [(timed(x, direct)[0], timed(x, ours)[0]) for _ in range(options.pairs)]
    ratios = sorted(mine_s / direct_s for direct_s, mine_s in pairs)
    print(f"{vars(options)}, one thread, forward and backward, losses and gradients agree")
    direct_s, ours_s = (statistics.median(side) for side in zip(*pairs, strict=True))
    print(f"direct {direct_s:6.3f} s   ours {ours_s:6.3f} s")
    print(f"ours / direct: {statistics.median(ratios):.2f} median of pairs, {ratios[0]:.2f} to {ratios[-1]:.2f}")


if __name__ == "__main__":
    main()
