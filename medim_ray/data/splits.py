"""Patients into splits: by a keyed hash of the patient id, so that a patient never straddles splits and adding patients
moves nobody. Also the hash under which patient ids are stored."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

SPLITS = ("train", "val", "test")
_CHUNK = 1 << 15
_NAMES = {
    **{name: name for name in SPLITS},
    **dict.fromkeys(("training",), "train"),
    **dict.fromkeys(("valid", "validate", "validation", "dev"), "val"),
    **dict.fromkeys(("testing",), "test"),
}


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Shares of the patients (not of the images) in each split."""

    train: float = field(default=0.8, metadata={"help": "share of the patients to train on"})
    val: float = field(default=0.1, metadata={"help": "share of the patients to choose by"})
    test: float = field(default=0.1, metadata={"help": "share of the patients to judge by"})
    seed: int = field(default=0, metadata={"help": "another seed deals the patients anew"})

    def __post_init__(self) -> None:
        shares = (self.train, self.val, self.test)
        if min(shares) < 0 or abs(sum(shares) - 1.0) > 1e-6:
            raise ValueError(
                f"train={self.train}, val={self.val}, test={self.test}: shares must be >= 0 and add up to 1"
            )


@dataclass(frozen=True)
class Patients:
    """codes_N: the patient of each row, a place in `names`."""

    codes_N: NDArray[np.int32]
    names: pa.Array


def hash_patient(patient_id: str, salt: str) -> str:
    """16 hexadecimal digits: BLAKE2b of the id under the salt as key. Without the salt the id can't be guessed back."""
    key = hashlib.blake2b(salt.encode()).digest()
    return hashlib.blake2b(patient_id.encode(), key=key, digest_size=8).hexdigest()


def salt_mark(salt: str) -> str:
    """What two shard sets of one salt have in common: the hash of a word that is no patient."""
    return hash_patient("medim-ray", salt)


def hash_patients(names: pa.Array, salt: str) -> pa.Array:
    """`hash_patient` of each name."""
    key, blake2b = hashlib.blake2b(salt.encode()).digest(), hashlib.blake2b
    chunks = [pa.array([], type=pa.string())]
    for start in range(0, len(names), _CHUNK):
        chunk = names.slice(start, _CHUNK).to_pylist()
        chunks.append(pa.array([blake2b(name.encode(), key=key, digest_size=8).hexdigest() for name in chunk]))
    return pa.concat_arrays(chunks)


def split_of(patient_id: str, config: SplitConfig) -> str:
    """The split of a patient, a function of the id and `config` alone (not of the salt, nor of other patients)."""
    return SPLITS[int(_deal_by_hash(pa.array([patient_id]), config)[0])]


def _deal_by_hash(names: pa.Array, config: SplitConfig) -> NDArray[np.int8]:
    """[P] places in SPLITS."""
    key, blake2b = f"medim-ray split {config.seed}".encode(), hashlib.blake2b
    places_P = np.empty(len(names), dtype=np.uint64)
    for start in range(0, len(names), _CHUNK):
        chunk = names.slice(start, _CHUNK).to_pylist()
        digests = b"".join([blake2b(name.encode(), key=key, digest_size=8).digest() for name in chunk])
        places_P[start : start + len(chunk)] = np.frombuffer(digests, dtype="<u8")
    shares = [(SPLITS.index(name), share) for name in SPLITS if (share := getattr(config, name)) > 0]
    edges = np.cumsum([share for _, share in shares])[:-1]  # the last one takes what rounding leaves
    which = np.searchsorted(edges, places_P / 2.0**64, side="right")
    return np.array([split for split, _ in shares], dtype=np.int8)[which]


def deal(
    patients: Patients, given: Any, image_ids: Any, config: SplitConfig
) -> tuple[NDArray[np.int8], NDArray[np.bool_]]:
    """Of each row: the split (a place in SPLITS), and whether the user's own column decided it.

    given: the user's own split of each row, '' where there is none; a patient's own split counts for all of the
    patient's rows. Raises ValueError for unknown split names, and where the user's column puts one patient in two
    splits (images are named, patients are not).
    """
    codes_N = patients.codes_N
    given_N = _codes_of_given(given)
    of_patient_P = np.full(len(patients.names), -1, dtype=np.int8)
    known = np.flatnonzero(given_N >= 0)
    of_patient_P[codes_N[known][::-1]] = given_N[known][::-1]  # the first row counts
    against = known[of_patient_P[codes_N[known]] != given_N[known]]
    if len(against):
        raise _two_splits(codes_N, known, against, image_ids)
    is_given_P = of_patient_P >= 0
    dealt = np.flatnonzero(~is_given_P)
    if len(dealt):
        of_patient_P[dealt] = _deal_by_hash(patients.names.take(pa.array(dealt)), config)
    return of_patient_P[codes_N], is_given_P[codes_N]


def _codes_of_given(given: Any) -> NDArray[np.int8]:
    """[N] places in SPLITS, -1 where no split is given."""
    counted = given.combine_chunks() if isinstance(given, pa.ChunkedArray) else given
    encoded = counted.dictionary_encode()
    names = [name.strip().lower() for name in encoded.dictionary.to_pylist()]
    unknown = [
        name for name, plain in zip(encoded.dictionary.to_pylist(), names, strict=True) if plain and plain not in _NAMES
    ]
    if unknown:
        shown = ", ".join(repr(name) for name in unknown[:5])
        raise ValueError(f"the split column holds {shown}: known splits are {', '.join(sorted(_NAMES))}")
    codes = np.array([SPLITS.index(_NAMES[name]) if name else -1 for name in names], dtype=np.int8)
    found: NDArray[np.int8] = codes[encoded.indices.to_numpy()]
    return found


def _two_splits(
    codes_N: NDArray[np.int32], known: NDArray[np.int64], against: NDArray[np.int64], image_ids: Any
) -> ValueError:
    """The error for patients whose rows `against` differ from their first rows."""
    patients, first_against = np.unique(codes_N[against], return_index=True)
    rows = sorted(int(against[place]) for place in first_against)[:3]
    pairs = [(int(known[codes_N[known] == codes_N[row]][0]), row) for row in rows]
    shown = "; ".join(f"images {image_ids[a].as_py()!r} and {image_ids[b].as_py()!r}" for a, b in pairs)
    return ValueError(
        f"{len(patients)} patients are in two splits by the split column, which leaks them from training into the "
        f"test: {shown}. Give every image of a patient the same split, or clear source.split_column"
    )
