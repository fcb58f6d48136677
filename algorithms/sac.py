"""Multi-task soft actor-critic, the learner under every algorithm of the comparison.

Haarnoja et al. 2018 (SAC with learned temperature), with what the papers compared here share:
one temperature per task, task losses weighted by softmax(-log alpha) and an extreme-loss mask
(Soft Modularization Sec. 4.2; D2R Eq. 15, App. A.2).

Symbols: T tasks, B transitions per task, A action numbers; pi the actor, Q1 and Q2 the critics
(stacked on a leading axis of 2), Q' their slow targets, alpha the temperatures.

Departures, alike for all algorithms:
 1. All losses use the parameters from before the step, and one backward pass serves them
    (D2R's code); the papers print no order.
 2. A row is drawn independently for each task (the authors' code draws one row index for all).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from algorithms.agent import Action, Agent, AgentConfig, Batch, Finding, History, Plan
from algorithms.nn import Init, initialise, split_gaussian, squash
from algorithms.pcgrad import projected
from algorithms.precision import bfloat16_products
from suites.base import SuiteSpec, stream

Phase = Literal["explore", "exploit", "policy", "value", "target"]
"""Why a network is called: to collect data, to act greedily in evaluation, for the actor's loss
at s, for the critics' loss at (s, a), for the target at s'. Routed networks choose by it."""

Extras = dict[str, Tensor]


class SACConfig(AgentConfig):
    """What all algorithms share. Values are the paper recipe's; presets state their differences."""

    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """Discount (MEGA Table 2; D2R Table 1)."""
    tau: Annotated[float, Field(gt=0, le=1)] = 0.005
    """Share of the new parameters in each soft target update (MEGA Table 2)."""
    actor_lr: Annotated[float, Field(gt=0)] = 3e-4
    """Adam learning rate of the actor (MEGA Table 2)."""
    critic_lr: Annotated[float, Field(gt=0)] = 3e-4
    """Adam learning rate of the critics (MEGA Table 2)."""
    alpha_lr: Annotated[float, Field(gt=0)] = 1e-4
    """Adam learning rate of the log temperatures (MEGA Table 2; D2R's code)."""
    alpha_max: Annotated[float, Field(gt=0)] | None = 1.0
    """Cap of each temperature, applied after every step (D2R's code; not in the papers)."""
    target_entropy: float | None = None
    """Entropy the temperatures aim at; none: minus the number of action numbers (SAC)."""
    grad_clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest L2 norm of each network's gradient (both authors' code)."""
    loss_weight: Literal["log_alpha", "alpha", "none"] = "log_alpha"
    """Weight of a task's actor and critic losses: T softmax(-log alpha) (both authors' code),
    softmax(-alpha) (as Soft Modularization Eq. 10 and D2R Eq. 15 print it), or 1."""
    extreme_loss: Annotated[float, Field(gt=0)] | None = 3e3
    """A task whose losses sum to more than this is left out of the step (D2R App. A.2). With
    balanced rewards the limit grows by the square of the task's factor, as squared errors do."""
    extreme_loss_weighted: bool = False
    """Whether that sum is of losses as weighted (D2R's code) or as they are (PaCo's code, which has
    no weights); D2R App. A.2 does not say."""
    reward_scale: Annotated[float, Field(gt=0)] = 0.1
    """Factor on rewards in the losses (MEGA Table 2); returns are reported unscaled."""
    time_limit: Literal["bootstrap", "terminal"] = "bootstrap"
    """Whether the value of the state at the time limit counts; D2R's code treats it as terminal."""
    init: Init = "authors"
    """Network initialisation: uniform +-1/sqrt(output width), bias 0.1, output layer +-3e-3 (both
    authors' code), or torch's default."""
    critic_layer_norm: bool = False
    """LayerNorm before each hidden activation of the critics (reduced recipe only)."""
    reward_balance: Annotated[float, Field(ge=1)] | None = None
    """Cap of the per-task factor (largest task's mean reward / this task's mean reward) on rewards,
    after Cho et al. 2025 (ARS); none: no balancing (the papers)."""
    reward_floor: Annotated[float, Field(gt=0)] = 1e-8
    """A task's mean reward counts as at least this in its factor (ARS: 0.01); so it matters where
    rewards are balanced."""
    reward_balance_every: Annotated[int, Field(ge=1)] | None = 2000
    """Updates between renewals of the reward balance; none: at the first and after each reset."""
    resets: Annotated[int, Field(ge=0)] | None = 0
    """How often, evenly over the run, networks, temperatures and optimisers start anew while the
    replay stays; none: 4 up to ten tasks, 6 above (Cho et al. 2025, ARS)."""
    reset_updates: Annotated[int, Field(ge=0)] = 0
    """Updates on the replay that follow a reset at once, before the new actor acts (the authors'
    code of ARS: 1,000)."""
    pcgrad: bool = False
    """Project each task's gradient off those it conflicts with (Yu et al. 2020, PCGrad), in actor
    and critics. For plain networks, whose every layer all tasks or one task own."""

    products: Literal["float32", "bfloat16"] = "float32"
    """Number format of an update's matrix products; not in the papers, whose code has float32."""

    PLAIN: ClassVar[bool] = False
    """Whether the algorithm's networks are plain in that sense."""

    def for_run(self, suite: SuiteSpec, plan: Plan) -> Self:
        """With the number of resets decided."""
        resets = (6 if suite.large else 4) if self.resets is None else self.resets
        return self.model_copy(update={"resets": resets})

    @model_validator(mode="after")
    def _pcgrad_needs_plain_networks(self) -> Self:
        if self.pcgrad and not self.PLAIN:
            raise ValueError("pcgrad is a treatment of plain shared networks: mt_sac and mtmh_sac")
        return self

    @model_validator(mode="after")
    def _balance_is_on(self) -> Self:
        if self.reward_balance is None and self.reward_balance_every is not None:
            self._unused("reward_balance_every", because="reward_balance is none")
        return self

    @model_validator(mode="after")
    def _mask_is_on(self) -> Self:
        if self.extreme_loss is None or self.loss_weight == "none":
            because = f"extreme_loss is {self.extreme_loss}, loss_weight {self.loss_weight}"
            self._unused("extreme_loss_weighted", because=because)
        return self


