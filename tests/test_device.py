"""What a GPU runs, without one: updates on torch's ``meta`` device.

Its tensors have shapes and no content. So any step fails that mixes them with a CPU's tensors or
waits for a number from the device, on the very path that a GPU takes (no compiled loops).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from begun import begun

import algorithms
from algorithms.mega import MEGA
from bench.replay import ReplayBuffer
from bench.spec import RunSpec
from suites.base import Step

ToySpec = Callable[..., RunSpec]
READS_BACK = ("mega@update_behaviour",)
"""Once per update this reads which genotypes its rows are of."""


def labels(name: str) -> list[str]:
    """An algorithm and its variants, with its own numbers where a name takes one."""
    agent = algorithms.load(name)
    values = agent.Config().model_dump().items()
    numbers = defaultdict(lambda: "2", {k: f"{v:g}" for k, v in values if type(v) in (int, float)})
    return [name, *(f"{name}@{variant.format_map(numbers)}" for variant in agent.VARIANTS)]


class _Generator(torch.Generator):
    """The CPU's, whatever device it is asked for."""

    def __new__(cls, device: str = "cpu") -> _Generator:  # noqa: ARG004
        return super().__new__(cls)


class _Adam(torch.optim.Adam):
    """Not ``fused``, which this device is not known to."""

    def __init__(self, params: Any, *, lr: float, fused: bool = False) -> None:
        super().__init__(params, lr=lr)


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(torch, "Generator", _Generator)
    monkeypatch.setattr("algorithms.sac.Adam", _Adam)
    return "meta"


def filled(spec: RunSpec, path: Path, device: str) -> ReplayBuffer:
    """A replay buffer for ``device`` with what the algorithm acts and stores."""
    acting = begun(spec)
    suite = acting.suite
    replay = ReplayBuffer(
        path, suite, acting.extras_spec, capacity=16, slack=4, seed=0, device=torch.device(device)
    )
    shape = (suite.num_tasks, 1)
    for _ in range(4):
        obs = np.random.default_rng(0).uniform(-1, 1, (*shape, suite.obs_dim)).astype(np.float32)
        action, extras = acting.act(obs, explore=True)
        no = np.zeros(shape, bool)
        step = Step(obs, obs, np.ones(shape, np.float32), no, no, [])
        replay.add(obs, action, step, extras)
    return replay


@pytest.mark.parametrize("label", [label for n in algorithms.names() for label in labels(n)])
def test_an_update_stays_on_the_device(
    label: str, toy_spec: ToySpec, tmp_path: Path, meta: str
) -> None:
    spec = toy_spec(label)
    agent, replay = begun(spec, device=meta), filled(spec, tmp_path / "replay", meta)

    batch = replay.sample(spec.protocol.batch_per_task)
    if label in READS_BACK:
        with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
            agent.update(batch)
        return
    for name, value in agent.update(batch).items():
        assert value.device.type == meta, name
        assert value.shape == (agent.suite.num_tasks,), name
        assert not value.requires_grad, name


def test_growth_stays_on_the_device(toy_spec: ToySpec, tmp_path: Path, meta: str) -> None:
    spec = toy_spec("mega", **{"mega.replace": "at_once"})
    agent, replay = begun(spec, device=meta), filled(spec, tmp_path / "replay", meta)
    assert isinstance(agent, MEGA)
    before = len(agent.actor.stack)
    agent.lengthen(0, 0)
    agent.update(replay.sample(4))
    assert len(agent.actor.stack) == before + 1
    assert {parameter.device.type for parameter in agent.actor.parameters()} == {meta}
