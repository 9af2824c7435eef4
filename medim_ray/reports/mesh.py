"""The vocabulary of the tagger: MeSH headings with entry terms and tree numbers, from NLM files or bundled.

Reading only; matching is matcher.py. Formats: www.nlm.nih.gov/mesh (descriptor XML, ASCII MeSH, mtrees), any year.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from io import BytesIO
from xml.etree import ElementTree

import fsspec

from medim_ray.reports.chest_terms import CHEST_TERMS, table_rows

__all__ = ["Heading", "Vocabulary"]


@dataclass(frozen=True, slots=True)
class Heading:
    """One heading: `category` is 'anatomy', 'finding', 'technique', 'device', 'procedure' or 'other'.

    `entry_terms` are the synonyms without the heading itself; `tree_numbers` like "A04.411", empty where unknown.
    """

    name: str
    category: str
    entry_terms: tuple[str, ...] = ()
    tree_numbers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Vocabulary:
    """Headings by name, in the order given. `source` says where they come from, for error messages and records."""

    headings: dict[str, Heading]
    source: str

    def __len__(self) -> int:
        return len(self.headings)

    def terms(self) -> Iterator[tuple[str, Heading]]:
        """Every (term, heading): the heading's name first, then its entry terms."""
        for heading in self.headings.values():
            yield heading.name, heading
            for term in heading.entry_terms:
                yield term, heading

    @staticmethod
    @cache
    def default() -> Vocabulary:
        """The bundled chest vocabulary (chest_terms.py); tree numbers are empty."""
        return Vocabulary(_parse_chest_terms(CHEST_TERMS), "bundled chest terms")

    @staticmethod
    def from_nlm(path_or_url: str, categories: str = "ACE") -> Vocabulary:
        """Read desc20xx.xml, d20xx.bin (ASCII MeSH) or mtrees20xx.bin, plain or gzipped, from any fsspec URL.

        Keeps the headings with a tree number in `categories` (first letters; the paper uses A, C and E). mtrees files
        have no entry terms. Raises ValueError for a truncated file, another format, or nothing in `categories`.
        """
        path = str(path_or_url)
        data = _read_bytes(path)
        start = data[:4096].lstrip(b"\xef\xbb\xbf \t\r\n")
        if start.startswith(b"<"):
            found = _read_descriptor_xml(data, path)
        elif start.startswith(b"*NEWRECORD"):
            found = _read_ascii_mesh(data, path)
        else:
            found = _read_mtrees(data, path)
        headings = {
            name: Heading(name, category_of(numbers), tuple(terms), tuple(numbers))
            for name, (numbers, terms) in found.items()
            if any(number[0] in categories for number in numbers)
        }
        if not headings:
            raise ValueError(
                f"{path}: no heading of the MeSH categories {categories!r} among {len(found)}; use a descriptor file"
            )
        return Vocabulary(headings, path)

    def merged(self, other: Vocabulary) -> Vocabulary:
        """Both vocabularies: where both know a heading, this one's category and the terms and tree numbers of both."""
        headings = dict(self.headings)
        for name, theirs in other.headings.items():
            ours = headings.get(name)
            if ours is None:
                headings[name] = theirs
            else:
                terms = tuple(dict.fromkeys(ours.entry_terms + theirs.entry_terms))
                numbers = tuple(dict.fromkeys(ours.tree_numbers + theirs.tree_numbers))
                headings[name] = replace(ours, entry_terms=terms, tree_numbers=numbers)
        return Vocabulary(headings, f"{self.source} + {other.source}")


def category_of(tree_numbers: Iterable[str]) -> str:
    """The tagger's category of a heading from its MeSH tree numbers: disease before anatomy before equipment."""
    numbers = sorted(tree_numbers)
    for prefix, category in (
        ("C", "finding"),
        ("A", "anatomy"),
        ("E07", "device"),
        ("E04", "procedure"),
        ("E", "technique"),
    ):
        if any(number.startswith(prefix) for number in numbers):
            return category
    return "other"


