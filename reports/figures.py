"""Figures: one registered function each, from a section to a drawing and the numbers behind it.

To add one, write a function from ``Section`` to ``Drawing`` under ``@figure("name")``; raise
``MissingError`` with the reason where the results do not support it. What they share is in
``reports.drawing``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from reports import stats
from reports.drawing import (
    FIGURES,
    MARKERS,
    STEPS,
    TASK_COLOURS,
    UNFINISHED,
    Drawing,
    Look,
    figure,
    legend,
    legend_line,
    new_figure,
    panels,
    section_looks,
    short,
    steps_axis,
    task_name,
    title,
)
from reports.frames import MissingError, ProbedRun, Section, order_key, published
from reports.genotypes import OFFSET, Embedding, collect, embed

__all__ = ["FIGURES", "Drawing", "figure"]

# Curves ------------------------------------------------------------------------------------------


FEW_POINTS = 8
"""A curve of fewer evaluations than this shows each as a point; a single one is no line."""


def _wide(rows: pd.DataFrame) -> pd.DataFrame:
    """Runs x steps, the mean over the rows of a cell."""
    return rows.pivot_table(index="run", columns="step", values="value")


def _draw_curve(axes: Axes, rows: pd.DataFrame, look: Look, bold: float, band: bool) -> None:
    """Every run thin, unfinished ones dotted; the mean of the finished bold, maybe with a band."""
    for _, run in rows.groupby("run"):
        series = run.groupby("step")["value"].mean()
        unfinished = not bool(run["finished"].iloc[0])
        axes.plot(
            series.index.to_numpy(),
            series.to_numpy(),
            color=look.colour,
            linewidth=0.6,
            alpha=0.55,
            linestyle=":" if unfinished else "-",
            marker="." if len(series) < FEW_POINTS else None,
            markersize=3,
        )
    finished = _wide(rows[rows["finished"]]).dropna(axis="columns")
    if finished.empty:
        return
    steps = finished.columns.to_numpy()
    mean, low, high = stats.mean_interval(finished.to_numpy())
    if band and np.isfinite(low).any():
        axes.fill_between(steps, low, high, color=look.colour, alpha=0.14, linewidth=0)
    axes.plot(
        steps,
        mean,
        color=look.colour,
        linestyle=look.dash,
        linewidth=bold,
        marker="o" if len(steps) < FEW_POINTS else None,
        markersize=2.2 * bold,
        clip_on=False,  # the last point stands on the edge
        alpha=0.9,  # curves that coincide show each other
    )


def _curve_rows(section: Section, metric: str) -> pd.DataFrame:
    rows = section.curves(metric)
    if rows.empty:
        raise MissingError(f"no run has been evaluated for {metric} during training yet")
    return rows


def _curve_handles(section: Section, rows: pd.DataFrame) -> list[Any]:
    styles = section_looks(section)
    drawn = [label for label in section.labels if label in set(rows["label"])]
    handles = [legend_line(styles[label], label) for label in drawn]
    return handles + ([] if rows["finished"].all() else [UNFINISHED])


_CURVE_ESTIMATOR = "Thin lines: every seed (dotted: unfinished run). Bold: mean of the finished."


@figure("learning_curves")
def learning_curves(section: Section) -> Drawing:
    """Mean success over tasks against environment steps (MEGA Fig. 6)."""
    rows = _curve_rows(section, "success")
    styles = section_looks(section)
    made = new_figure(3.4)
    axes = made.subplots()
    for label in section.labels:
        _draw_curve(axes, rows[rows["label"] == label], styles[label], 2.2, band=True)
    for name, rates in section.references.iterrows():
        level = float(rates.mean())
        axes.axhline(level, color="#8a8a8a", linewidth=0.9, linestyle=(0, (2, 2)))
        axes.annotate(
            f"{name} {level:.2f}",
            (1.0, level),
            xycoords=("axes fraction", "data"),
            xytext=(-2, -2 if level > 0.5 else 2),
            textcoords="offset points",
            ha="right",
            va="top" if level > 0.5 else "bottom",
            fontsize=7,
            color="#666666",
        )
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlim(0, max(1, int(rows["step"].max())))
    axes.set_ylabel("success rate, mean over tasks")
    steps_axis(axes)
    title(made, "Learning curves", section)
    legend(made, _curve_handles(section, rows))
    means = rows.groupby(["label", "run", "step"])["value"].mean()
    return Drawing(
        title="Learning curves",
        figure=made,
        caption=section.caption(
            "Success rate of the deterministic policy at each evaluation and, last, the final one, "
            "mean over tasks. "
            f"{_CURVE_ESTIMATOR} Band: 95 % t interval of that mean, from {stats.MIN_SEEDS} seeds "
            "on. Dashed grey: reference policies, where recorded."
        ),
        data=means.reset_index(name="success"),
    )


def _task_curves(section: Section, metric: str, words: str, ylabel: str) -> Drawing:
    rows = _curve_rows(section, metric)
    styles = section_looks(section)
    made, cells = panels(section, ylabel, share_y=metric == "success")
    for _, task, axes in cells:
        of_task = rows[rows["task"] == task]
        for label in section.labels:
            _draw_curve(axes, of_task[of_task["label"] == label], styles[label], 1.4, band=False)
        if metric == "success":
            axes.set_ylim(-0.04, 1.04)
            axes.set_yticks([0, 0.5, 1])
        else:
            axes.yaxis.set_major_locator(MaxNLocator(3))
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    title(made, words, section)
    legend(made, _curve_handles(section, rows), xlabel=STEPS)
    scale = "" if metric == "success" else " Every panel has a vertical scale of its own."
    return Drawing(
        title=words,
        figure=made,
        caption=section.caption(
            f"{words}, at each evaluation and, last, the final one. {_CURVE_ESTIMATOR}{scale}"
        ),
        data=rows.rename(columns={"value": metric}),
    )


@figure("task_success")
def task_success(section: Section) -> Drawing:
    """Success against environment steps, a panel per task."""
    return _task_curves(section, "success", "Success rate per task", "success rate")


@figure("task_returns")
def task_returns(section: Section) -> Drawing:
    """Mean episode return against environment steps, a panel per task."""
    return _task_curves(section, "return", "Return per task", "episode return (unscaled reward)")


# Agents' own quantities over time ----------------------------------------------------------------


def _draw_probe(
    section: Section, runs: list[ProbedRun], key: str, words: str, ylabel: str, steps: bool
) -> tuple[Figure, list[tuple[int, str, Axes]], pd.DataFrame]:
    """A per-task probe over training; ``steps`` draws a staircase, seeds nudged apart."""
    styles = section_looks(section)
    made, cells = panels(section, ylabel)
    frames = []
    for run in runs:
        when, values = run.series(key)
        if values.shape[1:] != (len(section.tasks),):
            raise MissingError(f"probe {key!r} of run {run.run} has not one value per task")
        frames.append(
            pd.DataFrame(
                {
                    "label": run.label,
                    "run": run.run,
                    "finished": run.finished,
                    "step": np.repeat(when, values.shape[1]),
                    "task": np.tile(list(section.tasks), len(when)),
                    "value": values.ravel().astype(float),
                }
            )
        )
        others = [other.run for other in runs if other.label == run.label]
        nudge = 0.08 * (others.index(run.run) - (len(others) - 1) / 2) if steps else 0.0
        for index, _, axes in cells:
            axes.plot(
                when,
                values[:, index] + nudge,
                color=styles[run.label].colour,
                linewidth=0.7,
                alpha=0.7,
                linestyle="-" if run.finished else ":",
                drawstyle="steps-post" if steps else "default",
            )
    rows = pd.concat(frames, ignore_index=True)
    for _, task, axes in cells:
        chosen = rows[(rows["task"] == task) & rows["finished"]]
        for label, group in chosen.groupby("label"):
            mean = _wide(group).dropna(axis="columns").mean()
            look = styles[str(label)]
            axes.plot(
                mean.index.to_numpy(),
                mean.to_numpy(),
                color=look.colour,
                linestyle=look.dash,
                linewidth=1.5,
                drawstyle="steps-post" if steps else "default",
            )
    title(made, words, section)
    return made, cells, rows


def _labels_of(runs: Iterable[ProbedRun]) -> list[str]:
    return sorted({run.label for run in runs}, key=order_key)


def _events(run: ProbedRun) -> Iterator[tuple[int, int, int, int, str]]:
    """Distinct stage increases: step per task, task, old and new stage, cause."""
    seen: set[tuple[int, ...]] = set()
    for _, arrays in run.snapshots:
        names = [str(name) for name in arrays.get("cause_names", np.array([]))]
        for event in arrays.get("stage_events", np.zeros((0, 5), dtype=int)):
            step, task, old, new, code = (int(v) for v in event)
            if (step, task, old, new) not in seen:
                seen.add((step, task, old, new))
                cause = names[code] if 0 <= code < len(names) else f"cause {code}"
                yield step, task, old, new, cause


@figure("stages")
def stages(section: Section) -> Drawing:
    """MEGA's stage of every task over time, each increase marked with its cause."""
    runs = section.probed("stage")
    if not runs:
        raise MissingError("no run has recorded stages (only MEGA has them)")
    made, cells, rows = _draw_probe(
        section, runs, "stage", "Stage of each task", "stage (modules allotted)", steps=True
    )
    events = [(run, *event) for run in runs for event in _events(run)]
    causes = sorted({event[-1] for event in events})
    shapes = {cause: MARKERS[(2 + i) % len(MARKERS)] for i, cause in enumerate(causes)}
    for _, step, task, _, new, cause in events:
        if task < len(cells):
            cells[task][2].plot(
                step, new, shapes[cause], color="#222222", markersize=3.5, alpha=0.8, mew=0
            )
    for _, _, axes in cells:
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, high - 2), max(high, low + 2))
    styles = section_looks(section)
    handles: list[Any] = [legend_line(styles[label], label) for label in _labels_of(runs)]
    handles += [
        Line2D([], [], color="#222222", linestyle="", marker=shapes[c], markersize=4, label=c)
        for c in causes
    ]
    legend(made, handles, xlabel=STEPS)
    return Drawing(
        title="Stage of each task",
        figure=made,
        caption=section.caption(
            "Stage (number of modules a task may use) over training. Thin lines: every seed, "
            "nudged apart where they coincide; bold: mean over the finished seeds. Markers: "
            f"{len(events)} stage increases, by cause.",
            _labels_of(runs),
        ),
        data=rows.rename(columns={"value": "stage"}),
    )


