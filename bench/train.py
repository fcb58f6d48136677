"""The training loop, and the process that runs it."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import machine
from bench.evaluate import episodes_needed, evaluate
from bench.replay import ReplayBuffer
from bench.spec import RunSpec
from bench.store import BusyError, Row, RunStore, StoreError
from suites.base import Episode, stream

CHECKPOINT_SECONDS = 60.0
"""A checkpoint is taken at the first episode boundary this long after the last ..."""
CHECKPOINT_STEPS = 4_000
"""... or at the latest after this many steps per task, which bounds the replay's slack."""
LOGGED_POINTS = 100
"""Rows of training metrics over a run, at most."""
PROBED_POINTS = 50
"""Snapshots of the agent's own state over a run, at most."""
HEARTBEAT_SECONDS = 1.0


class DivergenceError(RuntimeError):
    """A training metric stopped being a number."""


class Interrupted(Exception):  # noqa: N818  (it is a request, not an error)
    """Training stopped on request, after a checkpoint."""


Heartbeat = Callable[[int, dict[str, Any]], None]
"""Called about every second with the step and facts for the status."""


def replay_slack(spec: RunSpec) -> int:
    """Rows per task beyond the replay's capacity: those of two checkpoint intervals."""
    p = spec.protocol
    return 2 * (max(CHECKPOINT_STEPS, p.horizon * p.envs_per_task) + p.horizon * p.envs_per_task)


def replay_capacity(spec: RunSpec) -> int:
    """Rows per task that can be sampled; a short run never fills the whole buffer."""
    return min(spec.protocol.replay_per_task, spec.protocol.steps_per_task)


def train(
    spec: RunSpec,
    store: RunStore,
    *,
    device: str = "cpu",
    workers: int = 0,
    stop: Callable[[], bool] = lambda: False,
    heartbeat: Heartbeat = lambda step, facts: None,
) -> None:
    """Train ``spec`` to its end in ``store``, from its newest checkpoint if it has one.

    Raises Interrupted after a checkpoint once ``stop()`` is true; DivergenceError, SimulatorError
    or OSError when training cannot go on.
    """
    p, suite = spec.protocol, spec.make_suite()
    names, clock = suite.spec.task_names, Clock()
    agent = spec.agent(suite.spec, spec.agent_config, p.plan, seed=spec.seed, device=device)
    envs = suite.make(seed=spec.seed, envs_per_task=p.envs_per_task, workers=workers)
    eval_envs = suite.make(seed=spec.seed, autoreset=False)
    meters = Meters(names)

    checkpoint = store.load_checkpoint()
    store.rewind(checkpoint[0] if checkpoint else None)
    replay = ReplayBuffer(
        store.replay_path, suite.spec, agent.extras_spec, capacity=replay_capacity(spec),
        slack=replay_slack(spec), seed=stream(spec.seed, "replay"), device=agent.device,
    )  # fmt: skip
    if checkpoint:
        step, content = checkpoint
        agent.load_state_dict(content["agent"])
        replay.load_state_dict(json.loads(content["replay"]))
        meters.load_state_dict(content["meters"])
        clock.load(content["seconds"])
        facts: dict[str, Any] = content["facts"]
        obs = envs.load_state_dict(json.loads(content["envs"]))
    else:
        step, facts = 0, {}
        obs = envs.reset()
        for task in range(suite.spec.num_tasks):
            for env in range(p.envs_per_task):
                agent.on_episode_start(task, env)

    def save() -> None:
        with clock("checkpoint"):
            replay.flush()
            content = {
                "agent": agent.state_dict(),
                "replay": json.dumps(replay.state_dict()),
                "meters": meters.state_dict(),
                "seconds": clock.seconds(agent.seconds),
                "facts": facts,
                "envs": json.dumps(envs.state_dict()),
            }
            store.append_timing(step, clock.seconds(agent.seconds))
            store.save_checkpoint(step, content)

    def measure(episodes: int, kind: str) -> np.ndarray:
        with clock("evaluation"):
            outcome = evaluate(
                lambda o: agent.act(o, explore=False).action,
                eval_envs, episodes_needed(suite, episodes), p.eval_seed,
            )  # fmt: skip
        store.append_metrics(outcome.rows(step, kind, names))
        facts["success"] = float(outcome.success.mean())
        return outcome.observations

    started, saved_step, saved_at, beat_at = time.monotonic(), step, time.monotonic(), 0.0
    first = step
    while step < p.steps_per_task:
        with clock("act"):
            action, extras = agent.act(obs, explore=True)
        with clock("simulator"):
            result = envs.step(action)
        replay.add(obs, action, result, extras)
        obs, step = result.obs, step + p.envs_per_task
        for episode in result.episodes:
            meters.add_episode(episode)
            agent.on_episode_end(episode)
            agent.on_episode_start(episode.task, episode.env)
        if step > p.warmup_steps:
            with clock("update"):
                for _ in range(p.updates_per_step):
                    meters.add_update(agent.update(replay.sample(p.batch_per_task)))
        now = time.monotonic()
        if now - beat_at > HEARTBEAT_SECONDS:
            beat_at = now
            heartbeat(step, facts | {"steps_per_second": (step - first) / (now - started)})
        if not result.episodes:
            continue

        meters.check(step)
        if due(step, p.horizon * p.envs_per_task, p.steps_per_task, LOGGED_POINTS):
            store.append_metrics(meters.rows(step))
        if due(step, p.horizon * p.envs_per_task, p.steps_per_task, PROBED_POINTS):
            store.write_probe(f"{step:010d}", agent.probe())
        if step % p.eval_every == 0 and step < p.steps_per_task:
            measure(p.eval_episodes, "eval")
        late = time.monotonic() - saved_at > CHECKPOINT_SECONDS
        stopping = stop()
        if stopping or late or step - saved_step >= CHECKPOINT_STEPS or step == p.steps_per_task:
            save()
            saved_step, saved_at = step, time.monotonic()
        if stopping and step < p.steps_per_task:
            raise Interrupted

    heartbeat(step, facts)
    store.write_probe("trace", agent.trace(measure(p.final_episodes, "final")))
    store.append_timing(step, clock.seconds(agent.seconds))
    envs.close()
    eval_envs.close()
    store.finish()


