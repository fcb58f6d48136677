"""T x E environments stepped in lockstep, in this process or spread over worker processes.

A `Shard` steps some of the environments and writes what they return to its rows of shared arrays.
It is the same object here and in a worker, and each environment has a generator of its own, so
trajectories do not depend on the number of workers. Workers are spawned (a fork could inherit a
lock held by one of torch's threads), share anonymous memory, without a name that could leak, and
take commands of a few bytes through a pipe. The pipe's end is the worker's end: a parent that
dies, however it dies, ends its workers, and a worker that dies is noticed at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from multiprocessing.util import Finalize
from typing import Any

import numpy as np

from suites.base import Episode, RenderError, SimulatorError, Step, SuiteSpec, VectorEnv

_CLOSE_SECONDS = 5.0
_IDLE = -1


class Arrays:
    """What the shards share: arrays over one buffer, with a row per environment, task-major."""

    action: np.ndarray  # (n, A) float32
    obs: np.ndarray  # (n, O) float32, of a reset
    next_obs: np.ndarray  # (n, O) float32, of a step
    reward: np.ndarray  # (n,) float64
    success: np.ndarray  # (n,) bool
    current: np.ndarray  # (shards,) int64: the row a shard is working on, or _IDLE

    def __init__(self, spec: SuiteSpec, rows: int, shards: int, *, shared: bool) -> None:
        self._layout: dict[str, tuple[tuple[int, ...], str]] = {  # widest first: all aligned
            "current": ((shards,), "i8"),
            "reward": ((rows,), "f8"),
            "action": ((rows, spec.action_dim), "f4"),
            "obs": ((rows, spec.obs_dim), "f4"),
            "next_obs": ((rows, spec.obs_dim), "f4"),
            "success": ((rows,), "?"),
        }
        size = sum(int(np.prod(s)) * np.dtype(d).itemsize for s, d in self._layout.values())
        context = multiprocessing.get_context("spawn")
        self._buffer: Any = context.RawArray("B", size) if shared else bytearray(size)
        self._carve()
        self.current[:] = _IDLE

    def _carve(self) -> None:
        offset = 0
        for name, (shape, dtype) in self._layout.items():
            count = int(np.prod(shape))
            array = np.frombuffer(self._buffer, dtype, count, offset).reshape(shape)
            setattr(self, name, array)
            offset += array.nbytes

    def __getstate__(self) -> tuple[Any, ...]:
        return self._layout, self._buffer

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._layout, self._buffer = state
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

    def render(self, rows: Sequence[int]) -> dict[int, np.ndarray]:
        """Pictures (H, W, 3) uint8 of those of the rows that are the shard's."""
        raise RenderError("this suite has no pictures")

    def close(self) -> None:  # noqa: B027  (most shards have nothing to release)
        """Release what the shard holds."""


class Simulator(ABC):
    """One environment that never terminates, with a generator of its own."""

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

    def render(self) -> np.ndarray:
        """A picture (H, W, 3) uint8 of the simulator as it stands."""
        raise RenderError("this simulator has no pictures")

    def close(self) -> None:  # noqa: B027  (most simulators have nothing to release)
        """Release what the simulator holds."""


