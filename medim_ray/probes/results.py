"""What a probe of a run found, as the content of RUN/result.json, and its tables as files. Computes means, no metric.

RUN/result.json; RUN/probe_scores.parquet: a row for each image judged, by label and encoder; RUN/probe_splits.parquet:
where each labelled image stood (fold or split). Ids of patients are the keyed hashes of the shards.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from medim_ray.data.storage import committed
from medim_ray.probes.bootstrap import Estimate, average
from medim_ray.probes.classify import ProbeScores
from medim_ray.probes.encoders import TRAINED
from medim_ray.probes.finetune import TUNED, Tuned, mean_over_seeds
from medim_ray.probes.regress import NumberScores
from medim_ray.probes.rows import RowList
from medim_ray.probes.scoring import AnyScores, AnyTask
from medim_ray.probes.tasks import AGE_GROUP, NumberTask, Task

RESULT = "result.json"
SCHEMA_VERSION = 3
NO_FINDINGS = ("view", "sex", AGE_GROUP)  # labels of the person and of the picture
_NUM_BINS = 10
SCORES, SPLITS = "probe_scores.parquet", "probe_splits.parquet"
_SCORES_SCHEMA = pa.schema(
    [
        ("label", pa.string()),
        ("encoder", pa.string()),
        ("image_id", pa.string()),
        ("patient_id", pa.string()),
        ("class", pa.string()),  # of a number its value
        ("scores", pa.list_(pa.float64())),  # one a class in the order of result.json, of a number the prediction
    ]
)


def label_results(tasks: Sequence[AnyTask], scores: Mapping[str, Mapping[str, AnyScores]]) -> dict[str, Any]:
    """`labels`, `mean` (over all labels of classes), `findings` (the mean without NO_FINDINGS) and `regression` of
    result.json."""
    labels, numbers = {}, {}
    classified = {}
    for task in tasks:
        of_task = scores[task.label]
        if isinstance(task, Task):
            classified[task.label] = {name: s for name, s in of_task.items() if isinstance(s, ProbeScores)}
            labels[task.label] = _classification(task, classified[task.label])
        else:
            numbers[task.label] = _regression(task, {n: s for n, s in of_task.items() if isinstance(s, NumberScores)})
    findings = [of_label for label, of_label in classified.items() if label not in NO_FINDINGS]
    return {
        "labels": labels,
        "mean": _mean_over_labels(list(classified.values())),
        "findings": _mean_over_labels(findings),
        "regression": numbers,
    }


def finetune_results(tasks: Sequence[AnyTask], tuned: Tuned) -> dict[str, Any]:
    """`finetune` of result.json: means over the seeds, beside what each seed gave."""
    labels, means = {}, []
    for task in tasks:
        if task.label not in tuned:
            continue
        scores = {name: mean_over_seeds(of_seeds) for name, of_seeds in tuned[task.label].items()}
        means.append(scores)
        assert isinstance(task, Task)
        labels[task.label] = {
            **_about(task, scores[TRAINED]),
            **compared({name: _linear(s) for name, s in scores.items()}),
            "seeds": {name: [_number(s.auroc.value) for s in seeds] for name, seeds in tuned[task.label].items()},
            "fractions": [_fraction(fraction, scores) for fraction in scores[TRAINED].shares],
        }
    return {"labels": labels, "mean": _mean_over_labels(means)}


def with_tuned(scores: Mapping[str, Mapping[str, AnyScores]], tuned: Tuned) -> dict[str, dict[str, AnyScores]]:
    """The scores of the frozen probes, with those of trained encoders as `NAME tuned/SEED`."""
    both: dict[str, dict[str, AnyScores]] = {label: dict(of_label) for label, of_label in scores.items()}
    for label, of_label in tuned.items():
        for name, seeds in of_label.items():
            both.setdefault(label, {}).update({f"{name} {TUNED}/{i}": one for i, one in enumerate(seeds)})
    return both


def _about(task: Task, scores: ProbeScores) -> dict[str, Any]:
    return {
        "classes": list(task.classes),
        "counts": task.counts(),
        "positive": task.classes[1] if len(task.classes) == 2 else None,
        "num_images": scores.num_images,
        "num_patients": scores.num_patients,
        "protocol": scores.protocol,
    }


def _classification(task: Task, scores: Mapping[str, ProbeScores]) -> dict[str, Any]:
    trained = scores["trained"]
    return {
        **_about(task, trained),
        **compared({name: _linear(s) for name, s in scores.items()}),
        "knn": compared({name: s.knn for name, s in scores.items()}),
        "confusion": {name: confusion(task, s) for name, s in scores.items()},
        "calibration": {name: calibration(task, s) for name, s in scores.items()},
        "fractions": [_fraction(fraction, scores) for fraction in trained.shares],
    }


def confusion(task: Task, scores: ProbeScores) -> list[list[int]]:
    """Images by true class (rows) and predicted class; those without a prediction are in none."""
    num = len(task.classes)
    table = np.zeros((num, num), dtype=np.int64)
    has_K = scores.predicted_K >= 0
    np.add.at(table, (task.y_K[scores.judged_K][has_K], scores.predicted_K[has_K]), 1)
    found: list[list[int]] = table.tolist()
    return found


def calibration(task: Task, scores: ProbeScores) -> dict[str, Any]:
    """`bins` of equal counts in the order of the probability: its mean, how often it came true, images; `error`: their
    mean distance, weighted by images (expected calibration error). The probability is ProbeScores.probability_K."""
    has_K = np.isfinite(scores.probability_K)
    p_K, y_K = scores.probability_K[has_K], task.y_K[scores.judged_K][has_K]
    true_K = y_K == 1 if len(task.classes) == 2 else y_K == scores.predicted_K[has_K]
    parts = [part for part in np.array_split(np.argsort(p_K, kind="stable"), _NUM_BINS) if len(part)]
    bins = [
        {"probability": float(p_K[part].mean()), "observed": float(true_K[part].mean()), "num": len(part)}
        for part in parts
    ]
    off = [abs(one["probability"] - one["observed"]) * one["num"] for one in bins]
    return {"bins": bins, "error": sum(off) / len(p_K) if len(p_K) else None}


def _linear(scores: ProbeScores) -> dict[str, Estimate]:
    return {"auroc": scores.auroc, "auprc": scores.auprc, "accuracy": scores.accuracy, "f1": scores.f1}


def _fraction(fraction: float, scores: Mapping[str, ProbeScores]) -> dict[str, Any]:
    share = scores["trained"].shares[fraction]
    shares = {name: s.shares[fraction] for name, s in scores.items()}
    return {
        "fraction": fraction,
        "num_draws": len(share.draws["auroc"]),
        "num_images": share.num_images,
        "num_patients": share.num_patients,
        "note": share.note,
        **compared({name: {"auroc": s.auroc, "auprc": s.auprc} for name, s in shares.items()}),
        "draws": {
            name: {k: [_number(value) for value in values] for k, values in s.draws.items()}
            for name, s in shares.items()
        },
    }


def _regression(task: NumberTask, scores: Mapping[str, NumberScores]) -> dict[str, Any]:
    trained = scores["trained"]
    return {
        "num_images": trained.num_images,
        "num_patients": trained.num_patients,
        "num_unreadable": task.num_unreadable,
        "protocol": trained.protocol,
        **compared({name: s.metrics for name, s in scores.items()}),
        "baseline": _json(trained.baseline),
        "trained_minus_baseline": _minus(trained.metrics, trained.baseline),
    }


def _mean_over_labels(scores: Sequence[Mapping[str, ProbeScores]]) -> dict[str, Any] | None:
    """Each encoder's mean over the labels, from joint draws of patients; None without labels."""
    if not scores:
        return None

    first = scores[0]["trained"]

    def means(of: Any) -> dict[str, Any]:
        return compared(
            {
                name: {metric: average([of(of_task[name])[metric] for of_task in scores]) for metric in of(first)}
                for name in scores[0]
            }
        )

    return {
        "num_labels": len(scores),
        **means(_linear),
        **({"knn": means(lambda s: s.knn)} if first.knn else {}),
        "fractions": [
            {
                "fraction": fraction,
                **means(lambda s, f=fraction: {"auroc": s.shares[f].auroc, "auprc": s.shares[f].auprc}),
            }
            for fraction in first.shares
        ],
    }


