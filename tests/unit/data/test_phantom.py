"""The phantom's promises: determinism, truth that fits the picture, patients that stay themselves."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from medim_ray.data.phantom import FINDINGS, Lesion, Study, _plan, patient_id, render, zone_map
from medim_ray.data.phantom_anatomy import Patient

NUM_STUDIES = 200
SIZE = 128
SIDES, ZONES = ("right", "left"), ("upper", "mid", "lower")


@pytest.fixture(scope="module")
def studies() -> list[Study]:
    return [render(index, seed=3, size=SIZE) for index in range(NUM_STUDIES)]


def located(studies: list[Study]) -> list[tuple[int, Lesion]]:
    return [(i, lesion) for i, study in enumerate(studies) for lesion in study.lesions if lesion.side]


def test_same_study_twice_in_another_order_is_bit_equal(studies: list[Study]) -> None:
    for index in (41, 7, 0):
        again = render(index, seed=3, size=SIZE)
        np.testing.assert_array_equal(again.image_HW, studies[index].image_HW)
        assert (again.report, again.labels) == (studies[index].report, studies[index].labels)
        for one, other in zip(again.lesions, studies[index].lesions, strict=True):
            np.testing.assert_array_equal(one.mask_HW, other.mask_HW)


def test_another_process_draws_the_same_study(studies: list[Study]) -> None:
    code = f"from medim_ray.data.phantom import render; print(render(5, seed=3, size={SIZE}).image_HW.tobytes().hex())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == studies[5].image_HW.tobytes().hex()


def test_seed_and_index_make_other_studies(studies: list[Study]) -> None:
    assert not np.array_equal(render(0, seed=4, size=SIZE).image_HW, studies[0].image_HW)
    assert len({study.image_HW.tobytes() for study in studies}) == NUM_STUDIES
    assert len({study.image_id for study in studies}) == NUM_STUDIES


def test_size_changes_pixels_only() -> None:
    small, large = render(8, seed=3, size=112), render(8, seed=3, size=224)
    assert small.report == large.report
    assert small.labels == large.labels
    assert large.image_HW.shape == (224, 224)
    for one, other in zip(small.lesions, large.lesions, strict=True):
        assert one.mask_HW.mean() == pytest.approx(other.mask_HW.mean(), rel=0.35)
    halved = large.image_HW.reshape(112, 2, 112, 2).mean((1, 3))
    assert np.corrcoef(halved.ravel(), small.image_HW.ravel())[0, 1] > 0.98


def test_images_use_the_gray_scale(studies: list[Study]) -> None:
    for study in studies:
        assert study.image_HW.dtype == np.uint8
        assert study.image_HW.shape == (SIZE, SIZE)
        low, high = np.percentile(study.image_HW, [5, 95])
        assert high - low > 90


def test_masks_are_the_labels(studies: list[Study]) -> None:
    for study in studies:
        assert sorted(lesion.finding for lesion in study.lesions) == sorted(
            n for n in FINDINGS if study.labels[n] == "1"
        )
        assert len(study.lesions) <= 4
        for lesion in study.lesions:
            assert lesion.mask_HW.shape == study.image_HW.shape
            assert lesion.mask_HW.dtype == np.bool_
            assert lesion.mask_HW.sum() >= 5


def test_every_finding_side_and_zone_occurs(studies: list[Study]) -> None:
    for name in FINDINGS:
        assert 0.08 < np.mean([study.labels[name] == "1" for study in studies]) < 0.40
    nodules = {(les.side, les.zone) for _, les in located(studies) if les.finding in ("nodule", "consolidation")}
    assert nodules == {(side, zone) for side in SIDES for zone in ZONES}
    assert {len(study.lesions) for study in studies} == {0, 1, 2, 3, 4}


def test_median_lesion_covers_at_most_three_percent(studies: list[Study]) -> None:
    areas = [lesion.mask_HW.mean() for study in studies for lesion in study.lesions]
    assert np.median(areas) <= 0.03
    assert np.median([les.mask_HW.mean() for _, les in located(studies)]) <= 0.03


def test_lesions_lie_in_their_side_and_zone(studies: list[Study]) -> None:
    """A lesion may reach over the border of its zone, but not dwell there."""
    shares = []
    for index, lesion in located(studies):
        zones_HW = zone_map(index, seed=3, size=SIZE)
        sides = SIDES if lesion.side == "bilateral" else (lesion.side,)
        for side in sides:
            own = 1 + ZONES.index(lesion.zone) + (3 if side == "left" else 0)
            counts = np.bincount(zones_HW[lesion.mask_HW], minlength=7)
            other_side = counts[1:4].sum() if side == "left" else counts[4:7].sum()
            if lesion.side != "bilateral":
                assert other_side <= 0.1 * lesion.mask_HW.sum(), (index, lesion.finding)
            half = counts[4:7] if side == "left" else counts[1:4]
            assert half.sum() > 0, (index, lesion.finding)
            shares.append(counts[own] / half.sum())
            assert shares[-1] >= 0.45, (index, lesion.finding, lesion.side, lesion.zone, counts)
    assert np.mean(shares) > 0.85


def test_left_of_the_patient_is_right_in_the_image(studies: list[Study]) -> None:
    centre: dict[str, list[float]] = {"left": [], "right": []}
    for _, lesion in located(studies):
        if lesion.side in centre:
            centre[lesion.side].append(np.nonzero(lesion.mask_HW)[1].mean() / SIZE)
    assert np.min(centre["left"]) > 0.45 > 0.4 > np.quantile(centre["right"], 0.9)


def test_lesions_lie_anywhere_in_their_zone(studies: list[Study]) -> None:
    """Within one zone the place varies: no single patch of a 14 x 14 grid holds a tenth of the nodules' centres."""
    centres = [
        np.argwhere(lesion.mask_HW).mean(0) / SIZE
        for _, lesion in located(studies)
        if lesion.finding in ("nodule", "consolidation", "atelectasis") and lesion.side != "bilateral"
    ]
    patches = [tuple((14 * centre).astype(int)) for centre in centres]
    assert len(patches) > 60
    assert max(patches.count(patch) for patch in set(patches)) <= 0.1 * len(patches)


