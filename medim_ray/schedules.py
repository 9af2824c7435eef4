"""Values that change over a run (learning rate, weight decay, momentum, temperature) as pure functions of the step.

No state, no torch, no optimizer. The shapes are DINOv2's (Oquab et al., 2023): frozen, linear warm-up, cosine.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Schedule = Callable[[int], float]


def _ramp(start: float, end: float, position: int, num: int) -> float:
    """Point `position` of `num` evenly spaced points from start to end, both ends included (numpy's linspace)."""
    return start + (end - start) * position / max(num - 1, 1)


def cosine(
    base: float,
    final: float,
    num_steps: int,
    warmup_steps: int = 0,
    warmup_start: float = 0.0,
    frozen_steps: int = 0,
) -> Schedule:
    """DINOv2's schedule: 0 for `frozen_steps`, a line from `warmup_start` to `base`, then half a cosine to `final`.

    The line reaches `base` in its last step; the cosine starts at `base` and would reach `final` at `num_steps`, the
    value of every later step. ValueError where the parts do not fit into the run.
    """
    num_cosine = num_steps - warmup_steps - frozen_steps
    if min(num_steps, warmup_steps, frozen_steps) < 0 or num_cosine < 0:
        raise ValueError(
            f"a schedule of num_steps={num_steps} cannot hold warmup_steps={warmup_steps} and "
            f"frozen_steps={frozen_steps}: their sum must be at most num_steps; shorten them or train longer"
        )

    def value(step: int) -> float:
        if step < 0:
            raise ValueError(f"step={step} of a schedule must be 0 or more")
        if step < frozen_steps:
            return 0.0
        step -= frozen_steps
        if step < warmup_steps:
            return _ramp(warmup_start, base, step, warmup_steps)
        step -= warmup_steps
        if step >= num_cosine:
            return final
        return final + 0.5 * (base - final) * (1.0 + math.cos(math.pi * step / num_cosine))

    return value


def linear_warmup(start: float, end: float, warmup_steps: int) -> Schedule:
    """A line from `start` to `end` over `warmup_steps` steps, then `end` (DINOv2's teacher temperature)."""
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps={warmup_steps} must be 0 or more")

    def value(step: int) -> float:
        return _ramp(start, end, step, warmup_steps) if step < warmup_steps else end

    return value


def tabulate(schedule: Schedule, num_steps: int) -> NDArray[np.float64]:
    """The values of steps 0 to num_steps - 1, [num_steps]."""
    return np.array([schedule(step) for step in range(num_steps)], dtype=np.float64)
