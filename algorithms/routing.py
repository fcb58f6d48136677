"""The module-level routed network and ResRouting: D2R's actor and critics, MEGA's critic.

He et al. 2023, "Not All Tasks Are Equally Difficult: Multi-Task Deep Reinforcement Learning with
Dynamic Depth Routing", Sec. 3.1 and 3.2; where text and the authors' code part, the code, as
listed under Departures in `algorithms.d2r`.

Modules m_1 ... m_M stand in a row and may read any module before them; the output head, in
(M+1)-th place, reads any of them. A *destination* (m_2 ... m_M, then the head: M of them) picks K
of its *sources* (m_1 ... m_M), hence route arrays are (..., M, M): destination, source, lower
triangle. With F(s) the state encoder's output and H(task) the task encoder's:

    z   = G(F(s) * H(task))                              routing logits               (Eq. 4)
    d^i = the K largest of z^i, or K drawn without replacement from softmax(z^i / tau)
                                                         routing path          (Eq. 6, 7, 13)
    p^i = softmax of z^i over the sources in d^i         routing weights           (Eq. 5, 8)
    u^i = sum_j p_j^i m^j;   m^1 = y^1, m^i = y^i + u^i,   y^i = ReLU(u^i W_i + b_i)  (Eq. 11)
    output = head(u^{M+1})

ResRouting changes no value, only gradients (Eq. 10-12): a source whose softmax(z^i)_j is not above
1/i is *unsuitable* for destination i, and what reaches it from there passes round its own y^j to
its sources u^j.

On a CPU the network is evaluated by `algorithms.routing_cpu`; elsewhere by tensor operations, with
the rows of the batch in the last axis, where reductions over the 16 sources vectorise. A test holds
the two equal.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from algorithms.nn import Dense, Init, Layers, Linear, Scratch, compiled, draw, mlp
from algorithms.routing_cpu import run as run_on_cpu

NEVER = -1e30
"""Score of a connection that does not exist: below all others, yet finite."""

Choice = Literal["sample", "top_k"]
"""How a path is chosen: drawn at the task's route temperature, or the largest logits."""


class Route(NamedTuple):
    """The sources of each destination and their weights, rows of the batch last."""

    sources: Tensor  # (C, M, K, T, B) int64, zero-based; 0 where a destination has fewer than K
    weights: Tensor  # (C, M, K, T, B), exactly 0 where a destination has fewer than K sources

    def matrix(self) -> Tensor:
        """The weights as (C, T, B, M, M): destination, source; zero where not in the path."""
        dense = self.weights.new_zeros(self._shape())
        return dense.scatter_add_(2, self.sources, self.weights).permute(0, 3, 4, 1, 2)

    def path(self) -> Tensor:
        """The path d as booleans (C, T, B, M, M): destination, source."""
        dense = torch.zeros(self._shape(), dtype=torch.bool, device=self.sources.device)
        # A destination with fewer than K sources repeats source 0, which it has anyway.
        return dense.scatter_(2, self.sources, True).permute(0, 3, 4, 1, 2)

    def _shape(self) -> tuple[int, ...]:
        copies, modules, _, tasks, rows = self.sources.shape
        return copies, modules, modules, tasks, rows


def modules_used(edges: Tensor) -> Tensor:
    """How many modules (...) the head reaches, walking back along ``edges`` (..., M, M) bool.

    D2R Sec. 5.3: the modules that a state's path actually uses; the others are skipped.
    """
    modules = edges.shape[-1]
    reached = edges[..., modules - 1, :].clone()  # the head's sources
    for module in range(modules - 1, 0, -1):  # m_{module+1} is destination module-1
        reached |= reached[..., module, None] & edges[..., module - 1, :]
    return reached.sum(-1)


def path_bytes(modules: int) -> int:
    """Bytes that `pack_path` needs: one bit for each of the M(M+1)/2 possible connections."""
    return -(-modules * (modules + 1) // 16)


def pack_path(path: Tensor) -> Tensor:
    """Paths (..., M, M) bool as bits (..., path_bytes(M)) uint8, for the replay."""
    modules = path.shape[-1]
    row, column = torch.tril_indices(modules, modules, device=path.device)
    bits = path[..., row, column].to(torch.uint8)
    bits = nn.functional.pad(bits, (0, 8 * path_bytes(modules) - bits.shape[-1]))
    places = 2 ** torch.arange(8, dtype=torch.uint8, device=path.device)
    return (bits.view(*bits.shape[:-1], -1, 8) * places).sum(-1, dtype=torch.uint8)


def unpack_path(packed: Tensor, modules: int) -> Tensor:
    """Inverse of `pack_path`."""
    places = 2 ** torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed[..., None] & places).flatten(-2) != 0
    row, column = torch.tril_indices(modules, modules, device=packed.device)
    place = torch.full((modules * modules,), len(row), device=packed.device)
    place[row * modules + column] = torch.arange(len(row), device=packed.device)
    bits = nn.functional.pad(bits[..., : len(row)], (0, 1))  # a false bit for the other triangle
    return bits.index_select(-1, place).view(*bits.shape[:-1], modules, modules)


