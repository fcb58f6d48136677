"""Network parts that several algorithms share, with a leading axis of independent copies.

Every parameter has the copies ``C`` first, so that twin critics are one network with C = 2 and one
batched product per layer; an actor has C = 1. Activations are ``(C, T, B, width)``: copy, task, row
of the task's batch. The task is an axis, hence a network that the papers feed with a one-hot task
id has a bias per task in its first layer: the same function and the same parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from algorithms.kernels import (
    Array,
    activate,
    activate_backward,
    add_bias,
    add_bias_backward,
    blend,
    blend_backward,
    products_on_one_thread,
    run_layer,
    run_layer_backward,
)

Init = Literal["authors", "torch"]

LOG_STD_RANGE = (-20.0, 2.0)
"""Clamp of the policy's log standard deviation (code of Soft Modularization and of D2R)."""


@runtime_checkable
class Drawn(Protocol):
    """A layer whose parameters are drawn by `initialise`."""

    def initialise(self, scheme: Init, generator: torch.Generator) -> None:
        """Draw the layer's own parameters, not those of layers within it."""


class Linear(nn.Module):
    """y = x W + b (+ u_task where the layer sees a one-hot task id of ``one_hot`` entries)."""

    def __init__(
        self, inputs: int, outputs: int, *, copies: int = 1, one_hot: int = 0, last: bool = False
    ) -> None:
        """``last``: this is a network's output layer, which the authors initialise near zero."""
        super().__init__()
        self.last = last
        self.weight = nn.Parameter(torch.empty(copies, inputs, outputs))
        self.bias = nn.Parameter(torch.empty(copies, 1, outputs))
        self.task_bias = nn.Parameter(torch.empty(copies, one_hot, 1, outputs)) if one_hot else None

    def forward(self, x: Tensor) -> Tensor:
        """(C or 1, T, B, inputs) -> (C, T, B, outputs)."""
        if compiled(x):
            return in_a_row(x, [(self, None, False)])
        if self.weight.dim() == 4:  # a copy for each task, while PCGrad takes gradients
            y = torch.matmul(x, self.weight) + self.bias
            return y if self.task_bias is None else y + self.task_bias
        copies, inputs, outputs = self.weight.shape
        rows = x.reshape(x.shape[0], -1, inputs).expand(copies, -1, -1)  # (C, T*B, inputs)
        y = torch.baddbmm(self.bias, rows, self.weight)
        y = y.view(copies, *x.shape[1:-1], outputs)
        return y if self.task_bias is None else y + self.task_bias

    def initialise(self, scheme: Init, generator: torch.Generator) -> None:
        """Draw the parameters; see `initialise`."""
        _, inputs, outputs = self.weight.shape
        fan_in = inputs + (0 if self.task_bias is None else self.task_bias.shape[1])
        columns = [self.weight] if self.task_bias is None else [self.weight, self.task_bias]
        draw(columns, self.bias, fan_in, outputs, self.last, scheme, generator)