@figure("route_temperature")
def route_temperature(section: Section) -> Drawing:
    """D2R's routing temperature of every task over time (D2R Fig. 9)."""
    runs = section.probed("route_temperature")
    if not runs:
        raise MissingError("no run has recorded route temperatures (only D2R has them)")
    made, cells, rows = _draw_probe(
        section, runs, "route_temperature", "Route temperature", "route temperature", steps=False
    )
    for _, _, axes in cells:
        axes.yaxis.set_major_locator(MaxNLocator(3))
    styles = section_looks(section)
    legend(made, [legend_line(styles[label], label) for label in _labels_of(runs)], xlabel=STEPS)
    return Drawing(
        title="Route temperature",
        figure=made,
        caption=section.caption(
            "Temperature of the routing softmax per task (no unit). Thin lines: every seed; bold: "
            "mean over the finished seeds.",
            _labels_of(runs),
        ),
        data=rows.rename(columns={"value": "route_temperature"}),
    )


# Modules -----------------------------------------------------------------------------------------


def _modules(section: Section) -> pd.DataFrame:
    """Modules used per finished run and task: from genotypes, or the mean over traced states."""
    rows = []
    for run in section.probed("modules_used"):
        if run.finished:
            _, values = run.series("modules_used")
            rows.append((run, values[-1], "genotype"))
    rows += [(run, used.mean(axis=1), "routes") for run, used in section.traced("modules_used")]
    frames = [
        pd.DataFrame(
            {
                "label": run.label,
                "seed": run.seed,
                "task": list(section.tasks),
                "modules": np.asarray(values, dtype=float),
                "origin": origin,
            }
        )
        for run, values, origin in rows
        if len(values) == len(section.tasks)
    ]
    if not frames:
        raise MissingError("no finished run has recorded the modules it uses (MEGA and D2R do)")
    return pd.concat(frames, ignore_index=True)