def route_temperature(log_alpha: Tensor, scale_by_tasks: bool = True) -> Tensor:
    """tau = (1 / alpha) / sum over tasks (1 / alpha), times T if asked for, shape (T,) (Eq. 14).

    Times the number of tasks (the authors' code) its mean over tasks is 1.
    """
    share = torch.softmax(-log_alpha.detach().flatten(), 0)
    return share * len(share) if scale_by_tasks else share


@torch.no_grad()
def balance_routes(
    temperatures: Iterable[Tensor], log_alpha: Tensor, scale_by_tasks: bool = True
) -> None:
    """Set the networks' route temperatures, each (C, T), from SAC's (Eq. 14)."""
    tau = route_temperature(log_alpha, scale_by_tasks)
    for temperature in temperatures:
        temperature.copy_(tau.expand_as(temperature))


class RoutedNetwork(nn.Module):
    """Encoders, router, M modules and output head, in C independent copies (D2R Fig. 3).

    With ``layer_norm`` every linear layer in front of a ReLU is followed by a LayerNorm, except
    in the router: both layers of the state encoder (the second also feeds the router) and each
    module. The reduced recipe needs it to keep Q values bounded, which the router does not touch.
    """

    UNTRACED = ("_noise",)
    """What `torch.compile` leaves alone: generators cannot be traced."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        tasks: int,
        *,
        copies: int = 1,
        width: int = 400,
        module_width: int = 128,
        router_width: int = 256,
        modules: int = 16,
        top_k: int | None = 2,
        rescale: bool = True,
        state_routing: bool = True,
        resrouting: bool = True,
        shortcut_masked: bool = False,
        threshold: Literal["above", "at_least"] = "above",
        layer_norm: bool = False,
    ) -> None:
        """Sizes as in D2R Table 7.

        ``top_k``: sources per destination, None for all of them (soft routing). ``rescale``:
        the weights sum to 1 over the path; otherwise they are the full softmax's.
        ``state_routing``: the router sees the state, not only the task. ``resrouting``: stop
        gradients as described above. ``shortcut_masked``: stop them in the shortcut u of m = y + u
        too (Eq. 11-12), not only on their way through W_i (the code). ``threshold``: a source is
        suitable above 1/i (the code), or at least there (Eq. 10).
        """
        super().__init__()
        self.modules_count, self.outputs = modules, outputs
        self.top_k = modules if top_k is None else min(top_k, modules)
        self.rescale, self.state_routing = rescale, state_routing
        self.resrouting, self.shortcut_masked = resrouting, shortcut_masked
        self.threshold = threshold

        self.state_encoder = encoder(inputs, width, copies=copies, layer_norm=layer_norm)
        self.task_encoder = TaskEncoder(tasks, width, copies=copies)
        self.router = mlp(width, [router_width] * 2, None, copies=copies)
        # D2R's Departures 1 and 2: M (M + 1) / 2 connections, the head's included, of one layer.
        self.logits = Linear(router_width, modules * (modules + 1) // 2, copies=copies)
        # Departure 3: the first module reads ReLU(F(s)).
        self.first = Layers(
            nn.ReLU(), *mlp(width, [module_width], None, copies=copies, layer_norm=layer_norm)
        )
        self.rest = ModuleStack(modules - 1, module_width, copies=copies, layer_norm=layer_norm)
        self.head = Linear(module_width, outputs, copies=copies, last=True)
        # tau of Eq. 13; a parameter, as in the published counts, that no gradient moves.
        self.temperature = nn.Parameter(torch.ones(copies, tasks), requires_grad=False)

        row, column = torch.tril_indices(modules, modules)
        self.register_buffer("_triangle", row * modules + column, persistent=False)
        order = torch.arange(modules, dtype=torch.float32).view(modules, 1)
        self.register_buffer("_order", order, persistent=False)
        bar = 1 / torch.arange(2, modules + 2, dtype=torch.float32)  # 1/i
        self.register_buffer("bar", bar, persistent=False)
        self._triangle: Tensor
        self._order: Tensor
        self.bar: Tensor
        self.scratch = Scratch()

    def forward(
        self, x: Tensor, route: Choice | Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Route]:
        """Outputs (C, T, B, outputs) at x (C or 1, T, B, inputs), and the route they took.

        ``route``: how to choose paths, or given paths (C or 1, T, B, M, M) bool with as many
        sources in each destination as `top_k` allows. ``generator`` serves "sample". ResRouting
        is active whenever gradients are recorded.
        """
        copies, tasks, rows = len(self.head.weight), x.shape[1], x.shape[2]
        noise = self._noise(x, route, generator)
        given = route if isinstance(route, Tensor) else None
        if compiled(x):
            output, sources, weights = run_on_cpu(self, x, given, noise)
        else:
            state = self.state_encoder(x)  # (C, T, B, width), F(s) before its ReLU
            task = self.task_encoder()  # (C, T, 1, width)
            hidden = self.router(state * task if self.state_routing else task.expand_as(state))
            sources, weights, suitable = self._route(hidden, given, noise)  # (C, M, K, T*B)
            first = self.first(state).flatten(1, 2)
            mixed = self.rest(first, sources, weights, suitable, self.shortcut_masked)
            output = self.head(mixed.view(copies, tasks, rows, -1))
        shape = (*sources.shape[:3], tasks, rows)
        return output, Route(sources.reshape(shape), weights.detach().reshape(shape))

    def _noise(
        self, x: Tensor, route: Choice | Tensor, generator: torch.Generator | None
    ) -> Tensor | None:
        """Gumbel noise (C, M(M+1)/2, T*B) where paths are drawn, otherwise None."""
        if isinstance(route, Tensor) or route == "top_k" or self.top_k == self.modules_count:
            return None
        copies, _, connections = self.logits.bias.shape
        shape = (copies, connections, x.shape[1] * x.shape[2])
        noise = torch.rand(shape, generator=generator, dtype=x.dtype, device=x.device)
        return noise.clamp_min_(1e-12).log_().neg_().log_()

    def score(self, z: Tensor, noise: Tensor | None) -> Tensor:
        """What sources are chosen by, a copy: logits z (C, M(M+1)/2, T*B), or samples of them.

        The K largest of z / tau + Gumbel noise are K draws without replacement from
        softmax(z / tau) (Kool et al. 2019).
        """
        if noise is None:
            return z.clone()
        tau = self.temperature[:, None, :, None]  # of each task's rows
        by_task = z.view(*z.shape[:2], tau.shape[2], -1) / tau
        return by_task.flatten(2).sub_(noise)

    def _route(
        self, hidden: Tensor, given: Tensor | None, noise: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Sources, weights, and whether each is suitable (None: not asked), all (C, M, K, T*B)."""
        # A linear layer, with its product transposed so that the rows come last at no cost.
        weight, bias = self.logits.weight, self.logits.bias
        logits = torch.baddbmm(bias.mT, weight.mT, hidden.flatten(1, 2).mT)
        z = self._triangular(logits, -torch.inf)  # (C, M, M, T*B)
        sources, valid = self._choose(self.score(logits.detach(), noise), z.detach(), given)
        weights = self._weights(z, sources, valid)
        if not (torch.is_grad_enabled() and self.resrouting):
            return sources, weights, None
        chance = torch.softmax(z.detach(), 2).gather(2, sources)
        bar = self.bar.view(-1, 1, 1)
        return sources, weights, chance > bar if self.threshold == "above" else chance >= bar

    def _triangular(self, values: Tensor, elsewhere: float) -> Tensor:
        """Values (C, M(M+1)/2, rows) of the connections as (C, M, M, rows)."""
        copies, modules, rows = len(values), self.modules_count, values.shape[-1]
        padded = values.new_full((copies, modules * modules, rows), elsewhere)
        return padded.index_copy_(1, self._triangle, values).view(copies, modules, modules, rows)

    def _choose(self, score: Tensor, z: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor]:
        """The path: sources (C, M, K, rows), and whether each exists."""
        copies, modules = z.shape[:2]
        order = self._order
        if self.top_k == modules:
            valid = z > -torch.inf
            return torch.where(valid, order.long(), 0), valid
        if given is not None:
            path = given.flatten(1, 2).permute(0, 2, 3, 1).to(z.dtype, copy=True)
            score = path.sub_(1).mul_(-NEVER).expand(copies, -1, -1, -1)
        else:
            score = self._triangular(score, NEVER)

        sources: list[Tensor] = []
        exists: list[Tensor] = []
        for rank in range(self.top_k):
            if rank:
                score = score.scatter(2, sources[-1], -torch.inf)
            best = score.amax(2, keepdim=True)
            exists.append(best > NEVER / 2)
            # The first of the best, in arithmetic, which is faster than comparisons: 0 + its
            # place for the best, at least M for others.
            distance = (best - score).sign_()
            place = distance.mul_(modules).add_(order).amin(2, keepdim=True)
            sources.append(place.long() * exists[-1])
        return torch.cat(sources, 2), torch.cat(exists, 2)

    def _weights(self, z: Tensor, sources: Tensor, valid: Tensor) -> Tensor:
        """p^i = MaskSoftmax(z^i, d^i) (Eq. 5), or softmax(z^i) at the sources without rescaling."""
        if self.rescale:
            chosen = z.gather(2, sources).masked_fill(~valid, -torch.inf)
            return torch.softmax(chosen, 2)
        return torch.softmax(z, 2).gather(2, sources).masked_fill(~valid, 0)


