"""Genotypes, weights, operators and populations against the paper's equations and algorithms."""

from __future__ import annotations

import json
import math
from decimal import Decimal, getcontext
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from algorithms.genetic import (
    Community,
    GeneticSettings,
    GenotypeTable,
    crossover,
    crossover_parents,
    decode,
    encode,
    fit,
    grow,
    half_softmax,
    length,
    modules_used,
    mutate,
    mutation_parent,
    softmax,
    stage_of,
    weight_intervals,
    weight_matrix,
)
from algorithms.mega import MEGAConfig

FIG_11 = "1110 0110 1011 0111 1101 0010 0101 0111 0000 1011"
STAGES = st.integers(1, 9)
PRECISIONS = st.integers(1, 8)
SEEDS = st.integers(0, 2**32)
ALIGN = st.sampled_from(["front", "segment"])
RATES = st.floats(0.0, 1.0)
few = settings(max_examples=60, deadline=None)


def parse(text: str) -> np.ndarray:
    return np.array([int(bit) for bit in text.replace(" ", "")], dtype=np.uint8)


def random_bits(stage: int, precision: int, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 2, length(stage, precision), dtype=np.uint8)


def split(bits: np.ndarray, precision: int) -> list[np.ndarray]:
    """The bits of each segment, by an explicit walk."""
    segments, start, weights = [], 0, 1
    while start < len(bits):
        segments.append(bits[start : start + precision * weights])
        start, weights = start + precision * weights, weights + 1
    return segments


# Genotypes and weights


@few
@given(STAGES, PRECISIONS, SEEDS)
def test_encode_is_the_inverse_of_decode(stage: int, precision: int, seed: int) -> None:
    bits = random_bits(stage, precision, np.random.default_rng(seed))
    decimals = np.concatenate(decode(bits, precision))
    np.testing.assert_array_equal(encode(decimals, precision), bits)
    for wrong in (-1, 2**precision):
        with pytest.raises(ValueError, match="decimals must be 0 to"):
            encode([wrong], precision)


def test_worked_example_of_figure_11() -> None:
    levels = decode(parse(FIG_11), 4)
    assert [level.tolist() for level in levels] == [[14], [6, 11], [7, 13, 2], [5, 7, 0, 11]]
    weights = half_softmax(levels[2])
    by_hand = np.exp([7.0, 13.0, 2.0]) - 0.99
    np.testing.assert_allclose(weights, by_hand / by_hand.sum(), rtol=1e-12)


def test_length_is_equation_5_with_the_head_as_last_level() -> None:
    assert [length(stage, 1) for stage in (1, 2, 3, 16)] == [3, 6, 10, 153]
    assert length(3, 2) == 20
    assert length(3, 4) == len(parse(FIG_11)) == 40
    for precision in range(1, 9):
        for stage in range(25):
            n_m = stage + 1
            assert length(stage, precision) == precision * (n_m + 1) * n_m // 2
            assert stage_of(length(stage, precision), precision) == stage
            levels = decode(np.zeros(length(stage, precision), int), precision)
            assert [len(level) for level in levels] == list(range(1, stage + 2))


@pytest.mark.parametrize(("bits", "nearest"), [(39, 40), (41, 40), (51, 60), (0, 4), (49, 40)])
def test_a_length_of_no_stage_is_refused_and_the_nearest_named(bits: int, nearest: int) -> None:
    with pytest.raises(ValueError, match=rf"{bits} bits .* nearest is {nearest} bits"):
        decode(np.zeros(bits, int), 4)


def test_a_genotype_holds_zeros_and_ones() -> None:
    for wrong in ([0, 2, 1], [0, -1, 1], [0.0, 1.0, 1.0]):
        with pytest.raises(ValueError, match="0 and 1"):
            decode(np.array(wrong), 1)


def test_intervals_of_figure_12() -> None:
    table = weight_intervals(4, 2)
    assert table[:, 0].tolist() == [1, 2, 3, 4]
    assert table[0, 1:].tolist() == [1, 1, 1, 1]
    soft = [[0.047426, 0.952574], [0.024289, 0.909443], [0.016325, 0.870049]]
    half = [[0.000523, 0.999477], [0.000262, 0.998954], [0.000175, 0.998431]]
    np.testing.assert_allclose(table[1:, 1:3], soft, atol=5e-7)
    np.testing.assert_allclose(table[1:, 3:5], half, atol=5e-7)
    for i in range(2, 6):  # Eq. 6
        low, high = weight_intervals(i, 4)[-1, 1:3]
        assert low == pytest.approx(1 / (1 + (i - 1) * math.exp(15)))
        assert high == pytest.approx(math.exp(15) / (math.exp(15) + i - 1))


