"""How fast this machine is at the parts of training: the real networks and simulator, timed."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from algorithms.agent import Agent, Batch
from bench import machine
from bench.replay import ReplayBuffer
from bench.spec import RunSpec
from bench.store import RunStore
from bench.train import replay_capacity, replay_slack, train
from suites.base import SuiteSpec, VectorEnv


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
        agent = spec.make_agent(self._device)
        parts = measure(spec, agent, self._environments(spec), budget)
        lockstep = parts.act + parts.step
        steps = p.steps_per_task / p.envs_per_task
        updates = (p.steps_per_task - p.warmup_steps) / p.envs_per_task * p.updates_per_step
        during = (p.steps_per_task - 1) // p.eval_every
        episodes = during + 1 if suite.frozen_goals else during * p.eval_episodes + p.final_episodes
        # Evaluation steps one environment of each task.
        evaluating = episodes * p.horizon * lockstep / p.envs_per_task
        seconds = steps * lockstep + updates * parts.update + evaluating
        rows = replay_capacity(spec) + replay_slack(spec)
        replay = ReplayBuffer.bytes_needed(suite.spec, agent.extras_spec, rows)
        counts = agent.parameter_counts()
        # Adam keeps two moments of each trained parameter; both critics have a target.
        checkpoint = 4 * (3 * counts["actor"] + 8 * counts["critic"])
        return Cost(seconds, replay + 3 * checkpoint)

    def _environments(self, spec: RunSpec) -> VectorEnv:
        key = _world(spec)
        if self._envs is None or key != self._key:
            self._close()
            self._envs, self._key = _environments(spec), key
        return self._envs

    def _close(self) -> None:
        if self._envs is not None:
            self._envs.close()
            self._envs = None


def _world(spec: RunSpec) -> tuple[Any, ...]:
    """Specifications of one world can be measured in the same environments."""
    p = spec.protocol
    return (spec.suite, p.goals, p.reward_version, p.horizon, p.envs_per_task)


def _environments(spec: RunSpec) -> VectorEnv:
    return spec.make_suite().make(seed=spec.seed, envs_per_task=spec.protocol.envs_per_task)


def measure(spec: RunSpec, agent: Agent, envs: VectorEnv, budget: float) -> Parts:
    """Median seconds of each part, measured for about ``budget`` seconds in all.

    A step of the simulator has its share of the reset that ends an episode.
    """
    p, device = spec.protocol, str(agent.device)
    obs = envs.reset()
    started = time.perf_counter()
    envs.reset()
    reset = (time.perf_counter() - started) / p.horizon
    for task in range(agent.suite.num_tasks):
        for env in range(p.envs_per_task):
            agent.on_episode_start(task, env)
    extras = agent.act(obs, explore=True).extras
    act = median_seconds(lambda: agent.act(obs, explore=True), budget / 4, device)
    actions = random_actions(agent.suite, p.envs_per_task)
    step = median_seconds(
        lambda: envs.step(next(actions)), budget / 4, at_most=max(1, p.horizon - 2)
    )
    batch = example_batch(agent, p.batch_per_task, extras)
    update = median_seconds(lambda: agent.update(batch), budget / 2, device)
    return Parts(act, step + reset, update)


def random_actions(suite: SuiteSpec, envs: int) -> Iterator[np.ndarray]:
    """Actions (T, envs, A), another at each step: one that stays drives an arm to its end."""
    shape = (100, suite.num_tasks, envs, suite.action_dim)
    return itertools.cycle(np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32))


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


def median_seconds(
    action: Callable[[], Any], budget: float, device: str = "cpu", at_most: int = 10_000
) -> float:
    """Median duration of ``action`` on ``device``, of at least `LEAST` times, after one warm-up."""

    def once() -> float:
        started = time.perf_counter()
        action()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    once()
    times: list[float] = []
    while len(times) < min(LEAST, at_most) or (sum(times) < budget and len(times) < at_most):
        times.append(once())
    return float(np.median(times))


LEAST = 3
"""Times that anything is measured in each round."""

ROUNDS = 5
"""Times that everything is measured, in turns, so that a busy moment falls on all alike."""

TRAINING_ROUNDS = 3
"""Times that real training is measured, in turns."""

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
    compiled: bool = False,
) -> list[dict[str, Any]]:
    """A row per algorithm, suite, preset and number of threads, ``seconds`` of measuring each.

    ``compiled``: and one with its networks by `torch.compile`.

    Each figure is the least of `ROUNDS` medians, all rows of one setting being measured in turns.
    ``update_ms``, ``act_ms``, ``step_ms`` (the simulator's): milliseconds per call for all tasks.
    ``ratio``: an update's to that of the first algorithm. ``gflop``: the work of an update's matrix
    products, as plain backpropagation makes them; ``peak_share``: at their rate, against that of
    one large product (`PEAK_SHAPE`), which is measured in the same turns.
    ``steps_per_second``: training steps of all tasks together, without evaluations.
    """
    machine.keep_freed_memory()
    settings = [
        [
            RunSpec.resolve(label, suite, 0, preset_name=preset, overrides=overrides)
            for label in labels
        ]
        for suite, preset in itertools.product(suites, presets)
    ]
    rows = []
    for specs, count in itertools.product(settings, threads):
        torch.set_num_threads(count)
        rows += _setting(labels, specs, device, count, seconds, compiled)
    return rows


def _setting(
    labels: Sequence[str],
    specs: Sequence[RunSpec],
    device: str,
    threads: int,
    seconds: float,
    compiled: bool,
) -> list[dict[str, Any]]:
    ways = [False, True] if compiled else [False]
    pairs = itertools.product(zip(labels, specs, strict=True), ways)
    entries = [(label, spec, spec.make_agent(device), way) for (label, spec), way in pairs]
    for _, _, agent, way in entries:
        if way:
            agent.compile()
    rounds, peaks = [], []
    with contextlib.ExitStack() as stack:
        worlds: dict[tuple[Any, ...], VectorEnv] = {}
        for spec in specs:
            if _world(spec) not in worlds:
                envs = stack.enter_context(contextlib.closing(_environments(spec)))
                worlds[_world(spec)] = envs
        for _ in range(ROUNDS):
            peaks.append(peak_gflops(device, seconds / ROUNDS / 4))
            rounds.append(
                [
                    measure(spec, agent, worlds[_world(spec)], seconds / ROUNDS)
                    for _, spec, agent, _ in entries
                ]
            )
    rows: list[dict[str, Any]] = []
    for place, (label, spec, agent, way) in enumerate(entries):
        parts = Parts(*np.min([measured[place] for measured in rounds], axis=0))
        at_once = agent.suite.num_tasks * spec.protocol.envs_per_task
        p = spec.protocol
        batch = example_batch(agent, p.batch_per_task, _extras(agent, p.envs_per_task))
        gflop = rows[-1]["gflop"] if way else work(agent, batch)  # counted operation by operation
        learning = spec.protocol.updates_per_step * parts.update
        rows.append(
            {
                "algorithm": label,
                "compiled": way,
                "suite": spec.suite,
                "preset": spec.preset,
                "tasks": agent.suite.num_tasks,
                "batch": spec.protocol.batch_per_task * agent.suite.num_tasks,
                "threads": threads,
                "update_ms": 1e3 * parts.update,
                "ratio": 1e3 * parts.update / rows[0]["update_ms"] if rows else 1.0,
                "gflop": gflop,
                "peak_share": gflop / parts.update / max(peaks),
                "act_ms": 1e3 * parts.act,
                "step_ms": 1e3 * parts.step,
                "steps_per_second": at_once / (parts.act + parts.step + learning),
            }
        )
    return rows


def training_rows(
    labels: Sequence[str],
    suite: str,
    preset: str,
    device: str,
    threads: int,
    steps: int,
    overrides: Mapping[str, Any] | None = None,
    workers: int = 0,
    compiled: bool = False,
) -> list[dict[str, Any]]:
    """A `training_row` per algorithm, in turns; ``compiled``: and one by `torch.compile`."""
    ways = itertools.product(labels, [False, True] if compiled else [False])
    return in_turns(
        [
            partial(
                training_row, label, suite, preset, device, threads, steps,
                overrides=dict(overrides or {}), workers=workers, compiled=way,
            )
            for label, way in ways
        ]
    )  # fmt: skip


def in_turns(
    measurements: Sequence[Callable[[], dict[str, Any]]], rounds: int = TRAINING_ROUNDS
) -> list[dict[str, Any]]:
    """Of each measurement of ``steps_per_second``, repeated in turns, the median one, with the
    rates of the ``slowest`` and the ``fastest``."""
    rows = []
    for found in zip(
        *([measure() for measure in measurements] for _ in range(rounds)), strict=True
    ):
        ordered = sorted(found, key=lambda row: row["steps_per_second"])
        ends = {"slowest": ordered[0], "fastest": ordered[-1]}
        rows.append(
            ordered[rounds // 2] | {name: row["steps_per_second"] for name, row in ends.items()}
        )
    return rows


def training_row(
    label: str,
    suite: str,
    preset: str,
    device: str,
    threads: int,
    steps: int,
    *,
    overrides: Mapping[str, Any],
    workers: int = 0,
    compiled: bool = False,
) -> dict[str, Any]:
    """What real training of ``steps`` per task brings after the warm-up and an episode that
    learns, on disk for as long as it takes; ``workers``: processes it simulates in.

    ``steps_per_second``: of all tasks together, outside evaluations and checkpoints; ``update``
    (sampling included), ``simulator``, ``act`` and ``rest``: their shares of that time;
    ``evaluation_steps_per_second``: of all tasks together in the final evaluation.
    """
    torch.set_num_threads(threads)
    resolve = partial(RunSpec.resolve, label, suite, 0, preset_name=preset)
    p = resolve(overrides=overrides).protocol
    unit = p.episode_steps
    warmup, length = (max(1, -(-count // unit)) * unit for count in (p.warmup_steps, steps))
    begin, end = warmup + unit, warmup + unit + length
    once = {"steps_per_task": end, "eval_every": end, "final_episodes": 1}
    kept = {key: value for key, value in overrides.items() if key.rpartition(".")[2] not in once}
    spec = resolve(overrides=kept | once)
    with tempfile.TemporaryDirectory(prefix="bench-speed-") as folder:
        facts = machine.environment(device, threads, compiled)
        store = RunStore.create(Path(folder), spec, facts)
        # Without a pause between checkpoints it records times at each episode's end.
        train(
            spec, store, device=device, compiled=compiled, workers=workers, checkpoint_seconds=0.0
        )
        rows = pd.read_csv(store.path / "timing.csv")
    cumulative = rows.pivot_table("seconds", "step", "section", aggfunc="max").fillna(0.0)
    spent = (cumulative.loc[end] - cumulative.loc[begin]).to_dict()
    whole = spent["total"] - spent["evaluation"] - spent["checkpoint"]
    shares = {part: spent[part] / whole for part in ("update", "simulator", "act")}
    tasks = spec.make_suite().spec.num_tasks
    return {
        "algorithm": spec.title,
        "compiled": compiled,
        "suite": spec.suite,
        "preset": spec.preset,
        "threads": threads,
        "sim_workers": workers,
        "steps": length,
        "steps_per_second": tasks * length / whole,
        **shares,
        "rest": 1 - sum(shares.values()),
        "evaluation_steps_per_second": tasks * spec.protocol.horizon / spent["evaluation"],
    }


def simulator_rows(specs: Sequence[RunSpec], rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Environment steps/s of our vector environment and of public ones of the same tasks, once for
    each world of ``specs``.

    Each steps an episode's length with random actions, resets included, in turns, ``rounds`` times;
    ``ratio``: to the slowest.
    """
    worlds = {_world(spec): spec for spec in specs}
    return [row for spec in worlds.values() for row in _simulators(spec, rounds)]


def _simulators(spec: RunSpec, rounds: int) -> list[dict[str, Any]]:
    world, suite = spec.make_suite(), spec.suite
    horizon, tasks = world.spec.horizon, world.spec.num_tasks
    with contextlib.ExitStack() as stack:
        steps: dict[str, Callable[[], Any]] = {}
        most = min(machine.cores(), tasks)
        for workers in sorted({0, *(2**n for n in range(most.bit_length())), most}):
            envs = stack.enter_context(contextlib.closing(world.make(seed=0, workers=workers)))
            envs.reset()
            actions = random_actions(world.spec, 1)
            steps[f"ours, --sim-workers {workers}"] = partial(_step, envs, actions)
        for name, peer in world.peers().items():
            steps[name] = stack.enter_context(peer(horizon))
        for step in steps.values():  # a first episode of each, to warm up
            _episode(step, horizon)
        times = [
            {name: _episode(step, horizon) for name, step in steps.items()} for _ in range(rounds)
        ]
    medians = {name: float(np.median([each[name] for each in times])) for name in steps}
    slowest = max(medians.values())
    return [
        {
            "suite": suite,
            "horizon": horizon,
            "simulator": name,
            "steps_per_second": tasks * horizon / value,
            "ratio": slowest / value,
        }
        for name, value in medians.items()
    ]


def _step(envs: VectorEnv, actions: Iterator[np.ndarray]) -> None:
    envs.step(next(actions))


def _episode(step: Callable[[], Any], horizon: int) -> float:
    """Seconds of ``horizon`` steps."""
    started = time.perf_counter()
    for _ in range(horizon):
        step()
    return time.perf_counter() - started


def peak_gflops(device: str, budget: float) -> float:
    """GFLOP/s of a product of `PEAK_SHAPE`, at the threads that are set."""
    rows, inputs, outputs = PEAK_SHAPE
    x = torch.rand(rows, inputs, device=device)
    weight, out = torch.rand(inputs, outputs, device=device), torch.empty(rows, outputs)
    out = out.to(device)
    spent = median_seconds(lambda: torch.mm(x, weight, out=out), budget, device)
    return 2e-9 * rows * inputs * outputs / spent


def work(agent: Agent, batch: Batch) -> float:
    """GFLOP of the matrix products of an update."""
    with FlopCounterMode(display=False) as counter:
        agent.update(batch)
    return 1e-9 * float(counter.get_total_flops())


def _extras(agent: Agent, envs: int) -> dict[str, np.ndarray]:
    """What the agent stores with the transitions of ``envs`` environments per task."""
    obs = np.zeros((agent.suite.num_tasks, envs, agent.suite.obs_dim), np.float32)
    return agent.act(obs, explore=True).extras
