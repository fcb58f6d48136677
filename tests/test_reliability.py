"""Faults, each as a test; docs/reliability.md has their figures."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from campaign import campaign

from bench.doctor import run_checks
from bench.launch import Local
from bench.replay import ReplayBuffer
from bench.spec import RunSpec
from bench.store import RunStore, write_atomically
from bench.sweep import Job, Sweep
from bench.train import main, train
from suites import toy

ROOT = Path(__file__).resolve().parent.parent

ToySpec = Callable[..., RunSpec]
Open = Callable[[Path, RunSpec], RunStore]
Measured = Callable[[RunStore], dict[str, bytes]]
Finished = Callable[[str], RunStore]


@pytest.mark.slow
def test_a_sweep_survives_kills(tmp_path: Path) -> None:
    """The whole campaign is ``python tests/campaign.py --kills 100``; this is a sample of it."""
    kills = int(os.environ.get("BENCH_KILLS", "6"))
    facts = campaign(kills, 3600, seed=kills, folder=tmp_path)
    assert facts["kills"] >= kills, facts
    assert facts["identical"], facts
    assert facts["runs_lost"] == 0, facts
    assert facts["trained_twice"] == [], facts


# ---------------------------------------------------------------------------------- power failure


class Disk:
    """What would be on the disk if the power failed now: nothing that was not synced.

    A file's content counts from its fsync, a name from the fsync of its directory. The replay's
    memory-mapped rows count from its flush.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.contents: dict[int, bytes] = {}  # by inode
        self.names: dict[Path, dict[str, int]] = {}  # directory -> name -> inode
        fsync, flush = os.fsync, ReplayBuffer.flush

        def synced(descriptor: int) -> None:
            fsync(descriptor)
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            if path.is_dir():
                self.names[path] = {p.name: p.stat().st_ino for p in path.iterdir() if p.is_file()}
            else:
                self.contents[path.stat().st_ino] = path.read_bytes()

        def flushed(replay: ReplayBuffer) -> None:
            flush(replay)
            path = Path(str(replay._rows.filename))
            self.contents[path.stat().st_ino] = path.read_bytes()

        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(ReplayBuffer, "flush", flushed)

    def fail(self) -> None:
        """Leave what is safe: other files are empty, a name that was replaced is the old one."""
        safe = {
            directory / name: self.contents.get(inode)
            for directory, names in self.names.items()
            for name, inode in names.items()
        }
        for path in [p for p in self.folder.rglob("*") if p.is_file()]:
            content = self.contents.get(path.stat().st_ino, safe.get(path))
            path.write_bytes(b"" if content is None else content)


class PowerFailure(BaseException):
    """Nothing catches it."""


@pytest.mark.parametrize("number", [3, 8, 12, 17])
def test_what_was_not_synced_is_not_relied_upon(
    number: int, toy_spec: ToySpec, open_store: Open, measured: Measured, finished: Finished,
    tmp_path: Path,
) -> None:  # fmt: skip
    """The power fails at a rename, in the worst way that a disk may forget."""
    store = open_store(tmp_path, toy_spec("mega"))
    saves = RunStore.save_checkpoint
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(store.path, patch)
        write_atomically(store.path / "spec.json", (store.path / "spec.json").read_bytes())
        calls, replace = 0, Path.replace

        def failing(path: Path, target: Any) -> Path:
            nonlocal calls
            calls += ".pt" in path.name or "npz" in path.name
            if calls == number:
                raise PowerFailure
            return replace(path, target)

        patch.setattr(Path, "replace", failing)
        with pytest.raises(PowerFailure):
            train(store.spec(), store, checkpoint_seconds=0)
        assert RunStore.save_checkpoint is saves
        disk.fail()
    train(store.spec(), store, lease_seconds=0.1)  # the lease is of another start of the machine
    assert measured(store) == measured(finished("mega"))


# --------------------------------------------------------------------------- hung, out of memory


@pytest.fixture
def job(toy_spec: ToySpec, open_store: Open, tmp_path: Path) -> Job:
    """A run of a sweep."""
    spec = toy_spec(steps_per_task=2000, eval_every=500)
    return Job(spec, open_store(tmp_path, spec))


