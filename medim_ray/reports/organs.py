"""Abnormal anatomy in a sentence: links states ("tortuous") to the anatomy that they describe, and joins compounds.

The rules are in chest_rules.py; this module only looks for who stands near whom.
"""

from __future__ import annotations

from dataclasses import replace

from medim_ray.reports.chest_rules import STATE_RULES
from medim_ray.reports.chest_terms import table_rows
from medim_ray.reports.mesh import Heading, Vocabulary
from medim_ray.reports.scope import Found, name_of

__all__ = ["OrganLinker"]

_STATE_REACH = 8  # tokens: "degenerative changes are again seen throughout the thoracic spine"
_COMPOUND_REACH = 7  # tokens: "calcified mediastinal and right hilar granulomas"
_COMPOUNDS = {("Calcinosis", "Granuloma"): "Calcified Granuloma"}
# States that belong to a finding right after them, and how many tokens may stand between.
_TAKEN_STATES = {"enlarged": 1, "degenerative": 0, "lowered": 1, "raised": 1}


class OrganLinker:
    """The state rules of chest_rules.py for the headings of one vocabulary."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._headings = vocabulary.headings
        self._organs: dict[str, dict[str, list[Heading]]] = {}  # state -> anatomy -> headings that they index
        for name, entries in table_rows(STATE_RULES):
            anatomies, _, states = ";".join(entries).partition("|")
            for state in states.split(";") if name in self._headings else ():
                for anatomy in anatomies.split(";"):
                    organs = self._organs.setdefault(state.strip(), {}).setdefault(anatomy.strip(), [])
                    organs.append(self._headings[name])

    def link(self, found: list[Found]) -> list[Found]:
        """Items with a heading, in order of their place; states became findings of their anatomies or are dropped."""
        found = self._join_compounds(found)
        linked: list[Found] = []
        for place, item in enumerate(found):
            if item.state:
                organs = _described(found, place, self._organs.get(item.state, {}))
                linked += [replace(item, heading=heading, state="") for heading in organs]
            elif item.heading is not None:
                linked.append(item)
        return sorted(linked, key=lambda item: item.first)

    def _join_compounds(self, found: list[Found]) -> list[Found]:
        """Join the parts of a compound that anatomy separates: "calcified right lower lobe granuloma"."""
        joined: list[Found] = []
        for item in found:
            for part in reversed(joined) if item.category == "finding" else ():
                if part.clause != item.clause or item.first - part.stop > _COMPOUND_REACH:
                    break
                if part.category == "anatomy":
                    continue
                name = _COMPOUNDS.get((name_of(part), name_of(item)), "")
                if name in self._headings:
                    joined.remove(part)
                    item.first, item.heading = part.first, self._headings[name]
                break
            joined.append(item)
        return joined


def _described(found: list[Found], place: int, organs: dict[str, list[Heading]]) -> list[Heading]:
    """Headings of the anatomies that the state at `place` describes: those close after it, else the nearest before."""
    state = found[place]
    is_loose = state.state == "degenerative"  # "degenerative changes, most marked in the lower thoracic spine"
    after: list[Heading] = []
    distance = _STATE_REACH
    for item in found[place + 1 : place + 1 + _STATE_REACH]:
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
    for item in reversed(found[max(0, place - _STATE_REACH) : place]):
        if item.clause != state.clause or state.first - item.stop > _STATE_REACH:
            break
        if item.heading is not None and item.category == "anatomy" and item.heading.name in organs:
            before = organs[item.heading.name]
            break
    if is_loose:
        return _most_specific(after + before)
    return list(dict.fromkeys(after if after and (distance <= 3 or not before) else before))


def _modifies_finding(found: list[Found], place: int, anatomy: Found) -> bool:
    """In "prominent interstitial opacities" the anatomy is part of a finding that follows at once."""
    for item in found[place + 1 : place + 1 + _STATE_REACH]:
        if item.category != "anatomy" and not item.state and 0 <= item.first - anatomy.stop <= 1:
            return True
    return False


def _most_specific(headings: list[Heading]) -> list[Heading]:
    """Endplate and disc say spine; a region of the spine nearby says more."""
    has_region = any(heading.name.endswith("Vertebrae") for heading in headings)
    return [heading for heading in dict.fromkeys(headings) if not (has_region and heading.name == "Spine")]
