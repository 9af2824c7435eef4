"""Words and tokens of one report as arrays: the word of each token, the mention and sentence of each word.

Follows the paper's code (MedIM, "word pieces summed to words"): word i is token i + 1 once the pieces are summed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from medim_ray.reports.sections import Sentence, blank_markup
from medim_ray.reports.tagger import Mention

__all__ = ["ASSERTION_CODES", "BareTokenizer", "EncodedReport", "encode"]

ASSERTION_CODES = {"": 0, "present": 1, "absent": 2, "uncertain": 3, "prior": 4}


@dataclass(frozen=True)
class EncodedReport:
    """Arrays of one report with T = num_tokens and W = T - 1.

    token_ids_T (int64): [CLS], pieces, [SEP], padding. word_of_token_T (int16): -1 for [CLS], [SEP] and padding.
    word_is_pad_W: no word there. mesh_flag_W: the word lies in a mention. assertion_W (int8): ASSERTION_CODES of that
    mention, a finding before an anatomy; 'absent' for anatomy that only tells where something is absent.
    sentence_id_W (int16): index into the sentences given, -1 for padding. num_sentences: with at least
    one visible word.
    """

    token_ids_T: NDArray[np.int64]
    token_is_pad_T: NDArray[np.bool_]
    word_of_token_T: NDArray[np.int16]
    word_is_pad_W: NDArray[np.bool_]
    mesh_flag_W: NDArray[np.bool_]
    assertion_W: NDArray[np.int8]
    sentence_id_W: NDArray[np.int16]
    num_sentences: int


@dataclass(frozen=True)
class BareTokenizer:
    """What `encode` needs of a fast Hugging Face tokenizer: its core, and the ids of the tokens that frame a report.

    Processes that it is sent to need not load transformers.
    """

    core: tokenizers.Tokenizer
    first_id: int
    last_id: int
    pad_id: int

    @classmethod
    def of(cls, tokenizer: Any) -> BareTokenizer:
        """ValueError for a slow tokenizer, or one without the special tokens."""
        ids = special_token_ids(tokenizer)
        core = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        core.no_truncation()
        core.no_padding()
        return cls(core, *ids)


def encode(
    text: str, tokenizer: Any, mentions: Sequence[Mention], sentences: Sequence[Sentence], num_tokens: int
) -> EncodedReport:
    """Encode `text` with a fast Hugging Face tokenizer, or the bare one of it, which is made once for many reports;
    mentions and sentences carry offsets into the same `text`.

    A word of which not all pieces fit is dropped with its pieces; a sentence cut by the limit keeps its visible words.
    Empty text is [CLS] [SEP] and padding. Raises ValueError for a slow tokenizer, one without the special tokens, or
    num_tokens < 3.
    """
    if num_tokens < 3:
        raise ValueError(f"num_tokens={num_tokens}: must be at least 3 ([CLS], one word, [SEP]); the paper uses 112")
    bare = tokenizer if isinstance(tokenizer, BareTokenizer) else BareTokenizer.of(tokenizer)
    readable, places = _readable(text)
    encoding = bare.core.encode(readable, add_special_tokens=False)
    word_ids: list[int | None] = encoding.word_ids
    keep = _num_kept(word_ids, num_tokens - 2)

    token_ids_T = np.full(num_tokens, bare.pad_id, np.int64)
    token_ids_T[0] = bare.first_id
    token_ids_T[1 : keep + 1] = encoding.ids[:keep]
    token_ids_T[keep + 1] = bare.last_id
    words = np.array(word_ids[:keep], dtype=np.int64)
    is_new = np.ones(keep, bool)
    is_new[1:] = words[1:] != words[:-1]
    offsets = np.array(encoding.offsets[:keep], dtype=np.int64).reshape(-1, 2)
    firsts = np.flatnonzero(is_new)
    starts = offsets[firsts, 0]
    ends = offsets[np.append(firsts[1:], keep) - 1, 1] if keep else starts
    # A byte-level tokenizer makes words of bare white space: tokens like others, but no words.
    is_word = np.array([bool(readable[start:end].strip()) for start, end in zip(starts, ends, strict=True)], bool)
    if places is not None and keep:  # back to `text`
        starts, ends = places[starts], places[np.maximum(ends - 1, 0)] + 1
    numbers = np.where(is_word, np.cumsum(is_word) - 1, -1)
    word_of_token_T = np.full(num_tokens, -1, np.int16)
    word_of_token_T[1 : keep + 1] = numbers[np.cumsum(is_new) - 1]
    starts, ends = starts[is_word], ends[is_word]
    num_words = len(starts)

    num_places = num_tokens - 1
    flags, assertions = _mention_words(starts, ends, mentions, num_places)
    sentence_id_W = np.full(num_places, -1, np.int16)
    if num_words and sentences:
        sentence_starts = np.array([sentence.start for sentence in sentences])
        places = np.searchsorted(sentence_starts, np.maximum(starts, ends - 1), side="right") - 1
        sentence_id_W[:num_words] = np.maximum(places, 0)
    return EncodedReport(
        token_ids_T=token_ids_T,
        token_is_pad_T=np.arange(num_tokens) > keep + 1,
        word_of_token_T=word_of_token_T,
        word_is_pad_W=np.arange(num_places) >= num_words,
        mesh_flag_W=flags,
        assertion_W=assertions,
        sentence_id_W=sentence_id_W,
        num_sentences=len(np.unique(sentence_id_W[:num_words])) if sentences else 0,
    )


_UNREAD = re.compile(r"_{2,}|[^\S\n]{3,}")


def _readable(text: str) -> tuple[str, NDArray[np.int64] | None]:
    """The text as it is read: markup and runs of underscores (blanks of de-identification) are one space each, so that
    they cost no tokens; and the place in `text` of each of its characters, None where nothing was taken out."""
    plain = blank_markup(text)
    if _UNREAD.search(plain) is None:
        return plain, None
    kept, last = [], 0
    for match in _UNREAD.finditer(plain):
        kept.append(np.arange(last, match.start() + 1))
        last = match.end()
    places = np.concatenate([*kept, np.arange(last, len(plain))])
    return _UNREAD.sub(" ", plain), places


def special_token_ids(tokenizer: Any) -> tuple[int, int, int]:
    """Ids of the first, last and padding token; ValueError when the tokenizer cannot serve."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError("the tokenizer has no offsets; load a fast one (a folder with tokenizer.json)")
    first_id = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
    last_id = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    ids = {"cls_token or bos_token": first_id, "sep_token or eos_token": last_id, "pad_token": tokenizer.pad_token_id}
    for name, token_id in ids.items():
        if token_id is None:
            raise ValueError(
                f"the tokenizer has no {name}; set it (tokenizer.add_special_tokens) before encoding reports"
            )
    return first_id, last_id, tokenizer.pad_token_id


def _num_kept(word_ids: list[int | None], capacity: int) -> int:
    """How many pieces stay when only whole words within `capacity` pieces do."""
    if len(word_ids) <= capacity:
        return len(word_ids)
    keep = capacity
    while keep and word_ids[keep] == word_ids[keep - 1]:
        keep -= 1
    return keep


def _mention_words(
    starts: NDArray[np.int64], ends: NDArray[np.int64], mentions: Sequence[Mention], num_places: int
) -> tuple[NDArray[np.bool_], NDArray[np.int8]]:
    """Flag and assertion code of each word; later writes win, so anatomy is written before findings."""
    flags = np.zeros(num_places, bool)
    assertions = np.zeros(num_places, np.int8)
    for mention in sorted(mentions, key=lambda mention: mention.category != "anatomy"):
        first = np.searchsorted(ends, mention.start, side="right")
        stop = np.searchsorted(starts, mention.end, side="left")
        flags[first:stop] = True
        assertions[first:stop] = ASSERTION_CODES["absent" if mention.negated else mention.assertion]
    return flags, assertions
