"""A named collection of implementations; an unknown name lists the known ones. No entry points, no import magic."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """Names mapped to classes of one kind ("masking", "objective", ...).

    A module registers its class with `@MASKINGS.register("uniform")`; one explicit import line in the package's
    `__init__` makes it known.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, type[T]] = {}

    def register(self, *names: str) -> Callable[[type[T]], type[T]]:
        """Class decorator: make the class known under each of `names`."""

        def add(cls: type[T]) -> type[T]:
            for name in names:
                assert name not in self._entries, f"{self.kind} {name!r} is registered twice"
                self._entries[name] = cls
            return cls

        return add

    def __getitem__(self, name: str) -> type[T]:
        """The class registered as `name`; ValueError with the known names and the nearest one otherwise."""
        try:
            return self._entries[name]
        except KeyError:
            near = difflib.get_close_matches(name, self._entries, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown {self.kind} {name!r}.{hint} Known: {', '.join(sorted(self._entries))}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))
