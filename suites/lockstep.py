"""T x E simulators stepped in lockstep, in this process or spread over worker processes.

A `Shard` steps some of the environments and writes what they return to its rows of shared arrays.
It is the same object in this process and in a worker, and each environment has a generator of
its own, so trajectories do not depend on the number of workers. Workers are spawned (never forked, so
torch's threads are no danger), share anonymous memory without a name that could leak, and take
commands of a few bytes through a pipe whose end is the end of the worker: a parent that dies ends
its workers, and a worker that dies is noticed at once.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from suites.base import Episode, SimulatorError, Step, SuiteSpec, VectorEnv

_CLOSE_SECONDS = 5.0
_IDLE = -1


class Simulator(ABC):
    """One environment of one task, never terminating, with a generator of its own."""

    seed: int
    """What the generator was last seeded with."""

    @abstractmethod
    def reset(self, seed: int | None = None) -> np.ndarray:
        """Start an episode, after re-seeding if ``seed`` is given; returns the observation (O,)."""

    @abstractmethod
    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool]:
        """Apply an action (A,) float32; returns observation (O,), reward and success."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """JSON-able: what `restart` needs to begin the current episode again."""

    @abstractmethod
    def restart(self, state: dict[str, Any]) -> np.ndarray:
        """Begin the episode during which `state` was called; returns the observation (O,)."""

    def close(self) -> None:  # noqa: B027  (most simulators have nothing to release)
        """Release what the simulator holds."""


class Arrays:
    """What shards share: arrays over one buffer, a row per environment (task-major), and a cell per shard."""

    def __init__(self, spec: SuiteSpec, rows: int, shards: int, shared: bool) -> None:
        self.layout: dict[str, tuple[tuple[int, ...], str]] = {
            "reward": ((rows,), "<f8"),
            "current": ((shards,), "<i8"),
            "action": ((rows, spec.action_dim), "<f4"),
            "obs": ((rows, spec.obs_dim), "<f4"),
            "next_obs": ((rows, spec.obs_dim), "<f4"),
            "success": ((rows,), "?"),
        }
        size = sum(int(np.prod(s)) * np.dtype(d).itemsize for s, d in self.layout.values())
        context = multiprocessing.get_context("spawn")
        self.buffer: Any = context.RawArray("B", size) if shared else bytearray(size)
        self._carve()

    def _carve(self) -> None:
        views, offset = {}, 0
        for name, (shape, dtype) in self.layout.items():
            count = int(np.prod(shape))
            view = np.frombuffer(self.buffer, dtype, count, offset).reshape(shape)
            views[name], offset = view, offset + view.nbytes
        self.reward = views["reward"]  # (n,) float64
        self.current = views["current"]  # (shards,) the row being worked on, or _IDLE
        self.action, self.obs, self.next_obs = views["action"], views["obs"], views["next_obs"]
        self.success = views["success"]  # (n,) bool

    def __getstate__(self) -> dict[str, Any]:
        return {"layout": self.layout, "buffer": self.buffer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._carve()


class Shard(ABC):
    """Some of the environments: reads actions from and writes results to their rows of arrays."""

    @abstractmethod
    def reset(self, seeds: dict[int, int] | None) -> None:
        """Start an episode everywhere, after re-seeding with ``seeds`` (row -> seed) if given."""

    @abstractmethod
    def step(self, reset: bool) -> None:
        """Apply the actions in the arrays, then start the next episode if ``reset``."""

    @abstractmethod
    def states(self) -> dict[int, dict[str, Any]]:
        """Row -> what `restart` needs to begin its current episode again, JSON-able."""

    @abstractmethod
    def restart(self, states: dict[int, dict[str, Any]]) -> None:
        """Begin the episodes of ``states`` (row -> state)."""

    def close(self) -> None:  # noqa: B027  (most shards have nothing to release)
        """Release what the shard holds."""


class SimulatorShard(Shard):
    """A shard of simulators stepped one after the other."""

    def __init__(
        self,
        number: int,
        rows: Sequence[int],
        arrays: Arrays,
        *,
        labels: Sequence[str],
        makers: Sequence[Callable[[], Simulator]],
    ) -> None:
        """``labels`` and ``makers`` of all environments, of which ``rows`` are this shard's."""
        self._number, self._labels, self._arrays = number, labels, arrays
        self._simulators: dict[int, Simulator] = {}

        def make(row: int) -> None:
            self._simulators[row] = makers[row]()

        self._each(rows, make)

    def reset(self, seeds: dict[int, int] | None) -> None:
        def start(row: int) -> None:
            seed = None if seeds is None else seeds[row]
            self._arrays.obs[row] = self._simulators[row].reset(seed)

        self._each(self._simulators, start)

    def step(self, reset: bool) -> None:
        arrays, simulators = self._arrays, self._simulators

        def advance(row: int) -> None:
            simulator = simulators[row]
            next_obs, reward, success = simulator.step(arrays.action[row])
            arrays.next_obs[row] = next_obs
            arrays.reward[row] = reward
            arrays.success[row] = success
            if reset:
                arrays.obs[row] = simulator.reset()

        self._each(simulators, advance)

    def states(self) -> dict[int, dict[str, Any]]:
        return {row: simulator.state() for row, simulator in self._simulators.items()}

    def restart(self, states: dict[int, dict[str, Any]]) -> None:
        def start(row: int) -> None:
            self._arrays.obs[row] = self._simulators[row].restart(states[row])

        self._each(self._simulators, start)

    def close(self) -> None:
        for simulator in self._simulators.values():
            simulator.close()

    def _each(
        self, rows: Sequence[int] | dict[int, Simulator], work: Callable[[int], None]
    ) -> None:
        current = self._arrays.current
        for row in rows:
            current[self._number] = row
            try:
                work(row)
            except Exception as error:
                simulator = self._simulators.get(row)
                seeded = "" if simulator is None else f", last seeded with {simulator.seed}"
                raise SimulatorError(
                    f"{self._labels[row]}{seeded}: {type(error).__name__}: {error}"
                ) from error
        current[self._number] = _IDLE


