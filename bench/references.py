"""The yardsticks of every suite: Meta-World's scripted experts and a random policy.

They are evaluated as the algorithms are, on the same episodes, and kept in run directories of their
own. They also check the success rule and the horizon: experts must succeed.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from bench.evaluate import Policy, episodes_needed, evaluate
from bench.spec import Protocol, RunSpec
from bench.store import BusyError, RunStore
from suites.base import Suite, stream

POLICIES = ("expert", "random")
EVALUATION = ("goals", "reward_version", "horizon", "eval_seed", "eval_episodes")
"""What of a protocol an evaluation depends on; nothing of how long anything is trained."""


def references(specs: Sequence[RunSpec]) -> list[RunSpec]:
    """The reference runs of ``specs``: one per suite, and one per seed where goals are frozen."""
    found: dict[str, RunSpec] = {}
    for spec in specs:
        frozen = spec.make_suite().frozen_goals
        for policy in POLICIES:
            evaluation = {key: getattr(spec.protocol, key) for key in EVALUATION}
            seed = spec.seed if frozen else 0
            world = {"suite": spec.suite, "policy": policy, "seed": seed, **evaluation}
            id_ = f"{zlib.crc32(json.dumps(world, sort_keys=True).encode()):08x}"
            horizon = spec.protocol.horizon
            protocol = Protocol(
                **evaluation, steps_per_task=horizon, eval_every=horizon, warmup_steps=0
            )
            found[id_] = RunSpec(
                id=id_, suite=spec.suite, algorithm=policy, label=policy, seed=seed,
                preset=spec.preset, protocol=protocol, config={},
            )  # fmt: skip
    return list(found.values())


def measure(spec: RunSpec, store: RunStore) -> None:
    """Evaluate the reference policy ``spec.algorithm`` and keep its rows in ``store``."""
    suite = spec.make_suite()
    episodes = episodes_of(spec.algorithm, suite, spec.protocol.eval_episodes)
    with closing(suite.make(seed=spec.seed, autoreset=False)) as envs:
        acts = policy(spec.algorithm, suite, spec)
        outcome = evaluate(acts, envs, episodes, spec.protocol.eval_seed)
    store.resume()
    store.append_metrics(outcome.rows(0, "reference", suite.spec.task_names))
    store.finish()
    store.write_status("done", step=0, steps=0, time=time.time(),
                       success=float(outcome.success.mean()))  # fmt: skip


def episodes_of(name: str, suite: Suite, episodes: int) -> int:
    """Of a policy, how many need be run: the random one is never twice the same."""
    return episodes if name == "random" else episodes_needed(suite, episodes)


def policy(name: str, suite: Suite, spec: RunSpec) -> Policy:
    """The named reference policy; the random one draws from a stream of the evaluation seed."""
    if name == "expert":
        return suite.expert
    rng = np.random.default_rng(stream(spec.protocol.eval_seed, "random", spec.suite))
    action_dim = suite.spec.action_dim

    def random(obs: np.ndarray) -> np.ndarray:
        return rng.uniform(-1, 1, (*obs.shape[:2], action_dim)).astype(np.float32)

    return random


def ensure(specs: Sequence[RunSpec], out: Path, environment: dict[str, Any]) -> list[str]:
    """Measure the references of ``specs`` that ``out`` lacks; returns what went wrong."""
    problems = []
    for spec in references(specs):
        store = RunStore(out / spec.directory)
        if store.done:
            continue
        try:
            with store.locked():  # whatever was begun before is measured anew
                (store.path / "spec.json").unlink(missing_ok=True)
                (store.path / "metrics.csv").unlink(missing_ok=True)
                RunStore.create(out, spec, environment)
                try:
                    measure(spec, store)
                except Exception as error:  # so that nobody waits for it
                    store.write_status("failed", error=f"{type(error).__name__}: {error}")
                    raise
        except BusyError:  # another sweep is at it
            continue
        except Exception as error:  # noqa: BLE001  (the suite's: what it costs is these rows)
            problems.append(f"{spec.suite} {spec.label}: {type(error).__name__}: {error}")
    return problems
