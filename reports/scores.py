"""Tables of success: per task, and as the papers print it, beside what they print."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from reports import stats
from reports.frames import (
    MissingError,
    Section,
    base_name,
    generator,
    order_key,
    published,
    text,
)
from reports.tabling import (
    ABSENT,
    OVERVIEWS,
    Table,
    interval_cell,
    mean_std_cell,
    rate,
    setting_warnings,
    table,
)


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
        steps = sorted(self.rates.query("suite == @suite")["steps_per_task"].dropna().unique())
        trained = f", {' or '.join(f'{n:,.0f}' for n in steps)} steps per task" if steps else ""
        return (
            f"{self.column}: {row['statistic']}, horizon {row['horizon']:.0f}{trained}{self.spread}"
        )

    def apart(self, section: Section) -> str:
        """Why its numbers do not compare with the section's, in words; nothing where they do."""
        if not section.full_scale:
            return "; ours is at another scale, the two do not compare"
        rows = self.rates.query("suite == @section.suite")
        ours = {"steps_per_task": float(section.steps_per_task)}
        horizon = section.runs.get("protocol.horizon", pd.Series(dtype=float)).dropna().unique()
        ours |= {"horizon": float(horizon[0])} if len(horizon) == 1 else {}
        differs = [
            f"{name.replace('_', ' ')} {text(value)}"
            for name, value in ours.items()
            if rows[name].notna().any() and not (rows[name] == value).any()
        ]
        return f"; ours has {' and '.join(differs)}, the two do not compare" if differs else ""


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
    """Interquartile mean over seeds x tasks of one algorithm, with its interval.

    NaN where every score is of a single episode: of zeros and ones it tells only their mean.
    """
    if not section.graded:
        return stats.Estimate(float("nan"))
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
    note = "".join(f" {paper.scale(section.suite)}{paper.apart(section)}." for paper in papers)
    note = f" Published values:{note}" if papers else ""
    if not section.graded:
        note = f" With one episode per task a score is 0 or 1, and there is no IQM.{note}"
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
            f"tasks, 95 % percentile interval of {stats.REPLICATES:,} replicates of rliable's "
            f"stratified bootstrap, {stats.TOO_NARROW}; none below {stats.MIN_SEEDS} seeds.{note}",
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
        caption="Numbers of other papers, each under its own goals, horizon, reward and training "
        f"length: they say what is possible on {section.suite}. Only a row with all of them alike "
        f"compares with the runs above ({section.rules or 'rules not recorded'}; "
        f"{section.scale}). Second-hand: as a later paper tells it.",
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
    labels = section.labels_in(data)
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
