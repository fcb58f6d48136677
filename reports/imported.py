"""Curves from elsewhere: somebody else's CSV as results, checked row by row."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from reports.frames import REFERENCES, WITHOUT_TASKS, Results

CURVE_COLUMNS = ("algorithm", "step", "success")
"""What a table of curves must have; ``suite``, ``seed``, ``task``, ``return``, ``episodes``,
``preset`` and ``steps_per_task`` it may have."""

_NUMBERS: dict[str, tuple[float, float, bool, str]] = {
    "step": (0, 1e15, True, "no whole number of steps from 0 to 1e15"),
    "success": (0, 1, False, "no rate between 0 and 1"),
    "seed": (0, 1e15, True, "no whole number from 0 to 1e15"),
    "return": (-np.inf, np.inf, False, "no number"),
    "episodes": (1, np.inf, True, "no positive whole number"),
    "steps_per_task": (1, 1e15, True, "no whole number from 1 to 1e15"),
}
"""Column -> least and largest value, whether it is whole, and what another value is."""


def read_curves(path: Path) -> Results:
    """Curves from elsewhere: a CSV of success rates in [0, 1] over environment steps per task.

    Needs ``CURVE_COLUMNS``; a row without ``task`` is a mean over tasks. Curves that state a
    ``preset`` and ``steps_per_task`` of ours are drawn beside ours, others by themselves. The last
    row of each curve, of each task where it has tasks, counts as its final evaluation. Where
    ``episodes`` is absent, nothing is said of how many a rate is of.

    Raises:
        ValueError: a column is missing, or a row does not hold what its columns say; the message
            names file, line, column and value.
        OSError: the file cannot be read.
    """
    path = Path(path)
    frame = _table(path)
    if lacking := [name for name in CURVE_COLUMNS if name not in frame]:
        raise ValueError(
            f"{path}: column {lacking[0]!r} is missing; needed are {', '.join(CURVE_COLUMNS)}"
        )
    if frame.empty:
        raise ValueError(f"{path}: there is no row below the header")
    if (unnamed := frame["algorithm"] == "").any():
        raise ValueError(f"{path}: line {_first(unnamed)}: algorithm is empty")
    if (reserved := frame["algorithm"].isin(REFERENCES)).any():
        raise ValueError(
            f"{path}: line {_first(reserved)}: {' and '.join(REFERENCES)} are the reference "
            "policies' names; call these curves something else"
        )
    for name in _NUMBERS:
        if name in frame:
            frame[name] = _numbers(path, frame[name])
    defaults: dict[str, Any] = {
        "suite": "unknown",
        "seed": 0,
        "task": WITHOUT_TASKS,
        "preset": "imported",
        "steps_per_task": frame["step"].max(),
    }
    for name, value in defaults.items():
        if name not in frame:
            frame[name] = value
        frame[name] = frame[name].where(frame[name].notna() & (frame[name] != ""), value)
    episodes = frame["episodes"] if "episodes" in frame else pd.Series(np.nan, frame.index)
    keys = ["suite", "algorithm", "seed", "preset", "steps_per_task"]
    counts = frame.select_dtypes("number").columns.intersection(["step", *keys])
    frame[counts] = frame[counts].astype(int)
    frame["run"] = [f"{path}: " + "/".join(map(str, key)) for key in frame[keys].to_numpy()]
    _check_curves(path, frame)
    last = frame["step"] == frame.groupby(["run", "task"])["step"].transform("max")
    runs = frame.groupby("run", as_index=False).agg({"step": "max"} | dict.fromkeys(keys, "first"))
    row = ["run", "suite", "algorithm", "seed", "step", "task"]
    success = frame[row].assign(
        kind=np.where(last, "final", "eval"),
        metric="success",
        value=frame["success"] * episodes.fillna(1),
        count=episodes,
    )
    metrics = [success]
    if "return" in frame:
        metrics.append(success.assign(metric="return", value=frame["return"]))
    return Results(
        runs=runs.assign(state="done", origin=str(path)),
        metrics=pd.concat(metrics, ignore_index=True),
    )


def _table(path: Path) -> pd.DataFrame:
    """The cells as text, indexed by line; raises ValueError where a row has not its header's."""
    lines, rows = [], []
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            for row in reader:
                if row and len(row) != len(header):
                    raise ValueError(
                        f"{path}: line {reader.line_num}: {len(row)} values under {len(header)} "
                        f"columns, the first {row[0]!r}"
                    )
                if row:
                    lines.append(reader.line_num)
                    rows.append([cell.strip() for cell in row])
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: after line {reader.line_num}: {error}") from None
    if twice := [name for name in header if header.count(name) > 1]:
        raise ValueError(f"{path}: column {twice[0]!r} is there twice")
    return pd.DataFrame(rows, index=lines, columns=header, dtype=object)


def _numbers(path: Path, cells: pd.Series) -> pd.Series:
    """A column's numbers, NaN where an optional one is empty; raises ValueError for any other."""
    name = str(cells.name)
    low, high, whole, otherwise = _NUMBERS[name]
    values = pd.to_numeric(cells, errors="coerce").astype(float)
    fits = values.between(low, high) & ~values.isin([np.inf, -np.inf])
    if whole:
        fits &= values % 1 == 0
    if name not in CURVE_COLUMNS:
        fits |= cells == ""
    if not fits.all():
        line = _first(~fits)
        shown = cells.loc[line] or "(empty)"
        raise ValueError(f"{path}: line {line}: {name} {shown} is {otherwise}")
    return values


def _check_curves(path: Path, frame: pd.DataFrame) -> None:
    """Raises ValueError if a curve has two values at one step, or one both with and without tasks.

    They would be averaged unseen.
    """
    if (again := frame.duplicated(["run", "task", "step"])).any():
        line = _first(again)
        row = frame.loc[line]
        raise ValueError(
            f"{path}: line {line}: step {row['step']} is there twice for algorithm "
            f"{row['algorithm']} on suite {row['suite']}, seed {row['seed']}, task {row['task']}"
        )
    bare = frame["task"] == WITHOUT_TASKS
    both = bare & (bare.groupby(frame["run"]).transform("mean") < 1)
    if both.any():
        line = _first(both)
        row = frame.loc[line]
        raise ValueError(
            f"{path}: line {line}: task is empty, other rows of algorithm {row['algorithm']}, "
            f"seed {row['seed']} have one"
        )


def _first(where: pd.Series) -> int:
    """The line of the first row that is so."""
    return int(where.index[where.to_numpy()][0])