def _serve(connection: Connection, make_shard: Callable[[], Shard]) -> None:
    """A worker's life: build its shard, then obey until told to close or the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            shard = make_shard()
            connection.send((None, None))
            while True:
                method, args = connection.recv()
                connection.send((getattr(shard, method)(*args), None))
                if method == "close":
                    return
        except SimulatorError as error:
            connection.send((None, (str(error), traceback.format_exc())))


class _Worker:
    """A shard in a process of its own."""

    def __init__(self, number: int, make_shard: Callable[[], Shard]) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, make_shard), name=f"simulators-{number}", daemon=True
        )
        self.process.start()
        theirs.close()  # else the pipe would outlive the worker and its death go unnoticed

    def submit(self, method: str, *args: Any) -> None:
        """Start a call."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # `result` tells
            self._connection.send((method, args))

    def result(self) -> Any:
        """Wait for the call's end. Raises EOFError if the worker is dead."""
        try:
            value, failure = self._connection.recv()
        except ConnectionResetError as error:
            raise EOFError from error
        if failure is not None:
            message, trace = failure
            error = SimulatorError(message)
            error.add_note(f"In a worker process:\n{trace}")
            raise error
        return value

    def end(self) -> str:
        """How a dead worker died."""
        self.process.join(_CLOSE_SECONDS)
        return f"worker process {self.process.name} ended with exit code {self.process.exitcode}"

    def close(self) -> None:
        """End the process; safe to call on a dead one."""
        self.submit("close")
        self.process.join(_CLOSE_SECONDS)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self._connection.close()
        self.process.close()


class _Local:
    """A shard in this process."""

    def __init__(self, make_shard: Callable[[], Shard]) -> None:
        self._shard, self._value = make_shard(), None

    def submit(self, method: str, *args: Any) -> None:
        """Make a call."""
        self._value = getattr(self._shard, method)(*args)

    def result(self) -> Any:
        """What the call returned."""
        return self._value

    def close(self) -> None:
        self._shard.close()