def carry_out(job: Job, meanwhile: Callable[[int], None], **options: Any) -> None:
    """The sweep of one job; ``meanwhile(pid)`` once it has come somewhere."""
    told: list[int] = []

    def notice(_: Job | None) -> None:
        status = job.store.status()
        if not told and status["state"] == "running" and status.get("step", 0) > 100:
            told.append(status["pid"])
            meanwhile(status["pid"])

    Sweep([job], Local(1), **options).run(notice)


@pytest.mark.slow
def test_a_simulator_that_hangs_is_ended_and_the_run_goes_on(job: Job) -> None:
    """A process that simulates stands still; the watchdog ends the run, a retry finishes it."""

    def freeze(pid: int) -> None:
        for child in map(int, _children(pid)):
            os.kill(child, signal.SIGSTOP)

    carry_out(
        job, freeze, options=("--sim-workers", "1", "--hang-seconds", "12"), retries=1
    )  # fmt: skip
    assert job.attempts == 2
    assert job.outcome == "done", job.error
    log = (job.store.path / "log.txt").read_text()
    assert "Timeout (" in log
    assert "lockstep.py" in log, "the log says where it hung"


HOLDER = """
import sys, time
from pathlib import Path
from bench.store import RunStore
with RunStore(Path(sys.argv[1])).locked():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_run_that_another_process_lets_go_is_taken_up(
    toy_spec: ToySpec, open_store: Open, tmp_path: Path
) -> None:
    """Two sweeps at once: what the other one leaves undone is not left for nobody."""
    held, mine = (toy_spec(seed=seed) for seed in (0, 1))
    jobs = [Job(spec, open_store(tmp_path, spec)) for spec in (held, mine)]
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(jobs[0].store.path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    seen = []

    def notice(job: Job | None) -> None:
        if job is jobs[0]:
            seen.append(job.outcome)
            if job.outcome == "busy":
                holder.communicate("")

    Sweep(jobs, Local(1)).run(notice)
    assert seen == ["running", "busy", "running", "done"]
    assert jobs[1].outcome == "done"


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


@pytest.mark.slow
def test_a_hung_run_is_named_if_it_is_not_tried_again(job: Job) -> None:
    carry_out(
        job, lambda pid: [os.kill(int(c), signal.SIGSTOP) for c in _children(pid)],  # type: ignore[arg-type,return-value]
        options=("--sim-workers", "1", "--hang-seconds", "4"),
    )  # fmt: skip
    assert job.outcome == "failed"
    assert "the process hung" in job.error
    assert job.store.status()["state"] == "failed"
    assert not job.store.busy


@pytest.mark.slow
def test_running_out_of_memory_is_a_failure_that_is_named(job: Job) -> None:
    """The process may have 1.5 GB more of addresses than it has, and its replay wants 12 GB."""
    big = job.spec.protocol.model_copy(update={"steps_per_task": 20_000_000, "eval_every": 500,
                                               "replay_per_task": 20_000_000})  # fmt: skip
    spec = job.spec.model_copy(update={"protocol": big, "id": "0" * 10})
    store = RunStore.create(job.store.path.parents[2], spec, job.store.description()["environment"])
    code = (
        "import resource, sys; from bench.train import main; import torch, suites.toy;"
        "used = int(open('/proc/self/statm').read().split()[0]) * 4096;"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 1_500_000_000,) * 2);"
        "import os; os.posix_fallocate = os.ftruncate and (lambda f, o, n: os.ftruncate(f, n));"
        "sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(store.path)], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    status = store.status()
    assert status["state"] == "failed"
    assert "memory" in status["error"].lower()


@pytest.mark.slow
def test_the_out_of_memory_killer_leaves_a_reason_and_a_run_that_resumes(
    job: Job, measured: Measured, open_store: Open, tmp_path: Path
) -> None:
    """The kernel's killer sends SIGKILL; the sweep says so, and the same sweep again finishes."""
    carry_out(job, lambda pid: os.kill(pid, signal.SIGKILL))
    assert job.outcome == "failed"
    assert job.error == "the process was killed by SIGKILL (out of memory?)"
    assert job.store.status()["error"] == job.error
    again = Job(job.spec, job.store)
    carry_out(again, lambda _: None)
    assert again.outcome == "done"
    alone = open_store(tmp_path / "alone", job.spec)
    train(job.spec, alone)
    assert measured(job.store) == measured(alone)


