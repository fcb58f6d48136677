"""Measure this machine for docs/benchmarks.md, and put tables and figure of it there.

    python docs/benchmarks/measure.py              about 50 minutes on an idle machine
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
from bench.speed import (
    example_batch,
    in_turns,
    median_seconds,
    simulator_rows,
    speed_rows,
    training_row,
    training_rows,
    work,
)
from reports.drawing import STYLE, legend, looks, new_figure
from reports.writers import fill

HERE = Path(__file__).resolve().parent
SCALED = ("mt_sac", "d2r", "mega")
STAGES = ("mt_sac", *(f"mega@fixed{stage}" for stage in (1, 3, 8, 16, 24)))
EVERY = tuple(
    dict.fromkeys(["mt_sac", *names(), "soft_module@shallow", "care@original", "mega@critic_mlp"])
)
"""MT-SAC first: ratios are to it."""
TRAINED = ("mega", "d2r", "mtmh_sac", "mt_sac", "soft_module")
TASKS = (1, 10, 25, 50, 200)
BATCHES = (8, 16, 32, 64, 128, 256)
HIGH = (0, 1, 3, 5, 10)
"""Tasks of ten that stand at stage 24."""
ZEN4_PEAK = 164
"""GFLOP/s of a product of `bench.speed.PEAK_SHAPE` on two threads of the machine that public
implementations were timed on, in milliseconds per update at the papers' sizes on MT10:"""
AIM_MS = {
    "mtmh_sac": 225, "soft_module": 551 / 1.8, "soft_module@shallow": 260, "d2r": 1554 / 4,
    "paco": 592 / 2.5, "moore": 535, "care@original": 140,
}  # fmt: skip
"""What we hold an update to there, as the page derives it."""
AIMS = {"mt_sac": "85 %", "mega": "ratio 1.50", "mega@critic_mlp": "ratio 1.05"}
"""The same as a share of the peak, or as a multiple of MT-SAC's time."""
Rows = list[dict[str, Any]]
Found = dict[str, dict[str, Any]]
"""Of a part: ``rows``, and ``hardware``, ``versions`` and ``commit`` they were measured with."""


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
        }
        for place, (high, agent) in enumerate(zip(HIGH, agents, strict=True))
    ]


def training() -> Rows:
    """What a run's loop makes of it, on one thread."""
    return training_rows(TRAINED, "mt10_rand", "cpu", "cpu", 1, 1_000)


def delay() -> Rows:
    """The same of MEGA with the simulator in a process of its own, waited for or not."""
    ways = ((0, {"act_delay": 0}), (1, {"act_delay": 0}), (1, {"act_delay": 1}))
    mega = partial(training_row, "mega", "mt10_rand", "cpu", "cpu", 1, 1_000)
    measured = in_turns([partial(mega, overrides=change, workers=n) for n, change in ways])
    return [row | change for row, (_, change) in zip(measured, ways, strict=True)]


ALL = os.cpu_count() or 1
PARTS: dict[str, Callable[[], Rows]] = {
    "paper": lambda: speed(EVERY, ["mt10_rand"], "paper"),
    "paper_all": lambda: speed(EVERY, ["mt10_rand"], "paper", threads=[ALL]),
    "training": training,
    "delay": delay,
    "simulators": lambda: simulator_rows([RunSpec.resolve("mt_sac", "mt10_rand", 0)]),
    "stages": lambda: speed(STAGES, ["mt10_rand"], "paper"),
    "mixed": mixed,
    "tasks": lambda: speed(SCALED, [f"toy{count}" for count in TASKS], "cpu"),
    "batches": lambda: [
        row
        for rows in BATCHES
        for row in speed(SCALED, ["toy10"], "cpu", overrides={"batch_per_task": rows})
    ],
    "cpu": lambda: speed(EVERY, ["mt10_rand"], "cpu"),
    "cpu_all": lambda: speed(EVERY, ["mt10_rand"], "cpu", threads=[ALL]),
    "mt50": lambda: speed(EVERY, ["mt50_rand"], "paper"),
    "mt50_all": lambda: speed(EVERY, ["mt50_rand"], "paper", threads=[ALL]),
}


def where() -> dict[str, Any]:
    """What is kept of this machine beside what was measured on it."""
    return {
        "hardware": machine.hardware("cpu"), "versions": machine.versions(),
        "commit": machine.git_commit(),
    }  # fmt: skip


def record(part: str, here: dict[str, Any], measured: Rows) -> None:
    """Put a part into ``measured.json``."""
    to = HERE / "measured.json"
    found: dict[str, Any] = json.loads(to.read_text()) if to.exists() else {}
    found[part] = here | {"rows": measured}
    to.write_text(json.dumps(found, indent=1) + "\n")


