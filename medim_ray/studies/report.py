"""`medim-ray report`: RUN/report.html, one self-contained page of a run: probes, maps, curves, masks, configuration.

It shows what lies in the run folder (metrics.jsonl, result.json, config.yaml, the newest checkpoint) and computes no
metric itself. Opening it needs no network.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

import medim_ray
from medim_ray.config.schema import RunConfig, TrainConfig
from medim_ray.data.shards import ShardSet
from medim_ray.data.storage import committed
from medim_ray.plan.page import PAGE as PLAN_PAGE
from medim_ray.probes.command import read_result
from medim_ray.probes.results import SCHEMA_VERSION
from medim_ray.probes.tables import GENERATION, segmentation_tables, title
from medim_ray.studies.figures import Drawing, curve, interval_bar, to_png
from medim_ray.studies.gallery import Gallery, contact_sheet, make_gallery, templates
from medim_ray.studies.origin import package_commit, this_machine
from medim_ray.studies.probe_figures import probe_charts
from medim_ray.studies.waiting import why_it_waits
from medim_ray.track.aim_run import repo_of, show_pictures
from medim_ray.track.tracker import VALIDATION
from medim_ray.train.before import LOOK_S
from medim_ray.train.feed import BROKEN_ROWS, STREAM_SECONDS
from medim_ray.train.fit import estimate
from medim_ray.train.metrics import METRICS, read_metrics
from medim_ray.train.runs import CONFIG, load_run, open_config
from medim_ray.train.store import CheckpointStore
from medim_ray.train.throughput import ADDED, PERCENTILES, throughput
from medim_ray.train.validation import numbers_of, read_validation

REPORT = "report.html"
_NUM_IMAGES = 8
_PLACE = ("step", "epoch")
_THROUGHPUT = {
    "samples_per_s": ("images per second", "median {:.1f}"),
    "mfu": ("model FLOPs utilisation", "median {:.1%}"),
    "data_wait_ratio": ("share of the step spent waiting for data", "median {:.1%}"),
}
_OPTIMISER = {"lr": "learning rate", "grad_norm": "gradient norm"}
_MAPS = "maps/"
_VALIDATED = {"dice": "Dice", "r2": "R²"}  # what a number of validation.jsonl begins with, where it is no AUROC
_HIDDEN = {"samples_key", *_PLACE, *_THROUGHPUT, *_OPTIMISER, *ADDED, "step_s", LOOK_S, BROKEN_ROWS, *STREAM_SECONDS}


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One series over the steps; summary: its last or typical value."""

    name: str
    summary: str
    svg: Drawing


@dataclass(frozen=True, kw_only=True)
class ChartGroup:
    """Charts under one heading; note: what is there to say instead of, or beside, them."""

    title: str
    note: str
    charts: Sequence[Chart]


@dataclass(frozen=True, kw_only=True)
class Head:
    """The top and the foot of the page. tiles: (value, meaning); facts: (name, value)."""

    title: str
    subtitle: str
    tiles: Sequence[tuple[str, str]]
    facts: Sequence[tuple[str, str]]
    run_dir: str
    step: int
    written: str
    version: str
    commit: str
    machine: str


def write_report(run_dir: str, num_images: int = _NUM_IMAGES, text: bool = True, aim_repo: str | None = None) -> str:
    """Writes RUN/report.html from whatever the run has by now and returns its path or URL.

    num_images: images in the mask gallery; text: words and sentences of their reports beside them; aim_repo: the
    figures and the gallery, without text, go into the run's Aim run there too ('': the run's own). ValueError where
    `run_dir` is no run folder; RuntimeError where Aim does not take them.
    """
    config = open_config(run_dir)
    records = read_metrics(run_dir)
    result = read_result(run_dir)
    if result is not None and result["schema_version"] < SCHEMA_VERSION:
        result = None  # of an older version, which judged less: to be probed again
    gallery, gallery_note = _gallery(run_dir, num_images, text)
    fs, root = fsspec.core.url_to_fs(run_dir)
    root = root.rstrip("/")
    config_text = fs.cat_file(f"{root}/{CONFIG}").decode()
    groups = [*chart_groups(records), *_waiting(records, config), *_validation(read_validation(run_dir))]
    drawn = probe_charts(result["labels"]) if result else []
    page = (
        templates()
        .get_template("report.html.j2")
        .render(
            head=_head(run_dir, config, config_text, records),
            result=result,
            encoder_title=title,
            segmentation_tables=segmentation_tables,
            generation_titles=GENERATION,
            probe_charts=drawn,
            prevalence=_prevalence(result),
            protocols=sorted({task["protocol"] for task in result["labels"].values()}) if result else [],
            bar=interval_bar,
            groups=groups,
            gallery=gallery,
            gallery_note=gallery_note,
            config_text=config_text,
            config_lines=config_text.count("\n"),
        )
    )
    with committed(fs, f"{root}/{REPORT}", scratch=root) as file:
        file.write(page.encode())
    if aim_repo is not None:
        repo = repo_of(run_dir, aim_repo or config.track.aim_repo)
        show_pictures(repo, run_dir, _pictures(groups, drawn, gallery), len(records))
    return f"{run_dir.rstrip('/')}/{REPORT}"


