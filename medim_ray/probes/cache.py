"""Features on disk, so that a probe of the same weights on the same images encodes nothing twice.

One file an encoder: its name is a hash of weights, crop and data, its rows are images. A cache that can't be read or
written costs time and nothing else.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Mapping

import fsspec
import numpy as np
from numpy.typing import NDArray

from medim_ray.probes.features import Source
from medim_ray.probes.rows import RowList

OFF = "off"
FOLDER = "features"


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

    def _path(self, source: Source) -> tuple[fsspec.AbstractFileSystem, str]:
        fs, root = fsspec.core.url_to_fs(self._url)
        name = hashlib.blake2b(f"{source.key} {self._data_hash}".encode(), digest_size=12).hexdigest()
        return fs, f"{root.rstrip('/')}/{name}.npz"

    def _read(self, source: Source) -> tuple[NDArray[np.int64], NDArray[np.float32]] | None:
        """Places in ascending order and their features; None where there is no file or none that can be read."""
        fs, path = self._path(source)
        try:
            with np.load(io.BytesIO(fs.cat_file(path))) as arrays:
                places, features = arrays["places"], arrays["features"]
        except (OSError, KeyError, ValueError, zipfile.BadZipFile):
            return None
        return places, features

    def _write(self, source: Source, places_K: NDArray[np.int64], values_KD: NDArray[np.float32]) -> None:
        stored = self._read(source)
        if stored is not None and stored[1].shape[1] == values_KD.shape[1]:
            others = ~np.isin(stored[0], places_K)
            places_K = np.concatenate([places_K, stored[0][others]])
            values_KD = np.concatenate([values_KD, stored[1][others]])
        order = np.argsort(places_K)
        buffer = io.BytesIO()
        np.savez(buffer, places=places_K[order], features=values_KD[order])
        fs, path = self._path(source)
        fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        fs.pipe_file(f"{path}.partial", buffer.getvalue())
        fs.mv(f"{path}.partial", path)


def _places(rows: RowList) -> NDArray[np.int64]:
    """One number an image: file, row group and row of the shards."""
    file, group, row = rows.place_K3.T
    return (file << 44) | (group << 24) | row
