"""What to run: protocol, presets, and the resolution of a command line into run specifications.

A run is a function of its `RunSpec`; two equal specifications share an id and so a directory.
Values are laid over each other in this order: the papers' defaults (the fields of `Protocol` and of
the algorithm's Config), the preset, the variant (``algorithm@variant``), the user's overrides.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

import algorithms
import suites
from algorithms.agent import Agent, AgentConfig, Match, Plan
from suites.base import Suite, SuiteSpec, unknown

SCHEMA = 1
"""Version of the run directory's files."""

MAX_SEEDS = 10_000
"""Of one request: more is a slip of the keyboard."""


M = TypeVar("M", bound=BaseModel)


class SpecError(ValueError):
    """A request that names something that does not exist or does not fit."""


class _Problems:
    """Keeps the SpecErrors of ``with problems:`` blocks, so that others can be found as well."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, SpecError):
            self.lines += str(error).splitlines()
        return isinstance(error, SpecError)


@contextmanager
def collected() -> Iterator[_Problems]:
    """Run several checks (``with problems: check()``), then raise what all of them found wrong as
    one SpecError, a line each."""
    problems = _Problems()
    yield problems
    if problems.lines:
        raise SpecError("\n".join(dict.fromkeys(problems.lines)))


class Protocol(BaseModel):
    """What must be alike for every algorithm of a comparison. Defaults: MEGA Sec. 5.3, Table 2."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    goals: Literal["fresh", "benchmark50"] = "fresh"
    """Where goals come from: a continuum (as D2R's code draws them), or the 50 per task of the
    Meta-World benchmark (Meta-World+)."""
    reward_version: Literal["v1", "v2"] = "v2"
    """Meta-World's reward; success always follows the v2 rule."""
    horizon: Annotated[int, Field(ge=1, le=500)] = 200
    """Steps per episode (MEGA Table 2)."""
    steps_per_task: Annotated[int, Field(ge=1)] = 1_500_000
    """Training steps of each task (MEGA Sec. 5.3: 7,500 episodes of 200 steps in MT10)."""
    envs_per_task: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Environments of each task stepped together (D2R Sec. 5.1)."""
    updates_per_step: Annotated[int, Field(ge=1, le=1_000)] = 1
    """Gradient steps after each lockstep of the environments (D2R Table 1)."""
    act_delay: Literal[0, 1] = 0
    """0: an action knows the gradient step before it (D2R Table 1: one training step for each
    environment step; its code's actors are an epoch behind). 1: that is taken while the
    environments move, so the policy that acts is one gradient step older; with ``--sim-workers``
    simulator and updates then work at the same time."""
    batch_per_task: Annotated[int, Field(ge=1, le=100_000)] = 128
    """Transitions of each task in an update (MEGA Table 2: 1280 for ten tasks)."""
    warmup_steps: Annotated[int, Field(ge=0)] = 2_000
    """Steps per task with the untrained policy before the first update (D2R App. A.2)."""
    replay_per_task: Annotated[int, Field(ge=1)] = 100_000
    """Transitions kept per task (MEGA Table 2: 10^6 in all for MT10)."""
    eval_every: Annotated[int, Field(ge=1)] = 10_000
    """Steps per task between evaluations (D2R Sec. 5.2)."""
    eval_episodes: Annotated[int, Field(ge=1)] = 32
    """Episodes per task of an evaluation during training (D2R Sec. 5.2)."""
    final_episodes: Annotated[int, Field(ge=1)] = 100
    """Episodes per task of the final evaluation (D2R Sec. 5.2)."""
    eval_seed: Annotated[int, Field(ge=0)] = 20_250_219
    """Seed of the evaluation episodes: the same goals for every algorithm and training seed."""

    @model_validator(mode="after")
    def _whole_episodes(self) -> Self:
        episode = f"episodes of {self.episode_steps} steps (horizon x envs_per_task)"
        row = f"rows of {self.envs_per_task} environments (envs_per_task)"
        problems = []
        for name, unit, what in (
            ("steps_per_task", self.episode_steps, episode),
            ("eval_every", self.episode_steps, episode),
            ("replay_per_task", self.envs_per_task, row),
        ):
            value = getattr(self, name)
            if value % unit:
                low, high = value // unit * unit, (value // unit + 1) * unit
                nearest = f"{low} or {high}" if low else f"{high}"
                problems.append(
                    f"{name}={value} is not a whole number of {what}; nearest: {nearest}"
                )
        if self.warmup_steps >= self.steps_per_task:
            problems.append(
                f"warmup_steps={self.warmup_steps} leaves nothing of "
                f"steps_per_task={self.steps_per_task} to train on"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def episode_steps(self) -> int:
        """Steps per task in one episode of all its environments."""
        return self.horizon * self.envs_per_task

    @property
    def plan(self) -> Plan:
        """What an agent may know about the length of its run."""
        return Plan(self.steps_per_task, self.horizon, self.warmup_steps)


class Preset(BaseModel):
    """A named set of differences from the papers' values, alike for every algorithm."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    description: str
    full_scale: bool
    protocol: dict[str, Any] = {}
    protocol_large: dict[str, Any] = {}
    algorithm: dict[str, Any] = {}
    """Values for every algorithm that has such a field."""
    seeds: int | None = None
    """How many its source asks for."""


def preset_names() -> list[str]:
    """Names of the shipped presets."""
    return sorted(
        entry.name.removesuffix(".toml")
        for entry in files("bench").joinpath("presets").iterdir()
        if entry.name.endswith(".toml")
    )


def preset(name: str) -> Preset:
    """The preset ``name``; a TOML file's ``base`` names the preset it differs from."""
    if name not in preset_names():
        raise SpecError(unknown("preset", name, preset_names()))
    text = files("bench").joinpath("presets", f"{name}.toml").read_text(encoding="utf-8")
    data: dict[str, Any] = tomllib.loads(text)
    if (base := data.pop("base", None)) is not None:
        below = preset(base)
        for part in ("protocol", "protocol_large", "algorithm"):
            data[part] = getattr(below, part) | data.get(part, {})
    return Preset(name=name, **data)


class RunSpec(BaseModel):
    """Everything that can change a number of a run, resolved to values."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    """Hash of suite, algorithm, seed and every value that is not the papers'. Labels, presets and
    sources do not enter, nor do fields that a later version adds with a neutral default."""
    suite: str
    algorithm: str
    """Registry name."""
    label: str
    """``algorithm`` or ``algorithm@variant``, as results are titled."""
    seed: int = Field(ge=0)
    preset: str
    protocol: Protocol
    config: dict[str, Any]
    """The algorithm's resolved Config."""
    changed: dict[str, Any] = {}
    """Values the user set that no label tells."""
    sources: dict[str, str] = {}
    """Where each value that is not the papers' comes from: preset, variant or user."""

    @property
    def directory(self) -> str:
        """The run's path below the output directory, which no name can lead out of."""
        return f"{folder(self.suite)}/{folder(self.label)}/{self.seed}-{folder(self.id)}"

    @property
    def title(self) -> str:
        """The label with what the user changed: how results tell this configuration apart."""
        return title(self.label, self.changed)

    def with_seed(self, seed: int) -> RunSpec:
        """The same run under another seed."""
        id_ = _id(self.suite, self.algorithm, seed, self.protocol, self.agent_config)
        return self.model_copy(update={"seed": seed, "id": id_})

    def conflict(self, other: RunSpec) -> str:
        """The first value in which two specifications of one id differ, in words; or ``""``."""
        pairs = [
            ("suite", self.suite, other.suite),
            ("algorithm", self.algorithm, other.algorithm),
            ("seed", self.seed, other.seed),
        ]
        for mine, theirs in (
            (self.protocol.model_dump(mode="json"), other.protocol.model_dump(mode="json")),
            (self.config, other.config),
        ):
            pairs += [(key, mine[key], theirs[key]) for key in mine if key in theirs]
        return next((f"{name}: {a!r} and {b!r}" for name, a, b in pairs if a != b), "")

    @property
    def agent(self) -> type[Agent]:
        """The algorithm's class. Raises SpecError if it is not installed here."""
        return _agent(self.algorithm)

    @property
    def agent_config(self) -> AgentConfig:
        """The algorithm's configuration object. Raises SpecError if it has other fields here."""
        try:
            return self.agent.Config(**self.config)
        except ValidationError as error:
            wrong = [explain(self.algorithm, problem) for problem in error.errors()]
            raise SpecError("\n".join(wrong)) from None

    def make_agent(self, device: str = "cpu") -> Agent:
        """The untrained agent. Raises SpecError if its algorithm or the suite is not here."""
        shape = self.make_suite().spec
        plan = self.protocol.plan
        return self.agent(shape, self.agent_config, plan, seed=self.seed, device=device)

    def make_suite(self) -> Suite:
        """The suite under this run's protocol. Raises SpecError if it is not here."""
        p = self.protocol
        try:
            return suites.load(
                self.suite, goals=p.goals, reward_version=p.reward_version, horizon=p.horizon
            )
        except ValueError as error:
            raise SpecError(str(error)) from None

    @classmethod
    def resolve(
        cls,
        algorithm: str,
        suite: str,
        seed: int,
        *,
        preset_name: str = "cpu",
        overrides: Mapping[str, Any] | None = None,
    ) -> RunSpec:
        """The run that ``algorithm@variant`` on ``suite`` means under a preset and overrides.

        ``overrides``: field name, or ``algorithm.field`` for one algorithm, to value (or its text).
        Raises SpecError naming what is unknown or out of range, and what would be allowed.
        """
        if seed < 0:
            raise SpecError(f"seed {seed}: seeds start at 0")
        name, _, variant = algorithm.partition("@")
        with collected() as problems:
            with problems:
                chosen = preset(preset_name)
            with problems:
                agent = _agent(name)
                with problems:
                    mine = _for_algorithm(overrides or {}, name, agent)
                with problems:
                    variant_values(agent, name, variant)
            with problems:
                shape = _shape(suite)
            if problems.lines:  # the values cannot be judged together, but each by itself
                with problems:
                    _check_fields(Protocol, overrides or {}, "protocol")
        large = chosen.protocol_large if shape.large else {}

        def values(
            variant: str, changes: Mapping[str, Any]
        ) -> tuple[Protocol, AgentConfig, dict[str, str]]:
            of_variant = variant_values(agent, name, variant)
            matches = {k: v for k, v in of_variant.items() if isinstance(v, Match)}
            layers = {
                f"preset {chosen.name}": chosen.protocol | large | chosen.algorithm,
                f"variant {variant}": {k: v for k, v in of_variant.items() if k not in matches},
                "user": changes,
            }
            with collected() as problems:
                with problems:
                    protocol, sources = _build(Protocol, layers, "protocol")
                with problems:
                    config, more = _build(agent.Config, layers, name)
            try:
                config = config.for_run(shape, protocol.plan)
            except ValueError as error:
                raise SpecError(f"{name}: {error}") from None
            for field, match in matches.items():
                if field in changes:
                    continue
                reference = cls.resolve(match.reference, suite, 0, preset_name=preset_name)
                target = _parameters(reference.agent, reference.agent_config, protocol.plan, shape)
                size = _matching_size(agent, config, field, protocol.plan, shape, target)
                config, more[field] = config.model_copy(update={field: size}), f"variant {variant}"
            return protocol, config, sources | more

        protocol, config, sources = values(variant, mine)

        # A configuration that equals a variant's is that variant, however it was asked for. What
        # changes the protocol holds for the whole sweep and is no part of a label.
        of_protocol = {key: value for key, value in mine.items() if key in Protocol.model_fields}
        changed = {key: value for key, value in mine.items() if key not in of_protocol}
        alike = (
            ["", variant, *_variants_like(agent, config)] if changed else [""] if variant else []
        )
        for candidate in alike:
            try:
                same = values(candidate, of_protocol)[:2] == (protocol, config)
            except SpecError:
                continue
            if same:
                variant, changed = candidate, {}
                break
        return cls(
            id=_id(suite, name, seed, protocol, config),
            suite=suite,
            algorithm=name,
            label=f"{name}@{variant}" if variant else name,
            seed=seed,
            preset=preset_name,
            protocol=protocol,
            config=config.model_dump(mode="json"),
            changed=changed,
            sources=sources,
        )


def changed_protocol(sources: Mapping[str, str]) -> list[str]:
    """Fields of the protocol that the user set, by a specification's ``sources``."""
    fields = Protocol.model_fields
    return sorted(k for k, source in sources.items() if source == "user" and k in fields)


def title(label: str, changed: Mapping[str, Any]) -> str:
    """A label with what the user changed: ``mega[start_stage=4]``."""
    changes = ",".join(f"{key}={value}" for key, value in sorted(changed.items()))
    return f"{label}[{changes}]" if changes else label


def variant_values(agent: type[Agent], name: str, variant: str) -> dict[str, Any]:
    """What ``name@variant`` changes. ``fixed{n}`` in VARIANTS stands for fixed1, fixed2, ..."""
    if not variant:
        return {}
    for pattern, values in agent.VARIANTS.items():
        fields = re.findall(r"\{(\w+)\}", pattern)
        number = r"(?P<\1>(?:0|[1-9]\\d{0,8})(?:[.]\\d{1,9})?)"
        regex = re.sub(r"\\\{(\w+)\\\}", number, re.escape(pattern))
        if found := re.fullmatch(regex, variant):
            texts = {field: found[field] for field in fields}
            return values | {f: float(t) if "." in t else int(t) for f, t in texts.items()}
    known = [f"{name}@{pattern}" for pattern in agent.VARIANTS]
    if not known:
        raise SpecError(f"unknown variant {name}@{variant}: {name} has no variants")
    raise SpecError(unknown("variant", f"{name}@{variant}", known))


def parse_value(text: str) -> Any:
    """A value typed on the command line: TOML where it is TOML, else the text itself."""
    if text.lower() in ("none", "null"):
        return None
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (tomllib.TOMLDecodeError, RecursionError, ValueError):
        return text
    return parsed["value"] if len(parsed) == 1 else text


def parse_overrides(items: Iterable[str], option: str = "--set") -> dict[str, Any]:
    """``key=value`` strings as a mapping; raises SpecError on a malformed or repeated key."""
    overrides: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not key.strip():
            raise SpecError(f"{option} {item!r}: expected key=value, such as gamma=0.98")
        if key.strip() in overrides:
            raise SpecError(f"{option} {key.strip()} is given twice")
        overrides[key.strip()] = parse_value(text.strip())
    return overrides


def parse_seeds(text: str) -> list[int]:
    """``5`` means 0..4; ``0-9`` and ``3,7`` name seeds. Raises SpecError on none or duplicates."""
    parts = text.split(",")
    if re.fullmatch(r"\s*[0-9]{1,18}\s*", text):
        parts = [f"0-{int(text) - 1}"] if int(text) else []
    seeds: list[int] = []
    for part in parts:
        found = re.fullmatch(r"\s*([0-9]{1,18})\s*(?:-\s*([0-9]{1,18})\s*)?", part)
        if not found:
            raise SpecError(
                f"seeds {text!r}: {part!r} is neither a seed nor a range; "
                "write 5 (seeds 0 to 4), 0-9, or 3,7"
            )
        low, high = int(found[1]), int(found[2] or found[1])
        if high < low:
            raise SpecError(f"seeds {text!r}: the range {part.strip()!r} runs backwards")
        if len(seeds) + high - low >= MAX_SEEDS:
            raise SpecError(f"seeds {text!r}: at most {MAX_SEEDS} are allowed")
        seeds += range(low, high + 1)
    if not seeds:
        raise SpecError(f"seeds {text!r}: no seed named; write 5 (seeds 0 to 4), 0-9, or 3,7")
    return once(seeds, f"seeds {text!r}")


def once(seeds: list[int], shown: str) -> list[int]:
    """The seeds. Raises SpecError, beginning with ``shown``, if one is named twice."""
    if twice := [seed for seed, number in Counter(seeds).items() if number > 1]:
        raise SpecError(f"{shown}: {min(twice)} is named twice")
    return seeds


def _agent(name: str) -> type[Agent]:
    try:
        return algorithms.load(name)
    except ValueError as error:
        raise SpecError(str(error)) from None


def _shape(suite: str) -> SuiteSpec:
    try:
        return suites.load(suite).spec
    except ValueError as error:
        raise SpecError(str(error)) from None


def folder(name: str) -> str:
    """``name`` as one folder of a path: itself, or, if it could not be one or lead elsewhere, what
    of it can be, with a hash of the whole."""
    if re.fullmatch(r"[A-Za-z0-9_@:+=,-][A-Za-z0-9_@:+=,.-]{0,149}", name):
        return name
    plain = re.sub(r"[^A-Za-z0-9_@:+=,-]", "_", name)[:100]
    return f"{plain}~{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _id(suite: str, algorithm: str, seed: int, protocol: Protocol, config: AgentConfig) -> str:
    identity = {
        "suite": suite,
        "algorithm": algorithm,
        "seed": seed,
        "protocol": protocol.model_dump(mode="json", exclude_defaults=True),
        "config": config.model_dump(mode="json", exclude_defaults=True),
    }
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _for_algorithm(overrides: Mapping[str, Any], name: str, agent: type[Agent]) -> dict[str, Any]:
    """The overrides that concern algorithm ``name``; raises SpecError on a field it lacks."""
    fields = [*Protocol.model_fields, *agent.Config.model_fields]
    mine: dict[str, Any] = {}
    problems: list[str] = []
    # What is said of this algorithm alone wins over what is said of all, in whatever order.
    for key, value in sorted(overrides.items(), key=lambda item: "." in item[0]):
        owner, dot, field = key.rpartition(".")
        if dot and owner != name:
            if owner not in algorithms.names():
                problems.append(unknown("algorithm", owner, algorithms.names()))
        elif field not in fields:
            problems.append(f"{name}: " + unknown("field", field, fields))
        else:
            mine[field] = value
    if problems:
        raise SpecError("\n".join(problems))
    return mine


def _check_fields(model: type[BaseModel], values: Mapping[str, Any], owner: str) -> None:
    """Raises SpecError for values that their fields do not take, whatever the others are."""
    mine = {key: value for key, value in values.items() if key in model.model_fields}
    try:
        model(**mine)
    except ValidationError as error:
        if wrong := [explain(owner, problem) for problem in error.errors() if problem["loc"]]:
            raise SpecError("\n".join(wrong)) from None


def _build(
    model: type[M], layers: Mapping[str, Mapping[str, Any]], owner: str
) -> tuple[M, dict[str, str]]:
    """``model`` with the layers' values for its fields, and the layer each value came from."""
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for layer, content in layers.items():
        for field, info in model.model_fields.items():
            # What a user repeats of the layers below changes nothing, and has their source.
            if field not in content:
                continue
            value = content[field]
            if value is None and "none" in get_args(info.annotation):
                value = "none"  # a choice of that name, which the command line reads as no value
            if layer != "user" or value != values.get(field, info.default):
                values[field], sources[field] = value, layer
    strange = [k for k, v in values.items() if isinstance(v, float) and not math.isfinite(v)]
    problems = [f"{owner}: {k}={values.pop(k)}: not a finite number" for k in strange]
    try:
        built = model(**values)
        for key, value in built:  # "Infinity" is text until a field takes it for a number
            if isinstance(value, float) and not math.isfinite(value):
                problems.append(f"{owner}: {key}={value}: not a finite number")
    except ValidationError as error:
        problems += [explain(owner, problem) for problem in error.errors()]
    if problems:
        raise SpecError("\n".join(problems))
    return built, sources


@cache
def _parameters(agent: type[Agent], config: AgentConfig, plan: Plan, suite: SuiteSpec) -> int:
    """Parameters of the actor and one critic."""
    return sum(agent(suite, config, plan, seed=0).parameter_counts().values())


@cache
def _matching_size(
    agent: type[Agent], config: AgentConfig, field: str, plan: Plan, suite: SuiteSpec, target: int
) -> int:
    """The value of ``field`` that brings the number of parameters nearest to ``target``."""

    def excess(size: int) -> int:
        changed = config.model_copy(update={field: size})
        return _parameters(agent, changed, plan, suite) - target

    high = 1
    while excess(high) < 0:
        high *= 2
    low = high // 2  # too few at low, enough at high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if excess(middle) < 0 else (low, middle)
    return low if low and -excess(low) < excess(high) else high


def explain(owner: str, problem: Any) -> str:
    """One of pydantic's errors, naming the field and its value; a check of several fields may have
    found several things, a line each."""
    message = problem["msg"].removeprefix("Value error, ")
    if not problem["loc"]:
        return "\n".join(f"{owner}: {line}" for line in message.splitlines())
    field = str(problem["loc"][0])
    return f"{owner}: {field}={problem['input']!r}: {message[0].lower()}{message[1:]}"


def _variants_like(agent: type[Agent], config: AgentConfig) -> list[str]:
    """All variants of an algorithm, ``fixed{n}`` with the value that ``config`` has."""
    values = {k: f"{v:g}" if isinstance(v, float) else v for k, v in config.model_dump().items()}
    return [pattern.format_map(values) for pattern in agent.VARIANTS]
