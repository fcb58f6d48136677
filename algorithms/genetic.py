"""Genotype policies and their genetic algorithm: the part of MEGA that knows nothing of learning.

Source: MEGA, "Model Evolution Framework with Genetic Algorithm for Multi-Task Reinforcement
Learning", arXiv 2502.13569: Sec. 4.2 and App. A-B (genotypes and their weights, Eq. 5-9), Sec. 4.3
and App. C (genetic algorithm, Alg. 1-5), Sec. 4.4 (growth), Table 3 (settings).

Symbols: a task at *stage* N uses the modules M_1 .. M_N; ``p`` is the precision p_w in bits per
weight. Segment k (k = 1 .. N+1) of its genotype holds the k weights of m_0 .. m_{k-1}; it feeds M_k
or, as the last segment, the head. T tasks have populations of P genotypes each; together they are
the community. `Community` is asked which genotype runs an episode and told the episode's return.

**Departures** and readings where the paper is silent or cannot mean what it prints:

1. Eq. 5 counts the head as the last level, n_m = N + 1: the only reading that agrees with Fig. 1
   and Fig. 11. Most significant bit first, which the paper does not print; the other order would be
   the same algorithm, as every operator picks its bits uniformly.
2. Alg. 1 abandons "p_w * r_a" genotypes; it can only mean P * r_a. r_a is not published: half,
   rounded up, that is 2 of 3 (MT10) and 2 of 4 (MT50). An odd number is filled with a mutant last.
   Children that one optimisation inserts are not parents in the same optimisation.
3. A generation is P * max_evaluate_times episodes of the task, and fitness is the mean return over
   this generation's episodes, so that an old lucky return does not rule for ever. With several
   environments per task, an episode that an earlier generation began counts for none.
4. Unevaluated genotypes are taken in order of rank, the last generation's best first.
5. A child equal to a living genotype of its task is mutated until it differs: with one survivor,
   "two random" parents are one and the same and most crossovers would clone it.
6. The child of parents of other stages is cut or extended (with random bits) to its task's stage;
   a mutant's parent before it is mutated, so that every flip of Alg. 5 is in the child.
7. `grow` offers, beside Sec. 4.4's new random genotypes, two ways to keep what was learnt.

In this order: genotypes, weights, operators (all pure functions), then the `Community`.
"""

from __future__ import annotations

import json
import math
from base64 import b64decode, b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray

Bits = NDArray[np.uint8]
Weighting = Literal["half_softmax", "softmax"]
Align = Literal["front", "segment"]
Growth = Literal["random", "extend", "preserve"]
T = TypeVar("T")


def length(stage: int, precision: int) -> int:
    """l_g = p (n_m + 1) n_m / 2 bits with n_m = stage + 1 (Eq. 5)."""
    if stage < 0 or precision < 1:
        raise ValueError(f"no genotype has stage {stage} and precision {precision}")
    return precision * (stage + 1) * (stage + 2) // 2


