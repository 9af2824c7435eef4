"""Where in a sentence an independent statement begins, which no negation before it reaches.

"No pneumothorax, effusion or edema is seen" is one statement, "no pneumothorax, the heart is enlarged" are two.
"""

from __future__ import annotations

__all__ = ["CLAUSE_ENDS", "COLONS", "begins_statement"]

COLONS = frozenset((":", "-", "\u2013", "\u2014"))  # and dashes that stand alone
CLAUSE_ENDS = COLONS | {";"}
_VERB_WORDS = "is are was were has have had appears appear remains remain measures measure continues"
_VERBS = frozenset(_VERB_WORDS.split())
# "... and effusion is seen" ends a list; "... and the heart is enlarged" does not.
_EXISTENCE_WORDS = """
seen identified noted present evident visualized visible demonstrated appreciated detected observed found apparent
suspected
"""
_EXISTS = frozenset(_EXISTENCE_WORDS.split())
# How a finding that is there is begun; what is not there has no degree and no course.
_DEGREE_WORDS = """
mild mildly minimal minimally small tiny trace moderate moderately stable unchanged old chronic persistent residual
again redemonstrated increased increasing worsening
"""
_DEGREES = frozenset(_DEGREE_WORDS.split())
_BEFORE_WITH = frozenset(("compatible", "consistent", "associated"))


def begins_statement(tokens: list[str], place: int) -> bool:
    """Whether the comma, "and" or "with" at `place` begins a statement of its own. tokens: of one sentence."""
    word, rest = tokens[place], tokens[place + 1 : place + 2]
    if not rest or word not in (",", "and", "with"):
        return False
    if word == "with":
        return rest[0] in _DEGREES and not (place and tokens[place - 1] in _BEFORE_WITH)
    if word == "," and rest[0] == "with":
        return True
    if word == "," and rest[0] == "and":
        return False  # judged where the "and" stands
    is_joined = word == "and"
    parts = _parts(tokens, place + 1)
    if any("or" in part or "nor" in part for part in parts):
        return False  # a list that goes on
    part = parts[0]
    verb = next((at for at, token in enumerate(part) if token in _VERBS), None)
    if verb is None:
        return bool(part) and (part[0] in _DEGREES or (is_joined and part[0] in ("a", "an")))
    is_list = is_joined or "," in tokens[:place]
    return not (is_list and not _EXISTS.isdisjoint(part[verb:]))


def _parts(tokens: list[str], begin: int) -> list[list[str]]:
    """The words from `begin` to the end of the clause, cut at commas."""
    parts: list[list[str]] = [[]]
    for token in tokens[begin:]:
        if token == ",":
            parts.append([])
        elif token in CLAUSE_ENDS or token == "there":
            break
        else:
            parts[-1].append(token)
    return parts
