"""Meta-World v3: MT10, MT25, MT50, single tasks and any list of them.

Single environment classes are stepped directly. Metaworld's own vector environments give all tasks
the same seed, draw 50 goals per task whether they are used or not (seconds), ignore
``reset(seed=)`` and, unfrozen, draw goals from numpy's global generator; here every environment has
a generator of its own and nothing global is touched. The goal is visible (in observation 36:39).
How they are stepped faster than by themselves is in `suites.sawyer`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import NamedTemporaryFile, gettempdir
from typing import Any

import gymnasium
import numpy as np
from metaworld.env_dict import ALL_V3_ENVIRONMENTS, MT10_V3, MT25_V3, MT50_V3
from metaworld.policies import ENV_POLICY_MAP

from suites import names
from suites.base import RenderError, Suite, SuiteSpec, VectorEnv, stream, unknown
from suites.lockstep import LockstepEnv, Simulator, SimulatorShard
from suites.sawyer import SwiftSawyer

BENCHMARK_SEED = 0
"""From which the 50 benchmark goals of every task are drawn, see `benchmark_positions`."""

_BENCHMARKS = {"10": MT10_V3, "25": MT25_V3, "50": MT50_V3}
_GOALS_PER_TASK = 50
_CAMERA, _PICTURE = "corner", (240, 320)


def load(name: str, *, goals: str, reward_version: str, horizon: int) -> MetaWorld:
    """The suite of this name; raises ValueError for a name or task that does not exist."""
    kind, tasks = _parse(name)
    fixed, benchmark = kind == "fixed", goals == "benchmark50"
    spec = SuiteSpec(
        name=name, task_names=tasks, obs_dim=39, action_dim=4, horizon=horizon,
        positions=_GOALS_PER_TASK if benchmark and not fixed else None,
    )  # fmt: skip
    return MetaWorld(spec, fixed=fixed, benchmark=benchmark, reward_version=reward_version)


class MetaWorld(Suite):
    """Tasks of Meta-World, with fixed goals (one per task and run) or a new one per episode."""

    def __init__(
        self, spec: SuiteSpec, *, fixed: bool, benchmark: bool, reward_version: str
    ) -> None:
        self.spec, self.frozen_goals = spec, fixed
        self._benchmark, self._reward_version = benchmark, reward_version
        experts: dict[str, Any] = ENV_POLICY_MAP
        self._experts = [experts[task]() for task in spec.task_names]

    def make(
        self, *, seed: int, envs_per_task: int = 1, workers: int = 0, autoreset: bool = True
    ) -> VectorEnv:
        """See `Suite.make`. Raises SimulatorError if an environment cannot be built."""
        makers, seeds = [], []
        for task in self.spec.task_names:
            positions = benchmark_positions(task) if self._benchmark else None
            position_seed = stream(seed, "goal", task) if self.frozen_goals else None
            for env in range(envs_per_task):
                seeds.append(stream(seed, "envs", task, env))
                makers.append(
                    partial(
                        _Sawyer,
                        task,
                        seeds[-1],
                        reward_version=self._reward_version,
                        positions=positions,
                        position_seed=position_seed,
                    )
                )
        return LockstepEnv(
            self.spec,
            partial(SimulatorShard, makers=makers),
            seeds,
            envs_per_task=envs_per_task,
            workers=workers,
            autoreset=autoreset,
        )

    def expert(self, obs: np.ndarray) -> np.ndarray:
        """Actions (T, E, 4) float32 of Meta-World's scripted policies, clipped to [-1, 1]."""
        action = np.empty((*obs.shape[:2], self.spec.action_dim), np.float32)
        with warnings.catch_warnings():  # each script warns that its actions exceed [-1, 1]
            warnings.simplefilter("ignore", UserWarning)
            for task, expert in enumerate(self._experts):
                for env in range(obs.shape[1]):
                    action[task, env] = expert.get_action(obs[task, env].astype(np.float64))
        return np.clip(action, -1.0, 1.0)

    def peers(self) -> dict[str, Callable[[int], contextlib.AbstractContextManager[Any]]]:
        """Metaworld's own, in one process and with a process for each task."""
        kind = re.match(r"mt(10|25|50)_", self.spec.name)
        if kind is None:
            return {}
        benchmark = f"MT{kind[1]}"
        return {f"metaworld's, {s}": partial(_official, benchmark, s) for s in ("sync", "async")}


