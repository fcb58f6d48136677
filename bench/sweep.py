"""A sweep: expand what was asked for into runs, skip what is done, train the rest side by side."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import signal
import subprocess
import time
import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import algorithms
from bench.launch import Exit, Handle, Launcher, Order
from bench.spec import (
    MAX_SEEDS,
    Protocol,
    RunSpec,
    SpecError,
    once,
    parse_seeds,
    preset_names,
)
from bench.speed import Cost
from bench.store import RunStore, StoreError
from bench.train import EXIT_BUSY, EXIT_INTERRUPTED
from suites.base import unknown

POLL_SECONDS = 0.25
FULL_DISK_BYTES = 1_000_000
"""A disk with less free space than this is full."""
NOTIFY_SECONDS = 60.0
DEAD_SECONDS = 15.0
"""The process of a run that its launcher says has ended gives no sign of life for this long."""
CLERKS = 64
"""Threads that wait for that."""


# --------------------------------------------------------------------------------- what to run


@dataclass(frozen=True)
class Request:
    """A product of algorithms, suites and seeds under one preset."""

    algorithms: Sequence[str]
    suites: Sequence[str]
    seeds: Sequence[int]
    preset: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    place: str = ""
    """Where it was asked for, for messages."""

    shared: Collection[str] = ()
    """Keys of ``overrides`` that stand over several requests; each must concern one of them."""

    @property
    def owners(self) -> set[str]:
        """The algorithms, without variants."""
        return {name.partition("@")[0] for name in self.algorithms}

    def expand(self, sweep: Collection[str] = ()) -> tuple[list[RunSpec], list[Mistake]]:
        """The runs, seed by seed so that all algorithms advance together, and what is wrong.

        ``sweep``: the algorithms of all requests together.
        """
        specs: list[RunSpec] = []
        mistakes = []
        owners = self.owners
        for key in self.overrides:
            owner, dot, _ = key.rpartition(".")
            if dot and owner not in (owners | set(sweep) if key in self.shared else owners):
                known = ", ".join(self.algorithms)
                problem = f"{'set' if self.place else '--set'} {key}: "
                if owner in Protocol.model_fields:
                    problem += f"{owner} is a value and no table"
                else:
                    problem += f"no algorithm {owner!r} in this sweep ({known})"
                mistakes.append(Mistake(self.place, problem))
        overrides = {
            key: value
            for key, value in self.overrides.items()
            if "." not in key or key.rpartition(".")[0] in owners
        }
        for suite in self.suites:
            for algorithm in self.algorithms:
                try:
                    first = RunSpec.resolve(
                        algorithm, suite, self.seeds[0],
                        preset_name=self.preset, overrides=overrides,
                    )  # fmt: skip
                except SpecError as error:
                    mistakes += [
                        Mistake(self.place, line, algorithm.partition("@")[0])
                        for line in str(error).splitlines()
                    ]
                    continue
                specs += [first, *(first.with_seed(seed) for seed in self.seeds[1:])]
        order = {seed: rank for rank, seed in enumerate(self.seeds)}
        return sorted(specs, key=lambda spec: order[spec.seed]), mistakes


class Mistake(NamedTuple):
    """Something wrong with a request."""

    place: str
    problem: str
    algorithm: str = ""
    """For which it was found."""


def told(mistakes: Iterable[Mistake]) -> str:
    """The mistakes, a line each; one that was found for several algorithms or places is told once
    with all of them."""
    found: dict[tuple[str, bool], tuple[dict[str, None], dict[str, None]]] = {}
    for place, problem, algorithm in mistakes:
        own = problem.removeprefix(f"{algorithm}: ")
        of_algorithm = own != problem
        if of_algorithm:
            # Which fields there are differs between algorithms; that this is none does not.
            own = re.sub(r" \(allowed: .*", "", own) if own.startswith("unknown field") else own
        names, places = found.setdefault((own, of_algorithm), ({}, {}))
        names.setdefault(algorithm)
        places.setdefault(place)
    lines = []
    for (problem, of_algorithm), (names, places) in found.items():
        where = ", ".join(place for place in places if place)
        who = ", ".join(names) if of_algorithm else ""
        hint = f" (bench show {next(iter(names))} lists them)" * problem.startswith("unknown field")
        lines.append(": ".join(part for part in (where, who, problem + hint) if part))
    return "\n".join(lines)


def expand(requests: Iterable[Request], mistakes: Iterable[Mistake] = ()) -> list[RunSpec]:
    """All runs of the requests, each once. Raises SpecError with everything that is wrong, what was
    found before (``mistakes``) included."""
    specs: dict[str, RunSpec] = {}
    mistakes, requests = list(mistakes), list(requests)
    sweep = {owner for request in requests for owner in request.owners}
    for request in requests:
        found, wrong = request.expand(sweep)
        mistakes += wrong
        for spec in found:
            specs.setdefault(spec.id, spec)
    if mistakes:
        raise SpecError(told(mistakes))
    return list(specs.values())


_GRID_KEYS = ("description", "algos", "suite", "seeds", "preset", "set", "runs")


def read_grid(
    path: Path,
    *,
    algos: str | None = None,
    suite: str | None = None,
    seeds: str | None = None,
    preset: str | None = None,
) -> tuple[list[Request], list[Mistake]]:
    """The requests of a TOML grid: ``algos``, ``suite``, ``seeds``, ``preset`` and a table ``set``
    at the top, refined in each ``[[runs]]``. What is given here wins over both.

    What is wrong comes with it, for `expand` to tell together with what the requests have wrong.
    Raises SpecError if the file cannot be read at all.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise SpecError(f"cannot read the grid {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # also of a number of thousands of digits
        raise SpecError(f"{path} is not TOML: {error}") from None
    given = {"algos": algos, "suite": suite, "seeds": seeds, "preset": preset}
    given = {key: value for key, value in given.items() if value is not None}
    entries = data.pop("runs", None)
    requests, mistakes = [], _strange_keys(data, str(path))
    if not isinstance(words := data.get("description", ""), str):
        mistakes.append(Mistake(str(path), f"description={words!r}: expected text"))
    if not (entries is None or (isinstance(entries, list) and entries)):
        problem = f"runs={entries!r}: expected tables, each under [[runs]]"
        return [], [*mistakes, Mistake(str(path), problem)]
    for number, entry in enumerate([{}] if entries is None else entries, start=1):
        place = str(path) if entries is None else f"{path}, runs[{number}]"
        if not isinstance(entry, dict):
            mistakes.append(Mistake(place, f"{entry!r}: expected a table"))
            continue
        mistakes += _strange_keys(entry, place)
        request, wrong = _read_request({"preset": "cpu"} | data | entry | given, data, entry, place)
        mistakes += wrong
        requests += [request] if request else []
    return requests, mistakes


def read_options(
    algos: str, suite: str, seeds: str, preset: str
) -> tuple[list[Request], list[Mistake]]:
    """The request of a command line's options; what is wrong comes with it, as in `read_grid`."""
    options = {"algos": algos, "suite": suite, "seeds": seeds, "preset": preset}
    request, mistakes = _read_request(options, {}, {}, "")
    return ([request] if request else []), mistakes


def _strange_keys(table: Mapping[str, Any], place: str) -> list[Mistake]:
    return [
        Mistake(place, unknown("key", key, _GRID_KEYS)) for key in table if key not in _GRID_KEYS
    ]


def _read_request(
    merged: Mapping[str, Any], top: Mapping[str, Any], entry: Mapping[str, Any], place: str
) -> tuple[Request | None, list[Mistake]]:
    """The request of one entry of a grid, as far as it can be read, and what is wrong with it."""
    mistakes: list[Mistake] = []

    def read(key: str, what: Callable[[Any], Any], otherwise: Any) -> Any:
        if merged.get(key) is None:
            mistakes.append(Mistake(place, f"{key} missing"))
            return otherwise
        try:
            return what(merged[key])
        except SpecError as error:
            mistakes.append(Mistake(place, str(error)))
            return otherwise

    tables = [table.get("set", {}) for table in (top, entry)]
    for table in tables:
        if not isinstance(table, dict):
            problem = f"set={table!r} is not a table; write set = {{ gamma = 0.98 }}"
            mistakes.append(Mistake(place, problem))
    overrides = [_flatten(table) for table in tables if isinstance(table, dict)]
    algorithms = read("algos", lambda value: _words(value, "algos"), [])
    suites = read("suite", lambda value: _words(value, "suite"), [])
    # What is read in place of a mistake lets the rest be judged; there is no sweep in the end.
    request = Request(
        algorithms=algorithms,
        suites=suites or ["toy"],
        seeds=read("seeds", _seeds, [0]),
        preset=read("preset", _preset, "cpu"),
        overrides=overrides[0] | overrides[-1] if overrides else {},
        place=place,
        shared=overrides[0].keys() - overrides[-1].keys() if overrides else (),
    )
    return (request if request.algorithms else None), mistakes


def _seeds(value: Any) -> list[int]:
    if isinstance(value, list):
        wrong = [seed for seed in value if type(seed) is not int or seed < 0]
        if wrong or not value:
            raise SpecError(f"seeds={value!r}: {', '.join(map(repr, wrong)) or 'nothing'} "
                            "is not a seed; write numbers from 0 up, such as [3, 7]")  # fmt: skip
        if len(value) > MAX_SEEDS:
            raise SpecError(f"seeds: {len(value)} are named, at most {MAX_SEEDS} are allowed")
        return once(value, f"seeds={value!r}")
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise SpecError(f'seeds={value!r}: write 5 (seeds 0 to 4), "0-9", or [3, 7]')
    return parse_seeds(str(value))


def _preset(value: Any) -> str:
    if not isinstance(value, str) or value not in preset_names():
        raise SpecError(unknown("preset", value, preset_names()))
    return value


def ablations() -> dict[str, dict[str, Any]]:
    """The shipped ablations: name -> description, paper, algorithms to compare, and where it has
    one of its own, suite and values (``set``)."""
    text = files("bench").joinpath("grids", "ablations.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def _flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """``[set.mega] start_stage = 4`` as ``mega.start_stage``."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        # An algorithm's table may be empty; as a field's value an empty table is a mistake to tell.
        if isinstance(value, dict) and (value or key in algorithms.names()):
            flat |= {f"{key}.{inner}": content for inner, content in value.items()}
        else:
            flat[key] = value
    return flat


def _words(value: Any, key: str) -> list[str]:
    words = value.split(",") if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise SpecError(f"{key}={value!r} is neither a name nor a list of names")
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
    outcome: str = "pending"
    """pending | running | done | failed | interrupted | busy | skipped (was done before)."""
    error: str = ""
    warnings: list[str] = field(default_factory=list)
    """What its process warned of, in the log."""
    log_start: int = 0
    """Where in the log this attempt began."""
    attempts: int = 0
    """How often it was started."""
    before: dict[str, Any] = field(default_factory=dict)
    """Its status when this attempt began."""

    @cached_property
    def group(self) -> str:
        """Runs of one group cost the same: all but the seed is equal."""
        return self.spec.with_seed(0).id


class Sweep:
    """Carries out the jobs with a launcher, as many at a time as that takes."""

    def __init__(
        self,
        jobs: Sequence[Job],
        launcher: Launcher,
        *,
        options: Sequence[str] = (),
        threads: int = 1,
        retries: int = 0,
    ) -> None:
        """``options`` of ``python -m bench.train``. ``retries``: how often a run is started again
        whose process was killed or hung."""
        self.jobs, self.launcher, self.retries = jobs, launcher, retries
        self._options, self._threads = tuple(options), threads
        self._running: dict[int, Handle] = {}  # by the job's place in the list
        self._clerks: ThreadPoolExecutor
        self._recorded: list[Future[None]] = []
        self._signals = 0

    @property
    def interrupted(self) -> bool:
        """Whether a signal asked the sweep to stop."""
        return self._signals > 0

    def run(self, notice: Callable[[Job | None], None]) -> None:
        """Train all jobs; ``notice(job)`` on each change of a job, ``notice(None)`` in between.

        SIGINT, SIGTERM and SIGHUP stop it: runs save at the end of their episodes, a second signal
        ends them at once. Jobs not started stay pending. A job that another process was training
        is looked at again in the end, when that process may be done with it, or gone.
        """
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
            numbers.append(signal.SIGHUP)
        previous = {number: signal.signal(number, self._on_signal) for number in numbers}
        passed_on = 0
        with ThreadPoolExecutor(CLERKS) as self._clerks:
            try:
                while True:
                    if not self._signals:
                        self._start(notice)
                    if not self._running:
                        break
                    while passed_on < self._signals:
                        passed_on += 1
                        for handle in self._running.values():
                            handle.stop()
                    ready = time.monotonic() + self.launcher.poll_seconds
                    while time.monotonic() < ready and passed_on == self._signals:
                        time.sleep(POLL_SECONDS)
                    for place, handle in list(self._running.items()):
                        if (end := handle.poll()) is not None:
                            del self._running[place]
                            self._ended(self.jobs[place], end)
                            notice(self.jobs[place])
                    notice(None)
            finally:
                for handle in self._running.values():
                    handle.stop()
                for number, handler in previous.items():
                    signal.signal(number, handler)
        for recorded in self._recorded:
            recorded.result()

    def _on_signal(self, number: int, frame: object) -> None:
        self._signals += 1

    def _start(self, notice: Callable[[Job | None], None]) -> None:
        """Start what there is room for."""
        room = self.launcher.slots - len(self._running)
        waiting = [place for place, job in enumerate(self.jobs) if job.outcome == "pending"]
        if not waiting and not self._running:
            for job in self.jobs:
                if job.outcome == "busy" and job.store.done:
                    job.outcome = "skipped"
                    notice(job)
            waiting = [place for place, job in enumerate(self.jobs) if self._has_come_free(job)]
        chosen = waiting if math.isinf(room) else waiting[: int(room)]
        places, orders = [], []
        for place in chosen:
            job = self.jobs[place]
            job.before = job.store.status()
            try:
                job.log_start = job.store.log_length()
            except OSError as error:
                self._fail(job, f"cannot write {job.store.path}: {error.strerror}", notice)
                continue
            places.append(place)
            orders.append(Order(job.store.path, self._options, self._threads))
        if not orders:
            return
        try:
            handles = self.launcher.start(orders)
        except (OSError, RuntimeError) as error:
            for place in places:
                self._fail(self.jobs[place], f"cannot be started: {error}", notice)
            return
        for place, handle in zip(places, handles, strict=True):
            self._running[place] = handle
            self.jobs[place].outcome = "running"
            self.jobs[place].attempts += 1
            notice(self.jobs[place])

    def _has_come_free(self, job: Job) -> bool:
        # That another machine is gone shows a first attempt; a second would show no more.
        held = job.store.busy or (job.attempts and job.store.elsewhere)
        return job.outcome == "busy" and not held

    def _fail(self, job: Job, error: str, notice: Callable[[Job | None], None]) -> None:
        job.outcome, job.error = "failed", error
        notice(job)

    def _ended(self, job: Job, end: Exit) -> None:
        log = job.store.log_since(job.log_start)
        job.warnings = _warnings(log)
        job.error = ""
        if end.code == 0:
            job.outcome = "done"
        elif end.code == EXIT_INTERRUPTED or (
            self._signals and end.code in (-signal.SIGINT, -signal.SIGTERM, -signal.SIGHUP)
        ):
            job.outcome = "interrupted"
        elif end.code == EXIT_BUSY:
            job.outcome = "busy"
        else:
            lost, job.error = _why(job, end, log)
            job.outcome = "pending" if lost and job.attempts <= self.retries else "failed"
            # Its own process may not have been able to say so.
            if job.outcome == "failed" and _said(job)["state"] != "failed":
                self._recorded.append(self._clerks.submit(_record_failure, job))


def _why(job: Job, end: Exit, log: str) -> tuple[bool, str]:
    """Whether the process ended without recording why, and why a job failed."""
    if end.code < 0:
        name = signal.Signals(-end.code).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return True, f"the process was killed by {name}{hint}"
    if end.reason:
        return True, end.reason
    status = _said(job)
    if status["state"] == "running" and "Timeout (" in log:
        return True, (
            "the process hung and was ended (a simulator that does not answer?); log.txt says where"
        )
    said = [line.strip() for line in log.splitlines() if line.strip()] or ["see log.txt"]
    error = f"exit code {end.code}: {said[-1][:300]}"
    if status["state"] == "failed":
        error = str(status.get("error") or error)
    if (free := shutil.disk_usage(job.store.path).free) < FULL_DISK_BYTES:
        # Neither status nor log may have found room for the reason.
        error = f"the disk of {job.store.path} is full ({size(free)} free)"
    return False, error


def _said(job: Job) -> dict[str, Any]:
    """What the job's process has written as its status; not what an earlier one had."""
    status = job.store.status()
    return {"state": "pending"} if status == job.before else status


def _record_failure(job: Job) -> None:
    """Write the status that the run's own process could not, once its lease stands still."""
    status = job.store.status()
    facts = {key: value for key, value in status.items() if key != "state"}
    try:
        with job.store.locked(expires=DEAD_SECONDS):
            if not job.store.done:
                job.store.write_status("failed", **(facts | {"error": job.error}))
    except (StoreError, OSError) as error:
        job.error += f"; its status could not be written: {error}"


def _warnings(log: str) -> list[str]:
    """The warnings in what a process has logged."""
    found = (line.partition("RuntimeWarning: ")[2] for line in log.splitlines())
    return [warning for warning in found if warning]


def notify(command: str, jobs: Sequence[Job], out: Path, *, interrupted: bool) -> str:
    """Run the user's command at the end of a sweep; why it could not be done, or ``""``.

    It finds in its environment BENCH_STATE (done, failed, interrupted, or incomplete where another
    process trains the rest), BENCH_DONE, BENCH_FAILED and BENCH_RUNS (counts), BENCH_OUT and
    BENCH_MESSAGE.
    """
    done = sum(job.outcome in ("done", "skipped") for job in jobs)
    failed = sum(job.outcome == "failed" for job in jobs)
    rest = "done" if done == len(jobs) else "incomplete"
    state = "interrupted" if interrupted else "failed" if failed else rest
    message = f"sweep {state}: {done} of {len(jobs)} runs done, {failed} failed in {out}"
    facts = {
        "BENCH_STATE": state, "BENCH_DONE": str(done), "BENCH_FAILED": str(failed),
        "BENCH_RUNS": str(len(jobs)), "BENCH_OUT": str(out),
        "BENCH_MESSAGE": message,
    }  # fmt: skip
    try:
        ended = subprocess.run(
            command, shell=True, env=os.environ | facts, timeout=NOTIFY_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"--notify: {error}"
    return f"--notify: the command ended with {ended.returncode}" if ended.returncode else ""


def size(count: float) -> str:
    """Bytes in words."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_size(text: str, option: str) -> int:
    """``20GB``, ``500M``, ``1.5 TB`` in bytes, at least one. Raises SpecError."""
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([KMGT]?)B?\s*", text, re.IGNORECASE)
    count = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    if not count:
        raise SpecError(f"{option} {text!r}: expected a size such as 20GB")
    return count


def plan(specs: Sequence[RunSpec], out: Path) -> list[Job]:
    """A job for each run, without touching the disk; finished ones are marked skipped.

    A run that is there under another name of its configuration (``mega@tuned`` is
    ``mega@trigger_patient``) is that run.
    """
    there: dict[str, list[Path]] = {}  # by seed and id, which a run has whatever its label
    for path in sorted(out.glob("*/*/*")):
        there.setdefault(path.name, []).append(path)
    jobs = []
    for spec in map(partial(_as_recorded, out, there), specs):
        job = Job(spec, RunStore(out / spec.directory))
        if job.store.done:
            job.outcome = "skipped"
        elif job.store.busy:
            job.outcome = "busy"
        jobs.append(job)
    return jobs


def _as_recorded(out: Path, there: Mapping[str, Sequence[Path]], spec: RunSpec) -> RunSpec:
    """The specification by the name under which its run is recorded, if it is."""
    own = out / spec.directory
    alike = there.get(own.name, ())
    if own not in alike:
        for path in alike:
            with contextlib.suppress(StoreError):
                recorded = RunStore(path).spec()
                if path == out / recorded.directory and not spec.conflict(recorded):
                    return recorded
    return spec


def prepare(specs: Sequence[RunSpec], out: Path, environment: Mapping[str, Any]) -> list[Job]:
    """`plan`, and a directory for each run; ``environment`` as far as it is known already.

    A run whose directory holds something else, or is damaged, has failed. Raises OSError if nothing
    can be written.
    """
    jobs = plan(specs, out)
    for job in jobs:
        try:
            RunStore.create(out, job.spec, dict(environment))
        except StoreError as error:
            job.outcome, job.error = "failed", str(error)
    return jobs


def check_room(out: Path, costs: Mapping[str, Cost], jobs: Sequence[Job], workers: int) -> str:
    """Why the disk cannot hold the sweep, or ``""``."""
    open_jobs = [job for job in jobs if job.outcome == "pending"]
    largest = sorted(
        (max(0, costs[job.group].working_bytes - job.store.state_bytes) for job in open_jobs),
        reverse=True,
    )
    at_once = largest[:workers]
    needed, free = sum(at_once), shutil.disk_usage(out).free
    if needed <= free:
        return ""
    return (
        f"{out} has {size(free)} free, {len(at_once)} runs at a time need {size(needed)}; "
        "use fewer --workers, a smaller replay_per_task, or another --out"
    )


def writable(out: Path) -> None:
    """Make the output directory. Raises StoreError if nothing can be written there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".write-test-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise StoreError(f"cannot write to --out {out}: {error.strerror or error}") from None
