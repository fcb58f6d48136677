"""Inner loops of the networks, compiled for the CPU (numba).

Between two matrix products lies a little arithmetic on every row: normalising, rectifying, and in
the routed network choosing sources and mixing them. As tensor operations it costs several times the
products at the sizes of the reduced presets; here all of it between two products is one pass over
the rows. The formulas, and the same in tensor operations for other devices, are in `algorithms.nn`,
`algorithms.routing`, `algorithms.moore` and `algorithms.soft_module`.

Symbols: N = C R rows of all C copies together, M modules, K sources per destination, d the width of
a module. Arrays are contiguous, which compilers need to vectorise, and indexed by hand, because a
view of each row would cost more than its arithmetic. An optional array is absent when it is empty.

The compiler guards a vectorised loop with a check that its output overlaps no input. With too many
arrays it gives up, and overlapping ones take the slow path: hence short loops over few arrays. A
loop that sums writes only to the array it reads; otherwise that check, which adjacent arrays can
fail, would pick the order of the sum, and the last bit would depend on where memory was free.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit
from numba.extending import register_jitable
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

Array = NDArray[Any]


def _compile(function: Callable[..., None]) -> Callable[..., None]:
    """Compiled at the first call, and kept on disk for the next process where that is possible."""
    options: dict[str, Any] = {
        # Sums may be reordered, so that they vectorise; infinities and NaN keep their meaning.
        "fastmath": {"reassoc", "contract", "arcp", "nsz"},
        "error_model": "numpy",
        "nogil": True,  # blocks of rows may run in several threads
    }
    try:
        return njit(cache=True, **options)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # neither the package nor the home directory can be written
        return njit(**options)(function)  # type: ignore[no-any-return]


@cache
def products_on_one_thread() -> None:
    """Keep scipy's BLAS, which serves products in compiled loops, from starting threads of its own.

    These products are small, and the loops around them may run in several threads already.
    """
    import scipy.linalg.cython_blas  # noqa: F401  (what is not loaded cannot be told)

    for library in ThreadpoolController().select(prefix="libscipy_openblas").lib_controllers:
        if "numpy" not in Path(library.filepath).parts[-2]:  # numpy brings one like it
            library.set_num_threads(1)


@_compile
def choose(
    z: Array,
    score: Array,
    given: Array,
    places: Array,
    chosen: Array,
) -> None:
    """The K sources of each destination of largest score, the first of equals, or those given.

    ``z``, ``score`` (C, L, R): routing logits of the L = M (M + 1) / 2 connections, destination
    after destination, and what to choose by, which is overwritten. ``given`` (N' M, M, optional):
    row n chooses what is marked for n modulo N'. Writes the indices ``places`` and the logits
    ``chosen`` (C, M, K, R), 0 and -inf where a destination has fewer sources.
    """
    copies, modules, most, rows = places.shape
    highest = np.empty(rows, z.dtype)
    for c in range(copies):
        for i in range(modules):
            start, count = i * (i + 1) // 2, i + 1
            for k in range(most):
                found, logit = places[c, i, k], chosen[c, i, k]
                found[:] = 0
                logit[:] = -np.inf
                if given.shape[0] > 0 or k >= count:
                    continue
                highest[:] = -np.inf
                for j in range(count):
                    contender, place = score[c, start + j], np.int32(j)
                    for n in range(rows):  # vectorised: no branch
                        above = contender[n] > highest[n]
                        highest[n] = contender[n] if above else highest[n]
                        found[n] = place if above else found[n]
                for n in range(rows):
                    logit[n] = z[c, start + found[n], n]
                    score[c, start + found[n], n] = -np.inf
            if given.shape[0] > 0:
                for n in range(rows):
                    marks, k = (c * rows + n) * modules % given.shape[0] + i, 0
                    for j in range(count):
                        if given[marks, j] and k < most:
                            places[c, i, k, n] = j
                            chosen[c, i, k, n] = z[c, start + j, n]
                            k += 1


@_compile
def less_destination_maximum(
    z: Array,
    out: Array,
) -> None:
    """Each logit less the largest of its destination, both (C, L, R)."""
    copies, connections, rows = z.shape
    largest = np.empty(rows, z.dtype)
    for c in range(copies):
        i = start = 0
        while start < connections:
            largest[:] = z[c, start]
            for j in range(start, start + i + 1):
                for n in range(rows):
                    largest[n] = max(largest[n], z[c, j, n])
            for j in range(start, start + i + 1):
                for n in range(rows):
                    out[c, j, n] = z[c, j, n] - largest[n]
            i += 1
            start += i


@_compile
def _add_up(values: Array, total: Array) -> None:
    """``total`` (n,) = the sum of the rows of ``values`` (k, n)."""
    total[:] = values[0]
    for k in range(1, len(values)):
        for n in range(len(total)):
            total[n] += values[k, n]


@_compile
def weigh(
    places: Array,
    inside: Array,
    powers: Array,
    rescale: bool,
    bar: Array,
    at_least: bool,
    sources: Array,
    weights: Array,
    suitable: Array,
) -> None:
    """``sources``, ``weights`` and ``suitable`` (or M, 0, K), all (M, N, K), of the places chosen.

    ``inside`` (C, M, K, R): the softmax over what is chosen, the weights if ``rescale``; otherwise
    those over all sources are. ``powers`` (C, L, R, needed for these and for ``suitable``): e to
    the logits, up to a factor for each destination. Suitable: a share of all above ``bar`` (M,), or
    at least that. What fills up a destination of fewer than K sources is suitable, at weight 0.
    """
    copies, modules, most, rows = places.shape
    total = np.empty(rows, inside.dtype)
    for c in range(copies):
        for i in range(modules):
            start, count = i * (i + 1) // 2, i + 1
            if powers.shape[0] > 0:
                _add_up(powers[c, start : start + count], total)
            for n in range(rows):
                row = c * rows + n
                for k in range(most):
                    place = places[c, i, k, n]
                    sources[i, row, k] = place
                    weight = inside[c, i, k, n]
                    if powers.shape[0] > 0:
                        share = powers[c, start + place, n] / total[n]
                        if not rescale:
                            weight = share if k < count else share * 0
                        if suitable.shape[1] > 0:
                            enough = share >= bar[i] if at_least else share > bar[i]
                            suitable[i, row, k] = enough or k >= count
                    weights[i, row, k] = weight


@_compile
def weigh_backward(
    gradient: Array,
    places: Array,
    powers: Array,
    rescale: bool,
    weights: Array,
    out: Array,
) -> None:
    """The gradient at the logits, ``out`` (C, L, R), from that at the weights (M, N, K)."""
    copies, modules, most, rows = places.shape
    total = np.empty(rows, weights.dtype)
    for c in range(copies):
        for i in range(modules):
            start, count = i * (i + 1) // 2, i + 1
            if not rescale:
                _add_up(powers[c, start : start + count], total)
            out[c, start : start + count] = 0
            for n in range(rows):
                row = c * rows + n
                mean = out[c, start, n]  # zero, of the right type
                for k in range(min(most, count)):
                    mean += weights[i, row, k] * gradient[i, row, k]
                if rescale:
                    for k in range(min(most, count)):
                        place = start + places[c, i, k, n]
                        out[c, place, n] = weights[i, row, k] * (gradient[i, row, k] - mean)
                    continue
                for j in range(count):
                    out[c, start + j, n] = -mean * powers[c, start + j, n] / total[n]
                for k in range(min(most, count)):
                    place = start + places[c, i, k, n]
                    out[c, place, n] += weights[i, row, k] * gradient[i, row, k]


@_compile
def mix(
    m: Array,
    start: int,
    sources: Array,
    weights: Array,
    u: Array,
) -> None:
    """u = sum_k p_k m_{d_k}: ``u`` (n, d) by sources and weights (n, K) of rows that begin at
    ``start`` in ``m`` (M, N, d)."""
    rows, width = u.shape
    for n in range(rows):
        for k in range(sources.shape[1]):
            j, p = sources[n, k], weights[n, k]
            if k == 0:
                for w in range(width):
                    u[n, w] = p * m[j, start + n, w]
            else:
                for w in range(width):
                    u[n, w] += p * m[j, start + n, w]


@_compile
def activate(
    x: Array, bias: Array, scale: Array, shift: Array, u: Array, inverse: Array, out: Array
) -> None:
    """out = ReLU(LayerNorm(x + b)) + u, without LayerNorm where ``scale`` is absent.

    ``x`` (N, d): a product with weights; left with what the backward pass needs, the normalised
    input or that before the ReLU. ``out`` (N, d, optional): if there is neither LayerNorm nor
    ``u`` it may be absent, and ``x`` is rectified in place. ``u`` (N, d, optional). ``inverse``
    (N,): 1 over the standard deviation. ``bias`` (G, d), ``scale`` and ``shift`` (C, d): each
    serves the same number of consecutive rows; G and C divide N.
    """
    rows, width = x.shape
    per_bias, per_scale = rows // bias.shape[0], rows // max(scale.shape[0], 1)
    kind = x.dtype.type  # whole numbers would turn float32 into float64
    zero, one, epsilon = kind(0), kind(1), kind(1e-5)
    part = one / kind(width)
    for n in range(rows):
        g = n // per_bias
        if out.shape[0] == 0:
            for w in range(width):
                x[n, w] = max(x[n, w] + bias[g, w], zero)
            continue
        for w in range(width):
            x[n, w] += bias[g, w]
        if scale.shape[0] > 0:
            c = n // per_scale
            mean = variance = zero
            for w in range(width):
                mean += x[n, w]
            mean *= part
            for w in range(width):
                x[n, w] -= mean
                variance += x[n, w] * x[n, w]
            factor = one / np.sqrt(variance * part + epsilon)
            inverse[n] = factor
            if u.shape[0] > 0:
                for w in range(width):
                    x[n, w] *= factor
                    out[n, w] = max(x[n, w] * scale[c, w] + shift[c, w], zero) + u[n, w]
            else:
                for w in range(width):
                    x[n, w] *= factor
                    out[n, w] = max(x[n, w] * scale[c, w] + shift[c, w], zero)
        elif u.shape[0] > 0:
            for w in range(width):
                out[n, w] = max(x[n, w], zero) + u[n, w]
        else:
            for w in range(width):
                out[n, w] = max(x[n, w], zero)


@register_jitable(inline="always")  # a call for each row would cost more than its arithmetic
def _layer_norm_backward(
    arriving: Array, x: Array, n: int, scale: Array, c: int, inverse: Array, part: float,
    g_scale: Array, g_shift: Array,
) -> None:  # fmt: skip
    """Turn the gradient (d,) at a normalised row's scale * x + shift into that before normalising.

    Row n of ``x`` and ``inverse`` as `activate` left them; ``part`` is 1 / d in their type. The
    gradients of row c of scale and shift are added to.
    """
    width, zero = x.shape[1], x.dtype.type(0)
    for w in range(width):
        g_scale[c, w] += arriving[w] * x[n, w]
        g_shift[c, w] += arriving[w]
    mean = along = zero
    for w in range(width):
        value = arriving[w] * scale[c, w]
        mean += value
        along += value * x[n, w]
    mean *= part
    along *= part
    for w in range(width):
        value = arriving[w] * scale[c, w]
        arriving[w] = inverse[n] * (value - mean - x[n, w] * along)


@_compile
def activate_backward(
    gradient: Array,
    blocked: Array,
    x: Array,
    scale: Array,
    shift: Array,
    inverse: Array,
    out: Array,
    g_bias: Array,
    g_scale: Array,
    g_shift: Array,
) -> None:
    """From the gradient (N, d) after the ReLU, less ``blocked`` (N, d, optional), to that at x.

    ``x`` and ``inverse`` are what `activate` left; the result goes to ``out``, which may be ``x``.
    The gradients of bias (G, d), scale and shift (C, d) are added to.
    """
    rows, width = x.shape
    per_bias, per_scale = rows // g_bias.shape[0], rows // max(scale.shape[0], 1)
    kind = x.dtype.type
    zero, part = kind(0), kind(1) / kind(width)
    arriving = np.empty(width, x.dtype)
    for n in range(rows):
        g = n // per_bias
        if scale.shape[0] > 0:
            c = n // per_scale
            if blocked.shape[0] > 0:
                for w in range(width):
                    passes = x[n, w] * scale[c, w] + shift[c, w] > zero
                    arriving[w] = gradient[n, w] - blocked[n, w] if passes else zero
            else:
                for w in range(width):
                    passes = x[n, w] * scale[c, w] + shift[c, w] > zero
                    arriving[w] = gradient[n, w] if passes else zero
            _layer_norm_backward(arriving, x, n, scale, c, inverse, part, g_scale, g_shift)
        elif blocked.shape[0] > 0:
            for w in range(width):
                arriving[w] = gradient[n, w] - blocked[n, w] if x[n, w] > zero else zero
        else:
            for w in range(width):
                arriving[w] = gradient[n, w] if x[n, w] > zero else zero
        for w in range(width):
            g_bias[g, w] += arriving[w]
            out[n, w] = arriving[w]


@_compile
def add_bias(x: Array, bias: Array) -> None:
    """Add to the rows of x (N, d) a ``bias`` (G, d), which serves N / G rows in a row."""
    rows, width = x.shape
    each = rows // bias.shape[0]
    for n in range(rows):
        for w in range(width):
            x[n, w] += bias[n // each, w]


@_compile
def add_bias_backward(gradient: Array, g_bias: Array) -> None:
    """Add the rows of a gradient (N, d) to those of ``g_bias`` (G, d) that served them."""
    rows, width = gradient.shape
    each = rows // g_bias.shape[0]
    for n in range(rows):
        for w in range(width):
            g_bias[n // each, w] += gradient[n, w]


@_compile
def encode(
    x: Array, bias: Array, scale: Array, shift: Array, task: Array, routed: bool, inverse: Array,
    state: Array, query: Array, first: Array,
) -> None:  # fmt: skip
    """What the readers of a routed network's state get, from a product ``x`` (N, d).

    ``state`` F = LayerNorm(x + b), without LayerNorm where ``scale`` (C, d) is absent; the router's
    ``query``, F * H, or H alone if not ``routed``; the ``first`` module's, ReLU(F); all (N, d). Of
    H, ``task`` (C T, d), each row serves N / (C T). ``x`` and ``inverse`` as of `activate`.
    """
    rows, width = x.shape
    per_copy, per_task = rows // bias.shape[0], rows // task.shape[0]
    activate(x, bias, scale, shift, x[:0], inverse, first)
    for n in range(rows):
        c, t = n // per_copy, n // per_task
        if scale.shape[0] > 0:
            for w in range(width):
                state[n, w] = x[n, w] * scale[c, w] + shift[c, w]
        else:
            for w in range(width):
                state[n, w] = x[n, w]
        if routed:
            for w in range(width):
                query[n, w] = state[n, w] * task[t, w]
        else:
            for w in range(width):
                query[n, w] = task[t, w]


@_compile
def encode_backward(
    of_query: Array, of_first: Array, x: Array, scale: Array, task: Array, routed: bool,
    inverse: Array, state: Array, out: Array, g_bias: Array, g_scale: Array, g_shift: Array,
    g_task: Array,
) -> None:  # fmt: skip
    """From the gradients (N, d) at query and first of `encode` to that at x, ``out``.

    The gradients of bias, scale, shift (C, d) and task (C T, d) are added to.
    """
    rows, width = x.shape
    per_copy, per_task = rows // g_bias.shape[0], rows // task.shape[0]
    kind = x.dtype.type
    zero, part = kind(0), kind(1) / kind(width)
    arriving = np.empty(width, x.dtype)
    for n in range(rows):
        c, t = n // per_copy, n // per_task
        for w in range(width):
            arriving[w] = of_first[n, w] if state[n, w] > zero else zero
        if routed:
            for w in range(width):
                arriving[w] += of_query[n, w] * task[t, w]
            for w in range(width):
                g_task[t, w] += of_query[n, w] * state[n, w]
        else:
            for w in range(width):
                g_task[t, w] += of_query[n, w]
        if scale.shape[0] > 0:
            _layer_norm_backward(arriving, x, n, scale, c, inverse, part, g_scale, g_shift)
        for w in range(width):
            g_bias[c, w] += arriving[w]
            out[n, w] = arriving[w]


@_compile
def push(
    a: Array,
    t: Array,
    m: Array,
    start: int,
    sources: Array,
    weights: Array,
    suitable: Array,
    masked: bool,
    whole: Array,
    blocked: Array,
    g_weights: Array,
) -> None:
    """Add one destination's gradient to the sums of its sources, and take that at its weights.

    Of n rows that begin at ``start`` in ``m`` (M, N, d). ``a`` (n, d): the gradient at its input u
    through its layer; ``t`` that and the shortcut's together. ``whole`` (M, n, d): sums at u_j.
    ``blocked`` (M, n, d, optional): the part that may not enter the layer of j, where ``suitable``
    (n, K, optional) is false; of ``t`` if ``masked``, else of ``a``.
    """
    rows, width = a.shape
    zero = a.dtype.type(0)
    for n in range(rows):
        for k in range(sources.shape[1]):
            j, p = sources[n, k], weights[n, k]
            product = zero
            for w in range(width):
                product += t[n, w] * m[j, start + n, w]
            g_weights[n, k] = product
            for w in range(width):
                whole[j, n, w] += p * t[n, w]
            if suitable.shape[0] > 0 and not suitable[n, k]:
                if masked:
                    for w in range(width):
                        blocked[j, n, w] += p * t[n, w]
                else:
                    for w in range(width):
                        blocked[j, n, w] += p * a[n, w]


# Loops that contain others have them as parts of their own. Calls would go to one function of that
# name for the whole process, whichever was loaded first, and compiled in another place it may add
# up in another order.
_mix, _activate, _activate_backward, _add_bias, _add_bias_backward, _push = (
    register_jitable(inline="always")(loop.py_func)  # type: ignore[attr-defined]
    for loop in (mix, activate, activate_backward, add_bias, add_bias_backward, push)
)


@_compile
def run_layer(
    x: Array, weight: Array, bias: Array, scale: Array, shift: Array, rectify: bool, pre: Array,
    inverse: Array, out: Array,
) -> None:  # fmt: skip
    """G layers, each ReLU(LayerNorm(x W + b)), or x W + b, which stays in ``pre``.

    ``x`` (G or 1, R, inputs), ``weight`` (G, inputs, d), ``bias`` (G n, d): each serves R / n rows
    in a row, ``scale`` and ``shift`` (G, d), ``pre`` and ``out`` (G, R, d), ``inverse`` (G, R).
    What may be absent, and what is left in ``pre`` and ``inverse``, is as of `activate`.
    """
    layers = pre.shape[0]
    each = bias.shape[0] // layers
    for g in range(layers):
        np.dot(x[g if x.shape[0] > 1 else 0], weight[g], pre[g])
        if rectify:
            _activate(
                pre[g], bias[g * each : (g + 1) * each], scale[g : g + 1], shift[g : g + 1],
                pre[g, :0], inverse[g], out[g],
            )  # fmt: skip
        else:
            _add_bias(pre[g], bias[g * each : (g + 1) * each])


@_compile
def run_layer_backward(
    begins: Array, gradient: Array, x: Array, weight: Array, scale: Array, shift: Array,
    rectify: bool, pre: Array, inverse: Array, g_pre: Array, g_bias: Array, g_scale: Array,
    g_shift: Array, g_weight: Array, g_x: Array,
) -> None:  # fmt: skip
    """From the gradient (N, d) after `run_layer` to that at its product, ``g_pre``, and others.

    Layer g has the rows from ``begins[g]`` to ``begins[g + 1]``, also of ``pre`` (N, d),
    ``inverse`` (N,) and ``g_x`` (N, inputs, optional), which is written. So is ``g_weight`` (G,
    inputs, d, optional), for which a layer needs as many rows as ``x`` has. The gradients of bias,
    scale and shift are added to. If not ``rectify`` ``g_pre`` is the gradient itself.
    """
    layers = weight.shape[0]
    each = g_bias.shape[0] // layers
    for g in range(layers):
        a, b = begins[g], begins[g + 1]
        if a == b:
            continue
        if rectify:
            _activate_backward(
                gradient[a:b], pre[:0], pre[a:b], scale[g : g + 1], shift[g : g + 1],
                inverse[a:b], g_pre[a:b], g_bias[g * each : (g + 1) * each],
                g_scale[g : g + 1], g_shift[g : g + 1],
            )  # fmt: skip
        else:
            _add_bias_backward(g_pre[a:b], g_bias[g * each : (g + 1) * each])
        if g_weight.shape[0] > 0:
            np.dot(x[g if x.shape[0] > 1 else 0].T, g_pre[a:b], g_weight[g])
        if g_x.shape[0] > 0:
            np.dot(g_pre[a:b], weight[g].T, g_x[a:b])


@_compile
def run_modules(
    begin: int, end: int, blocks: Array, first: Array, sources: Array, weights: Array,
    weight: Array, bias: Array, scale: Array, shift: Array, m: Array, u: Array, x: Array,
    inverse: Array, out: Array,
) -> None:  # fmt: skip
    """The routed modules in a row and the head's input, for the blocks from ``begin`` to ``end``.

    m^1 = ``first`` (N, d); u^i = sum_k p_k m_{d_k}, x^i = u^i W_i, m^i = ReLU(LayerNorm(x^i +
    b_i)) + u^i; ``out`` (N, d) is u of the head. ``blocks`` (.., 3): copy, first row of all N, past
    the last. In one of them all modules run before the next, so that what they read of each other
    is in a cache. ``sources`` and ``weights`` (M, N, K); parameters (C, M - 1, .., d), ``scale``
    and ``shift`` with or without their one row. ``m``, ``u``, ``x`` (M, N, d) and ``inverse`` (M,
    N) are left for the backward pass, unless they have no rows.
    """
    modules, width = m.shape[0], first.shape[1]
    keep = m.shape[1] > 0
    if not keep:
        size = (blocks[:, 2] - blocks[:, 1]).max()
        m = np.empty((modules, size, width), first.dtype)
        u, x, inverse = np.empty_like(m), np.empty_like(m), np.empty((modules, size), first.dtype)
    for block in range(begin, end):
        c, n, past = blocks[block]
        a = n if keep else 0
        b = a + past - n
        m[0, a:b] = first[n:past]
        for i in range(modules):
            if i > 0:
                np.dot(u[i - 1, a:b], weight[c, i - 1], x[i, a:b])
                _activate(
                    x[i, a:b], bias[c, i - 1], scale[c, i - 1], shift[c, i - 1], u[i - 1, a:b],
                    inverse[i, a:b], m[i, a:b],
                )  # fmt: skip
            _mix(m, a, sources[i, n:past], weights[i, n:past], u[i, a:b])
        out[n:past] = u[modules - 1, a:b]


@_compile
def run_modules_backward(
    begin: int, end: int, blocks: Array, gradient: Array, sources: Array, weights: Array,
    suitable: Array, masked: bool, weight: Array, scale: Array, shift: Array, m: Array, x: Array,
    inverse: Array, g_first: Array, g_weights: Array, of_layers: Array,
) -> None:  # fmt: skip
    """From the gradient (N, d) at ``out`` of `run_modules` to those at ``first`` and weights.

    ``suitable`` (M, N, K, or M, 0, K) and ``masked`` as in `push`. ``x`` is left with the gradients
    at the products u W; those of bias, scale and shift are added to ``of_layers`` (blocks, 3,
    M - 1, d), apart for each block, so that their sum does not depend on who adds first.
    """
    modules, width = m.shape[0], gradient.shape[1]
    size = (blocks[:, 2] - blocks[:, 1]).max()
    # What destinations have pushed to each module, and what of it may not enter its layer.
    whole = np.empty((modules, size, width), m.dtype)
    blocked = np.empty((modules, size if suitable.shape[1] > 0 else 0, width), m.dtype)
    through = np.empty((size, width), m.dtype)  # the layer
    for block in range(begin, end):
        c, n, past = blocks[block]
        count = past - n
        whole[:] = 0
        blocked[:] = 0
        arriving = through[:count]
        arriving[:] = gradient[n:past]
        together = arriving  # and through the shortcut, which the head has not
        for i in range(modules - 1, -1, -1):
            _push(
                arriving, together, m, n, sources[i, n:past], weights[i, n:past],
                suitable[i, n:past], masked, whole, blocked, g_weights[i, n:past],
            )  # fmt: skip
            together = whole[i, :count]
            if i == 0:
                break
            _activate_backward(
                together, blocked[i, :count], x[i, n:past], scale[c, i - 1], shift[c, i - 1],
                inverse[i, n:past], x[i, n:past], of_layers[block, 0, i - 1 : i],
                of_layers[block, 1, i - 1 : i], of_layers[block, 2, i - 1 : i],
            )  # fmt: skip
            np.dot(x[i, n:past], weight[c, i - 1].T, arriving)
            for k in range(count):
                for w in range(width):
                    together[k, w] += arriving[k, w]
        g_first[n:past] = together
        for k in range(min(count, blocked.shape[1])):
            for w in range(width):
                g_first[n + k, w] -= blocked[0, k, w]


@_compile
def mix_orthonormal(
    h: Array, weights: Array, eps: float, v: Array, norms: Array, out: Array
) -> None:
    """out = sum_i w_i V_i, V = Gram-Schmidt of the k vectors h of a row (MOORE).

    ``h``, ``v`` (C, k, N, d), ``weights`` (C, T, k) with T dividing N, ``norms`` (C, k, N): of each
    vector less its shadows, ``out`` (C, N, d).
    """
    copies, k, rows, width = h.shape
    per_task, kind = rows // weights.shape[1], h.dtype.type
    shadows = np.empty(k, h.dtype)
    for c in range(copies):
        for n in range(rows):
            for i in range(k):
                for j in range(i):
                    shadow = kind(0)
                    for w in range(width):
                        shadow += v[c, j, n, w] * h[c, i, n, w]
                    shadows[j] = shadow
                for w in range(width):
                    v[c, i, n, w] = h[c, i, n, w]
                for j in range(i):
                    shadow = shadows[j]
                    for w in range(width):
                        v[c, i, n, w] -= shadow * v[c, j, n, w]
                square = kind(0)
                for w in range(width):
                    square += v[c, i, n, w] * v[c, i, n, w]
                norm, share = np.sqrt(square), weights[c, n // per_task, i]
                norms[c, i, n] = norm
                factor = kind(1) / (norm + kind(eps))
                for w in range(width):
                    v[c, i, n, w] *= factor
                    out[c, n, w] = share * v[c, i, n, w] + (out[c, n, w] if i else kind(0))


@_compile
def mix_orthonormal_backward(
    gradient: Array, h: Array, weights: Array, eps: float, v: Array, norms: Array,
    of_h: Array, of_weights: Array,
) -> None:  # fmt: skip
    """Gradients ``of_h`` (C, k, N, d), and ``of_weights`` (C, T, k), which starts at zero.

    With r_i the i-th vector less its shadows, V_i = r_i / (|r_i| + eps), and last vector first:
    g_r = g_V / (|r| + eps) - V <g_V, V> / |r|;   g_h = g_r - sum_j <V_j, g_r> V_j;
    g_{V_j} -= <V_j, h_i> g_r + <V_j, g_r> h_i for each j < i.
    """
    copies, k, rows, width = h.shape
    per_task, kind = rows // weights.shape[1], h.dtype.type
    of_v, of_r = np.empty((k, width), h.dtype), np.empty(width, h.dtype)
    for c in range(copies):
        for n in range(rows):
            t = n // per_task
            for i in range(k):
                share, total = weights[c, t, i], kind(0)
                for w in range(width):
                    total += gradient[c, n, w] * v[c, i, n, w]
                of_weights[c, t, i] += total
                for w in range(width):
                    of_v[i, w] = share * gradient[c, n, w]
            for i in range(k - 1, -1, -1):
                norm, along = norms[c, i, n], kind(0)
                for w in range(width):
                    along += of_v[i, w] * v[c, i, n, w]
                along = along / norm if norm > 0 else kind(0)
                factor = kind(1) / (norm + kind(eps))
                for w in range(width):
                    of_r[w] = factor * of_v[i, w] - along * v[c, i, n, w]
                    of_h[c, i, n, w] = of_r[w]
                for j in range(i):
                    shadow = back = kind(0)
                    for w in range(width):
                        shadow += v[c, j, n, w] * h[c, i, n, w]
                        back += v[c, j, n, w] * of_r[w]
                    for w in range(width):
                        of_h[c, i, n, w] -= back * v[c, j, n, w]
                        of_v[j, w] -= shadow * of_r[w] + back * h[c, i, n, w]


@_compile
def blend(p: Array, o: Array, bias: Array, rectify: bool, out: Array) -> None:
    """out_i = sum_j p_ij (o_j + b_j) of each row, with a ReLU after it if ``rectify``.

    ``p`` (C, N, I, J), ``o`` (C, J, N, d), left with the bias (C, J, d, optional) added, ``out``
    (C, I, N, d).
    """
    copies, rows, most, sources = p.shape
    width, zero = o.shape[3], o.dtype.type(0)
    for c in range(copies):
        for n in range(rows):
            if bias.shape[0] > 0:
                for j in range(sources):
                    for w in range(width):
                        o[c, j, n, w] += bias[c, j, w]
            for i in range(most):
                for j in range(sources):
                    share = p[c, n, i, j]
                    if j == 0:
                        for w in range(width):
                            out[c, i, n, w] = share * o[c, j, n, w]
                    else:
                        for w in range(width):
                            out[c, i, n, w] += share * o[c, j, n, w]
                if rectify:
                    for w in range(width):
                        out[c, i, n, w] = max(out[c, i, n, w], zero)


@_compile
def blend_backward(
    gradient: Array, p: Array, o: Array, rectify: bool, out: Array, of_p: Array, of_o: Array,
    g_bias: Array,
) -> None:  # fmt: skip
    """Gradients of `blend`: <g_i, o_j> for p_ij, sum_i p_ij g_i for o_j, added up for b_j."""
    copies, rows, most, sources = p.shape
    width, zero = o.shape[3], o.dtype.type(0)
    g = np.empty((most, width), o.dtype)
    for c in range(copies):
        for n in range(rows):
            for i in range(most):
                if rectify:
                    for w in range(width):
                        g[i, w] = gradient[c, i, n, w] if out[c, i, n, w] > zero else zero
                else:
                    for w in range(width):
                        g[i, w] = gradient[c, i, n, w]
            for j in range(sources):
                for i in range(most):
                    share, inner = p[c, n, i, j], zero
                    for w in range(width):
                        inner += g[i, w] * o[c, j, n, w]
                    of_p[c, n, i, j] = inner
                    if i == 0:
                        for w in range(width):
                            of_o[c, j, n, w] = share * g[i, w]
                    else:
                        for w in range(width):
                            of_o[c, j, n, w] += share * g[i, w]
                if g_bias.shape[0] > 0:
                    for w in range(width):
                        g_bias[c, j, w] += of_o[c, j, n, w]


@_compile
def gate(pre: Array, bias: Array, f: Array, out: Array) -> None:
    """out = ReLU(f (pre + b)), all (N, d); ``bias`` (G, d) serves N / G rows in a row.

    ``pre`` is left with the bias added.
    """
    rows, width = pre.shape
    each, zero = rows // bias.shape[0], pre.dtype.type(0)
    for n in range(rows):
        g = n // each
        for w in range(width):
            pre[n, w] += bias[g, w]
            out[n, w] = max(pre[n, w] * f[n, w], zero)


@_compile
def gate_backward(
    gradient: Array, pre: Array, f: Array, of_pre: Array, of_f: Array, g_bias: Array
) -> None:
    """Gradients of `gate`; that of the bias (G, d) is added to."""
    rows, width = pre.shape
    each, zero = rows // g_bias.shape[0], pre.dtype.type(0)
    for n in range(rows):
        g = n // each
        for w in range(width):
            arriving = gradient[n, w] if pre[n, w] * f[n, w] > zero else zero
            of_pre[n, w] = arriving * f[n, w]
            of_f[n, w] = arriving * pre[n, w]
        for w in range(width):
            g_bias[g, w] += of_pre[n, w]


@_compile
def less_row_maximum(z: Array, out: Array) -> None:
    """Each number less the largest of its row, both (N, n)."""
    rows, width = z.shape
    for n in range(rows):
        largest = z[n, 0]
        for w in range(1, width):
            largest = max(largest, z[n, w])
        for w in range(width):
            out[n, w] = z[n, w] - largest


@_compile
def divide_by_sum(p: Array) -> None:
    """Divide each row of ``p`` (N, n) by its sum."""
    rows, width = p.shape
    for n in range(rows):
        total = p.dtype.type(0)
        for w in range(width):
            total += p[n, w]
        for w in range(width):
            p[n, w] /= total


@_compile
def softmax_backward(gradient: Array, p: Array, out: Array) -> None:
    """p_w (g_w - sum_v p_v g_v) of each row, all (N, n)."""
    rows, width = p.shape
    for n in range(rows):
        mean = p.dtype.type(0)
        for w in range(width):
            mean += p[n, w] * gradient[n, w]
        for w in range(width):
            out[n, w] = p[n, w] * (gradient[n, w] - mean)
