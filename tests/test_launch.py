"""Launchers: a real Ray cluster that loses a node, submitit's jobs, and what SLURM is told."""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import slurm

from bench import machine
from bench.launch import (
    Exit,
    Launcher,
    Local,
    Order,
    Remote,
    Slurm,
    SlurmQueue,
    _Job,
    launcher,
    launcher_options,
)
from bench.lease import machine as machine_name
from bench.spec import RunSpec, SpecError
from bench.store import RunStore
from bench.sweep import Job, Sweep, prepare
from bench.train import train

ToySpec = Callable[..., RunSpec]
Open = Callable[[Path, RunSpec], RunStore]
Measured = Callable[[RunStore], dict[str, bytes]]
OPTIONS = ("--device", "cpu", "--checkpoint-seconds", "0")


def wait_for(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def carry_out(jobs: list[Job], where: Launcher, meanwhile: Callable[[], None]) -> None:
    """The whole sweep; ``meanwhile`` is called in every round of its loop."""
    sweep = Sweep(jobs, where, options=OPTIONS)
    deadline = time.monotonic() + 900

    def notice(job: Job | None) -> None:
        assert time.monotonic() < deadline, [job.outcome for job in jobs]
        if job is None:
            meanwhile()

    sweep.run(notice)


def undisturbed(specs: list[RunSpec], open_store: Open, out: Path) -> list[RunStore]:
    stores = [open_store(out, spec) for spec in specs]
    for spec, store in zip(specs, stores, strict=True):
        train(spec, store)
    return stores


# ---------------------------------------------------------------------------------- this machine


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks into /proc")
def test_runs_are_shared_out_evenly_over_gpus(
    toy_spec: ToySpec, open_store: Open, tmp_path: Path
) -> None:
    """What a run sees of the machine's GPUs; there need be none to see that."""

    def seen(process: Any) -> str:
        environ = Path(f"/proc/{process.pid}/environ")
        wait_for(environ.read_text, "it never began")
        facts = environ.read_text().split("\0")
        return dict(fact.split("=", 1) for fact in facts if fact)["CUDA_VISIBLE_DEVICES"]

    spec = toy_spec(steps_per_task=5_000, eval_every=5_000)
    order = Order(open_store(tmp_path, spec).path, ("--device", "cpu"), 1)
    local = Local(4, ["2", "GPU-5f"])
    handles: list[Any] = local.start([order] * 4)
    processes = [handle.process for handle in handles]
    try:
        assert sorted(map(seen, processes)) == ["2", "2", "GPU-5f", "GPU-5f"]
        gone = processes[1]
        gone.kill()
        gone.wait()
        (handle,) = local.start([order])
        processes.append(handle.process)
        assert seen(handle.process) == "GPU-5f"
    finally:
        for process in processes:
            process.kill()
            process.wait()


# ------------------------------------------------------------------------------------------- Ray


@pytest.fixture
def nodes() -> Iterator[Any]:
    """A cluster of a head without processors and two nodes of one each."""
    pytest.importorskip("ray")
    import ray
    from ray.cluster_utils import Cluster

    soon = {
        "health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000,
        "health_check_timeout_ms": 2000, "health_check_failure_threshold": 3,
    }  # fmt: skip
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": soon}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    workers = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    os.environ["RAY_ADDRESS"] = cluster.address
    yield cluster, workers
    del os.environ["RAY_ADDRESS"]
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.slow
def test_a_lost_ray_node_costs_no_run(
    nodes: Any, toy_spec: ToySpec, open_store: Open, measured: Measured, tmp_path: Path
) -> None:
    """Two nodes train a run each; one is killed; the other takes over from the checkpoint."""
    cluster, workers = nodes
    specs = [toy_spec(seed=seed, steps_per_task=1000, eval_every=500) for seed in (0, 1)]
    expected = undisturbed(specs, open_store, tmp_path / "alone")
    jobs = prepare(specs, tmp_path / "shared", machine.origin())
    assert "numerics" not in jobs[0].store.description()["environment"]
    first: dict[int, int] = {}  # run -> its first process

    def lose_a_node() -> None:
        pids = [job.store.status().get("pid") for job in jobs]
        steps = [job.store.status().get("step", 0) for job in jobs]
        if not first and all(pids) and min(steps) > 25:
            first.update(enumerate(pids))
            cluster.remove_node(workers.pop(), allow_graceful=False)

    where = launcher("ray", [], out=tmp_path, workers=1, cores=1, device="cpu")
    carry_out(jobs, where, lose_a_node)
    assert first, "the runs were over before a node could be lost"
    assert [job.outcome for job in jobs] == ["done", "done"], [job.error for job in jobs]
    assert [measured(job.store) for job in jobs] == [measured(store) for store in expected]
    leases = [int(next(j.store.state_path.glob("lease-*")).name[-8:]) for j in jobs]
    assert sorted(leases) == [1, 2], "one run was started once, the other again"
    assert jobs[0].store.description()["environment"]["numerics"]["device"] == "cpu"
    where.close()


@pytest.mark.slow
@pytest.mark.usefixtures("nodes")
def test_a_ray_task_that_is_asked_to_stop_saves_first(toy_spec: ToySpec, tmp_path: Path) -> None:
    where = launcher("ray", [], out=tmp_path, workers=1, cores=1, device="cpu")
    spec = toy_spec(seed=2, steps_per_task=200_000, eval_every=200_000)
    (job,) = prepare([spec], tmp_path / "shared", machine.origin())
    (handle,) = where.start([Order(job.store.path, OPTIONS, 1)])
    wait_for(lambda: job.store.status().get("step", 0) > 0, "it never started")
    handle.stop()
    wait_for(lambda: handle.poll() is not None, "it never stopped")
    assert job.store.status()["state"] == "interrupted"
    end = handle.poll()
    assert end is not None
    assert end.code == 130
    where.close()


# ----------------------------------------------------------------------------------------- SLURM


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a SLURM of this one machine; see tests/slurm.py."""
    pytest.importorskip("submitit")
    folder = tmp_path / "cluster"
    monkeypatch.setenv("PATH", f"{slurm.install(folder)}:{os.environ['PATH']}")
    monkeypatch.setattr(Slurm, "poll_seconds", 0.25)
    monkeypatch.setattr(SlurmQueue, "SECONDS", 0.5)
    monkeypatch.setattr(_Job, "GONE_SECONDS", 1.0)
    yield folder
    for state, group in slurm.jobs(folder).values():
        if state == "RUNNING":
            slurm.kill(group)


def on_slurm(out: Path, *settings: str, **facts: Any) -> Slurm:
    where = launcher(
        "slurm", settings, out=out, workers=1, **({"cores": 1, "device": "cpu"} | facts)
    )
    assert isinstance(where, Slurm)
    return where


def orders(tmp_path: Path, count: int) -> list[Order]:
    return [Order(tmp_path / str(seed), OPTIONS, 1) for seed in range(count)]


def newest_generation(store: RunStore) -> int:
    return max(int(path.name[-8:]) for path in store.state_path.glob("lease-*"))


@pytest.mark.slow
def test_a_job_near_its_time_limit_saves_and_is_queued_again(
    cluster: Path, toy_spec: ToySpec, open_store: Open, measured: Measured, tmp_path: Path
) -> None:
    specs = [toy_spec(steps_per_task=1500, eval_every=250)]
    (expected,) = undisturbed(specs, open_store, tmp_path / "alone")
    (job,) = prepare(specs, tmp_path / "shared", machine.origin())
    signalled: list[int] = []

    def near_the_limit() -> None:
        status = job.store.status()
        if not signalled and status.get("step", 0) > 100:
            signalled.append(status["pid"])
            stat = Path(f"/proc/{status['pid']}/stat").read_text()
            os.kill(status["pid"], signal.SIGUSR2)  # some clusters signal every process
            os.kill(int(stat.rpartition(")")[2].split()[1]), signal.SIGUSR2)

    carry_out([job], on_slurm(tmp_path), near_the_limit)
    assert signalled, "the run was over before its limit"
    assert job.outcome == "done", job.error
    assert job.store.status()["state"] == "done"
    assert len(slurm.calls(cluster, "scontrol")) == 1
    assert newest_generation(job.store) == 2
    assert measured(job.store) == measured(expected)


@pytest.mark.slow
def test_a_job_that_cannot_save_before_its_limit_is_queued_again_all_the_same(
    cluster: Path, toy_spec: ToySpec, tmp_path: Path
) -> None:
    specs = [toy_spec(steps_per_task=2000, eval_every=2000, horizon=500, batch_per_task=4096)]
    (job,) = prepare(specs, tmp_path / "shared", machine.origin())
    where = on_slurm(tmp_path, "signal_seconds=1")
    (handle,) = where.start([Order(job.store.path, OPTIONS, 1)])
    wait_for(lambda: job.store.status().get("step", 0) > 0, "it never started")
    pid = job.store.status()["pid"]
    stat = Path(f"/proc/{pid}/stat").read_text()
    os.kill(int(stat.rpartition(")")[2].split()[1]), signal.SIGUSR2)
    wait_for(lambda: slurm.calls(cluster, "scontrol"), "it was not queued again")
    status = job.store.status()
    assert (status["state"], status["pid"]) == ("running", pid), "it did not save"
    wait_for(lambda: job.store.status().get("pid") not in (None, pid), "it did not begin again")
    assert handle.poll() is None


@pytest.mark.slow
def test_ctrl_c_lets_running_jobs_save_and_cancels_the_others_at_once(
    cluster: Path, toy_spec: ToySpec, tmp_path: Path
) -> None:
    specs = [toy_spec(seed=seed, steps_per_task=200_000, eval_every=200_000) for seed in range(4)]
    jobs = prepare(specs, tmp_path / "shared", machine.origin())
    where = on_slurm(tmp_path, "at_once=1")
    handles = where.start([Order(job.store.path, OPTIONS, 1) for job in jobs])
    wait_for(lambda: jobs[0].store.status().get("step", 0) > 0, "it never started")
    for handle in handles:
        handle.stop()
    started = time.monotonic()
    assert [handle.poll() for handle in handles[1:]] == [Exit(130)] * 3
    assert time.monotonic() - started < 10
    assert slurm.calls(cluster, "scancel") == ["4242_1 4242_2 4242_3"]
    wait_for(lambda: handles[0].poll() is not None, "it never stopped")
    assert jobs[0].store.status()["state"] == "interrupted"


@pytest.mark.slow
def test_a_killed_job_is_recorded_as_failed(
    cluster: Path, toy_spec: ToySpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though its lease, of another machine as far as can be told here, was never released."""
    monkeypatch.setattr("bench.sweep.DEAD_SECONDS", 2.0)
    (job,) = prepare([toy_spec(steps_per_task=200_000, eval_every=200_000)], tmp_path / "shared",
                     machine.origin())  # fmt: skip
    killed: list[int] = []

    def kill() -> None:
        if not killed and job.store.status().get("step", 0) > 0:
            killed.append(job.store.status()["pid"])
            os.kill(killed[0], signal.SIGSTOP)  # so that it does not renew its lease
            (lease,) = job.store.state_path.glob("lease-*")
            lease.write_text(lease.read_text().replace(machine_name(), "node17/"))
            ((name, (_, group)),) = slurm.jobs(cluster).items()
            os.killpg(group, signal.SIGKILL)
            os.kill(killed[0], signal.SIGKILL)
            (cluster / name).unlink()

    carry_out([job], on_slurm(tmp_path), kill)
    assert job.outcome == "failed"
    assert "left the queue without a result" in job.error
    assert job.store.status()["state"] == "failed"
    assert job.store.status()["error"] == job.error


def test_jobs_that_wait_are_found_again_not_submitted_again(cluster: Path, tmp_path: Path) -> None:
    """As after a ``kill -9`` of the command that follows them."""
    (cluster / "full").touch()
    first = on_slurm(tmp_path).start(orders(tmp_path, 3))
    assert [handle.poll() for handle in first] == [None] * 3
    (cluster / "4242_1").unlink()
    again = on_slurm(tmp_path).start(orders(tmp_path, 4))
    ids = [handle.job.job_id for handle in again]  # type: ignore[attr-defined]
    assert ids == ["4242_0", "4243_0", "4242_2", "4243_1"]
    assert len(slurm.calls(cluster, "sbatch")) == 2


def test_where_the_queue_cannot_be_seen_nothing_is_submitted_again(
    cluster: Path, tmp_path: Path
) -> None:
    (cluster / "full").touch()
    (cluster / "no-squeue").touch()
    on_slurm(tmp_path).start(orders(tmp_path, 2))  # nothing can be there yet
    with pytest.raises(RuntimeError, match="squeue does not answer"):
        on_slurm(tmp_path).start(orders(tmp_path, 2))
    assert len(slurm.calls(cluster, "sbatch")) == 1


def test_what_was_submitted_before_sbatch_refused_is_cancelled(
    cluster: Path, tmp_path: Path
) -> None:
    (cluster / "full").touch()
    (cluster / "full-after").touch()
    with pytest.raises(RuntimeError, match="job submit limit"):
        on_slurm(tmp_path, "array_size=2").start(orders(tmp_path, 5))
    assert slurm.jobs(cluster) == {}


def test_a_job_that_has_ended_is_not_found_again(cluster: Path, tmp_path: Path) -> None:
    """Its result is there a moment before it leaves the queue."""
    (cluster / "full").touch()
    (first,) = on_slurm(tmp_path).start(orders(tmp_path, 1))
    first.job.paths.result_pickle.write_bytes(pickle.dumps(("success", 1)))  # type: ignore[attr-defined]
    assert first.poll() == Exit(1)
    (second,) = on_slurm(tmp_path).start(orders(tmp_path, 1))
    assert second.poll() is None
    assert len(slurm.calls(cluster, "sbatch")) == 2


def test_the_reason_of_an_exception_in_a_job_is_told(cluster: Path, tmp_path: Path) -> None:
    (cluster / "full").touch()
    (handle,) = on_slurm(tmp_path).start(orders(tmp_path, 1))
    trace = "Traceback (most recent call last):\n  ...\nOSError: No space left on device"
    handle.job.paths.result_pickle.write_bytes(pickle.dumps(("error", trace)))  # type: ignore[attr-defined]
    assert handle.poll() == Exit(1, "job 4242: OSError: No space left on device")


def test_jobs_that_could_not_be_cancelled_are_named(
    cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (cluster / "full").touch()
    (cluster / "no-scancel").touch()
    where = on_slurm(tmp_path)
    for handle in where.start(orders(tmp_path, 2)):
        handle.stop()
    where.close()
    assert "scancel 4242_0 4242_1" in capsys.readouterr().err


def test_more_runs_than_an_array_takes_are_several_arrays(cluster: Path, tmp_path: Path) -> None:
    (cluster / "full").touch()
    on_slurm(tmp_path, "array_size=2", "at_once=3").start(orders(tmp_path, 5))
    assert len(slurm.calls(cluster, "sbatch")) == 3
    assert "--array=0-1%1" in (cluster / "script-4242").read_text()
    assert list(slurm.jobs(cluster)) == ["4242_0", "4242_1", "4243_0", "4243_1", "4244"]


def test_a_controller_that_does_not_answer_costs_no_job(cluster: Path, tmp_path: Path) -> None:
    (cluster / "full").touch()
    (handle,) = on_slurm(tmp_path).start(orders(tmp_path, 1))
    (cluster / "no-squeue").touch()
    time.sleep(0.6)
    assert handle.poll() is None
    (cluster / "no-squeue").unlink()
    (cluster / "4242").unlink()
    time.sleep(0.6)
    assert handle.poll() is None, "its result may be on its way"
    time.sleep(1.1)
    end = handle.poll()
    assert end is not None
    assert end.code == 1


def test_what_slurm_is_told(cluster: Path, tmp_path: Path) -> None:
    (cluster / "full").touch()
    settings = [
        "partition=gpu", "minutes=90", "signal_seconds=240", "at_once=8", "memory_gb=6.5",
        "sbatch=--exclude=node7 --exclusive --wckey=mine", "setup=module load x",
    ]  # fmt: skip
    where = on_slurm(tmp_path, *settings, cores=2, device="cuda")
    handles = where.start(orders(tmp_path, 3))
    lines = (cluster / "script-4242").read_text().splitlines()
    for expected in (
        "--partition=gpu", "--time=90", "--signal=USR2@240", "--array=0-2%3", "--requeue",
        "--cpus-per-task=2", "--gpus-per-node=1", "--mem=6656MB", "--open-mode=append",
        "--job-name=bench", "--exclude=node7", "--exclusive", "--wckey=mine",
    ):  # fmt: skip
        assert f"#SBATCH {expected}" in lines, lines
    assert "module load x" in lines
    assert not any(line.startswith("#SBATCH --wckey=submitit") for line in lines)
    (command,) = (line for line in lines if "submitit.core._submit" in line)
    assert "--cpus-per-task=2" in command
    assert [handle.job.job_id for handle in handles] == ["4242_0", "4242_1", "4242_2"]  # type: ignore[attr-defined]
    typed = on_slurm(tmp_path, "sbatch=--gpus-per-node=a100:1", device="cuda")
    typed.start(orders(tmp_path / "more", 2))
    lines = (cluster / "script-4243").read_text().splitlines()
    assert [line for line in lines if "gpus" in line] == ["#SBATCH --gpus-per-node=a100:1"]


def test_what_a_job_is_queued_again_with(tmp_path: Path) -> None:
    submitit = pytest.importorskip("submitit")
    order = Order(tmp_path, OPTIONS, 1)
    again = Remote(order, save_seconds=7).checkpoint()
    assert isinstance(again, submitit.helpers.DelayedSubmission)
    assert (again.function.order, again.function.save_seconds) == (order, 7)


# --------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("slrm", [], ["'slrm'", "'slurm'"]),
        ("local", ["partition=gpu"], ["local takes no settings"]),
        ("slurm", ["partitoin=gpu"], ["'partitoin'", "'partition'"]),
        ("slurm", ["minutes=0"], ["minutes=0", "greater than or equal to 1"]),
        ("slurm", ["minutes=long", "at_once=-1"], ["minutes='long'", "at_once=-1"]),
        ("slurm", ["minutes=4", "signal_seconds=240"], ["signal_seconds=240", "240 seconds"]),
        ("slurm", ["sbatch=gres=gpu:1"], ["'gres=gpu:1'", "--option=value"]),
        ("slurm", ["sbatch=--mem-per-cpu=2G"], ["--mem-per-cpu", "memory_gb"]),
        ("ray", ["gpus_per_run=1.5"], ["gpus_per_run=1.5", "whole"]),
        ("ray", ["gpus_per_run"], ["expected key=value"]),
        ("ray", ["retries=1", "retries=2"], ["retries is given twice"]),
    ],
)
def test_wrong_settings_are_named(name: str, settings: list[str], words: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        launcher_options(name, settings)
    for word in words:
        assert word in str(caught.value)
