"""The replay ring: what is in it, how it is drawn, and that it survives on disk."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.replay import ReplayBuffer
from bench.spec import RunSpec
from bench.train import replay_capacity, replay_slack
from suites.base import Step, SuiteSpec

O, A = 5, 2  # noqa: E741
EXTRAS: dict[str, tuple[tuple[int, ...], str]] = {
    "route": ((3,), "uint8"), "genotype": ((), "int32"), "weight": ((2, 2), "float32"),
}  # fmt: skip


def suite(tasks: int) -> SuiteSpec:
    names = tuple(f"task-{task}" for task in range(tasks))
    return SuiteSpec(name="s", task_names=names, obs_dim=O, action_dim=A, horizon=10)


def make(
    folder: Path,
    *,
    tasks: int = 2,
    capacity: int = 6,
    slack: int = 4,
    seed: int = 0,
    extras: Mapping[str, tuple[tuple[int, ...], str]] = EXTRAS,
) -> ReplayBuffer:
    return ReplayBuffer(
        folder / "state" / "replay.bin", suite(tasks), extras,
        capacity=capacity, slack=slack, seed=seed, device=torch.device("cpu"),
    )  # fmt: skip


def row(tasks: int, envs: int, number: int) -> dict[str, Any]:
    """The ``number``-th rows (T, E) of a stream that is a function of the number alone."""
    rng = np.random.default_rng(number)
    shape = (tasks, envs)
    obs, next_obs = rng.random((2, *shape, O), np.float32)
    step = Step(
        obs=next_obs,  # what is acted on next is of no concern to the replay
        next_obs=next_obs,
        reward=rng.normal(size=shape).astype(np.float32),
        terminated=rng.random(shape) < 0.3,
        truncated=rng.random(shape) < 0.3,
        episodes=[],
    )
    extras = {
        "route": rng.integers(0, 256, (*shape, 3), np.uint8),
        "genotype": rng.integers(-(2**31), 2**31, shape, np.int32),
        "weight": rng.normal(size=(*shape, 2, 2)).astype(np.float32),
    }
    return {
        "obs": obs, "action": rng.random((*shape, A), np.float32), "step": step, "extras": extras,
    }  # fmt: skip


def fill(buffer: ReplayBuffer, first: int, last: int, envs: int = 1) -> None:
    """Add the stream's rows ``first`` ... ``last`` - 1; each brings ``envs`` rows per task."""
    for number in range(first, last):
        buffer.add(**row(buffer.tasks, envs, number))


def live(tasks: int, envs: int, added: int, capacity: int) -> list[dict[str, Any]]:
    """The rows that must be in the ring after ``added`` calls, oldest first."""
    flat = []
    for number in range(added):
        r = row(tasks, envs, number)
        flat += [
            {
                "obs": r["obs"][:, e], "action": r["action"][:, e],
                "reward": r["step"].reward[:, e, None],
                "next_obs": r["step"].next_obs[:, e],
                "terminated": r["step"].terminated[:, e, None].astype(np.float32),
                "truncated": r["step"].truncated[:, e, None].astype(np.float32),
                **{name: value[:, e] for name, value in r["extras"].items()},
            }
            for e in range(envs)
        ]  # fmt: skip
    return flat[-capacity:]


