"""The papers: one file per algorithm behind the interface of `algorithms.agent`."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from suites.base import unknown

if TYPE_CHECKING:
    from algorithms.agent import Agent

ENTRY_POINT_GROUP = "mega_bench.algorithms"

_BUILT_IN = {
    "mega": "algorithms.mega:MEGA",
    "d2r": "algorithms.d2r:D2R",
    "soft_module": "algorithms.soft_module:SoftModule",
    "moore": "algorithms.moore:MOORE",
    "care": "algorithms.care:CARE",
    "paco": "algorithms.paco:PaCo",
    "mixture_of_experts": "algorithms.mixture_of_experts:MixtureOfExperts",
    "hard_routing": "algorithms.hard_routing:HardRouting",
    "mtmh_sac": "algorithms.mtmh_sac:MTMHSAC",
    "mt_sac": "algorithms.mt_sac:MTSAC",
    "sac": "algorithms.single_task_sac:SingleTaskSAC",
}


@cache
def plugins() -> dict[str, str]:
    """Name -> "module:Class" of the algorithms of other installed packages."""
    return {point.name: point.value for point in entry_points(group=ENTRY_POINT_GROUP)}


def table() -> dict[str, str]:
    """Name -> "module:Class" of every algorithm, installed plug-ins included."""
    return _BUILT_IN | plugins()


def names() -> list[str]:
    """Registered algorithms."""
    return list(table())


def load(name: str) -> type[Agent]:
    """The class of the algorithm ``name``.

    Raises ValueError naming the nearest match of an unknown name, or what is wrong with a plug-in.
    """
    if name not in table():
        raise ValueError(unknown("algorithm", name, names()))
    if name in _BUILT_IN and name in plugins():
        raise ValueError(
            f"algorithm {name!r} is built in, and an installed package registers {table()[name]} "
            "under the same name: remove that package, or rename its algorithm"
        )
    module, _, attribute = table()[name].partition(":")
    try:
        agent: type[Agent] = getattr(import_module(module), attribute)
    except Exception as error:
        if name in _BUILT_IN:
            raise
        raise ValueError(
            f"algorithm {name!r} is registered as {table()[name]} by an installed package, but "
            f"cannot be loaded: {type(error).__name__}: {error}"
        ) from None
    from algorithms.agent import Agent

    if not (isinstance(agent, type) and issubclass(agent, Agent)):
        raise ValueError(f"algorithm {name!r}: {table()[name]} is no class of `algorithms.Agent`")
    return agent
