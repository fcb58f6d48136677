"""K point-mass tasks of Meta-World's shapes, learnable in seconds. For tests and small studies.

A point starts near the origin of the plane and is to reach a goal on a ring around it. In ``toy``
task k turns the motor by 2 pi k / K before it moves the point, which the observation does not show:
no policy that ignores the task solves more than one of them. In ``toy_opposite`` the motor is the
same everywhere, but every other task is to reach the point opposite to the goal that it is shown:
tasks of equal observations that want opposite actions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from suites import names
from suites.base import Suite, SuiteSpec, VectorEnv, stream, unknown
from suites.lockstep import Arrays, LockstepEnv, Shard

_SPEED = 0.1
"""Distance per step at full action."""
_RADIUS = 0.1
"""Within which of the goal the task is solved."""
_START = 0.1
"""Half the side of the square of starting points."""
_RING = (0.5, 0.9)
"""Least and largest distance of a goal from the origin."""
_MAX_TASKS = 500
_PIXELS = 96
"""Side of a picture."""


def load(name: str, *, goals: str, reward_version: str, horizon: int) -> Toy:
    """The suite ``toy`` (3 tasks) or ``toy<K>`` (K tasks, 1 to 500), and so ``toy_opposite``."""
    match = re.fullmatch(r"toy(_opposite)?(\d{0,3})", name)
    tasks = int(match[2] or (2 if match[1] else 3)) if match else 0
    if match is None or not 1 <= tasks <= _MAX_TASKS:
        raise ValueError(unknown("suite", name, names()))
    if goals != "fresh":
        raise ValueError(f"goals {goals!r}: the toy suite has fresh goals only")
    if reward_version != "v2":
        raise ValueError(f"reward_version {reward_version!r}: the toy suite has one reward, 'v2'")
    task_names = tuple(f"point-{task}" for task in range(tasks))
    spec = SuiteSpec(name=name, task_names=task_names, obs_dim=39, action_dim=4, horizon=horizon)
    return Toy(spec, opposite=bool(match[1]))


class Toy(Suite):
    """Point masses with a hidden angle or side of the goal; a new goal in every episode."""

    frozen_goals = False

    def __init__(self, spec: SuiteSpec, *, opposite: bool) -> None:
        self.spec = spec
        task = np.arange(spec.num_tasks)
        self._side = 1.0 - 2.0 * (task % 2) * opposite
        angle = 0.0 * task if opposite else 2 * np.pi * task / spec.num_tasks
        cos, sin = np.cos(angle), np.sin(angle)
        self._turn = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)

    def make(
        self, *, seed: int, envs_per_task: int = 1, workers: int = 0, autoreset: bool = True
    ) -> VectorEnv:
        """See `Suite.make`."""
        seeds = [
            stream(seed, "envs", task, env)
            for task in self.spec.task_names
            for env in range(envs_per_task)
        ]
        return LockstepEnv(
            self.spec,
            partial(
                _Points, turn=self._turn, side=self._side, envs_per_task=envs_per_task, seeds=seeds
            ),
            seeds,
            envs_per_task=envs_per_task,
            workers=workers,
            autoreset=autoreset,
        )

    def expert(self, obs: np.ndarray) -> np.ndarray:
        """Straight to the goal: actions (T, E, 4) float32."""
        goal = self._side[:, None, None] * obs[..., 36:38]
        way = (goal - obs[..., 0:2]).astype(np.float64)
        action = np.zeros((*obs.shape[:2], self.spec.action_dim), np.float32)
        action[..., :2] = np.einsum("tji,tej->tei", self._turn, way) / _SPEED
        # Scaled, not clipped by number, so that the direction stays.
        action /= np.maximum(1.0, np.abs(action).max(-1, keepdims=True))
        return action


class _Points(Shard):
    """Some of the points, all moved at once."""

    def __init__(
        self,
        number: int,
        rows: Sequence[int],
        arrays: Arrays,
        *,
        turn: np.ndarray,
        side: np.ndarray,
        envs_per_task: int,
        seeds: Sequence[int],
    ) -> None:
        """``turn`` (T, 2, 2) and ``side`` (T,) of all tasks, ``seeds`` of all environments."""
        self._rows, self._index, self._arrays = rows, np.array(rows), arrays
        self._turn = turn[self._index // envs_per_task]
        self._side = side[self._index // envs_per_task, None]
        self._generators = [np.random.default_rng(seeds[row]) for row in rows]
        self._position, self._goal = np.zeros((2, len(rows), 2))
        self._states: list[Any] = []

    def reset(self, seeds: dict[int, int] | None) -> None:
        """Draw starting points and goals."""
        if seeds is not None:
            self._generators = [np.random.default_rng(seeds[row]) for row in self._rows]
        self._states = [generator.bit_generator.state for generator in self._generators]
        x, y, angle, distance = np.array([generator.random(4) for generator in self._generators]).T
        self._position = _START * (2 * np.stack([x, y], -1) - 1)
        direction = np.stack([np.cos(2 * np.pi * angle), np.sin(2 * np.pi * angle)], -1)
        self._goal = (_RING[0] + (_RING[1] - _RING[0]) * distance)[:, None] * direction
        self._observe(self._arrays.obs)

    def step(self, reset: bool) -> None:
        """Move the points; the reward falls off exponentially with the distance, from 10."""
        action = np.clip(self._arrays.action[self._index, :2].astype(np.float64), -1.0, 1.0)
        move = _SPEED * np.einsum("nij,nj->ni", self._turn, action)
        self._position = np.clip(self._position + move, -1.0, 1.0)
        distance = np.linalg.norm(self._position - self._side * self._goal, axis=-1)
        self._arrays.reward[self._index] = 10.0 * np.exp(-2.0 * distance)
        self._arrays.success[self._index] = distance <= _RADIUS
        self._observe(self._arrays.next_obs)
        if reset:
            self.reset(None)

    def states(self) -> dict[int, dict[str, Any]]:
        """Row -> its generator before the reset."""
        return dict(zip(self._rows, self._states, strict=True))

    def restart(self, states: dict[int, dict[str, Any]]) -> None:
        """An episode follows from its generator."""
        for row, generator in zip(self._rows, self._generators, strict=True):
            generator.bit_generator.state = states[row]
        self.reset(None)

    def render(self, rows: Sequence[int]) -> dict[int, np.ndarray]:
        """The plane from above: the goal as a disc, the point dark."""
        grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, _PIXELS)] * 2), axis=-1)
        pictures = {}
        for place, row in enumerate(self._rows):
            if row not in rows:
                continue
            picture = np.full((_PIXELS, _PIXELS, 3), 245, np.uint8)
            aim = self._side[place] * self._goal[place]
            picture[np.linalg.norm(grid - aim, axis=-1) < _RADIUS] = (120, 190, 120)
            picture[np.linalg.norm(grid - self._position[place], axis=-1) < 0.05] = (30, 30, 30)
            pictures[row] = picture
        return pictures

    def _observe(self, out: np.ndarray) -> None:
        """Position at 0:2 and goal at 36:38, where Meta-World has them; the rest is zero."""
        out[self._index, 0:2] = self._position
        out[self._index, 36:38] = self._goal
