"""The same specification and numerics give the same bytes, however the sweep went."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from test_cli import bench

from bench.spec import RunSpec
from bench.store import RunStore, find
from bench.train import Interrupted, train
from bench.verify import steps_to_verify

Finished = Callable[[str], RunStore]
Measured = Callable[[RunStore], dict[str, bytes]]
ToySpec = Callable[..., RunSpec]
Open = Callable[[Path, RunSpec], RunStore]

SWEEP = [
    "run", "--suite", "toy", "--preset", "smoke", "--seeds", "2", "--steps", "200",
    *("--set", "horizon=25", "--set", "eval_every=100", "--set", "eval_episodes=2"),
    *("--set", "final_episodes=2", "--set", "warmup_steps=50", "--set", "width=16"),
]  # fmt: skip


@pytest.mark.slow
def test_how_a_sweep_is_run_changes_no_byte(measured: Measured, tmp_path: Path) -> None:
    """Workers, the order of runs and processes to simulate in."""
    ways = {
        "one": ["--algos", "mt_sac,mtmh_sac", "--workers", "1"],
        "two": ["--algos", "mtmh_sac,mt_sac", "--workers", "2", "--sim-workers", "2"],
    }
    found = {}
    for way, options in ways.items():
        out = tmp_path / way
        done = bench(*SWEEP, *options, "--out", str(out))
        assert done.returncode == 0, done.stdout + done.stderr
        found[way] = {str(s.path.relative_to(out)): measured(s) for s in find(out)}
    assert len(found["one"]) == 6  # four runs and two references
    assert found["one"] == found["two"]


@pytest.mark.parametrize("changed", [{"eval_every": 50}, {"eval_episodes": 3}])
def test_evaluating_more_changes_no_training(
    changed: dict[str, int], toy_spec: ToySpec, open_store: Open, finished: Finished,
    tmp_path: Path,
) -> None:  # fmt: skip
    def trained(store: RunStore) -> list[str]:
        lines = (store.path / "metrics.csv").read_text().splitlines()
        return [line for line in lines if line.split(",")[1] in ("train", "update")]

    other = open_store(tmp_path, toy_spec("mt_sac", **changed))
    train(other.spec(), other)
    assert trained(other) == trained(finished("mt_sac"))


def test_a_record_is_verified_by_training_its_beginning_again(
    finished: Finished, tmp_path: Path
) -> None:
    original = finished("mt_sac")
    steps = steps_to_verify(original.spec())
    assert original.spec().protocol.warmup_steps < steps < 250
    done = bench("verify", str(original.path), "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal to the byte" in done.stdout
    copy = tmp_path / original.path.name
    shutil.copytree(original.path, copy)
    metrics = (copy / "metrics.csv").read_text().splitlines()
    place = next(n for n, line in enumerate(metrics) if ",update," in line)
    metrics[place] += "1"
    (copy / "metrics.csv").write_text("\n".join(metrics) + "\n")
    done = bench("verify", str(copy), "--device", "cpu")
    assert done.returncode == 1
    assert f"metrics.csv line {place + 1}: recorded" in done.stdout


def test_a_run_is_verified_as_far_as_it_is_recorded(
    toy_spec: ToySpec, open_store: Open, tmp_path: Path
) -> None:
    store = open_store(tmp_path, toy_spec())
    done = bench("verify", str(store.path), "--device", "cpu")
    assert done.returncode == 1
    assert "has recorded nothing" in done.stderr
    ends = iter(range(1, 100))
    with pytest.raises(Interrupted):
        train(store.spec(), store, checkpoint_seconds=0, stop=lambda: next(ends) == 5)
    with (store.path / "metrics.csv").open("a") as metrics:
        metrics.write("150,train,po")  # killed as it wrote
    done = bench("verify", str(store.path), "--device", "cpu", "--steps", "200")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "up to step 125" in done.stdout
