"""The one interface between the harness and every algorithm."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from suites.base import Episode, SuiteSpec


class Plan(NamedTuple):
    """How long a run will be, for agents whose schedules scale with it."""

    steps_per_task: int
    """Training steps of each task."""
    horizon: int
    """Steps per episode."""
    warmup_steps: int
    """Steps per task before the first update; their episodes count for no statistics."""


class AgentConfig(BaseModel):
    """Base of every algorithm's settings: immutable, validated, each field documented in place.

    The string below a field is its documentation and names its source (paper, section, equation);
    `bench show` prints it. Unknown names and values out of range raise pydantic.ValidationError.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def for_run(self, suite: SuiteSpec, plan: Plan) -> Self:
        """The same settings with everything decided that depends on the suite or the length.

        What is decided stays: ``config.for_run(...).for_run(...)`` changes nothing.
        """
        return self

    def _unused(self, *names: str, because: str) -> None:
        """For validators: raises ValueError if a field that has no effect here is not as it was."""
        for name in names:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}={getattr(self, name)!r} has no effect: {because}")


class Match(NamedTuple):
    """The value of a size in VARIANTS at which actor and critic have as many parameters as those of
    ``reference``, an ``algorithm@variant``, on the same suite under the same preset."""

    reference: str

    def __str__(self) -> str:
        return f"as many parameters as {self.reference}"


class Batch(NamedTuple):
    """Transitions, task-major: B of each of the T tasks, on the agent's device."""

    obs: Tensor  # (T, B, O)
    action: Tensor  # (T, B, A)
    reward: Tensor  # (T, B, 1), unscaled
    next_obs: Tensor  # (T, B, O)
    terminated: Tensor  # (T, B, 1), 0 or 1
    truncated: Tensor  # (T, B, 1), 0 or 1
    mean_reward: Tensor  # (T, 1, 1), mean unscaled reward of each task over the whole replay
    extras: dict[str, Tensor]  # what the agent stored beside each transition: (T, B, ...)


class Action(NamedTuple):
    """Actions (T, E, A) in [-1, 1] and what to store with the transitions, one row per (T, E)."""

    action: np.ndarray
    extras: dict[str, np.ndarray]


class History(NamedTuple):
    """What a run recorded, for `Agent.health`: S log points of training, T tasks."""

    tasks: tuple[str, ...]
    config: AgentConfig
    plan: Plan
    probes: list[tuple[int, dict[str, np.ndarray]]]
    """(step, what `Agent.probe` returned), oldest first."""
    steps: np.ndarray  # (S,) environment steps per task
    success: np.ndarray  # (S, T) success rate of the training episodes since the point before
    return_: np.ndarray  # (S, T) their mean return
    updates: dict[str, np.ndarray]  # (S, T) means of what `Agent.update` returned; nan before


class Finding(NamedTuple):
    """A verdict on one aspect of a run's health, in plain language."""

    check: str
    """What was looked at, in two or three words, the same for every run."""
    result: Literal["good", "note", "bad"]
    verdict: str
    """What was found, with numbers."""
    advice: str = ""
    """What to do about it."""


class Agent(ABC):
    """One multi-task learner. Subclasses are the algorithms; the harness knows only this."""

    Config: ClassVar[type[AgentConfig]]
    VARIANTS: ClassVar[dict[str, dict[str, Any]]] = {}
    """Ablations as differences from Config (or of protocol fields). ``fixed{start_stage}`` takes
    the number in the variant's name as that field's value."""
    PAPER: ClassVar[str] = ""
    """Citation shown by `bench list`."""

    suite: SuiteSpec
    device: torch.device
    extras_spec: dict[str, tuple[tuple[int, ...], str]]
    """Shape and numpy dtype per transition of what `act` returns in `Action.extras`."""
    seconds: dict[str, float]
    """Wall-clock seconds, since construction, of parts that deserve a row in the timings."""
    owed_updates: int = 0
    """Updates to make before the next action, however few the protocol has; `update` counts them
    down."""

    def __init__(
        self, suite: SuiteSpec, config: AgentConfig, plan: Plan, *, seed: int, device: str = "cpu"
    ) -> None:
        """``seed`` is the run's; take streams from it with `suites.base.stream`."""
        self.suite, self.config, self.plan = suite, config.for_run(suite, plan), plan
        self.device = torch.device(device)
        self.extras_spec = {}
        self.seconds = {}

    @abstractmethod
    def act(self, obs: np.ndarray, explore: bool) -> Action:
        """Actions for observations (T, E, O); ``explore=False`` draws from no generator."""

    @abstractmethod
    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One gradient step. Returns metrics as (T,) tensors, without a host synchronisation."""

    def compile(self) -> None:  # noqa: B027
        """Hand to `torch.compile` what it makes faster; what it cannot compile goes on without."""

    def on_episode_start(self, task: int, env: int) -> None:  # noqa: B027  (most need no hook)
        """A training episode starts in environment ``env`` of ``task`` (never in evaluation)."""

    def on_episode_end(self, episode: Episode) -> None:  # noqa: B027
        """A training episode ended (never in evaluation)."""

    def probe(self) -> dict[str, np.ndarray]:
        """The agent's own state, for figures (genotypes, stages, temperatures): no objects."""
        return {}

    def trace(self, obs: np.ndarray) -> dict[str, np.ndarray]:
        """What depends on the state, for observations (T, P, O): routes, modules used."""
        return {}

    @classmethod
    def health(cls, history: History) -> list[Finding]:  # noqa: ARG003
        """Verdicts on a run under way or done, from what it recorded."""
        return []

    @abstractmethod
    def parameter_counts(self) -> dict[str, int]:
        """``{"actor": n, "critic": n}`` with one critic, as the papers count."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything that training continues from: weights, optimisers, generators, populations.

        Tensors, numbers, strings, lists and dicts only (it is loaded without unpickling objects).
        """

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
