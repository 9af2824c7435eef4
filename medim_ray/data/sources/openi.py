"""Source `openi`: the Indiana University collection, as the XML reports of Open-i or as the pair of CSV tables."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from medim_ray.data.sources.base import SOURCES, Row, Sample, described, plain_sample, plan_rows, read_image
from medim_ray.data.sources.files import extension, join, list_files, read_texts
from medim_ray.data.sources.folder import IMAGE_EXTENSIONS
from medim_ray.data.sources.published import ViewedConfig, check_root, common_labels, keep_views, view_of
from medim_ray.data.sources.tables import columns

_REPORTS, _PROJECTIONS = "reports.csv", "projections.csv"  # the pair is published as indiana_reports.csv, …
_NO_FINDINGS = ("normal", "no indexing", "technical quality of image unsatisfactory", "")
_SECTIONS = ("indication", "comparison", "findings", "impression")


@SOURCES.register("openi")
class OpeniSource:
    """Indiana University chest X-rays: Open-i's XML reports, or indiana_reports.csv and indiana_projections.csv.

    One study a patient. Labels are the indexers' headings ("Cardiomegaly" of "Cardiomegaly/mild") and `normal`, 1 or
    0. Only the CSV pair knows views (FRONTAL, LATERAL).
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(ViewedConfig):
        name: str = described("openi", "openi")
        min_images: int = described(50, "headings of fewer images are no labels")

    def __init__(self, config: Config) -> None:
        check_root(config)
        self.config = config
        self.name = config.name

    def plan(self) -> pa.Table:
        """See `Source`. An image that a report names and no folder holds is a row that can't be read."""
        root = self.config.path
        found = list_files(root)
        pair = [name for name in found if name.endswith((_REPORTS, _PROJECTIONS))]
        images = {_stem(name): name for name in found if extension(name) in IMAGE_EXTENSIONS}
        if len(pair) == 2:
            rows = self._from_tables(images, *sorted(pair, key=lambda name: name.endswith(_PROJECTIONS)))
        else:
            names = [name for name in found if extension(name) == "xml"]
            rows = self._from_xml(images, names)
        if not rows:
            raise ValueError(
                f"source.path={root} holds neither indiana_{_REPORTS} with indiana_{_PROJECTIONS} nor XML reports "
                "of Open-i that name images: see medim_ray/data/sources/README.md"
            )
        return plan_rows(_labelled(keep_views(rows, self.config.views, root), self.config.min_images))

    def sample(self, row: Mapping[str, Any]) -> Sample:
        """See `Source`."""
        return plain_sample(row, read_image(row["location"]))

    def _from_tables(self, images: Mapping[str, str], reports: str, projections: str) -> list[Row]:
        root = self.config.path
        table = columns(join(root, reports), ["uid", "MeSH", *_SECTIONS])
        studies = {}
        for uid, mesh, *sections in zip(*table.values(), strict=True):
            studies[uid] = (mesh, _report(dict(zip(_SECTIONS, sections, strict=True))))
        listed = columns(join(root, projections), ["uid", "filename", "projection"])
        rows = []
        for uid, file, projection in zip(*listed.values(), strict=True):
            mesh, report = studies.get(uid, ("", ""))
            place = images.get(_stem(file), f"images/images_normalized/{file}")
            rows.append(_row(join(root, place), _stem(file), uid, view_of(projection), report, mesh))
        return rows

    def _from_xml(self, images: Mapping[str, str], names: list[str]) -> list[Row]:
        root, rows = self.config.path, []
        for name, text in zip(names, read_texts([join(root, name) for name in names]), strict=True):
            try:
                tree = ElementTree.fromstring(re.sub(r"^<\?xml[^>]*\?>", "", text.lstrip()))
            except ElementTree.ParseError as error:
                raise ValueError(f"{join(root, name)} is no XML, or was cut off ({error})") from None
            identity = tree.find("uId")
            uid = (identity.get("id", "") if identity is not None else "") or _stem(name)
            sections = {str(part.get("Label", "")).lower(): part.text or "" for part in tree.iter("AbstractText")}
            mesh = ";".join((part.text or "").strip() for part in tree.iter("major"))
            for image in tree.iter("parentImage"):
                stem = image.get("id", "")
                place = images.get(stem, f"{stem}.png")
                rows.append(_row(join(root, place), stem, uid, "", _report(sections), mesh))
        return rows


def _labelled(rows: list[Row], min_images: int) -> list[Row]:
    """The rows with headings as labels 1 and 0; studies that nobody indexed have none."""
    found = [{part.partition("/")[0].strip() for part in row.labels["mesh"].split(";")} - {""} for row in rows]
    findings = [{name for name in headings if name.lower() not in _NO_FINDINGS} for headings in found]
    names = common_labels(findings, min_images)
    labelled = []
    for row, headings, present in zip(rows, found, findings, strict=True):
        indexed = bool(present) or any(name.lower() == "normal" for name in headings)
        stated = {name: str(int(name in present)) for name in names} if indexed else {}
        normal = {"normal": str(int(not present))} if indexed else {}
        labelled.append(replace(row, labels={"view": row.view, **normal, **stated}))
    return labelled


def _row(location: str, image: str, uid: str, view: str, report: str, mesh: str) -> Row:
    return Row(image_id=image, location=location, patient_id=uid, view=view, report=report, labels={"mesh": mesh})


def _report(sections: Mapping[str, str]) -> str:
    """The report as one text with headings, as medim_ray.reports splits it."""
    parts = [(name.upper(), sections.get(name, "").strip()) for name in _SECTIONS]
    return "\n\n".join(f"{name}: {text}" for name, text in parts if text)


def _stem(name: str) -> str:
    """A file's name without folders and image endings ("1_IM-0001-4001.dcm.png" is "1_IM-0001-4001")."""
    base = name.rpartition("/")[2]
    return re.sub(r"\.(png|jpg|jpeg|dcm|xml)$", "", re.sub(r"\.(png|jpg|jpeg|xml)$", "", base))
