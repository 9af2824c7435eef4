"""Tasks, both protocols and every message for labels that can't be probed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from medim_ray.config.probe import ProbeConfig
from medim_ray.probes.classify import probe
from medim_ray.probes.protocol import SMALL, check_protocol
from medim_ray.probes.results import calibration, confusion
from medim_ray.probes.tasks import AGE_GROUP, NumberTask, Task, default_labels, make_task

OPTIONS: dict[str, Any] = {"num_folds": 5, "num_bootstrap": 200, "seed": 0}


def _labels(name: str, values: list[str]) -> list[dict[str, str]]:
    return [{name: value} if value else {} for value in values]


def _task(y: NDArray[np.int64], num_classes: int = 2) -> Task:
    return Task(label="x", classes=tuple("abcdef"[:num_classes]), rows_K=np.arange(len(y)), y_K=y)


def _classes(label: str, labels: list[dict[str, str]]) -> Task:
    task = make_task(label, labels, "shards")
    assert isinstance(task, Task)
    return task


def test_view_is_pa_against_ap_and_supine_others_are_unlabelled() -> None:
    task = _classes("view", _labels("view", ["PA", "AP Supine", "L", "", "AP", "PA"]))
    assert task.classes == ("PA", "AP")
    assert task.rows_K.tolist() == [0, 1, 4, 5] and task.y_K.tolist() == [0, 1, 1, 0]


def test_numbers_are_ordered_by_value_and_few_of_them_are_classes() -> None:
    task = _classes("grade", _labels("grade", ["10", "2", "10", "1"]))
    assert task.classes == ("1", "2", "10") and task.counts() == {"1": 1, "2": 1, "10": 2}


@pytest.mark.parametrize(
    ("label", "values", "words"),
    [
        ("sexx", ["M", "F"], ["no image of shards has a label 'sexx'", "did you mean 'sex'"]),
        ("sex", ["M", "M", ""], ["'sex' has only the value 'M'", "two classes"]),
        ("view", ["PA", "L"], ["'view' has only the value 'PA'", "PA, AP and AP Supine are read"]),
    ],
)
def test_labels_that_cannot_be_probed_say_why(label: str, values: list[str], words: list[str]) -> None:
    name = "sex" if label == "sexx" else label
    with pytest.raises(ValueError) as error:
        make_task(label, _labels(name, values), "shards")
    assert all(word in str(error.value) for word in ["probe.labels", *words]), str(error.value)


def test_classes_with_fewer_patients_than_folds_are_refused_with_the_number_to_use() -> None:
    y = np.array([0] * 20 + [1] * 6)
    patients = [f"p{i}" for i in range(20)] + ["q0", "q0", "q1", "q1", "q2", "q2"]
    with pytest.raises(ValueError, match=r"x=b has images of 3 patients.*probe\.num_folds to at most 3"):
        check_protocol(_task(y), patients, ["train"] * 26, num_folds=5)
    check_protocol(_task(y), patients, ["train"] * 26, num_folds=3)


def test_a_split_without_a_class_is_refused() -> None:
    y = np.arange(SMALL) % 2
    splits = np.array(["train"] * 800 + ["val"] * 100 + ["test"] * 100)
    y[splits == "val"] = 0
    with pytest.raises(ValueError, match=r"split 'val' has 100 images with x and none of b"):
        check_protocol(_task(y), [str(i) for i in range(SMALL)], splits.tolist(), num_folds=5)


@pytest.mark.parametrize(
    ("policy", "y"), [("ignore", [1, 0, 0]), ("ones", [1, 1, 0, 0, 1]), ("zeros", [1, 0, 0, 0, 0])]
)
def test_uncertain_values_are_left_out_or_count_as_ones_or_zeros(policy: str, y: list[int]) -> None:
    task = make_task("Edema", _labels("Edema", ["1", "-1", "", "0", "0", "-1"]), "shards", policy)
    assert isinstance(task, Task) and task.classes == ("0", "1") and task.y_K.tolist() == y
    grade = make_task("grade", _labels("grade", ["-1", "0", "1", "2"]), "shards", policy)
    assert isinstance(grade, Task) and grade.classes == ("-1", "0", "1", "2"), "a scale is no uncertainty"
    assert default_labels({"Edema": {"-1": 2, "0": 2, "1": 1}}) == ("Edema",)
    with pytest.raises(ValueError, match=r"probe\.uncertain: Edema: 'one' is none of ignore, ones, zeros"):
        ProbeConfig(uncertain={"Edema": "one"})


def test_many_numbers_are_a_measure_and_ages_make_groups() -> None:
    labels = _labels("age", [*map(str, range(30, 75)), "", "unknown"])
    with pytest.raises(ValueError, match="no image of shards has a label 'agegroup'"):
        make_task("agegroup", labels, "shards")
    groups = _classes(AGE_GROUP, labels)
    assert groups.counts() == {"under 40": 10, "40 to 64": 25, "65 and over": 10} and len(groups.rows_K) == 45
    task = make_task("age", labels[:45], "shards")
    assert isinstance(task, NumberTask)
    assert task.values_K.tolist() == [float(age) for age in range(30, 75)]


def test_tables_of_numbers_write_nought_one_and_nothing_in_their_own_way() -> None:
    task = make_task("Edema", _labels("Edema", ["1.0", "nan", "0.0", "NaN", "1", "-1.0"]), "shards", "ones")
    assert isinstance(task, Task)
    assert task.classes == ("0", "1") and task.rows_K.tolist() == [0, 2, 4, 5] and task.y_K.tolist() == [1, 0, 1, 1]
    assert default_labels({"Edema": {"0.0": 3, "1.0": 2, "nan": 7}, "grade": {"low": 1, "high": 2}}) == ("Edema",)


def test_default_labels_are_view_the_binary_ones_and_measures() -> None:
    counts = {"view": {"PA": 1}, "sex": {"M": 1, "F": 2}, "edema": {"0": 3, "1": 1}, "zone": {"4": 1}, "tube": {"1": 2}}
    assert default_labels(counts) == ("edema", "tube", "view")
    assert default_labels({"age": {str(age): 1 for age in range(20, 40)}, "sex": {"M": 1}}) == ("age",)


def test_folds_keep_patients_apart_so_that_an_identity_teaches_nothing() -> None:
    """Features that name the patient: images of a patient in two folds would give AUROC 1."""
    rng = np.random.default_rng(0)
    of_patient = rng.normal(size=(60, 40))
    y_of_patient = rng.permutation(np.arange(60) % 2)
    patient = np.repeat(np.arange(60), 4)
    features = of_patient[patient] + 0.01 * rng.normal(size=(240, 40))
    scores = probe(_task(y_of_patient[patient]), features, patient.astype(str).tolist(), ["train"] * 240, **OPTIONS)
    low, high = scores.auroc.interval()
    assert low < 0.5 < high and "out of fold" in scores.protocol


def test_features_without_signal_are_at_chance_on_average_not_below() -> None:
    """The base rate of a fold's training images is no score: ranking raw probabilities together would use it."""
    values = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        y, features = (rng.random(150) < 0.2).astype(np.int64), rng.normal(size=(150, 20))
        patients = [str(i) for i in range(150)]
        values.append(
            probe(_task(y), features, patients, ["train"] * 150, **{**OPTIONS, "num_bootstrap": 1}).auroc.value
        )
    assert np.mean(values) == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("num_classes", [2, 3])
