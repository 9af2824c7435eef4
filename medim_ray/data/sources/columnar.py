"""Sources `parquet` and `hf`: tables that hold the images themselves, or paths of image files, in a column.

The plan reads every column but the pixels; a task reads the row group (Parquet) or maps the file (Arrow) of its row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from medim_ray.data.images import BadImageError
from medim_ray.data.sources.base import (
    SOURCES,
    Picture,
    Row,
    Sample,
    absolute,
    decode_image,
    described,
    plain_sample,
    plan_rows,
    read_image,
)
from medim_ray.data.sources.files import exists, extension, is_file, join, list_files, read_bytes, readable
from medim_ray.data.sources.roles import ColumnConfig, choose_roles
from medim_ray.data.storage import opened, retried

T = TypeVar("T")
_PARQUET = ("parquet", "pq")
_MAX_GROUP = 256 << 20  # bytes of images in a row group
_PLACE = re.compile(r"(.+)#(\d+):(\d+)")  # file, row group, row in it
_SPLIT = re.compile(r"(?:^|[^a-z])(train(?:ing)?|valid(?:ation)?|val|dev|test(?:ing)?)(?![a-z])", re.IGNORECASE)


@SOURCES.register("parquet")
class ParquetSource:
    """Parquet files with images (bytes, or paths of files) and reports in columns.

    One row an image. Several files are read as one table; a task reads the whole row group of its image.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(ColumnConfig):
        name: str = described("parquet", "parquet")
        path: str = described("", "Parquet file or a folder of them, path or fsspec URL")

    def __init__(self, config: Config) -> None:
        if not config.path:
            raise ValueError("source.path is not set: give the Parquet file or folder as source.path=…")
        self.config = config
        self.name = config.name

    def plan(self) -> pa.Table:
        """See `Source`. ValueError: no Parquet file, a damaged one, a column that is not there."""
        path = self.config.path
        if extension(path) in _PARQUET and is_file(path):
            files = [("", absolute(path))]
        else:
            files = [(f"{name}:", join(path, name)) for name in list_files(path) if extension(name) in _PARQUET]
            if not files:
                raise ValueError(f"source.path={path} holds no file that ends in .parquet")
        rows = [row for prefix, url in files for row in _table_rows(self.config, url, prefix)]
        return _planned(rows, path)

    def sample(self, row: Mapping[str, Any]) -> Sample:
        """See `Source`."""
        return plain_sample(row, _pixels(row["location"], self.config))


