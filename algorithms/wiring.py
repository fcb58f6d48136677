"""The network that genotypes wire: MEGA's actor, and its critics where a genotype wires them too.

MEGA Sec. 4.1 and 4.2 (arXiv 2502.13569); symbols and Departures are those of `algorithms.mega`.
From genotypes to the weights of their modules, as rows of one array (`Decoder`, `Wiring`); the
network that evaluates tasks of different depth (Eq. 3 and 4, `GenotypeNetwork`), its gradients by
hand; and decimals that learn, an open question about the paper (`Relaxation`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from algorithms.genetic import (
    Community,
    Genotype,
    Weighting,
    decode,
    encode,
    modules_reached,
    stage_of,
    weight_matrix,
)
from algorithms.nn import Dense, Init, LayerNorm, Linear, Normed, Scratch, TaskLinear, draw, mlp


class Wiring(NamedTuple):
    """Which modules run for which tasks, and what they read."""

    weights: Tensor
    """(T, G, L, L) for G = 1, or the B rows of each task. Of a task of depth D, row k - 1 weights
    m_0, m_1, .. (the columns) for M_k, and row D for the head: the last level (Departure 1)."""
    depth: tuple[int, ...]
    """(T,) modules of each task, largest first: the order of tasks inside the network."""
    order: Tensor | None
    """(T,) which task stands there; None: all in their own place."""
    place: Tensor | None
    """(T,) where each task stands; None: all in their own place."""
    idle: frozenset[int]
    """Modules that no head is connected with."""

    def reach(self, module: int) -> int:
        """How many tasks, from the first on, run M_module."""
        return sum(depth >= module for depth in self.depth)

    def blocks(self) -> Iterator[tuple[int, int, int]]:
        """Runs of tasks of one depth: first, past the last, depth."""
        start = 0
        for stop in range(1, len(self.depth) + 1):
            if stop == len(self.depth) or self.depth[stop] != self.depth[start]:
                yield start, stop, self.depth[start]
                start = stop


HELD_WEIGHTS = 2**24
"""Decoded weights that are held at most, 64 MB; a run's genotypes may be many more."""


class Decoder:
    """Genotypes by number to wirings; what is asked for again is not decoded again."""

    def __init__(
        self, community: Community, function: Weighting, offset: float, device: torch.device
    ) -> None:
        self.community, self.function, self.offset = community, function, offset
        self.device = device
        self.clear()

    def clear(self) -> None:
        """Forget all: the community's numbers mean other genotypes now."""
        self._place: dict[int, int] = {}  # a genotype's row in the arrays
        self._depth = np.zeros(0, dtype=np.int64)
        self._weights = np.zeros((0, 1, 1), dtype=np.float32)  # laid out as in `Wiring`
        self._needed = np.zeros((0, 1), dtype=bool)  # column k: is M_k connected with the head?

    def matrix(self, bits: NDArray[np.uint8]) -> NDArray[np.float64]:
        """The weights of a genotype, (N + 1, N + 1), the head's last."""
        settings = self.community.settings
        return weight_matrix(bits, settings.precision, self.function, self.offset)

    def __call__(self, numbers: NDArray[np.integer[Any]]) -> Wiring:
        """The wiring of genotypes (T, G)."""
        wanted = numbers.ravel().tolist()
        new = set(wanted) - self._place.keys()
        if new and self._weights.size > HELD_WEIGHTS:
            self.clear()
            new = set(wanted)
        for number in sorted(new):
            self._decode(number)
        places: NDArray[np.integer[Any]] = np.array(
            [self._place[number] for number in wanted]
        ).reshape(numbers.shape)
        depths = self._depth[places]  # (T, G)
        depth = depths.max(1)
        order = np.argsort(-depth, kind="stable")
        places, depths, depth = places[order], depths[order], depth[order]
        levels = int(depth[0]) + 1
        weights = self._weights[places][..., :levels, :levels]  # a copy
        needed = self._needed[places].any((0, 1))
        if (depths != depth[:, None]).any():  # shorter genotypes: their heads become the last level
            task, row = np.ogrid[: places.shape[0], : places.shape[1]]
            heads = weights[task, row, depths]
            weights[task, row, depths] = 0.0
            weights[task, row, depth[:, None]] = heads
        moved = bool((order != np.arange(len(order))).any())
        return Wiring(
            weights=self._sent(np.ascontiguousarray(weights)),
            depth=tuple(depth.tolist()),
            order=self._sent(order) if moved else None,
            place=self._sent(np.argsort(order)) if moved else None,
            idle=frozenset(k for k in range(1, levels) if not needed[k]),
        )

    def _sent(self, array: NDArray[Any]) -> Tensor:
        """On the device, without waiting for what that is doing."""
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def _decode(self, number: int) -> None:
        weights = self.matrix(self.community.table[number]).astype(np.float32)
        reached = modules_reached(weights, 0.0)
        depth = int(np.flatnonzero(reached).max(initial=-1)) + 1
        weights[:-1][~reached] = 0.0
        weights[depth] = weights[-1]  # what lies between is connected with nothing
        place = self._place[number] = len(self._place)
        self._make_room(place + 1, len(weights))
        levels = depth + 1
        self._weights[place, :levels, :levels] = weights[:levels, :levels]
        self._needed[place, 1:levels] = reached[:depth]
        self._depth[place] = depth

    def _make_room(self, count: int, levels: int) -> None:
        held, size = self._weights.shape[:2]
        more = max(count, 2 * held) - held if count > held else 0
        wider = max(levels - size, 0)
        if more or wider:
            self._weights = np.pad(self._weights, ((0, more), (0, wider), (0, wider)))
            self._needed = np.pad(self._needed, ((0, more), (0, wider)))
            self._depth = np.pad(self._depth, (0, more))


