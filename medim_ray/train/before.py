"""What a rank does between two steps without changing either: it looks at its maps, and publishes its weights.

Called by the loop before every step, on all ranks alike. What is looked at comes from outside (probes/watch.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Look:
    """numbers: for the step's record; words: what they say that a user should hear of."""

    numbers: Mapping[str, float] = field(default_factory=dict)
    words: Sequence[str] = ()


LOOK_S = "look_s"  # seconds of a look, which are not the step's


class BeforeStep:
    """publish: told of every step (snapshots.py); look: called every `every` steps from step 0 on, so that its numbers
    are of the weights that the step begins with; None where a run has no such."""

    def __init__(self, publish: Callable[[int], None] | None, look: Callable[[], Look] | None, every: int) -> None:
        self._publish, self._look, self._every = publish, look, every

    def __call__(self, step: int) -> Look:
        if self._publish is not None:
            self._publish(step)
        if self._look is None or step % self._every:
            return Look()
        began = time.perf_counter()
        seen = self._look()
        words = seen.words if step else ()  # weights that have not learned yet are no news
        return Look(numbers={**seen.numbers, LOOK_S: time.perf_counter() - began}, words=words)
