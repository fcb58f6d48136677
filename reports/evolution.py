"""MEGA's populations and stages over training: who grew and why, how diverse, at what cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from reports import stats
from reports.drawing import (
    MARKERS,
    STEPS,
    Drawing,
    bold_line,
    draw_probe,
    figure,
    legend,
    legend_lines,
    map_panels,
    new_figure,
    section_looks,
    short,
    steps_axis,
    title,
    wide,
)
from reports.embedding import clarity
from reports.frames import MissingError, ProbedRun, Section, counted, labels_of
from reports.genotypes import Coding, Embedding, collect, embed


def _events(run: ProbedRun) -> Iterator[tuple[int, int, int, int, str]]:
    """Stage increases: step per task, task, old and new stage, cause.

    The last snapshot holds all there have been.
    """
    kept = [arrays for _, arrays in run.snapshots if "stage_events" in arrays]
    for arrays in kept[-1:]:
        names = [str(name) for name in arrays.get("cause_names", np.array([]))]
        for event in arrays["stage_events"]:
            step, task, old, new, code = (int(v) for v in event)
            cause = names[code] if 0 <= code < len(names) else f"cause {code}"
            yield step, task, old, new, cause


@figure("stages")
def stages(section: Section) -> Drawing:
    """MEGA's stage of every task over time, each increase marked with its cause."""
    runs = section.probed("stage")
    if not runs:
        raise MissingError("no run has recorded stages (only MEGA has them)")
    made, cells, rows = draw_probe(
        section, runs, "stage", "Stage of each task", "stage (modules allotted)", steps=True
    )
    events = [(run, *event) for run in runs for event in _events(run)]
    causes = sorted({event[-1] for event in events})
    shapes = {cause: MARKERS[(2 + i) % len(MARKERS)] for i, cause in enumerate(causes)}
    for (task, cause), rises in groupby(
        sorted(events, key=lambda event: (event[2], event[5])), lambda event: (event[2], event[5])
    ):
        if task < len(cells):
            steps, stages_ = zip(*((event[1], event[4]) for event in rises), strict=True)
            cells[task][2].plot(
                steps, stages_, shapes[cause], color="#222222", markersize=3.5, alpha=0.8, mew=0
            )
    for _, _, axes in cells:
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, high - 2), max(high, low + 2))
    shown = [run.run for run in runs]
    handles: list[Any] = legend_lines(section, labels_of(runs), shown)
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
            f"{counted(len(events), 'stage increase')}, by cause.",
            labels_of(runs),
            shown,
        ),
        data=rows.rename(columns={"value": "stage"}),
    )


SHOWN_WINDOWS, BINS_PER_WINDOW = 2, 3
"""Windows of training before and after a stage increase that are shown, and points in each."""


def _around_increases(section: Section) -> pd.DataFrame:
    """Training success and return around every stage increase, a row per run, event and bin.

    ``window`` is the time since the increase, in windows over which growth is decided. An increase
    without a full window of training on both sides is left out.
    """
    settings = section.runs.set_index("run")
    grown = section.probed("stage_events")
    metrics = section.results.metrics
    train = metrics[metrics["run"].isin([run.run for run in grown])]
    train = train[(train["kind"] == "train") & train["metric"].isin(["success", "return"])]
    rate = train["metric"] == "success"
    train = train.assign(value=train["value"].where(~rate, train["value"] / train["count"]))
    by_run = dict(list(train.groupby("run")))
    found: list[tuple[Any, ...]] = []
    for run in grown:
        of_run = settings.loc[run.run].to_dict()
        span = float(of_run.get("config.window", "nan"))
        span *= float(of_run.get("protocol.horizon", "nan"))
        if not span > 0 or run.run not in by_run:
            continue
        last = float(of_run["step"])
        table = by_run[run.run].pivot_table(
            index="step", columns=["metric", "task"], values="value"
        )
        steps = table.index.to_numpy(float)
        values = {key: column.to_numpy() for key, column in table.items()}
        for number, (step, task, *_) in enumerate(_events(run)):
            name = section.tasks[task]
            if step < span or step + span > last or ("return", name) not in values:
                continue
            window = (steps - step) / span
            near = (window > -SHOWN_WINDOWS) & (window <= SHOWN_WINDOWS)
            places, index = np.unique(np.ceil(window[near] * BINS_PER_WINDOW), return_inverse=True)
            success, return_ = (
                np.bincount(index, values[metric, name][near]) / np.bincount(index)
                for metric in ("success", "return")
            )
            middle = (places - 0.5) / BINS_PER_WINDOW
            found += [
                (*point, run.label, run.run, number)
                for point in zip(middle, success, return_, strict=True)
            ]
    return pd.DataFrame(found, columns=["window", "success", "return", "label", "run", "event"])


