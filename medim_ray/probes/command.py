"""`medim-ray probe`: what a run's frozen encoder knows, beside the untrained one and raw pixels. Writes result.json.

Features and maps are made by Ray Data (features.py, localise.py), the probes of all labels and encoders are Ray tasks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import fsspec
import ray
from rich.console import Console
from rich.table import Table

from medim_ray.config.loader import run_hash
from medim_ray.config.schema import ProbeConfig
from medim_ray.probes.bootstrap import average
from medim_ray.probes.features import Features, extract, frozen_encoder, raw_pixels
from medim_ray.probes.linear import (
    ProbeScores,
    Task,
    check_protocol,
    default_labels,
    judged_patients,
    make_task,
    probe,
)
from medim_ray.probes.localise import Localisation, localise
from medim_ray.probes.rows import RowList, list_rows
from medim_ray.train.build import build_crop
from medim_ray.train.launch import ray_session
from medim_ray.train.runs import LoadedRun, load_run

RESULT = "result.json"
SCHEMA_VERSION = 1
ENCODERS = {"trained": "trained", "untrained": "untrained", "pixels": "raw pixels"}


@dataclass(frozen=True, kw_only=True)
class ProbeRoot:
    """Options of `medim-ray probe`."""

    run: str = field(metadata={"help": "run folder"})
    probe: ProbeConfig = field(default_factory=ProbeConfig)


def run_probe(run_dir: str, config: ProbeConfig, console: Console | None = None) -> dict[str, Any]:
    """Probes the newest checkpoint of a run, prints the tables and writes RUN/result.json, whose content it returns.

    Joins the cluster of the run (run.ray_address), or the Ray that is running, or starts one.

    ValueError: no run, no checkpoint, or a label named in `probe.labels` that can't be probed (see linear.make_task).
    Of labels that were not named, those that can't be probed are left out with a note.
    """
    console = console or Console()
    runs = {"trained": load_run(run_dir), "untrained": load_run(run_dir, trained=False)}
    run = runs["trained"]
    every = list_rows(run.shards)
    tasks, notes = _tasks(run, every, config)
    num_cpus = max(2, os.cpu_count() or 1)
    with ray_session(run.config.run.ray_address, num_cpus):
        scores: dict[str, dict[str, ProbeScores]] = {}
        if tasks:
            wanted = every.take(sorted({int(i) for task in tasks for i in task.rows_K}))
            encoders = {name: frozen_encoder(loaded.objective.encoder) for name, loaded in runs.items()}
            features = extract(
                run.shards,
                wanted,
                build_crop(run.config),
                {**encoders, "pixels": raw_pixels},
                run.config.train.use_gpu,
            )
            console.print(
                f"features of {len(wanted)} images by {len(features.features)} encoders: "
                f"{features.images_per_s:.1f} images/s",
                highlight=False,
            )
            scores = _probe_all(tasks, every, features, config)
        localisation = localise(runs, config.num_bootstrap, config.seed)
    result = _result(run, tasks, scores, notes, localisation, config)
    write_result(run_dir, result)
    print_result(result, console)
    return result


def _tasks(run: LoadedRun, rows: RowList, config: ProbeConfig) -> tuple[list[Task], list[str]]:
    """The tasks of the labels asked for, or of all labels that can be probed; notes on those left out."""
    tasks, notes = [], []
    for label in config.labels or default_labels(run.shards.manifest.labels):
        try:
            task = make_task(label, rows.labels, run.shards.url)
            check_protocol(task, *_groups(task, rows), config.num_folds)
            tasks.append(task)
        except ValueError as error:
            if config.labels:
                raise
            notes.append(f"left out: {str(error).removeprefix('probe.labels: ')}")
    if not tasks and not config.labels:
        notes.append("no label of these shards can be probed; name some with probe.labels=[...]")
    return tasks, notes


def _groups(task: Task, rows: RowList) -> tuple[list[str], list[str]]:
    """Patients and splits of the task's images."""
    return [rows.patient_ids[i] for i in task.rows_K], [rows.splits[i] for i in task.rows_K]


