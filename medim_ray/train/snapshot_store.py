"""The snapshots of a run as files, and which of them masks which step. No torch, no model.

    RUN/snapshots/step-SSSSSSSS.safetensors
Step s is masked by the snapshot of `source_step(s, K)`, a function of s alone: 0 (the weights that the run begins with)
up to step 2K, then the last but one multiple of K. So maps do not depend on workers, prefetching or resume.
"""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path
from typing import Any

import fsspec

from medim_ray.data.storage import committed

_NAME = re.compile(r"step-(\d{8})\.safetensors$")
_LOOK_S = 0.2


def source_step(step: int, every: int) -> int:
    """The snapshot that masks step `step`: at least `every` steps old, so that the stream may run ahead of training."""
    return max(0, step // every - 1) * every


class SnapshotStore:
    """The snapshots of a run, on any fsspec filesystem. Step 0 is not stored: every process can build it."""

    def __init__(self, run_dir: str) -> None:
        self._fs, root = fsspec.core.url_to_fs(run_dir)
        self._root = f"{root.rstrip('/')}/snapshots"

    def path(self, step: int) -> str:
        return f"{self._root}/step-{step:08d}.safetensors"

    def steps(self) -> list[int]:
        """The steps that are published, in order."""
        self._fs.invalidate_cache()
        if not self._fs.exists(self._root):
            return []
        found = (_NAME.search(Path(entry).name) for entry in self._fs.ls(self._root, detail=False))
        return sorted(int(match[1]) for match in found if match)

    def publish(self, step: int, tensors: dict[str, Any]) -> None:
        """Whole or not at all."""
        from safetensors.torch import save

        with committed(self._fs, self.path(step), self._root) as file:
            file.write(save(tensors))

    def wait(self, step: int) -> dict[str, Any]:
        """The tensors of a snapshot, once it is there: training publishes it without needing what waits for it."""
        from safetensors.torch import load

        while True:
            self._fs.invalidate_cache()
            with contextlib.suppress(FileNotFoundError):
                return load(self._fs.cat_file(self.path(step)))
            time.sleep(_LOOK_S)

    def begin(self, step: int, every: int) -> None:
        """Before a stream starts at `step`: what a rolled back time line published later goes. ValueError where the
        snapshot is gone that the run needs to go on."""
        published = self.steps()
        for later in published:
            if later > step:
                self._remove(later)
        needed = {source_step(s, every) for s in range(step, step + 2 * every)}
        # The one of this very step is published again when the run goes on.
        if missing := sorted(s for s in needed if 0 < s < step and s not in published):
            raise ValueError(f"{self.path(missing[0])} is gone: step {step} is masked by it; restore it, or start anew")

    def prune(self, oldest_checkpoint: int, every: int) -> None:
        """Keeps what the steps after the oldest checkpoint need."""
        for step in self.steps():
            if step < source_step(oldest_checkpoint, every):
                self._remove(step)

    def _remove(self, step: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(self.path(step))
