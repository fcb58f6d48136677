"""Matrix products of an update in bfloat16, which has float32's range and 8 instead of 24 bits.

Inputs are rounded, sums are kept in float32 by the processor, and everything else of an update, the
parameters and Adam's moments above all, stays float32. No paper does so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

HALF = torch.bfloat16
aten = torch.ops.aten
PRODUCTS = {
    overload: product
    for product, named in ((torch.mm, (aten.mm, aten.addmm)), (torch.bmm, (aten.bmm, aten.baddbmm)))
    for name in named
    for overload in (name.default, name.out)
}
"""What is replaced, and the product in it; some add it to a first argument."""


@contextmanager
def bfloat16_products(device: torch.device) -> Iterator[None]:
    """Compute matrix products of float32 tensors so, wherever they are written.

    On a GPU torch has a setting for it. On a CPU, where it has none that works, products are
    replaced as they are started; those within compiled loops (routed modules) stay as they are.
    """
    if device.type == "cuda":
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
    else:
        with _Halved():  # type: ignore[no-untyped-call]
            yield


class _Halved(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Replaces products of float32 tensors."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        product = PRODUCTS.get(func)
        kwargs = kwargs or {}
        scaled = kwargs.keys() - {"out"}  # factors alpha and beta: nobody's
        if product is None or scaled or args[-1].dtype != torch.float32:
            return func(*args, **kwargs)
        *bias, a, b = args
        result = product(a.to(HALF), b.to(HALF))
        if bias:
            result = result.float().add_(*bias)
        out: Tensor | None = kwargs.get("out")
        return result.float() if out is None else out.copy_(result)
