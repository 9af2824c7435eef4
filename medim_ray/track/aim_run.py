"""The Aim run of a folder: of a pretraining run, a sweep or a study. Whoever opens it again goes on in the same one."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fsspec

_RUN_FILE = "aim_run"  # in the folder: the hash of its Aim run


def repo_of(folder: str, asked: str = "") -> str:
    """The repository that was asked for, else the one that folders beside each other share; a folder on object storage
    has it in the working directory."""
    return asked or str(Path(folder).resolve().parent if "://" not in folder else Path.cwd())


def open_aim_run(repo: str, folder: str) -> Any:
    """An aim.Run, made where `folder` has none yet. repo: a folder, made where it is missing, or aim://HOST:PORT."""
    import aim

    if "://" not in repo:
        Path(repo).mkdir(parents=True, exist_ok=True)
        aim.Repo.from_path(repo, init=True)
    fs, root = fsspec.core.url_to_fs(folder)
    file = f"{root.rstrip('/')}/{_RUN_FILE}"
    known = fs.cat_file(file).decode().strip() if fs.exists(file) else None
    run = aim.Run(
        run_hash=known,
        repo=repo,
        force_resume=known is not None,
        system_tracking_interval=None,
        capture_terminal_logs=False,
        log_system_params=False,
    )
    fs.pipe_file(file, f"{run.hash}\n".encode())
    return run


def show_pictures(repo: str, folder: str, pictures: Iterable[tuple[str, bytes]], step: int) -> int:
    """Puts PNGs into the Aim run of `folder` as images named `figure`, told apart by their context; returns how many.

    RuntimeError where Aim does not take them, such as while a run that goes on holds the repository.
    """
    import aim
    from PIL import Image

    try:
        run, num = open_aim_run(repo, folder), 0
        for name, png in pictures:
            image = aim.Image(Image.open(io.BytesIO(png)), caption=name)
            run.track(image, name="figure", step=step, context={"shows": name})
            num += 1
        run.close()
    except Exception as error:  # a view with many layers below: whatever they raise is the same to the user
        raise RuntimeError(f"Aim repository {repo} did not take the figures of {folder}: {error}") from error
    return num
