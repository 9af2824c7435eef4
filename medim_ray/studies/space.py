"""The search space of a sweep: axes in YAML to points, and a point to a checked RunConfig. No Ray, no training.

An axis is a dotted key of `pretrain` with a list of values or a range, or a name of its own with named choices, each a
list of overrides. Every configuration that the space can make is built before a trial starts.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from medim_ray.config.loader import leaves, load, run_hash
from medim_ray.config.schema import RunConfig
from medim_ray.draws import step_draws

SEED = "seed"  # the axis over which a table takes means
MEMBER = "member"  # the axis of a population: which of its members
SPEED = (  # options that change no weight of a run, so that its hash does not see them, but what a study may measure
    "data.granules_per_step",
    "data.window_steps",
    "data.num_actors",
    "data.prefetch_blocks",
    "train.offload_optimizer",
    "train.activation_checkpointing",
    "train.checkpoint_every",
    "train.max_pending_saves",
    "train.use_gpu",
    "train.cpus_per_worker",
)
MAX_CHECKED = 2000  # combinations of a space


@dataclass(frozen=True)
class Choices:
    """Named values; each is a list of overrides of the recipe."""

    key: str
    options: Mapping[str, tuple[str, ...]]

    @property
    def sets(self) -> set[str]:
        """The options of `pretrain` that it sets."""
        return {text.partition("=")[0] for overrides in self.options.values() for text in overrides}

    def shown(self, name: Any) -> Any:
        """An option in a table: a number where its name is one, so that tables sort and figures have a scale."""
        try:
            value = json.loads(name)
        except (TypeError, ValueError):
            return name
        return value if isinstance(value, int | float) else name


@dataclass(frozen=True)
class Range:
    """Numbers between `low` and `high`, drawn on a linear or logarithmic scale; whole numbers for `randint`."""

    key: str
    kind: Literal["uniform", "loguniform", "randint"]
    low: float
    high: float

    @property
    def sets(self) -> set[str]:
        """The option of `pretrain` that it sets."""
        return {self.key}

    def shown(self, value: Any) -> Any:
        """A value in a table."""
        return value

    def at(self, share: float) -> float | int:
        """The value at `share` in [0, 1) of the way from low to high."""
        if self.kind == "randint":
            low, high = int(self.low), int(self.high)
            return low + min(int(share * (high - low + 1)), high - low)
        if self.kind == "loguniform":
            return math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        return self.low + share * (self.high - self.low)


Axis = Choices | Range


@dataclass(frozen=True)
class Point:
    """One place of the space. values: axis -> what a table shows; overrides: of the recipe."""

    values: Mapping[str, Any]
    overrides: tuple[str, ...]

    @property
    def cell(self) -> str:
        """The point without its seed, in words: points of one cell are repetitions of each other."""
        return ", ".join(f"{key}={value}" for key, value in self.values.items() if key != SEED) or "recipe"


@dataclass(frozen=True)
class SearchSpace:
    """The axes of a sweep, in the order of the file."""

    axes: tuple[Axis, ...]

    @classmethod
    def parse(cls, space: Mapping[str, Any]) -> SearchSpace:
        """The axes of a `space:` group.

        ValueError: an axis without values, a value twice, a range that is empty or not of numbers, an option that two
        axes set.
        """
        if not space:
            raise ValueError("space is empty: name at least one axis, e.g. space: {masking.ratio: [0.5, 0.75]}")
        axes = tuple(_axis(key, value) for key, value in space.items())
        for one, other in itertools.combinations(axes, 2):
            for key, another in itertools.product(sorted(one.sets), sorted(other.sets)):
                if f"{key}.".startswith(f"{another}.") or f"{another}.".startswith(f"{key}."):
                    both = f"space.{one.key} and space.{other.key} both set {max(key, another, key=len)}"
                    raise ValueError(f"{both}: the second would undo the first; leave it in one of them")
        return cls(axes)

    @property
    def is_finite(self) -> bool:
        """Only choices: the grid has every point."""
        return all(isinstance(axis, Choices) for axis in self.axes)

    def grid(self) -> list[Point]:
        """Every combination of the choices; ValueError where an axis is a range."""
        ranges = [axis.key for axis in self.axes if isinstance(axis, Range)]
        if ranges:
            raise ValueError(f"search=grid, but space.{ranges[0]} is a range: list its values, or search=random")
        names = [list(axis.options) for axis in self.axes if isinstance(axis, Choices)]
        return [self.point(dict(zip(self.keys, combination, strict=True))) for combination in itertools.product(*names)]

    def random(self, num: int, seed: int) -> list[Point]:
        """`num` different cells (fewer where the space has fewer), each with every value of the axis `seed`.

        A function of (seed, place in the list): a longer list begins with the shorter one.
        """
        if any(axis.key == SEED and isinstance(axis, Range) for axis in self.axes):
            raise ValueError(f"space.{SEED} is a range, but search=random runs each cell with every seed: list them")
        drawn = [axis for axis in self.axes if axis.key != SEED]
        seeds = [name for axis in self.axes if axis.key == SEED and isinstance(axis, Choices) for name in axis.options]
        found: dict[str, list[Point]] = {}
        for draw in range(20 * num):
            shares = step_draws(seed, draw).uniform("sweep", len(drawn))[0]
            values = {axis.key: _draw(axis, float(u)) for axis, u in zip(drawn, shares, strict=True)}
            points = [self.point({**values, SEED: name}) for name in seeds] or [self.point(values)]
            found.setdefault(points[0].cell, points)
            if len(found) == num:
                break
        return [point for points in found.values() for point in points]

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the axes."""
        return tuple(axis.key for axis in self.axes)

    def point(self, values: Mapping[str, Any]) -> Point:
        """The point with these values: the name of an option for choices, a number for ranges."""
        overrides: list[str] = []
        for axis in self.axes:
            value = values[axis.key]
            if isinstance(axis, Choices):
                overrides += axis.options[str(value)]
            else:
                overrides.append(f"{axis.key}={json.dumps(value)}")
        return Point({axis.key: axis.shown(values[axis.key]) for axis in self.axes}, tuple(overrides))

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether these are values of all axes and no other: the name of an option, a number within a range."""
        return values.keys() == set(self.keys) and all(_is_on(axis, values[axis.key]) for axis in self.axes)

    @property
    def num_corners(self) -> int:
        """Combinations of the choices with the ends of the ranges."""
        return math.prod(len(ends) for ends in self._ends())

    def corners(self) -> list[Point]:
        """What is checked before a trial starts: every value of every axis beside the first values of the others, then
        every combination of choices and ends of ranges, or MAX_CHECKED of them, evenly spread."""
        ends = self._ends()
        shape = [len(values) for values in ends]
        places = [[at if i == j else 0 for j in range(len(ends))] for i, size in enumerate(shape) for at in range(size)]
        num = math.prod(shape)
        checked = min(num, MAX_CHECKED)
        places += [_unravelled(k * num // checked, shape) for k in range(checked)]
        return [
            self.point({key: values[at] for key, values, at in zip(self.keys, ends, place, strict=True)})
            for place in dict.fromkeys(map(tuple, places))
        ]

    def _ends(self) -> list[list[Any]]:
        """Every name of a choice, the lowest and highest number of a range."""
        return [
            list(axis.options)
            if isinstance(axis, Choices)
            else [int(axis.low), int(axis.high)]
            if axis.kind == "randint"
            else [axis.low, axis.high]
            for axis in self.axes
        ]


def _is_on(axis: Axis, value: Any) -> bool:
    if isinstance(axis, Choices):
        return str(value) in axis.options
    return isinstance(value, int | float) and axis.low <= value <= axis.high


def _unravelled(index: int, shape: Sequence[int]) -> list[int]:
    """The place with this number, the last axis the fastest. Python's whole numbers: a space may have any size."""
    place = []
    for size in reversed(shape):
        index, at = divmod(index, size)
        place.append(at)
    return place[::-1]


