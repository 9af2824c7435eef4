"""Side, zone and course of a finding from the modifier words that reach it; the words are in context.py."""

from __future__ import annotations

from bisect import bisect_left

from medim_ray.reports.context import EMPHASIS_WORDS, EXPLAINING_WORDS, MODIFIER_BOUNDARIES, MODIFIERS, PLACING_WORDS
from medim_ray.reports.scope import Found

__all__ = ["find_places"]

_Modifier = tuple[int, tuple[tuple[str, str], ...]]  # place of the token, (slot, value) pairs
_REACH = 14  # tokens between a modifier and a finding
_COMPARING = frozenset(("greater", "larger", "more", "worse", "smaller", "less"))
# What is said of a healthy part; a place before it and an "and" is told of nothing after it: "right lung is clear and".
_HEALTHY = frozenset(("clear", "normal", "unremarkable", "expanded", "aerated"))
_ANATOMY_REACH_BEFORE, _ANATOMY_REACH_AFTER = 3, 1  # "right mid and lower lung", "lungs bilaterally"


def find_places(found: list[Found], tokens: list[str]) -> list[dict[str, str]]:
    """Side, zone and course of each item, from the modifier words that reach it.

    A finding that explains another ("..., likely atelectasis") without a place of its own has the place of the other.
    """
    compared = [place for place, token in enumerate(tokens) if token in _COMPARING and _compares_sides(tokens, place)]
    modifiers = [
        (place, MODIFIERS[token])
        for place, token in enumerate(tokens)
        if token in MODIFIERS and place not in compared  # "larger than right" tells no course
    ]
    if not modifiers:
        return [{}] * len(found)
    slots: list[dict[str, str]] = []
    for number, item in enumerate(found):
        is_anatomy = item.category == "anatomy"
        before = _ANATOMY_REACH_BEFORE if is_anatomy else _REACH
        after = _ANATOMY_REACH_AFTER if is_anatomy else _REACH
        neighbours = found[max(0, number - _REACH) : number], found[number + 1 : number + 1 + _REACH]
        mine = _slots(item.first, item.stop, before, after, modifiers, tokens, *neighbours)
        if not is_anatomy and not item.absent and "side" not in mine and "zone" not in mine:
            anchor = _explained(item.first, tokens)
            if anchor is not None:
                explained = _slots(anchor, anchor, _REACH, 0, modifiers, tokens, [], [])
                mine = {**{slot: value for slot, value in explained.items() if slot != "course"}, **mine}
        if not is_anatomy and any(_is_compared(item, place, found[number + 1 :]) for place in compared):
            mine = {**mine, "side": "bilateral"}
        slots.append(mine)
    return slots


def _compares_sides(tokens: list[str], place: int) -> bool:
    """Whether "than" and a side follow: "left greater than right"."""
    after = [token for token in tokens[place + 1 : place + 5] if token not in ("on", "the")]
    return after[:1] == ["than"] and after[1:2] in (["left"], ["right"])


def _is_compared(item: Found, place: int, later: list[Found]) -> bool:
    """Whether the comparison of sides at `place` speaks of `item`: the nearest finding before it."""
    if not 0 <= place - item.stop <= _REACH:
        return False
    return not any(other.first < place for other in later if other.category != "anatomy")


def _explained(first: int, tokens: list[str]) -> int | None:
    """Where the text ends that the finding at token `first` explains: before "likely", "consistent with"."""
    for place in range(first - 1, max(0, first - _REACH) - 1, -1):
        if tokens[place] in EXPLAINING_WORDS:
            return place - 1 if place and tokens[place - 1] == "," else place
        if tokens[place] in MODIFIER_BOUNDARIES:
            return None
    return None


def _slots(
    first: int,
    stop: int,
    reach_before: int,
    reach_after: int,
    modifiers: list[_Modifier],
    tokens: list[str],
    earlier: list[Found],
    later: list[Found],
) -> dict[str, str]:
    """The nearest modifier of each slot; left and right on the same side of tokens [first, stop) are bilateral.

    What is said before an earlier finding ("right effusion and left atelectasis") is that one's, if there is a nearer
    word; so is what follows one up to an "and", where this one has its own place ("... and nodules in both bases").
    """
    best: dict[str, tuple[int, str]] = {}
    sides: dict[int, set[str]] = {-1: set(), 0: set(), 1: set()}  # before, inside, after
    begin = bisect_left(modifiers, (first - reach_before,))
    end = bisect_left(modifiers, (stop + reach_after,))
    has_own = _has_own_place(stop, tokens)
    others = [other.first for other in earlier if other.category != "anatomy"]
    for place, meanings in modifiers[begin:end]:
        where, gap, between = 0, 0, tokens[:0]
        if place < first:
            where, gap, between = -1, first - place, tokens[place + 1 : first]
            if "and" in between and not _HEALTHY.isdisjoint(between[: between.index("and")]):
                continue
            if has_own and "and" in between and any(other < place for other in others):
                continue
        elif place >= stop:
            where, gap, between = 1, place - stop + 1, tokens[stop:place]
            if _belongs_to(place, later, tokens, between):
                continue
        crossed = MODIFIER_BOUNDARIES.intersection(between)
        is_emphasis = where == 1 and crossed == {","} and not EMPHASIS_WORDS.isdisjoint(between)
        for slot, value in meanings:
            if crossed and not is_emphasis and not (slot == "course" and where == 1 and crossed == {","}):
                continue  # of all slots only the course may follow a bare comma: "mild edema, improved"
            if slot == "side" and not (where == -1 and any(place < other < first for other in others)):
                sides[where].add(value)
            if slot not in best or gap < best[slot][0]:
                best[slot] = (gap, value)
    slots = {slot: value for slot, (_, value) in best.items()}
    if any({"left", "right"} <= group for group in sides.values()):
        slots["side"] = "bilateral"
    return slots


def _has_own_place(stop: int, tokens: list[str]) -> bool:
    """Whether "in", "at" and a word of place follow token `stop`."""
    if stop >= len(tokens) or tokens[stop] not in PLACING_WORDS:
        return False
    for token in tokens[stop + 1 : stop + 6]:
        if token in MODIFIER_BOUNDARIES:
            return False
        if any(slot in ("side", "zone") for slot, _ in MODIFIERS.get(token, ())):
            return True
    return False


def _belongs_to(place: int, later: list[Found], tokens: list[str], between: list[str]) -> bool:
    """Whether the word at `place` is said of a finding in `later`: it stands right before it, or after its "with"."""
    for other in later:
        if other.first - place > 2:
            return False
        is_before = other.first > place and tokens[place + 1] not in EXPLAINING_WORDS
        if other.category != "anatomy" and (is_before or (other.first < place and "with" in between)):
            return True
    return False
