"""The loop and its process: killed, interrupted, damaged, held, refused; and what it logs."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import machine
from bench.evaluate import episodes_needed, evaluate
from bench.frames import read_probes, read_timing, run_row
from bench.replay import ReplayBuffer
from bench.spec import Protocol, RunSpec
from bench.store import BusyError, RunStore, StoreError
from bench.train import (
    Clock,
    DivergenceError,
    Interrupted,
    Meters,
    checkpoint_steps,
    due,
    main,
    replay_capacity,
    replay_slack,
    train,
)
from suites import toy
from suites.base import Episode, SimulatorError

ROOT = Path(__file__).resolve().parent.parent

ToySpec = Callable[..., RunSpec]
Open = Callable[[Path, RunSpec], RunStore]
Measured = Callable[[RunStore], dict[str, bytes]]
Finished = Callable[..., RunStore]


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def store(toy_spec: ToySpec, open_store: Open, tmp_path: Path) -> RunStore:
    """A run not begun."""
    return open_store(tmp_path, toy_spec())


def start(store: RunStore, *options: str, group: bool = False) -> subprocess.Popen[bytes]:
    """The run's own process, as a sweep starts it; in a process group of its own if ``group``."""
    return subprocess.Popen(
        [sys.executable, "-m", "bench.train", str(store.path), *options],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=group,
    )  # fmt: skip


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline, "nothing happened for two minutes"
        time.sleep(0.002)


def newest(store: RunStore) -> int:
    """Step of the newest checkpoint, 0 before the first."""
    steps = [int(p.name.split("-")[1]) for p in store.state_path.glob("checkpoint-*.pt")]
    return max(steps, default=0)


# ------------------------------------------------------------------------------- a finished run


def test_a_run_directory_holds_what_it_should(finished: Finished) -> None:
    store = finished("mt_sac")
    names = {p.name for p in store.path.iterdir()}
    assert names == {
        "spec.json", "status.json", "metrics.csv", "timing.csv", "SHA256SUMS", "state",
    }  # fmt: skip
    status = store.status()
    assert status["state"] == "done"
    assert status["step"] == status["steps"] == 250
    assert 0 <= status["success"] <= 1
    assert status["parameters"].keys() == {"actor", "critic"}
    assert not store.replay_path.exists(), "a finished run gives back its disk space"
    assert newest(store) == 250
    metrics = pd.read_csv(store.path / "metrics.csv")
    assert list(metrics.columns) == ["step", "kind", "task", "metric", "value", "count"]
    assert set(metrics.task) == {"point-0", "point-1", "point-2"}
    evaluations = metrics[(metrics.kind == "eval") & (metrics.metric == "success")]
    assert sorted(set(evaluations.step)) == [100, 200]
    assert (evaluations["count"] == 2).all()
    final = metrics[(metrics.kind == "final") & (metrics.metric == "success")]
    assert (final.step == 250).all()
    assert (final["count"] == 3).all()


def test_timing_is_cumulative_and_adds_up(finished: Finished) -> None:
    timing = pd.read_csv(finished("mt_sac").path / "timing.csv")
    assert {"act", "simulator", "update", "evaluation", "checkpoint", "total"} <= set(
        timing.section
    )
    wide = timing.drop_duplicates(["step", "section"], keep="last").pivot(
        index="step", columns="section", values="seconds"
    )
    assert (wide.diff().dropna(how="all").fillna(0) >= 0).all().all()
    assert wide.drop(columns="total").sum(axis=1).iloc[-1] <= wide["total"].iloc[-1]


def test_a_finished_run_is_not_trained_again(finished: Finished) -> None:
    store = finished("mt_sac")
    files = [store.path / name for name in ("metrics.csv", "status.json", "timing.csv")]
    before = [(p.read_bytes(), p.stat().st_mtime_ns) for p in files]
    train(store.spec(), store)
    assert main([str(store.path)]) == 0
    assert [(p.read_bytes(), p.stat().st_mtime_ns) for p in files] == before


# -------------------------------------------------------------------------------------- killed


