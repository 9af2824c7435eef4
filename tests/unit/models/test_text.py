"""TextEncoder: words are sums of pieces, attention is the last layer's, padding is inert; reproducible tokenizers."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from medim_ray.models.text import TextEncoder, load_tokenizer
from medim_ray.reports.sections import split_sentences
from medim_ray.reports.tokens import encode
from medim_ray.reports.wordpiece import train_tokenizer

TEXT = "the heart is mildly enlarged . no pneumothorax or pleural effusion in left right lower lobe opacity edema"


def reports() -> list[str]:
    rng = random.Random(0)
    return [*(" ".join(rng.choices(TEXT.split(), k=20)) for _ in range(200)), "Mr Wojciechowski has edema"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(reports(), path, vocab_size=120)
    return path


def columns(tokenizer: Any, texts: list[str], num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = [encode(text, tokenizer, [], split_sentences(text), num_tokens) for text in texts]
    return (
        torch.from_numpy(np.stack([row.token_ids_T for row in rows])),
        torch.from_numpy(np.stack([row.token_is_pad_T for row in rows])),
        torch.from_numpy(np.stack([row.word_of_token_T for row in rows])),
    )


def test_words_and_attention(folder: Path) -> None:
    tokenizer = load_tokenizer(TextEncoder.Config(), folder)
    torch.manual_seed(0)
    encoder = TextEncoder(TextEncoder.Config(num_tokens=32), len(tokenizer)).eval()
    ids, is_pad, words = columns(tokenizer, ["Pneumothoraces in the left lobe", "no edema", ""], 32)
    assert (words[0] == 0).sum() > 1, "a word of several pieces"
    features = encoder(ids, is_pad, words)

    model = transformers.BertModel(encoder.model.config, add_pooling_layer=False)
    model.set_attn_implementation("eager")
    model.load_state_dict(encoder.model.state_dict())
    reference = model.eval()(input_ids=ids, attention_mask=(~is_pad).long(), output_attentions=True)
    states, attention = reference.last_hidden_state, reference.attentions[-1].mean(1)[:, 0]
    torch.testing.assert_close(features.global_BD, states[:, 0], rtol=1e-4, atol=1e-5)
    for row in range(3):
        for word in range(int(words[row].max()) + 1):
            pieces = words[row] == word
            torch.testing.assert_close(features.words_BWD[row, word], states[row, pieces].sum(0), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(features.cls_attention_BW[row, word], attention[row, pieces].sum())
    assert (~features.word_is_pad_BW).sum(1).tolist() == [5, 2, 0]
    assert (features.words_BWD[2] == 0).all() and (features.cls_attention_BW[2] == 0).all()


def test_padding_is_inert(folder: Path) -> None:
    tokenizer = load_tokenizer(TextEncoder.Config(), folder)
    encoder = TextEncoder(TextEncoder.Config(num_tokens=32), len(tokenizer))  # in training mode: no dropout by default
    short, long = (encoder(*columns(tokenizer, ["no edema in the heart"], num)) for num in (12, 32))
    torch.testing.assert_close(short.global_BD, long.global_BD)
    torch.testing.assert_close(short.words_BWD[:, :5], long.words_BWD[:, :5])


def test_vocabulary_is_the_same_in_any_process_and_order(folder: Path, tmp_path: Path) -> None:
    code = "import sys\nfrom medim_ray.reports.wordpiece import train_tokenizer\n"
    code += "train_tokenizer(sys.stdin.read().splitlines(), sys.argv[1], vocab_size=120)"
    text = "\n".join(reversed(reports()))
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], input=text, text=True, check=True)
    for name in ("vocab.txt", "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_a_word_of_one_report_never_becomes_a_token(folder: Path) -> None:
    tokenizer = load_tokenizer(TextEncoder.Config(), folder)
    vocabulary = set(tokenizer.get_vocab())
    assert "pneumothorax" in vocabulary and "edema" in vocabulary
    assert not any("woj" in token or "ciech" in token for token in vocabulary)
    assert len(tokenizer.tokenize("PNEUMOTHORAX")) == 1, "lower-cased"
    with pytest.raises(ValueError, match="no word occurs in 2 reports"):
        train_tokenizer(["once only"], folder / "none")


def test_transformers_folder_and_its_faults(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(TextEncoder.Config(), folder)
    torch.manual_seed(0)
    small = TextEncoder(TextEncoder.Config(num_tokens=32), len(tokenizer)).model
    small.save_pretrained(tmp_path)
    config = TextEncoder.Config(name="hf", path=str(tmp_path), num_tokens=32, trainable=False)
    with pytest.raises(ValueError, match="has no tokenizer"):
        load_tokenizer(config, "")
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(config, "")
    assert loaded("no edema")["input_ids"] == tokenizer("no edema")["input_ids"]
    encoder = TextEncoder(config, len(loaded))
    assert encoder.width == 128 and not any(p.requires_grad for p in encoder.parameters())
    torch.testing.assert_close(encoder.model.state_dict(), small.state_dict())

    with pytest.raises(ValueError, match="has 32 positions"):
        TextEncoder(TextEncoder.Config(name="hf", path=str(tmp_path)), len(loaded))
    with pytest.raises(ValueError, match="embeddings for a tokenizer of"):
        TextEncoder(config, len(loaded) + 1)
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="no readable weights"):
        TextEncoder(config, len(loaded))
    (tmp_path / "empty").mkdir()
    empty = TextEncoder.Config(name="hf", path=str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="no configuration of a transformers model"):
        TextEncoder(empty, 10)
    with pytest.raises(ValueError, match="has no tokenizer"):
        load_tokenizer(empty, "")


def test_shards_without_a_vocabulary() -> None:
    with pytest.raises(ValueError, match="medim-ray prepare"):
        load_tokenizer(TextEncoder.Config(), "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "hf"}, "text.path"),
        ({"path": "somewhere"}, "text.name=hf"),
        ({"name": "hf", "path": "x", "width": 64}, "text.width"),
        ({"width": 33}, "multiple"),
        ({"num_tokens": 2}, "num_tokens"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextEncoder.Config(**options)
