"""The validation of one committed checkpoint, in one Ray task: labels, retrieval and segmentation, as `validate` asks.

A small sibling of `medim-ray probe` for use during training (train/validation.py): the first images by a hash of their
ids, one process, no intervals, no other encoder. All numbers are better when higher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch

from medim_ray.config.schema import ValidateConfig
from medim_ray.draws import name_key
from medim_ray.probes.classify import probe
from medim_ray.probes.encoders import source_here
from medim_ray.probes.features import Source, extract_here
from medim_ray.probes.protocol import check_protocol
from medim_ray.probes.regress import regress
from medim_ray.probes.retrieve import recall_here
from medim_ray.probes.rows import RowList, list_rows
from medim_ray.probes.scoring import groups_of
from medim_ray.probes.segment import dice_here
from medim_ray.probes.tasks import Task, make_task
from medim_ray.train.runs import LoadedRun, load_run

_NUM_FOLDS = 3


def validate(run_dir: str, checkpoint: str, config: ValidateConfig) -> dict[str, float]:
    """AUROC of each label of classes by a linear probe, by k-NN as `knn_LABEL`, `mean` and `knn_mean` over them; R2 of
    a label of numbers as `r2_LABEL`; `recall_at_10`; `dice_TARGET`.

    FileNotFoundError: the checkpoint was pruned. ValueError: what can't be probed.
    """
    torch.set_num_threads(max(1, int(config.num_cpus)))
    cv2.setNumThreads(1)
    run = load_run(run_dir, checkpoint=checkpoint)
    every = list_rows(run.shards)
    order = sorted(range(len(every)), key=lambda i: name_key(every.image_ids[i]))
    rows = every.take(sorted(order[: config.num_images]))
    source = source_here(run)
    found = _labels(run, source, rows, config.labels) if config.labels else {}
    if config.retrieve:
        found["recall_at_10"] = recall_here(run, rows)
    if config.segment:
        dice = dice_here(run.shards, source, rows, config.segment, seed=0)
        found |= {f"dice_{target}": value for target, value in dice.items()}
    return found


def _labels(run: LoadedRun, source: Source, rows: RowList, labels: Sequence[str]) -> dict[str, float]:
    features_KD = extract_here(run.shards, rows, source)
    found: dict[str, float] = {}
    nearest: dict[str, float] = {}
    numbers: dict[str, float] = {}
    how: dict[str, Any] = {"num_folds": _NUM_FOLDS, "num_bootstrap": 1, "seed": 0}
    for label in labels:
        task = make_task(label, rows.labels, run.shards.url)
        patients, splits = groups_of(task, rows)
        check_protocol(task, patients, splits, _NUM_FOLDS)
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
