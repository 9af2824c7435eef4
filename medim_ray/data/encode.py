"""Rows of a source's plan to rows of a shard: read, resize, encode, split the report, keep the faults. Knows no Ray.

One `RowEncoder` call makes one row group and the facts about it; the same plan rows give the same bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from medim_ray.data.fingerprint import perceptual_hash, pixel_hash, row_checksum
from medim_ray.data.images import BadImageError, Gray, ImageEncoder
from medim_ray.data.shards import SCHEMA, SECTIONS
from medim_ray.data.sources.base import Sample, Source
from medim_ray.reports.sections import split_sections, split_sentences

NO_REPORT, NO_PATIENT = "no_report", "no_patient_id"


@dataclass(kw_only=True)
class PartFacts:
    """What one task found out about its run of plan rows; lists run over the rows that it encoded.

    places: in the run; num_bytes: of the encoded row; pixel_sums: (pixels, their sum, sum of squares, bits), exact.
    quarantined: (row of the source, image id, location, reason).
    """

    places: list[int] = field(default_factory=list)
    pixel_hash: list[str] = field(default_factory=list)
    perceptual_hash: list[str] = field(default_factory=list)
    num_bytes: list[int] = field(default_factory=list)
    pixel_sums: list[tuple[int, int, int, int]] = field(default_factory=list)
    quarantined: list[tuple[int, str, str, str]] = field(default_factory=list)

    def to_json(self) -> str:
        """Text for `from_json`."""
        return json.dumps(vars(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> PartFacts:
        """The facts that `to_json` wrote."""
        return cls.from_tree(json.loads(text))

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> PartFacts:
        """The facts of parsed JSON."""
        return cls(**{**tree, "quarantined": [tuple(entry) for entry in tree["quarantined"]]})


@dataclass(kw_only=True)
class RowCounts:
    """Rows by flag, by value of each label, and by source."""

    labels: dict[str, Counter[str]] = field(default_factory=dict)
    flags: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)

    def count(self, rows: pa.Table) -> None:
        """Adds rows of a shard, in place."""
        self.sources.update(rows["source"].to_pylist())
        for flags, labels in zip(rows["flags"].to_pylist(), rows["labels"].to_pylist(), strict=True):
            self.flags.update(flags)
            for name, value in labels:
                self.labels.setdefault(name, Counter())[value] += 1

    def add(self, flags: Mapping[str, int], labels: Mapping[str, Mapping[str, int]]) -> None:
        """Adds what was counted elsewhere, in place."""
        self.flags.update(flags)
        for name, counts in labels.items():
            self.labels.setdefault(name, Counter()).update(counts)


class RowEncoder:
    """Callable: plan rows -> shard rows and facts. Pickled into Ray tasks."""

    def __init__(self, source: Source, image: ImageEncoder) -> None:
        self._source, self._image = source, image

    def __call__(self, plan: pa.Table) -> tuple[pa.Table, PartFacts]:
        """plan: PLAN_COLUMNS with hashed patients, final splits, `row` (place in the source) and `flags`."""
        cv2.setNumThreads(1)  # one CPU a task is what Ray was asked for
        facts, rows = PartFacts(), []
        for place, row in enumerate(plan.to_pylist()):
            try:
                sample = self._source.sample(row)
            except BadImageError as error:
                facts.quarantined.append((row["row"], row["image_id"], row["location"], str(error)))
                continue
            image_HW = self._image.prepare(sample.image_HW)
            rows.append(self._shard_row(row, sample, image_HW))
            facts.places.append(place)
            facts.pixel_hash.append(rows[-1]["pixel_hash"])
            facts.perceptual_hash.append(rows[-1]["perceptual_hash"])
            facts.num_bytes.append(_num_bytes(rows[-1]))
            facts.pixel_sums.append(pixel_sums(image_HW))
        return pa.Table.from_pylist(rows, schema=SCHEMA), facts

    def _shard_row(self, row: Mapping[str, Any], sample: Sample, image_HW: Gray) -> dict[str, Any]:
        sections = asdict(split_sections(sample.report))
        report = report_text(sections)
        sentences = [sentence.text for sentence in split_sentences(report)]
        flags = [*row["flags"], *sample.flags, *([] if report else [NO_REPORT])]
        encoded = self._image.encode(image_HW)
        truth = [
            {
                "finding": lesion.finding,
                "side": lesion.side,
                "zone": lesion.zone,
                "sentence": sentences.index(lesion.sentence) if lesion.sentence else -1,
                "mask": self._image.encode_mask(lesion.mask_HW),
            }
            for lesion in sample.truth
        ]
        return {
            "image_id": row["image_id"],
            "patient_id": row["patient_id"],
            "split": row["split"],
            "source": self._source.name,
            "view": sample.view,
            "image": encoded.data,
            "height": encoded.height,
            "width": encoded.width,
            "bits": encoded.bits,
            "report": report,
            "sections": {name: sections[name] for name in SECTIONS},
            "sentences": sentences,
            "labels": sorted(sample.labels.items()),
            "truth": truth,
            "flags": sorted(set(flags)),
            "pixel_hash": pixel_hash(image_HW),
            "perceptual_hash": perceptual_hash(image_HW),
            "checksum": row_checksum(row["image_id"].encode(), encoded.data, report.encode()),
        }


def report_text(sections: Mapping[str, str]) -> str:
    """What a text encoder reads: findings and impression (MedIM's choice), or the body where neither has a heading."""
    parts: Iterable[str] = (sections["findings"], sections["impression"])
    text = "\n\n".join(part for part in parts if part)
    return text or sections["body"]


def _num_bytes(row: Mapping[str, Any]) -> int:
    """What a row adds to a file, nearly: texts are compressed to about a third."""
    return len(row["image"]) + sum(len(lesion["mask"]) for lesion in row["truth"]) + len(row["report"]) + 200


def pixel_sums(image_HW: Gray) -> tuple[int, int, int, int]:
    """Number of pixels, their sum, the sum of their squares, bits a pixel."""
    bits = 8 * image_HW.dtype.itemsize
    if bits == 8:  # OpenCV's sums of 8-bit values are whole numbers below 2**53: exact
        return image_HW.size, int(cv2.sumElems(image_HW)[0]), int(cv2.norm(image_HW, cv2.NORM_L2SQR)), bits
    values = image_HW.ravel().astype(np.int64)
    return image_HW.size, int(values.sum()), int(values @ values), bits


def mean_std(sums_N4: NDArray[np.int64]) -> dict[str, float]:
    """Mean and standard deviation of all pixels on the scale [0, 1], and their number; {} where there are none.

    sums_N4: rows of `PartFacts.pixel_sums`.
    """
    total, squares, num = 0.0, 0.0, 0
    for bits in (8, 16):
        of_bits = sums_N4[sums_N4[:, 3] == bits]
        top = float(2**bits - 1)
        num += sum(of_bits[:, 0].tolist())
        total += sum(of_bits[:, 1].tolist()) / top  # Python's whole numbers: exact in any order
        squares += sum(of_bits[:, 2].tolist()) / top**2
    if not num:
        return {}
    return {"mean": total / num, "std": max(squares / num - (total / num) ** 2, 0.0) ** 0.5, "pixels": num}


def pooled(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What `mean_std` says of several sets of pixels together."""
    known = [part for part in parts if part]
    num = sum(part["pixels"] for part in known)
    if not num:
        return {}
    mean = sum(part["mean"] * part["pixels"] for part in known) / num
    square = sum((part["std"] ** 2 + part["mean"] ** 2) * part["pixels"] for part in known) / num
    return {"mean": mean, "std": max(square - mean**2, 0.0) ** 0.5, "pixels": num}
