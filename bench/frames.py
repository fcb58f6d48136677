"""Run directories as tidy frames: what reports are made from."""

from __future__ import annotations

import io
import json
import multiprocessing
import shlex
import time
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from algorithms.agent import Finding, History
from bench.spec import changed_protocol, preset, preset_names, title
from bench.store import METRICS, TIMING, RunStore, StoreError, find
from bench.sweep import ablations

Frames = dict[str, Any]
"""Keyword arguments of `reports.Results`."""
Probes = list[tuple[int, dict[str, np.ndarray]]]
"""Steps and the agent's own arrays by name."""


REPORTED = ("eval", "final", "reference")
"""Kinds of metric rows that reports read whole; ``train`` is gathered, ``update`` left out."""
RESTORE = "restore it from a copy, or delete the run's folder and train it again"
"""What to do about a damaged file of a run."""


def load(out: Path | str) -> Frames:
    """All runs below ``out``, their training episodes gathered to `TRAINING_POINTS` points.

    What cannot be read is named under ``unreadable``. Runs of older versions are read as far as
    they are understood.
    """
    out = Path(out)
    stores = find(out)
    names = [str(store.path.relative_to(out)) for store in stores]
    unreadable: dict[str, str] = {}
    read: list[_Run] = []
    for name, found in zip(names, _read_all(stores, names), strict=True):
        if isinstance(found, str):
            unreadable[name] = found
        else:
            read.append(found)
    tasks: dict[str, tuple[str, ...]] = {}
    for run in read:
        if run.tasks:
            tasks.setdefault(run.row["suite"], run.tasks)
    return {
        "runs": pd.DataFrame([run.row for run in read]),
        "metrics": _concatenate([run.metrics for run in read]),
        "timing": _concatenate([run.timing for run in read]),
        "health": pd.DataFrame([line for run in read for line in run.health]),
        "probes": {run.row["run"]: run.probes for run in read if run.probes},
        "traces": {run.row["run"]: run.trace for run in read if run.trace is not None},
        "tasks": tasks,
        "ablations": ablations(),
        "clips": {run.row["run"]: run.clips for run in read if run.clips},
        "unreadable": unreadable,
    }


class _Run(NamedTuple):
    """What one run directory holds."""

    row: dict[str, Any]
    metrics: pd.DataFrame | None
    timing: pd.DataFrame | None
    health: list[dict[str, str]]
    probes: Probes
    trace: dict[str, np.ndarray] | None
    tasks: tuple[str, ...]
    clips: dict[str, Path]


MANY_RUNS = 100
"""From this many runs on, reading them in several processes pays off."""


def _read_all(stores: list[RunStore], names: list[str]) -> Iterator[_Run | str]:
    """Each run, or why it cannot be read."""
    if len(stores) < MANY_RUNS or "fork" not in multiprocessing.get_all_start_methods():
        yield from map(_read_run, stores, names)
        return
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork")) as pool:
        yield from pool.map(_read_run, stores, names, chunksize=8)


def _read_run(store: RunStore, name: str) -> _Run | str:
    try:
        metrics, timing = read_metrics(store), read_timing(store)
        row = run_row(store, name, timing)
        probes = read_probes(store)
        trace = store.probe_path / "trace.npz"
        arrays = _arrays(trace) if trace.exists() else None
        health = [*_damage(store), *health_rows(store, metrics, probes)]
    except (StoreError, OSError, ValueError, TypeError) as error:
        return str(error)
    key = {column: row[column] for column in ("run", "suite", "algorithm", "seed")}
    wanted = None
    if metrics is not None:
        kept = metrics[metrics["kind"].isin(REPORTED)]
        wanted = pd.concat([_training(metrics, row["steps_per_task"]), kept]).assign(**key)
    return _Run(
        row=row,
        metrics=wanted,
        timing=None if timing is None else timing.assign(**key),
        health=[{"run": name} | line for line in health],
        probes=probes,
        trace=arrays,
        tasks=() if metrics is None else tuple(map(str, metrics["task"].unique())),
        clips={film.stem: film for film in sorted((store.path / VIDEO).glob("*.*"))},
    )


