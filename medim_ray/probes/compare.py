"""`medim-ray probe compare RUN_A RUN_B`: the paired difference of two runs' frozen encoders, label by label.

Reads what `medim-ray probe` left in the runs (result.json, probe_scores.parquet); no image, no model and no Ray.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from medim_ray.config.probe import MIN_BOOTSTRAP
from medim_ray.probes.bootstrap import Estimate, Floats, average, bootstrap
from medim_ray.probes.classify import METRICS, estimates
from medim_ray.probes.encoders import TRAINED
from medim_ray.probes.finetune import TUNED
from medim_ray.probes.regress import mean_error, r_squared
from medim_ray.probes.results import read_result, read_scores
from medim_ray.probes.tables import format_estimate


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """What is compared, and how often it is drawn."""

    labels: tuple[str, ...] = field(default=(), metadata={"help": "labels both runs have; empty: all of them"})
    encoder: str = field(
        default=TRAINED,
        metadata={"help": "encoder of both runs; with tuned, as in 'trained tuned', the fine-tuned one"},
    )
    num_bootstrap: int = field(default=1000, metadata={"help": "bootstrap draws over patients"})
    seed: int = field(default=0, metadata={"help": "seed of the bootstrap"})

    def __post_init__(self) -> None:
        if self.num_bootstrap < MIN_BOOTSTRAP:
            raise ValueError(f"probe.num_bootstrap={self.num_bootstrap}: at least {MIN_BOOTSTRAP}")


@dataclass(frozen=True, kw_only=True)
class CompareRoot:
    """Options of `medim-ray probe compare RUN_A RUN_B`."""

    probe: CompareOptions = field(default_factory=CompareOptions)
    out: str = field(default="", metadata={"help": "JSON file of the differences, any fsspec URL"})


@dataclass(frozen=True, kw_only=True)
class _Judged:
    """One label of one run: the images judged in the order of their ids. scores: [K, C] of each seed (of a frozen
    encoder there is one); classes: empty for a number."""

    image_ids: tuple[str, ...]
    patients: tuple[str, ...]
    truth: tuple[str, ...]
    scores: tuple[Floats, ...]
    classes: tuple[str, ...]


def run_compare(runs: Sequence[str], root: CompareRoot, console: Console | None = None) -> dict[str, Any]:
    """Prints a table, writes `out` where it is named, and returns what it holds.

    ValueError: not two runs, a run that was not probed, other shards, other images of a label, or a label that one of
    them lacks.
    """
    if len(runs) != 2:
        raise ValueError(f"probe compare takes two run folders, RUN_A RUN_B, and got {len(runs)}")
    console = console or Console()
    results = [_result(run) for run in runs]
    if results[0]["data_hash"] != results[1]["data_hash"]:
        raise ValueError(
            f"the runs were probed on other shards (data hash {results[0]['data_hash']} and "
            f"{results[1]['data_hash']}): a paired difference needs the same images; train or probe both on one set"
        )
    judged = [_judged(run, result, root.probe.encoder) for run, result in zip(runs, results, strict=True)]
    labels = _common(judged, runs, root.probe.labels)
    found = {label: _difference(label, judged, root.probe) for label in labels}
    compared = {"encoder": root.probe.encoder, **_to_json(runs, results, judged[0], found)}
    console.print(_table(compared))
    for note in compared["notes"]:
        console.print(note, highlight=False, markup=False)
    if root.out:
        with fsspec.open(root.out, "w", encoding="utf-8") as file:
            file.write(json.dumps(compared, indent=1) + "\n")
    return compared


def _result(run: str) -> dict[str, Any]:
    result = read_result(run)
    if result is None:
        raise ValueError(f"{run} was not probed (no result.json in it): run `medim-ray probe run={run}` first")
    return result


def _judged(run: str, result: Mapping[str, Any], encoder: str) -> dict[str, _Judged]:
    """label -> what was judged with this encoder; ValueError where the run has none of this name."""
    table = read_scores(run)
    found = {}
    classes = {**result["labels"], **result.get("finetune", {}).get("labels", {})}
    names = sorted(set(table["encoder"].to_pylist()))
    mine = [name for name in names if encoder in (name, name.rpartition("/")[0] if TUNED in name else name)]
    if not mine:
        raise ValueError(f"probe.encoder={encoder!r}: {run} was probed with {', '.join(names)}")
    table = table.filter(pc.is_in(table["encoder"], pa.array(mine))).sort_by("image_id")
    for label in sorted(set(table["label"].to_pylist())):
        of_label = table.filter(pc.equal(table["label"], label))
        seeds = [of_label.filter(pc.equal(of_label["encoder"], name)) for name in mine]
        own = seeds[0]
        found[label] = _Judged(
            image_ids=tuple(own["image_id"].to_pylist()),
            patients=tuple(own["patient_id"].to_pylist()),
            truth=tuple(own["class"].to_pylist()),
            scores=tuple(np.array(seed["scores"].to_pylist(), dtype=np.float64) for seed in seeds),
            classes=tuple(classes[label]["classes"]) if label in classes else (),
        )
    return found


def _common(judged: Sequence[Mapping[str, _Judged]], runs: Sequence[str], asked: Sequence[str]) -> list[str]:
    """The labels to compare; ValueError where one that was asked for, or any at all, is missing."""
    common = sorted(set(judged[0]) & set(judged[1]))
    for label in asked:
        for run, labels in zip(runs, judged, strict=True):
            if label not in labels:
                raise ValueError(
                    f"probe.labels: {run} was not probed for {label!r}; it has {', '.join(sorted(labels)) or 'none'}"
                )
    if not common:
        raise ValueError(f"{runs[0]} and {runs[1]} have no probed label in common")
    return list(asked) or common


def _difference(
    label: str, judged: Sequence[Mapping[str, _Judged]], options: CompareOptions
) -> tuple[dict[str, Estimate], dict[str, Estimate]]:
    """The label's metrics of both runs, from joint draws of patients."""
    a, b = (of_run[label] for of_run in judged)
    if a.image_ids != b.image_ids or a.truth != b.truth:
        raise ValueError(
            f"{label}: the runs were judged on other images ({len(a.image_ids)} and {len(b.image_ids)}): probe both "
            "with the same medim-ray and options"
        )
    among = sorted({patient for of_run in judged for one in of_run.values() for patient in one.patients})
    first, second = (_metrics(one, among, options) for one in (a, b))
    return first, second


