"""A sweep from its plan to its last word: what `bench run` and `bench ablate` do."""

from __future__ import annotations

import contextlib
import math
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import typer

from bench import launch, machine, references, sweep
from bench.console import (
    UsageError,
    WorkError,
    duration,
    new_console,
    resolved_device,
    spinner,
)
from bench.progress import Progress
from bench.spec import RunSpec, changed_protocol, preset
from bench.speed import Cost, Meter
from bench.store import StoreError
from bench.sweep import Job, size
from bench.tidy import keep_within, used
from bench.track import Follower, sinks


class How(NamedTuple):
    """The options of `run` and `ablate` that say how, not what."""

    out: Path
    workers: str
    threads: int
    device: str
    compile: bool
    runs_per_device: int
    launcher: str
    launcher_set: list[str]
    retries: int
    sim_workers: int
    hang_seconds: float
    track: str
    notify: str | None
    disk_budget: str | None
    allow_other_numerics: bool

    @property
    def train_options(self) -> list[str]:
        """Of the runs' processes."""
        options = [
            "--device", self.device, "--threads", str(self.threads),
            "--sim-workers", str(self.sim_workers), "--hang-seconds", str(self.hang_seconds),
        ]  # fmt: skip
        options += ["--compile"] * self.compile
        return options + ["--allow-other-numerics"] * self.allow_other_numerics


def conduct(
    specs: list[RunSpec], how: How, *, dry_run: bool, of_papers: Callable[[], set[str]]
) -> None:
    """Plan, train with progress, and end with what the runs brought."""
    launch.launcher_options(how.launcher, how.launcher_set)
    if not (how.hang_seconds == 0 or how.hang_seconds >= 10):
        raise UsageError(f"--hang-seconds {how.hang_seconds}: expected at least 10, or 0 for never")
    if how.launcher != "local" and how.device.startswith("cuda:"):
        raise UsageError(
            f"--device {how.device} is one of this machine's: with --launcher {how.launcher} a run "
            "sees the GPUs that it asks for, as cuda"
        )
    if how.launcher != "local" and how.workers != "auto":
        raise UsageError(
            f"--workers {how.workers} is for this machine: --launcher {how.launcher} starts runs "
            "as its cluster has room (SLURM: --launcher-set at_once=N)"
        )
    worlds = {(s.suite, s.protocol.goals, s.protocol.reward_version, s.protocol.horizon): s
              for s in specs}  # fmt: skip
    for spec in worlds.values():  # is there such a one? Before anything is written
        spec.make_suite()
    budget = 0
    if how.disk_budget is not None:
        budget = sweep.parse_size(how.disk_budget, "--disk-budget")
    try:
        trackers = sinks(how.track)
    except RuntimeError as error:
        raise UsageError(f"--track: {error}") from None
    local = how.launcher == "local"
    out = how.out if local else how.out.resolve()  # other machines have other working directories
    cores = max(how.threads, how.sim_workers)
    at_a_time = _workers(how.workers, cores)
    # A cluster's machines may have devices that this one lacks.
    here = resolved_device(how.device if local else "auto")
    gpus = machine.gpus(here) if local else []
    if gpus:  # each run sees one of them
        at_a_time = min(at_a_time, len(gpus) * how.runs_per_device)
        here = "cuda"
    how = how._replace(device=here if local or how.device == "auto" else how.device)
    environment = machine.environment(here, how.threads) if local else machine.origin()
    console = new_console()

    def planned(jobs: list[Job]) -> list[Job]:
        with Meter(here) as meter:
            costs = _costs(jobs, meter, how.threads)
            _print_plan(
                console, jobs, costs, at_a_time if local else len(jobs), out, meter, of_papers
            )
        if not dry_run and local and (problem := sweep.check_room(out, costs, jobs, at_a_time)):
            raise WorkError(problem)
        return jobs

    if dry_run:
        planned(sweep.plan(specs, out))
        return
    try:
        sweep.writable(out)
        if how.compile and local:
            with spinner(console, "trying torch.compile"):
                problem = machine.compiler_problem(here)
            if problem:
                print(f"bench: --compile: {problem}; runs train without", file=sys.stderr)
        launcher = launch.launcher(
            how.launcher, how.launcher_set, out=out, workers=at_a_time, cores=cores,
            device=how.device, gpus=gpus, runs_per_gpu=how.runs_per_device,
        )  # fmt: skip
    except (StoreError, RuntimeError) as error:
        raise WorkError(str(error)) from None
    with contextlib.closing(launcher):  # there before a directory is made: it may not work here
        try:
            jobs = planned(sweep.prepare(specs, out, environment))
        except OSError as error:
            raise WorkError(str(error)) from None

        def measure_references() -> None:
            facts = environment if local else machine.environment(here, how.threads)
            with spinner(console, "evaluating the scripted experts and the random policy"):
                for problem in references.ensure(specs, out, facts):
                    print(f"bench: no reference rows of {problem}", file=sys.stderr)

        if local:  # first: a report may want them at any time; on a cluster, where jobs queue, last
            measure_references()
        started = time.monotonic()
        under_way = sweep.Sweep(
            jobs, launcher, options=how.train_options, threads=how.threads, retries=how.retries
        )
        begun = "started" if local else "handed over"
        with (
            Progress(console, jobs, begun) as progress,
            _Aside(jobs, out, trackers, budget) as aside,
        ):

            def notice(job: Job | None) -> None:
                progress.notice(job)
                aside.notice(job)

            under_way.run(notice)
    interrupted = under_way.interrupted
    if not local and not interrupted:
        measure_references()
    if how.notify and (problem := sweep.notify(how.notify, jobs, out, interrupted=interrupted)):
        print(f"bench: {problem}", file=sys.stderr)
    _conclude(console, jobs, out, time.monotonic() - started, interrupted=interrupted)