def encoder(inputs: int, width: int, *, copies: int, layer_norm: bool = False) -> Layers:
    """F(s): two layers, without the second's ReLU, because some of its readers want it so."""
    return Layers(*list(mlp(inputs, [width] * 2, None, copies=copies, layer_norm=layer_norm))[:-1])


class TaskEncoder(nn.Module):
    """H(task) = onehot(task) W + b: a learned vector for each task and one for all."""

    def __init__(self, tasks: int, outputs: int, *, copies: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(copies, tasks, 1, outputs))
        self.bias = nn.Parameter(torch.empty(copies, 1, 1, outputs))

    def forward(self) -> Tensor:
        """(C, T, 1, outputs)."""
        return self.weight + self.bias

    def initialise(self, scheme: Init, generator: torch.Generator) -> None:
        """Draw the parameters as those of a linear layer with T inputs."""
        _, tasks, _, outputs = self.weight.shape
        draw([self.weight], self.bias, tasks, outputs, False, scheme, generator)


class ModuleStack(nn.Module):
    """m^i = u^i + ReLU(u^i W_i + b_i) for i = 2 ... M, and the head's input u^{M+1} (Eq. 11).

    The modules run in a row, and between two of them little happens to many rows, so this is one
    autograd function with preallocated buffers and a backward pass by hand (`_Stack`).
    """

    def __init__(self, count: int, width: int, *, copies: int, layer_norm: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(copies, count, width, width))
        self.bias = nn.Parameter(torch.empty(copies, count, 1, width))
        self.scale = nn.Parameter(torch.ones(copies, count, 1, width)) if layer_norm else None
        self.shift = nn.Parameter(torch.zeros(copies, count, 1, width)) if layer_norm else None

    def forward(
        self,
        first: Tensor,
        sources: Tensor,
        weights: Tensor,
        suitable: Tensor | None,
        shortcut_masked: bool,
    ) -> Tensor:
        """The head's input (C, R, width) from m^1 (C, R, width) and a route (C, M, K, R).

        ``suitable`` (C, M, K, R): where gradients may reach a source's own module; None:
        everywhere. ``shortcut_masked``: whether that holds for the shortcut as well.
        """
        mixed: Tensor = _Stack.apply(  # type: ignore[no-untyped-call]
            first, weights, self.weight, self.bias, self.scale, self.shift, sources, suitable,
            shortcut_masked,
        )  # fmt: skip
        return mixed

    def initialise(self, scheme: Init, generator: torch.Generator) -> None:
        """Draw the parameters as those of linear layers, one per module."""
        width = self.weight.shape[-1]
        draw([self.weight], self.bias, width, width, False, scheme, generator)
        if self.scale is not None and self.shift is not None:
            with torch.no_grad():
                self.scale.fill_(1)
                self.shift.fill_(0)