OFFSETS = st.one_of(
    st.sampled_from([1.0, 1 - 2**-53, 0.999, 0.99, 0.9, 1e-300]),
    st.floats(0.0, 1.0, exclude_min=True),
)


@few
@given(st.lists(st.integers(0, 255), min_size=1, max_size=25), OFFSETS)
def test_half_softmax_is_equations_7_to_9_to_the_last_digits(
    decimals: list[int], offset: float
) -> None:
    getcontext().prec = 200
    terms = [Decimal(d).exp() - Decimal(offset) for d in decimals]
    total = sum(terms)
    exact = [float(t / total) if total else 1 / len(terms) for t in terms]
    weights = half_softmax(decimals, offset)
    assert weights.dtype == np.float64
    np.testing.assert_allclose(weights, exact, rtol=1e-12, atol=0)
    exact_softmax = np.exp(np.array(decimals) - max(decimals))
    np.testing.assert_allclose(softmax(decimals), exact_softmax / exact_softmax.sum(), rtol=1e-12)


@pytest.mark.parametrize("offset", [1e-12, 0.5, 0.9, 0.99, 0.999, 1.0])
def test_zeros_weigh_alike_at_every_offset(offset: float) -> None:
    for i in range(1, 26):
        assert (half_softmax(np.zeros(i, int), offset) == 1 / i).all()
        assert (softmax(np.zeros(i, int)) == 1 / i).all()
    matrix = weight_matrix(np.zeros(length(24, 2), int), 2, offset=offset)
    assert matrix[-1].tolist() == [1 / 25] * 25


def test_an_offset_of_one_silences_zeros_completely() -> None:
    assert half_softmax([[0, 3], [0, 255]], 1.0).tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize("offset", [0.0, -0.1, 1.0001, math.nan])
def test_an_offset_outside_its_interval_is_refused(offset: float) -> None:
    with pytest.raises(ValueError, match="offset"):
        half_softmax([1, 2], offset)
    with pytest.raises(ValueError, match="offset"):
        weight_matrix(parse(FIG_11), 4, offset=offset)


@few
@given(STAGES, PRECISIONS, SEEDS, st.integers(0, 3), st.sampled_from(["half_softmax", "softmax"]))
def test_weight_matrix_is_the_weights_level_by_level(
    stage: int, precision: int, seed: int, extra: int, function: Any
) -> None:
    rng = np.random.default_rng(seed)
    batch = np.stack([random_bits(stage, precision, rng) for _ in range(2)])
    size = stage + 1 + extra
    matrices = weight_matrix(batch, precision, function, 0.9, size)
    assert matrices.shape == (2, size, size)
    for bits, matrix in zip(batch, matrices, strict=True):
        expected = np.zeros((size, size))
        for k, decimals in enumerate(decode(bits, precision), start=1):
            row = -1 if k == stage + 1 else k - 1
            weights = softmax(decimals) if function == "softmax" else half_softmax(decimals, 0.9)
            expected[row, :k] = weights
        np.testing.assert_array_equal(matrix, expected)  # to the bit, whatever the size
    with pytest.raises(ValueError, match="does not fit"):
        weight_matrix(batch, precision, size=stage)


def test_modules_used_follow_chains_to_the_head() -> None:
    # Head <- M_3 <- M_1 <- m_0; M_2 feeds nobody. Precision 2: 11 is all, 00 is 0.0005.
    assert modules_used(weight_matrix(parse("11 1100 001100 00000011"), 2)) == 2
    assert modules_used(weight_matrix(parse("11 1100 001100 11000000"), 2)) == 0  # m_0 only
    assert modules_used(weight_matrix(parse("11 0011 000011 00000011"), 2)) == 3
    assert modules_used(weight_matrix(parse("11 0011 000011 00000011"), 2, size=7)) == 3
    assert modules_used(weight_matrix(parse("11 1100 001100 11000000"), 2), threshold=1e-5) == 3


# Operators


