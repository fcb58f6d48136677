"""PCGrad against Algorithm 1 written as its loops, and by hand."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

import algorithms
from algorithms.nn import ModuleLinear, TaskLinear, initialise, mlp
from algorithms.pcgrad import projected, shares
from bench.spec import RunSpec, SpecError

C, T, B, INPUTS = 2, 5, 4, 6


def by_the_loops(gradients: list[Tensor], order: Tensor) -> list[Tensor]:
    """Algorithm 1: every g_i' of task gradients (N,)."""
    found = []
    for i, gradient in enumerate(gradients):
        mine = gradient.clone()
        for j in order[i].tolist():
            if j != i and (inner := mine @ gradients[j]) < 0:
                mine = mine - inner / (gradients[j] @ gradients[j]) * gradients[j]
        found.append(mine)
    return found


def test_two_conflicting_tasks_by_hand() -> None:
    """g_1 = (1, 0) and g_2 = (-1, 1) become (1/2, 1/2) and (0, 1)."""
    g = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
    for order in ([[0, 1], [0, 1]], [[1, 0], [1, 0]]):
        c = shares((g @ g.T)[None], torch.tensor(order))
        torch.testing.assert_close(c, torch.tensor([[2.0, 1.5]]))
        torch.testing.assert_close(c[0] @ g, torch.tensor([0.5, 1.5]))
    agreeing = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    assert shares((agreeing @ agreeing.T)[None], torch.tensor(order)).tolist() == [[1.0, 1.0]]
    silent = torch.tensor([[1.0, 0.0], [0.0, 0.0]])  # a masked task has no gradient
    assert shares((silent @ silent.T)[None], torch.tensor(order)).tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("heads", [False, True])
def test_gradients_are_algorithm_1(layer_norm: bool, heads: bool) -> None:
    g = torch.Generator().manual_seed(0)
    network: nn.Module = mlp(
        INPUTS, [7, 6], None if heads else 3, copies=C, one_hot=T, layer_norm=layer_norm
    )
    if heads:
        network = nn.Sequential(network, TaskLinear(T, 6, 3, copies=C, last=True))
    initialise(network, "torch", g)
    network.double()
    x = torch.randn(1, T, B, INPUTS, generator=g, dtype=torch.float64)
    wanted_output = torch.randn(C, T, B, 3, generator=g, dtype=torch.float64)
    order = torch.rand(T, T, generator=g).argsort(1)

    def losses() -> Tensor:
        """(C, T); tasks pull the shared layers to targets of their own."""
        return (network(x) - wanted_output).square().mean((2, 3))

    parameters = list(network.parameters())
    plain = losses()
    expected, conflicts = [], 0
    for copy in range(C):
        gradients = [
            torch.cat([
                part[copy].flatten()
                for part in torch.autograd.grad(plain[copy, task], parameters, retain_graph=True)
            ])
            for task in range(T)
        ]  # fmt: skip
        conflicts += sum(bool(a @ b < 0) for a in gradients for b in gradients)
        expected.append(sum(by_the_loops(gradients, order)))
    assert conflicts > 2, "nothing to project"

    with projected([network], order):
        inside = losses()
        torch.autograd.backward(inside.sum())
    torch.testing.assert_close(inside, plain)
    assert [id(p) for p in network.parameters()] == [id(p) for p in parameters]
    for copy in range(C):
        found = torch.cat([p.grad[copy].flatten() for p in parameters])
        torch.testing.assert_close(found, expected[copy])


def test_networks_that_are_not_plain_are_refused() -> None:
    modules = ModuleLinear(2, INPUTS, 3)
    with (
        pytest.raises(TypeError, match="ModuleLinear"),
        projected([modules], torch.zeros(T, T, dtype=torch.int64)),
    ):
        pass
    for name in algorithms.names():
        config = algorithms.load(name).Config
        if name in ("mt_sac", "mtmh_sac"):
            assert config(pcgrad=True).pcgrad
        else:
            with pytest.raises(ValidationError, match="plain"):
                config(pcgrad=True)
    with pytest.raises(SpecError, match="plain shared networks"):
        RunSpec.resolve("d2r", "mt10_rand", 0, overrides={"pcgrad": True})
