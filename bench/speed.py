"""How fast this machine is at the parts of training: the real networks and simulator, timed."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from algorithms.agent import Agent, Batch
from bench import machine
from bench.replay import ReplayBuffer
from bench.spec import RunSpec
from bench.train import replay_capacity, replay_slack
from suites.base import VectorEnv


class Parts(NamedTuple):
    """Seconds of one act, one lockstep of the simulator and one update."""

    act: float
    step: float
    update: float


class Cost(NamedTuple):
    """What one run needs."""

    seconds: float
    working_bytes: int
    """While it trains: replay and checkpoints."""


class Meter:
    """Estimates what runs cost from a moment's measurement of each.

    A context: runs that follow each other on one suite share its environments, whose building takes
    longer than the measuring, and at the end what was taken is given back to the system, which the
    runs then have for themselves.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._key: tuple[Any, ...] = ()
        self._envs: VectorEnv | None = None

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        machine.give_back_memory(self._device)

    def cost(self, spec: RunSpec, threads: int, budget: float = 1.0) -> Cost:
        """The estimated cost of ``spec``, measured for about ``budget`` seconds."""
        torch.set_num_threads(threads)
        p, suite = spec.protocol, spec.make_suite()
        agent = _agent(spec, self._device)
        parts = measure(spec, agent, self._environments(spec), budget)
        lockstep = parts.act + parts.step
        steps = p.steps_per_task / p.envs_per_task
        updates = (p.steps_per_task - p.warmup_steps) / p.envs_per_task * p.updates_per_step
        during = (p.steps_per_task - 1) // p.eval_every
        episodes = during + 1 if suite.frozen_goals else during * p.eval_episodes + p.final_episodes
        seconds = steps * lockstep + updates * parts.update + episodes * p.horizon * lockstep
        rows = replay_capacity(spec) + replay_slack(spec)
        replay = ReplayBuffer.bytes_needed(suite.spec, agent.extras_spec, rows)
        counts = agent.parameter_counts()
        # Adam keeps two moments of each trained parameter; both critics have a target.
        checkpoint = 4 * (3 * counts["actor"] + 8 * counts["critic"])
        return Cost(seconds, replay + 3 * checkpoint)

    def _environments(self, spec: RunSpec) -> VectorEnv:
        p = spec.protocol
        key = (spec.suite, p.goals, p.reward_version, p.horizon, p.envs_per_task)
        if self._envs is None or key != self._key:
            self._close()
            self._envs, self._key = _environments(spec), key
        return self._envs

    def _close(self) -> None:
        if self._envs is not None:
            self._envs.close()
            self._envs = None


def _environments(spec: RunSpec) -> VectorEnv:
    return spec.make_suite().make(seed=spec.seed, envs_per_task=spec.protocol.envs_per_task)


def measure(spec: RunSpec, agent: Agent, envs: VectorEnv, budget: float) -> Parts:
    """Median seconds of each part, measured for about ``budget`` seconds in all."""
    p, obs = spec.protocol, envs.reset()
    for task in range(agent.suite.num_tasks):
        for env in range(p.envs_per_task):
            agent.on_episode_start(task, env)
    action, extras = agent.act(obs, explore=True)
    act = median_seconds(lambda: agent.act(obs, explore=True), budget / 4)
    step = median_seconds(lambda: envs.step(action), budget / 4, at_most=p.horizon - 2)
    batch = example_batch(agent, p.batch_per_task, extras)
    return Parts(act, step, median_seconds(lambda: agent.update(batch), budget / 2))