ARS: dict[str, Any] = {
    "critic_layer_norm": True,
    "reward_balance": 1e6,
    "reward_floor": 0.01,
    "reward_balance_every": None,
    "resets": None,
    "reset_updates": 1000,
    "loss_weight": "none",
    "alpha_max": None,
}
"""The ingredients of ARS (Cho et al. 2025, adaptive reward scaling and resets; with LayerNorm), for
any algorithm here. Loss weights and the cap on alpha are off: temperatures grow with rewards, so
both would undo a larger factor. What stays the algorithm's, and is otherwise in the authors' code:
four layers of 400 (actor ReLU, critics tanh), a LayerNorm on the critics' input, too, no clipping,
a temperature rate of 3e-4, rewards not times 0.1 and the first critic alone in the actor's loss."""


class SAC(Agent):
    """The shared update; an algorithm fills in its networks and, where needed, the seams."""

    config: SACConfig
    INDEPENDENT_AXES: ClassVar[int] = 1
    """Leading axes of a parameter whose slices are networks of their own, clipped each alone."""

    def __init__(
        self, suite: SuiteSpec, config: AgentConfig, plan: Plan, *, seed: int, device: str = "cpu"
    ) -> None:
        super().__init__(suite, config, plan, seed=seed, device=device)
        tasks = suite.num_tasks
        self.init_generator = torch.Generator().manual_seed(stream(seed, "init") % 2**63)
        self.noise = torch.Generator(device=self.device)
        self.noise.manual_seed(stream(seed, "noise") % 2**63)
        self.actor = self._new(self.make_actor())
        self.critic = self._new(self.make_critic())
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = torch.zeros(tasks, 1, 1, device=self.device, requires_grad=True)
        self.balance = torch.ones(tasks, 1, 1, device=self.device)
        self.updates = 0
        self.steps = 0
        """Training steps of each task so far."""
        self.resets_done = 0
        self.compiled = False
        """Whether `compile` was asked for."""
        self.fresh = True
        """Whether this update is the first of new networks."""
        self.target_entropy = (
            -float(suite.action_dim) if self.config.target_entropy is None
            else self.config.target_entropy
        )  # fmt: skip
        self.actor_optimizer = self._adam(self.actor.parameters(), self.config.actor_lr)
        self.critic_optimizer = self._adam(self.critic.parameters(), self.config.critic_lr)
        self.alpha_optimizer = self._adam([self.log_alpha], self.config.alpha_lr)
        self._listed: tuple[int, tuple[list[Tensor], list[Tensor]]] = 0, ([], [])
        self.optimizers = (self.actor_optimizer, self.critic_optimizer, self.alpha_optimizer)
        self.on_new_alpha()

    def _new(self, network: nn.Module) -> nn.Module:
        initialise(network.cpu(), self.config.init, self.init_generator)  # alike on every device
        return network.to(self.device)

    def compile(self) -> None:
        """The networks by `torch.compile`, once per shape, on a GPU as CUDA graphs."""
        config = torch._dynamo.config
        config.suppress_errors = True  # what cannot be traced or compiled runs as it is
        # Of one forward: numbers of rows (acting, learning, evaluating) x networks x gradients.
        config.cache_size_limit = 64
        mode = "reduce-overhead" if self.device.type == "cuda" else "default"
        for network in (self.actor, self.critic, self.target_critic):
            for method in getattr(network, "UNTRACED", ()):
                untraced: Any = torch.compiler.disable(getattr(network, method))  # type: ignore[no-untyped-call]
                setattr(network, method, untraced)
            network.compile(dynamic=False, mode=mode)
        self.compiled = True

    def _begin_step(self) -> None:
        """Nothing that networks computed before is read any more: CUDA graphs may overwrite it."""
        if self.compiled:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]

    @staticmethod
    def _adam(parameters: Iterable[Tensor], lr: float) -> torch.optim.Adam:
        trained = [p for p in parameters if p.requires_grad]
        return Adam(trained, lr=lr, fused=True)

    # ------------------------------------------------------------------ what algorithms fill in

    def make_network(
        self, inputs: int, outputs: int, *, copies: int, layer_norm: bool
    ) -> nn.Module:
        """A network (1, T, B, inputs) -> (copies, T, B, outputs), as actor and as critics.

        Every parameter has a leading axis of copies.
        """
        raise NotImplementedError

    def make_actor(self) -> nn.Module:
        """s -> mean and log std of the action, (1, T, B, O) -> (1, T, B, 2A)."""
        suite = self.suite
        return self.make_network(suite.obs_dim, 2 * suite.action_dim, copies=1, layer_norm=False)

    def make_critic(self) -> nn.Module:
        """[s, a] -> Q, twice, (1, T, B, O + A) -> (2, T, B, 1)."""
        return self.make_network(
            self.suite.obs_dim + self.suite.action_dim, 1,
            copies=2, layer_norm=self.config.critic_layer_norm,
        )  # fmt: skip

    def policy(self, obs: Tensor, phase: Phase, extras: Extras) -> tuple[Tensor, Extras]:
        """Gaussian parameters (T, B, 2A) at observations (T, B, O), and what to store with them.

        ``extras`` is what was stored with the batch's transitions (empty while acting).
        """
        output: Tensor = self.actor(obs[None])
        return output[0], {}

    def value(self, critic: nn.Module, obs: Tensor, action: Tensor, phase: Phase) -> Tensor:
        """Q1 and Q2 (2, T, B, 1) of ``critic`` (the trained or the target one)."""
        output: Tensor = critic(torch.cat([obs, action], -1)[None])
        return output

    def actor_loss(self, objective: Tensor) -> Tensor:
        """Each task's mean (T,) of alpha log pi(a|s) - min Q(s, a), given as (T, B, 1)."""
        return objective.mean((1, 2))

    def on_new_alpha(self) -> None:
        """Called when temperatures are new: at the start, after each update and each reset."""

    def after_update(self, kept: Tensor) -> None:
        """Called at the end of each update; ``kept`` (T,) is 0 for tasks that the mask left out."""

    # --------------------------------------------------------------------------------- acting

    @torch.no_grad()
    def act(self, obs: np.ndarray, explore: bool) -> Action:
        """A sample of the policy, or tanh of its mean."""
        self._begin_step()
        tensor = torch.from_numpy(obs).to(self.device)
        params, extras = self.policy(tensor, "explore" if explore else "exploit", {})
        self.steps += explore * obs.shape[1]
        mean, std = split_gaussian(params)
        action = torch.tanh(mean + std * self.normal(mean.shape)) if explore else torch.tanh(mean)
        return Action(action.cpu().numpy(), {k: v.cpu().numpy() for k, v in extras.items()})

    def normal(self, shape: torch.Size) -> Tensor:
        """Standard normal numbers from the run's stream of action noise."""
        return torch.randn(shape, generator=self.noise, device=self.device)

    # --------------------------------------------------------------------------------- learning

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One step on all networks and temperatures; metrics (T,)."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self._begin_step()
        self._reset_if_due()
        alpha = self.log_alpha.detach().exp()  # (T, 1, 1)
        with self.products():
            target = self.target(batch, alpha)  # (T, B, 1)

        with self.products(), self.gradients() as critic_parameters:
            q = self.value(self.critic, batch.obs, batch.action, "value")  # (2, T, B, 1)
            critic_loss = (q - target).square().mean((2, 3)).sum(0)  # (T,)

            action, log_prob = self.sample(batch.obs, "policy", batch.extras)
            with frozen(critic_parameters):
                q_policy = self.value(self.critic, batch.obs, action, "policy").amin(0)  # (T, B, 1)
            actor_loss = self.actor_loss(alpha * log_prob - q_policy)  # (T,)

            surplus = (log_prob.detach() + self.target_entropy).mean((1, 2))  # (T,)
            alpha_loss = -self.log_alpha[:, 0, 0] * surplus  # (T,)

            weight, kept = self.task_weights(
                (critic_loss + actor_loss).detach(), alpha_loss.detach(), self.log_alpha.detach()
            )
            loss = (weight * (critic_loss + actor_loss) + kept * alpha_loss).mean()
            torch.autograd.backward(loss)
        self.step()

        with torch.no_grad():  # Polyak: Q' <- (1 - tau) Q' + tau Q
            torch._foreach_lerp_(*self._slow_and_fast(), self.config.tau)
        self.updates += 1
        self.owed_updates = max(0, self.owed_updates - 1)
        self.fresh = False
        self.on_new_alpha()
        self.after_update(kept)
        return {
            "critic_loss": critic_loss.detach(),
            "actor_loss": actor_loss.detach(),
            "alpha": alpha[:, 0, 0],
            "entropy": -log_prob.detach().mean((1, 2)),
            "q": q.detach().mean((0, 2, 3)),
            "masked": (kept == 0).to(kept.dtype),
        }

    def products(self) -> AbstractContextManager[None]:
        """In which number format matrix products are computed within."""
        half = self.config.products == "bfloat16"
        return bfloat16_products(self.device) if half else nullcontext()

    @torch.no_grad()
    def target(self, batch: Batch, alpha: Tensor) -> Tensor:
        """y = r + gamma (1 - d) (min Q'(s', a') - alpha log pi(a'|s')), shape (T, B, 1)."""
        action, log_prob = self.sample(batch.next_obs, "target", batch.extras)
        q = self.value(self.target_critic, batch.next_obs, action, "target").amin(0)
        done = batch.terminated
        if self.config.time_limit == "terminal":
            done = torch.maximum(done, batch.truncated)
        reward = self.config.reward_scale * self.balanced(batch)
        return reward + self.config.gamma * (1 - done) * (q - alpha * log_prob)

    def balanced(self, batch: Batch) -> Tensor:
        """Rewards (T, B, 1) times the task's balance, renewed from the replay's mean rewards."""
        cap = self.config.reward_balance
        if cap is None:
            return batch.reward
        every = self.config.reward_balance_every
        if self.fresh or (every is not None and self.updates % every == 0):
            largest = batch.mean_reward.amax()
            ratio = largest / batch.mean_reward.clamp_min(self.config.reward_floor)
            self.balance = torch.where(largest > 0, ratio.clamp(1, cap), torch.ones_like(ratio))
        return self.balance * batch.reward

    def sample(self, obs: Tensor, phase: Phase, extras: Extras) -> tuple[Tensor, Tensor]:
        """Actions (T, B, A) of the policy and their log probabilities (T, B, 1)."""
        mean, std = split_gaussian(self.policy(obs, phase, extras)[0])
        return squash(mean, std, self.normal(mean.shape))

    def task_weights(
        self, loss: Tensor, alpha_loss: Tensor, log_alpha: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Weight of each task's loss (actor's and critics') and mask, both (T,); no gradients."""
        config = self.config
        weight = torch.ones_like(loss)
        if config.loss_weight == "log_alpha":
            weight = len(loss) * torch.softmax(-log_alpha[:, 0, 0], 0)
        elif config.loss_weight == "alpha":
            weight = torch.softmax(-log_alpha[:, 0, 0].exp(), 0)
        total = (weight * loss if config.extreme_loss_weighted else loss) + alpha_loss
        kept = torch.ones_like(total)
        if config.extreme_loss is not None:
            kept = (total <= config.extreme_loss * self.balance[:, 0, 0].square()).to(total.dtype)
        # A loss that is not a number must surface as such, not vanish behind the mask.
        kept = torch.where(total.isfinite(), kept, total)
        return kept * weight, kept

    @contextmanager
    def gradients(self) -> Iterator[Sequence[Tensor]]:
        """Where losses are built and propagated backward: plainly, or with PCGrad.

        Gives the critics' parameters as the losses see them.
        """
        if not self.config.pcgrad:
            yield learned(self.critic_optimizer)
            return
        tasks = self.suite.num_tasks
        draws = torch.rand(tasks, tasks, generator=self.noise, device=self.device)
        with projected((self.actor, self.critic), draws.argsort(1)):
            yield list(self.critic.parameters())

    def step(self) -> None:
        """Clipping per network, and Adam on every parameter."""
        if self.config.grad_clip is not None:
            for optimizer in (self.actor_optimizer, self.critic_optimizer):
                clip_slices(learned(optimizer), self.config.grad_clip, self.INDEPENDENT_AXES)
        for optimizer in self.optimizers:
            optimizer.step()
        if self.config.alpha_max is not None:
            with torch.no_grad():
                self.log_alpha.clamp_(max=float(np.log(self.config.alpha_max)))

    def _slow_and_fast(self) -> tuple[list[Tensor], list[Tensor]]:
        """Parameters of target and critics, listed anew only when there are more of them."""
        count = len(learned(self.critic_optimizer))
        if count != self._listed[0]:
            slow: list[Tensor] = list(self.target_critic.parameters())
            fast: list[Tensor] = list(self.critic.parameters())
            self._listed = count, (slow, fast)
        return self._listed[1]

    def _reset_if_due(self) -> None:
        resets = self.config.resets or 0
        due = self.steps * (resets + 1) // self.plan.steps_per_task
        if self.resets_done < min(due, resets):
            self.reset()

    def reset(self) -> None:
        """Start networks, temperatures and optimisers anew (ARS); all else stays."""
        self._new(self.actor)
        self._new(self.critic)
        self.target_critic.load_state_dict(self.critic.state_dict())
        with torch.no_grad():
            self.log_alpha.zero_()
        for optimizer in self.optimizers:
            optimizer.state.clear()
        self.resets_done += 1
        self.owed_updates = self.config.reset_updates
        self.fresh = True
        self.on_new_alpha()

    # -------------------------------------------------------------------------------- the rest

    def parameter_counts(self) -> dict[str, int]:
        """Parameters of the actor and of one critic."""
        actor = sum(p.numel() for p in self.actor.parameters())
        critic = sum(p.numel() // p.shape[0] for p in self.critic.parameters())
        return {"actor": actor, "critic": critic}

    @classmethod
    def health(cls, history: History) -> list[Finding]:
        """Whether tasks are left out of the updates, and whether policies still explore."""
        late = history.steps > history.plan.steps_per_task // 2

        def mean(metric: str) -> np.ndarray | None:
            """(T,) over the second half of training, None before it."""
            values = history.updates.get(metric)
            values = None if values is None else values[late & np.isfinite(values).all(1)]
            return None if values is None or not len(values) else values.mean(0)

        findings = []
        if (masked := mean("masked")) is not None:
            left_out = masked > 0.5
            findings.append(
                Finding(
                    "updates", "bad",
                    f"{listed(history.tasks, left_out)} left out of most updates: extreme losses",
                    "lower the learning rates, or raise extreme_loss",
                )
                if left_out.any()
                else Finding("updates", "good", "every task takes part in most updates")
            )  # fmt: skip
        if (alpha := mean("alpha")) is not None:
            settled = alpha < 1e-4
            words = f"temperatures {alpha.min():.2g} to {alpha.max():.2g}"
            findings.append(
                Finding(
                    "exploration", "note",
                    f"{words}; {listed(history.tasks, settled)} hardly explore any more",
                    "a higher target_entropy keeps them exploring",
                )
                if settled.any()
                else Finding("exploration", "good", words)
            )  # fmt: skip
        return findings

    def state_dict(self) -> dict[str, Any]:
        """Networks, optimisers, temperatures, balance and the noise stream."""
        return {
            "actor": self.actor.state_dict(),
            "critic": self.critic.state_dict(),
            "target_critic": self.target_critic.state_dict(),
            "log_alpha": self.log_alpha.detach(),
            "actor_optimizer": self.actor_optimizer.state_dict(),
            "critic_optimizer": self.critic_optimizer.state_dict(),
            "alpha_optimizer": self.alpha_optimizer.state_dict(),
            "balance": self.balance,
            "updates": self.updates,
            "steps": self.steps,
            "resets": self.resets_done,
            "fresh": self.fresh,
            "noise": self.noise.get_state(),
            "init_generator": self.init_generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.actor.load_state_dict(state["actor"])
        self.critic.load_state_dict(state["critic"])
        self.target_critic.load_state_dict(state["target_critic"])
        with torch.no_grad():
            self.log_alpha.copy_(state["log_alpha"])
        self.actor_optimizer.load_state_dict(state["actor_optimizer"])
        self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        self.alpha_optimizer.load_state_dict(state["alpha_optimizer"])
        self.balance = state["balance"].to(self.device)
        self.updates, self.steps = state["updates"], state["steps"]
        self.resets_done, self.fresh = state["resets"], state["fresh"]
        self.noise.set_state(state["noise"].cpu())
        self.init_generator.set_state(state["init_generator"].cpu())


def listed(tasks: tuple[str, ...], which: np.ndarray) -> str:
    """``3 of 10 tasks (reach-v3, ...)`` for a mask (T,)."""
    names = [name for name, chosen in zip(tasks, which, strict=True) if chosen]
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return f"{len(names)} of {len(tasks)} tasks ({shown})"


class Adam(torch.optim.Adam):
    """Torch's fused Adam, which spends four times its arithmetic on finding what it works on."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step on the parameters that have gradients."""
        of_groups = [[p for p in g["params"] if p.grad is not None] for g in self.param_groups]
        if not all(self.state.get(p) for trained in of_groups for p in trained):
            super().step()  # the first of some of them
            return
        for group, trained in zip(self.param_groups, of_groups, strict=True):
            means, squares, steps = (
                [self.state[p][name] for p in trained] for name in ("exp_avg", "exp_avg_sq", "step")
            )
            torch._foreach_add_(steps, 1)
            torch._fused_adam_(
                trained, [p.grad for p in trained], means, squares, [], steps,
                lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1], eps=group["eps"],
                weight_decay=0, amsgrad=False, maximize=False,
            )  # fmt: skip


def learned(optimizer: torch.optim.Adam) -> list[Tensor]:
    """The parameters of a network that learn, found faster than by a walk through its layers."""
    parameters: list[Tensor] = optimizer.param_groups[0]["params"]
    return parameters


@contextmanager
def frozen(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Build no graph towards ``parameters``; through what uses them as usual."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def clip_slices(parameters: Iterable[Tensor], limit: float, axes: int = 1) -> None:
    """Scale the gradient of each slice to an L2 norm of at most ``limit``.

    The slices are those of the first ``axes`` axes, which all parameters have in common: the
    copies, or the copies and tasks.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack([torch.linalg.vector_norm(g.flatten(axes), dim=axes) for g in gradients])
    norm = torch.linalg.vector_norm(norms, dim=0)  # (C,) or (C, T)
    scale = (limit / (norm + 1e-6)).clamp(max=1)
    for gradient in gradients:
        gradient.mul_(scale.view(*scale.shape, *[1] * (gradient.dim() - axes)))
