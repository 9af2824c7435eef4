"""Source `padchest`: PadChest with its Spanish reports and 16-bit PNG files."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from medim_ray.data.sources.base import SOURCES, Row, Sample, described, plain_sample, plan_rows, read_image
from medim_ray.data.sources.files import exists, join, list_files
from medim_ray.data.sources.published import ViewedConfig, check_root, common_labels, keep_views, person, view_of
from medim_ray.data.sources.tables import columns

_TABLE = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
_UNKNOWN = ("suboptimal study", "exclude", "unchanged", "nan", "")


@SOURCES.register("padchest")
class PadChestSource:
    """PadChest: 16-bit PNG files, Spanish reports, radiographic findings as labels.

    Labels are those that at least `min_images` images have; an image without one of them is 0, one whose study was
    not labelled has none. There is no official split.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(ViewedConfig):
        name: str = described("padchest", "padchest")
        min_images: int = described(100, "findings of fewer images are no labels")

    def __init__(self, config: Config) -> None:
        check_root(config, _TABLE, f"{_TABLE}.gz")
        self.config = config
        self.name = config.name

    def plan(self) -> pa.Table:
        """See `Source`. Images lie in folders by ImageDir (0 … 54), or all in one."""
        root = self.config.path
        url = join(root, _TABLE if exists(join(root, _TABLE)) else f"{_TABLE}.gz")
        names = ["ImageID", "PatientID", "Projection", "Report", "Labels"]
        table = columns(url, names, ("ImageDir", "PatientBirth", "PatientSex_DICOM", "StudyDate_DICOM"))
        places = {name.rpartition("/")[2]: name for name in list_files(root) if name.endswith(".png")}
        found = [_findings(text) for text in table["Labels"]]
        common = common_labels((findings or () for findings in found), self.config.min_images)
        rows = []
        for at, image in enumerate(table["ImageID"]):
            view, findings = view_of(table["Projection"][at]), found[at]
            age = _age(table["PatientBirth"][at], table["StudyDate_DICOM"][at])
            stated = {} if findings is None else {name: str(int(name in findings)) for name in common}
            folder = table["ImageDir"][at].removesuffix(".0")
            rows.append(
                Row(
                    image_id=image,
                    location=join(root, places.get(image, f"{folder}/{image}" if folder else image)),
                    patient_id=table["PatientID"][at],
                    view=view,
                    report=table["Report"][at],
                    labels={**person(view, table["PatientSex_DICOM"][at], age), **stated},
                )
            )
        return plan_rows(keep_views(rows, self.config.views, root))

    def sample(self, row: Mapping[str, Any]) -> Sample:
        """See `Source`."""
        return plain_sample(row, read_image(row["location"]))


def _findings(text: str) -> set[str] | None:
    """The findings of a cell such as "['normal', ' cardiomegaly']"; None: the study was not labelled."""
    try:
        values = ast.literal_eval(text) if text else []
    except (ValueError, SyntaxError):
        return None
    names = {str(value).strip().lower() for value in values} if isinstance(values, list) else set()
    return names - set(_UNKNOWN) or None


def _age(birth: str, study: str) -> str:
    """Years between the years of birth ("1930.0") and study ("20140915"); '' where one is unknown."""
    born, done = birth.removesuffix(".0"), study.removesuffix(".0")[:4]
    return str(max(int(done) - int(born), 0)) if born.isdigit() and done.isdigit() else ""
