"""Vocabularies: the bundled one, NLM files of three formats, and damaged ones."""

import gzip
from pathlib import Path

import pytest

from medim_ray.reports.mesh import Vocabulary
from medim_ray.reports.tagger import Tagger


def descriptor(name: str, numbers: list[str], terms: list[str]) -> str:
    tree = "".join(f"<TreeNumber>{number}</TreeNumber>" for number in numbers)
    strings = "".join(f"<Term><TermUI>T1</TermUI><String>{term}</String></Term>" for term in [name, *terms])
    return (
        f'<DescriptorRecord DescriptorClass="1"><DescriptorUI>D1</DescriptorUI><DescriptorName><String>{name}</String>'
        f"</DescriptorName><TreeNumberList>{tree}</TreeNumberList><ConceptList><Concept PreferredConceptYN='Y'>"
        f"<TermList>{strings}</TermList></Concept></ConceptList></DescriptorRecord>"
    )


XML = (
    "<?xml version='1.0' encoding='UTF-8'?>\n<!DOCTYPE DescriptorRecordSet SYSTEM 'desc.dtd'>\n"
    '<DescriptorRecordSet LanguageCode="eng">'
    + descriptor("Pneumothorax", ["C08.528.778"], ["Pressure Pneumothorax"])
    + descriptor("Lung", ["A04.411"], ["Lungs"])
    + descriptor("Catheters, Indwelling", ["E07.132.500"], ["Indwelling Catheters"])
    + descriptor("Amoxicillin", ["D02.065"], [])
    + descriptor("Back", ["A01.923.176"], ["Left"])
    + "</DescriptorRecordSet>"
)
ASCII = """*NEWRECORD
RECTYPE = D
MH = Pneumothorax
PRINT ENTRY = Collapsed Pleural Space|T047|NON|EQV|NLM (1997)|970117|abcdef
ENTRY = Pressure Pneumothorax
MN = C08.528.778
UI = D011030

*NEWRECORD
RECTYPE = D
MH = Lung
MN = A04.411
UI = D008168
"""
MTREES = "Body Regions;A01\nLung;A04.411\nBronchi;A04.411.125\nPneumothorax;C08.528.778\nDrugs;D26\nLungs Abroad;Z01\n"


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_default_vocabulary_is_consistent() -> None:
    vocabulary = Vocabulary.default()
    owners: dict[str, set[str]] = {}
    for term, heading in vocabulary.terms():
        owners.setdefault(term.lower(), set()).add(heading.name)
    assert {term: names for term, names in owners.items() if len(names) > 1} == {}
    assert {"Lung", "Cardiomegaly", "Pneumothorax", "Opacity", "Catheters, Indwelling"} <= set(vocabulary.headings)
    assert all(heading.tree_numbers == () for heading in vocabulary.headings.values())


@pytest.mark.parametrize("year", ["desc2010.xml", "desc2025.xml", "desc2025.gz"])
def test_descriptor_xml_of_any_year(tmp_path: Path, year: str) -> None:
    content = XML.encode()
    path = write(tmp_path, year, gzip.compress(content) if year.endswith("gz") else content)
    headings = Vocabulary.from_nlm(path).headings
    assert headings["Pneumothorax"].tree_numbers == ("C08.528.778",)
    assert headings["Pneumothorax"].entry_terms == ("Pressure Pneumothorax",)
    assert {name: heading.category for name, heading in headings.items()} == {
        "Pneumothorax": "finding",
        "Lung": "anatomy",
        "Catheters, Indwelling": "device",
        "Back": "anatomy",
    }


def test_ascii_mesh_and_mtrees(tmp_path: Path) -> None:
    ascii_mesh = Vocabulary.from_nlm(write(tmp_path, "d2024.bin", ASCII))
    assert ascii_mesh.headings["Pneumothorax"].entry_terms == ("Pressure Pneumothorax", "Collapsed Pleural Space")
    trees = Vocabulary.from_nlm("file://" + write(tmp_path, "mtrees2024.bin", MTREES))
    assert list(trees.headings) == ["Body Regions", "Lung", "Bronchi", "Pneumothorax"]
    assert trees.headings["Bronchi"].tree_numbers == ("A04.411.125",)


def test_merged_gives_the_chest_terms_their_tree_numbers(tmp_path: Path) -> None:
    merged = Vocabulary.default().merged(Vocabulary.from_nlm(write(tmp_path, "desc.xml", XML)))
    (mention,) = Tagger(merged).tag("Large pneumothoraces.")
    assert (mention.heading, mention.tree_numbers) == ("Pneumothorax", ("C08.528.778",))
    assert Tagger(merged).headings("Pressure pneumothorax") == ["Pneumothorax"]


def test_headings_that_are_modifiers_are_left_out(tmp_path: Path) -> None:
    tagger = Tagger(Vocabulary.from_nlm(write(tmp_path, "desc.xml", XML)))
    assert tagger.tag("The left and upper part was moved back.") == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.xml", XML[: len(XML) // 2], "truncated or damaged XML after 2 descriptors"),
        ("cut.gz", gzip.compress(XML.encode() * 50)[:200], "truncated or damaged gzip"),
        ("cut.bin", MTREES[: MTREES.index("C08") + 6], "truncated in line 4"),
        ("cut_clean.bin", MTREES[: MTREES.index(".125")], "truncated in line 3"),  # a valid number, but Lung's
        ("cut_ascii.bin", ASCII[: ASCII.rindex("UI")], "truncated after 1 records"),
        ("long.bin", "".join(f"Term {n};A{n // 1000:02d}.{n % 1000:03d}\n" for n in range(11_000)), "category Z"),
        ("supp.xml", "<SupplementalRecordSet></SupplementalRecordSet>", "needs descriptors"),
        ("other.xml", "<html><body>moved</body></html>", "without a DescriptorRecord"),
        ("q.bin", "*NEWRECORD\nRECTYPE = Q\nSH = abnormalities\nUI = Q000002\n", "without a descriptor"),
        ("reports.csv", "uid,findings\n1,clear\n", "is not 'Heading;A01.234'"),
        ("empty.bin", " \n", "empty file"),
        ("drugs.bin", "Drugs;D26\n", "no heading of the MeSH categories"),
    ],
)
def test_damaged_and_foreign_files_are_named(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(ValueError, match=message) as caught:
        Vocabulary.from_nlm(path)
    assert name in str(caught.value)
