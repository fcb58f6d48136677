"""Tables: one registered function each, from a section to cells and the numbers behind them.

To add one, write a function from ``Section`` to ``Table`` under ``@table("name")``; raise
``MissingError`` with the reason where the results do not support it. Every writer escapes.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table as Grid
from rich.text import Text

from reports import stats
from reports.frames import (
    RECIPE,
    MissingError,
    Results,
    Section,
    generator,
    published,
    sections,
    text,
)

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


TABLES: dict[str, Callable[[Section], Table]] = {}


def table(name: str) -> Callable[[Callable[[Section], Table]], Callable[[Section], Table]]:
    """Registers a section's table under ``name``, in the order of the page."""

    def register(function: Callable[[Section], Table]) -> Callable[[Section], Table]:
        if name in TABLES:
            raise ValueError(f"table {name!r} is registered twice")
        TABLES[name] = function
        return function

    return register


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
    """``0.81 [0.76, 0.86]``; without an interval the value alone."""
    sign = "+" if signed else ""
    value = f"{estimate.value:{sign}.2f}"
    if not estimate.has_interval:
        return value
    return f"{value} [{estimate.low:{sign}.2f}, {estimate.high:{sign}.2f}]"


def _mean(values: pd.Series) -> float:
    return float(values.mean()) if len(values) else float("nan")


# Success -----------------------------------------------------------------------------------------


def _published_rates(suite: str, label: str, source: str) -> tuple[float, float]:
    name = "Table 1" if source == "mega" else "Table 8"
    frame = published("success_rates")
    hit = frame[
        (frame["source"] == source)
        & (frame["table"] == name)
        & (frame["suite"] == suite)
        & (frame["algorithm"] == label)
    ]
    return (float(hit["mean"].iloc[0]), float(hit["std"].iloc[0])) if len(hit) else (np.nan, np.nan)


def iqm(section: Section, label: str) -> stats.Estimate:
    """Interquartile mean over seeds x tasks of one algorithm, with its interval."""
    return stats.stratified_interval(
        section.scores(label).to_numpy(),
        stats.interquartile_mean,
        generator("iqm", section.title, label),
    )


@table("success_rates")
def success_rates(section: Section) -> Table:
    """Final success rate per algorithm in the papers' form, the published values beside ours."""
    if not section.scored:
        raise MissingError(f"no finished run has a final evaluation ({section.missing})")
    rows, data = [], []
    for label in section.scored:
        seed_means = section.scores(label).mean(axis=1)
        mean, std = stats.mean_std(seed_means)
        middle = iqm(section, label)
        mega, d2r = (_published_rates(section.suite, label, source) for source in ("mega", "d2r"))
        rows.append(
            (
                label,
                mean_std_cell(mean, std),
                interval_cell(middle),
                rate(float(seed_means.min())),
                str(len(seed_means)),
                section.episodes,
                f"{section.preset}, {section.steps_per_task:,}",
                mean_std_cell(*mega),
                mean_std_cell(*d2r),
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
                "published_mega_table1_mean": mega[0],
                "published_mega_table1_spread": mega[1],
                "published_d2r_table8_mean": d2r[0],
                "published_d2r_table8_std": d2r[1],
            }
        )
    note = "" if section.full_scale else " Ours is at another scale: the two do not compare."
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
            "Published: MEGA Table 1",
            "Published: D2R Table 8",
        ),
        rows=rows,
        data=pd.DataFrame(data),
        caption=section.caption(
            "Success rate of the final policy: successes over episodes per task, mean over tasks; "
            "mean ± sample standard deviation over seeds. IQM: interquartile mean over seeds × "
            f"tasks, 95 % percentile interval of {stats.REPLICATES:,} bootstrap replicates that "
            "draw seeds within each task (rliable's stratified bootstrap); no interval below "
            f"{stats.MIN_SEEDS} seeds. Published values: 5 seeds, spread as printed (MEGA Table 1 "
            f"calls it variance, D2R Table 8 standard deviation).{note}",
            section.scored,
        ),
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


