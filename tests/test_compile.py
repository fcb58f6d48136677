"""``--compile``: networks by `torch.compile`, which GPUs need and CPUs can do."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from begun import begun
from torch._dynamo.backends.debugging import aot_eager

import algorithms
from algorithms.agent import Agent
from bench import machine, train
from bench.spec import RunSpec
from bench.speed import example_batch
from bench.store import RunStore, StoreError
from bench.train import Interrupted

ToySpec = Callable[..., RunSpec]
Open = Callable[[Path, RunSpec], RunStore]
OTHERS = ("mt_sac@pcgrad",)
UPDATES = 3


@pytest.fixture(autouse=True)
def _torch_as_before() -> Iterator[None]:
    settings = torch._dynamo.config
    before = settings.suppress_errors, settings.cache_size_limit
    yield
    settings.suppress_errors, settings.cache_size_limit = before
    torch.compiler.reset()


@pytest.fixture
def trained_plainly(
    finished: Callable[[str], RunStore], measured: Callable[[RunStore], dict[str, bytes]]
) -> Callable[..., str]:
    """Trains a run in a process that is asked to compile, which must come to what a plain one
    comes to, to the byte; gives what it said."""

    def train_and_compare(store: RunStore, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "bench.train", str(store.path), "--compile"],
            env=os.environ | environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert measured(store) == measured(finished("mt_sac"))
        return done.stderr

    return train_and_compare


def updated(spec: RunSpec, *, compiled: bool) -> Agent:
    """The agent of ``spec`` after some updates, the same whichever way they were computed."""
    agent = begun(spec)
    suite = agent.suite
    if compiled:
        agent.compile()
        torch._dynamo.config.suppress_errors = False
    with torch.random.fork_rng():
        torch.manual_seed(0)
        obs = torch.rand(suite.num_tasks, 1, suite.obs_dim).numpy()
    extras = agent.act(obs, explore=True).extras
    for _ in range(UPDATES):
        agent.update(example_batch(agent, 8, extras))
    return agent


@pytest.mark.parametrize(
    "label",
    ["mt_sac", *(pytest.param(label, marks=pytest.mark.slow)
                 for label in (*algorithms.names(), *OTHERS) if label != "mt_sac")],
)  # fmt: skip
def test_compiled_updates_are_those_of_the_paper(
    label: str, toy_spec: ToySpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[torch.fx.GraphModule] = []
    known: set[int] = set()

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        known.update(map(id, inputs))
        compiled: Callable[..., Any] = aot_eager(graph, inputs)
        return compiled

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **_: real(f, dynamic=False, backend=backend))
    plain = updated(toy_spec(label), compiled=False)
    assert not graphs
    other = updated(toy_spec(label), compiled=True)
    for network in ("actor", "critic", "target_critic"):
        parameters = {id(p) for p in getattr(other, network).parameters()}
        assert parameters & known, f"{network} was not compiled"
    for network in ("actor", "critic", "target_critic"):
        ours = getattr(other, network).state_dict()
        for name, value in getattr(plain, network).state_dict().items():
            torch.testing.assert_close(ours[name], value, rtol=0, atol=2e-5, msg=name)


@pytest.mark.slow
def test_a_compiled_run_goes_on_to_the_same_bytes_and_only_compiled(
    toy_spec: ToySpec,
    open_store: Open,
    tmp_path: Path,
    measured: Callable[[RunStore], dict[str, bytes]],
) -> None:
    if problem := machine.compiler_problem("cpu"):
        pytest.skip(problem)
    spec = toy_spec("mt_sac")
    whole, parts = (open_store(tmp_path / name, spec) for name in ("whole", "parts"))
    train(spec, whole, compiled=True)
    assert whole.description()["environment"]["numerics"]["compiled"] == "yes"

    torch.compiler.reset()
    ends, beats = itertools.count(), itertools.count()
    with pytest.raises(Interrupted):
        train(
            spec, parts, compiled=True, checkpoint_seconds=0, heartbeat_seconds=1e9,
            stop=lambda: next(ends) >= 5, alive=lambda: next(beats),
        )  # fmt: skip
    assert next(beats) > 5  # of start, end, and the pieces that were compiled
    with pytest.raises(StoreError, match=r"other numerics \(compiled yes -> no\)"):
        train(spec, parts)
    torch.compiler.reset()
    train(spec, parts, compiled=True)
    assert measured(parts) == measured(whole)


def test_without_a_compiler_it_trains_as_it_would_anyway(
    toy_spec: ToySpec, open_store: Open, tmp_path: Path, trained_plainly: Callable[..., str]
) -> None:
    store = open_store(tmp_path, toy_spec("mt_sac"))
    said = trained_plainly(
        store, CXX=str(tmp_path / "none"), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache")
    )
    assert "--compile: " in said
    assert "; training without" in said
    assert "compiled" not in store.description()["environment"]["numerics"]


def test_a_run_that_began_plain_goes_on_plain(
    toy_spec: ToySpec, open_store: Open, tmp_path: Path, trained_plainly: Callable[..., str]
) -> None:
    """Asked to compile in its middle, where that could change its last bits."""
    spec = toy_spec("mt_sac")
    store = open_store(tmp_path, spec)
    ends = itertools.count()
    with pytest.raises(Interrupted):
        train(spec, store, checkpoint_seconds=0, stop=lambda: next(ends) >= 5)
    assert "--compile: the run began without; training without" in trained_plainly(store)