def _pictures(
    groups: Sequence[ChartGroup], of_probes: Sequence[tuple[str, str, Drawing]], gallery: Gallery | None
) -> Iterator[tuple[str, bytes]]:
    """(name, PNG) of every figure of the page, and of every image of its gallery."""
    for group in groups:
        yield from ((f"{group.title}: {chart.name}", to_png(chart.svg)) for chart in group.charts)
    for label, caption, drawing in of_probes:
        yield f"{label}: {caption}", to_png(drawing)
    for i, entry in enumerate(gallery.entries if gallery else (), 1):
        yield f"masks: image {i}", contact_sheet(entry)


def _gallery(run_dir: str, num_images: int, text: bool) -> tuple[Gallery | None, str]:
    """The gallery of the newest checkpoint, or None and why there is none."""
    if CheckpointStore(run_dir).newest() is None:
        return None, "No checkpoint is committed yet, so there is no model to draw masks with."
    return make_gallery(load_run(run_dir), num_images, text), ""


def _prevalence(result: Mapping[str, Any] | None) -> dict[str, float | None]:
    """Share of positives of each two-class label: the AUPRC of chance."""
    shares: dict[str, float | None] = {}
    for label, task in (result["labels"] if result else {}).items():
        counts = task["counts"]
        shares[label] = counts[task["positive"]] / sum(counts.values()) if task["positive"] else None
    return shares


# --- Charts --------------------------------------------------------------------------------------------------------


def chart_groups(records: Sequence[Mapping[str, Any]]) -> list[ChartGroup]:
    """Loss and everything else that the objective logs, throughput, optimiser; a word where there is nothing yet."""
    numbers = (name for record in records for name, value in record.items() if isinstance(value, int | float))
    shown = (name for name in numbers if name not in _HIDDEN and not name.startswith(VALIDATION))  # its own section
    every = list(dict.fromkeys(shown))
    names = [name for name in every if not name.startswith(_MAPS)]
    names.sort(key=lambda name: name != "loss")
    loss = [_chart(records, name, name, None, "last {:.4g}") for name in names]
    speed = [_chart(records, name, title, 0.0, summary) for name, (title, summary) in _THROUGHPUT.items()]
    optimiser = [_chart(records, name, title, 0.0, "last {:.3g}") for name, title in _OPTIMISER.items()]
    note = "" if records else "No step is recorded yet."
    return [
        ChartGroup(title="Loss and its terms", note=note or _gaps(records), charts=_drawn(loss)),
        *_maps(records, [name for name in every if name.startswith(_MAPS)]),
        ChartGroup(title="Throughput", note=note, charts=_drawn(speed)),
        ChartGroup(title="Optimiser", note=note, charts=_drawn(optimiser)),
    ]


