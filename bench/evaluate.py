"""Evaluation: a policy on episodes that depend on the suite and the evaluation seed alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from bench.store import Row
from suites.base import Suite, VectorEnv, stream

Policy = Callable[[np.ndarray], np.ndarray]
"""Observations (T, E, O) to actions (T, E, A)."""


class Outcome(NamedTuple):
    """What ``n`` episodes of each task brought."""

    success: np.ndarray  # (T, n) bool
    return_: np.ndarray  # (T, n)
    observations: np.ndarray  # (T, P, O) float32, a spread of observations met

    def rows(self, step: int, kind: str, task_names: tuple[str, ...]) -> list[Row]:
        """Successes and mean return per task."""
        rows = []
        for task, name in enumerate(task_names):
            n = self.success.shape[1]
            rows.append(Row(step, kind, name, "success", float(self.success[task].sum()), n))
            rows.append(Row(step, kind, name, "return", float(self.return_[task].mean()), n))
        return rows


SAMPLE_EVERY, SAMPLED_EPISODES = 10, 5
"""Of the first SAMPLED_EPISODES episodes, the observation of every SAMPLE_EVERY-th step is kept."""


def evaluate(policy: Policy, envs: VectorEnv, episodes: int, seed: int) -> Outcome:
    """Run ``episodes`` episodes of each task with ``policy`` in ``envs`` (made without autoreset).

    Episode k of a task starts from a seed made of the evaluation seed, the task and k, so it is the
    same for every algorithm, training seed and checkpoint.
    """
    names, per_round = envs.spec.task_names, envs.envs_per_task
    success = np.zeros((len(names), episodes), bool)
    return_ = np.zeros((len(names), episodes))
    kept: list[np.ndarray] = []
    for first in range(0, episodes, per_round):
        numbers = range(first, first + per_round)
        obs = envs.reset(evaluation_seeds(names, seed, numbers, envs.spec.positions))
        wanted = min(per_round, episodes - first, max(0, SAMPLED_EPISODES - first))
        ended = 0
        for t in range(envs.spec.horizon):
            if wanted and t % SAMPLE_EVERY == 0:
                kept.append(obs[:, :wanted].copy())
            step = envs.step(policy(obs))
            obs = step.obs
            for episode in step.episodes:
                if first + episode.env < episodes:
                    success[episode.task, first + episode.env] = episode.success
                    return_[episode.task, first + episode.env] = episode.return_
                ended += 1
        assert ended == len(names) * per_round, "episodes end together, at the horizon"
    return Outcome(success, return_, np.concatenate(kept, axis=1))


def evaluation_seeds(
    names: Sequence[str], seed: int, numbers: Sequence[int], positions: int | None = None
) -> np.ndarray:
    """Seeds (T, n) of the evaluation episodes of these numbers, of tasks by name.

    Where a goal is one of K ``positions``, K episodes in a row have each of them once.
    """
    seeds = [[stream(seed, "evaluation", name, number) for number in numbers] for name in names]
    found = np.array(seeds, np.uint64)
    if positions is not None:
        count = np.uint64(positions)
        found += np.array(numbers, np.uint64) % count - found % count
    return found


def episodes_needed(suite: Suite, episodes: int) -> int:
    """Of a deterministic policy on frozen goals all episodes are one and the same: run it once."""
    return 1 if suite.frozen_goals else episodes
