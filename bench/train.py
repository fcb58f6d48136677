"""The training loop, and the process that runs it."""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import machine
from bench.evaluate import episodes_needed, evaluate
from bench.lease import LEASE_SECONDS
from bench.replay import ReplayBuffer
from bench.spec import RunSpec
from bench.store import LOOK_SECONDS, BusyError, Row, RunStore, State, StoreError
from suites.base import Episode, SimulatorError, VectorEnv, stream

CHECKPOINT_SECONDS = 60.0
"""A checkpoint is taken at the first episode boundary this long after the last ..."""
CHECKPOINT_STEPS = 4_000
"""... or after about this many steps per task, see `checkpoint_steps`."""
LOGGED_POINTS = 100
"""Rows of training metrics over a run, at most."""
PROBED_POINTS = 50
"""Snapshots of the agent's own state over a run, at most."""
HEARTBEAT_SECONDS = 1.0
"""Between two statuses of a run, each a sign of life."""
HANG_SECONDS = 900.0
"""A process without a heartbeat for this long hangs and is ended."""
DIVERGED = 1e12
"""A training metric beyond this is taken for divergence; values and losses stay far below."""
EXIT_FAILED, EXIT_INTERRUPTED, EXIT_BUSY = 1, 130, 75


class DivergenceError(RuntimeError):
    """A training metric stopped being a number, or a sensible one."""


class Interrupted(Exception):  # noqa: N818  (it is a request, not an error)
    """Training stopped on request, after a checkpoint."""


Heartbeat = Callable[[int, dict[str, Any]], None]
"""Called every second or few with the step and facts for the status."""


