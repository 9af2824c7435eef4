"""From the facts about encoded rows to the files of the set, and from written files to its manifest. Knows no Ray."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

import medim_ray
from medim_ray.data import shards
from medim_ray.data.duplicates import Hashed, Verdict, judge, to_json
from medim_ray.data.encode import PartFacts, RowCounts, mean_std, pooled
from medim_ray.data.fingerprint import parse_hashes
from medim_ray.data.layout import FilePlan, ShardConfig, cut
from medim_ray.data.output import Stored
from medim_ray.data.shards import Manifest, OtherFile, ShardFile
from medim_ray.data.splits import SPLITS
from medim_ray.data.vocabulary import VocabularyConfig, write_vocabulary
from medim_ray.data.work import WorkFolder, WrittenFile


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """All parts of a job. rows: `listing.final_rows` that are new in the set, cut into runs of `part_rows`;
    is_bound_N: of each row, whether its patient is in the set already; None where there is none yet."""

    rows: pa.Table
    part_rows: int
    facts: Mapping[int, PartFacts]
    is_bound_N: NDArray[np.bool_] | None

    def quarantined(self) -> list[tuple[int, str, str, str]]:
        """(row of the source, image id, location, reason), in the order of the source."""
        return sorted(entry for facts in self.facts.values() for entry in facts.quarantined)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be written. parts_N, places_N: where each of N encoded rows lies; of_file: path -> its rows among
    them, in order; hashed and verdict: over the stored rows, then these."""

    encoded: Encoded
    files: list[FilePlan]
    of_file: dict[str, NDArray[np.int64]]
    parts_N: NDArray[np.int64]
    places_N: NDArray[np.int64]
    pixel_sums_N4: NDArray[np.int64]
    hashed: Hashed
    verdict: Verdict

    def rows_of(self, file: FilePlan) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Part, and place in it, of each row of a file."""
        rows_K = self.of_file[file.path]
        return self.parts_N[rows_K], self.places_N[rows_K]

    def parts_of(self, files: Iterable[FilePlan]) -> set[int]:
        """Parts that hold rows of these files."""
        return {part for file in files for part in np.unique(self.rows_of(file)[0]).tolist()}


def plan_files(encoded: Encoded, rule: str, config: ShardConfig, stored: Stored | None) -> Plan:
    """Final splits, copies and files. Rows of a split are in the order of their keys."""
    numbers = sorted(encoded.facts)
    all_facts = [encoded.facts[number] for number in numbers]
    parts_N = np.repeat(np.array(numbers, dtype=np.int64), [len(facts.places) for facts in all_facts])
    positions_N = parts_N * encoded.part_rows + _joined(all_facts, "places", np.int64)
    places_N = np.concatenate([np.arange(len(facts.places)) for facts in all_facts])  # parts have no unreadable rows
    order_N = np.argsort(encoded.rows["key"].to_numpy()[positions_N], kind="stable")
    hashed = _hashed(encoded, positions_N[order_N], all_facts, order_N, stored)
    verdict = judge(hashed, rule)
    num_stored = 0 if stored is None else stored.rows.num_rows
    splits_N, is_skipped_N = verdict.splits_N[num_stored:], verdict.is_skipped_N[num_stored:]
    num_bytes_N = _joined(all_facts, "num_bytes", np.int64)[order_N]
    files: list[FilePlan] = []
    of_file: dict[str, NDArray[np.int64]] = {}
    for code, split in enumerate(SPLITS):
        rows_S = np.flatnonzero((splits_N == code) & ~is_skipped_N)
        for file in cut(split, num_bytes_N[rows_S], config, _next_number(split, stored)):
            files.append(file)
            of_file[file.path] = rows_S[file.first : file.first + sum(file.row_groups)]
    return Plan(
        encoded=encoded,
        files=files,
        of_file=of_file,
        parts_N=parts_N[order_N],
        places_N=places_N[order_N],
        pixel_sums_N4=_joined(all_facts, "pixel_sums", np.int64).reshape(-1, 4)[order_N],
        hashed=hashed,
        verdict=verdict,
    )


def _joined(all_facts: list[PartFacts], name: str, kind: Any) -> NDArray[Any]:
    arrays = [np.array(getattr(facts, name), dtype=kind) for facts in all_facts if getattr(facts, name)]
    return np.concatenate(arrays) if arrays else np.empty(0, dtype=kind)


def _hashed(
    encoded: Encoded,
    positions_N: NDArray[np.int64],
    all_facts: list[PartFacts],
    order_N: NDArray[np.int64],
    stored: Stored | None,
) -> Hashed:
    """Stored rows, then the new ones in the order of their keys."""
    new = encoded.rows.select(["image_id", "patient_id", "split"]).take(pa.array(positions_N))
    for name in ("pixel_hash", "perceptual_hash"):
        values = pa.array([value for facts in all_facts for value in getattr(facts, name)], type=pa.string())
        new = new.append_column(name, values.take(pa.array(order_N)))
    is_given_N = encoded.rows["is_given"].to_numpy()[positions_N]
    is_bound_N = np.zeros(len(order_N), dtype=np.bool_)
    if encoded.is_bound_N is not None:
        is_bound_N = encoded.is_bound_N[positions_N]
    num_stored = 0 if stored is None else stored.rows.num_rows
    before_N = np.zeros(num_stored, dtype=np.bool_)
    table = new if stored is None else pa.concat_tables([stored.rows.select(new.column_names), new])
    return Hashed(
        image_ids=table["image_id"],
        patients=table["patient_id"],
        pixel_hashes=table["pixel_hash"],
        perceptual_N5=parse_hashes(table["perceptual_hash"].to_pylist()),
        splits_N=pc.index_in(table["split"], pa.array(SPLITS)).to_numpy().astype(np.int8),
        is_stored_N=np.concatenate([~before_N, np.zeros(len(order_N), dtype=np.bool_)]),
        is_given_N=np.concatenate([before_N, is_given_N]),
        is_bound_N=np.concatenate([before_N, is_bound_N]),
    )


def _next_number(split: str, stored: Stored | None) -> int:
    """The number of the next file of a split."""
    if stored is None:
        return 0
    numbers = [
        int(f.path.rpartition("/")[2].removesuffix(".parquet")) for f in stored.manifest.files if f.split == split
    ]
    return max(numbers, default=-1) + 1


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What the set is a function of, and the name of its source."""

    source: str
    config_hash: str
    input_hash: str
    salt_mark: str
    rule: str
    vocabulary: VocabularyConfig


