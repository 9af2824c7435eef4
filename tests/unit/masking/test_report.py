"""KDM and SDM: the paper's arithmetic, exact counts with input masking, defined fallbacks, one result a sample."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medim_ray.draws import Draws
from medim_ray.masking import MASKINGS
from medim_ray.masking.base import Masks, Samples
from medim_ray.masking.report import NOISE, SENTENCE, WORDS, ReportMasking
from medim_ray.masking.selection import high_patches, select_hidden
from medim_ray.types import ASSERTION, MESH_FLAG, SENTENCE_ID, WORD_IS_PAD, Grid

GRID = Grid(14, 14)


def report_samples(sentences: list[list[int]], flagged: list[list[int]], absent: list[list[int]]) -> Samples:
    """Samples of reports given as sentence lengths, flagged word places and those of them asserted absent."""
    num, num_words = len(sentences), 30
    text: dict[str, np.ndarray[Any, Any]] = {
        SENTENCE_ID: np.full((num, num_words), -1, np.int16),
        WORD_IS_PAD: np.ones((num, num_words), bool),
        MESH_FLAG: np.zeros((num, num_words), bool),
        ASSERTION: np.zeros((num, num_words), np.int8),
    }
    for row, lengths in enumerate(sentences):
        ids = np.repeat(np.arange(len(lengths)), lengths)
        text[SENTENCE_ID][row, : len(ids)] = ids
        text[WORD_IS_PAD][row, : len(ids)] = False
        text[MESH_FLAG][row, flagged[row]] = True
        text[ASSERTION][row, flagged[row]] = 1
        text[ASSERTION][row, absent[row]] = 2
    return Samples(
        image_ids=[f"i{row}" for row in range(num)],
        boxes_B4=np.tile(np.array([0, 0, 1, 1], np.float32), (num, 1)),
        text=text,
        mentions=[()] * num,
        steps_B=np.zeros(num, np.int64),
        positions_B=np.arange(num),
        global_batch=num,
        seed=0,
    )


SAMPLES = report_samples([[5, 3, 6], [2, 3], [4], [], [7, 9]], [[0, 9], [1], [], [], [2, 3]], [[], [1], [], [], [3]])


def attention(num: int = 5) -> torch.Tensor:
    return torch.rand(num, 30, 196, generator=torch.Generator().manual_seed(0)).softmax(-1)


def run(samples: Samples = SAMPLES, **options: Any) -> tuple[dict[str, torch.Tensor], Masks]:
    masking = ReportMasking(ReportMasking.Config(**options))
    draws = Draws.of(3, np.zeros(len(samples), np.int64), samples.image_ids)
    columns = {key: torch.from_numpy(value) for key, value in masking.plan(samples, GRID, draws).items()}
    return columns, masking.resolve(columns, attention(len(samples)))


def test_the_papers_counts() -> None:
    _, masks = run(fallback="paper")
    kdm, sdm = (masks.hidden_SBN.sum(-1)).tolist()
    assert kdm == [97, 97, 19, 19, 97]
    assert sdm == [97, 97, 97, 19, 97]
    assert masks.fallback_SB.tolist() == [[False, False, True, True, False], [False, False, False, True, False]]
    high_SBN = high_patches(masks.maps_SBN, 0.5) if masks.maps_SBN is not None else None
    assert high_SBN is not None
    assert (masks.hidden_SBN & high_SBN).sum(-1)[0].tolist() == [88, 88, 0, 0, 88]


@pytest.mark.parametrize(("fallback", "count"), [("uniform", 98), ("paper", 19), ("none", 0)])
def test_fallbacks(fallback: str, count: int) -> None:
    _, masks = run(fallback=fallback)
    assert masks.hidden_SBN[0].sum(-1).tolist() == [97, 97, count, count, 97]


def test_maps_are_sums_of_the_rows_of_the_words_in_question() -> None:
    columns, masks = run()
    assert masks.maps_SBN is not None
    torch.testing.assert_close(masks.maps_SBN[0, 0], attention()[0, 0] + attention()[0, 9])
    chosen = int(columns[SENTENCE][4])
    words = slice(0, 7) if chosen == 0 else slice(7, 16)
    torch.testing.assert_close(masks.maps_SBN[1, 4], attention()[4, words].sum(0))


def test_negated_mentions_are_weighted() -> None:
    columns, masks = run(negated_weight=0.25)
    assert columns[WORDS][4, 0, 2:4].tolist() == [1.0, 0.25]
    _, without = run(negated_weight=0.0)
    assert without.fallback_SB[0].tolist() == [False, True, True, True, False], "row 1 has only a negated mention"
    assert not masks.fallback_SB[0, 1]


def test_the_sentence_has_more_than_three_words_where_one_has() -> None:
    samples = report_samples([[5, 3, 6]] * 400 + [[2, 3]] * 400, [[]] * 800, [[]] * 800)
    chosen = run(samples, name="sdm")[0][SENTENCE].numpy()
    shares = np.bincount(chosen[:400], minlength=3) / 400
    assert shares[1] == 0 and abs(shares[0] - 0.5) < 0.125
    assert abs(chosen[400:].mean() - 0.5) < 0.125
    assert run()[0][SENTENCE][3] == -1


def test_one_strategy_alone_is_the_same_strategy_in_both() -> None:
    _, both = run(name="kdm+sdm")
    for place, name in enumerate(("kdm", "sdm")):
        _, alone = run(name=name)
        assert torch.equal(alone.hidden_SBN[0], both.hidden_SBN[place])


def test_a_mask_does_not_depend_on_its_neighbours() -> None:
    _, masks = run()
    one = Samples(
        image_ids=["i4"],
        boxes_B4=SAMPLES.boxes_B4[:1],
        text={key: value[4:] for key, value in SAMPLES.text.items()},
        mentions=[()],
        steps_B=np.zeros(1, np.int64),
        positions_B=np.zeros(1, np.int64),
        global_batch=1,
        seed=0,
    )
    masking = ReportMasking(ReportMasking.Config())
    columns = masking.plan(one, GRID, Draws.of(3, np.zeros(1, np.int64), ["i4"]))
    alone = masking.resolve({key: torch.from_numpy(value) for key, value in columns.items()}, attention()[4:])
    assert torch.equal(alone.hidden_SBN[:, 0], masks.hidden_SBN[:, 4])


@settings(max_examples=60, deadline=None)
@given(st.floats(0.05, 0.95), st.floats(0.0, 1.0), st.integers(0, 10_000))
def test_input_masks_hide_one_number_and_prefer_high(ratio: float, diversity: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    maps_BN = torch.from_numpy(rng.integers(0, rng.integers(2, 200), (6, 49)).astype(np.float32))  # with ties
    maps_BN[0] = 0.0
    noise_BN = torch.from_numpy(rng.random((6, 49), dtype=np.float32))
    has_word_B = torch.tensor([True, True, True, True, True, False])
    config = ReportMasking.Config(ratio=ratio, diversity=diversity, on="input")
    hidden_BN, fallback_B = select_hidden(maps_BN, noise_BN, has_word_B, config)
    count = int(49 * ratio)
    assert (hidden_BN.sum(-1) == count).all()
    assert fallback_B[0] and fallback_B[5]
    high_BN = high_patches(maps_BN, ratio)
    for row in range(1, 5):
        num_high = int(high_BN[row].sum())
        wanted = int(diversity * num_high)
        got = int((hidden_BN[row] & high_BN[row]).sum())
        assert got == wanted or got == count - (49 - num_high) > wanted or fallback_B[row]


@settings(max_examples=60, deadline=None)
@given(st.floats(0.05, 0.95), st.floats(0.0, 1.0), st.integers(0, 10_000))
def test_feature_masks_follow_the_law_of_a_plain_loop(ratio: float, diversity: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    maps_BN = rng.integers(0, rng.integers(2, 200), (6, 49)).astype(np.float32)
    noise_BN = rng.random((6, 49), dtype=np.float32)
    config = ReportMasking.Config(ratio=ratio, diversity=diversity, fallback="paper")
    ours_BN, _ = select_hidden(torch.from_numpy(maps_BN), torch.from_numpy(noise_BN), torch.ones(6).bool(), config)
    for row in range(6):
        threshold = np.sort(maps_BN[row])[::-1][int(49 * ratio)]
        high, low = np.flatnonzero(maps_BN[row] > threshold), np.flatnonzero(maps_BN[row] <= threshold)
        high, low = (group[np.argsort(noise_BN[row, group], kind="stable")] for group in (high, low))
        hidden = np.concatenate([high[: int(diversity * len(high))], low[: int((1 - diversity) * len(low))]])
        assert sorted(hidden) == np.flatnonzero(ours_BN[row].numpy()).tolist()


def test_input_masks_of_whole_reports() -> None:
    _, masks = run(on="input", ratio=0.25)
    assert (masks.hidden_SBN.sum(-1) == 49).all()


def test_noise_is_planned_not_drawn() -> None:
    columns, first = run()
    torch.manual_seed(123)
    second = ReportMasking(ReportMasking.Config()).resolve(columns, attention())
    assert torch.equal(first.hidden_SBN, second.hidden_SBN)
    assert columns[NOISE].dtype == torch.float32 and columns[NOISE].min() >= 0 and columns[NOISE].max() < 1


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": 1.0},
        {"diversity": 1.1},
        {"on": "input", "fallback": "paper"},
        {"fallback": "zero"},
        {"negated_weight": -1.0},
        {"on": "pixels"},
    ],
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"masking.{list(options)[-1]}"):
        MASKINGS["kdm"].Config(**options)
