"""The harness: resolve what to run, train it, keep what it measured. Knows no algorithm by name."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.spec import RunSpec as RunSpec
    from bench.store import RunStore as RunStore
    from bench.train import train as train

# Before torch is loaded: its threads then hardly wait busily for their next product, and leave the
# processor to the compiled loops between two (an update of MEGA on two threads: a sixth faster).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

_EXPORTS = {"RunSpec": "bench.spec", "RunStore": "bench.store", "train": "bench.train"}

__all__ = ["RunSpec", "RunStore", "train"]


def __getattr__(name: str) -> Any:
    """Import on first use, so that ``bench --help`` needs no torch."""
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'bench' has no attribute {name!r}")
