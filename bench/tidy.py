"""Disk space: what can go without loss, and what goes first when a budget is spent."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from bench.store import RunStore, find, walk


class Removal(NamedTuple):
    """A file that can go, and what is lost with it."""

    path: Path
    size: int
    why: str
    modified: float
    """Seconds since the epoch."""


def removable(stores: Iterable[RunStore], *, checkpoints: bool = False) -> list[Removal]:
    """What nobody reads any more: leavings of interrupted writes, replays and older checkpoints of
    finished runs; with ``checkpoints`` their last ones, too, which only `bench eval` reads.

    Runs that a process holds, here or on another machine, are left alone; so are the checkpoints of
    all that are not finished.
    """
    found: list[Removal] = []
    for store in stores:
        if store.busy or store.elsewhere:
            continue
        files = [(path, "left behind by an interrupted write") for path in store.leftovers()]
        if store.done:
            kept = store.checkpoint_files()
            files += [(path, "older checkpoint of a finished run") for path in kept[1:]]
            if checkpoints:
                files += [(path, "last checkpoint of a finished run") for path in kept[:1]]
        for path, why in files:
            with suppress(FileNotFoundError):  # a run has begun, or somebody else cleans, too
                facts = path.stat()
                found.append(Removal(path, facts.st_size, why, facts.st_mtime))
    return found


def remove(removals: Iterable[Removal]) -> int:
    """Remove the files; the bytes given back."""
    freed = 0
    for removal in removals:
        removal.path.unlink(missing_ok=True)
        freed += removal.size
    return freed


def used(out: Path) -> int:
    """Bytes of all files below ``out``, through links as runs are found."""
    total = 0
    for folder, _, names in walk(out):
        for name in names:
            with suppress(FileNotFoundError):  # a run has just replaced it
                total += (Path(folder) / name).stat().st_size
    return total


def keep_within(out: Path, budget: int) -> list[Removal]:
    """Thin the checkpoints below ``out`` until it holds ``budget`` bytes at most, if that can be:
    first what nobody reads, then last checkpoints of finished runs, longest finished first.

    What was removed; results and runs under way are never touched.
    """
    excess = used(out) - budget
    if excess <= 0:
        return []
    stores = find(out)
    first = removable(stores)
    last = sorted(set(removable(stores, checkpoints=True)) - set(first), key=lambda r: r.modified)
    chosen: list[Removal] = []
    for removal in [*first, *last]:
        if excess <= 0:
            break
        chosen.append(removal)
        excess -= removal.size
    remove(chosen)
    return chosen
