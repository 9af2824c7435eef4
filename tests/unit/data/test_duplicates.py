"""Copies lie in one split, one is kept where copies are left out, and near ones are found; nothing else moves."""

from __future__ import annotations

import json
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medim_ray.data.duplicates import Hashed, judge, to_json
from medim_ray.data.fingerprint import MAX_DISTANCE, distances, near_pairs, parse_hashes, perceptual_hash, pixel_hash

ROWS = st.lists(
    st.tuples(
        st.integers(0, 5),  # patient
        st.integers(0, 7),  # pixels
        st.sampled_from(["dealt", "given", "stored", "bound"]),
    ),
    min_size=1,
    max_size=16,
)


def hashed(patients: list[int], pixels: list[int], splits: list[int], kinds: list[str] | None = None) -> Hashed:
    kinds = kinds or ["dealt"] * len(patients)
    return Hashed(
        image_ids=pa.chunked_array([[f"i{k}" for k in range(len(patients))]]),
        patients=pa.chunked_array([[f"p{p}" for p in patients]]),
        pixel_hashes=pa.chunked_array([[f"{p:032x}" for p in pixels]]),
        perceptual_N5=np.array([[p * 0x9E3779B97F4A7C15 % 2**64] * 5 for p in pixels], dtype=np.uint64),
        splits_N=np.array(splits, dtype=np.int8),
        is_stored_N=np.array([kind == "stored" for kind in kinds]),
        is_given_N=np.array([kind == "given" for kind in kinds]),
        is_bound_N=np.array([kind == "bound" for kind in kinds]),
    )


@settings(deadline=None)
@given(rows=ROWS, seed=st.integers(0, 99), rule=st.sampled_from(["keep", "skip"]))
def test_laws_of_the_verdict(rows: list[tuple[int, int, str]], seed: int, rule: str) -> None:
    of_patient = np.random.default_rng(seed).integers(0, 3, 6).tolist()
    kind_of = {patient: kind for patient, _, kind in rows}  # one kind a patient, but stored ones may have bound rows
    patients, pixels = [r[0] for r in rows], [r[1] for r in rows]
    kinds = [
        kind if kind_of[p] in ("stored", "bound") and kind in ("stored", "bound") else kind_of[p] for p, _, kind in rows
    ]
    table = hashed(patients, pixels, [of_patient[p] for p in patients], kinds)
    verdict = judge(table, rule)
    fixed = table.is_stored_N | table.is_given_N | table.is_bound_N
    assert (verdict.splits_N[fixed] == table.splits_N[fixed]).all() and not verdict.is_skipped_N[
        table.is_stored_N
    ].any()
    assert len({(p, s) for p, s in zip(patients, verdict.splits_N.tolist(), strict=True)}) == len(set(patients))
    for value in set(pixels):
        members = np.flatnonzero(np.array(pixels) == value)
        kept = members[~verdict.is_skipped_N[members]]
        assert len(kept) >= 1, "an image was lost"
        if rule == "skip":
            assert len(kept) == max(1, int(table.is_stored_N[members].sum()))
        elif len(set(verdict.splits_N[kept].tolist())) > 1:
            assert (table.is_stored_N | table.is_given_N)[kept].all(), "only what is fixed may lie apart"
    lonely = [
        i
        for i, p in enumerate(patients)
        if not any(pixels.count(v) > 1 for q, v in zip(patients, pixels, strict=True) if q == p)
    ]
    assert (verdict.splits_N[lonely] == table.splits_N[lonely]).all()


def test_families_are_joined_through_chains_and_go_where_their_first_copy_is() -> None:
    # p0 - p1 by pixels 7, p1 - p2 by pixels 8; p3 is alone. Row 0 is p0's own image, no copy.
    table = hashed([0, 0, 1, 1, 2, 3], [1, 7, 7, 8, 8, 9], [0, 0, 2, 2, 1, 1])
    verdict = judge(table, "keep")
    assert verdict.splits_N.tolist() == [0, 0, 0, 0, 0, 1]
    assert [g.tolist() for g in verdict.groups] == [[1, 2], [3, 4]] and verdict.num_moved == 3
    assert not verdict.is_skipped_N.any() and verdict.num_straddling == 0


def test_a_given_split_draws_the_family_and_two_of_them_are_reported() -> None:
    table = hashed([0, 1], [7, 7], [0, 2], ["dealt", "given"])
    assert judge(table, "keep").splits_N.tolist() == [2, 2]
    apart = hashed([0, 1], [7, 7], [0, 2], ["given", "given"])
    verdict = judge(apart, "keep")
    assert verdict.splits_N.tolist() == [0, 2] and verdict.num_straddling == 1
    assert judge(apart, "skip").is_skipped_N.tolist() == [True, False]  # the test set stays whole


