"""Train the first steps of a recorded run again, and compare what they measure with its record."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import torch

from bench import machine
from bench.spec import RunSpec
from bench.store import RunStore, StoreError
from bench.train import LOGGED_POINTS, Interrupted, due, train


class Verdict(NamedTuple):
    """What came of the comparison."""

    steps: int
    """Per task that were trained again."""
    rows: int
    """Of metrics.csv that were compared."""
    probes: int
    difference: str
    """The first difference, in words; empty if every byte is the same."""
    numerics: list[str]
    """How this machine's numerics differ from the recorded ones: differences are expected then."""


def steps_to_verify(spec: RunSpec) -> int:
    """The fewest steps per task after which two points with updates have been logged."""
    p = spec.protocol
    unit = p.episode_steps
    points = [
        step
        for step in range(unit, p.steps_per_task + 1, unit)
        if step > p.warmup_steps and due(step, unit, p.steps_per_task, LOGGED_POINTS)
    ]
    return points[:2][-1]


def verify(store: RunStore, steps: int, device: str) -> Verdict:
    """Train the run of ``store`` up to the end of the episode at ``steps`` in a folder of its own.

    Under the recorded number of threads, compiled if it was and that works here, and no further
    than the record is safe: of a run that is not done, to its last checkpoint. Raises StoreError if
    it is damaged or has nothing to compare.
    """
    spec = store.spec()
    recorded = store.numerics
    threads = int(recorded.get("threads", 1))
    compiled = recorded.get("compiled") == "yes" and not machine.compiler_problem(device)
    changed = machine.changed_numerics(recorded, device, threads, compiled)
    unit = spec.protocol.episode_steps
    steps = min(-(-steps // unit) * unit, store.recorded)
    old = _rows_until(store, steps)
    if len(old) < 2:
        raise StoreError(f"{store.path} has recorded nothing up to step {steps:,}")
    ends = itertools.count(unit, unit)  # a run asks at the end of each episode whether to stop
    before = torch.get_num_threads()
    folder = Path(tempfile.mkdtemp(prefix="bench-verify-"))
    try:
        torch.set_num_threads(threads)
        again = RunStore.create(folder, spec, machine.environment(device, threads, compiled))
        with suppress(Interrupted):
            train(spec, again, device=device, compiled=compiled, stop=lambda: next(ends) >= steps)
        new, probes = _rows_until(again, steps), _probes_until(again, steps)
        difference = _difference(old, new, _probes_until(store, steps), probes)
        return Verdict(steps, len(new) - 1, len(probes), difference, changed)
    finally:
        torch.set_num_threads(before)
        shutil.rmtree(folder, ignore_errors=True)


def _rows_until(store: RunStore, steps: int) -> list[str]:
    """The lines of metrics.csv up to a step, header included. Raises StoreError if damaged."""
    path = store.path / "metrics.csv"
    try:
        # A last line that does not end was being written when its process was.
        lines = path.read_text("utf-8").split("\n")[:-1] if path.exists() else []
        return lines[:1] + [line for line in lines[1:] if int(line.partition(",")[0]) <= steps]
    except (OSError, ValueError):
        raise StoreError(f"{path} is damaged; bench doctor {store.path} says where") from None


def _probes_until(store: RunStore, steps: int) -> dict[str, bytes]:
    found = store.probe_path.glob("*.npz")
    return {p.name: p.read_bytes() for p in found if p.stem.isdigit() and int(p.stem) <= steps}


def _difference(
    old: list[str], new: list[str], old_probes: dict[str, bytes], new_probes: dict[str, bytes]
) -> str:
    for number, (was, now) in enumerate(zip_longest(old, new, fillvalue="nothing"), start=1):
        if was != now:
            return f"metrics.csv line {number}: recorded {was!r}, now {now!r}"
    for name in sorted(old_probes.keys() | new_probes.keys()):
        if old_probes.get(name) != new_probes.get(name):
            return f"probe/{name} differs"
    return ""
