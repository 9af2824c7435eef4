"""Patients stay whole, stay where they are, and their ids stay secret."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medim_ray.data.splits import SPLITS, Patients, SplitConfig, deal, hash_patient, hash_patients, split_of

IDS = st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=40)


def split(patients: list[str], given_splits: list[str] | None = None) -> list[str]:
    names = pa.array([f"image{i}" for i in range(len(patients))])
    encoded = pa.array(patients).dictionary_encode()
    rows = Patients(encoded.indices.to_numpy(), encoded.dictionary)
    codes, is_given = deal(rows, pa.array(given_splits or [""] * len(patients)), names, SplitConfig())
    of_given = {p for p, g in zip(patients, given_splits or [""] * len(patients), strict=True) if g}
    assert is_given.tolist() == [p in of_given for p in patients]
    return [SPLITS[code] for code in codes]


@given(patients=IDS, more=IDS)
def test_no_patient_straddles_and_new_patients_move_nobody(patients: list[str], more: list[str]) -> None:
    before, after = split(patients), split(more + patients)
    assert after[len(more) :] == before
    assert len({(p, s) for p, s in zip(more + patients, after, strict=True)}) == len(set(more + patients))


def test_shares_are_met_and_another_seed_deals_anew() -> None:
    patients = [f"p{i}" for i in range(4000)]
    dealt = [split_of(p, SplitConfig(train=0.7, val=0.1, test=0.2)) for p in patients]
    for name, share in (("train", 0.7), ("val", 0.1), ("test", 0.2)):
        assert abs(dealt.count(name) / 4000 - share) < 0.03
    again = [split_of(p, SplitConfig(train=0.7, val=0.1, test=0.2, seed=1)) for p in patients]
    assert 0.3 < sum(a != b for a, b in zip(dealt, again, strict=True)) / 4000 < 0.6


def test_an_empty_share_gets_nobody() -> None:
    dealt = {split_of(f"p{i}", SplitConfig(train=0.5, val=0.5, test=0.0)) for i in range(300)}
    assert dealt == {"train", "val"}


def test_the_users_split_wins_for_the_whole_patient() -> None:
    assert split(["a", "a", "b"], ["", "Validation", "test"]) == ["val", "val", "test"]


def test_a_patient_in_two_splits_is_named_by_images_only() -> None:
    with pytest.raises(ValueError, match=r"1 patients are in two splits.*'image0' and 'image2'") as error:
        split(["secret", "b", "secret"], ["train", "train", "test"])
    assert "secret" not in str(error.value)


def test_unknown_split_names_are_listed() -> None:
    with pytest.raises(ValueError, match=r"'fold3'.*train"):
        split(["a"], ["fold3"])


def test_hashes_depend_on_the_salt_and_splits_do_not() -> None:
    assert hash_patient("a", "x") == hash_patient("a", "x") != hash_patient("a", "y")
    assert len({hash_patient(f"p{i}", "x") for i in range(5000)}) == 5000
    assert hash_patients(pa.array(["a", "bé"]), "x").to_pylist() == [hash_patient("a", "x"), hash_patient("bé", "x")]
    assert hash_patient("a", "long salt " * 50) != hash_patient("a", "long salt " * 51)


@pytest.mark.parametrize("shares", [(0.9, 0.2, 0.1), (1.2, -0.1, -0.1), (0.5, 0.2, 0.2)])
def test_shares_must_add_up(shares: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="add up to 1"):
        SplitConfig(train=shares[0], val=shares[1], test=shares[2])
