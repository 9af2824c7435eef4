"""The working folder as the archive that is sent with a job: which files, how large, refused before it is sent."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pathspec

_SHOWN = 5
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same files are the same archive, whenever it is made
_COMPRESSION_LIMIT = 4  # more than this many times the limit before compression is not even tried


def files_to_send(folder: Path, excludes: Sequence[str]) -> list[Path]:
    """Files of `folder`, sorted, but for those that `excludes` or a .gitignore at its top or below names."""
    if not folder.is_dir():
        raise ValueError(f"environment.working_dir={folder}: no such folder")
    return sorted(_walk(folder, [(folder, pathspec.GitIgnoreSpec.from_lines(excludes))]))


def _walk(folder: Path, rules: list[tuple[Path, pathspec.GitIgnoreSpec]]) -> Iterator[Path]:
    ignore = folder / ".gitignore"
    if ignore.is_file():
        rules = [*rules, (folder, pathspec.GitIgnoreSpec.from_lines(ignore.read_text().splitlines()))]
    for path in folder.iterdir():
        slash = "/" if path.is_dir() and not path.is_symlink() else ""
        if any(spec.match_file(f"{path.relative_to(top).as_posix()}{slash}") for top, spec in rules):
            continue
        if slash:
            yield from _walk(path, rules)
        elif path.is_file():
            yield path


def pack(folder: Path, excludes: Sequence[str], limit_mb: int, to: Path) -> str:
    """Writes the archive to `to`; a line about it.

    ValueError where it is larger than `limit_mb` (10^6 bytes), naming the largest files.
    """
    files = files_to_send(folder, excludes)
    sizes = {path: path.stat().st_size for path in files}
    limit = limit_mb * 10**6
    if sum(sizes.values()) > _COMPRESSION_LIMIT * limit:
        raise ValueError(_too_large(folder, sizes, sum(sizes.values()), limit_mb, "before compression"))
    with zipfile.ZipFile(to, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files:
            info = zipfile.ZipInfo(path.relative_to(folder).as_posix(), _EPOCH)
            info.external_attr = (path.stat().st_mode & 0o777) << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, path.read_bytes())
    size = to.stat().st_size
    if size > limit:
        raise ValueError(_too_large(folder, sizes, size, limit_mb, "compressed"))
    digest = hashlib.blake2b(to.read_bytes(), digest_size=6).hexdigest()
    return f"{len(files)} files of {folder}, {size / 1e6:.1f} MB compressed, {digest}"


def _too_large(folder: Path, sizes: dict[Path, int], size: int, limit_mb: int, how: str) -> str:
    largest = sorted(sizes, key=lambda path: -sizes[path])[:_SHOWN]
    shown = ", ".join(f"{path.relative_to(folder)} ({sizes[path] / 1e6:.1f} MB)" for path in largest)
    return (
        f"environment.working_dir={folder}: {size / 1e6:.1f} MB {how}, over ray.max_upload_mb={limit_mb}. The largest "
        f"files: {shown}. Name them in environment.excludes or .gitignore, and keep data on storage.root"
    )
