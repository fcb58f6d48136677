"""Tables: one registered function each, from a section to cells and the numbers behind them.

To add one, write a function from ``Section`` to ``Table`` under ``@table("name")``; raise
``MissingError`` with the reason where the results do not support it. Every writer escapes.
"""

from __future__ import annotations

import html
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table as Grid
from rich.text import Text

from reports import stats
from reports.frames import (
    RECIPE,
    Ablation,
    MissingError,
    Results,
    Section,
    base_name,
    counted,
    generator,
    order_key,
    published,
    sections,
    text,
)
from reports.registry import Registry

ABSENT = "–"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells to read, and tidy numbers (``data``) to compute with."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    data: pd.DataFrame
    caption: str
    warnings: tuple[str, ...] = ()
    """What a reader must know before believing the table."""
    words: tuple[str, ...] = ()
    """Columns that hold words, to be aligned as such."""
    details: bool = False
    """Whether a page may fold it away."""

    def _repr_html_(self) -> str:
        """As a notebook shows it."""
        shown = pd.DataFrame(self.rows, columns=list(self.columns)).to_html(index=False)
        words = "".join(f"<p>⚠ {html.escape(w)}</p>" for w in self.warnings)
        return f"<b>{html.escape(self.title)}</b>{words}{shown}<p>{html.escape(self.caption)}</p>"


TABLES: Registry[Section, Table] = Registry()
"""Tables of a section."""
ABLATION_TABLES: Registry[Ablation, Table] = Registry()
"""Tables of an ablation within a section."""
OVERVIEWS: Registry[Sequence[Section], Table] = Registry()
"""Tables over the suites at one preset."""
table = TABLES.register


# Cells -------------------------------------------------------------------------------------------


def rate(value: float) -> str:
    """A success rate as the papers print it."""
    return f"{value:.2f}" if np.isfinite(value) else ABSENT


def mean_std_cell(mean: float, std: float) -> str:
    """``0.82 ± 0.05``; without a deviation the mean alone."""
    return f"{rate(mean)} ± {std:.2f}" if np.isfinite(std) else rate(mean)


def p_cell(p: float) -> str:
    """A p value to three places."""
    if not np.isfinite(p):
        return ABSENT
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def interval_cell(estimate: stats.Estimate, signed: bool = False) -> str:
    """``0.81 [0.76, 0.86]``, ``+0.06 [−0.01, 0.13]``; without an interval the value alone."""
    value = f"{estimate.value:{'+' if signed else ''}.2f}"
    bounds = f" [{estimate.low:.2f}, {estimate.high:.2f}]" if estimate.has_interval else ""
    return (value + bounds).replace("-", "−")


def _mean(values: pd.Series) -> float:
    return float(values.mean()) if len(values) else float("nan")


# Success -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Paper:
    """Whose success rates stand beside ours."""

    source: str
    tables: tuple[str, ...]
    """Tables of ``published/success_rates.csv`` that count; the first names the column."""
    name: str
    spread: str

    @property
    def column(self) -> str:
        """The column's heading."""
        return f"{self.name} {self.tables[0]}"

    @property
    def key(self) -> str:
        """The column's name in data."""
        return f"published_{self.column.lower().replace(' ', '_')}"

    @cached_property
    def rates(self) -> pd.DataFrame:
        """The rows of its tables."""
        frame = published("success_rates")
        return frame[(frame["source"] == self.source) & frame["table"].isin(self.tables)]

    def cell(self, suite: str, label: str) -> tuple[float, float]:
        """Mean and spread as printed, NaN where the paper has none."""
        hit = self.rates.query("suite == @suite and algorithm == @label")
        return (float(hit["mean"].iloc[0]), float(hit["std"].iloc[0])) if len(hit) else NOTHING

    def scale(self, suite: str) -> str:
        """Seeds, horizon and training of its runs on ``suite``, in words."""
        row = self.rates.query("suite == @suite").iloc[0]
        steps = row["steps_per_task"]
        trained = f", {steps:,.0f} steps per task" if np.isfinite(steps) else ""
        return (
            f"{self.column}: {row['statistic']}, horizon {row['horizon']:.0f}{trained}{self.spread}"
        )


NOTHING = (float("nan"), float("nan"))
PAPERS = (
    Paper("mega", ("Table 1",), "MEGA", "; it calls what stands behind ± a variance"),
    Paper("d2r", ("Table 8",), "D2R", "; ± standard deviation"),
    Paper("soft_modularization", ("Table 1", "Section 5.6"), "Soft Modularization", ""),
)


