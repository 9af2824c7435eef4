"""Files on any fsspec storage: opened by option, read with retries, written whole or not at all, faults in plain words.

Knows no Ray. Object stores show an object when its upload ends; elsewhere a file is written beside and renamed.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.config import conf
from fsspec.core import OpenFile, get_compression, split_protocol
from fsspec.implementations.local import LocalFileSystem

S3, GCS, AZURE = ("s3", "s3a"), ("gs", "gcs"), ("az", "abfs", "abfss", "adl")
_OBJECT_STORES = (*S3, *GCS, *AZURE)
_PACKAGES = {**dict.fromkeys(S3, "s3fs"), **dict.fromkeys(GCS, "gcsfs"), **dict.fromkeys(AZURE, "adlfs")}
_PACKAGES |= {"http": "aiohttp", "https": "aiohttp", "sftp": "paramiko", "ssh": "paramiko", "hf": "huggingface_hub"}
_ENVIRONMENT = copy.deepcopy(conf)  # what fsspec took from files and FSSPEC_… variables, before this module adds to it
_ATTEMPTS = 4  # of ours; clients of object stores try several times themselves
_LASTING = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # waiting makes no room
_NO_CREDENTIALS = re.compile("Credential|Profile|Token|Auth")  # in names of errors that asking again does not mend
_LONGEST_PAUSE_S = 5.0
T = TypeVar("T")


class StorageFailingError(RuntimeError):
    """Remote storage that keeps failing: its files may be fine, so a job must not go on without them."""


@dataclass(frozen=True, kw_only=True)
class StorageConfig:
    """How object stores are opened; what is left empty is the provider's own default (environment, files, roles)."""

    endpoint: str = field(default="", metadata={"help": "URL of the server, for MinIO, Ceph and the like"})
    profile: str = field(default="", metadata={"help": "named credentials of ~/.aws (s3:// only)"})
    anonymous: bool = field(default=False, metadata={"help": "without credentials, for public buckets"})

    def __post_init__(self) -> None:
        if self.endpoint and "://" not in self.endpoint:
            raise ValueError(f"endpoint={self.endpoint}: a URL, such as http://{self.endpoint}")
        if self.anonymous and self.profile:
            raise ValueError(f"profile={self.profile} with anonymous=true: credentials or none; clear one of the two")

    def options(self, protocol: str) -> dict[str, Any]:
        """Keyword arguments of the fsspec class of `protocol`, complete: nothing set for other uses leaks in."""
        outer = _ENVIRONMENT.get(protocol, {})
        if protocol in S3:
            return {
                "endpoint_url": self.endpoint or outer.get("endpoint_url"),
                "profile": self.profile or outer.get("profile"),
                "anon": self.anonymous or outer.get("anon", False),
            }
        if protocol in GCS:
            endpoint = {"endpoint_url": self.endpoint} if self.endpoint else {}
            return {**endpoint, "token": "anon" if self.anonymous else outer.get("token")}
        if protocol in AZURE:
            host = {"account_host": self.endpoint.partition("://")[2]} if self.endpoint else {}
            return {**host, "anon": self.anonymous or outer.get("anon")}
        return {}


def filesystem(url: str, config: StorageConfig, option: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of `url` and the path on it. ValueError: an unknown protocol, a package that is not installed,
    or options that this protocol has no use for; `option` names the group they were given in."""
    protocol = split_protocol(url)[0] or "file"
    given = [key for key in ("endpoint", "profile", "anonymous") if getattr(config, key)]
    if given and protocol not in _OBJECT_STORES:
        raise ValueError(f"{option}.{given[0]} is set, but {url} is on no object store: clear it")
    if config.profile and protocol not in S3:
        raise ValueError(f"{option}.profile={config.profile}: only s3:// has profiles, {url} takes its own environment")
    with missing_packages(url):
        fs, root = fsspec.core.url_to_fs(url, **config.options(protocol))
    return fs, root.rstrip("/")


@contextlib.contextmanager
def missing_packages(url: str) -> Iterator[None]:
    """A ValueError that names the package to install, for fsspec's ImportError; likewise for unknown protocols."""
    try:
        yield
    except ImportError as error:
        protocol = split_protocol(url)[0] or ""
        package = _PACKAGES.get(protocol)
        fix = f"pip install {package}" if package else str(error)
        raise ValueError(f"{url}: {protocol}:// needs a package that is not installed: {fix}") from None
    except ValueError as error:
        if "Protocol not known" in str(error):
            raise ValueError(
                f"{url}: unknown protocol; use a path, s3://, gs://, az://, http:// or another that fsspec knows"
            ) from None
        raise


@contextlib.contextmanager
def sources_open_with(config: StorageConfig) -> Iterator[None]:
    """Within, whatever a source opens by URL is opened with these options (they become fsspec's defaults)."""
    before = copy.deepcopy(conf)
    for protocol in (S3[0], GCS[0], AZURE[1]):
        options = {key: value for key, value in config.options(protocol).items() if value}
        if options:
            conf[protocol] = {**conf.get(protocol, {}), **options}
    try:
        yield
    finally:
        conf.clear()
        conf.update(before)


def retried(url: str, read: Callable[[], T]) -> T:
    """What `read` returns; where the storage of `url` is remote and fails for a moment, it is asked again.

    FileNotFoundError, PermissionError and other OSErrors of the file itself; StorageFailingError: it keeps failing.
    """
    is_remote = (split_protocol(url)[0] or "file") not in ("file", "local")
    for attempt in range(_ATTEMPTS):
        try:
            return read()
        except Exception as error:
            # fsspec's HTTP calls whatever went wrong "not found", and keeps what it was as the cause.
            cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
            status = http_status(cause)
            if status in (404, 410):
                raise FileNotFoundError(url) from None
            if status in (401, 403):
                raise PermissionError(url) from None
            if not is_remote or not _passing(cause):
                raise
            if attempt == _ATTEMPTS - 1:
                raise StorageFailingError(f"the storage keeps failing ({_words(cause)})") from None
            time.sleep(0.2 * 3**attempt)
    raise AssertionError


def patiently(do: Callable[[], T], patience_s: float) -> T:
    """What `do` returns. Where the storage fails in a way that may pass it is asked again, in growing intervals, for
    `patience_s` seconds; then its error is raised, as is at once any that is there to stay (no permission, disk full).
    """
    until, pause = time.monotonic() + patience_s, 0.2
    while True:
        try:
            return do()
        except Exception as error:
            if not _passing(error) or getattr(error, "errno", None) in _FULL or time.monotonic() + pause > until:
                raise
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)