@figure("modules_used")
def modules_used(section: Section) -> Drawing:
    """Modules used per task, every seed a point, their mean outlined."""
    rows = _modules(section)
    styles = section_looks(section)
    labels = sorted(set(rows["label"]), key=order_key)
    means = rows.groupby(["label", "task"])["modules"].mean().unstack("label")
    order = list(means.mean(axis=1).sort_values(kind="stable").index)
    made = new_figure(height=1.2 + max(0.2, 0.08 + 0.07 * len(labels)) * len(order))
    axes = made.subplots()
    for k, label in enumerate(labels):
        offset = 0.7 * ((k + 0.5) / len(labels) - 0.5)
        look = styles[label]
        of_label = rows[rows["label"] == label]
        axes.scatter(
            of_label["modules"],
            [order.index(task) + offset for task in of_label["task"]],
            s=14,
            color=look.colour,
            marker=look.marker,
            alpha=0.45,
            linewidths=0,
        )
        axes.scatter(
            means.loc[order, label],
            np.arange(len(order)) + offset,
            s=42,
            color=look.colour,
            marker=look.marker,
            edgecolors="#222222",
            linewidths=0.7,
            zorder=3,
            label=short(label, 60),
        )
    axes.set_yticks(range(len(order)), [task_name(str(task)) for task in order])
    axes.set_ylim(-0.6, len(order) - 0.4)
    axes.set_xlim(left=0)
    axes.set_xlabel("modules used")
    title(made, "Modules used per task", section)
    legend(made, axes.get_legend_handles_labels()[0])
    return Drawing(
        title="Modules used per task",
        figure=made,
        caption=section.caption(
            "Modules that reach the action head. Of genotypes: through weights above 0.01 in the "
            "best genotype at the end of training; of routes: mean over states of the final "
            "evaluation. Pale points: seeds; outlined: their mean. Tasks ordered by the means.",
            labels,
        ),
        data=rows,
    )


