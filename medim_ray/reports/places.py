"""Side, zone and course of a finding from the modifier words that reach it."""

from __future__ import annotations

from bisect import bisect_left

from medim_ray.reports.context import EXPLAINING_WORDS, MODIFIER_BOUNDARIES, MODIFIERS
from medim_ray.reports.scope import Found

__all__ = ["find_places"]

_Modifier = tuple[int, tuple[tuple[str, str], ...]]  # place of the token, (slot, value) pairs
_REACH = 7  # tokens between a modifier and a finding
_ANATOMY_REACH_BEFORE, _ANATOMY_REACH_AFTER = 3, 1  # "right mid and lower lung", "lungs bilaterally"


def find_places(found: list[Found], tokens: list[str]) -> list[dict[str, str]]:
    """Side, zone and course of each item, from the modifier words that reach it."""
    modifiers = [(place, MODIFIERS[token]) for place, token in enumerate(tokens) if token in MODIFIERS]
    if not modifiers:
        return [{}] * len(found)
    slots: list[dict[str, str]] = []
    owner: int | None = None  # the finding that an explanation after it belongs to
    for number, item in enumerate(found):
        mine = _slots(number, modifiers, tokens, found)
        if item.category != "anatomy":
            if owner is not None and not item.absent and "side" not in mine and "zone" not in mine:
                between = tokens[found[owner].stop : item.first]
                if found[owner].clause == item.clause and not EXPLAINING_WORDS.isdisjoint(between):
                    mine = {**{slot: slots[owner][slot] for slot in ("side", "zone") if slot in slots[owner]}, **mine}
            owner = None if item.absent else number
        slots.append(mine)
    return slots


def _slots(number: int, modifiers: list[_Modifier], tokens: list[str], found: list[Found]) -> dict[str, str]:
    """The nearest modifier of each slot; left and right on the same side of the mention are bilateral."""
    item = found[number]
    reach_after = _ANATOMY_REACH_AFTER if item.category == "anatomy" else _REACH
    reach_before = _ANATOMY_REACH_BEFORE if item.category == "anatomy" else _REACH
    best: dict[str, tuple[int, str]] = {}
    sides: dict[int, set[str]] = {-1: set(), 0: set(), 1: set()}  # before, inside, after the mention
    begin = bisect_left(modifiers, (item.first - reach_before,))
    end = bisect_left(modifiers, (item.stop + reach_after,))
    for place, meanings in modifiers[begin:end]:
        where, gap, between = 0, 0, tokens[:0]
        if place < item.first:
            where, gap, between = -1, item.first - place, tokens[place + 1 : item.first]
        elif place >= item.stop:
            where, gap, between = 1, place - item.stop + 1, tokens[item.stop : place]
            if _starts_finding(place, found, number):
                continue  # said of the finding after it
        crossed = MODIFIER_BOUNDARIES.intersection(between)
        for slot, value in meanings:
            if crossed and not (slot == "course" and where == 1 and crossed == {","}):
                continue  # only the course may follow a comma: "mild edema, improved"
            if slot == "side":
                sides[where].add(value)
            if slot not in best or gap < best[slot][0]:
                best[slot] = (gap, value)
    slots = {slot: value for slot, (_, value) in best.items()}
    if any({"left", "right"} <= group for group in sides.values()):
        slots["side"] = "bilateral"
    return slots


def _starts_finding(place: int, found: list[Found], number: int) -> bool:
    """Whether the word at `place` stands right before a finding that comes after item `number`."""
    for other in found[number + 1 : number + 1 + _REACH]:
        if other.first - place > 2:
            return False
        if other.first > place and other.category != "anatomy":
            return True
    return False
