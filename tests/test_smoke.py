"""The README's main job at its smoke preset, on real Meta-World, from command line to page."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench.store import RunStore, find
from bench.train import replay_capacity, replay_slack

BENCH = [sys.executable, "-m", "bench.cli"]
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("smoke")]
"""One process for all, which trains the job once."""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One seed of the main job and its report."""
    out = tmp_path_factory.mktemp("smoke")
    for command in (
        ["run", "--algos", "mega,d2r", "--suite", "mt10_rand", "--seeds", "1", "--preset", "smoke"],
        ["report"],
    ):
        subprocess.run([*BENCH, *command, "--out", str(out)], check=True, timeout=1500)
    return out


def run_of(out: Path, algorithm: str) -> RunStore:
    (store,) = find(out, f"/{algorithm}/")
    return store


def test_the_smoke_job_exercises_everything(out: Path) -> None:
    for algorithm in ("mega", "d2r"):
        store = run_of(out, algorithm)
        spec = store.spec()
        assert store.done
        assert list(store.state_path.glob("checkpoint-*.pt"))
        assert replay_capacity(spec) + replay_slack(spec) < spec.protocol.steps_per_task, "wraps"
    with np.load(sorted(run_of(out, "mega").probe_path.glob("0*.npz"))[-1]) as probe:
        assert (probe["generation"] >= 2).all()
        assert len(probe["stage_events"]) >= 1
        assert probe["stage"].max() > 3
    with np.load(run_of(out, "d2r").probe_path / "trace.npz") as trace:
        assert trace["modules_used"].min() >= 1
        assert trace["modules_used"].max() <= 16


def test_its_page_says_that_it_is_no_result(out: Path) -> None:
    page = (out / "report" / "index.html").read_text(encoding="utf-8")
    assert "SMOKE" in page
    for word in ("mega", "d2r", "expert", "random", "mt10_rand"):
        assert word in page


def test_the_reference_policies_frame_what_can_be_reached(out: Path) -> None:
    assert run_of(out, "expert").status()["success"] >= 0.8
    assert run_of(out, "random").status()["success"] <= 0.2
