"""Single-task SAC: an agent of its own for every task, all of them computed as one.

Haarnoja et al. 2018, as compared in Soft Modularization Sec. 5.6. Each task has its own actor, twin
critics and temperature and learns from its own transitions alone, so a run on T tasks is T runs of
SAC; they share nothing but the products in which they are computed.

    pi_t, Q_t : [s, (a)] -> 400 -> 400 -> 400 -> output, for every task t

What couples tasks in the shared core is off: losses are summed, not weighted, and no task is masked
(``loss_weight`` and ``extreme_loss`` have no effect); gradients are clipped agent by agent.

**Departures**
 1. ``reward_balance``, of the reduced presets' recipe, stays as for every algorithm: it scales a
    task's rewards by the largest task's mean, and so is all that one agent knows of another.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from algorithms.nn import mlp
from algorithms.sac import SAC, SACConfig


class SingleTaskSACConfig(SACConfig):
    """Settings of single-task SAC."""

    width: Annotated[int, Field(ge=1)] = 400
    """Units of each hidden layer (Soft Modularization's code)."""
    depth: Annotated[int, Field(ge=1)] = 3
    """Hidden layers (Soft Modularization's code)."""

    @model_validator(mode="after")
    def _tasks_stay_apart(self) -> Self:
        because = "every task has an agent of its own"
        if self.loss_weight != "none":
            self._unused("loss_weight", because=because)
        if self.extreme_loss is not None:
            self._unused("extreme_loss", because=because)
        self._unused("extreme_loss_weighted", because=because)
        return self


class SingleTaskSAC(SAC):
    """T independent SAC agents in one."""

    Config = SingleTaskSACConfig
    config: SingleTaskSACConfig
    PAPER: ClassVar[str] = "Haarnoja et al. 2018, SAC; one agent per task"

    INDEPENDENT_AXES = 2  # clipping: a norm for each copy and task

    def make_network(
        self, inputs: int, outputs: int, *, copies: int, layer_norm: bool
    ) -> nn.Module:
        """A network per task."""
        hidden = [self.config.width] * self.config.depth
        return mlp(
            inputs, hidden, outputs,
            copies=copies, modules=self.suite.num_tasks, layer_norm=layer_norm,
        )  # fmt: skip

    def task_weights(
        self, loss: Tensor, alpha_loss: Tensor, log_alpha: Tensor
    ) -> tuple[Tensor, Tensor]:
        """T for each task, which makes the mean over tasks a sum."""
        total = loss + alpha_loss
        # A loss that is not a number must surface as such, as in the shared core.
        every = torch.where(total.isfinite(), len(total), total)
        return every, every
