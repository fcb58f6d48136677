"""MEGA's network, growth and choice of genotypes against the paper's equations, written naively."""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from algorithms.agent import Batch, History, Plan
from algorithms.genetic import Community, GeneticSettings, decode, hamming, length, stage_of
from algorithms.mega import CAUSES, MEGA, Evolution, MEGAConfig
from algorithms.nn import LayerNorm, Linear, initialise
from algorithms.routing import RoutedNetwork
from algorithms.wiring import Decoder, GenotypeNetwork
from suites.base import Episode, SuiteSpec

MLP: dict[str, Any] = {"width": 16, "module_width": 8, "critic": "mlp", "depth": 2}


def suite_of(tasks: int, horizon: int = 200) -> SuiteSpec:
    names = tuple(f"task-{task}" for task in range(tasks))
    return SuiteSpec(name="shape", task_names=names, obs_dim=39, action_dim=4, horizon=horizon)


def make(tasks: int = 3, plan: Plan | None = None, seed: int = 0, **settings: Any) -> MEGA:
    """An agent with an episode begun in environment 0 of each task."""
    config = MEGAConfig(**(MLP | settings))
    agent = MEGA(suite_of(tasks), config, plan or Plan(60_000, 200, 0), seed=seed)
    for task in range(tasks):
        agent.on_episode_start(task, 0)
    return agent


def batch(agent: MEGA, rows: int = 8, seed: int = 0, **extras: Tensor) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tasks = agent.suite.num_tasks

    def normal(size: int) -> Tensor:
        return torch.randn(tasks, rows, size, generator=generator)

    zeros = torch.zeros(tasks, rows, 1)
    return Batch(
        normal(39), normal(4).tanh(), normal(1), normal(39), zeros, zeros,
        torch.ones(tasks, 1, 1), extras,
    )  # fmt: skip


def end_episode(agent: MEGA, task: int, return_: float = 0.0, success: bool = False) -> None:
    """An episode ends in environment 0 of a task, and the next begins."""
    agent.on_episode_end(Episode(task, 0, return_, success, agent.suite.horizon))
    agent.on_episode_start(task, 0)


def stall(agent: MEGA, task: int, windows: int = 2) -> None:
    """Episodes without success or progress; two windows of them are one growth."""
    assert agent.config.window is not None
    for _ in range(windows * agent.config.window):
        end_episode(agent, task)


def greedy(agent: MEGA, obs: np.ndarray) -> np.ndarray:
    return agent.act(obs, explore=False).action


def observations(tasks: int, rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((tasks, rows, 39), dtype=np.float32)


def random_bits(stage: int, precision: int, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 2, length(stage, precision), dtype=np.uint8)


def naive(
    network: GenotypeNetwork, x: Tensor, bits: list[list[np.ndarray]], precision: int, offset: float
) -> Tensor:
    """Eq. 3 and 4, row by row: ``bits[t]`` holds one genotype, or one for each row of task t."""
    copies, (_, tasks, rows, _) = network.copies, x.shape

    def affine(layer: nn.Module, value: Tensor, c: int) -> Tensor:
        return value @ layer.weight[c] + layer.bias[c, 0]

    def dense(layer: nn.Module, norm: nn.Module | None, value: Tensor, c: int) -> Tensor:
        y = affine(layer, value, c)
        if norm is not None:
            y = (y - y.mean()) / (y.var(correction=0) + 1e-5).sqrt()
            y = y * norm.scale[c, 0, 0] + norm.shift[c, 0, 0]
        return y.relu()

    linears = [layer for layer in network.embedding if isinstance(layer, Linear)]
    norms = [layer for layer in network.embedding if isinstance(layer, LayerNorm)] or [None, None]

    outputs = []
    for c in range(copies):
        for t in range(tasks):
            for b in range(rows):
                genotype = bits[t][b if len(bits[t]) > 1 else 0]
                s = x[c if x.shape[0] > 1 else 0, t, b]
                m = [dense(linears[1], norms[1], dense(linears[0], norms[0], s, c), c)]
                if network.task_embedding is not None:
                    m[0] = m[0] + network.task_embedding.weight[c, t, 0]
                levels = decode(genotype, precision)
                for i, d in enumerate(levels, start=1):
                    e = np.exp(d.astype(np.float64)) - offset
                    w = (e / e.sum()).astype(np.float32) if d.any() else np.full(i, 1 / i, "f4")
                    read = sum(float(w[j]) * m[j] for j in range(i))
                    if i == len(levels):
                        break
                    module = network.stack[i - 1]
                    h = dense(module.inner, module.inner_norm, read, c)
                    y = dense(module.outer, module.outer_norm, h, c)
                    m.append(y + read if network.residual else y)
                if isinstance(network.head.weight, Tensor) and network.head.weight.dim() == 4:
                    out = read @ network.head.weight[c, t] + network.head.bias[c, t, 0]
                else:
                    out = affine(network.head, read, c)
                outputs.append(out)
    return torch.stack(outputs).view(copies, tasks, rows, -1)


def community(tasks: int, precision: int = 2) -> Community:
    return Community([1] * tasks, GeneticSettings(precision=precision), np.random.default_rng(0))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("identity", ["genotype", "embedding", "head"])
@pytest.mark.parametrize(
    ("copies", "per_row", "precision", "offset"),
    [(1, False, 2, 0.99), (1, True, 2, 0.99), (2, False, 3, 1.0), (2, True, 2, 1.0)],
)
def test_network_is_eq_3_and_4(
    residual: bool, layer_norm: bool, identity: Any, copies: int, per_row: bool, precision: int,
    offset: float,
) -> None:  # fmt: skip
    rng = np.random.default_rng(copies + 2 * per_row)
    stages, rows = [2, 5, 1, 5, 3], 3
    network = GenotypeNetwork(
        6, 4, 6, tasks=len(stages), copies=copies, width=5, module_width=4, residual=residual,
        task_identity=identity, layer_norm=layer_norm,
    )  # fmt: skip
    initialise(network, "torch", torch.Generator().manual_seed(1))
    network.double()
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, LayerNorm):  # not the identity that it starts as
                layer.scale.uniform_(0.5, 1.5)
                layer.shift.uniform_(-0.5, 0.5)
    members = community(len(stages), precision)
    bits = [
        [random_bits(rng.integers(1, s + 1) if k else s, precision, rng)
         for k in range(rows if per_row else 1)]
        for s in stages
    ]  # fmt: skip
    numbers = np.array([[members.table.add(b) for b in task] for task in bits])
    wiring = Decoder(members, "half_softmax", offset, torch.device("cpu"))(numbers)
    wiring = wiring._replace(weights=wiring.weights.double())
    assert wiring.depth == tuple(sorted(wiring.depth, reverse=True))

    x = torch.randn(1, len(stages), rows, 6, dtype=torch.float64, requires_grad=True)
    expected = naive(network, x, bits, precision, offset)
    pull = torch.randn_like(expected)
    wanted = torch.autograd.grad(
        expected, [x, *network.parameters()], pull, allow_unused=True, materialize_grads=True
    )
    for _ in range(2):
        # Buffers arrive with any content: what is not computed must not be read.
        size = 7 * copies * len(stages) * rows * 5
        network._scratch.give(*(torch.full((size,), torch.nan, dtype=x.dtype) for _ in range(2)))
        actual = network(x, wiring)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
        found = torch.autograd.grad(
            actual, [x, *network.parameters()], pull, allow_unused=True, materialize_grads=True
        )
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(network(x, wiring), actual, rtol=0, atol=0)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("residual", [False, True])
def test_gradients_reach_the_weights(rows: int, residual: bool) -> None:
    """What `relax` learns from, against finite differences: one genotype per task, or per row."""
    rng = np.random.default_rng(rows)
    network = GenotypeNetwork(6, 4, 4, tasks=3, copies=2, width=5, module_width=4,
                              residual=residual)  # fmt: skip
    initialise(network, "torch", torch.Generator().manual_seed(1))
    network.double()
    members = community(3)
    numbers = np.array(
        [[members.table.add(random_bits(s, 2, rng)) for _ in range(rows)] for s in (2, 4, 1)]
    )
    wiring = Decoder(members, "half_softmax", 0.99, torch.device("cpu"))(numbers)
    x = torch.randn(1, 3, 4, 6, dtype=torch.float64)
    weights = wiring.weights.double().requires_grad_(True)
    pull = torch.randn(2, 3, 4, 4, dtype=torch.float64)

    def output(w: Tensor) -> Tensor:
        return (network(x, wiring._replace(weights=w)) * pull).sum()

    (found,) = torch.autograd.grad(output(weights), weights)
    with torch.no_grad():
        for place in (weights > 0).nonzero().tolist():
            step = torch.zeros_like(weights)
            step[tuple(place)] = 1e-6
            slope = (output(weights + step) - output(weights - step)) / 2e-6
            torch.testing.assert_close(found[tuple(place)], slope, rtol=1e-5, atol=1e-7)


