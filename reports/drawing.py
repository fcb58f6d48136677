"""How figures look: colours by name, panels, legends, and the registry of figures.

No pyplot, no global state: the same frames give the same bytes.
"""

from __future__ import annotations

import io
import math
import textwrap
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator
from numpy.typing import ArrayLike

from reports.frames import Ablation, MissingError, ProbedRun, Section, base_name
from reports.registry import Registry, Source

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

# Paul Tol's muted scheme: for the variants, and for algorithms that this project does not know.
_OTHER_COLOURS = (
    "#882255",
    "#999933",
    "#332288",
    "#CC6677",
    "#117733",
    "#AA4499",
    "#6699CC",
    "#661100",
    "#44AA99",
)
_DASHES: tuple[Any, ...] = ((0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (8, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "p", "d", "h", "8")
TASK_COLOURS = (
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


@contextmanager
def _house_style() -> Iterator[None]:
    """Draws as ``STYLE`` says; a letter that its font lacks is a box, and no warning."""
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from", UserWarning)
        yield


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

    def _repr_png_(self) -> bytes:
        """As a notebook shows it."""
        return self.png()

    def _save(self, kind: str) -> bytes:
        # By the canvas itself: ``savefig`` draws everything twice, for a layout that stands.
        buffer = io.BytesIO()
        canvas: Any
        # Neither a date nor a version: equal frames give equal bytes.
        with _house_style():
            if kind == "svg":
                canvas = FigureCanvasSVG(self.figure)
                canvas.print_svg(buffer, metadata={"Date": None, "Creator": None})
            else:
                self.figure.set_dpi(DPI)
                canvas = FigureCanvasAgg(self.figure)
                canvas.print_png(
                    buffer, metadata={"Software": None}, pil_kwargs={"compress_level": 3}
                )
        return buffer.getvalue()


FIGURES: Registry[Section, Drawing] = Registry()
"""Figures of a section."""
ABLATION_FIGURES: Registry[Ablation, Drawing] = Registry()
"""Figures of an ablation within a section."""


def styled(function: Callable[[Source], Drawing]) -> Callable[[Source], Drawing]:
    """The function drawing in the house's style, and laid out once, alike in every format."""

    @wraps(function)
    def draw(source: Source) -> Drawing:
        with _house_style():
            made = function(source)
            if engine := made.figure.get_layout_engine():
                engine.execute(made.figure)
            made.figure.set_layout_engine("none")
            return made

    return draw


def figure(name: str) -> Callable[[Callable[[Section], Drawing]], Callable[[Section], Drawing]]:
    """Registers a section's figure under ``name``, in the order of the page."""
    return lambda function: FIGURES.register(name)(styled(function))


# Colours and layout ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """How one label is drawn, everywhere."""

    colour: str
    dash: Any
    marker: str


# Okabe and Ito's colours, which stay apart in the common colour vision deficiencies, solid; then
# Tol's, dashed, as theirs are hues that are taken.
_OWN_LOOKS = {
    "mega": Look("#D55E00", "-", "o"),
    "d2r": Look("#0072B2", "-", "s"),
    "soft_module": Look("#009E73", "-", "^"),
    "paco": Look("#CC79A7", "-", "D"),
    "care": Look("#E69F00", "-", "v"),
    "mtmh_sac": Look("#56B4E9", "-", "P"),
    "mt_sac": Look("#4D4D4D", "-", "X"),
    "moore": Look("#999933", _DASHES[0], "<"),
    "mixture_of_experts": Look("#332288", _DASHES[1], ">"),
    "hard_routing": Look("#882255", _DASHES[2], "*"),
    "sac": Look("#117733", _DASHES[3], "p"),
}


def looks(labels: Iterable[str]) -> dict[str, Look]:
    """Colour, dash and marker by name: no two alike, nor any marker twice while there are others.

    A name decides its own look; only where two names of one report would share one does the later
    of them in alphabetical order move to the next free look.
    """
    out: dict[str, Look] = {}
    known = {look.marker for look in _OWN_LOOKS.values()}
    # Plain algorithms first: theirs are the looks that readers know.
    for label in sorted(labels, key=lambda name: (name != base_name(name), name)):
        if label in _OWN_LOOKS:
            out[label] = _OWN_LOOKS[label]
            continue
        plain, start = label == base_name(label), zlib.crc32(label.encode())
        # As many as it takes until colour, dash and marker come together again.
        cycle = math.lcm(len(_OTHER_COLOURS), len(_DASHES), len(MARKERS))
        options = [
            Look(
                _OTHER_COLOURS[slot % len(_OTHER_COLOURS)],
                "-" if plain else _DASHES[slot % len(_DASHES)],
                MARKERS[slot % len(MARKERS)],
            )
            for slot in range(start, start + cycle)
        ]
        colours = {look.colour for look in out.values()}
        lines = {(look.colour, look.dash) for look in out.values()}
        markers = {look.marker for look in out.values()}
        out[label] = min(
            options,
            key=lambda look: (
                (look.colour, look.dash) in lines,
                look.colour in colours,
                look.marker in markers,
                look.marker in known,
            ),
        )
    return out


def section_looks(section: Section) -> dict[str, Look]:
    """The looks of every label of the report, so that sections agree."""
    return looks(section.everywhere)


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure with its own canvas; inches."""
    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def title(made: Figure, words: str, section: Section) -> None:
    """The figure's title: words, suite and, unless the scale is a paper's, the preset."""
    preset = section.preset.upper() if section.preset == "smoke" else section.preset
    scale = "" if section.full_scale else f" ({preset})"
    shown = f"{words} · {section.place}{scale}"
    width = float(made.get_size_inches()[0])
    made.suptitle("\n".join(textwrap.wrap(shown, max(20, int(11 * width)))), parse_math=False)


def short(name: str, limit: int = 22) -> str:
    """A name cut to ``limit`` characters, dollar signs kept from mathtext."""
    name = name if len(name) <= limit else f"{name[: limit - 1]}…"
    return name.replace("$", r"\$")


def task_name(name: str, limit: int = 26) -> str:
    """A task's name without its version."""
    return short(name.removesuffix("-v3").removesuffix("-v2"), limit)


def grid_columns(section: Section) -> int:
    """Panels per row in a grid of the section's tasks."""
    return min(len(section.tasks), 5 if len(section.tasks) <= 25 else 8)


def task_grid(
    section: Section, cell: float, share_y: bool = True
) -> tuple[Figure, list[tuple[int, str, Axes]]]:
    """A figure with a titled panel per task, ``cell`` inches high each: index, task, axes."""
    tasks = section.tasks
    if not tasks:
        raise MissingError("no evaluation has named the tasks yet")
    columns = grid_columns(section)
    rows = -(-len(tasks) // columns)
    dense = columns > 5
    # A single row leaves room for the label beside it.
    made = new_figure(height=(1.3 if rows == 1 else 0.85) + (0.85 if dense else 1) * cell * rows)
    grid = made.subplots(rows, columns, sharex=True, sharey=share_y, squeeze=False)
    for spare in grid.flat[len(tasks) :]:
        spare.set_axis_off()
    cells = []
    for index, (name, axes) in enumerate(zip(tasks, grid.flat, strict=False)):
        if dense:
            axes.set_title("\n".join(textwrap.wrap(task_name(name, 32), 16)), fontsize=6, pad=3)
        else:
            axes.set_title(task_name(name), fontsize=7.5, pad=3)
        axes.tick_params(labelsize=6.5)
        cells.append((index, name, axes))
    return made, cells


def panels(
    section: Section, ylabel: str, share_y: bool = True
) -> tuple[Figure, list[tuple[int, str, Axes]]]:
    """Small multiples, one panel per task over environment steps."""
    made, cells = task_grid(section, cell=1.3, share_y=share_y)
    columns = grid_columns(section)
    for index, _, axes in cells:
        steps_axis(axes, label="", ticks=3)
        if index + columns >= len(cells):
            axes.tick_params(labelbottom=True)
    made.supylabel(ylabel, fontsize=8)
    return made, cells


def wide(rows: pd.DataFrame) -> pd.DataFrame:
    """Runs x steps, the mean over the rows of a cell."""
    return rows.pivot_table(index="run", columns="step", values="value")


def draw_probe(
    section: Section, runs: list[ProbedRun], key: str, words: str, ylabel: str, steps: bool
) -> tuple[Figure, list[tuple[int, str, Axes]], pd.DataFrame]:
    """A per-task probe over training; ``steps`` draws a staircase, seeds nudged apart."""
    styles = section_looks(section)
    made, cells = panels(section, ylabel)
    frames = []
    for label in dict.fromkeys(run.label for run in runs):
        of_label = [(run, *run.series(key)) for run in runs if run.label == label]
        for run, when, values in of_label:
            if values.shape[1:] != (len(section.tasks),):
                raise MissingError(f"probe {key!r} of run {run.run} has not one value per task")
            facts = {"label": run.label, "run": run.run, "finished": run.finished}
            cell = {
                "step": np.repeat(when, values.shape[1]),
                "task": np.tile(list(section.tasks), len(when)),
                "value": values.ravel().astype(float),
            }
            frames.append(pd.DataFrame(facts | cell))
        look, middle = styles[label], (len(of_label) - 1) / 2
        apart = min(0.08, 0.4 / len(of_label)) if steps else 0.0
        for index, _, axes in cells:
            thin_lines(
                axes,
                [
                    (when, values[:, index] + apart * (place - middle), run.finished)
                    for place, (run, when, values) in enumerate(of_label)
                ],
                look.colour,
                staircase=steps,
            )
            finished = [
                pd.Series(values[:, index], when) for run, when, values in of_label if run.finished
            ]
            if finished:
                mean = pd.concat(finished, axis=1).dropna().mean(axis=1)
                curve = mean.to_numpy()
                bold_line(axes, mean.index.to_numpy(), curve, look, 1.5, staircase=steps)
    title(made, words, section)
    return made, cells, pd.concat(frames, ignore_index=True)


def map_panels(section: Section, maps: Sequence[tuple[str, np.ndarray, np.ndarray]]) -> Figure:
    """Planes of points coloured by task: (title, points ``(n, 2)``, task ``(n,)``) each."""
    columns = min(3, len(maps))
    rows = -(-len(maps) // columns)
    few = len(section.tasks) <= 12
    below = 0 if few else 0.14 * len(section.tasks) / 4
    made = new_figure(height=below + (0.6 + 2.35 * rows if columns > 1 else 3.6))
    grid = made.subplots(rows, columns, squeeze=False)
    for spare in grid.flat[len(maps) :]:
        spare.set_axis_off()
    palette = [
        (TASK_COLOURS[i % len(TASK_COLOURS)], MARKERS[(i + i // 10) % len(MARKERS)])
        for i in range(len(section.tasks))
    ]
    for axes, (name, points, task) in zip(grid.flat, maps, strict=False):
        for index, (colour, marker) in enumerate(palette):
            mine = points[task == index]
            axes.scatter(*mine.T, s=13, color=colour, marker=marker, linewidths=0, alpha=0.8)
        axes.set_title(name)
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
    elif grid.size > len(maps):
        grid.flat[len(maps)].legend(handles=handles, loc="center left")
    else:
        made.legend(handles=handles, loc="outside right center", ncols=1, fontsize=7)
    return made


def thin_lines(
    axes: Axes,
    curves: Iterable[tuple[np.ndarray, np.ndarray, bool]],
    colour: str,
    staircase: bool = False,
) -> None:
    """Runs as thin lines, unfinished ones dotted: x, y and whether finished of each.

    All in one collection, which hundreds of runs need.
    """
    lines: dict[bool, list[np.ndarray]] = {True: [], False: []}
    few = []
    for x, y, finished in curves:
        if staircase:
            x, y = np.repeat(x, 2)[1:], np.repeat(y, 2)[:-1]
        elif len(x) < FEW_POINTS:
            few.append(np.column_stack([x, y]))
        lines[finished].append(np.column_stack([x, y]))
    for finished, of_kind in lines.items():
        if of_kind:
            axes.add_collection(
                LineCollection(
                    of_kind, colors=colour, linewidths=0.6, alpha=0.6,
                    linestyles="-" if finished else ":",
                ),
                autolim=False,
            )  # fmt: skip
            axes.update_datalim(np.concatenate(of_kind))
    if few:
        axes.plot(*np.concatenate(few).T, ".", color=colour, markersize=3, alpha=0.6)
    # When it is drawn; ``autoscale_view`` would do it now, for every label.
    axes.autoscale(None)  # type: ignore[arg-type]


FEW_POINTS = 8
"""A curve of fewer evaluations than this shows each as a point; a single one is no line."""
CURVE_MARKERS = 3
"""About how many markers a curve carries; they tell curves apart without their colours."""


def bold_line(
    axes: Axes, x: ArrayLike, y: ArrayLike, look: Look, width: float, staircase: bool = False
) -> None:
    """A label's curve with a few of its markers, staggered by label: coinciding curves show."""
    count = len(np.asarray(x))
    every = max(1, count // CURVE_MARKERS)
    golden = 0.618034  # whose multiples spread evenly, however many
    first = int(every * (MARKERS.index(look.marker) * golden % 1))
    axes.plot(
        x, y, color=look.colour, linestyle=look.dash, linewidth=width,
        marker=look.marker, markevery=(first, every), markersize=3 + 1.7 * width,
        markeredgecolor="white", markeredgewidth=0.5,
        drawstyle="steps-post" if staircase else "default",
        clip_on=False,  # the last point stands on the edge
        alpha=0.9,
    )  # fmt: skip


STEPS = "environment steps per task"


def steps_axis(axes: Axes, label: str = STEPS, ticks: int = 6) -> None:
    """Environment steps as 20k, 1M."""
    axes.xaxis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel(label)


def legend(made: Figure, handles: Sequence[Any], xlabel: str = "", size: float = 7.5) -> None:
    """A legend below everything, and between it and the panels their common label.

    As many columns as the longest label leaves room for, at most six; more than three rows make the
    figure higher.
    """
    longest = max((len(str(handle.get_label())) for handle in handles), default=1)
    width, height = (float(inches) for inches in made.get_size_inches())
    columns = max(1, min(6, len(handles), int(width / (0.008 * size * longest + 0.55))))
    row = 0.0215 * size
    below = 0.06 + row * -(-len(handles) // columns)
    height += max(0.0, below - 0.06 - 3 * row)
    made.set_size_inches(width, height)
    bottom = (below + (0.18 if xlabel else 0)) / height
    engine = made.get_layout_engine()
    if isinstance(engine, ConstrainedLayoutEngine):
        engine.set(rect=(0, bottom, 1, 1 - bottom))
    if handles:
        made.legend(
            handles=handles,
            loc="lower center",
            ncols=columns,
            borderaxespad=0.2,
            fontsize=size,
            handlelength=3.2,  # in which dashes differ
        )
    if xlabel:
        made.text(0.5, (below + 0.03) / height, xlabel, ha="center", va="bottom", fontsize=8)


def with_seeds(section: Section, label: str, runs: Iterable[str] | None = None) -> str:
    """A label as legends have it, with how many of its runs are finished: of all or of these."""
    return f"{short(label, 60)} (n = {section.seeds(label, runs)})"


def legend_lines(
    section: Section, labels: Iterable[str], runs: Iterable[str] | None = None
) -> list[Line2D]:
    """A legend entry for each label; ``runs`` are those in the figure, where it has not all."""
    styles, shown = section_looks(section), None if runs is None else set(runs)
    return [
        Line2D(
            [], [], color=styles[label].colour, linestyle=styles[label].dash,
            marker=styles[label].marker, markersize=5.5, markeredgecolor="white",
            markeredgewidth=0.5,
            label=with_seeds(section, label, shown),
        )
        for label in labels
    ]  # fmt: skip


def wrapped(label: str, width: int = 24) -> str:
    """A label over several lines, broken after commas."""
    return "\n".join(textwrap.wrap(short(label, 72).replace(",", ", "), width))


UNFINISHED = Line2D([], [], color="#777777", linewidth=0.8, linestyle=":", label="unfinished run")