@contextlib.contextmanager
def _official(benchmark: str, strategy: str, horizon: int) -> Iterator[Callable[[], Any]]:
    """A step of metaworld's vector environment with random actions."""
    name = f"Meta-World/{benchmark}"
    envs = gymnasium.make_vec(name, vector_strategy=strategy, seed=0, max_episode_steps=horizon)
    try:
        envs.reset(seed=0)
        actions = itertools.cycle([envs.action_space.sample() for _ in range(100)])
        yield lambda: envs.step(next(actions))
    finally:
        envs.close()


class _Sawyer(Simulator):
    """One Meta-World environment.

    A "position" is the vector that metaworld draws at a reset: the goal's and the object's.
    ``positions`` (K, d): an episode has one of these, else one from the task's whole range.
    ``position_seed``: that one is drawn from this seed and stays the same in all episodes.
    """

    def __init__(
        self,
        task: str,
        seed: int,
        *,
        reward_version: str,
        positions: np.ndarray | None,
        position_seed: int | None,
    ) -> None:
        make: Any = ALL_V3_ENVIRONMENTS[task]
        self._env = env = make(reward_function_version=reward_version)
        self._generator = np.random.default_rng(seed)
        self._v1 = reward_version == "v1"
        env._set_task_called = True
        env._partially_observable = False
        del env.sawyer_observation_space  # cached before the goal was made visible
        env._freeze_rand_vec = False
        env.seeded_rand_vec = True
        self._settle_hand, self._passes = env._reset_hand, 0
        env._reset_hand = self._reset_hand
        if position_seed is not None:
            generator = np.random.default_rng(position_seed)
            if positions is None:
                positions = self.draw(generator, 1)
            else:
                positions = positions[generator.integers(len(positions))][None]
        self._positions = positions
        env._freeze_rand_vec = positions is not None
        self._swift = SwiftSawyer(env)
        self._state: dict[str, Any] = {}
        self._renderer: Any = None

    def reset(self, seed: int | None = None) -> np.ndarray:
        """Start an episode. Among K positions the seed's is the one numbered ``seed % K``."""
        if seed is None:
            return self._begin(None)
        self._generator = np.random.default_rng(seed)
        return self._begin(seed)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool]:
        """Metaworld's step; success by the v2 rule whatever the reward."""
        env = self._env
        obs, reward, info = self._swift.step(action)
        if self._v1:
            # Success is read off what the reward computed: the v1 reward's figures make some
            # tasks' success impossible. So the same state is judged by the v2 rule as well.
            env.reward_function_version = "v2"
            _, info = env.evaluate_state(obs, action)
            env.reward_function_version = "v1"
        return obs, reward, bool(info["success"])

    def state(self) -> dict[str, Any]:
        """The generator before the reset, and which position the seed chose."""
        return self._state

    def restart(self, state: dict[str, Any]) -> np.ndarray:
        """Everything else of a reset follows from the generator."""
        self._generator = np.random.default_rng(0)
        self._generator.bit_generator.state = state["generator"]
        return self._begin(state["choice"])

    def render(self) -> np.ndarray:
        """The table from the corner. The camera hangs upside down there; the picture does not."""
        if self._renderer is None:
            self._renderer = offscreen(self._env.model)
        self._renderer.update_scene(self._env.data, camera=_CAMERA)
        return np.asarray(self._renderer.render())[::-1, ::-1]

    def close(self) -> None:
        """Close metaworld's environment."""
        if self._renderer is not None:
            self._renderer.close()
        self._env.close()

    def draw(self, generator: Any, count: int) -> np.ndarray:
        """Positions (count, d) such as metaworld draws at resets with this generator."""
        env = self._env
        env.np_random, drawn = generator, []
        for _ in range(count):
            self._reset()
            drawn.append(env._last_rand_vec.copy())
        return np.stack(drawn)

    def _begin(self, choice: int | None) -> np.ndarray:
        generator = self._generator
        self._state = {"generator": generator.bit_generator.state, "choice": choice}
        self._env.np_random = generator
        if self._positions is not None:
            count = len(self._positions)
            number = choice % count if choice is not None else int(generator.integers(count))
            self._env._last_rand_vec = self._positions[number].copy()
        return self._reset()

    def _reset(self) -> np.ndarray:
        self._passes = 0
        obs, _ = self._env.reset()
        return np.asarray(obs)

    def _reset_hand(self, steps: int = 50) -> None:
        """Move the hand to its place, which metaworld simulates twice per reset, once in vain.

        Its reset() runs reset_model(), then mj_resetData and reset_model() again. Of the first
        pass only the numbers drawn and the model's new positions last, and they do not depend on
        the hand, so there the 250 physics steps are left out. The tests compare all 50 tasks.
        """
        self._passes += 1
        if self._passes == 1:
            self._env.init_tcp = self._env.tcp_center
        else:
            self._settle_hand(steps)


