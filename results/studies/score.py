"""The score by which variants of one algorithm are compared: success over a whole training.

    python results/studies/score.py results/studies/mega_readings
    python results/studies/score.py results/studies/reference 0.2      of the last fifth of training

A run's score is the success rate of its training episodes from first to last, averaged over tasks:
more episodes than a final evaluation has, and it counts learning early. For each label: its score
per seed, the mean, the mean difference from the plain algorithm on the same seeds (a good seed is
good for most variants) with its standard error and, from three seeds on, 95 % interval (paired t),
and the final evaluation. Runs that are not finished are left out.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from bench import frames
from reports.stats import mean_interval


def scores(out: Path, last: float = 1.0) -> pd.DataFrame:
    """A row per finished run: label, seed, score over the ``last`` share of training, final."""
    found = frames.load(out)
    runs = found["runs"].query("state == 'done'")[["run", "algorithm", "seed", "steps_per_task"]]
    success = found["metrics"].query("metric == 'success'")
    first = (1 - last) * success["run"].map(runs.set_index("run")["steps_per_task"])
    success = success[success["step"] > first]

    def mean(kind: str) -> pd.Series:
        rows = success[success["kind"] == kind]
        by_task = rows.groupby(["run", "task"])[["value", "count"]].sum()  # successes, episodes
        rate: pd.Series = (by_task["value"] / by_task["count"]).groupby("run").mean()
        return rate

    rows: pd.DataFrame = runs.assign(
        score=runs["run"].map(mean("train")), final=runs["run"].map(mean("final"))
    ).rename(columns={"algorithm": "label"})
    return rows


def table(rows: pd.DataFrame) -> str:
    """Markdown, the best mean score first."""
    by_seed = rows.pivot_table(index="seed", columns="label", values="score")
    final = rows.groupby("label")["final"].mean()
    lines = [
        "| variant | score per seed | mean | difference | its SE | 95 % interval | final |",
        "|---|---|---|---|---|---|---|",
    ]
    for label in by_seed.mean().sort_values(ascending=False).index:
        score, plain = by_seed[label].dropna(), _plain(label, by_seed.columns)
        cells = [f"`{label}`", ", ".join(f"{v:.2f}" for v in score), f"{score.mean():.3f}"]
        gap = (score - by_seed.get(plain, np.nan)).dropna()
        if label != plain and len(gap) > 1:
            mean, low, high = mean_interval(gap)
            interval = f"[{low:+.2f}, {high:+.2f}]" if np.isfinite(low) else ""
            cells += [f"{mean:+.3f}", f"{gap.sem():.3f}", interval]
        else:
            cells += [""] * 3
        lines.append("| " + " | ".join([*cells, f"{final[label]:.2f}"]) + " |")
    return "\n".join(lines)


def _plain(label: str, labels: pd.Index) -> str:
    """What a label is compared with: without its variant, or without all it changes."""
    for shorter in (re.sub(r"@[^\[]*", "", label), re.split(r"[@\[]", label)[0]):
        if shorter != label and shorter in labels:
            return shorter
    return label


if __name__ == "__main__":
    print(table(scores(Path(sys.argv[1]), *map(float, sys.argv[2:]))))
