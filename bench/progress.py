"""Live progress of a sweep: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as Bars,
)

from bench.sweep import Job

LINE_SECONDS = 30.0
"""Time between plain progress lines of one run."""


class Progress:
    """Tells how the jobs of a sweep stand; a context manager."""

    def __init__(self, console: Console, jobs: Sequence[Job], begun: str = "started") -> None:
        """``begun``: what is said of a job that its launcher has taken."""
        self.console, self.jobs, self.begun = console, jobs, begun
        self._bars: Bars | None = None
        self._rows: dict[int, TaskID] = {}
        self._said: dict[int, float] = {}
        if console.is_terminal:
            self._bars = Bars(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}", markup=False),
                TimeRemainingColumn(compact=True),
                console=console,
                refresh_per_second=4,
            )
            self._total = self._bars.add_task("runs", total=len(jobs), facts="")
            self._count()

    def __enter__(self) -> Self:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bars:
            self._bars.stop()

    def notice(self, changed: Job | None) -> None:
        """A job changed, or (None) time has passed."""
        if changed is not None:
            self._say_change(changed)
            return
        for job in self.jobs:
            if job.outcome == "running":
                self._show(job)

    def _say_change(self, job: Job) -> None:
        key = id(job)
        if job.outcome == "running":
            if self._bars is None:
                self.console.print(f"{self.begun} {job.spec.directory}")
            return
        if self._bars and key in self._rows:
            self._bars.remove_task(self._rows.pop(key))
        status = job.store.status()
        facts = f"at {status.get('step', 0):,} steps" + _success(status)
        self.console.print(f"{job.outcome} {job.spec.directory} {facts} {job.error}".rstrip())
        self._count()

    def _show(self, job: Job) -> None:
        status, total = job.store.status(), job.spec.protocol.steps_per_task
        if status["state"] != "running":  # queued, or about to begin
            return
        step = min(int(status.get("step", 0)), total)
        rate = status.get("steps_per_second") or 0.0
        facts = f"{rate:.0f} steps/s{_success(status)}"
        key = id(job)
        if self._bars:
            if key not in self._rows:
                name = f"{job.spec.suite} {job.spec.title} seed {job.spec.seed}"
                self._rows[key] = self._bars.add_task(name, total=total, facts="")
            self._bars.update(self._rows[key], completed=step, facts=facts)
            return
        now = time.monotonic()
        if now - self._said.setdefault(key, now) >= LINE_SECONDS:
            self._said[key] = now
            self.console.print(f"        {job.spec.directory} {step:,}/{total:,} {facts}")

    def _count(self) -> None:
        if self._bars:
            ended = sum(job.outcome not in ("pending", "running") for job in self.jobs)
            self._bars.update(self._total, completed=ended)


def _success(status: dict[str, Any]) -> str:
    """The latest evaluation's mean success, in words; empty before the first."""
    success = status.get("success")
    return "" if success is None else f", success {success:.2f}"
