"""A fine-tuned encoder learns what its frozen features do not tell, on the frozen probe's folds; pairs of two runs."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from rich.console import Console

from medim_ray.config.probe import ProbeConfig, TuneConfig
from medim_ray.data.transforms import CROPS, PadCrop
from medim_ray.models.vit import ImageEncoder
from medim_ray.probes.classify import judge
from medim_ray.probes.compare import CompareOptions, CompareRoot, run_compare
from medim_ray.probes.features import Source
from medim_ray.probes.finetune import Tuner, mean_over_seeds
from medim_ray.probes.linear import linear_scores
from medim_ray.probes.protocol import Fold, make_protocol
from medim_ray.probes.results import SCHEMA_VERSION, finetune_results, with_tuned, write_result, write_scores
from medim_ray.probes.rows import RowList
from medim_ray.probes.tasks import Task
from medim_ray.probes.trainable import OwnEncoder, Trainable

NUM, SIZE = 96, 32
JUDGE: dict[str, Any] = {"num_bootstrap": 100, "seed": 0, "among": None, "fractions": (0.5,), "num_draws": 1}


class _Tiny:
    """A frozen encoder as the probes make one: the same first weights each time."""

    def __init__(self, device: str) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.random.manual_seed(0)
            config = ImageEncoder.Config(
                name="vit_tiny_patch16_224", image_size=SIZE, patch_size=8, width=32, depth=2, num_heads=2
            )
            self._encoder = ImageEncoder(config).to(device)

    def trainable(self) -> Trainable:
        return OwnEncoder(self._encoder)


def _source() -> Source:
    # fine-tuning asks an encoder for nothing but its trainable self, which is all that _Tiny has
    return Source(make=_Tiny, crop=CROPS["pad_crop"](PadCrop.Config(), SIZE), crop_key="", key="")  # type: ignore[arg-type]


def _striped() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Noise with fine stripes of any phase, across in one class and down in the other: their mean is flat."""
    rng = np.random.default_rng(0)
    y = rng.permutation(np.arange(NUM) % 2)
    waves = [25 * np.sin(np.arange(SIZE) * np.pi / 2 + phase)[None, :] for phase in rng.uniform(0, 2 * np.pi, NUM)]
    images = np.stack(
        [rng.normal(110, 25, (SIZE, SIZE)) + (wave if label else wave.T) for wave, label in zip(waves, y, strict=True)]
    )
    return images.clip(0, 255).astype(np.uint8), y


def _scores(steps: int, num_seeds: int) -> tuple[Task, list[str], list[Any]]:
    pixels, y = _striped()
    patients = [f"p{i // 2}" for i in range(NUM)]
    task = Task(label="stripes", classes=("across", "down"), rows_K=np.arange(NUM), y_K=y)
    protocol = make_protocol(task, patients, ["train"] * NUM, 2, 0)
    source = _source()
    config = TuneConfig(steps=steps, batch=16, lr=2e-3)
    tuner = partial(Tuner, source, pixels, task, protocol, config)
    return task, patients, [judge(task, protocol, tuner(seed, "cpu"), known={}, **JUDGE) for seed in range(num_seeds)]


