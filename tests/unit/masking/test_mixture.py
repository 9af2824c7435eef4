"""A mixture draws each sample's strategy by weight and hides exactly as that strategy does alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medim_ray.draws import Draws
from medim_ray.masking import MASKINGS
from medim_ray.masking.base import Samples
from medim_ray.masking.block import BlockMasking
from medim_ray.masking.mixture import CHOICE, MixtureMasking
from medim_ray.reports.tagger import Tagger
from medim_ray.types import Grid

NUM, GRID = 600, Grid(7, 7)


def samples() -> Samples:
    mentions = Tagger().tag("Large left pleural effusion.")
    return Samples(
        image_ids=[f"i{k}" for k in range(NUM)],
        boxes_B4=np.tile(np.array([0, 0, 1, 1], np.float32), (NUM, 1)),
        text={},
        mentions=[mentions] * NUM,
        steps_B=np.zeros(NUM, np.int64),
        positions_B=np.arange(NUM),
        global_batch=NUM,
        seed=0,
    )


def test_shares_follow_the_weights_and_each_part_is_itself() -> None:
    mixture = MixtureMasking(MixtureMasking.Config(uniform_weight=1, block_weight=2, anatomy_weight=1, ratio=0.51))
    draws = Draws.of(0, np.zeros(NUM, np.int64), samples().image_ids)
    columns = mixture.plan(samples(), GRID, draws)
    shares = np.bincount(columns[CHOICE], minlength=3) / NUM
    np.testing.assert_allclose(shares, [0.25, 0.5, 0.25], atol=0.06)
    masks = mixture.resolve({key: torch.from_numpy(value) for key, value in columns.items()}, None)
    assert set(masks.hidden_SBN.sum(-1).flatten().tolist()) == {24}, "int(0.51 * 49), where uniform alone rounds to 25"
    block = BlockMasking(BlockMasking.Config(ratio=0.51)).plan(samples(), GRID, draws)["mask/block_BSN"][:, 0]
    is_block_B = columns[CHOICE] == 1
    np.testing.assert_array_equal(masks.hidden_SBN[0].numpy()[is_block_B], block[is_block_B])
    left_B = masks.hidden_SBN[0].reshape(NUM, 7, 7)[:, 3:, 4:].sum(dim=(1, 2)).numpy()
    assert left_B[columns[CHOICE] == 2].mean() > 1.5 * left_B[columns[CHOICE] == 0].mean()


def weights(part: str) -> dict[str, float]:
    return {"uniform_weight": 0.0, "anatomy_weight": 0.0} | {f"{part}_weight": 1.0}


def test_needs_are_those_of_the_parts() -> None:
    needs = {
        weight: (masking.needs_text, masking.needs_attention)
        for weight in ("uniform", "block", "anatomy", "kdm", "sdm")
        for masking in [MASKINGS["mixture"](MASKINGS["mixture"].Config(**weights(weight)))]
    }
    assert needs == {
        "uniform": (False, False),
        "block": (False, False),
        "anatomy": (True, False),
        "kdm": (True, True),
        "sdm": (True, True),
    }


@pytest.mark.parametrize(
    "options",
    [
        {"uniform_weight": 0, "anatomy_weight": 0},
        {"kdm_weight": -1},
        {"ratio": 0.0},
        {"on": "pixels"},
        {"prior": "multiply"},
        {"kdm_weight": 1.0, "negated_weight": -1.0},
    ],
)
def test_bad_options(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="masking"):
        MASKINGS["mixture"].Config(**options)
