"""The shared learner against equations worked by hand: one task and one network at a time."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

from algorithms.agent import Batch, Plan
from algorithms.mt_sac import MTSAC, MTSACConfig
from algorithms.nn import (
    LayerNorm,
    Linear,
    Owing,
    TaskLinear,
    initialise,
    mlp,
    split_gaussian,
    squash,
)
from algorithms.sac import ARS, Adam, clip_slices, frozen, learned
from suites.base import SuiteSpec

T, B, O, A = 3, 6, 5, 2  # noqa: E741
SUITE = SuiteSpec(
    name="s", task_names=("a", "b", "c"), obs_dim=O, action_dim=A, horizon=10
)  # fmt: skip
PLAN = Plan(steps_per_task=1000, horizon=10, warmup_steps=10)


def make_agent(**config: Any) -> MTSAC:
    """A small agent in float64, its temperatures apart from one another."""
    agent = MTSAC(SUITE, MTSACConfig(width=7, depth=2, **config), PLAN, seed=3)
    for network in (agent.actor, agent.critic, agent.target_critic):
        network.double()
    with torch.no_grad():
        for network in (agent.actor, agent.critic, agent.target_critic):
            for p in network.parameters():  # away from the small values of the first layers
                p.add_(0.3 * torch.randn(p.shape, generator=agent.init_generator, dtype=p.dtype))
        agent.log_alpha.data = torch.tensor([-0.2, -1.5, -3.0]).double().view(T, 1, 1)
    return agent


@pytest.fixture(autouse=True)
def _noise_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    normal = MTSAC.normal
    monkeypatch.setattr(MTSAC, "normal", lambda self, shape: normal(self, shape).double())


def make_batch(seed: int = 0, **changes: Tensor) -> Batch:
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).double()

    batch = Batch(
        obs=rand(T, B, O), action=rand(T, B, A).tanh(), reward=5 * rand(T, B, 1),
        next_obs=rand(T, B, O), terminated=(rand(T, B, 1) > 0.8).double(),
        truncated=(rand(T, B, 1) > 0.5).double(),
        mean_reward=torch.tensor([4.0, 0.5, -1.0]).double().view(T, 1, 1), extras={},
    )  # fmt: skip
    return batch._replace(**changes)


# ------------------------------------------------------------------ a reference without any axis


class Net(nn.Module):
    """One copy of a stacked network as plain layers on the observation and a one-hot task id."""

    def __init__(self, stacked: nn.Sequential, number: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for layer in stacked:
            if isinstance(layer, Linear):
                weight = layer.weight.detach()[number].T
                if layer.task_bias is not None:
                    weight = torch.cat([weight, layer.task_bias.detach()[number, :, 0].T], 1)
                linear = nn.Linear(weight.shape[1], weight.shape[0]).double()
                linear.weight.data = weight.clone()
                linear.bias.data = layer.bias.detach()[number, 0].clone()
                layers.append(linear)
            elif isinstance(layer, LayerNorm):
                norm = nn.LayerNorm(layer.scale.shape[-1]).double()
                norm.weight.data = layer.scale.detach()[number, 0, 0].clone()
                norm.bias.data = layer.shift.detach()[number, 0, 0].clone()
                layers.append(norm)
            else:
                layers.append(nn.ReLU())
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor, task: int) -> Tensor:
        """(B, inputs) of one task."""
        one_hot = torch.zeros(len(x), T).double()
        one_hot[:, task] = 1
        return self.layers(torch.cat([x, one_hot], 1))

    def equals(self, stacked: nn.Sequential, number: int) -> None:
        mine = self.state_dict()
        for name, value in Net(stacked, number).state_dict().items():
            torch.testing.assert_close(value, mine[name], rtol=1e-9, atol=1e-11, msg=name)


class Reference:
    """Multi-task SAC as the equations read: loops over tasks, a net and an optimiser each."""

    def __init__(self, agent: MTSAC) -> None:
        self.c = agent.config
        self.actor = Net(agent.actor, 0)
        self.critics = [Net(agent.critic, k) for k in range(2)]
        self.targets = [Net(agent.target_critic, k) for k in range(2)]
        self.log_alpha = [agent.log_alpha.detach()[t, 0, 0].clone() for t in range(T)]
        for value in self.log_alpha:
            value.requires_grad_(True)
        adam = torch.optim.Adam
        self.optimizers = [
            adam(self.actor.parameters(), lr=self.c.actor_lr),
            *(adam(critic.parameters(), lr=self.c.critic_lr) for critic in self.critics),
            adam(self.log_alpha, lr=self.c.alpha_lr),
        ]
        self.conflicts = 0
        self.noise = torch.Generator()
        self.noise.set_state(agent.noise.get_state())

    def sample(self, obs: Tensor, task: int, noise: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.actor(obs, task).chunk(2, -1)
        std = log_std.clamp(-20, 2).exp()
        u = mean + std * noise
        action = u.tanh()
        log_prob = (Normal(mean, std).log_prob(u) - torch.log(1 - action**2 + 1e-6)).sum(-1)
        return action, log_prob

    def q(self, nets: list[Net], obs: Tensor, action: Tensor, task: int) -> list[Tensor]:
        return [net(torch.cat([obs, action], 1), task)[:, 0] for net in nets]

    def surgery(self, net: Net, losses: list[Tensor], order: Tensor) -> list[Tensor]:
        """PCGrad, Algorithm 1."""
        parameters = list(net.parameters())
        g = [
            torch.cat([
                x.flatten() for x in torch.autograd.grad(loss, parameters, retain_graph=True)
            ])
            for loss in losses
        ]  # fmt: skip
        total = torch.zeros_like(g[0])
        for i in range(T):
            mine = g[i]
            for j in order[i].tolist():
                if j != i and mine @ g[j] < 0:
                    self.conflicts += 1
                    mine = mine - (mine @ g[j]) / (g[j] @ g[j]) * g[j]
            total += mine
        parts = total.split([p.numel() for p in parameters])
        return [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]

    def update(self, batch: Batch) -> dict[str, list[float]]:
        c = self.c
        shape = (T, B, A)
        target_noise = torch.randn(shape, generator=self.noise).double()
        order = torch.rand(T, T, generator=self.noise).argsort(1) if c.pcgrad else None
        policy_noise = torch.randn(shape, generator=self.noise).double()
        alpha = [value.detach().exp() for value in self.log_alpha]
        critic_losses, actor_losses, alpha_losses, balance = [], [], [], []
        largest = max(float(m) for m in batch.mean_reward.flatten())
        for t in range(T):
            factor = 1.0
            if c.reward_balance is not None and largest > 0:
                ratio = largest / max(float(batch.mean_reward[t]), c.reward_floor)
                factor = min(max(ratio, 1.0), c.reward_balance)
            balance.append(factor)
            with torch.no_grad():
                next_action, next_log_prob = self.sample(batch.next_obs[t], t, target_noise[t])
                next_q = torch.minimum(*self.q(self.targets, batch.next_obs[t], next_action, t))
                y = []
                for b in range(B):
                    ended = bool(batch.terminated[t, b, 0])
                    if c.time_limit == "terminal":
                        ended = ended or bool(batch.truncated[t, b, 0])
                    reward = c.reward_scale * factor * batch.reward[t, b, 0]
                    future = next_q[b] - alpha[t] * next_log_prob[b]
                    y.append(reward if ended else reward + c.gamma * future)
            q1, q2 = self.q(self.critics, batch.obs[t], batch.action[t], t)
            target = torch.stack(y)
            critic_losses.append(((q1 - target) ** 2).mean() + ((q2 - target) ** 2).mean())
            action, log_prob = self.sample(batch.obs[t], t, policy_noise[t])
            q_policy = torch.minimum(*self.q(self.critics, batch.obs[t], action, t))
            actor_losses.append((alpha[t] * log_prob - q_policy).mean())
            alpha_losses.append(-self.log_alpha[t] * (log_prob.detach() - A).mean())
        weights = {
            "log_alpha": [1 / a for a in alpha],  # exp(-log alpha)
            "alpha": [math.exp(-a) for a in alpha],
            "none": [1.0] * T,
        }[c.loss_weight]
        size = {"log_alpha": T, "alpha": 1, "none": T}[c.loss_weight]
        weight = [size * w / sum(weights) for w in weights]
        kept = []
        for t in range(T):
            share = weight[t] if c.extreme_loss_weighted else 1
            total = share * (critic_losses[t] + actor_losses[t]) + alpha_losses[t]
            limit = math.inf if c.extreme_loss is None else c.extreme_loss * balance[t] ** 2
            kept.append(0.0 if total > limit else 1.0)

        def mean(losses: list[Tensor], factors: list[Any]) -> Tensor:
            return sum(k * w * x for k, w, x in zip(kept, factors, losses, strict=True)) / T

        nets = [self.actor, *self.critics]
        losses = [mean(actor_losses, weight)] + [mean(critic_losses, weight)] * 2
        gradients = [
            torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
            for net, loss in zip(nets, losses, strict=True)
        ]
        if order is not None:
            by_task = [actor_losses, critic_losses, critic_losses]
            factors = [k * w / T for k, w in zip(kept, weight, strict=True)]
            gradients = [
                self.surgery(net, [f * x for f, x in zip(factors, each, strict=True)], order)
                for net, each in zip(nets, by_task, strict=True)
            ]
        alpha_gradient = torch.autograd.grad(mean(alpha_losses, [1.0] * T), self.log_alpha)
        for net, gradient in zip(nets, gradients, strict=True):
            for p, g in zip(net.parameters(), gradient, strict=True):
                p.grad = g
            if c.grad_clip is not None:
                torch.nn.utils.clip_grad_norm_(net.parameters(), c.grad_clip)
        for p, g in zip(self.log_alpha, alpha_gradient, strict=True):
            p.grad = g
        for optimizer in self.optimizers:
            optimizer.step()
        with torch.no_grad():
            for p in self.log_alpha:
                if c.alpha_max is not None:
                    p.clamp_(max=math.log(c.alpha_max))
            for slow, fast in zip(self.targets, self.critics, strict=True):
                for s, f in zip(slow.parameters(), fast.parameters(), strict=True):
                    s.copy_((1 - c.tau) * s + c.tau * f)
        return {
            "critic_loss": [float(x.detach()) for x in critic_losses],
            "actor_loss": [float(x.detach()) for x in actor_losses],
            "masked": [1 - k for k in kept],
            "alpha": [float(a) for a in alpha],
        }


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"time_limit": "terminal", "gamma": 0.9},
        {"loss_weight": "alpha", "grad_clip": None},
        {"loss_weight": "none", "grad_clip": 0.05, "tau": 0.3},
        {"critic_layer_norm": True, "critic_lr": 1e-2, "actor_lr": 1e-3, "alpha_lr": 3e-2},
        {"reward_balance": 3.0, "reward_scale": 1.0},
        {"alpha_max": 0.7, "alpha_lr": 0.5},
        {"extreme_loss": 30.0, "reward_scale": 1.0},
        {"extreme_loss": 40.0, "reward_scale": 1.0, "reward_balance": 3.0},
        {"extreme_loss": 30.0, "reward_scale": 1.0, "extreme_loss_weighted": True},
        {"reward_balance": 3.0, "reward_floor": 0.5},
        {"extreme_loss": None, "alpha_max": None},
        {"pcgrad": True, "critic_layer_norm": True},
        {"pcgrad": True, "loss_weight": "none", "grad_clip": None},
    ],
    ids=lambda c: ",".join(c) or "paper",
)
def test_updates_equal_the_equations(config: dict[str, Any]) -> None:
    """Targets, losses, weights, mask, clipping, Adam, cap and Polyak averaging, five steps long."""
    agent = make_agent(**config)
    reference = Reference(agent)
    masked = 0.0
    for number in range(5):
        batch = make_batch(number)
        if agent.config.pcgrad:  # tasks that pull the critics apart
            pull = torch.tensor([20.0, -20.0, 0.0]).double().view(T, 1, 1)
            batch = batch._replace(reward=batch.reward + pull)
        metrics, expected = agent.update(batch), reference.update(batch)
        masked += sum(expected["masked"])
        for name, values in expected.items():
            np.testing.assert_allclose(metrics[name].numpy(), values, rtol=1e-8, err_msg=name)
    reference.actor.equals(agent.actor, 0)
    for k in range(2):
        reference.critics[k].equals(agent.critic, k)
        reference.targets[k].equals(agent.target_critic, k)
    for t in range(T):
        mine, theirs = agent.log_alpha[t, 0, 0], reference.log_alpha[t]
        torch.testing.assert_close(mine.detach(), theirs.detach())
    if config.get("extreme_loss"):
        assert 0 < masked < 5 * T, "some task must be masked, and not all"
    assert (reference.conflicts > 0) == agent.config.pcgrad


# ------------------------------------------------------------------------------ one by one


def test_target_bootstraps_through_the_time_limit_but_not_through_an_end() -> None:
    alpha = torch.full((T, 1, 1), 0.1).double()
    zero, one = torch.zeros(T, B, 1).double(), torch.ones(T, B, 1).double()

    def target(time_limit: str, terminated: Tensor, truncated: Tensor) -> Tensor:
        agent = make_agent(time_limit=time_limit)
        return agent.target(make_batch(terminated=terminated, truncated=truncated), alpha)

    reward = 0.1 * make_batch().reward
    for time_limit in ("bootstrap", "terminal"):
        torch.testing.assert_close(target(time_limit, one, zero), reward)
        torch.testing.assert_close(target(time_limit, one, one), reward)
    going_on = target("bootstrap", zero, zero)
    assert (going_on - reward).abs().min() > 1e-6
    torch.testing.assert_close(target("bootstrap", zero, one), going_on)
    torch.testing.assert_close(target("terminal", zero, zero), going_on)
    torch.testing.assert_close(target("terminal", zero, one), reward)


def test_target_carries_no_graph_and_target_critics_learn_by_averaging_only() -> None:
    agent = make_agent()
    assert not any(p.requires_grad for p in agent.target_critic.parameters())
    assert not agent.target(make_batch(), agent.log_alpha.exp()).requires_grad
    agent.update(make_batch())
    assert all(p.grad is None for p in agent.target_critic.parameters())
    trained = {
        id(p)
        for optimizer in (agent.actor_optimizer, agent.critic_optimizer, agent.alpha_optimizer)
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert not trained & {id(p) for p in agent.target_critic.parameters()}


def test_the_mask_looks_at_losses_plain_or_weighted() -> None:
    """D2R's code weighs first: a settled task, of weight 2.7, is left out of the step earlier."""
    alpha = torch.tensor([0.01, 1.0, 0.1]).view(T, 1, 1)
    loss, none = torch.tensor([1500.0, 3500.0, 10.0]), torch.zeros(T)
    _, plain = make_agent().task_weights(loss, none, alpha.log())
    assert plain.tolist() == [1, 0, 1]
    _, weighted = make_agent(extreme_loss_weighted=True).task_weights(loss, none, alpha.log())
    assert weighted.tolist() == [0, 1, 1]