def _papers(suite: str) -> list[Paper]:
    """The papers that print success rates on ``suite``."""
    return [paper for paper in PAPERS if suite in set(paper.rates["suite"])]


def iqm(section: Section, label: str) -> stats.Estimate:
    """Interquartile mean over seeds x tasks of one algorithm, with its interval."""
    return stats.stratified_interval(
        section.scores(label).to_numpy(),
        stats.interquartile_mean,
        generator("iqm", section.title, label),
    )


@table("success_rates")
def success_rates(section: Section) -> Table:
    """Final success rate per algorithm, the published values beside ours."""
    if not section.scored:
        raise MissingError(f"no finished run has a final evaluation ({section.missing})")
    papers = _papers(section.suite)
    rows, data = [], []
    for label in section.scored:
        seed_means = section.scores(label).mean(axis=1)
        mean, std = stats.mean_std(seed_means)
        middle = iqm(section, label)
        printed = {paper: paper.cell(section.suite, label) for paper in papers}
        rows.append(
            (
                label,
                mean_std_cell(mean, std),
                interval_cell(middle),
                rate(float(seed_means.min())),
                str(len(seed_means)),
                section.episodes,
                f"{section.preset}, {section.steps_per_task:,}",
                *(mean_std_cell(*cell) for cell in printed.values()),
            )
        )
        data.append(
            {
                "suite": section.suite,
                "preset": section.preset,
                "steps_per_task": section.steps_per_task,
                "algorithm": label,
                "mean": mean,
                "std": std,
                "iqm": middle.value,
                "iqm_low": middle.low,
                "iqm_high": middle.high,
                "worst_seed": float(seed_means.min()),
                "seeds": len(seed_means),
                "episodes_per_task": section.episodes,
            }
            | {f"{paper.key}_mean": cell[0] for paper, cell in printed.items()}
            | {f"{paper.key}_spread": cell[1] for paper, cell in printed.items()}
        )
    theirs = "".join(f" {paper.scale(section.suite)}." for paper in papers)
    apart = " Ours is at another scale: the two do not compare."
    note = f" Published values:{theirs}{'' if section.full_scale else apart}" if papers else ""
    return Table(
        title="Success rate",
        warnings=setting_warnings(section),
        columns=(
            "Algorithm",
            "Mean ± std",
            "IQM [95 %]",
            "Worst seed",
            "Seeds",
            "Episodes",
            "Preset, steps per task",
            *(f"Published: {paper.column}" for paper in papers),
        ),
        rows=rows,
        data=pd.DataFrame(data),
        caption=section.caption(
            "Success rate of the final policy: successes over episodes per task, mean over tasks; "
            "mean ± sample standard deviation over seeds. IQM: interquartile mean over seeds × "
            f"tasks, 95 % percentile interval of {stats.REPLICATES:,} bootstrap replicates that "
            "draw seeds within each task (rliable's stratified bootstrap); no interval below "
            f"{stats.MIN_SEEDS} seeds.{note}",
            section.scored,
        ),
    )


@table("records")
def records(section: Section) -> Table:
    """What others have reported on the suite, each under a protocol of its own."""
    rows = (
        published("field").query("suite == @section.suite").sort_values("success", ascending=False)
    )
    if rows.empty:
        raise MissingError(f"no record is known on {section.suite}")

    def plain(value: object) -> str:
        return text(value) or ABSENT

    return Table(
        title="Records of the field, under other protocols",
        columns=(
            "Algorithm",
            "Success",
            "Goals",
            "Horizon",
            "Reward",
            "Seeds",
            "How known",
            "Source",
        ),
        words=("Goals", "Reward", "How known", "Source"),
        rows=[
            (
                row["algorithm"],
                f"{row['success']:.3f}"
                + (f" ± {row['spread']:.3f}" if np.isfinite(row["spread"]) else ""),
                *(plain(row[name]) for name in ("setting", "horizon", "reward", "seeds", "note")),
                row["source"],
            )
            for row in rows.to_dict("records")
        ],
        data=rows,
        caption="Numbers of other papers, set apart because goals, horizon, reward or training "
        "length differ from the runs of this report and among each other: they say what is "
        f"possible on {section.suite}, and compare with nothing above. Second-hand: as a later "
        "paper tells it.",
        details=True,
    )