def _axis(key: str, value: Any) -> Axis:
    where = f"space.{key}"
    if isinstance(value, list | tuple):
        texts = [json.dumps(item) for item in value]
        if not texts:
            raise ValueError(f"{where}=[]: an axis needs at least one value; leave it out to keep the recipe's")
        if len(set(texts)) < len(texts):
            raise ValueError(f"{where}={json.dumps(value)}: a value stands twice")
        return Choices(key, {_label(item): (f"{key}={text}",) for item, text in zip(value, texts, strict=True)})
    if not isinstance(value, Mapping) or len(value) != 1:
        raise ValueError(
            f"{where}={value!r}: give a list of values, {{choices: {{NAME: [key=value, …]}}}}, "
            "{uniform: [low, high]}, {loguniform: [low, high]} or {randint: [low, high]}"
        )
    ((kind, content),) = value.items()
    if kind == "choices":
        if not isinstance(content, Mapping) or not content:
            raise ValueError(f"{where}.choices={content!r}: needs at least one NAME: [key=value, …]")
        for name, overrides in content.items():
            if not isinstance(overrides, list | tuple) or not all(isinstance(text, str) for text in overrides):
                raise ValueError(f"{where}.choices.{name}={overrides!r}: a list of overrides, e.g. [masking.name=kdm]")
        return Choices(key, {str(name): tuple(overrides) for name, overrides in content.items()})
    if kind in ("uniform", "loguniform", "randint"):
        try:
            low, high = (float(number) for number in content)
        except (TypeError, ValueError):
            raise ValueError(f"{where}.{kind}={content!r}: needs two numbers, [low, high]") from None
        if not low < high or (kind == "loguniform" and low <= 0):
            rule = "0 < low < high" if kind == "loguniform" else "low < high"
            raise ValueError(f"{where}.{kind}={content!r}: needs {rule}")
        if kind == "randint" and not (low.is_integer() and high.is_integer()):
            raise ValueError(f"{where}.randint={content!r}: needs whole numbers; for others use uniform or loguniform")
        return Range(key, kind, low, high)
    raise ValueError(f"{where}: unknown kind {kind!r}; known: choices, uniform, loguniform, randint")


