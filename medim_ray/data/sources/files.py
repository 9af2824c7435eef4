"""Files of a tree at any fsspec URL: listing, reading, and faults of the whole job in plain words."""

from __future__ import annotations

import contextlib
import gzip
import lzma
import os
import stat
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from medim_ray.data import storage
from medim_ray.data.sources.base import absolute
from medim_ray.data.storage import StorageFailingError, http_status, is_clients, located, retried

T = TypeVar("T")
_READERS = 16  # threads that wait for storage while the plan is made


@contextlib.contextmanager
def readable(url: str, option: str = "source.path") -> Iterator[None]:
    """ValueError that names the option for whatever keeps a file or folder of the job from being read."""
    try:
        yield
    except StorageFailingError as error:
        raise ValueError(f"{option}={url} can't be read: {error}; try again when it answers") from None
    except FileNotFoundError as error:
        # fsspec's HTTP calls whatever a server refuses "not found", and keeps what it was as the cause.
        status = getattr(error.__cause__, "status", 404)
        if status in (404, 410):
            raise ValueError(f"{option}={url}: there is no such file or folder") from None
        raise ValueError(f"{option}={url} can't be read: the server answers {status}") from None
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile):
        raise ValueError(f"{option}={url} is cut off or damaged: download or copy it again") from None
    except IsADirectoryError:
        raise ValueError(f"{option}={url} is a folder: name the file in it") from None
    except NotADirectoryError:
        raise ValueError(f"{option}={url} is a file: name the folder") from None
    except PermissionError as error:
        inner = error.filename if isinstance(error.filename, str) and error.filename != absolute(url) else "it"
        raise ValueError(
            f"{option}={url}: no permission to read {inner}; check the file's rights or the bucket's credentials"
        ) from None
    except OSError as error:
        raise ValueError(f"{option}={url} can't be read: {error.strerror or type(error).__name__}") from None
    except Exception as error:
        if not is_clients(error):
            raise
        status = http_status(error)
        why = f"the server answers {status}" if status else f"{type(error).__name__}; check the credentials"
        raise ValueError(f"{option}={url} can't be read: {why}") from None


def asked(url: str, read: Callable[[], T], option: str = "source.path") -> T:
    """What `read` returns; remote storage that stumbles is asked again. ValueError: see `readable`."""
    with readable(url, option):
        return retried(url, read)


def join(root: str, name: str) -> str:
    """The URL of `name` (relative, with slashes) in the folder `root`; archives (zip://::…) are folders too."""
    root = absolute(root)
    if "://" not in root:
        return f"{root.rstrip('/')}/{name}"
    head, chain, tail = root.partition("::")
    return f"{head if head.endswith('://') else head.rstrip('/') + '/'}{name}{chain}{tail}"


def exists(url: str) -> bool:
    """Whether a file or folder is there. ValueError: not allowed to look."""

    def look() -> bool:
        fs, path = located(absolute(url))
        found: bool = fs.exists(path)
        return found

    return asked(url, look)


def is_file(url: str) -> bool:
    """Whether it is a file, whatever its ending; what is not there counts as one, so that its reader says so."""

    def look() -> bool:
        fs, path = located(absolute(url))
        return not fs.isdir(path)

    return asked(url, look)


def list_files(root: str, option: str = "source.path") -> list[str]:
    """Every file under `root`, relative to it, sorted; names that begin with a dot and what is no file are left out.

    Links are followed, each folder once, so that a link to a folder above ends. A broken link is listed: it is a
    row that can't be read. ValueError: no such folder, no permission, a file.
    """

    def find() -> list[str]:
        if "://" not in root:
            return list(_walk(Path(absolute(root))))
        fs, path = located(absolute(root))
        path = path.rstrip("/")
        names = [name[len(path) :].lstrip("/") for name in fs.find(path) if name != path]
        if not names and not fs.exists(path):
            raise FileNotFoundError
        return names

    names = asked(root, find, option)
    # object stores may hold an empty object "folder/" for a folder
    return sorted(n for n in names if n and n[-1] != "/" and not any(part.startswith(".") for part in n.split("/")))


def _walk(root: Path) -> Iterator[str]:
    seen: set[tuple[int, int]] = set()
    stack = [(root, "")]
    while stack:
        folder, prefix = stack.pop()
        facts = folder.stat()
        if (facts.st_dev, facts.st_ino) in seen:
            continue
        seen.add((facts.st_dev, facts.st_ino))
        with os.scandir(folder) as entries:
            found = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda e: e.name)
        for entry in found:
            try:
                mode = entry.stat().st_mode
            except OSError:  # a broken link, or one that points at itself
                mode = stat.S_IFREG
            if stat.S_ISDIR(mode):
                stack.append((Path(entry.path), f"{prefix}{entry.name}/"))
            elif stat.S_ISREG(mode):  # a pipe would wait for ever
                yield prefix + entry.name


def read_bytes(url: str, option: str = "source.path") -> bytes:
    """The content of a file that the whole job needs; .gz, .bz2 and .xz are unpacked. ValueError: it can't be read."""
    with readable(url, option):
        return storage.read_bytes(absolute(url), compression="infer")


def read_text(url: str, option: str = "source.path") -> str:
    """The text of a file, UTF-8 or else Latin-1, which every byte fits."""
    return decode_text(read_bytes(url, option))


def decode_text(data: bytes) -> str:
    """UTF-8 with or without byte order mark, or else Latin-1."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def read_texts(urls: Sequence[str]) -> list[str]:
    """The texts of many files, '' for an empty URL; several are read at a time. ValueError: one can't be read."""
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(lambda url: read_text(url) if url else "", urls))


def extension(name: str) -> str:
    """The lower-case ending after the last dot of a file's name, without the dot; '' where there is none."""
    return name.rpartition("/")[2].rpartition(".")[2].lower() if "." in name.rpartition("/")[2] else ""