def test_both_protocols_find_what_is_there_and_judge_the_right_images(num_classes: int) -> None:
    rng = np.random.default_rng(1)
    num = SMALL + 200
    y = rng.integers(0, num_classes, num)
    features = rng.normal(size=(num, 12)).astype(np.float32)
    features[:, 0] += 1.5 * y
    patients = [f"p{i // 2}" for i in range(num)]
    splits = np.where(np.arange(num) < 800, "train", np.where(np.arange(num) < 1000, "val", "test")).tolist()
    by_split = probe(_task(y, num_classes), features, patients, splits, **OPTIONS)
    assert (by_split.num_images, by_split.num_patients) == (200, 100) and "judged on test" in by_split.protocol
    few = _task(y[:300], num_classes)
    out_of_fold = probe(few, features[:300], patients[:300], splits[:300], **OPTIONS)
    assert (out_of_fold.num_images, out_of_fold.num_patients) == (300, 150)
    for scores in (by_split, out_of_fold):
        low, high = scores.auroc.interval()
        assert 0.7 < low < scores.auroc.value < high < 0.98
        assert scores.auprc.value > 0.6
        assert 1 / num_classes < scores.accuracy.interval()[0] < scores.accuracy.value < 0.95
        assert 0.4 < scores.f1.value < 0.95
        assert scores.scores_KC.shape == (scores.num_images, num_classes)
        which = _task(y if scores is by_split else y[:300], num_classes)
        table, told = np.array(confusion(which, scores)), calibration(which, scores)
        assert table.sum() == scores.num_images and np.trace(table) / table.sum() == pytest.approx(
            scores.accuracy.value
        )
        assert table.sum(axis=1).tolist() == np.bincount(which.y_K[scores.judged_K]).tolist()
        chances = [one["probability"] for one in told["bins"]]
        assert chances == sorted(chances) and sum(one["num"] for one in told["bins"]) == scores.num_images
        assert told["error"] < 0.12, "a logistic regression knows how sure it is"
        assert 0.6 < scores.knn["auroc"].interval()[0] < scores.knn["auroc"].value < scores.auroc.value + 0.05
    assert set(by_split.parts) == {"train", "val", "test"}
    assert set(out_of_fold.parts) == {f"fold {i}" for i in range(5)}
    assert np.array(splits)[by_split.judged_K].tolist() == ["test"] * 200


def test_a_probe_is_a_function_of_its_seed() -> None:
    rng = np.random.default_rng(2)
    y, features = rng.integers(0, 2, 120), rng.normal(size=(120, 8))
    patients = [str(i // 2) for i in range(120)]
    first, again = (probe(_task(y), features, patients, ["train"] * 120, **OPTIONS) for _ in range(2))
    assert first.auroc.to_json() == again.auroc.to_json()
    other = probe(_task(y), features, patients, ["train"] * 120, **{**OPTIONS, "seed": 5})
    assert other.auroc.to_json() != first.auroc.to_json()


def test_one_unreadable_age_is_left_out_and_told_and_a_column_of_words_stays_one_of_words() -> None:
    values = [*(str(18 + i) for i in range(30)), "unknown"]
    task = make_task("age", _labels("age", values), "shards")
    assert isinstance(task, NumberTask)
    assert (len(task.rows_K), task.num_unreadable, task.values_K.max()) == (30, 1, 47.0)
    assert default_labels({"age": dict.fromkeys(values, 1)}) == ("age",)
    words = [*values[:12], *(f"ward {i}" for i in range(6))]
    assert isinstance(make_task("place", _labels("place", words), "shards"), Task)