class _Aside:
    """What goes on beside a sweep: metrics to the trackers, disk space; no fault of it is one of
    the sweep's."""

    SECONDS = 10.0

    def __init__(self, jobs: list[Job], out: Path, trackers: list[str], budget: int) -> None:
        self._out, self._budget = out, budget
        todo = [job.store for job in jobs if job.outcome not in ("skipped", "failed")]
        self._follower: Follower | None = Follower(todo, out, trackers) if trackers else None
        self._next = time.monotonic() + self.SECONDS

    def __enter__(self) -> _Aside:
        if self._budget:
            self._thin()
        return self

    def __exit__(self, *_: object) -> None:
        self._track(last=True)

    def notice(self, job: Job | None) -> None:
        """See `bench.sweep.Sweep.run`."""
        if self._budget and job is not None and job.outcome not in ("pending", "running"):
            self._thin()
        if time.monotonic() >= self._next:
            self._track(last=False)
            self._next = time.monotonic() + self.SECONDS

    def _thin(self) -> None:
        try:
            removed = keep_within(self._out, self._budget)
        except OSError as error:
            print(f"bench: --disk-budget: {error}", file=sys.stderr)
            return
        if removed:
            freed = size(sum(removal.size for removal in removed))
            print(f"removed {len(removed)} files ({freed}) to stay within --disk-budget")
        elif (now := used(self._out)) > self._budget:
            print(f"bench: {self._out} holds {size(now)}, more than --disk-budget; what is left "
                  "is needed", file=sys.stderr)  # fmt: skip

    def _track(self, *, last: bool) -> None:
        if self._follower is None:
            return
        try:
            self._follower.close() if last else self._follower.pass_on()
        except Exception as error:  # noqa: BLE001  (a tracker may raise anything, the network too)
            print(f"bench: tracking stopped: {type(error).__name__}: {error}", file=sys.stderr)
            self._follower = None


MAX_WORKERS = 1000
"""Processes at a time on one machine: more is a slip of the keyboard."""


def _workers(text: str, cores_each: int) -> int:
    if text == "auto":
        return max(1, machine.cores() // cores_each)
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= MAX_WORKERS):
        raise UsageError(f"--workers {text!r}: expected auto or a number from 1 to {MAX_WORKERS}")
    return int(text)


def _costs(jobs: list[Job], meter: Meter, threads: int) -> dict[str, Cost]:
    """What a run of each group costs, measured once per group that has work left.

    What fails here will fail when it is trained, and is recorded there; the others go on.
    """
    costs: dict[str, Cost] = {}
    for job in jobs:
        if job.outcome == "pending" and job.group not in costs:
            with spinner(new_console(), f"measuring {job.spec.title} on {job.spec.suite}"):
                try:
                    costs[job.group] = meter.cost(job.spec, threads)
                except Exception as error:  # noqa: BLE001  (an algorithm of the user's may raise any)
                    costs[job.group] = Cost(math.nan, 0)
                    print(f"bench: {job.spec.title} on {job.spec.suite} could not be measured: "
                          f"{type(error).__name__}: {error}", file=sys.stderr)  # fmt: skip
    return costs


