"""What every registered masking keeps: masks are a function of the sample alone, and counts follow the strategy's law.

A new strategy appears here by itself; it must state its counts in `allowed_counts` and be free of its neighbours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medim_ray.draws import Draws
from medim_ray.masking import MASKINGS
from medim_ray.masking.base import Masking, Masks, Samples
from medim_ray.reports.sections import split_sentences
from medim_ray.reports.tagger import Tagger
from medim_ray.reports.tokens import ASSERTION_CODES
from medim_ray.types import ASSERTION, MESH_FLAG, SENTENCE_ID, WORD_IS_PAD, Grid

TAGGER = Tagger()
NUM_WORDS = 24
REPORTS = (
    "",
    "XXXX.",
    "No pleural effusion or pneumothorax. Heart size is normal.",
    "Large left pleural effusion. There is a small right apical pneumothorax.",
    "Right upper lobe consolidation, likely pneumonia. The heart is mildly enlarged. Endotracheal tube in place.",
    "Pulmonary edema. " * 12,
    "Ok. Fine. No change.",
)
BOXES = ((0.0, 0.0, 1.0, 1.0), (0.1, 0.2, 0.8, 0.9), (-0.2, 0.0, 1.2, 1.0))


def options() -> list[tuple[str, dict[str, Any]]]:
    """Every registered name with input and feature masking, where it has the choice, and its other variants."""
    variants = []
    for name in MASKINGS:
        fields = {field.name for field in dataclasses.fields(MASKINGS[name].Config)}
        places: list[dict[str, Any]] = [{"on": "input"}, {"on": "feature"}] if "on" in fields else [{}]
        for place in places:
            variants.append((name, place))
            if "of" in fields:
                variants.append((name, {**place, "of": "both"}))
            if "kdm_weight" in fields:
                variants.append((name, {**place, "kdm_weight": 1.0, "sdm_weight": 1.0, "block_weight": 0.5}))
            if "prior" in fields:
                guided = {**place, "kdm_weight": 1.0} if "kdm_weight" in fields else place
                variants += [(name, {**guided, "prior": "multiply"})]
                variants += [(name, {**guided, "prior": "cold_start", "prior_steps": 3})]
    return variants


VARIANTS = options()
IDS = ["-".join([name, *map(str, chosen.values())]) for name, chosen in VARIANTS]


def samples_of(reports: Sequence[int], boxes: Sequence[int], steps: Sequence[int], seed: int) -> Samples:
    num = len(reports)
    text: dict[str, Any] = {
        SENTENCE_ID: np.full((num, NUM_WORDS), -1, np.int16),
        WORD_IS_PAD: np.ones((num, NUM_WORDS), bool),
        MESH_FLAG: np.zeros((num, NUM_WORDS), bool),
        ASSERTION: np.zeros((num, NUM_WORDS), np.int8),
    }
    mentions = [TAGGER.tag(REPORTS[k]) for k in reports]
    for row, k in enumerate(reports):
        words = [(s, place) for s, sentence in enumerate(split_sentences(REPORTS[k])) for place in places_of(sentence)]
        for w, (sentence, (start, end)) in enumerate(words[:NUM_WORDS]):
            text[SENTENCE_ID][row, w], text[WORD_IS_PAD][row, w] = sentence, False
            for mention in mentions[row]:
                if mention.start < end and start < mention.end:
                    text[MESH_FLAG][row, w] = True
                    text[ASSERTION][row, w] = ASSERTION_CODES[mention.assertion]
    return Samples(
        image_ids=[f"i{row}-{k}" for row, k in enumerate(reports)],
        boxes_B4=np.array([BOXES[k] for k in boxes], np.float32),
        more_boxes_BK4=np.array([[BOXES[k - 1]] for k in boxes], np.float32),
        text=text,
        mentions=mentions,
        steps_B=np.array(steps, np.int64),
        positions_B=np.arange(num),
        global_batch=num,
        seed=seed,
    )


def places_of(sentence: Any) -> list[tuple[int, int]]:
    """Offsets of the sentence's words in the report."""
    spans, at = [], 0
    for word in sentence.text.split():
        at = sentence.text.index(word, at)
        spans.append((sentence.start + at, sentence.start + at + len(word)))
        at += len(word)
    return spans


def take(samples: Samples, rows: Sequence[int]) -> Samples:
    """Some of the samples, at their places in the same global batch."""
    index = np.array(rows)
    return dataclasses.replace(
        samples,
        image_ids=[samples.image_ids[i] for i in rows],
        boxes_B4=samples.boxes_B4[index],
        more_boxes_BK4=None if samples.more_boxes_BK4 is None else samples.more_boxes_BK4[index],
        text={name: column[index] for name, column in samples.text.items()},
        mentions=[samples.mentions[i] for i in rows],
        steps_B=samples.steps_B[index],
        positions_B=samples.positions_B[index],
    )


def attention_of(samples: Samples, grid: Grid) -> torch.Tensor:
    """[B, W, N] a softmax over patches, a function of each image id."""
    draws = Draws.of(9, np.zeros(len(samples), np.int64), samples.image_ids)
    scores = draws.uniform("attention", NUM_WORDS * grid.num_patches).reshape(len(samples), NUM_WORDS, -1)
    return torch.from_numpy(4 * scores).float().softmax(dim=-1)


