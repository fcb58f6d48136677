"""Success and return over steps and hours: one curve per run, their mean bold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, MaxNLocator

from reports import stats
from reports.drawing import (
    ABLATION_FIGURES,
    STEPS,
    UNFINISHED,
    Drawing,
    Look,
    bold_line,
    figure,
    legend,
    legend_lines,
    new_figure,
    panels,
    section_looks,
    steps_axis,
    styled,
    thin_lines,
    title,
)
from reports.frames import Ablation, MissingError, Section, generator
from reports.running import curve_rows, success_by_hours


def _draw_curve(axes: Axes, rows: pd.DataFrame, look: Look, bold: float, band: bool) -> None:
    """Every run thin, unfinished ones dotted; the mean of the finished bold, maybe with a band."""
    if rows.empty:
        return
    runs = rows.groupby(["run", "finished", "step"])["value"].mean().unstack()
    steps = runs.columns.to_numpy()
    known = runs.notna().to_numpy()
    thin_lines(
        axes,
        [
            (steps[there], values[there], bool(finished))
            for (_, finished), values, there in zip(runs.index, runs.to_numpy(), known, strict=True)
        ],
        look.colour,
    )
    finished = runs[runs.index.get_level_values("finished")].dropna(axis="columns")
    if finished.empty:
        return
    steps = finished.columns.to_numpy()
    mean, low, high = stats.mean_interval(finished.to_numpy())
    if band and np.isfinite(low).any():
        axes.fill_between(steps, low, high, color=look.colour, alpha=0.14, linewidth=0)
    bold_line(axes, steps, mean, look, bold)


def _curve_handles(section: Section, rows: pd.DataFrame) -> list[Any]:
    handles = legend_lines(section, section.labels_in(rows), rows["run"])
    return handles + ([] if rows["finished"].all() else [UNFINISHED])


_CURVE_ESTIMATOR = "Thin lines: every seed (dotted: unfinished run). Bold: mean of the finished."


def _draw_references(section: Section, axes: Axes) -> None:
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


_MEAN_SUCCESS = (
    "Success rate of the deterministic policy at each evaluation and, last, the final one, mean "
    f"over tasks. {_CURVE_ESTIMATOR} Band: 95 % t interval of that mean, from {stats.MIN_SEEDS} "
    "seeds on. Dashed grey: reference policies, where recorded."
)


def _mean_curves(section: Section, labels: list[str], words: str, estimator: str) -> Drawing:
    rows = curve_rows(section, "success")
    styles = section_looks(section)
    made = new_figure(3.4)
    axes = made.subplots()
    for label in labels:
        _draw_curve(axes, rows[rows["label"] == label], styles[label], 2.2, band=True)
    _draw_references(section, axes)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlim(0, max(1, int(rows["step"].max())))
    axes.set_ylabel("success rate, mean over tasks")
    steps_axis(axes)
    title(made, words, section)
    legend(made, _curve_handles(section, rows))
    means = rows.groupby(["label", "run", "step"])["value"].mean()
    return Drawing(
        title=words,
        figure=made,
        caption=section.caption(estimator, section.labels_in(rows), rows["run"]),
        data=means.reset_index(name="success"),
    )


@figure("learning_curves")
def learning_curves(section: Section) -> Drawing:
    """Mean success over tasks against environment steps (MEGA Fig. 6)."""
    return _mean_curves(section, section.labels, "Learning curves", _MEAN_SUCCESS)


@ABLATION_FIGURES.register("ablation")
@styled
def ablation_curves(ablation: Ablation) -> Drawing:
    """Mean success of an ablation's variants (MEGA Fig. 8, 9; D2R Fig. 7, 11, 12)."""
    return _mean_curves(
        ablation.section,
        list(ablation.labels),
        f"Ablation {ablation.name}: curves",
        f"{ablation.description} ({ablation.paper}). {_MEAN_SUCCESS}",
    )


MAX_POINTS = 60
"""Evaluations of which the sample-efficiency curve draws an interval each."""