def test_patients_have_one_to_three_studies_and_stay_themselves(studies: list[Study]) -> None:
    by_patient: dict[str, list[int]] = {}
    for index, study in enumerate(studies):
        assert study.patient_id == patient_id(index, seed=3)
        by_patient.setdefault(study.patient_id, []).append(index)
    numbers = [len(indices) for indices in by_patient.values()]
    assert set(numbers) == {1, 2, 3}
    for indices in by_patient.values():
        assert len({studies[i].labels["sex"] for i in indices}) == 1
        ages = [int(studies[i].labels["age"]) for i in indices]
        assert ages == sorted(ages)
        assert ages[-1] - ages[0] <= 2
        for chronic in ("cardiomegaly", "pacemaker"):
            assert len({studies[i].labels[chronic] for i in indices}) == 1


def test_anatomy_is_the_patients_own() -> None:
    """All studies of a patient are drawn from one anatomy; pose, view, breath and findings are the study's."""
    anatomies: dict[str, set[Patient]] = {}
    for index in range(300):
        anatomies.setdefault(patient_id(index, seed=3), set()).add(replace(_plan(index, 3).patient, age=0))
    assert all(len(versions) == 1 for versions in anatomies.values())
    assert len(set.union(*anatomies.values())) == len(anatomies)


def test_sex_age_and_view_shape_the_image(studies: list[Study]) -> None:
    """The breasts and the width of the heart show in the mean picture of a group."""

    def mean_image(key: str, value: str) -> np.ndarray:
        return np.mean([s.image_HW for s in studies if s.labels[key] == value], axis=0)

    assert np.abs(mean_image("sex", "F") - mean_image("sex", "M")).max() > 12
    assert np.abs(mean_image("view", "PA") - mean_image("view", "AP Supine")).max() > 12
    assert {study.view for study in studies} == {"PA", "AP", "AP Supine"}


def test_bad_arguments_are_told() -> None:
    with pytest.raises(ValueError, match="index=-1"):
        render(-1)
    with pytest.raises(ValueError, match=r"size=16.*32"):
        render(0, size=16)
