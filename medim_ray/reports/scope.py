"""What the cues of one sentence say about its matches: absent, uncertain, known from before, past.

One walk from left to right (after ConText, see context.py); chest_rules and places are applied later.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from medim_ray.reports.context import Cue
from medim_ray.reports.lexicon import Leaf, Match
from medim_ray.reports.mesh import Heading

__all__ = ["Found", "apply_cues", "name_of"]

_KNOWN_REACH = 6  # tokens: "stable small left effusion"
_NORMAL_REACH = 3  # tokens: "normal vascular markings"
# Findings that can be normal ("vascular markings are normal"); states ("prominent") can be, too.
_DESCRIBABLE = frozenset(("Markings", "Density", "Epicardial Fat", "Pulmonary Congestion"))


@dataclass(slots=True)
class Found:
    """A match that may become a mention: tokens [first, stop), and what the cues made of it so far."""

    first: int
    stop: int
    heading: Heading | None  # None for a state ("tortuous") that still looks for its anatomy
    category: str
    state: str
    clause: int  # number of the clause in the sentence
    phrase: int  # number of the part between commas
    absent: bool = False
    uncertain: bool = False
    known: bool = False
    past: bool = False


def name_of(item: Found) -> str:
    """The heading's name, '' for a state."""
    return item.heading.name if item.heading is not None else ""


def apply_cues(matches: list[Match], tokens: list[str]) -> list[Found]:
    """The findings, anatomies and states among the matches of one sentence, in order, with their assertion."""
    walk = _Walk()
    previous = 0
    for first, stop, leaf in matches:
        between = tokens[previous:first]
        if between:
            walk.pass_words(between, previous)
        previous = stop
        for cue in leaf.cues:
            walk.apply(cue, leaf.cues, stop, "," in between)
        for heading, category, state in _meanings(leaf):
            walk.add(first, stop, heading, category, state)
    return walk.found


@dataclass(slots=True)
class _Walk:
    """The scopes that are open at one place of the sentence."""

    found: list[Found] = field(default_factory=list)
    absent: bool = False
    uncertain: bool = False
    past: bool = False
    known_until: int = -1
    normal_until: int = -1
    segment: int = 0  # the first item that a backward cue may reach
    clause: int = 0
    phrase: int = 0

    def end_clause(self) -> None:
        self.absent = self.uncertain = self.past = False
        self.known_until = -1
        self.segment = len(self.found)
        self.clause += 1

    def pass_words(self, between: list[str], previous: int) -> None:
        """Punctuation between matches, and the article that shows a lost full stop: "no pneumothorax the lungs are"."""
        last = self.found[-1] if self.found else None
        follows_finding = last is not None and last.stop == previous and last.category != "anatomy"
        if ";" in between or ":" in between or (between[0] == "the" and follows_finding):
            self.end_clause()
        if "," in between:
            self.known_until = self.normal_until = -1
            self.phrase += 1

    def apply(self, cue: Cue, cues: tuple[Cue, ...], stop: int, after_comma: bool) -> None:
        """Open or close scopes; a phrase that can look both ways looks back where there is something to see."""
        reach = self.found[self.segment :]
        if cue is Cue.END:
            self.end_clause()
        elif cue is Cue.ABSENT_AFTER:
            if not (reach and Cue.ABSENT_BEFORE in cues):
                self.absent, self.uncertain = True, False
                self.segment = len(self.found)
        elif cue is Cue.ABSENT_BEFORE:
            for item in reach:
                item.absent = True
        elif cue is Cue.UNCERTAIN_AFTER or cue is Cue.DIFFERENTIAL:
            if not (reach and Cue.UNCERTAIN_BEFORE in cues):
                self.absent, self.uncertain = self.absent and not after_comma, True
                if cue is Cue.DIFFERENTIAL and reach:
                    reach[-1].uncertain = True
        elif cue is Cue.UNCERTAIN_BEFORE:
            for item in reach:
                item.uncertain, item.absent = True, False
        elif cue is Cue.KNOWN:
            self.known_until = stop + _KNOWN_REACH
            for item in () if after_comma else reach:
                item.known = True
        elif cue is Cue.PAST_AFTER:
            self.past = True
        elif cue is Cue.PAST_BEFORE:
            for item in reach:
                item.past = True
        elif cue is Cue.NORMAL:
            self.normal_until = stop + _NORMAL_REACH
            if reach and reach[-1].phrase == self.phrase and _is_describable(reach[-1]):
                reach[-1].absent = True

    def add(self, first: int, stop: int, heading: Heading | None, category: str, state: str) -> None:
        item = Found(first, stop, heading, category, state, self.clause, self.phrase)
        if category != "anatomy":
            item.absent = self.absent or (first < self.normal_until and _is_describable(item))
            item.uncertain, item.past, item.known = self.uncertain, self.past, first < self.known_until
        self.found.append(item)


def _meanings(leaf: Leaf) -> Iterator[tuple[Heading | None, str, str]]:
    """(heading, category, state) of each thing that a match stands for."""
    if leaf.indexed is not None:
        yield leaf.indexed, "finding", ""
    elif leaf.heading is not None:
        yield leaf.heading, leaf.heading.category, ""
    if leaf.state:
        yield None, "finding", leaf.state


def _is_describable(item: Found) -> bool:
    return bool(item.state) or name_of(item) in _DESCRIBABLE