def _print_plan(
    console: Any,
    jobs: list[Job],
    costs: dict[str, Cost],
    workers: int,
    out: Path,
    meter: Meter,
    of_papers: Callable[[], set[str]],
) -> None:
    todo = [job for job in jobs if job.outcome == "pending"]
    for chosen in (preset(name) for name in sorted({job.spec.preset for job in jobs})):
        of_preset = [job for job in jobs if job.spec.preset == chosen.name]
        scale = "Full scale" if chosen.full_scale else "Reduced scale"
        changed = {f"{k}={getattr(job.spec.protocol, k)}" for job in of_preset
                   for k in changed_protocol(job.spec.sources)}  # fmt: skip
        but = f" but for {', '.join(sorted(changed))}" if changed else ""
        papers = ""
        if not chosen.full_scale:
            waiting = [job for job in of_preset if job.outcome == "pending"]
            with spinner(console, "measuring the papers' scale"):
                hours = _paper_hours(waiting, meter, of_papers)
            papers = " The papers' scale is --preset paper" + (hours and f": a run here, {hours}")
        console.print(f"{scale}{but}, preset {chosen.name}: {chosen.description}{papers}")
    already = sum(job.outcome == "skipped" for job in jobs)
    busy = sum(job.outcome == "busy" for job in jobs)
    resumed = sum(job.store.status().get("step", 0) > 0 for job in todo)
    console.print(
        f"{len(jobs)} runs in {out}: {already} done, {len(todo)} to train"
        + (f" ({resumed} of them continued)" if resumed else "")
        + (f", {busy} in training elsewhere" if busy else "")
    )
    for line in _plugins([job.spec for job in jobs]):
        console.print(f"  {line}")
    for group, alike in _by_group(todo).items():
        seconds = costs[group].seconds
        spec, each = alike[0].spec, "not measured" if math.isnan(seconds) else duration(seconds)
        console.print(f"  {spec.suite} {spec.title} {spec.preset}: {len(alike)} x {each}")
    if todo:
        left = [_remaining(job, costs[job.group].seconds) for job in todo]
        left = [0.0 if math.isnan(seconds) else seconds for seconds in left]
        total, longest = sum(left), max(left)
        working = sorted((costs[job.group].working_bytes for job in todo), reverse=True)
        console.print(
            f"Estimated {duration(max(total / workers, longest))} with {workers} at a time"
            + " (measured one at a time; side by side each is slower)" * (workers > 1)
            + f", {sum(working[:workers]) / 1e9:.1f} GB of disk while training"
        )


def _by_group(jobs: list[Job]) -> dict[str, list[Job]]:
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.group, []).append(job)
    return groups


def _plugins(specs: list[RunSpec]) -> list[str]:
    """The code of other packages that these runs execute."""
    used = {f"algorithm {spec.algorithm}" for spec in specs}
    return [
        f"third-party {name}: {source}"
        for name, source in machine.plugins().items()
        if name in used
        or (name.startswith("suite ") and any(f"suite {s.suite}".startswith(name) for s in specs))
    ]


def _remaining(job: Job, seconds: float) -> float:
    step = float(job.store.status().get("step", 0))
    return seconds * (1 - step / job.spec.protocol.steps_per_task)


PAPER_EXAMPLES = 3
"""Of these the plan tells the hours at the papers' scale: measuring many takes minutes."""


def _paper_hours(jobs: list[Job], meter: Meter, of_papers: Callable[[], set[str]]) -> str:
    """Hours of one run at the papers' scale, from a moment's measurement, of the first few
    algorithms and suites; empty for suites that are not the papers'."""
    hours = []
    pairs = dict.fromkeys((job.spec.algorithm, job.spec.suite) for job in jobs)
    known = of_papers()
    for name, suite in [pair for pair in pairs if pair[1] in known][:PAPER_EXAMPLES]:
        with contextlib.suppress(Exception):  # an algorithm of the user's; its run will say what
            spec = RunSpec.resolve(name, suite, 0, preset_name="paper")
            seconds = meter.cost(spec, 1, budget=0.2).seconds
            hours.append(f"{name} on {suite} {seconds / 3600:,.0f} h")
    return ", ".join(hours)


def _conclude(
    console: Any, jobs: list[Job], out: Path, seconds: float, *, interrupted: bool
) -> None:
    """Say how it ended; exit 130 if interrupted, 1 if a run failed or another process has it."""
    failed = [job for job in jobs if job.outcome == "failed"]
    done = sum(job.outcome in ("done", "skipped") for job in jobs)
    console.print(f"{done} of {len(jobs)} runs done after {duration(seconds)}; results in {out}")
    for job in jobs:
        for warning in job.warnings:
            print(f"warning: {job.spec.directory}: {warning}", file=sys.stderr)
        if job.outcome == "busy":
            console.print(
                f"in training by another process: {job.spec.directory} (one whose bench run was "
                "killed stops by itself at the end of its episode: try again then)"
            )
    for job in failed:
        print(f"failed: {job.spec.directory}: {job.error}", file=sys.stderr)
        print(f"        traceback and output: {job.store.path / 'log.txt'}", file=sys.stderr)
    if interrupted:
        console.print("Interrupted; the same command continues.")
        raise typer.Exit(130)
    if failed:
        raise typer.Exit(1)
    if left := len(jobs) - done:
        console.print(f"{left} runs are not done: the same command looks at them again.")
        raise typer.Exit(1)
    console.print(f"Next: bench report --out {shlex.quote(str(out))}")