def test_parameter_counts_are_the_published_sizes() -> None:
    plan = Plan(1_500_000, 200, 2_000)
    for stage in (3, 16):
        agent = MEGA(suite_of(10), MEGAConfig(start_stage=stage, evolve=False), plan, seed=0)
        counts = agent.parameter_counts()
        assert counts["actor"] == 176_400 + 102_928 * stage + 3_208
        assert counts["critic"] == 684_947
    assert counts["actor"] == 1_826_456
    for identity, more in (("embedding", 10 * 400), ("head", 9 * 3_208)):
        config = MEGAConfig(task_identity=identity, critic="mlp")
        agent = MEGA(suite_of(10), config, plan, seed=0)
        assert agent.parameter_counts()["actor"] == 488_392 + more


def test_backward_runs_once() -> None:
    agent = make()
    wiring = agent._best()
    output = agent.actor(torch.randn(1, 3, 2, 39), wiring).sum()
    torch.autograd.backward(output, retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        torch.autograd.backward(output)


def test_the_order_of_tasks_changes_nothing() -> None:
    rng, members = np.random.default_rng(0), community(4)
    numbers = np.array([[members.table.add(random_bits(s, 2, rng))] for s in (1, 4, 2, 4)])
    decoder = Decoder(members, "half_softmax", 0.99, torch.device("cpu"))
    network = GenotypeNetwork(39, 8, 4, tasks=4, width=16, module_width=8)
    initialise(network, "torch", torch.Generator().manual_seed(0))
    x = torch.randn(1, 4, 16, 39)
    plain = network(x, decoder(numbers))
    for order in ([3, 2, 1, 0], [1, 3, 2, 0]):
        torch.testing.assert_close(network(x[:, order], decoder(numbers[order])), plain[:, order])


def test_work_follows_depth() -> None:
    rng, members = np.random.default_rng(0), community(4)
    numbers = np.array([[members.table.add(random_bits(s, 2, rng))] for s in (1, 4, 2, 4)])
    wiring = Decoder(members, "half_softmax", 0.99, torch.device("cpu"))(numbers)
    assert [wiring.reach(k) for k in (0, 1, 2, 3, 4)] == [4, 4, 3, 2, 2]
    assert list(wiring.blocks()) == [(0, 2, 4), (2, 3, 2), (3, 4, 1)]
    assert not wiring.idle


def test_what_no_head_reads_is_not_computed() -> None:
    """At offset 1 a decimal of 0 is a weight of 0: here M_3 feeds nothing and M_1 only M_3."""
    members = community(1)
    bits = np.array(
        [1] * 2 + [1, 1, 0, 0] + [1, 1, 1, 1, 1, 1] + [1, 1, 0, 0, 1, 1, 0, 0], np.uint8
    )
    number = np.array([[members.table.add(bits)]])
    wiring = Decoder(members, "half_softmax", 1.0, torch.device("cpu"))(number)
    assert wiring.depth == (2,)
    assert wiring.idle == {1}
    network = GenotypeNetwork(39, 8, 3, tasks=1, width=16, module_width=8)
    initialise(network, "torch", torch.Generator().manual_seed(0))
    torch.autograd.backward(network(torch.randn(1, 1, 4, 39), wiring).sum())
    trained = [all(p.grad is not None for p in module.parameters()) for module in network.stack]
    assert trained == [False, True, False]


@pytest.mark.parametrize("tasks", [1, 3])
def test_heads_that_read_no_module(tasks: int) -> None:
    """At offset 1 a head may read m_0 alone; if all do, not one module runs."""
    members = community(tasks)
    bits = np.array([int(bit) for bit in "010101110000"], np.uint8)
    numbers = np.full((tasks, 1), members.table.add(bits))
    wiring = Decoder(members, "half_softmax", 1.0, torch.device("cpu"))(numbers)
    assert wiring.depth == (0,) * tasks
    network = GenotypeNetwork(6, 4, 2, tasks=tasks, width=5, module_width=4)
    initialise(network, "torch", torch.Generator().manual_seed(0))
    x = torch.randn(1, tasks, 3, 6, requires_grad=True)
    output = network(x, wiring)
    torch.testing.assert_close(output, network.head(network.embedding(x)))
    torch.autograd.backward(output.sum())
    assert x.grad is not None
    assert (x.grad != 0).any()
    assert all(p.grad is None for p in network.stack.parameters())


def test_the_decoder_holds_a_bounded_number_of_genotypes(monkeypatch: pytest.MonkeyPatch) -> None:
    rng, members = np.random.default_rng(0), community(2)
    numbers = np.array([[members.table.add(random_bits(3, 2, rng))] for _ in range(400)])
    decoder, held = (Decoder(members, "half_softmax", 0.99, torch.device("cpu")) for _ in "ab")
    monkeypatch.setattr("algorithms.wiring.HELD_WEIGHTS", 50 * 16)
    for k in range(0, 400, 2):
        pair = numbers[k : k + 2]
        assert torch.equal(held(pair).weights, decoder(pair).weights)
        again = np.concatenate([numbers[:2], pair])  # dropped meanwhile, or not
        assert torch.equal(held(again).weights[2:], decoder(again).weights[2:])
        assert held._weights.size <= 4 * 50 * 16


def test_growth_appends_and_disturbs_nothing() -> None:
    agent = make(replace="at_once", window=6, evaluate_genotype="best")
    for seed in range(3):
        agent.update(batch(agent, seed=seed))
    obs = observations(3, 5)
    before = greedy(agent, obs)
    parameters = {k: v.clone() for k, v in agent.actor.state_dict().items()}
    optimizer = agent.actor_optimizer
    held = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}

    stall(agent, 1)
    assert agent.community.stage.tolist() == [3, 4, 3]
    assert len(agent.actor.stack) == 4
    for name, value in parameters.items():
        assert torch.equal(agent.actor.state_dict()[name], value)
    for parameter, state in held.items():
        for key, value in state.items():
            assert torch.equal(optimizer.state[parameter][key], value)
    after = greedy(agent, obs)
    np.testing.assert_allclose(after[[0, 2]], before[[0, 2]], rtol=0, atol=1e-6)
    assert np.abs(after[1] - before[1]).max() > 0

    fresh = list(agent.actor.stack[3].parameters())
    drawn = [p.clone() for p in fresh]
    agent.update(batch(agent, seed=4))
    assert all((p != q).any() for p, q in zip(fresh, drawn, strict=True))
    assert {int(optimizer.state[p]["step"]) for p in fresh} == {1}
    assert {int(optimizer.state[p]["step"]) for p in held} == {4}