class SimulatorShard(Shard):
    """A shard of simulators that are stepped one after the other."""

    def __init__(
        self,
        number: int,
        rows: Sequence[int],
        arrays: Arrays,
        *,
        makers: Sequence[Callable[[], Simulator]],
    ) -> None:
        """``makers`` of all environments, of which ``rows`` are this shard's."""
        self._number, self._arrays = number, arrays
        self._simulators: dict[int, Simulator] = {}

        def make(row: int) -> None:
            self._simulators[row] = makers[row]()

        self._each(rows, make)

    def reset(self, seeds: dict[int, int] | None) -> None:
        """One after the other."""

        def start(row: int) -> None:
            seed = None if seeds is None else seeds[row]
            self._arrays.obs[row] = self._simulators[row].reset(seed)

        self._each(self._simulators, start)

    def step(self, reset: bool) -> None:
        """One after the other."""
        arrays, simulators = self._arrays, self._simulators

        def advance(row: int) -> None:
            simulator = simulators[row]
            arrays.next_obs[row], arrays.reward[row], arrays.success[row] = simulator.step(
                arrays.action[row]
            )
            if reset:
                arrays.obs[row] = simulator.reset()

        self._each(simulators, advance)

    def states(self) -> dict[int, dict[str, Any]]:
        """Row -> `Simulator.state`."""
        return {row: simulator.state() for row, simulator in self._simulators.items()}

    def restart(self, states: dict[int, dict[str, Any]]) -> None:
        """One after the other."""

        def start(row: int) -> None:
            self._arrays.obs[row] = self._simulators[row].restart(states[row])

        self._each(self._simulators, start)

    def render(self, rows: Sequence[int]) -> dict[int, np.ndarray]:
        """One after the other."""
        return {row: self._simulators[row].render() for row in rows if row in self._simulators}

    def close(self) -> None:
        """Close all simulators."""
        for simulator in self._simulators.values():
            simulator.close()

    def _each(self, rows: Iterable[int], work: Callable[[int], None]) -> None:
        current = self._arrays.current
        for row in rows:
            current[self._number] = row  # if this process is killed, the parent reads it here
            try:
                work(row)
            except Exception as error:
                raise _RowError(row, f"{type(error).__name__}: {error}") from error
        current[self._number] = _IDLE


class _RowError(Exception):
    """The environment of this row failed."""

    def __init__(self, row: int, cause: str, trace: str = "") -> None:
        super().__init__(row, cause, trace)
        self.row, self.cause, self.trace = row, cause, trace


class _DeadWorkerError(Exception):
    """A worker process is gone; says how it ended."""


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
        """Close the shard."""
        self._shard.close()


