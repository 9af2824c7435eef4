"""Which rows are copies of each other, what becomes of them, and the list of them. Sees hashes, never pixels.

Exact copies make one family of their patients: the family goes to one split, so that no copy straddles splits. Near
copies are only listed: radiographs look alike.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from medim_ray.data.fingerprint import MAX_DISTANCE, distances, near_pairs
from medim_ray.data.splits import SPLITS

MAX_LISTED = 10_000
_HELD_OUT_FIRST = tuple(SPLITS.index(name) for name in ("test", "val", "train"))


@dataclass(frozen=True, kw_only=True)
class Hashed:
    """N encoded rows. image_ids, patients, pixel_hashes: strings; splits_N: places in SPLITS.

    is_stored_N: the row is in the shards already. is_given_N: the user's own column gave the patient's split.
    is_bound_N: other rows of the patient are in the shards. None of these changes its split.
    perceptual_N5: see `fingerprint.parse_hashes`.
    """

    image_ids: pa.ChunkedArray
    patients: pa.ChunkedArray
    pixel_hashes: pa.ChunkedArray
    perceptual_N5: NDArray[np.uint64]
    splits_N: NDArray[np.int8]
    is_given_N: NDArray[np.bool_]
    is_stored_N: NDArray[np.bool_]
    is_bound_N: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """splits_N: final; is_skipped_N: rows that are left out; groups: places of the rows of each exact copy; num_moved:
    rows whose family brought them to another split; num_straddling: groups that the user's splits keep apart."""

    splits_N: NDArray[np.int8]
    is_skipped_N: NDArray[np.bool_]
    groups: list[NDArray[np.int64]]
    num_moved: int
    num_straddling: int


def judge(rows: Hashed, rule: str) -> Verdict:
    """rule: `keep` all copies, or `skip` all but one. The result is a function of the rows and their order alone."""
    groups = _groups(rows.pixel_hashes)
    splits_N = _join(rows, groups)
    is_skipped_N = np.zeros(len(splits_N), dtype=np.bool_)
    num_straddling = 0
    for members in groups:
        if rule == "skip":
            is_stored = rows.is_stored_N[members]
            keeper = _keeper(members[is_stored] if is_stored.any() else members, splits_N)
            is_skipped_N[members[~is_stored & (members != keeper)]] = True
        else:
            is_skipped_N[_torn(rows, members, splits_N)] = True
        num_straddling += len(np.unique(splits_N[members[~is_skipped_N[members]]])) > 1
    moved = (splits_N != rows.splits_N) & ~is_skipped_N
    return Verdict(
        splits_N=splits_N,
        is_skipped_N=is_skipped_N,
        groups=groups,
        num_moved=int(moved.sum()),
        num_straddling=num_straddling,
    )


def _torn(rows: Hashed, members: NDArray[np.int64], splits_N: NDArray[np.int8]) -> NDArray[np.int64]:
    """Copies that can't lie in the split of the others, such as an image of a new patient who has copies of images of
    two patients that are stored in two splits: they are left out. What the user's column has decided stays."""
    if len(np.unique(splits_N[members])) == 1:
        return members[:0]
    stays = rows.is_stored_N[members] | rows.is_given_N[members]
    allowed = np.unique(splits_N[members[stays]])
    if not len(allowed):
        allowed = splits_N[[_keeper(members, splits_N)]]
    others = members[~stays]
    return others[splits_N[others] != allowed[0]] if len(allowed) == 1 else others


def _keeper(members: NDArray[np.int64], splits_N: NDArray[np.int8]) -> int:
    """The first copy in the split that is to stay whole: test before val before train."""
    for split in _HELD_OUT_FIRST:
        found = members[splits_N[members] == split]
        if len(found):
            return int(found[0])
    raise AssertionError


def _groups(pixel_hashes: pa.ChunkedArray) -> list[NDArray[np.int64]]:
    """Places of equal hashes, where there are at least two, in the order of their first ones."""
    counts = pc.value_counts(pixel_hashes)
    twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    places_K = np.flatnonzero(pc.is_in(pixel_hashes, twice).to_numpy(zero_copy_only=False))
    groups: dict[str, list[int]] = {}
    for place, value in zip(places_K.tolist(), pixel_hashes.take(pa.array(places_K)).to_pylist(), strict=True):
        groups.setdefault(value, []).append(place)
    return [np.array(group, dtype=np.int64) for group in groups.values()]


