"""The WordPiece vocabulary of a shard set, trained on its training reports. Words of few patients are left out, so that
no name becomes a token; they are spelled with pieces of other words. Knows no Ray.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from medim_ray.data.shards import TOKENIZER, OtherFile, ShardFile, describe_file
from medim_ray.reports.wordpiece import train_tokenizer

_MAX_PATIENTS = 50_000  # more teach a vocabulary nothing; keeps the memory bounded


@dataclass(frozen=True, kw_only=True)
class VocabularyConfig:
    """The vocabulary that a text encoder trained from scratch uses (text.name=bert)."""

    size: int = field(default=2000, metadata={"help": "word pieces, at most"})
    min_patients: int = field(default=5, metadata={"help": "patients that must share a word for it to be learned from"})

    def __post_init__(self) -> None:
        if self.size < 100:
            raise ValueError(f"size={self.size}: at least 100 word pieces")
        if self.min_patients < 1:
            raise ValueError(f"min_patients={self.min_patients}: at least 1")


def write_vocabulary(
    files: Sequence[ShardFile], config: VocabularyConfig, fs: fsspec.AbstractFileSystem, root: str
) -> list[OtherFile]:
    """Trains on the training files of root, writes root/tokenizer; [] where no word has enough patients."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            train_tokenizer(_texts(files, fs, root), folder, vocab_size=config.size, min_reports=config.min_patients)
        except ValueError:
            return []
        names = sorted(path.name for path in Path(folder).iterdir())
        fs.makedirs(f"{root}/{TOKENIZER}", exist_ok=True)
        for name in names:
            fs.put_file(str(Path(folder) / name), f"{root}/{TOKENIZER}/{name}")
    return [describe_file(fs, root, f"{TOKENIZER}/{name}") for name in names]


def _texts(files: Sequence[ShardFile], fs: fsspec.AbstractFileSystem, root: str) -> Iterator[str]:
    """The reports of one patient after the other, as one text each: what the trainer counts is then patients."""
    patients: set[str] = set()
    for table in _read(files, fs, root, ["patient_id"]):
        patients.update(table["patient_id"].to_pylist())
        patients = set(sorted(patients)[:_MAX_PATIENTS])  # ids are hashes: the lowest are a random choice
    chosen = pa.array(sorted(patients), type=pa.string())
    texts: dict[str, list[str]] = {}
    for table in _read(files, fs, root, ["patient_id", "report"]):
        kept = table.filter(pc.is_in(table["patient_id"], chosen))
        for patient, report in zip(kept["patient_id"].to_pylist(), kept["report"].to_pylist(), strict=True):
            texts.setdefault(patient, []).append(report)
    for _, reports in sorted(texts.items()):
        yield "\n".join(sorted(reports))


def _read(
    files: Sequence[ShardFile], fs: fsspec.AbstractFileSystem, root: str, columns: list[str]
) -> Iterator[pa.Table]:
    for file in files:
        if file.split == "train":
            with fs.open(f"{root}/{file.path}", "rb") as raw:
                yield pq.read_table(raw, columns=columns)