def compared(metrics: Mapping[str, Mapping[str, Estimate]]) -> dict[str, Any]:
    """`encoders`, `trained_minus_untrained`, and `trained_minus` each of the other encoders."""
    others = {name: _minus(metrics["trained"], values) for name, values in metrics.items() if name not in ("trained",)}
    return {
        "encoders": {name: _json(values) for name, values in metrics.items()},
        "trained_minus_untrained": others.get("untrained"),
        "trained_minus": others,
    }


def _json(metrics: Mapping[str, Estimate]) -> dict[str, Any]:
    return {name: estimate.to_json() for name, estimate in metrics.items()}


def _minus(metrics: Mapping[str, Estimate], other: Mapping[str, Estimate]) -> dict[str, Any]:
    return {name: estimate.minus(other[name]).to_json() for name, estimate in metrics.items()}


def _number(value: float) -> float | None:
    return value if value == value else None


# --- Files ---------------------------------------------------------------------------------------------------------


def write_result(run_dir: str, result: Mapping[str, Any]) -> None:
    """RUN/result.json, whole or not at all."""
    _write(run_dir, RESULT, (json.dumps(result, indent=1) + "\n").encode())


def read_result(run_dir: str) -> dict[str, Any] | None:
    """The content of RUN/result.json, None where the run was not probed."""
    fs, root = fsspec.core.url_to_fs(run_dir)
    path = f"{root.rstrip('/')}/{RESULT}"
    if not fs.exists(path):
        return None
    try:
        result: dict[str, Any] = json.loads(fs.cat_file(path))
    except ValueError:
        raise ValueError(f"{run_dir}/{RESULT} is damaged: run `medim-ray probe run={run_dir}` again") from None
    return result