def due(step: int, unit: int, total: int, points: int) -> bool:
    """Whether ``step``, a multiple of ``unit``, is one of about ``points`` spread over ``total``."""
    every = max(1, total // unit // points) * unit
    return step % every == 0 or step == total


class Clock:
    """Seconds spent in each part of a run, over all its sessions."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._spent: dict[str, float] = defaultdict(float)
        self._before: dict[str, float] = {}

    @contextmanager
    def __call__(self, section: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._spent[section] += time.perf_counter() - started

    def load(self, seconds: dict[str, float]) -> None:
        """Continue from the seconds of earlier sessions."""
        self._before = dict(seconds)

    def seconds(self, of_agent: dict[str, float]) -> dict[str, float]:
        """Cumulative seconds per section, ``total`` included."""
        now = dict(self._spent) | of_agent | {"total": time.perf_counter() - self._started}
        sections = {*now, *self._before}
        return {s: now.get(s, 0.0) + self._before.get(s, 0.0) for s in sorted(sections)}


class Meters:
    """Sums of training metrics since the last log point, kept where they are computed."""

    def __init__(self, task_names: tuple[str, ...]) -> None:
        self.names = task_names
        self._episodes = np.zeros((len(task_names), 3))  # episodes, successes, sum of returns
        self._sums: dict[str, Tensor] = {}
        self._updates = 0

    def add_episode(self, episode: Episode) -> None:
        """Count a training episode."""
        self._episodes[episode.task] += 1, episode.success, episode.return_

    def add_update(self, metrics: dict[str, Tensor]) -> None:
        """Add an update's metrics, each (T,)."""
        for name, value in metrics.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
        self._updates += 1

    def check(self, step: int) -> None:
        """Raise DivergenceError, naming metric and tasks, if a sum is not finite."""
        if not self._sums:
            return
        finite = torch.stack([value.isfinite() for value in self._sums.values()]).cpu()
        if bool(finite.all()):
            return
        metric, task = finite.logical_not().nonzero()[0].tolist()
        raise DivergenceError(
            f"training diverged by step {step}: {list(self._sums)[metric]} of "
            f"{self.names[task]} is no longer a finite number"
        )

    def rows(self, step: int) -> list[Row]:
        """The means since the last call, and start anew."""
        rows = []
        for task, name in enumerate(self.names):
            count, successes, total = self._episodes[task]
            if count:
                rows.append(Row(step, "train", name, "success", successes, count))
                rows.append(Row(step, "train", name, "return", total / count, count))
        for metric, sums in self._sums.items():
            means = (sums / self._updates).tolist()
            for name, value in zip(self.names, means, strict=True):
                rows.append(Row(step, "update", name, metric, value, self._updates))
        self._episodes[:] = 0
        self._sums, self._updates = {}, 0
        return rows

    def state_dict(self) -> dict[str, Any]:
        """Everything above."""
        return {
            "episodes": torch.from_numpy(self._episodes.copy()),
            "sums": self._sums,
            "updates": self._updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self._episodes = state["episodes"].numpy().copy()
        self._sums, self._updates = dict(state["sums"]), state["updates"]


# ------------------------------------------------------------------------ one run, one process


def main(arguments: list[str] | None = None) -> int:
    """Train the run of a directory: ``python -m bench.train RUN``. Returns the exit code.

    0 done, 1 failed (status.json has the reason), 130 interrupted after a checkpoint, 75 another
    process is training it.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.train", description=main.__doc__)
    parser.add_argument("run", type=Path, help="run directory with a spec.json")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sim-workers", type=int, default=0)
    parser.add_argument("--allow-other-numerics", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    store = RunStore(options.run)
    spec = store.spec()
    stop = _StopRequest()
    identity = {"pid": os.getpid(), "host": os.uname().nodename}
    last: dict[str, Any] = {"step": store.status().get("step", 0)}

    def heartbeat(step: int, facts: dict[str, Any]) -> None:
        last.update(step=step, **facts)
        store.write_status(
            "running", steps=spec.protocol.steps_per_task, time=time.time(), **last, **identity
        )

    def ended(state: Any, **facts: Any) -> None:
        facts = {"steps": spec.protocol.steps_per_task, "time": time.time(), **last, **facts}
        store.write_status(state, **facts)

    try:
        with store.locked():
            if store.done:
                return 0
            try:
                _check_numerics(store, options.device, options.threads, options.allow_other_numerics)
                heartbeat(last["step"], {})
                train(
                    spec, store, device=options.device, workers=options.sim_workers,
                    stop=stop, heartbeat=heartbeat,
                )  # fmt: skip
            except Interrupted:
                ended("interrupted")
                return 130
            except Exception as error:  # noqa: BLE001  (whatever ended the run is recorded with it)
                ended("failed", error=_reason(error), traceback=traceback.format_exc())
                traceback.print_exc()
                return 1
            ended("done", step=spec.protocol.steps_per_task)
            store.drop_replay()
            return 0
    except BusyError as error:
        print(error, file=sys.stderr)
        return 75
    except OSError as error:
        print(f"cannot record the end of {store.path}: {error}", file=sys.stderr)
        return 1


class _StopRequest:
    """True once a signal asked for the end, or the process that started this one is gone."""

    def __init__(self) -> None:
        self._asked = False
        self._parent = os.getppid()
        signal.signal(signal.SIGINT, self._on_signal)
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        if self._asked:  # a second request does not wait for the end of the episode
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise KeyboardInterrupt
        self._asked = True

    def __call__(self) -> bool:
        return self._asked or os.getppid() != self._parent


def _check_numerics(store: RunStore, device: str, threads: int, allowed: bool) -> None:
    """Refuse to go on under other numerics than the run began with, unless asked to."""
    began = store.description()["environment"]["numerics"]
    now = machine.numerics(device, threads)
    changed = [f"{k} {began.get(k)} -> {v}" for k, v in now.items() if began.get(k) != v]
    if not changed:
        return
    message = f"the run began under other numerics ({'; '.join(changed)})"
    if not allowed:
        raise StoreError(
            f"{message}; resume it as it began, or pass --allow-other-numerics to go on anyway"
        )
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    sys.exit(main())
