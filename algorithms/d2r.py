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

**Departures** of the defaults from the text; where nothing else is said they follow the code.
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
10. Model- and layer-level routing (Sec. 2.3 and 5.4, not in the published code) are our reading,
    see `LayeredNetwork`.
11. Ours: a time limit is not a terminal state, the warm-up 2,000 steps, and the mask of extreme
    losses looks at them unweighted (see `algorithms.sac`); ``d2r@authors`` has the code's. It does
    not take over the code's one row index for all tasks, the clipping of alpha's gradient, and
    actors an epoch behind.
12. The code's, not in the text: losses weighted by T softmax(-log alpha) (Eq. 15: softmax(-alpha)),
    temperatures of at most 1, and the initialisation; ``d2r@printed`` has the text's first two.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from algorithms.agent import AgentConfig, Batch, Plan
from algorithms.nn import Linear, blended, mlp
from algorithms.routing import (
    Choice,
    RoutedNetwork,
    TaskEncoder,
    balance_routes,
    encoder,
    modules_used,
    pack_path,
    path_bytes,
    unpack_path,
)
from algorithms.sac import ARS, SAC, Extras, Phase, SACConfig
from suites.base import SuiteSpec


class D2RConfig(SACConfig):
    """Settings of D2R."""

    width: Annotated[int, Field(ge=1)] = 400
    """Units of the state encoder's two layers and of the task encoder (D2R Table 7)."""
    modules: Annotated[int, Field(ge=2)] = 16
    """Modules besides the output head (D2R Table 7, its code; Departure 1)."""
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
    """Multiply Eq. 14 by the number of tasks, so that the mean temperature is 1 (D2R's code;
    Departure 6)."""
    target_routing: bool = False
    """The actor's loss draws new paths instead of replaying d_old (w/ Target Routing, Sec. 5.4)."""
    critic_route: Literal["sample", "stored"] = "sample"
    """Paths of the critics' loss: drawn (D2R's code), or the actor's d_old (as Alg. 1 reads;
    Departure 7)."""
    resrouting: bool = True
    """Stop gradients into unsuitable modules (Eq. 10); the shortcut of Eq. 11 stays without it."""
    resroute_shortcut_masked: bool = False
    """Stop them in the shortcut as well (Eq. 11-12), not only before the layer (D2R's code;
    Departure 4)."""
    resroute_threshold: Literal["above", "at_least"] = "above"
    """Suitable: softmax(z^i)_j > 1/i (D2R's code), or >= (Eq. 10; Departure 5)."""
    state_routing: bool = True
    """The router sees state and task; otherwise the task alone (w/o State Routing, App. C.5)."""
    route_level: Literal["module", "layer", "model"] = "module"
    """Which sources a module may read: all before it, those of the layer below, or only its own
    network's, whose outputs alone are then routed (Sec. 2.3, Fig. 2; compared in Sec. 5.4)."""
    layers: Annotated[int, Field(ge=2)] | None = None
    """Layers that the modules stand in, for layer- and model-level routing."""

    @model_validator(mode="after")
    def _modules_fill_layers(self) -> Self:
        if (self.layers is None) != (self.route_level == "module"):
            raise ValueError("layers belongs to route_level=layer and route_level=model")
        if self.top_k is not None and self.top_k > self.modules:
            raise ValueError(f"top_k={self.top_k}: there are {self.modules} sources at most")
        if self.modules % (self.layers or 1):
            raise ValueError(f"modules={self.modules} do not fill layers={self.layers}")
        width = self.modules // (self.layers or 1)
        if self.layers and self.top_k is not None and self.top_k >= width:
            raise ValueError(
                f"top_k={self.top_k} of the {width} modules of a layer are all: set top_k=none"
            )
        if self.top_k == 1 and self.rescale:
            raise ValueError("top_k=1 needs rescale=false: a rescaled weight of one source is 1, "
                             "and its router learns nothing")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _all_used(self) -> Self:
        if self.top_k is None:
            self._unused(
                "explore_sample", "route_balance", "tau_scale_by_T", "target_routing",
                "critic_route", because="every module reads all sources (top_k is none)",
            )  # fmt: skip
        if not self.explore_sample:
            self._unused("route_balance", "tau_scale_by_T", because="explore_sample is false")
        if not self.route_balance:
            self._unused("tau_scale_by_T", because="route_balance is false")
        if not self.resrouting:
            because = "resrouting is false"
            self._unused("resroute_shortcut_masked", "resroute_threshold", because=because)
        return self


