"""What a run came to, as named numbers with intervals: probes and maps of result.json, speed and loss of metrics.jsonl.

auroc.LABEL  auprc.LABEL  auroc.mean  auprc.mean     frozen-feature probes of the trained encoder
map_auroc.STRATEGY  lesion_lift.STRATEGY             word-to-patch maps against lesions (.both: times the prior)
loss  step_s  samples_per_s  data_wait_ratio  peak_gb
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medim_ray.probes.command import read_result
from medim_ray.train.metrics import read_metrics

PROBES = ("auroc", "auprc")
MAPS = ("map_auroc", "lesion_lift")
RUN_NUMBERS = {
    "loss": "mean loss of the last tenth of the steps",
    "step_s": "median seconds a step",
    "samples_per_s": "median images a second",
    "data_wait_ratio": "median share of a step spent waiting for data",
    "peak_gb": "peak memory of a worker, GB",
}
LOWER_IS_BETTER = ("loss", "step_s", "data_wait_ratio", "peak_gb")


@dataclass(frozen=True)
class Number:
    """A value with its 95 % interval over patients, where it has one."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Outcome:
    """numbers: by name; gains: trained minus untrained, paired, for the probes."""

    numbers: Mapping[str, Number]
    gains: Mapping[str, Number]


def check_metric(name: str, option: str) -> None:
    """ValueError where no run reports such a number."""
    family, _, rest = name.partition(".")
    if name in RUN_NUMBERS or (family in (*PROBES, *MAPS) and rest):
        return
    known = [*RUN_NUMBERS, *(f"{family}.LABEL" for family in PROBES), "auroc.mean", "auprc.mean"]
    known += [f"{family}.STRATEGY" for family in MAPS]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? Known" if near else "known"
    raise ValueError(f"{option}={name!r} is no number that a run reports; {hint}: {', '.join(known)}")


def needs_probe(metrics: Iterable[str]) -> bool:
    """Whether one of the metrics comes from `medim-ray probe`."""
    return any(name.partition(".")[0] in (*PROBES, *MAPS) for name in metrics)


def better_is_higher(metric: str) -> bool:
    """The direction of a metric."""
    return metric not in LOWER_IS_BETTER


def outcome_of(run_dir: str, probed: bool) -> Outcome:
    """The numbers of a run folder; with `probed` those of its result.json too."""
    numbers = dict(_of_metrics(read_metrics(run_dir)))
    gains: dict[str, Number] = {}
    result = read_result(run_dir) if probed else None
    if result is not None:
        _add_probes(result, numbers, gains)
        for strategy, sources in result["localisation"]["strategies"].items():
            for source, suffix in (("trained", ""), ("both", ".both")):
                for family in MAPS:
                    if source in sources:
                        numbers[f"{family}.{strategy}{suffix}"] = Number(**sources[source][family])
    return Outcome(numbers, gains)


def _add_probes(result: Mapping[str, Any], numbers: dict[str, Number], gains: dict[str, Number]) -> None:
    for label, facts in {**result["labels"], "mean": result.get("mean")}.items():
        if facts:
            for family in PROBES:
                numbers[f"{family}.{label}"] = Number(**facts["encoders"]["trained"][family])
                gains[f"{family}.{label}"] = Number(**facts["trained_minus_untrained"][family])


def _of_metrics(records: Sequence[Mapping[str, Any]]) -> Iterable[tuple[str, Number]]:
    last = records[-max(1, len(records) // 10) :]
    for name in RUN_NUMBERS:
        if name == "peak_gb":
            peak = max((float(record.get("peak_bytes", 0)) for record in records), default=0.0)
            yield name, Number(peak / 1e9 or None)
            continue
        found = [float(record.get(name) or np.nan) for record in (last if name == "loss" else records)]
        finite = [value for value in found if np.isfinite(value)]
        if finite:
            yield name, Number(float(np.mean(finite) if name == "loss" else np.median(finite)))