@pytest.mark.parametrize("replace", ["at_once", "at_optimise"])
@pytest.mark.parametrize(
    "settings",
    [
        {"critic": "module_level", "critic_modules": 3, "router_width": 8},
        {"update_genotype": "behaviour"},
        {"critic": "genotype", "critic_layer_norm": True},
        {"relax": True, "relax_lr": 0.1, "max_evaluate_times": 1},
        {"relax": True, "relax_lr": 0.1, "critic": "genotype", "weights": "softmax"},
    ],
)
def test_continues_exactly_across_growth(replace: Any, settings: dict[str, Any]) -> None:
    settings = {"replace": replace, "window": 6} | settings

    def new() -> MEGA:
        return make(**settings)

    def life(agent: MEGA, seed: int) -> None:
        """An episode of each task: one grows, one succeeds, one improves."""
        acts = [agent.act(observations(3, 1, seed + k), explore=True) for k in range(4)]
        extras = {k: torch.from_numpy(np.concatenate([a.extras[k] for a in acts], 1))
                  for k in acts[0].extras}  # fmt: skip
        agent.update(batch(agent, 4, seed, **extras))
        for task, (return_, success) in enumerate([(0, False), (seed % 3, True), (2**seed, False)]):
            end_episode(agent, task, float(return_), success)

    def copied(agent: MEGA) -> MEGA:
        buffer = io.BytesIO()
        torch.save(agent.state_dict(), buffer)
        buffer.seek(0)
        other = new()
        other.load_state_dict(torch.load(buffer, weights_only=True))
        return other

    agent = new()
    others: list[tuple[int, MEGA]] = []
    for seed in range(14):
        if seed in (3, 9, 12):
            others.append((seed, copied(agent)))
        life(agent, seed)
    assert agent.community.stage.tolist() == [4, 3, 3]
    for start, other in others:
        for seed in range(start, 14):
            life(other, seed)
        for (name, a), b in zip(
            agent.actor.state_dict().items(), other.actor.state_dict().values(), strict=True
        ):
            assert torch.equal(a, b), (start, name)
        for a, b in zip(agent.critic.parameters(), other.critic.parameters(), strict=True):
            assert torch.equal(a, b)
        assert agent.state_dict()["genetic"] == other.state_dict()["genetic"]
        for a, b in zip(
            agent.actor_optimizer.state_dict()["state"].values(),
            other.actor_optimizer.state_dict()["state"].values(),
            strict=True,
        ):
            assert all(torch.equal(a[k], b[k]) for k in a)
        if agent.relaxation is not None:
            a, b = agent.state_dict()["relaxed"], other.state_dict()["relaxed"]
            assert str(a) == str(b)
        for name in ("noise", "init_generator"):
            assert torch.equal(agent.state_dict()[name], other.state_dict()[name])
    with pytest.raises(ValueError, match="new agent"):
        agent.load_state_dict(new().state_dict())


def test_a_genotype_critic_grows_with_the_actor() -> None:
    agent = make(critic="genotype", critic_layer_norm=True, replace="at_once", window=6)
    agent.update(batch(agent))
    stall(agent, 1)
    for network in (agent.critic, agent.target_critic):
        assert isinstance(network, GenotypeNetwork)
        assert len(network.stack) == 4
    fast, slow = agent.critic.stack[3], agent.target_critic.stack[3]
    for p, q in zip(fast.parameters(), slow.parameters(), strict=True):
        assert torch.equal(p, q)
        assert p.requires_grad
        assert not q.requires_grad
    old = [p.clone() for p in fast.parameters()]
    for seed in range(4):
        agent.update(batch(agent, seed=seed))
    # A ReLU that never opened may leave a row of a fresh module as it was, not a whole tensor.
    assert all((p != q).any() for p, q in zip(fast.parameters(), old, strict=True))


def relaxed(agent: MEGA, task: int) -> list[np.ndarray]:
    assert agent.relaxation is not None
    decimals = agent.relaxation._decimals
    return [decimals[g].detach().numpy().copy() for g in agent.community.population(task)]