class LockstepEnv(VectorEnv):
    """A `VectorEnv` over simulators that all start, and at the horizon end, together."""

    def __init__(
        self,
        spec: SuiteSpec,
        make_shard: Callable[[int, Sequence[int], Arrays], Shard],
        seeds: Sequence[int],
        *,
        envs_per_task: int,
        workers: int,
        autoreset: bool,
    ) -> None:
        """``make_shard`` (number, rows, arrays), pickled if there are workers, makes the shards.

        ``seeds``: what the environments' generators are seeded with, task-major. Raises
        ValueError for numbers out of range, SimulatorError if an environment cannot be made.
        """
        if envs_per_task < 1 or workers < 0:
            raise ValueError(f"envs_per_task {envs_per_task} < 1 or workers {workers} < 0")
        self.spec, self.envs_per_task = spec, envs_per_task
        self._autoreset = autoreset
        self._seeds = list(seeds)
        self._clock: int | None = None  # steps into the episodes; None: there are none yet
        rows = len(self._seeds)
        shards = max(1, min(workers, rows))
        self._shape = (spec.num_tasks, envs_per_task)
        self._arrays = Arrays(spec, rows, shards, shared=workers > 0)
        self._return = np.zeros(rows)
        self._success = np.zeros(rows, bool)
        self._rows = [range(number, rows, shards) for number in range(shards)]
        self._shards: list[_Local | _Worker] = []
        for number, its in enumerate(self._rows):
            make = partial(make_shard, number, its, self._arrays)
            self._shards.append(_Worker(number, make) if workers else _Local(make))
        if workers:
            self._collect()  # what building them brought

    def reset(self, seeds: np.ndarray | None = None) -> np.ndarray:
        self._clock = None
        if seeds is None:
            self._call("reset", None)
        else:
            flat = check_seeds(seeds, self._shape)
            self._seeds = flat
            self._call("reset", dict(enumerate(flat)))
        return self._begin()

    def step(self, action: np.ndarray) -> Step:
        if self._clock is None or self._clock == self.spec.horizon:
            raise RuntimeError("the episodes have ended or none was started: call reset() first")
        self._arrays.action[:] = self._check(action)
        self._clock += 1
        ends = self._clock == self.spec.horizon
        self._call("step", ends and self._autoreset)
        arrays = self._arrays
        self._return += arrays.reward
        self._success |= arrays.success
        next_obs = self._tasks(arrays.next_obs)
        step = Step(
            obs=self._tasks(arrays.obs) if ends and self._autoreset else next_obs.copy(),
            next_obs=next_obs,
            reward=self._tasks(arrays.reward).astype(np.float32),
            terminated=np.zeros(self._shape, bool),
            truncated=np.full(self._shape, ends),
            episodes=self._episodes() if ends else [],
        )
        if ends and self._autoreset:
            self._begin()
        return step

    def state_dict(self) -> dict[str, Any]:
        if self._clock != 0:
            raise RuntimeError("the state is defined at episode boundaries only")
        states: dict[int, dict[str, Any]] = {}
        for part in self._call("states"):
            states |= part
        return {
            "suite": self.spec.name,
            "envs_per_task": self.envs_per_task,
            "environments": [states[row] for row in range(len(states))],
        }

    def load_state_dict(self, state: dict[str, Any]) -> np.ndarray:
        check_state(state, self)
        self._clock = None
        self._call("restart", dict(enumerate(state["environments"])))
        return self._begin()

    def close(self) -> None:
        for shard in self._shards:
            shard.close()
        self._shards = []
        self._clock = None

    def _begin(self) -> np.ndarray:
        self._clock = 0
        self._return[:] = 0.0
        self._success[:] = False
        return self._tasks(self._arrays.obs)

    def _tasks(self, rows: np.ndarray) -> np.ndarray:
        """(n, ...) -> a fresh (T, E, ...)."""
        return rows.reshape(*self._shape, *rows.shape[1:]).copy()

    def _episodes(self) -> list[Episode]:
        return [
            Episode(
                *divmod(row, self.envs_per_task),
                return_=float(self._return[row]),
                success=bool(self._success[row]),
                length=self.spec.horizon,
            )
            for row in range(len(self._return))
        ]

    def _check(self, action: np.ndarray) -> np.ndarray:
        action = np.asarray(action, np.float32)
        if action.shape != (*self._shape, self.spec.action_dim):
            raise ValueError(
                f"actions of shape {action.shape}, not {(*self._shape, self.spec.action_dim)}"
            )
        rows = action.reshape(-1, self.spec.action_dim)
        if not np.isfinite(rows).all():
            row = int(np.argmax(~np.isfinite(rows).all(1)))
            raise SimulatorError(f"{self._seeded(row)}: action {rows[row].tolist()} is not finite")
        return rows

    def _call(self, method: str, *args: Any) -> list[Any]:
        if not self._shards:
            raise RuntimeError("the environments are closed")
        try:
            for shard in self._shards:
                shard.submit(method, *args)
        except BaseException:
            self.close()
            raise
        return self._collect()

    def _collect(self) -> list[Any]:
        """The results of all shards; a failure closes the environments and is raised."""
        results = []
        try:
            for number, shard in enumerate(self._shards):
                try:
                    results.append(shard.result())
                except EOFError:
                    raise SimulatorError(self._obituary(number)) from None
        except BaseException:  # also Ctrl-C: a half-collected answer must not meet the next call
            self.close()
            raise
        return results

    def _obituary(self, number: int) -> str:
        worker = self._shards[number]
        assert isinstance(worker, _Worker)
        row = int(self._arrays.current[number])
        rows = self._rows[number] if row == _IDLE else [row]
        doing = "while it held" if row == _IDLE else "in"
        return f"{worker.end()} {doing} " + "; ".join(self._seeded(row) for row in rows)

    def _seeded(self, row: int) -> str:
        label = labels(self.spec, self.envs_per_task)[row]
        return f"{label}, last seeded with {self._seeds[row]}"


def labels(spec: SuiteSpec, envs_per_task: int) -> list[str]:
    """What error messages call the environments, task-major."""
    return [
        f"task {t!r}, environment {env}" for t in spec.task_names for env in range(envs_per_task)
    ]


def check_seeds(seeds: np.ndarray, shape: tuple[int, int]) -> list[int]:
    """Seeds (T, E) as a task-major list of ints. Raises ValueError if they are anything else."""
    seeds = np.asarray(seeds)
    if seeds.shape != shape or (seeds.dtype != object and seeds.dtype.kind not in "iu"):
        raise ValueError(f"seeds: {seeds.dtype} {seeds.shape}, not integers {shape}")
    flat = [int(seed) for seed in seeds.ravel()]
    if min(flat) < 0:
        raise ValueError(f"seeds: {min(flat)} is negative")
    return flat


def check_state(state: dict[str, Any], env: VectorEnv) -> None:
    """Raises ValueError if ``state`` was not taken from environments like ``env``."""
    for key, own in (("suite", env.spec.name), ("envs_per_task", env.envs_per_task)):
        if state.get(key) != own:
            raise ValueError(f"the state is of {key} {state.get(key)!r}, not {own!r}")
