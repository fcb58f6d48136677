"""What a suite of tasks is, to everybody who is not a simulator.

The leading axis of every array is the task: ``T`` tasks, ``E`` environments per task, ``O``
observation and ``A`` action numbers. All environments step in lockstep.
"""

from __future__ import annotations

import difflib
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, NamedTuple

import numpy as np


@dataclass(frozen=True, kw_only=True)
class SuiteSpec:
    """The shape of a suite. The number of tasks is stated here and nowhere else."""

    name: str
    task_names: tuple[str, ...]
    obs_dim: int
    action_dim: int
    horizon: int
    """Steps per episode; every episode ends by truncation there."""

    positions: int | None = None
    """How many places a task's goal is drawn from; None: any in its range. Among them an episode
    takes the one of its seed's number, modulo their count."""

    def __post_init__(self) -> None:
        for name in self.task_names:  # a cell of metrics.csv, and a file's name
            if not name or not name.isprintable() or set(name) & set(',"/\\') or name[0] == ".":
                raise ValueError(f"suite {self.name!r}: {name!r} is no name for a task")

    @property
    def num_tasks(self) -> int:
        """T, the number of tasks."""
        return len(self.task_names)

    @property
    def large(self) -> bool:
        """Whether what the papers set for MT50 holds, not what they set for MT10."""
        return self.num_tasks > 10


class Episode(NamedTuple):
    """One finished episode of environment ``env`` of task ``task``."""

    task: int
    env: int
    return_: float
    """Sum of the unscaled rewards."""
    success: bool
    """Whether the task's success rule held at any step."""
    length: int


class Step(NamedTuple):
    """What one lockstep of all environments brought."""

    obs: np.ndarray
    """(T, E, O) float32: the observation to act on next, after a reset where an episode ended."""
    next_obs: np.ndarray
    """(T, E, O) float32: the true successor of the action, also where an episode ended."""
    reward: np.ndarray
    """(T, E) float32, unscaled."""
    terminated: np.ndarray
    """(T, E) bool: the task itself ended (never true in Meta-World)."""
    truncated: np.ndarray
    """(T, E) bool: the time limit was reached; the value of ``next_obs`` is still worth having."""
    episodes: list[Episode]
    """Episodes that ended at this step, ordered by task, then environment."""


class SimulatorError(RuntimeError):
    """A simulator raised or a worker died; the message names the task and its seed."""


class RenderError(RuntimeError):
    """No picture can be had; the message says why and what would help."""


class VectorEnv(ABC):
    """T x E environments stepped in lockstep, each with a generator of its own."""

    spec: SuiteSpec
    envs_per_task: int

    @abstractmethod
    def reset(self, seeds: np.ndarray | None = None) -> np.ndarray:
        """Start an episode everywhere and return the observations (T, E, O) float32.

        ``seeds`` (T, E), integers: first re-seed each environment's generator, which makes the
        episode a function of the seed alone. Without it the generators run on.
        """

    def step(self, action: np.ndarray) -> Step:
        """Apply actions (T, E, A) in [-1, 1] and reset the environments whose episode ended.

        Raises SimulatorError if a simulator fails or a worker process dies.
        """
        self.start(action)
        return self.finish()

    @abstractmethod
    def start(self, action: np.ndarray) -> None:
        """Begin a step; worker processes go on with it while the caller does something else."""

    @abstractmethod
    def finish(self) -> Step:
        """Wait for the step that was started."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """JSON-able generator states from which `load_state_dict` restarts the current episodes.

        Only at an episode boundary (every environment at step 0): raises RuntimeError elsewhere.
        """

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> np.ndarray:
        """Restart the episodes that `state_dict` saw; their first observations (T, E, O)."""

    def render(self) -> np.ndarray:
        """Pictures (T, H, W, 3) uint8 of each task's first environment as it stands.

        Raises RenderError where none can be had.
        """
        raise RenderError(f"{self.spec.name} has no pictures")

    def close(self) -> None:  # noqa: B027  (most suites have nothing to release)
        """Release worker processes and simulators; safe to call twice."""


class Suite(ABC):
    """A named collection of tasks that can make environments and knows reference policies."""

    spec: SuiteSpec
    frozen_goals: bool
    """One goal per task and run: all episodes of a deterministic policy are identical."""

    @abstractmethod
    def make(
        self, *, seed: int, envs_per_task: int = 1, workers: int = 0, autoreset: bool = True
    ) -> VectorEnv:
        """Environments whose goals derive from ``seed`` (a run's seed, not a stream of it).

        ``workers``: processes to step in (0: in this one); trajectories do not depend on it.
        ``autoreset=False`` (evaluation): an ended episode stays ended until `reset`.
        """

    @abstractmethod
    def expert(self, obs: np.ndarray) -> np.ndarray:
        """Actions (T, E, A) of the suite's scripted experts for observations (T, E, O)."""

    def peers(self) -> dict[str, Callable[[int], AbstractContextManager[Callable[[], Any]]]]:
        """Public vector environments of the same tasks, to be timed beside ours.

        Each opens, for an episode length, a context whose value steps all tasks once with
        random actions.
        """
        return {}


@cache
def plugins(kind: str) -> dict[str, str]:
    """Name -> "module:attribute" of what other installed packages register as ``kind``."""
    return {point.name: point.value for point in entry_points(group=f"mega_bench.{kind}s")}


def registered(kind: str, name: str, built_in: Mapping[str, str]) -> Any:
    """What stands under ``name`` in ``built_in`` or among the plug-ins, imported.

    Raises ValueError if a package takes a built-in name, or if its entry cannot be imported.
    """
    others = plugins(kind)
    target = {**built_in, **others}[name]
    if name in built_in and name in others:
        raise ValueError(
            f"{kind} {name!r} is built in, and an installed package registers {target} under the "
            "same name: remove that package, or rename it there"
        )
    module, _, attribute = target.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except Exception as error:
        if name in built_in:
            raise
        raise ValueError(
            f"{kind} {name!r} is registered as {target} by an installed package, but cannot be "
            f"loaded: {type(error).__name__}: {error}"
        ) from None


def unknown(what: str, value: object, allowed: Iterable[str]) -> str:
    """The message for a name that is not among those allowed, with the nearest of them."""
    allowed = list(allowed)
    # What stands for a number or name in a pattern ("fixed{n}", "mt1_rand:<task>") is not compared.
    plain = {re.sub(r"[{<].*", "", name): name for name in reversed(allowed)}
    near = difflib.get_close_matches(str(value), plain, n=1, cutoff=0.4)
    hint = f"; did you mean {plain[near[0]]!r}?" if near else ""
    return f"unknown {what} {value!r}{hint} (allowed: {', '.join(allowed)})"


def stream(seed: int, *names: str | int) -> int:
    """The seed (64 bits) of a named random stream of a run, independent of all other streams.

    A run has one stream each for environments, evaluation, replay, network initialisation,
    action noise and the genetic algorithm, so that drawing more from one never moves another.
    """
    keys = [name if isinstance(name, int) else zlib.crc32(name.encode()) for name in names]
    return int(np.random.SeedSequence([seed, *keys]).generate_state(1, np.uint64)[0])
