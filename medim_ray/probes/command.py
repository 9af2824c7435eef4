"""`medim-ray probe`: what a run's frozen encoder knows, beside the untrained one, raw pixels and others by name.

Features and maps are made by Ray Data (features.py, localise.py), the probes of all labels and encoders are Ray tasks.
What is written: results.py; what is printed: tables.py.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray
from rich.console import Console

from medim_ray.config.loader import run_hash
from medim_ray.config.probe import ProbeConfig
from medim_ray.data.shards import ShardSet
from medim_ray.probes.cache import FOLDER, FeatureCache
from medim_ray.probes.encoders import Encoders, open_encoders
from medim_ray.probes.features import extract
from medim_ray.probes.finetune import Tuned, finetune
from medim_ray.probes.localise import Localisation, localise
from medim_ray.probes.protocol import SMALL, check_protocol
from medim_ray.probes.results import (
    SCHEMA_VERSION,
    finetune_results,
    label_results,
    read_result,
    with_tuned,
    write_result,
    write_scores,
)
from medim_ray.probes.retrieve import retrieve
from medim_ray.probes.rows import RowList, list_rows
from medim_ray.probes.scoring import AnyScores, AnyTask, groups_of, patients_of, score_all
from medim_ray.probes.segment import segment
from medim_ray.probes.tables import print_result
from medim_ray.probes.tasks import Task, default_labels, make_task, policy_of
from medim_ray.session import ray_session
from medim_ray.train.runs import LoadedRun, find_checkpoint, load_run

__all__ = ["ProbeRoot", "read_result", "run_probe", "tasks_of"]

_NOT_ASKED = "not asked for (probe.tasks)"


@dataclass(frozen=True, kw_only=True)
class ProbeRoot:
    """Options of `medim-ray probe`."""

    run: str = field(metadata={"help": "run folder"})
    checkpoint: str = field(
        default="latest", metadata={"help": "latest, best (by validation during the run) or a step"}
    )
    probe: ProbeConfig = field(default_factory=ProbeConfig)


def run_probe(
    run_dir: str, config: ProbeConfig, console: Console | None = None, checkpoint: str = "latest"
) -> dict[str, Any]:
    """Probes a checkpoint of a run (runs.find_checkpoint), prints the tables, writes RUN/result.json and returns its
    content.

    Joins the cluster of the run (run.ray_address), or the Ray that is running, or starts one.

    ValueError: no run, no checkpoint, or a label named in `probe.labels` that can't be probed (see tasks.make_task).
    Of labels that were not named, those that can't be probed are left out with a note.
    """
    console = console or Console()
    run = load_run(run_dir, checkpoint=find_checkpoint(run_dir, checkpoint))
    untrained = load_run(run_dir, trained=False)
    every = list_rows(run.shards)
    tasks, notes = tasks_of(run.shards, every, config)
    notes += _pretrained_on(tasks, every, run.config.data.split)
    num_cpus = max(2, os.cpu_count() or 1)
    with ray_session(run.config.run.ray_address, num_cpus):
        encoders = open_encoders(run, untrained, config.encoders)
        scores: dict[str, dict[str, AnyScores]] = {}
        tuned: Tuned = {}
        if tasks and "finetune" in config.tasks:
            classes = [task for task in tasks if isinstance(task, Task)]
            among = patients_of(tasks, every)
            tuned = finetune(run.shards, classes, every, encoders.sources, among, config, run.config.train.use_gpu)
        if tasks and "labels" in config.tasks:
            wanted = every.take(sorted({int(i) for task in tasks for i in task.rows_K}))
            cache = FeatureCache(config.cache or f"{run_dir.rstrip('/')}/{FOLDER}", run.shards.content_hash)
            features, more = _features(run, wanted, encoders, cache, console)
            notes += more
            scores = score_all(tasks, every, wanted, features, encoders.sources, cache, config)
        beyond = _beyond_labels(run, untrained, encoders, config)
    result = {
        "schema_version": SCHEMA_VERSION,
        "run_hash": run_hash(run.config),
        "data_hash": run.shards.content_hash,
        "checkpoint": run.checkpoint,
        "step": run.step,
        "num_bootstrap": config.num_bootstrap,
        "num_folds": config.num_folds,
        "seed": config.seed,
        **label_results(tasks if scores else [], scores),
        "finetune": finetune_results(tasks, tuned),
        **beyond,
        "not_available": dict(encoders.missing),
        "notes": notes,
    }
    write_scores(run_dir, tasks, every, with_tuned(scores, tuned))
    write_result(run_dir, result)
    print_result(result, console)
    return result


def _beyond_labels(
    run: LoadedRun, untrained: LoadedRun, encoders: Encoders, config: ProbeConfig
) -> dict[str, dict[str, Any]]:
    """All of result.json that judges no label; a note in what was not asked for."""
    draws = (config.num_bootstrap, config.seed)
    found: dict[str, dict[str, Any]] = {
        "localisation": Localisation(
            note=_NOT_ASKED, num_images=0, num_patients=0, estimates={}, left_out={}
        ).to_json(),
        "retrieval": {"note": _NOT_ASKED, "directions": {}},
        "zero_shot": {"note": _NOT_ASKED, "labels": {}, "mean": None},
        "segmentation": {"note": _NOT_ASKED, "targets": {}, "heads": {}},
        "generation": {"note": _NOT_ASKED, "encoders": {}},
    }
    if "localise" in config.tasks:
        found["localisation"] = localise({"trained": run, "untrained": untrained}, *draws).to_json()
    if "retrieve" in config.tasks:
        found |= retrieve(run, untrained, config.uncertain, *draws)
    if "segment" in config.tasks:
        found["segmentation"] = segment(run.shards, encoders.sources, config.segment, *draws, run.config.train.use_gpu)
    if "generate" in config.tasks:
        from medim_ray.probes.generate import generate  # loads transformers' text models

        found["generation"] = generate(run.shards, encoders.sources, config.generate, *draws, run.config.train.use_gpu)
    return found


def tasks_of(shards: ShardSet, rows: RowList, config: ProbeConfig) -> tuple[list[AnyTask], list[str]]:
    """The tasks of the labels asked for, or of all labels that can be probed; notes on those left out. ValueError: a
    label that was asked for can't be probed."""
    tasks: list[AnyTask] = []
    notes: list[str] = []
    if not {"labels", "finetune"} & set(config.tasks):
        return tasks, notes
    found = default_labels(shards.manifest.labels)
    for label in config.labels or found:
        try:
            task = make_task(label, rows.labels, shards.url, policy_of(label, config.uncertain))
            check_protocol(task, *groups_of(task, rows), config.num_folds)
            if isinstance(task, Task) or "labels" in config.tasks:  # a number is not fine-tuned
                tasks.append(task)
        except ValueError as error:
            if config.labels:
                raise
            notes.append(f"left out: {str(error).removeprefix('probe.labels: ')}")
    if not config.labels and (named := sorted(set(shards.manifest.labels) - set(found))):
        notes.append(f"probed only where probe.labels names them, since their values are words: {', '.join(named)}")
    if not tasks and not config.labels:
        notes.append("no label of these shards can be probed; name some with probe.labels=[...]")
    return tasks, notes


