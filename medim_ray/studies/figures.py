"""Figures as inline SVG that follow the page's light or dark colours, or as PNG. Knows numbers, not runs.

Matplotlib draws with stand-in colours, which are replaced by CSS variables of templates/style.css; text stays text.
"""

from __future__ import annotations

import functools
import io
import itertools
import re
from collections.abc import Mapping, Sequence
from importlib import resources

import cv2
import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

# Stand-ins for the colours of the page: matplotlib wants numbers, the page has variables. Gray, and so far apart that a
# pixel of a drawing tells which one it is made of.
_VARIABLES = ("--ink", "--muted", "--line", "--c1", "--c2", "--c4", "--c5", "--c6", "--c3", "--card")
_GAP = 16
_COLOURS = {f"#{3 * f'{_GAP * i:02x}'}": name for i, name in enumerate(_VARIABLES, 1)}
INK, MUTED, LINE, FIRST, SECOND, *_MORE, CARD = _COLOURS
SERIES = (FIRST, SECOND, *_MORE)
_MAX_POINTS = 300
_PNG_DPI = 160
_FIGURES = itertools.count()
STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
}


class Drawing(Markup):
    """An inline SVG element, with the figure that it was drawn from; description: what the figure shows."""

    figure: Figure
    description: str


def curve(
    steps_K: NDArray[np.float64], values_K: NDArray[np.float64], name: str, floor: float | None = None
) -> Drawing:
    """A series over the steps: smoothed line, with the raw values (or their range in a bucket of steps) behind it.

    NaN is a gap; at least one value is finite. floor: the lower end of the axis, where the number has one.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(3.7, 1.9), layout="constrained")
        axes = figure.add_subplot()
        x, low, middle, high = _buckets(steps_K, values_K)
        if len(x) < len(steps_K):
            axes.fill_between(x, low, high, color=FIRST, alpha=0.18, linewidth=0)
        else:
            axes.plot(
                x, middle, color=FIRST, alpha=0.35, linewidth=1.0, marker="o" if len(x) < 3 else None, markersize=4
            )
        axes.plot(x, _smooth(middle), color=FIRST, linewidth=1.8)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.margins(x=0.01)
        bottom, top = float(np.nanmin(values_K)), float(np.nanmax(values_K))
        if floor is not None:
            axes.set_ylim(floor, max(1.05 * top, floor + 1e-6))
        elif top - bottom <= 1e-6 * abs(top):  # flat: rounding errors are no signal
            room = 0.1 * abs(top) or 1.0
            axes.set_ylim(bottom - room, top + room)
        axes.set_xlabel("step")
        return to_svg(figure, f"{name} over the steps")


def _buckets(
    steps_K: NDArray[np.float64], values_K: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Steps with the least, mean and greatest value of at most `_MAX_POINTS` runs of steps."""
    if len(steps_K) <= _MAX_POINTS:
        return steps_K, values_K, values_K, values_K
    size = -(-len(steps_K) // _MAX_POINTS)
    parts = [np.arange(start, min(start + size, len(steps_K))) for start in range(0, len(steps_K), size)]
    parts = [part for part in parts if np.isfinite(values_K[part]).any()]
    columns = [
        (steps_K[p].mean(), np.nanmin(values_K[p]), np.nanmean(values_K[p]), np.nanmax(values_K[p])) for p in parts
    ]
    x, low, middle, high = np.array(columns).reshape(-1, 4).T
    return x, low, middle, high


def _smooth(values_K: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over a window of about a twentieth of the points, centred; gaps stay gaps and count for nothing."""
    half = len(values_K) // 40
    valid_K = np.isfinite(values_K)
    totals = np.concatenate([[0.0], np.cumsum(np.where(valid_K, values_K, 0.0))])
    counts = np.concatenate([[0], np.cumsum(valid_K)])
    at_K = np.arange(len(values_K))
    reach_K = np.minimum(half, np.minimum(at_K, len(values_K) - 1 - at_K))  # shrinks at the ends, stays centred
    first_K, last_K = at_K - reach_K, at_K + reach_K + 1
    num_K = counts[last_K] - counts[first_K]
    means_K = (totals[last_K] - totals[first_K]) / np.maximum(num_K, 1)
    return np.where(valid_K, means_K, np.nan)


def to_svg(figure: Figure, description: str) -> Drawing:
    """The figure as an inline SVG element that scales with its place; no namespace, no metadata, ids of its own."""
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
    )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(
        r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{description}">', text
    )
    number = next(_FIGURES)
    text = re.sub(r'(?<= id=")', f"f{number}-", text)
    text = re.sub(r'(?<=href="#)|(?<=url\(#)', f"f{number}-", text)
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font: \1 var(--font)", text)
    for stand_in, variable in _COLOURS.items():
        text = text.replace(stand_in, f"var({variable})")
    drawing = Drawing(text)
    drawing.figure, drawing.description = figure, description
    return drawing


def to_png(drawing: Drawing) -> bytes:
    """The figure in the page's light colours, opaque, for what shows no SVG."""
    canvas = FigureCanvasAgg(drawing.figure)
    drawing.figure.set_dpi(_PNG_DPI)
    drawing.figure.patch.set_alpha(0.0)
    for axes in drawing.figure.axes:
        axes.patch.set_alpha(0.0)
    canvas.draw()
    pixels_HW4 = np.asarray(canvas.buffer_rgba()).astype(np.float64)
    colours = _light_colours()
    which_HW = np.clip(np.round(pixels_HW4[:, :, 0] / _GAP).astype(int), 1, len(colours)) - 1
    opacity_HW1 = pixels_HW4[:, :, 3:] / 255
    paper = colours[_VARIABLES.index("--card")]
    painted_HW3 = opacity_HW1 * colours[which_HW] + (1 - opacity_HW1) * paper
    done, encoded = cv2.imencode(".png", np.round(painted_HW3[:, :, ::-1]).astype(np.uint8))
    assert done, "OpenCV can't write PNG"
    return encoded.tobytes()


@functools.cache
def _light_colours() -> NDArray[np.float64]:
    """[num_variables, 3] RGB, 0 to 255, as the style sheet gives them first."""
    sheet = resources.files("medim_ray.studies").joinpath("templates/style.css").read_text()
    found = [re.search(rf"{name}: #([0-9a-f]{{6}})", sheet) for name in _VARIABLES]
    return np.array([list(bytes.fromhex(match.group(1))) for match in found if match], dtype=np.float64)


def interval_bar(
    numbers: Mapping[str, float | None], lowest: float, highest: float, chance: float | None, kind: str
) -> Markup:
    """A dot with its interval on an axis from `lowest` to `highest`, a tick at chance; `kind` is a CSS class."""

    def place(value: float) -> float:
        return round(100 * (min(max(value, lowest), highest) - lowest) / (highest - lowest), 2)

    value, low, high = (numbers[key] for key in ("value", "low", "high"))
    parts = ['<line class="axis" x1="0" x2="100" y1="8" y2="8"/>']
    if chance is not None:
        parts.append(f'<line class="chance" x1="{place(chance)}" x2="{place(chance)}" y1="1" y2="15"/>')
    if low is not None and high is not None:
        parts.append(f'<line class="range" x1="{place(low)}" x2="{place(high)}" y1="8" y2="8"/>')
    dot = f'<i style="left:{place(value)}%"></i>' if value is not None else ""
    svg = f'<svg viewBox="0 0 100 16" preserveAspectRatio="none" aria-hidden="true">{"".join(parts)}</svg>'
    return Markup(f'<span class="interval {kind}">{svg}{dot}</span>')


def outline(contours: Sequence[NDArray[np.int32]], size: int) -> str:
    """SVG path of closed polygons of (x, y) points of an image of `size` pixels a side, in per mille of the side."""
    parts = []
    for points in contours:
        scaled = np.round(1000 * (points.reshape(-1, 2) + 0.5) / size).astype(int)
        parts.append("M" + "L".join(f"{x} {y}" for x, y in scaled) + "Z")
    return "".join(parts)


def squares(is_set_N: NDArray[np.bool_], width: int) -> str:
    """SVG path of unit squares, row by row, where `is_set_N`; runs in a row are one rectangle."""
    parts = []
    for y, row in enumerate(is_set_N.reshape(-1, width)):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(np.int8), [0]])))
        parts += [f"M{start} {y}h{end - start}v1h-{end - start}z" for start, end in edges.reshape(-1, 2)]
    return "".join(parts)
