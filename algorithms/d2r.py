"""D2R: one policy whose modules are picked, state by state, by a routing network.

He et al. 2023, "Not All Tasks Are Equally Difficult: Multi-Task Deep Reinforcement Learning with
Dynamic Depth Routing" (AAAI 2024), and the authors' published code. The routed network, its
equations and ResRouting are in `algorithms.routing`; here is which route each call takes.

Symbols: m^i modules (i = 1 ... n), z^i routing logits of destination i over its sources j < i,
d^i its path (the K sources it reads), p^i their weights, tau the route temperatures, alpha SAC's.

    act:        d ~ SampleK(z / tau_T, K), stored with the transition    (Eq. 13, Alg. 1 line 8)
    evaluate:   d = TopK(z, K), action tanh(mean)                        (Eq. 6)
    actor loss: p = MaskSoftmax(z, d_old), d_old from the replay         (Eq. 8, ResRouting)
    balance:    tau_T = (1 / alpha_T) / sum_j (1 / alpha_j)              (Eq. 14)

Departures of the defaults from the text; where nothing else is said they follow the authors' code.
 1. 16 modules and a head (136 logits); the text counts the head as the 16th module (120).
 2. One routing network with one output layer for all logits; the text has one per module.
 3. Module 1 reads ReLU(F(s)), the router F(s) * H(task) without ReLU; the text says F(s) for both.
 4. ResRouting blocks an unsuitable source only on its way through W_i, not in the shortcut
    (``resroute_shortcut_masked``; Eq. 11-12 mask both).
 5. Suitable means above 1/i (``resroute_threshold``; Eq. 10 has "at least").
 6. tau is Eq. 14 times the number of tasks (``tau_scale_by_T``).
 7. Only the actor replays paths. Critics draw new ones for their loss (``critic_route``; Alg. 1
    reads as d_old for both) and take the K largest logits in the actor's loss and the target,
    as does the actor at s'.
 8. All modules are computed for every row, as in the code; paths decide what is read. "Skipping"
    (Sec. 3.1) is counted, in ``modules_used``, not saved: batches of rows with different paths
    would run no faster.
 9. Ours: the replay holds a path as 136 bits, not 136 numbers.
10. Ours: temperatures alpha step together with the networks, and a time limit is not a terminal
    state (see `algorithms.sac`); ``d2r@authors`` treats it as one and warms up for 4,000 steps.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from algorithms.agent import AgentConfig, Batch, Plan
from algorithms.routing import (
    Choice,
    RoutedNetwork,
    modules_used,
    pack_path,
    path_bytes,
    route_temperature,
    unpack_path,
)
from algorithms.sac import ARS, SAC, Extras, Phase, SACConfig
from suites.base import SuiteSpec


class D2RConfig(SACConfig):
    """Settings of D2R."""

    width: Annotated[int, Field(ge=1)] = 400
    """Units of the state encoder's two layers and of the task encoder (D2R Table 7)."""
    modules: Annotated[int, Field(ge=2)] = 16
    """Modules besides the output head (D2R Table 7, its code)."""
    module_width: Annotated[int, Field(ge=1)] = 128
    """Units of each module (D2R Table 7)."""
    router_width: Annotated[int, Field(ge=1)] = 256
    """Units of the router's two hidden layers (D2R Table 7)."""
    top_k: Annotated[int, Field(ge=1)] | None = 2
    """Sources each module reads (D2R Sec. 3.1); none: all before it (Soft Routing, Sec. 5.4)."""
    rescale: bool = True
    """Weights sum to 1 over the path (Eq. 5); otherwise they are the softmax's over all sources,
    which Top-1 needs for a gradient (Hard Routing, Sec. 5.4)."""
    explore_sample: bool = True
    """Draw paths while training (Eq. 7); otherwise the K largest always (w/o SampleK, Sec. 5.4)."""
    route_balance: bool = True
    """Draw at route temperatures (Eq. 13, 14); otherwise at 1 (w/o Route-Balancing, Sec. 5.4)."""
    tau_scale_by_T: bool = True  # noqa: N815  (the symbol's name)
    """Multiply Eq. 14 by the number of tasks, so that the mean temperature is 1 (D2R's code)."""
    target_routing: bool = False
    """The actor's loss draws new paths instead of replaying d_old (w/ Target Routing, Sec. 5.4)."""
    critic_route: Literal["sample", "stored"] = "sample"
    """Paths of the critics' loss: drawn (D2R's code), or the actor's d_old (as Alg. 1 reads)."""
    resrouting: bool = True
    """Stop gradients into unsuitable modules (Eq. 10); the shortcut of Eq. 11 stays without it."""
    resroute_shortcut_masked: bool = False
    """Stop them in the shortcut as well (Eq. 11-12), not only before the layer (D2R's code)."""
    resroute_threshold: Literal["above", "at_least"] = "above"
    """Suitable: softmax(z^i)_j > 1/i (D2R's code), or >= (Eq. 10)."""
    state_routing: bool = True
    """The router sees state and task; otherwise the task alone (w/o State Routing, App. C.5)."""


