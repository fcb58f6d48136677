"""Checks of this machine and of a run, each with what to do about it."""

from __future__ import annotations

import math
import os
import shutil
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

import algorithms
from bench import machine, video
from bench.frames import RESTORE, health_of, state_of
from bench.spec import RunSpec
from bench.store import METRICS_HEADER, RunStore, StoreError

Check = dict[str, Any]
"""check, result (good | note | bad), value, advice."""


def machine_checks(out: Path) -> list[Check]:
    """Versions, device, simulator, renderer and free disk of this machine."""
    import torch

    checks = [_check(f"version of {k}", "good", v) for k, v in machine.versions().items()]
    for check in checks:
        if check["value"] == "not installed" and "mega-bench" not in check["check"]:
            check |= {"result": "bad", "advice": "pip install -e . -c constraints.txt"}
    cuda = torch.cuda.is_available()
    checks.append(
        _check(
            "device", "good" if cuda else "note",
            torch.cuda.get_device_name() if cuda else f"CPU, {machine.cores()} cores",
            "" if cuda else "fine for the cpu preset; a run of the paper preset takes days",
        )
    )  # fmt: skip
    checks.append(_compiler())
    renderer = _renderer()
    checks.append(_simulator(renderer))
    checks.append(renderer)
    place = out
    while not place.is_dir():
        place = place.parent
    free = shutil.disk_usage(place).free / 1e9
    writable = os.access(place, os.W_OK)
    checks.append(
        _check("disk", "good" if free > 5 and writable else "bad", f"{free:.1f} GB free at {place}",
               "" if free > 5 and writable else "choose another --out")
    )  # fmt: skip
    return checks


def _compiler() -> Check:
    """Whether loops can be compiled here."""
    advice = "pip install -e . -c constraints.txt"
    try:
        from llvmlite.binding import get_host_cpu_name  # type: ignore[import-untyped]
        from numba import njit

        compiled: Any = njit
        quarter = compiled(_quarter)(np.float32(1))
    except Exception as error:  # noqa: BLE001  (numba and LLVM raise what they like)
        return _check("compiler", "bad", f"{type(error).__name__}: {error}", advice)
    if quarter != 0.25:
        return _check("compiler", "bad", f"numba computes {quarter} for 1/4", advice)
    return _check("compiler", "good", f"numba, for {get_host_cpu_name()}")


def _quarter(x: float) -> float:
    return x / 4


def run_checks(store: RunStore) -> list[Check]:
    """Whether a run's directory is whole, how the run stands, and its algorithm's verdicts."""
    try:
        spec = store.spec()
    except StoreError as error:
        return [_check("spec.json", "bad", str(error), "restore it from a copy, or train anew")]
    checks = [_check("spec.json", "good", f"{spec.title} on {spec.suite}, seed {spec.seed}")]
    status = state_of(store)
    state = status["state"]
    advice = {
        "failed": f"see {store.path / 'log.txt'}; the same bench run command tries again",
        "interrupted": "the same bench run command continues it",
        "pending": "bench run trains it",
    }.get(state, "")
    checks.append(_check("state", "bad" if state == "failed" else "good", state, advice))
    if status.get("error"):
        checks.append(_check("error", "bad", status["error"]))
    checks += [
        _identity(store, spec), _lease(store), *_checkpoints(store, state), _metrics(store, spec),
        _whole_lines(store, "timing.csv"), _probes(store), *_sums(store, state), _leftovers(store),
    ]  # fmt: skip
    # Whatever ended a run, what it recorded is judged; not so where its files are damaged.
    whole = all(c["result"] != "bad" for c in checks if c["check"] not in ("state", "error"))
    for finding in health_of(store) if whole else []:
        checks.append(
            _check(finding["check"], finding["result"], finding["verdict"], finding["advice"])
        )
    return checks


def _identity(store: RunStore, spec: RunSpec) -> Check:
    """The id that the recorded values have here, and the one that the run was recorded under."""
    if spec.algorithm not in algorithms.names():
        return _check(
            "id", "note", f"{spec.id}; algorithm {spec.algorithm!r} is not here to compare"
        )
    try:
        now = spec.with_seed(spec.seed).id
    except ValueError as error:
        return _check("id", "bad", f"the values are not of this version: {error}",
                      "read the run with the version in its spec.json")  # fmt: skip
    if now != spec.id or not store.path.name.endswith(f"-{spec.id}"):
        value = f"recorded as {spec.id} in {store.path.name}, its values give {now}"
        return _check("id", "bad", value,
                      "spec.json was edited, or is of a version with other defaults")  # fmt: skip
    return _check("id", "good", f"{spec.id} is that of its values")


def _lease(store: RunStore) -> Check:
    if store.busy:
        return _check("held", "note", "by a process of this machine")
    if elsewhere := store.elsewhere:
        return _check("held", "note", f"by a process on {elsewhere}, if that is alive",
                      "bench run takes over when it shows no sign of life")  # fmt: skip
    return _check("held", "good", "by nobody")


