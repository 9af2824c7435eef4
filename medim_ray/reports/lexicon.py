"""One token trie over everything the tagger looks for: terms, cues, states and phrases, with plurals understood.

Matching only: longest match, left to right, no overlap. What a match means is decided in tagger.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from medim_ray.reports.chest_rules import ABNORMAL_PHRASES, STATE_TERMS
from medim_ray.reports.chest_terms import table_rows
from medim_ray.reports.context import CUE_TERMS, Cue
from medim_ray.reports.mesh import Heading, Vocabulary

__all__ = ["TOKEN", "Leaf", "Lexicon", "Match", "singular", "tokenize"]

TOKEN = re.compile(r"[^\W\d_]+|\d+(?:\.\d+)?|\(-\)|(?<=\s)[-\u2013\u2014](?=\s)|[,;:()/?]")
_UNKNOWN = "\0"  # a word of no term
_LEAF = ""  # key of the leaf inside a trie node; no token is empty

# Headings and entry terms that are modifiers or everyday words in a report, whatever a vocabulary says.
_STOP_WORDS = """
acute age all area arm association back body burn burns cat chronic cold comparison disease
diseases evaluation examination exposure face female fever film films fit foot hand head health history
injuries injury lead leads left leg level light line lines lower male measurement men method methods middle
normal observation old other pain patient patients position pressure projection recurrence region report
reports rest right role sign signs size studies study symptoms syndrome technique techniques test tests time
tip tissue tissues upper view volume weight weights women wound
"""
_STOP_TERMS = frozenset([*_STOP_WORDS.split(), "acute disease", "chronic disease"])
_IRREGULAR = {
    "vertebrae": "vertebra",
    "bronchi": "bronchus",
    "atria": "atrium",
    "apices": "apex",
    "hila": "hilum",
    "bullae": "bulla",
    "pleurae": "pleura",
    "pneumothoraces": "pneumothorax",
    "hemithoraces": "hemithorax",
    "metastases": "metastasis",
    "prostheses": "prosthesis",
    "diagnoses": "diagnosis",
    "emboli": "embolus",
    "thrombi": "thrombus",
    "foci": "focus",
    "sulci": "sulcus",
    "bases": "base",
    "granulomata": "granuloma",
    "humeri": "humerus",
    "diseases": "disease",
    "atelectases": "atelectasis",
    "stenoses": "stenosis",
    "scolioses": "scoliosis",
    "calculi": "calculus",
}
_PLURALS: dict[str, tuple[str, ...]] = {}
for _plural, _singular in _IRREGULAR.items():
    _PLURALS[_singular] = (*_PLURALS.get(_singular, ()), _plural)


@dataclass(slots=True)
class Leaf:
    """What one matched token sequence may mean; a meaning that does not apply is None or empty."""

    heading: Heading | None = None
    indexed: Heading | None = None  # an abnormal-anatomy phrase: what it indexes
    state: str = ""
    cues: tuple[Cue, ...] = ()


Match = tuple[int, int, Leaf]  # first token, token after the last, meaning


def tokenize(text: str) -> list[str]:
    """Lower-case words, numbers and the punctuation that matters for scope; hyphens separate words."""
    return TOKEN.findall(text.lower())


class Lexicon:
    """The compiled trie of one vocabulary plus the fixed cue, state and phrase tables."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._root: dict[str, Any] = {}
        self._canonical: dict[str, str] = {}
        for term, heading in vocabulary.terms():
            is_inverted = ", " in term  # nobody writes "Catheters, Indwelling" in a report
            if not is_inverted and term.lower() not in _STOP_TERMS and len(term) > 1:
                leaf = self._leaf(term)
                leaf.heading = leaf.heading or heading  # of two headings with the same term the first one wins
        for name, phrases in table_rows(ABNORMAL_PHRASES):
            for phrase in phrases if name in vocabulary.headings else ():
                self._leaf(phrase).indexed = vocabulary.headings[name]
        for state, phrases in table_rows(STATE_TERMS):
            for phrase in phrases:
                self._leaf(phrase).state = state
        for phrase, cue in CUE_TERMS:
            leaf = self._leaf(phrase)
            leaf.cues = (*leaf.cues, cue)

    def _leaf(self, phrase: str) -> Leaf:
        node = self._root
        for token in tokenize(phrase):
            canonical = singular(token)
            for variant in (
                token,
                canonical,
                canonical + "s",
                canonical + "es",
                canonical[:-1] + "ies",
                *_PLURALS.get(canonical, ()),
            ):
                if singular(variant) == canonical:
                    self._canonical[variant] = canonical
            node = node.setdefault(canonical, {})
        leaf: Leaf = node.setdefault(_LEAF, Leaf())
        return leaf

    def matches(self, tokens: list[str]) -> list[Match]:
        """Longest matches, left to right, without overlap; O(tokens) for a vocabulary of any size."""
        root, canonical = self._root, self._canonical
        words = [canonical.get(token, _UNKNOWN) for token in tokens]
        found: list[Match] = []
        position, num_tokens = 0, len(words)
        while position < num_tokens:
            node = root.get(words[position])
            if node is None:
                position += 1
                continue
            end, leaf, stop = position, node.get(_LEAF), position + 1
            if leaf is not None:
                stop = end = position + 1
            ahead = position + 1
            while ahead < num_tokens:
                node = node.get(words[ahead])
                if node is None:
                    break
                ahead += 1
                if _LEAF in node:
                    leaf, stop = node[_LEAF], ahead
                    end = ahead
            if end > position:
                found.append((position, end, leaf))
            position = stop
        return found


def singular(word: str) -> str:
    """The singular of an English or Latin plural that ends like one; other words unchanged."""
    known = _IRREGULAR.get(word)
    if known is not None:
        return known
    if len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith(("sses", "shes", "ches", "xes")):
        return word[:-2]
    return word[:-1]