def offscreen(model: Any) -> Any:
    """MuJoCo's renderer of ``model`` without a screen.

    Raises RenderError where neither EGL nor OSMesa can be used.
    """
    import mujoco

    try:
        return mujoco.Renderer(model, *_PICTURE)
    except (ImportError, AttributeError, RuntimeError, mujoco.FatalError) as error:
        raise RenderError(f"MuJoCo cannot render: {type(error).__name__}: {error}") from None


def benchmark_positions(task: str) -> np.ndarray:
    """The 50 benchmark goals (50, d) of a task, cached on disk.

    They are those of ``metaworld.MT1(task, seed=stream(BENCHMARK_SEED, task) % 2**32)``: a seed
    for each task, so that tasks with the same ranges get different goals, and the same goals in
    whatever suite the task appears.
    """
    path = _cache_directory() / f"metaworld-{version('metaworld')}-seed-{BENCHMARK_SEED}"
    path /= f"{task}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # absent or damaged
        cached = json.loads(path.read_text())
        positions = np.array(cached["positions"], np.float64)
        if positions.ndim == 2 and cached["crc32"] == zlib.crc32(positions.tobytes()):
            return positions
    simulator = _Sawyer(task, 0, reward_version="v2", positions=None, position_seed=None)
    seed = stream(BENCHMARK_SEED, task) % 2**32
    # The legacy generator, because it is what metaworld seeds (there the global one).
    positions = simulator.draw(np.random.RandomState(seed), _GOALS_PER_TASK)
    simulator.close()
    with contextlib.suppress(OSError):  # a cache that cannot be written only costs time
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"positions": positions.tolist(), "crc32": zlib.crc32(positions.tobytes())}
        with NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(content, file)
        os.replace(file.name, path)
    return positions


def _cache_directory() -> Path:
    if configured := os.environ.get("XDG_CACHE_HOME"):
        base = Path(configured)
    else:
        try:
            base = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
        except RuntimeError:  # a user without a home, as in some containers
            base = Path(gettempdir())
    return base / "mega-bench"


def _parse(name: str) -> tuple[str, tuple[str, ...]]:
    """("fixed" or "rand", tasks) of a suite's name."""
    if match := re.fullmatch(r"mt(10|25|50)_(fixed|rand)", name):
        return match[2], tuple(_BENCHMARKS[match[1]])
    if match := re.fullmatch(r"(mt1|custom)_(fixed|rand):(.+)", name):
        tasks = (match[3],) if match[1] == "mt1" else tuple(match[3].split("+"))
        for task in tasks:
            if task not in ALL_V3_ENVIRONMENTS:
                raise ValueError(unknown(f"task in suite {name!r}:", task, ALL_V3_ENVIRONMENTS))
        if len(set(tasks)) < len(tasks):
            raise ValueError(f"suite {name!r} names a task twice")
        return match[2], tasks
    raise ValueError(unknown("suite", name, names()))