def _pretrained_on(tasks: Sequence[AnyTask], rows: RowList, split: str) -> list[str]:
    """A note where images are judged whose split the run learned from."""
    judged = {int(i) for task in tasks if len(task.rows_K) < SMALL for i in task.rows_K}
    learned = sum(rows.splits[i] == split for i in judged)
    if not learned:
        return []
    return [
        f"{learned} of {len(judged)} judged images are of split {split}, on which the encoder was pretrained (without "
        f"labels, but with the reports where its objective reads them): labels of fewer than {SMALL:,} images are "
        "judged out of fold over all splits"
    ]


def _features(
    run: LoadedRun, rows: RowList, encoders: Encoders, cache: FeatureCache, console: Console
) -> tuple[dict[str, NDArray[Any]], list[str]]:
    """Features of `rows` by every encoder, from the cache or by one pass over the images; notes."""
    found = cache.find(encoders.sources, rows)
    left = {name: source for name, source in encoders.sources.items() if name not in found}
    told, notes = f"features of {len(rows)} images by {len(encoders.sources)} encoders", []
    if left:
        made = extract(run.shards, rows, left, run.config.train.use_gpu)
        notes = cache.keep(left, rows, made.features)
        told += f": {made.images_per_s:.1f} images/s"
        found |= made.features
    if len(left) < len(encoders.sources):
        told += f", {len(encoders.sources) - len(left)} of them from the cache"
    console.print(told, highlight=False)
    return {name: found[name] for name in encoders.sources}, notes
