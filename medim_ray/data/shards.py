"""The shard format: Parquet files of encoded grayscale images and reports, and manifest.json, which is written last.

    OUT/<split>/NNNNN.parquet   OUT/quarantine.parquet   OUT/duplicates.json   OUT/tokenizer/...   OUT/manifest.json
A folder without a manifest is not a shard set. Nothing here knows Ray, sources or models.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import xxhash

from medim_ray.data.storage import committed, missing_packages, sizes

# 2: hashes of the pixels, duplicates; 3: a checksum a row; 4: XXH3 of the files; 5: mark of the salt
SCHEMA_VERSION = 5
ROW_VERSION = 3  # of what the Parquet files hold: sets from here on can be added to and merged
READABLE = (1, 2, 3, 4, 5)
# Chance finds no collision, and it takes a tenth of BLAKE2b's time, which was 2 % of all that `prepare` does.
CHECKSUM = "xxh3_128"
_CHECKSUMS: dict[str, Callable[[], Any]] = {
    CHECKSUM: xxhash.xxh3_128,
    "blake2b": partial(hashlib.blake2b, digest_size=32),  # of sets before version 4
}
MANIFEST = "manifest.json"
QUARANTINE = "quarantine.parquet"
DUPLICATES = "duplicates.json"
WORK = ".prepare"  # what an unfinished `prepare` keeps in OUT to go on from; no part of the set
TOKENIZER = "tokenizer"

_TRUTH = pa.struct(
    [
        ("finding", pa.string()),
        ("side", pa.string()),
        ("zone", pa.string()),
        ("sentence", pa.int32()),  # position in `sentences`, -1: no sentence states it
        ("mask", pa.binary()),  # 1-bit PNG of the size of the image
    ]
)
SECTIONS = ("findings", "impression", "indication", "comparison", "body")
SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("patient_id", pa.string()),  # keyed hash
        ("split", pa.string()),
        ("source", pa.string()),
        ("view", pa.string()),
        ("image", pa.binary()),  # JPEG or PNG, one channel
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("bits", pa.int8()),  # 8 or 16
        ("report", pa.string()),  # what a text encoder reads: findings and impression, or the body where neither is
        ("sections", pa.struct([(name, pa.string()) for name in SECTIONS])),
        ("sentences", pa.list_(pa.string())),  # of `report`, as medim_ray.reports.split_sentences finds them
        ("labels", pa.map_(pa.string(), pa.string())),  # known labels only, sorted by name
        ("truth", pa.list_(_TRUTH)),  # empty where unknown
        ("flags", pa.list_(pa.string())),
        ("pixel_hash", pa.string()),  # of the stored pixels before encoding: equal for exact duplicates
        ("perceptual_hash", pa.string()),  # 64 + 256 bits in hexadecimal digits: few differ for near duplicates
        (
            "checksum",
            pa.int64(),
        ),  # of image_id, image and report (fingerprint.row_checksum)
    ],
    metadata={"medim_ray.schema_version": str(ROW_VERSION)},
)
QUARANTINE_SCHEMA = pa.schema([("image_id", pa.string()), ("location", pa.string()), ("reason", pa.string())])

# Images and masks are compressed already and never repeat; everything else does.
_TEXT_COLUMNS = ["report", *(f"sections.{name}" for name in SECTIONS), "sentences.list.element"]
_TEXT_COLUMNS += ["image_id", "pixel_hash", "perceptual_hash"]
_NAME_COLUMNS = ["split", "source", "view", "patient_id", "labels.key_value.key", "labels.key_value.value"]


@dataclass(frozen=True, kw_only=True)
class ShardFile:
    """One Parquet file of a split. path: relative to the shard set; row_groups: rows of each row group; checksum: its
    kind and digits, as in xxh3_128:0a1b; origin: in a merged set, the folder name of the set that it came from."""

    path: str
    split: str
    rows: int
    row_groups: tuple[int, ...]
    bytes: int
    checksum: str
    origin: str = ""

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> ShardFile:
        """The entry of its JSON, of any version."""
        return cls(**{**_with_checksum(tree), "row_groups": tuple(tree["row_groups"])})


@dataclass(frozen=True, kw_only=True)
class OtherFile:
    """A file of the set that holds no samples: quarantine, tokenizer."""

    path: str
    bytes: int
    checksum: str

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> OtherFile:
        """The entry of its JSON, of any version."""
        return cls(**_with_checksum(tree))


def _with_checksum(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Before version 4 the checksum had the name of its only kind."""
    entry = dict(tree)
    if "blake2b" in entry:
        entry["checksum"] = f"blake2b:{entry.pop('blake2b')}"
    return entry


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a shard set holds. intensity: `mean` and `std` over all stored training pixels, on the scale [0, 1].

    rows_in = rows_out + rows_quarantined + rows_skipped (copies that `duplicates=skip` leaves out); quarantine: rows by
    reason; labels: name -> value -> rows; intensity also has `pixels`, their number; config_hash: options that shape
    the rows; input_hash: the rows of the source as listed (not the image files); salt_mark: a hash under the salt of
    the patient ids, equal where one patient has one id ('' before version 5).
    """

    schema_version: int = SCHEMA_VERSION
    package_version: str
    config_hash: str
    input_hash: str
    rows_in: int
    rows_out: int
    rows_quarantined: int
    splits: dict[str, int]
    sources: dict[str, int]
    quarantine: dict[str, int]
    flags: dict[str, int]
    patients: dict[str, int]
    labels: dict[str, dict[str, int]]
    intensity: dict[str, float]
    files: tuple[ShardFile, ...]
    other_files: tuple[OtherFile, ...] = field(default=())
    rows_skipped: int = 0
    salt_mark: str = ""

    def to_json(self) -> str:
        """Text of manifest.json; `checksum` covers every other key."""
        tree = dataclasses.asdict(self)
        tree["checksum"] = _checksum(tree)
        return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, url: str) -> Manifest:
        """ValueError, naming `url`: no JSON, another schema version, keys missing, or a checksum that doesn't fit."""
        try:
            tree = json.loads(text)
            version = int(tree["schema_version"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{url} is damaged, it is no manifest: run `medim-ray prepare` again") from None
        if version not in READABLE:
            fix = "update medim-ray" if version > SCHEMA_VERSION else "run `medim-ray prepare` again into a new folder"
            known = f"{', '.join(str(v) for v in READABLE[:-1])} and {READABLE[-1]}"
            raise ValueError(f"{url}: shards of schema version {version}, this medim-ray reads {known}: {fix}")
        if tree.pop("checksum", None) != _checksum(tree):
            raise ValueError(
                f"{url}: the checksum does not fit, the manifest was changed or damaged after it was written"
            )
        tree["files"] = tuple(map(ShardFile.from_tree, tree["files"]))
        tree["other_files"] = tuple(map(OtherFile.from_tree, tree["other_files"]))
        return cls(**tree)


def _checksum(tree: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(tree, sort_keys=True).encode(), digest_size=16).hexdigest()


_VERIFY = "it lies in the manifest; restore it, or prepare the set again. All differences: medim-ray shards verify"


class ShardSet:
    """A finished shard set, opened by its manifest; reads small columns. Pixels are read by the training stream."""

    def __init__(self, url: str, fs: fsspec.AbstractFileSystem, root: str, manifest: Manifest) -> None:
        self.url, self.fs, self.root, self.manifest = url, fs, root, manifest

    @property
    def content_hash(self) -> str:
        """Twelve hexadecimal digits over the checksums of the samples' files: the data, wherever it lies."""
        files = sorted((file.path, file.checksum.partition(":")[2]) for file in self.manifest.files)
        return hashlib.blake2b(json.dumps(files).encode(), digest_size=6).hexdigest()

    @classmethod
    def open(cls, url: str, fs: fsspec.AbstractFileSystem | None = None) -> ShardSet:
        """ValueError where there is no (readable) manifest or one of another schema version.

        fs: the opened file system of `url`, where it needs options.
        """
        with missing_packages(url):
            if fs is None:
                fs, root = fsspec.core.url_to_fs(url)
            else:
                root = fs._strip_protocol(url)
        try:
            text = fs.cat_file(f"{root}/{MANIFEST}").decode(errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(
                f"{url} is not a finished shard set (no {MANIFEST} in it): write one with "
                f"`medim-ray prepare --config configs/sources/csv.yaml source.path=… out={url}`"
            ) from None
        return cls(url, fs, root, Manifest.from_json(text, f"{url}/{MANIFEST}"))

    @property
    def label_names(self) -> tuple[str, ...]:
        """Labels that at least one row has, sorted."""
        return tuple(sorted(self.manifest.labels))

    def files(self, split: str | None = None) -> tuple[ShardFile, ...]:
        """Files of a split, or of all splits, in order."""
        return tuple(f for f in self.manifest.files if split in (None, f.split))

    def num_rows(self, split: str | None = None) -> int:
        """Rows of a split, or of all splits."""
        return sum(f.rows for f in self.files(split))

    def check_files(self, split: str | None = None) -> None:
        """ValueError where a file of the split (of any: None) is gone or has another size; nothing is read."""
        found = sizes(self.fs, self.root)
        for file in self.files(split):
            size = found.get(file.path)
            if size != file.bytes:
                what = "is missing" if size is None else f"has {size} bytes instead of {file.bytes}"
                raise ValueError(f"{self.url}: {file.path} {what}: {_VERIFY} {self.url}")

    def exact_duplicates(self) -> list[dict[str, Any]]:
        """The groups of exact copies in duplicates.json; [] in a set of schema version 1."""
        if not any(file.path == DUPLICATES for file in self.manifest.other_files):
            return []
        groups: list[dict[str, Any]] = json.loads(self.fs.cat_file(f"{self.root}/{DUPLICATES}"))["exact"]
        return groups

    def tokenizer(self) -> dict[str, bytes]:
        """Path and content of each file of the vocabulary; {} where there is none."""
        paths = [file.path for file in self.manifest.other_files if file.path.startswith(f"{TOKENIZER}/")]
        return {path: self.fs.cat_file(f"{self.root}/{path}") for path in paths}

    def path(self, file: ShardFile) -> str:
        """Path of a file on `self.fs` (and on `self.arrow_fs()`)."""
        return f"{self.root}/{file.path}"

    def arrow_fs(self) -> pafs.FileSystem:
        """The file system for PyArrow: its own for local folders, fsspec elsewhere."""
        if "file" in (self.fs.protocol if isinstance(self.fs.protocol, tuple) else (self.fs.protocol,)):
            return pafs.LocalFileSystem()
        return pafs.PyFileSystem(pafs.FSSpecHandler(self.fs))

    def read_rows(self, split: str | None = None, columns: Sequence[str] | None = None) -> pa.Table:
        """The named columns (default: all but image and truth) of every row of a split, in the order of the shards."""
        if columns is None:
            columns = [name for name in SCHEMA.names if name not in ("image", "truth")]
        unknown = [name for name in columns if name not in SCHEMA.names]
        if unknown:
            raise ValueError(f"columns {', '.join(unknown)} are not in shards; they have {', '.join(SCHEMA.names)}")
        schema = pa.schema([SCHEMA.field(name) for name in columns])
        tables = [self._read(file, schema) for file in self.files(split)]
        return pa.concat_tables([schema.empty_table(), *tables])

    def _read(self, file: ShardFile, schema: pa.Schema) -> pa.Table:
        """Columns of one file; null where it is of an older schema version, which had none. ValueError: it is gone,
        cut off or damaged since the manifest was written."""
        try:
            with self.arrow_fs().open_input_file(self.path(file)) as raw:
                parquet = pq.ParquetFile(raw)
                present = [name for name in schema.names if name in parquet.schema_arrow.names]
                table = parquet.read(columns=present).replace_schema_metadata(None)
        except FileNotFoundError:
            raise ValueError(f"{self.url}: {file.path} is missing: {_VERIFY} {self.url}") from None
        except (pa.ArrowInvalid, OSError) as error:
            kind = type(error).__name__
            raise ValueError(f"{self.url}: {file.path} can't be read ({kind}): {_VERIFY} {self.url}") from None
        for name in schema.names:
            if name not in present:
                table = table.append_column(name, pa.nulls(table.num_rows, schema.field(name).type))
        return table.select(schema.names)


class HashingFile:
    """A writable file that forgets nothing of what passed: `num_bytes` and the checksum of everything written."""

    def __init__(self, file: Any, kind: str = CHECKSUM) -> None:
        self._file, self._kind, self._hash = file, kind, _CHECKSUMS[kind]()
        self.num_bytes, self.closed = 0, False

    def write(self, data: Any) -> int:
        """Pass on and count; returns the number of bytes."""
        view = memoryview(data)
        self._file.write(view)
        self._hash.update(view)
        self.num_bytes += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        """Nothing to do: the file below is closed by its owner."""

    def close(self) -> None:
        """Called by PyArrow; the file below is closed by its owner."""
        self.closed = True

    def readable(self) -> bool:
        """Never."""
        return False

    def writable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Never."""
        return False

    def tell(self) -> int:
        """Bytes so far."""
        return self.num_bytes

    def hexdigest(self) -> str:
        """Of everything written."""
        return str(self._hash.hexdigest())

    def checksum(self) -> str:
        """As manifests have it: the kind and the digits."""
        return f"{self._kind}:{self.hexdigest()}"


def write_shard(
    fs: fsspec.AbstractFileSystem, root: str, path: str, split: str, groups: Iterable[pa.Table]
) -> ShardFile:
    """Writes root/path, a row group for each table of `groups` that has rows; the same rows give the same bytes.

    The file appears whole or not at all.
    """
    rows: list[int] = []
    with committed(fs, f"{root}/{path}", f"{root}/{WORK}") as raw:
        out = HashingFile(raw)
        with pq.ParquetWriter(
            pa.PythonFile(out, mode="w"),
            SCHEMA,
            compression=dict.fromkeys([*_TEXT_COLUMNS, *_NAME_COLUMNS], "zstd"),
            use_dictionary=_NAME_COLUMNS,
            write_statistics=["image_id", "split"],  # statistics hold values: none of reports, labels or pixels
            write_page_checksum=True,
        ) as writer:
            for table in groups:
                if table.num_rows:
                    writer.write_table(table.combine_chunks(), row_group_size=table.num_rows)
                    rows.append(table.num_rows)
    return ShardFile(
        path=path, split=split, rows=sum(rows), row_groups=tuple(rows), bytes=out.num_bytes, checksum=out.checksum()
    )


def write_table(fs: fsspec.AbstractFileSystem, root: str, path: str, table: pa.Table) -> OtherFile:
    """Writes a small Parquet file of the set, whole or not at all."""
    with committed(fs, f"{root}/{path}", f"{root}/{WORK}") as raw:
        out = HashingFile(raw)
        pq.write_table(table, pa.PythonFile(out, mode="w"), compression="zstd")
    return OtherFile(path=path, bytes=out.num_bytes, checksum=out.checksum())


def write_bytes(fs: fsspec.AbstractFileSystem, root: str, path: str, data: bytes) -> OtherFile:
    """Writes a small file of the set, whole or not at all."""
    with committed(fs, f"{root}/{path}", f"{root}/{WORK}") as raw:
        out = HashingFile(raw)
        out.write(data)
    return OtherFile(path=path, bytes=out.num_bytes, checksum=out.checksum())


def describe_file(fs: fsspec.AbstractFileSystem, root: str, path: str, kind: str = CHECKSUM) -> OtherFile:
    """Size and checksum of a file that lies in the set."""
    out = HashingFile(Nowhere(), kind)
    with fs.open(f"{root}/{path}", "rb") as file:
        while block := file.read(1 << 22):
            out.write(block)
    return OtherFile(path=path, bytes=out.num_bytes, checksum=out.checksum())


def checksum_kind(file: ShardFile | OtherFile) -> str:
    """The kind of a file's checksum; ValueError where this package does not know it."""
    kind = file.checksum.partition(":")[0]
    if kind not in _CHECKSUMS:
        raise ValueError(f"{file.path}: checksum {file.checksum!r}, this medim-ray knows {', '.join(_CHECKSUMS)}")
    return kind


class Nowhere:
    """Takes what is written and drops it."""

    def write(self, data: Any) -> int:
        """Number of bytes."""
        return memoryview(data).nbytes


def verify(url: str, fs: fsspec.AbstractFileSystem | None = None) -> list[str]:
    """Every difference between the manifest and the files, one line each; [] where the set is whole.

    Reads every byte. fs: see `ShardSet.open`. ValueError where there is no manifest; a manifest that was changed is a
    difference.
    """
    try:
        shards = ShardSet.open(url, fs)
    except ValueError as error:
        if "not a finished shard set" in str(error):
            raise
        return [str(error)]
    fs, root = shards.fs, shards.root
    listed: list[ShardFile | OtherFile] = [*shards.manifest.files, *shards.manifest.other_files]
    known = {file.path: file for file in listed}
    differences = []
    for path, expected in known.items():
        try:
            found = describe_file(fs, root, path, checksum_kind(expected))
        except FileNotFoundError:
            differences.append(f"{path}: missing")
            continue
        except OSError as error:
            differences.append(f"{path}: can't be read ({type(error).__name__})")
            continue
        if found.bytes != expected.bytes:
            differences.append(f"{path}: {found.bytes} bytes instead of {expected.bytes}")
        elif found.checksum != expected.checksum:
            differences.append(f"{path}: content changed (now {found.checksum}, it was {expected.checksum})")
    for full in sorted(fs.find(root)):
        path = full[len(root.rstrip("/")) + 1 :]
        if path.endswith(".parquet") and path not in known and not path.startswith(f"{WORK}/"):
            differences.append(f"{path}: not in the manifest")
    return differences