@figure("sample_efficiency")
def sample_efficiency(section: Section) -> Drawing:
    """Interquartile mean over runs x tasks against environment steps (Agarwal et al. 2021)."""
    if not section.graded:
        raise MissingError("with one episode per task there is no interquartile mean")
    rows = curve_rows(section, "success")
    rows = rows[rows["finished"] & rows["task"].isin(section.tasks)]
    styles = section_looks(section)
    made = new_figure(3.2)
    axes = made.subplots()
    points = []
    for label in section.labels:
        of_label = rows[rows["label"] == label]
        if of_label.empty:
            continue
        cube = of_label.pivot_table(index="run", columns=["step", "task"], values="value")
        whole = cube.notna().all().groupby(level="step").all()  # runs and tasks at the step
        steps = whole.index[whole].to_numpy()
        if len(steps) > MAX_POINTS:
            steps = steps[np.linspace(0, len(steps) - 1, MAX_POINTS).round().astype(int)]
        for step in steps:
            estimate = stats.stratified_interval(
                cube[step].to_numpy(),
                stats.interquartile_mean,
                generator("sample efficiency", section.title, label, step),
                replicates=500,
            )
            points.append({"label": label, "step": int(step), "seeds": len(cube)})
            points[-1] |= {"iqm": estimate.value, "low": estimate.low, "high": estimate.high}
    data = pd.DataFrame(points)
    if data.empty:
        raise MissingError(f"no finished run was evaluated on every task ({section.missing})")
    drawn = section.labels_in(data)
    for label in drawn:
        curve, look = data[data["label"] == label], styles[label]
        axes.fill_between(
            curve["step"], curve["low"], curve["high"], color=look.colour, alpha=0.16, linewidth=0
        )
        bold_line(axes, curve["step"], curve["iqm"], look, 2)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlim(0, max(1, int(data["step"].max())))
    axes.set_ylabel("success rate, IQM over runs × tasks")
    steps_axis(axes)
    title(made, "Sample efficiency", section)
    legend(made, legend_lines(section, drawn, rows["run"]))
    return Drawing(
        title="Sample efficiency",
        figure=made,
        caption=section.caption(
            "Interquartile mean of the success rates of all finished runs on all tasks at each "
            "evaluation; band: 95 % stratified bootstrap interval (500 replicates), from "
            f"{stats.MIN_SEEDS} seeds on, {stats.TOO_NARROW}.",
            drawn,
            rows["run"],
        ),
        data=data,
    )


@figure("success_per_hour")
def success_per_hour(section: Section) -> Drawing:
    """Mean success over tasks against wall-clock hours of training."""
    rows = success_by_hours(section)
    styles = section_looks(section)
    made = new_figure(3.2)
    axes = made.subplots()
    drawn = section.labels_in(rows)
    for label in drawn:
        look, runs = styles[label], rows[rows["label"] == label]
        finished = [run for _, run in runs[runs["finished"]].groupby("run")]
        thin_lines(
            axes,
            [
                (run["hours"].to_numpy(), run["value"].to_numpy(), bool(run["finished"].iloc[0]))
                for _, run in runs.groupby("run")
            ],
            look.colour,
        )
        # Where every finished run of the algorithm was under way.
        low = max((run["hours"].min() for run in finished), default=0)
        high = min((run["hours"].max() for run in finished), default=0)
        if low < high:
            grid = np.linspace(low, high, 100)
            curves = [np.interp(grid, run["hours"], run["value"]) for run in finished]
            bold_line(axes, grid, np.mean(curves, axis=0), look, 2)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlim(left=0)
    axes.set_xlabel("wall-clock hours of training, evaluation included")
    axes.set_ylabel("success rate, mean over tasks")
    title(made, "Success per wall-clock hour", section)
    legend(made, _curve_handles(section, rows))
    return Drawing(
        title="Success per wall-clock hour",
        figure=made,
        caption=section.caption(
            f"Success rate at each evaluation against the time trained by then. {_CURVE_ESTIMATOR} "
            "The bold mean of an algorithm ends where the first of its finished runs ended. "
            "Hours depend on the machine and on what else ran on it: "
            f"{'; '.join(section.hardware) or 'hardware not recorded'}.",
            drawn,
            rows["run"],
        ),
        data=rows.rename(columns={"value": "success"}),
    )


def _task_curves(section: Section, metric: str, words: str, ylabel: str) -> Drawing:
    rows = curve_rows(section, metric, per_task=True)
    styles = section_looks(section)
    made, cells = panels(section, ylabel, share_y=metric == "success")
    parts = dict(list(rows.groupby(["task", "label"])))
    for _, task, axes in cells:
        for label in section.labels:
            if (task, label) in parts:
                _draw_curve(axes, parts[task, label], styles[label], 1.4, band=False)
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
            f"{words}, at each evaluation and, last, the final one. {_CURVE_ESTIMATOR}{scale}",
            section.labels_in(rows),
            rows["run"],
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
