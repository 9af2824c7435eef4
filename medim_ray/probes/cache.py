"""Features and scores on disk, so that a probe of the same weights on the same images computes nothing twice.

Features: one file an encoder, named by a hash of weights, crop and data; its rows are images. Scores: one file an
encoder, task and protocol. Trials of a sweep share one folder: raw pixels and equal first weights are probed once. A
cache that can't be read or written costs time and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
from numpy.typing import NDArray

from medim_ray.config.probe import ProbeConfig
from medim_ray.data.storage import committed
from medim_ray.probes.features import Source
from medim_ray.probes.rows import RowList
from medim_ray.probes.tasks import Task

OFF = "off"
FOLDER = "features"
_SCORES = 1  # raised when the same features come to other scores


class FeatureCache:
    """Features under a folder (any fsspec URL; "off": nothing is kept) for images of the data `data_hash`."""

    def __init__(self, url: str, data_hash: str) -> None:
        self._url, self._data_hash = url, data_hash

    def find(self, sources: Mapping[str, Source], rows: RowList) -> dict[str, NDArray[np.float32]]:
        """name -> [K, d] of the encoders whose features of all of `rows` are here."""
        found = {}
        for name, source in sources.items() if self._url != OFF else ():
            stored = self._read(source)
            if stored is None:
                continue
            places_S, features_SD = stored
            wanted_K = _places(rows)
            at_K = np.minimum(np.searchsorted(places_S, wanted_K), len(places_S) - 1)
            if len(places_S) and (places_S[at_K] == wanted_K).all():
                found[name] = features_SD[at_K]
        return found

    def keep(
        self, sources: Mapping[str, Source], rows: RowList, features: Mapping[str, NDArray[np.float32]]
    ) -> list[str]:
        """Writes the features beside those of other images that are here; notes on what could not be written."""
        if self._url == OFF:
            return []
        try:
            for name, values_KD in features.items():
                self._write(sources[name], _places(rows), values_KD)
        except OSError as error:
            why = error.strerror or str(error)
            return [f"features are not cached in {self._url}: {why}; the next probe computes them again"]
        return []

    def scores(self, source: Source, task: Task, rows: RowList, config: ProbeConfig) -> ScoreFile:
        """Where the scores of an encoder on a task are kept; rows: those that the task speaks of."""
        return ScoreFile.of(self._url, self._data_hash, source, task, rows, config)

    def _path(self, source: Source) -> tuple[fsspec.AbstractFileSystem, str]:
        fs, root = fsspec.core.url_to_fs(self._url)
        name = hashlib.blake2b(f"{source.key} {self._data_hash}".encode(), digest_size=12).hexdigest()
        return fs, f"{root.rstrip('/')}/{name}.npz"

    def _read(self, source: Source) -> tuple[NDArray[np.int64], NDArray[np.float32]] | None:
        """Places in ascending order and their features; None where there is no file or none that can be read."""
        arrays = _load(*self._path(source))
        return (arrays["places"], arrays["features"]) if {"places", "features"} <= arrays.keys() else None

    def _write(self, source: Source, places_K: NDArray[np.int64], values_KD: NDArray[np.float32]) -> None:
        stored = self._read(source)
        if stored is not None and stored[1].shape[1] == values_KD.shape[1]:
            others = ~np.isin(stored[0], places_K)
            places_K = np.concatenate([places_K, stored[0][others]])
            values_KD = np.concatenate([values_KD, stored[1][others]])
        order = np.argsort(places_K)
        _save(*self._path(source), {"places": places_K[order], "features": values_KD[order]})


def _load(fs: fsspec.AbstractFileSystem, path: str) -> dict[str, NDArray[Any]]:
    """The arrays of a file by name; {} where there is none that can be read."""
    try:
        with np.load(io.BytesIO(fs.cat_file(path))) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception:  # no file, or one cut or flipped: zip, zlib and numpy have many words for it
        return {}


def _save(fs: fsspec.AbstractFileSystem, path: str, arrays: Mapping[str, NDArray[Any]]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    with committed(fs, path, scratch=path.rpartition("/")[0]) as file:
        file.write(buffer.getvalue())


@dataclass(frozen=True, kw_only=True)
class ScoreFile:
    """The scores of one encoder on one task, by name (classify.probe); `url` is a folder or "off". Cheap to send to a
    task.

    digest: of all that the scores are a function of.
    """

    url: str
    digest: str

    @classmethod
    def of(
        cls, url: str, data_hash: str, source: Source, task: Task, places: RowList, config: ProbeConfig
    ) -> ScoreFile:
        """places: the rows that the task speaks of, whose patients and splits are part of the data."""
        protocol = (config.num_folds, config.seed, sorted(config.fractions), config.num_draws)
        hashed = hashlib.blake2b(digest_size=12)
        hashed.update(f"{_SCORES} {source.key} {data_hash} {task.label} {task.classes} {protocol}".encode())
        hashed.update(task.y_K.tobytes() + _places(places)[task.rows_K].tobytes())
        return cls(url=url, digest=hashed.hexdigest())

    def read(self) -> dict[str, NDArray[np.float64]]:
        """The scores by name; {} where there are none that can be read."""
        if self.url == OFF:
            return {}
        return _load(*self._at())

    def write(self, scores: Mapping[str, NDArray[np.float64]]) -> None:
        """Keeps the scores, or does not where the folder can't be written."""
        if self.url != OFF:
            with contextlib.suppress(OSError):
                _save(*self._at(), scores)

    def _at(self) -> tuple[fsspec.AbstractFileSystem, str]:
        fs, root = fsspec.core.url_to_fs(self.url)
        return fs, f"{root.rstrip('/')}/{self.digest}.scores.npz"


def _places(rows: RowList) -> NDArray[np.int64]:
    """One number an image: file, row group and row of the shards."""
    file, group, row = rows.place_K3.T
    return (file << 44) | (group << 24) | row
