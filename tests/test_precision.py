"""``products=bfloat16``: an update's matrix products in half the bits, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from begun import begun
from torch import Tensor

from algorithms.precision import bfloat16_products
from bench.spec import RunSpec
from bench.speed import example_batch

ToySpec = Callable[..., RunSpec]
CPU = torch.device("cpu")


def halved(*tensors: Tensor) -> list[Tensor]:
    """Rounded to bfloat16's 8 bits."""
    return [tensor.bfloat16().double() for tensor in tensors]


def test_products_are_those_of_rounded_inputs_wherever_they_are_written() -> None:
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, 30, 20, generator=g), torch.randn(2, 20, 10, generator=g)
    bias, out = torch.randn(2, 1, 10, generator=g), torch.empty(2, 30, 10)
    a, b = halved(x, w)
    exact = a @ b
    close = {"rtol": 2**-7, "atol": 1e-2, "check_dtype": False}  # a result is rounded, too
    with bfloat16_products(CPU):
        found = [torch.bmm(x, w), x @ w, torch.einsum("cri,cio->cro", x, w), torch.stack(
            [torch.mm(x[0], w[0]), torch.nn.functional.linear(x[1], w[1].T)]
        )]  # fmt: skip
        biased = [torch.baddbmm(bias, x, w), torch.stack([
            torch.addmm(bias[c], x[c], w[c]) for c in range(2)
        ])]  # fmt: skip
        assert torch.bmm(x, w, out=out) is out
        double = torch.bmm(x.double(), w.double())
    for product in [*found, out]:
        assert product.dtype == torch.float32
        assert not torch.equal(product, torch.bmm(x, w))
        torch.testing.assert_close(product, exact, **close)
    for product in biased:
        torch.testing.assert_close(product, exact + bias, **close)
    assert torch.equal(double, torch.bmm(x.double(), w.double()))
    torch.testing.assert_close(
        torch.bmm(x, w).double(), double, rtol=1e-4, atol=1e-4
    )  # and afterwards as before


def test_gradients_are_products_too() -> None:
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(1, 8, 8, generator=g).requires_grad_() for _ in range(2))
    with bfloat16_products(CPU):
        of_x, of_w = torch.autograd.grad(torch.bmm(x, w).sum(), [x, w])
    one = torch.ones(1, 8, 8, dtype=torch.float64)
    a, b = halved(x.detach(), w.detach())
    torch.testing.assert_close(of_x.double(), one @ b.mT, rtol=2**-7, atol=1e-2)
    torch.testing.assert_close(of_w.double(), a.mT @ one, rtol=2**-7, atol=1e-2)


def test_an_update_differs_by_rounding(algorithm: str, toy_spec: ToySpec) -> None:
    """Losses to a few percent, parameters by less than a step; they stay float32."""
    found = []
    for products in ("float32", "bfloat16"):
        agent = begun(toy_spec(algorithm, products=products))
        obs = torch.zeros(agent.suite.num_tasks, 1, agent.suite.obs_dim).numpy()
        batch = example_batch(agent, 32, agent.act(obs, explore=True).extras)
        metrics = agent.update(batch)
        parameters = torch.cat([p.detach().flatten() for p in agent.critic.parameters()])
        assert parameters.dtype == torch.float32
        found.append((metrics["critic_loss"], parameters))
    (loss, whole), (half_loss, half) = found
    assert not torch.equal(loss, half_loss)
    torch.testing.assert_close(half_loss, loss, rtol=0.05, atol=1e-4)
    assert (half - whole).abs().max() <= 2.1 * toy_spec(algorithm).agent_config.critic_lr


def test_it_is_a_field_of_the_run(toy_spec: ToySpec) -> None:
    plain, half = toy_spec("mt_sac"), toy_spec("mt_sac", products="bfloat16")
    assert plain.id != half.id
    with pytest.raises(ValueError, match="float32"):
        toy_spec("mt_sac", products="float16")