@given(
    tasks=st.integers(1, 4),
    envs=st.integers(1, 3),
    capacity=st.integers(1, 12),
    slack=st.integers(0, 7),
    calls=st.integers(1, 25),
)
def test_a_sample_holds_live_rows_only_and_whole(
    tmp_path_factory: pytest.TempPathFactory,
    tasks: int, envs: int, capacity: int, slack: int, calls: int,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("ring")
    buffer = make(folder, tasks=tasks, capacity=capacity, slack=slack)
    fill(buffer, 0, calls, envs)
    rows = live(tasks, envs, calls, capacity)
    assert len(buffer) == len(rows) == min(calls * envs, capacity)
    batch = buffer.sample(30)
    drawn = batch._asdict() | batch.extras
    for task in range(tasks):
        by_reward = {float(r["reward"][task, 0]): r for r in rows}
        for n in range(30):
            expected = by_reward[float(batch.reward[task, n, 0])]  # KeyError: a dead row
            for name, value in expected.items():
                got = drawn[name][task, n].numpy()
                assert got.shape == value[task].shape
                np.testing.assert_array_equal(got, value[task], err_msg=name)
    mean = np.mean([r["reward"][:, 0] for r in rows], axis=0)
    np.testing.assert_allclose(batch.mean_reward[:, 0, 0], mean, rtol=1e-5, atol=1e-6)


def test_shapes_and_types_of_a_batch(tmp_path: Path) -> None:
    buffer = make(tmp_path, tasks=3)
    fill(buffer, 0, 4)
    batch = buffer.sample(7)
    assert batch.obs.shape == batch.next_obs.shape == (3, 7, O)
    assert batch.action.shape == (3, 7, A)
    for scalar in (batch.reward, batch.terminated, batch.truncated):
        assert scalar.shape == (3, 7, 1)
        assert scalar.dtype == torch.float32
    assert batch.mean_reward.shape == (3, 1, 1)
    assert {n: (tuple(x.shape), x.dtype) for n, x in batch.extras.items()} == {
        "route": ((3, 7, 3), torch.uint8),
        "genotype": ((3, 7), torch.int32),
        "weight": ((3, 7, 2, 2), torch.float32),
    }


def test_every_live_row_is_as_likely_and_tasks_are_drawn_independently(tmp_path: Path) -> None:
    capacity, draws = 8, 8000
    buffer = make(tmp_path, tasks=2, capacity=capacity, slack=3)
    fill(buffer, 0, 29)  # the ring has wrapped
    batch = buffer.sample(draws)
    rows = live(2, 1, 29, capacity)
    index = np.stack([
        np.searchsorted(*_sorted([r["reward"][task, 0] for r in rows], batch.reward[task, :, 0]))
        for task in range(2)
    ])  # fmt: skip
    joint = np.zeros((capacity, capacity))
    np.add.at(joint, tuple(index), 1)
    expected = draws / capacity**2
    chi2 = ((joint - expected) ** 2 / expected).sum()
    assert chi2 < 63 + 5 * np.sqrt(2 * 63)  # 63 degrees of freedom: uniform and independent


def _sorted(values: list[np.float32], drawn: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    return np.sort(np.array(values)), drawn.numpy()


def test_mean_reward_does_not_drift(tmp_path: Path) -> None:
    buffer = make(tmp_path, capacity=50, extras={})
    big = row(2, 1, 0) | {"extras": {}}
    for scale in (1.0, 1e6, 1.0):  # huge rewards come and go
        for number in range(400):
            step = row(2, 1, number)["step"]._replace(
                reward=np.full((2, 1), scale * (number + 1), np.float32)
            )
            buffer.add(big["obs"], big["action"], step, {})
    mean = np.mean(np.arange(351, 401))
    np.testing.assert_allclose(buffer.sample(1).mean_reward[:, 0, 0], mean, rtol=1e-6)


@given(stop=st.integers(1, 40), more=st.integers(1, 30))
def test_reopened_from_its_state_it_continues_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, stop: int, more: int
) -> None:
    """As a run killed ``more`` rows after a checkpoint: those rows are in the file, and unseen."""
    kept, folder = 6, tmp_path_factory.mktemp("reload")
    slack = 30  # at least the rows written after the checkpoint
    buffer = make(folder, capacity=kept, slack=slack)
    fill(buffer, 0, stop)
    buffer.sample(4)
    state = buffer.state_dict()
    expected = [x for _ in range(3) for x in _arrays(buffer.sample(16))]
    fill(buffer, stop, stop + more)
    buffer.flush()
    again = make(folder, capacity=kept, slack=slack, seed=99)
    again.load_state_dict(state)
    assert len(again) == min(stop, kept)
    got = [x for _ in range(3) for x in _arrays(again.sample(16))]
    for a, b in zip(expected, got, strict=True):
        np.testing.assert_array_equal(a, b)


def _arrays(batch: Any) -> list[np.ndarray]:
    return [x.numpy() for x in (*batch[:7], *batch.extras.values())]


def test_a_state_for_another_file_is_refused(tmp_path: Path) -> None:
    state = make(tmp_path, slack=4).state_dict()
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r"room for 11 rows per task, the checkpoint's had 10"):
        make(tmp_path / "other", slack=5).load_state_dict(state)


def test_file_is_as_large_as_announced_and_claimed_at_once(tmp_path: Path) -> None:
    make(tmp_path, tasks=3, capacity=500, slack=100)
    status = (tmp_path / "state" / "replay.bin").stat()
    assert status.st_size == ReplayBuffer.bytes_needed(suite(3), EXTRAS, 600)
    assert status.st_blocks * 512 >= status.st_size  # a full disk is an error now, not later


def test_ten_million_transitions_fit_into_four_gigabytes() -> None:
    spec = RunSpec.resolve("d2r", "mt50_rand", 0, preset_name="paper")
    mt50 = spec.make_suite().spec
    rows = replay_capacity(spec) + replay_slack(spec)
    assert mt50.num_tasks * replay_capacity(spec) == 10_000_000
    routes = {"route": ((17,), "uint8")}  # 16 modules: 136 connections, a bit each
    assert 3.4e9 < ReplayBuffer.bytes_needed(mt50, {}, rows) < 4e9
    assert ReplayBuffer.bytes_needed(mt50, routes, rows) < 4e9


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_a_clear_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def full(descriptor: int, _: int, size: int) -> None:
        os.ftruncate(descriptor, size // 2)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"no room for the replay buffer \(0\.00 GB\).*replay\.bin"):
        make(tmp_path)
    assert not list((tmp_path / "state").iterdir())


def test_file_systems_without_reservation_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    buffer = make(tmp_path)
    fill(buffer, 0, 9)
    assert len(buffer) == 6


def test_an_empty_buffer_cannot_be_sampled(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="empty"):
        make(tmp_path).sample(1)
