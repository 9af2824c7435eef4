"""Image-report retrieval both ways and zero-shot classification, for runs that train a text encoder on whole reports.

Held-out images (val and test). A report of the same words counts as right, wherever it comes from; what scores alike
stands in random order, in expectation, so that a collapsed model is at chance in every number.
Zero-shot: cosine with sentences that tell a finding, less that with its denial.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import gammaln

from medim_ray import types
from medim_ray.config.schema import RunConfig
from medim_ray.data.collate import to_batch
from medim_ray.data.shards import ShardSet
from medim_ray.data.texts import TextRows, text_rows
from medim_ray.objectives.pixels import whole_images
from medim_ray.probes.bootstrap import Estimate, Floats, average, bootstrap, mean
from medim_ray.probes.classify import METRICS, estimates
from medim_ray.probes.models import Models, StoredModels
from medim_ray.probes.results import compared
from medim_ray.probes.rows import Columns, RowList, RowReader, centre_columns, list_rows, work_items
from medim_ray.probes.stream import item_of, pooled
from medim_ray.probes.tasks import Task, default_labels, make_task, policy_of
from medim_ray.train.build import build_crop, report_encoder
from medim_ray.train.runs import LoadedRun

KS = (1, 5, 10)
HELD_OUT = ("val", "test")
PRESENT = ("{}.", "There is {}.", "Findings are consistent with {}.")
ABSENT = ("No {}.", "There is no {}.", "No evidence of {}.")
_CHUNK = 1024  # queries at once
_NO_REPORTS = "raw pixels have no report embedding"


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """Unit vectors of held-out images and their reports, rows as `rows`; prompts: [label, 2, E], present and absent."""

    images_KE: Floats
    reports_KE: Floats
    prompts_L2E: Floats


def retrieve(
    run: LoadedRun, untrained: LoadedRun, uncertain: Mapping[str, str], num_bootstrap: int, seed: int
) -> dict[str, Any]:
    """`retrieval` and `zero_shot` of result.json. Needs a running Ray. uncertain: probe.uncertain.

    Where there is nothing to judge, `note` says why and `directions` and `labels` are empty.
    """
    note, rows, reports = _judged_rows(run.config, run.shards, list_rows(run.shards))
    labels, left_out = _findings(run, rows, uncertain)
    if note:
        nothing: dict[str, Any] = {"note": note, "num_images": 0, "num_patients": 0}
        zero_shot = {**nothing, "labels": {}, "mean": None, "left_out": {}}
        return {"retrieval": {**nothing, "directions": {}}, "zero_shot": zero_shot}
    embedded = _embed({"trained": run, "untrained": untrained}, rows, [task.label for task in labels])
    facts = {"note": _NO_REPORTS, "num_images": len(rows), "num_patients": len(set(rows.patient_ids))}
    return {
        "retrieval": {**facts, "directions": _directions(embedded, rows, reports, num_bootstrap, seed)},
        "zero_shot": {
            **facts,
            "left_out": left_out,
            "prompts": {"present": list(PRESENT), "absent": list(ABSENT)},
            **_zero_shot(embedded, labels, rows, num_bootstrap, seed),
        },
    }


def recall_here(run: LoadedRun, rows: RowList) -> float:
    """Recall at 10 of a run's held-out images among `rows` and their reports, mean of both ways: the probe in this
    process. ValueError where the objective embeds no reports, or there are none.
    """
    config = run.config
    judged, reports = check_retrieval(config, run.shards, rows)
    models = Models(
        config=config,
        crop=build_crop(config),
        reports=report_encoder(config, run.shards),
        device=torch.device("cpu"),
        objectives={"trained": run.objective},
    )
    reader = RowReader.of(run.shards, "image_id", "image", "report")
    found = _in_order([_embedded(item, models, reader) for item in work_items(judged)])
    images_KE, reports_KE = found["images trained"], found["reports trained"]
    text_K = _texts(reports)
    ways = (best_ranks(images_KE, reports_KE, text_K), best_ranks(reports_KE, images_KE, text_K))
    return float(np.mean([ranks.within(10).mean() for ranks in ways]))


def check_retrieval(config: RunConfig, shards: ShardSet, rows: RowList) -> tuple[RowList, list[str]]:
    """The held-out images of `rows` with a report, and their reports; ValueError where this objective embeds no
    reports, or there are too few."""
    note, judged, reports = _judged_rows(config, shards, rows)
    if note:
        raise ValueError(f"validate.retrieve, among {len(rows)} images: {note}")
    return judged, reports


def _texts(reports: Sequence[str]) -> NDArray[np.int64]:
    """[K] a number for each different text."""
    found: NDArray[np.int64] = np.unique([" ".join(report.split()) for report in reports], return_inverse=True)[1]
    return found


def _judged_rows(config: RunConfig, shards: ShardSet, every: RowList) -> tuple[str, RowList, list[str]]:
    """Why there is nothing to judge or '', the held-out images of `every` with a report, and their reports."""
    none = every.take([])
    if not getattr(config.objective, "embeds_reports", False):
        return f"objective.name={config.objective.name} of this run embeds no reports: nothing to retrieve", none, []
    table = shards.read_rows(columns=["image_id", "report"])
    of_image = dict(zip(table["image_id"].to_pylist(), table["report"].to_pylist(), strict=True))
    reports = [of_image[image_id] for image_id in every.image_ids]
    at = [i for i, split in enumerate(every.splits) if split in HELD_OUT and (reports[i] or "").strip()]
    if len(at) < 2:
        return "these shards have fewer than two held-out images (split val or test) with a report", none, []
    return "", every.take(at), [reports[i] for i in at]


def _findings(run: LoadedRun, rows: RowList, uncertain: Mapping[str, str]) -> tuple[list[Task], dict[str, str]]:
    """Every 0/1 label that has both values among the held-out images, uncertain ones counted as asked; label -> why it
    was left out, of the other 0/1 labels."""
    tasks, left_out = [], {}
    for label in default_labels(run.shards.manifest.labels):
        if not set(run.shards.manifest.labels[label]) <= {"-1", "0", "1"}:
            continue
        try:
            task = make_task(label, rows.labels, run.shards.url, policy_of(label, uncertain))
        except ValueError:
            left_out[label] = "the held-out images do not have both of its values"
        else:
            assert isinstance(task, Task)
            tasks.append(task)
    return tasks, left_out


# --- Embeddings ----------------------------------------------------------------------------------------------------


def _embed(runs: Mapping[str, LoadedRun], rows: RowList, labels: Sequence[str]) -> dict[str, Embedded]:
    """By the name of the weights; images are decoded and reports encoded once."""
    run = runs["trained"]
    arguments = (StoredModels.of(runs), RowReader.of(run.shards, "image_id", "image", "report"))
    found = _in_order(list(pooled(work_items(rows), _Embedder, arguments, run.config.train.use_gpu)))
    return {
        name: Embedded(
            images_KE=found[f"images {name}"],
            reports_KE=found[f"reports {name}"],
            prompts_L2E=embed_prompts(loaded.objective, run.config, run.shards, labels),
        )
        for name, loaded in runs.items()
    }


def _in_order(blocks: Sequence[Columns]) -> dict[str, Floats]:
    """The columns of all blocks, in the order of the rows."""
    joined = {key: np.concatenate([block[key] for block in blocks]) for key in blocks[0]}
    order = np.argsort(joined.pop("position"))
    return {key: values[order].astype(np.float64) for key, values in joined.items()}


class _Embedder:
    """Actor: images and reports of a work item to their embeddings under each of the weights."""

    def __init__(self, stored: StoredModels, reader: RowReader) -> None:
        self._models, self._reader = stored.open(), reader

    def __call__(self, block: Columns) -> Columns:
        return _embedded(item_of(block), self._models, self._reader)


@torch.no_grad()
def _embedded(item: Mapping[str, Any], models: Models, reader: RowReader) -> Columns:
    """Images and reports of a work item under each of the weights."""
    columns, _ = centre_columns(reader(item), models.crop, models.reports)
    batch = to_batch(columns, models.crop.views, models.device)
    out: Columns = {"position": np.asarray(item["positions"], dtype=np.int64)}
    for name, model in models.objectives.items():
        images_BE = model.image_projection(model.encoder(whole_images(batch)).global_BD)
        out[f"images {name}"] = images_BE.float().cpu().numpy()
        out[f"reports {name}"] = report_embeddings(model, batch.columns).float().cpu().numpy()
    return out


def report_embeddings(objective: Any, columns: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """[B, E] unit vectors of encoded reports."""
    features = objective.text(columns[types.TOKEN_IDS], columns[types.TOKEN_IS_PAD], columns[types.WORD_OF_TOKEN])
    vectors: torch.Tensor = objective.report_projection(features.global_BD)
    return vectors


@torch.no_grad()
def embed_prompts(objective: Any, config: RunConfig, shards: ShardSet, labels: Sequence[str]) -> Floats:
    """[label, 2, E]: the mean of the sentences that tell a label's finding, and of those that deny it."""
    encoder = report_encoder(config, shards)
    words = [template.format(said(label)) for label in labels for kind in (PRESENT, ABSENT) for template in kind]
    if not words:
        return np.zeros((0, 2, 1))
    rows: TextRows = text_rows(encoder, words, words)
    device = next(objective.parameters()).device
    columns = {name: torch.from_numpy(np.ascontiguousarray(column)).to(device) for name, column in rows.columns.items()}
    vectors = report_embeddings(objective, columns).double().cpu().numpy()
    means = vectors.reshape(len(labels), 2, len(PRESENT), -1).mean(axis=2)
    return np.asarray(means / np.maximum(np.linalg.norm(means, axis=2, keepdims=True), 1e-12))


