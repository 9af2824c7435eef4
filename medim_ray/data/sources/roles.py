"""Which column of a table plays which role, by option or by its usual name. Shared by parquet, hf and webdataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medim_ray.data.sources.base import Row, described, missing_column

_USUAL = {
    "image": ("image", "img", "file", "file_name", "filename", "path"),
    "report": ("report", "text", "notes", "caption", "txt"),
    "id": ("image_id", "dicom_id"),
    "patient": ("patient_id", "patientid", "subject_id", "patient"),
    "view": ("view", "view_position", "viewposition", "projection"),
    "split": ("split",),
}
_USUAL_LABELS = ("view", "sex", "age", "label", "labels", "finding")


@dataclass(frozen=True, kw_only=True)
class ColumnConfig:
    """Columns by role. null: the usual name, where there is such a column; a name: that column; empty: none."""

    image_column: str | None = described(None, f"column with image bytes or paths; null: {', '.join(_USUAL['image'])}")
    report_column: str | None = described(None, f"column with the report; null: {', '.join(_USUAL['report'])}")
    id_column: str | None = described(None, "column with a unique name; null: image_id; without one: place in the file")
    patient_column: str | None = described(None, f"column with the patient; null: {', '.join(_USUAL['patient'])}")
    view_column: str | None = described(None, f"column with the view; null: {', '.join(_USUAL['view'])}")
    split_column: str | None = described(None, "column with train, val or test; null: split")
    label_columns: tuple[str, ...] | None = described(
        None, f"columns that are kept as labels; null: those of {', '.join(_USUAL_LABELS)} that are there"
    )


@dataclass(frozen=True, kw_only=True)
class Roles:
    """The column of each role, '' where there is none, and label name -> column."""

    image: str
    report: str
    id: str
    patient: str
    view: str
    split: str
    labels: Mapping[str, str]

    def text_columns(self) -> list[str]:
        """Every column that is needed but the image's."""
        names = (self.report, self.id, self.patient, self.view, self.split, *self.labels.values())
        return [name for name in dict.fromkeys(names) if name]

    def row(self, values: Mapping[str, Any], *, location: str, name: str, split: str = "") -> Row:
        """The plan's row of one table row; `name` and `split` where the table has none."""

        def of(column: str) -> str:
            return text_of(values.get(column)) if column else ""

        return Row(
            image_id=of(self.id) or name,
            location=location,
            patient_id=of(self.patient),
            view=of(self.view),
            report=of(self.report),
            split=of(self.split) or split,
            labels={label: of(column) for label, column in self.labels.items()},
        )


def choose_roles(config: ColumnConfig, present: Sequence[str], where: str, *, need_image: bool = True) -> Roles:
    """The roles of the columns `present`. ValueError: a named column that is not there, or no column for the image."""
    lower = {name.lower(): name for name in reversed(present)}

    def column(role: str) -> str:
        given: str | None = getattr(config, f"{role}_column")
        if given is None:
            return next((lower[name] for name in _USUAL[role] if name in lower), "")
        if given and given not in present:
            raise missing_column(f"source.{role}_column", given, present, where)
        return given

    image = column("image") if need_image else ""
    if need_image and not image:
        raise ValueError(
            f"{where} has no column with images by a usual name: name it as source.image_column=…. "
            f"Its columns: {', '.join(present)}"
        )
    if config.label_columns is None:
        labels = {name: lower[name] for name in _USUAL_LABELS if name in lower}
    else:
        labels = {name: name for name in config.label_columns}
        for name in labels:
            if name not in present:
                raise missing_column("source.label_columns", name, present, where)
    roles = {role: column(role) for role in ("report", "id", "patient", "view", "split")}
    return Roles(image=image, labels=labels, **roles)


def text_of(value: Any) -> str:
    """A cell as text: '' for null and NaN, truth values as 1 and 0, whole floats without a point, lists joined by |."""
    if value is None or value != value:
        return ""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, list | tuple):
        return "|".join(text_of(part) for part in value)
    return str(value).strip()
