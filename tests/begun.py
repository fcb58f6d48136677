"""Agents that may act, learn and be compared."""

from __future__ import annotations

from algorithms.agent import Agent
from bench.spec import RunSpec


def begun(spec: RunSpec, *, seed: int = 0, device: str = "cpu") -> Agent:
    """The specification's agent, with an episode begun in an environment of each task."""
    suite = spec.make_suite().spec
    agent = spec.agent(suite, spec.agent_config, spec.protocol.plan, seed=seed, device=device)
    for task in range(suite.num_tasks):
        agent.on_episode_start(task, 0)
    return agent