class Relaxation:
    """Real decimals of all living genotypes, trained beside the networks (Departure 8).

    A genotype's decimals d in [0, 2^p - 1] start from its bits; the actor's loss moves them through
    the weights of Eq. 7-9 whenever an update draws the genotype. Acting, evaluation and targets use
    them as they are. When a generation ends they are rounded to bits, on which the genetic
    algorithm goes on, and all start anew; so it is where a stage increases at once. A connection
    whose weight is exactly 0 is not there (Departure 7) and gets no gradient. An episode under way
    whose genotype was replaced ends with that genotype's bits.
    """

    def __init__(self, decoder: Decoder, lr: float) -> None:
        self.decoder, self.community = decoder, decoder.community
        self.precision = self.community.settings.precision
        self._optimizer = torch.optim.Adam([torch.zeros(0)], lr=lr)
        self._decimals: dict[Genotype, Tensor] = {}
        for task in range(len(self.community.stage)):
            self.renew(task)

    def renew(self, task: int) -> None:
        """Start a task's decimals from the bits of its genotypes."""
        fresh = {
            genotype: torch.tensor(
                np.concatenate(decode(genotype.bits, self.precision)).astype(np.float32),
                device=self.decoder.device, requires_grad=True,
            )
            for genotype in self.community.population(task)
        }  # fmt: skip
        self._decimals |= fresh
        self._list()

    def restart(self) -> None:
        """Begin the optimiser anew; genotypes, whatever their order now, keep their decimals."""
        self._optimizer.state.clear()
        self._list()

    def _list(self) -> None:
        """Keep what belongs to living genotypes, in their order."""
        tasks = range(len(self.community.stage))
        living = [genotype for task in tasks for genotype in self.community.population(task)]
        self._decimals = {g: self._decimals[g] for g in living if g in self._decimals}
        listed = list(self._decimals.values())
        self._optimizer.param_groups[0]["params"] = listed
        for tensor in self._optimizer.state.keys() - set(listed):
            del self._optimizer.state[tensor]

    @torch.enable_grad()
    def __call__(self, genotypes: list[list[Genotype]], wiring: Wiring) -> Wiring:
        """The wiring of genotypes [T][G], given that of their bits, with the decimals' weights."""
        weights = wiring.weights
        order = range(len(genotypes)) if wiring.order is None else wiring.order.tolist()
        values, places = [], []
        relaxed = torch.zeros(weights.shape[:2], dtype=torch.bool)
        for place, task in enumerate(order):
            for group, genotype in enumerate(genotypes[task]):
                decimals = self._decimals.get(genotype)
                if decimals is None:
                    continue
                stage, depth = stage_of(len(genotype.bits), self.precision), wiring.depth[place]
                rows, columns = np.tril_indices(stage + 1)
                head = rows == stage
                rows[head] = depth  # as in `Wiring`, which leaves out what no head is reached by
                there = np.where(head, columns <= depth, rows < depth)
                relaxed[place, group] = True
                values.append(decimals[torch.from_numpy(np.flatnonzero(there)).to(weights.device)])
                cell = np.int64(place), np.int64(group), rows[there], columns[there]
                places.append(np.ravel_multi_index(cell, weights.shape))
        if not values:
            return wiring
        table = torch.zeros(weights.numel(), dtype=torch.float64, device=weights.device)
        index = torch.from_numpy(np.concatenate(places)).to(weights.device)
        table = table.index_copy(0, index, torch.cat(values).double()).view_as(weights)
        new = self._normalised(table, weights > 0).to(weights.dtype)
        mask = relaxed[..., None, None].to(weights.device)
        return wiring._replace(weights=torch.where(mask, new, weights))

    def _normalised(self, decimals: Tensor, present: Tensor) -> Tensor:
        """HalfSoftmax (Eq. 7-9) or Softmax along the last axis, over what is present; else zero."""
        largest = decimals.detach().amax(-1, keepdim=True)
        if self.decoder.function == "softmax":
            scaled = (decimals - largest).exp()
        else:
            # e^d - offset as (e^d - 1) + (1 - offset), divided by e^max: see `algorithms.genetic`.
            offset = self.decoder.offset
            scaled = -(decimals - largest).exp() * torch.expm1(-decimals)
            scaled = scaled + (1 - offset) * torch.exp(-largest)
            if offset == 1:
                scaled = torch.where(largest == 0, 1.0, scaled)
        scaled = scaled * present
        total = scaled.sum(-1, keepdim=True)
        return scaled / torch.where(total == 0, 1.0, total)

    @torch.no_grad()
    def step(self) -> None:
        """Learn from the gradients of the last backward pass."""
        self._optimizer.step()
        self._optimizer.zero_grad()
        for tensor in self._optimizer.param_groups[0]["params"]:
            tensor.clamp_(0, 2**self.precision - 1)

    def rounded(self, genotype: Genotype) -> NDArray[np.uint8]:
        """The bits (L,) nearest to a genotype's decimals; its own if it lives no more."""
        if genotype not in self._decimals:
            return genotype.bits
        decimals = self._decimals[genotype].detach().cpu().numpy()
        return encode(np.rint(decimals).astype(np.int64), self.precision)

    def state_dict(self) -> dict[str, Any]:
        """Decimals and their optimiser's state."""
        return {
            "decimals": [tensor.detach() for tensor in self._decimals.values()],
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`, after the community's."""
        for task in range(len(self.community.stage)):
            self.renew(task)
        with torch.no_grad():
            for tensor, values in zip(self._decimals.values(), state["decimals"], strict=True):
                tensor.copy_(values)
        self._optimizer.load_state_dict(state["optimizer"])


class GenotypeModule(nn.Module):
    """M_i: W -> module width -> W, ReLU after both (Sec. 4.1, Table 2)."""

    def __init__(self, width: int, module_width: int, *, copies: int, layer_norm: bool) -> None:
        super().__init__()
        self.inner = Linear(width, module_width, copies=copies)
        self.outer = Linear(module_width, width, copies=copies)
        self.inner_norm = LayerNorm(module_width, copies=copies) if layer_norm else None
        self.outer_norm = LayerNorm(width, copies=copies) if layer_norm else None


class TaskEmbedding(nn.Module):
    """A learned vector of each task."""

    def __init__(self, tasks: int, width: int, *, copies: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(copies, tasks, 1, width))

    def initialise(self, scheme: Init, generator: torch.Generator) -> None:
        """Draw the parameters as those of a linear layer with T inputs and no bias."""
        _, tasks, _, width = self.weight.shape
        draw([self.weight], torch.empty(0), tasks, width, False, scheme, generator)


class GenotypeNetwork(nn.Module):
    """Eq. 3 and 4 and the head, for tasks whose genotypes differ in weights and depth.

    Tasks stand in order of depth, so that M_k runs once, on the slice of tasks that reach it: the
    time of a task is that of its own modules. Modules are evaluated by `_Stack`.
    """

    UNTRACED = ("_wired",)
    """What `torch.compile` leaves alone: wirings differ, and each would be compiled anew."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        modules: int,
        *,
        tasks: int,
        copies: int = 1,
        width: int = 400,
        module_width: int = 128,
        residual: bool = False,
        task_identity: Literal["genotype", "embedding", "head"] = "genotype",
        layer_norm: bool = False,
    ) -> None:
        """Sizes as in MEGA Table 2. ``layer_norm``: a LayerNorm before every ReLU."""
        super().__init__()
        self.width, self.module_width, self.residual = width, module_width, residual
        self.copies, self.layer_norm = copies, layer_norm
        self.embedding = mlp(inputs, [width, width], None, copies=copies, layer_norm=layer_norm)
        self.task_embedding = (
            TaskEmbedding(tasks, width, copies=copies) if task_identity == "embedding" else None
        )
        self.stack = nn.ModuleList()
        for _ in range(modules):
            self.append()
        self.head: nn.Module = (
            TaskLinear(tasks, width, outputs, copies=copies, last=True)
            if task_identity == "head"
            else Linear(width, outputs, copies=copies, last=True)
        )
        self._scratch = Scratch()

    def append(self) -> nn.Module:
        """Add the next module, its parameters not yet drawn, and return it."""
        module = GenotypeModule(
            self.width, self.module_width, copies=self.copies, layer_norm=self.layer_norm
        )
        self.stack.append(module)
        self._scratch = Scratch()  # buffers of the old size will not be asked for again
        return module

    def forward(self, x: Tensor, wiring: Wiring) -> Tensor:
        """Outputs (C, T, B, outputs) at x (C or 1, T, B, inputs)."""
        if wiring.order is not None:
            x = x.index_select(1, wiring.order)
        first = self.embedding(x)  # (C, T, B, W), m_0, tasks in the wiring's order from here ...
        if self.task_embedding is not None:
            vectors = self.task_embedding.weight
            first = first + (
                vectors if wiring.order is None else vectors.index_select(1, wiring.order)
            )
        output: Tensor = self.head(self._wired(first, wiring))  # ... to here
        return output

    def _wired(self, first: Tensor, wiring: Wiring) -> Tensor:
        """What the head reads, (C, T, B, W)."""
        mixed: Tensor = _Stack.apply(  # type: ignore[no-untyped-call]
            first, wiring.weights, wiring, self._scratch, self.residual, torch.is_grad_enabled(),
            *(p for module in self.stack[: wiring.depth[0]] for p in module.parameters()),
        )  # fmt: skip
        return mixed


class _Stack(torch.autograd.Function):
    """All modules and the head's mixture, with a backward pass by hand.

    Outputs m_0 .. m_N lie in one buffer ``m`` (L, C, T, B, W), so a mixture is one batched product
    of weights (1 x i) and outputs (i x B W) for each task. Inputs of M_1 .. M_N lie in ``x``; once
    the gradients of M_i are taken, its input gives way to the gradient at that input. The head's is
    the last level: of tasks of depth D, the gradient at their head's input stands in x[D]. So the
    gradient at m_j is again one product, with the levels after j; and that at the weight with which
    M_i reads m_j is the inner product of the gradient at M_i's input and m_j.
    """

    @staticmethod
    def forward(
        ctx: Any,
        first: Tensor,
        weights: Tensor,
        wiring: Wiring,
        scratch: Scratch,
        residual: bool,
        learning: bool,
        *parameters: Tensor,
    ) -> Tensor:
        levels = wiring.depth[0] + 1
        shape = (levels, *first.shape)
        buffers = scratch.take(first, shape), scratch.take(first, shape)
        m, x = (b[: math.prod(shape)].view(shape) for b in buffers)
        m[0] = first
        modules = _modules(parameters, levels - 1)
        run: list[_Run | None] = []
        for i, (inner, outer) in enumerate(modules, start=1):
            n = wiring.reach(i)
            if i in wiring.idle:
                m[i, :, :n] = 0
                run.append(None)
                continue
            _mix(weights[:n, :, i - 1, :i], m[:i, :, :n], x[i - 1, :, :n])
            inputs, outputs = _rows(x[i - 1], n), _rows(m[i], n)
            h, normed_in = inner.rectified(inputs)
            _, normed_out = outer.rectified(h, out=outputs)
            active = outputs > 0 if residual and learning else None
            run.append(_Run(h, active, normed_in, normed_out))
            if residual:
                outputs += inputs
        mixed = torch.empty_like(first)
        for a, b, d in wiring.blocks():
            _mix(weights[a:b, :, d, : d + 1], m[: d + 1, :, a:b], mixed[:, a:b])
        if wiring.place is not None:
            mixed = mixed.index_select(1, wiring.place)
        if learning:
            ctx.save_for_backward(weights, *parameters)
            ctx.wiring, ctx.scratch, ctx.residual = wiring, scratch, residual
            ctx.buffers, ctx.m, ctx.x, ctx.run = buffers, m, x, run
        else:
            scratch.give(*buffers)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.buffers is None:
            raise RuntimeError("the modules' backward pass can run once only")
        weights, *parameters = ctx.saved_tensors
        wiring: Wiring = ctx.wiring
        m, x = ctx.m, ctx.x
        modules = _modules(parameters, len(m) - 1)
        g_weights = torch.zeros_like(weights) if ctx.needs_input_grad[1] else None
        if wiring.order is not None:
            gradient = gradient.index_select(1, wiring.order)
        for a, b, d in wiring.blocks():
            x[d, :, a:b] = gradient[:, a:b]
            if g_weights is not None:
                _credit(g_weights[a:b, :, d, : d + 1], m[: d + 1, :, a:b], x[d, :, a:b])

        def pull(source: int) -> Tensor:
            """The gradient at m_source, (C, n, B, W), from all levels after it."""
            pulled: Tensor = m.new_empty(m.shape[1], wiring.reach(source), *m.shape[3:])
            for a, b, d in wiring.blocks():
                if d >= source:
                    readers = weights[a:b, :, source : d + 1, source]
                    _mix(readers, x[source : d + 1, :, a:b], pulled[:, a:b])
            return pulled

        each = len(parameters) // max(len(modules), 1)
        learned: list[Tensor | None] = [None] * len(parameters)
        learning = any(ctx.needs_input_grad[6:])
        for i in range(len(modules), 0, -1):
            n, run = wiring.reach(i), ctx.run[i - 1]
            if run is None:
                x[i - 1, :, :n] = 0
                continue
            inner, outer = modules[i - 1]
            inputs, outputs = _rows(x[i - 1], n), _rows(m[i], n)
            arriving = pull(i).flatten(1, 2)  # (C, n B, W)
            if run.active is None:
                g_out = torch.ops.aten.threshold_backward(arriving, outputs, 0)
            else:
                g_out = arriving * run.active
            g_h, of_outer = outer.backward(g_out, run.hidden, run.normed_out, learning)
            g_h = torch.ops.aten.threshold_backward(g_h, run.hidden, 0)
            _, of_inner = inner.backward(g_h, inputs, run.normed_in, learning, out=inputs)
            # In the order in which a module lists its parameters: `_modules`.
            learned[each * (i - 1) : each * i] = [
                *of_inner[:2], *of_outer[:2], *of_inner[2:], *of_outer[2:]
            ]  # fmt: skip
            if ctx.residual:
                inputs += arriving
            if g_weights is not None:
                _credit(g_weights[:n, :, i - 1, :i], m[:i, :, :n], x[i - 1, :, :n])
        g_first = pull(0) if ctx.needs_input_grad[0] else None
        ctx.scratch.give(*ctx.buffers)
        ctx.buffers = ctx.m = ctx.x = None
        return g_first, g_weights, None, None, None, None, *learned


class _Run(NamedTuple):
    """What a module that ran leaves for its backward pass."""

    hidden: Tensor
    active: Tensor | None
    """Where its last ReLU let through; None: where its output is positive."""
    normed_in: Normed | None
    normed_out: Normed | None


def _modules(parameters: Sequence[Tensor], count: int) -> list[tuple[Dense, Dense]]:
    """The inner and the outer layer of each `GenotypeModule`, from their parameters in a row."""
    each = len(parameters) // max(count, 1)
    layers = []
    for module in range(count):
        w_in, b_in, w_out, b_out, *norms = parameters[each * module : each * (module + 1)]
        inner, outer = (norms[:2], norms[2:]) if norms else ((None, None), (None, None))
        layers.append((Dense(w_in, b_in, *inner), Dense(w_out, b_out, *outer)))
    return layers


def _rows(level: Tensor, tasks: int) -> Tensor:
    """The rows of the first tasks: (C, T, B, W) -> (C, tasks * B, W), a view."""
    rows = level.shape[2]
    return level.flatten(1, 2)[:, : tasks * rows]


def _mix(weights: Tensor, sources: Tensor, out: Tensor) -> None:
    """out = sum over the first axis of sources (K, C, n, B, W), weighted (n, G, K), for G | B."""
    n, groups, k = weights.shape
    weights = weights.reshape(n * groups, 1, k)
    for c in range(out.shape[0]):
        stacked = sources[:, c].reshape(k, n * groups, -1).transpose(0, 1)
        torch.bmm(weights, stacked, out=out[c].view(n * groups, 1, -1))


def _credit(g_weights: Tensor, sources: Tensor, gradient: Tensor) -> None:
    """Write what `_mix`'s weights (n, G, K) are owed for a gradient at its output (C, n, B, W)."""
    n, groups, k = g_weights.shape
    owed = gradient.new_zeros(n * groups, 1, k)
    for c in range(gradient.shape[0]):
        stacked = sources[:, c].reshape(k, n * groups, -1).permute(1, 2, 0)
        owed.baddbmm_(gradient[c].reshape(n * groups, 1, -1), stacked)
    g_weights.copy_(owed.view(n, groups, k))
