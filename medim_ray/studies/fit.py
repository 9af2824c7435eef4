"""Scaling laws by least squares (scipy): a power law with a floor, and the speed-up with a serial fraction (Amdahl).

    error(x) = floor + scale * x^-exponent          Hestness et al. 2017; floor, scale >= 0, exponent in [0.02, 4]
    rate(n)  = rate(1) * n / (1 + serial * (n - 1))  Amdahl 1967; serial in [0, 1]
Intervals: a parametric bootstrap over the points, each drawn with its own standard error or, where it has none (one
seed), with the scatter of the points around the law; none where there are no more points than parameters to tell one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar, nnls
from scipy.stats import t as student

from medim_ray.studies.outcome import Number

Floats = NDArray[np.float64]
LAWS = ("power", "amdahl")
_DRAWS = 400
_COARSE = 16


class Measured(NamedTuple):
    """A point of a law. number: with its 95 % interval, which is Student's over `num_runs` repetitions, or that of a
    single run over patients; learned: whether it beats the untrained encoder, None where that can't be told."""

    x: float
    number: Number
    num_runs: int = 1
    learned: bool | None = None

    @property
    def standard_error(self) -> float | None:
        """From the interval."""
        low, high = self.number.low, self.number.high
        if low is None or high is None:
            return None
        quantile = float(student.ppf(0.975, self.num_runs - 1)) if self.num_runs > 1 else 1.96
        return (high - low) / 2 / quantile


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A fitted law. parameters: name -> value with its interval; draws_RP: the bootstrap's parameters, R = 0 where no
    scatter is known.

    held_out_x, predicted, measured: the point that the fit did not see, None where all points were used.
    """

    law: Literal["power", "amdahl"]
    parameters: dict[str, Number]
    draws_RP: Floats
    held_out_x: float | None = None
    predicted: Number | None = None
    measured: Number | None = None

    @property
    def formula(self) -> str:
        """The law with its numbers."""
        p = {name: number.value for name, number in self.parameters.items()}
        if self.law == "power":
            return f"{p['floor']:.3g} + {p['scale']:.3g} · x^-{p['exponent']:.3g}"
        return f"{p['rate']:.3g} · n / (1 + {p['serial']:.3g} (n - 1))"

    def band(self, xs: Floats) -> tuple[Floats, Floats, Floats]:
        """The law at `xs`: low, value and high of its 95 % interval; NaN for both ends where no scatter is known."""
        values = np.array([n.value for n in self.parameters.values()], dtype=np.float64)
        if not len(self.draws_RP):
            unknown = np.full(len(xs), np.nan)
            return unknown, _CURVES[self.law](xs, *values), unknown
        drawn = np.stack([_CURVES[self.law](xs, *row) for row in self.draws_RP])
        low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
        return low, _CURVES[self.law](xs, *values), high

    def to_json(self) -> dict[str, Any]:
        """law, parameters, and what the held-out point came to."""
        tree: dict[str, Any] = {"law": self.law, "formula": self.formula}
        tree["parameters"] = {name: vars(number) for name, number in self.parameters.items()}
        if self.predicted is not None and self.measured is not None:
            tree["held_out"] = {
                "x": self.held_out_x,
                "predicted": vars(self.predicted),
                "measured": vars(self.measured),
            }
        return tree


def _power(xs: Floats, floor: float, scale: float, exponent: float) -> Floats:
    return floor + scale * xs**-exponent


def _amdahl(xs: Floats, rate: float, serial: float) -> Floats:
    return rate * xs / (1.0 + serial * (xs - 1.0))


_CURVES: dict[str, Callable[..., Floats]] = {"power": _power, "amdahl": _amdahl}
_NAMES = {"power": ("floor", "scale", "exponent"), "amdahl": ("rate", "serial")}  # the last one is not linear
_BASES: dict[str, Callable[[Floats, float], Floats]] = {
    "power": lambda xs, exponent: np.stack([np.ones_like(xs), xs**-exponent], axis=1),
    "amdahl": lambda xs, serial: _amdahl(xs, 1.0, serial)[:, None],
}
_BOUNDS = {"power": (0.02, 4.0), "amdahl": (0.0, 1.0)}  # of the parameter that is not linear


def fit_law(law: Literal["power", "amdahl"], points: Sequence[Measured], hold_out: bool, seed: int = 0) -> Fit:
    """Fits a law to points, x > 0. hold_out: the largest x is left out and predicted; of several points there the mean.

    ValueError: fewer points than parameters (a held-out one counts for nothing), x not above 0, or an error that does
    not fall with x, of which no exponent can be told.
    """
    known = sorted((point for point in points if point.number.value is not None), key=lambda point: point.x)
    seen = [point for point in known if point.x < known[-1].x] if hold_out else known
    need = len(_NAMES[law])
    if (num := len({point.x for point in seen})) < need:
        raise ValueError(
            f"fit.law={law} has {need} parameters and points at {num} x{' beside the one held out' * hold_out}; "
            "add arms, or set fit.hold_out=false"
        )
    if any(point.x <= 0 for point in known):
        raise ValueError(f"fit.x: must be above 0 for every arm, found {known[0].x:g}")
    xs = np.array([point.x for point in seen], dtype=np.float64)
    ys = np.array([point.number.value for point in seen], dtype=np.float64)
    best = _least_squares(law, xs, ys)
    if law == "power" and best[1] <= 1e-9 * abs(ys).max():
        raise ValueError("the error does not fall with x, so that there is no exponent to tell")
    deviations_K = _deviations(seen, ys - _CURVES[law](xs, *best), need)
    numbers = [Number(float(value)) for value in best]
    draws_RP = np.empty((0, need))
    if deviations_K is not None:
        rng = np.random.default_rng(seed)
        drawn_RK = ys + rng.standard_normal((_DRAWS, len(ys))) * deviations_K
        draws_RP = np.stack([_least_squares(law, xs, row) for row in drawn_RK])
        low, high = np.percentile(draws_RP, [2.5, 97.5], axis=0)
        numbers = [Number(*(float(v) for v in row)) for row in zip(best, low, high, strict=True)]
    fit = Fit(law=law, parameters=dict(zip(_NAMES[law], numbers, strict=True)), draws_RP=draws_RP)
    if not hold_out:
        return fit
    x, last = known[-1].x, [point.number for point in known if point.x == known[-1].x]
    measured = last[0] if len(last) == 1 else Number(float(np.mean([float(n.value or 0.0) for n in last])))
    low_1, value_1, high_1 = fit.band(np.array([x]))
    ends = (float(low_1[0]), float(high_1[0])) if len(draws_RP) else (None, None)
    return replace(fit, held_out_x=x, predicted=Number(float(value_1[0]), *ends), measured=measured)


def _deviations(points: Sequence[Measured], residuals_K: Floats, num_parameters: int) -> Floats | None:
    """Standard error of each number: its own, or else the scatter of the residuals; None where neither tells."""
    freedom = len(residuals_K) - num_parameters
    scatter = float(np.sqrt((residuals_K**2).sum() / freedom)) if freedom > 0 else None
    found = [scatter if point.standard_error is None else point.standard_error for point in points]
    return None if any(deviation is None for deviation in found) else np.array(found, dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class Line:
    """Arms of a study that lie on one line, x ascending; hold_out: whether the largest x was to be predicted; fit:
    their law, or `note`: why there is none."""

    name: str
    points: Sequence[Measured]
    hold_out: bool
    fit: Fit | None = None
    note: str = ""

    @property
    def not_learned(self) -> list[float]:
        """x of the points on the fitted line that do not beat the untrained encoder."""
        return [point.x for point in self.points if point.learned is False]

    def to_json(self) -> dict[str, Any]:
        """name, points, hold_out, not_learned, fit, note."""
        return {
            "name": self.name,
            "points": [[point.x, vars(point.number), point.num_runs, point.learned] for point in self.points],
            "hold_out": self.hold_out,
            "fit": self.fit and self.fit.to_json(),
            "note": self.note,
        }


def fit_line(name: str, points: Sequence[Measured], law: Literal["power", "amdahl"], hold_out: bool) -> Line:
    """The line through these points; a law that can't be fitted is a note."""
    points = sorted(points, key=lambda point: point.x)
    try:
        return Line(name=name, points=points, hold_out=hold_out, fit=fit_law(law, points, hold_out))
    except ValueError as error:
        return Line(name=name, points=points, hold_out=hold_out, note=str(error))


