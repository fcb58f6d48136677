"""A directory per run: written atomically, resumed to the byte, read back as tidy frames.

``spec.json`` what the run is and where it ran; ``status.json`` how it stands; ``metrics.csv`` what
it measured, free of wall-clock; ``timing.csv`` what depends on the clock; ``probe/`` arrays for the
figures; ``SHA256SUMS`` of all that, once the run is done (``sha256sum -c`` reads it); ``state/``
checkpoints, replay and lease, not needed once the run is done.

Everything that a later step relies on reaches the disk before that step: metrics and probes before
the checkpoint that counts on them, a file's content before the name that it replaces.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import re
import time
import warnings
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch

from bench.lease import (
    LEASE_SECONDS,
    POLL_SECONDS,
    Lease,
    LeaseHeldError,
    LeaseLostError,
    held_elsewhere,
)
from bench.spec import SCHEMA, RunSpec, SpecError

State = Literal["pending", "running", "interrupted", "failed", "done"]

_FACTS: dict[str, type | tuple[type, ...]] = {
    "step": int, "steps": int, "time": (int, float), "success": (int, float), "error": str,
    "steps_per_second": (int, float), "peak_memory_bytes": int, "parameters": dict,
}  # fmt: skip
"""What a status may tell, as JSON has it."""

METRICS: dict[str, type] = {
    "step": int, "kind": str, "task": str, "metric": str, "value": float, "count": float
}  # fmt: skip
TIMING: dict[str, type] = {"step": int, "section": str, "seconds": float}
"""Columns of a run's files."""
METRICS_HEADER, TIMING_HEADER = (f"{','.join(each)}\n".encode() for each in (METRICS, TIMING))
CHECKPOINTS_KEPT = 2
SUMS = "SHA256SUMS"
LOOK_SECONDS = 0.5
"""How long another process may hold the lock just to see whether the run is held."""


class Row(NamedTuple):
    """One measurement. Success: ``value`` successes in ``count`` episodes; else a mean of count."""

    step: int
    kind: str
    task: str
    metric: str
    value: float
    count: float  # type: ignore[assignment]  # tuple.count is of no use here


RESUMED = ("git_commit", "versions", "hardware")
"""Of a run's environment, what may be another when it is resumed."""


class StoreError(RuntimeError):
    """A run directory that cannot be used as it is."""


class BusyError(StoreError):
    """Another process is training this run."""


class TakenOverError(BusyError):
    """Another process has taken this run over from this one."""


