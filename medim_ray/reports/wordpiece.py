"""The WordPiece vocabulary that a text encoder trained from scratch uses: learned from reports. Loads no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers

SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def train_tokenizer(reports: Iterable[str], folder: str | Path, vocab_size: int = 2000, min_reports: int = 2) -> int:
    """Train a lower-cased WordPiece vocabulary, write vocab.txt and tokenizer.json to `folder`, return its size.

    Only words of at least `min_reports` reports are learned from, so that a word of one patient's report (a name)
    never becomes a token. The result does not depend on the order of the reports. ValueError without any such word.
    """
    tokenizer = _word_piece({})
    counts: Counter[str] = Counter()
    num_reports: Counter[str] = Counter()
    for report in reports:
        normal = tokenizer.normalizer.normalize_str(report)
        words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal)]
        counts.update(words)
        num_reports.update(set(words))
    kept = sorted(word for word, num in num_reports.items() if num >= min_reports)
    if not kept:
        raise ValueError(f"no word occurs in {min_reports} reports: nothing to train a vocabulary on")
    # Listed in order, because the trainer numbers letters by the order of a hash map, and breaks ties by number.
    letters = sorted(set("".join(kept)))
    listed = [*SPECIAL_TOKENS.values(), *letters, *(f"##{letter}" for letter in letters)]
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=max(vocab_size, len(listed)), special_tokens=listed, show_progress=False
    )
    tokenizer.train_from_iterator((" ".join([word] * counts[word]) for word in kept), trainer)
    # Afresh from the vocabulary: a letter must not stay a "special" token that is matched before words are split.
    tokenizer = _word_piece(tokenizer.get_vocab())
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS.values()))
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.model.save(str(out))
    tokenizer.save(str(out / "tokenizer.json"))
    return int(tokenizer.get_vocab_size())


def _word_piece(vocabulary: dict[str, int]) -> Any:
    """BERT's lower-cased WordPiece tokenizer."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    return tokenizer
