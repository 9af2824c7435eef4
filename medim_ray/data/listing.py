"""The rows of a job before any image is read: unique, dealt to splits, without patient ids, in their final order.

Everything is done a column at a time and freed as soon as may be: a million rows take seconds and little memory.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from medim_ray.data import shards
from medim_ray.data.encode import NO_PATIENT
from medim_ray.data.splits import SPLITS, Patients, SplitConfig, deal, hash_patients

_CHUNK = 1 << 15


def final_rows(plan: pa.Table, split: SplitConfig, salt: str) -> pa.Table:
    """The plan with hashed patients, provisional splits, `row` (place in the source), `is_given` (the user's own
    column decided the split), `key` (a hash of the image id) and `flags`, in the order of the shards.

    That is by split, then by `key`, so that a row group is a random sample of its split (and studies of a patient lie
    apart). ValueError: an image id twice, a patient in two splits by the user's column.
    """
    columns: dict[str, Any] = {name: plan[name] for name in plan.column_names}
    del plan  # a column is dropped when its sorted copy is made
    give_back()
    keys_N = image_keys(columns["image_id"])
    _refuse_twice(columns["image_id"], keys_N)
    unknown = pc.equal(columns["patient_id"], "")
    names = pc.if_else(unknown, pc.binary_join_element_wise("image", columns["image_id"], " "), columns["patient_id"])
    encoded = pa.chunked_array([names]) if isinstance(names, pa.Array) else names
    encoded = encoded.combine_chunks().dictionary_encode()
    del names, columns["patient_id"]
    give_back()
    patients = Patients(encoded.indices.to_numpy(), encoded.dictionary)
    splits_N, is_given_N = deal(patients, columns.pop("split"), columns["image_id"], split)
    order_N = np.lexsort((keys_N, splits_N))
    order = pa.array(order_N)
    flags = pa.array([[], [NO_PATIENT]], type=pa.list_(pa.string()))
    table = {
        "row": order,
        "patient_id": hash_patients(encoded.dictionary, salt).take(encoded.indices.take(order)),
        "split": pa.array(SPLITS).take(pa.array(splits_N[order_N])),
        "is_given": pa.array(is_given_N[order_N]),
        "key": pa.array(keys_N[order_N]),
        "flags": flags.take(unknown.combine_chunks().take(order).cast(pa.int8())),
    }
    del encoded, patients
    for name in ("image_id", "location", "view", "report", "labels"):
        table[name] = columns.pop(name).combine_chunks().take(order)
        give_back()
    return pa.table({name: table[name] for name in ROW_COLUMNS})


ROW_COLUMNS = (
    *("row", "image_id", "patient_id", "location", "view", "report", "split", "labels"),
    *("flags", "is_given", "key"),
)


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Within, Arrow takes memory from the system's allocator, which can be told to give back what is free."""
    before = pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield
        give_back()
    finally:
        pa.set_memory_pool(before)


def give_back() -> None:
    """Returns free memory to the system."""
    pa.default_memory_pool().release_unused()


def values(column: Any) -> Iterator[list[Any]]:
    """The values of a column as Python objects, some thousands at a time."""
    for start in range(0, len(column), _CHUNK):
        yield column.slice(start, _CHUNK).to_pylist()


def image_keys(image_ids: Any) -> NDArray[np.uint64]:
    """[N] the first eight bytes of the BLAKE2b digest of each image id; their order is that of the shards."""
    keys_N = np.empty(len(image_ids), dtype=np.uint64)
    blake2b, at = hashlib.blake2b, 0
    for names in values(image_ids):
        digests = b"".join([blake2b(name.encode(), digest_size=8).digest() for name in names])
        keys_N[at : at + len(names)] = np.frombuffer(digests, dtype=">u8")
        at += len(names)
    return keys_N


def _refuse_twice(image_ids: Any, keys_N: NDArray[np.uint64]) -> None:
    sorted_N = np.sort(keys_N)
    again = np.unique(sorted_N[1:][sorted_N[1:] == sorted_N[:-1]])
    if not len(again):
        return
    counts = pc.value_counts(image_ids.filter(pa.array(np.isin(keys_N, again))))
    twice = {c["values"]: c["counts"] for c in counts.to_pylist() if c["counts"] > 1}
    if not twice:
        return  # different ids of one hash
    shown = ", ".join(f"{name!r} ({num} rows)" for name, num in list(twice.items())[:5])
    raise ValueError(
        f"{len(twice)} image ids are not unique: {shown}{', …' if len(twice) > 5 else ''}. "
        "Remove the duplicates, or name a unique column as source.id_column"
    )


def rows_hash(rows: pa.Table) -> str:
    """16 hexadecimal digits over what the source said of every row; neither their places in the source nor their order
    count, nor labels that no row has."""
    order = pa.array(np.argsort(rows["key"].to_numpy(), kind="stable"))
    digest = hashlib.blake2b(digest_size=8)
    columns = {name: rows[name] for name in ("image_id", "patient_id", "location", "view", "report", "split")}
    labels = rows["labels"].combine_chunks()
    for field in sorted(labels.type, key=lambda field: field.name):
        column = pc.struct_field(labels, field.name)
        if column.null_count < len(column):
            columns[f"label {field.name}"] = column
    for name in list(columns):
        column = columns.pop(name)
        digest.update(name.encode())
        sink = shards.HashingFile(shards.Nowhere(), "blake2b")
        one = pa.table({"x": column.take(order)}).combine_chunks()
        with pa.ipc.new_stream(pa.PythonFile(sink, mode="w"), one.schema) as writer:
            writer.write_table(one)
        del one, column
        give_back()
        digest.update(sink.hexdigest().encode())
    return digest.hexdigest()
