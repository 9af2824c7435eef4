"""The anatomy prior: sides and zones where radiologists say they are, cropping, the law shared with KDM."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import medim_ray.masking
from medim_ray.draws import Draws
from medim_ray.masking import MASKINGS
from medim_ray.masking.anatomy import PRIOR, AnatomyMasking
from medim_ray.masking.base import Samples
from medim_ray.masking.chest_places import PLACE_OF_HEADING, draw_place
from medim_ray.masking.prior import Place, places_of, prior_maps
from medim_ray.masking.report import IS_COLD, WORDS, ReportMasking
from medim_ray.masking.report import PRIOR as REPORT_PRIOR
from medim_ray.reports.mesh import Vocabulary
from medim_ray.reports.sections import split_sentences
from medim_ray.reports.tagger import Tagger
from medim_ray.types import ASSERTION, MESH_FLAG, SENTENCE_ID, WORD_IS_PAD, Grid

GRID = Grid(14, 14)
TAGGER = Tagger()
WHOLE = (0.0, 0.0, 1.0, 1.0)


def samples_of(*reports: str, box: tuple[float, ...] = WHOLE) -> Samples:
    num, num_words = len(reports), 60
    text = {
        SENTENCE_ID: np.full((num, num_words), -1, np.int16),
        WORD_IS_PAD: np.ones((num, num_words), bool),
    }
    for row, report in enumerate(reports):
        ids = [k for k, sentence in enumerate(split_sentences(report)) for _ in sentence.text.split()]
        text[SENTENCE_ID][row, : len(ids)] = ids
        text[WORD_IS_PAD][row, : len(ids)] = False
    return Samples(
        image_ids=[f"i{row}" for row in range(num)],
        boxes_B4=np.tile(np.array(box, np.float32), (num, 1)),
        text=text,
        mentions=[TAGGER.tag(report) for report in reports],
        steps_B=np.zeros(num, np.int64),
        positions_B=np.arange(num),
        global_batch=num,
        seed=0,
    )


def map_of(report: str, box: tuple[float, ...] = WHOLE, grid: Grid = GRID) -> NDArray[np.float32]:
    return prior_maps(samples_of(report, box=box), grid).reshape(grid.height, grid.width)


def centre_of(map_HW: NDArray[np.float32]) -> tuple[float, float]:
    """(y, x) of the centre of mass, fractions of the view."""
    height, width = map_HW.shape
    weights = map_HW / map_HW.sum()
    y = float(weights.sum(1) @ ((np.arange(height) + 0.5) / height))
    return y, float(weights.sum(0) @ ((np.arange(width) + 0.5) / width))


@pytest.mark.parametrize(
    ("report", "low", "high"),  # (y, x) of the centre of mass lies between
    [
        ("Consolidation in the left upper lobe.", (0.1, 0.6), (0.4, 0.85)),
        ("Consolidation in the right upper lobe.", (0.1, 0.15), (0.4, 0.4)),
        ("Right lower lobe pneumonia.", (0.55, 0.15), (0.8, 0.4)),
        ("Large left pleural effusion.", (0.65, 0.65), (0.9, 0.95)),
        ("There is a right apical pneumothorax.", (0.05, 0.15), (0.35, 0.4)),
        ("The heart is markedly enlarged.", (0.5, 0.5), (0.75, 0.62)),
        ("Endotracheal tube in place.", (0.0, 0.45), (0.3, 0.55)),
        ("Right chest tube.", (0.3, 0.05), (0.75, 0.35)),
        ("Left-sided pacemaker.", (0.1, 0.65), (0.35, 0.9)),
        ("Cardiac pacemaker is in place.", (0.1, 0.55), (0.35, 0.9)),
        ("Scoliosis of the thoracic spine.", (0.3, 0.45), (0.7, 0.55)),
        ("Free air under the diaphragm.", (0.7, 0.4), (0.9, 0.6)),
    ],
)
def test_findings_are_where_they_are_on_films(report: str, low: tuple[float, float], high: tuple[float, float]) -> None:
    centre = centre_of(map_of(report))
    assert all(a < c < b for a, c, b in zip(low, centre, high, strict=True)), centre


def test_the_named_side_and_zone_hold_most_of_the_map() -> None:
    for side, columns in (("left", slice(7, 14)), ("right", slice(0, 7))):
        for finding in ("pneumothorax", "pleural effusion", "nodule", "atelectasis", "hilar mass"):
            map_HW = map_of(f"There is a {side} {finding}.")
            assert map_HW[:, columns].sum() > 0.97 * map_HW.sum(), (side, finding)
    upper, lower = map_of("Nodule in the right upper lung zone."), map_of("Nodule in the right lower lung zone.")
    assert upper[:5].sum() > 0.8 * upper.sum() and lower[7:].sum() > 0.9 * lower.sum()


def test_without_a_side_both_and_without_a_zone_the_whole_lung() -> None:
    none, both, left = (map_of(f"There is {side}consolidation.") for side in ("", "bilateral ", "left "))
    np.testing.assert_array_equal(none, both)
    assert 0.45 < none[:, :7].sum() / none.sum() < 0.6, "the heart takes more of the left lung"
    np.testing.assert_allclose(none[:, 7:] / none[:, 7:].sum(), left[:, 7:] / left[:, 7:].sum(), atol=1e-5)
    assert left[2:4].sum() > 0 and left[9:11].sum() > 0


def test_what_is_there_rules_over_what_is_denied_and_normal() -> None:
    alone = map_of("Right pneumothorax.")
    np.testing.assert_array_equal(alone, map_of("Right pneumothorax. No pleural effusion. Heart size is normal."))
    denied = map_of("No pleural effusion.")
    np.testing.assert_array_equal(denied, map_of("There are bilateral pleural effusions."))
    assert map_of("").max() == 0 and map_of("XXXX. ____").max() == 0


def test_a_vaguer_mention_of_the_same_kind_adds_nothing() -> None:
    exact = map_of("Consolidation in the right upper lobe.")
    np.testing.assert_array_equal(exact, map_of("Consolidation in the right upper lobe. Impression: Pneumonia."))
    two = places_of(TAGGER.tag("Right upper lobe nodule. Left lower lobe consolidation."))
    assert two == {Place("lung", "right", "upper"), Place("lung", "left", "lower")}
    assert centre_of(map_of("Right upper lobe nodule. Left effusion."))[1] == pytest.approx(0.5, abs=0.15)


def test_a_crop_sees_its_part_of_the_map_and_nothing_outside_the_image() -> None:
    report = "Small left pleural effusion. Right apical pneumothorax."
    fine = map_of(report, grid=Grid(64, 64))
    crop = map_of(report, box=(0.25, 0.5, 0.75, 1.0), grid=Grid(32, 32))
    np.testing.assert_allclose(crop, fine[16:48, 32:], rtol=1e-4, atol=1e-5)
    coarse = map_of(report, grid=Grid(16, 8))
    np.testing.assert_allclose(coarse, fine.reshape(16, 4, 8, 8).mean(axis=(1, 3)), rtol=1e-4, atol=1e-5)
    padded = map_of(report, box=(-0.5, 0.0, 1.5, 1.0), grid=Grid(16, 8))
    assert padded[:4].max() == 0 and padded[12:].max() == 0
    np.testing.assert_allclose(padded[4:12], map_of(report, grid=Grid(8, 8)), rtol=1e-4, atol=1e-5)
    assert fine.mean() == pytest.approx(1.0, rel=1e-4)


def test_every_place_of_the_table_can_be_drawn_with_every_side_and_zone() -> None:
    y, x = (np.arange(64) + 0.5)[:, None] / 64, (np.arange(64) + 0.5)[None] / 64
    zones = ("", "upper", "middle", "lower", "apical", "basal", "perihilar", "retrocardiac", "mediastinal")
    for kind in sorted({*PLACE_OF_HEADING.values(), "pleural_tube", "gastric_tube"}):
        for side in ("", "left", "right", "bilateral"):
            for zone in zones:
                weights = draw_place(kind, side, zone, y, x)
                assert weights.shape == (64, 64) and weights.min() >= 0 and np.isfinite(weights).all()
                assert weights.sum() > 1e-9, (kind, side, zone)


def test_the_table_names_headings_of_the_vocabulary() -> None:
    assert not set(PLACE_OF_HEADING) - set(Vocabulary.default().headings)


def run(samples: Samples, **options: Any) -> Any:
    masking = AnatomyMasking(AnatomyMasking.Config(**options))
    draws = Draws.of(3, np.zeros(len(samples), np.int64), samples.image_ids)
    columns = {key: torch.from_numpy(value) for key, value in masking.plan(samples, GRID, draws).items()}
    return columns, masking.resolve(columns, None)


def test_the_law_is_that_of_kdm() -> None:
    samples = samples_of("Right effusion.", "", "Cardiomegaly. Left nodule.")
    _, masks = run(samples, on="feature")
    assert masks.hidden_SBN.sum(-1).tolist() == [[97, 98, 97]], "88 of 98 high and 9 of 98 low; a fallback hides 98"
    assert masks.fallback_SB.tolist() == [[False, True, False]]
    columns, masks = run(samples, on="input", ratio=0.25, diversity=1.0)
    assert masks.hidden_SBN.sum(-1).tolist() == [[49, 49, 49]]
    hidden = masks.hidden_SBN[0, 0]
    assert columns[PRIOR][0, 0][hidden].min() >= columns[PRIOR][0, 0][~hidden].max()


def test_a_sentence_is_hidden_by_its_own_places() -> None:
    report = "There is a large right pleural effusion. The left apical pneumothorax is small."
    samples = samples_of(*[report] * 64)
    samples = dataclasses.replace(samples, image_ids=[f"i{k}" for k in range(64)])
    columns, masks = run(samples, of="both")
    assert masks.hidden_SBN.shape == (2, 64, 196)
    lefts = columns[PRIOR][:, 1].reshape(64, 14, 14)[:, :, 7:].sum(dim=(1, 2)) / columns[PRIOR][:, 1].sum(dim=1)
    assert ((lefts < 0.05) | (lefts > 0.95)).all(), "one sentence, one side"
    assert 16 < int((lefts > 0.5).sum()) < 48, "both sentences are drawn"
    whole = columns[PRIOR][:, 0].reshape(64, 14, 14)
    np.testing.assert_allclose(whole[:, :, 7:].sum(dim=(1, 2)) / whole.sum(dim=(1, 2)), 0.5, atol=0.02)
    _, alone = run(samples, of="sentence")
    assert torch.equal(alone.hidden_SBN[0], masks.hidden_SBN[1])


def guided(
    steps_B: NDArray[np.int64], flagged: bool = True, **options: Any
) -> tuple[Any, torch.Tensor, dict[str, torch.Tensor]]:
    """Masks of KDM + SDM on two reports without negations, the attention they came from and the plan."""
    samples = samples_of("Large right pleural effusion seen.", "Lungs remain as XXXX above.")
    text = dict(samples.text) | {
        MESH_FLAG: ~samples.text[WORD_IS_PAD] & flagged,
        ASSERTION: np.zeros(samples.text[WORD_IS_PAD].shape, np.int8),
    }
    samples = dataclasses.replace(samples, text=text, steps_B=steps_B, mentions=[samples.mentions[0], []])
    masking = ReportMasking(ReportMasking.Config(**options))
    columns = masking.plan(samples, GRID, Draws.of(3, np.zeros(2, np.int64), samples.image_ids))
    tensors = {key: torch.from_numpy(value) for key, value in columns.items()}
    attention_BWN = torch.rand(2, 60, 196, generator=torch.Generator().manual_seed(0)).softmax(-1)
    return masking.resolve(tensors, attention_BWN), tensors[WORDS] @ attention_BWN, tensors


def test_the_prior_weighs_the_attention_of_kdm_and_sdm() -> None:
    masks, attention_BSN, _ = guided(np.zeros(2, np.int64), prior="multiply")
    prior_BN = torch.from_numpy(prior_maps(samples_of("Large right pleural effusion seen.", ""), GRID))
    for s in range(2):
        torch.testing.assert_close(masks.maps_SBN[s, 0], attention_BSN[0, s] * prior_BN[0])
        torch.testing.assert_close(masks.maps_SBN[s, 1], attention_BSN[1, s])  # no place is told
    assert not masks.fallback_SB.any()


def test_a_cold_start_goes_by_the_prior_then_by_the_attention() -> None:
    masks, attention_BSN, columns = guided(np.array([4, 4]), prior="cold_start", prior_steps=5)
    torch.testing.assert_close(masks.maps_SBN, columns[REPORT_PRIOR].transpose(0, 1))
    assert masks.fallback_SB.tolist() == [[False, True], [False, True]], "no place is told: nothing to go by yet"
    masks, attention_BSN, _ = guided(np.array([5, 5]), prior="cold_start", prior_steps=5)
    torch.testing.assert_close(masks.maps_SBN, attention_BSN.transpose(0, 1))


def test_a_cold_start_needs_no_word_for_a_place() -> None:
    """The mention lies beyond the token limit: no word is flagged, but the prior knows the place."""
    options: dict[str, Any] = {"flagged": False, "prior": "cold_start", "prior_steps": 5}
    cold, warm = (guided(np.array([step, step]), **options)[0] for step in (4, 5))
    assert cold.fallback_SB[0].tolist() == [False, True] and warm.fallback_SB[0].tolist() == [True, True]


def test_without_a_prior_the_plan_is_the_papers() -> None:
    _, _, columns = guided(np.zeros(2, np.int64))
    assert REPORT_PRIOR not in columns and IS_COLD not in columns


def test_nothing_of_the_masking_package_knows_phantoms() -> None:
    for path in Path(medim_ray.masking.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert "phantom" not in ast.unparse(node), path
                assert "medim_ray.data" not in ast.unparse(node), path


@pytest.mark.parametrize("options", [{"of": "word"}, {"ratio": 1.0}, {"diversity": 1.1}, {"on": "pixels"}])
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"masking.{next(iter(options))}"):
        MASKINGS["anatomy"].Config(**options)


@pytest.mark.parametrize(
    "options", [{"prior": "add"}, {"prior": "cold_start"}, {"prior": "multiply", "prior_steps": 5}, {"prior_steps": 1}]
)
def test_bad_options_of_the_prior(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"masking\.prior"):
        MASKINGS["kdm"].Config(**options)
