"""Patients into splits: by a keyed hash of the patient id, so that a patient never straddles splits and adding patients
moves nobody. Also the hash under which patient ids are stored."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

SPLITS = ("train", "val", "test")
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


def hash_patient(patient_id: str, salt: str) -> str:
    """16 hexadecimal digits: BLAKE2b of the id under the salt as key. Without the salt the id can't be guessed back."""
    key = hashlib.blake2b(salt.encode()).digest()
    return hashlib.blake2b(patient_id.encode(), key=key, digest_size=8).hexdigest()


def split_of(patient_id: str, config: SplitConfig) -> str:
    """The split of a patient, a function of the id and `config` alone (not of the salt, nor of other patients)."""
    key = f"medim-ray split {config.seed}".encode()
    digest = hashlib.blake2b(patient_id.encode(), key=key, digest_size=8).digest()
    place = int.from_bytes(digest, "little") / 2**64
    shares = [(name, share) for name in SPLITS if (share := getattr(config, name)) > 0]
    edge = 0.0
    for name, share in shares:
        edge += share
        if place < edge:
            return name
    return shares[-1][0]  # the shares add up to 1 but for rounding


def assign(
    patient_ids: Sequence[str], given: Sequence[str], image_ids: Sequence[str], config: SplitConfig
) -> list[str]:
    """The split of each row.

    given: the user's own split of each row, '' where there is none; a patient's own split counts for all of the
    patient's rows. Raises ValueError for unknown split names, and where the user's column puts one patient in two
    splits (images are named, patients are not).
    """
    chosen: dict[str, tuple[str, int]] = {}
    conflicts: dict[str, tuple[int, int]] = {}
    unknown: dict[str, None] = {}
    for row, (patient, name) in enumerate(zip(patient_ids, given, strict=True)):
        if not name:
            continue
        split = _NAMES.get(name.strip().lower())
        if split is None:
            unknown[name] = None
            continue
        first, first_row = chosen.setdefault(patient, (split, row))
        if first != split:
            conflicts.setdefault(patient, (first_row, row))
    if unknown:
        shown = ", ".join(repr(name) for name in list(unknown)[:5])
        raise ValueError(f"the split column holds {shown}: known splits are {', '.join(sorted(_NAMES))}")
    if conflicts:
        shown = "; ".join(f"images {image_ids[a]!r} and {image_ids[b]!r}" for a, b in list(conflicts.values())[:3])
        raise ValueError(
            f"{len(conflicts)} patients are in two splits by the split column, which leaks them from training into the "
            f"test: {shown}. Give every image of a patient the same split, or clear source.split_column"
        )
    splits = {patient: split_of(patient, config) for patient in dict.fromkeys(patient_ids) if patient not in chosen}
    splits.update((patient, split) for patient, (split, _) in chosen.items())
    return [splits[patient] for patient in patient_ids]