def measure(parts: Sequence[str]) -> None:
    """Parts, one after the other, each into ``measured.json`` when it is done."""
    here = where()  # before the file changes, which is a change of the commit
    for name in parts:
        print(name, flush=True)
        record(name, here, PARTS[name]())


def rows(found: Found, part: str) -> Rows:
    """What was measured for a part."""
    measured: Rows = found[part]["rows"]
    return measured


def of_paper(found: Found) -> Rows:
    """An update at the papers' sizes, on one thread and on all."""
    shown = []
    for both in zip(rows(found, "paper"), rows(found, "paper_all"), strict=True):
        one = both[0]
        cells = {
            "algorithm": f"`{one['algorithm']}`", "GFLOP of products": f"{one['gflop']:.1f}",
            "aim": aim(one),
        }  # fmt: skip
        for row in both:
            cells |= {
                f"ms, {threads(row)}": f"{row['update_ms']:.0f}",
                f"ratio, {threads(row)}": f"{row['ratio']:.2f}",
                f"share of peak, {threads(row)}": f"{row['peak_share']:.0%}",
            }
        shown.append(cells | {"ms per act": f"{one['act_ms']:.2f}"})
    return shown


def aim(row: dict[str, Any]) -> str:
    """What an update is held to, on any machine."""
    name = row["algorithm"]
    if name not in AIM_MS:
        return AIMS.get(name, "")
    return f"{1e3 * row['gflop'] / AIM_MS[name] / ZEN4_PEAK:.0%}".replace("%", " %")


def threads(row: dict[str, Any]) -> str:
    """In words."""
    return f"{row['threads']} thread" + "s" * (row["threads"] > 1)


def of_sizes(found: Found) -> Rows:
    """Updates on MT50 and at the reduced preset, on one thread and on all."""
    shown: dict[str, dict[str, Any]] = {}
    for part, words in {"mt50": "MT50", "cpu": "MT10, `cpu` preset"}.items():
        for of in (part, f"{part}_all"):
            for row in rows(found, of):
                places = 0 if row["update_ms"] > 99 else 1
                cells = shown.setdefault(row["algorithm"], {})
                cells[f"{words}, {threads(row)}"] = (
                    f"{row['update_ms']:,.{places}f} ({row['ratio']:.2f}, {row['peak_share']:.0%})"
                )
    return [{"algorithm": f"`{name}`"} | cells for name, cells in shown.items()]


def of_training(found: Found) -> Rows:
    """Real training at the reduced preset."""
    return [
        {
            "algorithm": f"`{row['algorithm']}`",
            "steps/s of all ten tasks (slowest, fastest of three)": (
                f"{row['steps_per_second']:.0f} ({row['slowest']:.0f}, {row['fastest']:.0f})"
            ),
            "ms per step of ten tasks": f"{1e4 / row['steps_per_second']:.1f}",
            **{part: f"{row[part]:.0%}" for part in ("update", "simulator", "act", "rest")},
            "steps per task in an hour": f"{360 * row['steps_per_second']:,.0f}",
            "steps/s of an evaluation": f"{row['evaluation_steps_per_second']:,.0f}",
        }
        for row in rows(found, "training")
    ]


def of_peers(found: Found) -> Rows:
    """Public implementations, in turns with ours."""
    shown: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows(found, "peers"):
        for suffix, words in {"": "", "act_": ", acting on ten observations"}.items():
            if f"theirs_{suffix}ms" not in row:
                continue
            theirs, ours = row[f"theirs_{suffix}ms"], row[f"ours_{suffix}ms"]
            places = 0 if theirs > 20 else 2
            cells = shown.setdefault(
                (row["peer"], row["what"] + words),
                {
                    "implementation": row["peer"],
                    "what": row["what"] + words,
                    "million parameters, theirs / ours": f"{row['their_parameters'] / 1e6:.2f}"
                    f" / {row['our_parameters'] / 1e6:.2f}",
                },
            )
            cells[f"ms, {threads(row)}, theirs / ours"] = f"{theirs:.{places}f} / {ours:.{places}f}"
            cells[f"times as fast, {threads(row)}"] = f"{theirs / ours:.1f}"
    return list(shown.values())


def of_delay(found: Found) -> Rows:
    """What stepping beside the update brings."""
    return [
        {
            "MEGA, MT10, `cpu` preset": f"`--sim-workers {row['sim_workers']}`"
            + " `--set act_delay=1`" * row["act_delay"],
            "steps/s of all ten tasks": f"{row['steps_per_second']:.0f}",
            "waiting for the simulator": f"{row['simulator']:.0%}",
        }
        for row in rows(found, "delay")
    ]