def _damage(store: RunStore) -> Iterator[dict[str, str]]:
    """What happened to the files of a finished run since."""
    for problem in store.damaged() or []:
        yield Finding("files", "bad", f"{problem} since the run was done", RESTORE)._asdict()


TRAINING_POINTS = 100
"""Points to which the episodes of a run's training are gathered: hundreds of runs have millions."""


def _training(metrics: pd.DataFrame, steps_per_task: int) -> pd.DataFrame:
    """Rows of training episodes, those of a hundredth of the training in one row at its end."""
    rows = metrics[(metrics["kind"] == "train") & metrics["metric"].isin(["success", "return"])]
    width = max(1, steps_per_task // TRAINING_POINTS)
    rate = rows["metric"] == "success"
    rows = rows.assign(
        step=-(-rows["step"] // width) * width,
        value=np.where(rate, rows["value"], rows["value"] * rows["count"]),
    )
    rows = rows.drop(columns="kind")
    gathered = rows.groupby(["step", "task", "metric"], sort=False, as_index=False).sum()
    rate = gathered["metric"] == "success"
    gathered["value"] = np.where(rate, gathered["value"], gathered["value"] / gathered["count"])
    return gathered.assign(kind="train")[list(metrics)]


VIDEO = "video"
"""The folder of a run's clips, one file per task."""


def health_of(store: RunStore) -> list[dict[str, str]]:
    """`health_rows` of what the run has recorded so far."""
    return health_rows(store, read_metrics(store), read_probes(store))


def health_rows(
    store: RunStore, metrics: pd.DataFrame | None, probes: Probes
) -> list[dict[str, str]]:
    """The algorithm's verdicts on a run: check, result, verdict, advice. None before it trained.

    Raises StoreError if the run is damaged. An algorithm that is not installed here has no opinion.
    """
    if metrics is None:
        return []
    try:
        spec = store.spec()
        agent, config = spec.agent, spec.agent_config
    except (StoreError, ValueError):
        return []
    of_training = metrics[metrics["kind"].isin(["train", "update"])]
    values = of_training["value"].to_numpy(np.float64).copy()
    rates = (of_training["metric"] == "success").to_numpy()
    values[rates] /= of_training["count"].to_numpy(np.float64)[rates]
    step, steps = pd.factorize(of_training["step"], sort=True)
    task, tasks = pd.factorize(of_training["task"])
    names = of_training["kind"] + "." + of_training["metric"]
    metric, metrics_seen = pd.factorize(names)
    cube = np.full((len(metrics_seen), len(steps), len(tasks)), np.nan)
    cube[metric, step, task] = values
    series = dict(zip(map(str, metrics_seen), cube, strict=True))
    unknown = np.full((len(steps), len(tasks)), np.nan)
    history = History(
        tuple(map(str, tasks)), config, spec.protocol.plan, probes, np.asarray(steps),
        series.get("train.success", unknown), series.get("train.return", unknown),
        {name.removeprefix("update."): rows for name, rows in series.items()
         if name.startswith("update.")},
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
    """The arrays of an npz file, without objects.

    A run's snapshots repeat their arrays' headers, which numpy would parse thousands of times.
    Raises StoreError if the file cannot be read.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
            return {
                name.removesuffix(".npy"): _array(archive.read(name)) for name in archive.namelist()
            }
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise StoreError(f"{path} cannot be read: {error}") from None


def _array(data: bytes) -> np.ndarray:
    start = 10 + int.from_bytes(data[8:10], "little")
    dtype, shape, fortran = _header(data[:start])
    if fortran:
        return np.asarray(np.load(io.BytesIO(data), allow_pickle=False))
    return np.frombuffer(data, dtype, offset=start).reshape(shape)


@cache
def _header(data: bytes) -> tuple[np.dtype[Any], tuple[int, ...], bool]:
    stream = io.BytesIO(data)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("an array of another npy version than 1.0")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.hasobject:
        raise ValueError("an array of objects")
    return dtype, shape, fortran


def run_row(store: RunStore, name: str, timing: pd.DataFrame | None = None) -> dict[str, Any]:
    """What spec.json and status.json say of a run, flat, and ``timing`` of its seconds.

    Raises StoreError on a damaged one.
    """
    totals = None if timing is None else timing.loc[timing["section"] == "total", "seconds"]
    seconds = None if totals is None or totals.empty else float(totals.iloc[-1])
    try:
        row = _run_row(store, name, seconds)
        for field in ("seed", "steps_per_task"):
            if not isinstance(row[field], int):
                raise TypeError(f"{field} {row[field]!r} is no whole number")
    except (KeyError, TypeError, AttributeError) as error:
        wrong = f"{type(error).__name__}: {error}"
        raise StoreError(f"{store.path / 'spec.json'} is damaged: {wrong}") from None
    for field in ("step", "success", "steps_per_second", "heartbeat"):
        if not isinstance(row[field], int | float | None):
            raise StoreError(f"{store.path / 'status.json'} is damaged: {field} {row[field]!r}")
    return row


def _run_row(store: RunStore, name: str, seconds: float | None) -> dict[str, Any]:
    content, status = _description(store), state_of(store)
    spec = content.get("spec", content)
    environment = content.get("environment", {})
    stretches = [environment, *environment.get("resumed", [])]
    protocol = spec.get("protocol", {})
    parameters = status.get("parameters", {})
    flat: dict[str, Any] = {
        "run": name,
        "id": spec.get("id", ""),
        "suite": spec["suite"],
        "algorithm": title(spec.get("label", spec["algorithm"]), spec.get("changed", {})),
        "seed": spec["seed"],
        "preset": spec.get("preset", "unknown"),
        "full_scale": _full_scale(spec),
        "schema": content.get("schema"),
        "state": status["state"],
        "step": status.get("step", 0),
        "steps_per_task": protocol.get("steps_per_task", status.get("steps", 0)),
        "success": status.get("success"),
        "parameters_actor": parameters.get("actor"),
        "parameters_critic": parameters.get("critic"),
        "seconds": seconds,
        "peak_memory_bytes": status.get("peak_memory_bytes"),
        "steps_per_second": status.get("steps_per_second"),
        "updates_per_second": _updates_per_second(protocol, status.get("step", 0), seconds),
        "heartbeat": status.get("time"),
        "error": status.get("error", ""),
        "git_commit": then([one.get("git_commit", "") for one in stretches]),
        "other_numerics": ", ".join(status.get("other_numerics", [])),
        "command": _command(spec),
    }
    groups = {
        "protocol": protocol,
        "config": spec.get("config", {}),
        "hardware": _each([one.get("hardware", {}) for one in stretches]),
        "versions": _each([one.get("versions", {}) for one in stretches]),
        "numerics": environment.get("numerics", {}),
    }
    for group, values in groups.items():
        flat |= {f"{group}.{key}": value for key, value in values.items()}
    return flat


def _full_scale(spec: dict[str, Any]) -> bool:
    """Whether the protocol is that of a paper, with nothing of it changed."""
    name = spec.get("preset", "")
    known = name in preset_names() and preset(name).full_scale
    return known and not changed_protocol(spec.get("sources", {}))


def _description(store: RunStore) -> dict[str, Any]:
    """spec.json of this version, or of another one that tells suite, algorithm and seed."""
    try:
        return store.description()
    except StoreError:
        with suppress(OSError, ValueError, RecursionError):
            content = json.loads((store.path / "spec.json").read_text("utf-8"))
            spec = content.get("spec", content) if isinstance(content, dict) else None
            if isinstance(spec, dict) and {"suite", "algorithm", "seed"} <= set(spec):
                return dict(content)
        raise


def _command(spec: dict[str, Any]) -> str:
    """The command that trains this run, and no other, again."""
    protocol, config = spec.get("protocol", {}), spec.get("config", {})
    changed = dict(spec.get("changed", {}))
    for key, source in spec.get("sources", {}).items():
        if source == "user" and key in protocol:
            changed[key] = protocol[key]
        elif source == "user" and key in config:
            changed[f"{spec['algorithm']}.{key}"] = config[key]
            changed.pop(key, None)
    words = ["bench", "run", "--algos", spec.get("label", spec["algorithm"])]
    words += ["--suite", spec["suite"], "--seeds", f"{spec['seed']}-{spec['seed']}"]
    words += ["--preset", spec.get("preset", "cpu")]
    for key, value in changed.items():
        plain = "none" if value is None else value if isinstance(value, str) else json.dumps(value)
        words += ["--set", f"{key}={plain}"]
    return shlex.join(words)


SILENT_SECONDS = 300
"""After which a run of another machine counts as interrupted; clocks may differ by less."""


def state_of(store: RunStore) -> dict[str, Any]:
    """The run's status; one that says running was interrupted if no process here holds it, nor one
    of another machine that has shown a sign of life lately."""
    status = store.status()
    silent = time.time() - float(status.get("time", 0)) > SILENT_SECONDS
    if status["state"] == "running" and not (store.busy or (store.elsewhere and not silent)):
        status["state"] = "interrupted"
    return status


def _each(stretches: list[dict[str, Any]]) -> dict[str, Any]:
    """The facts under which a run was trained, or went on to be trained, one after the other."""
    return {
        key: then([facts[key] for facts in stretches if key in facts])
        for key in dict.fromkeys(key for facts in stretches for key in facts)
    }


def then(values: list[Any]) -> Any:
    """The value that all are, or "a, then b"."""
    changes = [value for value, _ in groupby(values)]
    return changes[0] if len(changes) == 1 else ", then ".join(str(v or "unknown") for v in changes)


def _updates_per_second(protocol: dict[str, Any], step: int, seconds: float | None) -> float | None:
    """Over all that a run has trained, evaluations included."""
    if not seconds or "envs_per_task" not in protocol:
        return None
    learning = max(0, step - protocol.get("warmup_steps", 0)) / protocol["envs_per_task"]
    return float(learning * protocol["updates_per_step"] / seconds)


def read_metrics(store: RunStore) -> pd.DataFrame | None:
    """The run's metrics; None if it has none yet. Raises StoreError if they are damaged."""
    return _read(store.path / "metrics.csv", METRICS)


def read_timing(store: RunStore) -> pd.DataFrame | None:
    """The run's times, likewise."""
    return _read(store.path / "timing.csv", TIMING)


def _read(path: Path, columns: dict[str, type]) -> pd.DataFrame | None:
    try:
        content = path.read_bytes()
        # A line without an end was being written, or found no room on the disk.
        whole = content[: content.rfind(b"\n") + 1]
        frame = pd.read_csv(io.BytesIO(whole), index_col=False, dtype=columns)
    except (FileNotFoundError, pd.errors.EmptyDataError):
        return None
    except (OSError, ValueError, TypeError) as error:
        raise StoreError(f"{path} cannot be read: {error}") from None
    if lost := [name for name in columns if name not in frame]:
        raise StoreError(f"{path} cannot be read: column {lost[0]!r} is missing")
    return frame if len(frame) else None


def _concatenate(frames: list[pd.DataFrame | None]) -> pd.DataFrame:
    present = [frame for frame in frames if frame is not None]
    return pd.concat(present, ignore_index=True) if present else pd.DataFrame()
