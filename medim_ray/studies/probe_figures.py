"""Figures of a run's probes: confusion of the linear probe, and how often its probabilities came true. No files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from medim_ray.studies.figures import FIRST, LINE, MUTED, SERIES, STYLE, Drawing, to_svg

_SIZE = (3.1, 2.5)
_ENCODERS = ("trained", "untrained")


def probe_charts(labels: Mapping[str, Any]) -> list[tuple[str, str, Drawing]]:
    """(label, what is drawn, SVG) of every label with probabilities: its confusion, then its reliability."""
    made = []
    for label, facts in labels.items():
        if any(map(any, facts["confusion"]["trained"])):
            made.append(
                (
                    label,
                    "images by true and predicted class",
                    confusion(facts["classes"], facts["confusion"]["trained"]),
                )
            )
        known = {name: facts["calibration"][name] for name in _ENCODERS if facts["calibration"][name]["bins"]}
        if known:
            made.append((label, "how often a probability came true", reliability(known)))
    return made


def confusion(classes: Sequence[str], table: Sequence[Sequence[int]]) -> Drawing:
    """Images by true class (rows) and predicted class, shaded by the share of their row."""
    counts = np.array(table, dtype=np.float64)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1.0)
    with rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.add_subplot()
        for y, x in np.ndindex(counts.shape):
            place = (x + 0.03, y + 0.04)
            axes.add_patch(Rectangle(place, 0.94, 0.92, facecolor=FIRST, alpha=0.06 + 0.6 * shares[y, x], linewidth=0))
            axes.text(x + 0.5, y + 0.5, f"{int(counts[y, x])}", ha="center", va="center")
        axes.set_xlim(0, len(classes))
        axes.set_ylim(len(classes), 0)
        places, names = np.arange(len(classes)) + 0.5, [name[:12] for name in classes]
        axes.set_xticks(places, names, rotation=0 if len(classes) < 4 else 30)
        axes.set_yticks(places, names)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(length=0)
        return to_svg(figure, "images by true and predicted class")


def reliability(encoders: Mapping[str, Mapping[str, Any]]) -> Drawing:
    """Share that came true over the probability told, in bins of equal counts; the diagonal is perfect."""
    with rc_context(STYLE):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], color=LINE, linewidth=1.2, linestyle=(0, (4, 3)))
        colours = {"trained": SERIES[0], "untrained": MUTED}
        for name, facts in encoders.items():
            xs, ys = ([one[key] for one in facts["bins"]] for key in ("probability", "observed"))
            error = f"{name}, off by {facts['error']:.2f}"
            axes.plot(xs, ys, marker="o", markersize=3.5, linewidth=1.4, color=colours[name], label=error)
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("probability told")
        axes.set_ylabel("came true")
        axes.legend(frameon=False, loc="upper left")
        return to_svg(figure, "share that came true over the probability told")