def efficiencies(points: Sequence[Measured]) -> list[tuple[float, Number]]:
    """(n, rate(n) / (n * rate(first)) * first) of the points of a speed-up, whose first one is 1 by definition."""
    if not points or not points[0].number.value:
        return []
    first, rate = points[0].x, points[0].number.value
    return [
        (n, Number(*(None if part is None else part * first / (n * rate) for part in (r.value, r.low, r.high))))
        for n, r, *_ in points
    ]


def _least_squares(law: str, xs: Floats, ys: Floats) -> Floats:
    """The parameters that fit best: for each value of the one that is not linear, the others by non-negative least
    squares; that one by a coarse search and Brent's method around its best place."""
    low, high = _BOUNDS[law]

    def residual(shape: float) -> float:
        return float(nnls(_BASES[law](xs, shape), ys)[1])

    grid = np.linspace(low, high, _COARSE)
    at = int(np.argmin([residual(shape) for shape in grid]))
    around = (grid[max(0, at - 1)], grid[min(_COARSE - 1, at + 1)])
    shape = float(minimize_scalar(residual, bounds=around, method="bounded", options={"xatol": 1e-7}).x)
    shape = min((shape, float(grid[at])), key=residual)
    return np.array([*nnls(_BASES[law](xs, shape), ys)[0], shape])