def run(masking: Masking, samples: Samples, grid: Grid) -> tuple[dict[str, Any], Masks]:
    draws = Draws.of(samples.seed, samples.steps_B // 4, samples.image_ids)
    columns = masking.plan(samples, grid, draws)
    tensors = {name: torch.from_numpy(column) for name, column in columns.items()}
    return columns, masking.resolve(tensors, attention_of(samples, grid) if masking.needs_attention else None)


def allowed_counts(name: str, masking: Any, num_patches: int, is_fallback: bool) -> tuple[int, int]:
    """The law of each strategy: fewest and most hidden patches of a row."""
    config = masking.config
    if name == "uniform":
        return round(num_patches * config.ratio), round(num_patches * config.ratio)
    if name in ("dinov2_block", "dinov2_report"):
        return 0, int(num_patches * config.max_ratio)
    count = int(num_patches * config.ratio)
    if masking.on == "input" or is_fallback or name == "block":
        return count, count
    # Of n <= count high patches int(d * n), of the others int((1 - d) * (N - n)); ties make n smaller.
    shares = [int(config.diversity * n) + int((1 - config.diversity) * (num_patches - n)) for n in range(1, count + 1)]
    if name == "mixture":
        shares.append(count)  # random rows
    return min(shares), max(shares)


batches = st.lists(st.tuples(st.integers(0, len(REPORTS) - 1), st.integers(0, 2), st.integers(0, 7)), min_size=2)
grids = st.builds(Grid, st.integers(3, 16), st.integers(3, 16))


@pytest.mark.parametrize(("name", "chosen"), VARIANTS, ids=IDS)
@settings(max_examples=15, deadline=None)
@given(batch=batches.map(lambda rows: rows[:12]), grid=grids, seed=st.integers(-(2**31), 2**31), data=st.data())
def test_masks_are_a_function_of_the_sample(
    name: str, chosen: dict[str, Any], batch: list[tuple[int, int, int]], grid: Grid, seed: int, data: st.DataObject
) -> None:
    masking: Masking = MASKINGS[name](MASKINGS[name].Config(name=name, **chosen))
    reports, boxes, steps = zip(*batch, strict=True)
    samples = samples_of(reports, boxes, steps, seed)
    state = torch.get_rng_state()
    columns, masks = run(masking, samples, grid)
    assert torch.equal(state, torch.get_rng_state()), "nothing is drawn from torch's generator"
    again_columns, again = run(masking, samples, grid)
    assert torch.equal(masks.hidden_SBN, again.hidden_SBN)

    num_masks = len(masking.names)
    assert masks.hidden_SBN.shape == (num_masks, len(batch), grid.num_patches) and masks.hidden_SBN.dtype == torch.bool
    assert masks.fallback_SB.shape == (num_masks, len(batch)) and masks.fallback_SB.dtype == torch.bool
    if masks.maps_SBN is not None:
        assert masks.maps_SBN.shape == masks.hidden_SBN.shape
        assert torch.isfinite(masks.maps_SBN).all() and (masks.maps_SBN >= 0).all()
    for column, values in columns.items():
        assert column.startswith("mask/") and len(values) == len(batch)
        assert values.dtype.kind in "biuf", column
        np.testing.assert_array_equal(values, again_columns[column])

    rows = data.draw(st.permutations(range(len(batch))).map(lambda order: order[: 1 + len(order) // 2]))
    _, some = run(masking, take(samples, rows), grid)
    assert torch.equal(some.hidden_SBN, masks.hidden_SBN[:, rows]), "neighbours and order do not matter"
    assert torch.equal(some.fallback_SB, masks.fallback_SB[:, rows])

    for s in range(num_masks):
        for row, (report, _, _) in enumerate(batch):
            low, high = allowed_counts(name, masking, grid.num_patches, bool(masks.fallback_SB[s, row]))
            assert low <= int(masks.hidden_SBN[s, row].sum()) <= high
            if report == 0 and masking.needs_text and name != "mixture":
                left_whole = name == "dinov2_report" and not masks.hidden_SBN[s, row].any()
                assert masks.fallback_SB[s, row] or left_whole, "no text, nothing to go by"


@pytest.mark.parametrize(("name", "chosen"), VARIANTS, ids=IDS)
def test_another_epoch_or_seed_hides_other_patches(name: str, chosen: dict[str, Any]) -> None:
    masking: Masking = MASKINGS[name](MASKINGS[name].Config(name=name, **chosen))
    one, other = (samples_of([3, 4] * 6, [0] * 12, [step] * 12, seed=5) for step in (0, 4))
    hidden, later = (run(masking, samples, Grid(14, 14))[1].hidden_SBN for samples in (one, other))
    assert not torch.equal(hidden, later)
    assert not torch.equal(hidden, run(masking, dataclasses.replace(one, seed=6), Grid(14, 14))[1].hidden_SBN)


def test_every_strategy_takes_part() -> None:
    assert {name for name, _ in VARIANTS} == set(MASKINGS)
