"""The validation of one committed checkpoint, in one Ray task: labels, retrieval and segmentation, as `validate` asks.

A small sibling of `medim-ray probe` for use during training (train/validation.py): the first images by a hash of their
ids, one process, no intervals, no other encoder. All numbers are better when higher. The split test is never looked at:
it judges what was chosen here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
import torch

from medim_ray.config.schema import RunConfig, ValidateConfig
from medim_ray.data.shards import ShardSet
from medim_ray.draws import name_key
from medim_ray.probes.classify import probe
from medim_ray.probes.encoders import source_here
from medim_ray.probes.features import Source, extract_here
from medim_ray.probes.protocol import check_protocol
from medim_ray.probes.regress import regress
from medim_ray.probes.retrieve import check_retrieval, recall_here
from medim_ray.probes.rows import RowList, list_rows
from medim_ray.probes.scoring import AnyTask, groups_of
from medim_ray.probes.segment import check_segmentation, dice_here
from medim_ray.probes.tasks import Task, make_task
from medim_ray.train.runs import LoadedRun, load_run
from medim_ray.train.validation import Validate

_NUM_FOLDS = 3


def validate(run_dir: str, checkpoint: str, config: ValidateConfig) -> dict[str, float]:
    """AUROC of each label of classes by a linear probe, by k-NN as `knn_LABEL`, `mean` and `knn_mean` over them; R2 of
    a label of numbers as `r2_LABEL`; `recall_at_10`; `dice_TARGET`; `error`: why some of them are missing.

    FileNotFoundError: the checkpoint was pruned.
    """
    torch.set_num_threads(max(1, int(config.num_cpus)))
    cv2.setNumThreads(1)
    run = load_run(run_dir, checkpoint=checkpoint)
    rows = _sample(run.shards, config.num_images)
    source = source_here(run)
    found: dict[str, Any] = {}
    errors = []
    parts: list[tuple[bool, Callable[[], dict[str, float]]]] = [
        (bool(config.labels), lambda: _labels(run, source, rows, config.labels)),
        (config.retrieve, lambda: {"recall_at_10": recall_here(run, rows)}),
        (bool(config.segment), lambda: dice_here(run.shards, source, rows, config.segment, seed=0)),
    ]
    for is_asked, part in parts:
        try:
            found |= part() if is_asked else {}
        except ValueError as error:  # the other parts are told all the same
            errors.append(str(error))
    if errors:
        found["error"] = "; ".join(errors)
    return found


def check_validate(config: RunConfig, shards: ShardSet) -> None:
    """ValueError where a label, the retrieval or the segmentation that `validate` asks for can't be had, or none of
    them has the number `validate.best_by`."""
    asked = config.validate
    rows = _sample(shards, asked.num_images)
    tasks = [_task(label, rows, shards) for label in asked.labels]
    classes = [task.label for task in tasks if isinstance(task, Task)]
    names = ["mean", "knn_mean"] if classes else []
    names += [name for label in classes for name in (label, f"knn_{label}")]
    names += [f"r2_{task.label}" for task in tasks if not isinstance(task, Task)]
    if asked.retrieve:
        check_retrieval(config, shards, rows)
        names.append("recall_at_10")
    if asked.segment:
        check_segmentation(shards, rows, asked.segment)
        names += [f"dice_{target}" for target in asked.segment]
    if asked.best_by not in names:
        raise ValueError(f"validate.best_by={asked.best_by!r}: what is validated has {', '.join(names)}")


VALIDATE = Validate(check=check_validate, run=validate)


def _sample(shards: ShardSet, num_images: int) -> RowList:
    every = list_rows(shards).where(lambda split, labels: split != "test")
    order = sorted(range(len(every)), key=lambda i: name_key(every.image_ids[i]))
    return every.take(sorted(order[:num_images]))


def _task(label: str, rows: RowList, shards: ShardSet) -> AnyTask:
    """ValueError where these rows can't be probed for it."""
    try:
        task = make_task(label, rows.labels, shards.url)
        check_protocol(task, *_sides(task, rows), _NUM_FOLDS)
    except ValueError as error:
        told = str(error).removeprefix("probe.labels: ")
        raise ValueError(f"validate.labels, among {len(rows)} images of train and val: {told}") from None
    return task


def _sides(task: AnyTask, rows: RowList) -> tuple[list[str], list[str]]:
    """Patients and splits of a task's images as the protocol takes them, with val in the place of test: a fifth of the
    patients of train is chosen on, and where there is no val another fifth is judged."""
    patients, splits = groups_of(task, rows)
    roles = {"val": "test"} if "val" in splits else {}
    fifths = ["val", "train", "train", "train", "train" if roles else "test"]
    return patients, [
        roles.get(split) or fifths[name_key(patient) % len(fifths)]
        for patient, split in zip(patients, splits, strict=True)
    ]


def _labels(run: LoadedRun, source: Source, rows: RowList, labels: Sequence[str]) -> dict[str, float]:
    features_KD = extract_here(run.shards, rows, source)
    found: dict[str, float] = {}
    nearest: dict[str, float] = {}
    numbers: dict[str, float] = {}
    how: dict[str, Any] = {"num_folds": _NUM_FOLDS, "num_bootstrap": 1, "seed": 0}
    for label in labels:
        task = _task(label, rows, run.shards)
        patients, splits = _sides(task, rows)
        features = features_KD[task.rows_K]
        if isinstance(task, Task):
            scores = probe(task, features, patients, splits, **how)
            found[label], nearest[f"knn_{label}"] = scores.auroc.value, scores.knn["auroc"].value
        else:
            numbers[f"r2_{label}"] = regress(task, features, patients, splits, **how).metrics["r2"].value
    means = {"mean": _mean(found), "knn_mean": _mean(nearest)} if found else {}
    return {**found, **nearest, **numbers, **means}


def _mean(numbers: dict[str, float]) -> float:
    return float(np.mean(list(numbers.values())))