def test_killed_and_interrupted_processes_continue_to_the_same_bytes(
    store: RunStore, finished: Finished, measured: Measured
) -> None:
    """SIGINT, then SIGKILL at a random moment with checkpoints at every episode, then the rest."""
    process = start(store)
    wait_for(lambda: store.status().get("step", 0) > 0, process)
    process.send_signal(signal.SIGINT)
    output = process.communicate()[0].decode()
    assert process.returncode == 130, output
    assert "Traceback" not in output
    status = store.status()
    assert status["state"] == "interrupted"
    assert status["step"] == newest(store) < 250
    assert newest(store) % 25 == 0

    process = start(store, "--checkpoint-seconds", "0")
    here = newest(store)
    wait_for(lambda: newest(store) > here + 50, process)
    time.sleep(random.random() * 0.05)
    process.kill()
    process.communicate()
    assert store.status()["state"] == "running"  # it could not say otherwise
    assert not store.busy

    process = start(store)
    assert process.communicate()[0].decode() == ""
    assert process.returncode == 0
    assert measured(store) == measured(finished("mt_sac"))


class Killed(BaseException):
    """Ends a run where it stands: nothing catches it, as nothing catches SIGKILL."""


def kill_at(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, number: int, *, after: bool
) -> None:
    """Die at the ``number``-th call from now, before or after it did its work."""
    original, calls = getattr(owner, name), 0

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and not after:
            raise Killed
        result = original(*args, **kwargs)
        if calls == number:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, dying)


@pytest.mark.parametrize("after", [False, True])
def test_dying_at_each_kind_of_write(
    store: RunStore, finished: Finished, measured: Measured, after: bool
) -> None:
    for owner, name, number in (
        (ReplayBuffer, "add", 12),
        (RunStore, "save_checkpoint", 1),
        (RunStore, "append_metrics", 6),
        (RunStore, "append_timing", 1),
        (ReplayBuffer, "flush", 2),
        (ReplayBuffer, "add", 40),
        (RunStore, "finish", 1),
        (RunStore, "drop_replay", 1),
    ):
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, owner, name, number, after=after)
            with pytest.raises(Killed):
                train(store.spec(), store)
    train(store.spec(), store)
    assert store.done
    assert measured(store) == measured(finished("mt_sac"))


def test_the_slack_keeps_every_row_that_the_checkpoint_before_the_last_needs(
    store: RunStore, finished: Finished, measured: Measured
) -> None:
    """The worst case: dead just before a checkpoint, and the newest one is damaged.

    The ring wraps: it has room for 175 rows per task and takes 250.
    """
    spec = store.spec()
    assert replay_capacity(spec) + replay_slack(spec) == 175
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, RunStore, "save_checkpoint", 5, after=False)
        with pytest.raises(Killed):
            train(spec, store)
    kept = sorted(store.state_path.glob("checkpoint-*.pt"))
    assert [int(p.name.split("-")[1]) for p in kept] == [150, 200]
    os.truncate(kept[-1], 100)
    with pytest.warns(RuntimeWarning, match="skipping the damaged checkpoint"):
        train(spec, store)
    assert measured(store) == measured(finished("mt_sac"))


@pytest.mark.slow
@pytest.mark.parametrize("kills", [8])
def test_many_kills(
    algorithm: str, kills: int, toy_spec: ToySpec, open_store: Open, measured: Measured,
    finished: Finished, tmp_path: Path,
) -> None:  # fmt: skip
    store = open_store(tmp_path, toy_spec(algorithm))
    rng = random.Random(algorithm)
    for number in range(kills):
        process = start(store, "--checkpoint-seconds", rng.choice(["0", "0", "60"]))
        wait_for(lambda: store.status().get("pid") == process.pid, process)  # noqa: B023
        time.sleep(rng.random() * 0.15 * (number + 1))
        process.kill()
        process.communicate()
        found = sorted(store.state_path.glob("checkpoint-*.pt"))
        if number % 3 == 2 and len(found) == 2 and not store.done:
            os.truncate(found[-1], rng.randrange(found[-1].stat().st_size))
    process = start(store)
    process.communicate()
    assert process.returncode == 0
    assert measured(store) == measured(finished(algorithm))