# --------------------------------------------------------------------------- disks that refuse


class HalfWritten:
    """A file on a disk that has room for half of what is written next."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> HalfWritten:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, data: Any) -> int:
        self.file.write(bytes(data)[: len(data) // 2])
        raise OSError(28, "No space left on device", self.file.name)


@pytest.mark.parametrize("what", ["metrics.csv", "checkpoint", "probe", "status.json"])
def test_a_disk_that_is_full_for_a_moment(
    what: str, toy_spec: ToySpec, open_store: Open, measured: Measured, finished: Finished,
    tmp_path: Path,
) -> None:  # fmt: skip
    """The write of any file fails halfway; the run says so, and goes on when there is room."""
    store = open_store(tmp_path, toy_spec("mega"))
    opened, calls = Path.open, 0
    name = {"probe": ".npz"}.get(what, what)

    def full(path: Path, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        file = opened(path, *args, **kwargs)
        if args and args[0] in ("wb", "ab") and name in path.name:
            calls += 1
            if calls == 3:
                return HalfWritten(file)
        return file

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", full)
        code = main([str(store.path), "--checkpoint-seconds", "0"])
    assert code == 1
    status = store.status()
    assert status["state"] == "failed"
    assert "No space left on device" in status["error"]
    if what == "probe":  # what there is of the run is judged all the same
        assert {"state", "population"} <= {row["check"] for row in run_checks(store)}
    assert main([str(store.path)]) == 0
    assert measured(store) == measured(finished("mega"))


@pytest.mark.skipif(shutil.which("mount") is None or os.geteuid() != 0, reason="needs root")
def test_a_disk_that_is_really_full(
    toy_spec: ToySpec, open_store: Open, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A file system of a few megabytes: refused or failed with a reason, and nothing is broken."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("no right to mount here")
    try:
        store = open_store(disk, toy_spec())
        assert main([str(store.path)]) == 1
        # The status, too, may have found no room for the reason.
        told = [store.status().get("error"), capfd.readouterr().err]
        assert any("No space left on device" in str(words) for words in told)
        assert not store.done
        assert not list(store.path.rglob("*.tmp"))
    finally:
        subprocess.run(["umount", str(disk)], check=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_directory(toy_spec: ToySpec, open_store: Open, tmp_path: Path) -> None:
    store = open_store(tmp_path, toy_spec())
    store.path.chmod(0o500)
    assert main([str(store.path)]) == 1
    store.path.chmod(0o700)


@pytest.mark.skipif(shutil.which("mount") is None or os.geteuid() != 0, reason="needs root")
def test_a_read_only_file_system(
    toy_spec: ToySpec, open_store: Open, measured: Measured, finished: Finished, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Begun where it could be written, then remounted read-only; it goes on when it can again."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=50m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount here")
    try:
        store = open_store(disk, toy_spec())
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert main([str(store.path)]) == 1
        assert "Read-only file system" in capfd.readouterr().err
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        assert main([str(store.path)]) == 0
        assert measured(store) == measured(finished("mt_sac"))
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def test_a_heartbeat_comes_while_the_simulator_is_slow(
    toy_spec: ToySpec, open_store: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is slow but alive is not taken for hung."""
    step, beats = toy._Points.step, []

    def slow(points: Any, reset: bool) -> None:
        time.sleep(0.02)
        step(points, reset)

    monkeypatch.setattr(toy._Points, "step", slow)
    store = open_store(tmp_path, toy_spec(steps_per_task=100, eval_every=100, eval_episodes=1,
                                          final_episodes=1, warmup_steps=50))  # fmt: skip
    train(store.spec(), store, heartbeat_seconds=0.05, alive=lambda: beats.append(time.monotonic()))
    gaps = np.diff(beats)
    assert len(beats) > 20
    assert gaps.max() < 5.0
