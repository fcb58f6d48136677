"""Hard routing: a controller picks one module per layer for each task, learned by REINFORCE.

The baseline "Hard Routing" of Soft Modularization (Yang et al. 2020, Sec. 5.2): "four module layers
with four modules each layer. For each layer, agent selects one module to use according to the
controller depending on the task", after Rosenbaum et al. 2018 (Routing Networks); the controller is
a look-up table that does not see the observation (Sec. 5.7).

Symbols: L layers of n modules; F the state encoder, eta (T x L x n) the table,
d (L) a path, J = alpha log pi(a|s) - min Q(s, a) the actor's objective, J_T its running mean.

    exploring, learning:  d_l ~ softmax(eta_{T,l});     evaluation:  d_l = argmax eta_{T,l}
    f = F([s, (a,) onehot(T)]);   o_1 = V_{1,d_1} ReLU(f);   o_l = V_{l,d_l} ReLU(o_{l-1})
    output = V ReLU(o_L)
    grad eta = E[(J - J_T) grad sum_l log softmax(eta_{T,l})_{d_l}]                      (REINFORCE)

**Departures** (no code is public; the papers say no more than the above)
 1. State encoder, modules and output layer are those of Soft Module (deep). The encoder sees the
    one-hot task id, as the paper's other baselines do; in `blind` the table alone knows the task.
 2. A path is drawn for each step and each row of a batch, not once per task.
 3. One table serves actor and critics. It learns from the actor's objective alone (no
    straight-through estimate); the critics draw paths for their own loss and take the likeliest
    modules in the actor's loss and the target: no path is credited with a critic's error along it.
 4. The table starts uniform and has the actor's learning rate; J_T starts at its first value.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from algorithms.agent import AgentConfig, Plan
from algorithms.nn import Init, LayerNorm, Linear, ModuleLinear, mlp
from algorithms.sac import SAC, Extras, Phase, SACConfig
from suites.base import SuiteSpec


class HardRoutingConfig(SACConfig):
    """Settings of hard routing."""

    width: Annotated[int, Field(ge=1)] = 400
    """Units of the state encoder's two layers (D2R Table 5, Soft Module)."""
    layers: Annotated[int, Field(ge=1)] = 4
    """L (Soft Modularization Sec. 5.2)."""
    modules: Annotated[int, Field(ge=1)] = 4
    """n, modules in a layer (Soft Modularization Sec. 5.2)."""
    module_width: Annotated[int, Field(ge=1)] = 128
    """Outputs of a module (Soft Modularization Sec. 5.2: deep)."""
    one_hot: bool = True
    """Whether the state encoder sees the one-hot task id (Departure 1)."""
    baseline_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Share that the running mean J_T keeps in each update; ours."""


class HardRouting(SAC):
    """One module per layer for each task, picked by a learned table."""

    Config = HardRoutingConfig
    config: HardRoutingConfig
    PAPER: ClassVar[str] = "Hard Routing, Yang et al. 2020, Soft Modularization Sec. 5.2"
    VARIANTS: ClassVar[dict[str, dict[str, Any]]] = {
        "blind": {"one_hot": False},
        "layers{layers}": {},
        "modules{modules}": {},
    }

    actor: RoutedActor

    def __init__(
        self, suite: SuiteSpec, config: AgentConfig, plan: Plan, *, seed: int, device: str = "cpu"
    ) -> None:
        super().__init__(suite, config, plan, seed=seed, device=device)
        self.running_mean = torch.zeros(suite.num_tasks, 1, 1, device=self.device)
        self.log_likelihood: Tensor
        """log p(d) (T, B, 1) of the paths that the actor took last in its loss."""

    def make_network(
        self, inputs: int, outputs: int, *, copies: int, layer_norm: bool
    ) -> nn.Module:
        """Layers of modules, without the table."""
        c = self.config
        return HardModules(
            inputs, outputs,
            copies=copies, width=c.width, layers=c.layers, modules=c.modules,
            module_width=c.module_width, one_hot=self.suite.num_tasks if c.one_hot else 0,
            layer_norm=layer_norm,
        )  # fmt: skip

    def make_actor(self) -> nn.Module:
        """Modules and the table."""
        c = self.config
        return RoutedActor(
            super().make_actor(), Controller(self.suite.num_tasks, c.layers, c.modules)
        )

    def policy(self, obs: Tensor, phase: Phase, extras: Extras) -> tuple[Tensor, Extras]:
        """Gaussian parameters along paths drawn from the table; in evaluation, the likeliest."""
        controller = self.actor.controller
        if phase == "exploit":
            path = controller.likeliest()
        else:
            path = controller.draw(obs.shape[1], self.noise)
        if phase == "policy":
            self.log_likelihood = controller.log_likelihood(path)
        output: Tensor = self.actor(obs[None], path)
        return output[0], {}

    def value(self, critic: nn.Module, obs: Tensor, action: Tensor, phase: Phase) -> Tensor:
        """Q1 and Q2, along drawn paths for their own loss only (Departure 3)."""
        controller = self.actor.controller
        if phase == "value":
            path = controller.draw(obs.shape[1], self.noise)
        else:
            path = controller.likeliest()
        output: Tensor = critic(torch.cat([obs, action], -1)[None], path)
        return output

    def actor_loss(self, objective: Tensor) -> Tensor:
        """The mean objective, with REINFORCE's gradient for the table in a term of value 0."""
        with torch.no_grad():
            mean = objective.mean(1, keepdim=True)
            keep = 0.0 if self.fresh else self.config.baseline_decay
            advantage = objective - (mean if self.fresh else self.running_mean)
            self.running_mean = keep * self.running_mean + (1 - keep) * mean
        score = advantage * (self.log_likelihood - self.log_likelihood.detach())
        return super().actor_loss(objective + score)

    def probe(self) -> dict[str, np.ndarray]:
        """``module_probabilities`` (T, L, n), the table's softmax."""
        table = self.actor.controller.table.detach()[0]
        return {"module_probabilities": torch.softmax(table, -1).cpu().numpy()}

    def trace(self, obs: np.ndarray) -> dict[str, np.ndarray]:
        """``module_routes`` (T, L), the module that evaluation takes in each layer."""
        return {"module_routes": self.actor.controller.likeliest()[0, :, 0].cpu().numpy()}

    def state_dict(self) -> dict[str, Any]:
        """As SAC, and the running mean."""
        return super().state_dict() | {"running_mean": self.running_mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        super().load_state_dict(state)
        self.running_mean = state["running_mean"].to(self.device)


class Controller(nn.Module):
    """eta: the logits of every module, for each task and layer."""

    def __init__(self, tasks: int, layers: int, modules: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(1, tasks, layers, modules))

    def draw(self, rows: int, generator: torch.Generator) -> Tensor:
        """Paths d ~ softmax(eta) for each row, (1, T, rows, L) int64."""
        _, tasks, layers, modules = self.table.shape
        noise = torch.rand(
            tasks, rows, layers, modules, generator=generator, device=self.table.device
        )
        gumbel = -noise.clamp_min(1e-12).log().neg().log()  # the largest is a draw
        return (self.table.detach()[:, :, None] + gumbel).argmax(-1)

    def likeliest(self) -> Tensor:
        """Paths d = argmax eta, (1, T, 1, L) int64."""
        return self.table.detach().argmax(-1)[:, :, None]

    def log_likelihood(self, path: Tensor) -> Tensor:
        """sum_l log softmax(eta_l)_{d_l} of paths (1, T, B, L), as (T, B, 1)."""
        log_p = torch.log_softmax(self.table, -1)[0, :, None].expand(-1, path.shape[2], -1, -1)
        return log_p.gather(-1, path[0, ..., None]).sum(-2)

    def initialise(self, scheme: Init, generator: torch.Generator) -> None:
        """Start uniform (Departure 4)."""
        with torch.no_grad():
            self.table.zero_()


class RoutedActor(nn.Module):
    """The policy's modules and the controller that picks them."""

    def __init__(self, network: nn.Module, controller: Controller) -> None:
        super().__init__()
        self.network, self.controller = network, controller

    def forward(self, x: Tensor, path: Tensor) -> Tensor:
        """The network along a path that the controller gave, see `HardModules`."""
        output: Tensor = self.network(x, path)
        return output


class HardModules(nn.Module):
    """State encoder, L layers of n modules, output layer, in C independent copies."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        copies: int = 1,
        width: int = 400,
        layers: int = 4,
        modules: int = 4,
        module_width: int = 128,
        one_hot: int = 0,
        layer_norm: bool = False,
    ) -> None:
        """``layer_norm``: one before each ReLU."""
        super().__init__()
        self.state_encoder = mlp(
            inputs, [width] * 2, None, copies=copies, one_hot=one_hot, layer_norm=layer_norm
        )
        self.layers = nn.ModuleList(
            nn.Sequential(
                ModuleLinear(
                    modules, module_width if layer else width, module_width, copies=copies
                ),
                LayerNorm(module_width, copies=copies, modules=modules)
                if layer_norm else nn.Identity(),
            )
            for layer in range(layers)
        )  # fmt: skip
        self.head = Linear(module_width, outputs, copies=copies, last=True)

    def forward(self, x: Tensor, path: Tensor) -> Tensor:
        """(C or 1, T, B, inputs) along paths (1, T, B or 1, L) -> (C, T, B, outputs)."""
        o = self.state_encoder(x)
        for layer, d in zip(self.layers, path.unbind(-1), strict=True):
            # Neighbouring rows take different modules: all are computed, one is read.
            each = layer(o[:, None])  # (C, n, T, B, d)
            o = each.gather(1, d[:, None, ..., None].expand(len(each), 1, *each.shape[2:]))[:, 0]
            o = o.relu()
        output: Tensor = self.head(o)
        return output
