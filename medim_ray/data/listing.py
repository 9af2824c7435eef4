"""The rows of a job before any image is read: unique, dealt to splits, without patient ids, in their final order."""

from __future__ import annotations

import hashlib
from collections import Counter

import pyarrow as pa

from medim_ray.data import shards
from medim_ray.data.encode import NO_PATIENT
from medim_ray.data.splits import SPLITS, SplitConfig, assign, hash_patient


def final_rows(plan: pa.Table, split: SplitConfig, salt: str) -> pa.Table:
    """The plan with hashed patients, final splits, `row` (place in the source) and `flags`, in the order of the shards.

    That is by split, then by a hash of the image id, so that a row group is a random sample of its split (and studies
    of a patient lie apart). ValueError: an image id twice, a patient in two splits.
    """
    image_ids = plan["image_id"].to_pylist()
    counts = Counter(image_ids)
    if len(counts) < len(image_ids):
        twice = [name for name, num in counts.items() if num > 1]
        shown = ", ".join(f"{name!r} ({counts[name]} rows)" for name in twice[:5])
        raise ValueError(
            f"{len(twice)} image ids are not unique: {shown}{', …' if len(twice) > 5 else ''}. "
            "Remove the duplicates, or name a unique column as source.id_column"
        )
    known = plan["patient_id"].to_pylist()
    patients = [patient or f"image {name}" for patient, name in zip(known, image_ids, strict=True)]
    splits = assign(patients, plan["split"].to_pylist(), image_ids, split)
    hashed = {patient: hash_patient(patient, salt) for patient in dict.fromkeys(patients)}
    columns = {
        "row": pa.array(range(len(image_ids)), type=pa.int64()),
        "image_id": plan["image_id"],
        "patient_id": pa.array([hashed[patient] for patient in patients], type=pa.string()),
        "location": plan["location"],
        "view": plan["view"],
        "report": plan["report"],
        "split": pa.array(splits, type=pa.string()),
        "labels": plan["labels"],
        "flags": pa.array([[] if patient else [NO_PATIENT] for patient in known], type=pa.list_(pa.string())),
    }
    keys = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in image_ids]
    order = sorted(range(len(image_ids)), key=lambda i: (SPLITS.index(splits[i]), keys[i]))
    return pa.table(columns).take(pa.array(order, type=pa.int64())).combine_chunks()


def table_hash(table: pa.Table) -> str:
    """16 hexadecimal digits over the schema and every value."""
    sink = shards.HashingFile(shards.Nowhere())
    with pa.ipc.new_stream(pa.PythonFile(sink, mode="w"), table.schema) as writer:
        writer.write_table(table)
    return sink.hexdigest()[:16]
