"""PCGrad: task gradients without what pulls against another task's.

Yu et al. 2020, "Gradient Surgery for Multi-Task Learning", Alg. 1. With g_i the gradient of the
loss of task i:

    g_i' = g_i;   for every other task j, in random order:
                      if <g_i', g_j> < 0:   g_i' = g_i' - <g_i', g_j> / |g_j|^2 g_j
    step along sum_i g_i'

All g_i' are combinations of the g_j, so that the loop needs their T x T inner products alone and
runs over j for all i at once. The g_i themselves come from one backward pass in which every task
has a copy of each shared parameter.

**Departures**: the losses are those of the shared core, with its weights and mask, averaged over
tasks. Actor and critics are projected apart, in the order drawn for this update.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from algorithms.nn import LayerNorm, Linear, TaskLinear

SHARED: dict[type[nn.Module], tuple[str, ...]] = {
    Linear: ("weight", "bias"), LayerNorm: ("scale", "shift"), TaskLinear: (),
}  # fmt: skip
"""What tasks share of a plain layer; its other parameters have a slice for each task."""


@contextmanager
def projected(networks: Iterable[nn.Module], order: Tensor) -> Iterator[None]:
    """Call networks and propagate backward within; on leaving, gradients are PCGrad's.

    ``order`` (T, T): for each task a permutation of all. Gradients must be None before. Raises
    TypeError on a layer that is not plain.
    """
    networks = list(networks)
    layers = [layer for network in networks for layer in network.modules()]
    copies: dict[nn.Parameter, nn.Parameter] = {}
    for layer in layers:
        if type(layer) not in SHARED and list(layer.parameters(recurse=False)):
            raise TypeError(f"PCGrad knows no gradient per task of {type(layer).__name__}")
    shared = [(layer, name) for layer in layers for name in SHARED.get(type(layer), ())]
    owners = [(layer, name, getattr(layer, name)) for layer, name in shared]
    for layer, name, parameter in owners:
        copies[parameter] = _per_task(parameter, len(order))
        setattr(layer, name, copies[parameter])
    try:
        yield
    finally:
        for layer, name, parameter in owners:
            setattr(layer, name, parameter)
    for network in networks:
        _project(list(network.parameters()), copies, order)


def _per_task(parameter: nn.Parameter, tasks: int) -> nn.Parameter:
    """(C, ...) or (C, 1, ...) -> (C, T, ...), the same values for every task."""
    values = parameter.detach()
    values = values if values.dim() == 4 else values[:, None]
    return nn.Parameter(values.expand(-1, tasks, -1, -1))


def _project(
    parameters: list[nn.Parameter], copies: dict[nn.Parameter, nn.Parameter], order: Tensor
) -> None:
    """Set the gradients of one network's parameters."""
    products = torch.zeros(())
    by_task: list[Tensor] = []
    for parameter in parameters:
        gradient = copies.get(parameter, parameter).grad
        assert gradient is not None
        gradient = gradient.flatten(2)  # (C, T, numbers)
        by_task.append(gradient)
        if parameter in copies:
            products = products + gradient @ gradient.mT
        else:  # other tasks have no gradient at a task's own parameters
            products = products + torch.diag_embed(gradient.square().sum(-1))
    share = shares(products, order)[:, None]  # (C, 1, T)
    for parameter, gradient in zip(parameters, by_task, strict=True):
        kept = share @ gradient if parameter in copies else share.mT * gradient
        parameter.grad = kept.view(parameter.shape)


def shares(products: Tensor, order: Tensor) -> Tensor:
    """c (C, T) with sum_i g_i' = sum_j c_j g_j, from inner products <g_i, g_j> (C, T, T)."""
    tasks = len(order)
    each = torch.arange(tasks, device=order.device)
    c = torch.eye(tasks, dtype=products.dtype, device=products.device).expand_as(products).clone()
    norms = products.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(products.dtype).tiny)
    for j in order.unbind(1):  # (T,): the task that each g_i' is compared with next
        inner = (c * products[:, j]).sum(-1)  # (C, T): <g_i', g_j>
        against = inner.clamp(max=0).masked_fill(j == each, 0)
        c[:, each, j] -= against / norms[:, j]
    return c.sum(1)
