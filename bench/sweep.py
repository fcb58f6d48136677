"""A sweep: expand what was asked for into runs, skip what is done, train the rest side by side."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from bench import machine
from bench.spec import RunSpec, SpecError, parse_seeds
from bench.speed import Cost
from bench.store import RunStore, StoreError
from bench.train import EXIT_BUSY, EXIT_INTERRUPTED
from suites.base import unknown

POLL_SECONDS = 0.25
FULL_DISK_BYTES = 1_000_000
"""A disk with less free space than this is full."""


# --------------------------------------------------------------------------------- what to run


@dataclass(frozen=True)
class Request:
    """A product of algorithms, suites and seeds under one preset."""

    algorithms: Sequence[str]
    suites: Sequence[str]
    seeds: Sequence[int]
    preset: str
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def expand(self) -> tuple[list[RunSpec], list[str]]:
        """The runs, seed by seed so that all algorithms advance together, and what is wrong."""
        specs, problems = [], []
        for key in self.overrides:
            owner, dot, _ = key.rpartition(".")
            if dot and owner not in {name.partition("@")[0] for name in self.algorithms}:
                problems.append(
                    f"--set {key}: no algorithm {owner!r} in this sweep "
                    f"({', '.join(self.algorithms)})"
                )
        for suite in self.suites:
            for algorithm in self.algorithms:
                try:
                    first = RunSpec.resolve(
                        algorithm, suite, self.seeds[0],
                        preset_name=self.preset, overrides=self.overrides,
                    )  # fmt: skip
                except SpecError as error:
                    problems.append(str(error))
                    continue
                specs += [first, *(first.with_seed(seed) for seed in self.seeds[1:])]
        order = {seed: rank for rank, seed in enumerate(self.seeds)}
        return sorted(specs, key=lambda spec: order[spec.seed]), problems


def expand(requests: Iterable[Request]) -> list[RunSpec]:
    """All runs of the requests, each once. Raises SpecError with everything that is wrong."""
    specs: dict[str, RunSpec] = {}
    problems: list[str] = []
    for request in requests:
        found, wrong = request.expand()
        problems += [problem for problem in wrong if problem not in problems]
        for spec in found:
            specs.setdefault(spec.id, spec)
    if problems:
        raise SpecError("\n".join(problems))
    return list(specs.values())


_GRID_KEYS = ("description", "algos", "suite", "seeds", "preset", "set", "runs")


def read_grid(
    path: Path,
    *,
    algos: str | None = None,
    suite: str | None = None,
    seeds: str | None = None,
    preset: str | None = None,
) -> list[Request]:
    """The requests of a TOML grid: ``algos``, ``suite``, ``seeds``, ``preset`` and a table ``set``
    at the top, refined in each ``[[runs]]``. What is given here wins over both.

    Raises SpecError with all errors of the file at once.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"cannot read the grid {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} is not TOML: {error}") from None
    given = {"algos": algos, "suite": suite, "seeds": seeds, "preset": preset}
    problems: list[str] = []
    requests = []
    for number, entry in enumerate(data.get("runs", [{}]), start=1):
        place = f"{path}, runs[{number}]" if "runs" in data else str(path)
        if not isinstance(entry, dict):
            problems.append(f"{place}: expected a table")
            continue
        problems += [
            f"{place}: " + unknown("key", key, _GRID_KEYS)
            for key in (*data, *entry)
            if key not in _GRID_KEYS
        ]
        if wrong := [t for t in (data, entry) if not isinstance(t.get("set", {}), dict)]:
            problems.append(
                f"{place}: set={wrong[0]['set']!r} is no table; write set = {{ gamma = 0.98 }}"
            )
            continue
        merged = {"preset": "cpu"} | data | entry
        merged["set"] = data.get("set", {}) | entry.get("set", {})
        merged |= {key: value for key, value in given.items() if value is not None}
        missing = [key for key in ("algos", "suite", "seeds") if not merged.get(key)]
        if missing:
            problems.append(f"{place}: {', '.join(missing)} missing")
            continue
        try:
            seeds = merged["seeds"]
            requests.append(
                Request(
                    algorithms=_words(merged["algos"], place, "algos"),
                    suites=_words(merged["suite"], place, "suite"),
                    seeds=parse_seeds(
                        ",".join(f"{seed}-{seed}" for seed in seeds)
                        if isinstance(seeds, list)
                        else str(seeds)
                    ),
                    preset=str(merged["preset"]),
                    overrides=_flatten(merged["set"]),
                )
            )
        except SpecError as error:
            problems.append(f"{place}: {error}")
    if problems:
        raise SpecError("\n".join(dict.fromkeys(problems)))
    return requests