def stage_of(bits: int, precision: int) -> int:
    """The stage whose genotypes have this many bits: the inverse of `length`.

    Raises ValueError, naming the nearest allowed length, if there is none.
    """
    below = max((math.isqrt(8 * max(bits, 0) // precision + 1) - 1) // 2 - 1, 0)
    nearest = min((below, below + 1), key=lambda stage: abs(length(stage, precision) - bits))
    if length(nearest, precision) != bits:
        raise ValueError(
            f"a genotype of {bits} bits fits no stage at precision {precision}: "
            f"the nearest is {length(nearest, precision)} bits (stage {nearest})"
        )
    return nearest


def _decimals(bits: ArrayLike, precision: int) -> tuple[NDArray[np.int64], int]:
    """All decimals (..., W) of genotypes (..., L) of one stage, and that stage."""
    array = np.asarray(bits)
    if array.dtype.kind not in "biu" or array.ndim == 0 or np.any((array != 0) & (array != 1)):
        raise ValueError("a genotype is a sequence of the integers 0 and 1")
    stage = stage_of(array.shape[-1], precision)
    powers = 1 << np.arange(precision - 1, -1, -1, dtype=np.int64)  # Departure 1
    return array.reshape(*array.shape[:-1], -1, precision) @ powers, stage


def decode(bits: ArrayLike, precision: int) -> list[NDArray[np.int64]]:
    """The decimals d_{i,j} of a genotype, one array per level (Sec. 4.2, Fig. 11).

    ``bits`` (..., L) -> N + 1 arrays; the k-th (..., k) feeds M_k, the last one the head.
    Raises ValueError for a length that no stage has.
    """
    decimals, stage = _decimals(bits, precision)
    return np.split(decimals, np.cumsum(np.arange(1, stage + 1)), axis=-1)


def encode(decimals: ArrayLike, precision: int) -> Bits:
    """The bits (W p,) of decimals (W,), all levels in a row: the inverse of `decode`.

    Raises ValueError for a decimal that the precision does not hold.
    """
    values = np.asarray(decimals)
    if values.size and not 0 <= values.min() <= values.max() < 2**precision:
        raise ValueError(f"decimals must be 0 to {2**precision - 1} at precision {precision}")
    places = np.arange(precision - 1, -1, -1)
    return ((values[:, None] >> places) & 1).astype(np.uint8).ravel()


def _exp(decimals: NDArray[np.float64]) -> NDArray[np.float64]:
    """e^d for decimals >= 0, divided by the largest of the last axis."""
    shifted: NDArray[np.float64] = np.exp(decimals - decimals.max(axis=-1, keepdims=True))
    return shifted


def _half_exp(decimals: NDArray[np.float64], offset: float) -> NDArray[np.float64]:
    """e^d - offset (Eq. 8) for decimals >= 0, divided by e^max; 1 where a segment is all zero.

    An all-zero segment weights its inputs alike for every offset; at offset 1 that is the limit.
    Elsewhere (e^d - 1) + (1 - offset), each part free of cancellation and of overflow.
    """
    if not 0.0 < offset <= 1.0:
        raise ValueError(f"offset must be in (0, 1], not {offset}")
    largest = decimals.max(axis=-1, keepdims=True)
    shifted = -np.exp(decimals - largest) * np.expm1(-decimals) + (1.0 - offset) * np.exp(-largest)
    return np.where(largest == 0.0, 1.0, shifted)


def _normalised(exponentials: NDArray[np.float64]) -> NDArray[np.float64]:
    """Divided by the sum of the last axis; rows of zeros stay zero."""
    # A running sum: zeros behind a row change nothing, so no weight depends on a matrix's size.
    total = exponentials.cumsum(axis=-1)[..., -1:]
    weights: NDArray[np.float64] = exponentials / np.where(total == 0.0, 1.0, total)
    return weights


def softmax(decimals: ArrayLike) -> NDArray[np.float64]:
    """w_j = e^{d_j} / sum_n e^{d_n} on the last axis, float64: MEGA's ablation (Eq. 6)."""
    return _normalised(_exp(np.asarray(decimals, dtype=np.float64)))


def half_softmax(decimals: ArrayLike, offset: float = 0.99) -> NDArray[np.float64]:
    """w_j = (e^{d_j} - offset) / sum_n (e^{d_n} - offset) on the last axis, float64 (Eq. 7-9).

    For decimals >= 0. Raises ValueError for an offset outside (0, 1].
    """
    return _normalised(_half_exp(np.asarray(decimals, dtype=np.float64), offset))


@lru_cache(maxsize=256)
def _triangle(levels: int, size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and column of each weight of a genotype in a matrix whose last row is the head."""
    rows, columns = np.tril_indices(levels)
    rows[rows == levels - 1] = size - 1
    return rows, columns


def weight_matrix(
    bits: ArrayLike,
    precision: int,
    function: Weighting = "half_softmax",
    offset: float = 0.99,
    size: int | None = None,
) -> NDArray[np.float64]:
    """The weights w_{i,j} of Eq. 4 of genotypes (..., L) as (..., size, size) float64.

    Row k - 1 weights m_0, m_1, .. (the columns) for M_k; the last row is the head's, whatever the
    size; rows of modules beyond the genotype's stage are zero. ``size`` defaults to stage + 1.
    ``offset`` belongs to HalfSoftmax alone. Raises ValueError for a length that no stage has, an
    offset outside (0, 1], an unknown function or a size below stage + 1.
    """
    weights, stage = _decimals(bits, precision)
    size = stage + 1 if size is None else size
    if size <= stage:
        raise ValueError(f"a genotype of stage {stage} does not fit a matrix of {size} levels")
    rows, columns = _triangle(stage + 1, size)
    decimals = np.zeros((*weights.shape[:-1], size, size))
    decimals[..., rows, columns] = weights
    # What is no weight holds decimal 0: never above a row's largest, and masked before the sum.
    used = np.zeros((size, size))
    used[rows, columns] = 1.0
    if function not in get_args(Weighting):
        raise ValueError(f"function must be half_softmax or softmax, not {function!r}")
    half = function == "half_softmax"
    exponentials = _half_exp(decimals, offset) if half else _exp(decimals)
    return _normalised(exponentials * used)


def weight_intervals(levels: int, precision: int, offset: float = 0.99) -> NDArray[np.float64]:
    """The reachable weights per level (Eq. 6, Fig. 12): (levels, 5).

    Columns: number of weights, Softmax minimum and maximum, HalfSoftmax minimum and maximum.
    """
    top = 2**precision - 1
    rows = np.empty((levels, 5))
    for level in range(1, levels + 1):
        least, most = np.full(level, top), np.zeros(level)
        least[0], most[0] = 0, top
        rows[level - 1] = (
            level,
            softmax(least)[0],
            softmax(most)[0],
            half_softmax(least, offset)[0],
            half_softmax(most, offset)[0],
        )
    return rows


def modules_reached(
    weights: NDArray[np.floating[Any]], threshold: float = 0.01
) -> NDArray[np.bool_]:
    """Which of M_1 .. M_N a chain of weights above the threshold connects to the head, (N,).

    ``weights`` (N + 1, N + 1) as from `weight_matrix`. The embedding m_0 is not a module.
    """
    above = weights > threshold
    reached: NDArray[np.bool_] = above[-1].copy()  # [j]: m_j reaches the head
    for module in range(len(above) - 1, 0, -1):
        if reached[module]:
            reached |= above[module - 1]
    return reached[1:]


def modules_used(weights: NDArray[np.floating[Any]], threshold: float = 0.01) -> int:
    """How many modules `modules_reached` finds."""
    return int(modules_reached(weights, threshold).sum())


def _random_bits(count: int, rng: Generator) -> Bits:
    return rng.integers(0, 2, size=count, dtype=np.uint8)


def _choose(items: Sequence[T], rng: Generator) -> T:
    return items[int(rng.integers(len(items)))]


def crossover_parents(
    population: Sequence[T], community: Sequence[T], threshold: float, rng: Generator
) -> tuple[T, T]:
    """Alg. 2; ``population`` is the task's, its best first, ``community`` everybody.

    The population's two are different ones, unless it has only one.
    """
    if rng.random() > threshold:  # lines 2-4
        return population[0], _choose(community, rng)
    if len(population) == 1:
        return population[0], population[0]
    first, second = rng.choice(len(population), 2, replace=False)  # line 6
    return population[int(first)], population[int(second)]


def mutation_parent(
    population: Sequence[T],
    community: Sequence[T],
    cross_threshold: float,
    best_threshold: float,
    rng: Generator,
) -> T:
    """Alg. 4; ``population`` is the task's, its best first, ``community`` everybody."""
    draw = rng.random()
    if draw > cross_threshold:  # lines 2-3
        return _choose(community, rng)
    if draw > best_threshold:  # lines 4-5
        return _choose(population, rng)
    return population[0]  # line 7


def fit(bits: Bits, stage: int, precision: int, align: Align, rng: Generator) -> Bits:
    """A copy cut or extended (with random bits) to the length of a stage.

    ``front`` works at the end of the string; ``segment`` keeps the head a head: it drops or inserts
    the segments of whole modules before it, and the head's last weights.
    """
    wanted, old = length(stage, precision), stage_of(len(bits), precision)
    if stage == old:
        return bits.copy()
    if align == "front":
        return np.concatenate([bits[:wanted], _random_bits(max(wanted - len(bits), 0), rng)])
    head = len(bits) - precision * (old + 1)
    if stage < old:
        body = wanted - precision * (stage + 1)
        return np.concatenate([bits[:body], bits[head : head + wanted - body]])
    new_weights = precision * (stage - old)
    inserted = wanted - len(bits) - new_weights
    return np.concatenate(
        [bits[:head], _random_bits(inserted, rng), bits[head:], _random_bits(new_weights, rng)]
    )


def crossover(
    first: Bits,
    second: Bits,
    *,
    rate: float,
    align: Align,
    stage: int,
    precision: int,
    rng: Generator,
) -> Bits:
    """Alg. 3: the longer parent with max(1, floor(l * rate)) of its bits from the shorter one.

    l is the shorter length; of two parents of one length the first counts as the longer. ``front``
    aligns the strings at their first bit (Alg. 3 literally), ``segment`` module with module and
    head with head. The child is then fitted to ``stage``, its task's own.
    """
    longer, shorter = (first, second) if len(first) >= len(second) else (second, first)  # line 1
    size = len(shorter)  # line 2
    positions = rng.choice(size, max(1, math.floor(size * rate)), replace=False)  # lines 3-4
    targets = positions
    if align == "segment":
        low = stage_of(size, precision)
        high = stage_of(len(longer), precision)
        head = size - precision * (low + 1)
        shift = (len(longer) - precision * (high + 1)) - head
        targets = np.where(positions >= head, positions + shift, positions)
    child = longer.copy()  # line 5
    child[targets] = shorter[positions]  # lines 6-8
    return fit(child, stage, precision, align, rng)


def mutate(bits: Bits, rate: float, rng: Generator) -> Bits:
    """Alg. 5: a copy with max(1, floor(l * rate)) different positions flipped."""
    size = len(bits)  # line 1
    positions = rng.choice(size, max(1, math.floor(size * rate)), replace=False)  # lines 2-3
    child = bits.copy()  # line 4
    child[positions] ^= 1  # lines 5-7
    return child


def grow(bits: Bits, precision: int, growth: Growth, rng: Generator) -> Bits:
    """A genotype of the next stage (Sec. 4.4).

    ``random`` (the paper): nothing is kept. ``extend``: the bits stay in front of a random segment,
    so that the old head feeds M_{N+1}. ``preserve``: M_{N+1} gets a random segment, and the head a
    weight of decimal 0 for it. HalfSoftmax gives a zero beside the old head at most
    (1 - offset) / (e - offset), so no weight changes by more. An all-zero head, where one more zero
    would count as an equal, first becomes all ones: the same policy.
    """
    stage = stage_of(len(bits), precision)
    if growth == "random":
        return _random_bits(length(stage + 1, precision), rng)
    if growth == "extend":
        return np.concatenate([bits, _random_bits(precision * (stage + 2), rng)])
    body, head = np.split(bits, [len(bits) - precision * (stage + 1)])
    if not head.any():
        head = np.ones_like(head)
    segment = _random_bits(precision * (stage + 1), rng)
    return np.concatenate([body, segment, head, np.zeros(precision, np.uint8)])


@dataclass(frozen=True, kw_only=True)
class GeneticSettings:
    """How populations are evaluated and bred (Table 3, Alg. 1-5).

    The fields are those of `algorithms.mega.MEGAConfig`, which says what they mean and checks them.
    """

    population_size: int = 3
    precision: int = 2
    max_evaluate_times: int = 2
    generation: Literal["episodes", "all_twice"] = "episodes"
    fitness: Literal["generation", "running_mean", "last"] = "generation"
    best_selection_prob: float = 0.5
    optimise: Literal["genetic", "random"] = "genetic"
    abandon_rate: float = 0.5
    parents: Literal["survivors", "before_drop"] = "survivors"
    clones: Literal["mutate", "keep"] = "mutate"
    crossover_rate: float = 0.5
    crossover_cross_threshold: float = 0.9
    align: Align = "front"
    mutation_rate: float = 0.15
    mutation_cross_threshold: float = 0.95
    mutation_best_threshold: float = 0.5
    growth: Growth = "random"
    replace: Literal["at_optimise", "at_once"] = "at_optimise"

    def check_room(self, stage: int) -> None:
        """Raises ValueError where a population of a stage has more members than there are
        genotypes of its length and none may be a clone."""
        fewest = 2 ** length(stage, self.precision)
        if self.clones == "mutate" and self.population_size > fewest:
            raise ValueError(
                f"{self.population_size} different genotypes do not exist at stage {stage} and "
                f"precision {self.precision}: there are {fewest}"
            )

    @property
    def abandoned(self) -> int:
        """How many genotypes one optimisation drops and breeds anew."""
        worst = math.ceil(round(self.population_size * self.abandon_rate, 9))  # Departure 2
        return min(max(worst, 1), self.population_size - 1)

    @property
    def survivors(self) -> int:
        """How many it keeps."""
        return self.population_size - self.abandoned

    @property
    def crossed(self) -> int:
        """How many of them crossover breeds: of each pair one, the others are mutants (Alg. 1)."""
        return self.abandoned // 2


def hamming(population: Sequence[Bits]) -> float:
    """Mean pairwise Hamming distance of genotypes (L,), as a share of their length."""
    bits = np.stack(population)  # (P, L)
    members, size = bits.shape
    ones = bits.sum(axis=0, dtype=np.int64)
    return float((ones * (members - ones)).sum() / (size * members * (members - 1) / 2))


def padded(genotypes: Sequence[Sequence[Bits]], shape: tuple[int, ...]) -> NDArray[np.int8]:
    """Genotypes [T][P] as ``shape`` (T, P) and L, -1 where there is none or it has ended."""
    longest = max((len(bits) for row in genotypes for bits in row), default=0)
    out = np.full((*shape, longest), -1, dtype=np.int8)
    for task, row in enumerate(genotypes):
        for member, bits in enumerate(row):
            out[task, member, : len(bits)] = bits
    return out


class GenotypeTable:
    """Every distinct genotype of a run under a number that never changes, as packed bits."""

    def __init__(self, text: str = "") -> None:
        """``text``: what `str` made of another table."""
        self._packed = [b64decode(entry) for entry in text.split()]
        self._ids = {packed: number for number, packed in enumerate(self._packed)}

    def __str__(self) -> str:
        return " ".join(b64encode(packed).decode() for packed in self._packed)

    def __getitem__(self, number: int) -> Bits:
        """The bits (L,) of a genotype, read-only."""
        if not 0 <= number < len(self._packed):
            raise IndexError(f"no genotype has the number {number}")
        bits = np.unpackbits(np.frombuffer(self._packed[number], np.uint8))
        bits = bits[: np.flatnonzero(bits)[-1]]
        bits.flags.writeable = False
        return bits

    def add(self, bits: Bits) -> int:
        """The number of these bits, a new one if they are new."""
        # A closing 1 marks where the bits end, before the zeros that fill the last byte.
        packed = np.packbits(np.append(bits, np.uint8(1))).tobytes()
        number = self._ids.setdefault(packed, len(self._packed))
        if number == len(self._packed):
            self._packed.append(packed)
        return number


@dataclass(slots=True, eq=False)
class Genotype:
    """A living genotype policy of one task. Two with the same bits share the ``id`` only."""

    id: int
    """Its number in the community's table."""
    bits: Bits
    """(L,), read-only."""
    evaluations: int = 0
    """Episodes in this generation."""
    returns: float = 0.0
    """Sum of the returns that make its fitness."""
    count: int = 0
    """Their number."""
    lived: int = 0
    """Episodes in its whole life that counted."""

    @property
    def fitness(self) -> float:
        """Unscaled episode return, nan while unevaluated."""
        return self.returns / self.count if self.count else math.nan


Learnt = Callable[[Genotype], Bits]
"""A living genotype to the bits that it has come to."""


@dataclass(slots=True, eq=False)
class _Flight:
    """An episode under way."""

    genotype: Genotype
    counts: bool
    generation: int
    """The task's when it began."""


class Community:
    """C = {P_1, .., P_T}: all task populations, asked for genotypes and told returns (Alg. 1).

    A population is ordered: survivors by fitness, then their children. "Best" is the first of the
    highest fitness; while nothing is evaluated, the first (its fitness is then nan).
    """

    stage: NDArray[np.int64]
    """(T,), the stage of each task; its genotypes may be shorter until its next optimisation."""
    generation: NDArray[np.int64]
    """(T,), optimisations so far."""
    table: GenotypeTable

    def __init__(self, stages: Sequence[int], settings: GeneticSettings, rng: Generator) -> None:
        """``stages`` (T,) are the tasks' start stages; ``rng`` (PCG64) drives every choice.

        Raises ValueError for a stage below 1, or one that has too few genotypes (`check_room`).
        """
        if len(stages) == 0 or min(stages) < 1:
            raise ValueError("a community needs tasks, each at stage 1 or higher")
        settings.check_room(min(stages))
        self.settings = settings
        self.table = GenotypeTable()
        self.stage = np.array(stages, dtype=np.int64)
        self.generation = np.zeros(len(stages), dtype=np.int64)
        self._rng = rng
        self._children = np.zeros(len(stages), dtype=np.int64)
        self._clones = np.zeros(len(stages), dtype=np.int64)
        self._gone = np.zeros(len(stages), dtype=np.int64)
        self._culled = np.zeros(len(stages), dtype=np.int64)
        self._flights: list[dict[int, _Flight]] = [{} for _ in stages]
        self._champions: list[Genotype | None] = [None] * len(stages)
        self._judged: list[list[tuple[int, float]]] = [[] for _ in stages]
        self._populations = [self._random_population(task) for task in range(len(stages))]

    def population(self, task: int) -> tuple[Genotype, ...]:
        """The living genotypes (P) of a task."""
        return tuple(self._populations[task])

    def best(self, task: int) -> Genotype:
        """G_best: the fittest as far as is known, the first while nothing is evaluated."""
        population = self._populations[task]
        best, fitness = population[0], -math.inf
        for genotype in population:
            if genotype.count and genotype.fitness > fitness:
                best, fitness = genotype, genotype.fitness
        return best

    def champion(self, task: int) -> Genotype:
        """The best of the last complete generation, though it may live no more; `best` before that.

        While a generation is under way, `best` compares single returns of some of its genotypes.
        """
        return self._champions[task] or self.best(task)

    def draw(self, task: int) -> Genotype:
        """The best with probability ``best_selection_prob``, otherwise one uniformly."""
        if self._rng.random() < self.settings.best_selection_prob:
            return self.best(task)
        return _choose(self._populations[task], self._rng)

    def ask(self, task: int, env: int, warmup: bool = False) -> Genotype:
        """The genotype for the episode that starts in an environment of a task (Sec. 4.3).

        The first that is neither evaluated in this generation nor being so, then as `draw`. A
        ``warmup`` episode draws uniformly and will count for nothing. An episode that was under way
        there is forgotten.
        """
        flights = self._flights[task]
        flights.pop(env, None)
        if warmup:
            genotype = _choose(self._populations[task], self._rng)
        else:
            genotype = self._due(task) or self.draw(task)
        flights[env] = _Flight(genotype, not warmup, int(self.generation[task]))
        return genotype

    def in_flight(self, task: int, env: int) -> Genotype:
        """The genotype of the episode under way there; RuntimeError if there is none."""
        return self._flight(task, env).genotype

    def counts(self, task: int, env: int) -> bool:
        """Whether the episode under way there counts: begun after the warm-up, and since the last
        `clear_fitness`. RuntimeError if there is none."""
        return self._flight(task, env).counts

    def _flight(self, task: int, env: int) -> _Flight:
        try:
            return self._flights[task][env]
        except KeyError:
            raise RuntimeError(f"no episode is under way in task {task}, env {env}") from None

    def tell(self, task: int, env: int, return_: float, learnt: Learnt | None = None) -> bool:
        """The episode under way there ended; True if that completed a generation and bred the next.

        The return goes to the very genotype that was asked for, if its generation still lasts and
        it still lives; otherwise the episode counts for nothing (Departure 3). ``learnt`` gives the
        bits that each genotype of the task has come to. It is asked after the generation is judged
        and before the next is bred; a genotype whose bits changed counts as unevaluated. Raises
        RuntimeError if no episode is under way, ValueError if the return is not finite.
        """
        genotype = self.in_flight(task, env)
        if not math.isfinite(return_):
            raise ValueError(f"the return of an episode of task {task} is {return_}")
        flight = self._flights[task].pop(env)
        population = self._populations[task]
        if not self._is_of_this_generation(task, flight) or genotype not in population:
            return False
        genotype.evaluations += 1
        genotype.lived += 1
        if self.settings.fitness == "last":
            genotype.returns, genotype.count = 0.0, 0
        genotype.returns += float(return_)
        genotype.count += 1
        if not self._complete(population):
            return False
        ranked = self._ranked(task)
        self._champions[task] = ranked[0]
        self._judged[task] = [(genotype.id, genotype.fitness) for genotype in ranked]
        changed = self._inherit(task, learnt)
        self._replace(task, self._optimised(task))
        for genotype in changed:
            genotype.returns, genotype.count = 0.0, 0
        self.generation[task] += 1
        return True

    def clear_fitness(self) -> None:
        """Restart every generation, best first: the networks behind the returns are no more."""
        self._champions = [None] * len(self._champions)
        self._judged = [[] for _ in self._judged]
        for task, population in enumerate(self._populations):
            self._populations[task] = self._ranked(task)
            for genotype in population:
                genotype.evaluations, genotype.returns, genotype.count = 0, 0.0, 0
            for flight in self._flights[task].values():
                flight.counts = False

    def _is_of_this_generation(self, task: int, flight: _Flight) -> bool:
        return flight.counts and flight.generation == self.generation[task]

    def _due(self, task: int) -> Genotype | None:
        """The genotype that most lacks evaluations, those under way included, if one does: of the
        unevaluated the first, so the last generation's best (Departure 4)."""
        least, due = self._evaluations_each, None
        for genotype in self._populations[task]:
            under_way = sum(
                flight.genotype is genotype and self._is_of_this_generation(task, flight)
                for flight in self._flights[task].values()
            )
            if genotype.evaluations + under_way < least:
                least, due = genotype.evaluations + under_way, genotype
        return due

    @property
    def _evaluations_each(self) -> int:
        """How often each genotype is evaluated before any is chosen by fitness."""
        return self.settings.max_evaluate_times if self.settings.generation == "all_twice" else 1

    def _complete(self, population: list[Genotype]) -> bool:
        evaluations = [genotype.evaluations for genotype in population]
        # With several environments per task, some genotypes' later episodes may end before others'
        # first; so no genotype is judged unevaluated. With one environment the sum decides.
        return (
            sum(evaluations) >= len(population) * self.settings.max_evaluate_times  # Departure 3
            and min(evaluations) >= self._evaluations_each
        )

    def lengthen(self, task: int, learnt: Learnt | None = None) -> int:
        """Move a task up one stage (Sec. 4.4) and return it; the setting ``growth`` says how.

        With ``at_once`` the task's generation restarts with the new genotypes, grown from what the
        old ones have ``learnt`` (as in `tell`).
        """
        self.stage[task] += 1
        if self.settings.replace == "at_once":
            self._inherit(task, learnt)
            self._replace(task, self._grown(task))
        return int(self.stage[task])

    def _replace(self, task: int, population: list[Genotype]) -> None:
        gone = [genotype for genotype in self._populations[task] if genotype not in population]
        self._gone[task] += len(gone)
        self._culled[task] += sum(genotype.lived == 0 for genotype in gone)
        self._populations[task] = population

    def _inherit(self, task: int, learnt: Learnt | None) -> list[Genotype]:
        """Write what was learnt into a task's genotypes; those whose bits changed."""
        if learnt is None:
            return []
        changed = []
        for genotype in self._populations[task]:
            bits = learnt(genotype)
            if not np.array_equal(bits, genotype.bits):
                bits.flags.writeable = False
                genotype.bits, genotype.id = bits, self.table.add(bits)
                changed.append(genotype)
        return changed

    def _new(self, bits: Bits) -> Genotype:
        bits.flags.writeable = False
        return Genotype(self.table.add(bits), bits)

    def _random_population(self, task: int) -> list[Genotype]:
        size = length(int(self.stage[task]), self.settings.precision)
        return [
            self._new(_random_bits(size, self._rng)) for _ in range(self.settings.population_size)
        ]

    def _ranked(self, task: int) -> list[Genotype]:
        """The population, fittest first; unevaluated ones last, in their order."""

        def unfitness(genotype: Genotype) -> float:
            return -genotype.fitness if genotype.count else math.inf

        return sorted(self._populations[task], key=unfitness)

    def _grown(self, task: int) -> list[Genotype]:
        """The ranked population, each genotype too short for the task's stage replaced in place."""
        stage, precision = int(self.stage[task]), self.settings.precision
        grown = []
        for genotype in self._ranked(task):
            bits = genotype.bits
            while stage_of(len(bits), precision) < stage:
                bits = grow(bits, precision, self.settings.growth, self._rng)
            grown.append(genotype if bits is genotype.bits else self._new(bits))
        return grown

    def _optimised(self, task: int) -> list[Genotype]:
        """Alg. 1, lines 3-12, for one population."""
        settings = self.settings
        if settings.optimise == "random":
            return self._random_population(task)
        outgrown = len(self._populations[task][0].bits) < length(
            int(self.stage[task]), settings.precision
        )
        population = self._grown(task)  # line 3: the best is the first
        if outgrown and settings.growth == "random":
            return population  # Sec. 4.4: all new, nothing to select from
        survivors = population[: -settings.abandoned]  # line 4
        for genotype in survivors:
            genotype.evaluations = 0
            if settings.fitness == "generation":
                genotype.returns, genotype.count = 0.0, 0
        parents = survivors if settings.parents == "survivors" else population
        return survivors + self._bred(task, survivors, parents)

    def _bred(
        self, task: int, survivors: list[Genotype], parents: list[Genotype]
    ) -> list[Genotype]:
        """Alg. 1, lines 5-12: crossover children and mutants in pairs, an odd one a mutant."""
        settings, rng = self.settings, self._rng
        stage = int(self.stage[task])
        community = [
            genotype
            for other, population in enumerate(self._populations)
            for genotype in (parents if other == task else population)
        ]
        living = {genotype.bits.tobytes() for genotype in survivors}
        children = []
        for number in range(settings.abandoned):
            if number % 2 == 0 and number + 1 < settings.abandoned:
                first, second = crossover_parents(
                    parents, community, settings.crossover_cross_threshold, rng
                )  # line 6
                bits = crossover(
                    first.bits,
                    second.bits,
                    rate=settings.crossover_rate,
                    align=settings.align,
                    stage=stage,
                    precision=settings.precision,
                    rng=rng,
                )  # line 7
            else:
                parent = mutation_parent(
                    parents,
                    community,
                    settings.mutation_cross_threshold,
                    settings.mutation_best_threshold,
                    rng,
                )  # line 8
                fitted = fit(parent.bits, stage, settings.precision, settings.align, rng)
                bits = mutate(fitted, settings.mutation_rate, rng)  # line 9
            self._children[task] += 1
            if bits.tobytes() in living:
                self._clones[task] += 1
                if settings.clones == "mutate":
                    bits = self._differing(bits, living)
            living.add(bits.tobytes())
            children.append(self._new(bits))  # line 10
        return children

    def _differing(self, bits: Bits, living: set[bytes]) -> Bits:
        """Mutate until no living genotype is equal."""
        for _ in range(100):
            bits = mutate(bits, self.settings.mutation_rate, self._rng)
            if bits.tobytes() not in living:
                return bits
        # Flips of a fixed number of bits do not lead everywhere (of all bits, to two places).
        while bits.tobytes() in living:
            bits = _random_bits(len(bits), self._rng)
        return bits

    def hamming(self) -> NDArray[np.float64]:
        """(T,) `hamming` of each population."""
        return np.array([hamming([g.bits for g in population]) for population in self._populations])

    def clone_rate(self) -> NDArray[np.float64]:
        """(T,) share of the children so far that came out equal to a living genotype of their task.

        Counted before such a child is mutated; 0 before the first child.
        """
        return self._clones / np.maximum(self._children, 1)

    def probe(self) -> dict[str, np.ndarray]:
        """The populations as arrays.

        genotypes (T, P, L) int8, padded with -1; lengths, evaluations (T, P) int64; fitness (T, P),
        nan where unevaluated; best (T,), index of `best`; hamming, clone_rate, generation (T,);
        gone (T,), genotypes replaced so far, and culled (T,), those of them never evaluated. And of
        the last complete generation, best first: judged (T, P, L) as genotypes, and judged_fitness
        (T, P), -1 and nan before there was one.
        """
        judged = [[self.table[number] for number, _ in task] for task in self._judged]
        fitness = np.full((len(judged), self.settings.population_size), np.nan)
        for task, found in enumerate(self._judged):
            fitness[task, : len(found)] = [value for _, value in found]
        lengths = np.array([[len(g.bits) for g in p] for p in self._populations])
        return {
            "genotypes": padded([[g.bits for g in p] for p in self._populations], lengths.shape),
            "judged": padded(judged, lengths.shape),
            "judged_fitness": fitness,
            "lengths": lengths,
            "fitness": np.array([[g.fitness for g in p] for p in self._populations]),
            "evaluations": np.array([[g.evaluations for g in p] for p in self._populations]),
            "best": np.array([p.index(self.best(t)) for t, p in enumerate(self._populations)]),
            "hamming": self.hamming(),
            "clone_rate": self.clone_rate(),
            "generation": self.generation.copy(),
            "gone": self._gone.copy(),
            "culled": self._culled.copy(),
        }

    def state_dict(self) -> dict[str, Any]:
        """All that the next choices depend on, as numbers, strings and lists (fit for JSON)."""

        def place(task: int, genotype: Genotype) -> list[int]:
            """Its place in the population, -1 if it lives no more and is known by its id alone."""
            population = self._populations[task]
            return [population.index(genotype) if genotype in population else -1, genotype.id]

        in_flight = [
            [task, env, *place(task, flight.genotype), int(flight.counts), flight.generation]
            for task, flights in enumerate(self._flights)
            for env, flight in flights.items()
        ]
        champions = [
            None if champion is None else place(task, champion)
            for task, champion in enumerate(self._champions)
        ]
        return {
            "rng": json.dumps(self._rng.bit_generator.state),
            "table": str(self.table),
            "stage": self.stage.tolist(),
            "generation": self.generation.tolist(),
            "children": self._children.tolist(),
            "clones": self._clones.tolist(),
            "gone": self._gone.tolist(),
            "culled": self._culled.tolist(),
            "populations": [
                [[g.id, g.evaluations, g.returns, g.count, g.lived] for g in population]
                for population in self._populations
            ],
            "in_flight": in_flight,
            "champions": champions,
            "judged": [[list(pair) for pair in task] for task in self._judged],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`; raises ValueError for a community of other numbers."""
        shape = [len(population) for population in state["populations"]]
        if shape != [self.settings.population_size] * len(self._populations):
            raise ValueError(
                f"the state holds populations of {shape}, this community "
                f"{len(self._populations)} of {self.settings.population_size}"
            )
        self._rng.bit_generator.state = json.loads(state["rng"])
        self.table = GenotypeTable(state["table"])
        self.stage = np.array(state["stage"], dtype=np.int64)
        self.generation = np.array(state["generation"], dtype=np.int64)
        self._children = np.array(state["children"], dtype=np.int64)
        self._clones = np.array(state["clones"], dtype=np.int64)
        self._gone = np.array(state["gone"], dtype=np.int64)
        self._culled = np.array(state["culled"], dtype=np.int64)
        self._populations = [
            [
                Genotype(number, self.table[number], evaluations, returns, count, lived)
                for number, evaluations, returns, count, lived in population
            ]
            for population in state["populations"]
        ]

        def at(task: int, member: int, number: int) -> Genotype:
            gone = member < 0
            return Genotype(number, self.table[number]) if gone else self._populations[task][member]

        self._flights = [{} for _ in self._populations]
        # Earlier checkpoints know neither in which generation a flight began nor what was judged.
        for task, env, member, number, counts, *began in state["in_flight"]:
            genotype, (generation,) = at(task, member, number), began or [self.generation[task]]
            self._flights[task][env] = _Flight(genotype, bool(counts), int(generation))
        self._judged = [
            [(number, fitness) for number, fitness in task]
            for task in state.get("judged", [[] for _ in self._populations])
        ]
        self._champions = [
            None if place is None else at(task, *place)
            for task, place in enumerate(state["champions"])
        ]