# Comparisons -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The reference algorithm against another one."""

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
            return "not separated"
        winner = self.reference if self.difference.estimate.value > 0 else self.other
        return f"separated: {winner} is better"

    @property
    def sentence(self) -> str:
        """The comparison in one line."""
        return (
            f"{self.reference} − {self.other}: "
            f"{interval_cell(self.difference.estimate, signed=True)}, "
            f"{self.seeds[0]} and {self.seeds[1]} seeds: {self.verdict}"
        )


def comparisons(section: Section) -> list[Comparison]:
    """Every scored algorithm against MEGA, or against the first where there is no MEGA."""
    if len(section.scored) < 2:
        return []
    reference = "mega" if "mega" in section.scored else section.scored[0]
    ours = section.scores(reference)
    others = [label for label in section.scored if label != reference]
    judged = []
    for other in others:
        theirs = section.scores(other)
        rng = generator("comparison", section.title, reference, other)
        judged.append(
            (
                other,
                len(theirs),
                stats.difference(ours.mean(axis=1), theirs.mean(axis=1), rng),
                stats.probability_of_improvement(ours.to_numpy(), theirs.to_numpy(), rng),
            )
        )
    adjusted = stats.holm([difference.p for _, _, difference, _ in judged])
    return [
        Comparison(
            reference=reference,
            other=other,
            seeds=(len(ours), n),
            difference=difference,
            adjusted_p=p,
            improvement=improvement,
        )
        for (other, n, difference, improvement), p in zip(judged, adjusted, strict=True)
    ]