@SOURCES.register("hf")
class HfSource:
    """A local folder of a Hugging Face dataset: `save_to_disk`, or its Parquet or Arrow files; `datasets` not needed.

    Splits are those of the dataset; where it has one only, patients are dealt by `split`. Class labels become names.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(ColumnConfig):
        name: str = described("hf", "hf")
        path: str = described("", "folder that save_to_disk wrote, or with Parquet or Arrow files of a dataset")
        official_split: bool = described(True, "keep the splits of the dataset; false: deal patients by `split`")

    def __init__(self, config: Config) -> None:
        if not config.path:
            raise ValueError("source.path is not set: give the folder of the dataset as source.path=…")
        if "://" in config.path:
            raise ValueError(f"source.path={config.path}: Arrow files are mapped into memory, copy the folder to disk")
        self.config = config
        self.name = config.name

    def plan(self) -> pa.Table:
        """See `Source`. ValueError: no dataset there, a damaged file, a column that is not there."""
        files = list(self._files())
        if not files:
            raise ValueError(f"source.path={self.config.path} holds no dataset: no state.json, *.parquet or *.arrow")
        splits = {split for _, _, split in files}
        keep = self.config.official_split and len(splits) > 1
        rows = [
            row
            for prefix, url, split in files
            for row in _table_rows(self.config, url, prefix, split=split if keep else "")
        ]
        return _planned(rows, self.config.path)

    def sample(self, row: Mapping[str, Any]) -> Sample:
        """See `Source`."""
        return plain_sample(row, _pixels(row["location"], self.config))

    def _files(self) -> Iterator[tuple[str, str, str]]:
        """(prefix of image names, URL, split) of each data file."""
        root = self.config.path
        if exists(join(root, "dataset_dict.json")):
            for split in json.loads(read_bytes(join(root, "dataset_dict.json")))["splits"]:
                yield from _saved(join(root, split), f"{split}/", split)
        elif exists(join(root, "state.json")):
            yield from _saved(root, "", "")
        else:
            for name in list_files(root):
                if extension(name) in (*_PARQUET, "arrow"):
                    found = _SPLIT.findall(name)
                    yield f"{name}:", join(root, name), found[-1].lower() if found else ""


def _saved(root: str, prefix: str, split: str) -> Iterator[tuple[str, str, str]]:
    """The files of one folder of `save_to_disk`."""
    state = json.loads(read_bytes(join(root, "state.json")))
    if state.get("_indices_data_files"):
        raise ValueError(f"{root} was saved with an index of chosen rows: save it again after flatten_indices()")
    for entry in state["_data_files"]:
        name = entry["filename"]
        yield f"{prefix}{name}:", join(root, name), split


def _planned(rows: Sequence[Row], path: str) -> pa.Table:
    if not rows:
        raise ValueError(f"source.path={path} has columns and no row: nothing to prepare")
    return plan_rows(rows)


def _table_rows(config: ColumnConfig, url: str, prefix: str, split: str = "") -> Iterator[Row]:
    """The rows of one file; images are not read."""
    schema, sizes = _shape(url)
    roles = choose_roles(config, schema.names, url)
    kind = schema.field(roles.image).type
    is_path = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if not (is_path or pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise ValueError(
            f"source.image_column={roles.image!r} of {url} holds {kind}: it must hold the bytes of image files, "
            "{bytes, path} as Hugging Face writes them, or paths"
        )
    if not is_path:
        _refuse_large_groups(url, roles.image)
    names = _class_names(schema)
    wanted = [*roles.text_columns(), *([roles.image] if is_path else [])]
    at = 0
    for group, size in enumerate(sizes):
        columns: list[dict[str, Any]] = [{}] * size
        if wanted:
            with readable(url):
                columns = _again(url, partial(_read, url, group, tuple(wanted))).to_pylist()
        for place, values in enumerate(columns):
            for column in names.keys() & values.keys():
                values[column] = _class_name(names[column], values[column])
            location = f"{url}#{group}:{place}"
            if is_path:
                location = _beside(url, str(values[roles.image] or "").strip())
            yield roles.row(values, location=location, name=f"{prefix}{at + place}", split=split)
        at += size


def _refuse_large_groups(url: str, image_column: str) -> None:
    """ValueError where one image would cost the reading of too many others."""
    if extension(url) == "arrow":
        return  # mapped: an image is read at its place
    metadata = _parquet(url).metadata
    for group in range(metadata.num_row_groups):
        parts = metadata.row_group(group)
        chunks = (parts.column(k) for k in range(parts.num_columns))
        size = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] == image_column)
        if size > _MAX_GROUP:
            raise ValueError(
                f"{url} has row groups of {parts.num_rows} images ({size >> 20} MiB), and each image costs the reading "
                "of its whole group: write it anew, pyarrow.parquet.write_table(…, row_group_size=100)"
            )


def _beside(url: str, path: str) -> str:
    """A path of a table's column: absolute, a URL, or relative to the table's folder; '' stays."""
    return path if not path or path.startswith("/") or "://" in path else join(url.rpartition("/")[0], path)


def _pixels(location: str, config: ColumnConfig) -> Picture:
    """The image of a row. BadImageError: null, damaged, or a file that can't be read any more. RuntimeError: its
    storage keeps failing."""
    place = _PLACE.fullmatch(location)
    if place is None:
        return read_image(location)
    url, group, row = place[1], int(place[2]), int(place[3])

    def read() -> Any:
        schema, _ = _shape_of(url)
        image = choose_roles(config, schema.names, url).image
        return _read(url, group, (image,))[image][row].as_py()

    try:
        value = _again(url, read)
    except (pa.ArrowException, OSError, ValueError, IndexError) as error:
        raise BadImageError(f"row can't be read from its file: {type(error).__name__}") from None
    if isinstance(value, dict):
        value = value.get("bytes") or _beside(url, value.get("path") or "")
    if isinstance(value, str):
        return read_image(value)
    if not value:
        raise BadImageError("no image in this row")
    return decode_image(value)


def _again(url: str, read: Callable[[], T]) -> T:
    """`retried`, with the file opened anew: one that is open may be that of a connection which is gone."""

    def fresh() -> T:
        try:
            return read()
        except Exception:
            _parquet.cache_clear()
            raise

    return retried(url, fresh)


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Column -> names of its classes, as Hugging Face keeps them in the schema."""
    text = (schema.metadata or {}).get(b"huggingface")
    features = json.loads(text).get("info", {}).get("features", {}) if text else {}
    return {
        name: feature["names"]
        for name, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
    }


def _class_name(names: Sequence[str], value: Any) -> Any:
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None


def _shape(url: str) -> tuple[pa.Schema, tuple[int, ...]]:
    """Schema and rows of each row group (or record batch). ValueError: no such file, damaged."""
    with readable(url):
        return _again(url, lambda: _shape_of(url))


@lru_cache(maxsize=16)
def _shape_of(url: str) -> tuple[pa.Schema, tuple[int, ...]]:
    """`_shape` with the errors of the storage as they are."""
    try:
        if extension(url) == "arrow":
            batches = _arrow(url)
            return batches.schema, tuple(len(chunk) for chunk in batches.column(0).chunks)
        metadata = _parquet(url).metadata
        groups = range(metadata.num_row_groups)
        return _parquet(url).schema_arrow, tuple(metadata.row_group(g).num_rows for g in groups)
    except pa.ArrowInvalid:
        raise ValueError(f"{url} is no Parquet or Arrow file, or was cut off") from None


@lru_cache(maxsize=1)  # the rows of a task come from many row groups: more would cost memory and save nothing
def _read(url: str, group: int, columns: tuple[str, ...]) -> pa.Table:
    """Columns of one row group."""
    if extension(url) != "arrow":
        return _parquet(url).read_row_group(group, columns=list(columns), use_threads=False)
    table = _arrow(url)
    start = sum(len(chunk) for chunk in table.column(0).chunks[:group])
    return table.select(list(columns)).slice(start, len(table.column(0).chunk(group)))


@lru_cache(maxsize=16)
def _parquet(url: str) -> pq.ParquetFile:
    return pq.ParquetFile(url, memory_map=True) if "://" not in url else pq.ParquetFile(opened(url).open())


@lru_cache(maxsize=16)
def _arrow(url: str) -> pa.Table:
    """The table of a stream or file of record batches, mapped: only what is used is read."""
    data = pa.memory_map(url)
    try:
        return pa.ipc.open_stream(data).read_all()
    except pa.ArrowInvalid:
        data.seek(0)
        return pa.ipc.open_file(data).read_all()
