"""Who may write a run's directory: one process, on whatever machine, and the next after it."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import lease
from bench.lease import Lease, LeaseHeldError, LeaseLostError, held_elsewhere, newest
from bench.spec import RunSpec
from bench.store import BusyError, RunStore, TakenOverError

ROOT = Path(__file__).resolve().parent.parent

ToySpec = Callable[..., RunSpec]
Open = Callable[[Path, RunSpec], RunStore]


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Go on as a process of another machine."""
    return lambda name: monkeypatch.setattr(lease, "machine", lambda: f"{name}/boot")


def test_generations_go_up_and_only_the_newest_file_stays(tmp_path: Path) -> None:
    for generation in (1, 2, 3):
        held = Lease.take(tmp_path, expires=None, locked=True)
        assert held.generation == generation
        held.renew()
        held.release()
    assert [path.name for path in tmp_path.iterdir()] == ["lease-00000003"]


def test_a_dead_holder_of_this_machine_is_followed_at_once(tmp_path: Path) -> None:
    Lease.take(tmp_path, expires=None, locked=True)  # and never released
    assert Lease.take(tmp_path, expires=None, locked=True).generation == 2
    with pytest.raises(LeaseHeldError):  # without a file lock nobody knows that it is dead
        Lease.take(tmp_path, expires=None, locked=False)


def test_a_lock_that_reaches_other_machines_leaves_it_to_the_lease(
    toy_spec: ToySpec, open_store: Open, tmp_path: Path, on: Callable[[str], None]
) -> None:
    """As over NFS, where the lock of a machine that is gone may stay behind."""
    store = open_store(tmp_path, toy_spec())
    on("a")
    store.state_path.mkdir()
    Lease.take(store.state_path, expires=None, locked=True)
    on("b")
    with (store.state_path / "lock").open("a") as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        assert not store.busy
        with store.locked(expires=0.3, wait=0.0):
            fcntl.flock(theirs, fcntl.LOCK_UN)
            # The next of this machine gets the lock, but must not take the holder for dead.
            with pytest.raises(BusyError), RunStore(store.path).locked(expires=None, wait=0.0):
                pass
            assert store.elsewhere == "b"
        with RunStore(store.path).locked(expires=None, wait=0.0):
            pass


def test_a_lease_that_was_hardly_taken_holds_nobody_up(tmp_path: Path) -> None:
    (tmp_path / "lease-00000004").touch()  # killed, or the disk full, before it was written
    started = time.monotonic()
    assert Lease.take(tmp_path, expires=30.0, locked=True).generation == 5
    assert time.monotonic() - started < 15


def test_a_lease_that_is_being_written_is_respected(tmp_path: Path) -> None:
    (tmp_path / "lease-00000004").write_text('{"machine": "another/bo')
    with pytest.raises(LeaseHeldError):
        Lease.take(tmp_path, expires=None, locked=True)


def test_a_silent_holder_of_another_machine_expires_and_learns_of_it(
    tmp_path: Path, on: Callable[[str], None]
) -> None:
    on("a")
    first = Lease.take(tmp_path, expires=None, locked=False)
    on("b")
    assert held_elsewhere(tmp_path) == "a"
    started = time.monotonic()
    second = Lease.take(tmp_path, expires=0.3, locked=False)
    assert time.monotonic() - started >= 0.3
    assert held_elsewhere(tmp_path) == "b"  # its own machine, whose file lock does not tell
    for look in (first.check, first.renew):
        with pytest.raises(LeaseLostError, match="taken over"):
            look()
    first.release()  # changes nothing
    second.check()
    assert newest(tmp_path) == (2, second._record)


def test_a_holder_that_renews_is_left_alone(tmp_path: Path, on: Callable[[str], None]) -> None:
    on("a")
    first = Lease.take(tmp_path, expires=None, locked=False)
    on("b")
    real = time.sleep

    def meanwhile(seconds: float) -> None:
        first.renew()
        real(seconds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", meanwhile)
        with pytest.raises(LeaseHeldError, match="on a has it and is alive"):
            Lease.take(tmp_path, expires=5.0, locked=False)
    with pytest.raises(LeaseHeldError, match="a process on a has it"):
        Lease.take(tmp_path, expires=None, locked=False)
    first.check()


def test_of_two_that_see_it_expire_one_gets_it(
    tmp_path: Path, on: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    on("a")
    Lease.take(tmp_path, expires=None, locked=False)
    on("b")
    taken: list[Lease] = []

    def faster(*_: Any) -> None:
        monkeypatch.undo()
        on("c")
        taken.append(Lease.take(tmp_path, expires=0.0, locked=False))

    monkeypatch.setattr(lease, "_watch", faster)
    with pytest.raises(LeaseHeldError, match="just taken"):
        Lease.take(tmp_path, expires=0.0, locked=False)
    taken[0].check()


def test_nothing_is_written_by_a_process_that_was_followed(
    toy_spec: ToySpec, open_store: Open, tmp_path: Path, on: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def unsupported(*_: Any) -> None:
        raise OSError(95, os.strerror(95))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    store = open_store(tmp_path, toy_spec())
    other = RunStore(store.path)
    on("a")
    with store.locked():
        store.append_metrics([])
        on("b")
        with pytest.raises(BusyError, match="a process on a"), other.locked(expires=None):
            pass
        with other.locked(expires=0.1):
            before = sorted(path.name for path in store.path.rglob("*"))
            for write in (
                lambda: store.append_metrics([]),
                lambda: store.append_timing(1, {"total": 1.0}),
                lambda: store.write_status("running"),
                lambda: store.write_probe("1", {"x": [1]}),  # type: ignore[dict-item,list-item]
                lambda: store.save_checkpoint(1, {}),
                store.finish,
                store.resume,
            ):
                with pytest.raises(TakenOverError):
                    write()
            assert sorted(path.name for path in store.path.rglob("*")) == before


def start(machine: str, store: RunStore, *options: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "tests/other_machine.py", machine, str(store.path), *options],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.mark.slow
def test_two_machines_on_one_directory(
    toy_spec: ToySpec, open_store: Open, tmp_path: Path,
    measured: Callable[[RunStore], dict[str, bytes]],
) -> None:  # fmt: skip
    """Machine A freezes, B takes over and finishes; A wakes up in the middle and stops."""
    spec = toy_spec(steps_per_task=2500, eval_every=500)
    alone, store = open_store(tmp_path / "alone", spec), open_store(tmp_path / "shared", spec)
    start("a", alone).communicate()
    a = start("a", store, "--checkpoint-seconds", "0")
    try:
        wait_for_step(store, 200)
        refused = start("b", store, "--lease-seconds", "20")
        output = refused.communicate()[0].decode()
        assert refused.returncode == 75, output
        assert "on a has it and is alive" in output
        a.send_signal(signal.SIGSTOP)
        b = start("b", store, "--lease-seconds", "2", "--checkpoint-seconds", "0")
        wait_for_step(store, store.status()["step"] + 100, pid=b.pid)
        a.send_signal(signal.SIGCONT)
        output = a.communicate(timeout=120)[0].decode()
        assert a.returncode == 75, output
        assert "another process has taken over" in output
        assert b.wait(timeout=300) == 0, b.communicate()
    finally:
        a.kill()
    assert store.status()["state"] == "done"
    assert measured(store) == measured(alone)


def wait_for_step(store: RunStore, step: int, pid: int | None = None) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        status = store.status()
        if status.get("step", 0) >= step and pid in (None, status.get("pid")):
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")
