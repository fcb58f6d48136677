"""The worlds: suites of tasks by name. Nothing heavy is imported before a suite is loaded."""

from __future__ import annotations

from suites.base import Suite, plugins, registered, unknown

GOALS = ("fresh", "benchmark50")
REWARD_VERSIONS = ("v2", "v1")
MAX_HORIZON = 500
"""Steps after which Meta-World itself refuses to go on; the limit of all suites."""

_LOADERS = {
    "mt": "suites.metaworld:load",
    "custom": "suites.metaworld:load",
    "toy": "suites.toy:load",
}
"""How a suite's name begins -> "module:function" with the signature of `load`."""

_GOALS = {"fixed": "one goal per task and run", "rand": "a new goal in every episode"}
_NAMES = {
    **{
        f"mt{size}_{kind}": f"Meta-World's MT{size}, {goals}"
        for size in (10, 25, 50)
        for kind, goals in _GOALS.items()
    },
    **{f"mt1_{kind}:<task>": f"one task of Meta-World, {goals}" for kind, goals in _GOALS.items()},
    **{
        f"custom_{kind}:<task>+<task>": f"any tasks of Meta-World, {goals}"
        for kind, goals in _GOALS.items()
    },
    "toy": "3 point masses, learnable in seconds: for tests and trying things out",
    "toy<tasks>": "1 to 500 of them",
    "toy_opposite": "2 point masses that look alike and want opposite actions",
    "toy_opposite<tasks>": "1 to 500 of them",
}


def names() -> list[str]:
    """What `load` takes, patterns such as ``mt1_rand:<task>`` as text, for listings."""
    return list(described())


def described() -> dict[str, str]:
    """`names`, each with what it is."""
    others = [prefix for prefix in plugins("suite") if prefix not in _LOADERS]
    return _NAMES | {f"{prefix}...": "of an installed package" for prefix in others}


def load(
    name: str, *, goals: str = "fresh", reward_version: str = "v2", horizon: int = 200
) -> Suite:
    """The suite of this name.

    ``goals``: "fresh" draws goals from the tasks' whole ranges, "benchmark50" from the 50 that
    Meta-World's benchmarks use per task. ``reward_version``: Meta-World's reward "v2" or "v1"
    (success goes by the v2 rule with both). ``horizon``: steps per episode, 1 to 500.

    Raises ValueError for what is unknown, naming it, what is allowed and what comes nearest.
    """
    if goals not in GOALS:
        raise ValueError(unknown("goals", goals, GOALS))
    if reward_version not in REWARD_VERSIONS:
        raise ValueError(unknown("reward_version", reward_version, REWARD_VERSIONS))
    if isinstance(horizon, bool) or not isinstance(horizon, int):
        raise ValueError(f"horizon {horizon!r} is not a whole number of steps")
    if not 1 <= horizon <= MAX_HORIZON:
        raise ValueError(f"horizon {horizon} is outside 1 to {MAX_HORIZON} steps")
    loaders = _LOADERS | plugins("suite")
    prefix = max((p for p in loaders if name.startswith(p)), key=len, default=None)
    if prefix is None:
        raise ValueError(unknown("suite", name, names()))
    make = registered("suite", prefix, _LOADERS)
    try:
        suite = make(name, goals=goals, reward_version=reward_version, horizon=horizon)
    except Exception as error:
        if prefix in _LOADERS or isinstance(error, ValueError):  # it says what is wrong
            raise
        raise ValueError(
            f"suite {name!r}: {loaders[prefix]} failed: {type(error).__name__}: {error}"
        ) from None
    if not isinstance(suite, Suite):
        made = type(suite).__name__
        raise ValueError(f"suite {name!r}: {loaders[prefix]} made a {made} and no Suite")
    return suite
