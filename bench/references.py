"""The yardsticks of every suite: Meta-World's scripted experts and a random policy.

They are evaluated as the algorithms are, on the same episodes, and kept in run directories of their
own. They also check the success rule and the horizon: experts must succeed.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.evaluate import Policy, episodes_needed, evaluate
from bench.spec import RunSpec
from bench.store import RunStore
from suites.base import Suite, stream

POLICIES = ("expert", "random")


def references(specs: Sequence[RunSpec]) -> list[RunSpec]:
    """The reference runs of ``specs``: one per suite, and one per seed where goals are frozen."""
    found: dict[str, RunSpec] = {}
    for spec in specs:
        frozen = spec.make_suite().frozen_goals
        for policy in POLICIES:
            protocol = spec.protocol
            world = {
                "suite": spec.suite, "policy": policy, "seed": spec.seed if frozen else 0,
                **{key: getattr(protocol, key) for key in
                   ("goals", "reward_version", "horizon", "eval_seed", "eval_episodes")},
            }  # fmt: skip
            id_ = f"{zlib.crc32(json.dumps(world, sort_keys=True).encode()):08x}"
            found[id_] = RunSpec(
                id=id_, suite=spec.suite, algorithm=policy, label=policy, seed=world["seed"],
                preset=spec.preset, protocol=protocol, config={},
            )  # fmt: skip
    return list(found.values())


def measure(spec: RunSpec, store: RunStore) -> None:
    """Evaluate the reference policy ``spec.algorithm`` and keep its rows in ``store``."""
    suite = spec.make_suite()
    envs = suite.make(seed=spec.seed, autoreset=False)
    episodes = spec.protocol.eval_episodes
    if spec.algorithm == "expert":
        episodes = episodes_needed(suite, episodes)
    outcome = evaluate(policy(spec.algorithm, suite, spec), envs, episodes, spec.protocol.eval_seed)
    envs.close()
    store.resume()
    store.append_metrics(outcome.rows(0, "reference", suite.spec.task_names))
    store.finish()
    store.write_status("done", step=0, steps=0, time=time.time(),
                       success=float(outcome.success.mean()))  # fmt: skip


def policy(name: str, suite: Suite, spec: RunSpec) -> Policy:
    """The named reference policy; the random one draws from a stream of the evaluation seed."""
    if name == "expert":
        return suite.expert
    rng = np.random.default_rng(stream(spec.protocol.eval_seed, "random", spec.suite))
    action_dim = suite.spec.action_dim

    def random(obs: np.ndarray) -> np.ndarray:
        return rng.uniform(-1, 1, (*obs.shape[:2], action_dim)).astype(np.float32)

    return random


def ensure(specs: Sequence[RunSpec], out: Path, environment: dict[str, Any]) -> list[RunSpec]:
    """Measure the references of ``specs`` that ``out`` lacks; returns those measured."""
    measured = []
    for spec in references(specs):
        store = RunStore.create(out, spec, environment)
        if store.done:
            continue
        with store.locked():
            measure(spec, store)
        measured.append(spec)
    return measured
