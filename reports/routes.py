"""Which modules and connections the tasks use: D2R's routes, Soft Modularization's, MEGA's counts.

D2R's traces hold ``routes`` ``(T, P, M, M)``: row r holds the weights by which module r + 2 reads
modules 1 .. r + 1, the last row those of the action head. Soft Modularization's ``soft_routes``
``(T, P, L - 1, n, n)`` are the weights of each layer, destination by source.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from reports.drawing import (
    STEPS,
    Drawing,
    draw_probe,
    figure,
    grid_columns,
    legend,
    legend_lines,
    map_panels,
    new_figure,
    section_looks,
    short,
    task_grid,
    task_name,
    title,
    with_seeds,
)
from reports.embedding import RANDOM_STATE, clarity, plane, silhouette
from reports.frames import (
    MissingError,
    ProbedRun,
    Section,
    counted,
    labels_of,
    order_key,
    published,
)

NOTICED = 0.01
"""A source counts from this weight on (D2R App. C.3)."""


@figure("route_temperature")
def route_temperature(section: Section) -> Drawing:
    """D2R's routing temperature of every task over time, with its success (D2R Fig. 9)."""
    runs = section.probed("route_temperature")
    if not runs:
        raise MissingError("no run has recorded route temperatures (only D2R has them)")
    made, cells, rows = draw_probe(
        section, runs, "route_temperature", "Route temperature", "route temperature", steps=False
    )
    labels, styles = labels_of(runs), section_looks(section)
    success = section.curves("success")
    success = success[success["label"].isin(labels) & success["finished"]]
    columns = grid_columns(section)
    for index, task, axes in cells:
        axes.yaxis.set_major_locator(MaxNLocator(3))
        other = axes.twinx()
        for label, curve in success[success["task"] == task].groupby("label"):
            mean = curve.groupby("step")["value"].mean()
            other.plot(
                mean.index, mean, color="#222222", linestyle=styles[str(label)].dash, linewidth=1
            )
        other.set_ylim(-0.04, 1.04)
        other.set_yticks([0, 0.5, 1])
        other.grid(visible=False)
        rightmost = index % columns == columns - 1 or index == len(cells) - 1
        other.tick_params(labelsize=6.5, labelright=rightmost, right=rightmost)
    shown = [run.run for run in runs]
    handles: list[Line2D] = legend_lines(section, labels, shown)
    line = Line2D([], [], color="#222222", linewidth=1, label="success rate (right axis)")
    legend(made, [*handles, line], xlabel=STEPS)
    return Drawing(
        title="Route temperature and success",
        figure=made,
        caption=section.caption(
            "Temperature of the routing softmax per task (no unit). Thin lines: every seed; bold: "
            "mean over the finished seeds. Black: success rate of the evaluations, mean over the "
            "finished seeds (right axis).",
            labels,
            shown,
        ),
        data=rows.rename(columns={"value": "route_temperature"}),
    )


# Modules -----------------------------------------------------------------------------------------


def _modules(section: Section) -> pd.DataFrame:
    """Modules used per finished run and task: from genotypes, or the mean over traced states."""
    rows: list[tuple[ProbedRun, np.ndarray, np.ndarray | float, str]] = []
    for run in section.probed("modules_used"):
        if run.finished:
            _, values = run.series("modules_used")
            rows.append((run, values[-1], np.nan, "genotype"))
    for run, used in section.traced("modules_used"):
        rows.append((run, used.mean(axis=1), used.std(axis=1), "routes"))
    frames = [
        pd.DataFrame(
            {
                "label": run.label,
                "run": run.run,
                "seed": run.seed,
                "task": list(section.tasks),
                "modules": np.asarray(values, dtype=float),
                "deviation": deviation,
                "origin": origin,
            }
        )
        for run, values, deviation, origin in rows
        if len(values) == len(section.tasks)
    ]
    if not frames:
        raise MissingError("no finished run has recorded the modules it uses (MEGA and D2R do)")
    return pd.concat(frames, ignore_index=True)


