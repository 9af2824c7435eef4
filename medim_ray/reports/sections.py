"""Sections and sentences of a radiology report, with character offsets.

Nothing is interpreted here (tagger.py does); MedIM splits sentences on "." and "N.", this module also survives
abbreviations, decimals, de-identified blanks, list numbers and wrapped lines.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Report", "Sentence", "blank_markup", "split_sections", "split_sentences", "untold_spans"]


@dataclass(frozen=True)
class Report:
    """The sections of one report; '' where a section is absent. `body` holds text under no heading."""

    findings: str = ""
    impression: str = ""
    indication: str = ""
    comparison: str = ""
    body: str = ""


@dataclass(frozen=True, slots=True)
class Sentence:
    """`text` is `source[start:end]`, in characters of the text that was split."""

    text: str
    start: int
    end: int


# Heading words of each section; "other" is recognised so that it ends the section before it, and is then left out.
_SECTION_HEADINGS = {
    "findings": "findings?|report|observations?",
    "impression": "impressions?|conclusions?|assessment|opinion|interpretation|summary|diagnosis",
    "indication": "(?:clinical )?indications?|(?:clinical |patient |brief )?history"
    "|clinical (?:information|data|details)|reason for (?:exam(?:ination)?|study|test|this exam(?:ination)?)|reason",
    "comparison": "comparisons?(?: studies| study)?|compared (?:to|with)|prior stud(?:y|ies)|previous stud(?:y|ies)",
    "both": "findings?(?: and |, | ?/ ?| & )impressions?",
    "other": "(?:exam(?:ination)?|procedure|study|technique|views?|exam(?:ination)? type|type of exam(?:ination)?"
    "|recommendations?(?: \\(s\\))?|notifications?|final report|wet read|addendum|attestation"
    "|electronically signed by|signed)",
}
_NAMES = "|".join(f"(?P<{name}>{words})" for name, words in _SECTION_HEADINGS.items() if name != "both")
_NAMES = f"(?P<both>{_SECTION_HEADINGS['both']})|{_NAMES}"
# A heading is a heading word with a colon at the start of a line or sentence, or alone on its line in capitals.
_HEADING = re.compile(
    rf"(?:(?<=\n)|(?<=\A)|(?<=[.!?\]:)_X] )|(?<=[.!?]))[ \t*#>-]*(?i:{_NAMES})[ \t*]*(?::[ \t*]*|(?=\n|\Z))",
)
_BLOCK_TAG = re.compile(r"<\s*/?\s*(?:br|p|div|li|ul|ol|tr|table|h[1-6]|body|html)\b[^<>]*>", re.IGNORECASE)
_TAG = re.compile(
    r"<!--(?:(?!<!--).)*?-->|<!doctype[^<>]*>|<\s*/?\s*(?:a|b|i|u|em|strong|span|font|sub|sup|td|th|tbody|thead|head|title|meta|pre|code|small"
    r"|center|img|hr|section|article|br|p|div|li|ul|ol|tr|table|h[1-6]|body|html)\b[^<>]*>|&(?:[a-zA-Z]{2,8}|\#\d{1,6}|\#x[0-9a-fA-F]{1,5});",
    re.IGNORECASE | re.DOTALL,
)


def blank_markup(text: str) -> str:
    """HTML tags and entities become as many blanks, block tags a blank line first: offsets stay those of `text`.

    De-identified blanks in angle brackets ("<XXXX>") and comparisons ("< 5 mm") are no tags and stay.
    """
    if "<" not in text and "&" not in text:
        return text
    text = _BLOCK_TAG.sub(lambda match: "\n\n" + " " * (len(match[0]) - 2), text)
    return _TAG.sub(lambda match: " " * len(match[0]), text)


def split_sections(text: str) -> Report:
    """Sections of a report with headings ("FINDINGS: ..."), without (all `body`), or with both.

    Under indication, comparison or technique a blank line ends the section, because many archives put the findings
    there without a heading, and so does the first line where the report would have no finding otherwise; text under
    "findings and impression" is findings. Technique, examination, recommendation and signature blocks are left out.
    White space around a section is dropped. No text raises.
    """
    text = blank_markup(text).replace("\r\n", "\n").replace("\r", "\n")
    parts: dict[str, list[str]] = {name: [] for name in ("findings", "impression", "indication", "comparison", "body")}
    for name, start, end in _pieces(text):
        piece = text[start:end].strip()
        if piece and name in parts:
            parts[name].append(piece)
    return Report(**{name: "\n".join(pieces) for name, pieces in parts.items()})


def untold_spans(text: str) -> list[tuple[int, int]]:
    """Character spans that tell no finding of this study: indication, comparison, technique, signature."""
    plain = blank_markup(text).replace("\r\n", " \n").replace("\r", "\n")
    return [(start, end) for name, start, end in _pieces(plain) if name in _UNTOLD]


_BLANK_LINE = re.compile(r"\n[ \t]*\n")
_UNTOLD = ("indication", "comparison", "other")


def _pieces(text: str) -> list[tuple[str, int, int]]:
    """(section, start, end) in order; "body" where there is no heading."""
    pieces: list[tuple[str, int, int]] = []
    current, begin = "body", 0
    heads = [match for match in _HEADING.finditer(text) if _is_heading(match, text)]
    for match in [*heads, None]:
        end = match.start() if match else len(text)
        first = end - len(text[begin:end].lstrip())
        gap = _BLANK_LINE.search(text, first, end) if current in _UNTOLD else None
        pieces.append((current, begin, gap.start() if gap else end))
        if gap:
            pieces.append(("body", gap.end(), end))
        if match:
            current = "findings" if match.lastgroup == "both" else str(match.lastgroup)
            begin = match.end()
    if any(text[start:end].strip() for name, start, end in pieces if name not in _UNTOLD):
        return pieces
    for place, (name, start, end) in reversed(list(enumerate(pieces))):
        line_end = text.find("\n", end - len(text[start:end].lstrip()), end)
        if name == "indication" and line_end >= 0:
            return [*pieces[:place], (name, start, line_end), ("body", line_end, end), *pieces[place + 1 :]]
    return pieces


def _is_heading(match: re.Match[str], text: str) -> bool:
    """With a colon, or in capitals and alone on its line."""
    head = match[0].strip(" \t*#>-\n")
    return head.rstrip("* \t").endswith(":") or (
        head.isupper() and text[: match.start()].rstrip(" \t")[-1:] in ("", "\n")
    )


_BOUNDARY = re.compile(r"[.!?]+[\"')\]]*(?=\s|\Z)|(?<=[a-z)\]][a-z)\]])[.!?]+(?=[A-Z][a-z])|\n[ \t]*(?:\n\s*)*")
_ABBREVIATION_WORDS = """
dr drs mr mrs ms prof vs approx ca cf e.g i.e eg ie etc fig st jr sr resp incl dept est min max no nos
"""
_ABBREVIATION = frozenset(_ABBREVIATION_WORDS.split())
_UNIT_WORDS = "cm mm ml cc kg mg lb lbs yr yrs wk wks hr hrs min sec"
_UNITS = frozenset(_UNIT_WORDS.split())
_CLOCK = frozenset(["a.m", "p.m"])
_CAPITAL_START = re.compile(r"(?:\A\W*|[.!?]\s+|\n\s*)(?!X+\b)[A-Z]")
_LIST_START = re.compile(r"\s*(?:\(?\d{1,2}[.)](?=\s|[A-Z])|[-*\u2022\u2013])\s*")


def split_sentences(text: str) -> list[Sentence]:
    """Sentences in order, disjoint, covering every character that is not white space.

    A list number ("1.") belongs to the sentence after it, stray punctuation to the sentence before it. "Dr.",
    "2.5 cm", "vs." and de-identified blanks do not end a sentence. A line break ends one at a blank line, before a list
    mark, and before a capital letter where the next word would have fitted on the line (so a wrapped line goes on).
    """
    source = blank_markup(text)
    width = max(60, max(map(len, source.split("\n")), default=0)) if "\n" in source else 0
    without_capitals = _CAPITAL_START.search(source) is None  # dictated in lower case: a stop is all there is
    sentences: list[Sentence] = []
    begin = 0
    for match in _BOUNDARY.finditer(source):
        if source[match.start()] == "\n":
            if not _breaks_at_newline(source, match, width):
                continue
        elif not _breaks_at_stop(source, begin, match, without_capitals):
            continue
        _append(sentences, text, source, begin, match.end())
        begin = match.end()
    _append(sentences, text, source, begin, len(source))
    return sentences


def _append(sentences: list[Sentence], text: str, source: str, begin: int, end: int) -> None:
    piece = source[begin:end]
    stripped = piece.strip()
    if not stripped:
        return
    start = begin + piece.index(stripped)
    end = start + len(stripped)
    if sentences and not any(map(str.isalnum, stripped)):
        start = sentences.pop().start
    sentences.append(Sentence(text[start:end], start, end))


def _breaks_at_stop(source: str, begin: int, match: re.Match[str], without_capitals: bool) -> bool:
    if match[0][0] == "?":
        return bool(source[begin : match.start()].strip()) and not source[match.start() - 1].isspace()  # "? pneumonia"
    if match[0][0] != ".":
        return True
    line = source[max(begin, match.start() - 40) : match.start()]
    before = "" if not line or line[-1].isspace() else line.split()[-1].lstrip("(['\"")
    following = source[match.end() : match.end() + 6].lstrip()
    if before.isdigit() and len(before) <= 2:
        ahead_of_it = source[begin : match.start() - len(before)].strip(" \t\n(")
        if not ahead_of_it or ahead_of_it.endswith(":"):
            return False  # the number of a list entry
    word = before.lower()
    if word in ("no", "nos"):
        return not following[:1].isdigit()
    if word in _CLOCK:
        return following[:1].isupper() and not following.startswith("XX")
    if word in _ABBREVIATION:
        return not following  # the last word of the text
    if len(before) == 1 and before.isupper():
        previous = source[begin : match.start() - 1].rstrip()
        return not previous.endswith((".", "XXXX"))  # an initial after "Dr." or another initial
    if not following[:1].islower() or len(match[0]) > 1:
        return True
    return without_capitals and word not in _UNITS


def _breaks_at_newline(source: str, match: re.Match[str], width: int) -> bool:
    if match[0].count("\n") > 1:
        return True
    following = source[match.end() : match.end() + 40]
    if _LIST_START.match(following):
        return True
    if not (following[:1].isupper() or following[:1].isdigit()):
        return False
    line_length = match.start() - (source.rfind("\n", 0, match.start()) + 1)
    return line_length + 1 + len(following.split(None, 1)[0]) <= width