@table("tasks")
def per_task(section: Section) -> Table:
    """Final success rate per task, the reference policies below."""
    if not section.scored:
        raise MissingError(f"no finished run has a final evaluation ({section.missing})")
    rates = {label: section.scores(label).mean() for label in section.scored}
    rates |= {f"{name} (reference)": row for name, row in section.references.iterrows()}
    frame = pd.DataFrame(rates)
    frame.loc["mean over tasks"] = frame.mean()
    data = frame.rename_axis("task").reset_index().melt("task", None, "algorithm", "success")
    return Table(
        title="Success rate per task",
        warnings=setting_warnings(section),
        columns=("Task", *(str(name) for name in frame.columns)),
        rows=[(str(task), *(rate(float(v)) for v in values)) for task, values in _items(frame)],
        data=data.assign(suite=section.suite, preset=section.preset),
        caption=section.caption(
            "Success rate of the final policy per task, mean over seeds. Reference rows: the "
            "simulator's scripted experts and a random policy, where recorded.",
            section.scored,
        ),
    )


def _items(frame: pd.DataFrame) -> list[tuple[object, np.ndarray]]:
    return list(zip(frame.index, frame.to_numpy(), strict=True))


@table("area")
def area(section: Section) -> Table:
    """Area under the return curve per task: what was learned also where success stays 0."""
    rows = section.task_curves("return")
    rows = rows[rows["finished"]]
    if rows.empty:
        raise MissingError(f"no finished run has recorded returns ({section.missing})")
    heights = []
    for (label, run, task), curve in rows.groupby(["label", "run", "task"]):
        curve = curve.sort_values("step")
        height = float(stats.area_under_curve(curve["step"], curve["value"]))
        heights.append({"label": label, "run": run, "task": task, "area": height})
    data = pd.DataFrame(heights)
    labels = [label for label in section.labels if label in set(data["label"])]
    cells = data.groupby(["task", "label"])["area"].agg(["mean", "std"])

    def cell(task: str, label: str) -> str:
        if (task, label) not in cells.index:
            return ABSENT
        mean, std = cells.loc[[(task, label)]].to_numpy(dtype=float)[0]
        return f"{mean:,.0f} ± {std:,.0f}" if np.isfinite(std) else f"{mean:,.0f}"

    return Table(
        title="Area under the return curve",
        columns=("Task", *labels),
        rows=[(task, *(cell(task, label) for label in labels)) for task in section.tasks],
        data=data.assign(suite=section.suite, preset=section.preset),
        caption=section.caption(
            "Mean height of the curve of evaluation returns (trapezoid area over the steps from "
            "the first to the last evaluation, divided by their distance; unscaled reward), mean ± "
            "sample standard deviation over finished runs. It tells tasks apart that nobody solves "
            "yet.",
            labels,
        ),
        details=True,
    )


# Comparisons -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The reference algorithm against another one."""

    place: str
    reference: str
    other: str
    seeds: tuple[int, int]
    difference: stats.Difference
    adjusted_p: float
    improvement: stats.Estimate

    @property
    def verdict(self) -> str:
        """What the numbers support, in words."""
        if np.isnan(self.difference.p):
            return f"not judged ({self.difference.method})"
        if self.adjusted_p >= 1 - stats.CONFIDENCE:
            alone = self.difference.p < 1 - stats.CONFIDENCE
            return "not separated" + (" once all comparisons are counted (Holm)" if alone else "")
        winner = self.reference if self.difference.estimate.value > 0 else self.other
        return f"separated: {winner} is better"

    @property
    def sentence(self) -> str:
        """The comparison in one line."""
        ours, theirs = self.seeds
        seeds = f"{ours} and {theirs} seeds" if ours != theirs else counted(ours, "seed")
        return (
            f"{self.reference} − {self.other} on {self.place}: "
            f"{interval_cell(self.difference.estimate, signed=True)}, {seeds}: {self.verdict}"
        )