def _probe_all(
    tasks: list[Task], rows: RowList, features: Features, config: ProbeConfig
) -> dict[str, dict[str, ProbeScores]]:
    """label -> encoder -> scores, one Ray task each."""
    place = {image_id: i for i, image_id in enumerate(features.rows.image_ids)}
    stored = {name: ray.put(values) for name, values in features.features.items()}
    among = sorted({patient for task in tasks for patient in judged_patients(task, *_groups(task, rows))})
    # "DEFAULT": in a trial of a sweep, not in the placement group of the trial, which has room for the trial alone
    remote = ray.remote(num_cpus=1, scheduling_strategy="DEFAULT")(_probe_rows)
    pending = {
        (task.label, name): remote.remote(
            task, stored[name], [place[rows.image_ids[i]] for i in task.rows_K], *_groups(task, rows), among, config
        )
        for task in tasks
        for name in features.features
    }
    done = dict(zip(pending, ray.get(list(pending.values())), strict=True))
    return {task.label: {name: done[task.label, name] for name in features.features} for task in tasks}


def _probe_rows(
    task: Task,
    features: Any,
    at: list[int],
    patient_ids: list[str],
    splits: list[str],
    among: list[str],
    config: ProbeConfig,
) -> ProbeScores:
    return probe(
        task,
        features[at],
        patient_ids,
        splits,
        num_folds=config.num_folds,
        num_bootstrap=config.num_bootstrap,
        seed=config.seed,
        among=among,
    )


def _result(
    run: LoadedRun,
    tasks: list[Task],
    scores: Mapping[str, Mapping[str, ProbeScores]],
    notes: list[str],
    localisation: Localisation,
    config: ProbeConfig,
) -> dict[str, Any]:
    """The content of result.json."""
    labels = {}
    for task in tasks:
        of_task = scores[task.label]
        trained, untrained = of_task["trained"], of_task["untrained"]
        labels[task.label] = {
            "classes": list(task.classes),
            "counts": task.counts(),
            "positive": task.classes[1] if len(task.classes) == 2 else None,
            "num_images": trained.num_images,
            "num_patients": trained.num_patients,
            "protocol": trained.protocol,
            "encoders": {name: {"auroc": s.auroc.to_json(), "auprc": s.auprc.to_json()} for name, s in of_task.items()},
            "trained_minus_untrained": {
                "auroc": trained.auroc.minus(untrained.auroc).to_json(),
                "auprc": trained.auprc.minus(untrained.auprc).to_json(),
            },
        }
    return {
        "schema_version": SCHEMA_VERSION,
        "run_hash": run_hash(run.config),
        "data_hash": run.shards.content_hash,
        "checkpoint": run.checkpoint,
        "step": run.step,
        "num_bootstrap": config.num_bootstrap,
        "seed": config.seed,
        "labels": labels,
        "mean": mean_over_labels(list(scores.values())),
        "notes": notes,
        "localisation": localisation.to_json(),
    }


def mean_over_labels(scores: Sequence[Mapping[str, ProbeScores]]) -> dict[str, Any] | None:
    """Each encoder's mean AUROC and AUPRC over the labels, from joint draws of patients; None without labels."""
    if not scores:
        return None
    means = {
        name: {metric: average([getattr(of_task[name], metric) for of_task in scores]) for metric in ("auroc", "auprc")}
        for name in scores[0]
    }
    return {
        "num_labels": len(scores),
        "encoders": {name: {k: v.to_json() for k, v in metrics.items()} for name, metrics in means.items()},
        "trained_minus_untrained": {k: v.minus(means["untrained"][k]).to_json() for k, v in means["trained"].items()},
    }