def ablations() -> dict[str, dict[str, Any]]:
    """The shipped ablations: name -> description, paper, algorithms to compare, and where it has
    one of its own, suite and values (``set``)."""
    text = files("bench").joinpath("grids", "ablations.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def _flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """``[set.mega] start_stage = 4`` as ``mega.start_stage``."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": content for inner, content in value.items()}
        else:
            flat[key] = value
    return flat


def _words(value: Any, place: str, key: str) -> list[str]:
    words = value.split(",") if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise SpecError(f"{place}: {key}={value!r} is neither a name nor a list of names")
    return names(",".join(words), key)


def names(text: str, what: str) -> list[str]:
    """Comma-separated names. Raises SpecError on none or on one named twice."""
    found = [word.strip() for word in text.split(",") if word.strip()]
    if not found:
        raise SpecError(f"{what}: nothing named")
    for name in found:
        if found.count(name) > 1:
            raise SpecError(f"{what}: {name!r} is named twice")
    return found


# ------------------------------------------------------------------------------ how it is done


@dataclass
class Job:
    """A run of the sweep and how it ended."""

    spec: RunSpec
    store: RunStore
    process: subprocess.Popen[bytes] | None = None
    outcome: str = "pending"
    """pending | running | done | failed | interrupted | busy | skipped (was done before)."""
    error: str = ""
    warnings: list[str] = field(default_factory=list)
    """What its process warned of, in the log."""
    log_start: int = 0
    """Where in the log this process began."""