def comparisons(section: Section, reference: str | None = None) -> list[Comparison]:
    """Every scored algorithm against ``reference``: MEGA, or the first where there is no MEGA.

    Where two sweeps are compared, each algorithm of the later one against its earlier self.
    """
    if reference is None:
        pairs = _sweep_pairs(section) or _reference_pairs(
            section, "mega" if "mega" in section.scored else (*section.scored, "")[0]
        )
    else:
        pairs = _reference_pairs(section, reference)
    judged = []
    for ours, theirs in pairs:
        a, b = section.scores(ours), section.scores(theirs)
        rng = generator("comparison", section.title, ours, theirs)
        judged.append(
            (
                stats.difference(a.mean(axis=1), b.mean(axis=1), rng),
                stats.probability_of_improvement(a.to_numpy(), b.to_numpy(), rng),
                (len(a), len(b)),
            )
        )
    adjusted = stats.holm([difference.p for difference, _, _ in judged])
    return [
        Comparison(
            place=section.place,
            reference=ours,
            other=theirs,
            seeds=seeds,
            difference=difference,
            adjusted_p=p,
            improvement=improvement,
        )
        for (ours, theirs), (difference, improvement, seeds), p in zip(
            pairs, judged, adjusted, strict=True
        )
    ]


def _reference_pairs(section: Section, reference: str) -> list[tuple[str, str]]:
    return [(reference, label) for label in section.scored if label != reference]


def _sweep_pairs(section: Section) -> list[tuple[str, str]]:
    """(later, earlier) labels of one algorithm, where the runs come from several sweeps."""
    order = list(dict.fromkeys(section.results.runs["sweep"]))
    if len(order) < 2:
        return []
    of_label = section.runs.drop_duplicates("label").set_index("label")
    pairs = []
    for _, group in of_label.loc[section.scored].groupby("algorithm", sort=False):
        ranked = sorted(group.index, key=lambda label: order.index(group.loc[label, "sweep"]))
        pairs += [(later, ranked[0]) for later in ranked[1:]]
    return pairs


def _comparison_cells(compared: Sequence[Comparison]) -> list[tuple[str, ...]]:
    return [
        (
            interval_cell(c.difference.estimate, signed=True),
            c.difference.method,
            p_cell(c.adjusted_p),
            interval_cell(c.improvement),
            f"{c.seeds[0]} / {c.seeds[1]}",
            c.verdict,
        )
        for c in compared
    ]


def _comparison_data(section: Section, compared: Sequence[Comparison]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "suite": section.suite,
            "reference": c.reference,
            "algorithm": c.other,
            "difference": c.difference.estimate.value,
            "low": c.difference.estimate.low,
            "high": c.difference.estimate.high,
            "method": c.difference.method,
            "p": c.difference.p,
            "p_holm": c.adjusted_p,
            "probability_of_improvement": c.improvement.value,
            "probability_low": c.improvement.low,
            "probability_high": c.improvement.high,
            "seeds_reference": c.seeds[0],
            "seeds": c.seeds[1],
        }
        for c in compared
    )


_JUDGED = (
    "Difference of the mean final success rates with its own 95 % interval: Welch's t on seed "
    f"means below {stats.WELCH_BELOW} seeds, percentile bootstrap from there on, none below "
    f"{stats.MIN_SEEDS}. p values are Holm-adjusted over the rows and the verdict follows them. P: "
    "probability that a random seed of the first is better on a random task (ties half), "
    "stratified bootstrap interval."
)


@table("comparisons")
def comparison_table(section: Section) -> Table:
    """Difference and probability of improvement of the reference algorithm over each other one."""
    compared = comparisons(section)
    if not compared:
        raise MissingError(
            f"a comparison needs two algorithms with finished runs ({section.missing})"
        )
    alike = len({c.reference for c in compared}) == 1
    reference = compared[0].reference if alike else "first"
    return Table(
        title=f"Difference to {reference}" if alike else "Difference between the sweeps",
        warnings=setting_warnings(section),
        columns=(
            "Pair",
            "Difference [95 %]",
            "Method",
            "p (Holm)",
            f"P({reference} better) [95 %]",
            "Seeds",
            "Verdict",
        ),
        words=("Method", "Verdict"),
        rows=[
            (f"{c.reference} − {c.other}", *cells)
            for c, cells in zip(compared, _comparison_cells(compared), strict=True)
        ],
        data=_comparison_data(section, compared),
        caption=section.caption(_JUDGED, section.scored),
    )