def checkpoint_steps(spec: RunSpec) -> int:
    """Steps per task from one checkpoint to the next at most: whole episodes, about a fifth of the
    run or CHECKPOINT_STEPS, whichever is less. It bounds the replay's slack."""
    p = spec.protocol
    unit = p.episode_steps
    return max(1, -(-min(CHECKPOINT_STEPS, p.steps_per_task // 5) // unit)) * unit


def replay_capacity(spec: RunSpec) -> int:
    """Rows per task that can be sampled; a short run never fills the whole buffer."""
    return min(spec.protocol.replay_per_task, spec.protocol.steps_per_task)


def replay_slack(spec: RunSpec) -> int:
    """Rows per task beyond the replay's capacity: those of two checkpoint intervals.

    Until a checkpoint is committed, the one before the last may yet be needed, if the last turns
    out damaged; no row that it could sample has been overwritten by then.
    """
    return min(2 * checkpoint_steps(spec), spec.protocol.steps_per_task - replay_capacity(spec))


def train(
    spec: RunSpec,
    store: RunStore,
    *,
    device: str = "cpu",
    compiled: bool = False,
    workers: int = 0,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    allow_other_numerics: bool = False,
    lease_seconds: float = LEASE_SECONDS,
    wait_seconds: float = LOOK_SECONDS,
    heartbeat_seconds: float = HEARTBEAT_SECONDS,
    stop: Callable[[], bool] = lambda: False,
    alive: Callable[[], None] = lambda: None,
) -> None:
    """Train ``spec`` to its end in ``store``, from its newest checkpoint if it has one.

    ``compiled``: by `torch.compile`, as far as the agent has a use for it.
    Holds the run (``lease_seconds``, ``wait_seconds``: see `RunStore.locked`) and keeps its status;
    calls ``alive`` at every heartbeat. Returns at once if the run is done already. Raises BusyError
    if another process trains it; Interrupted after a checkpoint once ``stop()`` is true;
    DivergenceError, SimulatorError, StoreError or OSError when training cannot go on.
    """
    with store.locked(expires=lease_seconds, wait=wait_seconds):
        if store.done:
            return
        before = store.status()
        known: dict[str, Any] = {"step": 0, "steps": spec.protocol.steps_per_task}
        known |= {key: before[key] for key in ("step", "other_numerics") if key in before}
        process = {"pid": os.getpid(), "host": os.uname().nodename}

        def heartbeat(step: int, facts: dict[str, Any]) -> None:
            alive()
            known.update(step=step, **facts)
            store.write_status("running", time=time.time(), **known, **process)

        def ended(state: State, **facts: Any) -> None:
            store.write_status(state, time=time.time(), **known, **facts)

        try:
            if store.checkpoint_files() and (
                changed := other_numerics(store, device, compiled, allow_other_numerics)
            ):
                known["other_numerics"] = changed
            heartbeat(known["step"], {})
            make = partial(spec.make_suite().make, seed=spec.seed, workers=workers)
            with (
                closing(make(envs_per_task=spec.protocol.envs_per_task)) as envs,
                closing(make(autoreset=False)) as eval_envs,
                machine.told_of_compiling(lambda: heartbeat(known["step"], {}))
                if compiled
                else nullcontext(),
            ):
                run_loop(
                    spec, store, envs, eval_envs, device=device, compiled=compiled, stop=stop,
                    heartbeat=heartbeat, heartbeat_seconds=heartbeat_seconds,
                    checkpoint_seconds=checkpoint_seconds,
                )  # fmt: skip
        except (Interrupted, KeyboardInterrupt):
            ended("interrupted")
            raise
        except BusyError:  # taken over: the status is the other process's now
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            ended("failed", error=reason, traceback=traceback.format_exc())
            raise
        known["step"] = spec.protocol.steps_per_task
        ended("done", peak_memory_bytes=machine.peak_memory_bytes())
        store.drop_replay()


def run_loop(
    spec: RunSpec,
    store: RunStore,
    envs: VectorEnv,
    eval_envs: VectorEnv,
    *,
    device: str,
    compiled: bool,
    stop: Callable[[], bool],
    heartbeat: Heartbeat,
    heartbeat_seconds: float,
    checkpoint_seconds: float,
) -> None:
    """What `train` does to a run that it holds."""
    p, suite = spec.protocol, spec.make_suite()
    names, clock = suite.spec.task_names, Clock()
    agent = spec.make_agent(device)
    if compiled:
        agent.compile()
    meters = Meters(names)

    checkpoint = store.resume()
    environment = machine.environment(device, torch.get_num_threads(), compiled)
    store.record_environment(environment, resumed=checkpoint is not None)
    replay = ReplayBuffer(
        store.replay_path, suite.spec, agent.extras_spec, capacity=replay_capacity(spec),
        slack=replay_slack(spec), seed=stream(spec.seed, "replay"), device=agent.device,
    )  # fmt: skip
    if checkpoint:
        step, content = checkpoint
        agent.load_state_dict(content["agent"])
        replay.load_state_dict(json.loads(content["replay"]))
        meters.load_state_dict(content["meters"], agent.device)
        clock.load(content["seconds"])
        facts: dict[str, Any] = content["facts"]
        obs = envs.load_state_dict(json.loads(content["envs"]))
    else:
        step, facts = 0, {}
        obs = envs.reset()
        for task in range(suite.spec.num_tasks):
            for env in range(p.envs_per_task):
                agent.on_episode_start(task, env)

    started, saved_step, saved_at, beat_at = time.monotonic(), step, time.monotonic(), 0.0
    first, interval = step, checkpoint_steps(spec)

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

    def beat() -> None:
        """Tell that the run is alive, if it is time to."""
        nonlocal beat_at
        now = time.monotonic()
        if now - beat_at > heartbeat_seconds:
            beat_at = now
            heartbeat(step, facts | {"steps_per_second": (step - first) / (now - started)})

    def greedy(obs: np.ndarray) -> np.ndarray:
        beat()
        return agent.act(obs, explore=False).action

    def measure(episodes: int, kind: str) -> np.ndarray:
        with clock("evaluation"):
            outcome = evaluate(greedy, eval_envs, episodes_needed(suite, episodes), p.eval_seed)
        store.append_metrics(outcome.rows(step, kind, names))
        facts["success"] = float(outcome.success.mean())
        facts["parameters"] = agent.parameter_counts()
        return outcome.observations

    def learn() -> None:
        made = 0
        while made < p.updates_per_step or agent.owed_updates:
            with clock("update"):
                meters.add_update(agent.update(replay.sample(p.batch_per_task)))
            made += 1
            beat()

    while step < p.steps_per_task:
        learning = step + p.envs_per_task > p.warmup_steps
        with clock("act"):
            action, extras = agent.act(obs, explore=True)
        with clock("simulator"), meters.suspected(step, action):
            envs.start(action)
        if learning and p.act_delay and step:
            learn()
        with clock("simulator"), meters.suspected(step, action):
            result = envs.finish()
        replay.add(obs, action, result, extras)
        obs, step = result.obs, step + p.envs_per_task
        for episode in result.episodes:
            meters.add_episode(episode)
            agent.on_episode_end(episode)
            agent.on_episode_start(episode.task, episode.env)
        if learning and not p.act_delay:
            learn()
        beat()
        if not result.episodes:
            continue

        meters.check(step)
        if due(step, p.episode_steps, p.steps_per_task, LOGGED_POINTS):
            store.append_metrics(meters.rows(step))
        if due(step, p.episode_steps, p.steps_per_task, PROBED_POINTS):
            store.write_probe(f"{step:010d}", agent.probe())
        if step % p.eval_every == 0 and step < p.steps_per_task:
            measure(p.eval_episodes, "eval")
        stopping = stop()
        late = time.monotonic() - saved_at > checkpoint_seconds or step - saved_step >= interval
        if stopping or late or step == p.steps_per_task:
            save()
            saved_step, saved_at = step, time.monotonic()
        if stopping and step < p.steps_per_task:
            heartbeat(step, facts)
            raise Interrupted

    heartbeat(step, facts)
    store.write_probe("trace", agent.trace(measure(p.final_episodes, "final")))
    heartbeat(step, facts)
    store.append_timing(step, clock.seconds(agent.seconds))
    store.finish()


def due(step: int, unit: int, total: int, points: int) -> bool:
    """Whether ``step``, a multiple of ``unit``, is one of about ``points`` over ``total``."""
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
        """Count the time spent within as the section's."""
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

    @contextmanager
    def suspected(self, step: int, action: np.ndarray) -> Iterator[None]:
        """If the simulator fails on an action that is no number, training is to blame."""
        try:
            yield
        except SimulatorError:
            self.check(step)
            if not np.isfinite(action).all():
                task = int(np.argmin(np.isfinite(action).all((1, 2))))
                raise DivergenceError(
                    f"training diverged by step {step}: the action of {self.names[task]} "
                    f"is {action[task].ravel().tolist()}"
                ) from None
            raise

    def check(self, step: int) -> None:
        """Raise DivergenceError, naming metric and task, if a mean is no number or absurd."""
        if not self._sums:
            return
        means = torch.stack(list(self._sums.values())).cpu() / self._updates  # (metrics, T)
        diverged = ~(means.abs() < DIVERGED)  # also what is not a number
        if not bool(diverged.any()):
            return
        metric, task = diverged.nonzero()[0].tolist()
        raise DivergenceError(
            f"training diverged by step {step}: {list(self._sums)[metric]} of {self.names[task]} "
            f"is {float(means[metric, task]):.3g}"
        ) from None

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

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Inverse of `state_dict`."""
        self._episodes = state["episodes"].numpy().copy()
        self._sums = {name: value.to(device) for name, value in state["sums"].items()}
        self._updates = state["updates"]


def other_numerics(store: RunStore, device: str, compiled: bool, allowed: bool) -> list[str]:
    """How this process's numerics differ from those the run began under, in words.

    Raises StoreError if they do and that is not ``allowed``.
    """
    changed = machine.changed_numerics(store.numerics, device, torch.get_num_threads(), compiled)
    if changed:
        message = f"the run began under other numerics ({'; '.join(changed)})"
        if not allowed:
            raise StoreError(
                f"{message}; resume it as it began, or pass --allow-other-numerics to go on anyway"
            )
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return changed


# ------------------------------------------------------------------------ one run, one process


def main(arguments: list[str] | None = None) -> int:
    """Train the run of a directory: ``python -m bench.train RUN``. Returns the exit code.

    0 done, 1 failed (status.json has the reason), 130 interrupted after a checkpoint, 75 another
    process is training it. A process that hangs writes where to standard error and ends with 1,
    while its status still says running.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.train", description=main.__doc__)
    parser.add_argument("run", type=Path, help="run directory with a spec.json")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:<index>")
    parser.add_argument("--compile", action="store_true", help="by torch.compile, if that works")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--sim-workers", type=int, default=0, help="processes to simulate in")
    parser.add_argument(
        "--checkpoint-seconds", type=float, default=CHECKPOINT_SECONDS,
        help="time between checkpoints, which are taken at the ends of episodes",
    )  # fmt: skip
    parser.add_argument("--allow-other-numerics", action="store_true")
    parser.add_argument(
        "--hang-seconds", type=float, default=HANG_SECONDS,
        help="end the process after this many seconds without a heartbeat; 0: never",
    )  # fmt: skip
    parser.add_argument(
        "--lease-seconds", type=float, default=LEASE_SECONDS,
        help="take the run from another machine that gave no sign of life for this many seconds",
    )  # fmt: skip
    parser.add_argument(
        "--wait-seconds", type=float, default=LOOK_SECONDS,
        help="wait this many seconds for another process that trains the run",
    )  # fmt: skip
    parser.add_argument(
        "--heartbeat-seconds", type=float, default=HEARTBEAT_SECONDS,
        help="time between two signs of life",
    )  # fmt: skip
    parser.add_argument(
        "--parent", type=int, default=os.getppid(),
        help="stop at the end of the episode once this process has not this parent any more",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.threads < 1:
        parser.error(f"--threads {options.threads}: at least 1 is needed")
    torch.set_num_threads(options.threads)
    machine.keep_freed_memory()
    store = RunStore(options.run)
    stop = _StopRequest(store, options.parent)
    try:
        device = machine.resolve_device(options.device)
        if options.compile and (problem := cannot_compile(store, device)):
            print(f"--compile: {problem}; training without", file=sys.stderr)
            options.compile = False
        train(
            store.spec(), store, device=device, compiled=options.compile,
            workers=options.sim_workers, stop=stop,
            checkpoint_seconds=options.checkpoint_seconds,
            allow_other_numerics=options.allow_other_numerics,
            lease_seconds=options.lease_seconds, wait_seconds=options.wait_seconds,
            heartbeat_seconds=options.heartbeat_seconds,
            alive=watchdog(options.hang_seconds),
        )  # fmt: skip
    except (Interrupted, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except BusyError as error:
        print(error, file=sys.stderr)
        return EXIT_BUSY
    except Exception as error:  # noqa: BLE001  (the status has it too, unless it cannot be written)
        traceback.print_exc()
        print(f"{store.path} failed: {type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_FAILED
    finally:
        faulthandler.cancel_dump_traceback_later()
    return 0


def cannot_compile(store: RunStore, device: str) -> str:
    """Why a run is better trained without `torch.compile`, in a line; "" if it is not."""
    if store.checkpoint_files() and "compiled" not in store.numerics:
        return "the run began without"
    return machine.compiler_problem(device)


def watchdog(seconds: float) -> Callable[[], None]:
    """What to call at every heartbeat so that this process ends, and says where it was, if none
    comes for ``seconds``. It works in native code, too; 0 gives one that never bites."""
    if not seconds:
        return lambda: None
    return lambda: faulthandler.dump_traceback_later(seconds, exit=True, file=2)


class _StopRequest:
    """True once a signal or a file asked for the end, or the process that started this one is
    gone."""

    def __init__(self, store: RunStore, parent: int) -> None:
        self._store, self._asked, self._parent = store, False, parent
        # SLURM's warning may reach every process of a job, but it is the job that passes it on.
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        signal.signal(signal.SIGINT, self._on_signal)
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        # A second request does not wait for the end of the episode; before the run is held, which
        # may be a long wait for another process, there is nothing to save.
        if self._asked or not self._store.held:
            raise KeyboardInterrupt
        self._asked = True

    def __call__(self) -> bool:
        return self._asked or os.getppid() != self._parent or self._store.asked_to_stop


class _Callable(ModuleType):
    """``from bench import train`` is the function, although this module has the same name."""

    __call__ = staticmethod(train)


if __name__ == "__main__":
    sys.exit(main())
sys.modules[__name__].__class__ = _Callable