def _join(rows: Hashed, groups: Sequence[NDArray[np.int64]]) -> NDArray[np.int8]:
    """The splits after families of patients were brought together."""
    splits_N = rows.splits_N.copy()
    if not groups:
        return splits_N
    patients_N = rows.patients.combine_chunks().dictionary_encode().indices.to_numpy()
    family = _Families()
    for members in groups:
        for patient in patients_N[members[1:]].tolist():
            family.join(int(patients_N[members[0]]), patient)
    in_family = np.flatnonzero(np.isin(patients_N, np.array(family.known(), dtype=patients_N.dtype)))
    copies = np.concatenate(groups)
    is_copy_N = np.zeros(len(splits_N), dtype=np.bool_)
    is_copy_N[copies] = True
    families: dict[int, list[int]] = {}
    for place in in_family.tolist():
        families.setdefault(family.root(int(patients_N[place])), []).append(place)
    for places in families.values():
        of_family = np.array(places)
        is_fixed = rows.is_given_N[of_family] | rows.is_stored_N[of_family] | rows.is_bound_N[of_family]
        anchors = of_family[is_fixed]
        if len(anchors):
            split = next(s for s in _HELD_OUT_FIRST if (splits_N[anchors] == s).any())
        else:  # that of the first copy, which is a random choice where rows are in the order of a hash
            split = splits_N[of_family[is_copy_N[of_family]][0]]
        anchored = np.isin(patients_N[of_family], patients_N[anchors])
        splits_N[of_family[~anchored]] = split
    return splits_N


class _Families:
    """Union-find."""

    def __init__(self) -> None:
        self._above: dict[int, int] = {}

    def root(self, one: int) -> int:
        while (above := self._above.setdefault(one, one)) != one:
            self._above[one] = self._above[above]
            one = above
        return one

    def join(self, one: int, two: int) -> None:
        a, b = sorted((self.root(one), self.root(two)))
        self._above[b] = a

    def known(self) -> list[int]:
        return list(self._above)


def to_json(rows: Hashed, verdict: Verdict, rule: str, earlier: Sequence[dict[str, Any]] = ()) -> str:
    """Text of duplicates.json: every group of exact copies, near pairs (at most MAX_LISTED, the nearest first).

    earlier: the groups of the set that rows are added to; what was left out then stays listed.
    """

    def ids(places: NDArray[np.int64]) -> list[str]:
        return rows.image_ids.take(pa.array(places)).to_pylist()

    def splits(places: NDArray[np.int64]) -> list[str]:
        return [SPLITS[code] for code in verdict.splits_N[places]]

    exact: list[dict[str, Any]] = []
    for members in verdict.groups:
        skipped = members[verdict.is_skipped_N[members]]
        kept = splits(members[~verdict.is_skipped_N[members]])
        exact.append(
            {
                "pixel_hash": rows.pixel_hashes[int(members[0])].as_py(),
                "images": ids(members),
                "splits": splits(members),
                "skipped": ids(skipped),
                "across_splits": len(set(kept)) > 1,
            }
        )
    _carry_over(exact, earlier)
    whole_N = np.ascontiguousarray(rows.perceptual_N5).view("V40").ravel()
    _, first_U, same_N = np.unique(whole_N, return_index=True, return_inverse=True)
    hashes_U = rows.perceptual_N5[first_U]
    pairs_P2, num_pairs = near_pairs(hashes_U, MAX_LISTED)
    equal = _equal_hashes(rows, first_U, same_N)
    near: list[dict[str, Any]] = []
    for pair, bits in [(p, 0) for p in equal] + list(
        zip(np.sort(first_U[pairs_P2], axis=1), distances(hashes_U, pairs_P2).tolist(), strict=True)
    ):
        sides = splits(np.asarray(pair))
        near.append(
            {"images": ids(np.asarray(pair)), "bits": bits, "splits": sides, "across_splits": sides[0] != sides[1]}
        )
    tree = {
        "rule": rule,
        "exact": exact,
        "near": near[:MAX_LISTED],
        "num_near": num_pairs + len(equal),
        "max_bits": MAX_DISTANCE,
        "num_across_splits": {
            "exact": sum(group["across_splits"] for group in exact),
            "near": sum(pair["across_splits"] for pair in near[:MAX_LISTED]),
        },
    }
    return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"


def _carry_over(exact: list[dict[str, Any]], earlier: Sequence[dict[str, Any]]) -> None:
    """Adds what earlier jobs left out, in place."""
    now = {group["pixel_hash"]: group for group in exact}
    for old in earlier:
        gone = set(old["skipped"])
        if old["pixel_hash"] not in now:
            exact.append(old)
            continue
        group = now[old["pixel_hash"]]
        for name, split in zip(old["images"], old["splits"], strict=True):
            if name in gone:
                group["images"].append(name)
                group["splits"].append(split)
                group["skipped"].append(name)


def _equal_hashes(rows: Hashed, first_U: NDArray[np.int64], same_N: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Pairs of the first row with a perceptual hash and another one that has it and other pixels."""
    is_first_N = np.zeros(len(same_N), dtype=np.bool_)
    is_first_N[first_U] = True
    others = np.flatnonzero(~is_first_N)
    if not len(others):
        return []
    firsts = first_U[same_N[others]]
    hashes = rows.pixel_hashes
    differ = pc.not_equal(hashes.take(pa.array(firsts)), hashes.take(pa.array(others))).to_numpy(zero_copy_only=False)
    seen: dict[str, tuple[int, int]] = {}  # copies of each other are one here
    for one, two, value in zip(
        firsts[differ].tolist(), others[differ].tolist(), hashes.take(pa.array(others[differ])).to_pylist(), strict=True
    ):
        seen.setdefault(value, (one, two))
    return list(seen.values())
