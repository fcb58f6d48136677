"""Tables of differences between algorithms, and what they support in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from reports import stats
from reports.frames import (
    Ablation,
    MissingError,
    Section,
    counted,
    generator,
)
from reports.scores import iqm
from reports.tabling import (
    ABLATION_TABLES,
    ABSENT,
    Table,
    interval_cell,
    mean,
    mean_std_cell,
    millions,
    p_cell,
    setting_warnings,
    table,
)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The reference algorithm against another one."""

    place: str
    reference: str
    other: str
    seeds: tuple[int, int]
    difference: stats.Difference
    adjusted_p: float
    family: int
    """Comparisons that were judged together, this one included."""
    improvement: stats.Estimate

    @property
    def verdict(self) -> str:
        """What the numbers support, in words, and among how many comparisons."""
        if np.isnan(self.difference.p):
            return f"not judged ({self.difference.method})"
        among = f" among {self.family} comparisons" if self.family > 1 else ""
        if self.adjusted_p >= 1 - stats.CONFIDENCE:
            alone = self.difference.p < 1 - stats.CONFIDENCE
            return "not separated" + (f"{among} (Holm)" if alone else "")
        winner = self.reference if self.difference.estimate.value > 0 else self.other
        return f"separated{among}: {winner} is better"

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
                stats.difference(a.mean(axis=1), b.mean(axis=1)),
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
            family=int(np.isfinite(adjusted).sum()),
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
    "Difference of the mean final success rates with its own 95 % interval, Welch's t on seed "
    f"means, none below {stats.MIN_SEEDS} seeds. p values are Holm-adjusted over the rows of this "
    "table, and the verdict follows them. P: probability that a random seed of the first is "
    f"better on a random task (ties half); its interval is the bootstrap's, {stats.TOO_NARROW}."
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
        actor = mean(section.runs.loc[section.runs["label"] == label, "parameters_actor"])
        difference, method, p, better, _, verdict = minus.get(label, ("base", *[ABSENT] * 5))
        rows.append(
            (
                label,
                mean_std_cell(*stats.mean_std(scores.mean(axis=1))),
                interval_cell(iqm(section, label)),
                str(len(scores)),
                millions(actor),
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