@figure("modules_difference")
def modules_difference(section: Section) -> Drawing:
    """MEGA's minus D2R's modules per task, sorted, with the mean over tasks (MEGA Fig. 7)."""
    rows = _modules(section)
    sides = []
    for origin, usual in (("genotype", "mega"), ("routes", "d2r")):
        labels = sorted(set(rows.loc[rows["origin"] == origin, "label"]), key=order_key)
        if not labels:
            raise MissingError(f"needs finished runs of MEGA and of D2R; none has {origin}")
        sides.append(usual if usual in labels else labels[0])
    ours, theirs = sides
    means = rows.groupby(["label", "task"])["modules"].mean().unstack("label")
    delta = (means[ours] - means[theirs]).sort_values(kind="stable")
    mean = float(delta.mean())
    styles = section_looks(section)
    made = new_figure(height=1.0 + 0.19 * len(delta))
    axes = made.subplots()
    colours = [styles[ours if value > 0 else theirs].colour for value in delta]
    axes.barh(np.arange(len(delta)), delta.to_numpy(), color=colours, height=0.72)
    axes.axvline(0, color="#555555", linewidth=0.8)
    axes.axvline(mean, color="#222222", linewidth=1.2, linestyle=(0, (4, 2)))
    axes.annotate(
        f"mean {mean:+.1f}".replace("-", "−"),
        (mean, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(3, 1),
        textcoords="offset points",
        fontsize=7.5,
    )
    axes.set_yticks(range(len(delta)), [task_name(str(task)) for task in delta.index])
    axes.set_ylim(-0.6, len(delta) - 0.4)
    axes.set_xlabel(f"modules used: {short(ours, 30)} minus {short(theirs, 30)}")
    title(made, "Difference in module quantity", section)
    paper = published("modules_used").query("algorithm == 'mega minus d2r'")
    printed = f"{float(paper['modules_mean'].iloc[0]):+.1f} on {paper['suite'].iloc[0]}"
    return Drawing(
        title="Difference in module quantity",
        figure=made,
        caption=section.caption(
            f"Modules used by {ours} minus those used by {theirs}, mean over the finished seeds of "
            "each, tasks sorted; bars in the colour of the algorithm that uses more; dashed: mean "
            f"over tasks, {mean:+.2f} (MEGA Sec. 5.3 prints {printed}).",
            [ours, theirs],
        ),
        data=delta.rename("difference").rename_axis("task").reset_index(),
    )


# Genotypes ---------------------------------------------------------------------------------------


@figure("weight_intervals")
def weight_intervals(section: Section) -> Drawing:
    """The weights that a genotype can express per level under both functions (MEGA Fig. 12)."""
    runs = section.probed("weight_intervals")
    if not runs:
        raise MissingError("no run has recorded weight intervals (only MEGA has them)")
    # The table has a row for each level reached so far, so it grows with the stages.
    tables = [a["weight_intervals"] for run in runs for _, a in run.snapshots]
    table = max(tables, key=len)
    precisions = [int(a["precision"]) for _, a in runs[0].snapshots if "precision" in a]
    bits = f"{precisions[-1]} bits per weight" if precisions else "precision not recorded"
    made = new_figure(2.5)
    pair = made.subplots(1, 2, sharey=True)
    for axes, column, name, colour in zip(
        pair, (1, 3), ("Softmax", "HalfSoftmax"), ("#44AA99", "#332288"), strict=True
    ):
        axes.vlines(table[:, 0], table[:, column], table[:, column + 1], color=colour, linewidth=5)
        for edge in (column, column + 1):
            axes.plot(table[:, 0], table[:, edge], "o", color=colour, markersize=3.5)
        axes.set_title(name)
        axes.set_xlabel("level (weights in the segment)")
        axes.set_ylim(-0.03, 1.03)
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    pair[0].set_ylabel("reachable module weight")
    title(made, "Interval of module weights", section)
    columns = ["level", "softmax_min", "softmax_max", "halfsoftmax_min", "halfsoftmax_max"]
    return Drawing(
        title="Interval of module weights",
        figure=made,
        caption=f"Smallest and largest weight that a segment can express, {bits}: computed, not "
        f"measured, so without seeds or episodes (MEGA Fig. 12). Suite {section.suite}.",
        data=pd.DataFrame(table, columns=columns),
    )


MAX_EMBEDDED_RUNS = 5


def _embedding(run: ProbedRun) -> Embedding:
    """Genotypes from the last fifth of a run's recorded training."""
    kept = [(s, a) for s, a in run.snapshots if {"genotypes", "lengths", "precision"} <= set(a)]
    since = 0.8 * kept[-1][0]
    last = [(a["genotypes"], a["lengths"]) for step, a in kept if step >= since]
    return embed(collect(last, int(kept[-1][1]["precision"])), int(kept[-1][1]["precision"]))


@figure("genotypes")
def genotype_map(section: Section) -> Drawing:
    """t-SNE of the genotypes, coloured by task (MEGA Fig. 10)."""
    runs = section.probed("genotypes")
    if not runs:
        raise MissingError("no run has recorded genotypes (only MEGA has them)")
    first = [run for run in runs if run.label == runs[0].label]
    first = [run for run in first if run.finished] or first
    embedded, refused = [], []
    for run in first[:MAX_EMBEDDED_RUNS]:
        try:
            embedded.append((run, _embedding(run)))
        except ValueError as reason:
            refused.append(f"seed {run.seed}: {reason}")
    if not embedded:
        raise MissingError("; ".join(refused))
    columns = min(3, len(embedded))
    rows = -(-len(embedded) // columns)
    few = len(section.tasks) <= 12
    below = 0 if few else 0.14 * len(section.tasks) / 4
    made = new_figure(height=below + (0.6 + 2.35 * rows if columns > 1 else 3.6))
    grid = made.subplots(rows, columns, squeeze=False)
    for spare in grid.flat[len(embedded) :]:
        spare.set_axis_off()
    palette = [
        (TASK_COLOURS[i % len(TASK_COLOURS)], MARKERS[(i + i // 10) % len(MARKERS)])
        for i in range(len(section.tasks))
    ]
    for axes, (run, map_) in zip(grid.flat, embedded, strict=False):
        for index, (colour, marker) in enumerate(palette):
            mine = map_.points[map_.task == index]
            axes.scatter(*mine.T, s=13, color=colour, marker=marker, linewidths=0, alpha=0.8)
        axes.set_title(f"seed {run.seed}{'' if run.finished else ' (unfinished)'}")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel("t-SNE 1", fontsize=7)
        axes.set_ylabel("t-SNE 2" if axes in grid[:, 0] else "", fontsize=7)
    handles = [
        Line2D([], [], linestyle="", marker=m, color=c, markersize=4, label=task_name(name))
        for name, (c, m) in zip(section.tasks, palette, strict=True)
    ]
    if not few:
        legend(made, handles, size=6.5)
    elif grid.size > len(embedded):
        grid.flat[len(embedded)].legend(handles=handles, loc="center left")
    else:
        made.legend(handles=handles, loc="outside right center", ncols=1, fontsize=7)
    title(made, f"Genotypes by task ({short(first[0].label, 30)})", section)
    clarity = "; ".join(
        f"seed {run.seed}: {map_.silhouette_task:.2f} by task, "
        + (
            f"{map_.silhouette_stage:.2f} by stage alone"
            if np.isfinite(map_.silhouette_stage)
            else f"none by stage (all at stage {map_.stage[0]})"
        )
        + f", {len(map_.points)} genotypes, perplexity {map_.perplexity:.0f}"
        for run, map_ in embedded
    )
    shown = f"{len(embedded)} of {len(first)} runs" + (
        f" ({'; '.join(refused)})" if refused else ""
    )
    return Drawing(
        title="Genotypes by task",
        figure=made,
        caption=section.caption(
            "t-SNE of the distinct genotypes of the last fifth of training, as weight matrices "
            f"(HalfSoftmax, offset {OFFSET}) on a common grid with the head in a row of its own; "
            "positions have no unit. Silhouettes of the weight matrices, 1 = clear clusters, 0 = "
            f"none: {clarity}. {shown} shown.",
            [first[0].label],
        ),
        data=pd.concat(
            pd.DataFrame(
                {
                    "run": run.run,
                    "seed": run.seed,
                    "task": [section.tasks[i] for i in map_.task],
                    "stage": map_.stage,
                    "x": map_.points[:, 0],
                    "y": map_.points[:, 1],
                }
            )
            for run, map_ in embedded
        ),
    )
