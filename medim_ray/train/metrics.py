"""metrics.jsonl, the truth of a run: one JSON object a step, written by rank 0. Plots and trackers are views of it."""

from __future__ import annotations

import json
import math
import resource
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
import torch
import torch.distributed as dist
from torch import Tensor

from medim_ray.data.storage import is_local

METRICS = "metrics.jsonl"


class JsonLinesFile:
    """Appends records to a file of the run folder. On object storage the file is rewritten at each `sync`."""

    def __init__(self, run_dir: str, name: str, records: Sequence[Mapping[str, Any]]) -> None:
        """Begins with `records`, whatever the file held before."""
        self._fs, root = fsspec.core.url_to_fs(run_dir)
        self._target = f"{root.rstrip('/')}/{name}"
        self._fs.makedirs(root, exist_ok=True)
        self._is_local = is_local(self._fs)
        path = Path(self._target) if self._is_local else Path(tempfile.mkdtemp(prefix="medim-ray-")) / name
        partial = path.with_suffix(".partial")
        partial.write_text("".join(_line(record) for record in records), encoding="utf-8")
        partial.replace(path)
        self._path = path
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """One line, flushed."""
        self._file.write(_line(record))
        self._file.flush()

    def sync(self) -> None:
        """Makes what was written visible at the run's location."""
        if not self._is_local:
            self._fs.put_file(str(self._path), self._target)


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps({k: _finite(v) for k, v in record.items()}) + "\n"


def _finite(value: Any) -> Any:
    """JSON knows no NaN: non-finite numbers are written by name."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_lines(run_dir: str, name: str = METRICS) -> list[str]:
    """The complete lines of RUN/metrics.jsonl, or of another such file; a line cut by a kill is left out."""
    fs, root = fsspec.core.url_to_fs(run_dir)
    path = f"{root.rstrip('/')}/{name}"
    fs.invalidate_cache()
    if not fs.exists(path):
        return []
    text = fs.cat_file(path).decode()
    return [line for line in text.split("\n")[:-1] if line]


def read_records(run_dir: str, name: str) -> list[dict[str, Any]]:
    """The records of a file that JsonLinesFile writes; ValueError that names a line which is damaged."""
    records = []
    for number, line in enumerate(read_lines(run_dir, name), 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            raise ValueError(f"{run_dir}/{name}: line {number} is damaged: remove it, or restore the file") from None
    return records


def read_metrics(run_dir: str) -> list[dict[str, Any]]:
    """The records of RUN/metrics.jsonl in the order of the steps."""
    return read_records(run_dir, METRICS)


def peak_bytes(device: torch.device) -> int:
    """The most memory that this rank has used so far: of its GPU, or of the machine by its process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reduce_logs(
    logs: list[dict[str, Tensor]], sums: Mapping[str, float], device: torch.device
) -> tuple[dict[str, float], dict[str, float]]:
    """One reduction a step: the mean of each scalar of `logs` over micro-batches and ranks, and `sums` over the ranks.

    Every rank must give the same names; `logs` may be empty. float64, so that sums of 32-bit integers are exact.
    """
    names = sorted(logs[0]) if logs else []
    own = torch.tensor([sums[name] for name in sorted(sums)], dtype=torch.float64, device=device)
    rows = [torch.stack([log[name].detach().double().to(device) for name in names]) for log in logs]
    mean = torch.stack(rows).mean(dim=0) if rows else own[:0]
    both = torch.cat([mean / dist.get_world_size(), own])
    dist.all_reduce(both)
    reduced: list[float] = both.tolist()
    return (
        dict(zip(names, reduced[: len(names)], strict=True)),
        dict(zip(sorted(sums), reduced[len(names) :], strict=True)),
    )
