"""Source `dicom`: a tree or a list of DICOM files. The headers are read while the plan is made, pixels in the tasks."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from medim_ray.data.images import BadImageError, fetch
from medim_ray.data.sources.base import SOURCES, Picture, Row, Sample, absolute, described, plain_sample, plan_rows
from medim_ray.data.sources.files import exists, extension, is_file, join, list_files, read_text
from medim_ray.data.storage import opened, retried

if TYPE_CHECKING:
    from medim_ray.data.dicom_header import Header

SHARED_UID = "shared_sop_uid"
_LISTS = ("txt", "lst", "list")
# What lies between DICOM files and is none; everything else in a tree is a row, also without an ending.
_OTHER_ENDINGS = (
    "txt csv tsv json xml html htm pdf doc docx xls xlsx md log zip gz tar tgz exe dll inf ini cfg db yaml yml"
    " jpg jpeg png gif bmp tif tiff webp svg mp4 avi py sh parquet npy npz h5 nii sha256 md5"
)
_OTHERS = frozenset(_OTHER_ENDINGS.split())
_HEADER_BLOCK = 1 << 17  # bytes that remote storage is asked for at a time while headers are read


@SOURCES.register("dicom")
class DicomSource:
    """DICOM files in a tree or a list: windowed, MONOCHROME1 inverted, a fixed list of header fields as labels.

    An image's name is its SOPInstanceUID. Where several files share one, a hash of the path is added to each, and
    the rows are flagged `shared_sop_uid`.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        name: str = described("dicom", "dicom")
        path: str = described("", "folder, one file, or a list (.txt: a path or URL a line), path or fsspec URL")
        pattern: str = described("*", "files of the folder that are rows, by name, such as *.dcm")
        window: Literal["voi", "percentile", "none"] = described(
            "voi", "voi: the file's own window or LUT; percentile: the darkest and brightest 0.5 % are cut; none"
        )
        fields: tuple[str, ...] = described(
            ("view", "sex", "age", "modality", "manufacturer"),
            "header fields that are kept as labels; a wrong name lists the known ones",
        )
        burned_in: Literal["quarantine", "keep"] = described(
            "quarantine", "files with BurnedInAnnotation = YES: text in the pixels may name the patient"
        )
        body_parts: tuple[str, ...] = described(
            ("CHEST", "THORAX", "TORAX", "LUNG", "PULM"),
            "BodyPartExamined must hold one of these words where it is stated, else quarantine; []: any",
        )
        modalities: tuple[str, ...] = described(
            ("CR", "DX", "DR", "RG", "SC", "OT"), "Modality must be one of these where it is stated; []: any"
        )

        def __post_init__(self) -> None:
            from medim_ray.data.dicom_header import FIELDS

            for name in self.fields:
                if name not in FIELDS:
                    raise ValueError(
                        f"fields: {name!r} is never read from a header; those that can be are {', '.join(FIELDS)}"
                    )

    def __init__(self, config: Config) -> None:
        if not config.path:
            raise ValueError("source.path is not set: give the folder with the DICOM files as source.path=…")
        self.config = config
        self.name = config.name

    def plan(self) -> pa.Table:
        """See `Source`. Files whose header can't be read are rows too: their sample says why."""
        names, urls = self._files()
        with ThreadPoolExecutor(16) as pool:
            rows = list(pool.map(self._row, names, urls))
        counts = Counter(row.image_id for row in rows)
        return plan_rows(
            [
                replace(row, image_id=_unique(row.image_id, name)) if counts[row.image_id] > 1 else row
                for row, name in zip(rows, names, strict=True)
            ]
        )

    def sample(self, row: Mapping[str, Any]) -> Sample:
        """See `Source`."""
        from medim_ray.data.dicom import decode_dicom, refuse_burned_in, refuse_other

        radiograph = decode_dicom(fetch(row["location"]), window=self.config.window)
        header, flags = radiograph.header, list(radiograph.flags)
        refuse_other(header, body_parts=self.config.body_parts, modalities=self.config.modalities)
        if self.config.burned_in == "quarantine":
            refuse_burned_in(header)
        elif header.burned_in:
            flags.append("burned_in_annotation")
        if header.sop_uid and row["image_id"] != header.sop_uid:
            flags.append(SHARED_UID)
        return plain_sample(row, Picture(radiograph.image_HW, tuple(flags)))

    def _row(self, name: str, url: str) -> Row:
        header = _header_of(url)
        if header is None:
            return Row(image_id=name, location=url)
        return Row(
            image_id=header.sop_uid or name,
            location=url,
            patient_id=header.patient_id,
            view=header.fields.get("view", ""),
            labels={field: header.fields[field] for field in self.config.fields if field in header.fields},
        )

    def _files(self) -> tuple[list[str], list[str]]:
        """(names, URLs) of the rows; a name is the path below the folder, or the line of the list."""
        path, pattern = self.config.path, self.config.pattern
        if extension(path) in _LISTS:
            names = [line.strip() for line in read_text(path).splitlines()]
            names = list(dict.fromkeys(name for name in names if name and not name.startswith("#")))
            folder = absolute(path).rpartition("/")[0]
            urls = [name if "://" in name or name.startswith("/") else join(folder, name) for name in names]
        elif is_file(path) and exists(path):
            names, urls = [path.rpartition("/")[2]], [absolute(path)]
        else:
            found = list_files(path)
            bases = {name: name.rpartition("/")[2] for name in found}
            names = [name for name in found if fnmatch(bases[name], pattern)]
            if pattern == "*":
                names = [n for n in names if extension(n) not in _OTHERS and bases[n].upper() != "DICOMDIR"]
            urls = [join(path, name) for name in names]
            if not names and found:
                raise ValueError(f"source.path={path} holds {len(found)} files, but none like source.pattern={pattern}")
        if not names:
            raise ValueError(f"source.path={path} is empty: nothing to prepare")
        return names, urls


def _header_of(url: str) -> Header | None:
    """None where the file or its header can't be read; the row's sample finds out why. RuntimeError where its storage
    keeps failing: the row would lose its name and its patient."""
    from medim_ray.data.dicom_header import read_header

    def read() -> Header:
        remote: dict[str, Any] = {"block_size": _HEADER_BLOCK} if "://" in url else {}
        with opened(url, **remote) as file:
            return read_header(file)

    try:
        return retried(url, read)
    except (BadImageError, OSError, ValueError):
        return None


def _unique(sop_uid: str, name: str) -> str:
    path = name.encode(errors="surrogateescape")
    return f"{sop_uid}-{hashlib.blake2b(path, digest_size=4).hexdigest()}"