def said(label: str) -> str:
    """A label's name as words of a sentence."""
    return label.replace("_", " ").strip().lower()


# --- Metrics -------------------------------------------------------------------------------------------------------


def _directions(
    embedded: Mapping[str, Embedded], rows: RowList, reports: Sequence[str], num_bootstrap: int, seed: int
) -> dict[str, Any]:
    text_K = _texts(reports)
    right_K = np.bincount(text_K)[text_K]
    out = {}
    for direction in ("image_to_report", "report_to_image"):
        metrics = {}
        for name, vectors in embedded.items():
            pair = (vectors.images_KE, vectors.reports_KE)
            ranks = best_ranks(*(pair if direction == "image_to_report" else pair[::-1]), text_K)
            metrics[name] = _rank_metrics(ranks, rows.patient_ids, num_bootstrap, seed)
        out[direction] = {**compared(metrics), "chance": chance(right_K, len(rows))}
    return out


@dataclass(frozen=True)
class Ranks:
    """[K] each. above: wrong targets that score above the best right one; alike: wrong ones that score as it does;
    right: right ones that score as it does, itself among them. Those that score alike stand in random order."""

    above_K: NDArray[np.int64]
    alike_K: NDArray[np.int64]
    right_K: NDArray[np.int64]

    @property
    def expected(self) -> Floats:
        """The rank of the first right target, from 1, in expectation."""
        return self.above_K + (self.alike_K + self.right_K + 1) / (self.right_K + 1)

    def within(self, k: int) -> Floats:
        """[K] the probability that a right target is among the first k."""
        places = np.maximum(k - self.above_K, 0).astype(np.float64)
        alike, tied = self.alike_K.astype(np.float64), (self.alike_K + self.right_K).astype(np.float64)
        # 1 - C(alike, places) / C(tied, places); nothing is missed where fewer than `places` are wrong
        can_miss = places <= alike
        m = np.where(can_miss, places, 0.0)
        missed = gammaln(alike + 1) - gammaln(alike - m + 1) - gammaln(tied + 1) + gammaln(tied - m + 1)
        return np.where(can_miss, 1 - np.exp(missed), 1.0)


