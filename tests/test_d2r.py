"""D2R on the shared SAC: which call takes which route, what is stored, what is balanced."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from algorithms.agent import Batch, Plan
from algorithms.d2r import D2R, D2RConfig
from algorithms.routing import pack_path, unpack_path
from suites.base import SuiteSpec

SMALL = {"width": 12, "module_width": 6, "router_width": 8}
B = 8


def agent(tasks: int = 3, seed: int = 0, **config: Any) -> D2R:
    names = tuple(f"task-{i}" for i in range(tasks))
    suite = SuiteSpec(name="s", task_names=names, obs_dim=39, action_dim=4, horizon=20)
    learner = D2R(suite, D2RConfig(**config), Plan(100, 20, 0), seed=seed)
    if config.get("width"):  # small networks begin with a path that hardly varies
        with torch.no_grad():
            for network in (learner.actor, learner.critic, learner.target_critic):
                network.logits.weight.mul_(20)
    return learner


def batch(learner: D2R, seed: int = 0) -> Batch:
    """Transitions whose stored paths are drawn by a policy like the learner's."""
    tasks = learner.suite.num_tasks
    generator = torch.Generator().manual_seed(seed)

    def normal(width: int) -> torch.Tensor:
        return torch.randn(tasks, B, width, generator=generator)

    obs = normal(39)
    extras = copy.deepcopy(learner).act(obs.numpy(), True).extras
    zeros = torch.zeros(tasks, B, 1)
    return Batch(
        obs, normal(4).tanh(), normal(1), normal(39), zeros, zeros, torch.ones(tasks, 1, 1),
        {name: torch.from_numpy(value) for name, value in extras.items()},
    )  # fmt: skip


def other_paths(given: Batch) -> Batch:
    """The same transitions with other, equally possible, stored paths."""
    path = unpack_path(given.extras["route"], 16)
    moved = torch.zeros_like(path)
    for i in range(16):
        moved[..., i, : i + 1] = path[..., i, : i + 1].roll(1, -1)
    return given._replace(extras={"route": pack_path(moved)})


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("tasks", "actor", "critic"), [(10, 684_250, 684_947), (50, 700_290, 700_987)]
)
def test_parameter_counts_are_the_published_ones(tasks: int, actor: int, critic: int) -> None:
    assert agent(tasks).parameter_counts() == {"actor": actor, "critic": critic}


@pytest.mark.parametrize(
    ("modules", "millions"), [(4, 0.908), (8, 1.054), (12, 1.207), (16, 1.369), (20, 1.539)]
)
def test_parameter_counts_by_number_of_modules(modules: int, millions: float) -> None:
    counts = agent(10, modules=modules).parameter_counts()
    assert round(sum(counts.values()) / 1e6, 3) == millions


def test_exploring_stores_the_path_that_acted() -> None:
    learner = agent(**SMALL)
    assert learner.extras_spec == {"route": ((17,), "uint8")}
    obs = np.random.default_rng(0).standard_normal((3, 2, 39)).astype(np.float32)
    acted = learner.act(obs, explore=True)
    assert acted.action.shape == (3, 2, 4)
    stored = acted.extras["route"]
    assert (stored.shape, stored.dtype) == ((3, 2, 17), np.uint8)
    path = unpack_path(torch.from_numpy(stored), 16)
    assert (path.sum((-1, -2)) == 31).all()
    draws = [learner.act(obs, explore=True).extras["route"] for _ in range(3)]
    assert any((draw != stored).any() for draw in draws)


def test_acting_greedily_draws_nothing() -> None:
    learner = agent(**SMALL)
    obs = np.random.default_rng(0).standard_normal((3, 2, 39)).astype(np.float32)
    before = learner.noise.get_state()
    acted = learner.act(obs, explore=False)
    assert torch.equal(learner.noise.get_state(), before)
    np.testing.assert_array_equal(learner.act(obs, explore=False).action, acted.action)
    with torch.no_grad():
        mean = learner.actor(torch.from_numpy(obs)[None], "top_k")[0][0].chunk(2, -1)[0]
    np.testing.assert_array_equal(acted.action, mean.tanh().numpy())