@ABLATION_TABLES.register("ablation")
def ablation_table(ablation: Ablation) -> Table:
    """Each variant's success and its difference to the ablation's base."""
    section, base = ablation.section, ablation.base
    scored = [label for label in ablation.labels if label in section.scored]
    if len(scored) < 2:
        raise MissingError(f"fewer than two variants have finished runs ({section.missing})")
    compared = {c.other: c for c in comparisons(section, base)}
    minus = dict(zip(compared, _comparison_cells(list(compared.values())), strict=True))
    rows = []
    for label in scored:
        scores = section.scores(label)
        actor = _mean(section.runs.loc[section.runs["label"] == label, "parameters_actor"])
        difference, method, p, better, _, verdict = minus.get(label, ("base", *[ABSENT] * 5))
        rows.append(
            (
                label,
                mean_std_cell(*stats.mean_std(scores.mean(axis=1))),
                interval_cell(iqm(section, label)),
                str(len(scores)),
                _millions(actor),
                difference,
                method,
                p,
                better,
                verdict,
            )
        )
    return Table(
        title=f"Ablation {ablation.name}",
        columns=(
            "Variant",
            "Mean ± std",
            "IQM [95 %]",
            "Seeds",
            "Actor M",
            f"{base} − variant [95 %]",
            "Method",
            "p (Holm)",
            f"P({base} better) [95 %]",
            "Verdict",
        ),
        words=("Method", "Verdict"),
        rows=rows,
        data=_comparison_data(section, list(compared.values())),
        warnings=setting_warnings(section),
        caption=section.caption(f"{ablation.description} ({ablation.paper}). {_JUDGED}", scored),
    )


# Across suites, as the papers print them ---------------------------------------------------------


def _paper_form(paper: Paper, found: Sequence[Section], parameters: bool = False) -> Table:
    """Algorithms x suites, ours beside the paper's."""
    first: dict[str, Section] = {}
    for section in found:
        if section.scored and section.suite in set(paper.rates["suite"]):
            first.setdefault(section.suite, section)
    if not first:
        raise MissingError(f"no finished run on a suite of {paper.column}")
    ours = {label for section in first.values() for label in section.scored}
    labels = sorted(ours | set(paper.rates["algorithm"]), key=order_key)
    counts = published("parameters").set_index("algorithm")
    rows, data = [], []
    for label in labels:
        cells = []
        for suite, section in first.items():
            here = stats.mean_std(section.scores(label).mean(axis=1))
            seeds = len(section.scores(label))
            there = paper.cell(suite, label)
            cells += [
                f"{mean_std_cell(*here)}, n = {seeds}" if seeds else ABSENT,
                mean_std_cell(*there),
            ]
            data.append(
                {"algorithm": label, "suite": suite, "preset": section.preset}
                | {"steps_per_task": section.steps_per_task, "mean": here[0], "std": here[1]}
                | {"seeds": seeds, "published_mean": there[0], "published_spread": there[1]}
            )
        if parameters:
            for name in ("mt10_millions", "mt50_millions"):
                known = counts[name].get(label, np.nan)
                cells.append(f"{known:.2f}" if np.isfinite(known) else ABSENT)
        rows.append((label, *cells))
    scales = "; ".join(f"{suite}: {s.scale}, {s.missing}" for suite, s in first.items())
    return Table(
        title=f"As {paper.column} prints it",
        columns=(
            "Algorithm",
            *(f"{suite}: {whose}" for suite in first for whose in ("ours", "published")),
            *(("MT10 M, published", "MT50 M, published") if parameters else ()),
        ),
        rows=rows,
        data=pd.DataFrame(data),
        caption="Mean success rate of the final policy ± sample standard deviation over n seeds. "
        f"Ours, {scales}. {' '.join(f'{paper.scale(suite)}.' for suite in first)}"
        + (" Parameters: actor and one critic, millions." if parameters else ""),
    )


@OVERVIEWS.register("mega_table_1")
def mega_table_1(found: Sequence[Section]) -> Table:
    """MEGA Table 1."""
    return _paper_form(PAPERS[0], found)


@OVERVIEWS.register("d2r_table_8")
def d2r_table_8(found: Sequence[Section]) -> Table:
    """D2R Table 8, with parameters."""
    return _paper_form(PAPERS[1], found, parameters=True)


@OVERVIEWS.register("soft_modularization_table_1")
def soft_modularization_table_1(found: Sequence[Section]) -> Table:
    """Soft Modularization Table 1."""
    return _paper_form(PAPERS[2], found)


_PLAIN_UNITS = 400


