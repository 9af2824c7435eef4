"""The plan as one HTML file, and its figures as SVG for the report of a run: cost and time, memory, goodput."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fsspec
import jinja2
from matplotlib.figure import Figure
from rich.console import Console

from medim_ray.plan import constants, tables
from medim_ray.plan.compare import Comparison
from medim_ray.plan.curves import Point, interval_curve
from medim_ray.plan.facts import Check
from medim_ray.plan.memory import Memory
from medim_ray.plan.planner import Plan

PAGE = "plan.html"
_PARTS = tuple(part.name for part in dataclasses.fields(Memory))

_PAGE = jinja2.Template(
    """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Plan: {{ title }}</title>
<style>body{font:15px/1.5 sans-serif;max-width:1100px;margin:2em auto;padding:0 1em}pre{font-size:12px;overflow-x:auto}
figure{margin:1.5em 0}figcaption{color:#555}svg{max-width:100%;height:auto}table{border-collapse:collapse}
td,th{border:1px solid #ccc;padding:2px 8px;text-align:left}</style>
<h1>Plan: {{ title }}</h1>
<p>{{ bottleneck }}. What would lift it: {{ lift }}.</p>
<pre>{{ text }}</pre>
{% for caption, svg in figures %}<figure>{{ svg|safe }}<figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
<h2>Where the numbers come from</h2>
<table><tr><th>constant</th><th>source</th><th>date</th><th>status</th></tr>
{% for name, entry in entries %}<tr><td>{{ name }}</td><td>{{ entry.source }}</td><td>{{ entry.date }}</td>
<td>{{ entry.status }}</td></tr>
{% endfor %}</table></html>
""",
    autoescape=True,
)


def write_page(
    plan: Plan, points: Sequence[Point], out: str | Path, check: Check | None, comparison: Comparison | None
) -> str:
    """Writes the page to `out`, in a folder (such as a run's, whose report then links it) as plan.html; any fsspec URL.
    Returns where it is; it needs no other file. ValueError names --html where it can't be written."""
    console = Console(file=io.StringIO(), width=140, no_color=True)
    for renderable in tables.render(plan, points, check, comparison):
        console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    page = _PAGE.render(
        title=plan.cluster.title,
        bottleneck=plan.bottleneck.words.capitalize(),
        lift=plan.bottleneck.lift,
        text=console.file.getvalue(),
        figures=figures(plan, points),
        entries=constants.all_entries(),
    )
    try:
        fs, path = fsspec.core.url_to_fs(str(out))
        place = f"{str(out).rstrip('/')}/{PAGE}" if fs.isdir(path) else str(out)
        fs.makedirs(fs._parent(path), exist_ok=True)
        with fsspec.open(place, "w", encoding="utf-8") as file:
            file.write(page)
    except (OSError, ImportError, ValueError) as error:
        raise ValueError(
            f"--html={out}: can't be written ({error}); give a file or folder that you may write"
        ) from error
    return place


def figures(plan: Plan, points: Sequence[Point]) -> list[tuple[str, str]]:
    """(caption, SVG) of each figure of the page."""
    return [
        (
            "Time and cost against GPUs. Strong: the same global batch; weak: the same images a GPU.",
            _svg(lambda figure: _scaling(plan, points, figure)),
        ),
        (
            "Memory of one GPU by ZeRO stage, without (left) and with activation checkpointing (right).",
            _svg(lambda figure: _bars(plan, figure)),
        ),
        (
            "Goodput against the checkpoint interval: Daly's formula and the simulation.",
            _svg(lambda figure: _goodput(plan, figure)),
        ),
        ("Simulated goodput at Daly's interval against GPUs.", _svg(lambda figure: _goodput_of_size(points, figure))),
    ]


def _svg(draw: Callable[[Figure], None]) -> str:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    draw(figure)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def _scaling(plan: Plan, points: Sequence[Point], figure: Figure) -> None:
    axes: Any = figure.subplots(1, 2)
    for ax, name, label in zip(axes, ("hours", "cost"), ("hours", "US dollars"), strict=True):
        for scaling, style in (("strong", "o-"), ("weak", "s--")):
            chosen = [p for p in points if p.scaling == scaling]
            ax.plot([p.num_gpus for p in chosen], [getattr(p, name) for p in chosen], style, ms=3, label=scaling)
        ax.set(xscale="log", yscale="log" if name == "hours" else "linear", xlabel="GPUs", ylabel=label)
        ax.axvline(plan.setting.num_gpus, color="gray", lw=0.8)
        ax.legend()


def _bars(plan: Plan, figure: Figure) -> None:
    ax: Any = figure.subplots()
    for checkpointed, shift in ((False, -0.2), (True, 0.2)):
        stages = sorted({stage for stage, _ in plan.memory})
        base = [0.0] * len(stages)
        for k, part in enumerate(_PARTS):
            sizes = [getattr(plan.memory[stage, checkpointed], part) / 1e9 for stage in stages]
            label = None if checkpointed else part
            ax.bar([stage + shift for stage in stages], sizes, 0.36, bottom=base, color=f"C{k}", label=label)
            base = [a + b for a, b in zip(base, sizes, strict=True)]
    ax.axhline(plan.cluster.memory_bytes / 1e9, color="black", lw=1, label="usable memory")
    ax.set(xlabel="ZeRO stage", ylabel="GB a GPU", xticks=stages)
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)


def _goodput(plan: Plan, figure: Figure) -> None:
    points = interval_curve(plan)
    ax: Any = figure.subplots()
    ax.plot([p[0] for p in points], [p[1] for p in points], "-", label="Daly's formula")
    ax.plot([p[0] for p in points], [p[2] for p in points], "o", ms=4, label="simulation")
    ax.axvline(plan.goodput.daly_s, color="gray", lw=0.8, label="Daly's interval")
    ax.axvline(plan.goodput.recipe_interval_s, color="red", lw=0.8, ls=":", label="the recipe's interval")
    ax.set(xscale="log", xlabel="seconds between checkpoints", ylabel="goodput")
    ax.legend()


def _goodput_of_size(points: Sequence[Point], figure: Figure) -> None:
    ax: Any = figure.subplots()
    by_size = sorted({p.num_gpus: p.goodput for p in points}.items())
    ax.plot([num for num, _ in by_size], [goodput for _, goodput in by_size], "o-", ms=3)
    ax.set(xscale="log", xlabel="GPUs", ylabel="goodput")