def write_result(run_dir: str, result: Mapping[str, Any]) -> None:
    """RUN/result.json, whole or not at all."""
    fs, root = fsspec.core.url_to_fs(run_dir)
    target = f"{root.rstrip('/')}/{RESULT}"
    fs.pipe_file(f"{target}.partial", (json.dumps(result, indent=1) + "\n").encode())
    fs.mv(f"{target}.partial", target)


def read_result(run_dir: str) -> dict[str, Any] | None:
    """The content of RUN/result.json, None where the run was not probed."""
    fs, root = fsspec.core.url_to_fs(run_dir)
    path = f"{root.rstrip('/')}/{RESULT}"
    if not fs.exists(path):
        return None
    result: dict[str, Any] = json.loads(fs.cat_file(path))
    return result


def print_result(result: Mapping[str, Any], console: Console) -> None:
    """The probe table, the localisation table, warnings and notes."""
    if result["labels"]:
        console.print(_probe_table(result))
        for label, facts in result["labels"].items():
            counts = ", ".join(f"{name} {num}" for name, num in facts["counts"].items())
            console.print(
                f"{label}: {facts['num_images']} images of {facts['num_patients']} patients ({counts}); "
                f"{facts['protocol']}",
                highlight=False,
            )
    localisation = result["localisation"]
    if localisation["strategies"]:
        console.print(_localisation_table(localisation))
    else:
        console.print(f"localisation: {localisation['note']}", highlight=False)
    for line in localisation["warnings"]:
        console.print(f"[yellow]warning: {line}", highlight=False)
    for note in result["notes"]:
        console.print(note, highlight=False)


def format_estimate(numbers: Mapping[str, float | None]) -> str:
    """`0.72 [0.59, 0.83]`; a dash where undefined."""
    value, low, high = (numbers[key] for key in ("value", "low", "high"))
    if value is None:
        return "-"
    return f"{value:.2f} [{low:.2f}, {high:.2f}]" if low is not None and high is not None else f"{value:.2f}"


def _probe_table(result: Mapping[str, Any]) -> Table:
    table = Table(title=f"Linear probes of {result['checkpoint']}: value [95 % interval over patients]")
    table.add_column("label")
    table.add_column("encoder")
    table.add_column("AUROC", no_wrap=True)
    table.add_column("AUPRC", no_wrap=True)
    for label, facts in result["labels"].items():
        name = f"{label} ({facts['positive']})" if facts["positive"] not in (None, "1") else label
        for encoder, numbers in facts["encoders"].items():
            last = encoder == list(facts["encoders"])[-1]
            table.add_row(
                name,
                ENCODERS[encoder],
                format_estimate(numbers["auroc"]),
                format_estimate(numbers["auprc"]),
                end_section=last,
            )
            name = ""
    mean = result["mean"]
    if mean["num_labels"] > 1:
        for i, (encoder, numbers) in enumerate(mean["encoders"].items()):
            name = "" if i else f"mean of {mean['num_labels']} labels"
            table.add_row(name, ENCODERS[encoder], *(format_estimate(numbers[k]) for k in ("auroc", "auprc")))
    return table


def _localisation_table(localisation: Mapping[str, Any]) -> Table:
    table = Table(
        title=f"Word-to-patch maps on {localisation['num_images']} held-out images with truth (chance 0.50 and 1.00)",
        caption="prior: anatomy of the mentions alone; both: trained x prior",
    )
    for heading in ("strategy", "map from", "map AUROC", f"lesion lift at ratio {localisation['ratio']}"):
        table.add_column(heading, no_wrap=True)
    for strategy, sources in localisation["strategies"].items():
        for i, (source, metrics) in enumerate(sources.items()):
            numbers = (format_estimate(metrics["map_auroc"]), format_estimate(metrics["lesion_lift"]))
            table.add_row("" if i else strategy.upper(), source, *numbers, end_section=i == len(sources) - 1)
    return table