def _parse_chest_terms(table: str) -> dict[str, Heading]:
    headings: dict[str, Heading] = {}
    category = ""
    for name, terms in table_rows(table):
        if name.startswith("["):
            category = name.strip("[] ")
            continue
        assert category and name not in headings, f"chest term table: {name!r}"
        headings[name] = Heading(name, category, tuple(terms))
    return headings


def _read_bytes(path: str) -> bytes:
    with fsspec.open(path, "rb") as file:
        data: bytes = file.read()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: truncated or damaged gzip file ({error}); download it again") from None
    if not data.strip():
        raise ValueError(f"{path}: empty file, not a MeSH file")
    return data


Found = dict[str, tuple[list[str], list[str]]]  # heading -> (tree numbers, entry terms)


def _read_descriptor_xml(data: bytes, path: str) -> Found:
    found: Found = {}
    try:
        for event, element in ElementTree.iterparse(BytesIO(data), events=("start", "end")):
            if event == "start":
                if element.tag.endswith("RecordSet") and element.tag != "DescriptorRecordSet":
                    raise ValueError(f"{path}: {element.tag}, but the tagger needs descriptors (desc20xx.xml)")
                continue
            if element.tag == "DescriptorRecord":
                name = (element.findtext("DescriptorName/String") or "").strip()
                numbers = [(node.text or "").strip() for node in element.iterfind("TreeNumberList/TreeNumber")]
                terms = [
                    (node.text or "").strip() for node in element.iterfind("ConceptList/Concept/TermList/Term/String")
                ]
                if not name:
                    raise ValueError(f"{path}: a DescriptorRecord without DescriptorName; not an NLM descriptor file")
                found[name] = (numbers, [term for term in dict.fromkeys(terms) if term and term != name])
                element.clear()
    except ElementTree.ParseError as error:
        raise ValueError(
            f"{path}: truncated or damaged XML after {len(found)} descriptors ({error}); download it again"
        ) from None
    if not found:
        raise ValueError(f"{path}: XML without a DescriptorRecord; the tagger reads NLM's desc20xx.xml")
    return found


_FIELD = re.compile(r"([A-Z][A-Z0-9 ]*) = (.*)")


def _read_ascii_mesh(data: bytes, path: str) -> Found:
    found: Found = {}
    for record in re.split(r"^\*NEWRECORD[ \t]*$", _decode(data), flags=re.MULTILINE)[1:]:
        fields: dict[str, list[str]] = {}
        for line in record.strip().splitlines():
            match = _FIELD.fullmatch(line.strip())
            if match:
                fields.setdefault(match[1].strip(), []).append(match[2].strip())
        if "UI" not in fields:  # NLM ends each record with its unique identifier
            raise ValueError(f"{path}: truncated after {len(found)} records (a record without UI); download it again")
        if "MH" in fields:
            terms = [term.split("|")[0].strip() for key in ("ENTRY", "PRINT ENTRY") for term in fields.get(key, [])]
            found[fields["MH"][0]] = (fields.get("MN", []), list(dict.fromkeys(terms)))
    if not found:
        raise ValueError(
            f"{path}: ASCII MeSH without a descriptor (MH = ...); use d20xx.bin, not qualifiers or supplements"
        )
    return found


_MTREES_LINE = re.compile(r"(.+);([A-Z](?:\d\d(?:\.\d{3})*)?)")


def _read_mtrees(data: bytes, path: str) -> Found:
    found: Found = {}
    owner: dict[str, str] = {}
    lines = _decode(data).splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        match = _MTREES_LINE.fullmatch(line.strip())
        if not match or match[2] in owner:  # a cut tree number is no tree number, or that of another heading
            if number > 1 and number == len(lines):
                raise ValueError(f"{path}: truncated in line {number} of an mtrees file; download it again")
            raise ValueError(
                f"{path}: line {number} is not 'Heading;A01.234'; known formats are NLM's "
                "desc20xx.xml, d20xx.bin and mtrees20xx.bin, also gzipped"
            )
        owner[match[2]] = match[1]
        found.setdefault(match[1], ([], []))[0].append(match[2])
    if len(lines) > 10_000 and not any(tree.startswith("Z") for tree in owner):
        raise ValueError(f"{path}: truncated after {len(lines)} lines (mtrees ends with category Z); download it again")
    return found


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")  # files before 2010
