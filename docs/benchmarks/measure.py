"""Measure this machine for docs/benchmarks.md, and draw what was measured.

    python docs/benchmarks/measure.py          about 15 minutes on an idle machine
    python docs/benchmarks/measure.py draw     the figure alone, of the numbers beside this file

Every part is what `bench speed` measures; algorithms that are compared take turns in one process.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter, ScalarFormatter

from algorithms import names
from bench import machine
from bench.speed import simulator_rows, speed_rows
from reports.drawing import STYLE, legend, legend_line, looks, new_figure

HERE = Path(__file__).resolve().parent
SCALED = ("mt_sac", "d2r", "mega")
STAGES = ("mt_sac", *(f"mega@fixed{stage}" for stage in (1, 3, 8, 16, 24)))
EVERY = tuple(dict.fromkeys(["mt_sac", *names(), "soft_module@shallow", "mega@critic_mlp"]))
"""MT-SAC first: ratios are to it."""
TASKS = (1, 10, 25, 50, 200)
BATCHES = (8, 16, 32, 64, 128, 256)
Rows = list[dict[str, Any]]


def speed(labels: tuple[str, ...], suites: list[str], preset: str, **more: Any) -> Rows:
    """Rows of `bench.speed.speed_rows` on the CPU, with one thread unless ``more`` has others."""
    return speed_rows(labels, suites, [preset], "cpu", **({"threads": [1], "seconds": 3} | more))


PARTS: dict[str, Callable[[], Rows]] = {
    "paper": lambda: speed(EVERY, ["mt10_rand"], "paper"),
    "simulators": lambda: simulator_rows("mt10_rand", 10),
    "stages": lambda: speed(STAGES, ["mt10_rand"], "paper"),
    "tasks": lambda: speed(SCALED, [f"toy{count}" for count in TASKS], "cpu"),
    "batches": lambda: [
        row
        for rows in BATCHES
        for row in speed(SCALED, ["toy10"], "cpu", overrides={"batch_per_task": rows})
    ],
    "cpu": lambda: speed(EVERY, ["mt10_rand"], "cpu"),
    "threads": lambda: speed(SCALED, ["mt10_rand"], "paper", threads=[2]),
    "mt50": lambda: speed(SCALED, ["mt50_rand"], "paper", seconds=10),
}


def measure() -> None:
    """All parts into ``measured.json``, one after the other."""
    found: dict[str, Any] = {
        "hardware": machine.hardware("cpu"), "versions": machine.versions(),
        "commit": machine.git_commit(),
    }  # fmt: skip
    for name, part in PARTS.items():
        print(name, flush=True)
        found[name] = part()
        (HERE / "measured.json").write_text(json.dumps(found, indent=1) + "\n")


def draw() -> None:
    """``scaling.png`` from ``measured.json``, a panel for each part that is there."""
    found = json.loads((HERE / "measured.json").read_text())
    there = [part for part in PANELS if part in found]
    with mpl.rc_context(STYLE):
        made = new_figure(2.5)
        for axes, part in zip(made.subplots(1, len(there)), there, strict=True):
            PANELS[part](axes, found[part])
        legend(made, [legend_line(LOOKS[label], label) for label in SCALED])
        made.savefig(HERE / "scaling.png", dpi=150)


LOOKS = looks(SCALED)


def against(of: str, words: str) -> Callable[[Axes, Rows], None]:
    """A panel of update times against ``of``, both logarithmic."""

    def panel(axes: Axes, rows: Rows) -> None:
        for label in SCALED:
            mine = [row for row in rows if row["algorithm"] == label]
            curve(axes, [(row[of], row["update_ms"]) for row in mine], LOOKS[label].colour)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(words)
        axes.set_ylabel("ms per update")
        axes.set_xticks(sorted({row[of] for row in rows}))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(ScalarFormatter())
            axis.set_minor_formatter(NullFormatter())

    return panel


def of_stages(axes: Axes, rows: Rows) -> None:
    """MEGA's update against the stage of its tasks, as a multiple of MT-SAC's."""
    grown = [row for row in rows if row["algorithm"] != "mt_sac"]
    points = [(int(row["algorithm"].partition("fixed")[2]), row["ratio"]) for row in grown]
    curve(axes, points, LOOKS["mega"].colour)
    axes.axhline(1, color=LOOKS["mt_sac"].colour, linewidth=1)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("stage of every task (MT10, paper)")
    axes.set_ylabel("update, MT-SAC = 1")


def of_simulators(axes: Axes, rows: Rows) -> None:
    """Steps/s of simulators."""
    names = [row["simulator"].replace(", ", ",\n") for row in rows]
    axes.barh(names, [row["steps_per_second"] for row in rows], color="#8a8a8a")
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=6)
    axes.set_xlabel("environment steps/s (MT10)")


PANELS: dict[str, Callable[[Axes, Rows], None]] = {
    "tasks": against("tasks", "tasks (toy, cpu preset)"),
    "batches": against("batch", "rows of an update (toy10, cpu preset)"),
    "stages": of_stages,
    "simulators": of_simulators,
}


def curve(axes: Axes, points: list[tuple[float, float]], colour: str) -> None:
    """A line through points."""
    axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3)


if __name__ == "__main__":
    if sys.argv[1:] != ["draw"]:
        measure()
    draw()
