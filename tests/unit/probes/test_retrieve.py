"""Ranks with ties and repeated reports, their chance, and a median under weights: against plain counting."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medim_ray.probes.retrieve import KS, Ranks, best_ranks, chance, said, weighted_median


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), num=st.integers(2, 40), num_texts=st.integers(1, 40))
def test_rank_is_that_of_the_best_report_of_the_same_words(seed: int, num: int, num_texts: int) -> None:
    rng = np.random.default_rng(seed)
    queries, targets = rng.normal(size=(2, num, 5))
    text = rng.integers(0, num_texts, num)
    scores = queries @ targets.T
    expected = []
    for i in range(num):
        best = max(scores[i, j] for j in range(num) if text[j] == text[i])
        expected.append(1 + sum(scores[i, j] > best for j in range(num) if text[j] != text[i]))
    np.testing.assert_allclose(best_ranks(queries, targets, text).expected, expected, atol=0.5)


def test_perfect_pairs_come_first_and_a_collapsed_model_is_at_chance() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(300, 64))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    text = np.arange(300)
    assert (best_ranks(vectors, vectors, text).expected == 1).all()
    constant = np.tile(vectors[:1], (300, 1))
    for texts in (text, text // 3, np.sort(rng.integers(0, 12, 300))):
        ranks, at_chance = best_ranks(constant, constant, texts), chance(np.bincount(texts)[texts], 300)
        assert np.median(ranks.expected) == at_chance["median_rank"]
        for k in KS:
            assert ranks.within(k).mean() == pytest.approx(at_chance[f"recall_at_{k}"]), "recall too, not 0"


def test_a_model_that_diverged_is_at_chance_and_one_broken_row_is_the_last() -> None:
    text = np.arange(50)
    ranks, at_chance = (
        best_ranks(np.full((50, 4), np.nan), np.ones((50, 4)), text),
        chance(np.ones(50, dtype=np.int64), 50),
    )
    assert ranks.within(10).mean() == pytest.approx(at_chance["recall_at_10"])
    vectors = np.eye(50)
    broken = vectors.copy()
    broken[7] = np.nan
    assert best_ranks(vectors, broken, text).expected[[6, 7]] == pytest.approx([1.0, 50.0])


def test_what_scores_alike_stands_in_random_order() -> None:
    """Against counting over all orders of the tied targets."""
    ranks = best_ranks(np.ones((6, 1)), np.array([[0.9, 0.5, 0.5, 0.5, 0.5, 0.1]]).T, np.array([1, 0, 0, 1, 1, 0]))
    ranks = Ranks(ranks.above_K[1:2], ranks.alike_K[1:2], ranks.right_K[1:2])  # a query with the text 0
    # 0 and 1 are right, 2 and 3 wrong, one wrong target stands above
    firsts = np.array([2 + min(order.index(0), order.index(1)) for order in itertools.permutations(range(4))])
    assert ranks.expected[0] == pytest.approx(firsts.mean())
    for k in range(1, 6):
        assert ranks.within(k)[0] == pytest.approx((firsts <= k).mean())


@pytest.mark.parametrize(("num", "num_texts"), [(50, 50), (60, 12), (8, 8)])
def test_chance_is_what_random_orders_give(num: int, num_texts: int) -> None:
    rng = np.random.default_rng(1)
    text = rng.integers(0, num_texts, num)
    pairs = rng.normal(size=(400, 2, num, 40))
    ranks = np.concatenate([best_ranks(queries, targets, text).expected for queries, targets in pairs])
    expected = chance(np.bincount(text)[text], num)
    for k in (1, 5, 10):
        assert (ranks <= k).mean() == pytest.approx(expected[f"recall_at_{k}"], abs=0.02)


def test_a_median_under_weights_is_that_of_repeated_values_and_no_image_is_undefined() -> None:
    rng = np.random.default_rng(2)
    values, weights = rng.integers(1, 30, 21).astype(float), rng.integers(0, 4, (20, 21)).astype(float)
    weights[:, 0] += weights.sum(axis=1) % 2 == 0  # an odd number: the median is one of the values
    expected = [np.median(np.repeat(values, row.astype(int))) for row in weights]
    np.testing.assert_array_equal(weighted_median(values, weights), expected)
    assert np.isnan(weighted_median(values, np.zeros((1, 21)))[0])


def test_labels_are_said_as_words() -> None:
    assert said("Pleural_Effusion") == "pleural effusion"