def _capacity_label(section: Section, printed: Mapping[Hashable, Any]) -> str:
    """Which of our labels has the printed row's layers, ``""`` if none; a preset's own depth is
    the plain algorithm's, whatever the papers' is."""
    name, layers = printed["algorithm"], printed["layers"]
    if printed["units"] != _PLAIN_UNITS:
        return name if name in section.scored else ""
    names = {base_name(name), f"{base_name(name)}@layers{text(layers)}"} & set(section.scored)
    runs = section.runs.reindex(columns=["label", "config.depth"])
    fits = runs["label"].isin(names) & (runs["config.depth"] == layers)
    return min(runs.loc[fits, "label"], key=len, default="")


@table("capacity")
def capacity(section: Section) -> Table:
    """Plain networks of growing capacity beside soft modules (Soft Modularization Table 2)."""
    printed = published("capacity").to_dict("records")
    ours = [_capacity_label(section, row) for row in printed]
    if len([label for label in ours if label]) < 2 or "@" not in "".join(ours):
        raise MissingError("needs runs of networks of several sizes (bench ablate capacity)")
    size = section.parameters
    unit = size.get("soft_module", np.nan)
    rows = [
        (
            label or row["algorithm"],
            *(text(row[name]) or ABSENT for name in ("layers", "units")),
            *(
                (
                    mean_std_cell(*stats.mean_std(section.scores(label).mean(axis=1))),
                    f"{size[label] / unit:.1f} x" if np.isfinite(unit) else ABSENT,
                    str(len(section.scores(label))),
                )
                if label
                else (ABSENT,) * 3
            ),
            f"{row['success']:.3f}",
            f"{row['parameters_relative']:.1f} x",
        )
        for label, row in zip(ours, printed, strict=True)
    ]
    return Table(
        title="Capacity, as Soft Modularization Table 2 prints it",
        columns=(
            "Network",
            "Layers",
            "Units",
            "Ours",
            "Ours: parameters",
            "Seeds",
            "Published",
            "Published: parameters",
        ),
        rows=rows,
        data=pd.DataFrame(printed).assign(
            label=ours, ours=[size.get(label, np.nan) for label in ours]
        ),
        caption=section.caption(
            "Mean success rate ± sample standard deviation over seeds; parameters of actor and one "
            "critic relative to soft_module's. Published: Soft Modularization Table 2, MT50 with "
            "fixed goals, horizon 150, Meta-World v1; layers and units are those of its networks; "
            "at a reduced preset ours are as much narrower as all.",
            [label for label in ours if label],
        ),
    )


# Cost --------------------------------------------------------------------------------------------

SHARES = ("simulator", "update", "act", "evaluation", "checkpoint", "genetic", "other")


def _millions(value: float) -> str:
    return f"{value / 1e6:.2f}" if np.isfinite(value) else ABSENT


