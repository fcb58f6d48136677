"""The score by which variants of one algorithm are compared: success over a whole training.

    python results/studies/score.py results/studies/mega_readings

A run's score is the success rate of its training episodes from first to last, averaged over tasks:
many more episodes than a final evaluation, and it counts learning early. For each label: its
score per seed, the mean, the difference of the mean from the plain algorithm's with its standard
error and 95 % interval (Welch), and the final evaluation. Runs that are not finished are left out.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd

from bench import frames
from reports import stats


def scores(out: Path) -> pd.DataFrame:
    """A row per finished run: label, seed, score, final."""
    found = frames.load(out)
    runs = found["runs"].query("state == 'done'")[["run", "algorithm", "seed"]]
    success = found["metrics"].query("metric == 'success'")

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
    lines = [
        "| variant | score per seed | mean | difference | its SE | 95 % interval | final |",
        "|---|---|---|---|---|---|---|",
    ]
    means = rows.groupby("label")["score"].mean().sort_values(ascending=False)
    for label in map(str, means.index):
        mine = rows[rows["label"] == label].sort_values("seed")
        plain = rows[rows["label"] == label.partition("@")[0]]
        score, base = mine["score"].to_numpy(), plain["score"].to_numpy()
        seeds = ", ".join(f"{value:.2f}" for value in score)
        apart = "| | |"
        if "@" in label and min(len(score), len(base)) > 1:
            gap = stats.welch(score, base).estimate
            error = np.sqrt(score.var(ddof=1) / len(score) + base.var(ddof=1) / len(base))
            apart = f"{gap.value:+.3f} | {error:.3f} | [{gap.low:+.2f}, {gap.high:+.2f}]"
        lines.append(
            f"| `{label}` | {seeds} | {score.mean():.3f} | {apart} | {mine['final'].mean():.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(scores(Path(sys.argv[1]))))
