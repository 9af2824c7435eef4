"""Source `webdataset`: tar files in which members of one name and different endings are one sample.

The plan reads headers and texts; a task reads the bytes of one image at its place in the tar.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from medim_ray.data.images import BadImageError
from medim_ray.data.sources.base import SOURCES, Sample, absolute, decode_image, described, plain_sample, plan_rows
from medim_ray.data.sources.files import asked, decode_text, extension, is_file, join, list_files
from medim_ray.data.sources.folder import IMAGE_EXTENSIONS
from medim_ray.data.sources.roles import ColumnConfig, choose_roles
from medim_ray.data.storage import opened, retried

_IMAGES = (*IMAGE_EXTENSIONS, "dcm")
_MAX_TEXT = 1 << 24  # bytes of a text member; more is no report
_MAGIC, _FIRST_LOOK = b"\0ustar", 1 << 22  # in every header of a tar; bytes in which one is looked for


@dataclass(kw_only=True)
class _Group:
    """The members of one sample: image at offset:size ('' where it has none, size -1: cut off), texts by ending."""

    key: str
    image: str = ""
    fields: dict[str, Any] = field(default_factory=dict)
    unnamed: list[str] = field(default_factory=list)  # members that may be images, but have longer endings


@SOURCES.register("webdataset")
class WebDatasetSource:
    """WebDataset tar files: image, .txt report and .json fields of one key.

    Columns are the endings of text members (txt, cls) and the top keys of .json; an image's name is TAR:KEY.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(ColumnConfig):
        name: str = described("webdataset", "webdataset")
        path: str = described("", "tar file, or a folder of them, path or fsspec URL; not compressed")

        def __post_init__(self) -> None:
            if self.image_column is not None and self.image_column.lower() not in _IMAGES:
                raise ValueError(f"image_column={self.image_column!r}: the ending of the images, {', '.join(_IMAGES)}")

    def __init__(self, config: Config) -> None:
        if not config.path:
            raise ValueError("source.path is not set: give the tar file or the folder of tar files as source.path=…")
        self.config = config
        self.name = config.name

    def plan(self) -> pa.Table:
        """See `Source`. A tar that ends too early gives the rows before its end, the last of them unreadable."""
        path = self.config.path
        if extension(path) in ("tar", "gz", "tgz") and is_file(path):
            tars = [(path.rpartition("/")[2], absolute(path))]
        else:
            tars = [(name, join(path, name)) for name in list_files(path) if extension(name) == "tar"]
            if not tars:
                raise ValueError(f"source.path={path} holds no file that ends in .tar")
        endings = (self.config.image_column.lower(),) if self.config.image_column else _IMAGES
        groups = [(name, url, group) for name, url in tars for group in _groups(url, endings)]
        if not groups:
            raise ValueError(f"source.path={path}: the tar files are empty: nothing to prepare")
        present = list(dict.fromkeys(name for *_, group in groups for name in group.fields))
        roles = choose_roles(self.config, present, path, need_image=False)
        return plan_rows(
            [
                roles.row(
                    group.fields, location=f"{url}#{group.image}" if group.image else "", name=f"{name}:{group.key}"
                )
                for name, url, group in groups
            ]
        )

    def sample(self, row: Mapping[str, Any]) -> Sample:
        """See `Source`."""
        url, _, place = row["location"].rpartition("#")
        if not url:
            raise BadImageError("no image of this key in the tar")
        offset, size = (int(part) for part in place.split(":"))
        data = _bytes_at(url, offset, size) if size >= 0 else b""
        if len(data) != size:
            raise BadImageError("the tar was cut off in this sample: it has no end mark")
        return plain_sample(row, decode_image(data))


def _bytes_at(url: str, offset: int, size: int) -> bytes:
    def read() -> bytes:
        with opened(url, **({"cache_type": "none"} if "://" in url else {})) as file:
            file.seek(offset)
            data: bytes = file.read(size)
            return data

    try:
        return retried(url, read)
    except OSError as error:
        raise BadImageError(f"tar can't be read: {type(error).__name__}") from None


