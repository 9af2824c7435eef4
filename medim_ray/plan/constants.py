"""The numbers behind a plan, read from constants.yaml: none without a source and a date. No arithmetic lives here."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args

import yaml

FILE = Path(__file__).with_name("constants.yaml")
# The entry of `codes` that is this project's trainer.
OUR_CODE = "medim_ray"
STATUSES = ("read", "measured", "assumed", "calibrated")
Given = float | str


@dataclass(frozen=True, kw_only=True)
class Constant:
    """One number, or one record of numbers, with where it comes from."""

    name: str
    value: Any
    source: str
    date: str
    status: str


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A device kind. Peaks in operations/s (dense), memory in bytes, bandwidth of that memory in bytes/s."""

    name: str
    peak_bf16: float
    peak_fp32: float
    memory_bytes: float
    memory_bandwidth: float
    watts: float

    @property
    def is_cpu(self) -> bool:
        return self.name.startswith("cpu")


@dataclass(frozen=True, kw_only=True)
class Code:
    """How a code base runs a step: see `codes` in constants.yaml."""

    name: str
    drop_path_skips: bool
    overlap: tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A run that happened. role: "calibrates" the utilisation, "judges" the model, or is only "shown"."""

    name: str
    recipe: str
    cluster: str
    hours: float
    role: str
    source: str


@cache
def _tables() -> dict[str, Any]:
    tables = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    assert isinstance(tables, dict)
    return tables


def tables() -> set[str]:
    """The names of the tables."""
    return {name for name, entries in _tables().items() if isinstance(entries, dict)}


def _entry(table: str, name: str, field: str) -> dict[str, Any]:
    known = _tables()[table]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{field}={name!r} is not known.{hint} Use one of: {', '.join(sorted(known))}")
    entry: dict[str, Any] = known[name]
    return entry


def constant(table: str, name: str, field: str = "") -> Constant:
    """The entry `name` of a table of plain numbers; ValueError that names `field` and the known entries."""
    entry = _entry(table, name, field or table)
    return Constant(
        name=f"{table}.{name}",
        value=float(entry["value"]),
        source=entry["source"],
        date=str(entry["date"]),
        status=entry["status"],
    )


def assumption(name: str) -> float:
    """The value of an entry of `assumptions`."""
    return float(constant("assumptions", name).value)


def number(table: str, given: Given, field: str) -> Constant:
    """A number that a cluster file gives itself, or the entry of `table` that it names."""
    if isinstance(given, str):
        return constant(table, given, field)
    assert isinstance(given, get_args(Given))
    return Constant(name=field, value=float(given), source="the cluster file", date="", status="given")


def gpu(name: str, field: str = "cluster.gpu") -> Gpu:
    """A device kind; ValueError names the known ones."""
    entry = _entry("gpus", name, field)
    keys = ("peak_bf16", "peak_fp32", "memory_bytes", "memory_bandwidth", "watts")
    return Gpu(name=name, **{key: float(entry[key]) for key in keys})


def gpu_numbers(name: str) -> list[Constant]:
    """The numbers of a device kind one by one."""
    entry = _entry("gpus", name, "cluster.gpu")
    about = {key: str(entry[key]) for key in ("source", "date", "status")}
    return [Constant(name=f"gpus.{name}.{key}", value=float(entry[key]), **about) for key in entry if key not in about]


def assumptions(on_cpu: bool) -> list[Constant]:
    """The entries of `assumptions` that matter on such devices: some are only of GPUs, some only of CPU cores."""
    other = ("gpu_", "host_", "link_") if on_cpu else ("cpu_",)
    return [constant("assumptions", name) for name in _tables()["assumptions"] if not name.startswith(other)]


def code(name: str) -> Code:
    """A code base; ValueError names the known ones."""
    entry = _entry("codes", name, "cluster.code")
    overlap = tuple(float(share) for share in entry["overlap"])
    assert len(overlap) == 4
    return Code(
        name=name,
        drop_path_skips=bool(entry["drop_path_skips"]),
        overlap=overlap,
    )


def facts() -> list[Fact]:
    """The facts that the model is calibrated and judged by."""
    keys = ("recipe", "cluster", "hours", "role", "source")
    return [Fact(name=name, **{key: entry[key] for key in keys}) for name, entry in _tables()["facts"].items()]


def all_entries() -> list[tuple[str, dict[str, Any]]]:
    """(dotted name, raw entry) of everything in the file."""
    return [
        (f"{table}.{name}", entry)
        for table, entries in _tables().items()
        if isinstance(entries, dict)
        for name, entry in entries.items()
    ]
