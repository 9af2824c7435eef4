"""Mentions of vocabulary headings in a report: where, present or not, on which side, and what an indexer would index.

Rules only, no weights: lexicon.py finds, context.py holds the cues, chest_rules.py the abnormal anatomy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from medim_ray.reports.chest_rules import STATE_RULES
from medim_ray.reports.chest_terms import table_rows
from medim_ray.reports.context import MODIFIERS, Cue
from medim_ray.reports.lexicon import TOKEN, Leaf, Lexicon, Match
from medim_ray.reports.mesh import Heading, Vocabulary
from medim_ray.reports.sections import Sentence, split_sentences

__all__ = ["Mention", "Tagger", "indexed_headings"]


class Mention(NamedTuple):
    """One mention: `text` is `report[start:end]` in characters.

    category: 'anatomy', 'finding', 'device', 'procedure', 'technique', 'quality' or 'other'. A finding of abnormal
    anatomy ("flattened" beside "diaphragms") carries the organ's heading and the category 'finding'.
    assertion: 'present', 'absent', 'uncertain' or 'prior' (known from before: unchanged, or history of).
    side: 'left', 'right', 'bilateral' or ''. zone: 'upper', 'middle', 'lower', 'apical', 'basal', 'perihilar',
    'retrocardiac', 'mediastinal' or ''. course: 'new', 'worse', 'improved', 'stable', 'past', 'acute', 'chronic' or ''.
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


@dataclass(slots=True)
class _Found:
    """A match that will become a mention: tokens [first, stop), and what the cues made of it so far."""

    first: int
    stop: int
    heading: Heading | None  # None for a state that still looks for its anatomy
    category: str
    state: str
    clause: int
    phrase: int  # number of the part between commas
    absent: bool = False
    uncertain: bool = False
    known: bool = False
    past: bool = False


_INDEXED_CATEGORIES = frozenset(("finding", "device", "procedure", "quality"))
_KNOWN_REACH = 6  # tokens: "stable small left effusion"
_NORMAL_REACH = 3  # tokens: "normal vascular markings"
_STATE_REACH = 8  # tokens: "degenerative changes are again seen throughout the thoracic spine"
_SIDE_REACH = 7  # tokens
_COMPOUND_REACH = 7  # tokens: "calcified mediastinal and right hilar granulomas"
_COMPOUNDS = {("Calcinosis", "Granuloma"): "Calcified Granuloma"}


class Tagger:
    """Finds mentions with a `Vocabulary` (the bundled chest vocabulary by default). Stateless after construction."""

    def __init__(self, vocabulary: Vocabulary | None = None) -> None:
        self.vocabulary = Vocabulary.default() if vocabulary is None else vocabulary
        self._lexicon = Lexicon(self.vocabulary)
        headings = self.vocabulary.headings
        self._organ_of_state: dict[str, dict[str, list[Heading]]] = {}
        for name, (anatomies, states) in _state_rules():
            for state in states if name in headings else ():
                for anatomy in anatomies:
                    self._organ_of_state.setdefault(state, {}).setdefault(anatomy, []).append(headings[name])

    def tag(self, text: str) -> list[Mention]:
        """All mentions in order of their place. No str raises: empty, foreign and broken text has few or none."""
        lower = text.lower()
        if len(lower) != len(text):  # a few characters grow when lowered, which would shift the offsets
            lower = "".join(char.lower() if char.isascii() else char for char in text)
        mentions: list[Mention] = []
        for index, sentence in enumerate(split_sentences(text)):
            mentions += self._tag_sentence(text, lower, sentence, index)
        return mentions

    def headings(self, text: str) -> list[str]:
        """What an indexer would index: headings that are abnormal and there, each once, in order of first mention."""
        return indexed_headings(self.tag(text))

    def _tag_sentence(self, text: str, lower: str, sentence: Sentence, index: int) -> list[Mention]:
        tokens: list[str] = []
        starts: list[int] = []
        for match in TOKEN.finditer(lower, sentence.start, sentence.end):
            tokens.append(match[0])
            starts.append(match.start())
        matches = self._lexicon.matches(tokens)
        if not matches:
            return []
        found = _assert(matches, tokens)
        found = self._link_states(self._join_compounds(found))
        found.sort(key=lambda item: item.first)
        modifiers = [(place, MODIFIERS[token]) for place, token in enumerate(tokens) if token in MODIFIERS]
        mentions = []
        for item in found:
            heading = item.heading
            assert heading is not None
            start, end = starts[item.first], starts[item.stop - 1] + len(tokens[item.stop - 1])
            slots = _slots(item, modifiers) if modifiers else {}
            course = "past" if item.past else slots.get("course", "stable" if item.known else "")
            mentions.append(
                Mention(
                    start, end, text[start:end], heading.name, heading.tree_numbers, item.category, _assertion(item),
                    slots.get("side", ""), slots.get("zone", ""), course, index,
                )
            )  # fmt: skip
        return mentions

    def _join_compounds(self, found: list[_Found]) -> list[_Found]:
        """Join the parts of a compound that anatomy separates: "calcified right lower lobe granuloma"."""
        joined: list[_Found] = []
        for item in found:
            for part in reversed(joined):
                if part.clause != item.clause or item.first - part.stop > _COMPOUND_REACH:
                    break
                if part.category == "anatomy":
                    continue
                name = _COMPOUNDS.get((_name(part), _name(item)), "")
                if name in self.vocabulary.headings:
                    joined.remove(part)
                    item.first, item.heading = part.first, self.vocabulary.headings[name]
                break
            joined.append(item)
        return joined

    def _link_states(self, found: list[_Found]) -> list[_Found]:
        """Turn each state into findings of the anatomies that it describes; states without one are dropped."""
        if not any(item.state for item in found):
            return [item for item in found if item.heading is not None]
        linked: list[_Found] = []
        for place, item in enumerate(found):
            if not item.state:
                if item.heading is not None:
                    linked.append(item)
                continue
            organs = self._organ_of_state.get(item.state, {})
            for heading in _described(found, place, organs):
                linked.append(
                    _Found(
                        item.first,
                        item.stop,
                        heading,
                        "finding",
                        "",
                        item.clause,
                        item.phrase,
                        item.absent,
                        item.uncertain,
                        item.known,
                        item.past,
                    )
                )
        return linked


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


