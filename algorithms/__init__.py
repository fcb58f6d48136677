"""The papers: one file per algorithm behind the interface of `algorithms.agent`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from suites.base import plugins, registered, unknown

if TYPE_CHECKING:
    from algorithms.agent import Agent

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


def table() -> dict[str, str]:
    """Name -> "module:Class" of every algorithm, installed plug-ins included."""
    return _BUILT_IN | plugins("algorithm")


def names() -> list[str]:
    """Registered algorithms."""
    return list(table())


def load(name: str) -> type[Agent]:
    """The class of the algorithm ``name``.

    Raises ValueError naming the nearest match of an unknown name, or what is wrong with a plug-in.
    """
    if name not in table():
        raise ValueError(unknown("algorithm", name, names()))
    agent: type[Agent] = registered("algorithm", name, _BUILT_IN)
    from algorithms.agent import Agent

    if not (isinstance(agent, type) and issubclass(agent, Agent)):
        raise ValueError(f"algorithm {name!r}: {table()[name]} is no class of `algorithms.Agent`")
    return agent
