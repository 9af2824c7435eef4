"""Source `folder`: a tree of image files, each with a report in a text file of the same name where there is one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from medim_ray.data.sources.base import SOURCES, Row, Sample, described, plain_sample, plan_rows, read_image
from medim_ray.data.sources.files import extension, join, list_files, read_texts

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "tif", "tiff", "bmp", "webp", "jp2")
_ROLES = ("patient", "view", "split")


@SOURCES.register("folder")
class FolderSource:
    """A tree of image files; reports in text files of the same name.

    An image's name is its path below the folder. `path_pattern` reads patient, split, view and labels out of it.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        name: str = described("folder", "folder")
        path: str = described("", "folder, path or fsspec URL")
        reports: bool = described(True, "read NAME.txt beside NAME.png as its report")
        path_pattern: str = described(
            "",
            "regular expression that is searched in every path below the folder; its named groups patient, view and "
            "split are those columns, other groups are labels: (?P<split>[^/]+)/(?P<finding>[^/]+)/(?P<patient>[^_]+)_",
        )

        def __post_init__(self) -> None:
            try:
                groups = re.compile(self.path_pattern).groupindex
            except re.error as error:
                raise ValueError(f"path_pattern={self.path_pattern!r} is no regular expression: {error}") from None
            if self.path_pattern and not groups:
                raise ValueError(f"path_pattern={self.path_pattern!r} has no named group such as (?P<patient>…)")

    def __init__(self, config: Config) -> None:
        if not config.path:
            raise ValueError("source.path is not set: give the folder with the images as source.path=…")
        self.config = config
        self.name = config.name

    def plan(self) -> pa.Table:
        """See `Source`. ValueError: no image in the folder, paths that don't fit the pattern."""
        path = self.config.path
        found = list_files(path)
        names = [name for name in found if extension(name) in IMAGE_EXTENSIONS]
        if not names:
            hint = (
                "; for DICOM use configs/sources/dicom.yaml" if any(n.lower().endswith(".dcm") for n in found) else ""
            )
            raise ValueError(
                f"source.path={path} holds {len(found)} files and no image ({', '.join(IMAGE_EXTENSIONS)}){hint}"
            )
        parts = self._parts(names)
        texts = {name.rpartition(".")[0]: name for name in found if extension(name) == "txt"}
        beside = [texts.get(name.rpartition(".")[0], "") if self.config.reports else "" for name in names]
        reports = read_texts([join(path, text) if text else "" for text in beside])
        return plan_rows(
            [
                Row(
                    image_id=name,
                    location=join(path, name),
                    patient_id=part.get("patient", ""),
                    view=part.get("view", ""),
                    split=part.get("split", ""),
                    report=report,
                    labels={key: value for key, value in part.items() if key not in _ROLES},
                )
                for name, part, report in zip(names, parts, reports, strict=True)
            ]
        )

    def sample(self, row: Mapping[str, Any]) -> Sample:
        """See `Source`."""
        return plain_sample(row, read_image(row["location"]))

    def _parts(self, names: list[str]) -> list[dict[str, str]]:
        pattern = self.config.path_pattern
        if not pattern:
            return [{} for _ in names]
        matches = [re.search(pattern, name) for name in names]
        strays = [name for name, match in zip(names, matches, strict=True) if match is None]
        if strays:
            raise ValueError(
                f"source.path_pattern={pattern!r} does not fit {len(strays)} of {len(names)} paths: {strays[0]!r}"
            )
        return [{key: value or "" for key, value in match.groupdict().items()} for match in matches if match]
