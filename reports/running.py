"""Tables of the runs: what they cost, how they fared, how they were set."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table as Grid
from rich.text import Text

from reports.comparing import comparisons
from reports.frames import (
    MissingError,
    Results,
    Section,
    published,
    sections,
)
from reports.scores import success_rates
from reports.tabling import (
    ABSENT,
    Table,
    mean,
    millions,
    rate,
    setting_warnings,
    settings,
    table,
)

SHARES = ("simulator", "update", "act", "evaluation", "checkpoint", "genetic", "other")


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
        speed = mean((runs["step"] * len(section.tasks) / total)[total > 0].dropna())
        shares = parts.sum() / total[total > 0].sum() if (total > 0).any() else parts.sum() * np.nan
        shares = shares.where(parts.notna().any())
        actor, critic = mean(runs["parameters_actor"]), mean(runs["parameters_critic"])
        seconds, updates = mean(total.dropna()), mean(runs["updates_per_second"].dropna())
        memory = mean(runs["peak_memory_bytes"].dropna()) / 1e9
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
                f"{millions(actor)} + {millions(critic)}" if actor + critic > 0 else ABSENT,
                millions(known),
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


def curve_rows(section: Section, metric: str, per_task: bool = False) -> pd.DataFrame:
    """`Section.curves`, or `Section.task_curves`; raises MissingError if there are none."""
    rows = section.task_curves(metric) if per_task else section.curves(metric)
    if rows.empty:
        raise MissingError(f"no run has been evaluated for {metric} during training yet")
    return rows


def success_by_hours(section: Section) -> pd.DataFrame:
    """Mean success over tasks at each evaluation and the ``hours`` that its run had trained.

    A row per label, run, finished and step. Raises MissingError if there is none.
    """
    rows = curve_rows(section, "success")
    totals = section.timing[section.timing["section"] == "total"]
    clocks = {run: clock.set_index("step")["seconds"] for run, clock in totals.groupby("run")}
    means = rows.groupby(["label", "run", "finished", "step"])["value"].mean().reset_index()
    means = means[means["run"].isin(clocks)]
    if means.empty:
        raise MissingError("no evaluated run has recorded its times")
    hours = [
        np.interp(curve["step"], [0, *clocks[run].index], [0.0, *clocks[run]]) / 3600
        for run, curve in means.groupby("run", sort=False)
    ]
    order = means.groupby("run", sort=False).indices
    return means.assign(
        hours=pd.Series(np.concatenate(hours), np.concatenate(list(order.values())))
    )


MINUTES = (1, 2, 5, 10, 20, 30, 45, 60, 120, 300, 600, 1_440, 2_880, 7_200)
"""Times of training at which algorithms are compared; the last few within a section's runs."""


@table("equal_time")
def equal_time(section: Section) -> Table:
    """Success after equal times of training: what an hour buys, whatever a step costs."""
    rows = success_by_hours(section)
    rows = rows[rows["finished"]]
    if rows.empty:
        raise MissingError("no finished run has recorded its times")
    spans = rows.groupby("run")["hours"].agg(["min", "max"])
    times = [m for m in MINUTES if spans["min"].min() <= m / 60 <= spans["max"].max()][-5:]
    shown, data = [], []
    for label in section.labels_in(rows):
        runs = [run for _, run in rows[rows["label"] == label].groupby("run")]
        ends = [float(run["hours"].iloc[-1]) for run in runs]
        after = {}
        for minutes in times:
            reached = [  # after its end what a run came to stays
                float(np.interp(minutes / 60, run["hours"], run["value"], left=np.nan))
                for run in runs
            ]
            after[minutes] = float(np.mean(reached))  # of all runs or of none
        end = float(np.mean([run["value"].iloc[-1] for run in runs]))
        cells = [
            rate(value) + "*" * bool(np.isfinite(value) and minutes / 60 > min(ends))
            for minutes, value in after.items()
        ]
        shown.append((label, str(len(runs)), *cells, f"{60 * np.mean(ends):.0f} min", rate(end)))
        data += [
            {"suite": section.suite, "algorithm": label, "runs": len(runs), "minutes": minutes,
             "success": value}
            for minutes, value in [*after.items(), (60 * float(np.mean(ends)), end)]
        ]  # fmt: skip
    words = [f"{m} min" if m < 60 else f"{m // 60} h" for m in times]
    return Table(
        title="Success for equal time",
        columns=("Algorithm", "Runs", *(f"After {each}" for each in words), "End", "At its end"),
        rows=shown,
        data=pd.DataFrame(data),
        warnings=("Runs were trained on different machines.",) * (len(section.hardware) > 1),
        caption=section.caption(
            "Success rate of the evaluations, mean over tasks, then over finished runs, between "
            "the two evaluations nearest to so much wall-clock training (evaluations included). "
            f"{ABSENT}: not all runs of the algorithm had been evaluated by then. *: some or all "
            "had ended, and count with what they came to. Times depend on the machine and on what "
            "else ran on it: "
            f"{'; '.join(section.hardware) or 'hardware not recorded'}."
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
        well = []
        for check in dict.fromkeys(of_label["check"]):
            verdicts = of_label[of_label["check"] == check]
            if (verdicts["result"] == "good").all():
                well.append(check)
                continue
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
        if well:
            good = f"all {of_label['run'].nunique()} good"
            rows.append((label, ", ".join(well), good, "", ""))
    return Table(
        title="Health",
        columns=("Algorithm", "Check", "Runs", "Worst run", "What to do"),
        words=("Check", "Runs", "Worst run", "What to do"),
        rows=rows,
        data=found.drop(columns=["label"]).assign(algorithm=found["label"]),
        caption=section.caption(
            "Verdicts on training, not on results, from what every run recorded of itself. The "
            "table shows one of the worst runs of each check that is not good in all, its data "
            "has every verdict."
        ),
        details=not (found["result"] == "bad").any(),
    )


# Settings ----------------------------------------------------------------------------------------


def _settings_table(section: Section, prefix: str, title: str, caption: str) -> Table:
    shown = settings(section, prefix)
    if not shown:
        raise MissingError("the runs record none of these fields")
    rows = [
        (name, *(values[label] or ABSENT for label in section.labels))
        for name, values in shown.items()
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
