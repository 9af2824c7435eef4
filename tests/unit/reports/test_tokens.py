"""Word <-> token alignment with a WordPiece and a byte-level BPE tokenizer, the limit, and bad tokenizers."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from medim_ray.reports.sections import split_sentences
from medim_ray.reports.tagger import Tagger
from medim_ray.reports.tokens import ASSERTION_CODES, EncodedReport, encode

TAGGER = Tagger()
TEXT = "No pneumothorax. The heart is enlarged, stable left effusion."
VOCABULARY = "[PAD] [UNK] [CLS] [SEP] no pneumo ##thorax . the heart is en ##larged , stable left eff ##usion _ x"
PIECES = VOCABULARY.split()


def word_piece() -> Any:
    vocabulary = {piece: number for number, piece in enumerate(PIECES)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def byte_bpe() -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate(["<s>", "</s>", "<pad>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


WORD_PIECE, BYTE_BPE = word_piece(), byte_bpe()


def encoded(text: str, num_tokens: int, tokenizer: Any = WORD_PIECE) -> EncodedReport:
    return encode(text, tokenizer, TAGGER.tag(text), split_sentences(text), num_tokens)


def test_words_flags_assertions_and_sentences() -> None:
    report = encoded(TEXT, 20)
    pieces = [PIECES[number] for number in report.token_ids_T]
    expected = "[CLS] no pneumo ##thorax . the heart is en ##larged , stable left eff ##usion . [SEP]"
    assert " ".join(pieces) == expected + " [PAD]" * 3
    assert report.word_of_token_T.tolist() == [-1, 0, 1, 1, 2, 3, 4, 5, 6, 6, 7, 8, 9, 10, 10, 11, -1, -1, -1, -1]
    assert report.token_is_pad_T.sum() == 3
    assert (~report.word_is_pad_W).sum() == 12
    words = ["no", "pneumothorax", ".", "the", "heart", "is", "enlarged", ",", "stable", "left", "effusion", "."]
    flagged = {words[place]: int(report.assertion_W[place]) for place in np.flatnonzero(report.mesh_flag_W)}
    codes = ASSERTION_CODES
    expected_codes = {"pneumothorax": "absent", "heart": "present", "enlarged": "present", "effusion": "prior"}
    assert flagged == {word: codes[assertion] for word, assertion in expected_codes.items()}
    assert report.sentence_id_W.tolist() == [0] * 3 + [1] * 9 + [-1] * 7
    assert report.num_sentences == 2


def test_a_cut_word_is_dropped_and_a_cut_sentence_keeps_its_words() -> None:
    report = encoded(TEXT, 10)  # 8 pieces fit: the last would be "en" of "enlarged"
    assert [PIECES[number] for number in report.token_ids_T[-3:]] == ["is", "[SEP]", "[PAD]"]
    assert (~report.word_is_pad_W).sum() == 6
    assert report.sentence_id_W[:6].tolist() == [0, 0, 0, 1, 1, 1]
    assert report.num_sentences == 2


@pytest.mark.parametrize("text", ["", " \n\t "])
def test_empty_text_is_two_tokens(text: str) -> None:
    report = encoded(text, 5)
    assert [PIECES[number] for number in report.token_ids_T] == ["[CLS]", "[SEP]", "[PAD]", "[PAD]", "[PAD]"]
    assert report.word_is_pad_W.all()
    assert not report.mesh_flag_W.any()
    assert report.num_sentences == 0


@pytest.mark.parametrize("text", ["XXXX", "_" * 80, "effusion " * 5000, "<b>No</b>\teffusion", "Derrame pleural."])
@pytest.mark.parametrize("tokenizer", [WORD_PIECE, BYTE_BPE])
def test_odd_texts_fill_the_same_shapes(text: str, tokenizer: Any) -> None:
    report = encoded(text, 112, tokenizer)
    assert report.token_ids_T.shape == report.word_of_token_T.shape == (112,)
    assert report.word_is_pad_W.shape == report.mesh_flag_W.shape == report.sentence_id_W.shape == (111,)
    assert (report.sentence_id_W == -1).tolist() == report.word_is_pad_W.tolist()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(["no", "effusion", "pneumothorax.", "heart", "x", "XXXX", "é", "The", "\n"]), max_size=30),
    st.integers(3, 40),
    st.booleans(),
)
def test_alignment_holds_for_any_text(parts: list[str], num_tokens: int, is_bpe: bool) -> None:
    text = " ".join(parts)
    report = encoded(text, num_tokens, BYTE_BPE if is_bpe else WORD_PIECE)
    words = report.word_of_token_T[report.word_of_token_T >= 0]
    num_words = int((~report.word_is_pad_W).sum())
    assert sorted(set(words.tolist())) == list(range(num_words))
    assert (np.diff(words) >= 0).all()
    num_tokens_used = num_tokens - int(report.token_is_pad_T.sum())
    assert num_tokens_used >= len(words) + 2 if is_bpe else num_tokens_used == len(words) + 2
    ids = report.sentence_id_W[:num_words]
    assert (np.diff(ids) >= 0).all()
    assert report.num_sentences == len(set(ids.tolist()))
    assert (report.assertion_W > 0).tolist() == report.mesh_flag_W.tolist()


def test_white_space_that_a_byte_tokenizer_keeps_is_no_word() -> None:
    report = encoded("\n\nx", 10, BYTE_BPE)
    assert report.word_of_token_T.tolist() == [-1, -1, -1, 0] + [-1] * 6
    assert report.num_sentences == 1


def test_bpe_words_carry_the_same_flags_as_word_pieces() -> None:
    bpe, pieces = encoded(TEXT, 112, BYTE_BPE), encoded(TEXT, 112)
    assert bpe.mesh_flag_W.sum() == pieces.mesh_flag_W.sum() == 4
    assert bpe.assertion_W[bpe.mesh_flag_W].tolist() == pieces.assertion_W[pieces.mesh_flag_W].tolist()


def test_tokenizers_that_cannot_serve_are_refused() -> None:
    with pytest.raises(ValueError, match="num_tokens=2"):
        encoded(TEXT, 2)
    with pytest.raises(ValueError, match="fast one"):
        encoded(TEXT, 20, object())
    bare = PreTrainedTokenizerFast(tokenizer_object=WORD_PIECE.backend_tokenizer, cls_token="[CLS]", sep_token="[SEP]")
    with pytest.raises(ValueError, match="no pad_token"):
        encoded(TEXT, 20, bare)


@pytest.mark.parametrize("tokenizer", [WORD_PIECE, BYTE_BPE], ids=["word pieces", "bytes"])
def test_blanks_and_markup_cost_no_tokens(tokenizer: Any) -> None:
    text = "_" * 120 + "\n<p>No <b>left</b> effusion.</p> ___ Enlarged heart."
    report = encoded(text, 64, tokenizer)
    words = [text[m.start : m.end].lower() for m in TAGGER.tag(text)]
    assert words == ["effusion", "enlarged heart"]
    assert report.mesh_flag_W.sum() == 3 and report.num_sentences == 2
    plain = encoded("\nNo left effusion. Enlarged heart.", 64, tokenizer)
    assert (~report.word_is_pad_W).sum() == (~plain.word_is_pad_W).sum()
    assert report.assertion_W[report.mesh_flag_W].tolist() == plain.assertion_W[plain.mesh_flag_W].tolist()