def write_scores(
    run_dir: str, tasks: Sequence[AnyTask], rows: RowList, scores: Mapping[str, Mapping[str, AnyScores]]
) -> None:
    """RUN/probe_scores.parquet and RUN/probe_splits.parquet; without a task those of an earlier probe are removed."""
    if not tasks:
        fs, root = fsspec.core.url_to_fs(run_dir)
        for path in (f"{root.rstrip('/')}/{name}" for name in (SCORES, SPLITS)):
            if fs.exists(path):
                fs.rm_file(path)
        return
    judged, placed = [], []
    for task in (task for task in tasks if task.label in scores):  # a number is not tuned
        ids = [rows.image_ids[i] for i in task.rows_K]
        patients = [rows.patient_ids[i] for i in task.rows_K]
        if isinstance(task, Task):
            classes = [task.classes[y] for y in task.y_K]
        else:
            classes = [f"{value:g}" for value in task.values_K]
        parts = next(iter(scores[task.label].values())).parts
        placed.append(
            pa.table(
                {
                    "label": [task.label] * len(ids),
                    "image_id": ids,
                    "patient_id": patients,
                    "class": classes,
                    "part": list(parts),
                }
            )
        )
        for name, found in scores[task.label].items():
            values = found.scores_KC if isinstance(found, ProbeScores) else found.predicted_K[:, None]
            columns: list[Any] = [[task.label] * len(values), [name] * len(values)]
            columns += [[column[i] for i in found.judged_K] for column in (ids, patients, classes)]
            judged.append(pa.table([*columns, values.tolist()], schema=_SCORES_SCHEMA))
    for name, tables in ((SCORES, judged), (SPLITS, placed)):
        buffer = io.BytesIO()
        pq.write_table(pa.concat_tables(tables), buffer, compression="zstd")
        _write(run_dir, name, buffer.getvalue())


def read_scores(run_dir: str) -> pa.Table:
    """The content of RUN/probe_scores.parquet; ValueError where the run was not probed."""
    fs, root = fsspec.core.url_to_fs(run_dir)
    path = f"{root.rstrip('/')}/{SCORES}"
    if not fs.exists(path):
        raise ValueError(f"{run_dir} has no {SCORES}: run `medim-ray probe run={run_dir}` first")
    try:
        return pq.read_table(io.BytesIO(fs.cat_file(path)))
    except pa.ArrowInvalid:
        raise ValueError(f"{path} is damaged: run `medim-ray probe run={run_dir}` again") from None


def _write(run_dir: str, name: str, content: bytes) -> None:
    fs, root = fsspec.core.url_to_fs(run_dir)
    root = root.rstrip("/")
    with committed(fs, f"{root}/{name}", scratch=root) as file:
        file.write(content)