@figure("modules_used")
def modules_used(section: Section) -> Drawing:
    """Modules used per task with their deviation over states (D2R Fig. 8)."""
    rows = _modules(section)
    styles = section_looks(section)
    labels = sorted(set(rows["label"]), key=order_key)
    means = rows.groupby(["label", "task"])["modules"].mean().unstack("label")
    spread = rows.groupby(["label", "task"])["deviation"].mean().unstack("label")
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
        axes.errorbar(
            means.loc[order, label],
            np.arange(len(order)) + offset,
            xerr=spread.loc[order, label],
            fmt="none",
            ecolor=look.colour,
            elinewidth=0.9,
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
            label=with_seeds(section, label, of_label["run"]),
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
            "genotype that the final evaluation runs; of routes: mean over states of the final "
            "evaluation, with the standard deviation over states (bars). Pale points: seeds; "
            "outlined: their mean. Tasks ordered by the means.",
            labels,
            rows["run"],
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
    made = new_figure(height=1.2 + 0.21 * len(delta))
    axes = made.subplots()
    colours = [styles[ours if value > 0 else theirs].colour for value in delta]
    axes.barh(np.arange(len(delta)), delta.to_numpy(), color=colours, height=0.72, alpha=0.75)
    used = {
        label: of_label.pivot_table(index="task", columns="run", values="modules")
        for label, of_label in rows.groupby("label")
    }
    against = {
        ours: used[ours].sub(means[theirs], axis="index").loc[delta.index],
        theirs: -used[theirs].sub(means[ours], axis="index").loc[delta.index],
    }
    for (label, points), offset in zip(against.items(), (0.18, -0.18), strict=True):
        # Counts of modules are whole numbers: seeds beside each other, or they would coincide.
        apart = np.linspace(-0.12, 0.12, points.shape[1]) if points.shape[1] > 1 else np.zeros(1)
        axes.scatter(
            points.to_numpy().ravel(),
            (np.arange(len(delta))[:, None] + offset + apart).ravel(),
            s=9,
            color=styles[label].colour,
            marker=styles[label].marker,
            edgecolors="white",
            linewidths=0.4,
            zorder=3,
            label=with_seeds(section, label, points.columns),
        )
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
    legend(made, axes.get_legend_handles_labels()[0])
    paper = published("modules_used").query("algorithm == 'mega minus d2r'")
    printed = f"{float(paper['modules_mean'].iloc[0]):+.1f} on {paper['suite'].iloc[0]}"
    return Drawing(
        title="Difference in module quantity",
        figure=made,
        caption=section.caption(
            f"Modules used by {ours} minus those used by {theirs}, mean over the finished seeds of "
            "each, tasks sorted; bars in the colour of the algorithm that uses more. Points: every "
            "seed of either against the mean of the other. Dashed: mean "
            f"over tasks, {mean:+.2f} (MEGA Sec. 5.3 prints {printed}).",
            [ours, theirs],
            rows["run"],
        ),
        data=pd.concat([delta.rename("difference"), *against.values()], axis=1)
        .rename_axis("task")
        .reset_index(),
    )


# Routes ------------------------------------------------------------------------------------------

MAX_PANELS = 3
MAX_POINTS = 400
"""Routes of which t-SNE makes one plane."""


def _first_seeds(section: Section, key: str) -> list[tuple[ProbedRun, np.ndarray]]:
    """The first finished run with ``key`` of each algorithm."""
    first: dict[str, tuple[ProbedRun, np.ndarray]] = {}
    for run, array in section.traced(key):
        if array.shape[0] == len(section.tasks):
            first.setdefault(run.label, (run, array))
    return list(first.values())


@figure("route_map")
def route_map(section: Section) -> Drawing:
    """t-SNE of routes by task (D2R Fig. 6 (a), Soft Modularization Fig. 4)."""
    found = [*_first_seeds(section, "routes"), *_first_seeds(section, "soft_routes")]
    found.sort(key=lambda pair: "@" in pair[0].label)  # algorithms before their variants
    if not found:
        raise MissingError("no finished run has recorded its routes (D2R and soft modules do)")
    maps, words, frames = [], [], []
    for run, routes in found[:MAX_PANELS]:
        states = min(routes.shape[1], max(2, MAX_POINTS // len(section.tasks)))
        chosen = np.linspace(0, routes.shape[1] - 1, states).round().astype(int)
        flat = routes[:, chosen].reshape(len(section.tasks) * states, -1).astype(np.float64)
        task = np.repeat(np.arange(len(section.tasks)), states)
        points, perplexity = plane(flat)
        maps.append((f"{short(run.label, 30)}, seed {run.seed}", points, task))
        words.append(
            f"{run.label} {clarity(silhouette(flat, task))} ({counted(len(flat), 'route')}, "
            f"perplexity {perplexity:.0f})"
        )
        frames.append(
            pd.DataFrame(
                {
                    "label": run.label,
                    "seed": run.seed,
                    "task": [section.tasks[index] for index in task],
                    "x": points[:, 0],
                    "y": points[:, 1],
                }
            )
        )
    made = map_panels(section, maps)
    title(made, "Routes by task", section)
    left = len(found) - len(maps)
    more = f" Left out: {counted(left, 'further algorithm')}." if left else ""
    return Drawing(
        title="Routes by task",
        figure=made,
        caption=section.caption(
            "t-SNE of the routing weights of states of the final evaluation, one seed of each "
            f"algorithm (random state {RANDOM_STATE}); positions have no unit. Silhouette of the "
            f"weights by task, 1 = clear clusters, 0 = none: {'; '.join(words)}.{more}",
            [run.label for run, _ in found[: len(maps)]],
        ),
        data=pd.concat(frames, ignore_index=True),
    )


def _connections(routes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean weight ``(T, M, M)`` of each connection in use, and share of states ``(T, M)`` in which
    the head reaches each module."""
    edges = routes > NOTICED
    size = routes.shape[-1]
    used = edges[..., size - 1, :].copy()
    for module in range(size - 1, 0, -1):
        used |= used[..., module, None] & edges[..., module - 1, :]
    # Row r feeds module r + 1 (counted from 0), the last row the head, which is always in use.
    head = np.ones((*used.shape[:-1], 1), dtype=bool)
    fed = np.concatenate([used[..., 1:], head], axis=-1)
    weights = np.where(edges & fed[..., None], routes, 0)
    return weights.mean(axis=1), used.mean(axis=1)


def _draw_arcs(axes: Axes, weights: np.ndarray, used: np.ndarray, colour: str) -> None:
    """Modules on a line in topological order, connections as arcs from left to right."""
    size = len(used)
    angle = np.linspace(0, np.pi, 24)
    arcs, widths, alphas = [], [], []
    for row, column in zip(*np.nonzero(weights > 0.02), strict=True):
        centre, radius = (row + 1 + column) / 2, (row + 1 - column) / 2
        # Arcs of neighbours above, all as flat as the panel needs.
        arcs.append(
            np.stack([centre - radius * np.cos(angle), radius**0.8 * np.sin(angle)], axis=1)
        )
        widths.append(0.4 + 1.6 * weights[row, column])
        alphas.append(min(1.0, 0.12 + weights[row, column]))
    axes.add_collection(LineCollection(arcs, colors=colour, linewidths=widths, alpha=alphas))
    axes.scatter(
        np.arange(size),
        np.zeros(size),
        s=10,
        c=[(1 - 0.87 * share,) * 3 for share in used],
        edgecolors="#555555",
        linewidths=0.4,
        zorder=3,
        clip_on=False,
    )
    axes.plot(size, 0, "s", color="#222222", markersize=3.6, clip_on=False)
    axes.set_xlim(-0.7, size + 0.7)
    axes.set_ylim(-0.5, (size / 2) ** 0.8 + 0.3)
    axes.set_axis_off()


@figure("routing_graphs")
def routing_graphs(section: Section) -> Drawing:
    """The connections that each task uses (D2R Fig. 6 (b)-(d))."""
    found = _first_seeds(section, "routes")
    if not found:
        raise MissingError("no finished run has recorded routes between modules (only D2R has)")
    run, routes = found[0]
    weights, used = _connections(routes)
    made, cells = task_grid(section, cell=0.95)
    colour = section_looks(section)[run.label].colour
    for index, _, axes in cells:
        _draw_arcs(axes, weights[index], used[index], colour)
    title(made, f"Routes of each task ({short(run.label, 30)}, seed {run.seed})", section)
    task, row, column = np.nonzero(weights)
    return Drawing(
        title="Routes of each task",
        figure=made,
        caption=section.caption(
            f"Modules 1 to {weights.shape[-1]} from left to right (the darker, the more states use "
            "them), the action head as a square; arcs run to the right and are the stronger, the "
            "larger the mean routing weight over states of the final evaluation. Connections into "
            f"modules that the head does not reach count as 0. {run.label}, seed {run.seed}.",
            [run.label],
        ),
        data=pd.DataFrame(
            {
                "task": [section.tasks[index] for index in task],
                "destination": ["head" if r == len(used[0]) - 1 else str(r + 2) for r in row],
                "source": column + 1,
                "weight": weights[task, row, column],
            }
        ),
    )


@figure("sparsity")
def sparsity(section: Section) -> Drawing:
    """Into how many sources the modules' routing weights go (D2R Fig. 10)."""
    rows = []
    for run, routes in section.traced("routes"):
        # Module 2 has one source to choose from and says nothing.
        count = (routes[..., 1:, :] > NOTICED).sum(axis=-1)
        for sources in range(1, routes.shape[-1] + 1):
            share = float((count == sources).mean())
            rows.append({"label": run.label, "run": run.run, "seed": run.seed})
            rows[-1] |= {"sources": sources, "share": share}
    if not rows:
        raise MissingError("no finished run has recorded routes between modules (only D2R has)")
    data = pd.DataFrame(rows)
    styles = section_looks(section)
    made = new_figure(2.8)
    axes = made.subplots()
    labels = sorted(set(data["label"]), key=order_key)
    for place, label in enumerate(labels):
        of_label, look = data[data["label"] == label], styles[label]
        offset = 0.8 * ((place + 0.5) / len(labels) - 0.5)
        mean = of_label.groupby("sources")["share"].mean()
        axes.bar(
            mean.index + offset, mean, width=0.74 / len(labels), color=look.colour,
            alpha=0.75, label=with_seeds(section, label, of_label["run"]),
        )  # fmt: skip
        axes.plot(
            of_label["sources"] + offset, of_label["share"], "o", color="#222222", markersize=1.8
        )
    top = int(data.loc[data["share"] > 0.001, "sources"].max())
    axes.set_xlim(0.4, top + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(20, integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel(f"sources with a routing weight above {NOTICED}")
    axes.set_ylabel("share of modules × states")
    axes.grid(visible=False, axis="x")
    title(made, "Sparsity of the routes", section)
    legend(made, axes.get_legend_handles_labels()[0])
    return Drawing(
        title="Sparsity of the routes",
        figure=made,
        caption=section.caption(
            f"How many sources with a weight above {NOTICED} the modules and the head have, over "
            "states of the final evaluation; modules with one possible source left out. Bars: mean "
            "over seeds; points: seeds. D2R App. C.3 shows it for soft routing.",
            labels,
            data["run"],
        ),
        data=data,
    )


@figure("soft_routes")
def soft_routes(section: Section) -> Drawing:
    """Routing probabilities between the layers, a panel per task (Soft Modularization Fig. 3)."""
    found = _first_seeds(section, "soft_routes")
    if not found:
        raise MissingError("no finished run has recorded soft routes (only soft_module has them)")
    run, routes = found[0]
    mean = routes.mean(axis=1)  # (T, L - 1, n, n)
    gaps, modules = mean.shape[1:3]
    made, cells = task_grid(section, cell=1.0)
    colour = section_looks(section)[run.label].colour
    for index, _, axes in cells:
        lines, widths, alphas = [], [], []
        for layer, into, source in np.ndindex(*mean.shape[1:]):
            lines.append([(layer, -source), (layer + 1, -into)])
            share = float(mean[index, layer, into, source])
            widths.append(0.4 + 2.4 * share)
            alphas.append(min(1.0, 0.1 + share))
        axes.add_collection(LineCollection(lines, colors=colour, linewidths=widths, alpha=alphas))
        layer, module = np.meshgrid(np.arange(gaps + 1), -np.arange(modules))
        axes.scatter(layer, module, s=15, c="white", edgecolors="#444444", linewidths=0.7, zorder=3)
        axes.set_xlim(-0.3, gaps + 0.3)
        axes.set_ylim(-modules + 0.5, 0.5)
        axes.set_axis_off()
    title(made, f"Soft routes of each task ({short(run.label, 30)}, seed {run.seed})", section)
    task, layer, into, source = np.nonzero(mean >= 0)
    return Drawing(
        title="Soft routes of each task",
        figure=made,
        caption=section.caption(
            f"Layers from left to right, {modules} modules each; a connection is the stronger, the "
            "larger its routing probability, mean over states of the final evaluation (the sources "
            f"of a module sum to 1). {run.label}, seed {run.seed}.",
            [run.label],
        ),
        data=pd.DataFrame(
            {
                "task": [section.tasks[index] for index in task],
                "layer": layer + 1,
                "source": source + 1,
                "destination": into + 1,
                "probability": mean[task, layer, into, source],
            }
        ),
    )
