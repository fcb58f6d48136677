"""What tests share: runs on the toy suite, and the list of algorithms to test alike."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # bytes are compared, and a GPU's are others

import pytest
import torch
from hypothesis import settings

import algorithms
from bench import machine
from bench.spec import RunSpec
from bench.store import RunStore
from bench.train import train

settings.register_profile("bench", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("bench")

TOY = {
    "horizon": 25, "steps_per_task": 250, "warmup_steps": 75, "eval_every": 100, "eval_episodes": 2,
    "final_episodes": 3, "batch_per_task": 16, "replay_per_task": 75,
}  # fmt: skip
"""A run of seconds whose replay ring wraps, logically and physically."""

SMALL = {"width": 16, "depth": 2, "module_width": 8, "router_width": 8}
"""Network sizes, for the algorithms that have such a field."""


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes ``algorithm`` runs for every registered one."""
    if "algorithm" in metafunc.fixturenames:
        metafunc.parametrize("algorithm", algorithms.names(), scope="module")


def toy_spec(algorithm: str = "mt_sac", seed: int = 0, **overrides: Any) -> RunSpec:
    """A small run on the toy suite; ``overrides`` of protocol and configuration."""
    fields = algorithms.load(algorithm.partition("@")[0]).Config.model_fields
    small = {key: value for key, value in SMALL.items() if key in fields}
    return RunSpec.resolve(
        algorithm, "toy", seed, preset_name="smoke", overrides=TOY | small | overrides
    )


@pytest.fixture(scope="session")
def toy_run() -> dict[str, int]:
    """The protocol of a run of seconds."""
    return TOY


@pytest.fixture(scope="session", name="toy_spec")
def _toy_spec() -> Callable[..., RunSpec]:
    return toy_spec


@pytest.fixture(scope="session")
def open_store() -> Callable[[Path, RunSpec], RunStore]:
    """The run directory of a specification below a folder."""

    def create(out: Path, spec: RunSpec) -> RunStore:
        return RunStore.create(out, spec, machine.environment("cpu", 1))

    return create


@pytest.fixture(scope="session")
def finished(
    open_store: Callable[[Path, RunSpec], RunStore], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], RunStore]:
    """An algorithm's small run from start to end, undisturbed; trained once, not to be changed."""

    @cache
    def run(algorithm: str) -> RunStore:
        spec = toy_spec(algorithm)
        store = open_store(tmp_path_factory.mktemp(algorithm), spec)
        train(spec, store)
        return store

    return run


@pytest.fixture
def copy(finished: Callable[[str], RunStore], tmp_path: Path) -> RunStore:
    """A finished run to do anything to."""
    original = finished("mt_sac")
    path = tmp_path / "out" / original.path.relative_to(original.path.parents[2])
    shutil.copytree(original.path, path)
    return RunStore(path)


@pytest.fixture(scope="session")
def measured() -> Callable[[RunStore], dict[str, bytes]]:
    """Name -> bytes of what a run measured: everything that must not depend on the clock."""

    def read(store: RunStore) -> dict[str, bytes]:
        paths = [store.path / "metrics.csv", *sorted(store.probe_path.glob("*"))]
        return {str(path.relative_to(store.path)): path.read_bytes() for path in paths}

    return read