class D2R(SAC):
    """Dynamic depth routing on the shared multi-task SAC."""

    Config = D2RConfig
    config: D2RConfig
    PAPER: ClassVar[str] = "He et al. 2023, D2R: multi-task RL with dynamic depth routing"
    VARIANTS: ClassVar[dict[str, dict[str, Any]]] = {
        "authors": {"time_limit": "terminal", "warmup_steps": 4000, "extreme_loss_weighted": True},
        # Departures 4 to 7 and SAC's weights as the text prints them; 1 to 3 stay the code's.
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
        "layer_level": {"route_level": "layer", "layers": 4},
        "model_level": {"route_level": "model", "layers": 4},
        "modules{modules}": {},
        # Plain: what a search found best did not hold on other seeds (results/studies/tuned).
        "tuned": {},
        "ars": ARS,
    }  # fmt: skip

    actor: RoutedNetwork | LayeredNetwork
    critic: RoutedNetwork | LayeredNetwork
    target_critic: RoutedNetwork | LayeredNetwork

    def __init__(
        self, suite: SuiteSpec, config: AgentConfig, plan: Plan, *, seed: int, device: str = "cpu"
    ) -> None:
        super().__init__(suite, config, plan, seed=seed, device=device)
        self.extras_spec = {"route": ((path_bytes(self.config.modules),), "uint8")}
        self.drawn: Choice = "sample" if self.config.explore_sample else "top_k"
        self.stored: Tensor | None = None

    def make_network(
        self, inputs: int, outputs: int, *, copies: int, layer_norm: bool
    ) -> nn.Module:
        """Modules and a router of their own."""
        config = self.config
        if config.layers is not None:
            return LayeredNetwork(
                inputs, outputs, self.suite.num_tasks, config, copies=copies, layer_norm=layer_norm
            )
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

    def on_new_alpha(self) -> None:
        """Refresh the route temperatures from the new, capped alpha (Eq. 14)."""
        if self.config.route_balance:
            networks = (self.actor, self.critic, self.target_critic)
            temperatures = (network.temperature for network in networks)
            balance_routes(temperatures, self.log_alpha, self.config.tau_scale_by_T)

    def probe(self) -> dict[str, np.ndarray]:
        """``route_temperature`` (T,)."""
        return {"route_temperature": self.actor.temperature[0].cpu().numpy().copy()}

    @torch.no_grad()
    def trace(self, obs: np.ndarray) -> dict[str, np.ndarray]:
        """``routes`` (T, P, M, M): greedy weights (destination, source), the head last;
        ``modules_used`` (T, P): modules that the head reaches along them, at most M."""
        tensor = torch.from_numpy(obs).to(self.device)
        route = self.actor(tensor[None], "top_k")[1]
        weights = route.matrix()[0]
        # Soft routing weights everything; D2R App. C.3 counts a source above 0.01.
        edges = weights > 0.01 if self.config.top_k is None else route.path()[0]
        return {
            "routes": weights.cpu().numpy(),
            "modules_used": modules_used(edges).cpu().numpy(),
        }


class LayeredRoute(NamedTuple):
    """Weights and path of D destinations over their n sources, and their places in the whole."""

    weights: Tensor  # (C, T, B, D, n)
    chosen: Tensor  # (C, T, B, D, n) bool
    place: Tensor  # (D, n) int64: of each connection in the flattened (M, M)
    fixed: Tensor  # (F,) int64: places of connections that always hold
    modules: int

    def matrix(self) -> Tensor:
        """The weights as (C, T, B, M, M): destination, source, as those of module-level routing."""
        return self._whole(self.weights)

    def path(self) -> Tensor:
        """The path d as booleans (C, T, B, M, M)."""
        return self._whole(self.chosen)

    def _whole(self, values: Tensor) -> Tensor:
        whole = values.new_zeros(*values.shape[:3], self.modules**2)
        whole[..., self.fixed] = 1
        whole[..., self.place.flatten()] = values.flatten(-2)
        return whole.view(*values.shape[:3], self.modules, self.modules)


