"""What a run came to, as named numbers with intervals: probes and maps of result.json, speed and loss of metrics.jsonl.

auroc.LABEL  auprc.LABEL  accuracy.LABEL  f1.LABEL  knn_auroc.LABEL   LABEL: a label, mean: over all of them,
                                                                      findings: over all but view, sex, age_group
auroc@0.01.LABEL  auroc@tuned.LABEL                  learned from that share (probe.fractions); encoder fine-tuned
mae.age  r2.age                                                       labels of numbers
dice.pneumothorax  dice@upernet.pneumothorax  dice@setr_tuned.lung    probe.segment; tuned: the encoder too
recall_at_10.image_to_report  median_rank.image_to_report  zero_shot_auroc.LABEL
rouge_l.report  bleu_4.report  macro_f1.report  micro_f1.report       reports that a language model writes
map_auroc.STRATEGY  lesion_lift.STRATEGY                              word-to-patch maps (.both: times the prior)
loss  step_s  samples_per_s  data_wait_ratio  peak_gb
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medim_ray.config.probe import ProbeConfig
from medim_ray.data.shards import ShardSet
from medim_ray.probes.command import read_result, tasks_of
from medim_ray.probes.rows import list_rows
from medim_ray.probes.tasks import Task
from medim_ray.train.metrics import read_metrics

_OF_LABELS = ("auroc", "auprc", "accuracy", "f1", "knn_auroc", "knn_auprc", "mae", "r2")
_BEYOND = ("dice", "recall_at_1", "recall_at_5", "recall_at_10", "median_rank", "zero_shot_auroc", "zero_shot_auprc")
_WRITTEN = ("rouge_l", "bleu_4", "macro_f1", "micro_f1")
FAMILIES = (*_OF_LABELS, *_BEYOND, *_WRITTEN)
MAPS = ("map_auroc", "lesion_lift")
RUN_NUMBERS = {
    "loss": "mean loss of the last tenth of the steps",
    "step_s": "median seconds a step",
    "samples_per_s": "median images a second",
    "data_wait_ratio": "median share of a step spent waiting for data",
    "peak_gb": "peak memory of a worker, GB",
}
_NAME = re.compile(r"(?P<family>\w+)(?:@(?P<at>\d+(?:\.\d+)?|\w+))?\.(?P<what>.+)")
LOWER_IS_BETTER = ("loss", "step_s", "data_wait_ratio", "peak_gb", "mae", "median_rank")


@dataclass(frozen=True)
class Number:
    """A value with its 95 % interval over patients, where it has one."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Outcome:
    """numbers: by name; gains: trained minus untrained, paired, for the probes; baselines: of the other encoders of the
    probe (untrained, pixels, timm:…), encoder -> numbers."""

    numbers: Mapping[str, Number]
    gains: Mapping[str, Number]
    baselines: Mapping[str, Mapping[str, Number]]


def told(number: Number | None, digits: int = 3) -> str:
    """`0.712 [0.68, 0.74]`; a dash where undefined."""
    if number is None or number.value is None:
        return "-"
    if number.low is None or number.high is None:
        return f"{number.value:.{digits}g}"
    return f"{number.value:.{digits}g} [{number.low:.{digits}g}, {number.high:.{digits}g}]"


def check_metric(name: str, option: str) -> None:
    """ValueError where no run reports such a number."""
    if name in RUN_NUMBERS or (_family(name) in (*FAMILIES, *MAPS) and name.partition(".")[2]):
        return
    known = [*RUN_NUMBERS, *(f"{family}.mean" for family in FAMILIES), *(f"{family}.kdm" for family in MAPS)]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? Known" if near else "known"
    families = ", ".join(f"{family}.NAME" for family in (*FAMILIES, *MAPS))
    raise ValueError(f"{option}={name!r} is no number that a run reports; {hint}: {', '.join(RUN_NUMBERS)}, {families}")


def check_report(names: Sequence[str], metric: str) -> None:
    """ValueError where one of a table's further numbers is no number of a run, or stands twice."""
    for name in names:
        check_metric(name, "report")
    if len({metric, *names}) <= len(names):
        raise ValueError(f"report={list(names)}: each number once, without metric={metric!r}, which is always there")


def check_reported(names: Sequence[str], probe: ProbeConfig, shards: ShardSet) -> None:
    """ValueError where no run on these shards can report one of the numbers when it is probed so: its task is not asked
    for, or its label or target is none of those that are probed."""
    if not needs_probe(names):
        return
    tasks, _ = tasks_of(shards, list_rows(shards), probe)
    classes = [task.label for task in tasks if isinstance(task, Task)]
    measures = [task.label for task in tasks if not isinstance(task, Task)]
    means = ["mean", "findings"] if classes else []
    for name in names:
        if name in RUN_NUMBERS:
            continue
        family, at, what = _parts(name)
        task, known, kinds = "", [what], [at]
        if family in _OF_LABELS:
            task = "finetune" if at == "tuned" else "labels"
            known = measures if family in ("mae", "r2") else [*means, *classes]
            kinds = ["", "tuned", *(f"{fraction:g}" for fraction in probe.fractions)]
        elif family == "dice":
            task, known = "segment", list(probe.segment.targets)
            tuned = "_tuned" if probe.segment.tune_encoder else ""
            kinds = [f"{head}{tuned}" if tuned or head != "linear" else "" for head in probe.segment.heads]
        elif family in _BEYOND:
            task = "retrieve"
        elif family in _WRITTEN:
            task = "generate"
        elif family in MAPS:
            task = "localise"
        if task and task not in probe.tasks:
            raise ValueError(f"{name} is asked for, but probe.tasks={list(probe.tasks)} has no {task!r}: add it")
        if at not in kinds:
            names = ", ".join(f"{family}{'@' * bool(kind)}{kind}.{what}" for kind in kinds)
            raise ValueError(f"{name} is asked for, but what is probed has {names}")
        if what not in known:
            raise ValueError(
                f"{name} is asked for, but what is probed on {shards.url} has {', '.join(known) or 'none'}"
            )


