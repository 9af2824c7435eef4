"""Reports are tokenised and tagged once an image id, and what is kept of them is what was made."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from medim_ray import types
from medim_ray.data.texts import ReportEncoder, text_rows
from medim_ray.models.text import TextEncoder, load_tokenizer
from medim_ray.reports.mesh import Vocabulary
from medim_ray.reports.sections import split_sentences
from medim_ray.reports.tagger import Tagger
from medim_ray.reports.tokens import encode
from medim_ray.reports.wordpiece import train_tokenizer

REPORTS = [f"No pneumothorax. Small left effusion, {word}. Heart size is normal." for word in ("new", "old", "stable")]
IDS = ["a", "b", "ü c"]


@pytest.fixture
def encoder(tmp_path: Path) -> ReportEncoder:
    train_tokenizer(REPORTS * 2, tmp_path, vocab_size=200)
    return ReportEncoder(load_tokenizer(TextEncoder.Config(), tmp_path), num_tokens=24)


def test_a_report_is_encoded_once_however_often_it_is_asked_for(encoder: ReportEncoder) -> None:
    first = text_rows(encoder, IDS, REPORTS)
    assert encoder.num_encoded == 3
    for _ in range(4):  # epochs, in other orders
        again = text_rows(encoder, IDS[::-1] + IDS, REPORTS[::-1] + REPORTS)
    assert encoder.num_encoded == 3
    for name, values in first.columns.items():
        assert np.array_equal(again.columns[name][3:], values) and np.array_equal(again.columns[name][:3], values[::-1])
    text_rows(encoder, ["d", "a"], [REPORTS[0], REPORTS[0]])
    assert encoder.num_encoded == 4


def test_words_of_a_mesh_file_are_flagged(tmp_path: Path) -> None:
    reports = ["Hamman syndrome. No effusion."]
    train_tokenizer(reports * 2, tmp_path, vocab_size=200)
    trees = tmp_path / "mtrees2026.bin"
    trees.write_text("Hamman Syndrome;C08.846.600\n")
    flagged = []
    for vocabulary in (None, Vocabulary.default().merged(Vocabulary.from_nlm(str(trees)))):
        made = ReportEncoder(load_tokenizer(TextEncoder.Config(), tmp_path), 24, vocabulary)
        flagged.append(int(text_rows(made, ["a"], reports).columns[types.MESH_FLAG].sum()))
    assert flagged == [1, 3]


def test_columns_and_mentions_are_those_of_the_report(encoder: ReportEncoder) -> None:
    rows = text_rows(encoder, IDS, REPORTS)
    rows = text_rows(encoder, IDS, REPORTS)  # from the file
    for place, report in enumerate(REPORTS):
        mentions = Tagger().tag(report)
        assert list(rows.mentions[place]) == mentions and mentions
        whole = encode(report, encoder._tokenizer, mentions, split_sentences(report), 24)
        assert np.array_equal(rows.columns[types.TOKEN_IDS][place], whole.token_ids_T)
        assert np.array_equal(rows.columns[types.ASSERTION][place], whole.assertion_W)
        assert np.array_equal(rows.columns[types.SENTENCE_ID][place], whole.sentence_id_W)
    assert len(rows.mentions) == 3 and len(rows.mentions[1:]) == 2
    assert rows.columns[types.TOKEN_IDS].dtype == np.int64 and rows.columns[types.MESH_FLAG].dtype == np.bool_


def test_an_encoder_travels_before_it_is_used(encoder: ReportEncoder) -> None:
    copy = pickle.loads(pickle.dumps(encoder))
    assert np.array_equal(copy(IDS, REPORTS).columns[types.TOKEN_IDS], encoder(IDS, REPORTS).columns[types.TOKEN_IDS])


def test_without_an_encoder_there_is_no_text() -> None:
    rows = text_rows(None, IDS, REPORTS)
    assert rows.columns == {} and [list(one) for one in rows.mentions] == [[], [], []]