class _Stack(torch.autograd.Function):
    """The modules after the first, with ResRouting's gradients.

    Below, N = C * R rows of all copies, d the module width. Destination i (zero-based) is module
    i + 1 (zero-based) or, at i = M - 1, the head. Forward, both paths that leave a source carry
    the same numbers, so one mixture u_i serves the module and its shortcut. Backward they differ:
    with a_i the gradient arriving at u_i through W_i and t_i that and the shortcut's together,

        d u_j += p_ij t_i                                 (j's own shortcut, never blocked)
        d y_j += p_ij t_i - blocked_ij p_ij a_i           (or - blocked_ij p_ij t_i if also masked)
        d p_ij = <t_i, m_j>

    which each destination pushes to its sources, last destination first.
    """

    @staticmethod
    def forward(
        ctx: Any,
        first: Tensor,
        weights: Tensor,
        weight: Tensor,
        bias: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        sources: Tensor,
        suitable: Tensor | None,
        shortcut_masked: bool,
    ) -> Tensor:
        copies, rows, width = first.shape
        modules, k = weights.shape[1:3]
        total = copies * rows
        picked = sources.permute(1, 0, 3, 2).reshape(modules, total, k).contiguous()
        share = weights.permute(1, 0, 3, 2).reshape(modules, total, k).contiguous()
        row = torch.arange(total, device=first.device)
        index = torch.add(row[:, None], picked, alpha=total).view(modules, total * k).unbind()
        factor = share.view(modules, total * k).unbind()
        bag = torch.arange(0, total * k, k, device=first.device)

        m = first.new_empty(modules, copies, rows, width)
        table, outputs = m.view(modules * total, width), m.unbind()
        outputs[0].copy_(first)
        u, y, normed = [], [], []
        for i, layer in enumerate(_layers(weight, bias, scale, shift)):
            mixed = _mix(table, index[i], bag, factor[i]).view(copies, rows, width)
            u.append(mixed)
            active, kept = layer.rectified(mixed)
            y.append(active)
            normed.append(kept)
            torch.add(mixed, y[i], out=outputs[i + 1])
        ctx.save_for_backward(m, picked, share, suitable, weight, bias, scale, shift)
        ctx.index, ctx.u, ctx.y, ctx.normed = index, u, y, normed
        ctx.shortcut_masked = shortcut_masked
        return _mix(table, index[-1], bag, factor[-1]).view(copies, rows, width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        m, picked, share, suitable, *parameters = ctx.saved_tensors
        layers = _layers(*parameters)
        modules, copies, rows, width = m.shape
        total, k = copies * rows, share.shape[-1]
        shape = (copies, rows, width)
        lanes = 1 if suitable is None else 2
        if suitable is not None:
            allowed = suitable.permute(1, 0, 3, 2).reshape(share.shape)
            block = share.masked_fill(allowed, 0)

        t = gradient.new_empty(modules, total, width)
        t[-1] = gradient.reshape(total, width)
        a = t[-1]
        # What destinations push to each source: d u_j, and what of it is blocked from y_j.
        pushed = gradient.new_zeros(modules * total, lanes, width)
        factor = share[..., None] if suitable is None else torch.stack([share, block], -1)
        learning = ctx.needs_input_grad[2]
        learned: list[list[Tensor | None]] = []
        for i in range(modules - 1, -1, -1):
            arriving = t[i, :, None]  # (N, lanes, d)
            if lanes == 2:
                arriving = torch.stack([t[i], t[i] if ctx.shortcut_masked else a], 1)
            push = factor[i, ..., None] * arriving[:, None]  # (N, K, lanes, d)
            pushed.index_add_(0, ctx.index[i], push.view(total * k, lanes, width))
            # Module i (zero-based) has now heard from all its destinations.
            g_u = pushed[i * total : (i + 1) * total, 0]
            g_y = g_u - pushed[i * total : (i + 1) * total, 1] if lanes == 2 else g_u
            g_y = g_y.reshape(shape)
            if i == 0:
                break
            g_y = torch.ops.aten.threshold_backward(g_y, ctx.y[i - 1], 0)
            a, of_layer = layers[i - 1].backward(g_y, ctx.u[i - 1], ctx.normed[i - 1], learning)
            learned.append(of_layer)
            a = a.view(total, width)
            torch.add(a, g_u, out=t[i - 1])

        by_row = t.transpose(0, 1)  # (N, M, d)
        per_source = torch.bmm(by_row, m.view(modules, total, width).permute(1, 2, 0))
        g_share = per_source.transpose(0, 1).gather(2, picked)  # (M, N, K)
        g_weights = g_share.view(modules, copies, rows, -1).permute(1, 0, 3, 2)
        g_layers = [
            torch.stack([cast(Tensor, of[n]) for of in reversed(learned)], 1).view_as(p)
            if learning and p is not None else None
            for n, p in enumerate(parameters)
        ]  # fmt: skip
        return g_y, g_weights, *g_layers, None, None, None


def _layers(
    weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None
) -> list[Dense]:
    """The layer of each module, from parameters (C, M - 1, ...)."""
    count = weight.shape[1]
    norms = [[None] * count if p is None else p.chunk(count, 1) for p in (scale, shift)]
    return [*map(Dense, weight.unbind(1), bias.unbind(1), *norms)]


def _mix(table: Tensor, index: Tensor, bag: Tensor, factor: Tensor) -> Tensor:
    """sum_k p_k m_{d_k} for each row (N, d), from the outputs (M * N, d) of all modules so far."""
    mixed: Tensor = torch.embedding_bag(table, index, bag, False, 0, False, factor)[0]
    return mixed
