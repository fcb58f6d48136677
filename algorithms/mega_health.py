"""Whether MEGA's genotypes, modules and stages do what the paper means them to, in plain words.

Verdicts on a run's records, for `bench doctor` and the report; training uses none of this.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from algorithms.agent import Finding, History
from algorithms.genetic import modules_reached, stage_of, weight_matrix
from algorithms.sac import listed

Config = Any
"""MEGA's; `algorithms.mega` imports this module."""

SAME_NETWORK = 0.1
"""Mean difference of weights of tasks' best genotypes below which they are one network."""


def findings(history: History) -> list[Finding]:
    """All verdicts; none before the first probe."""
    if not history.probes:
        return []
    config: Config = history.config
    last = history.probes[-1][1]
    late = [p for step, p in history.probes if step > history.plan.steps_per_task // 2] or [last]
    return [
        _diversity(history.tasks, late, config),
        *_clusters(last, config),
        _growth(history, last, config),
        *_after_growth(history, last, config),
        *_culled(last),
        *_dead_modules(late, config),
        _clones(last, config),
    ]


def _diversity(
    tasks: tuple[str, ...], probes: list[dict[str, np.ndarray]], config: Config
) -> Finding:
    """Whether the genotypes of a population still differ by more than mutation alone would bring
    into copies of one."""
    mean = np.mean([probe["hamming"] for probe in probes], axis=0)  # (T,)
    alone = np.mean([_of_copies(probe["lengths"][:, 0], config) for probe in probes], axis=0)
    collapsed = mean <= 1.1 * alone
    words = (
        f"genotypes of one task differ in {100 * mean.mean():.0f} % of their bits (random ones: "
        f"50 %, copies of one and their mutants: {100 * alone.mean():.0f} %)"
    )
    if not collapsed.any():
        return Finding("population", "good", words)
    # One survivor and its mutants is what Alg. 1 makes of three genotypes, of which it drops two.
    by_design = config.genetic(config.population_size, config.precision).survivors == 1
    return Finding(
        "population", "note" if by_design else "bad",
        f"collapsed in {listed(tasks, collapsed)}: {words}",
        "raise mutation_rate or population_size, or lower abandon_rate: more genotypes survive",
    )  # fmt: skip


def _of_copies(lengths: NDArray[np.int64], config: Config) -> NDArray[np.float64]:
    """(T,) mean pairwise Hamming distance, as a share of the length, in a population of copies of
    one genotype and of its fresh mutants, as many as an optimisation makes of them."""
    if config.optimise == "random":
        return np.zeros(len(lengths))
    size = config.population_size
    genetic = config.genetic(size, config.precision)
    # With one genotype to cross, a crossover child is its clone: kept as it is, or mutated.
    mutants = genetic.abandoned - (genetic.crossed if config.clones == "keep" else 0)
    flipped = np.maximum(np.floor(lengths * config.mutation_rate), 1) / lengths
    apart = mutants * (size - mutants) * flipped  # a copy and a mutant
    apart = apart + mutants * (mutants - 1) / 2 * 2 * flipped * (1 - flipped)  # two mutants
    distances: NDArray[np.float64] = apart / (size * (size - 1) / 2)
    return distances


def _evaluated(probe: dict[str, np.ndarray]) -> NDArray[np.int8]:
    """The genotype of each task that evaluation runs, (T, L), -1 where it has ended."""
    if "evaluated" in probe:
        return probe["evaluated"]
    best: NDArray[np.int8] = probe["genotypes"][np.arange(len(probe["best"])), probe["best"]]
    return best  # runs of version 0.1 recorded the fittest so far in the generation under way


def _matrices(probe: dict[str, np.ndarray], config: Config) -> NDArray[np.float64]:
    """The weights of each task's genotype, (T, N + 1, N + 1) with the N of the longest."""
    precision, best = int(probe["precision"]), _evaluated(probe)
    lengths = (best >= 0).sum(1)
    levels = stage_of(int(lengths.max()), precision) + 1
    matrices = np.empty((len(best), levels, levels))
    for size in np.unique(lengths):  # of one stage at a time
        genotypes = best[lengths == size, :size]
        matrices[lengths == size] = weight_matrix(
            genotypes, precision, config.weights, config.offset, levels
        )
    return matrices


def _clusters(probe: dict[str, np.ndarray], config: Config) -> Iterator[Finding]:
    """Whether the genotypes still tell the tasks apart."""
    matrices = _matrices(probe, config)
    flat = matrices.reshape(len(matrices), -1)
    tasks = len(flat)
    if tasks < 2:
        return
    bits = (_evaluated(probe) >= 0).sum(1).tolist()
    levels = np.array([stage_of(count, int(probe["precision"])) + 1 for count in bits])
    # Half the L1 distance of two levels is the share of their input that differs, 0 to 1.
    distance = np.abs(flat[:, None] - flat[None]).sum(-1) / 2 / np.maximum.outer(levels, levels)
    mean = distance.sum() / (tasks * (tasks - 1))
    share = 100 * mean
    words = f"the genotypes of two tasks weight {share:.0f} % of what modules read differently"
    if mean >= SAME_NETWORK:
        yield Finding("tasks apart", "good", words)
    elif config.task_identity != "genotype":
        yield Finding("tasks apart", "note", words)
    else:
        yield Finding(
            "tasks apart", "bad",
            f"all tasks are in one cluster: {words}, and the actor knows the task by nothing else",
            "raise crossover_cross_threshold and mutation_cross_threshold: tasks breed with each "
            "other less",
        )  # fmt: skip


def _growth(history: History, probe: dict[str, np.ndarray], config: Config) -> Finding:
    """Whether stages come to rest."""
    stage, events = probe["stage"], probe["stage_events"]
    low, high = int(stage.min()), int(stage.max())
    words = f"stages {low} to {high}" if low < high else f"stage {low} in every task"
    if not config.evolve:
        return Finding("growth", "good", f"{words}, fixed")
    if (full := stage >= config.max_stage).any():
        return Finding(
            "growth", "bad", f"{listed(history.tasks, full)} stand at max_stage {config.max_stage}",
            "growth is unbounded: lower solved_threshold or progress_threshold, or lengthen window",
        )  # fmt: skip
    since = history.plan.steps_per_task * 3 // 4
    growing = np.isin(np.arange(len(stage)), events[events[:, 0] > since, 1])
    if growing.mean() > 0.5:
        return Finding(
            "growth", "note",
            f"{words}; {listed(history.tasks, growing)} grew in the last quarter of training",
            "no end of growth in sight; a larger window or a lower progress_threshold slows it",
        )  # fmt: skip
    return Finding(
        "growth",
        "good",
        f"{words}; stage increases: {len(events)}, tasks that grew late: {growing.sum()}",
    )


def _after_growth(
    history: History, probe: dict[str, np.ndarray], config: Config
) -> Iterator[Finding]:
    """What a stage increase did to training, a window of episodes before and after it."""
    span = (config.window or 1) * history.plan.horizon
    tasks, success, return_ = [], [], []
    for step, task, *_ in probe["stage_events"].tolist():
        before = (history.steps > step - span) & (history.steps <= step)
        after = (history.steps > step) & (history.steps <= step + span)
        if before.any() and after.any():
            tasks.append(task)
            success.append([np.nanmean(history.success[m, task]) for m in (before, after)])
            return_.append([np.nanmean(history.return_[m, task]) for m in (before, after)])
    if not success:
        return
    (s0, s1), (r0, r1) = np.mean(success, axis=0), np.mean(return_, axis=0)
    words = (
        f"over {len(success)} stage increases the success rate went from {s0:.2f} to {s1:.2f} and "
        f"the return from {r0:.0f} to {r1:.0f}, a window before to a window after"
    )
    advice = "growth=preserve keeps what was learnt"
    if s1 < s0 - 0.1 or (r0 > 0 and r1 < 0.8 * r0):
        yield Finding("after growth", "bad", words, advice)
        return
    # What one task loses disappears in the mean of all; a single window is noisy, so half of it.
    halved = np.zeros(len(history.tasks), dtype=bool)
    for task in set(tasks):
        r0, r1 = np.mean(return_, axis=0, where=np.equal(tasks, task)[:, None])
        halved[task] = r0 > max(2 * r1, 0)
    if halved.any():
        words = f"{words}; it fell by half in {listed(history.tasks, halved)}"
        yield Finding("after growth", "note", words, advice)
    else:
        yield Finding("after growth", "good", words)


def _culled(probe: dict[str, np.ndarray]) -> Iterator[Finding]:
    """Whether genotypes were replaced unseen."""
    if "gone" not in probe:  # runs of version 0.1 did not count them
        return
    gone, culled = int(probe["gone"].sum()), int(probe["culled"].sum())
    words = f"{culled} of {gone} replaced genotypes had run no episode that counted"
    if culled <= 0.05 * gone:
        yield Finding("evaluation", "good", words)
    else:
        yield Finding("evaluation", "bad", words, "use replace=at_optimise")


def _dead_modules(probes: list[dict[str, np.ndarray]], config: Config) -> Iterator[Finding]:
    """Whether some module is read by nobody."""
    # A stage that has just risen may be no genotype's yet.
    matrices = [_matrices(probe, config) for probe in probes]
    used = np.zeros(max(each.shape[1] for each in matrices) - 1, dtype=bool)
    for matrix in (matrix for each in matrices for matrix in each):
        reached = modules_reached(matrix)
        used[: len(reached)] |= reached
    dead = [f"M_{k}" for k in np.flatnonzero(~used) + 1]
    if not dead:
        yield Finding("modules", "good", f"all {len(used)} modules feed some task's head")
    else:
        yield Finding(
            "modules", "note", f"{', '.join(dead)} of {len(used)} modules fed no task's head "
            "through weights above 0.01 in the second half of training",
        )  # fmt: skip


def _clones(probe: dict[str, np.ndarray], config: Config) -> Finding:
    """Whether crossover brings anything new: a mutant nearly always does."""
    rate = float(probe["clone_rate"].mean())
    words = f"{100 * rate:.0f} % of the children equalled a living genotype of their task"
    genetic = config.genetic(config.population_size, config.precision)
    crossed = 0.0 if config.optimise == "random" else genetic.crossed / genetic.abandoned
    if rate <= 0.5 * crossed:
        return Finding("clones", "good", words)
    words = f"{words}, and crossover makes {100 * crossed:.0f} % of them"
    advice = "a larger population_size or parents=before_drop gives crossover two parents"
    return Finding("clones", "note", words, advice)
