"""Classification by encoders that are trained with a linear head: folds, shares and judged images of the frozen probe.

Each fold trains the encoder anew, with layer decay, and stops early by the loss on the images that the frozen probe
chooses its penalty on (val, or the first of the inner folds). Crops lie in memory and are not augmented.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import ray
import torch
from numpy.typing import NDArray
from scipy.special import softmax
from torch import Tensor, nn
from torch.nn import functional as F

from medim_ray.config.probe import ProbeConfig, TuneConfig
from medim_ray.data.reader import VIEW
from medim_ray.data.shards import ShardSet
from medim_ray.probes.bootstrap import Estimate, Floats, average
from medim_ray.probes.classify import ProbeScores, judge
from medim_ray.probes.features import Source
from medim_ray.probes.linear import in_units_of_training
from medim_ray.probes.protocol import Fold, Protocol, choosing_folds, make_protocol
from medim_ray.probes.rows import RowList, RowReader, centre_columns, work_items
from medim_ray.probes.scoring import groups_of
from medim_ray.probes.tasks import Task
from medim_ray.probes.trainable import Trainable
from medim_ray.probes.tune import fit, seeded

TUNED = "tuned"  # encoder of probe_scores.parquet: NAME tuned/SEED
_BATCH = 32
Tuned = Mapping[str, Mapping[str, Sequence[ProbeScores]]]


def finetune(
    shards: ShardSet,
    tasks: Sequence[Task],
    rows: RowList,
    sources: Mapping[str, Source],
    among: Sequence[str],
    config: ProbeConfig,
    use_gpu: bool,
) -> Tuned:
    """label -> encoder -> scores of each seed. Needs a running Ray. Raw pixels have nothing to train: left out.

    rows: those that the tasks speak of; among: as in bootstrap.patient_weights.
    """
    device = "cuda" if use_gpu else "cpu"
    # "DEFAULT": as in scoring.py
    remote = ray.remote(num_cpus=0 if use_gpu else 1, num_gpus=float(use_gpu), scheduling_strategy="DEFAULT")(_task)
    read = ray.remote(num_cpus=1, scheduling_strategy="DEFAULT")(read_crops)
    wanted = sorted({int(i) for task in tasks for i in task.rows_K})
    place = {row: i for i, row in enumerate(wanted)}
    reader = RowReader.of(shards, "image_id", "image")
    trained = {name: source for name, source in sources.items() if source.has_weights}
    crops = {s.crop_key: read.remote(reader, rows.take(wanted), s.crop) for s in trained.values()}
    pending = {}
    for task in tasks:
        groups = groups_of(task, rows)
        at = np.array([place[int(i)] for i in task.rows_K])
        for name, source in trained.items():
            pending[task.label, name] = remote.remote(
                task, source, crops[source.crop_key], at, *groups, list(among), config, device
            )
    done = dict(zip(pending, ray.get(list(pending.values())), strict=True))
    return {task.label: {name: done[task.label, name] for name in trained} for task in tasks}


def _task(
    task: Task,
    source: Source,
    pixels_BHW: NDArray[np.uint8],
    at: NDArray[np.int64],
    patient_ids: Sequence[str],
    splits: Sequence[str],
    among: Sequence[str],
    config: ProbeConfig,
    device: str,
) -> list[ProbeScores]:
    """Ray task: one label by one encoder, every seed."""
    torch.set_num_threads(1 if device == "cpu" else torch.get_num_threads())
    protocol = make_protocol(task, patient_ids, splits, config.num_folds, config.seed)
    found = []
    for number in range(config.finetune.num_seeds):
        found.append(
            judge(
                task,
                protocol,
                Tuner(source, pixels_BHW[at], task, protocol, config.finetune.tune, config.seed + number, device),
                num_bootstrap=config.num_bootstrap,
                seed=config.seed,
                among=among,
                fractions=config.fractions,
                num_draws=config.num_draws,
                known={},
            )
        )
    return found


class Tuner:
    """From a fold to the scores of its test images (classify.Scores), by an encoder trained on its training images."""

    def __init__(
        self,
        source: Source,
        pixels_BHW: NDArray[np.uint8],
        task: Task,
        protocol: Protocol,
        config: TuneConfig,
        seed: int,
        device: str,
    ) -> None:
        self._source, self._pixels, self._task, self._protocol = source, pixels_BHW, task, protocol
        self._config, self._seed, self._device = config, seed, device

    def __call__(self, fold: Fold) -> Floats:
        """[test, num_classes + 2]; NaN where the training images are of one class only."""
        num_classes = len(self._task.classes)
        y_K = self._task.y_K
        if len(np.unique(y_K[fold.train_K])) < 2 or len(fold.train_K) < 4:
            return np.full((len(fold.test_K), num_classes + 2), np.nan)
        pairs = choosing_folds(self._protocol, fold, self._seed)
        train, val = pairs[0] if pairs else (fold.train_K, fold.train_K)
        if len(np.unique(y_K[train])) < 2:  # of a few labels the inner folds may leave one image, or one class
            train = val = fold.train_K
        with seeded(self._seed):
            encoder = self._source.make(self._device).trainable().to(self._device)
            head = self._fit(encoder, train, val)
        logits = [self._logits(encoder, head, rows) for rows in (fold.train_K, fold.test_K)]
        known = np.unique(y_K[fold.train_K])
        centred = [(values - values.mean(axis=1, keepdims=True))[:, known] for values in logits]
        probability = softmax(centred[1], axis=1)
        return in_units_of_training(centred[0], centred[1], probability, known, num_classes)

    def _fit(self, encoder: Trainable, train: NDArray[np.int64], val: NDArray[np.int64]) -> nn.Module:
        width = self._vectors(encoder, train[:1]).shape[1]
        norm = nn.BatchNorm1d(width, affine=False)
        head = nn.Sequential(norm, nn.Linear(width, len(self._task.classes))).to(self._device)
        y_K = torch.from_numpy(self._task.y_K).to(self._device)

        def loss_of(at: NDArray[np.int64]) -> Tensor:
            vectors = encoder.vectors(self._images(train[at]))
            return F.cross_entropy(head(vectors), y_K[torch.from_numpy(train[at])])

        def judged() -> float:
            logits = torch.from_numpy(self._logits(encoder, head, val))
            return float(F.cross_entropy(logits, torch.from_numpy(self._task.y_K[val])))

        fit(encoder, head, len(train), loss_of, judged, self._config, self._seed, trains=True)
        return head

    def _images(self, at: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(self._pixels[at]).to(self._device)[:, None].float() / 255.0

    @torch.no_grad()
    def _vectors(self, encoder: Trainable, at: NDArray[np.int64]) -> Tensor:
        encoder.eval()
        starts = range(0, len(at), _BATCH)
        return torch.cat([encoder.vectors(self._images(at[start : start + _BATCH])) for start in starts])

    @torch.no_grad()
    def _logits(self, encoder: Trainable, head: nn.Module, at: NDArray[np.int64]) -> Floats:
        found: Floats = head.eval()(self._vectors(encoder, at)).double().cpu().numpy()
        return found


def read_crops(reader: RowReader, rows: RowList, crop: Any) -> NDArray[np.uint8]:
    """[K, H, W] the centre crops of `rows`, in their order."""
    cv2.setNumThreads(1)
    size, name = crop.views[0].size, crop.views[0].name
    out = np.empty((len(rows), size, size), dtype=np.uint8)
    for item in work_items(rows):
        columns, _ = centre_columns(reader(item), crop, None)
        out[item["positions"]] = columns[f"{VIEW}{name}"][:, 0]
    return out


def mean_over_seeds(scores: Sequence[ProbeScores]) -> ProbeScores:
    """The mean of each metric over the seeds; images and scores are those of the first."""

    def mean_of(name: str) -> Estimate:
        return average([getattr(one, name) for one in scores])

    first = scores[0]
    shares = {}
    for fraction, share in first.shares.items():
        of_seeds = [one.shares[fraction] for one in scores]
        shares[fraction] = replace(
            share, auroc=average([one.auroc for one in of_seeds]), auprc=average([one.auprc for one in of_seeds])
        )
    return replace(
        first,
        shares=shares,
        auroc=mean_of("auroc"),
        auprc=mean_of("auprc"),
        accuracy=mean_of("accuracy"),
        f1=mean_of("f1"),
    )