@table("compute")
def compute(section: Section) -> Table:
    """Seconds, speed, where the time went, and parameters beside the published counts."""
    timing = section.timing
    if timing.empty and not section.runs["seconds"].notna().any():
        raise MissingError("no run has recorded its times yet")
    # Stable: rows of one step stand in the order in which they were written.
    last = (
        timing.sort_values("step", kind="stable")
        .groupby(["run", "section"])["seconds"]
        .last()
        .unstack()
    )
    column = "mt50_millions" if section.suite.startswith("mt50") else "mt10_millions"
    counts = published("parameters").set_index("algorithm")[column]
    measured = [name for name in SHARES if name in last and last[name].notna().any()]
    rows, data = [], []
    for label in section.labels:
        runs = section.runs[section.runs["label"] == label].set_index("run")
        runs = runs[runs["finished"]] if runs["finished"].any() else runs
        spent = last.reindex(runs.index)
        parts = spent.reindex(columns=list(SHARES))
        total = spent["total"] if "total" in spent else parts.sum(axis=1, min_count=1)
        total = total.fillna(runs["seconds"])
        speed = _mean((runs["step"] * len(section.tasks) / total)[total > 0].dropna())
        shares = parts.sum() / total[total > 0].sum() if (total > 0).any() else parts.sum() * np.nan
        shares = shares.where(parts.notna().any())
        actor, critic = _mean(runs["parameters_actor"]), _mean(runs["parameters_critic"])
        seconds, updates = _mean(total.dropna()), _mean(runs["updates_per_second"].dropna())
        memory = _mean(runs["peak_memory_bytes"].dropna()) / 1e9
        known = float(counts.get(label, np.nan)) * 1e6
        if section.suite.split("_")[0] not in ("mt10", "mt50"):
            known = np.nan
        rows.append(
            (
                label,
                str(len(runs)),
                f"{seconds:,.0f}" if np.isfinite(seconds) else ABSENT,
                f"{speed:,.0f}" if np.isfinite(speed) else ABSENT,
                f"{updates:,.1f}" if np.isfinite(updates) else ABSENT,
                f"{memory:.2f}" if np.isfinite(memory) else ABSENT,
                *(f"{100 * s:.1f}" if np.isfinite(s) else ABSENT for s in shares[measured]),
                f"{_millions(actor)} + {_millions(critic)}" if actor + critic > 0 else ABSENT,
                _millions(known),
            )
        )
        data.append(
            {
                "suite": section.suite,
                "algorithm": label,
                "runs": len(runs),
                "seconds": seconds,
                "steps_per_second": speed,
                "updates_per_second": updates,
                "peak_memory_bytes": 1e9 * memory,
                **{f"share_{name}": float(shares[name]) for name in SHARES},
                "parameters_actor": actor,
                "parameters_critic": critic,
                "parameters_published": known,
            }
        )
    return Table(
        title="Compute",
        columns=(
            "Algorithm",
            "Runs",
            "Seconds",
            "Steps/s",
            "Updates/s",
            "Memory GB",
            *(f"{name.capitalize()} %" for name in measured),
            "Actor + critic M",
            "Published M",
        ),
        rows=rows,
        data=pd.DataFrame(data),
        caption=section.caption(
            "Wall-clock seconds of training per run, environment steps of all tasks together per "
            "second, gradient updates per second, most memory of the process (a GPU's not "
            "included); means over finished runs, or over all runs of an algorithm that has none. "
            "Shares are of the total. Parameters in millions at the end "
            "of training, beside D2R Table 8 (full-size networks; reduced presets have smaller "
            f"ones). Hardware: {'; '.join(section.hardware) or 'not recorded'}."
        ),
    )


@table("health")
def health(section: Section) -> Table:
    """What each algorithm says of its runs: learning, populations, growth."""
    found = section.results.health
    found = found[found["run"].isin(section.runs["run"])].join(
        section.runs.set_index("run")[["label", "seed"]], on="run"
    )
    if found.empty:
        raise MissingError("no run has recorded anything that its algorithm judges")
    worst = ("bad", "note", "good")
    rows = []
    for label in section.labels:
        of_label = found[found["label"] == label]
        for check in dict.fromkeys(of_label["check"]):
            verdicts = of_label[of_label["check"] == check]
            rank = verdicts["result"].map(worst.index)
            shown = verdicts.loc[rank.idxmin()]
            counts = [f"{n} {w}" for w in worst if (n := int((verdicts["result"] == w).sum()))]
            rows.append(
                (
                    label,
                    check,
                    ", ".join(counts),
                    f"seed {shown['seed']}: {shown['verdict']}",
                    shown["advice"],
                )
            )
    return Table(
        title="Health",
        columns=("Algorithm", "Check", "Runs", "Worst run", "What to do"),
        words=("Check", "Runs", "Worst run", "What to do"),
        rows=rows,
        data=found.drop(columns=["label"]).assign(algorithm=found["label"]),
        caption=section.caption(
            "Verdicts on training, not on results, from what every run recorded of itself; the "
            "table shows one of the worst runs of each check, its data has all."
        ),
        details=not (found["result"] == "bad").any(),
    )


# Settings ----------------------------------------------------------------------------------------


def _settings(section: Section, prefix: str) -> dict[str, dict[str, str]]:
    """Field -> label -> value(s), the runs of a label joined where they differ."""
    out: dict[str, dict[str, str]] = {}
    for column in section.runs.columns:
        if not str(column).startswith(prefix):
            continue
        found: dict[str, set[str]] = {label: set() for label in section.labels}
        for label, value in zip(section.runs["label"], section.runs[column], strict=True):
            found[label].add(text(value))
        out[str(column).removeprefix(prefix)] = {
            label: " / ".join(sorted(values - {""})) for label, values in found.items()
        }
    return {name: values for name, values in out.items() if any(values.values())}


