"""Losses against plain per-sample formulas, and the cases that the paper's code breaks on (empty report, batch 1)."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from medim_ray.objectives import losses


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def local(words: Tensor, patches: Tensor, is_pad: Tensor, **options: bool) -> tuple[Tensor, Tensor]:
    word_attention = torch.rand(is_pad.shape, generator=torch.Generator().manual_seed(5)).masked_fill(is_pad, 0.0)
    patch_attention = torch.rand(patches.shape[:2], generator=torch.Generator().manual_seed(6))
    return losses.local_alignment(
        words,
        patches,
        is_pad,
        losses.clipped_weights(word_attention, of_nonzero=True),
        losses.clipped_weights(patch_attention, of_nonzero=False),
        temperature=0.1,
        normalise_patch_context=options.get("normalise_patch_context", False),
    )


def test_contrast_is_two_cross_entropies_and_gathering_adds_negatives() -> None:
    a, b = unit(6, 8), unit(6, 8, seed=1)
    target = torch.arange(6)
    expected = F.cross_entropy(a @ b.T / 0.07, target) + F.cross_entropy(b @ a.T / 0.07, target)
    torch.testing.assert_close(losses.image_text_contrast(a, b, 0.07, a, b, 0), expected)
    halves = [losses.image_text_contrast(a[i : i + 3], b[i : i + 3], 0.07, a, b, i) for i in (0, 3)]
    torch.testing.assert_close(sum(halves) / 2, expected)


def test_accuracy_of_shuffled_pairs() -> None:
    a = torch.eye(10)
    assert losses.retrieval_accuracy(a, a, 1) == 1.0
    assert losses.retrieval_accuracy(a, a.roll(1, 0) * 2 + 0.1 * a, 1) == 0.0
    assert losses.retrieval_accuracy(a, a.roll(1, 0) * 2 + 0.1 * a, 2) == 1.0


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99), st.booleans())
def test_matched_cross_entropy_equals_a_loop(num: int, batch: int, seed: int, is_sharp: bool) -> None:
    temperature = 0.025 if is_sharp else 0.1
    q, k = unit(batch, num, 4, seed=seed), unit(batch, num, 4, seed=seed + 1)
    weights = torch.rand(batch, num, generator=torch.Generator().manual_seed(seed))
    expected = torch.zeros(())
    for b in range(batch):
        scores, target = q[b] @ k[b].T / temperature, torch.arange(num)
        terms = F.cross_entropy(scores, target, reduction="none") + F.cross_entropy(scores.T, target, reduction="none")
        expected = expected + (0.5 * terms * weights[b]).sum() / batch
    ours = losses.matched_cross_entropy(q, k, weights, temperature)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_attention_is_the_softmax_over_patches() -> None:
    words, patches = unit(2, 5, 8), unit(2, 9, 8, seed=1)
    is_pad = torch.zeros(2, 5, dtype=torch.bool)
    expected = (words @ patches.transpose(1, 2) / 0.1).softmax(-1)
    torch.testing.assert_close(local(words, patches, is_pad)[1], expected)
    torch.testing.assert_close(losses.word_patch_attention(words, patches, 0.1), expected)


def test_attention_entropy() -> None:
    is_pad = torch.tensor([[False, False, True]])
    attention = torch.zeros(1, 3, 8)
    attention[0, 0, 3] = 1.0  # a single patch
    attention[0, 1:] = 1 / 8  # uniform; the last is padding
    torch.testing.assert_close(losses.attention_entropy_ratio(attention, is_pad), torch.tensor(0.5))
    assert losses.attention_entropy_ratio(attention, torch.ones(1, 3, dtype=torch.bool)) == 0


def test_an_empty_report_adds_nothing_and_gives_no_nan() -> None:
    words, patches = unit(3, 5, 8).requires_grad_(), unit(3, 9, 8, seed=1).requires_grad_()
    is_pad = torch.zeros(3, 5, dtype=torch.bool)
    is_pad[1] = True
    is_pad[2, 3:] = True
    loss, attention = local(words, patches, is_pad)
    loss.backward()
    assert words.grad is not None and patches.grad is not None
    assert torch.isfinite(loss) and torch.isfinite(attention).all()
    assert torch.isfinite(words.grad).all() and torch.isfinite(patches.grad).all()
    assert (words.grad[1] == 0).all() and (patches.grad[1] == 0).all()
    assert (patches.grad[0] != 0).any() and (words.grad[2] != 0).any()


def test_padding_words_are_not_attended_to() -> None:
    words, patches = unit(1, 5, 8), unit(1, 9, 8, seed=1)
    is_pad = torch.tensor([[False, False, False, True, True]])
    weights = torch.full((1, 9), 1 / 9)
    no_words = torch.zeros(1, 5)
    other = words.clone()
    other[:, 3:] = unit(1, 2, 8, seed=9)
    a, b = (losses.local_alignment(w, patches, is_pad, no_words, weights, 0.1, False)[0] for w in (words, other))
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_clipped_weights() -> None:
    weights = losses.clipped_weights(torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0, 100.0], [0.0] * 6]), of_nonzero=True)
    low, high = 1.4, 4 + 0.6 * 96  # percentiles of the five non-zero entries
    expected = torch.tensor([0.0, low, 2.0, 3.0, 4.0, high])
    torch.testing.assert_close(weights[0], expected / expected.sum())
    assert (weights[1] == 0).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.integers(2, 20), st.integers(0, 99))
def test_sinkhorn_rows_sum_to_one(batch: int, num: int, seed: int) -> None:
    scores = unit(batch, 8, seed=seed) @ unit(num, 8, seed=seed + 1).T
    q = losses.sinkhorn(scores, 0.05, 3)
    torch.testing.assert_close(q.sum(1), torch.ones(batch))
    # A shift that would overflow exp changes nothing.
    torch.testing.assert_close(losses.sinkhorn(scores + 50, 0.05, 3), q, rtol=1e-2, atol=1e-4)


def test_sinkhorn_spreads_samples_over_prototypes() -> None:
    scores = torch.rand(64, 8, generator=torch.Generator().manual_seed(0)) + torch.linspace(0, 1, 8)
    assert losses.sinkhorn(scores, 0.05, 50).sum(0).sub(8.0).abs().max() < 0.1
    assert losses.sinkhorn(scores, 0.05, 0).sum(0).max() > 30


def test_prototypes_of_any_length_and_gradient() -> None:
    a, b = unit(6, 8).requires_grad_(), unit(6, 8, seed=1)
    prototypes = unit(10, 8, seed=2)
    loss = losses.prototype_prediction(a, b, prototypes, 0.2, 0.05)
    torch.testing.assert_close(losses.prototype_prediction(a, b, 7 * prototypes, 0.2, 0.05), loss)
    assert loss < 2 * math.log(10)
    loss.backward()
    assert a.grad is not None and a.grad.abs().sum() > 0


def test_reconstruction_is_a_mean_over_all_pixels() -> None:
    decoded, images = torch.zeros(2, 3, 1, 4, 4), torch.full((3, 1, 4, 4), 0.5)
    decoded[1] = math.atanh(0.5)
    torch.testing.assert_close(losses.reconstruction(decoded, images), torch.tensor([0.25, 0.0]))
