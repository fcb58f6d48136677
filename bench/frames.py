"""Run directories as tidy frames: what reports are made from."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from algorithms.agent import Finding, History
from bench.spec import Protocol
from bench.store import RunStore, StoreError, find

Frames = dict[str, Any]
"""Keyword arguments of `reports.Results`."""


def load(out: Path) -> Frames:
    """All runs below ``out``; unreadable ones are skipped with a warning."""
    runs: list[dict[str, Any]] = []
    metrics: list[pd.DataFrame] = []
    timing: list[pd.DataFrame] = []
    probes: dict[str, list[tuple[int, dict[str, np.ndarray]]]] = {}
    traces: dict[str, dict[str, np.ndarray]] = {}
    tasks: dict[str, tuple[str, ...]] = {}
    health: list[dict[str, str]] = []
    for store in find(out):
        name = str(store.path.relative_to(out))
        try:
            row = run_row(store, name)
        except StoreError as error:
            warnings.warn(f"skipping {name}: {error}", RuntimeWarning, stacklevel=2)
            continue
        for problem in store.damaged() or []:
            warnings.warn(f"{name}: {problem} since the run was done", RuntimeWarning, stacklevel=2)
        runs.append(row)
        key = {column: row[column] for column in ("run", "suite", "algorithm", "seed")}
        measured, timed = (_read(store.path / file) for file in ("metrics.csv", "timing.csv"))
        if measured is not None:
            metrics.append(measured.assign(**key))
            tasks.setdefault(row["suite"], tuple(measured["task"].unique()))
        if timed is not None:
            timing.append(timed.assign(**key))
        probes[name] = read_probes(store)
        if (trace := store.probe_path / "trace.npz").exists():
            traces[name] = _arrays(trace)
        findings = health_rows(store, measured, probes[name])
        health += [{"run": name} | finding for finding in findings]
    return {
        "runs": pd.DataFrame(runs),
        "metrics": _concatenate(metrics),
        "timing": _concatenate(timing),
        "health": pd.DataFrame(health),
        "probes": probes,
        "traces": traces,
        "tasks": tasks,
    }


Probes = list[tuple[int, dict[str, np.ndarray]]]


def health_of(store: RunStore) -> list[dict[str, str]]:
    """`health_rows` of what the run has recorded so far."""
    return health_rows(store, _read(store.path / "metrics.csv"), read_probes(store))


def health_rows(
    store: RunStore, metrics: pd.DataFrame | None, probes: Probes
) -> list[dict[str, str]]:
    """The algorithm's verdicts on a run: check, result, verdict, advice. None before it trained.

    Raises StoreError if the run is damaged. An algorithm that is not installed here has no opinion.
    """
    if metrics is None:
        return []
    spec = store.spec()
    try:
        agent, config = spec.agent, spec.agent_config
    except ValueError:
        return []
    of_training = metrics[metrics["kind"].isin(["train", "update"])]
    tasks = tuple(str(task) for task in of_training["task"].unique())
    index = pd.Index(sorted(of_training["step"].unique()))

    def series(rows: pd.DataFrame, values: pd.Series) -> np.ndarray:
        wide = rows.assign(shown=values).pivot_table(index="step", columns="task", values="shown")
        return wide.reindex(index=index, columns=list(tasks)).to_numpy(np.float64)

    trained = of_training[of_training["kind"] == "train"]
    success = trained[trained["metric"] == "success"]
    return_ = trained[trained["metric"] == "return"]
    updates = of_training[of_training["kind"] == "update"]
    history = History(
        tasks, config, spec.protocol.plan, probes, index.to_numpy(),
        series(success, success["value"] / success["count"]), series(return_, return_["value"]),
        {str(name): series(rows, rows["value"]) for name, rows in updates.groupby("metric")},
    )  # fmt: skip
    try:
        findings = agent.health(history)
    except Exception as error:  # noqa: BLE001  (an opinion must not take the report along)
        findings = [Finding("health", "note", f"not judged: {type(error).__name__}: {error}")]
    return [finding._asdict() for finding in findings]


def read_probes(store: RunStore) -> Probes:
    """(step, arrays) of the agent's own state over training, oldest first."""
    return [
        (int(path.stem), _arrays(path))
        for path in sorted(store.probe_path.glob("*.npz"))
        if path.stem.isdigit()
    ]


def _arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays.items())


def run_row(store: RunStore, name: str) -> dict[str, Any]:
    """What spec.json and status.json say of a run, flat. Raises StoreError on a damaged one."""
    content, spec, status = store.description(), store.spec(), state_of(store)
    environment = content.get("environment", {})
    parameters = status.get("parameters", {})
    seconds = _last_total(store)
    flat: dict[str, Any] = {
        "run": name,
        "id": spec.id,
        "suite": spec.suite,
        "algorithm": spec.title,
        "seed": spec.seed,
        "preset": spec.preset,
        "state": status["state"],
        "step": status.get("step", 0),
        "steps_per_task": spec.protocol.steps_per_task,
        "success": status.get("success"),
        "parameters_actor": parameters.get("actor"),
        "parameters_critic": parameters.get("critic"),
        "seconds": seconds,
        "peak_memory_bytes": status.get("peak_memory_bytes"),
        "steps_per_second": status.get("steps_per_second"),
        "updates_per_second": _updates_per_second(spec.protocol, status.get("steps_per_second")),
        "heartbeat": status.get("time"),
        "error": status.get("error", ""),
        "git_commit": environment.get("git_commit", ""),
    }
    groups = {
        "protocol": spec.protocol.model_dump(mode="json"),
        "config": spec.config,
        "hardware": environment.get("hardware", {}),
        "versions": environment.get("versions", {}),
        "numerics": environment.get("numerics", {}),
    }
    for group, values in groups.items():
        flat |= {f"{group}.{key}": value for key, value in values.items()}
    return flat


def state_of(store: RunStore) -> dict[str, Any]:
    """The run's status; one that says running while no process holds it was interrupted."""
    status = store.status()
    if status["state"] == "running" and not store.busy:
        status["state"] = "interrupted"
    return status


def _updates_per_second(protocol: Protocol, steps_per_second: float | None) -> float | None:
    if steps_per_second is None:
        return None
    return steps_per_second / protocol.envs_per_task * protocol.updates_per_step


def _last_total(store: RunStore) -> float | None:
    timing = _read(store.path / "timing.csv")
    if timing is None:
        return None
    totals = timing.loc[timing["section"] == "total", "seconds"]
    return float(totals.iloc[-1]) if len(totals) else None


def _read(path: Path) -> pd.DataFrame | None:
    try:
        frame = pd.read_csv(path)
    except (FileNotFoundError, pd.errors.EmptyDataError, pd.errors.ParserError):
        return None
    return frame if len(frame) else None


def _concatenate(frames: list[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
