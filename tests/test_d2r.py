"""D2R on the shared SAC: which call takes which route, what is stored, what is balanced."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from algorithms.agent import Batch, Plan
from algorithms.d2r import D2R, D2RConfig, LayeredNetwork
from algorithms.nn import initialise
from algorithms.routing import modules_used, pack_path, unpack_path
from bench.spec import RunSpec
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


# ------------------------------------------------------------ layer- and model-level routing


LEVELS = {
    "layer": {"route_level": "layer", "layers": 3},
    "model": {"route_level": "model", "layers": 3},
}


def layered(level: str, layer_norm: bool = False, **config: Any) -> LayeredNetwork:
    """Three layers of three modules, in float64, with logits that spread."""
    sizes = {"width": 7, "module_width": 5, "router_width": 6, "modules": 9}
    settings = D2RConfig(**sizes | LEVELS[level] | config)
    network = LayeredNetwork(4, 2, 3, settings, copies=2, layer_norm=layer_norm).double()
    g = torch.Generator().manual_seed(3)
    initialise(network, "torch", g)
    with torch.no_grad():
        network.logits.weight.mul_(12)
        network.temperature.fill_(50)  # so that unsuitable sources are drawn as well
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=g))
    return network


def naive(network: LayeredNetwork, x: Tensor, path: Tensor) -> Tensor:
    """One row at a time along ``path`` (C, T, B, M, M), gradients stopped with `detach`."""
    config, n = network.config, network.sources
    modules, outputs = config.modules, []

    def linear(layer: Any, value: Tensor, *index: int) -> Tensor:
        return value @ layer.weight[index] + layer.bias[index if len(index) > 1 else index[0]][0]

    def norm(layers: Any, value: Tensor, c: int, m: int = 0) -> Tensor:
        for layer in layers:
            if type(layer).__name__ == "LayerNorm":
                value = F.layer_norm(value, value.shape) * layer.scale[c, m, 0]
                value = value + layer.shift[c, m, 0]
        return value

    for c, t, b in itertools.product(range(2), range(3), range(x.shape[2])):
        encoder = list(network.state_encoder)
        half = len(encoder) // 2 + 1
        f = norm(encoder[:half], linear(encoder[0], x[0, t, b], c), c).relu()
        f = norm(encoder[half:], linear(encoder[half], f, c), c)
        h = network.task_encoder.weight[c, t, 0] + network.task_encoder.bias[c, 0, 0]
        g = f * h if config.state_routing else h
        g = linear(network.router[2], linear(network.router[0], g, c).relu(), c).relu()
        z = linear(network.logits, g, c).split(n)

        def module(layer: int, i: int, value: Tensor, c: int = c) -> Tensor:
            block = network.layers[layer]
            return norm(block, linear(block[0], value, c, i), c, i).relu()

        def route(
            row: int, layer: int, segment: Tensor, m: list[Tensor], rsg: list[Tensor],
            d: Tensor = path[c, t, b],
        ) -> tuple[Tensor, Tensor]:  # fmt: skip
            """Masked and plain mixture that destination ``row`` reads from ``layer``."""
            d = d[row, layer * n : (layer + 1) * n]
            full = segment.softmax(0)
            p = torch.where(d, segment, -torch.inf).softmax(0) if config.rescale else full * d
            bar = 1 / (n + 1)
            suitable = full > bar if config.resroute_threshold == "above" else full >= bar
            hat = [m[j] if suitable[j] or not config.resrouting else rsg[j] for j in range(n)]
            masked = sum(p[j] * hat[j] for j in range(n))
            return masked, sum(p[j] * m[j] for j in range(n))

        m = [module(0, i, f.relu()) for i in range(n)]
        rsg = [value.detach() for value in m]
        for layer in range(1, config.layers):
            found, passed = [], []
            for i in range(n):
                if config.route_level == "model":
                    found.append(module(layer, i, m[i]))
                    passed.append(found[-1].detach())
                    continue
                segment = z[(layer - 1) * n + i]
                masked, plain = route(layer * n + i - 1, layer - 1, segment, m, rsg)
                shortcut = masked if config.resroute_shortcut_masked else plain
                y = module(layer, i, masked)
                found.append(y + shortcut)
                passed.append(y.detach() + shortcut)
            m, rsg = found, passed
        masked, _ = route(modules - 1, config.layers - 1, z[-1], m, rsg)
        outputs.append(linear(network.head, masked, c))
    return torch.stack(outputs).view(2, 3, x.shape[2], -1)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"resroute_shortcut_masked": True, "resroute_threshold": "at_least"},
        {"resrouting": False},
        {"top_k": 1, "rescale": False},
        {"top_k": None, "state_routing": False},
        {"layer_norm": True},
    ],
    ids=lambda options: ",".join(options) or "default",
)
def test_layered_routing_is_its_equations(level: str, options: dict[str, Any]) -> None:
    network = layered(level, **options)
    g = torch.Generator().manual_seed(4)
    x = torch.randn(1, 3, 5, 4, generator=g, dtype=torch.float64).requires_grad_()
    output, taken = network(x, "sample", g)
    expected = naive(network, x, taken.path())
    torch.testing.assert_close(output, expected)
    ours, theirs = (_gradients(of, x, network) for of in (output, expected))
    for mine, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-8, atol=1e-10)
    if network.config.resrouting and network.config.top_k is not None:  # some are unsuitable
        kept = {k: v for k, v in options.items() if not k.startswith("resroute_")}
        free = layered(level, **kept | {"resrouting": False})
        again, _ = free(x, taken.path())
        torch.testing.assert_close(again, output, rtol=0, atol=0)
        assert not torch.allclose(_gradients(again, x, free)[0], ours[0])


def _gradients(output: Tensor, x: Tensor, network: LayeredNetwork) -> tuple[Tensor, ...]:
    trained = [x, *(p for p in network.parameters() if p.requires_grad)]
    weight = torch.arange(1.0, 1 + output.numel()).double().view_as(output).sin()
    return torch.autograd.grad((output * weight).sum(), trained, materialize_grads=True)


def test_layers_restrict_the_paths() -> None:
    """Neither level lets a module read beyond the layer below it."""
    x = torch.randn(1, 3, 50, 4, dtype=torch.float64)
    pairs = {"modules": 6, "top_k": 1, "rescale": False}
    by_layer = layered("layer", **pairs)(x, "sample", torch.Generator())[1]
    path = by_layer.path()
    # Destinations m2 (first layer, reads nothing), m3 ... m6, head.
    assert path.sum(-1)[0, 0, 0].tolist() == [0, 1, 1, 1, 1, 1]
    allowed = torch.zeros(6, 6, dtype=torch.bool)
    allowed[1:3, :2] = allowed[3:5, 2:4] = allowed[5, 4:] = True
    assert torch.equal(path.flatten(0, 2).any(0), allowed)
    assert set(modules_used(path).flatten().tolist()) == {3}
    assert torch.equal(by_layer.matrix() > 0, path)
    networks = layered("model", **pairs)(x, "sample", torch.Generator())[1].path()
    fixed = torch.zeros(6, 6, dtype=torch.bool)
    fixed[1, 0] = fixed[2, 1] = fixed[3, 2] = fixed[4, 3] = True
    assert torch.equal(networks[..., :5, :], fixed[:5].expand(2, 3, 50, 5, 6))
    assert set(modules_used(networks).flatten().tolist()) == {3}


def test_layered_paths_are_drawn_as_module_level_ones() -> None:
    """P(d = {a, b}) without replacement from softmax(z / tau), and the two largest greedily."""
    settings = D2RConfig(width=7, module_width=5, router_width=6, modules=8, route_level="model",
                         layers=2)  # fmt: skip
    network = LayeredNetwork(4, 2, 2, settings).double()
    initialise(network, "torch", torch.Generator().manual_seed(0))
    z, tau = torch.tensor([0.3, -0.8, 1.0, 0.1]).double(), torch.tensor([0.5, 3.0]).double()
    with torch.no_grad():
        network.logits.weight.zero_()
        network.logits.bias[0, 0] = z
        network.temperature[0] = tau
    x = torch.zeros(1, 2, 20_000, 4, dtype=torch.float64)
    path = network(x, "sample", torch.Generator().manual_seed(1))[1].chosen[0, :, :, 0]
    for t, (a, b) in itertools.product(range(2), itertools.combinations(range(4), 2)):
        q = (z / tau[t]).softmax(0)
        exact = float(q[a] * q[b] / (1 - q[a]) + q[b] * q[a] / (1 - q[b]))
        assert abs(float((path[t, :, a] & path[t, :, b]).double().mean()) - exact) < 0.02
    assert network(x, "top_k")[1].chosen[0, 0, 0, 0].tolist() == [True, False, True, False]


@pytest.mark.parametrize(("level", "logits"), [("layer", 52), ("model", 4)])
def test_layered_networks_have_d2rs_parts(level: str, logits: int) -> None:
    """16 modules of 128 in four layers, and a router with so many logits."""
    learner = agent(10, route_level=level, layers=4)
    shared = 176_400 + 4_400 + 102_656 + 65_792 + 4 * 51_328 + 12 * 16_512 + 10 + 257 * logits
    counts = learner.parameter_counts()
    assert counts == {"actor": shared + 1_032, "critic": shared + 4 * 400 + 129}
    given = batch(learner)
    assert given.extras["route"].shape == (10, B, 17)
    stored = unpack_path(given.extras["route"], 16)[None]
    assert torch.equal(learner.actor(given.obs[None], stored)[1].path(), stored)


def test_layers_without_layered_routing_are_refused() -> None:
    for config in (
        {"layers": 4}, {"route_level": "layer"}, {"route_level": "model", "layers": 5},
    ):  # fmt: skip
        with pytest.raises(ValidationError, match="layers"):
            D2RConfig(**config)


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


def test_the_tuned_variant_is_the_plain_one_and_shares_its_runs() -> None:
    plain, tuned = (RunSpec.resolve(name, "mt10_rand", 0) for name in ("d2r", "d2r@tuned"))
    assert tuned.id == plain.id