def test_training_the_encoder_finds_what_its_first_features_do_not(tmp_path: Path) -> None:
    task, patients, (first, second) = _scores(30, 2)
    features = _Tiny("cpu").trainable().eval().vectors(torch.from_numpy(_striped()[0])[:, None].float() / 255)
    protocol = make_protocol(task, patients, ["train"] * NUM, 2, 0)

    def frozen(fold: Fold) -> Any:
        return linear_scores(features.detach().double().numpy(), task.y_K, protocol, fold, 2, 0)

    before = judge(task, protocol, frozen, known={}, **JUDGE)
    assert first.auroc.value > 0.9 > 0.7 > before.auroc.value
    assert first.parts == before.parts and (first.judged_K == before.judged_K).all(), "the same folds, the same images"
    assert first.shares[0.5].num_images == before.shares[0.5].num_images
    both = mean_over_seeds([first, second])
    assert both.auroc.value == pytest.approx((first.auroc.value + second.auroc.value) / 2)
    _, _, (again,) = _scores(4, 1)
    _, _, (same,) = _scores(4, 1)
    assert (again.scores_KC == same.scores_KC).all(), "a function of the seed"

    # The scores are files that `probe compare` pairs, seed by seed.
    rows = RowList(
        image_ids=tuple(f"i{i:03d}" for i in range(NUM)), patient_ids=tuple(patients), splits=("train",) * NUM,
        sources=("s",) * NUM, labels=({},) * NUM, place_K3=np.zeros((NUM, 3), dtype=np.int64),
    )  # fmt: skip
    for name, seeds in (("a", [first, second]), ("b", [again, again])):
        tuned = {"stripes": {"trained": seeds, "untrained": seeds}}
        (tmp_path / name).mkdir()
        write_scores(str(tmp_path / name), [task], rows, with_tuned({"stripes": {"trained": before}}, tuned))
        result = {
            "schema_version": SCHEMA_VERSION, "data_hash": "d", "run_hash": name, "checkpoint": "c", "seed": 0,
            "num_folds": 2, "labels": {}, "finetune": finetune_results([task], tuned),
        }  # fmt: skip
        write_result(str(tmp_path / name), result)
    names = set(pq.read_table(tmp_path / "a/probe_scores.parquet")["encoder"].to_pylist())
    assert names == {"trained", *(f"{name} tuned/{i}" for name in ("trained", "untrained") for i in (0, 1))}
    runs = [str(tmp_path / "a"), str(tmp_path / "b")]
    root = CompareRoot(probe=CompareOptions(encoder="trained tuned", num_bootstrap=100), out=f"{tmp_path}/out.json")
    found = run_compare(runs, root, Console(quiet=True))["labels"]["stripes"]["auroc"]
    assert found["a"]["value"] == pytest.approx(both.auroc.value) and found["b"]["value"] == again.auroc.value
    assert (
        found["a_minus_b"]["low"] > 0 and json.loads((tmp_path / "out.json").read_text())["encoder"] == "trained tuned"
    )
    with pytest.raises(ValueError, match=r"'pixels tuned': .* was probed with trained"):
        run_compare(runs, CompareRoot(probe=CompareOptions(encoder="pixels tuned")), Console(quiet=True))


def test_a_fold_of_one_class_has_no_value_and_options_are_checked() -> None:
    pixels, y = _striped()
    task = Task(label="x", classes=("a", "b"), rows_K=np.arange(NUM), y_K=y)
    protocol = make_protocol(task, [str(i) for i in range(NUM)], ["train"] * NUM, 2, 0)
    source: Any = None  # nothing is made of it
    none = np.zeros(0, dtype=np.int64)
    fold = Fold(train_K=np.flatnonzero(y == 0), val_K=none, test_K=np.arange(5))
    assert np.isnan(Tuner(source, pixels, task, protocol, TuneConfig(), 0, "cpu")(fold)).all()
    with pytest.raises(ValueError, match=r"'tune' is none of labels, .*finetune"):
        ProbeConfig(tasks=("tune",))


@pytest.mark.parametrize("num", [4, 5, 6])
def test_a_handful_of_labels_is_learned_from_though_the_inner_folds_leave_one_image(num: int) -> None:
    """1 % of a small corpus: four images, of which inner folds may keep one, or one class."""
    pixels, _ = _striped()
    y = np.arange(NUM) % 2
    task = Task(label="stripes", classes=("across", "down"), rows_K=np.arange(NUM), y_K=y)
    patients = ["same"] * (num - 1) + [f"p{i}" for i in range(NUM - num + 1)]
    protocol = make_protocol(task, patients, ["train"] * NUM, 2, 0)
    source = _source()
    few = Fold(train_K=np.arange(num), val_K=np.zeros(0, dtype=np.int64), test_K=np.arange(num, num + 8))
    scores = Tuner(source, pixels, task, protocol, TuneConfig(steps=2, batch=8), 0, "cpu")(few)
    assert scores.shape == (8, 4) and np.isfinite(scores).all()
