"""Kill a small sweep again and again, then compare it byte by byte with an undisturbed one.

    python tests/campaign.py --kills 120 --minutes 60

Every attempt is the same sweep. In turn the sweep itself, one of its runs, a process that
simulates, or (by fault injection) a run at a random ``fsync`` or rename is killed with SIGKILL. In
the end the sweep must finish by itself, with the bytes of one that nothing happened to; no run may
be lost, and none trained again once it was done. Processes are forked, not started anew, so that
most of the time is training; what they run is `bench.sweep.Sweep` and `bench.train.main`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench import machine
from bench.launch import Exit, Handle, Order
from bench.spec import RunSpec
from bench.store import RunStore
from bench.sweep import Request, Sweep, expand, prepare
from bench.train import main as train_main
from bench.train import train

VALUES = {
    "horizon": 25, "steps_per_task": 600, "warmup_steps": 75, "eval_every": 200, "width": 16,
    "eval_episodes": 2, "final_episodes": 2, "batch_per_task": 16, "replay_per_task": 100,
}  # fmt: skip
"""Runs of seconds whose replay rings wrap."""
PLACES = ("sweep", "run", "simulator", "writing")


def specs() -> list[RunSpec]:
    """Two algorithms, two seeds."""
    return expand([Request(["mt_sac", "mega"], ["toy"], [0, 1], "smoke", VALUES)])


# ------------------------------------------------------------------------------ forked processes


def fork(work: Callable[[], int], log: Path) -> int:
    """Do the work in a process of its own that writes to a log; its id."""
    if pid := os.fork():
        return pid
    try:
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        code = work()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    finally:
        os._exit(99)


class Forked:
    """A launcher whose runs are forks of the sweep, with a fault in the first."""

    slots: float = 2
    poll_seconds = 0.25

    def __init__(self, fault: Callable[[], None]) -> None:
        self._fault = fault

    def start(self, orders: Sequence[Order]) -> list[Handle]:
        return [self._start(order) for order in orders]

    def _start(self, order: Order) -> Handle:
        fault, self._fault = self._fault, lambda: None

        def work() -> int:
            fault()
            return train_main([str(order.run), *order.options])

        return Child(fork(work, order.run / "log.txt"))

    def close(self) -> None:
        """Nothing is held."""


class Child:
    """A forked run."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def poll(self) -> Exit | None:
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return Exit(os.waitstatus_to_exitcode(status)) if pid else None

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGINT)


def die_at(name: str, number: int, after: bool) -> Callable[[], None]:
    """What makes a process kill itself at its ``number``-th call of ``os.name``."""

    def arm() -> None:
        original, calls = getattr(os, name), 0

        def dying(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls == number and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args, **kwargs)
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(os, name, dying)

    return arm


def sweep(out: Path, simulators: int, fault: Callable[[], None]) -> int:
    """The sweep's process; its id."""
    options = ["--sim-workers", str(simulators), "--checkpoint-seconds", "0.2"]

    def work() -> int:
        jobs = prepare(specs(), out, machine.environment("cpu", 1))
        Sweep(jobs, Forked(fault), options=options).run(lambda _: None)
        return int(any(job.outcome not in ("done", "skipped") for job in jobs))

    out.mkdir(parents=True, exist_ok=True)
    return fork(work, out / "sweep.txt")


# -------------------------------------------------------------------------------------- attacks


def children(pid: int) -> list[int]:
    try:
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    except OSError:
        return []


def simulators(run: int) -> list[int]:
    """The processes that a run simulates in."""
    found = []
    for child in children(run):
        try:
            if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text():
                found.append(child)
        except OSError:
            continue
    return found


def attack(out: Path, place: str, rng: random.Random, patience: float) -> int:
    """Run the sweep and kill something of it; how many processes were killed."""

    def no_fault() -> None:
        """Nothing is injected."""

    fault = no_fault
    if place == "writing":
        fault = die_at(rng.choice(["fsync", "replace"]), rng.randint(1, 12), rng.random() < 0.5)
    log = out / "sweep.txt"
    pid = sweep(out, int(place == "simulator"), fault)
    begun, moment = time.monotonic(), time.monotonic() + rng.random() * patience
    killed = 0
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        time.sleep(0.005)
        if killed or place == "writing" or time.monotonic() < moment:
            continue
        runs = children(pid)
        victims = {"sweep": [pid], "run": runs}.get(place) or [
            s for r in runs for s in simulators(r)
        ]
        if victims:
            try:
                os.kill(rng.choice(victims), signal.SIGKILL)
                killed = 1
            except ProcessLookupError:
                continue
    if place == "writing":
        killed = sum(
            "SIGKILL" in str(RunStore(path.parent).status().get("error"))
            and path.stat().st_mtime > time.time() - (time.monotonic() - begun)
            for path in out.rglob("status.json")
        )
    assert "Traceback" not in (log.read_text() if log.exists() else ""), log.read_text()
    return killed


def measured(out: Path) -> dict[str, bytes]:
    """What all runs below ``out`` measured."""
    paths = [*out.rglob("metrics.csv"), *out.rglob("probe/*.npz")]
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


def finished(out: Path) -> dict[str, int]:
    """Finished runs and when their metrics were last written."""
    stores = [RunStore(path.parent) for path in out.rglob("SHA256SUMS")]
    return {
        str(s.path.relative_to(out)): (s.path / "metrics.csv").stat().st_mtime_ns
        for s in stores
        if s.done
    }


def campaign(kills: int, seconds: float, seed: int, folder: Path) -> dict[str, object]:
    """The facts of one campaign. ``seconds`` bound the killing, not the end of the sweeps."""
    torch.set_num_threads(1)
    rng, started = random.Random(seed), time.monotonic()
    expected = folder / "undisturbed"
    for spec in specs():
        train(spec, RunStore.create(expected, spec, machine.environment("cpu", 1)))
    quiet, patience = measured(expected), (time.monotonic() - started) / 2
    counts: Counter[str] = Counter()
    again: list[str] = []
    sweeps = rounds = attempts = lost = 0
    identical = True

    def over() -> bool:
        return sum(counts.values()) >= kills or time.monotonic() - started > seconds

    while not over():
        sweeps += 1
        out, known = folder / f"sweep-{sweeps}", {}
        while len(known) < len(specs()) and not over():
            place = PLACES[rounds % len(PLACES)]
            rounds += 1
            counts[place] += attack(out, place, rng, patience)
            now = finished(out)
            again += [run for run, at in known.items() if now.get(run) != at]
            known = now
        tries = 0
        while len(finished(out)) < len(specs()) and tries < 50:
            # Orphans of a killed sweep are busy until their episode ends.
            tries += 1
            os.waitpid(sweep(out, 0, lambda: None), 0)
        attempts = max(attempts, tries)
        now = finished(out)
        again += [run for run, at in known.items() if now.get(run) != at]
        lost += len(specs()) - len(now)
        identical &= measured(out) == quiet
    return {
        "kills": sum(counts.values()), "of": dict(counts), "attempts": rounds, "sweeps": sweeps,
        "identical": identical, "runs_lost": lost, "trained_twice": again,
        "commands_to_finish": attempts, "seconds": round(time.monotonic() - started), "seed": seed,
    }  # fmt: skip


def main() -> int:
    """Run a campaign and print its facts as JSON; 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        facts = campaign(options.kills, 60 * options.minutes, options.seed, Path(folder))
    print(json.dumps(facts, indent=1))
    return int(not facts["identical"] or bool(facts["runs_lost"]) or bool(facts["trained_twice"]))


if __name__ == "__main__":
    sys.exit(main())
