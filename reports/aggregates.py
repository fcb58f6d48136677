"""Final success in aggregate: intervals, profiles, tasks by algorithms, and what size buys."""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter

from reports import stats
from reports.drawing import (
    Drawing,
    bold_line,
    figure,
    legend,
    legend_lines,
    new_figure,
    section_looks,
    task_name,
    title,
    with_seeds,
    wrapped,
)
from reports.frames import MissingError, Section, generator


def _scored(section: Section) -> list[str]:
    if not section.scored:
        raise MissingError(f"no finished run has a final evaluation ({section.missing})")
    return section.scored


@figure("aggregates")
def aggregates(section: Section) -> Drawing:
    """Median, interquartile mean and mean with their intervals (Agarwal et al. 2021, Fig. 9)."""
    labels = _scored(section)
    styles = section_looks(section)
    longest = max(map(len, labels))
    shown = [item for item in stats.AGGREGATES.items() if section.graded or item[0] != "IQM"]
    made = new_figure(height=1.15 + (0.27 + 0.12 * (longest > 30)) * len(labels))
    cells = made.subplots(1, len(shown), sharey=True)
    rows = []
    for axes, (name, statistic) in zip(cells, shown, strict=True):
        for place, label in enumerate(labels):
            scores, look = section.scores(label).to_numpy(), styles[label]
            if name == "Mean":
                mean, low, high = stats.mean_interval(scores.mean(axis=1))
                estimate = stats.Estimate(float(mean), float(low), float(high))
            else:
                estimate = stats.stratified_interval(
                    scores, statistic, generator("aggregate", name, section.title, label)
                )
            if estimate.has_interval:
                width = estimate.high - estimate.low
                axes.barh(
                    place, width, left=estimate.low, height=0.6, color=look.colour, alpha=0.35
                )
            axes.vlines(estimate.value, place - 0.3, place + 0.3, color=look.colour, linewidth=2)
            if name == "Mean":  # a median or trimmed mean of one seed is none of all, nor near it
                points = np.full(len(scores), place)
                axes.plot(scores.mean(axis=1), points, "o", color="#222222", markersize=2.2)
            rows.append(
                {"aggregate": name, "label": label, "seeds": len(scores)}
                | {"value": estimate.value, "low": estimate.low, "high": estimate.high}
            )
        axes.set_title(name)
        axes.set_xlabel("success rate")
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_xlim(-0.02, max(0.1, 1.06 * axes.dataLim.xmax))
    counts = [f"{wrapped(label, 30)} (n = {section.seeds(label)})" for label in labels]
    cells[0].set_yticks(range(len(labels)), counts)
    cells[0].set_ylim(len(labels) - 0.45, -0.55)
    title(made, "Aggregate success", section)
    return Drawing(
        title="Aggregate success",
        figure=made,
        caption=section.caption(
            "Final success (lines): median over tasks of the mean over seeds"
            f"{', interquartile mean over seeds × tasks' if section.graded else ''}, mean. Bars, "
            f"from {stats.MIN_SEEDS} seeds on: 95 % t interval of the mean over seeds; of the "
            f"others the stratified bootstrap's, {stats.TOO_NARROW}. Points: the mean of each "
            "seed.",
            labels,
        ),
        data=pd.DataFrame(rows),
    )


THRESHOLDS = np.linspace(0, 1, 101)


@figure("performance_profile")
def performance_profile(section: Section) -> Drawing:
    """Share of runs x tasks above each success rate (Agarwal et al. 2021, Sec. 4.2)."""
    labels = _scored(section)
    styles = section_looks(section)
    made = new_figure(3.0)
    axes = made.subplots()
    frames = []
    for label in labels:
        value, low, high = stats.performance_profile(
            section.scores(label).to_numpy(),
            THRESHOLDS,
            generator("profile", section.title, label),
            replicates=1000,
        )
        look = styles[label]
        axes.fill_between(
            THRESHOLDS, low, high, step="post", color=look.colour, alpha=0.14, linewidth=0
        )
        bold_line(axes, THRESHOLDS, value, look, 1.8, staircase=True)
        frame = pd.DataFrame({"threshold": THRESHOLDS, "share": value, "low": low, "high": high})
        frames.append(frame.assign(label=label))
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("success rate τ")
    axes.set_ylabel("share of runs × tasks above τ")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    title(made, "Performance profile", section)
    legend(made, legend_lines(section, labels))
    return Drawing(
        title="Performance profile",
        figure=made,
        caption=section.caption(
            "Share of the finished runs × tasks whose final success rate exceeds τ; higher is "
            "better. Band: pointwise 95 % stratified bootstrap interval (1,000 replicates), from "
            f"{stats.MIN_SEEDS} seeds on, {stats.TOO_NARROW}.",
            labels,
        ),
        data=pd.concat(frames, ignore_index=True),
    )