def _state_rules() -> list[tuple[str, tuple[list[str], list[str]]]]:
    rules = []
    for name, entries in table_rows(STATE_RULES):
        anatomies, _, states = ";".join(entries).partition("|")
        rules.append((name, ([a.strip() for a in anatomies.split(";")], [s.strip() for s in states.split(";")])))
    return rules


def _described(found: list[_Found], place: int, organs: dict[str, list[Heading]]) -> list[Heading]:
    """Headings of the anatomies that the state at `place` describes: those close after it, else the nearest before."""
    state = found[place]
    is_loose = state.state == "degenerative"  # "degenerative changes, most marked in the lower thoracic spine"
    after: list[Heading] = []
    distance = _STATE_REACH
    for item in found[place + 1 :]:
        if item.clause != state.clause or item.first - state.stop > _STATE_REACH:
            break
        if item.phrase != state.phrase and not is_loose:
            break
        if item.heading is None:
            continue
        if item.category != "anatomy":
            if state.state in _TAKEN_STATES and item.first - state.stop <= _TAKEN_STATES[state.state] and not after:
                return []  # "enlarged nodule", "degenerative spurring": the finding takes the state
            continue
        if item.heading.name in organs and not (state.state == "enlarged" and _modifies_finding(found, place, item)):
            distance = min(distance, item.first - state.stop)
            after += organs[item.heading.name]
    before: list[Heading] = []
    for item in reversed(found[:place]):
        if item.clause != state.clause or state.first - item.stop > _STATE_REACH:
            break
        if item.heading is not None and item.category == "anatomy" and item.heading.name in organs:
            before = organs[item.heading.name]
            break
    if is_loose:
        return _most_specific(after + before)
    return list(dict.fromkeys(after if after and (distance <= 3 or not before) else before))


# States that belong to a finding right after them, and how many tokens may stand between.
_TAKEN_STATES = {"enlarged": 1, "degenerative": 0, "lowered": 1, "raised": 1}


def _modifies_finding(found: list[_Found], place: int, anatomy: _Found) -> bool:
    """ "Prominent interstitial opacities": the anatomy is part of a finding that follows at once."""
    return any(
        item.category != "anatomy" and not item.state and 0 <= item.first - anatomy.stop <= 1
        for item in found[place + 1 :]
    )


def _most_specific(headings: list[Heading]) -> list[Heading]:
    """ "Endplate" and "disc" say spine; a region of the spine nearby says more."""
    has_region = any(heading.name.endswith("Vertebrae") for heading in headings)
    return [heading for heading in dict.fromkeys(headings) if not (has_region and heading.name == "Spine")]


