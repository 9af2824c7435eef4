"""Scores of the labels' probes from features, one Ray task a label and encoder: classes by classify.py, numbers by
regress.py.

The tasks load scikit-learn and no torch: a start of each of their processes is seconds shorter for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ray
from numpy.typing import NDArray

from medim_ray.config.probe import ProbeConfig
from medim_ray.probes.cache import FeatureCache, ScoreFile
from medim_ray.probes.classify import ProbeScores, probe
from medim_ray.probes.features import Source
from medim_ray.probes.protocol import judged_patients
from medim_ray.probes.regress import NumberScores, regress
from medim_ray.probes.rows import RowList
from medim_ray.probes.tasks import NumberTask, Task

AnyTask = Task | NumberTask
AnyScores = ProbeScores | NumberScores


def score_all(
    tasks: list[AnyTask],
    rows: RowList,
    wanted: RowList,
    features: Mapping[str, NDArray[Any]],
    sources: Mapping[str, Source],
    cache: FeatureCache,
    config: ProbeConfig,
) -> dict[str, dict[str, AnyScores]]:
    """label -> encoder -> scores, one Ray task each. `features` are those of `wanted`, tasks speak of `rows`."""
    place = {image_id: i for i, image_id in enumerate(wanted.image_ids)}
    stored = {name: ray.put(values) for name, values in features.items()}
    shared = ray.put(patients_of(tasks, rows))
    # "DEFAULT": in a trial of a sweep, not in the placement group of the trial, which has room for the trial alone
    remote = ray.remote(num_cpus=1, scheduling_strategy="DEFAULT")(_score_one)
    pending = {
        (task.label, name): remote.remote(
            task,
            stored[name],
            [place[rows.image_ids[i]] for i in task.rows_K],
            *groups_of(task, rows),
            shared,
            config,
            cache.scores(sources[name], task, rows, config) if isinstance(task, Task) else None,
        )
        for task in tasks
        for name in features
    }
    done = dict(zip(pending, ray.get(list(pending.values())), strict=True))
    return {task.label: {name: done[task.label, name] for name in features} for task in tasks}


def patients_of(tasks: Sequence[AnyTask], rows: RowList) -> list[str]:
    """The patients that joint bootstrap draws of all tasks are taken from."""
    return sorted({patient for task in tasks for patient in judged_patients(task, *groups_of(task, rows))})


def _score_one(
    task: AnyTask,
    features: Any,
    at: list[int],
    patient_ids: list[str],
    splits: list[str],
    among: list[str],
    config: ProbeConfig,
    file: ScoreFile | None,
) -> AnyScores:
    options: dict[str, Any] = {
        "num_folds": config.num_folds,
        "num_bootstrap": config.num_bootstrap,
        "seed": config.seed,
        "among": among,
    }
    if not isinstance(task, Task):
        return regress(task, features[at], patient_ids, splits, **options)
    options |= {"fractions": config.fractions, "num_draws": config.num_draws}
    assert file is not None
    known = file.read()
    before = len(known)
    found = probe(task, features[at], patient_ids, splits, known=known, **options)
    if len(known) > before:
        file.write(known)
    return found


def groups_of(task: AnyTask, rows: RowList) -> tuple[list[str], list[str]]:
    """Patients and splits of the task's images."""
    return [rows.patient_ids[i] for i in task.rows_K], [rows.splits[i] for i in task.rows_K]