def example_batch(agent: Agent, rows: int, extras: dict[str, np.ndarray]) -> Batch:
    """A batch of plausible shape and scale; ``extras`` (T, E, ...) are repeated along the rows."""
    suite, device = agent.suite, agent.device
    rng = np.random.default_rng(0)

    def numbers(width: int) -> torch.Tensor:
        values = rng.random((suite.num_tasks, rows, width), np.float32)
        return torch.from_numpy(values).to(device)

    zero = torch.zeros(suite.num_tasks, rows, 1, device=device)
    return Batch(
        obs=numbers(suite.obs_dim),
        action=2 * numbers(suite.action_dim) - 1,
        reward=numbers(1),
        next_obs=numbers(suite.obs_dim),
        terminated=zero,
        truncated=zero,
        mean_reward=torch.ones(suite.num_tasks, 1, 1, device=device),
        extras={
            name: torch.from_numpy(np.repeat(value[:, :1], rows, axis=1)).to(device)
            for name, value in extras.items()
        },
    )


def median_seconds(action: Callable[[], Any], budget: float, at_most: int = 10_000) -> float:
    """Median duration of ``action`` over about ``budget`` seconds, after one warm-up."""
    action()
    times: list[float] = []
    while not times or (sum(times) < budget and len(times) < at_most):
        started = time.perf_counter()
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return float(np.median(times))


ROUNDS = 5
"""Times that everything is measured, in turns, so that a busy moment falls on all alike."""

PRODUCTS = frozenset({"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"})

PEAK_SHAPE = (1280, 400, 400)
"""Rows, inputs and outputs of the product that stands for what the machine can do: a hidden layer
of the papers' networks on a batch of MT10."""