@figure("after_growth")
def after_growth(section: Section) -> Drawing:
    """What a stage increase does to training, right before and after it."""
    around = _around_increases(section)
    if around.empty:
        raise MissingError("no run has a stage increase with training on both sides of it")
    styles = section_looks(section)
    made = new_figure(2.7)
    labels = section.labels_in(around)
    for axes, column in zip(made.subplots(1, 2), ("success", "return"), strict=True):
        for label in labels:
            seeds = around[around["label"] == label].pivot_table(
                index="run", columns="window", values=column, aggfunc="mean"
            )
            mean, low, high = stats.mean_interval(seeds.dropna(axis="columns"))
            when, look = seeds.dropna(axis="columns").columns, styles[label]
            bold_line(axes, when, mean, look, 1.6)
            axes.fill_between(when, low, high, color=look.colour, alpha=0.1, linewidth=0)
        axes.axvline(0, color="#888888", linewidth=0.8)
        axes.set_xlabel("windows since the increase")
        axes.set_ylim(bottom=0)
    made.axes[0].set_title("success rate in training")
    made.axes[1].set_title("return in training")
    title(made, "Around stage increases", section)
    legend(made, legend_lines(section, labels, around["run"]))
    counts = around.drop_duplicates(["run", "event"])["label"].value_counts(sort=False)
    return Drawing(
        title="Around stage increases",
        figure=made,
        caption=section.caption(
            "Training episodes of a task around its stage increases, averaged over increases and "
            "then over seeds (band: 95 % t interval over seeds, from three on). A window is the "
            "number of episodes over which growth is decided. A task grows when it is stuck, so "
            "some rise afterwards is regression to the mean: compare variants, not before with "
            "after. Increases: " + ", ".join(f"{k} {v}" for k, v in counts.items()) + ".",
            labels,
            around["run"],
        ),
        data=around,
    )


@figure("diversity")
def diversity(section: Section) -> Drawing:
    """How different the genotypes of a population are, and how many children are clones."""
    runs = section.probed("hamming")
    if not runs:
        raise MissingError("no run has recorded the diversity of populations (only MEGA has them)")
    styles = section_looks(section)
    made = new_figure(2.7)
    cells = {"hamming": "Hamming distance", "clone_rate": "clones among children"}
    grid = made.subplots(1, 2, squeeze=False)[0]
    frames = []
    for axes, (key, words) in zip(grid, cells.items(), strict=True):
        of_key = [run for run in runs if any(key in arrays for _, arrays in run.snapshots)]
        for label in labels_of(of_key):
            look, seeds = styles[label], []
            for run in [run for run in of_key if run.label == label]:
                when, values = run.series(key)
                mean = values.reshape(len(when), -1).mean(axis=1)
                axes.fill_between(
                    when,
                    values.min(axis=1),
                    values.max(axis=1),
                    color=look.colour,
                    alpha=0.08,
                    linewidth=0,
                )
                axes.plot(
                    when,
                    mean,
                    color=look.colour,
                    linewidth=0.7,
                    alpha=0.7,
                    linestyle="-" if run.finished else ":",
                )
                frame = pd.DataFrame({"step": when, "value": mean})
                frames.append(frame.assign(label=label, run=run.run, quantity=key))
                seeds += [frame.assign(run=run.run)] if run.finished else []
            if seeds:
                bold = wide(pd.concat(seeds)).dropna(axis="columns").mean()
                bold_line(axes, bold.index, bold, look, 1.8)
        axes.set_title(words)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        steps_axis(axes, ticks=4)
    title(made, "Diversity of the populations", section)
    shown = [run.run for run in runs]
    legend(made, legend_lines(section, labels_of(runs), shown))
    return Drawing(
        title="Diversity of the populations",
        figure=made,
        caption=section.caption(
            "Left: mean pairwise Hamming distance of a task's genotypes, as a share of their "
            "length. Right: share of the children so far that equalled a living genotype of their "
            "task. Thin lines: every seed, mean over tasks, in the range of its tasks (pale); "
            "bold: mean over the finished seeds.",
            labels_of(runs),
            shown,
        ),
        data=pd.concat(frames, ignore_index=True),
    )