@few
@given(STAGES, STAGES, STAGES, PRECISIONS, RATES, ALIGN, SEEDS)
def test_crossover_overwrites_exactly_its_share(
    one: int, two: int, stage: int, precision: int, rate: float, align: Any, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    low, high = sorted((one, two))
    short = np.ones(length(low, precision), np.uint8)
    long = np.zeros(length(high, precision), np.uint8)
    first, second = (long, short) if low == high or seed % 2 else (short, long)

    def cross(target: int) -> np.ndarray:
        return crossover(
            first, second, rate=rate, align=align, stage=target, precision=precision, rng=rng
        )

    child = cross(high)
    assert len(child) == len(long)
    assert child.sum() == max(1, math.floor(len(short) * rate))
    assert not long.any()  # parents untouched
    assert short.all()
    if align == "front":
        assert not child[len(short) :].any()
    else:
        for k, segment in enumerate(split(child, precision), start=1):
            if k == high + 1:  # the longer head: only its first weights meet the shorter head
                assert not segment[precision * (low + 1) :].any()
            elif k > low:  # modules that the shorter parent does not have
                assert not segment.any()
    assert len(cross(stage)) == length(stage, precision)


def test_segment_alignment_crosses_head_with_head() -> None:
    short, long = np.ones(length(1, 2), np.uint8), np.zeros(length(3, 2), np.uint8)
    rng = np.random.default_rng(0)
    child = crossover(long, short, rate=1.0, align="segment", stage=3, precision=2, rng=rng)
    assert child.tolist() == parse("11 0000 000000 11110000").tolist()
    child = crossover(long, short, rate=1.0, align="front", stage=3, precision=2, rng=rng)
    assert child.tolist() == parse("11 1111 000000 00000000").tolist()
    child = crossover(long, short, rate=1.0, align="segment", stage=1, precision=2, rng=rng)
    assert child.all()


@few
@given(STAGES, STAGES, PRECISIONS, ALIGN, SEEDS)
def test_fitting_keeps_what_both_stages_have(
    old: int, new: int, precision: int, align: Any, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    bits = random_bits(old, precision, rng)
    fitted = fit(bits, new, precision, align, rng)
    assert stage_of(len(fitted), precision) == new
    if align == "front":
        common = min(len(bits), len(fitted))
        assert (fitted[:common] == bits[:common]).all()
        return
    before, after = split(bits, precision), split(fitted, precision)
    for k in range(min(old, new)):
        assert (before[k] == after[k]).all()
    common = precision * (min(old, new) + 1)
    assert (before[-1][:common] == after[-1][:common]).all()


@few
@given(STAGES, PRECISIONS, RATES, SEEDS)
def test_mutation_flips_exactly_its_share(
    stage: int, precision: int, rate: float, seed: int
) -> None:
    bits = random_bits(stage, precision, np.random.default_rng(seed))
    before = bits.copy()
    child = mutate(bits, rate, np.random.default_rng(seed))
    assert (child != bits).sum() == max(1, math.floor(len(bits) * rate))
    assert (bits == before).all()
    assert (child == mutate(bits, rate, np.random.default_rng(seed))).all()


def test_published_rates_flip_three_and_cross_ten_of_twenty_bits() -> None:
    rng = np.random.default_rng(0)
    zeros, ones = np.zeros(20, np.uint8), np.ones(20, np.uint8)
    assert mutate(zeros, 0.15, rng).sum() == 3
    child = crossover(zeros, ones, rate=0.5, align="front", stage=3, precision=2, rng=rng)
    assert child.sum() == 10


def test_crossover_parents_are_drawn_at_the_published_rate() -> None:
    rng, draws = np.random.default_rng(0), 20_000
    population, community = ["best", "b", "c"], ["x", "y", "best", "b", "c"]
    pairs = [crossover_parents(population, community, 0.9, rng) for _ in range(draws)]
    foreign = [pair for pair in pairs if pair[1] in ("x", "y")]
    # n > 0.9, then 2 of the community's 5; standard error 0.0014
    assert len(foreign) / draws == pytest.approx(0.1 * 2 / 5, abs=0.006)
    assert {pair[0] for pair in foreign} == {"best"}
    unordered = [frozenset(pair) for pair in pairs]
    for two in combinations(population, 2):
        # An own pair in 0.9 of the draws, any of three; or the best with this other one in 0.1 / 5.
        expected = 0.9 / 3 + (0.1 / 5 if "best" in two else 0)
        assert unordered.count(frozenset(two)) / draws == pytest.approx(expected, abs=0.015)
    assert crossover_parents(["only"], ["only", "x"], 1.0, rng) == ("only", "only")


def test_mutation_parents_are_drawn_at_the_published_rates() -> None:
    rng, draws = np.random.default_rng(0), 20_000
    population, community = ["best", "b", "c"], ["x", "y", "best", "b", "c"]
    drawn = [mutation_parent(population, community, 0.95, 0.5, rng) for _ in range(draws)]
    for name, expected in {
        "best": 0.5 + 0.45 / 3 + 0.05 / 5,
        "b": 0.45 / 3 + 0.05 / 5,
        "c": 0.45 / 3 + 0.05 / 5,
        "x": 0.05 / 5,
        "y": 0.05 / 5,
    }.items():
        assert drawn.count(name) / draws == pytest.approx(expected, abs=0.015), name


@few
@given(STAGES, PRECISIONS, st.sampled_from([0.9, 0.99, 0.999, 1.0]), SEEDS, st.booleans())
def test_preserving_growth_keeps_the_policy(
    stage: int, precision: int, offset: float, seed: int, silent_head: bool
) -> None:
    rng = np.random.default_rng(seed)
    bits = random_bits(stage, precision, rng)
    if silent_head:
        bits[-precision * (stage + 1) :] = 0
    grown = grow(bits, precision, "preserve", rng)
    assert stage_of(len(grown), precision) == stage + 1
    before = weight_matrix(bits, precision, offset=offset)
    after = weight_matrix(grown, precision, offset=offset)
    assert (after[:stage, :stage] == before[:stage, :stage]).all()  # M_1 .. M_N as they were
    bound = (1 - offset) / (math.e - offset) + 1e-12
    assert np.abs(after[-1, :-1] - before[-1]).max() <= bound
    assert after[-1, -1] <= bound
    if not silent_head and bits[-precision * (stage + 1) :].any():
        old_head = bits[-precision * (stage + 1) :]
        assert (split(grown, precision)[-1] == np.append(old_head, [0] * precision)).all()


def test_preserving_growth_of_a_loud_head_moves_it_by_the_smallest_weight() -> None:
    grown = grow(np.ones(20, np.uint8), 2, "preserve", np.random.default_rng(0))
    smallest = weight_intervals(5, 2)[-1, 3]
    head = weight_matrix(grown, 2)[-1]
    assert head[-1] == pytest.approx(smallest)
    assert np.abs(head[:-1] - 0.25).max() < smallest


@few
@given(STAGES, PRECISIONS, SEEDS)
def test_extending_growth_keeps_the_bits_in_front(stage: int, precision: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    bits = random_bits(stage, precision, rng)
    extended = grow(bits, precision, "extend", rng)
    assert stage_of(len(extended), precision) == stage + 1
    assert (extended[: len(bits)] == bits).all()
    assert stage_of(len(grow(bits, precision, "random", rng)), precision) == stage + 1


def test_table_numbers_distinct_genotypes_for_ever() -> None:
    table = GenotypeTable()
    strings = [[0], [0, 0], [0, 0, 0], [1], [1, 0], [0] * 8, [1] * 8, [0] * 20, [1, 0] * 77]
    numbers = [table.add(np.array(bits, np.uint8)) for bits in strings]
    assert numbers == list(range(len(strings)))
    assert table.add(np.array([1, 0], np.uint8)) == 4
    for copy in (table, GenotypeTable(str(table))):
        assert [copy[number].tolist() for number in numbers] == strings
        assert copy.add(np.array([0, 0, 0], np.uint8)) == 2
    with pytest.raises(ValueError, match="read-only"):
        table[0][0] = 1
    with pytest.raises(IndexError, match="no genotype"):
        table[len(strings)]


# Settings


@pytest.mark.parametrize(
    "wrong",
    [
        {"population_size": 1},
        {"precision": 9},
        {"precision": 0},
        {"max_evaluate_times": 0},
        {"best_selection_prob": 1.1},
        {"crossover_rate": -0.1},
        {"mutation_rate": math.nan},
        {"mutation_best_threshold": 0.96},
        {"generation": "both"},
        {"growth": "none"},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MEGAConfig(**wrong)


def test_half_the_population_is_dropped_and_never_all() -> None:
    assert [GeneticSettings(population_size=n).abandoned for n in range(2, 9)] == [
        *(1, 2, 2, 3, 3, 4, 4)
    ]
    assert GeneticSettings(population_size=3, abandon_rate=2 / 3).abandoned == 2
    assert GeneticSettings(population_size=4, abandon_rate=1.0).abandoned == 3
    assert GeneticSettings(population_size=4, abandon_rate=0.0).abandoned == 1


def test_impossible_communities_are_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="stage 1"):
        Community([3, 0], GeneticSettings(), rng)
    with pytest.raises(ValueError, match="there are 8"):
        Community([1], GeneticSettings(precision=1, population_size=9), rng)


# Populations


def community(tasks: int = 2, stage: int = 3, seed: int = 0, **options: Any) -> Community:
    return Community([stage] * tasks, GeneticSettings(**options), np.random.default_rng(seed))


def run_episode(group: Community, task: int, return_: float, env: int = 0) -> bool:
    group.ask(task, env)
    return group.tell(task, env, return_)


def by_bits(group: Community, task: int, env: int = 0) -> float:
    """A return that the genotype itself decides: its share of ones."""
    return float(group.in_flight(task, env).bits.mean())


def run_generation(group: Community, task: int) -> int:
    for episodes in range(1, 100):
        group.ask(task, 0)
        if group.tell(task, 0, by_bits(group, task)):
            return episodes
    raise AssertionError("the generation does not end")


@pytest.mark.parametrize(("size", "times"), [(3, 2), (4, 2), (2, 1), (5, 3)])
def test_a_generation_takes_both_branches_and_ends_in_time(size: int, times: int) -> None:
    group = community(population_size=size, max_evaluate_times=times)
    for generation in range(1, 6):
        living = group.population(0)
        for episode in range(size * times):
            if episode >= size:  # all are evaluated: best or uniform
                assert all(genotype.evaluations for genotype in living)
            genotype = group.ask(0, 0)
            if episode < size:  # the unevaluated, in order
                assert genotype is living[episode]
                assert math.isnan(genotype.fitness)
            assert group.in_flight(0, 0) is genotype
            assert group.tell(0, 0, float(episode)) == (episode == size * times - 1)
        assert group.generation.tolist() == [generation, 0]


def test_the_evaluated_are_drawn_best_first_at_the_published_rate() -> None:
    group = community(tasks=1, max_evaluate_times=10_000)
    counts: dict[Any, int] = {}
    for return_ in (1.0, 3.0, 2.0):
        run_episode(group, 0, return_)
    best = group.population(0)[1]
    for _ in range(6000):
        genotype = group.ask(0, 0)
        counts[genotype] = counts.get(genotype, 0) + 1
        group.tell(0, 0, genotype.fitness)
    assert group.best(0) is best
    assert counts[best] / 6000 == pytest.approx(0.5 + 0.5 / 3, abs=0.03)
    assert min(counts.values()) / 6000 == pytest.approx(0.5 / 3, abs=0.03)
    drawn = [group.draw(0) for _ in range(6000)]
    assert drawn.count(best) / 6000 == pytest.approx(0.5 + 0.5 / 3, abs=0.03)


def test_all_twice_evaluates_each_alike() -> None:
    group = community(population_size=4, generation="all_twice")
    for _ in range(3):
        told = []
        done = False
        while not done:
            told.append(group.ask(0, 0))
            done = group.tell(0, 0, by_bits(group, 0))
        assert [told.count(genotype) for genotype in dict.fromkeys(told)] == [2, 2, 2, 2]
        assert len(set(told[:4])) == 4


@pytest.mark.parametrize(
    ("fitness", "now", "next_generation", "after_ten"),
    [
        ("generation", 2.0, math.nan, 10.0),
        ("running_mean", 2.0, 2.0, (1 + 2 + 3 + 2 + 10) / 5),
        ("last", 3.0, 2.0, 10.0),
    ],
)
def test_fitness(fitness: Any, now: float, next_generation: float, after_ten: float) -> None:
    group = community(tasks=1, fitness=fitness, best_selection_prob=1.0)
    elite = group.best(0)
    for return_ in (1.0, -5.0, -9.0, 2.0, 3.0):  # the last two go to the best, the first
        assert not run_episode(group, 0, return_)
    assert elite.fitness == pytest.approx(now)
    assert run_episode(group, 0, 2.0)
    assert group.population(0)[0] is elite
    assert elite.evaluations == 0
    assert elite.fitness == pytest.approx(next_generation, nan_ok=True)
    assert all(math.isnan(genotype.fitness) for genotype in group.population(0)[1:])
    assert group.ask(0, 0) is elite  # evaluated anew, whatever its fitness is made of
    group.tell(0, 0, 10.0)
    assert elite.fitness == pytest.approx(after_ten)


@few
@given(st.integers(2, 8), st.integers(1, 4), SEEDS, st.sampled_from(["survivors", "before_drop"]))
def test_optimisation_keeps_the_best_and_replaces_the_worst(
    size: int, precision: int, seed: int, parents: Any
) -> None:
    group = community(seed=seed, population_size=size, precision=precision, parents=parents)
    rng = np.random.default_rng(seed)
    for _ in range(3):
        before = group.population(1)
        heard: dict[Any, list[float]] = {genotype: [] for genotype in before}
        done = False
        while not done:
            genotype, return_ = group.ask(1, 0), float(rng.normal())
            heard[genotype].append(return_)
            done = group.tell(1, 0, return_)
        ranked = sorted(before, key=lambda genotype: -np.mean(heard[genotype]))
        after, kept = group.population(1), size - group.settings.abandoned
        assert list(after[:kept]) == ranked[:kept]  # the same ones, best first: elitism
        assert not set(after[kept:]) & set(before)
        assert len({genotype.id for genotype in after[kept:]}) == size - kept
        assert all(len(genotype.bits) == length(3, precision) for genotype in after)
        assert all((group.table[genotype.id] == genotype.bits).all() for genotype in after)


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8])
def test_children_come_in_pairs_and_an_odd_one_is_a_mutant(size: int) -> None:
    """Parents of zeros only: a crossover child has no ones, a mutant of 20 bits has three."""
    group = community(tasks=1, population_size=size, clones="keep", fitness="last")
    for genotype in group.population(0):
        genotype.bits = np.zeros(20, np.uint8)
    run_generation(group, 0)
    children = group.population(0)[size - group.settings.abandoned :]
    ones = [int(child.bits.sum()) for child in children]
    pairs = len(children) // 2
    assert ones == [0, 3] * pairs + [3] * (len(children) % 2)


def test_clones_are_counted_and_by_choice_mutated() -> None:
    keep, mutated = community(clones="keep"), community(clones="mutate")
    for group in (keep, mutated):
        for _ in range(30):
            for task in range(2):
                run_generation(group, task)
                distinct = {genotype.id for genotype in group.population(task)}
                if group is mutated:
                    assert len(distinct) == 3
    # One survivor crosses with itself in 9 of 10 cases: nearly half of all children.
    assert keep.clone_rate() == pytest.approx([0.45, 0.45], abs=0.1)
    assert mutated.clone_rate() == pytest.approx([0.45, 0.45], abs=0.1)
    assert (keep.hamming() < mutated.hamming()).all()


@pytest.mark.parametrize("rate", [0.0, 0.7, 1.0])
def test_clones_can_always_be_avoided(rate: float) -> None:
    group = community(stage=1, precision=1, population_size=8, mutation_rate=rate)
    for _ in range(20):
        run_generation(group, 0)
        ids = [genotype.id for genotype in group.population(0)]
        assert len(set(ids[4:])) == 4
        assert not set(ids[4:]) & set(ids[:4])


def test_without_the_genetic_algorithm_everything_is_redrawn() -> None:
    group = community(optimise="random")
    before = group.population(0)
    assert run_generation(group, 0) == 6
    assert not set(before) & set(group.population(0))
    assert not {g.id for g in before} & {g.id for g in group.population(0)}
    assert group.lengthen(0) == 4
    run_generation(group, 0)
    assert {len(genotype.bits) for genotype in group.population(0)} == {length(4, 2)}


def test_best_is_the_first_while_nothing_is_evaluated_and_records_say_so() -> None:
    group = community()
    assert group.best(0) is group.population(0)[0]
    probe = group.probe()
    assert probe["best"].tolist() == [0, 0]
    assert np.isnan(probe["fitness"]).all()
    run_episode(group, 0, -7.0)
    run_episode(group, 0, -5.0)
    assert group.best(0) is group.population(0)[1]
    assert group.probe()["best"].tolist() == [1, 0]


def test_warm_up_counts_for_nothing() -> None:
    group = community()
    drawn = set()
    for _ in range(60):
        drawn.add(group.ask(0, 0, warmup=True))
        assert not group.tell(0, 0, 5.0)
    assert drawn == set(group.population(0))
    assert group.probe()["evaluations"].sum() == 0
    assert group.generation.tolist() == [0, 0]
    group.ask(0, 1, warmup=True)  # nor does it keep anybody from being evaluated
    assert [group.ask(0, env) for env in (2, 3, 4)] == list(group.population(0))


def test_environments_do_not_evaluate_the_same_genotype_by_accident() -> None:
    group = community(population_size=4)
    assert [group.ask(0, env) for env in range(4)] == list(group.population(0))
    group.ask(0, 2)  # the episode there is forgotten and its genotype due again
    assert group.in_flight(0, 2) is group.population(0)[2]
    group = community(population_size=4, generation="all_twice")
    asked = [group.ask(0, env) for env in range(8)]
    assert [asked.count(genotype) for genotype in group.population(0)] == [2, 2, 2, 2]


def test_a_return_is_never_credited_to_another_genotype() -> None:
    group = community(tasks=1, best_selection_prob=0.0)
    elite, _, worst = group.population(0)
    for return_ in (10.0, 2.0, 1.0):
        run_episode(group, 0, return_)
    while group.ask(0, 1) is not elite:
        pass
    while group.ask(0, 2) is not worst:
        pass
    while not group.tell(0, 0, group.ask(0, 0).fitness):
        pass
    assert group.population(0)[0] is elite
    assert worst not in group.population(0)
    assert not group.tell(0, 2, 1000.0)  # its genotype is gone
    assert np.isnan(group.probe()["fitness"]).all()
    assert not group.tell(0, 1, 4.0)  # this one survived; the generation that asked for it has not
    assert np.isnan(group.probe()["fitness"]).all()


@few
@given(st.integers(1, 12), SEEDS, st.sampled_from(["episodes", "all_twice"]), st.booleans())
def test_no_genotype_is_culled_before_it_is_evaluated(
    envs: int, seed: int, generation: Any, interleaved: bool
) -> None:
    group = community(tasks=1, seed=seed, generation=generation, population_size=4)
    for env in range(envs):
        group.ask(0, env)
    for _ in range(12):
        for env in range(envs):
            before = group.population(0)
            told = {genotype for genotype in before if genotype.evaluations}
            told.add(group.in_flight(0, env))
            if group.tell(0, env, by_bits(group, 0, env)):
                assert set(before) <= told
            if interleaved:
                group.ask(0, env)
        if not interleaved:
            for env in range(envs):
                group.ask(0, env)
    assert envs * 12 / 8 * 0.4 - 2 <= group.generation[0] <= envs * 12 / 8


def test_wrong_episodes_are_refused() -> None:
    group = community()
    with pytest.raises(RuntimeError, match="task 1, env 3"):
        group.tell(1, 3, 0.0)
    group.ask(1, 3)
    with pytest.raises(ValueError, match="task 1 is nan"):
        group.tell(1, 3, math.nan)


# Growth of a task


@pytest.mark.parametrize("growth", ["random", "extend", "preserve"])
def test_genotypes_are_replaced_at_the_next_optimisation(growth: Any) -> None:
    group = community(growth=growth, fitness="last", seed=3)
    before = group.population(0)
    for return_ in (1.0, 3.0, 2.0):
        run_episode(group, 0, return_)
    assert group.lengthen(0) == 4
    assert group.stage.tolist() == [4, 3]
    assert group.population(0) == before
    assert [run_episode(group, 0, genotype.fitness) for genotype in before] == [False, False, True]
    elite = max(before, key=lambda genotype: genotype.fitness)
    after = group.population(0)
    assert {len(genotype.bits) for genotype in after} == {length(4, 2)}
    assert all(math.isnan(genotype.fitness) for genotype in after)
    if growth == "extend":
        assert (after[0].bits[:20] == elite.bits).all()
    if growth == "preserve":
        assert (
            weight_matrix(after[0].bits, 2)[:3, :3] == weight_matrix(elite.bits, 2)[:3, :3]
        ).all()
    assert {len(genotype.bits) for genotype in group.population(1)} == {20}
    assert run_generation(group, 0) == 6
    assert {len(genotype.bits) for genotype in group.population(0)} == {length(4, 2)}


@pytest.mark.parametrize("growth", ["random", "extend", "preserve"])
def test_genotypes_are_replaced_at_once_by_choice(growth: Any) -> None:
    group = community(growth=growth, replace="at_once")
    for return_ in (1.0, 3.0, 2.0, 2.5):
        run_episode(group, 0, return_)
    elite, stale = group.best(0), group.ask(0, 5)
    assert group.lengthen(0) == 4
    assert {len(genotype.bits) for genotype in group.population(0)} == {length(4, 2)}
    if growth == "extend":  # the best is first, so it stays the best until something is evaluated
        assert (group.best(0).bits[:20] == elite.bits).all()
    assert group.in_flight(0, 5) is stale
    assert not group.tell(0, 5, 99.0)
    assert group.generation[0] == 0
    assert run_generation(group, 0) == 6  # the generation starts again


@pytest.mark.parametrize("align", ["front", "segment"])
@pytest.mark.parametrize("replace", ["at_optimise", "at_once"])
def test_stages_cross_and_every_child_has_its_tasks_stage(align: Any, replace: Any) -> None:
    stages = [1, 3, 6]
    group = Community(
        stages,
        GeneticSettings(
            align=align,
            replace=replace,
            population_size=4,
            crossover_cross_threshold=0.1,
            mutation_cross_threshold=0.2,
            mutation_best_threshold=0.1,
        ),
        np.random.default_rng(0),
    )
    for generation in range(40):
        for task in range(3):
            if generation % 15 == 14:
                group.lengthen(task)
            run_generation(group, task)
            bits = length(int(group.stage[task]), 2)
            assert {len(genotype.bits) for genotype in group.population(task)} == {bits}
    assert group.stage.tolist() == [3, 5, 8]


def test_clearing_fitness_keeps_stages_and_genotypes() -> None:
    group = community()
    for return_ in (1.0, 3.0, 2.0):
        run_episode(group, 0, return_)
    elite, before = group.best(0), set(group.population(0))
    group.ask(0, 0)
    group.clear_fitness()
    assert set(group.population(0)) == before
    assert np.isnan(group.probe()["fitness"]).all()
    assert group.best(0) is elite
    assert not group.tell(0, 0, 9.0)  # its episode began with the old networks
    assert np.isnan(group.probe()["fitness"]).all()
    assert run_generation(group, 0) == 6


# Search, records, continuation


def test_selection_beats_chance() -> None:
    """The share of ones rises under the genetic algorithm and not under random redrawing."""
    mean = {}
    for optimise in ("genetic", "random"):
        group = community(tasks=4, optimise=optimise, seed=1)
        for _ in range(60):
            for task in range(4):
                run_generation(group, task)
        mean[optimise] = np.mean([g.bits.mean() for t in range(4) for g in group.population(t)])
    assert mean["random"] == pytest.approx(0.5, abs=0.1)
    assert mean["genetic"] > 0.8


def test_probe_shows_the_populations() -> None:
    group = community(population_size=4, replace="at_once")
    run_episode(group, 1, 2.0)
    group.lengthen(0)
    probe = group.probe()
    assert probe["genotypes"].shape == (2, 4, 30)
    assert probe["genotypes"].dtype == np.int8
    assert probe["lengths"].tolist() == [[30] * 4, [20] * 4]
    assert (probe["genotypes"][1, :, 20:] == -1).all()
    for member, genotype in enumerate(group.population(1)):
        assert (probe["genotypes"][1, member, :20] == genotype.bits).all()
    assert probe["fitness"][1, 0] == 2.0
    assert probe["evaluations"].tolist() == [[0] * 4, [1, 0, 0, 0]]
    assert probe["generation"].tolist() == [0, 0]
    assert probe["clone_rate"].tolist() == [0, 0]
    pairs = combinations(probe["genotypes"][0], 2)
    assert probe["hamming"][0] == pytest.approx(np.mean([(a != b).mean() for a, b in pairs]))


def drive(group: Community, rng: np.random.Generator, steps: int) -> list[Any]:
    """Two environments, growth and updates' draws, in an order that ``rng`` decides."""
    record: list[Any] = []
    for _ in range(steps):
        task, env = int(rng.integers(3)), int(rng.integers(2))
        if rng.random() < 0.04:
            group.lengthen(task)
        warmup = bool(rng.random() < 0.1)
        record.append((group.ask(task, env, warmup).id, group.draw(task).id, group.best(task).id))
        if rng.random() < 0.9:
            return_: Any = np.float32(by_bits(group, task, env) + rng.normal())
            record.append(group.tell(task, env, return_))
    return record


@settings(max_examples=25, deadline=None)
@given(
    SEEDS,
    st.integers(0, 80),
    st.sampled_from(["random", "extend", "preserve"]),
    st.sampled_from(["at_optimise", "at_once"]),
    st.sampled_from(["generation", "running_mean", "last"]),
)
def test_continuation_is_exact(
    seed: int, steps: int, growth: Any, replace: Any, fitness: Any
) -> None:
    options = {"growth": growth, "replace": replace, "fitness": fitness, "population_size": 4}
    one, two = (community(tasks=3, seed=seed, **options) for _ in range(2))
    driver = np.random.default_rng(seed)
    again = np.random.default_rng(seed)
    assert drive(one, driver, steps) == drive(two, again, steps)  # a seed decides everything
    state = json.loads(json.dumps(one.state_dict(), allow_nan=False))
    other = community(tasks=3, seed=seed + 1, **options)
    drive(other, np.random.default_rng(1), 5)
    other.load_state_dict(state)
    assert other.state_dict() == state
    assert drive(one, driver, 60) == drive(other, again, 60)
    assert one.state_dict() == other.state_dict()
    for name, array in one.probe().items():
        np.testing.assert_array_equal(array, other.probe()[name], err_msg=name)


def test_state_of_another_community_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[3, 3\]"):
        community(tasks=3).load_state_dict(community().state_dict())