def opened(url: str, *, compression: str | None = None, **options: Any) -> OpenFile:
    """`fsspec.open` for reading; without a protocol it is a local file, also where its name holds "::"."""
    if "://" in url:
        return fsspec.open(url, "rb", compression=compression, **options)
    return OpenFile(LocalFileSystem(), url, "rb", compression=get_compression(url, compression))


def located(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """`fsspec.core.url_to_fs`, with local files as `opened` has them."""
    if "://" in url:
        fs, path = fsspec.core.url_to_fs(url)
        return fs, path
    return LocalFileSystem(), url


def read_bytes(url: str, *, compression: str | None = None) -> bytes:
    """The whole file at any URL; see `retried`."""

    def read() -> bytes:
        with opened(url, compression=compression) as file:
            data: bytes = file.read()
            return data

    return retried(url, read)


def http_status(error: BaseException) -> int | None:
    """The HTTP status behind an error of aiohttp, if there is one."""
    status = getattr(error, "status", None)
    return status if isinstance(status, int) and status else None


def is_clients(error: BaseException) -> bool:
    """Errors of the clients of servers that are no OSError."""
    return type(error).__module__.partition(".")[0] in ("botocore", "aiobotocore", "aiohttp", "gcsfs", "azure")


def _passing(error: BaseException) -> bool:
    """Whether asking again may help: time-outs, cut connections, overloaded servers."""
    status = http_status(error)
    if status is not None:
        return status == 429 or status >= 500
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return False
    if isinstance(error, OSError):
        return error.errno not in _LASTING
    return is_clients(error) and not _NO_CREDENTIALS.search(type(error).__name__)


def _words(error: BaseException) -> str:
    """An error in few words, without paths."""
    text = getattr(error, "strerror", None) or ""
    return str(text) or (f"HTTP status {http_status(error)}" if http_status(error) else type(error).__name__)


@contextlib.contextmanager
def storage_faults(option: str, kept: str = "") -> Iterator[None]:
    """A RuntimeError in plain words for a fault of the storage, whether it was raised here or in a Ray task.

    option: name and value of what can't be used; kept: what became of what was written.
    """
    try:
        yield
    except Exception as error:
        cause: Any = getattr(error, "cause", None) or error  # where Ray wrapped it
        if isinstance(cause, RuntimeError) and cause is not error:
            raise RuntimeError(f"{str(cause).splitlines()[0]}{kept}") from None  # Ray adds lines of advice
        if not isinstance(cause, OSError) and not is_clients(cause):
            raise
        if isinstance(cause, PermissionError):
            reason = f"no permission ({cause.strerror or cause})"
        elif is_clients(cause) or not getattr(cause, "strerror", None):
            reason = next(iter(str(cause).splitlines()), "") or type(cause).__name__
        else:
            reason = str(cause.strerror)
        raise RuntimeError(f"{option} can't be used: {reason}{kept}") from None


def is_local(fs: fsspec.AbstractFileSystem) -> bool:
    """Whether `fs` is a local disk."""
    return bool(set(_protocols(fs)) & {"file", "local"})


def has_folders(fs: fsspec.AbstractFileSystem) -> bool:
    """Whether folders must be made before files are written into them (object stores have none)."""
    return not set(_protocols(fs)) & set(_OBJECT_STORES)


def _protocols(fs: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    return fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)


@contextlib.contextmanager
def committed(fs: fsspec.AbstractFileSystem, path: str, scratch: str) -> Iterator[Any]:
    """A file to write that appears under `path` only when the body ends without error; scratch: a folder for what is
    not finished, on the same disk."""
    if not has_folders(fs):
        file = fs.open(path, "wb")
        try:
            yield file
        except BaseException:
            file.discard()
            file.closed = True  # closing it later would commit what is there
            raise
        file.close()
        return
    temporary = f"{scratch}/{uuid.uuid4().hex}.tmp"
    for folder in (scratch, path.rpartition("/")[0]):
        fs.makedirs(folder, exist_ok=True)
    try:
        with fs.open(temporary, "wb") as file:
            yield file
            if is_local(fs):
                file.flush()
                os.fsync(file.fileno())
        if is_local(fs):
            Path(temporary).replace(path)
        else:
            fs.mv(temporary, path)
    except BaseException:
        with contextlib.suppress(Exception):
            fs.rm(temporary)
        raise


def sizes(fs: fsspec.AbstractFileSystem, folder: str) -> Mapping[str, int]:
    """Name relative to `folder` -> bytes, of every file below it; {} where there is no such folder."""
    fs.invalidate_cache()
    try:
        found = fs.find(folder, detail=True)
    except FileNotFoundError:
        return {}
    return {name[len(folder.rstrip("/")) + 1 :]: int(info["size"]) for name, info in found.items()}