class RunStore:
    """The directory of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state_path = path / "state"
        self.probe_path = path / "probe"
        self.replay_path = self.state_path / "replay.bin"
        self._lease: Lease | None = None

    # --------------------------------------------------------------------------- what it is

    @classmethod
    def create(cls, out: Path, spec: RunSpec, environment: dict[str, Any]) -> RunStore:
        """The directory of ``spec`` below ``out``, made if it does not exist.

        Raises StoreError if it holds another configuration, OSError if it cannot be written.
        """
        store = cls(out / spec.directory)
        if (store.path / "spec.json").exists():
            if conflict := spec.conflict(store.spec()):
                raise StoreError(
                    f"{store.path} holds another configuration ({conflict}); it was edited, or "
                    "written by a version with other defaults, and is left alone"
                )
            return store
        if (store.path / "metrics.csv").exists():
            raise StoreError(
                f"{store.path} has results but no spec.json, which tells where they are from; "
                "restore it from a copy, or delete the folder to train the run anew"
            )
        store.path.mkdir(parents=True, exist_ok=True)
        content = {
            "schema": SCHEMA,
            "spec": spec.model_dump(mode="json"),
            "environment": environment,
        }
        write_atomically(store.path / "spec.json", _json(content))
        return store

    def record_environment(self, environment: dict[str, Any], *, resumed: bool) -> None:
        """Note by what the run is trained from now on: commit, versions, hardware, numerics.

        They need not be those under which it was prepared, perhaps days ago or elsewhere. What is
        ``resumed`` began under what is known; the list of that name in its environment has, oldest
        first, the commits, versions and hardware that it went on under, where they are others."""
        content = self.description()
        known = content.get("environment", {})
        stretches = known.get("resumed", [])
        facts, last = (
            {key: of.get(key) for key in RESUMED} for of in (environment, [known, *stretches][-1])
        )
        now = known
        if not resumed:
            now = environment | {key: known[key] for key in ("command",) if key in known}
        elif facts != last:
            now = known | {"resumed": [*stretches, facts]}
        if now != known:
            self._still_mine()
            write_atomically(self.path / "spec.json", _json(content | {"environment": now}))

    @property
    def numerics(self) -> dict[str, str]:
        """What `bench.machine.numerics` was where the run began; empty before it did."""
        found: dict[str, str] = self.description().get("environment", {}).get("numerics", {})
        return found

    def description(self) -> dict[str, Any]:
        """The content of spec.json. Raises StoreError if it is missing or damaged."""
        try:
            content: dict[str, Any] = json.loads((self.path / "spec.json").read_text("utf-8"))
        except FileNotFoundError:
            raise StoreError(f"{self.path} is not a run directory: it has no spec.json") from None
        except (OSError, ValueError, RecursionError) as error:
            raise StoreError(f"{self.path / 'spec.json'} is damaged: {error}") from None
        schema = content.get("schema") if isinstance(content, dict) else None
        if schema != SCHEMA:
            raise StoreError(
                f"{self.path / 'spec.json'} has schema {schema!r}; this version reads {SCHEMA}"
            )
        return content

    def spec(self) -> RunSpec:
        """The run's specification. Raises StoreError if it cannot be read."""
        try:
            return RunSpec(**self.description()["spec"])
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{self.path / 'spec.json'} cannot be read: {error}") from None

    # ------------------------------------------------------------------------ how it stands

    def status(self) -> dict[str, Any]:
        """The last status written, as far as it can be read; ``{"state": "pending"}`` before the
        first. A run that was sealed is done, whatever became of its status since."""
        try:
            status = json.loads((self.path / "status.json").read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            status = None
        if isinstance(status, dict) and status.get("state") in get_args(State):
            return {k: v for k, v in status.items() if isinstance(v, _FACTS.get(k, object))}
        if not (self.path / SUMS).exists():
            return {"state": "pending"}
        try:
            steps = int(self.description()["spec"]["protocol"]["steps_per_task"])
        except (StoreError, KeyError, TypeError, ValueError):
            return {"state": "done"}
        return {"state": "done", "step": steps, "steps": steps}

    def write_status(self, state: State, **facts: Any) -> None:
        """Replace status.json, and renew the lease of a process that holds the run."""
        self._still_mine(renew=True)
        # A run whose last word is lost with the power is resumed; one that is done must stay so.
        content = _json({"state": state} | facts)
        write_atomically(self.path / "status.json", content, sync=state == "done")

    def finish(self) -> None:
        """Seal what was measured with its checksums; the status may say done after this."""
        for path in self._results():
            self._sync(str(path.relative_to(self.path)))
        lines = [f"{_sha256(path)}  {path.relative_to(self.path)}\n" for path in self._results()]
        self._still_mine()
        write_atomically(self.path / SUMS, "".join(lines).encode())

    def damaged(self) -> list[str] | None:
        """Results that are not as they were when the run was done, each with what is wrong.

        None if the run has no checksums: it is not done, or was recorded before there were any.
        """
        try:
            lines = (self.path / SUMS).read_text("utf-8").splitlines()
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            return [f"{SUMS} cannot be read: {error}"]
        sums: dict[str, str] = {}
        for line in lines:
            found = re.fullmatch(r"([0-9a-f]{64})  (\S+)", line)
            if not found:
                return [f"{SUMS} is damaged: {line[:80]!r}"]
            sums[found[2]] = found[1]
        there = {str(path.relative_to(self.path)): path for path in self._results()}
        problems = [f"{name} is gone" for name in sums if name not in there]
        problems += [f"{name} was added" for name in there if name not in sums]
        return problems + [
            f"{name} was changed"
            for name, path in there.items()
            if name in sums and _sha256(path) != sums[name]
        ]

    def _results(self) -> list[Path]:
        """The files that a report reads."""
        found = [self.path / name for name in ("spec.json", "metrics.csv", "timing.csv")]
        return [path for path in found if path.is_file()] + sorted(self.probe_path.glob("*.npz"))

    @property
    def state_bytes(self) -> int:
        """Disk space that the run's replay and checkpoints take."""
        files = [self.replay_path, *self.checkpoint_files()]
        return sum(512 * path.stat().st_blocks for path in files if path.is_file())

    def drop_replay(self) -> None:
        """Give back the replay's disk space; a finished run is never resumed."""
        self.replay_path.unlink(missing_ok=True)

    @property
    def recorded(self) -> int:
        """Steps per task up to which all that was measured is there for good."""
        if self.done:
            return self.spec().protocol.steps_per_task
        newest = self.checkpoint_files()[:1]
        return int(newest[0].name.split("-")[1]) if newest else 0

    def log_length(self) -> int:
        """Bytes that the run's processes have logged. Raises OSError if they could not."""
        with (self.path / "log.txt").open("ab") as log:
            return log.tell()

    def log_since(self, start: int) -> str:
        """What was logged after the first ``start`` bytes."""
        try:
            with (self.path / "log.txt").open("rb") as log:
                log.seek(start)
                return log.read().decode(errors="replace")
        except OSError:
            return ""

    @property
    def done(self) -> bool:
        """Whether the run was trained to its end."""
        return self.status().get("state") == "done"

    @contextmanager
    def locked(
        self, *, expires: float | None = LEASE_SECONDS, wait: float = LOOK_SECONDS
    ) -> Iterator[None]:
        """Hold the run for this process, on this machine by the kernel's lock, which ends however
        the process ends, and between machines by a lease (see `bench.lease`).

        ``expires``: seconds after which a silent holder on another machine counts as dead; None:
        never. ``wait``: seconds to wait for a process that is alive to end. Raises BusyError if
        another process holds the run; TakenOverError is raised within, by whatever writes, once
        another process has taken over.
        """
        self.state_path.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + wait
        with (self.state_path / "lock").open("a") as file:
            while True:
                try:
                    locked = self._lock(file.fileno())
                    lease = Lease.take(self.state_path, expires=expires, locked=locked)
                    break
                except LeaseHeldError as error:
                    if time.monotonic() >= deadline:
                        raise BusyError(
                            f"{self.path} is being trained by another process: {error}"
                        ) from None
                    time.sleep(min(POLL_SECONDS, wait))
            self._lease = lease
            (self.state_path / "stop").unlink(missing_ok=True)
            try:
                yield
            finally:
                self._lease = None
                lease.release()

    def _lock(self, descriptor: int) -> bool:
        """Take the file lock; False if the file system has none. Raises LeaseHeldError if another
        process of this machine has it; over NFS one elsewhere may, and there its lease decides."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if self.elsewhere:
                return False
            raise LeaseHeldError("one of this machine has it") from None
        except OSError:
            return False
        return True

    @property
    def held(self) -> bool:
        """Whether this process holds the run."""
        return self._lease is not None

    @property
    def busy(self) -> bool:
        """Whether a process of this machine holds the run."""
        try:
            file = (self.state_path / "lock").open()
        except OSError:
            return False
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return not self.elsewhere
            except OSError:
                pass
        return False

    @property
    def elsewhere(self) -> str:
        """The other machine that holds the run, dead or alive, or ``""``."""
        return held_elsewhere(self.state_path)

    def _still_mine(self, *, renew: bool = False) -> None:
        """Raise TakenOverError if this process held the run and another has taken over."""
        if self._lease:
            try:
                self._lease.renew() if renew else self._lease.check()
            except LeaseLostError as error:
                raise TakenOverError(str(error)) from None

    def ask_to_stop(self) -> None:
        """Ask the process that trains the run, wherever it is, to save and end."""
        self.state_path.mkdir(exist_ok=True)
        (self.state_path / "stop").touch()

    @property
    def asked_to_stop(self) -> bool:
        """Whether somebody asked since the run was last taken."""
        return (self.state_path / "stop").exists()

    # --------------------------------------------------------------------- what it measured

    def append_metrics(self, rows: Iterable[Row]) -> None:
        """Append rows to metrics.csv."""
        lines = (
            f"{r.step},{r.kind},{r.task},{r.metric},{r.value:.9g},{r.count:.9g}\n" for r in rows
        )
        self._append("metrics.csv", METRICS_HEADER, "".join(lines))

    def append_timing(self, step: int, seconds: dict[str, float]) -> None:
        """Append cumulative seconds per section to timing.csv."""
        lines = (f"{step},{section},{value:.3f}\n" for section, value in seconds.items())
        self._append("timing.csv", TIMING_HEADER, "".join(lines))

    def _append(self, name: str, header: bytes, text: str) -> None:
        path = self.path / name
        self._still_mine()
        with naming(path), path.open("ab") as file:
            file.write((header if file.tell() == 0 else b"") + text.encode())

    def _sync(self, name: str) -> int:
        """Bring a file to the disk; its length."""
        path = self.path / name
        self._still_mine()
        with naming(path), path.open("ab") as file:
            os.fsync(file.fileno())
            return file.tell()

    def write_probe(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        """Replace probe/``name``.npz; equal arrays give equal bytes."""
        if not arrays:
            return
        self._still_mine()
        self.probe_path.mkdir(exist_ok=True)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **arrays)
        write_atomically(self.probe_path / f"{name}.npz", buffer.getvalue())

    # --------------------------------------------------------------------------- checkpoints

    def save_checkpoint(self, step: int, content: dict[str, Any]) -> int:
        """Commit a checkpoint and drop all but the newest two; returns its size in bytes.

        What was measured so far is part of it by its checksums, the replay by its length. The
        file's name carries the checkpoint's own checksum.
        """
        lengths = {name: self._sync(name) for name in ("metrics.csv", "timing.csv")}
        sums = {name: _crc32(self.path / name, length) for name, length in lengths.items()}
        for probe in self.probe_path.glob("*.npz"):
            sums[f"probe/{probe.name}"] = _crc32(probe)
        lengths["state/replay.bin"] = _length(self.replay_path)
        buffer = io.BytesIO()
        torch.save({"step": step, "lengths": lengths, "sums": sums, "content": content}, buffer)
        data = buffer.getbuffer()
        name = f"checkpoint-{step:010d}-{zlib.crc32(data):08x}.pt"
        self._still_mine()
        write_atomically(self.state_path / name, data)
        for old in self.checkpoint_files()[CHECKPOINTS_KEPT:]:
            old.unlink(missing_ok=True)
        return len(data)

    def load_checkpoint(self) -> tuple[int, dict[str, Any]] | None:
        """The newest checkpoint that is whole, as (step, content); None if there is none.

        Warns about damaged ones. Loads tensors and plain values only, never code.
        """
        for path in self.checkpoint_files():
            if loaded := _read_checkpoint(path):
                return loaded["step"], loaded["content"]
        return None

    def resume(self) -> tuple[int, dict[str, Any]] | None:
        """Go back to the newest checkpoint that the run can continue from; None: start anew.

        Whatever was written after it is cut off. Newer ones that cannot be used are renamed. For
        the process that holds the run alone. Raises StoreError, and changes nothing, if there are
        checkpoints but none can be used.
        """
        found = self.checkpoint_files()
        for number, path in enumerate(found):
            loaded = _read_checkpoint(path)
            if loaded is None:
                continue
            if short := [n for n, old in loaded["lengths"].items() if _length(self.path / n) < old]:
                _warn_skipped(path, f"{' and '.join(short)} lost what it had written by then")
                continue
            if changed := [
                name
                for name, sum_ in loaded["sums"].items()
                if _crc32(self.path / name, loaded["lengths"].get(name)) != sum_
            ]:
                _warn_skipped(path, f"{' and '.join(changed)} changed since")
                continue
            for unusable in found[:number]:
                unusable.replace(unusable.with_name(f"{unusable.name}.damaged"))
            self._cut_back(loaded["step"], loaded["lengths"])
            return loaded["step"], loaded["content"]
        if found:
            raise StoreError(
                f"none of the {len(found)} checkpoints in {self.state_path} can be used (see the "
                "warnings); restore the files, or delete that folder to train the run anew"
            )
        if (self.path / SUMS).exists():
            raise StoreError(
                f"{self.path} was trained to its end, but neither its status nor a checkpoint says "
                "so; it is left alone: delete the folder to train the run anew"
            )
        self._cut_back(-1, {"metrics.csv": 0, "timing.csv": 0})
        self.replay_path.unlink(missing_ok=True)
        return None

    def _cut_back(self, step: int, lengths: dict[str, int]) -> None:
        """Forget what was measured after ``step``."""
        self._still_mine()
        (self.path / SUMS).unlink(missing_ok=True)
        for name in ("metrics.csv", "timing.csv"):
            if (self.path / name).exists():
                os.truncate(self.path / name, lengths[name])
        for probe in self.probe_path.glob("*.npz"):
            if not probe.stem.isdigit() or int(probe.stem) > step:
                probe.unlink()
        for leftover in self.path.rglob("*.tmp"):
            leftover.unlink(missing_ok=True)

    def checkpoint_steps(self) -> list[int]:
        """Steps of the checkpoints that are whole, newest first. Warns about damaged ones."""
        loaded = (_read_checkpoint(path) for path in self.checkpoint_files())
        return [content["step"] for content in loaded if content]

    def leftovers(self) -> list[Path]:
        """What interrupted writes and damage have left behind; nobody reads it."""
        found = [*self.path.rglob("*.tmp"), *self.state_path.glob("checkpoint-*.damaged")]
        return sorted(found + [self.replay_path] * (self.done and self.replay_path.exists()))

    def checkpoint_files(self) -> list[Path]:
        """Checkpoint files, newest first."""
        named = re.compile(r"checkpoint-\d{10}-[0-9a-f]{8}\.pt")
        found = self.state_path.glob("checkpoint-*.pt") if self.state_path.exists() else []
        return sorted((p for p in found if named.fullmatch(p.name)), reverse=True)


_CHECKPOINT = {"step": int, "lengths": dict, "sums": dict, "content": dict}


def _read_checkpoint(path: Path) -> dict[str, Any] | None:
    """A checkpoint file's content; None, after a warning, if it is damaged."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:  # the training process has just replaced it by a newer one
        return None
    if f"{zlib.crc32(data):08x}" != path.stem.rpartition("-")[2]:
        _warn_skipped(path, "its checksum does not match")
        return None
    try:
        loaded: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        # Those of version 0.1 had no checksums of what was measured.
        loaded = {"sums": {}} | {key: loaded[key] for key in loaded if key in _CHECKPOINT}
        if not all(isinstance(loaded[key], kind) for key, kind in _CHECKPOINT.items()):
            raise TypeError("it holds something else")
    except Exception as error:  # noqa: BLE001  (torch raises many kinds on a file that is none)
        # Only what went wrong: torch goes on with advice on loading files without its safeguards.
        reason = str(error).partition("\n")[0].partition(". ")[0]
        _warn_skipped(path, f"{type(error).__name__}: {reason}")
        return None
    return loaded


def _warn_skipped(path: Path, why: str) -> None:
    warnings.warn(f"skipping the damaged checkpoint {path}: {why}", RuntimeWarning, stacklevel=3)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _crc32(path: Path, length: int | None = None) -> int | None:
    """Of the file's first ``length`` bytes; None if it cannot be read."""
    try:
        return zlib.crc32(memoryview(path.read_bytes())[:length])
    except OSError:
        return None


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def find(out: Path, pattern: str = "") -> list[RunStore]:
    """Run directories below ``out`` whose path contains ``pattern``, in order."""
    if not out.is_dir():
        return []
    paths = sorted(_run_paths(out))
    return [RunStore(path) for path in paths if pattern in str(path.relative_to(out))]


def _run_paths(out: Path) -> Iterator[Path]:
    """Folders of runs, be they damaged, also behind links: a part of a sweep on another disk."""
    for folder, folders, files in walk(out):
        if {"spec.json", "status.json"} & {*files, *folders}:
            yield Path(folder)
            folders.clear()


def walk(out: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """As os.walk, also behind links, each folder once however many lead to it."""
    seen = set()
    for folder, folders, files in os.walk(out, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        yield folder, folders, files


def open_run(out: Path, run: str) -> RunStore:
    """The one run that ``run`` names: a path, or part of one below ``out``.

    Raises SpecError if no run or more than one fits.
    """
    with suppress(OSError):  # of a name too long for a file
        if any((Path(run) / name).exists() for name in ("spec.json", "status.json")):
            return RunStore(Path(run))
    found = find(out, run)
    if len(found) == 1:
        return found[0]
    if not found:
        there = _listed(find(out), out)
        raise SpecError(f"no run named {run!r} below {out}; there are: {there or 'none'}")
    raise SpecError(f"{run!r} names {len(found)} runs below {out}: {_listed(found, out)}")


def _listed(stores: list[RunStore], out: Path) -> str:
    names = [str(store.path.relative_to(out)) for store in stores]
    return ", ".join(names[:5]) + (f", and {len(names) - 5} more" if len(names) > 5 else "")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of writing name the file: a full disk's do not by themselves."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_atomically(path: Path, data: bytes | memoryview, *, sync: bool = True) -> None:
    """Replace ``path`` by ``data``: it holds the old content or the new, never a part."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path), partial.open("wb") as file:
            file.write(data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if sync:
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=False) + "\n").encode()
