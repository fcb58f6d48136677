"""Results for other programs: tidy tables, LaTeX, and the JSON of MARL-eval.

``runs`` has a row per run, ``scores`` one per finished run and task, ``metrics`` every evaluation.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from reports.frames import MissingError, Results, Section, sections
from reports.making import produce
from reports.tables import ABLATION_TABLES, OVERVIEWS, TABLES

EXPORTS: dict[str, Callable[[Results, Path], list[Path]]] = {}
"""Format -> function that writes results into a folder and says which files."""


def export(results: Results, to: Path, kind: str) -> list[Path]:
    """Writes ``results`` into the folder ``to``; returns the files.

    Raises:
        ValueError: an unknown format.
        ImportError: a library that the format needs is not installed.
        OSError: ``to`` cannot be written.
    """
    if kind not in EXPORTS:
        raise ValueError(f"unknown format {kind!r} (allowed: {', '.join(EXPORTS)})")
    Path(to).mkdir(parents=True, exist_ok=True)
    return EXPORTS[kind](results, Path(to))


def _tidy(results: Results) -> dict[str, pd.DataFrame]:
    found = sections(results)
    scores = [
        section.scores(label)
        .reset_index()
        .melt("seed", var_name="task", value_name="success")
        .assign(
            suite=section.suite,
            preset=section.preset,
            steps_per_task=section.steps_per_task,
            algorithm=label,
        )
        for section in found
        for label in section.scored
    ]
    return {
        "runs": results.runs,
        "scores": pd.concat(scores, ignore_index=True) if scores else pd.DataFrame(),
        "metrics": results.metrics,
        "timing": results.timing,
    }


def to_csv_files(results: Results, to: Path) -> list[Path]:
    """One CSV per frame."""
    paths = []
    for name, frame in _tidy(results).items():
        paths.append(to / f"{name}.csv")
        frame.to_csv(paths[-1], index=False, lineterminator="\n")
    return paths


def to_parquet_files(results: Results, to: Path) -> list[Path]:
    """One Parquet file per frame; needs pyarrow."""
    paths = []
    for name, frame in _tidy(results).items():
        paths.append(to / f"{name}.parquet")
        # Settings mix numbers and words between algorithms; a column has one type here.
        mixed = [c for c in frame if frame[c].dtype == object]
        plain = frame.assign(**{str(c): frame[c].map(_word) for c in mixed})
        plain.to_parquet(paths[-1], index=False)
    return paths


def _word(value: object) -> str | None:
    return None if value is None or value != value else str(value)


def to_latex_files(results: Results, to: Path) -> list[Path]:
    """Every table for booktabs, a file each."""
    paths: list[Path] = []

    def write(folder: str, makers: Any, source: Any) -> None:
        for name, maker in makers.items():
            place = f"{folder}-{name}"
            outcome = produce(place, place, lambda: maker(source), ("tex",))  # noqa: B023
            if outcome.failure:
                warnings.warn(f"no {place}.tex: {outcome.failure}", stacklevel=3)
            for content in outcome.files.values():
                paths.append(to / f"{place}.tex")
                paths[-1].write_bytes(content)

    found = sections(results)
    for section in found:
        folder = section.anchor
        write(folder, TABLES, section)
        for ablation in section.ablations:
            write(f"{folder}-{ablation.name}", ABLATION_TABLES, ablation)
    for preset in dict.fromkeys(section.preset for section in found):
        write(f"papers-{preset}", OVERVIEWS, [s for s in found if s.preset == preset])
    return paths


def to_marl_eval(results: Results, to: Path) -> list[Path]:
    """One JSON per suite and scale as MARL-eval reads it (Gorsane et al. 2022).

    Environment (the suite), task, algorithm, run, step: metrics are rates and mean returns over the
    evaluation's episodes, the final evaluation's are the absolute metrics. Finished runs only.
    """
    paths = []
    for section in sections(results):
        tree = marl_eval_tree(section)
        if tree[section.suite]:
            paths.append(to / f"{section.anchor}.json")
            paths[-1].write_text(json.dumps(tree, indent=1))
    if not paths:
        raise MissingError("there is no finished run to export")
    return paths


def marl_eval_tree(section: Section) -> dict[str, Any]:
    """The section in MARL-eval's structure."""
    tree: dict[str, Any] = {}
    rows = section.metrics[section.metrics["finished"]]
    rows = rows[rows["metric"].isin(["success", "return"])]
    rate = rows["value"] / rows["count"].where(rows["metric"] == "success", 1).fillna(1)
    rows = rows.assign(number=rate, algorithm=rows["label"])
    for (task, label, seed), of_run in rows.groupby(["task", "label", "seed"]):
        steps: dict[str, Any] = {}
        during = of_run[of_run["kind"] == "eval"]
        for number, (step, at) in enumerate(during.groupby("step"), start=1):
            values = {m: [float(v)] for m, v in zip(at["metric"], at["number"], strict=True)}
            steps[f"step_{number}"] = {"step_count": int(str(step))} | values
        final = of_run[of_run["kind"] == "final"]
        steps["absolute_metrics"] = {
            m: [float(v)] for m, v in zip(final["metric"], final["number"], strict=True)
        }
        of_task = tree.setdefault(str(task), {})
        of_task.setdefault(str(label), {})[f"seed_{seed}"] = steps
    return {section.suite: tree}


EXPORTS |= {
    "csv": to_csv_files,
    "parquet": to_parquet_files,
    "marl-eval": to_marl_eval,
    "latex": to_latex_files,
}