@figure("task_heat_map")
def task_heat_map(section: Section) -> Drawing:
    """Final success, tasks x algorithms."""
    labels = _scored(section)
    columns = {label: section.scores(label).mean() for label in labels}
    columns |= {f"{name} (reference)": row for name, row in section.references.iterrows()}
    rates = pd.DataFrame(columns).reindex(list(section.tasks))
    rates.loc["mean over tasks"] = rates.mean()
    many = len(rates) > 25
    made = new_figure(
        height=1.3 + (0.155 if many else 0.2) * len(rates),
        width=min(7.1, 2.2 + 0.75 * len(columns)),
    )
    axes = made.subplots()
    seaborn.heatmap(
        rates, vmin=0, vmax=1, cmap="cividis", cbar=False, annot=True, fmt=".2f",
        annot_kws={"fontsize": 5.5 if many else 6.5}, ax=axes,
    )  # fmt: skip
    axes.axhline(len(rates) - 1, color="white", linewidth=2.5)
    axes.tick_params(length=0)
    slanted = len(columns) > 3 or max(map(len, columns)) > 12
    axes.set_xticks(
        np.arange(len(columns)) + 0.5,
        [wrapped(with_seeds(section, name) if name in labels else name) for name in columns],
        rotation=30 if slanted else 0,
        ha="right" if slanted else "center",
    )
    names = [task_name(str(task)) for task in rates.index]
    axes.set_yticks(np.arange(len(rates)) + 0.5, names, fontsize=6 if many else 7)
    axes.set(xlabel="", ylabel="")
    title(made, "Success per task", section)
    return Drawing(
        title="Success per task and algorithm",
        figure=made,
        caption=section.caption("Final success rate, mean over n seeds; dark 0, bright 1.", labels),
        data=rates.rename_axis("task").reset_index(),
    )


@figure("capacity")
def capacity_figure(section: Section) -> Drawing:
    """Success against parameters (the question of Soft Modularization Fig. 6 (a))."""
    sizes = section.parameters
    labels = [label for label in _scored(section) if label in sizes]
    if len({round(sizes[label]) for label in labels}) < 2:
        raise MissingError("needs finished runs of networks of two sizes")
    styles = section_looks(section)
    made = new_figure(3.0)
    axes = made.subplots()
    rows = []
    for label in labels:
        look, seeds = styles[label], section.scores(label).mean(axis=1)
        axes.scatter(
            np.full(len(seeds), sizes[label]),
            seeds,
            s=10,
            color=look.colour,
            alpha=0.5,
            linewidths=0,
        )
        axes.scatter(
            sizes[label],
            seeds.mean(),
            s=46,
            color=look.colour,
            marker=look.marker,
            edgecolors="#222222",
            linewidths=0.7,
            zorder=3,
            label=with_seeds(section, label),
        )
        rows += [
            {"label": label, "parameters": sizes[label], "seed": seed, "success": success}
            for seed, success in seeds.items()
        ]
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e6:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    low, high = min(sizes[label] for label in labels), max(sizes[label] for label in labels)
    ticks = [m * 10.0**e for e in range(2, 10) for m in (1, 2, 5)]
    axes.set_xticks([tick for tick in ticks if low / 1.5 < tick < high * 1.5])
    axes.set_xlim(low / 1.3, high * 1.3)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("parameters of actor and one critic, millions (logarithmic)")
    axes.set_ylabel("success rate, mean over tasks")
    title(made, "Success and size", section)
    legend(made, axes.get_legend_handles_labels()[0])
    return Drawing(
        title="Success and size",
        figure=made,
        caption=section.caption(
            "Final success against the parameters of actor and one critic at the end of training. "
            "Pale points: seeds; outlined: their mean.",
            labels,
        ),
        data=pd.DataFrame(rows),
    )