@figure("genetic_cost")
def genetic_cost(section: Section) -> Drawing:
    """What the genetic algorithm costs: share of training time, and time per generation."""
    spent = section.timing.pivot_table(
        index=["label", "run", "finished", "step"], columns="section", values="seconds",
        aggfunc="last",
    )  # fmt: skip
    if not {"genetic", "total"} <= set(spent.columns) or not (spent["genetic"] > 0).any():
        raise MissingError("no run has recorded time spent in a genetic algorithm")
    spent = spent[spent["genetic"] > 0].reset_index()
    generations = {run.run: run.series("generation") for run in section.probed("generation")}
    spent["share"] = spent["genetic"] / spent["total"]
    spent["per_generation"] = np.nan
    for run, (when, count) in generations.items():
        mine = spent["run"] == run
        total = np.interp(spent.loc[mine, "step"], when, count.sum(axis=1))
        spent.loc[mine, "per_generation"] = (
            1000 * spent.loc[mine, "genetic"] / np.where(total > 0, total, np.nan)
        )
    styles = section_looks(section)
    made = new_figure(2.6)
    left, right = made.subplots(1, 2)
    labels = section.labels_in(spent)
    for axes, column in ((left, "share"), (right, "per_generation")):
        for (label, _, finished), of_run in spent.groupby(["label", "run", "finished"]):
            look = styles[str(label)]
            look = look if finished else replace(look, dash=":")
            bold_line(axes, of_run["step"], of_run[column], look, 1.1)
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        steps_axis(axes, ticks=4)
    left.yaxis.set_major_formatter(PercentFormatter(1))
    left.set_title("share of the training time so far")
    right.set_title("milliseconds per generation of one task")
    title(made, "Cost of the genetic algorithm", section)
    legend(made, legend_lines(section, labels, spent["run"]))
    return Drawing(
        title="Cost of the genetic algorithm",
        figure=made,
        caption=section.caption(
            "Wall-clock time spent in the genetic algorithm since the start, as a share of all "
            "training time (left) and per generation of one task's population (right). A line is a "
            "seed (dotted: unfinished).",
            labels,
            spent["run"],
        ),
        data=spent[["label", "run", "step", "genetic", "total", "share", "per_generation"]],
    )


@figure("weight_intervals")
def weight_intervals(section: Section) -> Drawing:
    """The weights that a genotype can express per level under both functions (MEGA Fig. 12)."""
    runs = section.probed("weight_intervals")
    if not runs:
        raise MissingError("no run has recorded weight intervals (only MEGA has them)")
    # The table has a row for each level reached so far, so it grows with the stages.
    of_first = [a for run in runs if run.label == runs[0].label for _, a in run.snapshots]
    longest = max(
        (a for a in of_first if "weight_intervals" in a), key=lambda a: len(a["weight_intervals"])
    )
    table, precision = longest["weight_intervals"], longest.get("precision")
    bits = "precision not recorded" if precision is None else f"{int(precision)} bits per weight"
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
        caption=f"Smallest and largest weight that a segment of {runs[0].label} can express, "
        f"{bits}: computed, not measured, so without seeds or episodes (MEGA Fig. 12). Suite "
        f"{section.suite}.",
        data=pd.DataFrame(table, columns=columns),
    )


MAX_EMBEDDED_RUNS = 5


def _coding(section: Section, run: ProbedRun) -> Coding:
    """How a run reads its genotypes, by its configuration."""
    precision = [int(a["precision"]) for _, a in run.snapshots if "precision" in a][-1]
    config = section.runs.set_index("run").loc[run.run]
    coding = Coding(precision)
    if pd.notna(function := config.get("config.weights")):
        coding = coding._replace(function=str(function))
    if pd.notna(offset := config.get("config.offset")):
        coding = coding._replace(offset=float(offset))
    return coding


def _embedding(run: ProbedRun, coding: Coding) -> Embedding:
    """Genotypes from the last fifth of a run's recorded training."""
    kept = [(s, a) for s, a in run.snapshots if {"genotypes", "lengths", "precision"} <= set(a)]
    since = 0.8 * kept[-1][0]
    last = [(a["genotypes"], a["lengths"]) for step, a in kept if step >= since]
    return embed(collect(last, coding.precision), coding)


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
            embedded.append((run, _embedding(run, _coding(section, run))))
        except ValueError as reason:
            refused.append(f"seed {run.seed}: {reason}")
    if not embedded:
        raise MissingError("; ".join(refused))
    made = map_panels(
        section,
        [
            (f"seed {run.seed}{'' if run.finished else ' (unfinished)'}", map_.points, map_.task)
            for run, map_ in embedded
        ],
    )
    title(made, f"Genotypes by task ({short(first[0].label, 30)})", section)
    clear = "; ".join(
        f"seed {run.seed}: {clarity(map_.silhouette_task)} by task, "
        + (
            f"{map_.silhouette_stage:.2f} by stage alone"
            if np.isfinite(map_.silhouette_stage)
            else f"none by stage (all at stage {map_.stage[0]})"
        )
        + f", {counted(len(map_.points), 'genotype')}, perplexity {map_.perplexity:.0f}"
        for run, map_ in embedded
    )
    shown = f"{len(embedded)} of {counted(len(first), 'run')}" + (
        f" ({'; '.join(refused)})" if refused else ""
    )
    return Drawing(
        title="Genotypes by task",
        figure=made,
        caption=section.caption(
            "t-SNE of the distinct genotypes of the last fifth of training, as weight matrices "
            f"({_coding(section, embedded[0][0])}) on a common grid with the head in a row of its "
            "own; positions have no unit. Silhouettes of the weight matrices, 1 = clear clusters, "
            f"0 = none: {clear}. {shown} shown.",
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