MT10 = {
    "steps_per_task": 500, "horizon": 50, "warmup_steps": 100, "eval_every": 250,
    "eval_episodes": 1, "final_episodes": 1, "batch_per_task": 8, "replay_per_task": 100,
}  # fmt: skip


@pytest.mark.slow
def test_many_kills_on_metaworld(
    algorithm: str, open_store: Open, measured: Measured, tmp_path: Path
) -> None:
    """Real MT10, killed at random moments, with a ring that wraps several times."""
    spec = RunSpec.resolve(algorithm, "mt10_rand", 1, preset_name="smoke", overrides=MT10)
    assert replay_capacity(spec) + replay_slack(spec) == 300
    undisturbed = open_store(tmp_path / "a", spec)
    train(spec, undisturbed)
    store = open_store(tmp_path / "b", spec)
    rng = random.Random(algorithm)
    for _ in range(4):
        process = start(store, "--checkpoint-seconds", "0")
        wait_for(lambda: store.status().get("pid") == process.pid, process)  # noqa: B023
        here = newest(store)
        wait_for(lambda: newest(store) > here, process)  # noqa: B023
        time.sleep(rng.random())
        process.kill()
        process.communicate()
    process = start(store)
    process.communicate()
    assert measured(store) == measured(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("act_delay", [0, 1])
def test_other_shapes_of_the_loop_resume_as_well(
    act_delay: int, toy_spec: ToySpec, open_store: Open, measured: Measured, tmp_path: Path
) -> None:
    """Several environments and updates per step, simulated in worker processes or not."""
    spec = toy_spec(
        envs_per_task=2, updates_per_step=2, replay_per_task=76, eval_every=150, critic_lr=1e-3,
        act_delay=act_delay,
    )  # fmt: skip
    one, other = open_store(tmp_path / "a", spec), open_store(tmp_path / "b", spec)
    train(spec, one)
    calls = iter([False, True, False, True])
    for _ in range(2):
        with pytest.raises(Interrupted):
            train(spec, other, stop=lambda: next(calls), workers=2)
    train(spec, other)
    assert measured(one) == measured(other)


@pytest.mark.parametrize("label", ["mega", "mega@hybrid"])
def test_stages_that_increase_between_interruptions(
    label: str, toy_spec: ToySpec, open_store: Open, measured: Measured, tmp_path: Path
) -> None:
    """Modules and genotypes grow before, between and after two interruptions."""
    spec = toy_spec(
        label, steps_per_task=500, window=2, solved_threshold=1.0, progress_threshold=10.0
    )
    one, other = open_store(tmp_path / "a", spec), open_store(tmp_path / "b", spec)
    train(spec, one)
    grown = []
    for count in (10, 6):
        calls = iter([False] * count + [True])
        with pytest.raises(Interrupted):
            train(spec, other, stop=lambda: next(calls))  # noqa: B023
        grown.append(len(read_probes(other)[-1][1]["stage_events"]))
    train(spec, other)
    grown.append(len(read_probes(other)[-1][1]["stage_events"]))
    assert 0 < grown[0] < grown[1] < grown[2]
    assert measured(one) == measured(other)


def test_an_action_may_be_one_gradient_step_old(
    toy_spec: ToySpec, open_store: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With act_delay=1 the k-th update is taken before the replay has the step it runs beside."""
    added, seen = 0, []
    add, sample = ReplayBuffer.add, ReplayBuffer.sample

    def adding(*args: Any) -> None:
        nonlocal added
        added += 1
        add(*args)

    def sampling(*args: Any) -> Any:
        seen.append(added)
        return sample(*args)

    monkeypatch.setattr(ReplayBuffer, "add", adding)
    monkeypatch.setattr(ReplayBuffer, "sample", sampling)
    at = {}
    for delay in (0, 1):
        added, seen = 0, []
        spec = toy_spec(act_delay=delay)
        train(spec, open_store(tmp_path / str(delay), spec))
        at[delay] = seen
    assert at[0][0] == spec.protocol.warmup_steps + 1
    assert at[1] == [rows - 1 for rows in at[0]]


# --------------------------------------------------------------------------- asked to stop


def test_a_second_signal_ends_it_at_once(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    added = 0
    add = ReplayBuffer.add

    def pressed(*args: Any) -> None:
        nonlocal added
        added += 1
        if added in (30, 33):
            signal.raise_signal(signal.SIGINT)
        add(*args)

    monkeypatch.setattr(ReplayBuffer, "add", pressed)
    assert main([str(store.path)]) == 130
    assert added == 33
    assert store.status()["state"] == "interrupted"


def test_it_stops_when_its_parent_is_gone(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    parents = iter([10, 10, 10])
    monkeypatch.setattr(os, "getppid", lambda: next(parents, 1))
    assert main([str(store.path)]) == 130
    assert newest(store) == 75  # asked at 25, 50 and 75
    assert store.status()["state"] == "interrupted"


@pytest.mark.slow
def test_it_stops_when_its_real_parent_is_killed(
    toy_spec: ToySpec, open_store: Open, tmp_path: Path
) -> None:
    spec = toy_spec(steps_per_task=100_000, eval_every=100_000)
    store = open_store(tmp_path, spec)
    shell = subprocess.Popen(
        ["sh", "-c", f"{sys.executable} -m bench.train {store.path} & wait"], cwd=ROOT
    )
    wait_for(lambda: store.status().get("step", 0) > 0, shell)
    shell.kill()
    shell.wait()
    deadline = time.monotonic() + 60
    while store.busy and time.monotonic() < deadline:
        time.sleep(0.05)
    assert store.status()["state"] == "interrupted"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_its_processes_interrupts_it(
    number: int, toy_spec: ToySpec, open_store: Open, tmp_path: Path
) -> None:
    """As a terminal, systemd or SLURM sends it: simulators wait for what the run says."""
    store = open_store(tmp_path, toy_spec(steps_per_task=100_000, eval_every=100_000))
    process = start(store, "--sim-workers", "2", group=True)
    wait_for(lambda: store.status().get("step", 0) > 0, process)
    os.killpg(process.pid, number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130, output
    assert store.status()["state"] == "interrupted"
    deadline = time.monotonic() + 20
    while _alive(process.pid):
        assert time.monotonic() < deadline, "a simulator is left"
        time.sleep(0.05)


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_training_that_fails_leaves_no_worker(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverged(*_: Any) -> None:
        raise DivergenceError("for this test")

    monkeypatch.setattr(Meters, "check", diverged)
    with pytest.raises(DivergenceError) as caught:
        train(store.spec(), store, workers=2)
    assert caught.traceback  # which holds the frames that hold the environments
    assert not multiprocessing.active_children()


def test_peak_memory_is_the_process_own() -> None:
    """Not that of the sweep that started it."""
    ballast = np.ones(150_000_000, np.uint8)
    script = "from bench import machine; print(machine.peak_memory_bytes())"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert 10_000_000 < int(done.stdout) < 150_000_000
    assert machine.peak_memory_bytes() > ballast.nbytes


def test_two_processes_do_not_train_one_run(
    store: RunStore, capsys: pytest.CaptureFixture[str]
) -> None:
    with store.locked():
        assert main([str(store.path)]) == 75
        with pytest.raises(BusyError):
            train(store.spec(), RunStore(store.path))
    assert "is being trained by another process" in capsys.readouterr().err
    assert not (store.path / "metrics.csv").exists()
    assert store.status() == {"state": "pending"}


# ------------------------------------------------------------------------------------- failures


def failed(store: RunStore) -> str:
    """The recorded reason; there must be a traceback, too."""
    status = store.status()
    assert status["state"] == "failed"
    assert "Traceback" in status["traceback"]
    reason: str = status["error"]
    return reason


@pytest.mark.parametrize("lr", [1e4, 1e30])
def test_divergence_names_metric_and_task(
    toy_spec: ToySpec, open_store: Open, tmp_path: Path, lr: float
) -> None:
    spec = toy_spec(
        actor_lr=lr, critic_lr=lr, grad_clip=None, extreme_loss=None, critic_layer_norm=False
    )
    store = open_store(tmp_path, spec)
    assert main([str(store.path)]) == 1
    assert failed(store).startswith("DivergenceError: training diverged by step ")
    assert " of point-" in failed(store)


def test_a_failing_simulator_is_named_and_the_run_can_be_continued(
    store: RunStore, finished: Finished, measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0
    step = toy._Points.step

    def breaking(self: Any, reset: bool) -> None:
        nonlocal steps
        steps += 1
        if steps == 200:
            self._arrays.reward[1] = np.nan
            return
        step(self, reset)

    with monkeypatch.context() as patch:
        patch.setattr(toy._Points, "step", breaking)
        with pytest.raises(SimulatorError):
            train(store.spec(), store)
    assert "SimulatorError" in failed(store)
    assert "point-1" in failed(store)
    train(store.spec(), store)
    assert measured(store) == measured(finished("mt_sac"))


def test_other_numerics_are_refused_unless_allowed(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = machine.numerics
    with monkeypatch.context() as patch:
        patch.setattr(machine, "numerics", lambda device, *_: here(device, 4))
        with pytest.raises(Interrupted):
            train(store.spec(), store, checkpoint_seconds=0, stop=lambda: True)
    recorded = (store.path / "metrics.csv").read_bytes()
    described = (store.path / "spec.json").read_bytes()
    with pytest.raises(StoreError, match=r"other numerics \(threads 4 -> 1\).*--allow-other-num"):
        train(store.spec(), store)
    assert "threads 4 -> 1" in failed(store)
    assert (store.path / "metrics.csv").read_bytes() == recorded
    assert (store.path / "spec.json").read_bytes() == described  # it trained nothing

    with pytest.warns(RuntimeWarning, match="threads 4 -> 1"), pytest.raises(Interrupted):
        train(store.spec(), store, allow_other_numerics=True, stop=lambda: True)
    assert store.status()["other_numerics"] == ["threads 4 -> 1"]


def test_a_run_tells_what_trained_it_not_what_prepared_it(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep may be continued after an update, whose code trains what was only prepared before."""
    prepared = store.description()["environment"]["command"]
    here, commits = machine.environment, iter(("a" * 40, "b" * 40, "b" * 40, "c" * 40))

    def environment(device: str, threads: int, _: bool) -> dict[str, Any]:
        facts = here(device, threads)
        return facts | {"git_commit": next(commits), "command": "python -m bench.train"}

    monkeypatch.setattr(machine, "environment", environment)
    for _ in range(3):
        with pytest.raises(Interrupted):
            train(store.spec(), store, checkpoint_seconds=0, stop=lambda: True)
    train(store.spec(), store)
    row = run_row(store, "run")
    assert row["git_commit"] == f"{'a' * 40}, then {'b' * 40}, then {'c' * 40}"
    assert row["hardware.system"] == machine.hardware("cpu")["system"]  # the same all the time
    environment_ = store.description()["environment"]
    assert (environment_["git_commit"], environment_["command"]) == ("a" * 40, prepared)
    assert not store.damaged()


def test_a_run_tells_of_every_machine_and_of_all_its_time(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = machine.hardware("cpu")["processor"]
    with pytest.raises(Interrupted):
        train(store.spec(), store, checkpoint_seconds=0, stop=lambda: True)
    here = machine.hardware
    with monkeypatch.context() as patch:
        patch.setattr(machine, "hardware", lambda device: here(device) | {"processor": "another"})
        train(store.spec(), store)
    row, p = run_row(store, "run", read_timing(store)), store.spec().protocol
    assert row["hardware.processor"] == f"{first}, then another"
    assert row["hardware.cores"] == here("cpu")["cores"]
    updates = (p.steps_per_task - p.warmup_steps) * p.updates_per_step / p.envs_per_task
    assert row["updates_per_second"] == pytest.approx(updates / row["seconds"])


def test_a_state_folder_that_cannot_be_made(
    store: RunStore, capsys: pytest.CaptureFixture[str]
) -> None:
    store.state_path.write_text("a file")
    assert main([str(store.path)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"{store.path} failed: FileExistsError")


def test_a_full_disk_fails_clearly_and_can_be_continued(
    store: RunStore, finished: Finished, measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        assert main([str(store.path)]) == 1
    assert "no room for the replay buffer" in failed(store)
    with monkeypatch.context() as patch:
        kill_at(patch, RunStore, "save_checkpoint", 2, after=False)
        with pytest.raises(Killed):
            train(store.spec(), store)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert main([str(store.path)]) == 1
    assert "No space left on device: " in failed(store)
    train(store.spec(), store)
    assert measured(store) == measured(finished("mt_sac"))


@pytest.mark.parametrize(
    ("name", "change"),
    [("metrics.csv", "cut"), ("metrics.csv", "gone"), ("state/replay.bin", "gone")],
)
def test_lost_files_are_not_papered_over(store: RunStore, name: str, change: str) -> None:
    with pytest.raises(Interrupted):
        train(store.spec(), store, stop=lambda: newest(store) >= 75)
    file = store.path / name
    if change == "cut":
        os.truncate(file, 60)
    else:
        file.unlink()
    before = (store.path / "metrics.csv").read_bytes() if file.exists() else None
    with pytest.warns(RuntimeWarning, match=f"{name} lost"), pytest.raises(StoreError):
        train(store.spec(), store)
    assert "delete that folder to train the run anew" in failed(store)
    if before is not None:
        assert (store.path / "metrics.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "--threads 0"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--device", "cuda:99"], "not here"),
    ],
)
def test_bad_arguments(
    store: RunStore, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as end:
        sys.exit(main([str(store.path), *arguments]))
    assert end.value.code in (1, 2)
    assert message in capsys.readouterr().err


def test_a_path_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nothing")]) == 1
    assert "is not a run directory: it has no spec.json" in capsys.readouterr().err
    assert not (tmp_path / "nothing").exists()


# --------------------------------------------------------------------------------------- parts


@given(
    horizon=st.integers(1, 500),
    envs=st.integers(1, 4),
    episodes=st.integers(1, 3000),
    replay=st.integers(1, 100_000),
    data=st.data(),
)
def test_slack_suffices_for_any_protocol(
    toy_spec: ToySpec, horizon: int, envs: int, episodes: int, replay: int, data: st.DataObject
) -> None:
    """Wherever checkpoints fall, what the older of two needs is there until a third is safe."""
    unit = horizon * envs
    try:
        protocol = Protocol(
            horizon=horizon, envs_per_task=envs, steps_per_task=unit * episodes, eval_every=unit,
            replay_per_task=replay * envs, warmup_steps=0,
        )  # fmt: skip
    except ValueError:
        return
    spec = toy_spec().model_copy(update={"protocol": protocol})
    interval = checkpoint_steps(spec)
    assert interval % unit == 0
    assert interval >= unit
    capacity = replay_capacity(spec)
    physical = capacity + replay_slack(spec)
    assert physical <= protocol.steps_per_task  # no room that is never used
    most = interval // unit
    gaps = data.draw(st.lists(st.integers(1, most), min_size=2, max_size=2))
    older = unit * data.draw(st.integers(0, episodes))
    written = min(older + sum(gaps) * unit, protocol.steps_per_task)
    oldest_needed = max(0, older - capacity)
    assert written - physical <= oldest_needed


def test_the_smoke_preset_exercises_everything() -> None:
    spec = RunSpec.resolve("mt_sac", "mt10_rand", 0, preset_name="smoke")
    p = spec.protocol
    assert replay_capacity(spec) + replay_slack(spec) < p.steps_per_task  # the ring wraps
    assert p.steps_per_task // checkpoint_steps(spec) >= 3
    assert p.eval_every < p.steps_per_task


@given(unit=st.integers(1, 500), total=st.integers(1, 500), points=st.integers(1, 100))
def test_log_points_are_evenly_spread_and_end_at_the_end(
    unit: int, total: int, points: int
) -> None:
    steps = [n * unit for n in range(1, total + 1) if due(n * unit, unit, total * unit, points)]
    assert steps[-1] == total * unit
    assert min(total, points) <= len(steps) <= 2 * points + 1 or len(steps) == total
    assert len(set(np.diff([0, *steps])[:-1])) <= 1


def test_meters_mean_over_updates_and_count_episodes() -> None:
    meters = Meters(("a", "b"))
    meters.add_episode(Episode(0, 0, 3.0, True, 10))
    meters.add_episode(Episode(0, 0, 5.0, False, 10))
    for value in (1.0, 2.0):
        meters.add_update({"q": torch.tensor([value, 10 * value])})
    other = Meters(("a", "b"))
    other.load_state_dict(meters.state_dict(), torch.device("cpu"))
    meters.add_update({"q": torch.tensor([6.0, 0.0])})
    assert [tuple(row) for row in meters.rows(7)] == [
        (7, "train", "a", "success", 1.0, 2.0),
        (7, "train", "a", "return", 4.0, 2.0),
        (7, "update", "a", "q", 3.0, 3),
        (7, "update", "b", "q", 10.0, 3),
    ]
    assert meters.rows(8) == []
    other.add_update({"q": torch.tensor([6.0, 0.0])})
    assert [row.value for row in other.rows(7)] == [1.0, 4.0, 3.0, 10.0]


def test_meters_find_what_is_no_number() -> None:
    meters = Meters(("a", "b"))
    meters.check(1)
    meters.add_update({"q": torch.ones(2), "loss": torch.tensor([1.0, np.nan])})
    with pytest.raises(DivergenceError, match=r"diverged by step 9: loss of b is nan"):
        meters.check(9)


def test_clock_continues_over_sessions() -> None:
    clock = Clock()
    with clock("update"):
        time.sleep(0.01)
    first = clock.seconds({"genetic": 1.0})
    assert first["update"] >= 0.01
    assert first["total"] >= first["update"]
    again = Clock()
    again.load(first)
    second = again.seconds({})
    assert second["genetic"] == 1.0
    assert second["update"] == first["update"]
    assert second["total"] >= first["total"]


def test_evaluation_is_a_function_of_policy_and_seed(toy_spec: ToySpec) -> None:
    suite = toy_spec().make_suite()

    def policy(obs: np.ndarray) -> np.ndarray:
        return suite.expert(obs)

    def run(seed: int, episodes: int, training_seed: int = 0, per_task: int = 1) -> Any:
        envs = suite.make(seed=training_seed, envs_per_task=per_task, autoreset=False)
        return evaluate(policy, envs, episodes, seed)

    first = run(5, 6)
    assert first.success.shape == first.return_.shape == (3, 6)
    assert first.success.mean() > 0.9  # the expert
    assert len(set(first.return_.flatten())) == 18  # goals differ over tasks and episodes
    for other in (run(5, 6, training_seed=9), run(5, 6, per_task=4), run(5, 6, per_task=6)):
        np.testing.assert_array_equal(first.return_, other.return_)
    np.testing.assert_array_equal(first.return_[:, :2], run(5, 2).return_)
    assert not np.array_equal(first.return_, run(6, 6).return_)
    assert first.observations.shape == (3, 15, 39)  # every tenth of 25 steps of five episodes
    rows = first.rows(40, "eval", suite.spec.task_names)
    assert rows[0].metric == "success"
    assert rows[0].value == first.success[0].sum()
    assert rows[0].count == 6
    assert rows[1].value == pytest.approx(first.return_[0].mean())
    assert episodes_needed(suite, 6) == 6


def test_describing_the_machine() -> None:
    facts = machine.environment("cpu", 3)
    assert facts["numerics"] == {
        "threads": "3", "device": "cpu", "torch": torch.__version__,
        "numba": facts["versions"]["numba"], "scipy": facts["versions"]["scipy"],
        "simulator": facts["numerics"]["simulator"],
    }  # fmt: skip
    assert "metaworld 3." in facts["numerics"]["simulator"]
    json.dumps(facts)
    assert machine.resolve_device("auto") in ("cpu", "cuda")
    assert machine.resolve_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="unknown device"):
        machine.resolve_device("gpu")