def finish(
    identity: Identity, plan: Plan, written: Mapping[str, WrittenFile], stored: Stored | None, work: WorkFolder
) -> Manifest:
    """Writes quarantine, list of copies and vocabulary, then the manifest; what was stored is part of it."""
    fs, root = work.fs, work.root
    new_files = [written[file.path].file for file in plan.files]
    old = None if stored is None else stored.manifest
    files = sorted([*(old.files if old else ()), *new_files], key=lambda f: (SPLITS.index(f.split), f.path))
    counts = RowCounts()
    if old is not None:
        counts.add(old.flags, old.labels)
    for entry in written.values():
        counts.add(entry.counts.flags, entry.counts.labels)
    quarantined = plan.encoded.quarantined()
    reasons = Counter(reason for *_, reason in quarantined) + Counter(old.quarantine if old else {})
    is_kept_N = ~plan.verdict.is_skipped_N
    rows_in = plan.encoded.rows.num_rows + (old.rows_in if old else 0)
    rows_skipped = int((~is_kept_N).sum()) + (old.rows_skipped if old else 0)
    splits = {split: sum(f.rows for f in files if f.split == split) for split in SPLITS}
    num_new = sum(file.rows for file in new_files)
    sources = Counter(old.sources if old else {}) + Counter({identity.source: num_new})
    manifest = Manifest(
        package_version=medim_ray.__version__,
        config_hash=identity.config_hash,
        input_hash=identity.input_hash,
        rows_in=rows_in,
        rows_out=sum(splits.values()),
        rows_quarantined=sum(reasons.values()),
        rows_skipped=rows_skipped,
        splits=splits,
        sources=dict(sorted(sources.items())),
        quarantine=dict(sorted(reasons.items())),
        flags=dict(sorted(counts.flags.items())),
        patients=_num_patients(plan, is_kept_N),
        labels={name: dict(sorted(values.items())) for name, values in sorted(counts.labels.items())},
        intensity=_intensity(plan, old),
        files=tuple(files),
        other_files=tuple(_others(identity, plan, quarantined, files, stored, work)),
        salt_mark=identity.salt_mark,
    )
    kept, gone = manifest.rows_out, manifest.rows_quarantined + manifest.rows_skipped
    assert manifest.rows_in == kept + gone, "rows went missing"
    shards.write_bytes(fs, root, shards.MANIFEST, manifest.to_json().encode())
    return manifest


def _others(
    identity: Identity,
    plan: Plan,
    quarantined: list[tuple[int, str, str, str]],
    files: list[ShardFile],
    stored: Stored | None,
    work: WorkFolder,
) -> list[OtherFile]:
    """Quarantine, list of copies, vocabulary. One that is there stays: trained models know its numbers."""
    names = shards.QUARANTINE_SCHEMA.names
    entries = [dict(zip(names, entry[1:], strict=True)) for entry in quarantined]
    table = pa.Table.from_pylist(entries, schema=shards.QUARANTINE_SCHEMA)
    old_files: tuple[OtherFile, ...] = ()
    if stored is not None:
        table = pa.concat_tables([stored.quarantine, table])
        old_files = stored.manifest.other_files
    copies = to_json(plan.hashed, plan.verdict, identity.rule, stored.copies if stored else ())
    vocabulary = [file for file in old_files if file.path.startswith(f"{shards.TOKENIZER}/")]
    return [
        shards.write_table(work.fs, work.root, shards.QUARANTINE, table),
        shards.write_bytes(work.fs, work.root, shards.DUPLICATES, copies.encode()),
        *(vocabulary or write_vocabulary(files, identity.vocabulary, work.fs, work.root)),
    ]


def _num_patients(plan: Plan, is_kept_N: NDArray[np.bool_]) -> dict[str, int]:
    """Patients of each split who have a sample."""
    kept = plan.hashed.patients.filter(pa.array(is_kept_N))
    splits_K = plan.verdict.splits_N[is_kept_N]
    return {split: len(pc.unique(kept.filter(pa.array(splits_K == code)))) for code, split in enumerate(SPLITS)}


def _intensity(plan: Plan, old: Manifest | None) -> dict[str, float]:
    """Over the training pixels that are stored."""
    num_stored = len(plan.verdict.splits_N) - len(plan.parts_N)
    in_training_N = (plan.verdict.splits_N == SPLITS.index("train")) & ~plan.verdict.is_skipped_N
    new = mean_std(plan.pixel_sums_N4[in_training_N[num_stored:]])
    return new if old is None else pooled([old.intensity, new])
