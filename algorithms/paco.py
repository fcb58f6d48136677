"""PaCo: every task's network is a combination of K shared sets of parameters.

Sun et al. 2022, "PaCo: Parameter-Compositional Multi-Task Reinforcement Learning"; sizes of D2R
Table 6 (five sets of three layers of 400).

Symbols: Phi the K parameter sets, w_tau (K) the compositional vector of task tau.

    theta_tau = Phi w_tau,   for every layer's weight and bias                          (Sec. 3)
    pi(a|s) = network(s; theta_tau);   Q(s, a) = network([s, a]; theta_tau)

Actor and critics have a Phi each and w in common, which learns from the losses of both; targets use
it as it is. No one-hot task id is fed in; the task enters through w alone. A task whose loss
explodes is left out of the step (the shared core's mask), and its w becomes a random convex
combination of the other tasks' (Sec. 3.4).

Each task's parameters are composed first, so a forward pass is one batched product per layer; of a
single row per task, as in acting, the K sets' outputs are combined instead: the same, in less time.

**Departures**
 1. As in the authors' code, the K sets start alike and w, drawn from N(0, 1), breaks the symmetry.
 2. w learns at the actor's rate and is clipped with the actor's gradient (the authors: by an
    optimiser of its own).
 3. Where a preset gives critics LayerNorms, the K sets share them.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, ClassVar, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from algorithms.nn import Init, LayerNorm, draw
from algorithms.sac import SAC, Extras, Phase, SACConfig


class PaCoConfig(SACConfig):
    """Settings of PaCo."""

    width: Annotated[int, Field(ge=1)] = 400
    """Units of each hidden layer (D2R Table 6)."""
    depth: Annotated[int, Field(ge=1)] = 3
    """Hidden layers (D2R Table 6)."""
    sets: Annotated[int, Field(ge=1)] = 5
    """K, parameter sets (D2R Table 6)."""
    reset_extreme: bool = True
    """Whether a task of extreme loss gets a new w (PaCo Sec. 3.4)."""

    @model_validator(mode="after")
    def _losses_can_be_extreme(self) -> Self:
        if self.extreme_loss is None:
            self._unused("reset_extreme", because="extreme_loss is none")
        return self


class PaCo(SAC):
    """Parameter-compositional multi-task SAC."""

    Config = PaCoConfig
    config: PaCoConfig
    PAPER: ClassVar[str] = "Sun et al. 2022, PaCo (sizes: D2R Table 6)"
    VARIANTS: ClassVar[dict[str, dict[str, Any]]] = {
        "sets{sets}": {},
        "no_reset": {"reset_extreme": False},
    }

    actor: ComposedNetwork

    def make_actor(self) -> nn.Module:
        """s -> mean and log std of the action; w stands here (Departure 2)."""
        actor = super().make_actor()
        actor.composition = Composition(self.suite.num_tasks, self.config.sets)
        return actor

    def make_network(
        self, inputs: int, outputs: int, *, copies: int, layer_norm: bool
    ) -> nn.Module:
        """A network composed for each task."""
        config = self.config
        return ComposedNetwork(
            inputs, [config.width] * config.depth, outputs, config.sets,
            copies=copies, layer_norm=layer_norm,
        )  # fmt: skip

    @property
    def w(self) -> Tensor:
        """(1, T, K)."""
        w: Tensor = self.actor.composition.weight
        return w

    def policy(self, obs: Tensor, phase: Phase, extras: Extras) -> tuple[Tensor, Extras]:
        """Gaussian parameters (T, B, 2A)."""
        output: Tensor = self.actor(obs[None], self.w)
        return output[0], {}

    def value(self, critic: nn.Module, obs: Tensor, action: Tensor, phase: Phase) -> Tensor:
        """Q1 and Q2; the actor's loss teaches w through the actor, not through them."""
        w = self.w if phase == "value" else self.w.detach()
        output: Tensor = critic(torch.cat([obs, action], -1)[None], w.expand(2, -1, -1))
        return output

    @torch.no_grad()
    def after_update(self, kept: Tensor) -> None:
        """Give tasks of extreme loss another w: a random convex combination of the others'."""
        if not self.config.reset_extreme or self.config.extreme_loss is None:
            return
        draws = torch.rand(len(kept), len(kept), generator=self.noise, device=self.device)
        share = draws * kept  # (T, T), task by source; nothing from tasks that are extreme too
        share = share / share.sum(1, keepdim=True).clamp_min(1e-8)
        renewed = ((1 - kept) * kept.amax())[:, None]  # (T, 1); all extreme: nobody to take from
        self.w.copy_(torch.where(renewed > 0, share @ self.w, self.w))

    @torch.no_grad()
    def probe(self) -> dict[str, np.ndarray]:
        """``composition`` (T, K), w."""
        return {"composition": self.w[0].cpu().numpy().copy()}

    def trace(self, obs: np.ndarray) -> dict[str, np.ndarray]:
        """The same w for every state."""
        return self.probe()


