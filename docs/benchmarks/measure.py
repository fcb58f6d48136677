"""Measure this machine for docs/benchmarks.md, and put tables and figure of it there.

    python docs/benchmarks/measure.py              about 20 minutes on an idle machine
    python docs/benchmarks/measure.py paper cpu    these parts again
    python docs/benchmarks/measure.py show         tables and figure of the numbers beside this

Every part is what `bench speed` measures; algorithms that are compared take turns in one process.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter, ScalarFormatter

from algorithms import names
from algorithms.mega import MEGA
from bench import machine
from bench.spec import RunSpec
from bench.speed import example_batch, median_seconds, simulator_rows, speed_rows, work
from reports.drawing import STYLE, legend, looks, new_figure
from reports.writers import fill

HERE = Path(__file__).resolve().parent
SCALED = ("mt_sac", "d2r", "mega")
STAGES = ("mt_sac", *(f"mega@fixed{stage}" for stage in (1, 3, 8, 16, 24)))
EVERY = tuple(dict.fromkeys(["mt_sac", *names(), "soft_module@shallow", "mega@critic_mlp"]))
"""MT-SAC first: ratios are to it."""
TASKS = (1, 10, 25, 50, 200)
BATCHES = (8, 16, 32, 64, 128, 256)
HIGH = (0, 1, 3, 5, 10)
"""Tasks of ten that stand at stage 24."""
AIMS = {
    "mega": 1.5, "d2r": 1.8, "soft_module": 1.6, "moore": 2.6, "care": 1.3, "paco": 1.4,
    "mtmh_sac": 1.1, "mega@critic_mlp": 1.05,
}  # fmt: skip
"""What we hold an update at the papers' sizes to, as a multiple of MT-SAC's."""
Rows = list[dict[str, Any]]


def speed(labels: tuple[str, ...], suites: list[str], preset: str, **more: Any) -> Rows:
    """Rows of `bench.speed.speed_rows` on the CPU, with one thread unless ``more`` has others."""
    settings: dict[str, Any] = {"threads": [1], "seconds": 3} | more
    return speed_rows(labels, suites, [preset], "cpu", **settings)


def mixed() -> Rows:
    """MEGA's update, with a plain critic, while some of ten tasks stand at stage 24 and the others
    at 3; and the longest that an increase took which appends a module."""
    change = {"mega.replace": "at_once"}
    spec = RunSpec.resolve("mega@critic_mlp", "mt10_rand", 0, preset_name="paper", overrides=change)
    suite, plan = spec.make_suite().spec, spec.protocol.plan
    agents, grown = [], []
    for high in HIGH:
        agent = spec.agent(suite, spec.agent_config, plan, seed=0)
        assert isinstance(agent, MEGA)
        for task in range(high):
            for _ in range(3, 24):
                started = time.perf_counter()
                agent.lengthen(task, 0)
                if task == 0:  # the others find the modules there
                    grown.append(time.perf_counter() - started)
        agents.append(agent)
    batch = example_batch(agents[0], spec.protocol.batch_per_task, {})
    rounds = [
        [median_seconds(partial(agent.update, batch), 1) for agent in agents] for _ in range(5)
    ]
    return [
        {
            "high": high,
            "update_ms": 1e3 * min(each[place] for each in rounds),
            "gflop": work(agent, batch),
            "growth_ms": 1e3 * max(grown),
            "processor": machine.hardware("cpu")["processor"],
        }
        for place, (high, agent) in enumerate(zip(HIGH, agents, strict=True))
    ]


PARTS: dict[str, Callable[[], Rows]] = {
    "paper": lambda: speed(EVERY, ["mt10_rand"], "paper"),
    "simulators": lambda: simulator_rows("mt10_rand", 10),
    "stages": lambda: speed(STAGES, ["mt10_rand"], "paper"),
    "mixed": mixed,
    "tasks": lambda: speed(SCALED, [f"toy{count}" for count in TASKS], "cpu"),
    "batches": lambda: [
        row
        for rows in BATCHES
        for row in speed(SCALED, ["toy10"], "cpu", overrides={"batch_per_task": rows})
    ],
    "cpu": lambda: speed(EVERY, ["mt10_rand"], "cpu"),
    "threads": lambda: speed(EVERY, ["mt10_rand"], "paper", threads=[os.cpu_count() or 1]),
    "mt50": lambda: speed(EVERY, ["mt50_rand"], "paper", seconds=6),
}


def measure(parts: Sequence[str]) -> None:
    """Parts into ``measured.json``, one after the other."""
    to = HERE / "measured.json"
    found: dict[str, Any] = json.loads(to.read_text()) if to.exists() else {}
    found |= {
        "hardware": machine.hardware("cpu"), "versions": machine.versions(),
        "commit": machine.git_commit(),
    }  # fmt: skip
    for name in parts:
        print(name, flush=True)
        found[name] = PARTS[name]()
        to.write_text(json.dumps(found, indent=1) + "\n")


def of_paper(found: dict[str, Rows]) -> Rows:
    """An update at the papers' sizes."""
    return [
        {
            "algorithm": f"`{row['algorithm']}`",
            "ms per update": f"{row['update_ms']:.0f}",
            "ratio to MT-SAC": f"{row['ratio']:.2f}",
            "aim": AIMS.get(row["algorithm"], ""),
            "GFLOP of products": f"{row['gflop']:.1f}",
            "share of peak": f"{row['peak_share']:.0%}",
            "ms per act": f"{row['act_ms']:.2f}",
        }
        for row in found["paper"]
    ]