def best_ranks(queries_KE: Floats, targets_KE: Floats, text_K: NDArray[np.int64]) -> Ranks:
    """Where the best target with the query's own text stands."""
    counts_3K = np.empty((3, len(queries_KE)), dtype=np.int64)
    for first in range(0, len(queries_KE), _CHUNK):
        found_QK = np.round(queries_KE[first : first + _CHUNK] @ targets_KE.T, 6)
        scores_QK = np.where(np.isfinite(found_QK), found_QK, -2.0)  # of a model that diverged: below every cosine
        is_right_QK = text_K[first : first + _CHUNK, None] == text_K[None]
        best_Q1 = np.where(is_right_QK, scores_QK, -np.inf).max(axis=1, keepdims=True)
        is_best_QK = scores_QK == best_Q1
        found = (scores_QK > best_Q1, is_best_QK & ~is_right_QK, is_best_QK & is_right_QK)
        counts_3K[:, first : first + _CHUNK] = [mask_QK.sum(axis=1) for mask_QK in found]
    return Ranks(*counts_3K)


def _rank_metrics(ranks: Ranks, patients: Sequence[str], num_bootstrap: int, seed: int) -> dict[str, Estimate]:
    found = {f"recall_at_{k}": bootstrap(partial(mean, ranks.within(k)), patients, num_bootstrap, seed) for k in KS}
    middle = bootstrap(partial(weighted_median, ranks.expected), patients, num_bootstrap, seed)
    return {**found, "median_rank": middle}


