"""One quantity of a golden file beside ours. What is compared: check_golden.py and golden_*.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Comparison:
    """One line: `key` is the reference quantity of the file that it accounts for. relative: error and tolerance are
    relative to the reference."""

    key: str
    what: str
    reference: NDArray[Any]
    ours: NDArray[Any]
    tolerance: float
    relative: bool = True

    @property
    def error(self) -> float:
        """Largest error over the entries; NaN where shapes differ."""
        if self.reference.shape != self.ours.shape:
            return float("nan")
        difference = np.abs(self.reference.astype(np.float64) - self.ours.astype(np.float64))
        if self.relative:
            scale = np.abs(self.reference.astype(np.float64))
            difference = np.where(difference == 0, 0.0, difference / np.where(scale == 0, 1e-30, scale))
        return float(difference.max(initial=0.0))

    @property
    def is_ok(self) -> bool:
        return self.error <= self.tolerance  # False for NaN
