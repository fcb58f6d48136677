"""The routed network of `algorithms.routing` on a CPU: one step of autograd, gradients by hand.

At the reduced presets an update makes thousands of small steps, and what each costs besides its
arithmetic is half of the time. Here layers are products, as elsewhere, and compiled loops between
them (`algorithms.kernels`), with nothing in between. A test holds values and gradients equal to
those of the network's tensor operations and to the papers' equations.

Symbols as in `algorithms.routing`; R = T B rows, N = C R rows of all copies together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from algorithms.kernels import (
    Array,
    choose,
    encode,
    encode_backward,
    less_destination_maximum,
    products_on_one_thread,
    run_modules,
    run_modules_backward,
    weigh,
    weigh_backward,
)
from algorithms.nn import Dense, Layer, LayerNorm, Linear, Owing, flat

if TYPE_CHECKING:
    from algorithms.routing import RoutedNetwork

CACHED_NUMBERS = 2**16
"""Module outputs (numbers) of the rows that are taken through all modules at once."""

ROWS_OF_A_THREAD = 512
"""Rows below which a thread of its own would not pay."""


def run(
    network: RoutedNetwork, x: Tensor, given: Tensor | None, noise: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The network's outputs, sources and weights (C, M, K, R) at x (C or 1, T, B, inputs).

    ``given``: paths to take; otherwise the best by logits, or by samples of them with ``noise``.
    """
    found: tuple[Tensor, Tensor, Tensor] = _Run.apply(  # type: ignore[no-untyped-call]
        network, x, given, noise, torch.is_grad_enabled(), *_parameters(network)
    )
    return found


def _parameters(network: RoutedNetwork) -> Iterable[Tensor | None]:
    """All that learns: encoder, router, first module, the other modules, logits, head, tasks."""
    chains = (network.state_encoder, network.router, network.first)
    layers = [layer for chain in chains for layer in _layers(chain)]
    rest, logits, head = network.rest, network.logits, network.head
    layers += [
        Dense(rest.weight, rest.bias, rest.scale, rest.shift),
        Dense(logits.weight, logits.bias), Dense(head.weight, head.bias),
    ]  # fmt: skip
    return [p for layer in layers for p in layer] + list(network.task_encoder.parameters())


def _layers(chain: nn.Sequential) -> list[Dense]:
    found: list[Dense] = []
    for part in chain:
        if isinstance(part, Linear):
            found.append(Dense(part.weight, part.bias))
        elif isinstance(part, LayerNorm):
            found[-1] = found[-1]._replace(scale=part.scale, shift=part.shift)
    return found


class _Run(torch.autograd.Function):
    """Forward, layer after layer; backward, the same in reverse."""

    @staticmethod
    def forward(
        ctx: Any,
        network: RoutedNetwork,
        x: Tensor,
        given: Tensor | None,
        noise: Tensor | None,
        learning: bool,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        layers = [Dense(*parameters[k : k + 4]) for k in range(0, len(parameters) - 2, 4)]
        encoder, state, router_in, router_out, first, rest, logits, head = layers
        task = (parameters[-2] + parameters[-1]).flatten(0, 2)  # H, (C T, width)
        copies, tasks, rows = len(head.weight), x.shape[1], x.shape[2]

        share = torch.from_numpy  # the same memory
        encoded = Layer(x.detach().flatten(1, 2).numpy(), encoder)
        read = _State(share(encoded.out), state, task, network.state_routing)
        asked = Layer(read.query.numpy(), router_in)
        heard = Layer(asked.out, router_out)
        # z as (C, L, R): a product transposed so that the rows come last at no cost.
        z = torch.baddbmm(logits.bias.mT, logits.weight.mT, share(heard.out).mT)
        route = _Route(z, network.score(z, noise), given, network, learning)
        begun = Layer(read.first.numpy(), first)
        modules = _Modules(share(begun.out), route, rest, network, learning)
        output = Layer(modules.out.numpy(), head, rectify=False)
        if learning:
            ctx.shape, ctx.layers = x.shape, layers
            ctx.parts = encoded, read, asked, heard, route, begun, modules, output
        of_route = [
            torch.from_numpy(a).view(-1, copies, tasks * rows, a.shape[2]).permute(1, 0, 3, 2)
            for a in (route.sources, route.weights)
        ]
        ctx.mark_non_differentiable(*of_route)
        return share(output.out).view(copies, tasks, rows, -1), of_route[0], of_route[1]

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient: Tensor, _sources: Tensor, _weights: Tensor
    ) -> tuple[Tensor | None, ...]:
        if ctx.parts is None:
            raise RuntimeError("the routed network's backward pass can run once only")
        encoded, read, asked, heard, route, begun, modules, output = ctx.parts
        *_, logits, _ = ctx.layers
        ctx.parts, wanted = None, ctx.needs_input_grad
        learning = any(wanted[5:])

        share = torch.from_numpy
        at_output = output.rows(gradient)
        owing = Owing.of(at_output, learning)
        g_modules, *of_head = output.backward(owing.taken(at_output), True, learning, owing)
        g_begun, g_weights, of_rest = modules.backward(g_modules, learning, owing)
        g_first, *of_first = begun.backward(g_begun, True, learning, owing)
        g_z = route.backward(g_weights).mT  # (C, R, L)
        of_logits = [*_linear(share(heard.out), g_z), None, None] if learning else []
        g_hidden = owing.times(g_z, logits.weight)
        g_heard, *of_heard = heard.backward(g_hidden, True, learning, owing)
        g_query, *of_asked = asked.backward(g_heard, True, learning, owing)
        g_encoded, g_task, of_state = read.backward(g_query, g_first, learning, owing)
        g_inputs, *of_encoder = encoded.backward(g_encoded, wanted[1], learning, owing)
        g_x = None
        if wanted[1]:
            of_copies = (len(gradient), *ctx.shape[1:])
            g_x = share(owing.spread(g_inputs)).view(of_copies).sum_to_size(ctx.shape)
        nothing = (None,) * 3
        if not learning:
            return None, g_x, *nothing, *(None for _ in wanted[5:])
        learned = [*of_encoder, *of_state, *of_asked, *of_heard, *of_first, *of_rest, *of_logits,
                   *of_head]  # fmt: skip
        shaped = [
            None if p is None or found is None else torch.as_tensor(found).view_as(p)
            for p, found in zip((p for layer in ctx.layers for p in layer), learned, strict=True)
        ]
        g_task = g_task.view(len(gradient), -1, 1, g_task.shape[1])
        return None, g_x, *nothing, *shaped, g_task, g_task.sum(1, keepdim=True)


