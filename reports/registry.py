"""Named makers of tables and figures, in the order of the page."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Source = TypeVar("Source")
Made = TypeVar("Made")


class Registry(dict[str, Callable[[Source], Made]]):
    """Name -> function from what it is made of to what is made."""

    def register(self, name: str) -> Callable[[Callable[[Source], Made]], Callable[[Source], Made]]:
        """Enters the decorated function as ``name``; raises ValueError if that is taken."""

        def enter(function: Callable[[Source], Made]) -> Callable[[Source], Made]:
            if name in self:
                raise ValueError(f"{name!r} is registered twice")
            self[name] = function
            return function

        return enter