class TaskLinear(nn.Module):
    """A linear layer of its own for each task: the output heads of a multi-head network."""

    def __init__(
        self, tasks: int, inputs: int, outputs: int, *, copies: int = 1, last: bool = False
    ) -> None:
        super().__init__()
        self.last = last
        self.weight = nn.Parameter(torch.empty(copies, tasks, inputs, outputs))
        self.bias = nn.Parameter(torch.empty(copies, tasks, 1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(C, T, B, inputs) -> (C, T, B, outputs)."""
        if compiled(x):
            return in_a_row(x, [(self, None, False)])
        return torch.matmul(x, self.weight) + self.bias

    def initialise(self, scheme: Init, generator: torch.Generator) -> None:
        """Draw the parameters; see `initialise`. The authors' layer is one of T x outputs."""
        _, tasks, inputs, outputs = self.weight.shape
        draw([self.weight], self.bias, inputs, tasks * outputs, self.last, scheme, generator)


class ModuleLinear(nn.Module):
    """M linear layers side by side: y_m = x_m W_m + b_m (+ u_{m,task}, as in `Linear`)."""

    def __init__(
        self,
        modules: int,
        inputs: int,
        outputs: int,
        *,
        copies: int = 1,
        one_hot: int = 0,
        last: bool = False,
    ) -> None:
        super().__init__()
        self.last = last
        self.weight = nn.Parameter(torch.empty(copies, modules, inputs, outputs))
        self.bias = nn.Parameter(torch.empty(copies, modules, 1, outputs))
        self.task_bias = (
            nn.Parameter(torch.empty(copies, modules, one_hot, 1, outputs)) if one_hot else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """(C or 1, M or 1, ..., inputs) -> (C, M, ..., outputs); with a one-hot, ... is T, B."""
        if compiled(x):
            return in_a_row(x, [(self, None, False)])
        y = self.product(x, self.bias)
        return y if self.task_bias is None else y + self.task_bias

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x_m W_m, plus a bias (C, M, 1, outputs) where there is one; shapes as of `forward`."""
        copies, modules, _, outputs = self.weight.shape
        rows = x.flatten(2, -2).expand(copies, modules, -1, -1).flatten(0, 1)  # (C M, R, inputs)
        weight = self.weight.flatten(0, 1)
        y = (
            torch.bmm(rows, weight) if bias is None
            else torch.baddbmm(bias.flatten(0, 1), rows, weight)
        )  # fmt: skip
        return y.view(copies, modules, *x.shape[2:-1], outputs)

    def initialise(self, scheme: Init, generator: torch.Generator) -> None:
        """Draw each module's parameters as those of a layer of its own."""
        _, _, inputs, outputs = self.weight.shape
        fan_in = inputs + (0 if self.task_bias is None else self.task_bias.shape[2])
        columns = [self.weight] if self.task_bias is None else [self.weight, self.task_bias]
        draw(columns, self.bias, fan_in, outputs, self.last, scheme, generator)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, with a scale and a shift for each copy.

    ``modules``: how many lie side by side, the axis after the copies; each has its own.
    """

    def __init__(self, width: int, *, copies: int = 1, modules: int = 1) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(copies, modules, 1, width))
        self.shift = nn.Parameter(torch.zeros(copies, modules, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        """(C, modules, ..., width), or (C, T, B, width) for one module: the same shape."""
        shape = (*self.scale.shape[:2], *(1 for _ in x.shape[3:]), x.shape[-1])
        scale, shift = self.scale.view(shape), self.shift.view(shape)
        return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:]), scale)

    def initialise(self, scheme: Init, generator: torch.Generator) -> None:
        """Start as the plain normalisation."""
        with torch.no_grad():
            self.scale.fill_(1)
            self.shift.fill_(0)


AnyLinear = Linear | TaskLinear | ModuleLinear

COMPILED = True
"""Whether the arithmetic between matrix products is compiled on a CPU (`algorithms.kernels`)."""


def compiled(x: Tensor) -> bool:
    """Whether to compute at ``x`` by compiled loops; otherwise by tensor operations, which are what
    `torch.compile` compiles."""
    return COMPILED and x.device.type == "cpu" and not torch.compiler.is_compiling()


class Layers(nn.Sequential):
    """Layers in a row; on a CPU, linear ones and what follows up to their ReLU are one step."""

    def forward(self, x: Tensor) -> Tensor:
        """As of all layers in turn."""
        if not compiled(x):
            for layer in self:
                x = layer(x)
            return x
        waiting, row = list(self), list[tuple[AnyLinear, LayerNorm | None, bool]]()
        while waiting:
            match waiting:
                case [Linear() | ModuleLinear() as linear, LayerNorm() as norm, nn.ReLU(), *after]:
                    row.append((linear, norm, True))
                case [Linear() | ModuleLinear() as linear, nn.ReLU(), *after]:
                    row.append((linear, None, True))
                case [Linear() | ModuleLinear() as linear, *after]:
                    row.append((linear, None, False))
                case [layer, *after]:
                    x, row = layer(in_a_row(x, row)), []
            waiting = after
        return in_a_row(x, row)


def in_a_row(x: Tensor, row: Sequence[tuple[AnyLinear, LayerNorm | None, bool]]) -> Tensor:
    """The layers of ``row``, each linear, perhaps with a LayerNorm, perhaps with a ReLU."""
    if not row:
        return x
    parameters: list[Tensor | None] = []
    for linear, norm, _ in row:
        bias: Tensor = linear.bias
        if (of_task := getattr(linear, "task_bias", None)) is not None:
            each = bias.dim() == of_task.dim()  # a copy for each task, as in `Linear`
            bias = (bias if each else bias.unsqueeze(-3)) + of_task
        parameters += [linear.weight, bias]
        parameters += [None, None] if norm is None else [norm.scale, norm.shift]
    y: Tensor = _InARow.apply(x, [rectify for *_, rectify in row], *parameters)  # type: ignore[no-untyped-call]
    return y


Normed = tuple[Tensor, Tensor, Tensor, Tensor]
"""What LayerNorm's backward pass needs: its input, the normalised input, mean and 1 / deviation."""


class Dense(NamedTuple):
    """A linear layer's parameters, with those of the LayerNorm behind it where there is one."""

    weight: Tensor
    bias: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None

    def arrays(self) -> list[Array]:
        """Bias, scale and shift as rows (n, d); the last two (0, d) without LayerNorm."""
        bias = flat(self.bias)
        return [bias, *(bias[:0] if p is None else flat(p) for p in (self.scale, self.shift))]

    def rectified(self, inputs: Tensor, out: Tensor | None = None) -> tuple[Tensor, Normed | None]:
        """ReLU(LayerNorm(inputs W + b)) on rows (C, R, W)."""
        if self.scale is None or self.shift is None:
            pre = torch.baddbmm(self.bias, inputs, self.weight, out=out)
            return pre.relu_(), None
        pre = torch.baddbmm(self.bias, inputs, self.weight)
        hat, mean, deviation = torch.native_layer_norm(pre, [pre.shape[-1]], None, None, 1e-5)
        normed = torch.addcmul(self.shift[:, 0], hat, self.scale[:, 0], out=out)
        return normed.relu_(), (pre, hat, mean, deviation)

    def backward(
        self,
        gradient: Tensor,
        inputs: Tensor,
        normed: Normed | None,
        learning: bool,
        out: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """From the gradient before the ReLU: that at the inputs, and those of the parameters.

        ``out`` may be the inputs themselves.
        """
        of_norm: list[Tensor | None] = []
        if normed is not None and self.scale is not None:
            pre, hat, mean, deviation = normed
            of_norm = [None, None]
            if learning:
                of_norm = [
                    (gradient * hat).sum(1, keepdim=True)[:, None],
                    gradient.sum(1, keepdim=True)[:, None],
                ]
            gradient = torch.ops.aten.native_layer_norm_backward(
                gradient * self.scale[:, 0], pre, [pre.shape[-1]], mean, deviation,
                None, None, [True, False, False],
            )[0]  # fmt: skip
        of_linear: list[Tensor | None] = [None, None]
        if learning:
            of_linear = [
                torch.bmm(inputs.transpose(1, 2), gradient), gradient.sum(1, keepdim=True)
            ]  # fmt: skip
        return torch.bmm(gradient, self.weight.transpose(1, 2), out=out), of_linear + of_norm


class _InARow(torch.autograd.Function):
    """`Layer` after `Layer` as one step of autograd.

    Parameters come and go in their own shapes, since each view of one would be a node of the graph.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rectify: Sequence[bool], *parameters: Tensor) -> Tensor:
        weight = parameters[0]
        kept = weight.dim() - 2  # axes of copies, or of copies and modules, G of them
        lead = [max(a, b) for a, b in zip(x.shape, weight.shape[:kept], strict=False)]
        rows = x.detach().flatten(kept, -2)
        if rows.shape[:kept].numel() > 1:
            rows = rows.expand(*lead, -1, -1)
        array = rows.reshape(-1, *rows.shape[kept:]).numpy()  # (G or 1, R, inputs)
        ctx.layers = []
        for n, active in enumerate(rectify):
            dense = Dense(*parameters[4 * n : 4 * n + 4])
            ctx.layers.append(Layer(array, dense, rectify=active))
            array = ctx.layers[-1].out
        ctx.shapes = [None if p is None else p.shape for p in parameters]
        ctx.of_x, ctx.lead = x.shape, lead
        return torch.from_numpy(array).view(*lead, *x.shape[kept:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        lead, of_x, (of_input, _, *wanted) = ctx.lead, ctx.of_x, ctx.needs_input_grad
        g: Array | None = ctx.layers[-1].rows(gradient)
        assert g is not None
        owing = Owing.of(g, any(wanted))
        g = owing.taken(g)
        learned: list[Array | None] = []
        for n in range(len(ctx.layers) - 1, -1, -1):
            assert g is not None
            g, *of_layer = ctx.layers[n].backward(g, n > 0 or of_input, wanted[4 * n], owing)
            learned = [*of_layer, *learned]
        g_x = None
        if g is not None:  # summed over the copies and modules that read the same input
            g_x = torch.from_numpy(owing.spread(g)).view(*lead, *of_x[len(lead) :])
            g_x = g_x.sum_to_size(of_x)
        shaped = [
            torch.from_numpy(g).view(shape) if g is not None and want else None
            for g, shape, want in zip(learned, ctx.shapes, wanted, strict=True)
        ]
        return g_x, None, *shaped


class Layer:
    """ReLU(LayerNorm(x W + b)) of rows x (G or 1, R, inputs), or x W + b if not ``rectify``.

    Of ``dense`` the weight is (.., inputs, d), G layers in all. Its bias has G n rows: each serves
    R / n rows in a row; scale and shift have one for each layer. The result is ``out`` (G, R, d).
    Arrays, not tensors, because many short steps spend less on them.

    On one thread products are part of the compiled pass, which finds their results in a cache and
    makes small ones at little cost. Torch computes them where it has more threads for large ones,
    and where they are counted or replaced (`algorithms.precision`) as it starts them.
    """

    def __init__(self, x: Array, dense: Dense, *, rectify: bool = True) -> None:
        bias, self.scale, self.shift = dense.arrays()
        weight = dense.weight.detach().numpy()
        self.weight = np.ascontiguousarray(weight.reshape(-1, *weight.shape[-2:]))
        self.x, self.rectify, kind = np.ascontiguousarray(x), rectify, x.dtype
        layers, rows, width = len(self.weight), x.shape[1], weight.shape[-1]
        self.shape = layers, rows, width
        self.by_torch = is_in_torch_dispatch_mode() or (
            torch.get_num_threads() > 1 and self.x[0].size * layers * width >= WORK_OF_THREADS
        )
        self.biases, self.pre = len(bias), np.empty(self.shape, kind)
        self.inverse = np.empty((layers, rows if len(self.scale) else 0), kind)
        self.out = np.empty(self.shape, kind) if len(self.scale) else self.pre
        out = self.out if len(self.scale) else self.pre[:, :0]
        if not self.by_torch:
            products_on_one_thread()
            run_layer(
                self.x, self.weight, bias, self.scale, self.shift, rectify, self.pre, self.inverse,
                out,
            )  # fmt: skip
            return
        _product(self.x, self.weight, self.pre)
        pre, out = self.pre.reshape(-1, width), out.reshape(-1, width)
        if rectify:
            activate(pre, bias, self.scale, self.shift, pre[:0], self.inverse.ravel(), out)
        else:
            add_bias(pre, bias)

    def rows(self, gradient: Tensor) -> Array:
        """A gradient at the result as an array (G, R, d)."""
        return gradient.detach().contiguous().numpy().reshape(self.shape)

    def backward(
        self, gradient: Array, to_x: bool, learning: bool, owing: Owing
    ) -> tuple[Array | None, Array | None, Array, Array | None, Array | None]:
        """Gradients at x, if asked for, W, if learning, bias, and if there are any scale and shift.

        ``gradient`` (N, d), which stays as it is, and that at x (N, inputs) are of the rows
        ``owing``; learning takes all.
        """
        (layers, _, width), inputs, kind = self.shape, self.x.shape[2], gradient.dtype
        pre, inverse = owing.taken(self.pre), self.inverse.ravel()
        if len(inverse):
            inverse = owing.taken(self.inverse[..., None]).ravel()
        leaving = np.empty_like(gradient) if self.rectify else gradient
        g_bias = np.zeros((self.biases if owing.rows is None else layers, width), kind)
        g_scale, g_shift = np.zeros((2, len(self.scale), width), kind)
        g_weight = np.empty((layers if learning else 0, inputs, width), kind)
        g_x = np.empty((len(gradient) if to_x else 0, inputs), kind)
        if not self.by_torch:
            run_layer_backward(
                owing.begins, gradient, self.x, self.weight, self.scale, self.shift, self.rectify,
                pre, inverse, leaving, g_bias, g_scale, g_shift, g_weight, g_x,
            )  # fmt: skip
        else:
            for a, b, of in owing.alike():
                weight = self.weight[of].swapaxes(1, 2)
                if self.rectify:
                    activate_backward(
                        gradient[a:b], pre[:0], pre[a:b], self.scale[of], self.shift[of],
                        inverse[a:b], leaving[a:b], g_bias[of], g_scale[of], g_shift[of],
                    )  # fmt: skip
                else:
                    add_bias_backward(leaving[a:b], g_bias[of])
                if to_x:
                    _product(leaving[a:b].reshape(len(weight), -1, width), weight, g_x[a:b])
            if learning:
                _product(self.x.swapaxes(1, 2), leaving.reshape(self.shape), g_weight)
        normed = len(self.scale) > 0
        return (
            g_x if to_x else None, g_weight if learning else None, g_bias,
            g_scale if normed else None, g_shift if normed else None,
        )  # fmt: skip


class Owing(NamedTuple):
    """Which rows of a gradient (G, R, d) the backward pass takes.

    Where nothing learns it is those that are not zero: an actor's loss has the less of two critics,
    and at a row the other is owed nothing, so half of the work is none.
    """

    shape: tuple[int, int]
    """G, R."""
    rows: Array | None
    """(N,) their numbers, of all G R; None: all."""
    begins: Array
    """(G + 1,) where those of each of the G begin among the N, and the end of the last."""

    @staticmethod
    def of(gradient: Array, learning: bool) -> Owing:
        """By the gradient (G, R, d); all rows if ``learning``, if few are zero, and where products
        are counted or replaced: what is counted is the plain work."""
        layers, rows = shape = gradient.shape[0], gradient.shape[1]
        if not learning and layers > 1 and not is_in_torch_dispatch_mode():
            some = (gradient != 0).any(2)
            counts = some.sum(1)
            if counts.sum() < MOST * some.size:
                begins = np.concatenate(([0], counts.cumsum()))
                return Owing(shape, np.flatnonzero(some), begins)
        return Owing(shape, None, np.arange(0, layers * rows + 1, rows))

    def taken(self, whole: Array) -> Array:
        """The rows (N, d) of an array (G, R, d)."""
        rows = whole.reshape(-1, whole.shape[-1])
        return rows if self.rows is None else rows.take(self.rows, 0)

    def spread(self, part: Array) -> Array:
        """Rows (N, d) in their places (G R, d), zeros elsewhere."""
        if self.rows is None:
            return part
        whole = np.zeros((math.prod(self.shape), part.shape[1]), part.dtype)
        whole[self.rows] = part
        return whole

    def times(self, gradient: Tensor, weight: Tensor) -> Array:
        """g W^T of these rows, (N, inputs), for gradient (G, R, d) and weight (G, inputs, d)."""
        if self.rows is None:
            return torch.bmm(gradient, weight.mT).numpy().reshape(-1, weight.shape[1])
        part, transposed = self.taken(gradient.numpy()), weight.detach().mT.numpy()
        out = np.empty((len(part), weight.shape[1]), part.dtype)
        for a, b, of in self.alike():
            _product(part[None, a:b], transposed[of], out[a:b])
        return out

    def alike(self) -> Iterator[tuple[int, int, slice]]:
        """First row, past the last, and which of the G have them, the same number each."""
        if self.rows is None:
            yield 0, math.prod(self.shape), slice(None)
            return
        for g, (a, b) in enumerate(pairwise(self.begins.tolist())):
            if a < b:
                yield a, b, slice(g, g + 1)


MOST = 0.9
"""Share of rows from which on taking out the others would not pay."""

WORK_OF_THREADS = 2**24
"""Multiplications of a layer's product below which a second thread would not pay."""


def _product(x: Array, weight: Array, out: Array) -> None:
    """``out`` (G, R, d) or (G R, d) = x (G or 1, R, inputs) W (G, inputs, d), by torch."""
    rows = torch.from_numpy(x).expand(len(weight), -1, -1)
    result = torch.from_numpy(out).view(len(weight), -1, out.shape[-1])
    torch.bmm(rows, torch.from_numpy(weight), out=result)


def flat(x: Tensor) -> Array:
    """The rows (.., d) of a contiguous tensor as (n, d), the same memory."""
    return x.detach().numpy().reshape(-1, x.shape[-1])


def blended(
    weights: Tensor, outputs: Tensor, bias: Tensor | None = None, *, rectify: bool = False
) -> Tensor:
    """sum_j p_ij (o_j + b_j): (C, T, B, i, j) and (C, j, T, B, d) -> (C, i, T, B, d), or its ReLU.

    ``bias`` (C, j, 1, d): of `ModuleLinear.product`, whose result ``outputs`` is and then belongs
    to this function alone.
    """
    if compiled(outputs):
        mixed: Tensor = _Blended.apply(weights, outputs, bias, rectify)  # type: ignore[no-untyped-call]
        return mixed
    if bias is not None:
        outputs = outputs + bias[:, :, None]
    mixed = torch.matmul(weights, outputs.permute(0, 2, 3, 1, 4)).permute(0, 3, 1, 2, 4)
    return mixed.relu() if rectify else mixed


class _Blended(torch.autograd.Function):
    """`blended` in one compiled pass: small products for each row cost more than their sums."""

    @staticmethod
    def forward(
        ctx: Any, weights: Tensor, outputs: Tensor, bias: Tensor | None, rectify: bool
    ) -> Tensor:
        p, o = weights.contiguous().flatten(1, 2), outputs.contiguous().flatten(2, 3)
        mixed = o.new_empty(len(o), p.shape[2], *o.shape[2:])
        biases = o.new_empty(0, 0, 0) if bias is None else bias.detach()[:, :, 0]
        blend(p.numpy(), o.numpy(), biases.numpy(), rectify, mixed.numpy())
        result = mixed.view(*mixed.shape[:2], *outputs.shape[2:])
        ctx.save_for_backward(p, o, result)
        ctx.rectify, ctx.biased = rectify, bias is not None
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        p, o, result = ctx.saved_tensors
        of_p, of_o = torch.empty_like(p), torch.empty_like(o)
        wanted = ctx.biased and ctx.needs_input_grad[2]
        g_bias = o.new_zeros(*o.shape[:2], o.shape[3]) if wanted else o.new_empty(0, 0, 0)
        blend_backward(
            gradient.contiguous().flatten(2, 3).numpy(), p.numpy(), o.numpy(), ctx.rectify,
            result.flatten(2, 3).numpy(), of_p.numpy(), of_o.numpy(), g_bias.numpy(),
        )  # fmt: skip
        tasks_rows = gradient.shape[2:4]
        return (
            of_p.view(len(p), *tasks_rows, *p.shape[2:]),
            of_o.view(*o.shape[:2], *tasks_rows, o.shape[3]),
            g_bias[:, :, None] if wanted else None,
            None,
        )


class Scratch:
    """Buffers for what lives from a forward pass to its backward pass, used again and again.

    Fresh memory of this size costs more in page faults than the mixing that fills it.
    """

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def take(self, like: Tensor, shape: Sequence[int]) -> Tensor:
        """An uninitialised flat buffer with room for ``shape``."""
        size = math.prod(shape)
        fitting = [b for b in self._free if b.numel() >= size and b.dtype == like.dtype]
        if not fitting:
            return like.new_empty(size)
        buffer = min(fitting, key=Tensor.numel)
        self._free = [b for b in self._free if b is not buffer]
        return buffer

    def give(self, *buffers: Tensor) -> None:
        """Take buffers back; the caller reads them no more."""
        self._free.extend(buffers)

    def __deepcopy__(self, memo: dict[int, Any]) -> Scratch:
        return Scratch()


def mlp(
    inputs: int,
    hidden: Sequence[int],
    outputs: int | None,
    *,
    copies: int = 1,
    one_hot: int = 0,
    layer_norm: bool = False,
    modules: int | None = None,
) -> Layers:
    """Linear (-> LayerNorm) -> ReLU for each hidden width, then a linear output unless None.

    ``modules``: how many such networks lie side by side (`ModuleLinear`).
    """

    def linear(outputs: int, last: bool) -> nn.Module:
        if modules is None:
            return Linear(inputs, outputs, copies=copies, one_hot=one_hot, last=last)
        return ModuleLinear(modules, inputs, outputs, copies=copies, one_hot=one_hot, last=last)

    layers: list[nn.Module] = []
    for width in hidden:
        layers.append(linear(width, last=False))
        if layer_norm:
            layers.append(LayerNorm(width, copies=copies, modules=modules or 1))
        layers.append(nn.ReLU())
        inputs, one_hot = width, 0
    if outputs is not None:
        layers.append(linear(outputs, last=True))
    return Layers(*layers)


def initialise(network: nn.Module, scheme: Init, generator: torch.Generator) -> None:
    """Draw all layers of ``network`` from ``generator``, copy after copy from the same law.

    ``authors`` (code of Soft Modularization and D2R): weights U(+-1/sqrt(output width)), bias 0.1;
    output layers U(+-0.003) throughout. ``torch``: U(+-1/sqrt(input width)) throughout.
    """
    for layer in network.modules():
        if isinstance(layer, Drawn):
            layer.initialise(scheme, generator)


def draw(
    weights: Sequence[Tensor],
    bias: Tensor,
    fan_in: int,
    fan_out: int,
    last: bool,
    scheme: Init,
    generator: torch.Generator,
) -> None:
    """Draw one layer's weights and bias by the law of `initialise`."""
    with torch.no_grad():
        if scheme == "authors" and not last:
            bound = 1 / math.sqrt(fan_out)
            bias.fill_(0.1)
        else:
            bound = 3e-3 if scheme == "authors" else 1 / math.sqrt(fan_in)
            bias.uniform_(-bound, bound, generator=generator)
        for weight in weights:
            weight.uniform_(-bound, bound, generator=generator)


def split_gaussian(params: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the Gaussian before squashing, from (..., 2A) outputs."""
    mean, log_std = params.chunk(2, dim=-1)
    return mean, log_std.clamp(*LOG_STD_RANGE).exp()


def squash(mean: Tensor, std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Action a = tanh(u), u = mean + std * noise, and log pi(a) summed over A (..., 1).

    log pi(a) = log N(u; mean, std) - sum log(1 - tanh(u)^2 + 1e-6)  (Haarnoja et al. 2018, App. C).
    """
    action = torch.tanh(torch.addcmul(mean, std, noise))
    log_normal = -0.5 * noise.square() - std.log() - 0.5 * math.log(2 * math.pi)
    log_prob = log_normal - torch.log(1 - action.square() + 1e-6)
    return action, log_prob.sum(-1, keepdim=True)