def speed_rows(
    labels: Sequence[str],
    suites: Sequence[str],
    presets: Sequence[str],
    device: str,
    threads: Sequence[int],
    seconds: float = 6.0,
    overrides: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """A row per algorithm, suite, preset and number of threads, ``seconds`` of measuring each.

    Each figure is the least of `ROUNDS` medians, all rows of one setting being measured in turns.
    ``update_ms``, ``act_ms``, ``step_ms`` (the simulator's): milliseconds per call for all tasks.
    ``ratio``: an update's to that of the first algorithm. ``gflop``: the work of an update's matrix
    products; ``peak_share``: at their rate, against that of one large product (`PEAK_SHAPE`),
    which is measured in the same turns; ``gemm_share``: of an update's time, spent in
    products, without those inside compiled loops (routed modules).
    ``steps_per_second``: training steps of all tasks together, without evaluations.
    """
    machine.keep_freed_memory()
    rows = []
    for suite, preset, count in itertools.product(suites, presets, threads):
        torch.set_num_threads(count)
        specs = [
            RunSpec.resolve(label, suite, 0, preset_name=preset, overrides=overrides)
            for label in labels
        ]
        rows += _setting(labels, specs, device, count, seconds)
    return rows


def _setting(
    labels: Sequence[str],
    specs: Sequence[RunSpec],
    device: str,
    threads: int,
    seconds: float,
) -> list[dict[str, Any]]:
    agents = [_agent(spec, device) for spec in specs]
    rounds, peaks = [], []
    with contextlib.closing(_environments(specs[0])) as envs:  # alike for all algorithms
        for _ in range(ROUNDS):
            peaks.append(peak_gflops(device, seconds / ROUNDS / 4))
            pairs = zip(specs, agents, strict=True)
            rounds.append([measure(spec, agent, envs, seconds / ROUNDS) for spec, agent in pairs])
    rows: list[dict[str, Any]] = []
    for place, (label, spec, agent) in enumerate(zip(labels, specs, agents, strict=True)):
        parts = Parts(*np.min([measured[place] for measured in rounds], axis=0))
        at_once = agent.suite.num_tasks * spec.protocol.envs_per_task
        batch = example_batch(agent, spec.protocol.batch_per_task, _extras(agent))
        gflop = work(agent, batch)
        rows.append(
            {
                "algorithm": label,
                "suite": spec.suite,
                "preset": spec.preset,
                "tasks": agent.suite.num_tasks,
                "batch": spec.protocol.batch_per_task * agent.suite.num_tasks,
                "threads": threads,
                "update_ms": 1e3 * parts.update,
                "ratio": 1e3 * parts.update / rows[0]["update_ms"] if rows else 1.0,
                "gflop": gflop,
                "peak_share": gflop / parts.update / max(peaks),
                "gemm_share": gemm_share(agent, batch),
                "act_ms": 1e3 * parts.act,
                "step_ms": 1e3 * parts.step,
                "steps_per_second": at_once / sum(parts),
            }
        )
    return rows


def simulator_rows(suite: str, seconds: float = 6.0) -> list[dict[str, Any]]:
    """Environment steps/s of our vector environment and of public ones of the same tasks.

    Random actions, all measured in turns; ``ratio``: to the slowest.
    """
    world = RunSpec.resolve("mt_sac", suite, 0).make_suite()
    shape = (world.spec.num_tasks, 1, world.spec.action_dim)
    action = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    with contextlib.ExitStack() as stack:
        steps: dict[str, Callable[[], Any]] = {}
        cores = os.cpu_count() or 1
        for workers in sorted({0, *(2**n for n in range(cores.bit_length())), cores}):
            envs = world.make(seed=0, workers=workers)
            stack.callback(envs.close)
            envs.reset()
            name = f"ours, --sim-workers {workers}"
            steps[name] = partial(envs.step, action)
        for name, peer in world.peers().items():
            steps[name] = stack.enter_context(peer())
        rounds = [
            {name: median_seconds(step, seconds / ROUNDS) for name, step in steps.items()}
            for _ in range(ROUNDS)
        ]
    medians = {name: min(each[name] for each in rounds) for name in steps}
    slowest = max(medians.values())
    return [
        {
            "suite": suite,
            "simulator": name,
            "steps_per_second": world.spec.num_tasks / value,
            "ratio": slowest / value,
        }
        for name, value in medians.items()
    ]


def peak_gflops(device: str, budget: float) -> float:
    """GFLOP/s of a product of `PEAK_SHAPE`, at the threads that are set."""
    rows, inputs, outputs = PEAK_SHAPE
    x = torch.rand(rows, inputs, device=device)
    weight, out = torch.rand(inputs, outputs, device=device), torch.empty(rows, outputs)
    out = out.to(device)
    spent = median_seconds(lambda: torch.mm(x, weight, out=out), budget)
    return 2e-9 * rows * inputs * outputs / spent


def work(agent: Agent, batch: Batch) -> float:
    """GFLOP of the matrix products of an update."""
    with FlopCounterMode(display=False) as counter:
        agent.update(batch)
    return 1e-9 * float(counter.get_total_flops())


def gemm_share(agent: Agent, batch: Batch, updates: int = 3) -> float:
    """Share of an update's operator time that is spent in matrix products."""
    agent.update(batch)
    on_gpu = agent.device.type == "cuda"
    kinds = torch.profiler.ProfilerActivity
    with (
        silent_stderr(),  # the profiler's native part chats there
        torch.profiler.profile(activities=[kinds.CUDA if on_gpu else kinds.CPU]) as profile,
    ):
        for _ in range(updates):
            agent.update(batch)
    spent = {
        event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total
        for event in profile.key_averages()
    }
    products = sum(
        time_
        for name, time_ in spent.items()
        if name in PRODUCTS or (on_gpu and "gemm" in name.lower())
    )
    return float(products / sum(spent.values()))


@contextmanager
def silent_stderr() -> Iterator[None]:
    """Send what native code writes to standard error nowhere."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _extras(agent: Agent) -> dict[str, np.ndarray]:
    """What the agent stores with a transition, of one environment per task."""
    obs = np.zeros((agent.suite.num_tasks, 1, agent.suite.obs_dim), np.float32)
    return agent.act(obs, explore=True).extras


def _agent(spec: RunSpec, device: str) -> Agent:
    suite = spec.make_suite().spec
    return spec.agent(suite, spec.agent_config, spec.protocol.plan, seed=spec.seed, device=device)