class LayeredNetwork(nn.Module):
    """D2R's network with L layers of n modules, routed layer by layer or network by network.

    "Model-level and layer-level routing paths can be viewed as specific DAGs with structural
    restrictions" (Sec. 2.3). Modules are numbered layer by layer; those of the first all read
    ReLU(F(s)). Layer-level: a module, and the head, may read all n of the layer below, as in Soft
    Modularization; z has (L - 1) n^2 + n numbers. Model-level: the i-th modules of all layers are a
    plain network, and the head alone routes, over the n networks' outputs; z has n numbers.

    Encoders, router, MaskSoftmax, SampleK and temperatures are D2R's. So is ResRouting, with the
    bar 1 / (n + 1) for n sources. It passes round what has sources of its own, modules above the
    first layer. A network as a whole has none, so an unsuitable one learns nothing, and its modules
    have no shortcuts.
    """

    def __init__(
        self, inputs: int, outputs: int, tasks: int, config: D2RConfig, *,
        copies: int = 1, layer_norm: bool = False,
    ) -> None:  # fmt: skip
        """``layer_norm``: one before each ReLU of state encoder and modules, as `RoutedNetwork`."""
        super().__init__()
        assert config.layers is not None
        self.config = config
        width, units, router = config.width, config.module_width, config.router_width
        self.sources = n = config.modules // config.layers
        by_layer = config.route_level == "layer"

        self.state_encoder = encoder(inputs, width, copies=copies, layer_norm=layer_norm)
        self.task_encoder = TaskEncoder(tasks, width, copies=copies)
        self.router = mlp(width, [router] * 2, None, copies=copies)
        self.layers = nn.ModuleList(
            mlp(
                units if layer else width, [units], None,
                copies=copies, layer_norm=layer_norm, modules=n,
            )
            for layer in range(config.layers)
        )  # fmt: skip
        self.head = Linear(units, outputs, copies=copies, last=True)
        self.temperature = nn.Parameter(torch.ones(copies, tasks), requires_grad=False)

        # Module (layer, i) is number layer * n + i, its row as a destination one less.
        number = torch.arange(config.modules).view(config.layers, n)
        row = torch.cat([number[1:].flatten() - 1, torch.tensor([config.modules - 1])])
        below = number.repeat_interleave(n, 0)[: len(row)]  # (destinations, n)
        place = row[:, None] * config.modules + below
        fixed = row[:-1] * config.modules + number[:-1].flatten()
        self.register_buffer("_place", place if by_layer else place[-1:], persistent=False)
        self.register_buffer("_fixed", fixed[:0] if by_layer else fixed, persistent=False)
        self._place: Tensor
        self._fixed: Tensor
        self.logits = Linear(router, self._place.numel(), copies=copies)

    def forward(
        self, x: Tensor, route: Choice | Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, LayeredRoute]:
        """As `RoutedNetwork`, given paths too: outputs (C, T, B, outputs) and the route."""
        config, n = self.config, self.sources
        state = self.state_encoder(x)
        task = self.task_encoder()
        hidden = self.router(state * task if config.state_routing else task.expand_as(state))
        z = self.logits(hidden).unflatten(-1, (-1, n))  # (C, T, B, D, n)
        chosen = self._choose(z.detach(), route, generator)
        if config.rescale:
            weights = torch.softmax(z.masked_fill(~chosen, -torch.inf), -1)
        else:
            weights = torch.softmax(z, -1) * chosen
        blocked = None
        if torch.is_grad_enabled() and config.resrouting:
            chance, bar = torch.softmax(z.detach(), -1), 1 / (n + 1)
            above = config.resroute_threshold == "above"
            blocked = weights.detach() * ~(chance > bar if above else chance >= bar)

        y = o = self.layers[0](state.relu()[:, None])  # (C, n, T, B, d)
        for layer, module in enumerate(self.layers[1:]):
            if config.route_level == "layer":
                rows = slice(layer * n, (layer + 1) * n)
                u, heard = _read(weights, blocked, rows, o, y)
                y = module(heard)
                o = y + (heard if config.resroute_shortcut_masked else u)
            else:
                y = o = module(o)
        _, heard = _read(weights, blocked, slice(-1, None), o, y)
        taken = LayeredRoute(weights.detach(), chosen, self._place, self._fixed, config.modules)
        return self.head(heard[:, 0]), taken

    def _choose(
        self, z: Tensor, route: Choice | Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """The path (C, T, B, D, n) bool."""
        if isinstance(route, Tensor):
            return route.flatten(-2)[..., self._place].expand_as(z)
        k = min(self.config.top_k or self.sources, self.sources)
        if route == "sample":  # z / tau + Gumbel noise: K draws without replacement
            noise = torch.rand(z.shape, generator=generator, dtype=z.dtype, device=z.device)
            tau = self.temperature[:, :, None, None, None]
            z = z / tau - noise.clamp_min(1e-12).log().neg().log()
        return torch.zeros_like(z, dtype=torch.bool).scatter(-1, z.topk(k, -1).indices, True)


def _read(
    weights: Tensor, blocked: Tensor | None, rows: slice, o: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """sum_j p_j o_j of some destinations, and the same with rsg[o_j] where j is unsuitable.

    ``o`` and ``y`` (C, n, T, B, d): the modules' outputs with and without their shortcuts.
    """

    u = blended(weights[..., rows, :], o)
    if blocked is None:
        return u, u
    # rsg[o] = o - (y - sg[y]): nothing to the value, y's share of the gradient less.
    return u, u - blended(blocked[..., rows, :], y - y.detach())