def setting_warnings(section: Section) -> tuple[str, ...]:
    """What does not compare: settings that differ between algorithms of one section, and curves
    that know no tasks."""
    protocol, recipe = _settings(section, "protocol."), _settings(section, "config.")
    candidates = [("Protocol", name, values) for name, values in protocol.items()]
    candidates += [("Recipe", name, recipe[name]) for name in RECIPE if name in recipe]
    out = []
    for kind, name, values in candidates:
        given = {label: value for label, value in values.items() if value}
        if len(set(given.values())) > 1:
            shown = "; ".join(f"{label}: {value}" for label, value in given.items())
            out.append(f"{kind} differs in {name} ({shown}): these rows do not compare fairly.")
    without = section.runs.loc[section.runs["taskless"], "label"]
    out += [
        f"{label} was imported without tasks: it is in the curves, not in the tables."
        for label in dict.fromkeys(without)
    ]
    return tuple(out)


def _settings_table(section: Section, prefix: str, title: str, caption: str) -> Table:
    settings = _settings(section, prefix)
    if not settings:
        raise MissingError("the runs record none of these fields")
    rows = [
        (name, *(values[label] or ABSENT for label in section.labels))
        for name, values in settings.items()
    ]
    columns = ("Field", *section.labels)
    return Table(
        title=title,
        columns=columns,
        rows=rows,
        data=pd.DataFrame(rows, columns=list(columns)),
        caption=f"{caption} Suite {section.suite}, {section.scale}.",
        details=True,
    )


@table("protocol")
def protocol(section: Section) -> Table:
    """Every protocol field's value; one value for all algorithms, or a warning."""
    shown = _settings_table(
        section,
        "protocol.",
        "Protocol",
        "How training and evaluation were done; a fair comparison has one value per row.",
    )
    return replace(shown, warnings=setting_warnings(section))


@table("configuration")
def configuration(section: Section) -> Table:
    """The resolved configuration of every algorithm."""
    return _settings_table(
        section, "config.", "Configuration", "Resolved configuration of each algorithm."
    )


# The runs ----------------------------------------------------------------------------------------


def run_table(results: Results) -> Table:
    """One row per run: state, progress, latest evaluation, cost, error."""
    parts = []
    for section in sections(results):
        curve = section.curves("success")
        latest = curve[curve["step"] == curve.groupby("run")["step"].transform("max")]
        success = latest.groupby("run")["value"].mean()
        parts.append(section.runs.assign(latest=section.runs["run"].map(success)))
    if not parts:
        raise MissingError("there are no runs")
    runs = pd.concat(parts, ignore_index=True)
    rows = [
        (
            row["run"],
            row["label"],
            str(row["seed"]),
            row["state"],
            f"{row['step']:,} / {row['steps_per_task']:,}",
            rate(row["latest"]),
            f"{row['seconds'] / 3600:.2f}" if np.isfinite(row["seconds"]) else ABSENT,
            last_line(row["error"]),
        )
        for row in runs.to_dict("records")
    ]
    return Table(
        title="Runs",
        columns=(
            "Run",
            "Algorithm",
            "Seed",
            "State",
            "Steps per task",
            "Latest evaluation",
            "Hours",
            "Error",
        ),
        words=("Algorithm", "State", "Error"),
        rows=rows,
        data=runs.drop(columns=["finished", "taskless"]),
        caption="Every run found. Latest evaluation: mean over tasks of its success rate.",
        details=len(rows) > 20,
    )


def last_line(error: str) -> str:
    """The line of a traceback that says what happened."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def summary(results: Results) -> RenderableType:
    """Success rates with their scale for a terminal, and what is missing."""
    found = sections(results)
    if not found:
        return Text("No runs yet.")
    parts: list[RenderableType] = []
    for section in found:
        grid = Grid(title=escape(section.title), title_justify="left", caption_justify="left")
        try:
            source = success_rates(section)
        except MissingError as reason:
            parts.append(Text(f"{section.title}\n{reason}", style="yellow"))
            continue
        wanted = [0, 1, 2, 3, 4, *range(7, len(source.columns))]
        for position in wanted:
            grid.add_column(
                source.columns[position].replace(": ", "\n"),
                justify="right" if position else "left", overflow="fold",
            )  # fmt: skip
        for row in source.rows:
            grid.add_row(*(Text(row[position]) for position in wanted))
        notes = [f"{section.scale}; {section.evaluated}; {section.missing}."]
        if section.preset == "smoke":
            notes.insert(0, "SMOKE: shows that things work, not results.")
        notes += [f"Warning: {warning}" for warning in setting_warnings(section)]
        notes += [comparison.sentence for comparison in comparisons(section)]
        parts += [grid, Text("\n".join(notes) + "\n")]
    return Group(*parts)
