"""Soft Modularization: layers of modules, wired softly by a routing network.

Yang et al. 2020, "Multi-Task Reinforcement Learning with Soft Modularization", Sec. 4; sizes of
D2R Table 5 (deep: 4 layers of 4 modules of 128; `shallow`: 2 of 2 of 256).

Symbols: L layers of n modules of width d; f the state's encoding, h the task's, both of width D
and before their ReLU; P^l (n x n) the weights with which layer l + 1 reads layer l, destination
by source; q (n) those of the output.

    g   = G(ReLU(f * h)),  G two linear layers                        routing features      (code)
    P^1 = softmax(W_1 ReLU(g))                                        rows sum to 1    (Eq. 6, 7)
    P^l = softmax(W_l ReLU(g * U_l [P^1 .. P^{l-1}]))                                  (Eq. 5, 7)
    q   = softmax(W_L ReLU(g * U_L [P^1 .. P^{L-1}]))                                       (code)
    o^1_j = V^1_j ReLU(f);   o^{l+1}_i = V^{l+1}_i ReLU(sum_j P^l_ij o^l_j)                 (Eq. 8)
    output = V ReLU(sum_j q_j o^L_j)                                                        (Eq. 9)

The one-hot task id enters h alone. Actor and critics have a routing network each.

**Departures**: the authors' code is the default; ``reading=paper`` is the print, which differs in
 1. the routing features: f * h itself, not G of it;
 2. P^{l+1} from P^l alone, before its softmax (Eq. 5), not from all before it;
 3. the ReLU of a module's output, before the weighted sum (Eq. 8), not after it;
 4. the output, the sum of the last layer's modules (Eq. 9), without weights q and a common layer;
 5. the first modules' input, f, not ReLU(f).

Ours, in either: temperatures step with the networks; the code steps them first.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from algorithms.kernels import (
    divide_by_sum,
    gate,
    gate_backward,
    less_row_maximum,
    softmax_backward,
)
from algorithms.nn import LayerNorm, Linear, ModuleLinear, blended, compiled
from algorithms.routing import TaskEncoder, encoder
from algorithms.sac import SAC, SACConfig

SHALLOW: dict[str, Any] = {"layers": 2, "modules": 2, "widen": 2.0}
"""Soft Modularization Sec. 5.2: modules of 256."""


class SoftModuleConfig(SACConfig):
    """Settings of Soft Module."""

    width: Annotated[int, Field(ge=1)] = 400
    """D: units of the state encoder's two layers and of the task's encoding (D2R Table 5)."""
    layers: Annotated[int, Field(ge=2)] = 4
    """L (Soft Modularization Sec. 5.2: deep)."""
    modules: Annotated[int, Field(ge=1)] = 4
    """n, modules in a layer (Soft Modularization Sec. 5.2)."""
    module_width: Annotated[int, Field(ge=1)] = 128
    """d, outputs of a module (Soft Modularization Sec. 5.2)."""
    widen: Annotated[float, Field(gt=0)] = 1.0
    """Times the module width, for variants that a preset scales like the others."""
    router_width: Annotated[int, Field(ge=1)] = 256
    """Units of G's two layers (the code; D2R Table 5 prints four, its count needs two). The paper's
    reading has no G."""
    state_routing: bool = True
    """Whether routing sees the state, or h alone (Soft Modularization Sec. 5.7)."""
    reading: Literal["code", "paper"] = "code"
    """The authors' code, or the paper's equations as printed (Departures 1 to 5)."""


class SoftModule(SAC):
    """Soft Modularization."""

    Config = SoftModuleConfig
    config: SoftModuleConfig
    PAPER: ClassVar[str] = "Yang et al. 2020, Soft Modularization (sizes: D2R Table 5)"
    VARIANTS: ClassVar[dict[str, dict[str, Any]]] = {
        "shallow": SHALLOW,
        "paper": {"reading": "paper", "loss_weight": "alpha", "alpha_max": None,
                  "extreme_loss": None},
        "no_balance": {"loss_weight": "none"},
        "no_state_routing": {"state_routing": False},
        # As the paper ablates them, in its shallow network, balance first (Sec. 5.7, Fig. 6 c).
        "shallow_no_balance": SHALLOW | {"loss_weight": "none"},
        "shallow_no_balance_no_state": SHALLOW | {"loss_weight": "none", "state_routing": False},
        "authors": {"warmup_steps": 4000, "alpha_lr": 3e-4, "alpha_max": None,
                    "extreme_loss": None, "reward_scale": 1.0},
    }  # fmt: skip

    actor: SoftModuleNetwork

    def make_network(
        self, inputs: int, outputs: int, *, copies: int, layer_norm: bool
    ) -> nn.Module:
        """Base network and routing network."""
        c = self.config
        return SoftModuleNetwork(
            inputs, outputs, self.suite.num_tasks,
            copies=copies, width=c.width, layers=c.layers, modules=c.modules,
            module_width=round(c.module_width * c.widen), router_width=c.router_width,
            state_routing=c.state_routing, reading=c.reading, layer_norm=layer_norm,
        )  # fmt: skip

    @torch.no_grad()
    def trace(self, obs: np.ndarray) -> dict[str, np.ndarray]:
        """``soft_routes`` (T, P, L - 1, n, n): P^1 .. P^{L-1}, destination by source."""
        x = torch.from_numpy(obs).to(self.device)[None]
        weights, _ = self.actor.route(self.actor.state_encoder(x))
        return {"soft_routes": torch.stack([w[0] for w in weights], 2).cpu().numpy()}


class SoftModuleNetwork(nn.Module):
    """Base network and routing network (Fig. 2), in C independent copies."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        tasks: int,
        *,
        copies: int = 1,
        width: int = 400,
        layers: int = 4,
        modules: int = 4,
        module_width: int = 128,
        router_width: int = 256,
        state_routing: bool = True,
        reading: Literal["code", "paper"] = "code",
        layer_norm: bool = False,
    ) -> None:
        """``layer_norm``: one before each ReLU of state encoder and modules, not of the router."""
        super().__init__()
        self.modules_count, self.state_routing, self.reading = modules, state_routing, reading
        code = reading == "code"

        self.state_encoder = encoder(inputs, width, copies=copies, layer_norm=layer_norm)
        self.task_encoder = TaskEncoder(tasks, width, copies=copies)

        routing = router_width if code else width
        self.features = encoder(width, routing, copies=copies) if code else nn.Identity()
        square = modules**2
        self.logits = nn.ModuleList(
            Linear(routing, square, copies=copies, last=True) for _ in range(layers - 1)
        )
        self.conditions = nn.ModuleList(
            Linear(square * (layer if code else 1), routing, copies=copies)
            for layer in range(1, layers - 1)
        )
        self.stack = nn.ModuleList()
        for layer in range(layers):
            last = layer == layers - 1 and not code
            self.stack.append(
                ModuleLinear(
                    modules, module_width if layer else width, outputs if last else module_width,
                    copies=copies, last=last,
                )
            )  # fmt: skip
        normed = [module_width] * (layers if code else layers - 1)
        self.norms = nn.ModuleList(
            LayerNorm(units, copies=copies, modules=1 if n == layers - 1 else modules)
            for n, units in enumerate(normed if layer_norm else [])
        )
        if code:
            self.output_condition = Linear(square * (layers - 1), routing, copies=copies)
            self.output_logits = Linear(routing, modules, copies=copies, last=True)
            self.head = Linear(module_width, outputs, copies=copies, last=True)

    def route(self, state: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """P^1 .. P^{L-1}, each (C, T, B, n, n), and q (C, T, B, n) of the code's output."""
        task = self.task_encoder()  # (C, T, 1, D)
        joint = state * task if self.state_routing else task.expand_as(state)
        features = self.features(joint.relu()) if self.reading == "code" else joint  # Departure 1
        n = self.modules_count
        logits = [self.logits[0](features.relu())]  # (C, T, B, n n)
        weights = [_rows(logits[0], n)]
        for condition, layer in zip(self.conditions, self.logits[1:], strict=True):
            code = self.reading == "code"  # Departure 2
            before = torch.cat([w.flatten(-2) for w in weights], -1) if code else logits[-1]
            logits.append(layer(gated(features, cast(Linear, condition), before)))
            weights.append(_rows(logits[-1], n))
        if self.reading == "paper":
            return weights, None
        before = torch.cat([w.flatten(-2) for w in weights], -1)
        output = self.output_logits(gated(features, self.output_condition, before))
        return weights, short_softmax(output)

    def forward(self, x: Tensor) -> Tensor:
        """(C or 1, T, B, inputs) -> (C, T, B, outputs)."""
        state = self.state_encoder(x)
        weights, q = self.route(state)
        if q is None:
            return self._as_printed(state, weights)
        normed = len(self.norms) > 0
        # What each module of a layer reads, (C, 1 or n, T, B, ...); of the first, Departure 5.
        x = state.relu()[:, None]
        for layer, p in enumerate([*weights, q[..., None, :]]):  # q: Departure 4
            module = cast(ModuleLinear, self.stack[layer])
            x = blended(p, module.product(x), module.bias, rectify=not normed)  # Departure 3
            if normed:
                x = self.norms[layer](x).relu()
        output: Tensor = self.head(x[:, 0])
        return output

    def _as_printed(self, state: Tensor, weights: list[Tensor]) -> Tensor:
        """Eq. 8 and 9."""
        o: Tensor = self.stack[0](state[:, None])  # (C, n, T, B, d)
        for layer, (module, p) in enumerate(zip(self.stack[1:], weights, strict=True)):
            if len(self.norms):
                o = self.norms[layer](o)
            o = module(blended(p, o.relu()))
        return o.sum(1)


def gated(features: Tensor, linear: Linear, x: Tensor) -> Tensor:
    """ReLU(f * linear(x)): (C, T, B, d) and (C, T, B, inputs) -> (C, T, B, d)."""
    if not compiled(x):
        plain: Tensor = (features * linear(x)).relu_()
        return plain
    product = torch.bmm(x.flatten(1, 2), linear.weight)
    rows: Tensor = _Gated.apply(features.flatten(1, 2), product, linear.bias)  # type: ignore[no-untyped-call]
    return rows.view_as(features)


class _Gated(torch.autograd.Function):
    """ReLU(f (product + b)) of rows (C, R, d) in one compiled pass; ``product`` is used up."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, product: Tensor, bias: Tensor) -> Tensor:
        f, out = features.contiguous(), torch.empty_like(product)
        gate(*(t.detach().flatten(0, 1).numpy() for t in (product, bias, f, out)))
        ctx.save_for_backward(product, f)
        ctx.groups = len(bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        pre, f = ctx.saved_tensors
        of_pre, of_f = torch.empty_like(pre), torch.empty_like(f)
        g_bias = pre.new_zeros(ctx.groups, 1, pre.shape[-1])
        arrays = (gradient.contiguous(), pre, f, of_pre, of_f, g_bias)
        gate_backward(*(t.flatten(0, 1).numpy() for t in arrays))
        return of_f, of_pre, g_bias


def short_softmax(z: Tensor) -> Tensor:
    """Softmax over the last axis, for one of a few entries."""
    if not compiled(z):
        return torch.softmax(z, -1)
    p: Tensor = _ShortSoftmax.apply(z)  # type: ignore[no-untyped-call]
    return p


class _ShortSoftmax(torch.autograd.Function):
    """`short_softmax`, compiled but for the exponential."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        z, p = z.contiguous(), torch.empty(z.shape, dtype=z.dtype)
        less_row_maximum(z.flatten(0, -2).numpy(), p.flatten(0, -2).numpy())
        p.exp_()
        divide_by_sum(p.flatten(0, -2).numpy())
        ctx.save_for_backward(p)
        return p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (p,) = ctx.saved_tensors
        of_z = torch.empty_like(p)
        softmax_backward(*(t.flatten(0, -2).numpy() for t in (gradient.contiguous(), p, of_z)))
        return of_z


def _rows(logits: Tensor, modules: int) -> Tensor:
    """Eq. 7: (..., n n) -> (..., n, n), each row a softmax over its sources."""
    return short_softmax(logits.view(*logits.shape[:-1], modules, modules))