def of_machine(found: Found) -> Rows:
    """Where the parts were measured, those of one machine and version together."""
    groups: dict[str, list[str]] = {}
    for part, what in found.items():
        software = ", ".join(
            f"{name} {what['versions'][name]}" for name in ("torch", "metaworld", "mujoco")
        )
        facts = what["hardware"]
        commit, _, changes = what["commit"].partition("+")
        commit = commit[:7] + (f"+{changes}" if changes else "")
        words = f"{facts['processor']}, {facts['cores']} cores, {facts['memory_gb']} GiB"
        groups.setdefault(f"{words}; {software}; commit {commit}", []).append(part)
    return [{"measured": ", ".join(parts), "on": where} for where, parts in groups.items()]


def of_mixed(found: Found) -> Rows:
    """MEGA's update against how many of its tasks have grown."""
    measured = rows(found, "mixed")
    least, most = measured[0], measured[-1]

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
        for row in measured
    ]


def of_simulators(found: Found) -> Rows:
    """Simulators, beside metaworld's own in one process."""
    measured = rows(found, "simulators")
    speeds = {row["simulator"]: row["steps_per_second"] for row in measured}
    return [
        {
            "simulator, MT10, random actions": row["simulator"],
            "environment steps/s": f"{row['steps_per_second']:,.0f}",
            "against metaworld's sync": f"{speeds[row['simulator']] / speeds[OFFICIAL]:.2f}",
        }
        for row in measured
    ]


OFFICIAL = "metaworld's, sync"
TABLES = {
    "machine": of_machine, "paper": of_paper, "sizes": of_sizes, "training": of_training,
    "delay": of_delay, "mixed": of_mixed, "simulators": of_simulators, "peers": of_peers,
}  # fmt: skip


def markdown(table: Sequence[dict[str, Any]]) -> str:
    """A table of rows of equal keys."""
    lines = [list(table[0]), ["---"] * len(table[0]), *([*row.values()] for row in table)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def with_tables(text: str, found: Found) -> str:
    """The page ``text`` with its tables, each between its two comments, made of ``found``."""
    missing = list(TABLES)

    def table(name: str) -> str:
        missing.remove(name)
        return markdown(TABLES[name](found))

    text = fill(text, "measured", table)
    if missing:
        raise SystemExit(f"the page has no place for the table {missing[0]}")
    return text


def drawn(found: Found) -> Figure:
    """A panel for each of `PANELS`."""
    with mpl.rc_context(STYLE):
        made = new_figure(4.6)
        for axes, part in zip(made.subplots(2, 2).flat, PANELS, strict=True):
            PANELS[part](axes, rows(found, part))
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

    def panel(axes: Axes, measured: Rows) -> None:
        for label in SCALED:
            mine = [row for row in measured if row["algorithm"] == label]
            curve(axes, [(row[of], row["update_ms"]) for row in mine], LOOKS[label].colour)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(words)
        axes.set_ylabel("ms per update")
        axes.set_xticks(sorted({row[of] for row in measured}))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(ScalarFormatter())
            axis.set_minor_formatter(NullFormatter())

    return panel


def draw_stages(axes: Axes, measured: Rows) -> None:
    """MEGA's update against the stage of its tasks, as a multiple of MT-SAC's."""
    grown = [row for row in measured if row["algorithm"] != "mt_sac"]
    points = [(int(row["algorithm"].partition("fixed")[2]), row["ratio"]) for row in grown]
    curve(axes, points, LOOKS["mega"].colour)
    axes.axhline(1, color=LOOKS["mt_sac"].colour, linewidth=1)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("stage of every task (MT10, paper preset)")
    axes.set_ylabel("update, MT-SAC = 1")


def draw_simulators(axes: Axes, measured: Rows) -> None:
    """Steps/s of simulators."""
    labels = [row["simulator"].replace(", ", ",\n") for row in measured]
    axes.barh(labels, [row["steps_per_second"] for row in measured], color="#8a8a8a")
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=6)
    axes.set_xlabel("environment steps/s (MT10)")


PANELS: dict[str, Callable[[Axes, Rows], None]] = {
    "tasks": against("tasks", "tasks (toy, cpu preset)"),
    "batches": against("batch", "rows of an update (toy10, cpu preset)"),
    "stages": draw_stages,
    "simulators": draw_simulators,
}


def curve(axes: Axes, points: Sequence[tuple[float, float]], colour: str) -> None:
    """A line through points."""
    axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3)


if __name__ == "__main__":
    if sys.argv[1:] != ["show"]:
        measure(sys.argv[1:] or list(PARTS))
    show()