def test_the_actor_replays_the_stored_path() -> None:
    learner = agent(**SMALL)
    given = batch(learner)
    stored = unpack_path(given.extras["route"], 16)[None]
    expected, taken = learner.actor(given.obs[None], stored)
    assert torch.equal(taken.path(), stored)
    assert torch.equal(learner.policy(given.obs, "policy", given.extras)[0], expected[0])
    greedy = learner.policy(given.obs, "target", given.extras)[0]
    assert torch.equal(greedy, learner.actor(given.obs[None], "top_k")[0][0])
    assert not torch.equal(greedy, expected[0])


@pytest.mark.parametrize(
    ("config", "actor_moves", "critic_moves"),
    [
        ({}, True, False),
        ({"critic_route": "stored"}, True, True),
        ({"target_routing": True}, False, False),
    ],
    ids=["default", "critics_replay", "target_routing"],
)
def test_who_learns_from_stored_paths(
    config: dict[str, Any], actor_moves: bool, critic_moves: bool
) -> None:
    """One update from the same transitions with other paths changes only those who replay them."""
    first, second = agent(**SMALL, **config), agent(**SMALL, **config)
    given = batch(first)
    first.update(given)
    second.update(other_paths(given))
    assert same(first.actor, second.actor) != actor_moves
    assert same(first.critic, second.critic) != critic_moves


def test_critics_draw_only_for_their_own_loss() -> None:
    learner = agent(**SMALL)
    given = batch(learner)
    drew = {}
    for phase in ("policy", "value", "target"):
        before = learner.noise.get_state()
        learner.value(learner.critic, given.obs, given.action, phase)
        drew[phase] = not torch.equal(before, learner.noise.get_state())
    assert drew == {"policy": False, "value": True, "target": False}


def test_route_temperatures_follow_the_capped_alpha() -> None:
    learner = agent(**SMALL)
    assert learner.probe()["route_temperature"].tolist() == [1, 1, 1]
    with torch.no_grad():
        learner.log_alpha[:, 0, 0] = torch.tensor([1.0, 0.5, 0.01]).log()
    learner.update(batch(learner))
    alpha = learner.log_alpha.detach().exp().flatten()
    assert alpha.max() <= 1
    expected = 3 * (1 / alpha) / (1 / alpha).sum()
    for network in (learner.actor, learner.critic, learner.target_critic):
        torch.testing.assert_close(
            network.temperature.detach(), expected.expand(len(network.temperature), 3)
        )
    printed = agent(**SMALL, tau_scale_by_T=False)
    np.testing.assert_allclose(printed.probe()["route_temperature"], 1 / 3)
    unbalanced = agent(**SMALL, route_balance=False)
    unbalanced.update(batch(unbalanced))
    assert unbalanced.probe()["route_temperature"].tolist() == [1, 1, 1]


def test_trace_holds_greedy_routes() -> None:
    learner = agent(**SMALL)
    obs = np.random.default_rng(0).standard_normal((3, 5, 39)).astype(np.float32)
    trace = learner.trace(obs)
    assert trace["routes"].shape == (3, 5, 16, 16)
    np.testing.assert_allclose(trace["routes"].sum(-1), 1, rtol=1e-5)
    assert not np.triu(trace["routes"], 1).any()
    assert ((trace["routes"] > 0).sum(-1) <= 2).all()
    used = trace["modules_used"]
    assert used.shape == (3, 5)
    assert (used >= 2).all()
    assert (used <= 16).all()


VARIED = {
    "default": {},
    "layer_norm": {"critic_layer_norm": True},
    **{
        name: {k: v for k, v in values.items() if k != "warmup_steps"}
        for name, values in D2R.VARIANTS.items()
    },
    "modules{modules}": {"modules": 5},
}


@pytest.mark.parametrize("config", VARIED.values(), ids=VARIED)
def test_save_load_continue_is_the_same_run(config: dict[str, Any]) -> None:
    """Also that two agents of one seed are equal, and that each variant updates."""
    first, second = agent(**SMALL, **config), agent(**SMALL, seed=5, **config)
    for step in range(2):
        metrics = first.update(batch(first, step))
    assert all(value.isfinite().all() for value in metrics.values())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    obs = np.random.default_rng(0).standard_normal((3, 2, 39)).astype(np.float32)
    for step in range(2, 4):
        first.update(batch(first, step))
        second.update(batch(second, step))
        ours, theirs = first.act(obs, True), second.act(obs, True)
        np.testing.assert_array_equal(ours.action, theirs.action)
        np.testing.assert_array_equal(ours.extras["route"], theirs.extras["route"])
    for name in ("actor", "critic", "target_critic"):
        assert same(getattr(first, name), getattr(second, name))