def test_loss_weights_by_hand() -> None:
    agent = make_agent()
    alpha = torch.tensor([0.5, 0.1, 1.0]).view(T, 1, 1)
    none = torch.zeros(T)
    weight, kept = agent.task_weights(none, none, alpha.log())
    torch.testing.assert_close(weight, 3 * torch.tensor([2.0, 10.0, 1.0]) / 13)
    torch.testing.assert_close(kept, torch.ones(T))
    printed, _ = make_agent(loss_weight="alpha").task_weights(none, none, alpha.log())
    expected = np.exp([-0.5, -0.1, -1.0])
    np.testing.assert_allclose(printed, expected / expected.sum(), rtol=1e-6)
    even, _ = make_agent(loss_weight="none").task_weights(none, none, alpha.log())
    assert torch.equal(even, kept)
    vanished = torch.tensor([-200.0, -200.0, 0.0]).view(T, 1, 1)  # e^-200 is no float32
    weight, _ = agent.task_weights(none, none, vanished)
    torch.testing.assert_close(weight, torch.tensor([1.5, 1.5, 0.0]))


def test_a_masked_task_contributes_no_gradient() -> None:
    """Whatever the masked task's rows hold, the step is the same."""
    states = []
    for size in (1e4, 1e5):
        agent, batch = make_agent(), make_batch()
        reward = batch.reward.clone()
        reward[1] = size
        metrics = agent.update(batch._replace(reward=reward))
        assert metrics["masked"].tolist() == [0, 1, 0]
        states.append(agent.state_dict())
        assert float(agent.log_alpha.detach()[1]) == -1.5  # its temperature rests as well
        task_bias = agent.actor[0].task_bias
        assert task_bias is not None
        assert task_bias.grad is not None
        assert not task_bias.grad[:, 1].any()
        assert task_bias.grad[:, 0].any()
    for name in ("actor", "critic", "target_critic"):
        for a, b in zip(states[0][name].values(), states[1][name].values(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_is_not_hidden_by_the_mask(value: float) -> None:
    agent, batch = make_agent(), make_batch()
    reward = batch.reward.clone()
    reward[1, 2] = value
    metrics = agent.update(batch._replace(reward=reward))
    finite = torch.stack(list(metrics.values())).isfinite().all(0)
    assert finite.tolist() == [True, False, True]  # it names the task


def test_clipping_is_per_copy_and_equals_torchs() -> None:
    g = torch.Generator().manual_seed(0)
    stacked = [nn.Parameter(torch.zeros(2, 3, 4)), nn.Parameter(torch.zeros(2, 1, 5))]
    for p in stacked:
        p.grad = torch.randn(p.shape, generator=g)
    stacked[0].grad[1] *= 1e-3  # type: ignore[index]
    stacked[1].grad[1] *= 1e-3  # type: ignore[index]
    apart = [[nn.Parameter(torch.zeros(p.shape[1:])) for p in stacked] for _ in range(2)]
    for k in range(2):
        for p, q in zip(stacked, apart[k], strict=True):
            assert p.grad is not None
            q.grad = p.grad[k].clone()
        torch.nn.utils.clip_grad_norm_(apart[k], 1.0)
    clip_slices(stacked, 1.0)
    for k in range(2):
        for p, q in zip(stacked, apart[k], strict=True):
            assert p.grad is not None
            torch.testing.assert_close(p.grad[k], q.grad)
    assert apart[1][0].grad is not None
    assert float(apart[1][0].grad.norm()) < 0.1  # the small copy was not scaled with the large


def test_actor_loss_reaches_the_action_but_not_the_critic() -> None:
    agent = make_agent()
    action = make_batch().action.requires_grad_(True)
    with frozen(learned(agent.critic_optimizer)):
        q = agent.value(agent.critic, make_batch().obs, action, "policy")
    q.sum().backward()
    assert action.grad is not None
    assert action.grad.abs().sum() > 0
    assert all(p.grad is None and p.requires_grad for p in agent.critic.parameters())


def test_temperature_never_exceeds_its_cap() -> None:
    agent = make_agent(alpha_lr=5.0, alpha_max=0.6, target_entropy=50.0)
    for number in range(3):
        agent.update(make_batch(number))
    torch.testing.assert_close(agent.log_alpha.exp(), torch.full((T, 1, 1), 0.6).double())
    agent = make_agent(alpha_lr=5.0, alpha_max=None, target_entropy=50.0)
    agent.update(make_batch())
    assert float(agent.log_alpha.detach().exp().max()) > 1


def test_reward_balance_is_capped_and_renewed_on_time() -> None:
    agent = make_agent(reward_balance=5.0, reward_balance_every=3)
    batch = make_batch()
    doubled = batch._replace(mean_reward=torch.tensor([4.0, 2.0, 1.0]).view(T, 1, 1).double())
    seen = []
    for number in range(5):
        agent.update(batch if number < 1 else doubled)
        seen.append(agent.balance.flatten().tolist())
    assert seen[0] == [1.0, 5.0, 5.0]  # 4 / 0.5 is above the cap; a negative mean takes the cap
    assert seen[1] == seen[2] == seen[0]
    assert seen[3] == seen[4] == [1.0, 2.0, 4.0]
    nothing = make_agent(reward_balance=5.0)
    nothing.update(batch._replace(mean_reward=torch.zeros(T, 1, 1).double()))
    assert nothing.balance.flatten().tolist() == [1.0, 1.0, 1.0]
    assert make_agent().balanced(batch) is batch.reward


@pytest.mark.parametrize(("tasks", "resets"), [(3, 4), (10, 4), (50, 6)])
def test_arss_resets_follow_the_number_of_tasks(tasks: int, resets: int) -> None:
    suite = replace(SUITE, task_names=tuple(f"task-{t}" for t in range(tasks)))
    assert MTSAC(suite, MTSACConfig(**ARS, width=4, depth=1), PLAN, seed=0).config.resets == resets
    assert MTSACConfig().for_run(suite, PLAN).resets == 0


# --------------------------------------------------------------------------------- networks


@given(seed=st.integers(0, 1000))
def test_log_prob_equals_torch_distributions(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    mean = torch.randn(4, 3, generator=g).double()
    std = (0.5 * torch.randn(4, 3, generator=g).double()).exp()
    action, log_prob = squash(mean, std, 0.5 * torch.randn(4, 3, generator=g).double())
    base = Independent(Normal(mean, std), 1)
    expected = TransformedDistribution(base, TanhTransform())
    # The papers' 1e-6 in the logarithm is the difference, below 1e-6 / (1 - a^2) per number.
    tolerance = float((1e-6 / (1 - action**2)).sum(-1).max()) + 1e-9
    torch.testing.assert_close(log_prob[:, 0], expected.log_prob(action), rtol=1e-7, atol=tolerance)


def test_log_std_is_clamped() -> None:
    mean, std = split_gaussian(torch.tensor([[0.5, -1.0, -99.0, 99.0]]))
    torch.testing.assert_close(mean, torch.tensor([[0.5, -1.0]]))
    torch.testing.assert_close(std, torch.tensor([[-20.0, 2.0]]).exp())


@pytest.mark.parametrize("layer_norm", [False, True])
def test_stacked_twins_with_task_biases_equal_separate_nets_on_a_one_hot(layer_norm: bool) -> None:
    stacked = mlp(O, [7, 6], 4, copies=2, one_hot=T, layer_norm=layer_norm).double()
    initialise(stacked, "torch", torch.Generator().manual_seed(0))
    x = make_batch().obs
    y = stacked(x[None])  # (2, T, B, 4)
    for k in range(2):
        net = Net(stacked, k)
        for t in range(T):
            torch.testing.assert_close(y[k, t], net(x[t], t), rtol=1e-12, atol=1e-12)
        parameters = sum(p.numel() for p in net.parameters())
        assert parameters == sum(p.numel() // 2 for p in stacked.parameters())


@pytest.mark.parametrize("modules", [None, 3])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_compiled_layers_equal_those_of_tensor_operations(
    layer_norm: bool, modules: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"copies": 2, "one_hot": T, "layer_norm": layer_norm, "modules": modules}
    network = mlp(O, [7, 6], 4, **options).double()
    initialise(network, "torch", torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, dtype=torch.float64)
    x = make_batch().obs[None].requires_grad_()  # one copy for both
    x = x if modules is None else x[:, None]
    found = []
    for compiled in (True, False):
        monkeypatch.setattr("algorithms.nn.COMPILED", compiled)
        y = network(x)
        weight = torch.arange(1.0, 1 + y.numel(), dtype=y.dtype).view_as(y).sin()
        found.append([y, *torch.autograd.grad((y * weight).sum(), [x, *network.parameters()])])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_adam_is_torchs_to_the_bit_also_loaded_and_with_a_parameter_more() -> None:
    g = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=g) for shape in ((2, 3, 4), (2, 1, 4), (5,))]
    steps = [[torch.randn(p.shape, generator=g) for p in start] for _ in range(6)]
    found = []
    for kind in (Adam, torch.optim.Adam):
        parameters = [p.clone().requires_grad_() for p in start]
        optimizer = kind(parameters[:2], lr=0.1, fused=True)
        for count, gradients in enumerate(steps):
            if count == 2:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = kind(parameters[:2], lr=0.1, fused=True)
                optimizer.load_state_dict(saved)
            if count == 3:
                optimizer.param_groups[0]["params"].append(parameters[2])
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.clone()
            if count == 4:
                parameters[0].grad = None  # stays as it is
            optimizer.step()
        found.append([p.detach() for p in parameters])
    for ours, theirs, first in zip(*found, start, strict=True):
        assert torch.equal(ours, theirs)
        assert not torch.equal(ours, first)


def test_adam_steps_every_group_at_its_own_rate() -> None:
    found = []
    for kind in (Adam, torch.optim.Adam):
        parameters = [torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)]
        groups = [{"params": [p], "lr": lr} for p, lr in zip(parameters, (0.1, 0.01), strict=True)]
        optimizer = kind(groups, fused=True)
        for scale in (1.0, -2.0, 0.5):
            for parameter in parameters:
                parameter.grad = torch.full_like(parameter, scale)
            optimizer.step()
        found.append(torch.cat([p.detach() for p in parameters]))
    assert torch.equal(*found)
    assert not torch.equal(found[0][0], found[0][-1])


def chosen(kind: str, shape: torch.Size) -> Tensor:
    """Which rows (C, ..) owe something: of each one copy's (some in both), one's, none or all."""
    draws = torch.rand(shape, generator=torch.Generator().manual_seed(2))
    match kind:
        case "the less of two":
            return draws == draws.amin(0)
        case "some of both":
            return draws < 0.4
        case "one copy":
            return (torch.arange(len(draws)) == 1).view(-1, *[1] * (len(shape) - 1)).expand(shape)
        case "none":
            return torch.zeros(shape, dtype=torch.bool)
    return torch.ones(shape, dtype=torch.bool)


OWED = ["the less of two", "some of both", "one copy", "none", "all"]


@pytest.mark.parametrize("owed", OWED)
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_frozen_layers_pass_back_what_rows_owe_and_nothing_else(
    threads: int, layer_norm: bool, owed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = mlp(O, [7, 6], 4, copies=2, one_hot=T, layer_norm=layer_norm).double()
    initialise(network, "torch", torch.Generator().manual_seed(0))
    network.requires_grad_(False)
    monkeypatch.setattr("algorithms.nn.WORK_OF_THREADS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x = make_batch().obs[None].requires_grad_()  # one copy for both
    found = []
    for compiled in (True, False):
        monkeypatch.setattr("algorithms.nn.COMPILED", compiled)
        y = network(x)
        rows = chosen(owed, y.shape[:-1])[..., None]
        found.append(torch.autograd.grad((y.sin() * rows).sum(), x)[0])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)
    assert bool(found[0].any()) == (owed != "none")


def test_a_row_of_the_less_of_two_critics_costs_one_of_them() -> None:
    less = chosen("the less of two", torch.Size((2, T, B)))
    gradient = less.flatten(1)[..., None].numpy().astype(np.float32)
    owing = Owing.of(gradient, learning=False)
    assert owing.rows is not None
    assert len(owing.rows) == owing.begins[-1] == T * B
    assert owing.begins.tolist() == [0, int(less[0].sum()), T * B]
    assert np.array_equal(owing.spread(owing.taken(gradient)), gradient.reshape(-1, 1))
    assert Owing.of(gradient, learning=True).rows is None
    gradient[0, 0] = np.nan  # must surface
    rows = Owing.of(gradient, learning=False).rows
    assert rows is not None
    assert rows[0] == 0


@pytest.mark.parametrize("layer_norm", [False, True])
def test_more_threads_compute_the_same_layers(
    layer_norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = mlp(O, [7, 6], 4, copies=2, one_hot=T, layer_norm=layer_norm).double()
    initialise(network, "torch", torch.Generator().manual_seed(0))
    monkeypatch.setattr("algorithms.nn.WORK_OF_THREADS", 1)
    x = make_batch().obs[None].requires_grad_()
    found = []
    for threads in (1, 2):  # products in the compiled pass, and by torch
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        y = network(x)
        found.append([y, *torch.autograd.grad(y.sin().sum(), [x, *network.parameters()])])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


def test_task_heads_equal_a_layer_each() -> None:
    layer = TaskLinear(T, O, 4, copies=2).double()
    initialise(layer, "torch", torch.Generator().manual_seed(0))
    x = torch.randn(2, T, B, O, generator=torch.Generator().manual_seed(1)).double()
    y = layer(x)
    for k in range(2):
        for t in range(T):
            expected = x[k, t] @ layer.weight[k, t] + layer.bias[k, t, 0]
            torch.testing.assert_close(y[k, t], expected)


def test_initialisation_follows_the_authors_law() -> None:
    network = mlp(O, [400, 50], 8, copies=2, one_hot=10)
    initialise(network, "authors", torch.Generator().manual_seed(0))
    first, second, last = (layer for layer in network if isinstance(layer, Linear))
    assert first.task_bias is not None
    for weight, bound in (
        (first.weight, 400**-0.5), (first.task_bias, 400**-0.5), (second.weight, 50**-0.5),
        (last.weight, 3e-3), (last.bias, 3e-3),
    ):  # fmt: skip
        assert float(weight.detach().abs().max()) <= bound
        assert float(weight.detach().abs().max()) > 0.8 * bound
    assert (first.bias == 0.1).all()
    assert (second.bias == 0.1).all()
    assert not torch.equal(first.weight[0], first.weight[1])  # the twins differ


def test_acting_greedily_is_tanh_of_the_mean_and_draws_nothing() -> None:
    agent = MTSAC(SUITE, MTSACConfig(width=7, depth=2), PLAN, seed=3)
    obs = np.random.default_rng(0).normal(size=(T, 2, O)).astype(np.float32)
    before = agent.noise.get_state()
    action = agent.act(obs, explore=False).action
    assert torch.equal(agent.noise.get_state(), before)
    mean = agent.actor(torch.from_numpy(obs)[None])[0][..., :A]
    np.testing.assert_allclose(action, mean.tanh().detach().numpy(), rtol=1e-6)
    assert action.dtype == np.float32
    assert action.shape == (T, 2, A)


def test_exploring_draws_from_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    agent = MTSAC(SUITE, MTSACConfig(width=7, depth=2), PLAN, seed=3)
    obs = np.zeros((T, 4000, O), np.float32)
    u = np.arctanh(agent.act(obs, explore=True).action.astype(np.float64))
    mean, std = split_gaussian(agent.actor(torch.from_numpy(obs[:, :1])[None])[0])
    np.testing.assert_allclose(u.mean(1), mean[:, 0].detach(), atol=0.1)
    np.testing.assert_allclose(u.std(1), std[:, 0].detach(), rtol=0.06)


def test_target_starts_as_the_critic_and_is_a_copy() -> None:
    agent = MTSAC(SUITE, MTSACConfig(width=7, depth=2), PLAN, seed=3)
    before = copy.deepcopy(agent.critic.state_dict())
    for p, q in zip(agent.critic.parameters(), agent.target_critic.parameters(), strict=True):
        assert torch.equal(p, q)
        assert p.data_ptr() != q.data_ptr()
    for name, value in agent.critic.state_dict().items():
        assert torch.equal(value, before[name])
