"""The routed network against the paper's equations written out row by row."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from algorithms import routing_cpu
from algorithms.nn import initialise
from algorithms.routing import (
    RoutedNetwork,
    modules_used,
    pack_path,
    path_bytes,
    route_temperature,
    unpack_path,
)

C, T, B, M, INPUTS, WIDTH, UNITS = 2, 3, 4, 6, 5, 7, 8


def build(copies: int = C, **options) -> RoutedNetwork:
    """A small float64 network with spread logits, so that sources differ in suitability."""
    sizes = {"width": WIDTH, "module_width": UNITS, "router_width": 9, "modules": M}
    network = RoutedNetwork(INPUTS, 2, T, copies=copies, **sizes | options).double()
    generator = torch.Generator().manual_seed(3)
    initialise(network, "authors", generator)
    with torch.no_grad():
        network.logits.weight.mul_(4)
        network.head.weight.mul_(300)
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def observations(copies: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(copies, T, B, INPUTS, generator=generator, dtype=torch.float64)


def triangular(flat: Tensor) -> list[Tensor]:
    """136 logits of one row as segments of 1, 2, ..., M."""
    return list(flat.split(list(range(1, M + 1))))


def row_logits(network: RoutedNetwork, x: Tensor, c: int, t: int) -> tuple[Tensor, Tensor]:
    """F(s) and z of one row x (INPUTS,), layer by layer."""

    def linear(layer, value: Tensor) -> Tensor:
        return value @ layer.weight[c] + layer.bias[c, 0]

    def norm(layer, value: Tensor) -> Tensor:
        return F.layer_norm(value, value.shape) * layer.scale[c, 0, 0] + layer.shift[c, 0, 0]

    layers = list(network.state_encoder)
    f = x
    for layer in layers:
        kind = type(layer).__name__
        f = (
            f.relu()
            if kind == "ReLU"
            else norm(layer, f)
            if kind == "LayerNorm"
            else linear(layer, f)
        )
    h = network.task_encoder.weight[c, t, 0] + network.task_encoder.bias[c, 0, 0]
    g = f * h if network.state_routing else h
    g = linear(network.router[0], g).relu()
    g = linear(network.router[2], g).relu()
    return f, linear(network.logits, g)


def naive(network: RoutedNetwork, x: Tensor, path: Tensor) -> Tensor:
    """Eq. 3-12 for one row at a time with `detach`, along ``path`` (C, T, B, M, M)."""
    outputs = []
    for c, t, b in itertools.product(range(C), range(T), range(B)):
        f, z = row_logits(network, x[min(c, len(x) - 1), t, b], c, t)
        first = network.first[1]
        y = f.relu() @ first.weight[c] + first.bias[c, 0]
        if network.rest.scale is not None:
            ln = network.first[2]
            y = F.layer_norm(y, y.shape) * ln.scale[c, 0, 0] + ln.shift[c, 0, 0]
        m = [y.relu()]
        rsg = [y.relu().detach()]  # Eq. 12 of each module
        for i, segment in enumerate(triangular(z)):
            d = path[c, t, b, i, : i + 1]
            full = segment.softmax(0)
            kept = torch.where(d, segment, -torch.inf).softmax(0)
            p = kept if network.rescale else full * d
            bar = 1 / (i + 2)
            suitable = full > bar if network.threshold == "above" else full >= bar
            if not network.resrouting:
                suitable = torch.ones_like(suitable)
            hat = [m[j] if suitable[j] else rsg[j] for j in range(i + 1)]
            masked = sum(p[j] * hat[j] for j in range(i + 1))
            plain = sum(p[j] * m[j] for j in range(i + 1))
            if i == M - 1:
                outputs.append(masked @ network.head.weight[c] + network.head.bias[c, 0])
                break
            y = masked @ network.rest.weight[c, i] + network.rest.bias[c, i, 0]
            if network.rest.scale is not None:
                y = F.layer_norm(y, y.shape)
                y = y * network.rest.scale[c, i, 0] + network.rest.shift[c, i, 0]
            shortcut = masked if network.shortcut_masked else plain
            m.append(y.relu() + shortcut)
            rsg.append(y.relu().detach() + shortcut)
    return torch.stack(outputs).view(C, T, B, -1)


def gradients(output: Tensor, network: RoutedNetwork, x: Tensor) -> dict[str, Tensor]:
    weight = torch.arange(1.0, 1 + output.numel(), dtype=output.dtype).view_as(output).sin()
    named = {"x": x} | {n: p for n, p in network.named_parameters() if p.requires_grad}
    found = torch.autograd.grad((output * weight).sum(), list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(named.items(), found, strict=True)
    }


OPTIONS = {
    "code": {},
    "paper": {"shortcut_masked": True, "threshold": "at_least"},
    "no_resrouting": {"resrouting": False},
    "top1": {"top_k": 1, "rescale": False},
    "top3": {"top_k": 3},
    "soft": {"top_k": None},
    "soft_unscaled": {"top_k": None, "rescale": False},
    "no_state_routing": {"state_routing": False},
    "layer_norm": {"layer_norm": True},
    "layer_norm_paper": {"layer_norm": True, "shortcut_masked": True},
}


@pytest.fixture(params=[True, False], ids=["compiled", "tensors"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows by compiled loops, as on a CPU, and by tensor operations, as elsewhere."""
    monkeypatch.setattr("algorithms.nn.COMPILED", request.param)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("route", ["top_k", "sample"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_values_and_gradients_are_the_equations(options, route) -> None:
    network = build(**options)
    x = observations().requires_grad_()
    output, taken = network(x, route, torch.Generator().manual_seed(1))
    expected = naive(network, x, taken.path())
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-11)
    ours, theirs = gradients(output, network, x), gradients(expected, network, x)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.usefixtures("either_way")
def test_resrouting_changes_gradients_only_and_code_differs_from_print() -> None:
    x = observations()
    outputs, found = [], []
    for options in ({"resrouting": False}, {}, {"shortcut_masked": True}):
        network = build(**options)
        output, _ = network(x.requires_grad_(), "sample", torch.Generator().manual_seed(1))
        outputs.append(output.detach())
        found.append(gradients(output, network, x)["rest.weight"])
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.allclose(found[0], found[1])
    assert not torch.allclose(found[1], found[2])


@pytest.mark.parametrize("masked", [False, True], ids=["code", "paper"])
def test_gradient_passes_round_an_unsuitable_module(masked: bool) -> None:
    """Path 1 -> 2 -> 3 -> head, where m^2 is unsuitable for m^3."""
    network = build(top_k=1, shortcut_masked=masked)
    with torch.no_grad():
        network.logits.weight.zero_()
        network.logits.bias.zero_()
        network.logits.bias[:, 0, 1] = 9.0  # z^3 = (9, 0): m^2's share is far below 1/3
        network.logits.bias[:, 0, -4] = 9.0  # z^head: m^3
    path = torch.zeros(1, T, B, M, M, dtype=torch.bool)
    path[..., :, 0] = True
    for destination, source in ((1, 1), (M - 1, 2)):
        path[..., destination, 0] = False
        path[..., destination, source] = True
    x = observations().requires_grad_()

    found = gradients(network(x, path)[0], network, x)
    blocked = found["rest.weight"][:, 0].abs().max()  # W_2
    assert (blocked == 0) == masked  # the code's shortcut still reaches it
    assert found["first.1.weight"].abs().max() > 0  # m^1 learns through the shortcuts
    assert found["rest.weight"][:, 1].abs().max() > 0  # so does m^3

    with torch.no_grad():  # once m^2 is suitable, both forms reach it
        network.logits.bias[:, 0, 1:3] = torch.tensor([-9.0, 9.0], dtype=torch.float64)
    suitable = gradients(network(x, path)[0], network, x)["rest.weight"][:, 0]
    assert suitable.abs().max() > 0


@pytest.mark.parametrize("route", ["top_k", "sample"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_compiled_rows_equal_those_of_tensor_operations(
    options, route, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, at the sizes of the papers' modules, with the same noise."""
    sizes = {"modules": 16, "module_width": 40}
    network = build(**sizes | options).float()
    x = torch.randn(1, T, 50, INPUTS, generator=torch.Generator().manual_seed(4)).requires_grad_()
    found = {}
    for compiled in (True, False):
        monkeypatch.setattr("algorithms.nn.COMPILED", compiled)
        output, taken = network(x, route, torch.Generator().manual_seed(1))
        found[compiled] = {"output": output, **gradients(output, network, x)}
        found[compiled]["path"] = taken.path()
    for name, ours in found[True].items():
        theirs = found[False][name]
        torch.testing.assert_close(
            ours,
            theirs,
            rtol=1e-3,
            atol=1e-4 * theirs.abs().max().item() if theirs.is_floating_point() else 0,
            msg=name,
        )


def test_blocks_of_rows_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = build(layer_norm=True), observations().requires_grad_()
    whole, route = network(x, "sample", torch.Generator().manual_seed(1))
    monkeypatch.setattr(routing_cpu, "CACHED_NUMBERS", M * UNITS * 5)  # 5 rows at a time
    parts, _ = network(x, route.path())
    torch.testing.assert_close(parts, whole)
    ours, theirs = gradients(parts, network, x), gradients(whole, network, x)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], msg=name)


def test_threads_make_no_difference_to_the_last_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = build(layer_norm=True), observations().requires_grad_()
    monkeypatch.setattr(routing_cpu, "CACHED_NUMBERS", M * UNITS * 5)
    monkeypatch.setattr(routing_cpu, "ROWS_OF_A_THREAD", 5)
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        output, _ = network(x, "sample", torch.Generator().manual_seed(1))
        found.append({"output": output, **gradients(output, network, x)})
    for name in found[0]:
        assert torch.equal(found[0][name], found[1][name]), name


def test_a_counter_of_operations_sees_every_product() -> None:
    network, x = build(layer_norm=True), observations()
    with FlopCounterMode(display=False) as counter:
        network(x, "top_k")[0].sum().backward()
    router, connections = 9, M * (M + 1) // 2
    later = (
        WIDTH * WIDTH + WIDTH * router + router * router + router * connections
        + WIDTH * UNITS + (M - 1) * UNITS * UNITS + UNITS * 2
    )  # fmt: skip
    # Forward, and backward at weights and inputs; the observations need no gradient.
    assert counter.get_total_flops() == 2 * C * T * B * (3 * later + 2 * INPUTS * WIDTH)


@pytest.mark.usefixtures("either_way")
def test_frozen_parameters_still_pass_gradients_to_the_input() -> None:
    network = build()
    x = observations().requires_grad_()
    expected = gradients(network(x, "top_k")[0], network, x)["x"]
    network.requires_grad_(False)
    output, _ = network(x, "top_k")
    weight = torch.arange(1.0, 1 + output.numel(), dtype=output.dtype).view_as(output).sin()
    torch.testing.assert_close(torch.autograd.grad((output * weight).sum(), x)[0], expected)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_rows_that_owe_nothing_cost_nothing_and_change_nothing(
    layer_norm: bool, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, x = build(layer_norm=layer_norm), observations().requires_grad_()
    monkeypatch.setattr(routing_cpu, "CACHED_NUMBERS", M * UNITS * 5)  # 5 rows at a time
    network.requires_grad_(False)
    found = []
    for compiled in (True, False):
        monkeypatch.setattr("algorithms.nn.COMPILED", compiled)
        output, _ = network(x, "top_k")
        draws = torch.rand(output.shape[:-1], generator=torch.Generator().manual_seed(3))
        found.append(torch.autograd.grad((output.sin() * (draws < share)[..., None]).sum(), x)[0])
    torch.testing.assert_close(*found)
    assert bool(found[0].any()) == (share > 0)


@pytest.mark.usefixtures("either_way")
def test_a_path_holds_k_sources_and_the_largest_ones() -> None:
    network = build()
    x = observations()
    for route in ("top_k", "sample"):
        path = network(x, route, torch.Generator().manual_seed(0))[1].path()
        expected = torch.arange(1, M + 1).clamp(max=2)
        assert torch.equal(path.sum(-1), expected.expand(C, T, B, M))
        assert not path.triu(1).any()
    greedy = network(x, "top_k")[1]
    for c, t, b in itertools.product(range(C), range(T), range(B)):
        for i, z in enumerate(triangular(row_logits(network, x[0, t, b], c, t)[1])):
            best = set(z.topk(min(2, i + 1)).indices.tolist())
            assert set(greedy.path()[c, t, b, i].nonzero().flatten().tolist()) == best
    assert torch.allclose(greedy.matrix().sum(-1), torch.ones(C, T, B, M, dtype=torch.float64))


@pytest.mark.usefixtures("either_way")
def test_equal_logits_give_whole_paths() -> None:
    network = build()
    with torch.no_grad():
        network.logits.weight.zero_()
        network.logits.bias.fill_(0.1)
    path = network(observations(), "top_k")[1].path()
    assert torch.equal(path.sum(-1)[0, 0, 0], torch.tensor([1, 2, 2, 2, 2, 2]))
    assert path[..., 1:, :2].all()


@pytest.mark.usefixtures("either_way")
def test_sampling_without_replacement_has_the_exact_frequencies() -> None:
    """P(d = {a, b}) = q_a q_b / (1 - q_a) + q_b q_a / (1 - q_b), q = softmax(z / tau_T)."""
    network = build(copies=1)
    z = torch.linspace(-1, 1.5, M * (M + 1) // 2, dtype=torch.float64).sin() * 2
    tau = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    with torch.no_grad():
        network.logits.weight.zero_()
        network.logits.bias[0, 0] = z
        network.temperature[0] = tau
    draws = 20_000
    x = torch.zeros(1, T, draws, INPUTS, dtype=torch.float64)
    path = network(x, "sample", torch.Generator().manual_seed(7))[1].path()[0]
    for t, (i, segment) in itertools.product(range(T), enumerate(triangular(z))):
        if i < 2:
            continue
        q = (segment / tau[t]).softmax(0)
        for a, b in itertools.combinations(range(i + 1), 2):
            exact = float(q[a] * q[b] / (1 - q[a]) + q[b] * q[a] / (1 - q[b]))
            seen = float((path[t, :, i, a] & path[t, :, i, b]).double().mean())
            assert abs(seen - exact) < 5 * math.sqrt(exact * (1 - exact) / draws) + 1e-9


@pytest.mark.usefixtures("either_way")
def test_a_given_path_is_taken() -> None:
    network = build()
    x = observations()
    path = network(x, "sample", torch.Generator().manual_seed(5))[1].path()
    taken = network(x, path)[1]
    assert torch.equal(taken.path(), path)
    z = row_logits(network, x[0, 1, 2], 0, 1)[1]
    for i, segment in enumerate(triangular(z)):
        d = path[0, 1, 2, i, : i + 1]
        expected = torch.where(d, segment, -torch.inf).softmax(0)
        torch.testing.assert_close(taken.matrix()[0, 1, 2, i, : i + 1], expected)
    only = network(x, path[:1])[1].path()  # one actor's paths serve all copies
    assert torch.equal(only, path[:1].expand(C, -1, -1, -1, -1))


@pytest.mark.parametrize(("modules", "size"), [(16, 17), (4, 2), (20, 27)])
def test_packed_paths_come_back(modules: int, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    path = (torch.rand(3, 5, modules, modules, generator=generator) < 0.4).tril()
    packed = pack_path(path)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, 5, path_bytes(modules)) == (3, 5, size)
    assert torch.equal(unpack_path(packed, modules), path)


def test_modules_used_walks_back_from_the_head() -> None:
    edges = torch.zeros(4, 4, dtype=torch.bool)  # destinations m2, m3, m4, head
    edges[0, 0] = edges[1, 1] = edges[2, 2] = True  # the chain 1 -> 2 -> 3 -> 4
    edges[3, 1] = True  # the head reads m2 only: m3 and m4 are skipped
    assert modules_used(edges) == 2
    edges[3, 3] = True
    assert modules_used(edges) == 4
    assert torch.equal(modules_used(torch.stack([edges, edges * 0])), torch.tensor([4, 0]))


def test_route_temperature_is_equation_14() -> None:
    alpha = torch.tensor([1.0, 0.5, 0.01])
    expected = (1 / alpha) / (1 / alpha).sum()
    torch.testing.assert_close(route_temperature(alpha.log(), False), expected)
    torch.testing.assert_close(route_temperature(alpha.log().view(3, 1, 1)), 3 * expected)
