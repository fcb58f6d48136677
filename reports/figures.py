"""Figures: one registered function each, from a section to a drawing and the numbers behind it.

To add one, write a function from ``Section`` to ``Drawing`` under ``@figure("name")``; raise
``MissingError`` with the reason where the results do not support it. No pyplot, no global state:
the same frames give the same bytes.
"""

from __future__ import annotations

import colorsys
import io
import textwrap
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from reports import stats
from reports.frames import MissingError, ProbedRun, Section, base_name, order_key, published
from reports.genotypes import OFFSET, Embedding, collect, embed

WIDTH = 7.1
"""Inches: the text width of a two-column paper."""
DPI = 200

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "figure.titlesize": 9.5,
    "figure.titleweight": "bold",
    "figure.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "svg.fonttype": "path",
    "svg.hashsalt": "reports",
    "savefig.dpi": DPI,
}

# Okabe and Ito's colours, which stay apart in the common colour vision deficiencies.
_OWN_COLOURS = {
    "mega": "#D55E00",
    "d2r": "#0072B2",
    "soft_module": "#009E73",
    "paco": "#CC79A7",
    "care": "#E69F00",
    "mtmh_sac": "#56B4E9",
    "mt_sac": "#4D4D4D",
}
_OTHER_COLOURS = ("#882255", "#999933", "#332288", "#AA4499", "#117733", "#661100", "#6699CC")
_VARIANT_DASHES: tuple[Any, ...] = ((0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (8, 2)))
_VARIANT_SHADES = (0.4, -0.4, 0.2)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
_TASK_COLOURS = (
    "#332288",
    "#E69F00",
    "#44AA99",
    "#CC6677",
    "#88CCEE",
    "#117733",
    "#882255",
    "#999933",
    "#AA4499",
    "#4D4D4D",
)


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A figure, what it shows, and the numbers it was drawn from."""

    title: str
    figure: Figure
    caption: str
    data: pd.DataFrame

    def png(self) -> bytes:
        """The figure at print resolution."""
        return self._save("png")

    def svg(self) -> bytes:
        """The figure as vectors, its text as outlines."""
        return self._save("svg")

    def _save(self, kind: str) -> bytes:
        buffer = io.BytesIO()
        with mpl.rc_context(STYLE):
            # Neither a date nor a version: equal frames give equal bytes.
            clean = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
            self.figure.savefig(buffer, format=kind, metadata=clean)
        return buffer.getvalue()


FIGURES: dict[str, Callable[[Section], Drawing]] = {}


def figure(name: str) -> Callable[[Callable[[Section], Drawing]], Callable[[Section], Drawing]]:
    """Registers a section's figure under ``name``, in the order of the page."""

    def register(function: Callable[[Section], Drawing]) -> Callable[[Section], Drawing]:
        if name in FIGURES:
            raise ValueError(f"figure {name!r} is registered twice")

        def styled(section: Section) -> Drawing:
            with mpl.rc_context(STYLE):
                made = function(section)
                # Lay out once; both formats then share the positions.
                made.figure.draw_without_rendering()
                made.figure.set_layout_engine("none")
                return made

        FIGURES[name] = styled
        return styled

    return register


# Colours and layout ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """How one label is drawn, everywhere."""

    colour: str
    dash: Any
    marker: str


def _shade(colour: str, amount: float) -> str:
    hue, light, saturation = colorsys.rgb_to_hls(*to_rgb(colour))
    light += amount * (1 - light if amount > 0 else light)
    return to_hex(colorsys.hls_to_rgb(hue, light, saturation))


def looks(labels: Iterable[str]) -> dict[str, Look]:
    """Colour by algorithm; dash, shade and marker by variant.

    A name decides its own look; only where two names of one report would share one does the later
    of them in alphabetical order move to the next free look.
    """
    out: dict[str, Look] = {}
    taken: set[tuple[str, int]] = set()
    bases: dict[str, str] = {}
    for base in sorted({base_name(label) for label in labels}):
        start = zlib.crc32(base.encode())
        options = [_OTHER_COLOURS[(start + k) % len(_OTHER_COLOURS)] for k in range(7)]
        free = [colour for colour in options if colour not in bases.values()]
        bases[base] = _OWN_COLOURS.get(base, (free or options)[0])
    slots = len(_VARIANT_DASHES) * len(_VARIANT_SHADES)
    for label in sorted(labels):
        base = base_name(label)
        if label == base:
            out[label] = Look(bases[base], "-", _MARKERS[0])
            continue
        slot = zlib.crc32(label.encode()) % slots
        while (base, slot) in taken and sum(b == base for b, _ in taken) < slots:
            slot = (slot + 1) % slots
        taken.add((base, slot))
        out[label] = Look(
            # Three shades and four dashes have no common divisor: every slot is a pair of its own.
            _shade(bases[base], _VARIANT_SHADES[slot % len(_VARIANT_SHADES)]),
            _VARIANT_DASHES[slot % len(_VARIANT_DASHES)],
            _MARKERS[1 + slot % (len(_MARKERS) - 1)],
        )
    return out