def _groups(url: str, endings: tuple[str, ...]) -> list[_Group]:
    """The samples of a tar in its order; of a tar that was cut off, the last one is marked. ValueError: a tar that is
    damaged in its middle, or members of which an image would be lost."""
    groups = asked(url, lambda: _scanned(url, endings))
    for group in groups:
        if len(group.unnamed) > 1 and not group.image:
            raise ValueError(
                f"{url}: {group.unnamed[0]!r} and {group.unnamed[1]!r} are of one key, {group.key!r} (it ends at the "
                "first dot), and none is its image: name the files without dots in their keys"
            )
    dotted = [group.unnamed[0] for group in groups if group.unnamed]
    if dotted and not any(group.image for group in groups):
        raise ValueError(
            f"{url}: the ending of {dotted[0]!r} begins at its first dot, so it is no image, as no other member is: "
            "name the files without dots in their keys"
        )
    return groups


def _scanned(url: str, endings: tuple[str, ...]) -> list[_Group]:
    groups: dict[str, _Group] = {}
    with opened(url) as file:
        if file.read(2) == b"\x1f\x8b":
            raise ValueError(f"{url} is compressed, and samples are read at their place: unpack it with gunzip")
        at: int | None = 0
        while at is not None:  # one archive after the other, where they were put together with `cat`
            at = _archive(url, file, at, endings, groups)
    return list(groups.values())


def _archive(url: str, file: Any, start: int, endings: tuple[str, ...], groups: dict[str, _Group]) -> int | None:
    """Adds the samples of the archive at `start`; where the next one begins, None for no other."""
    last, end = "", start
    file.seek(start)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                folder, slash, base = member.name.rpartition("/")
                stem, ending = _key(base)
                if member.isfile() and stem and ending:
                    last = f"{folder}{slash}{stem}"
                    _add(url, tar, member, ending.lower(), groups.setdefault(last, _Group(key=last)), endings)
    except (tarfile.ReadError, EOFError):
        if end == start == 0:
            file.seek(0)
            if _MAGIC not in file.read(_FIRST_LOOK):
                raise ValueError(f"{url} is no tar file") from None
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) == tarfile.BLOCKSIZE and any(block):
        raise ValueError(
            f"{url} is damaged at byte {end}, and what is behind it can't be found: restore or pack it anew"
        )
    if len(block) < tarfile.BLOCKSIZE and last:  # no end mark
        groups[last].image = "0:-1"
    while len(block) == tarfile.BLOCKSIZE and not any(block):
        end += tarfile.BLOCKSIZE
        block = file.read(tarfile.BLOCKSIZE)
    return end if len(block) == tarfile.BLOCKSIZE else None


def _key(base: str) -> tuple[str, str]:
    """Key and ending of a member's name: at the first dot, as WebDataset has it, but behind a DICOM UID."""
    uid = re.match(r"\d+(\.\d+)+(?=\.[A-Za-z])", base)
    stem = uid[0] if uid else base.partition(".")[0]
    return stem, base[len(stem) + 1 :]


def _add(
    url: str, tar: tarfile.TarFile, member: tarfile.TarInfo, ending: str, group: _Group, images: tuple[str, ...]
) -> None:
    if ending in images:
        if group.image:
            raise ValueError(
                f"{url}: the key {group.key!r} has a second image, {member.name!r}, and one would be lost: give each a "
                "key of its own (a key ends at the first dot), or name the ending in source.image_column"
            )
        group.image = f"{member.offset_data}:{member.size}"
        return
    if ending.rpartition(".")[2] in images and "." in ending:
        group.unnamed.append(member.name)
    if ending in _IMAGES or member.size > _MAX_TEXT:
        return
    if ending not in ("txt", "json", "cls", "text", "id"):
        return
    stream = tar.extractfile(member)
    data = stream.read() if stream else b""
    if len(data) < member.size:
        raise EOFError
    if ending != "json":
        group.fields[ending] = decode_text(data)
        return
    try:
        tree = json.loads(data)
    except ValueError:
        raise ValueError(f"{url}: {member.name} is no JSON") from None
    group.fields.update(tree if isinstance(tree, dict) else {"json": tree})