def _assert(matches: list[Match], tokens: list[str]) -> list[_Found]:
    """Walk the matches of one sentence in order and apply the cues to the findings in their scope."""
    found: list[_Found] = []
    absent = uncertain = past = False
    known_until = normal_until = -1
    segment = clause = phrase = 0  # first finding that a backward cue may reach; numbers of clause and phrase
    previous = 0
    for first, stop, leaf in matches:
        between = tokens[previous:first]
        has_comma = "," in between
        if ";" in between or ":" in between:
            absent = uncertain = past = False
            segment, clause = len(found), clause + 1
        if between and between[0] == "the" and found and found[-1].stop == previous and found[-1].category != "anatomy":
            absent = uncertain = past = False  # a lost full stop: "no pneumothorax the lungs are"
            segment, clause = len(found), clause + 1
        if has_comma:
            known_until = normal_until = -1
            phrase += 1
        previous = stop
        for cue in leaf.cues:
            has_before = len(found) > segment
            if cue is Cue.END:
                absent = uncertain = past = False
                known_until = -1
                segment, clause = len(found), clause + 1
            elif cue is Cue.ABSENT_AFTER:
                if Cue.ABSENT_BEFORE in leaf.cues and has_before:
                    continue
                absent, uncertain = True, False
                segment = len(found)
            elif cue is Cue.ABSENT_BEFORE:
                for item in found[segment:]:
                    item.absent = True
            elif cue is Cue.UNCERTAIN_AFTER or cue is Cue.DIFFERENTIAL:
                if Cue.UNCERTAIN_BEFORE in leaf.cues and has_before:
                    continue
                absent = absent and not has_comma
                uncertain = True
                if cue is Cue.DIFFERENTIAL and has_before:
                    found[-1].uncertain = True
            elif cue is Cue.UNCERTAIN_BEFORE:
                for item in found[segment:]:
                    item.uncertain, item.absent = True, False
            elif cue is Cue.KNOWN:
                known_until = stop + _KNOWN_REACH
                if has_before and not has_comma:
                    for item in found[segment:]:
                        item.known = True
            elif cue is Cue.PAST_AFTER:
                past = True
            elif cue is Cue.PAST_BEFORE:
                for item in found[segment:]:
                    item.past = True
            elif cue is Cue.NORMAL:
                normal_until = stop + _NORMAL_REACH
                for item in found[segment:]:
                    item.absent = item.absent or _is_describable(item)
        for heading, category, state in _meanings(leaf):
            item = _Found(first, stop, heading, category, state, clause, phrase)
            if category != "anatomy":
                item.absent = absent or (first < normal_until and _is_describable(item))
                item.uncertain, item.past, item.known = uncertain, past, first < known_until
            found.append(item)
    return found


def _meanings(leaf: Leaf) -> Iterator[tuple[Heading | None, str, str]]:
    """(heading, category, state) of each thing that a match stands for."""
    if leaf.indexed is not None:
        yield leaf.indexed, "finding", ""
    elif leaf.heading is not None:
        yield leaf.heading, leaf.heading.category, ""
    if leaf.state:
        yield None, "finding", leaf.state


# Findings that can be normal: "vascular markings are normal".
_DESCRIBABLE = frozenset(("Markings", "Density", "Epicardial Fat", "Pulmonary Congestion"))


def _name(item: _Found) -> str:
    return item.heading.name if item.heading is not None else ""


def _is_describable(item: _Found) -> bool:
    return bool(item.state) or _name(item) in _DESCRIBABLE


def _assertion(item: _Found) -> str:
    if item.absent:
        return "absent"
    if item.past:
        return "prior"
    if item.uncertain:
        return "uncertain"
    return "prior" if item.known else "present"


def _slots(item: _Found, modifiers: list[tuple[int, tuple[tuple[str, str], ...]]]) -> dict[str, str]:
    """Side, zone and course from the nearest modifier words; left and right together are bilateral."""
    best: dict[str, tuple[int, str]] = {}
    sides = set()
    for place, meanings in modifiers:
        if place < item.first:
            distance = item.first - place
        elif place >= item.stop:
            distance = place - item.stop + 2  # a word before its noun binds closer
        else:
            distance = 0
        if distance > _SIDE_REACH:
            continue
        for slot, value in meanings:
            if slot == "side" and distance <= 3:
                sides.add(value)
            if slot not in best or distance < best[slot][0]:
                best[slot] = (distance, value)
    slots = {slot: value for slot, (_, value) in best.items()}
    if "left" in sides and "right" in sides:
        slots["side"] = "bilateral"
    return slots
