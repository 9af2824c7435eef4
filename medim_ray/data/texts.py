"""Reports as text columns: tokenised and tagged once per report, kept in a file of this process. No Ray in here.

The file grows with the corpus (2 to 3 kB a report), the memory does not.
"""

from __future__ import annotations

import contextlib
import pickle
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from medim_ray import types
from medim_ray.reports.mesh import Vocabulary
from medim_ray.reports.sections import split_sentences
from medim_ray.reports.tagger import Mention, Tagger
from medim_ray.reports.tokens import BareTokenizer, encode

_CACHE_KB = 8192  # of the file that stays in memory


class Mentions(Sequence[Sequence[Mention]]):
    """The mentions of B reports; each list is made when it is asked for, since most masks ask for none."""

    def __init__(self, pickled: Sequence[bytes]) -> None:
        self._pickled = pickled

    @overload
    def __getitem__(self, place: int) -> Sequence[Mention]: ...

    @overload
    def __getitem__(self, place: slice) -> Mentions: ...

    def __getitem__(self, place: int | slice) -> Sequence[Mention] | Mentions:
        if isinstance(place, slice):
            return Mentions(self._pickled[place])
        mentions: list[Mention] = [Mention(*values) for values in pickle.loads(self._pickled[place])]
        return mentions

    def __len__(self) -> int:
        return len(self._pickled)


@dataclass(frozen=True, kw_only=True)
class TextRows:
    """The text of B samples: columns of medim_ray.types and the mentions."""

    columns: dict[str, NDArray[Any]]
    mentions: Sequence[Sequence[Mention]]


class ReportEncoder:
    """Tokens and mentions of reports, computed once per image id; num_encoded: how many were.

    Travels to a process before it is used there.
    """

    def __init__(self, tokenizer: Any, num_tokens: int, vocabulary: Vocabulary | None = None) -> None:
        """vocabulary: of the tagger; None: the bundled chest terms."""
        self._tokenizer = BareTokenizer.of(tokenizer)
        self._tagger = Tagger(vocabulary)
        self._num_tokens, num_words = num_tokens, num_tokens - 1
        self._dtype = np.dtype(
            [
                (types.TOKEN_IDS, np.int64, num_tokens),
                (types.TOKEN_IS_PAD, np.bool_, num_tokens),
                (types.WORD_OF_TOKEN, np.int16, num_tokens),
                (types.WORD_IS_PAD, np.bool_, num_words),
                (types.MESH_FLAG, np.bool_, num_words),
                (types.ASSERTION, np.int8, num_words),
                (types.SENTENCE_ID, np.int16, num_words),
            ]
        )
        self._known: sqlite3.Connection | None = None
        self.num_encoded = 0

    def __call__(self, image_ids: Sequence[str], reports: Sequence[str]) -> TextRows:
        """The text of a block of samples."""
        known = self._file()
        packed: list[tuple[bytes, bytes]] = []
        new: list[tuple[str, bytes, bytes]] = []
        for image_id, report in zip(image_ids, reports, strict=True):
            found = known.execute("SELECT columns, mentions FROM reports WHERE id = ?", (image_id,)).fetchone()
            if found is None:
                found = self._encode(report)
                new.append((image_id, *found))
            packed.append(found)
        with contextlib.suppress(sqlite3.OperationalError), known:  # a full disk: encoded again the next time
            known.executemany("INSERT OR REPLACE INTO reports VALUES (?, ?, ?)", new)
        records_B = np.frombuffer(b"".join(columns for columns, _ in packed), dtype=self._dtype)
        names = self._dtype.names or ()
        return TextRows(
            columns={name: np.ascontiguousarray(records_B[name]) for name in names},
            mentions=Mentions([mentions for _, mentions in packed]),
        )

    def words_of(self, report: str, mention: Mention) -> NDArray[np.bool_]:
        """bool [W]: the words of one mention of the report, none where the token limit cuts it off."""
        return encode(report, self._tokenizer, [mention], [], self._num_tokens).mesh_flag_W

    def _encode(self, report: str) -> tuple[bytes, bytes]:
        mentions = self._tagger.tag(report)
        encoded = encode(report, self._tokenizer, mentions, split_sentences(report), self._num_tokens)
        record = np.empty(1, dtype=self._dtype)
        record[types.TOKEN_IDS] = encoded.token_ids_T
        record[types.TOKEN_IS_PAD] = encoded.token_is_pad_T
        record[types.WORD_OF_TOKEN] = encoded.word_of_token_T
        record[types.WORD_IS_PAD] = encoded.word_is_pad_W
        record[types.MESH_FLAG] = encoded.mesh_flag_W
        record[types.ASSERTION] = encoded.assertion_W
        record[types.SENTENCE_ID] = encoded.sentence_id_W
        self.num_encoded += 1
        return record.tobytes(), pickle.dumps([tuple(mention) for mention in mentions])

    def _file(self) -> sqlite3.Connection:
        """SQLite's temporary database: a file without a name, gone with the process."""
        if self._known is None:
            self._known = sqlite3.connect("", check_same_thread=False)
            for pragma in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{_CACHE_KB}"):
                self._known.execute(f"PRAGMA {pragma}")
            self._known.execute("CREATE TABLE reports (id TEXT PRIMARY KEY, columns BLOB, mentions BLOB)")
        return self._known


def text_rows(encoder: ReportEncoder | None, image_ids: Sequence[str], reports: Sequence[str]) -> TextRows:
    """The text of a block of samples; no columns where the run has no text encoder."""
    if encoder is None:
        return TextRows(columns={}, mentions=[[] for _ in image_ids])
    return encoder(image_ids, reports)