def weighted_median(values_K: Floats, weights_RK: Floats) -> Floats:
    """[R] the smallest value with half of the weight at or below it, the lower one of two middles; NaN where a draw is
    empty."""
    order = np.argsort(values_K, kind="stable")
    below_RK = np.cumsum(weights_RK[:, order], axis=1)
    total_R = below_RK[:, -1]
    at_R = (below_RK < 0.5 * total_R[:, None]).sum(axis=1)
    return np.where(total_R > 0, values_K[order][np.minimum(at_R, len(values_K) - 1)], np.nan)


def chance(right_K: NDArray[np.int64], num: int) -> dict[str, float]:
    """What a random order of `num` targets gives queries of which each has `right_K` right ones."""
    ranks = Ranks(np.zeros_like(right_K), num - right_K, right_K)  # as if all scored alike
    found = {f"recall_at_{k}": float(ranks.within(k).mean()) for k in KS}
    return {**found, "median_rank": float(weighted_median(ranks.expected, np.ones((1, len(right_K))))[0])}


def _zero_shot(
    embedded: Mapping[str, Embedded], tasks: Sequence[Task], rows: RowList, num_bootstrap: int, seed: int
) -> dict[str, Any]:
    """`labels` and their `mean`, from joint draws of patients."""
    among = sorted(set(rows.patient_ids))
    labels, found = {}, []
    for i, task in enumerate(tasks):
        patients = [rows.patient_ids[k] for k in task.rows_K]
        metrics = {}
        for name, vectors in embedded.items():
            present_E, absent_E = vectors.prompts_L2E[i]
            scores_K = vectors.images_KE[task.rows_K] @ (present_E - absent_E)
            scores_K2 = np.stack([-scores_K, scores_K], axis=1)
            metrics[name] = estimates(scores_K2, task.y_K, patients, num_bootstrap, seed, among)
        found.append(metrics)
        labels[task.label] = {
            "counts": task.counts(),
            "num_images": len(task.rows_K),
            "num_patients": len(set(patients)),
            **compared(metrics),
        }
    means = {
        name: {metric: average([metrics[name][metric] for metrics in found]) for metric in METRICS} for name in embedded
    }
    return {"labels": labels, "mean": compared(means) if found else None}
