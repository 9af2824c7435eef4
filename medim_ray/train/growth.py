"""Whether a run with `train.num_workers=[least, most]` could have more workers: the driver looks now and then.

Ray Train's own resizing would end the workers without a word; here they commit the step in flight first (control.py).
"""

from __future__ import annotations

import time

import ray

from medim_ray.config.schema import TrainConfig

_LONGEST_PAUSE_S = 3600.0


class Growth:
    """Looks every `train.resize_every_s`; where a larger group was asked for and did not come about, half as often."""

    def __init__(self, train: TrainConfig) -> None:
        self._train = train
        self._pause_s = train.resize_every_s
        self._next_look = 0.0
        self._had = 0  # workers of the group that was ended to grow

    def begin(self) -> None:
        """A group of workers starts: the first look is a pause from now."""
        self._next_look = time.monotonic() + self._pause_s

    def is_due(self) -> bool:
        """Whether it is time for a look."""
        return time.monotonic() >= self._next_look

    def look(self, num_workers: int) -> bool:
        """Whether a group of more than the `num_workers` that there are would find room now; counts as asked for."""
        if self._had:
            grown = num_workers > self._had
            self._pause_s = self._train.resize_every_s if grown else min(2 * self._pause_s, _LONGEST_PAUSE_S)
            self._had = 0
        self.begin()
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if room_for(self._train, nodes) <= num_workers or not room_for(self._train, [ray.available_resources()]):
            return False
        self._had = num_workers
        return True


def room_for(train: TrainConfig, nodes: list[dict[str, float]]) -> int:
    """The workers, up to the most that the run may have, that nodes with these resources hold."""
    need = {"CPU": train.cpus_per_worker, **({"GPU": 1.0} if train.use_gpu else {})}
    held = sum(int(min(node.get(kind, 0.0) // amount for kind, amount in need.items())) for node in nodes)
    return min(held, train.max_workers)
