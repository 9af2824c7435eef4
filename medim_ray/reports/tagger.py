"""Mentions of vocabulary headings in a report: where, present or not, on which side, and what an indexer would index.

Rules only, no weights: lexicon.py matches, scope.py applies cues, organs.py finds abnormal anatomy, places.py sides.
"""

from __future__ import annotations

from typing import NamedTuple

from medim_ray.reports.lexicon import TOKEN, Lexicon
from medim_ray.reports.mesh import Vocabulary
from medim_ray.reports.organs import OrganLinker
from medim_ray.reports.places import find_places
from medim_ray.reports.scope import Found, apply_cues
from medim_ray.reports.sections import Sentence, blank_markup, split_sentences

__all__ = ["Mention", "Tagger", "indexed_headings"]


class Mention(NamedTuple):
    """One mention: `text` is `report[start:end]` in characters.

    category: 'anatomy', 'finding', 'device', 'procedure', 'technique', 'quality' or 'other'. A finding of abnormal
    anatomy ("flattened" beside "diaphragms") carries the organ's heading and the category 'finding'.
    assertion: 'present', 'absent', 'uncertain' or 'prior' (known from before: unchanged, or history of).
    side: 'left', 'right', 'bilateral' or ''. zone: 'upper', 'middle', 'lower', 'apical', 'basal', 'perihilar',
    'retrocardiac', 'mediastinal' or ''. course: 'new', 'worse', 'improved', 'stable', 'past', 'acute', 'chronic' or ''.
    negated: the words stand in a negated statement: of a finding, that it is absent; of anatomy, which is present all
    the same, that it tells where something is absent ("no opacity in the left lung").
    """

    start: int
    end: int
    text: str
    heading: str
    tree_numbers: tuple[str, ...]
    category: str
    assertion: str
    side: str
    zone: str
    course: str
    sentence: int
    negated: bool


_INDEXED_CATEGORIES = frozenset(("finding", "device", "procedure", "quality"))


class Tagger:
    """Finds mentions with a `Vocabulary` (the bundled chest vocabulary by default). Stateless after construction."""

    def __init__(self, vocabulary: Vocabulary | None = None) -> None:
        self.vocabulary = Vocabulary.default() if vocabulary is None else vocabulary
        self._lexicon = Lexicon(self.vocabulary)
        self._linker = OrganLinker(self.vocabulary)

    def tag(self, text: str) -> list[Mention]:
        """All mentions in order of their place. No str raises: empty, foreign and broken text has few or none."""
        plain = blank_markup(text)
        lower = plain.lower()
        if len(lower) != len(text):  # a few characters grow when lowered, which would shift the offsets
            lower = "".join(char.lower() if char.isascii() else char for char in plain)
        mentions: list[Mention] = []
        for index, sentence in enumerate(split_sentences(text)):
            mentions += self._tag_sentence(text, lower, sentence, index)
        return mentions

    def headings(self, text: str) -> list[str]:
        """What an indexer would index: headings that are abnormal and there, each once, in order of first mention."""
        return indexed_headings(self.tag(text))

    def _tag_sentence(self, text: str, lower: str, sentence: Sentence, index: int) -> list[Mention]:
        tokens: list[str] = TOKEN.findall(lower, sentence.start, sentence.end)
        matches = self._lexicon.matches(tokens)
        if not matches:
            return []
        found = self._linker.link(apply_cues(matches, tokens))
        if sentence.text.endswith("?"):
            for item in found:
                item.uncertain = True
        starts, place = [], sentence.start
        for token in tokens:  # between tokens stand only characters that begin none, so `find` meets each in its place
            place = lower.find(token, place)
            starts.append(place)
            place += len(token)
        mentions = []
        for item, slots in zip(found, find_places(found, tokens), strict=True):
            heading = item.heading
            assert heading is not None
            start, end = starts[item.first], starts[item.stop - 1] + len(tokens[item.stop - 1])
            mentions.append(
                Mention(
                    start, end, text[start:end], heading.name, heading.tree_numbers, item.category, _assertion(item),
                    slots.get("side", ""), slots.get("zone", ""), _course(item, slots), index, item.absent,
                )
            )  # fmt: skip
        return mentions


def indexed_headings(mentions: list[Mention]) -> list[str]:
    """The headings that an indexer would give a report with these mentions: what is said to be there, new or known."""
    return list(
        dict.fromkeys(
            mention.heading
            for mention in mentions
            if mention.category in _INDEXED_CATEGORIES
            and mention.assertion in ("present", "prior")
            and mention.course != "past"
        )
    )


def _assertion(item: Found) -> str:
    if item.category == "anatomy":
        return "present"
    if item.absent:
        return "absent"
    if item.past:
        return "prior"
    if item.uncertain:
        return "uncertain"
    return "prior" if item.known else "present"


def _course(item: Found, slots: dict[str, str]) -> str:
    if item.category == "anatomy":
        return ""
    if item.past:
        return "past"
    return slots.get("course", "stable" if item.known else "")