def _looks(section: Section) -> dict[str, Look]:
    """The looks of every label of the report, so that sections agree."""
    names = set(section.results.runs["algorithm"]) | set(section.labels)
    return looks(names)


def _new(height: float, width: float = WIDTH) -> Figure:
    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def _title(made: Figure, words: str, section: Section) -> None:
    smoke = " (SMOKE)" if section.preset == "smoke" else ""
    made.suptitle(f"{words} · {_short(section.suite, 40)}{smoke}", parse_math=False)


def _short(name: str, limit: int = 22) -> str:
    name = name if len(name) <= limit else f"{name[: limit - 1]}…"
    return name.replace("$", r"\$")


def _task(name: str, limit: int = 26) -> str:
    return _short(name.removesuffix("-v3").removesuffix("-v2"), limit)


def _panels(
    section: Section, ylabel: str, share_y: bool = True
) -> tuple[Figure, list[tuple[int, str, Axes]]]:
    """Small multiples, one panel per task over environment steps."""
    tasks = section.tasks
    if not tasks:
        raise MissingError("no evaluation has named the tasks yet")
    columns = min(len(tasks), 5 if len(tasks) <= 25 else 8)
    rows = -(-len(tasks) // columns)
    made = _new(height=0.85 + (1.3 if columns <= 5 else 1.1) * rows)
    grid = made.subplots(rows, columns, sharex=True, sharey=share_y, squeeze=False)
    for spare in grid.flat[len(tasks) :]:
        spare.set_axis_off()
    cells = []
    for index, (name, axes) in enumerate(zip(tasks, grid.flat, strict=False)):
        if columns <= 5:
            axes.set_title(_task(name), fontsize=7.5, pad=3)
        else:
            axes.set_title("\n".join(textwrap.wrap(_task(name, 32), 16)), fontsize=6, pad=3)
        axes.tick_params(labelsize=6.5)
        _steps_axis(axes, label="", ticks=3)
        if index + columns >= len(tasks):
            axes.tick_params(labelbottom=True)
        cells.append((index, name, axes))
    made.supylabel(ylabel, fontsize=8)
    return made, cells


_STEPS = "environment steps per task"


def _steps_axis(axes: Axes, label: str = _STEPS, ticks: int = 6) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel(label)


def _legend(made: Figure, handles: Sequence[Any], xlabel: str = "", size: float = 7.5) -> None:
    """A legend below everything, and between it and the panels their common label.

    As many columns as the longest label leaves room for, at most six.
    """
    longest = max((len(str(handle.get_label())) for handle in handles), default=1)
    width, height = (float(inches) for inches in made.get_size_inches())
    columns = max(1, min(6, len(handles), int(width / (0.0085 * size * longest + 0.4))))
    legend = 0.06 + 0.17 * -(-len(handles) // columns)
    bottom = (legend + (0.18 if xlabel else 0)) / height
    engine = made.get_layout_engine()
    if isinstance(engine, ConstrainedLayoutEngine):
        engine.set(rect=(0, bottom, 1, 1 - bottom))
    if handles:
        made.legend(
            handles=handles, loc="lower center", ncols=columns, borderaxespad=0.2, fontsize=size
        )
    if xlabel:
        made.text(0.5, (legend + 0.03) / height, xlabel, ha="center", va="bottom", fontsize=8)


def _line(look: Look, label: str) -> Line2D:
    return Line2D([], [], color=look.colour, linestyle=look.dash, label=_short(label, 60))


_UNFINISHED = Line2D([], [], color="#777777", linewidth=0.8, linestyle=":", label="unfinished run")


# Curves ------------------------------------------------------------------------------------------


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
        )
    finished = _wide(rows[rows["finished"]]).dropna(axis="columns")
    if finished.empty:
        return
    steps = finished.columns.to_numpy()
    mean, low, high = stats.mean_interval(finished.to_numpy())
    if band and np.isfinite(low).any():
        axes.fill_between(steps, low, high, color=look.colour, alpha=0.14, linewidth=0)
    axes.plot(steps, mean, color=look.colour, linestyle=look.dash, linewidth=bold)


def _curve_rows(section: Section, metric: str) -> pd.DataFrame:
    rows = section.curves(metric)
    if rows.empty:
        raise MissingError(f"no run has been evaluated for {metric} during training yet")
    return rows


def _curve_handles(section: Section, rows: pd.DataFrame) -> list[Any]:
    styles = _looks(section)
    drawn = [label for label in section.labels if label in set(rows["label"])]
    handles = [_line(styles[label], label) for label in drawn]
    return handles + ([] if rows["finished"].all() else [_UNFINISHED])


_CURVE_ESTIMATOR = "Thin lines: every seed (dotted: unfinished run). Bold: mean of the finished."


@figure("learning_curves")
def learning_curves(section: Section) -> Drawing:
    """Mean success over tasks against environment steps (MEGA Fig. 6)."""
    rows = _curve_rows(section, "success")
    styles = _looks(section)
    made = _new(3.4)
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
    _steps_axis(axes)
    _title(made, "Learning curves", section)
    _legend(made, _curve_handles(section, rows))
    means = rows.groupby(["label", "run", "step"])["value"].mean()
    return Drawing(
        title="Learning curves",
        figure=made,
        caption=section.caption(
            "Success rate of the deterministic policy at each evaluation, mean over tasks. "
            f"{_CURVE_ESTIMATOR} Band: 95 % t interval of that mean, from {stats.MIN_SEEDS} seeds "
            "on. Dashed grey: reference policies, where recorded."
        ),
        data=means.reset_index(name="success"),
    )


def _task_curves(section: Section, metric: str, words: str, ylabel: str) -> Drawing:
    rows = _curve_rows(section, metric)
    styles = _looks(section)
    made, cells = _panels(section, ylabel, share_y=metric == "success")
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
    _title(made, words, section)
    _legend(made, _curve_handles(section, rows), xlabel=_STEPS)
    scale = "" if metric == "success" else " Every panel has a vertical scale of its own."
    return Drawing(
        title=words,
        figure=made,
        caption=section.caption(f"{words}, at each evaluation. {_CURVE_ESTIMATOR}{scale}"),
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
    styles = _looks(section)
    made, cells = _panels(section, ylabel)
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
    _title(made, words, section)
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
    shapes = {cause: _MARKERS[(2 + i) % len(_MARKERS)] for i, cause in enumerate(causes)}
    for _, step, task, _, new, cause in events:
        if task < len(cells):
            cells[task][2].plot(
                step, new, shapes[cause], color="#222222", markersize=3.5, alpha=0.8, mew=0
            )
    for _, _, axes in cells:
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, high - 2), max(high, low + 2))
    styles = _looks(section)
    handles: list[Any] = [_line(styles[label], label) for label in _labels_of(runs)]
    handles += [
        Line2D([], [], color="#222222", linestyle="", marker=shapes[c], markersize=4, label=c)
        for c in causes
    ]
    _legend(made, handles, xlabel=_STEPS)
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
    styles = _looks(section)
    _legend(made, [_line(styles[label], label) for label in _labels_of(runs)], xlabel=_STEPS)
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
    styles = _looks(section)
    labels = sorted(set(rows["label"]), key=order_key)
    means = rows.groupby(["label", "task"])["modules"].mean().unstack("label")
    order = list(means.mean(axis=1).sort_values(kind="stable").index)
    made = _new(height=1.2 + max(0.2, 0.08 + 0.07 * len(labels)) * len(order))
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
            label=_short(label, 60),
        )
    axes.set_yticks(range(len(order)), [_task(str(task)) for task in order])
    axes.set_ylim(-0.6, len(order) - 0.4)
    axes.set_xlim(left=0)
    axes.set_xlabel("modules used")
    _title(made, "Modules used per task", section)
    _legend(made, axes.get_legend_handles_labels()[0])
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
    styles = _looks(section)
    made = _new(height=1.0 + 0.19 * len(delta))
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
    axes.set_yticks(range(len(delta)), [_task(str(task)) for task in delta.index])
    axes.set_ylim(-0.6, len(delta) - 0.4)
    axes.set_xlabel(f"modules used: {_short(ours, 30)} minus {_short(theirs, 30)}")
    _title(made, "Difference in module quantity", section)
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
    table = runs[0].series("weight_intervals")[1][-1]
    precisions = [int(a["precision"]) for _, a in runs[0].snapshots if "precision" in a]
    bits = f"{precisions[-1]} bits per weight" if precisions else "precision not recorded"
    made = _new(2.5)
    panels = made.subplots(1, 2, sharey=True)
    for axes, column, name, colour in zip(
        panels, (1, 3), ("Softmax", "HalfSoftmax"), ("#44AA99", "#332288"), strict=True
    ):
        axes.vlines(table[:, 0], table[:, column], table[:, column + 1], color=colour, linewidth=5)
        for edge in (column, column + 1):
            axes.plot(table[:, 0], table[:, edge], "o", color=colour, markersize=3.5)
        axes.set_title(name)
        axes.set_xlabel("level (weights in the segment)")
        axes.set_ylim(-0.03, 1.03)
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    panels[0].set_ylabel("reachable module weight")
    _title(made, "Interval of module weights", section)
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
    below = 0 if few else 0.17 * len(section.tasks) / 4
    made = _new(height=below + (0.6 + 2.35 * rows if columns > 1 else 3.6))
    grid = made.subplots(rows, columns, squeeze=False)
    for spare in grid.flat[len(embedded) :]:
        spare.set_axis_off()
    palette = [
        (_TASK_COLOURS[i % len(_TASK_COLOURS)], _MARKERS[(i + i // 10) % len(_MARKERS)])
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
        Line2D([], [], linestyle="", marker=m, color=c, markersize=4, label=_task(name))
        for name, (c, m) in zip(section.tasks, palette, strict=True)
    ]
    if not few:
        _legend(made, handles, size=6.5)
    elif grid.size > len(embedded):
        grid.flat[len(embedded)].legend(handles=handles, loc="center left")
    else:
        made.legend(handles=handles, loc="outside right center", ncols=1, fontsize=7)
    _title(made, f"Genotypes by task ({_short(first[0].label, 30)})", section)
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
