"""What all tables share: cells, warnings of what does not compare, and where they register."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from reports import stats
from reports.frames import (
    RECIPE,
    WITHOUT_TASKS,
    Ablation,
    Section,
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
    if not np.isfinite(estimate.value):
        return ABSENT
    value = f"{estimate.value:{'+' if signed else ''}.2f}"
    bounds = f" [{estimate.low:.2f}, {estimate.high:.2f}]" if estimate.has_interval else ""
    return (value + bounds).replace("-", "−")


def millions(value: float) -> str:
    """``1.37`` for a count of 1,370,000."""
    return f"{value / 1e6:.2f}" if np.isfinite(value) else ABSENT


def mean(values: pd.Series) -> float:
    """The mean, NaN of none."""
    return float(values.mean()) if len(values) else float("nan")


# What does not compare ---------------------------------------------------------------------------


def settings(section: Section, prefix: str) -> dict[str, dict[str, str]]:
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
    protocol, recipe = settings(section, "protocol."), settings(section, "config.")
    candidates = [("Protocol", name, values) for name, values in protocol.items()]
    candidates += [("Recipe", name, recipe[name]) for name in RECIPE if name in recipe]
    out = []
    for kind, name, values in candidates:
        given = {label: value for label, value in values.items() if value}
        counts = Counter(given.values()).most_common()
        if len(counts) > 1:
            (usual, most), second = counts[0], counts[1][1]
            apart = {k: v for k, v in given.items() if v != usual or most == second}
            others = f"; the others: {usual}" if len(apart) < len(given) else ""
            shown = "; ".join(f"{label}: {value}" for label, value in apart.items()) + others
            rows = "these rows do" if not others else "rows that differ do"
            out.append(f"{kind} differs in {name} ({shown}): {rows} not compare fairly.")
    if section.copies:
        out.append(f"Copies of runs count once: left out {_some(section.copies)}.")
    without = section.runs[section.runs["taskless"] & (section.runs["origin"] != "")]
    for label, of_label in without.groupby("label"):
        seen = section.metrics[section.metrics["run"].isin(of_label["run"])]
        named = set(seen["task"]) - {"", WITHOUT_TASKS}
        why = f"names tasks that are not ours ({_some(sorted(named))})" if named else "has no tasks"
        out.append(f"{label} was imported and {why}: it is in the curves, not in the tables.")
    short = section.runs[section.runs["finished"] & (section.runs["step"] > 0)]
    short = short[short["step"] < 0.9 * short["steps_per_task"]]
    out += [
        f"{label} ends at step {runs['step'].min():,} of {section.steps_per_task:,}."
        for label, runs in short.groupby("label")
    ]
    return tuple(out)


def _some(names: Sequence[str]) -> str:
    """``a, b, c and 4 more``."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
