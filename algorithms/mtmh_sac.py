"""MTMH-SAC: multi-task SAC with a shared trunk and an output head per task.

Yu et al. 2019 (Meta-World, Sec. 5); sizes as compared in D2R Table 3 (five layers of 400). The
one-hot task id stays in the input (Soft Modularization's code; the published parameter counts
of D2R Table 8 hold with it and not without).

    h = trunk([s, (a,) onehot(task)]);   output = h W_task + b_task

**Departures**: none from D2R's comparison, in which the shared core's loss weights and mask serve
every algorithm (App. A.2).
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import nn

from algorithms.agent import Match
from algorithms.nn import TaskLinear, mlp
from algorithms.sac import ARS, SAC, SACConfig


class MTMHSACConfig(SACConfig):
    """Settings of MTMH-SAC."""

    PLAIN: ClassVar[bool] = True

    width: Annotated[int, Field(ge=1)] = 400
    """Units of each hidden layer (D2R Table 3)."""
    depth: Annotated[int, Field(ge=1)] = 5
    """Hidden layers of the trunk (D2R Table 3; Soft Modularization uses 3)."""
    widen: Annotated[float, Field(gt=0)] = 1.0
    """Times the width: Soft Modularization Table 2 sets 600 units beside 400, reduced presets as
    much more than their own."""


class MTMHSAC(SAC):
    """Multi-task SAC with a head per task."""

    Config = MTMHSACConfig
    config: MTMHSACConfig
    PAPER: ClassVar[str] = "Yu et al. 2019, Meta-World (sizes: D2R Table 3)"
    VARIANTS: ClassVar[dict[str, dict[str, Any]]] = {
        "ars": ARS,
        "pcgrad": {"pcgrad": True},
        "no_balance": {"loss_weight": "none"},  # as Soft Modularization compares it (Sec. 5.7)
        "layers{depth}": {},
        "wide4": {"depth": 4, "widen": 1.5},  # Soft Modularization Table 2
        "wide5": {"depth": 5, "widen": 1.5},
        "match_mega": {"width": Match("mega@fixed3")},
        "match_mega16": {"width": Match("mega@fixed16")},
        "match_d2r": {"width": Match("d2r")},
    }

    def make_network(
        self, inputs: int, outputs: int, *, copies: int, layer_norm: bool
    ) -> nn.Module:
        """[s, (a,) onehot] -> trunk -> the task's head."""
        tasks, width = self.suite.num_tasks, round(self.config.width * self.config.widen)
        hidden = [width] * self.config.depth
        trunk = mlp(inputs, hidden, None, copies=copies, one_hot=tasks, layer_norm=layer_norm)
        head = TaskLinear(tasks, width, outputs, copies=copies, last=True)
        return nn.Sequential(trunk, head)
