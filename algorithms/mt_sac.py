"""MT-SAC: one soft actor-critic for all tasks, told the task by a one-hot id.

Yu et al. 2019 (Meta-World, Sec. 5); sizes as compared in D2R Table 2 (five layers of 400).

    pi, Q_k : [s, (a,) onehot(task)] -> 400 -> 400 -> 400 -> 400 -> 400 -> output

The one-hot id is a bias per task in the first layer: the same function, the same parameters.

**Departures**: none from D2R's comparison, in which the shared core's loss weights and mask serve
every algorithm (App. A.2); `no_balance` is MT-SAC as Soft Modularization compares it.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import nn

from algorithms.nn import mlp
from algorithms.sac import ARS, SAC, SACConfig


class MTSACConfig(SACConfig):
    """Settings of MT-SAC."""

    PLAIN: ClassVar[bool] = True

    width: Annotated[int, Field(ge=1)] = 400
    """Units of each hidden layer (D2R Table 2)."""
    depth: Annotated[int, Field(ge=1)] = 5
    """Hidden layers (D2R Table 2; Soft Modularization uses 3)."""


class MTSAC(SAC):
    """Multi-task SAC on a plain network with a one-hot task id."""

    Config = MTSACConfig
    config: MTSACConfig
    PAPER: ClassVar[str] = "Yu et al. 2019, Meta-World (sizes: D2R Table 2)"
    VARIANTS: ClassVar[dict[str, dict[str, Any]]] = {
        "ars": ARS,
        "pcgrad": {"pcgrad": True},
        "no_balance": {"loss_weight": "none"},  # as Soft Modularization compares it (Sec. 5.7)
        "layers{depth}": {},
    }

    def make_network(
        self, inputs: int, outputs: int, *, copies: int, layer_norm: bool
    ) -> nn.Module:
        """[s, (a,) onehot] -> output."""
        return mlp(
            inputs, [self.config.width] * self.config.depth, outputs,
            copies=copies, one_hot=self.suite.num_tasks, layer_norm=layer_norm,
        )  # fmt: skip