def test_relaxed_decimals_start_at_the_bits_and_learn() -> None:
    """Untrained they are the genotype's network; the drawn genotypes' alone move, in [0, 3]."""
    agent, plain = make(relax=True, relax_lr=0.05), make()
    obs = observations(3, 4)
    np.testing.assert_allclose(greedy(agent, obs), greedy(plain, obs), rtol=0, atol=1e-6)

    before = [relaxed(agent, task) for task in range(3)]
    agent.update(batch(agent))
    moved = [
        [bool((a != b).any()) for a, b in zip(relaxed(agent, t), before[t], strict=True)]
        for t in range(3)
    ]
    assert [sum(each) for each in moved] == [1, 1, 1]
    for seed in range(60):
        agent.update(batch(agent, seed=seed))
    values = np.concatenate([d for task in range(3) for d in relaxed(agent, task)])
    assert values.min() == 0.0
    assert values.max() == 3.0
    assert (values % 1 > 0).any()
    assert np.abs(greedy(agent, obs) - greedy(plain, obs)).max() > 0


def test_children_inherit_what_was_rounded() -> None:
    agent = make(relax=True, relax_lr=0.3, max_evaluate_times=1, clones="keep", evolve=False)
    community = agent.community
    for seed in range(20):
        agent.update(batch(agent, seed=seed))
    learnt = [np.rint(d).astype(int) for d in relaxed(agent, 0)]
    other = [g.bits.copy() for g in community.population(1)]
    for return_ in (1.0, 5.0, 2.0):
        end_episode(agent, 0, return_)
    assert community.generation.tolist() == [1, 0, 0]
    best = np.concatenate(decode(community.population(0)[0].bits, 2))
    np.testing.assert_array_equal(best, learnt[1])  # the elite, of return 5
    for genotype, decimals in zip(community.population(0), relaxed(agent, 0), strict=True):
        np.testing.assert_array_equal(np.concatenate(decode(genotype.bits, 2)), decimals)
    for genotype, bits in zip(community.population(1), other, strict=True):
        np.testing.assert_array_equal(genotype.bits, bits)  # its generation goes on


def test_a_genotype_whose_last_module_is_unread_learns_what_is_there() -> None:
    """At offset 1 the head does not read M_3 here, and M_3 alone reads M_1."""
    agent = make(1, relax=True, relax_lr=0.1, offset=1.0, update_genotype="best")
    bits = np.array([int(bit) for bit in "01100001010001001000"], np.uint8)
    for genotype in agent.community.population(0):
        genotype.bits, genotype.id = bits, agent.community.table.add(bits)
    assert agent.relaxation is not None
    agent.relaxation.renew(0)
    agent._forget()
    assert agent._best().depth == (2,)
    before = relaxed(agent, 0)[0]
    for seed in range(3):
        agent.update(batch(agent, seed=seed))
    moved = relaxed(agent, 0)[0] != before
    # The head's weights of m_0 and M_2; a weight alone in its row is 1 whatever its decimal.
    assert np.flatnonzero(moved).tolist() == [6, 8]


def test_growth_at_once_keeps_what_decimals_learnt() -> None:
    """`preserve` keeps the policy that acted, rounded, not that of the bits it started from."""
    agent = make(
        1, relax=True, relax_lr=0.3, growth="preserve", replace="at_once", window=6,
        max_evaluate_times=20,
    )  # fmt: skip
    for seed in range(20):
        agent.update(batch(agent, seed=seed))
    learnt = [np.rint(d).astype(int) for d in relaxed(agent, 0)]
    started = [np.concatenate(decode(g.bits, 2)) for g in agent.community.population(0)]
    assert any((a != b).any() for a, b in zip(learnt, started, strict=True))
    stall(agent, 0)
    assert agent.community.stage.tolist() == [4]
    for genotype, old in zip(agent.community.population(0), learnt, strict=True):
        levels = decode(genotype.bits, 2)
        kept = np.concatenate([*levels[:3], levels[4][:4]])  # all but M_4's and its weight
        np.testing.assert_array_equal(kept, old)
    for decimals, genotype in zip(relaxed(agent, 0), agent.community.population(0), strict=True):
        np.testing.assert_array_equal(decimals, np.concatenate(decode(genotype.bits, 2)))


def test_relaxed_bits_that_changed_are_unevaluated() -> None:
    """Whatever the fitness counts: bits that learnt to be others have run no episode yet."""
    agent = make(1, relax=True, relax_lr=0.3, fitness="running_mean", evolve=False)
    plain = make(1, fitness="running_mean", evolve=False)
    for seed in range(20):
        agent.update(batch(agent, seed=seed))
    for return_ in (1.0, 5.0, 2.0, 3.0, 3.0, 3.0):
        end_episode(agent, 0, return_)
        end_episode(plain, 0, return_)
    assert agent.community.generation.tolist() == plain.community.generation.tolist() == [1]
    assert plain.community.population(0)[0].fitness > 0
    assert np.isnan(agent.community.population(0)[0].fitness)


def test_probes_show_the_genotypes_that_act() -> None:
    agent = make(2, relax=True, relax_lr=0.3)
    before = agent.probe()["genotypes"]
    for seed in range(20):
        agent.update(batch(agent, seed=seed))
    after = agent.probe()
    assert (after["genotypes"] != before).any()
    for task in range(2):
        for member, decimals in enumerate(relaxed(agent, task)):
            bits = after["genotypes"][task, member]
            np.testing.assert_array_equal(np.concatenate(decode(bits, 2)), np.rint(decimals))


def test_relaxed_weights_with_several_environments_and_stages() -> None:
    """Genotypes of two lengths under way in one task: each with its own decimals and head."""
    agent = make(2, relax=True, relax_lr=0.2, start_stage=2, window=6)
    for task in range(2):
        agent.on_episode_start(task, 1)
    for seed in range(10):
        agent.update(batch(agent, seed=seed))
    stall(agent, 0)  # env 0 goes on to genotypes of stage 3, env 1 still holds one of stage 2
    held = [[agent.community.in_flight(t, e) for e in range(2)] for t in range(2)]
    assert {len(g.bits) for g in held[0]} == {12, 20}
    obs = torch.from_numpy(observations(2, 2))
    with torch.no_grad():
        both, _ = agent.policy(obs, "explore", {})
        for env in range(2):
            alone = agent._wire([[held[task][env]] for task in range(2)])
            expected = agent.actor(obs[None, :, env : env + 1], alone)[0]
            torch.testing.assert_close(both[:, env : env + 1], expected)