class LocalLauncher:
    """Runs as processes of this machine, so many at a time, one thread each."""

    def __init__(
        self, *, workers: int, device: str, threads: int, allow_other_numerics: bool = False
    ) -> None:
        self.workers, self.device, self.threads = workers, device, threads
        self.allow_other_numerics = allow_other_numerics
        self._signals = 0

    def run(self, jobs: Sequence[Job], notice: Callable[[Job | None], None]) -> None:
        """Train all jobs; ``notice(job)`` on each change of a job, ``notice(None)`` in between.

        SIGINT and SIGTERM stop it: runs save at the end of their episodes, a second signal ends
        them at once. Jobs not started stay pending.
        """
        waiting = [job for job in jobs if job.outcome == "pending"]
        running: list[Job] = []
        previous = {
            number: signal.signal(number, self._on_signal)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        passed_on = 0
        try:
            while running or (waiting and not self._signals):
                while waiting and len(running) < self.workers and not self._signals:
                    job = waiting.pop(0)
                    self._start(job)
                    if job.process is not None:
                        running.append(job)
                    notice(job)
                if passed_on < self._signals:
                    passed_on = self._signals
                    for job in running:
                        assert job.process is not None
                        job.process.send_signal(signal.SIGINT)
                time.sleep(POLL_SECONDS)
                for job in [j for j in running if j.process and j.process.poll() is not None]:
                    self._ended(job)
                    running.remove(job)
                    notice(job)
                notice(None)
        finally:
            for job in running:
                if job.process is not None:
                    job.process.terminate()
            for number, handler in previous.items():
                signal.signal(number, handler)

    @property
    def interrupted(self) -> bool:
        """Whether a signal asked the sweep to stop."""
        return self._signals > 0

    def _on_signal(self, number: int, frame: object) -> None:
        self._signals += 1

    def _start(self, job: Job) -> None:
        try:
            log = (job.store.path / "log.txt").open("ab")
            job.log_start = log.tell()
        except OSError as error:
            job.outcome, job.error = "failed", f"cannot write {job.store.path}: {error.strerror}"
            return
        command = [
            sys.executable, "-m", "bench.train", str(job.store.path),
            "--device", self.device, "--threads", str(self.threads),
        ]  # fmt: skip
        if self.allow_other_numerics:
            command.append("--allow-other-numerics")
        # Linear algebra libraries read their thread counts before torch is told its own.
        limits = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        with log:
            job.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env=os.environ | limits, start_new_session=True,
            )  # fmt: skip
        job.outcome = "running"

    def _ended(self, job: Job) -> None:
        assert job.process is not None
        code = job.process.returncode
        job.warnings = _warnings(job)
        if code == 0:
            job.outcome = "done"
        elif code == EXIT_INTERRUPTED or (
            self._signals and code in (-signal.SIGINT, -signal.SIGTERM)
        ):
            job.outcome = "interrupted"
        elif code == EXIT_BUSY:
            job.outcome = "busy"
        else:
            job.outcome = "failed"
            status = job.store.status()
            if code < 0:
                name = signal.Signals(-code).name
                job.error = f"the process was killed by {name}" + (
                    " (out of memory?)" if name == "SIGKILL" else ""
                )
                facts = {key: value for key, value in status.items() if key != "state"}
                job.store.write_status("failed", **(facts | {"error": job.error}))
            else:
                job.error = str(status.get("error") or f"exit code {code}, see log.txt")
                if (free := shutil.disk_usage(job.store.path).free) < FULL_DISK_BYTES:
                    # Neither status nor log may have found room for the reason.
                    job.error = f"the disk of {job.store.path} is full ({size(free)} free)"


def _warnings(job: Job) -> list[str]:
    """The warnings in what this process has logged."""
    try:
        with (job.store.path / "log.txt").open("rb") as log:
            log.seek(job.log_start)
            lines = log.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    found = (line.partition("RuntimeWarning: ")[2] for line in lines)
    return [warning for warning in found if warning]


def size(count: float) -> str:
    """Bytes in words."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def plan(specs: Sequence[RunSpec], out: Path) -> list[Job]:
    """A job for each run, without touching the disk; finished ones are marked skipped."""
    jobs = []
    for spec in specs:
        job = Job(spec, RunStore(out / spec.directory))
        if job.store.done:
            job.outcome = "skipped"
        elif job.store.busy:
            job.outcome = "busy"
        jobs.append(job)
    return jobs


def prepare(specs: Sequence[RunSpec], out: Path, *, device: str, threads: int) -> list[Job]:
    """`plan`, and a directory for each run.

    Raises StoreError or OSError if a directory cannot be used.
    """
    environment = machine.environment(device, threads)
    for spec in specs:
        RunStore.create(out, spec, environment)
    return plan(specs, out)


def check_room(out: Path, costs: Mapping[str, Cost], jobs: Sequence[Job], workers: int) -> str:
    """Why the disk cannot hold the sweep, or ``""``."""
    open_jobs = [job for job in jobs if job.outcome == "pending"]
    largest = sorted((costs[group(j.spec)].working_bytes for j in open_jobs), reverse=True)
    at_once = largest[:workers]
    needed, free = sum(at_once), shutil.disk_usage(out).free
    if needed <= free:
        return ""
    return (
        f"{out} has {size(free)} free, {len(at_once)} runs at a time need {size(needed)}; "
        "use fewer --workers, a smaller replay_per_task, or another --out"
    )


def group(spec: RunSpec) -> str:
    """Runs of one group cost the same: all but the seed is equal."""
    return f"{spec.suite} {spec.title} {spec.preset}"


def writable(out: Path) -> None:
    """Make the output directory. Raises StoreError if nothing can be written there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".write-test-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise StoreError(f"cannot write to --out {out}: {error.strerror or error}") from None