def _family(name: str) -> str:
    """`auroc` of auroc@0.01.mean."""
    return _parts(name)[0]


def _parts(name: str) -> tuple[str, str, str]:
    """`auroc`, `0.01`, `mean` of auroc@0.01.mean; the second '' where there is none, both of a number of the run."""
    found = _NAME.fullmatch(name)
    return (found["family"], found["at"] or "", found["what"]) if found else (name, "", "")


def needs_probe(metrics: Iterable[str]) -> bool:
    """Whether one of the metrics comes from `medim-ray probe`."""
    return any(_family(name) in (*FAMILIES, *MAPS) for name in metrics)


def better_is_higher(metric: str) -> bool:
    """The direction of a metric."""
    return _family(metric) not in LOWER_IS_BETTER


def outcome_of(run_dir: str, step: int, probed: bool) -> Outcome:
    """The numbers of a run folder after `step` optimizer steps; with `probed` those of its result.json too."""
    numbers = dict(_of_metrics([record for record in read_metrics(run_dir) if record["step"] < step]))
    gains: dict[str, Number] = {}
    baselines: dict[str, dict[str, Number]] = {}
    result = read_result(run_dir) if probed else None
    if result is not None:
        _add_probes(result, numbers, gains, baselines)
        for strategy, sources in result["localisation"]["strategies"].items():
            for source, suffix in (("trained", ""), ("both", ".both")):
                for family in MAPS:
                    if source in sources:
                        numbers[f"{family}.{strategy}{suffix}"] = Number(**sources[source][family])
    return Outcome(numbers, gains, baselines)


def _add_probes(
    result: Mapping[str, Any],
    numbers: dict[str, Number],
    gains: dict[str, Number],
    baselines: dict[str, dict[str, Number]],
) -> None:
    def add(facts: Mapping[str, Any] | None, name: str, prefix: str = "", at: str = "") -> None:
        if not facts or not facts["encoders"]:
            return
        gained = facts["trained_minus_untrained"]
        for encoder, found in facts["encoders"].items():
            of_encoder = numbers if encoder == "trained" else baselines.setdefault(encoder, {})
            for family, number in found.items():
                if f"{prefix}{family}" in FAMILIES:
                    of_encoder[f"{prefix}{family}{at}.{name}"] = Number(**number)
        for family in facts["encoders"]["trained"]:
            if f"{prefix}{family}" in FAMILIES:
                gains[f"{prefix}{family}{at}.{name}"] = Number(**gained[family])

    means = {name: result.get(name) for name in ("mean", "findings")}
    for label, facts in {**result["labels"], **means}.items():
        add(facts, label)
        add(facts and facts.get("knn"), label, "knn_")
        for share in (facts or {}).get("fractions", ()):
            add(share, label, at=f"@{share['fraction']:g}")
    tuned = result.get("finetune", {})
    for label, facts in {**tuned.get("labels", {}), "mean": tuned.get("mean")}.items():
        add(facts, label, at="@tuned")
    for label, facts in result.get("regression", {}).items():
        add(facts, label)
    add(result.get("generation"), "report")
    segmentation = result.get("segmentation", {})
    for target, facts in segmentation.get("targets", {}).items():
        add(facts, target)
    for head, targets in segmentation.get("heads", {}).items():
        for target, facts in targets.items():
            add(facts, target, at=f"@{head}")
    for direction, facts in result.get("retrieval", {}).get("directions", {}).items():
        add(facts, direction)
    zero_shot = result.get("zero_shot", {})
    for label, facts in {**zero_shot.get("labels", {}), "mean": zero_shot.get("mean")}.items():
        add(facts, label, "zero_shot_")


def _of_metrics(records: Sequence[Mapping[str, Any]]) -> Iterable[tuple[str, Number]]:
    last = records[-max(1, len(records) // 10) :]
    for name in RUN_NUMBERS:
        if name == "peak_gb":
            peak = max((float(record.get("peak_bytes", 0)) for record in records), default=0.0)
            yield name, Number(peak / 1e9 or None)
            continue
        found = [float(record.get(name, np.nan)) for record in (last if name == "loss" else records)]
        finite = [value for value in found if np.isfinite(value)]
        if finite:
            yield name, Number(float(np.mean(finite) if name == "loss" else np.median(finite)))