def _linear(x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients at weight and bias of a layer, from that (C, R, outputs) at its output."""
    return torch.bmm(x.mT, gradient), gradient.sum(1, keepdim=True)


class _State:
    """F = LayerNorm(x W + b), and what reads it: the router's F * H, the first module's ReLU(F)."""

    def __init__(self, x: Tensor, layer: Dense, task: Tensor, routed: bool) -> None:
        self.x, self.weight, self.routed = x, layer.weight.detach(), routed
        self.product = torch.bmm(x, self.weight)
        self.state, self.query, self.first = (torch.empty_like(self.product) for _ in range(3))
        bias, self.scale, shift = layer.arrays()
        self.task, pre = flat(task), flat(self.product)
        self.inverse = np.empty(len(pre), pre.dtype)
        encode(
            pre, bias, self.scale, shift, self.task, routed, self.inverse, flat(self.state),
            flat(self.query), flat(self.first),
        )  # fmt: skip

    def backward(
        self, g_query: Array, g_first: Array, learning: bool, owing: Owing
    ) -> tuple[Array, Tensor, list[Tensor | None]]:
        """Gradients at x, at H (C T, d) and at the layer's parameters.

        Those (N, d) at query and first and at x are of the rows ``owing``.
        """
        out, width = torch.empty_like(self.product), self.product.shape[2]
        of_bias = out.new_zeros(len(out), width)
        of_norm = out.new_zeros(2, len(self.scale), width)
        of_task = out.new_zeros(self.task.shape)
        encode_backward(
            owing.spread(g_query), owing.spread(g_first), flat(self.product), self.scale, self.task,
            self.routed, self.inverse, flat(self.state), flat(out), of_bias.numpy(),
            *of_norm.numpy(), of_task.numpy(),
        )  # fmt: skip
        of_weight = torch.bmm(self.x.mT, out) if learning else None
        return owing.times(out, self.weight), of_task, [of_weight, of_bias, *of_norm]


class _Route:
    """``sources``, ``weights`` and ``suitable`` (M, N, K) from logits z (C, L, R)."""

    def __init__(
        self, z: Tensor, score: Tensor, given: Tensor | None, network: RoutedNetwork, learning: bool
    ) -> None:
        (copies, _, rows), modules = z.shape, network.modules_count
        self.z, self.rescale, k = z, network.rescale, network.top_k
        asks = learning and network.resrouting
        marks = np.empty((0, modules), bool) if given is None else flat(given)
        self.places = np.empty((copies, modules, k, rows), np.int32)
        inside = z.new_empty(self.places.shape)
        choose(z.numpy(), score.numpy(), marks, self.places, inside.numpy())
        powers = z.new_empty(0, 0, 0)
        if asks or not self.rescale:
            powers = torch.empty_like(z)
            less_destination_maximum(z.numpy(), powers.numpy())
            powers.exp_()
        self.powers = powers.numpy()
        shape = (modules, copies * rows, k)
        self.sources, self.weights = np.empty(shape, np.int64), np.empty(shape, self.powers.dtype)
        self.suitable = np.empty((modules, copies * rows if asks else 0, k), bool)
        weigh(
            self.places, torch.softmax(inside, 2).numpy(), self.powers, self.rescale,
            network.bar.numpy(), network.threshold == "at_least", self.sources, self.weights,
            self.suitable,
        )  # fmt: skip

    def backward(self, g_weights: Array) -> Tensor:
        """The gradient at z."""
        out = torch.empty_like(self.z)
        weigh_backward(g_weights, self.places, self.powers, self.rescale, self.weights, out.numpy())
        return out


class _Modules:
    """The modules after the first and the head's input ``out`` (C, R, d), in blocks of rows."""

    def __init__(
        self, first: Tensor, route: _Route, layer: Dense, network: RoutedNetwork, learning: bool
    ) -> None:
        (copies, rows, width), modules = first.shape, len(route.weights)
        self.route, self.scratch, self.masked = route, network.scratch, network.shortcut_masked
        self.normed = layer.scale is not None
        shape = (modules, copies * rows if learning else 0, width)
        self.buffers = [
            self.scratch.take(first, shape) if learning else first.new_empty(0) for _ in range(3)
        ]
        self.m, self.u, self.x = (b[: math.prod(shape)].view(shape) for b in self.buffers)
        self.inverse, self.out = first.new_empty(shape[:2]).numpy(), torch.empty_like(first)
        none = layer.bias[:, :, :0]
        self.weight, bias, self.scale, self.shift = (
            (none if p is None else p).detach().numpy() for p in layer
        )
        _in_threads(
            run_modules, _blocks(range(0, copies * rows + 1, rows), modules * width), flat(first),
            route.sources, route.weights, self.weight, bias, self.scale, self.shift,
            self.m.numpy(), self.u.numpy(), self.x.numpy(), self.inverse, flat(self.out),
        )  # fmt: skip
        _tell(first, modules - 1)

    def backward(
        self, gradient: Array, learning: bool, owing: Owing
    ) -> tuple[Array, Array, list[Tensor | None]]:
        """Gradients at ``first``, at the route's weights and at the layers' parameters.

        That (N, d) at ``out`` and at ``first`` are of the rows ``owing``.
        """
        (copies, rows), (modules, _, width), route = owing.shape, self.m.shape, self.route
        m, x, inverse, sources, weights, suitable = (
            a if owing.rows is None or not a.shape[1] else a.take(owing.rows, 1)
            for a in (self.m.numpy(), self.x.numpy(), self.inverse, route.sources, route.weights,
                      route.suitable)
        )  # fmt: skip
        g_first, g_weights = np.empty_like(gradient), np.empty_like(weights)
        blocks = _blocks(owing.begins, modules * width)
        of_blocks = np.zeros((len(blocks), 3, modules - 1, width), gradient.dtype)
        _in_threads(
            run_modules_backward, blocks, gradient, sources, weights, suitable, self.masked,
            self.weight, self.scale, self.shift, m, x, inverse, g_first, g_weights, of_blocks,
        )  # fmt: skip
        _tell(self.out, modules - 1)
        of_layers: list[Tensor | None] = [None] * 4
        if learning:
            # x holds the gradients at the products u W by now.
            inputs, outputs = (t.view(modules, copies, rows, width) for t in (self.u, self.x))
            of_weight = torch.bmm(inputs[:-1].flatten(0, 1).mT, outputs[1:].flatten(0, 1))
            of_weight = of_weight.view(modules - 1, copies, width, width).transpose(0, 1)
            of_copies = torch.from_numpy(of_blocks).view(copies, -1, *of_blocks.shape[1:]).sum(1)
            of_layers = [of_weight.contiguous(), *of_copies.transpose(0, 1).contiguous()]
            of_layers[2:] = of_layers[2:] if self.normed else [None, None]
        if owing.rows is not None:
            whole = np.zeros_like(route.weights)
            whole[:, owing.rows] = g_weights
            g_weights = whole
        self.scratch.give(*self.buffers)
        return g_first, g_weights, of_layers


def _tell(x: Tensor, layers: int) -> None:
    """Show a counter of operations the products of x (C, R, d) with the weights of some layers,
    which compiled loops have made out of its sight."""
    if is_in_torch_dispatch_mode():
        copies, rows, width = x.shape
        shapes = ((copies * layers, rows, width), (copies * layers, width, width))
        torch.bmm(*(torch.empty(shape, device="meta") for shape in shapes))


def _blocks(begins: Iterable[int], numbers: int) -> NDArray[np.int64]:
    """Rows of each copy, as `run_modules` takes them; ``numbers``: outputs of all modules a row."""
    size = max(1, CACHED_NUMBERS // numbers)
    blocks = [
        (copy, row, min(row + size, past))
        for copy, (first, past) in enumerate(pairwise(begins))
        for row in range(first, past, size)
    ]
    return np.array(blocks, np.int64).reshape(-1, 3)


def _in_threads(kernel: Callable[..., None], blocks: NDArray[np.int64], *arguments: Any) -> None:
    """Run ``kernel`` on all blocks, in as many threads as torch."""
    products_on_one_thread()
    count = len(blocks)
    if not count:
        return
    threads = max(1, min(torch.get_num_threads(), int(blocks[-1, 2]) // ROWS_OF_A_THREAD))
    if threads == 1:
        kernel(0, count, blocks, *arguments)
        return
    bounds = [count * thread // threads for thread in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda a, b: kernel(a, b, blocks, *arguments), bounds[:-1], bounds[1:]))
