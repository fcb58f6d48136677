"""Training before and after stage increases, beside the same moments where no stage increases.

    python results/studies/mega_growth/around.py

A task grows when a window of its episodes was poor, so the next would be better by chance alone.
What that is worth is read off `mega@fixed3`: the same trigger goes over its episodes and changes
nothing. The same replay finds the very increases of the runs that did grow (asserted).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from algorithms.mega import Evolution
from bench import frames
from reports.stats import mean_interval

HERE = Path(__file__).parent
WINDOW = 6


def increases(success: np.ndarray, return_: np.ndarray) -> Iterator[tuple[int, int]]:
    """(episode, task) after which the trigger increases a stage; both arguments (E, T)."""
    trigger = Evolution(success.shape[1], WINDOW, solved=0.5, progress=0.1)
    for episode, row in enumerate(zip(success, return_, strict=True)):
        for task, (solved, value) in enumerate(zip(*row, strict=True)):
            if trigger.record(task, value, bool(solved)) is not None:
                yield episode, task


def main() -> None:
    """Print the table of the page."""
    found = frames.load(HERE)
    train = found["metrics"].query("kind == 'train'")
    rows = []
    for run in found["runs"].query("state == 'done'").to_dict("records"):
        if not run["algorithm"].startswith("mega"):
            continue
        own = train[train["run"] == run["run"]]
        order = own["task"].unique()
        tables = own.pivot_table(index="step", columns=["metric", "task"], values="value")
        counted = tables.index > run["protocol.warmup_steps"]
        success, return_ = (tables[name][order].to_numpy()[counted] for name in
                            ("success", "return"))  # fmt: skip
        events = list(increases(success, return_))
        if run["config.evolve"]:
            _, probe = found["probes"][run["run"]][-1]
            steps = tables.index[counted]
            told = {(int(event[0]), int(event[1])) for event in probe["stage_events"]}
            assert told == {(steps[episode], task) for episode, task in events}, run["run"]
        for episode, task in events:
            if not WINDOW <= episode + 1 <= len(success) - WINDOW:
                continue
            spans = [slice(max(episode + 1 + k * WINDOW, 0), episode + 1 + (k + 1) * WINDOW)
                     for k in (-1, 0, 1)]  # fmt: skip
            values = [x[s, task].mean() if len(x[s]) == WINDOW else np.nan
                      for x in (success, return_) for s in spans]  # fmt: skip
            rows.append([run["algorithm"], run["seed"], *values])
    columns = [f"{what} {when}" for what in ("success", "return")
               for when in ("before", "after", "later")]  # fmt: skip
    table = pd.DataFrame(rows, columns=["label", "seed", *columns])
    for label, each in table.groupby("label"):
        seeds = each.groupby("seed")[columns].mean()
        rise = (seeds["return after"] - seeds["return before"]).to_numpy()[:, None]
        mean, low, high = (float(v[0]) for v in mean_interval(rise))
        cells = [f"{v:.2f}" for v in seeds.mean()[:3]] + [f"{v:.0f}" for v in seeds.mean()[3:]]
        print(f"| `{label}` ({len(each)}) | " + " | ".join(cells)
              + f" | {mean:+.0f} [{low:+.0f}, {high:+.0f}] |")  # fmt: skip


if __name__ == "__main__":
    main()