def test_a_reset_keeps_stages_and_genotypes_and_forgets_returns() -> None:
    agent = make(resets=1, replace="at_once", window=6, relax=True, critic="genotype")
    stall(agent, 1)
    end_episode(agent, 0, 5.0)
    genotypes = [{g.id for g in agent.community.population(task)} for task in range(3)]
    agent.steps = agent.plan.steps_per_task // 2 + 1
    agent.update(batch(agent))
    assert agent.resets_done == 1
    assert agent.community.stage.tolist() == [3, 4, 3]
    assert len(agent.actor.stack) == 4
    for task in range(3):
        assert {g.id for g in agent.community.population(task)} == genotypes[task]
        assert all(np.isnan(g.fitness) for g in agent.community.population(task))


def test_a_reset_leaves_every_genotype_its_decimals() -> None:
    """The populations are ranked anew; what a genotype learnt stays its own."""
    agent = make(1, resets=1, relax=True, relax_lr=0.3, evolve=False)
    for seed in range(10):
        agent.update(batch(agent, seed=seed))
    for return_ in (1.0, 2.0, 5.0):
        end_episode(agent, 0, return_)
    population = agent.community.population(0)
    learnt = dict(zip(population, relaxed(agent, 0), strict=True))
    agent.reset()
    assert agent.community.population(0) == population[::-1]
    for genotype, decimals in zip(population[::-1], relaxed(agent, 0), strict=True):
        np.testing.assert_array_equal(decimals, learnt[genotype])
    again = make(1, resets=1, relax=True, relax_lr=0.3, evolve=False)
    again.load_state_dict(agent.state_dict())
    for each in (agent, again):
        for seed in range(3):
            each.update(batch(each, seed=seed))
    for a, b in zip(relaxed(agent, 0), relaxed(again, 0), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_reset_is_no_reason_to_grow() -> None:
    """The fall in return after it says nothing of the genotypes: windows begin anew, without the
    episode that had begun under the old networks."""
    agent = make(1, resets=1, window=6)
    for _ in range(6):
        end_episode(agent, 0, 100.0, success=True)
    agent.reset()
    stall(agent, 0)  # the first episode does not count: one window, and one episode short of two
    assert agent.community.stage.tolist() == [3]
    end_episode(agent, 0)
    assert agent.community.stage.tolist() == [4]


def test_growth_preserve_keeps_the_policy() -> None:
    """No weight of the head changes by more than HalfSoftmax gives a zero beside the old head."""
    agent = make(1, growth="preserve", replace="at_once", window=6, init="torch")
    x = torch.from_numpy(observations(1, 50))[None]
    with torch.no_grad():
        before = agent.actor(x, agent._best())
        stall(agent, 0)
        wiring = agent._best()
        after = agent.actor(x, wiring)
        assert wiring.depth == (4,)
        size = torch.zeros(())  # the largest output that any m_j alone would give
        for j in range(5):
            weights = wiring.weights.clone()
            weights[..., 4, :] = 0
            weights[..., 4, j] = 1
            size = torch.maximum(size, agent.actor(x, wiring._replace(weights=weights)).abs().max())
    epsilon = 0.01 / (np.e - 0.99)
    assert 0 < (after - before).abs().max() <= 2 * epsilon * size


def test_evaluation_and_probes_touch_nothing() -> None:
    agent = make()
    for _ in range(4):
        end_episode(agent, 0, 1.0)
    state = agent.state_dict()
    obs = observations(3, 4)
    first = greedy(agent, obs)
    agent.probe()
    agent.trace(obs)
    np.testing.assert_array_equal(greedy(agent, obs), first)
    after = agent.state_dict()
    assert after["genetic"] == state["genetic"]
    assert torch.equal(after["noise"], state["noise"])


def evaluated(agent: MEGA, genotypes: list[Any]) -> None:
    """That evaluation acts with these genotypes' mean actions."""
    obs = observations(agent.suite.num_tasks, 4)
    wiring = agent.decoder(np.array([[genotype.id] for genotype in genotypes]))
    with torch.no_grad():
        mean = agent.actor(torch.from_numpy(obs)[None], wiring)[0, ..., :4]
    np.testing.assert_array_equal(greedy(agent, obs), mean.tanh().numpy())


def test_evaluation_runs_the_best_with_the_mean() -> None:
    agent = make()
    for return_ in (1.0, 5.0, 2.0):  # the population, one after the other
        end_episode(agent, 0, return_)
    best = agent.community.best(0)
    assert best.fitness == 5.0
    evaluated(agent, [best, agent.community.best(1), agent.community.best(2)])


@pytest.mark.parametrize("growth", [False, True])
def test_evaluation_runs_the_best_of_a_whole_generation(growth: bool) -> None:
    """Neither a child with one lucky episode, nor what has grown and not run yet."""
    settings: dict[str, Any] = {"window": 6, "max_evaluate_times": 2} if growth else {}
    agent, greedy_one = make(1, **settings), make(1, evaluate_genotype="best", **settings)
    for each in (agent, greedy_one):
        bits = [genotype.bits for genotype in each.community.population(0)]
        for _ in range(12 if growth else 6):
            end_episode(each, 0, float(each.community.in_flight(0, 0).bits is bits[1]))
    champion = agent.community.champion(0)
    if growth:
        assert agent.community.stage.tolist() == [4]
        assert champion not in agent.community.population(0)
    else:
        assert champion is agent.community.population(0)[0]
    for each in (agent, greedy_one):  # the second genotype of the next generation is lucky
        for return_ in (0.0, 9.0):
            end_episode(each, 0, return_)
    lucky = agent.community.population(0)[1]
    assert agent.community.best(0) is lucky
    evaluated(agent, [champion])
    evaluated(greedy_one, [greedy_one.community.population(0)[1]])

    other = make(1, **settings)
    other.load_state_dict(agent.state_dict())
    evaluated(other, [champion])
    alive = champion in agent.community.population(0)
    assert (other.community.champion(0) in other.community.population(0)) is alive


def test_each_environment_acts_with_its_own_genotype() -> None:
    agent = make(2, start_stage=2)
    agent.on_episode_start(0, 1)
    agent.on_episode_start(1, 1)
    members = [[agent.community.in_flight(t, e) for e in range(2)] for t in range(2)]
    assert members[0][0] is not members[0][1]
    obs = observations(2, 2)
    tensor = torch.from_numpy(obs)
    with torch.no_grad():
        params, _ = agent.policy(tensor, "explore", {})
        for env in range(2):
            alone = agent.decoder(np.array([[members[task][env].id] for task in range(2)]))
            expected = agent.actor(tensor[None, :, env : env + 1], alone)[0]
            torch.testing.assert_close(params[:, env : env + 1], expected)


def test_updates_read_populations_and_change_only_their_generator() -> None:
    agent = make()
    members = [[g.id for g in agent.community.population(task)] for task in range(3)]
    seen = set()
    for seed in range(12):
        before = agent.community.state_dict()
        agent.update(batch(agent, 4, seed))
        after = agent.community.state_dict()
        assert after.pop("rng") != before.pop("rng")
        assert after == before
        assert agent._drawn["policy"] is agent._drawn["target"]
        seen.add(tuple(agent._drawn["policy"].weights.flatten().tolist()))
    assert len(seen) > 3
    assert members == [[g.id for g in agent.community.population(task)] for task in range(3)]


def test_update_genotype_best_and_target_best() -> None:
    agent = make(update_genotype="best")
    before = agent.community.state_dict()
    agent.update(batch(agent))
    assert agent._drawn["policy"] is agent._best()
    assert agent.community.state_dict() == before
    agent = make(target_genotype="best")
    agent.update(batch(agent))
    assert agent._drawn["target"] is agent._best()


def test_update_genotype_behaviour_replays_what_acted() -> None:
    """Rows of a task learn under the genotypes that acted in them, short ones among long ones."""
    agent = make(2, update_genotype="behaviour", replace="at_once", window=3)
    assert agent.extras_spec == {"genotype": ((), "int32")}
    stored, bits = [], []
    obs = observations(2, 10)
    for row in range(10):
        stored.append(agent.act(obs[:, row : row + 1], explore=True).extras["genotype"])
        bits.append([agent.community.in_flight(task, 0).bits for task in range(2)])
        end_episode(agent, 0)
        end_episode(agent, 1, success=True)
    assert agent.community.stage.tolist() == [4, 3]
    extras = torch.from_numpy(np.concatenate(stored, 1))
    assert extras.dtype == torch.int32
    metrics = agent.update(batch(agent, 10, genotype=extras))
    assert metrics["actor_loss"].isfinite().all()
    assert agent._drawn["target"] is agent._drawn["policy"]  # of s and s' alike
    tensor = torch.from_numpy(obs)
    with torch.no_grad():
        params, _ = agent.policy(tensor, "policy", {})
        per_task = [[bits[row][task] for row in range(10)] for task in range(2)]
        expected = naive(agent.actor, tensor[None], per_task, 2, 0.99)[0]
    torch.testing.assert_close(params, expected)


def test_critics_draw_their_routes_for_their_own_loss_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And at temperatures that follow alpha, from the start, after updates and after resets
    (Departure 6)."""
    agent = make(2, critic="module_level", critic_modules=4, router_width=8)
    networks = {id(agent.critic): "critic", id(agent.target_critic): "target"}
    asked: list[tuple[str, object]] = []
    forward = RoutedNetwork.forward

    def heard(self: RoutedNetwork, x: Tensor, route: Any, generator: Any = None) -> Any:
        asked.append((networks[id(self)], route))
        return forward(self, x, route, generator)

    monkeypatch.setattr(RoutedNetwork, "forward", heard)
    with torch.no_grad():
        agent.log_alpha[:, 0, 0] = torch.tensor([1.0, 0.1]).log()
    agent.update(batch(agent))
    assert asked == [("target", "top_k"), ("critic", "sample"), ("critic", "top_k")]
    for _ in range(2):
        weight = 1 / agent.log_alpha.detach().exp().flatten()
        for network in (agent.critic, agent.target_critic):
            expected = (2 * weight / weight.sum()).expand(2, 2)
            torch.testing.assert_close(network.temperature.detach(), expected)
        agent.reset()


def test_settings_that_only_some_suites_make_idle_are_taken() -> None:
    """Of three genotypes one is dropped at a time, of MT50's four two, and one is crossed."""
    config = MEGAConfig(abandon_rate=0.3, crossover_rate=0.3)
    plan = Plan(1_000_000, 200, 2_000)
    assert config.for_run(suite_of(50), plan).population_size == 4
    with pytest.raises(ValidationError, match="crossover_rate"):
        config.for_run(suite_of(10), plan)


def test_evolution_by_hand() -> None:
    def feed(evolution: Evolution, *windows: tuple[float, float]) -> list[int | None]:
        """Windows of (mean return, success rate), 4 episodes each."""
        causes = []
        for mean, rate in windows:
            for episode in range(4):
                last = evolution.record(0, mean + (episode - 1.5), episode < 4 * rate)
                assert last is None or episode == 3
            causes.append(last)
        return causes

    def new() -> Evolution:
        return Evolution(1, 4, 0.5, 0.1)

    # The first window is compared with nothing; after an increase one window of rest.
    assert feed(new(), (10, 0), (10, 0), (10, 0), (10, 0)) == [None, 0, None, 0]
    assert feed(new(), (10, 0), (8, 0)) == [None, 1]
    assert [CAUSES[0], CAUSES[1]] == ["unsolved, return stalled", "unsolved, return fell"]
    # Solved, or making progress: no increase, and progress is measured window by window.
    assert feed(new(), (10, 0.5), (10, 0.5), (5, 0.5), (5, 0.25)) == [None, None, None, 0]
    assert feed(new(), (10, 0), (11, 0), (12, 0), (13.5, 0)) == [None, None, 0, None]
    # Returns below zero.
    assert feed(new(), (-10, 0), (-8, 0), (-7.5, 0)) == [None, None, 0]


def test_warmup_counts_for_nothing() -> None:
    agent = make(1, Plan(60_000, 200, 400), window=2)
    for steps in (200, 400):
        agent.steps = steps
        end_episode(agent, 0, 9.0)
    assert not any(g.evaluations for g in agent.community.population(0))
    for steps in (600, 800):  # the first window of episodes that count
        agent.steps = steps
        end_episode(agent, 0, 1.0)
    assert sum(g.evaluations for g in agent.community.population(0)) == 2
    assert agent.community.stage[0] == 3
    for steps in (1000, 1200):
        agent.steps = steps
        end_episode(agent, 0, 1.0)
    assert agent.stage_events == [[1200, 0, 3, 4, 0]]


def test_steps_are_those_of_training() -> None:
    agent = make(2)
    for task in range(2):
        agent.on_episode_start(task, 1)
    agent.act(observations(2, 2), explore=True)
    agent.act(observations(2, 5), explore=False)
    assert agent.steps == 2


def test_stages_stop_at_the_maximum_or_never_start() -> None:
    agent = make(1, window=2, max_stage=4)
    stall(agent, 0, windows=9)
    assert agent.community.stage[0] == 4
    assert len(agent.stage_events) == 1
    fixed = make(1, evolve=False, start_stage=30, precision=1)
    assert fixed.config.window is None
    for _ in range(100):
        end_episode(fixed, 0)
    assert fixed.community.stage[0] == 30


def test_smoke_length_completes_generations_and_grows() -> None:
    """20 episodes per task, 2 of them warm-up, returns without trend, hardly a success."""
    for tasks in (10, 50):
        rng = np.random.default_rng(tasks)
        agent = make(tasks, Plan(4_000, 200, 400))
        for episode in range(1, 21):
            agent.steps = 200 * episode
            for task in range(tasks):
                end_episode(agent, task, rng.normal(50, 10))
        assert (agent.community.generation >= 2).all()
        assert (agent.community.stage > 3).sum() > tasks / 4
        lengths = agent.probe()["lengths"]
        assert (lengths == length(4, agent.precision)).any()


def test_probe_is_complete() -> None:
    agent = make(3, window=2)
    for return_ in (1.0, 4.0, 2.0):
        end_episode(agent, 2, return_)
    stall(agent, 0)
    agent.steps = 77
    probe = agent.probe()
    assert all(value.dtype != object for value in probe.values())
    assert probe["stage"].tolist() == [4, 3, 3]
    assert probe["stage_events"].tolist() == [[0, 0, 3, 4, 0]]
    assert probe["cause_names"].tolist() == list(CAUSES)
    assert probe["genotypes"].shape[:2] == (3, 3)
    assert probe["genotypes"].dtype == np.int8
    assert probe["best"][2] == [g.fitness for g in agent.community.population(2)].index(4.0)
    assert np.isnan(probe["fitness"][1]).all()
    assert (probe["modules_used"] <= 4).all()
    assert probe["modules_used"].dtype.kind == "f"
    assert probe["weight_intervals"].shape == (5, 5)
    assert probe["precision"] == 2
    expected = {
        "stage", "stage_events", "cause_names", "genotypes", "lengths", "fitness", "evaluations",
        "best", "modules_used", "hamming", "clone_rate", "generation", "weight_intervals",
        "precision", "gone", "culled", "judged", "judged_fitness", "evaluated",
    }  # fmt: skip
    assert probe.keys() == expected
    assert agent.seconds["genetic"] > 0
    assert make().probe()["stage_events"].shape == (0, 5)


def history(agent: MEGA, **changes: Any) -> History:
    """What a run of 100 log points records, healthy unless changed."""
    tasks, plan = agent.suite.num_tasks, agent.plan
    steps = np.linspace(plan.steps_per_task / 100, plan.steps_per_task, 100)
    flat = np.ones((100, tasks))
    given = {
        "success": 0.5 * flat, "return_": 100 * flat,
        "updates": {"masked": 0 * flat, "alpha": 0.1 * flat},
        "probe": agent.probe(),
    } | changes  # fmt: skip
    return History(
        agent.suite.task_names, agent.config, plan, [(plan.steps_per_task, given["probe"])], steps,
        given["success"], given["return_"], given["updates"],
    )  # fmt: skip


def verdicts(agent: MEGA, **changes: Any) -> dict[str, tuple[str, str]]:
    found = MEGA.health(history(agent, **changes))
    assert len({finding.check for finding in found}) == len(found)
    assert all(finding.advice for finding in found if finding.result == "bad")
    return {finding.check: (finding.result, finding.verdict) for finding in found}


def test_a_sound_run_is_healthy() -> None:
    agent = make(4, window=1000)
    for episode in range(60):
        for task in range(4):
            end_episode(agent, task, float((7 * episode + task) % 11))
    found = verdicts(agent)
    # The population is one survivor and its children: crossover has one parent (Alg. 1's order).
    assert found.pop("clones")[0] == "note"
    assert found.pop("population")[0] in ("good", "note")
    assert {result for result, _ in found.values()} == {"good"}
    # Ten generations in each of four tasks, two genotypes replaced in each.
    assert "0 of 80" in verdicts(agent)["evaluation"][1]


def test_health_names_each_failure() -> None:
    agent = make(4, window=10)
    steps, flat = agent.plan.steps_per_task, np.ones((100, 4))
    probe = agent.probe()
    same = probe | {
        "hamming": np.array([0.01, 0.3, 0.3, 0.02]),
        "evaluated": np.repeat(probe["evaluated"][:1], 4, 0),
        "clone_rate": np.full(4, 0.8),
        "gone": np.full(4, 10), "culled": np.array([0, 5, 0, 0]),
    }  # fmt: skip
    found = verdicts(agent, probe=same, updates={"masked": flat * [0.9, 0, 0, 0],
                                                 "alpha": flat * [1e-5, 1, 1, 1]})  # fmt: skip
    for check, result, words in (
        ("population", "note", "2 of 4 tasks (task-0, task-3)"),
        ("tasks apart", "bad", "one cluster"),
        ("evaluation", "bad", "5 of 40"),
        ("clones", "note", "80 % of the children"),
        ("updates", "bad", "1 of 4 tasks (task-0)"),
        ("exploration", "note", "1 of 4 tasks (task-0)"),
    ):
        assert found[check][0] == result, check
        assert words in found[check][1]

    events = np.array(
        [[steps * k // 10, task, 3 + k, 4 + k, 0] for k in (8, 9) for task in (0, 1, 2)]
    )
    grown = probe | {"stage": np.array([24, 5, 5, 3]), "stage_events": events}
    assert found["growth"][0] == "good"
    assert verdicts(agent, probe=grown)["growth"][0] == "bad"
    late = verdicts(agent, probe=grown | {"stage": np.array([5, 5, 5, 3])})
    assert late["growth"][0] == "note"
    assert "3 of 4 tasks" in late["growth"][1]
    falling = flat.cumsum(0)[::-1]
    assert late["after growth"][0] == "good"
    drop = verdicts(agent, probe=grown, return_=falling**3)
    assert drop["after growth"][0] == "bad"
    ruined = 100 * flat
    ruined[80:, 0] = 45.0  # one task of three
    one = verdicts(agent, probe=grown | {"stage_events": events[:3]}, return_=ruined)
    assert one["after growth"][0] == "note"
    assert "1 of 4 tasks (task-0)" in one["after growth"][1]


def bred(agent: MEGA, generations: int) -> dict[str, np.ndarray]:
    """The probe after generations in which a genotype is the better the nearer to the first."""
    assert agent.config.population_size is not None
    for _ in range(generations * 2 * agent.config.population_size):
        for task in range(agent.suite.num_tasks):
            first = agent.community.population(task)[0].bits
            differing = agent.community.in_flight(task, 0).bits != first
            end_episode(agent, task, -float(differing.sum()))
    return agent.probe()


def test_collapse_is_found_where_breeding_cannot_leave_one_genotype() -> None:
    """Without other tasks' genotypes and with clones kept, a population is copies of its best."""
    alone = {
        "clones": "keep", "crossover_cross_threshold": 1.0, "mutation_cross_threshold": 1.0,
        "window": 1000,
    }  # fmt: skip
    for size, result, copies in ((3, "note", "10 %"), (4, "bad", "8 %")):
        agent = make(2, **alone, population_size=size)
        found = verdicts(agent, probe=bred(agent, 20))
        assert found["population"][0] == result  # of three one survives, whatever happens
        assert f"mutants: {copies}" in found["population"][1]
        assert found["clones"][0] == "note"
    # Clones are mutated by default, so a population around one genotype is its mutants.
    around = make(2, crossover_cross_threshold=1.0, mutation_cross_threshold=1.0, window=1000)
    found = verdicts(around, probe=bred(around, 20))
    assert found["population"][0] == "note"
    assert "mutants: 18 %" in found["population"][1]
    diverse = make(2, window=1000, population_size=6, abandon_rate=0.2)
    assert verdicts(diverse, probe=bred(diverse, 5))["population"][0] == "good"


def test_a_probe_holds_a_whole_generation_whenever_it_is_taken() -> None:
    """Probes fall at the same few episodes of a generation: the one under way is known in part."""
    agent = make(1, window=1000)
    assert (agent.probe()["judged"] == -1).all()
    for _ in range(6):
        end_episode(agent, 0, float(agent.community.in_flight(0, 0).bits.sum()))
    judged, fitness = (agent.probe()[key][0] for key in ("judged", "judged_fitness"))
    assert fitness.tolist() == sorted(judged.sum(1).astype(float), reverse=True)
    end_episode(agent, 0, 0.0)
    probe = agent.probe()
    assert (probe["judged"][0] == judged).all()
    assert (probe["evaluated"][0] == judged[0]).all()  # the champion
    agent.reset()
    elite = agent.community.population(0)[0]
    assert (agent.probe()["evaluated"][0] == elite.bits).all()


def test_relaxed_genotypes_and_their_diversity_are_of_the_same_bits() -> None:
    agent = make(2, relax=True, relax_lr=0.5, window=1000)
    for _ in range(20):
        agent.update(batch(agent))
    probe = agent.probe()
    for task in range(2):
        assert probe["hamming"][task] == hamming(list(probe["genotypes"][task].astype(np.uint8)))
    assert (probe["hamming"] != agent.community.hamming()).any()


def test_one_task_of_many_modules_does_not_make_one_cluster_of_the_others() -> None:
    agent = make(20, window=1000, precision=4)
    agent.community.stage[0] = 24
    agent.community._replace(0, agent.community._random_population(0))
    assert verdicts(agent)["tasks apart"][0] == "good"


def test_a_module_that_nobody_reads_is_reported() -> None:
    """At offset 1 a decimal of 0 is a weight of 0: the head reads m_1 alone."""
    agent = make(2, offset=1.0)
    bits = np.array([1] * 8 + [1] * 4 + [0, 0, 1, 1, 0, 0, 0, 0], np.int8)
    probe = agent.probe()
    probe["evaluated"] = np.broadcast_to(bits, (2, 20))
    found = verdicts(agent, probe=probe)
    assert found["modules"] == (
        "note",
        "M_2, M_3 of 3 modules fed no task's head through weights above 0.01 in the second half "
        "of training",
    )


def test_configuration_is_decided_by_suite_and_length() -> None:
    plan = Plan(1_500_000, 200, 2_000)
    small = MEGAConfig().for_run(suite_of(10), plan)
    assert (small.precision, small.population_size, small.window) == (2, 3, 374)
    large = MEGAConfig().for_run(suite_of(11), plan)
    assert (large.precision, large.population_size) == (4, 4)
    assert small.for_run(suite_of(50), plan) == small  # decided once
    short = {4_000: 6, 20_400: 20, 10_400: 10, 100_400: 25}  # 18, 100, 50 and 500 episodes
    for steps, window in short.items():
        assert MEGAConfig().for_run(suite_of(10), Plan(steps, 200, 400)).window == window
    assert MEGAConfig(evolve=False).for_run(suite_of(10), plan).window is None


@pytest.mark.parametrize(
    "settings",
    [
        {"start_stage": 25},
        {"start_stage": 24},
        {"weights": "softmax", "growth": "preserve"},
        {"optimise": "random", "growth": "extend"},
        {"population_size": 2, "crossover_rate": 0.3},
        {"update_genotype": "best", "target_genotype": "best"},
        {"critic_top_k": 17},
        {"start_stage": 1, "precision": 1, "population_size": 9},
        {"weights": "softmax", "offset": 0.9},
        {"offset": 0.0},
        {"precision": 9},
        {"population_size": 1},
        {"evolve": False, "growth": "preserve"},
        {"evolve": False, "window": 10},
        {"critic": "mlp", "critic_modules": 8},
        {"optimise": "random", "parents": "before_drop"},
        {"mutation_best_threshold": 0.99},
        {"critic": "genotype", "critic_top_k": 3},
        {"relax_lr": 0.1},
        {"relax": True, "update_genotype": "behaviour"},
        {"unknown": 1},
    ],
)
def test_inconsistent_settings_raise(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        MEGAConfig(**settings)


@pytest.mark.parametrize("variant", list(MEGA.VARIANTS))
def test_every_variant_trains(variant: str) -> None:
    values = {k: v for k, v in MEGA.VARIANTS[variant].items() if k in MEGAConfig.model_fields}
    rates = {"offset": 1.0, "mutation_rate": 0.3}
    values |= {field: rates.get(field, 5) for field in re.findall(r"{(\w+)}", variant)}
    agent = make(2, **values)
    extras = agent.act(observations(2, 1), explore=True).extras
    stored = {k: torch.from_numpy(v).expand(2, 4) for k, v in extras.items()}
    for task in range(2):
        for _ in range(8):
            end_episode(agent, task)
    assert all(v.isfinite().all() for v in agent.update(batch(agent, 4, **stored)).values())
    if variant.startswith(("fixed", "stage")):
        assert len(agent.actor.stack) == 5
    if variant.startswith("precision"):
        assert stage_of(len(agent.community.best(0).bits), 5) == 3
