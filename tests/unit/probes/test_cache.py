"""The feature cache: found only where every image is there, kept beside others, and harmless where it can't be used."""

from __future__ import annotations

import resource
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from medim_ray.config.probe import ProbeConfig
from medim_ray.data.transforms import CROPS, PadCrop
from medim_ray.probes.cache import OFF, FeatureCache, ScoreFile
from medim_ray.probes.classify import ProbeScores, Share, probe
from medim_ray.probes.encoders import raw_pixels
from medim_ray.probes.features import Source
from medim_ray.probes.rows import RowList
from medim_ray.probes.tasks import Task


def _rows(rows: list[int]) -> RowList:
    names = tuple(map(str, rows))
    places = np.array([(i // 10, i // 5 % 2, i % 5) for i in rows], dtype=np.int64)
    labels: tuple[dict[str, str], ...] = tuple({} for _ in rows)
    return RowList(image_ids=names, patient_ids=names, splits=names, sources=names, labels=labels, place_K3=places)


def _source(key: str) -> Source:
    return Source(make=raw_pixels(16), crop=CROPS["pad_crop"](PadCrop.Config(), 32), crop_key="32", key=key)


def _values(rows: list[int]) -> np.ndarray:
    return np.array(rows, dtype=np.float32)[:, None] * np.ones((1, 3), dtype=np.float32)


def test_what_was_kept_is_found_in_any_order_and_only_for_the_same_weights_and_data(tmp_path: Path) -> None:
    cache, source = FeatureCache(str(tmp_path / "features"), "data"), _source("weights a")
    first, more = [7, 3, 25, 11], [3, 2]
    assert cache.find({"x": source}, _rows(first)) == {}
    assert cache.keep({"x": source}, _rows(first), {"x": _values(first)}) == []
    assert cache.find({"x": source}, _rows([*first, 2])) == {}, "one image is missing"
    assert cache.keep({"x": source}, _rows(more), {"x": _values(more)}) == []
    every = [2, 25, 3, 11, 7]
    np.testing.assert_array_equal(cache.find({"other name": source}, _rows(every))["other name"], _values(every))
    assert cache.find({"x": _source("weights b")}, _rows(first)) == {}
    assert FeatureCache(str(tmp_path / "features"), "other data").find({"x": source}, _rows(first)) == {}
    assert len(list((tmp_path / "features").iterdir())) == 1


def test_a_damaged_file_is_made_again(tmp_path: Path) -> None:
    cache, source = FeatureCache(str(tmp_path), "data"), _source("a")
    cache.keep({"x": source}, _rows([1, 2]), {"x": _values([1, 2])})
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    flipped = bytes(byte ^ 255 if 60 < i < 400 else byte for i, byte in enumerate(whole))
    for damaged in (b"", whole[:100], b"PK\x03\x04" + whole[4:60], flipped):
        file.write_bytes(damaged)
        assert cache.find({"x": source}, _rows([1])) == {}
    assert cache.keep({"x": source}, _rows([1]), {"x": _values([1])}) == []
    np.testing.assert_array_equal(cache.find({"x": source}, _rows([1]))["x"], _values([1]))


def test_a_full_disk_is_a_note_and_leaves_no_half_file_to_be_found(tmp_path: Path) -> None:
    cache, source, many = FeatureCache(str(tmp_path / "f"), "data"), _source("a"), list(range(4000))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, old[1]))  # the kernel refuses longer files
        notes = cache.keep({"x": source}, _rows(many), {"x": _values(many)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert len(notes) == 1 and str(tmp_path) in notes[0] and "File too large" in notes[0]
    assert cache.find({"x": source}, _rows(many)) == {}


def test_scores_are_kept_by_weights_task_and_protocol_and_nothing_is_fitted_again(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    y, features, rows = rng.integers(0, 2, 60), rng.normal(size=(60, 6)), _rows(list(range(60)))
    task = Task(label="x", classes=("0", "1"), rows_K=np.arange(60), y_K=y)
    cache, source = FeatureCache(str(tmp_path), "data"), _source("a")
    config = ProbeConfig(num_folds=2, fractions=(0.5,), num_draws=2)
    options: dict[str, Any] = {"num_folds": 2, "num_bootstrap": 50, "seed": 0, "fractions": (0.5,), "num_draws": 2}

    def probed(values: NDArray[np.float64], file: ScoreFile) -> ProbeScores:
        known = file.read()
        found = probe(task, values, rows.patient_ids, rows.splits, known=known, **options)
        file.write(known)
        return found

    file = cache.scores(source, task, rows, config)
    first = probed(features, file)
    assert sorted(file.read()) == ["0.5 0", "0.5 1", "all", "knn"]
    again = probed(np.full_like(features, np.nan), cache.scores(source, task, rows, config))
    for one, other in ((first, again), (first.shares[0.5], again.shares[0.5])):
        assert isinstance(one, ProbeScores | Share) and isinstance(other, ProbeScores | Share)
        assert one.auroc.to_json() == other.auroc.to_json() and one.auprc.to_json() == other.auprc.to_json()
    assert (first.predicted_K == again.predicted_K).all() and (first.probability_K == again.probability_K).all()
    assert first.knn["auroc"].to_json() == again.knn["auroc"].to_json() and first.f1.value == again.f1.value
    flipped = replace(task, y_K=1 - y)
    others = [
        cache.scores(_source("b"), task, rows, config), cache.scores(source, flipped, rows, config),
        cache.scores(source, task, rows, replace(config, seed=1)),
        cache.scores(source, task, rows, replace(config, num_folds=3)),
        FeatureCache(str(tmp_path), "more data").scores(source, task, rows, config),
    ]  # fmt: skip
    assert len({file.digest, *(other.digest for other in others)}) == 6 and all(other.read() == {} for other in others)
    assert cache.scores(source, task, rows, replace(config, num_bootstrap=900)) == file, "intervals are drawn each time"
    (stored,) = tmp_path.iterdir()
    stored.write_bytes(stored.read_bytes()[:99])
    assert file.read() == {}


def test_off_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cache, source = FeatureCache(OFF, "data"), _source("a")
    assert cache.keep({"x": source}, _rows([1]), {"x": _values([1])}) == []
    assert cache.find({"x": source}, _rows([1])) == {} and list(tmp_path.iterdir()) == []
    none = ScoreFile(url=OFF, digest="x")
    none.write({"all": np.zeros(3)})
    assert none.read() == {} and list(tmp_path.iterdir()) == []
