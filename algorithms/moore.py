"""MOORE: a mixture of orthogonal experts, with an output head per task.

Hendawy et al. 2024, "Multi-Task Reinforcement Learning with Mixture of Orthogonal Experts".

Symbols: k experts h_1 .. h_k, three layers of 400 each; w_tau (k) the weights of task tau.

    V(s) = GramSchmidt(h_1(s), .., h_k(s))                        orthonormal rows      (Sec. 4)
    v_tau(s) = tanh(sum_i w_{tau,i} V_i(s));   output = head_tau(v_tau)

Orthonormality holds sample by sample, so the experts span what the tasks may use of a state. No
one-hot task id is fed in: the task chooses weights and head.

**Departures**
 1. Initialisation is the shared core's, not the authors' Xavier; w is drawn as a bias-free linear
    layer on a one-hot id.
 2. ``eps`` keeps the normalisation finite where two experts agree (the authors' code has none).
 3. Trained by the shared core, with its loss weights and mask, ``grad_clip`` 1 (the authors: none),
    log std down to -20 (theirs: -10), temperatures up to 1 (theirs: any), actor and critics in one
    step (theirs: the actor first, and only after 3,000 transitions per task).
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from algorithms.agent import Plan
from algorithms.kernels import mix_orthonormal, mix_orthonormal_backward
from algorithms.nn import Init, ModuleLinear, TaskLinear, compiled, draw, mlp
from algorithms.sac import SAC, SACConfig
from suites.base import SuiteSpec


class MOOREConfig(SACConfig):
    """Settings of MOORE."""

    width: Annotated[int, Field(ge=1)] = 400
    """Units of each of an expert's layers (MOORE App. A)."""
    depth: Annotated[int, Field(ge=1)] = 3
    """Layers of an expert, the last one linear (MOORE App. A)."""
    experts: Annotated[int, Field(ge=1)] | None = None
    """k; none: 4 up to ten tasks, 6 above (MOORE Sec. 5)."""
    orthogonal: bool = True
    """Whether experts are made orthonormal; otherwise a plain mixture (MOORE Sec. 5.4)."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the norms in Gram-Schmidt (Departure 2)."""

    @model_validator(mode="after")
    def _eps_is_used(self) -> Self:
        if not self.orthogonal:
            self._unused("eps", because="orthogonal is false")
        return self

    def for_run(self, suite: SuiteSpec, plan: Plan) -> Self:
        """With the number of experts decided."""
        experts = self.experts or (6 if suite.large else 4)
        return super().for_run(suite, plan).model_copy(update={"experts": experts})


class MOORE(SAC):
    """Mixture of orthogonal experts on multi-task SAC."""

    Config = MOOREConfig
    config: MOOREConfig
    PAPER: ClassVar[str] = "Hendawy et al. 2024, MOORE: mixture of orthogonal experts"
    VARIANTS: ClassVar[dict[str, dict[str, Any]]] = {
        "experts{experts}": {},
        "not_orthogonal": {"orthogonal": False},
    }

    actor: OrthogonalMixture

    def make_network(
        self, inputs: int, outputs: int, *, copies: int, layer_norm: bool
    ) -> nn.Module:
        """Orthogonal experts and heads."""
        config = self.config
        assert config.experts is not None
        return OrthogonalMixture(
            inputs, config.width, config.depth, outputs, self.suite.num_tasks, config.experts,
            copies=copies, orthogonal=config.orthogonal, eps=config.eps, layer_norm=layer_norm,
        )  # fmt: skip

    @torch.no_grad()
    def probe(self) -> dict[str, np.ndarray]:
        """``expert_weights`` (T, k), the actor's w."""
        return {"expert_weights": self.actor.task_weights[0].cpu().numpy().copy()}

    def trace(self, obs: np.ndarray) -> dict[str, np.ndarray]:
        """The same weights for every state."""
        return self.probe()


class OrthogonalMixture(nn.Module):
    """Experts, Gram-Schmidt, mixture and heads, in C independent copies."""

    def __init__(
        self,
        inputs: int,
        width: int,
        depth: int,
        outputs: int,
        tasks: int,
        experts: int,
        *,
        copies: int = 1,
        orthogonal: bool = True,
        eps: float = 1e-8,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.orthogonal, self.eps = orthogonal, eps
        trunk = [width] * (depth - 1)
        self.experts = mlp(
            inputs, trunk, None, copies=copies, modules=experts, layer_norm=layer_norm
        )
        self.experts.append(ModuleLinear(experts, width if trunk else inputs, width, copies=copies))
        self.task_weights = nn.Parameter(torch.empty(copies, tasks, experts))
        self.head = TaskLinear(tasks, width, outputs, copies=copies, last=True)

    def initialise(self, scheme: Init, generator: torch.Generator) -> None:
        """Draw w (Departure 1); the layers draw their own parameters."""
        _, tasks, experts = self.task_weights.shape
        nothing = torch.empty(0)
        draw([self.task_weights], nothing, tasks, experts, False, scheme, generator)

    def forward(self, x: Tensor) -> Tensor:
        """(C or 1, T, B, inputs) -> (C, T, B, outputs)."""
        h = self.experts(x[:, None])  # (C, k, T, B, W)
        if self.orthogonal and compiled(h):
            mixed: Tensor = _OrthonormalMixture.apply(  # type: ignore[no-untyped-call]
                h, self.task_weights, self.eps
            )
        else:
            v = gram_schmidt(h, self.eps) if self.orthogonal else h
            mixed = torch.einsum("ctk,cktbw->ctbw", self.task_weights, v)
        output: Tensor = self.head(mixed.tanh())
        return output


def gram_schmidt(vectors: Tensor, eps: float) -> Tensor:
    """Orthonormal vectors (C, k, T, B, W) that span what the k given ones do, sample by sample."""
    found: list[Tensor] = []
    for h in vectors.unbind(1):
        if found:
            before = torch.stack(found, 1)  # (C, i, T, B, W)
            shadow = (before * h[:, None]).sum(-1, keepdim=True)  # <V_j, h>
            h = h - (shadow * before).sum(1)
        found.append(h / (h.norm(dim=-1, keepdim=True) + eps))
    return torch.stack(found, 1)


class _OrthonormalMixture(torch.autograd.Function):
    """sum_i w_i V_i of experts (C, k, T, B, W), V by `gram_schmidt`, in one compiled pass."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weights: Tensor, eps: float) -> Tensor:
        rows = h.contiguous().flatten(2, 3)  # (C, k, T B, W)
        v, norms = torch.empty_like(rows), rows.new_empty(rows.shape[:3])
        mixed = rows.new_empty(len(rows), *rows.shape[2:])
        mix_orthonormal(
            rows.numpy(), weights.detach().numpy(), eps, v.numpy(), norms.numpy(), mixed.numpy()
        )
        ctx.save_for_backward(rows, weights, v, norms)
        ctx.eps = eps
        return mixed.view(len(h), *h.shape[2:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights, v, norms = ctx.saved_tensors
        of_h, of_weights = torch.empty_like(rows), torch.zeros_like(weights)
        mix_orthonormal_backward(
            gradient.contiguous().flatten(1, 2).numpy(), rows.numpy(), weights.detach().numpy(),
            ctx.eps, v.numpy(), norms.numpy(), of_h.numpy(), of_weights.numpy(),
        )  # fmt: skip
        shape = (*rows.shape[:2], *gradient.shape[1:])
        return of_h.view(shape), of_weights, None