class D2R(SAC):
    """Dynamic depth routing on the shared multi-task SAC."""

    Config = D2RConfig
    config: D2RConfig
    PAPER: ClassVar[str] = "He et al. 2023, D2R: multi-task RL with dynamic depth routing"
    VARIANTS: ClassVar[dict[str, dict[str, Any]]] = {
        "authors": {"time_limit": "terminal", "warmup_steps": 4000},
        "printed": {
            "resroute_shortcut_masked": True, "resroute_threshold": "at_least",
            "tau_scale_by_T": False, "critic_route": "stored", "loss_weight": "alpha",
            "alpha_max": None,
        },
        "top1": {"top_k": 1, "rescale": False},
        "soft": {"top_k": None},
        "no_samplek": {"explore_sample": False},
        "no_balance": {"route_balance": False},
        "target_routing": {"target_routing": True},
        "no_resrouting": {"resrouting": False},
        "no_state_routing": {"state_routing": False},
        "modules{modules}": {},
        "ars": ARS,
    }  # fmt: skip

    actor: RoutedNetwork
    critic: RoutedNetwork
    target_critic: RoutedNetwork

    def __init__(
        self, suite: SuiteSpec, config: AgentConfig, plan: Plan, *, seed: int, device: str = "cpu"
    ) -> None:
        super().__init__(suite, config, plan, seed=seed, device=device)
        self.extras_spec = {"route": ((path_bytes(self.config.modules),), "uint8")}
        self.drawn: Choice = "sample" if self.config.explore_sample else "top_k"
        self.stored: Tensor | None = None
        self._balance_routes()

    def make_network(
        self, inputs: int, outputs: int, *, copies: int, layer_norm: bool
    ) -> nn.Module:
        """Modules and a router of their own."""
        config = self.config
        return RoutedNetwork(
            inputs, outputs, self.suite.num_tasks,
            copies=copies, width=config.width, module_width=config.module_width,
            router_width=config.router_width, modules=config.modules, top_k=config.top_k,
            rescale=config.rescale, state_routing=config.state_routing,
            resrouting=config.resrouting, shortcut_masked=config.resroute_shortcut_masked,
            threshold=config.resroute_threshold, layer_norm=layer_norm,
        )  # fmt: skip

    def policy(self, obs: Tensor, phase: Phase, extras: Extras) -> tuple[Tensor, Extras]:
        """Gaussian parameters; exploring also returns the path, to be stored."""
        route: Choice | Tensor
        if phase == "policy" and not self.config.target_routing:
            route = self._stored_path(extras)  # Eq. 8
        else:
            route = self.drawn if phase in ("explore", "policy") else "top_k"
        output, taken = self.actor(obs[None], route, self.noise)
        return output[0], {"route": pack_path(taken.path()[0])} if phase == "explore" else {}

    def value(self, critic: nn.Module, obs: Tensor, action: Tensor, phase: Phase) -> Tensor:
        """Q1 and Q2, which draw paths of their own for their own loss (Departure 7)."""
        route: Choice | Tensor = "top_k"
        if phase == "value":
            route = self.drawn if self.stored is None else self.stored
        output: Tensor = critic(torch.cat([obs, action], -1)[None], route, self.noise)[0]
        return output

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """The shared update; critics may be told to replay the actor's paths (Departure 7)."""
        if self.config.critic_route == "stored":
            self.stored = self._stored_path(batch.extras)
        return super().update(batch)

    def _stored_path(self, extras: Extras) -> Tensor:
        """d_old of the batch's transitions, (1, T, B, M, M) bool."""
        return unpack_path(extras["route"], self.config.modules)[None]

    def after_update(self, kept: Tensor) -> None:
        """Refresh the route temperatures from the new, capped alpha (Eq. 14)."""
        self._balance_routes()

    def reset(self) -> None:
        """As SAC, and the route temperatures with alpha."""
        super().reset()
        self._balance_routes()

    @torch.no_grad()
    def _balance_routes(self) -> None:
        if self.config.route_balance:
            tau = route_temperature(self.log_alpha, self.config.tau_scale_by_T)
            for network in (self.actor, self.critic, self.target_critic):
                network.temperature.copy_(tau.expand_as(network.temperature))

    def probe(self) -> dict[str, np.ndarray]:
        """``route_temperature`` (T,)."""
        return {"route_temperature": self.actor.temperature[0].cpu().numpy().copy()}

    @torch.no_grad()
    def trace(self, obs: np.ndarray) -> dict[str, np.ndarray]:
        """``routes`` (T, P, M, M): greedy weights (destination, source), the head last;
        ``modules_used`` (T, P): modules that the head reaches along them, at most M."""
        tensor = torch.from_numpy(obs).to(self.device)
        weights = self.actor(tensor[None], "top_k")[1].matrix()[0]
        # Soft routing weights everything; D2R App. C.3 counts a source above 0.01.
        edges = weights > (0.01 if self.config.top_k is None else 0)
        return {
            "routes": weights.cpu().numpy(),
            "modules_used": modules_used(edges).cpu().numpy(),
        }
