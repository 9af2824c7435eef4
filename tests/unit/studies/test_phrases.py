"""A mention's map is made of its own words and place, a sentence's of all of its words."""

from __future__ import annotations

import numpy as np
import pytest

from medim_ray.data.texts import ReportEncoder
from medim_ray.reports.sections import split_sentences
from medim_ray.studies.panels import picture_pixels
from medim_ray.studies.phrases import Phrase, phrases
from medim_ray.types import BOX, Grid
from tests.unit.reports.test_tokens import WORD_PIECE

TEXT = "No pneumothorax. The heart is enlarged, stable left effusion. Thank you."
GRID = Grid(4, 5)


def lit(phrase: Phrase, title: str) -> set[int]:
    """The patches where a map of the phrase is not at its lowest."""
    (panel,) = (one for one in phrase.maps if one.title == title)
    return set(np.flatnonzero(picture_pixels(panel.heat)[:, :, 3])) if panel.heat else set()


@pytest.mark.parametrize("num_tokens", [20, 6])
def test_each_map_is_of_the_words_of_its_phrase(num_tokens: int) -> None:
    encoder = ReportEncoder(WORD_PIECE, num_tokens)
    encoded = encoder(["a"], [TEXT])
    columns = {**encoded.columns, BOX: np.array([[0, 0, 1, 1]], np.float32)}
    row = {"report": TEXT, "sentences": [sentence.text for sentence in split_sentences(TEXT)]}
    attention_WN = np.eye(num_tokens - 1, GRID.num_patches, dtype=np.float32)  # word w looks at patch w
    spoken = phrases(row, encoder, columns, encoded, 0, GRID, attention_WN)
    known = num_tokens == 20
    assert [(one.words, one.negated, lit(one, "attention")) for one in spoken.mentions] == [
        ("pneumothorax", True, {1}),
        ("heart", False, {4} if known else set()),
        ("enlarged", False, {6} if known else set()),
        ("effusion", False, {10} if known else set()),
    ]
    told = {one.words: one.told for one in spoken.mentions}
    assert told["heart"] == "Heart" and told["effusion"] == "Pleural Effusion · prior · left"
    assert [one.words for one in spoken.sentences] == row["sentences"]
    assert lit(spoken.sentences[0], "attention") == {0, 1, 2}
    caption = spoken.mentions[1].maps[0].caption
    assert caption == ("" if known else "beyond text.num_tokens")
    assert [panel.title for panel in spoken.sentences[2].maps] == ["attention"], "it tells no place"


def test_without_a_model_the_place_is_shown_alone() -> None:
    encoder = ReportEncoder(WORD_PIECE, 20)
    encoded = encoder(["a"], [TEXT])
    columns = {**encoded.columns, BOX: np.array([[0, 0, 1, 1]], np.float32)}
    row = {"report": TEXT, "sentences": [sentence.text for sentence in split_sentences(TEXT)]}
    effusion = phrases(row, encoder, columns, encoded, 0, GRID, None).mentions[-1]
    assert [panel.title for panel in effusion.maps] == ["anatomy prior"]
    columns_lit = {patch % GRID.width for patch in lit(effusion, "anatomy prior") if patch >= 3 * GRID.width}
    assert columns_lit and min(columns_lit) >= 2, "the patient's left is on the image's right"
