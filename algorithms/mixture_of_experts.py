"""Mixture of experts: plain networks side by side, mixed by a gate that sees state and task.

The baseline "Mix-Expert" of Soft Modularization (Yang et al. 2020, Sec. 5.2): "four expert networks
with the same architecture as MT-SAC" and "a learned gating network".

    e_i = expert_i([s, (a,) onehot(task)]);   p = softmax(gate([s, (a,) onehot(task)]))
    output = sum_i p_i e_i

**Departures** (no code is public; the paper says no more than the above)
 1. The gate is an MLP of two layers, sees what the experts see, and mixes all of them softly.
 2. It mixes the experts' outputs; ``mix=features`` mixes their last hidden layers before one common
    output layer.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from algorithms.nn import Linear, blended, mlp
from algorithms.sac import SAC, SACConfig


class MixtureOfExpertsConfig(SACConfig):
    """Settings of the mixture of experts."""

    width: Annotated[int, Field(ge=1)] = 400
    """Units of an expert's hidden layers (D2R Table 2, MT-SAC)."""
    depth: Annotated[int, Field(ge=1)] = 5
    """Hidden layers of an expert (D2R Table 2, MT-SAC; Soft Modularization uses 3)."""
    experts: Annotated[int, Field(ge=1)] = 4
    """Experts (Soft Modularization Sec. 5.2)."""
    router_width: Annotated[int, Field(ge=1)] = 256
    """Units of the gate's two hidden layers (Departure 1)."""
    mix: Literal["outputs", "features"] = "outputs"
    """What is mixed (Departure 2)."""


class MixtureOfExperts(SAC):
    """Softly gated experts on multi-task SAC."""

    Config = MixtureOfExpertsConfig
    config: MixtureOfExpertsConfig
    PAPER: ClassVar[str] = "Mix-Expert, Yang et al. 2020, Soft Modularization Sec. 5.2"
    VARIANTS: ClassVar[dict[str, dict[str, Any]]] = {
        "features": {"mix": "features"},
        "experts{experts}": {},
    }

    actor: Mixture

    def make_network(
        self, inputs: int, outputs: int, *, copies: int, layer_norm: bool
    ) -> nn.Module:
        """Experts and gate."""
        c = self.config
        return Mixture(
            inputs, [c.width] * c.depth, outputs, self.suite.num_tasks, c.experts,
            copies=copies, gate_width=c.router_width, mix=c.mix, layer_norm=layer_norm,
        )  # fmt: skip

    @torch.no_grad()
    def trace(self, obs: np.ndarray) -> dict[str, np.ndarray]:
        """``expert_weights`` (T, P, experts)."""
        weights = self.actor.weights(torch.from_numpy(obs).to(self.device)[None])
        return {"expert_weights": weights[0].cpu().numpy()}


class Mixture(nn.Module):
    """Experts and gate, in C independent copies."""

    def __init__(
        self,
        inputs: int,
        hidden: list[int],
        outputs: int,
        tasks: int,
        experts: int,
        *,
        copies: int = 1,
        gate_width: int = 256,
        mix: Literal["outputs", "features"] = "outputs",
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.experts = mlp(
            inputs, hidden, outputs if mix == "outputs" else None,
            copies=copies, one_hot=tasks, layer_norm=layer_norm, modules=experts,
        )  # fmt: skip
        self.gate = mlp(inputs, [gate_width] * 2, experts, copies=copies, one_hot=tasks)
        self.head = (
            nn.Identity() if mix == "outputs"
            else Linear(hidden[-1], outputs, copies=copies, last=True)
        )  # fmt: skip

    def weights(self, x: Tensor) -> Tensor:
        """p (C, T, B, experts)."""
        return torch.softmax(self.gate(x), -1)

    def forward(self, x: Tensor) -> Tensor:
        """(C or 1, T, B, inputs) -> (C, T, B, outputs)."""
        each = self.experts(x[:, None])  # (C, experts, T, B, W)
        output: Tensor = self.head(blended(self.weights(x)[..., None, :], each)[:, 0])
        return output