def _metrics(judged: _Judged, among: Sequence[str], options: CompareOptions) -> dict[str, Estimate]:
    """Means over the seeds."""
    draws = (judged.patients, options.num_bootstrap, options.seed, among)
    if judged.classes:
        y_K: NDArray[np.int64] = np.array([judged.classes.index(name) for name in judged.truth])
        of_seeds = [estimates(scores_KC, y_K, *draws) for scores_KC in judged.scores]
    else:
        values_K = np.array([float(value) for value in judged.truth])
        of_seeds = [
            {
                name: bootstrap(partial(metric, scores_K1[:, 0], values_K), *draws)
                for name, metric in (("mae", mean_error), ("r2", r_squared))
            }
            for scores_K1 in judged.scores
        ]
    return {name: average([one[name] for one in of_seeds]) for name in of_seeds[0]}


def _to_json(
    runs: Sequence[str],
    results: Sequence[Mapping[str, Any]],
    judged: Mapping[str, _Judged],
    found: Mapping[str, tuple[Mapping[str, Estimate], Mapping[str, Estimate]]],
) -> dict[str, Any]:
    def pair(a: Mapping[str, Estimate], b: Mapping[str, Estimate]) -> dict[str, Any]:
        return {
            metric: {
                "a": a[metric].to_json(),
                "b": b[metric].to_json(),
                "a_minus_b": a[metric].minus(b[metric]).to_json(),
            }
            for metric in a
        }

    classified = [label for label in found if judged[label].classes]
    notes = []
    folds = [{key: result.get(key) for key in ("seed", "num_folds")} for result in results]
    if folds[0] != folds[1]:
        notes.append(f"the folds differ ({folds[0]} and {folds[1]}): part of the difference is theirs")
    return {
        "a": {"run": runs[0], "run_hash": results[0]["run_hash"], "checkpoint": results[0]["checkpoint"]},
        "b": {"run": runs[1], "run_hash": results[1]["run_hash"], "checkpoint": results[1]["checkpoint"]},
        "data_hash": results[0]["data_hash"],
        "labels": {
            label: {
                "num_images": len(judged[label].image_ids),
                "num_patients": len(set(judged[label].patients)),
                **pair(*found[label]),
            }
            for label in found
        },
        "mean": pair(*({k: average([found[label][i][k] for label in classified]) for k in METRICS} for i in (0, 1)))
        if classified
        else None,
        "notes": notes,
    }


def _table(compared: Mapping[str, Any]) -> Table:
    table = Table(
        title=f"Probes of two runs ({compared['encoder']}) on the same images",
        caption=f"A: {compared['a']['run']}, {compared['a']['checkpoint']}\n"
        f"B: {compared['b']['run']}, {compared['b']['checkpoint']}\n"
        "* the interval leaves out 0",
    )
    for heading in ("label", "metric", "A", "B", "A - B [95 % over patients]"):
        table.add_column(heading, no_wrap=heading != "label")
    sections = dict(compared["labels"])
    if compared["mean"] and len(sections) > 1:
        sections["mean of the classes"] = compared["mean"]
    for label, facts in sections.items():
        metrics = {name: numbers for name, numbers in facts.items() if isinstance(numbers, dict)}
        for i, (metric, numbers) in enumerate(metrics.items()):
            low, high = numbers["a_minus_b"]["low"], numbers["a_minus_b"]["high"]
            mark = "*" if low is not None and (low > 0 or high < 0) else ""
            cells = [f"{numbers[key]['value']:.3f}" if numbers[key]["value"] is not None else "-" for key in ("a", "b")]
            difference = f"{format_estimate(numbers['a_minus_b'], 3)} {mark}"
            name = {"r2": "R²"}.get(metric, metric.upper())
            table.add_row("" if i else label, name, *cells, difference, end_section=i == len(metrics) - 1)
    return table