def of_sizes(found: dict[str, Rows]) -> Rows:
    """The same updates with all threads, on MT50 and at the reduced preset."""
    parts = {
        "paper": "MT10, 1 thread",
        "threads": f"MT10, {found['threads'][0]['threads']} threads",
        "mt50": "MT50, 1 thread",
        "cpu": "MT10, `cpu` preset",
    }
    shown = {row["algorithm"]: dict.fromkeys(parts.values(), "–") for row in found["paper"]}
    for part, words in parts.items():
        for row in found[part]:
            places = 0 if row["update_ms"] > 99 else 1
            shown[row["algorithm"]][words] = f"{row['update_ms']:,.{places}f} ({row['ratio']:.2f})"
    return [{"algorithm": f"`{name}`"} | cells for name, cells in shown.items()]


def of_step(found: dict[str, Rows]) -> Rows:
    """A whole step of all tasks at the reduced preset."""
    shown = []
    for row in found["cpu"]:
        parts = {name: row[f"{name}_ms"] for name in ("step", "act", "update")}
        total = sum(parts.values())
        shown.append(
            {
                "algorithm": f"`{row['algorithm']}`",
                "ms per step of ten tasks": f"{total:.1f}",
                "simulator": f"{parts['step'] / total:.0%}",
                "acting": f"{parts['act'] / total:.0%}",
                "update": f"{parts['update'] / total:.0%}",
                "update, share of peak": f"{row['peak_share']:.0%}",
                "steps per task in an hour": f"{3.6e6 / total:,.0f}",
            }
        )
    return shown


def of_mixed(found: dict[str, Rows]) -> Rows:
    """MEGA's update against how many of its tasks have grown."""
    least, most = found["mixed"][0], found["mixed"][-1]

    def share(row: dict[str, Any], of: str) -> str:
        return f"{(row[of] - least[of]) / (most[of] - least[of]):.0%}"

    return [
        {
            "tasks at stage 24, of ten": row["high"],
            "ms per update": f"{row['update_ms']:.0f}",
            "of the way from none to all": share(row, "update_ms"),
            "GFLOP of products": f"{row['gflop']:.1f}",
            "of the way": share(row, "gflop"),
        }
        for row in found["mixed"]
    ]


def of_machines(found: dict[str, Rows]) -> Rows:
    """Simulators."""
    return [
        {
            "simulator, MT10, random actions": row["simulator"],
            "environment steps/s": f"{row['steps_per_second']:,.0f}",
            "against metaworld's sync": f"{row['ratio']:.2f}",
        }
        for row in found["simulators"]
    ]


TABLES = {
    "paper": of_paper, "sizes": of_sizes, "step": of_step, "mixed": of_mixed,
    "simulators": of_machines,
}  # fmt: skip


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table of rows of equal keys."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([*row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def with_tables(text: str, found: dict[str, Rows]) -> str:
    """The page ``text`` with its tables, each between its two comments, made of ``found``."""
    missing = list(TABLES)

    def table(name: str) -> str:
        missing.remove(name)
        return markdown(TABLES[name](found))

    text = fill(text, "measured", table)
    if missing:
        raise SystemExit(f"the page has no place for the table {missing[0]}")
    return text


def drawn(found: dict[str, Rows]) -> Figure:
    """A panel for each of `PANELS`."""
    with mpl.rc_context(STYLE):
        made = new_figure(4.6)
        for axes, part in zip(made.subplots(2, 2).flat, PANELS, strict=True):
            PANELS[part](axes, found[part])
        lines = [
            Line2D([], [], color=LOOKS[label].colour, marker="o", markersize=3, label=label)
            for label in SCALED
        ]
        legend(made, lines)
    return made


def show() -> None:
    """Tables and figure of ``measured.json`` where the page has them."""
    found, page = json.loads((HERE / "measured.json").read_text()), HERE.parent / "benchmarks.md"
    page.write_text(with_tables(page.read_text(), found))
    with mpl.rc_context(STYLE):
        drawn(found).savefig(HERE / "scaling.png", dpi=150)


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
    axes.set_xlabel("stage of every task (MT10, paper preset)")
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


def curve(axes: Axes, points: Sequence[tuple[float, float]], colour: str) -> None:
    """A line through points."""
    axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3)


if __name__ == "__main__":
    if sys.argv[1:] != ["show"]:
        measure(sys.argv[1:] or list(PARTS))
    show()
