"""What a source is: a plan of its rows, made once on the driver, and the pixels of one row, read in any Ray task.

Neither Ray nor torch is imported here: tasks load this module in every worker process.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from medim_ray.data.images import Gray, decode_file, fetch, is_dicom
from medim_ray.registry import Registry

if TYPE_CHECKING:
    from medim_ray.data.dicom import Radiograph

PLAN_COLUMNS = ("image_id", "patient_id", "location", "view", "report", "split", "labels")
"""Columns of a plan: strings, '' where unknown (report: large_string), and `labels`, a struct of strings or null."""


@dataclass(frozen=True, kw_only=True)
class Truth:
    """A known lesion: its finding, side ("left", "right" or ""), zone, pixels, and the words of the sentence that
    states it ('' where none does)."""

    finding: str
    side: str
    zone: str
    sentence: str
    mask_HW: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One row, read: gray pixels [H, W] (uint8 or uint16), report, labels.

    flags: what is odd about the row, kept in the shards.
    """

    image_HW: Gray
    view: str
    report: str
    labels: Mapping[str, str]
    truth: tuple[Truth, ...] = ()
    flags: tuple[str, ...] = ()


class Source(Protocol):
    """A data set. Its class holds a frozen `Config` with a field `name`; it is constructed as `cls(config)`, pickled
    into tasks, and registered in SOURCES."""

    name: str  # kept in the shards' column `source`

    def plan(self) -> pa.Table:
        """One row an image, columns PLAN_COLUMNS. ValueError for faults of the whole job (missing column, no row)."""
        ...

    def sample(self, row: Mapping[str, Any]) -> Sample:
        """The sample of one row of the plan. BadImageError where its image can't be read."""
        ...


SOURCES: Registry[Any] = Registry("source")


def plan_table(
    *,
    image_id: Any,
    patient_id: Any,
    location: Any,
    view: Any,
    report: Any,
    split: Any,
    labels: Mapping[str, Any],
) -> pa.Table:
    """A plan from arrays or sequences of strings of equal length; `labels` holds one a label name. ValueError: a name
    that is no UTF-8."""

    def column(values: Any, kind: pa.DataType) -> Any:
        if isinstance(values, pa.Array | pa.ChunkedArray):
            return values.cast(kind)
        try:
            return pa.array(values, type=kind)
        except UnicodeEncodeError as error:  # names of files are bytes, and Python has strings for all of them
            raise ValueError(
                f"the name {error.object!r} is not UTF-8: rename it, or all of a tree with "
                "`convmv -f latin1 -t utf8 -r --notest FOLDER`"
            ) from None

    def whole(values: Any) -> pa.Array:
        return values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values

    columns = [column(v, pa.string()) for v in (image_id, patient_id, location, view)]
    columns += [column(report, pa.large_string()), column(split, pa.string())]
    names = list(labels)
    values = [whole(column(labels[name], pa.string())) for name in names]
    empty = pa.array([{}] * len(columns[0]), type=pa.struct([]))
    columns.append(pa.StructArray.from_arrays(values, names=names) if names else empty)
    return pa.table(columns, names=list(PLAN_COLUMNS))


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row of a plan; '' where unknown, labels '' are left out."""

    image_id: str
    location: str
    patient_id: str = ""
    view: str = ""
    report: str = ""
    split: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


def plan_rows(rows: Sequence[Row]) -> pa.Table:
    """A plan from rows; its labels are those that at least one row has, in the order of their first appearance."""
    names = list(dict.fromkeys(name for row in rows for name, value in row.labels.items() if value))
    return plan_table(
        image_id=[row.image_id for row in rows],
        patient_id=[row.patient_id for row in rows],
        location=[row.location for row in rows],
        view=[row.view for row in rows],
        report=[row.report for row in rows],
        split=[row.split for row in rows],
        labels={name: [row.labels.get(name) or None for row in rows] for name in names},
    )


class Picture(NamedTuple):
    """Decoded pixels [H, W] and what is odd about their file."""

    image_HW: Gray
    flags: tuple[str, ...] = ()


def plain_sample(
    row: Mapping[str, Any],
    picture: Picture,
    *,
    more_labels: Mapping[str, str] | None = None,
    truth: tuple[Truth, ...] = (),
    flags: tuple[str, ...] = (),
) -> Sample:
    """The sample of a plan's row and its picture; `more_labels` add to those of the plan, they change none."""
    known = {name: value for name, value in row["labels"].items() if value is not None}
    labels = {**{name: value for name, value in (more_labels or {}).items() if value}, **known}
    view = row["view"] or labels.get("view", "")
    flags = (*picture.flags, *flags)
    return Sample(image_HW=picture.image_HW, view=view, report=row["report"], labels=labels, truth=truth, flags=flags)


def read_image(url: str) -> Picture:
    """An image or DICOM file at any fsspec URL, [H, W] uint8 or uint16.

    BadImageError: it can't be read, or is a DICOM file that source `dicom` would not take with its defaults.
    """
    return decode_image(fetch(url))


def decode_image(data: bytes) -> Picture:
    """The bytes of an image or DICOM file, as `read_image`."""
    if is_dicom(data[:132]):
        radiograph = chest_radiograph(data)
        return Picture(radiograph.image_HW, radiograph.flags)
    return Picture(decode_file(data))


def chest_radiograph(data: bytes) -> Radiograph:
    """A DICOM file that another source lists, by the defaults of source `dicom`.

    BadImageError: no image, text burned into it, another part of the body, no radiograph.
    """
    from medim_ray.data.dicom import decode_dicom, refuse_burned_in, refuse_other  # pydicom: only where it is used

    wanted = SOURCES["dicom"].Config()
    radiograph = decode_dicom(data, window=wanted.window)
    refuse_burned_in(radiograph.header)
    refuse_other(radiograph.header, body_parts=wanted.body_parts, modalities=wanted.modalities)
    return radiograph


def absolute(url: str) -> str:
    """A local path from the root of the file system (a task's working folder is not the driver's), also that of an
    archive (zip://name::path); URLs stay."""
    if "://" not in url:
        return str(Path(url).expanduser().absolute())
    head, chain, archive = url.partition("::")
    return f"{head}{chain}{absolute(archive)}" if archive else url


def missing_column(option: str, value: str, present: Sequence[str], where: str) -> ValueError:
    """The error for a column that `where` has not: names the nearest one and those that are there."""
    near = difflib.get_close_matches(value, present, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(f"{option}={value!r}: {where} has no such column.{hint} Its columns: {', '.join(present)}")


def described(default: Any, text: str) -> Any:
    """A dataclass field with its meaning."""
    return field(default=default, metadata={"help": text})
