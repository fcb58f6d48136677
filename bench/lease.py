"""The lease on a run: which process may write a directory that several machines share.

A file lock is enough on one machine, where the kernel gives it back with the process. Over a shared
directory it may not reach the other machines, or may stay behind when one of them is gone. So each
holder also has a *generation*: a file ``lease-<generation>`` that it alone created (exclusive
creation is atomic on shared file systems, too), with a counter that it raises every few seconds.

- An observer takes the next generation once the counter has stood still for some seconds of the
  observer's own monotonic clock; no two clocks are ever compared.
- The new holder removes the file of the old one. A holder re-reads its file before everything that
  it commits, and stops if the file is gone or no longer its own.

A holder that slept between the look and the commit can still write once, so what it writes must do
no harm: checkpoints carry their step and checksum, and of a deterministic run both processes write
the same bytes (see `bench.replay` on how far the rows of two checkpoints are apart).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LEASE_SECONDS = 60.0
"""A lease whose counter stands still for this long has expired."""
EMPTY_SECONDS = 2.0
"""So has an empty one after this long: its holder died, or found no room, as it took it."""
POLL_SECONDS = 0.2


class LeaseHeldError(RuntimeError):
    """The lease belongs to a process that is alive, as far as can be told."""


class LeaseLostError(RuntimeError):
    """Another process has taken the lease from this one, which must write nothing any more."""


def machine() -> str:
    """This machine since its last start: two processes that name the same share a kernel."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        boot = ""
    return f"{os.uname().nodename}/{boot}"


class Lease:
    """A generation that this process holds."""

    def __init__(self, path: Path, generation: int, *, locked: bool) -> None:
        self.path, self.generation = path, generation
        self._record: dict[str, Any] = {
            "machine": machine(), "pid": os.getpid(), "token": secrets.token_hex(8), "counter": 0,
            "locked": locked,
        }  # fmt: skip

    @classmethod
    def take(cls, folder: Path, *, expires: float | None, locked: bool) -> Lease:
        """The lease on ``folder``, in a new generation.

        ``expires``: seconds for which the counter of another machine's holder must stand still;
        None: that one is never disturbed. ``locked``: this process holds the folder's file lock,
        so no other process of this machine is alive in it.

        Raises LeaseHeldError if the holder is alive or another process was faster, OSError if the
        folder cannot be written.
        """
        found = newest(folder)
        generation, record = found or (0, {"released": True})
        dead = locked and _had_the_lock(record)
        if not (record.get("released") or dead):
            path = _path(folder, generation)
            if locked and expires is not None and not _bytes(path):
                expires = min(expires, EMPTY_SECONDS)
            _watch(path, expires, str(record.get("machine", "another one")))
        lease = cls(_path(folder, generation + 1), generation + 1, locked=locked)
        try:
            with lease.path.open("x", encoding="utf-8") as file:
                file.write(lease._text())
        except FileExistsError:
            raise LeaseHeldError("another process has just taken it") from None
        except OSError:
            lease.path.unlink(missing_ok=True)
            raise
        for number, path in _generations(folder):
            if number > lease.generation:  # taken and taken again since `newest` looked
                lease.path.unlink(missing_ok=True)
                raise LeaseHeldError("another process has just taken it")
            if number < lease.generation:
                path.unlink(missing_ok=True)
        return lease

    def check(self) -> None:
        """Raise LeaseLostError unless the lease is still this process's."""
        # Opening asks the server of a shared directory; listing it may be answered from a cache.
        record = _read(self.path)
        if record is None or record.get("token") != self._record["token"]:
            raise LeaseLostError(
                f"another process has taken over from this one (generation {self.generation} of "
                f"{self.path.parent})"
            )

    def renew(self) -> None:
        """Tell that this process is alive. Raises LeaseLostError if it no longer holds the run."""
        self.check()
        self._record["counter"] += 1
        self._write()

    def release(self) -> None:
        """Let others take the lease at once. If it is lost, or the disk is, nothing is left to do:
        it expires."""
        with contextlib.suppress(LeaseLostError, OSError):
            self.check()
            self._record["released"] = True
            self._write()

    def _text(self) -> str:
        return json.dumps(self._record) + "\n"

    def _write(self) -> None:
        """In place, so that a file which the next holder removed does not come back."""
        try:
            with self.path.open("r+", encoding="utf-8") as file:
                file.write(self._text())
                file.truncate()
        except FileNotFoundError:
            self.check()


def newest(folder: Path) -> tuple[int, dict[str, Any]] | None:
    """The newest generation and its holder's record; None if the folder was never leased."""
    found = max(_generations(folder), default=None)
    return None if found is None else (found[0], _read(found[1]) or {})


def held_elsewhere(folder: Path) -> str:
    """The machine whose process has not released the lease, where this one's file lock does not
    tell of it; or ``""``.

    Whether that process is alive, only watching its counter can tell.
    """
    found = newest(folder)
    if found is None or found[1].get("released") or _had_the_lock(found[1]):
        return ""
    return str(found[1].get("machine", "?")).partition("/")[0]


def _had_the_lock(record: dict[str, Any]) -> bool:
    """Whether the holder is, or was, one of this machine's with its file lock."""
    return record.get("machine") == machine() and bool(record.get("locked", True))


def _watch(
    path: Path, expires: float | None, holder: str, clock: Callable[[], float] = time.monotonic
) -> None:
    """Return once the file has not changed for ``expires`` seconds; LeaseHeldError if it does."""
    holder = holder.partition("/")[0]
    if expires is None:
        raise LeaseHeldError(f"a process on {holder} has it")
    before, started = _bytes(path), clock()
    while clock() - started < expires:
        time.sleep(min(POLL_SECONDS, expires))
        if _bytes(path) != before:
            raise LeaseHeldError(f"a process on {holder} has it and is alive")


def _path(folder: Path, generation: int) -> Path:
    return folder / f"lease-{generation:08d}"


def _generations(folder: Path) -> list[tuple[int, Path]]:
    named = re.compile(r"lease-(\d{8})")
    try:
        paths = list(folder.iterdir())
    except FileNotFoundError:
        return []
    return [(int(m[1]), path) for path in paths if (m := named.fullmatch(path.name))]


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _read(path: Path) -> dict[str, Any] | None:
    """A record; ``{}`` if it is being written, None if it is not there."""
    try:
        record = json.loads(path.read_bytes())
    except OSError:
        return None
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}
