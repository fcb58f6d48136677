"""The baselines against their equations, written naively, and what learns from what."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import algorithms
import algorithms.nn as nn_parts
import suites
from algorithms.agent import Agent, Batch, Match, Plan
from algorithms.care import AttentiveCritic, CAREConfig, sentence_vectors
from algorithms.hard_routing import Controller, HardModules, HardRouting
from algorithms.mixture_of_experts import Mixture
from algorithms.moore import OrthogonalMixture, gram_schmidt
from algorithms.nn import LayerNorm, Linear, ModuleLinear, initialise
from algorithms.paco import ComposedNetwork, PaCo
from algorithms.single_task_sac import SingleTaskSAC
from algorithms.soft_module import SoftModuleNetwork
from bench.spec import RunSpec
from suites.base import SuiteSpec

PLAN = Plan(10_000, 200, 0)


def suite_of(tasks: int) -> SuiteSpec:
    names = tuple(f"task-{task}" for task in range(tasks))
    return SuiteSpec(name="shape", task_names=names, obs_dim=39, action_dim=4, horizon=200)


def make(name: str, tasks: int = 3, seed: int = 0, **settings: Any) -> Agent:
    agent = algorithms.load(name)
    sizes = {"width": 16, "depth": 2, "module_width": 8, "router_width": 8}
    small = {name: size for name, size in sizes.items() if name in agent.Config.model_fields}
    return agent(suite_of(tasks), agent.Config(**(small | settings)), PLAN, seed=seed)


def batch(tasks: int = 3, rows: int = 8, seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)

    def normal(size: int) -> Tensor:
        return torch.randn(tasks, rows, size, generator=g)

    zeros = torch.zeros(tasks, rows, 1)
    return Batch(normal(39), normal(4).tanh(), normal(1), normal(39), zeros, zeros,
                 torch.ones(tasks, 1, 1), {})  # fmt: skip


def drawn(network: nn.Module) -> nn.Module:
    """Parameters of ordinary size everywhere, in float64."""
    g = torch.Generator().manual_seed(1)
    initialise(network, "torch", g)
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, LayerNorm):
                layer.scale.uniform_(0.5, 1.5, generator=g)
                layer.shift.uniform_(-0.5, 0.5, generator=g)
    return network.double()


def affine(layer: nn.Module, value: Tensor, *index: int) -> Tensor:
    bias = layer.bias[index] if len(index) > 1 else layer.bias[index[0]]
    return value @ layer.weight[index] + bias[0]


def norm(layer: nn.Module, value: Tensor, c: int, m: int = 0) -> Tensor:
    if not isinstance(layer, LayerNorm):
        return value
    y = (value - value.mean()) / (value.var(correction=0) + 1e-5).sqrt()
    return y * layer.scale[c, m, 0] + layer.shift[c, m, 0]


def naive_soft_module(net: SoftModuleNetwork, s: Tensor, c: int, task: int) -> Tensor:
    """One sample of one task through one copy, module by module."""
    n, code = net.modules_count, net.reading == "code"
    encoder = list(net.state_encoder)
    normed = len(encoder) == 5
    first, second = encoder[0], encoder[3 if normed else 2]
    norms = (encoder[1], encoder[4]) if normed else (nn.Identity(), nn.Identity())
    hidden = norm(norms[0], affine(first, s, c), c).relu()
    f = norm(norms[1], affine(second, hidden, c), c)
    h = net.task_encoder.weight[c, task, 0] + net.task_encoder.bias[c, 0, 0]
    joint = f * h if net.state_routing else h
    g = joint
    if code:
        g = affine(net.features[2], affine(net.features[0], joint.relu(), c).relu(), c)
    logits = [affine(net.logits[0], g.relu(), c)]
    for layer in range(1, len(net.logits)):
        before = torch.cat([rows(p, n).flatten() for p in logits]) if code else logits[-1]
        u = affine(net.conditions[layer - 1], before, c)
        logits.append(affine(net.logits[layer], (g * u).relu(), c))
    weights = [rows(p, n) for p in logits]

    o = [affine(net.stack[0], f.relu() if code else f, c, j) for j in range(n)]
    for layer, p in enumerate(weights):
        after = net.norms[layer] if len(net.norms) else nn.Identity()
        found = []
        for i in range(n):
            if code:
                mixed = norm(after, sum(p[i, j] * o[j] for j in range(n)), c, i).relu()
            else:
                mixed = sum(p[i, j] * norm(after, o[j], c, j).relu() for j in range(n))
            found.append(affine(net.stack[layer + 1], mixed, c, i))
        o = found
    if not code:
        return sum(o)
    u = affine(net.output_condition, torch.cat([w.flatten() for w in weights]), c)
    q = torch.softmax(affine(net.output_logits, (g * u).relu(), c), 0)
    mixed = sum(q[j] * o[j] for j in range(n))
    if len(net.norms):
        mixed = norm(net.norms[-1], mixed, c)
    return affine(net.head, mixed.relu(), c)


def rows(logits: Tensor, n: int) -> Tensor:
    """Eq. 7, row by row."""
    return torch.stack([torch.softmax(row, 0) for row in logits.view(n, n)])


@pytest.mark.parametrize("reading", ["code", "paper"])
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize(("layers", "state_routing"), [(2, True), (4, True), (3, False)])
def test_soft_module_is_its_equations(
    reading: Any, layer_norm: bool, layers: int, state_routing: bool
) -> None:
    net = drawn(
        SoftModuleNetwork(
            6, 4, 3, copies=2, width=5, layers=layers, modules=3, module_width=4, router_width=7,
            state_routing=state_routing, reading=reading, layer_norm=layer_norm,
        )
    )  # fmt: skip
    assert isinstance(net, SoftModuleNetwork)
    x = torch.randn(1, 3, 2, 6, dtype=torch.float64)
    expected = torch.stack([
        torch.stack([
            torch.stack([naive_soft_module(net, x[0, t, b], c, t) for b in range(2)])
            for t in range(3)
        ])
        for c in range(2)
    ])  # fmt: skip
    torch.testing.assert_close(net(x), expected)


def test_soft_modules_probabilities_are_traced() -> None:
    agent = make("soft_module", modules=3, layers=3)
    routes = agent.trace(np.random.default_rng(0).standard_normal((3, 5, 39), np.float32))
    shown = routes["soft_routes"]
    assert shown.shape == (3, 5, 2, 3, 3)
    np.testing.assert_allclose(shown.sum(-1), 1, rtol=1e-5)
    # The authors draw the routing logits' layer near zero: routing starts almost uniform.
    np.testing.assert_allclose(shown, 1 / 3, atol=0.02)


@pytest.mark.parametrize(
    ("name", "key", "shape"),
    [
        ("soft_module", "soft_routes", (3, 5, 3, 4, 4)),
        ("mixture_of_experts", "expert_weights", (3, 5, 4)),
        ("care", "attention", (3, 6)),
        ("paco", "composition", (3, 5)),
        ("moore", "expert_weights", (3, 4)),
        ("hard_routing", "module_routes", (3, 4)),
    ],
)
def test_what_tasks_take_from_the_modules_is_traced(
    name: str, key: str, shape: tuple[int, ...]
) -> None:
    agent = make(name)
    agent.update(batch())
    found = agent.trace(np.random.default_rng(0).standard_normal((3, 5, 39), np.float32))
    assert list(found) == [key]
    assert found[key].shape == shape
    if key in ("soft_routes", "attention") or name == "mixture_of_experts":
        np.testing.assert_allclose(found[key].sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_paco_composes_parameters(layer_norm: bool) -> None:
    """theta = sum_k w_k Phi_k, task by task, equals K passes only where the network is linear."""
    net = drawn(ComposedNetwork(6, [5, 5], 4, 2, copies=2, layer_norm=layer_norm))
    assert isinstance(net, ComposedNetwork)
    with torch.no_grad():
        for layer in net.layers:
            layer.weight.normal_()
            layer.bias.normal_()
    x = torch.randn(1, 3, 4, 6, dtype=torch.float64)
    vectors = torch.randn(1, 3, 2, dtype=torch.float64)
    found = net(x, vectors.expand(2, -1, -1))
    for c in range(2):
        for t in range(3):
            w, y = vectors[0, t], x[0, t]
            for number, layer in enumerate(net.layers):
                weight = sum(w[k] * layer.weight[c, k] for k in range(2))
                y = y @ weight + sum(w[k] * layer.bias[c, k] for k in range(2))
                if number < 2:
                    y = torch.stack([norm(net.norms[number], row, c) for row in y]).relu()
            torch.testing.assert_close(found[c, t], y)


def test_paco_starts_from_one_set_and_tasks_differ() -> None:
    agent = make("paco")
    for layer in agent.actor.layers:
        assert torch.equal(layer.weight[:, :1].expand_as(layer.weight), layer.weight)
    assert agent.probe()["composition"].shape == (3, 5)


def test_pacos_sets_and_tasks_grow_apart() -> None:
    """w is N(0, 1) (PaCo's code), on fifty tasks as on three: what sets learn differs between them,
    and w is all by which a task is known."""
    suite = SuiteSpec(
        name="many", task_names=tuple(map(str, range(50))), obs_dim=5, action_dim=2, horizon=10
    )
    config = PaCo.Config(width=16)
    agent = PaCo(suite, config, Plan(100_000, 10, 0), seed=0)
    w = agent.probe()["composition"]
    assert abs(w.mean()) < 0.2
    assert 0.85 < w.std() < 1.15
    began = agent.critic.layers[1].weight.detach().clone()
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        obs, following = (torch.randn(50, 8, 5, generator=generator) for _ in range(2))
        action = torch.rand(50, 8, 2, generator=generator) * 2 - 1
        reward = 10 * torch.sin(obs.sum(-1, keepdim=True) * torch.arange(50)[:, None, None])
        ended = torch.zeros(50, 8, 1)
        agent.update(Batch(obs, action, reward, following, ended, ended, torch.ones(50, 1, 1), {}))
    moved = agent.critic.layers[1].weight.detach() - began  # (2, K, inputs, outputs)
    common = moved.mean(1, keepdim=True)
    assert (moved - common).square().sum() > 0.1 * moved.square().sum()


@pytest.mark.parametrize(
    ("variant", "plain"), [("soft_module@shallow", "soft_module"), ("care@original", "care")]
)
def test_a_preset_scales_variants_of_other_sizes_too(variant: str, plain: str) -> None:
    def size(label: str, preset: str) -> int:
        spec = RunSpec.resolve(label, "mt10_rand", 0, preset_name=preset)
        agent = spec.agent(spec.make_suite().spec, spec.agent_config, spec.protocol.plan, seed=0)
        return sum(agent.parameter_counts().values())

    ratios = [size(variant, preset) / size(plain, preset) for preset in ("paper", "cpu")]
    assert ratios[0] < 1
    assert ratios[1] == pytest.approx(ratios[0], abs=0.1)


def test_paco_resets_the_composition_of_extreme_tasks_alone() -> None:
    agent = make("paco", actor_lr=1e-12, critic_lr=1e-12)
    assert isinstance(agent, PaCo)
    old = agent.w.detach().clone()
    extreme = batch()
    extreme.reward[1] = 1e6
    assert agent.update(extreme)["masked"].tolist() == [0, 1, 0]
    new = agent.w.detach().clone()
    torch.testing.assert_close(new[:, [0, 2]], old[:, [0, 2]], rtol=0, atol=1e-6)
    # w_1 lies between w_0 and w_2.
    share = (new[:, 1] - old[:, 0]) / (old[:, 2] - old[:, 0])
    torch.testing.assert_close(share, share[:1, :1].expand_as(share), rtol=1e-3, atol=1e-3)
    assert 0 <= share.mean() <= 1
    everywhere = batch()
    everywhere.reward[:] = 1e6
    assert agent.update(everywhere)["masked"].tolist() == [1, 1, 1]
    torch.testing.assert_close(agent.w.detach(), new, rtol=0, atol=1e-6)


def test_pacos_w_learns_from_both_losses_and_not_through_the_policys_critics() -> None:
    agent = make("paco")
    assert isinstance(agent, PaCo)
    given = batch()
    for phase, learns in (("value", True), ("policy", False)):
        q = agent.value(agent.critic, given.obs, given.action, phase)
        found = torch.autograd.grad(q.sum(), agent.w, allow_unused=True)[0]
        assert (found is not None and bool(found.abs().sum() > 0)) is learns
    params, _ = agent.policy(given.obs, "policy", {})
    assert torch.autograd.grad(params.sum(), agent.w)[0].abs().sum() > 0


def test_gram_schmidt_against_a_worked_example() -> None:
    h = torch.tensor([[3.0, 4.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 2.0]], dtype=torch.float64)
    found = gram_schmidt(h.view(1, 3, 1, 1, 3), 1e-12).view(3, 3)
    wanted = torch.tensor([[0.6, 0.8, 0.0], [0.8, -0.6, 0.0], [0.0, 0.0, 1.0]]).double()
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("orthogonal", [True, False])
def test_moore_is_its_equations(orthogonal: bool) -> None:
    net = drawn(OrthogonalMixture(6, 5, 3, 4, 3, 2, copies=2, orthogonal=orthogonal))
    assert isinstance(net, OrthogonalMixture)
    x = torch.randn(1, 3, 4, 6, dtype=torch.float64)
    found = net(x)
    layers = [layer for layer in net.experts if not isinstance(layer, nn.ReLU)]
    for c in range(2):
        for t in range(3):
            for b in range(4):
                h = []
                for k in range(2):
                    y = affine(layers[0], x[0, t, b], c, k).relu()
                    y = affine(layers[1], y, c, k).relu()
                    h.append(affine(layers[2], y, c, k))
                if orthogonal:
                    h[0] = h[0] / h[0].norm()
                    h[1] = h[1] - (h[0] @ h[1]) * h[0]
                    h[1] = h[1] / h[1].norm()
                v = (net.task_weights[c, t, 0] * h[0] + net.task_weights[c, t, 1] * h[1]).tanh()
                torch.testing.assert_close(found[c, t, b], affine(net.head, v, c, t))


def assert_compiled_is_plain(
    monkeypatch: pytest.MonkeyPatch, net: nn.Module, x: Tensor, trained: list[Tensor]
) -> None:
    """Outputs of ``net`` at ``x``, and gradients of a weighted sum of them at ``trained``."""
    found = []
    for compiled in (True, False):
        monkeypatch.setattr(nn_parts, "COMPILED", compiled)
        output = net(x)
        weight = torch.arange(1.0, 1 + output.numel()).double().view_as(output).sin()
        found.append([output, *torch.autograd.grad((output * weight).sum(), trained)])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("destinations", [1, 3])
def test_the_compiled_blend_is_the_plain_one(
    monkeypatch: pytest.MonkeyPatch, destinations: int, biased: bool, rectify: bool
) -> None:
    g = torch.Generator().manual_seed(0)
    p = torch.randn(2, 3, 4, destinations, 5, generator=g).double().requires_grad_()
    o = torch.randn(2, 5, 3, 4, 6, generator=g).double().requires_grad_()
    bias = torch.randn(2, 5, 1, 6, generator=g).double().requires_grad_() if biased else None
    weight = torch.randn(2, destinations, 3, 4, 6, generator=g).double()
    wanted = [p, o] if bias is None else [p, o, bias]
    found = []
    for compiled in (True, False):
        monkeypatch.setattr(nn_parts, "COMPILED", compiled)
        mixed = nn_parts.blended(p, o.clone(), bias, rectify=rectify)
        found.append([mixed, *torch.autograd.grad((mixed * weight).sum(), wanted)])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("reading", ["code", "paper"])
def test_the_compiled_soft_module_is_the_plain_one(
    monkeypatch: pytest.MonkeyPatch, reading: Any, layer_norm: bool
) -> None:
    """Values and gradients of every parameter and of the input."""
    net = drawn(
        SoftModuleNetwork(
            6, 4, 3, copies=2, width=7, layers=3, modules=2, module_width=5, router_width=6,
            reading=reading, layer_norm=layer_norm,
        )
    )  # fmt: skip
    x = torch.randn(1, 3, 4, 6, dtype=torch.float64).requires_grad_()
    trained = [x, *net.parameters()]
    assert_compiled_is_plain(monkeypatch, net, x, trained)


def test_paco_acts_by_the_composed_parameters() -> None:
    """One row per task mixes the sets' outputs, more compose parameters first: the same."""
    g = torch.Generator().manual_seed(0)
    net = drawn(ComposedNetwork(6, [7, 5], 4, 3, copies=2, layer_norm=True))
    w = torch.randn(2, 4, 3, generator=g).double().requires_grad_()
    x = torch.randn(1, 4, 1, 6, generator=g).double()
    found = []
    for rows in (x, x.expand(-1, -1, 2, -1)):
        output = net(rows, w)
        of_w = torch.autograd.grad(output.square().sum() / rows.shape[2], w)[0]
        found.append([output[:, :, :1], of_w])
    for alone, composed in zip(*found, strict=True):
        torch.testing.assert_close(alone, composed)


def test_moores_compiled_mixture_is_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients, which stay finite where an expert has no output."""
    g = torch.Generator().manual_seed(0)
    net = drawn(OrthogonalMixture(6, 5, 2, 4, 3, 4, copies=2))
    x = torch.randn(1, 3, 4, 6, dtype=torch.float64, generator=g).requires_grad_()
    trained = [x, *net.parameters()]
    assert_compiled_is_plain(monkeypatch, net, x, trained)
    with torch.no_grad():  # the second expert is zero
        net.experts[-1].weight[:, 1] = 0
        net.experts[-1].bias[:, 1] = 0
    for compiled in (True, False):
        monkeypatch.setattr(nn_parts, "COMPILED", compiled)
        gradients = torch.autograd.grad(net(x).sum(), trained)
        assert all(each.isfinite().all() for each in gradients)


@pytest.mark.parametrize("mix", ["outputs", "features"])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_the_mixture_of_experts_is_its_equations(mix: Any, layer_norm: bool) -> None:
    net = drawn(Mixture(6, [5, 5], 4, 3, 2, copies=2, gate_width=4, mix=mix, layer_norm=layer_norm))
    assert isinstance(net, Mixture)
    x = torch.randn(1, 3, 4, 6, dtype=torch.float64)
    found = net(x)
    linears = [layer for layer in net.experts if isinstance(layer, ModuleLinear)]
    norms = [layer for layer in net.experts if isinstance(layer, LayerNorm)] or [nn.Identity()] * 2
    gate = [layer for layer in net.gate if isinstance(layer, Linear)]
    for c in range(2):
        for t in range(3):
            for b in range(4):
                g = (affine(gate[0], x[0, t, b], c) + gate[0].task_bias[c, t, 0]).relu()
                p = torch.softmax(affine(gate[2], affine(gate[1], g, c).relu(), c), 0)
                each = []
                for k in range(2):
                    y = affine(linears[0], x[0, t, b], c, k) + linears[0].task_bias[c, k, t, 0]
                    y = norm(norms[0], y, c, k).relu()
                    y = norm(norms[1], affine(linears[1], y, c, k), c, k).relu()
                    each.append(affine(linears[2], y, c, k) if mix == "outputs" else y)
                y = p[0] * each[0] + p[1] * each[1]
                wanted = y if mix == "outputs" else affine(net.head, y, c)
                torch.testing.assert_close(found[c, t, b], wanted)


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("one_hot", [0, 3])
def test_hard_routing_is_its_equations(layer_norm: bool, one_hot: int) -> None:
    net = drawn(
        HardModules(
            6, 4, copies=2, width=5, layers=3, modules=2, module_width=4, one_hot=one_hot,
            layer_norm=layer_norm,
        )
    )  # fmt: skip
    assert isinstance(net, HardModules)
    g = torch.Generator().manual_seed(2)
    x = torch.randn(1, 3, 4, 6, dtype=torch.float64, generator=g)
    path = torch.randint(2, (1, 3, 4, 3), generator=g)
    found = net(x, path)
    first, second = (layer for layer in net.state_encoder if isinstance(layer, Linear))
    norms = [layer for layer in net.state_encoder if isinstance(layer, LayerNorm)]
    first_norm, second_norm = norms or [nn.Identity()] * 2
    for c in range(2):
        for t in range(3):
            for b in range(4):
                y = affine(first, x[0, t, b], c)
                if one_hot:
                    y = y + first.task_bias[c, t, 0]
                y = norm(second_norm, affine(second, norm(first_norm, y, c).relu(), c), c).relu()
                for (module, after), d in zip(net.layers, path[0, t, b], strict=True):
                    y = norm(after, affine(module, y, c, int(d)), c, int(d)).relu()
                torch.testing.assert_close(found[c, t, b], affine(net.head, y, c))
    # Only the modules that a row takes learn from it.
    only = torch.zeros(1, 3, 4, 3, dtype=torch.int64)
    torch.autograd.backward(net(x, only).sum())
    for module, _ in net.layers:
        assert module.weight.grad[:, 0].abs().sum() > 0
        assert not module.weight.grad[:, 1].any()


def test_hard_routings_controller_draws_by_its_table() -> None:
    controller = Controller(2, 3, 4)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        controller.table.normal_(generator=g)
    p = torch.softmax(controller.table[0], -1).detach()
    drawn_paths = controller.draw(20_000, g)[0]  # (T, rows, L)
    seen = torch.stack([(drawn_paths == module).float().mean(1) for module in range(4)], -1)
    torch.testing.assert_close(seen, p, rtol=0, atol=0.02)
    assert torch.equal(controller.likeliest()[0, :, 0], p.argmax(-1))
    log_p = controller.log_likelihood(drawn_paths[None, :, :5])
    for t in range(2):
        for b in range(5):
            wanted = sum(p[t, layer, drawn_paths[t, b, layer]].log() for layer in range(3))
            torch.testing.assert_close(log_p[t, b, 0].detach(), wanted)


def test_hard_routings_table_learns_by_reinforce_alone() -> None:
    """grad eta = E[(J - J_T) grad log p(d)], row by row; no value changes, no other gradient."""
    agent = make("hard_routing")
    assert isinstance(agent, HardRouting)
    controller, network = agent.actor.controller.double(), agent.actor.network.double()
    with torch.no_grad():
        controller.table.normal_(generator=torch.Generator().manual_seed(0))
        agent.running_mean = torch.tensor([0.3, -0.2, 1.0]).double().view(3, 1, 1)
    agent.fresh = False
    noise = agent.noise.get_state()
    mean, _ = agent.policy(batch().obs.double(), "policy", {})
    agent.noise.set_state(noise)
    path = controller.draw(8, agent.noise)[0]
    objective = mean.square().sum(-1, keepdim=True)
    before = agent.running_mean.clone()
    loss = agent.actor_loss(objective)
    torch.testing.assert_close(loss, objective.mean((1, 2)), rtol=0, atol=0)
    torch.testing.assert_close(
        agent.running_mean, 0.99 * before + 0.01 * objective.detach().mean(1, keepdim=True)
    )
    parameters = list(network.parameters())
    gradient, *ours = torch.autograd.grad(loss.sum(), [controller.table, *parameters])
    wanted = torch.zeros_like(controller.table)
    p = torch.softmax(controller.table.detach(), -1)
    for t in range(3):
        for b in range(8):
            advantage = objective[t, b, 0].detach() - before[t, 0, 0]
            for layer in range(4):
                for module in range(4):
                    taken = float(path[t, b, layer] == module)
                    wanted[0, t, layer, module] += advantage * (taken - p[0, t, layer, module]) / 8
    torch.testing.assert_close(gradient, wanted)
    # The modules' gradient is that of the objective along the drawn path.
    again = network(batch().obs[None].double(), path[None])[0].square().sum(-1).mean(1).sum()
    for found, plain in zip(ours, torch.autograd.grad(again, parameters), strict=True):
        torch.testing.assert_close(found, plain)


def test_hard_routing_takes_the_likeliest_modules_in_evaluation_and_to_judge_actions() -> None:
    agent = make("hard_routing")
    obs, action = batch().obs, batch().action
    drew = {}
    for phase in ("policy", "value", "target"):
        before = agent.noise.get_state()
        agent.value(agent.critic, obs, action, phase)
        drew[phase] = not torch.equal(before, agent.noise.get_state())
    assert drew == {"policy": False, "value": True, "target": False}
    first = agent.actor.controller
    with torch.no_grad():
        first.table[0, :, :, 2] += 1
    assert (agent.trace(obs.numpy())["module_routes"] == 2).all()
    greedy = agent.policy(obs, "exploit", {})[0]
    path = torch.full((1, 3, 8, 4), 2)
    torch.testing.assert_close(greedy, agent.actor.network(obs[None], path)[0])
    assert agent.probe()["module_probabilities"].shape == (3, 4, 4)


def test_moores_experts_follow_the_number_of_tasks() -> None:
    assert make("moore", 10).actor.task_weights.shape == (1, 10, 4)
    assert make("moore", 11).actor.task_weights.shape == (1, 11, 6)
    assert make("moore", 3, experts=2).actor.task_weights.shape == (1, 3, 2)


def care_config(**settings: Any) -> CAREConfig:
    sizes = {"width": 5, "depth": 2, "encoders": 3, "encoder_width": 4, "context_width": 6}
    return CAREConfig(**(sizes | settings))


@pytest.mark.parametrize("layout", ["table", "textbook"])
@pytest.mark.parametrize("metadata", ["sentence", "learned"])
def test_care_is_its_equations(layout: Any, metadata: Any) -> None:
    tasks = ("reach-v3", "push-v3")
    net = drawn(AttentiveCritic(7, 2, tasks, care_config(layout=layout, metadata=metadata)))
    assert isinstance(net, AttentiveCritic)
    x = torch.randn(1, 2, 3, 9, dtype=torch.float64)
    found, core = net(x), net.network
    for c in range(2):
        for t in range(2):
            v = net.context.vectors[c if metadata == "learned" else 0, t, 0]
            layers = net.context.layers
            z = affine(layers[2], affine(layers[0], v, c).relu(), c)
            g = affine(core.gate[2], affine(core.gate[0], z, c).relu(), c).relu()
            p = torch.softmax(affine(core.gate[4], g, c), 0)
            for b in range(3):
                s, a = x[0, t, b, :7], x[0, t, b, 7:]
                e = sum(
                    p[k] * affine(core.encoders[2], affine(core.encoders[0], s, c, k).relu(), c, k)
                    for k in range(3)
                )
                y = affine(core.trunk[0], torch.cat([e, s if layout == "table" else z, a]), c)
                if layout == "table":
                    y = y + core.trunk[0].task_bias[c, t, 0]
                y = affine(core.trunk[2], y.relu(), c).relu()
                torch.testing.assert_close(found[c, t, b], affine(core.trunk[4], y, c))


def test_cares_context_learns_from_the_critics_alone() -> None:
    agent = make("care")
    mean, _ = agent.policy(batch().obs, "policy", {})
    torch.autograd.backward(mean.sum())
    assert all(p.grad is None for p in agent.critic.parameters())
    assert all(p.grad is not None for p in agent.actor.parameters())
    q = agent.value(agent.critic, batch().obs, batch().action, "value")
    torch.autograd.backward(q.sum())
    assert all(p.grad is not None for p in agent.critic.context.parameters())


def test_every_meta_world_task_has_a_sentence_of_its_own() -> None:
    names = suites.load("mt50_rand").spec.task_names
    vectors = sentence_vectors(names)
    assert vectors.shape == (50, 768)
    similar = np.corrcoef(vectors)
    assert (similar[~np.eye(50, dtype=bool)] < 0.99).all()
    near = names[int(np.argsort(-similar[names.index("drawer-open-v3")])[1])]
    assert near in ("drawer-close-v3", "door-open-v3")
    assert np.isclose(vectors.std(), 1, atol=0.1)
    # Tasks of another suite: fixed by their names, and of the same scale.
    other = sentence_vectors(("point-0", "point-1"))
    np.testing.assert_array_equal(other, sentence_vectors(("point-0", "point-1")))
    assert abs(np.corrcoef(other)[0, 1]) < 0.2


class Noiseless(SingleTaskSAC):
    """Takes the mean action, so that agents of different numbers of tasks see the same noise."""

    def normal(self, shape: torch.Size) -> Tensor:
        return torch.full(shape, 0.5)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_single_task_sac_is_t_separate_agents(layer_norm: bool) -> None:
    config = Noiseless.Config(width=16, depth=2, critic_layer_norm=layer_norm, grad_clip=0.05)
    together = Noiseless(suite_of(3), config, PLAN, seed=0)
    alone = [Noiseless(suite_of(1), config, PLAN, seed=0) for _ in range(3)]
    for task, agent in enumerate(alone):
        for mine, theirs in (
            (agent.actor, together.actor),
            (agent.critic, together.critic),
            (agent.target_critic, together.target_critic),
        ):
            mine.load_state_dict({k: v[:, task : task + 1] for k, v in theirs.state_dict().items()})
    for seed in range(5):
        data = batch(seed=seed)
        data.reward[1] = 1e5  # neither masked nor weighted away, nor anybody else's business
        together.update(data)
        for task, agent in enumerate(alone):
            own = [v[task : task + 1] for v in data[:-1]]
            agent.update(Batch(*own, {}))
    for task, agent in enumerate(alone):
        for name in ("actor", "critic"):
            theirs = getattr(together, name).state_dict()
            for key, value in getattr(agent, name).state_dict().items():
                torch.testing.assert_close(
                    value, theirs[key][:, task : task + 1], rtol=1e-4, atol=1e-6
                )
        torch.testing.assert_close(agent.log_alpha[0], together.log_alpha[task])


@pytest.mark.parametrize(
    ("name", "variant"),
    [(n, v) for n in algorithms.names() if n not in ("mega", "d2r")
     for v in algorithms.load(n).VARIANTS],
)  # fmt: skip
def test_every_variant_trains(name: str, variant: str) -> None:
    agent = algorithms.load(name)
    values = {
        k: v
        for k, v in agent.VARIANTS[variant].items()
        if k in agent.Config.model_fields and not isinstance(v, Match)
    }
    if "{" in variant:
        values[variant.split("{")[1].rstrip("}")] = 2
    made = make(name, **values)
    for seed in range(3):
        metrics = made.update(batch(seed=seed))
    assert all(value.isfinite().all() for value in metrics.values())
