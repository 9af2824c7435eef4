"""What the cues of one sentence say about its matches: absent, uncertain, known from before, past.

One walk from left to right (after ConText, see context.py); chest_rules and places are applied later.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from medim_ray.reports.clauses import CLAUSE_ENDS, COLONS, begins_statement
from medim_ray.reports.context import Cue
from medim_ray.reports.lexicon import Leaf, Match
from medim_ray.reports.mesh import Heading

__all__ = ["Found", "apply_cues", "name_of"]

_KNOWN_REACH = 6  # tokens: "stable small left effusion"
_NORMAL_REACH = 3  # tokens: "normal vascular markings"
_PARTS = CLAUSE_ENDS | {",", "and", "or", "but"}
_NO = frozenset((Cue.ABSENT_AFTER, Cue.ABSENT_BEFORE, Cue.NORMAL))
_PAST_ENDS = frozenset(("with", "now", "new", "currently", "presenting"))
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
    for number, (first, stop, leaf) in enumerate(matches):
        between = tokens[previous:first]
        walk.subject = []
        if between:
            walk.pass_words(tokens, previous, first)
        previous = stop
        if leaf.cues:
            ahead = _is_followed(islice(matches, number + 1, None), tokens, stop)
            for cue in leaf.cues:
                walk.apply(cue, leaf.cues, stop, "," in between, ahead)
        for heading, category, state in _meanings(leaf):
            walk.add(first, stop, heading, category, state)
    return walk.found


def _is_followed(later: Iterable[Match], tokens: list[str], stop: int) -> bool:
    """Whether what the cue that ends at token `stop` may speak of follows it, in the same part of the sentence."""
    for first, _, leaf in later:
        if not _PARTS.isdisjoint(tokens[stop:first]):
            return False
        if leaf.heading is not None or leaf.indexed is not None or leaf.state:
            return True
    return False


@dataclass(slots=True)
class _Walk:
    """The scopes that are open at one place of the sentence."""

    found: list[Found] = field(default_factory=list)
    absent: bool = False
    uncertain: bool = False
    past: bool = False
    known_until: int = -1
    normal_until: int = -1
    subject: list[Found] = field(default_factory=list)  # what a colon or a dash right before here says more about
    segment: int = 0  # the first item that a backward cue may reach
    clause: int = 0
    phrase: int = 0

    def end_scopes(self) -> None:
        self.absent = self.uncertain = self.past = False
        self.known_until = -1
        self.segment = len(self.found)

    def end_clause(self) -> None:
        self.end_scopes()
        self.clause += 1

    def pass_words(self, tokens: list[str], previous: int, first: int) -> None:
        """The words tokens[previous:first] between two matches: punctuation, the start of an independent statement,
        and the article that shows a lost full stop ("no pneumothorax the lungs are")."""
        between = tokens[previous:first]
        last = self.found[-1] if self.found else None
        follows = last is not None and last.stop == previous
        is_finding = last is not None and last.category != "anatomy"
        if between[0] in COLONS:
            if follows and is_finding and first == previous + 1:
                self.subject = self.found[-1:]  # "pneumothorax: none"
            if follows and not is_finding:
                self.end_scopes()  # "heart: enlarged"
            else:
                self.end_clause()
        elif (
            not CLAUSE_ENDS.isdisjoint(between)
            or (between[0] == "the" and follows and is_finding)
            or self._is_new_statement(tokens, previous, first)
        ):
            self.end_clause()
        if self.past and not _PAST_ENDS.isdisjoint(between):
            self.past = False
        if "new" in between:
            self.known_until = -1
        if "," in between:
            self.known_until = self.normal_until = -1
            self.phrase += 1

    def _is_new_statement(self, tokens: list[str], previous: int, first: int) -> bool:
        """Whether the open scope has had its finding, and something else is said from here on."""
        is_adjective = len(self.found) == self.segment and tokens[previous] == ","  # "no acute, displaced fracture"
        if is_adjective or not (self.absent or self.uncertain):
            return False
        return any(begins_statement(tokens, at) for at in range(previous, first))

    def apply(self, cue: Cue, cues: tuple[Cue, ...], stop: int, after_comma: bool, ahead: bool) -> None:
        """Open or close scopes; a phrase that can look both ways looks back where there is something to see.

        ahead: what the cue may speak of follows it at once: "effusion, less likely pneumonia", "and possible effusion".
        """
        if self.subject and cue in _NO and not ahead:
            for item in self.subject:
                item.absent = True
            return
        reach = self.found[self.segment :]
        has_finding = any(item.category != "anatomy" for item in reach)
        if cue is Cue.END:
            self.end_clause()
        elif cue is Cue.ABSENT_AFTER:
            if not reach or Cue.ABSENT_BEFORE not in cues or (after_comma and ahead):
                self.absent, self.uncertain = True, False
                self.segment = len(self.found)
        elif cue is Cue.ABSENT_BEFORE:
            for item in () if Cue.ABSENT_AFTER in cues and after_comma and ahead else reach:
                item.absent |= has_finding  # "the lungs have cleared" negates nothing
        elif cue is Cue.UNCERTAIN_AFTER or cue is Cue.DIFFERENTIAL:
            if not reach or Cue.UNCERTAIN_BEFORE not in cues or ahead:
                self.absent, self.uncertain = self.absent and not after_comma, True
                if cue is Cue.DIFFERENTIAL and reach:
                    reach[-1].uncertain = True
        elif cue is Cue.UNCERTAIN_BEFORE:
            for item in () if Cue.UNCERTAIN_AFTER in cues and ahead else reach:
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
        item = Found(first, stop, heading, category, state, self.clause, self.phrase, absent=self.absent)
        if category != "anatomy":
            item.absent |= first < self.normal_until and _is_describable(item)
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
