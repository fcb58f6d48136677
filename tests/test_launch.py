"""Launchers: a real Ray cluster that loses a node, submitit's jobs, and what SLURM is told."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import machine
from bench.launch import (
    Launcher,
    Local,
    Order,
    Remote,
    SlurmOptions,
    Submitit,
    launcher,
    launcher_options,
)
from bench.launch import slurm_executor as make_executor
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
        while not (text := Path(f"/proc/{process.pid}/environ").read_text()):
            time.sleep(0.01)  # it is about to begin
        facts = text.split("\0")
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

    where = launcher("ray", [], out=tmp_path, workers=1, threads=1, device="cpu")
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
    where = launcher("ray", [], out=tmp_path, workers=1, threads=1, device="cpu")
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


@pytest.mark.slow
def test_a_job_near_its_time_limit_saves_and_is_queued_again(
    toy_spec: ToySpec, open_store: Open, measured: Measured, tmp_path: Path
) -> None:
    """Submitit's own executor on this machine, which signals as SLURM does."""
    submitit = pytest.importorskip("submitit")
    specs = [toy_spec(steps_per_task=750, eval_every=250)]
    (expected,) = undisturbed(specs, open_store, tmp_path / "alone")
    executor = submitit.LocalExecutor(tmp_path / "submitit", max_num_timeout=3)
    executor.update_parameters(timeout_min=20)
    (job,) = prepare(specs, tmp_path / "shared", machine.origin())
    signalled: list[int] = []

    def near_the_limit() -> None:
        status = job.store.status()
        if not signalled and status.get("step", 0) > 100:
            signalled.append(status["pid"])
            stat = Path(f"/proc/{status['pid']}/stat").read_text()
            os.kill(int(stat.rpartition(")")[2].split()[1]), signal.SIGUSR2)

    carry_out([job], Submitit(executor), near_the_limit)
    assert signalled, "the run was over before its limit"
    assert job.outcome == "done", job.error
    assert job.store.status()["state"] == "done"
    assert newest_generation(job.store) == 2
    assert measured(job.store) == measured(expected)


def newest_generation(store: RunStore) -> int:
    return max(int(path.name[-8:]) for path in store.state_path.glob("lease-*"))


def test_what_slurm_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    tools, seen = tmp_path / "bin", tmp_path / "seen"
    tools.mkdir()
    for name, body in {
        "sbatch": f'cp "$1" {seen}\necho Submitted batch job 4242', "srun": "exit 1"
    }.items():  # fmt: skip
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    options = launcher_options(
        "slurm", ["partition=gpu", "minutes=90", "signal_seconds=240", "at_once=8", "memory_gb=6.5"]
    )
    assert isinstance(options, SlurmOptions)
    where = Submitit(make_executor(options, tmp_path / "jobs", threads=2, device="cuda"))
    handles = where.start(
        [Order(tmp_path / str(seed), ("--device", "cuda"), 2) for seed in range(3)]
    )
    lines = seen.read_text().splitlines()
    for expected in (
        "--partition=gpu", "--time=90", "--signal=USR2@240", "--array=0-2%3", "--requeue",
        "--cpus-per-task=2", "--gpus-per-node=1", "--mem=6656MB", "--open-mode=append",
        "--job-name=bench",
    ):  # fmt: skip
        assert f"#SBATCH {expected}" in lines, lines
    assert any("submitit.core._submit" in line for line in lines)
    assert [handle.job.job_id for handle in handles] == ["4242_0", "4242_1", "4242_2"]  # type: ignore[attr-defined]


def test_what_a_job_is_queued_again_with(tmp_path: Path) -> None:
    submitit = pytest.importorskip("submitit")
    order = Order(tmp_path, OPTIONS, 1)
    again = Remote(order).checkpoint()
    assert isinstance(again, submitit.helpers.DelayedSubmission)
    assert again.function.order == order


# --------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("slrm", [], ["'slrm'", "'slurm'"]),
        ("local", ["partition=gpu"], ["local takes no settings"]),
        ("slurm", ["partitoin=gpu"], ["'partitoin'", "'partition'"]),
        ("slurm", ["minutes=0"], ["minutes=0", "greater than or equal to 1"]),
        ("slurm", ["minutes=long", "at_once=-1"], ["minutes='long'", "at_once=-1"]),
        ("ray", ["gpus_per_run"], ["expected key=value"]),
        ("ray", ["retries=1", "retries=2"], ["retries is given twice"]),
    ],
)
def test_wrong_settings_are_named(name: str, settings: list[str], words: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        launcher_options(name, settings)
    for word in words:
        assert word in str(caught.value)