def test_a_new_copy_of_stored_rows_in_two_splits_is_left_out() -> None:
    kinds = ["stored", "stored", "dealt", "dealt", "dealt"]
    table = hashed([0, 1, 2, 2, 2], [7, 8, 7, 8, 9], [0, 2, 1, 1, 1], kinds)
    verdict = judge(table, "keep")
    assert verdict.splits_N.tolist() == [0, 2, 2, 2, 2] and verdict.is_skipped_N.tolist() == [0, 0, 1, 0, 0]


def test_the_list_names_copies_and_near_pairs_across_splits() -> None:
    table = hashed([0, 1, 2, 3], [7, 7, 3, 4], [0, 2, 2, 0], ["given"] * 4)
    table.perceptual_N5[3] = table.perceptual_N5[2] ^ np.array([0b101, 1, 0, 2, 0], dtype=np.uint64)
    earlier: list[dict[str, Any]] = [
        {
            "pixel_hash": f"{9:032x}",
            "images": ["a", "b"],
            "splits": ["val"] * 2,
            "skipped": ["b"],
            "across_splits": False,
        }
    ]
    tree = json.loads(to_json(table, judge(table, "keep"), "keep", earlier))
    assert tree["exact"][0]["images"] == ["i0", "i1"] and tree["exact"][0]["across_splits"]
    assert tree["exact"][1] == earlier[0]
    assert [(p["images"], p["bits"], p["across_splits"]) for p in tree["near"]] == [(["i2", "i3"], 2, True)]
    assert tree["num_near"] == 1 and tree["num_across_splits"] == {"exact": 1, "near": 1}


def test_near_pairs_are_those_that_all_pairs_would_find() -> None:
    rng = np.random.default_rng(0)

    def flips(bits: int, most: int) -> int:
        return sum(1 << int(bit) for bit in rng.choice(bits, int(rng.integers(0, most)), replace=False))

    rows = rng.integers(0, 2**63, (400, 5), dtype=np.uint64)
    changes = [[flips(64, 8), *(flips(64, 14) for _ in range(4))] for _ in range(400)]
    hashes = np.unique(np.concatenate([rows, rows ^ np.array(changes, dtype=np.uint64)]), axis=0)
    coarse = np.bitwise_count(hashes[:, None, 0] ^ hashes[None, :, 0])
    fine = np.bitwise_count(hashes[:, None, 1:] ^ hashes[None, :, 1:]).sum(axis=2, dtype=int)
    expected = {
        (int(a), int(b)) for a, b in zip(*np.nonzero((coarse <= 4) & (fine <= MAX_DISTANCE)), strict=True) if a < b
    }
    pairs, num = near_pairs(hashes, max_pairs=10_000)
    assert {(int(a), int(b)) for a, b in pairs} == expected and num == len(expected) > 60
    few, num = near_pairs(hashes, max_pairs=5)
    assert len(few) == 5 and num == len(expected)


def radiograph(seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    noise = np.random.default_rng(seed).normal(size=(12, 12)).astype(np.float32)
    smooth = cv2.resize(noise, (300, 256), interpolation=cv2.INTER_CUBIC)
    return np.clip(128 + 40 * smooth, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("seed", range(4))
def test_the_perceptual_hash_survives_what_the_pixel_hash_does_not(seed: int) -> None:
    image = radiograph(seed)
    jpeg: Any = cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 60])[1], cv2.IMREAD_GRAYSCALE)
    smaller = cv2.resize(image, (180, 154), interpolation=cv2.INTER_AREA)
    brighter = np.clip(image * 1.05 + 4, 0, 255).astype(np.uint8)
    assert pixel_hash(image) == pixel_hash(image.copy())
    for other in (jpeg, smaller, brighter):
        pairs, _ = near_pairs(parse_hashes([perceptual_hash(image), perceptual_hash(other)]), max_pairs=9)
        assert pixel_hash(other) != pixel_hash(image) and pairs.tolist() == [[0, 1]]
    hashes = parse_hashes([perceptual_hash(image), perceptual_hash(radiograph(seed + 50))])
    assert distances(hashes, np.array([[0, 1]]))[0] > 2 * MAX_DISTANCE


def test_size_and_depth_are_part_of_the_pixel_hash() -> None:
    flat = np.zeros((4, 6), dtype=np.uint8)
    assert len({pixel_hash(flat), pixel_hash(flat.reshape(6, 4)), pixel_hash(flat.astype(np.uint16)[:, :3])}) == 3