def _draw(axis: Axis, share: float) -> Any:
    if isinstance(axis, Range):
        return axis.at(share)
    names = list(axis.options)
    return names[min(int(share * len(names)), len(names) - 1)]


def _label(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A point as a run: its configuration, whose run.dir is RUNS/<name>."""

    point: Point
    config: RunConfig

    @property
    def name(self) -> str:
        """Of the run's folder: its hash (make_trial), or its lineage where it may have begun from another one's
        checkpoint (pbt.py). Equal for equal results, wherever it ran."""
        return self.config.run.dir.rpartition("/")[2]


def distinct(trials: Iterable[Trial]) -> list[Trial]:
    """Each run once: two points of a space, or two arms, may be the same one."""
    return list({trial.name: trial for trial in trials}.values())


def steps_of(trials: Iterable[Trial]) -> int:
    """Optimizer steps of these runs together."""
    return sum(trial.config.train.steps for trial in distinct(trials))


def make_trial(recipe: str | Path, overrides: Sequence[str], point: Point, runs: str) -> Trial:
    """The run of a point. Its name is the run's hash, and a second one over what the point sets and the hash does not
    see, since it changes no weight, though speed or memory (SPEED).

    ValueError that names the point where the recipe can't be so.
    """
    try:
        config = load(RunConfig, recipe, [*overrides, *point.overrides])
    except ValueError as error:
        raise ValueError(f"{point.cell}: {error}") from None
    folder = f"{runs.rstrip('/')}/{run_hash(config)}{_beside_hash(config, point)}"
    return Trial(point=point, config=replace(config, run=replace(config.run, dir=folder)))


def _beside_hash(config: RunConfig, point: Point) -> str:
    keys = tuple(text.partition("=")[0] for text in point.overrides)
    values = {
        key: value
        for key, value, _ in leaves(config)
        if key in SPEED and any(key == k or key.startswith(f"{k}.") for k in keys)
    }
    if not values:
        return ""
    return f"-{hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=2).hexdigest()}"
