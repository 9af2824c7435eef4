"""What the time from the command, or from a failure, to the first step went to; by the clocks of driver and rank 0."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class Startup:
    """A stop watch that travels from the driver to rank 0. parts: what -> seconds, in order."""

    began: float = field(default_factory=time.time)  # Unix time: of all processes alike, unlike the monotonic clock
    parts: dict[str, float] = field(default_factory=dict)

    def mark(self, part: str) -> None:
        """What went on since the last mark was `part`."""
        self.parts[part] = round(time.time() - self.began - sum(self.parts.values()), 2)


def describe_startup(parts: dict[str, float]) -> str:
    """One line for the screen."""
    return f"first step after {sum(parts.values()):.1f} s: " + ", ".join(f"{k} {v:.1f}" for k, v in parts.items())