class Composition(nn.Module):
    """w."""

    def __init__(self, tasks: int, sets: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, tasks, sets))

    def initialise(self, scheme: Init, generator: torch.Generator) -> None:
        """Draw w (Departure 1)."""
        with torch.no_grad():
            self.weight.normal_(generator=generator)


class ComposedNetwork(nn.Module):
    """An MLP whose parameters are composed for each task, in C independent copies."""

    composition: Composition

    def __init__(
        self,
        inputs: int,
        hidden: list[int],
        outputs: int,
        sets: int,
        *,
        copies: int,
        layer_norm: bool,
    ) -> None:
        super().__init__()
        sizes = [inputs, *hidden, outputs]
        self.layers = nn.ModuleList(
            ComposedLinear(i, o, sets, copies=copies, last=n == len(hidden))
            for n, (i, o) in enumerate(pairwise(sizes))
        )
        self.norms = nn.ModuleList(
            LayerNorm(width, copies=copies) if layer_norm else nn.Identity() for width in hidden
        )

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """(C or 1, T, B, inputs) and w (C, T, K) -> (C, T, B, outputs)."""
        x = x.expand(len(w), *x.shape[1:])
        for layer, norm in zip(self.layers, self.norms, strict=False):
            x = norm(layer(x, w)).relu()
        output: Tensor = self.layers[-1](x, w)
        return output


class ComposedLinear(nn.Module):
    """y = x (sum_k w_k W_k) + sum_k w_k b_k."""

    def __init__(self, inputs: int, outputs: int, sets: int, *, copies: int, last: bool) -> None:
        super().__init__()
        self.last = last
        self.weight = nn.Parameter(torch.empty(copies, sets, inputs, outputs))
        self.bias = nn.Parameter(torch.empty(copies, sets, 1, outputs))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """(C, T, B, inputs) and w (C, T, K) -> (C, T, B, outputs)."""
        copies, tasks, rows, inputs = x.shape
        if rows == 1:  # acting: outputs of all sets are fewer than composed parameters
            of_sets = torch.matmul(x.transpose(1, 2), self.weight) + self.bias  # (C, K, T, outputs)
            return torch.einsum("ctk,ckto->cto", w, of_sets)[:, :, None]
        weight = torch.bmm(w, self.weight.flatten(2))  # (C, T, inputs * outputs)
        bias = torch.bmm(w, self.bias.flatten(2))  # (C, T, outputs)
        y = torch.baddbmm(
            bias.view(copies * tasks, 1, -1),
            x.reshape(copies * tasks, rows, inputs),
            weight.view(copies * tasks, inputs, -1),
        )
        return y.view(copies, tasks, rows, -1)

    def initialise(self, scheme: Init, generator: torch.Generator) -> None:
        """Draw one set, and start all alike (Departure 1)."""
        _, _, inputs, outputs = self.weight.shape
        weight, bias = self.weight[:, :1].detach().clone(), self.bias[:, :1].detach().clone()
        draw([weight], bias, inputs, outputs, self.last, scheme, generator)
        with torch.no_grad():
            self.weight.copy_(weight.expand_as(self.weight))
            self.bias.copy_(bias.expand_as(self.bias))
