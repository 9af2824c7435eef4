"""What a probe is asked: one label of the shards as classes or as a number. Knows neither features nor folds."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medim_ray.probes.bootstrap import Floats

AGE_GROUP = "age_group"  # made of the label `age` where the shards have no label of this name
_AGES = (("under 40", 40.0), ("40 to 64", 65.0), ("65 and over", float("inf")))
_MAX_CLASSES = 10
_MAX_UNREADABLE = 0.1  # of the values of a label of numbers
_VIEW = {"PA": "PA", "AP": "AP", "AP Supine": "AP"}  # projection; lateral and others are not part of the task
_VIEW_CLASSES = ("PA", "AP")


@dataclass(frozen=True, kw_only=True)
class Task:
    """One label as classes. Of two classes the second is the positive one.

    rows_K: the labelled images, as positions in the sequence the task was made from; y_K: their class.
    """

    label: str
    classes: tuple[str, ...]
    rows_K: NDArray[np.int64]
    y_K: NDArray[np.int64]

    def counts(self) -> dict[str, int]:
        """Images of each class."""
        return {name: int((self.y_K == i).sum()) for i, name in enumerate(self.classes)}


@dataclass(frozen=True, kw_only=True)
class NumberTask:
    """One label as a number: values_K of the labelled images rows_K (positions as in Task).

    num_unreadable: images left out because their value is no number.
    """

    label: str
    rows_K: NDArray[np.int64]
    values_K: Floats
    num_unreadable: int = 0


_UNCERTAIN = {"ignore": "", "ones": "1", "zeros": "0"}
_SAME = {"0.0": "0", "1.0": "1", "-1.0": "-1", "nan": "", "NaN": ""}  # how tables of numbers write 0, 1, -1 and nothing


def make_task(
    label: str, labels: Sequence[Mapping[str, str]], where: str, uncertain: str = "ignore"
) -> Task | NumberTask:
    """The classes of `label` over the images of a shard set named `where`, whose known labels are `labels`.

    `view` is PA against AP (AP and AP Supine together), `age_group` comes from `age`; a label with more than ten
    numbers, and few values that are none, is a number. uncertain: what -1 of a 0/1 label counts as: ignore
    (unlabelled), ones or zeros (CheXpert).
    ValueError: no image has the label, or it has one value only.
    """
    found = [row.get(label, "") for row in labels]
    if label == AGE_GROUP and not any(found):
        found = [_age_group(row.get("age", "")) for row in labels]
    if not any(found):
        others = sorted({name for row in labels for name in row})
        near = difflib.get_close_matches(label, others, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose among {', '.join(others) or 'none'}"
        raise ValueError(f"probe.labels: no image of {where} has a label {label!r}; {hint}")
    known = [_VIEW.get(value, "") if label == "view" else _SAME.get(value, value) for value in found]
    if set(known) <= {"", "-1", "0", "1"}:
        known = [_UNCERTAIN[uncertain] if value == "-1" else value for value in known]
    rows = np.array([i for i, value in enumerate(known) if value], dtype=np.int64)
    names = sorted({value for value in known if value})
    if _is_measure(names):
        rows_K = np.array([i for i in rows if _is_number(known[i])], dtype=np.int64)
        values_K = np.array([float(known[i]) for i in rows_K])
        return NumberTask(label=label, rows_K=rows_K, values_K=values_K, num_unreadable=len(rows) - len(rows_K))
    if len(names) < 2:
        read = " (PA, AP and AP Supine are read)" if label == "view" else ""
        raise ValueError(
            f"probe.labels: {label!r} has only the value {', '.join(map(repr, names)) or 'unknown'} in {where}{read}: "
            "a probe needs two classes; leave this label out or prepare more images"
        )
    order = {"view": _VIEW_CLASSES, AGE_GROUP: tuple(name for name, _ in _AGES if name in names)}
    classes = order.get(label) or tuple(sorted(names, key=_by_number))
    y = np.array([classes.index(known[i]) for i in rows], dtype=np.int64)
    return Task(label=label, classes=classes, rows_K=rows, y_K=y)


def default_labels(counts: Mapping[str, Mapping[str, int]]) -> tuple[str, ...]:
    """`view`, every 0/1 label (uncertain values among them or not) and every label of numbers, from the label counts of
    a manifest."""
    values_of = {name: {_SAME.get(value, value) for value in values} - {""} for name, values in counts.items()}
    return tuple(
        sorted(
            name
            for name, values in values_of.items()
            if name == "view" or values <= {"-1", "0", "1"} or _is_measure(sorted(values))
        )
    )


def policy_of(label: str, uncertain: Mapping[str, str]) -> str:
    """What -1 of a label counts as, by probe.uncertain."""
    return uncertain.get(label, uncertain.get("all", "ignore"))


def _is_measure(names: Sequence[str]) -> bool:
    """More than ten numbers; at most one value in ten may be none, such as an age of `unknown` or `045Y`."""
    num = sum(_is_number(name) for name in names)
    return num > _MAX_CLASSES and len(names) - num <= _MAX_UNREADABLE * len(names)


def _age_group(age: str) -> str:
    return next(name for name, end in _AGES if float(age) < end) if _is_number(age) else ""


def _is_number(value: str) -> bool:
    try:
        return bool(np.isfinite(float(value)))
    except ValueError:
        return False


def _by_number(value: str) -> tuple[float, str]:
    """Numbers in their order, words after each other in theirs."""
    return (float(value) if _is_number(value) else 0.0, value)