class _Worker:
    """A shard in a process of its own. The first `result` is that of making it."""

    def __init__(self, name: str, make_shard: Callable[[], Shard]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, make_shard), name=name, daemon=True
        )
        self._process.start()
        theirs.close()  # while a copy is open here, the worker's death would not end the pipe
        # Also when this process ends without `close`: a worker heeds nothing but its pipe.
        self._end = Finalize(self, _end, (self._pipe, self._process), exitpriority=0)

    def submit(self, method: str, *args: Any) -> None:
        """Start a call."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # `result` will tell
            self._pipe.send((method, args))

    def result(self) -> Any:
        """Wait for what the call returns. Raises _RowError or _DeadWorkerError."""
        try:
            value, error = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join(_CLOSE_SECONDS)
            end = f"{self._process.name} ended with exit code {self._process.exitcode}"
            raise _DeadWorkerError(end) from None
        if error is not None:
            raise error
        return value

    def close(self) -> None:
        """End the process, also one that is dead or does not listen."""
        self.submit("close")
        self._end()


def _end(pipe: Any, process: Any) -> None:
    """End a worker, which sees the pipe's end once it has done what it is at."""
    pipe.close()
    process.join(_CLOSE_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
    process.close()


_PR_SET_PDEATHSIG = 1
"""Of Linux's prctl: the signal that a process gets when its parent ends (the thread of it that
started the process: make environments in one that lives as long as they do)."""


def _serve(pipe: Any, make_shard: Callable[[], Shard]) -> None:
    """A worker's life: make the shard, then obey until told to close or the parent is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # sent to all processes: the parent decides
    if sys.platform == "linux":  # one that hangs never looks at its pipe
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        parent = multiprocessing.parent_process()
        if parent is not None and os.getppid() != parent.pid:  # it ended before that
            return
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            shard = make_shard()
            pipe.send((None, None))
            method = ""
            while method != "close":
                method, args = pipe.recv()
                pipe.send((getattr(shard, method)(*args), None))
        except _RowError as error:
            pipe.send((None, _RowError(error.row, error.cause, traceback.format_exc())))


class LockstepEnv(VectorEnv):
    """A `VectorEnv` over shards, whose episodes all start and, at the horizon, end together."""

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

        ``seeds``: with what the environments' generators are seeded, task-major. Raises
        ValueError for numbers out of range, SimulatorError if an environment cannot be made.
        """
        if envs_per_task < 1 or workers < 0:
            raise ValueError(f"envs_per_task {envs_per_task} < 1 or workers {workers} < 0")
        self.spec, self.envs_per_task = spec, envs_per_task
        self._autoreset = autoreset
        self._seeds = list(seeds)
        self._clock: int | None = None  # steps into the episodes; None: none was started yet
        self._started = False  # a step that `finish` has not been called for
        self._shape = (spec.num_tasks, envs_per_task)
        rows, shards = len(self._seeds), max(1, min(workers, len(self._seeds)))
        self._arrays = Arrays(spec, rows, shards, shared=workers > 0)
        self._return, self._success = np.zeros(rows), np.zeros(rows, bool)
        self._rows = [range(number, rows, shards) for number in range(shards)]
        self._shards: list[_Local | _Worker] = []
        with self._failures():
            for number, its in enumerate(self._rows):
                make = partial(make_shard, number, its, self._arrays)
                name = f"simulator worker {number + 1} of {shards}"
                self._shards.append(_Worker(name, make) if workers else _Local(make))
            self._results()

    def reset(self, seeds: np.ndarray | None = None) -> np.ndarray:
        """See `VectorEnv.reset`. Raises ValueError for seeds that are not (T, E) integers >= 0."""
        self._check_idle()
        by_row = None
        if seeds is not None:
            self._seeds = _check_seeds(seeds, self._shape)
            by_row = dict(enumerate(self._seeds))
        self._clock = None
        self._call("reset", by_row)
        return self._begin()

    def start(self, action: np.ndarray) -> None:
        """See `VectorEnv.start`.

        Raises RuntimeError after an episode's end without autoreset or before the step under way
        is finished, SimulatorError if an action is not finite.
        """
        if self._clock is None or self._clock == self.spec.horizon:
            raise RuntimeError("the episodes have ended, or none was started: call reset()")
        self._check_idle()
        self._arrays.action[:] = self._check_action(action)
        self._clock += 1
        self._submit("step", self._clock == self.spec.horizon and self._autoreset)
        self._started = True

    def finish(self) -> Step:
        """See `VectorEnv.finish`. All arrays of the result are fresh.

        Raises RuntimeError if no step is under way.
        """
        if not self._started:
            raise RuntimeError("no step is under way: call start(action)")
        self._started = False
        with self._failures():
            self._results()
        self._check_results()
        arrays = self._arrays
        ends = self._clock == self.spec.horizon
        self._return += arrays.reward
        self._success |= arrays.success
        episodes = self._episodes() if ends else []
        return Step(
            obs=self._begin() if ends and self._autoreset else self._by_task(arrays.next_obs),
            next_obs=self._by_task(arrays.next_obs),
            reward=self._by_task(arrays.reward).astype(np.float32),
            terminated=np.zeros(self._shape, bool),
            truncated=np.full(self._shape, ends),
            episodes=episodes,
        )

    def state_dict(self) -> dict[str, Any]:
        """See `VectorEnv.state_dict`."""
        if self._clock != 0:
            raise RuntimeError("environments have a state only where their episodes begin")
        states: dict[int, dict[str, Any]] = {}
        for some in self._call("states"):
            states |= some
        return {
            "suite": self.spec.name,
            "shape": list(self._shape),
            "seeds": self._seeds,
            "environments": [states[row] for row in range(len(states))],
        }

    def load_state_dict(self, state: dict[str, Any]) -> np.ndarray:
        """See `VectorEnv.load_state_dict`. Raises ValueError for another suite's state."""
        own = {"suite": self.spec.name, "shape": list(self._shape)}
        if (theirs := {key: state.get(key) for key in own}) != own:
            raise ValueError(f"this is the state of {theirs}, not of {own}")
        self._seeds = list(state["seeds"])
        self._clock = None
        self._call("restart", dict(enumerate(state["environments"])))
        return self._begin()

    def render(self) -> np.ndarray:
        """See `VectorEnv.render`."""
        first = [task * self.envs_per_task for task in range(self.spec.num_tasks)]
        pictures: dict[int, np.ndarray] = {}
        for some in self._call("render", first):
            pictures |= some
        return np.stack([pictures[row] for row in first])

    def close(self) -> None:
        """See `VectorEnv.close`."""
        shards, self._shards, self._clock, self._started = self._shards, [], None, False
        for shard in shards:
            shard.close()

    def _begin(self) -> np.ndarray:
        """Count an episode from its start; its first observations (T, E, O)."""
        self._clock = 0
        self._return[:] = 0.0
        self._success[:] = False
        return self._by_task(self._arrays.obs)

    def _by_task(self, rows: np.ndarray) -> np.ndarray:
        """(n, ...) -> (T, E, ...), a copy."""
        return rows.reshape(*self._shape, *rows.shape[1:]).copy()

    def _episodes(self) -> list[Episode]:
        return [
            Episode(
                *divmod(row, self.envs_per_task), float(return_), bool(success), self.spec.horizon
            )
            for row, (return_, success) in enumerate(zip(self._return, self._success, strict=True))
        ]

    def _check_action(self, action: np.ndarray) -> np.ndarray:
        """Actions (n, A) float32."""
        shape = (*self._shape, self.spec.action_dim)
        action = np.asarray(action, np.float32)
        if action.shape != shape:
            raise ValueError(f"actions have the shape {action.shape}, not {shape}")
        rows = action.reshape(-1, self.spec.action_dim)
        if not np.isfinite(rows).all():
            row = int(np.argmin(np.isfinite(rows).all(-1)))
            self.close()
            raise SimulatorError(f"{self._label(row)}: action {rows[row].tolist()} is not finite")
        return rows

    def _check_results(self) -> None:
        """An unstable simulation may go on with numbers that would poison the replay."""
        arrays = self._arrays
        if not (np.isfinite(arrays.reward).all() and np.isfinite(arrays.next_obs).all()):
            fine = np.isfinite(arrays.reward) & np.isfinite(arrays.next_obs).all(-1)
            row = int(np.argmin(fine))
            self.close()
            raise SimulatorError(
                f"{self._label(row)}: reward {arrays.reward[row]} or an observation is not finite"
            )

    def _call(self, method: str, *args: Any) -> list[Any]:
        self._submit(method, *args)
        with self._failures():
            return self._results()

    def _submit(self, method: str, *args: Any) -> None:
        if not self._shards:
            raise RuntimeError("the environments are closed")
        self._check_idle()
        with self._failures():
            for shard in self._shards:
                shard.submit(method, *args)

    def _check_idle(self) -> None:
        """A step's late answer must never meet the next call."""
        if self._started:
            raise RuntimeError("a step is under way: call finish()")

    def _results(self) -> list[Any]:
        results = []
        for number, shard in enumerate(self._shards):
            try:
                results.append(shard.result())
            except _DeadWorkerError as error:
                row = int(self._arrays.current[number])
                where = "while it held" if row == _IDLE else "in"
                lost = "; ".join(map(self._label, self._rows[number] if row == _IDLE else [row]))
                raise SimulatorError(f"{error} {where} {lost}") from None
        return results

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Closes the environments on any error; that of a simulator becomes a SimulatorError."""
        try:
            yield
        except _RowError as error:
            self.close()
            failure = SimulatorError(f"{self._label(error.row)}: {error.cause}")
            if error.trace:
                failure.add_note(f"In the worker process:\n{error.trace}")
            raise failure from error
        except BaseException:  # Ctrl-C too: see `_check_idle`
            self.close()
            raise

    def _label(self, row: int) -> str:
        task, env = divmod(row, self.envs_per_task)
        name, seed = self.spec.task_names[task], self._seeds[row]
        return f"task {name}, environment {env}, last seeded with {seed}"


def _check_seeds(seeds: np.ndarray, shape: tuple[int, int]) -> list[int]:
    """Seeds (T, E) as a task-major list."""
    seeds = np.asarray(seeds)
    if seeds.shape != shape or seeds.dtype.kind not in "iu" or seeds.min() < 0:
        raise ValueError(f"seeds must be integers >= 0 of shape {shape}, not {seeds!r}")
    return [int(seed) for seed in seeds.ravel()]
