"""Checks of this machine and of a run, each with what to do about it."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

from bench import machine
from bench.frames import health_of, state_of
from bench.store import RunStore, StoreError

Check = dict[str, Any]
"""check, result (good | note | bad), value, advice."""


def machine_checks(out: Path) -> list[Check]:
    """Versions, device, simulator, compiler, renderer and free disk of this machine."""
    import torch

    checks = [_check(f"version of {k}", "good", v) for k, v in machine.versions().items()]
    for check in checks:
        if check["value"] == "not installed" and "mega-bench" not in check["check"]:
            check |= {"result": "bad", "advice": "pip install -e . -c constraints.txt"}
    cuda = torch.cuda.is_available()
    checks.append(
        _check(
            "device", "good" if cuda else "note",
            torch.cuda.get_device_name() if cuda else f"CPU, {os.cpu_count()} cores",
            "" if cuda else "fine for the cpu preset; the paper preset wants a GPU build of torch",
        )
    )  # fmt: skip
    checks.append(_simulator())
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    checks.append(
        _check("compiler", "good" if compiler else "note", compiler or "none",
               "" if compiler else "only torch.compile would need one")
    )  # fmt: skip
    renderer = os.environ.get("MUJOCO_GL", "")
    checks.append(
        _check("renderer", "good" if renderer else "note", renderer or "MUJOCO_GL is not set",
               "" if renderer else "training needs none; for videos set MUJOCO_GL=egl or osmesa")
    )  # fmt: skip
    place = out
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 1e9
    writable = os.access(place, os.W_OK)
    checks.append(
        _check("disk", "good" if free > 5 and writable else "bad", f"{free:.1f} GB free at {place}",
               "" if free > 5 and writable else "choose another --out")
    )  # fmt: skip
    return checks


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
    if state not in ("done", "pending"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loaded = store.load_checkpoint()
        checks += [
            _check("checkpoint", "bad", str(warning.message), "the one before it is used")
            for warning in caught
        ]
        where = "none yet" if loaded is None else f"step {loaded[0]:,}"
        checks.append(_check("checkpoint", "note" if loaded is None else "good", where))
    for name in ("metrics.csv", "timing.csv"):
        path = store.path / name
        lines = path.read_bytes() if path.exists() else b""
        whole = not lines or lines.endswith(b"\n")
        checks.append(
            _check(name, "good" if whole else "bad", f"{lines.count(10):,} lines",
                   "" if whole else "its last line is cut; resuming repairs it")
        )  # fmt: skip
    for finding in health_of(store):
        checks.append(
            _check(finding["check"], finding["result"], finding["verdict"], finding["advice"])
        )
    return checks


def _simulator() -> Check:
    import numpy as np

    import suites

    try:
        envs = suites.load("mt1_rand:reach-v3").make(seed=0)
        envs.reset()
        envs.step(np.zeros((1, 1, 4), np.float32))
        envs.close()
    except Exception as error:  # noqa: BLE001  (whatever is wrong is what this check reports)
        return _check("simulator", "bad", f"{type(error).__name__}: {error}",
                      "reinstall metaworld and mujoco")  # fmt: skip
    return _check("simulator", "good", "Meta-World steps")


def _check(check: str, result: str, value: str, advice: str = "") -> Check:
    return {"check": check, "result": result, "value": value, "advice": advice}