def _maps(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[ChartGroup]:
    """What the looks at the word-to-patch maps found, where the run has such maps; the prior alone does not move."""
    looks = [record for record in records if names and any(name in record for name in names)]
    if not looks:
        return []
    titles = {name: name.removeprefix(_MAPS).replace("/", " ").replace("_", " ").upper() for name in names}
    fixed = [name for name in names if "/prior_" in name and not name.endswith("agreement")]
    told = ", ".join(f"{titles[name]} {looks[-1][name]:.2f}" for name in fixed if name in looks[-1])
    note = "On a small batch that stays the same; chance is 0.5 for AUROC and agreement, 1.0 for lifts."
    if told:
        note += f" The anatomy prior alone: {told.replace('PRIOR ', '')}."
    last = dict.fromkeys(word for record in looks[-1:] for word in record.get("warnings", ()))
    charts = [_chart(looks, name, titles[name], None, "last {:.3f}") for name in names if name not in fixed]
    return [
        ChartGroup(
            title="Maps of words on patches", note=" ".join([note, *(f"{w}." for w in last)]), charts=_drawn(charts)
        )
    ]


def _validation(rows: Sequence[Mapping[str, Any]]) -> list[ChartGroup]:
    """What the checkpoints came to that were validated during the run, where there are any."""
    names = list(dict.fromkeys(name for row in rows for name in numbers_of(row)))
    charts = [_chart(rows, name, _validated(name), None, "last {:.3f}") for name in names]
    failed = sum("error" in row for row in rows)
    note = f"{failed} checkpoints were not wholly validated: validation.jsonl says why." if failed else ""
    return [ChartGroup(title="Validation during the run", note=note, charts=_drawn(charts))] if rows else []


def _validated(name: str) -> str:
    """The heading of a number of validation.jsonl; of a label it is the AUROC."""
    if name == "recall_at_10":
        return "Recall at 10, images and reports"
    kind, _, of = name.partition("_")
    return f"{_VALIDATED[kind]}, {of}" if of and kind in _VALIDATED else f"AUROC, {name}"


def _waiting(records: Sequence[Mapping[str, Any]], config: RunConfig) -> list[ChartGroup]:
    """What the run waits for, where it waits for data."""
    note = why_it_waits(records, config)
    return [ChartGroup(title="Waiting for data", note=note, charts=[])] if note else []


def _drawn(charts: Sequence[Chart | None]) -> list[Chart]:
    return [chart for chart in charts if chart is not None]


def _gaps(records: Sequence[Mapping[str, Any]]) -> str:
    """Where the loss was not a finite number."""
    steps = [record["step"] for record in records if not np.isfinite(_number(record.get("loss")))]
    if not steps:
        return ""
    return f"The loss was not finite at {len(steps)} steps, first at step {steps[0]}: gaps in the curves."


def _chart(
    records: Sequence[Mapping[str, Any]], name: str, title: str, floor: float | None, summary: str
) -> Chart | None:
    """None where no record has a finite number under this name."""
    steps, values = series(records, name)
    finite = values[np.isfinite(values)]
    if not len(finite):
        return None
    typical = float(np.median(finite)) if summary.startswith("median") else float(finite[-1])
    return Chart(name=title, summary=summary.format(typical), svg=curve(steps, values, title, floor))


def series(records: Sequence[Mapping[str, Any]], name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps and values of one number; NaN where it was not finite or not logged."""
    steps = np.array([record["step"] for record in records], dtype=np.float64)
    return steps, np.array([_number(record.get(name)) for record in records], dtype=np.float64)


def _number(value: Any) -> float:
    """metrics.jsonl holds null where there is no number, and names of numbers that are not finite."""
    return float("nan") if value is None or not np.isfinite(float(value)) else float(value)


# --- Head ----------------------------------------------------------------------------------------------------------


def _workers(train: TrainConfig) -> str:
    return " to ".join(str(num) for num in sorted({train.min_workers, train.max_workers}))


def _head(run_dir: str, config: RunConfig, config_text: str, records: Sequence[Mapping[str, Any]]) -> Head:
    train = config.train
    newest = CheckpointStore(run_dir).newest()
    steps = records[-1]["step"] + 1 if records else 0
    masks = f", {config.masking.name} masks" if hasattr(config.masking, "ratio") else f", {config.masking.name}"
    ratio = f" at ratio {config.masking.ratio}" if hasattr(config.masking, "ratio") else ""
    commented = [line[2:] for line in config_text.split("\n") if line.startswith("# ")]
    facts = [
        ("Run", " · ".join([Path(run_dir.rstrip("/")).name, *commented[:1]])),
        ("When", _when(run_dir)),
        ("Data", " · ".join([_data(config), *commented[1:2]])),
        (
            "Spread over",
            f"{_workers(train)} workers, ZeRO stage {train.zero}, global batch {train.global_batch} "
            f"({train.local_micro_batch} a forward, {train.accumulation} accumulated), {train.precision}",
        ),
        ("Checkpoint", f"{newest.name}, {newest.step} steps" if newest else "none committed yet"),
        *(("Software", line) for line in commented[2:]),
        *pace(throughput(run_dir, records)),
        *_costs(config, records),
        *planned(run_dir),
    ]
    return Head(
        title=f"{config.objective.name} · {config.encoder.name} at {config.encoder.image_size} px",
        subtitle=f"Pretraining run, {steps} of {train.steps} steps{masks}{ratio}",
        tiles=_tiles(config, records),
        facts=facts,
        run_dir=run_dir,
        step=newest.step if newest else 0,
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        version=medim_ray.__version__,
        commit=package_commit(),
        machine=this_machine(),
    )


def _costs(config: RunConfig, records: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The peak of a worker's memory beside the planner's estimate, and steps that were left out."""
    if not records:
        return []
    costs = []
    peak = max(int(record.get("peak_bytes", 0)) for record in records)
    if peak:
        told = f"{peak / 1e9:.2f} GB peak of a worker"
        with contextlib.suppress(ValueError):  # the planner has no model of some encoders
            told += f", {estimate(config).by_stage[config.train.stage].total / 1e9:.2f} GB estimated before"
        costs.append(("Memory", told))
    left_out = sum("omitted" in record for record in records)
    if left_out:
        costs.append(("Left out", f"{left_out} steps whose numbers were not finite or spiked (bad_steps.jsonl)"))
    return costs


def pace(block: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Throughput, step times and where the wall time went, over all attempts (train/throughput.py)."""
    if block is None:
        return []
    rate = f"{block['samples_per_s']:.1f} images/s, {block['data_wait_ratio']:.1%} of it waiting for data"
    if block["mfu"] is not None:
        rate += f", {block['mfu']:.1%} of {block['peak_flops'] / 1e12:.3g} TFLOPS a worker ({block['peak_source']})"
    steps = ", ".join(f"{block[f'step_s_p{p}']:.3g} s (p{p})" for p in PERCENTILES)
    parts = (
        ("launch_s", "from the command to the first step"),
        ("restart_s", "in restarts"),
        ("checkpoint_s", "in checkpoints"),
        ("lost_s", "in steps made again"),
    )
    spent = ", ".join(f"{_duration(block[name])} {words}" for name, words in parts if block[name] >= 0.05)
    goodput = f"{block['goodput']:.1%} of {_duration(block['wall_s'])} in steps that count"
    attempts = f"{block['num_attempts']} attempt{'s' if block['num_attempts'] > 1 else ''}"
    return [("Throughput", rate), ("Step", steps), ("Goodput", f"{goodput}; {spent}; {attempts}")]


def planned(run_dir: str) -> list[tuple[str, str]]:
    """A link to the planner's page, where `medim-ray plan --html RUN` has put one beside this page."""
    fs, root = fsspec.core.url_to_fs(run_dir)
    if not fs.exists(f"{root.rstrip('/')}/{PLAN_PAGE}"):
        return []
    return [("Plan", Markup(f'<a href="{PLAN_PAGE}">memory, time, cost and goodput on a cluster</a>'))]


def _tiles(config: RunConfig, records: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    if not records:
        return [("0", f"of {config.train.steps} steps")]
    _, loss = series(records, "loss")
    tail = loss[-max(1, len(loss) // 10) :]
    finite = tail[np.isfinite(tail)]
    seconds = float(np.nansum(series(records, "step_s")[1]))
    wait = float(np.nanmedian(series(records, "data_wait_ratio")[1]))
    return [
        (f"{records[-1]['step'] + 1:,}", f"of {config.train.steps:,} steps"),
        (f"{len(records) * config.train.global_batch:,}", "images seen"),
        (f"{finite.mean():.4g}" if len(finite) else "not finite", "loss, mean of the last tenth"),
        (f"{np.nanmedian(series(records, 'samples_per_s')[1]):.1f}", "images per second, median"),
        (f"{wait:.0%}", "of a step spent waiting for data, median"),
        (_duration(seconds), "in training steps"),
    ]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _when(run_dir: str) -> str:
    fs, root = fsspec.core.url_to_fs(run_dir)
    path = f"{root.rstrip('/')}/{METRICS}"
    if not fs.exists(path):
        return "no step yet"
    return f"last step recorded {fs.modified(path).astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def _data(config: RunConfig) -> str:
    manifest = ShardSet.open(config.data.shards).manifest
    sources = ", ".join(f"{name} {num:,}" for name, num in manifest.sources.items())
    splits = ", ".join(f"{name} {num:,}" for name, num in manifest.splits.items())
    patients = sum(manifest.patients.values())
    return f"{Path(config.data.shards.rstrip('/')).name}: {sources} images ({splits}), {patients:,} patients"