def _checkpoints(store: RunStore, state: str) -> list[Check]:
    """Every checkpoint there is, read and compared with its checksum."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps = store.checkpoint_steps()
    checks = [
        _check("checkpoint", "bad", str(warning.message), "the one before it is used")
        for warning in caught
    ]
    if steps:
        value = "whole: step " + ", ".join(f"{step:,}" for step in steps)
        return [*checks, _check("checkpoints", "good", value)]
    advice = "bench eval cannot evaluate it again" if state == "done" else ""
    return [*checks, _check("checkpoints", "note", "none", advice)]


def _metrics(store: RunStore, spec: RunSpec) -> Check:
    """Each line of metrics.csv, and that a finished run has its final evaluation."""
    whole = _whole_lines(store, "metrics.csv")
    if whole["result"] == "bad":
        return whole
    path, before, final = store.path / "metrics.csv", 0, 0
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    if lines and lines[0] != METRICS_HEADER.decode().strip():
        return _check("metrics.csv", "bad", f"line 1 is {lines[0][:60]!r}", RESTORE)
    for number, line in enumerate(lines[1:], start=2):
        try:
            step, kind, _, metric, value, count = line.split(",")
            fine = before <= int(step) <= spec.protocol.steps_per_task
            fine &= math.isfinite(float(value)) and float(count) > 0
            fine &= metric != "success" or 0 <= float(value) <= float(count)
        except ValueError:
            fine = False
        if not fine:
            return _check("metrics.csv", "bad", f"line {number} is {line[:60]!r}", RESTORE)
        before = int(step)
        final += kind == "final" and metric == "success"
    if store.done and spec.algorithm in algorithms.names():
        try:
            tasks = spec.make_suite().spec.num_tasks
        except ValueError:  # of a plug-in that is not here
            return whole
        if final != tasks:
            value = f"the final evaluation has {final} of {tasks} tasks"
            return _check("metrics.csv", "bad", value, RESTORE)
    return whole


def _whole_lines(store: RunStore, name: str) -> Check:
    path = store.path / name
    try:
        content = path.read_bytes() if path.exists() else b""
        content.decode()
    except (OSError, UnicodeDecodeError) as error:
        return _check(name, "bad", f"cannot be read: {error}", RESTORE)
    whole = not content or content.endswith(b"\n")
    advice = RESTORE if store.done else "resuming repairs it"
    return _check(name, "good" if whole else "bad", f"{content.count(10):,} lines",
                  "" if whole else f"its last line is cut; {advice}")  # fmt: skip


def _probes(store: RunStore) -> Check:
    paths = sorted(store.probe_path.glob("*.npz"))
    for path in paths:
        try:
            with np.load(path, allow_pickle=False) as arrays:
                for name in arrays.files:
                    arrays[name]
        except (OSError, ValueError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            return _check("probe", "bad", f"{path.name}: {type(error).__name__}: {error}", RESTORE)
    return _check("probe", "good", f"{len(paths)} files")


def _sums(store: RunStore, state: str) -> list[Check]:
    problems = store.damaged()
    if problems is None:
        if state != "done":
            return []
        return [_check("checksums", "note", "none: recorded before there were any")]
    if not problems:
        return [_check("checksums", "good", "all results are as they were recorded")]
    return [_check("checksums", "bad", problem, RESTORE) for problem in problems]


def _leftovers(store: RunStore) -> Check:
    found = store.leftovers()
    return _check("leftovers", "note" if found else "good", f"{len(found)} files",
                  "bench clean removes them" if found else "")  # fmt: skip


def _renderer() -> Check:
    """Whether MUJOCO_GL is a renderer, and one that works here."""
    try:
        given = video.backend_setting()
    except ValueError as error:
        return _check("renderer", "bad", str(error).partition(";")[0], video.ADVICE)
    if not given:
        return _check("renderer", "note", "MUJOCO_GL is not set",
                      "training needs none; bench eval --video looks for one")  # fmt: skip
    if given in video.OFF or not video.renders(given):
        value = f"MUJOCO_GL is {given!r}, which renders nothing here"
        return _check("renderer", "note", value, f"training needs none; for videos {video.ADVICE}")
    return _check("renderer", "good", given)


def _simulator(renderer: Check) -> Check:
    import suites

    try:
        envs = suites.load("mt1_rand:reach-v3").make(seed=0)
        envs.reset()
        envs.step(np.zeros((1, 1, 4), np.float32))
        envs.close()
    except Exception as error:  # noqa: BLE001  (whatever is wrong is what this check reports)
        return _check("simulator", "bad", f"{type(error).__name__}: {error}",
                      renderer["advice"] if renderer["result"] == "bad"
                      else "reinstall metaworld and mujoco")  # fmt: skip
    return _check("simulator", "good", "Meta-World steps")


def _check(check: str, result: str, value: str, advice: str = "") -> Check:
    return {"check": check, "result": result, "value": value, "advice": advice}