@table("comparisons")
def comparison_table(section: Section) -> Table:
    """Difference and probability of improvement of the reference algorithm over each other one."""
    compared = comparisons(section)
    if not compared:
        raise MissingError(
            f"a comparison needs two algorithms with finished runs ({section.missing})"
        )
    reference = compared[0].reference
    rows = [
        (
            f"{reference} − {c.other}",
            interval_cell(c.difference.estimate, signed=True),
            c.difference.method,
            p_cell(c.adjusted_p),
            interval_cell(c.improvement),
            f"{c.seeds[0]} / {c.seeds[1]}",
            c.verdict,
        )
        for c in compared
    ]
    data = pd.DataFrame(
        {
            "suite": section.suite,
            "reference": reference,
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
    return Table(
        title=f"Difference to {reference}",
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
        rows=rows,
        data=data,
        caption=section.caption(
            "Difference of the mean final success rates with its own 95 % interval: Welch's t on "
            f"seed means below {stats.WELCH_BELOW} seeds, percentile bootstrap from there on, none "
            f"below {stats.MIN_SEEDS}. p values are Holm-adjusted over the rows and the verdict "
            "follows them. P: probability that a random seed is better on a random task (ties "
            "half), stratified bootstrap interval.",
            section.scored,
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
    columns = [c for c in section.runs.columns if str(c).startswith("hardware.")]
    names = [str(c).removeprefix("hardware.").replace("_", " ") for c in columns]
    hardware = sorted(
        {
            ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True) if value)
            for values in zip(*(section.runs[c].map(text) for c in columns), strict=True)
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
            f"ones). Hardware: {'; '.join(h for h in hardware if h) or 'not recorded'}."
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
        details=bool((found["result"] == "good").all()),
    )


# Settings ----------------------------------------------------------------------------------------


def _settings(section: Section, prefix: str) -> dict[str, dict[str, str]]:
    """Field -> label -> value(s), the runs of a label joined where they differ."""
    out: dict[str, dict[str, str]] = {}
    for column in section.runs.columns:
        if not str(column).startswith(prefix):
            continue
        values = section.runs[column].map(text)
        name = str(column).removeprefix(prefix)
        out[name] = {
            label: " / ".join(sorted(set(values[section.runs["label"] == label]) - {""}))
            for label in section.labels
        }
    return {name: values for name, values in out.items() if any(values.values())}


def setting_warnings(section: Section) -> tuple[str, ...]:
    """Protocol and recipe fields that differ between algorithms of one section."""
    protocol, recipe = _settings(section, "protocol."), _settings(section, "config.")
    candidates = [("Protocol", name, values) for name, values in protocol.items()]
    candidates += [("Recipe", name, recipe[name]) for name in RECIPE if name in recipe]
    out = []
    for kind, name, values in candidates:
        given = {label: value for label, value in values.items() if value}
        if len(set(given.values())) > 1:
            shown = "; ".join(f"{label}: {value}" for label, value in given.items())
            out.append(f"{kind} differs in {name} ({shown}): these rows do not compare fairly.")
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
        data=runs.drop(columns=["finished"]),
        caption="Every run found. Latest evaluation: mean over tasks of its success rate.",
        details=len(rows) > 20,
    )


def last_line(error: str) -> str:
    """The line of a traceback that says what happened."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


# Writers -----------------------------------------------------------------------------------------

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "−": r"$-$",
    "×": r"$\times$",
    "–": "--",
    "·": r"$\cdot$",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "⚠": "",
} | {c: f"\\{c}" for c in "&%$#_{}"}


def latex_escape(value: str) -> str:
    """Text that LaTeX prints as it stands."""
    return "".join(_LATEX.get(c, c) for c in " ".join(value.split()))


def markdown_escape(value: str) -> str:
    """Text that Markdown shows literally inside a table cell."""
    plain = html.escape(" ".join(value.split()), quote=False)
    return "".join(f"\\{c}" if c in "\\|`*_[]~" else c for c in plain)


def to_markdown(source: Table) -> str:
    """A GitHub-flavoured table under its title, the caption below."""
    lines = [source.columns, ("---", *("---:" for _ in source.columns[1:]))]
    body = [[markdown_escape(cell) for cell in row] for row in source.rows]
    header = [markdown_escape(cell) for cell in lines[0]]
    grid = "\n".join("| " + " | ".join(row) + " |" for row in [header, list(lines[1]), *body])
    warnings = "".join(f"> **Warning:** {markdown_escape(w)}\n\n" for w in source.warnings)
    title, caption = markdown_escape(source.title), markdown_escape(source.caption)
    return f"## {title}\n\n{warnings}{grid}\n\n{caption}\n"


def to_latex(source: Table) -> str:
    """A ``table`` environment for the booktabs package."""
    rows = [" & ".join(latex_escape(cell) for cell in row) + r" \\" for row in source.rows]
    notes = "".join(f" Warning: {latex_escape(w)}" for w in source.warnings)
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{latex_escape(source.title)}. {latex_escape(source.caption)}{notes}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(source.columns) - 1)}}}",
            r"\toprule",
            " & ".join(latex_escape(cell) for cell in source.columns) + r" \\",
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def to_csv(source: Table) -> str:
    """The tidy numbers behind the table."""
    return source.data.to_csv(index=False, lineterminator="\n")


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
        wanted = [0, 1, 2, 3, 4, 7, 8]
        for position in wanted:
            grid.add_column(
                source.columns[position].replace(": ", "\n"),
                justify="right" if position else "left", overflow="fold",
            )  # fmt: skip
        for row in source.rows:
            grid.add_row(*(Text(row[position]) for position in wanted))
        notes = [f"{section.scale}; {section.episodes} episodes per task; {section.missing}."]
        if section.preset == "smoke":
            notes.insert(0, "SMOKE: shows that things work, not results.")
        notes += [f"Warning: {warning}" for warning in setting_warnings(section)]
        notes += [comparison.sentence for comparison in comparisons(section)]
        parts += [grid, Text("\n".join(notes) + "\n")]
    return Group(*parts)
