"""The reports: statistics against hand-worked numbers, pages from anything."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pytest
from made_results import MT10, _genotypes, make_results, without_curves
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from rich.console import Console

import algorithms
from algorithms import genetic
from reports import Results, build, published, stats, summary
from reports.comparing import comparisons
from reports.drawing import bold_line, figure, looks, section_looks
from reports.figures import ABLATION_FIGURES, FIGURES
from reports.frames import MissingError, sections
from reports.genotypes import Coding, collect, embed, segments, stage_of, weight_matrix
from reports.html import mixed
from reports.tables import ABLATION_TABLES, OVERVIEWS, TABLES
from reports.tabling import setting_warnings, table
from reports.writers import to_latex, to_markdown


@pytest.fixture(scope="module")
def results() -> Results:
    states = {("mt_sac", 3): "running", ("mt_sac", 4): "failed"}
    algorithms = ("mega", "mega@softmax", "d2r", "soft_module", "mt_sac")
    return make_results(algorithms, tasks=MT10, states=states)


@pytest.fixture(scope="module")
def page(results: Results, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(results, tmp_path_factory.mktemp("report"))


# Statistics --------------------------------------------------------------------------------------


def test_iqm_is_the_mean_of_the_middle_half() -> None:
    # Sorted 0..7: a quarter is two entries, so the mean of 2, 3, 4, 5.
    scores = np.array([[7.0, 0.0, 3.0, 2.0], [5.0, 1.0, 6.0, 4.0]])
    assert stats.interquartile_mean(scores) == 3.5
    # Six entries: floor(6 / 4) = 1 is cut at each end, (2 + 3 + 4 + 5) / 4.
    assert stats.interquartile_mean([[1, 2, 3], [4, 5, 100]]) == 3.5


def test_mean_and_deviation_over_seeds() -> None:
    assert stats.mean_std([0.7, 0.8, 0.9]) == (pytest.approx(0.8), pytest.approx(0.1))
    mean, deviation = stats.mean_std([0.7])
    assert mean == 0.7
    assert np.isnan(deviation)


def test_bootstrap_is_a_function_of_its_generator_and_strata() -> None:
    scores = np.random.default_rng(0).random((5, 10))
    first, again, other = (
        stats.stratified_interval(scores, stats.interquartile_mean, np.random.default_rng(seed))
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
    assert first.low < first.value < first.high
    # Seeds that agree within each task leave nothing to resample, however tasks differ.
    constant = np.tile([0.0, 0.5, 1.0, 1.0], (4, 1))
    still = stats.stratified_interval(constant, stats.interquartile_mean, np.random.default_rng(0))
    assert still.value == 0.75
    assert not still.has_interval
    # Two seeds support no interval.
    assert not stats.stratified_interval(
        scores[:2], stats.interquartile_mean, np.random.default_rng(0)
    ).has_interval


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        sample = rng.normal(0.5, 0.1, (20, 4))
        found = stats.stratified_interval(sample, lambda x: x.mean(axis=(-2, -1)), rng, 300)
        hits += found.low <= 0.5 <= found.high
    assert 0.88 <= hits / 200 <= 0.99


def test_welch_against_a_worked_example() -> None:
    # a: mean 3, s² 2.5, n 5; b: mean 6, s² 10, n 5: t = -3 / sqrt(2.5) = -1.8974, df = 5.8824;
    # t(.975, 5.8824) = 2.45873 gives -3 ± 3.88760 and p = 0.10755.
    found = stats.difference([1, 2, 3, 4, 5], [2, 4, 6, 8, 10])
    assert found.estimate.value == -3
    assert found.estimate.low == pytest.approx(-6.8876, abs=1e-3)
    assert found.estimate.high == pytest.approx(0.8876, abs=1e-3)
    assert found.p == pytest.approx(0.1075, abs=1e-3)


def test_difference_is_not_judged_without_support() -> None:
    few = stats.difference([0.1, 0.2], [0.3, 0.4, 0.5])
    assert few.estimate.value == pytest.approx(-0.25)
    assert not few.estimate.has_interval
    assert np.isnan(few.p)


@pytest.mark.parametrize("seeds", [3, 12])
@pytest.mark.parametrize(("ours", "theirs"), [(0.5, 0.2), (0.7, 0.5), (0.1 + 0.2, 0.3)])
def test_seeds_that_differ_by_rounding_alone_are_not_judged(
    ours: float, theirs: float, seeds: int
) -> None:
    """The mean of three .7 is no .7 in floating point: their deviation is 1e-16, not 0."""
    same = [ours] * (seeds - 1) + [float(np.nextafter(ours, 1))]
    for a in ([ours] * seeds, same):
        flat = stats.difference(a, [theirs] * seeds)
        assert not flat.estimate.has_interval
        assert np.isnan(flat.p)
        assert flat.method == "seeds do not vary"
    assert stats.difference([*same[1:], ours + 1e-3], [theirs] * seeds).p >= 0


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_difference_covers_the_truth_as_often_as_it_says(seeds: int) -> None:
    rng, hits = np.random.default_rng(seeds), 0
    for _ in range(1000):
        found = stats.difference(rng.normal(0.5, 0.05, seeds), rng.normal(0.4, 0.1, seeds))
        hits += found.estimate.low <= 0.1 <= found.estimate.high
    assert 0.93 <= hits / 1000 <= 0.98


def test_a_certain_win_has_no_interval() -> None:
    rng = np.random.default_rng(0)
    always = stats.probability_of_improvement(np.full((3, 2), 0.9), np.full((3, 2), 0.1), rng)
    assert always.value == 1
    assert not always.has_interval


def test_holm_against_a_worked_example() -> None:
    # Sorted .005 .01 .03 .04 times 4 3 2 1 = .02 .03 .06 .04, made monotone: .02 .03 .06 .06.
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    with_gap = stats.holm([0.01, float("nan"), 0.04])
    assert with_gap[0] == pytest.approx(0.02)
    assert np.isnan(with_gap[1])
    assert stats.holm([0.8, 0.9]) == [1.0, 1.0]


def test_probability_of_improvement_against_a_worked_example() -> None:
    # Task 1: pairs (1>0), (1=1), (2>0), (2>1) give 3.5 of 4; task 2: never better, 0 of 4.
    rng = np.random.default_rng(0)
    a, b = np.array([[1.0, 0.0], [2.0, 0.0]]), np.array([[0.0, 1.0], [1.0, 1.0]])
    found = stats.probability_of_improvement(a, b, rng)
    assert found.value == pytest.approx((3.5 / 4 + 0) / 2)
    assert not found.has_interval
    same = np.random.default_rng(1).random((6, 3))
    assert stats.probability_of_improvement(same, same, rng).value == 0.5
    with pytest.raises(ValueError, match="3 and 2 tasks"):
        stats.probability_of_improvement(same, b, rng)


def test_curve_interval_needs_three_seeds() -> None:
    mean, low, high = stats.mean_interval(np.array([[0.0, 1.0], [1.0, 1.0], [2.0, 1.0]]))
    assert mean.tolist() == [1, 1]
    # t(.975, 2) = 4.30265, times 1 / sqrt(3).
    assert high[0] - mean[0] == pytest.approx(4.30265 / np.sqrt(3), abs=1e-4)
    assert np.isnan([low[1], high[1]]).all()  # of seeds that are alike nothing is known
    assert np.isnan(stats.mean_interval(np.ones((2, 3)))[1]).all()


# Genotypes ---------------------------------------------------------------------------------------


def test_genotype_of_the_papers_worked_example() -> None:
    bits = "1110 0110 1011 0111 1101 0010 0101 0111 0000 1011".replace(" ", "")
    decoded = segments(np.array([int(c) for c in bits], dtype=np.int8), 4)
    assert [d.tolist() for d in decoded] == [[14], [6, 11], [7, 13, 2], [5, 7, 0, 11]]
    with pytest.raises(ValueError, match="no stage"):
        stage_of(41, 4)


def test_heads_of_different_stages_share_a_row() -> None:
    # Stage 1 at one bit: segments (1) and (0, 1); HalfSoftmax of 0 is .01, of 1 is e - .99.
    grid = weight_matrix(np.array([1, 0, 1], dtype=np.int8), Coding(1), max_stage=3)
    assert grid.shape == (4, 4)
    assert grid[0].tolist() == [1, 0, 0, 0]
    assert not grid[1:3].any()
    assert grid[3, :2] == pytest.approx([0.01 / (np.e - 0.98), (np.e - 0.99) / (np.e - 0.98)])
    # A segment of zeros weighs its sources alike.
    assert weight_matrix(np.zeros(3, dtype=np.int8), Coding(1), 1)[1].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("function", ["half_softmax", "softmax"])
@pytest.mark.parametrize("offset", [0.5, 0.99, 1.0])
def test_genotypes_are_drawn_by_the_weights_that_they_stand_for(
    function: Literal["half_softmax", "softmax"], offset: float
) -> None:
    rng = np.random.default_rng(0)
    for stage, precision in ((1, 1), (3, 2), (5, 4)):
        length = (stage + 1) * (stage + 2) // 2 * precision
        for bits in (np.zeros(length, np.int8), rng.integers(2, size=length, dtype=np.int8)):
            drawn = weight_matrix(bits, Coding(precision, function, offset), max_stage=7)
            trained = genetic.weight_matrix(bits, precision, function, offset, size=8)
            np.testing.assert_allclose(drawn, trained, rtol=1e-12, atol=1e-15)


def test_a_map_of_genotypes_reads_them_as_their_run_did() -> None:
    made = make_results(["mega@softmax"], seeds=1)
    made.runs["config.weights"], made.runs["config.offset"] = "softmax", 0.99
    (section,) = sections(made)
    softmax = FIGURES["genotypes"](section)
    made.runs["config.weights"], made.runs["config.offset"] = "half_softmax", 0.5
    (section,) = sections(made)
    half = FIGURES["genotypes"](section)
    assert "(Softmax) on a common grid" in softmax.caption
    assert "(HalfSoftmax, offset 0.5) on a common grid" in half.caption
    assert not np.allclose(softmax.data["x"], half.data["x"])


def test_training_is_set_around_stage_increases() -> None:
    """Task b grows at step 2,000: success 0 before, 1 after; task a, which never grows, is out."""
    results = make_results(["mega"], seeds=3, tasks=("a", "b"), steps_per_task=4000)
    event = np.array([[2000, 1, 3, 4, 0]])
    results.probes = {
        run: [(4000, {"stage_events": event, "cause_names": np.array(["stuck"])})]
        for run in results.probes
    }
    results.runs["config.window"], results.runs["protocol.horizon"] = 3, 200
    training = results.metrics["kind"] == "train"
    rates = training & (results.metrics["metric"] == "success")
    late = (results.metrics["step"] > 2000) & (results.metrics["task"] == "b")
    results.metrics.loc[rates, "value"] = np.where(late[rates], 5.0, 0.0)
    data = FIGURES["after_growth"](sections(results)[0]).data
    after = data["window"] > 0
    assert set(data.loc[after, "success"]) == {1.0}
    assert set(data.loc[~after, "success"]) == {0.0}
    assert sorted(data["window"].unique()) == pytest.approx(np.arange(-5.5, 6) / 3)
    with pytest.raises(MissingError, match="stage increase"):
        FIGURES["after_growth"](sections(make_results(["d2r"], seeds=2))[0])


def test_embedding_counts_a_survivor_once_and_measures_clusters() -> None:
    rng = np.random.default_rng(0)
    genotypes, lengths = _genotypes(rng, np.array([3, 3, 4]), 6, 2)
    sample = collect([(genotypes, lengths), (genotypes, lengths)], 2)
    assert len(sample) == len(collect([(genotypes, lengths)], 2)) <= 18
    map_ = embed(sample, Coding(2))
    assert map_.points.shape == (len(sample), 2)
    assert map_.perplexity == pytest.approx((len(sample) - 1) / 3)
    assert map_.silhouette_task > 0.1
    assert np.array_equal(map_.points, embed(sample, Coding(2)).points)
    with pytest.raises(ValueError, match="distinct genotypes"):
        embed(sample[:4], Coding(2))


# Tables ------------------------------------------------------------------------------------------


def test_published_values_carry_their_citation() -> None:
    frame = published("success_rates").query("source == 'mega' and suite == 'mt10_rand'")
    assert frame.set_index("algorithm").loc["mega", "mean"] == 0.82
    assert frame["citation"].str.contains("2502.13569").all()
    with pytest.raises(ValueError, match="no published table 'nope'"):
        published("nope")


def test_success_is_successes_over_episodes_per_task_then_per_seed() -> None:
    rows = [
        {"run": run, "suite": "s", "algorithm": "mega", "seed": seed, "step": 10}
        | {"kind": "final", "task": task, "metric": "success", "value": value, "count": count}
        for run, seed, task, value, count in [
            ("a", 0, "x", 1, 2),
            ("a", 0, "y", 50, 50),
            ("b", 1, "x", 0, 2),
            ("b", 1, "y", 25, 50),
        ]
    ]
    runs = pd.DataFrame(
        {"run": ["a", "b"], "suite": "s", "algorithm": "mega", "seed": [0, 1], "state": "done"}
        | {"preset": "paper", "steps_per_task": 10}
    )
    (section,) = sections(Results(runs=runs, metrics=pd.DataFrame(rows)))
    assert section.scores("mega").to_numpy().tolist() == [[0.5, 1.0], [0.0, 0.5]]
    made = TABLES["success_rates"](section)
    # Seeds 0.75 and 0.25: mean 0.5, sample deviation 0.354; two seeds carry no interval.
    assert made.rows[0][:5] == ("mega", "0.50 ± 0.35", "0.50", "0.25", "2")
    assert "2–50 episodes" in made.caption


def test_success_table_sets_ours_beside_the_published_values(results: Results) -> None:
    (section,) = sections(results)
    made = TABLES["success_rates"](section)
    rows = {row[0]: row for row in made.rows}
    assert list(rows) == ["mega", "mega@softmax", "d2r", "soft_module", "mt_sac"]
    assert made.columns[-3:] == (
        "Published: MEGA Table 1",
        "Published: D2R Table 8",
        "Published: Soft Modularization Table 1",
    )
    assert rows["mega"][-3:] == ("0.82 ± 0.05", "–", "–")
    assert rows["d2r"][-3:] == ("0.77 ± 0.05", "0.86 ± 0.05", "–")
    assert rows["mt_sac"][-3:] == ("0.55 ± 0.07", "0.51 ± 0.08", "0.43")
    assert "horizon 150" in made.caption
    assert made.rows[0][6] == "cpu, 100,000"
    assert "2 of 25 runs missing (1 failed, 1 running)" in made.caption
    assert "50 episodes" in made.caption
    assert "not the papers' scale" in made.caption
    assert made.data.loc[0, "seeds"] == 5


def test_references_are_those_of_the_sections_own_world() -> None:
    made = make_results(seeds=1)
    other = made.runs["algorithm"].isin(["expert", "random"])
    made.runs["protocol.horizon"] = 200
    elsewhere = made.runs[other].assign(**{"protocol.horizon": 20})
    elsewhere["run"] += "-short"
    metrics = made.metrics[made.metrics["kind"] == "reference"].assign(value=0)
    metrics["run"] += "-short"
    made.runs = pd.concat([made.runs, elsewhere], ignore_index=True)
    made.metrics = pd.concat([made.metrics, metrics], ignore_index=True)
    (section,) = sections(made)
    assert (section.references.loc["expert"] == 1.0).all()


def test_task_table_ends_with_the_mean_and_holds_the_references(results: Results) -> None:
    (section,) = sections(results)
    made = TABLES["tasks"](section)
    assert made.columns[-2:] == ("expert (reference)", "random (reference)")
    assert made.rows[0][0] == "reach-v3"
    assert made.rows[-1][0] == "mean over tasks"
    assert made.rows[-1][-2] == "1.00"


def test_comparison_says_what_the_interval_supports(results: Results) -> None:
    (section,) = sections(results)
    found = {c.other: c for c in comparisons(section)}
    assert set(found) == {"mega@softmax", "d2r", "soft_module", "mt_sac"}
    low, high = found["mt_sac"].difference.estimate[1:]
    sentence = f"mega − mt_sac on mt10_rand: {found['mt_sac'].difference.estimate.value:+.2f} "
    sentence += f"[{low:.2f}, {high:.2f}], 5 and 3 seeds: "
    sentence += "separated among 4 comparisons: mega is better"
    assert found["mt_sac"].sentence == sentence
    assert found["mt_sac"].verdict == "separated among 4 comparisons: mega is better"
    assert found["mt_sac"].seeds == (5, 3)
    (two,) = sections(make_results(("mega", "d2r"), seeds=2))
    assert [c.verdict for c in comparisons(two)] == ["not judged (fewer than 3 seeds)"]
    (without,) = sections(make_results(("mt_sac", "d2r"), seeds=3))
    assert comparisons(without)[0].reference == "d2r"


def test_compute_table_shares_and_speed() -> None:
    (section,) = sections(make_results(("mega",), seeds=2))
    made = TABLES["compute"](section)
    row = dict(zip(made.columns, made.rows[0], strict=True))
    # 100,000 steps of 4 tasks in 3,000 s; shares as made, none of them "other".
    assert (row["Seconds"], row["Steps/s"]) == ("3,000", "133")
    assert (row["Simulator %"], row["Genetic %"]) == ("30.0", "0.5")
    assert "Other %" not in row
    assert row["Actor + critic M"] == "0.49 + 0.68"


def test_success_for_equal_time() -> None:
    """mega trains its 100,000 steps in 50 minutes, d2r in 100: an evaluation each 5 and 10."""
    results = make_results(("mega", "d2r"), seeds=2)
    slow = results.timing["run"].str.contains("/d2r/")
    timing = results.timing.assign(
        seconds=results.timing["seconds"].where(~slow, 2 * results.timing["seconds"])
    )
    (section,) = sections(replace(results, timing=timing))
    made = TABLES["equal_time"](section)
    assert made.columns[2:] == (
        "After 10 min", "After 20 min", "After 30 min", "After 45 min", "After 1 h", "End",
        "At its end",
    )  # fmt: skip
    curve = section.curves("success").groupby(["label", "step"])["value"].mean()
    rows = {row[0]: row[1:] for row in made.rows}
    assert rows["mega"][0] == "2"
    assert rows["mega"][3:] == (
        f"{curve['mega', 60_000]:.2f}", f"{curve['mega', 90_000]:.2f}",
        f"{curve['mega', 100_000]:.2f}*", "50 min",
        f"{curve['mega', 100_000]:.2f}",
    )  # fmt: skip
    assert rows["d2r"][1:4] == tuple(f"{curve['d2r', 1000 * m]:.2f}" for m in (10, 20, 30))
    assert rows["d2r"][5:] == (
        f"{curve['d2r', 60_000]:.2f}", "100 min", f"{curve['d2r', 100_000]:.2f}"
    )  # fmt: skip
    halfway = made.data.set_index(["algorithm", "minutes"])["success"]["d2r", 45]
    between = (curve["d2r", 40_000] + curve["d2r", 50_000]) / 2
    assert halfway == pytest.approx(between)


def test_a_run_without_a_tasks_final_evaluation_is_missing(tmp_path: Path) -> None:
    made = without_curves(make_results(("mega", "d2r"), seeds=3))
    cut = made.metrics["run"].str.contains("mega/2") & (made.metrics["task"] == MT10[0])
    cut &= made.metrics["kind"] == "final"
    lacking = replace(made, metrics=made.metrics[~cut])
    (section,) = sections(lacking)
    assert section.runs.set_index("run")["finished"].sum() == 5
    assert len(section.scores("mega")) == section.seeds("mega") == 2
    words = "1 of 6 runs missing (1 done without a whole final evaluation)"
    assert words in TABLES["success_rates"](section).caption
    page = build(lacking, tmp_path, formats=()).read_text()
    assert "mega / seed 2" in page
    assert "done without a whole final evaluation at step 100,000" in page


def test_a_final_evaluation_stands_for_the_one_of_its_step() -> None:
    made = make_results(("mega",), seeds=2)
    returns = made.metrics["metric"] == "return"
    made.metrics.loc[returns & (made.metrics["kind"] == "eval"), "value"] = 0.0
    made.metrics.loc[returns & (made.metrics["kind"] == "final"), "value"] = 100.0
    (section,) = sections(made)
    # 0 up to 90,000 steps, then up to 100: the last of ten trapezoids.
    assert set(TABLES["area"](section).data["area"]) == {5.0}
    last = section.curves("return").query("step == 100_000")
    assert len(last) == 2 * len(section.tasks)
    assert (last["value"] == 100).all()


def test_a_row_of_the_capacity_table_is_a_depth_and_not_a_name() -> None:
    """The plain algorithm has the preset's depth: at the papers' it is their fifth layer's row."""
    names = ("soft_module", "mtmh_sac", "mtmh_sac@layers3", "mtmh_sac@wide5", "mtmh_sac@ars")
    made = make_results(names, seeds=2, suite="mt50_fixed")
    depth = made.runs["algorithm"].map({names[2]: 3}).fillna(5)
    runs = made.runs.assign(**{"config.depth": depth.where(made.runs["algorithm"] != names[0])})
    (section,) = sections(replace(made, runs=runs))
    rows = TABLES["capacity"](section).rows
    shown = {(row[1], row[2]): row[0] for row in rows if row[5] == "2"}
    assert shown == {
        ("3", "400"): "mtmh_sac@layers3", ("5", "400"): "mtmh_sac", ("5", "600"): "mtmh_sac@wide5",
        ("–", "–"): "soft_module",
    }  # fmt: skip


def test_compute_reads_the_last_row_of_the_last_step() -> None:
    """The final evaluation follows the last checkpoint: two rows of one step, many sections."""
    made = make_results()
    last = made.timing[made.timing["step"] == 100_000]
    again = last.assign(seconds=last["seconds"] + 100)
    before, after = (
        TABLES["compute"](sections(replace(made, timing=timing))[0]).data["seconds"]
        for timing in (made.timing, pd.concat([made.timing, again], ignore_index=True))
    )
    assert (after == before + 100).all()


def test_health_shows_the_worst_run_of_each_check(results: Results) -> None:
    (section,) = sections(results)
    shown = TABLES["health"](section)
    assert shown.rows[0] == (
        ("mega", "population", "1 bad, 4 good", "seed 1: collapsed", "breed more")
    )
    assert len(shown.data) == 10
    assert not shown.details
    well = results.health.assign(result="good")
    (section,) = sections(replace(results, health=well))
    assert TABLES["health"](section).rows[0] == ("mega", "population", "all 5 good", "", "")


def test_scales_and_settings_are_never_averaged() -> None:
    mixed = make_results(("mega", "d2r"), seeds=2)
    mixed.runs.loc[mixed.runs["seed"] == 1, "preset"] = "paper"
    assert [s.preset for s in sections(mixed)] == ["cpu", "paper"]
    tuned = make_results(("mega",), seeds=2)
    tuned.runs.loc[tuned.runs["seed"] == 1, "config.actor_lr"] = 3e-4
    (section,) = sections(tuned)
    assert section.labels == ["mega [actor_lr=0.0003]", "mega [actor_lr=0.001]"]


def test_protocol_that_differs_is_warned_of() -> None:
    alike = make_results(("mega", "d2r"), seeds=1)
    assert setting_warnings(sections(alike)[0]) == ()
    alike.runs.loc[alike.runs["algorithm"] == "d2r", "protocol.horizon"] = 500
    (section,) = sections(alike)
    (warning,) = setting_warnings(section)
    assert "horizon (mega: 200; d2r: 500)" in warning
    assert TABLES["success_rates"](section).warnings == (warning,)
    assert warning.replace("_", r"\_") in to_markdown(TABLES["protocol"](section))


def test_a_warning_names_the_exceptions_alone() -> None:
    made = make_results(("mega", "d2r", "mt_sac", "mt_sac@ars"), seeds=1)
    made.runs["config.reward_balance"] = 50.0
    made.runs.loc[made.runs["algorithm"] == "mt_sac@ars", "config.reward_balance"] = 250.0
    (warning,) = setting_warnings(sections(made)[0])
    assert "reward_balance (mt_sac@ars: 250; the others: 50)" in warning


def test_code_and_machines_that_differ_are_warned_of() -> None:
    made = make_results(("mega", "d2r"), seeds=1)
    assert mixed(sections(made)[0]) == []
    mine = made.runs["algorithm"].isin(["mega", "d2r"])
    made.runs.loc[mine, "git_commit"] = ["a" * 40, f"{'b' * 40}+changes, then {'c' * 40}"]
    made.runs.loc[mine, "hardware.cpu"] = ["AMD EPYC", "AMD EPYC, then Intel"]
    made.runs.loc[0, "other_numerics"] = "threads 4 -> 1"
    (section,) = sections(made)
    shown = sorted(mixed(section))
    assert shown[0] == (
        "Runs differ in git_commit: aaaaaaaaaa, bbbbbbbbbb+changes, then cccccccccc."
    )
    assert shown[1] == "Runs differ in hardware.cpu: AMD EPYC, AMD EPYC, then Intel."
    assert shown[2] == "mt10_rand/mega/0-00 was resumed under other numerics: threads 4 -> 1."
    assert TABLES["equal_time"](section).warnings


def test_runs_that_cannot_be_read_are_counted_wherever_seeds_are() -> None:
    made = make_results(("mega",), seeds=2)
    lost = {"mt10_rand/mega/7-ab": "cut", "mt10_fixed/mega/7-ab": "of another suite"}
    (section,) = sections(replace(made, unreadable=lost))
    words = "all 2 runs finished; 1 run beside them cannot be read"
    assert words in TABLES["success_rates"](section).caption


def test_writers_escape() -> None:
    made = TABLES["tasks"](sections(make_results(seeds=1, tasks=("a|b<i>", "50%_&~")))[0])
    assert r"a\|b&lt;i&gt;" in to_markdown(made)
    tex = to_latex(made)
    assert r"50\%\_\&\textasciitilde{}" in tex
    assert r"a|b\textless{}i\textgreater{}" in tex
    assert tex.index(r"\toprule") < tex.index(r"\midrule") < tex.index(r"\bottomrule")


def test_latex_tables_are_no_wider_than_the_text(tmp_path: Path) -> None:
    names = tuple(f"an_algorithm_of_a_long_name@variant{i}" for i in range(6))
    wide = to_latex(TABLES["tasks"](sections(without_curves(make_results(names, seeds=1)))[0]))
    narrow = to_latex(TABLES["tasks"](sections(without_curves(make_results(seeds=1)))[0]))
    assert r"\caption[Success rate per task]{Success rate per task. " in wide
    if not (pdflatex := shutil.which("pdflatex")):
        pytest.skip("no LaTeX here")
    head = r"\documentclass{article}\usepackage{booktabs,graphicx}\begin{document}\listoftables"
    (tmp_path / "x.tex").write_text(f"{head}\n{wide}\n{narrow}\n\\end{{document}}\n")
    done = subprocess.run(
        [pdflatex, "-interaction=nonstopmode", "-halt-on-error", "x.tex"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull" not in done.stdout


def test_names_are_registered_once() -> None:
    with pytest.raises(ValueError, match="registered twice"):
        table("tasks")(TABLES["tasks"])
    with pytest.raises(ValueError, match="registered twice"):
        figure("stages")(FIGURES["stages"])


# Figures -----------------------------------------------------------------------------------------


def test_an_algorithm_has_one_colour_and_variants_differ() -> None:
    variants = [f"mega@v{i}" for i in range(10)]
    alone, among = looks(["mega", "other"]), looks(["mega", "d2r", "other", *variants])
    assert alone["mega"] == among["mega"]
    assert alone["other"] == among["other"]
    shown = [(look.colour, str(look.dash)) for look in among.values()]
    assert len(set(shown)) == len(shown)
    few = looks(["mega", "d2r", "other", *variants[:8]])
    assert len({look.colour for look in few.values()}) == len(few)


def test_references_take_no_look_from_a_variant() -> None:
    names = ("mega", *(f"mega@x{i}" for i in range(6)))
    (alone,) = sections(make_results(names, seeds=1))
    (beside,) = sections(make_results((*names, "expert", "random"), seeds=1))
    assert section_looks(beside) == section_looks(alone)


def test_every_algorithm_is_told_apart_without_colours() -> None:
    names = algorithms.names()
    own = looks(names)
    assert len({look.marker for look in own.values()}) == len(names)
    assert len({(look.colour, str(look.dash)) for look in own.values()}) == len(names)
    # Solid lines are apart also where red and green are one (Machado et al. 2009, severity 1).
    deuteranope = np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]])
    solid = [look.colour for look in own.values() if look.dash == "-"]
    assert len(set(solid)) == len(solid) == 7
    seen = [deuteranope @ np.array(to_rgb(colour)) ** 2.2 for colour in solid]
    apart = [np.abs(a - b).max() for i, a in enumerate(seen) for b in seen[:i]]
    assert min(apart) > 0.1
    others = looks([*names, "third", "party", "mega@softmax", "d2r@sparse"])
    assert {name: others[name] for name in names} == own
    for name in set(others) - set(names):
        assert (others[name].colour, others[name].dash) not in {
            (look.colour, look.dash) for label, look in others.items() if label != name
        }


def test_curves_carry_the_marker_of_their_legend_and_how_many_runs() -> None:
    made = make_results(("mega", "moore"), seeds=4, states={("moore", 1): "failed"})
    (section,) = sections(made)
    own = looks(["mega", "moore"])
    for name in ("learning_curves", "sample_efficiency", "performance_profile", "success_per_hour"):
        drawing = FIGURES[name](section)
        drawn = {line.get_marker() for line in drawing.figure.axes[0].get_lines()}
        assert {own["mega"].marker, own["moore"].marker} <= drawn, name
        shown = drawing.figure.legends[0]
        words = [entry.get_text() for entry in shown.get_texts()]
        assert words[:2] == ["mega (n = 4)", "moore (n = 3)"], name
        assert "mega n = 4, moore n = 3" in drawing.caption
        assert [handle.get_marker() for handle in shown.legend_handles[:2]] == ["o", "<"]
    # Of a figure that has not all runs, those that it has.
    timed = made.timing[~made.timing["run"].str.contains("mega/[01]")]
    (section,) = sections(replace(made, timing=timed))
    drawing = FIGURES["success_per_hour"](section)
    assert drawing.figure.legends[0].get_texts()[0].get_text() == "mega (n = 2)"
    assert "mega n = 2" in drawing.caption


def test_curves_that_coincide_show_each_others_markers() -> None:
    axes = Figure().subplots()
    for label in ("mega", "d2r", "soft_module"):
        bold_line(axes, np.arange(40), np.ones(40), looks([label])[label], 2)
    places = [range(40)[slice(*line.get_markevery()[:1], None)] for line in axes.get_lines()]
    assert len({place[0] for place in places}) == 3


@pytest.mark.filterwarnings("error")
def test_letters_that_the_font_lacks_warn_nobody() -> None:
    (section,) = sections(make_results(("メガ", "mega"), seeds=1, tasks=("到達", "push-v3")))
    for name in ("learning_curves", "task_success", "task_heat_map"):
        assert FIGURES[name](section).svg()
        assert FIGURES[name](section).png()


def test_counts_of_one_are_singular() -> None:
    made = without_curves(make_results(("mega",), seeds=1))
    one = made.metrics.assign(count=1.0, value=made.metrics["value"].clip(upper=1))
    (section,) = sections(replace(made, metrics=one))
    caption = TABLES["success_rates"](section).caption
    assert "Final evaluation: 1 episode per task." in caption
    assert caption.endswith("; the run finished.")


def test_long_suites_are_named_in_titles_and_verdicts_by_their_first_tasks() -> None:
    suite = "custom_rand:reach-v3+push-v3"
    (section,) = sections(make_results(suite=suite))
    assert section.place == "custom_rand: reach, push"
    (section,) = sections(make_results(suite=f"{suite}+window-close-v3+button-press-topdown-v3"))
    assert section.place == "custom_rand: reach, push and 2 more"
    assert all(section.place in comparison.sentence for comparison in comparisons(section))


def test_figures_state_what_they_show(results: Results) -> None:
    (section,) = sections(results)
    drawing = FIGURES["genotypes"](section)
    assert re.search(r"seed 0: 0\.\d\d by task, -?0\.\d\d by stage alone", drawing.caption)
    assert "5 of 5 runs shown" in drawing.caption
    difference = FIGURES["modules_difference"](section)
    means = FIGURES["modules_used"](section).data.groupby(["label", "task"])["modules"].mean()
    expected = (means["mega"] - means["d2r"]).mean()
    assert f"over tasks, {expected:+.2f} (MEGA Sec. 5.3 prints -5.2" in difference.caption
    assert difference.data["difference"].is_monotonic_increasing
    # Every seed against the mean of the other algorithm: 5 points per task of either.
    runs = [run for run in difference.data if "/d2r/" in run or "/mega/" in run]
    assert len(runs) == 10
    clouds = [points.get_offsets() for points in difference.figure.axes[0].collections]
    assert [len(cloud) for cloud in clouds] == [50, 50]
    assert np.mean(clouds[1][:, 0]) == pytest.approx(expected)
    assert "1 failed, 1 running" in FIGURES["learning_curves"](section).caption


@pytest.mark.parametrize("name", ["learning_curves", "stages", "genotypes"])
def test_equal_frames_give_equal_bytes(name: str) -> None:
    first, again = (FIGURES[name](sections(make_results(seeds=2))[0]) for _ in range(2))
    assert first.svg() == again.svg()
    assert first.png() == again.png()
    assert b"<dc:date>" not in first.svg()


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_a_figure_without_data_says_why(name: str) -> None:
    pending = make_results(seeds=1, states=dict.fromkeys([("mega", 0), ("d2r", 0)], "pending"))
    bare = replace(pending, metrics=pd.DataFrame(), probes={}, traces={})
    with pytest.raises(MissingError, match=r"\w+"):
        FIGURES[name](sections(bare)[0])


# The page ----------------------------------------------------------------------------------------


def test_page_holds_everything_and_needs_no_network(page: Path) -> None:
    text = page.read_text()
    assert page.name == "index.html"
    assert "could not be made because of an error" not in text.lower()
    # Every figure, that of the ablation, and the enlarged one.
    assert text.count("<img ") == len(FIGURES) + len(ABLATION_FIGURES) + 1
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", text)
    assert "http" not in re.sub(r"data:[^\"]+", "", text)
    assert "Reduced scale" in text
    assert "SMOKE" not in text
    assert "FloatingPointError: critic loss is NaN in task push-v3" in text
    assert "mt_sac / seed 3" in text
    assert len(text) < 8_000_000
    for name in {*TABLES, *ABLATION_TABLES, *OVERVIEWS} - {"capacity"}:
        assert list((page.parent / "tables").glob(f"*-{name}.tex")), name
    for name in FIGURES:
        for kind in ("png", "svg", "csv"):
            assert list((page.parent / "figures").glob(f"*-{name}.{kind}")), (name, kind)


def test_links_inside_the_page_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    anchors = re.findall(r"href=\"#([^\"]+)\"", text)
    ids = re.findall(r" id=\"([^\"]+)\"", text)
    assert len(set(ids)) == len(ids)
    assert set(anchors) <= set(ids)


def test_embedded_numbers_are_the_files(page: Path) -> None:
    match = re.search(r"download=\"(\S+-success_rates\.csv)\" href=\"([^\"]+)\"", page.read_text())
    assert match is not None
    inside = base64.b64decode(match[2].split(",", 1)[1])
    assert inside == (page.parent / "tables" / match[1]).read_bytes()


def test_names_are_shown_literally(tmp_path: Path) -> None:
    nasty = "<script>alert('x')</script>$a_{1}$"
    odd = make_results((nasty, "mega"), seeds=1, suite="../s<b>", tasks=(nasty, "&amp;"))
    odd.runs.loc[0, ["state", "error"]] = ["failed", "Error: <img src=x onerror=alert(1)>"]
    text = build(odd, tmp_path).read_text()
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text
    assert "<img src=x" not in text
    assert "&amp;amp;" in text
    assert "because of an error" not in text
    assert all(p.resolve().is_relative_to(tmp_path) for p in tmp_path.rglob("*"))
    assert not list(tmp_path.parent.glob("s-*"))


def _none() -> Results:
    return Results()


def _failed() -> Results:
    return make_results(
        seeds=2, states={(a, s): "failed" for a in ("mega", "d2r", "mt_sac") for s in (0, 1)}
    )


def _pending() -> Results:
    states = {(a, s): "pending" for a in ("mega", "d2r", "mt_sac") for s in (0, 1)}
    return replace(make_results(seeds=2, states=states), metrics=pd.DataFrame())


def _one_seed() -> Results:
    return without_curves(make_results(seeds=1))


def _one_task() -> Results:
    return make_results(seeds=2, suite="mt1_rand:reach-v3", tasks=("reach-v3",))


def _no_mega() -> Results:
    return without_curves(make_results(("d2r", "unheard_of@x"), seeds=2))


def _bare_columns() -> Results:
    made = without_curves(make_results(seeds=1))
    names = ["run", "suite", "algorithm", "seed", "state"]
    return Results(runs=made.runs[names], metrics=made.metrics.drop(columns="seed"))


def _broken_probe() -> Results:
    made = make_results(("mega",), seeds=1)
    probes = {run: [(0, {"stage": np.zeros((3, 2))})] for run in made.probes}
    return replace(made, probes=probes)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_none, "There are no runs to report on yet."),
        (_failed, "6 of 6 runs missing (6 failed)"),
        (_pending, "6 of 6 runs missing (6 pending)"),
        (_one_task, "mt1_rand:reach-v3"),
        (_no_mega, "only MEGA has them"),
        (_one_seed, "mega n = 1"),
        (_bare_columns, "not the papers"),
        (_broken_probe, "has not one value per task"),
    ],
)
def test_anything_gives_a_page(make: Callable[[], Results], words: str, tmp_path: Path) -> None:
    made = make()
    text = build(made, tmp_path, formats=("md",)).read_text()
    assert words in text.replace("&#39;", "'")
    assert "because of an error" not in text
    console = Console(width=160, record=True, quiet=True)
    console.print(summary(made))


def test_an_error_in_the_data_costs_one_figure(tmp_path: Path) -> None:
    made = make_results(("mega",), seeds=1)
    probes = {run: [(0, {"weight_intervals": np.zeros(3)})] for run in made.probes}
    text = build(replace(without_curves(made), probes=probes), tmp_path, formats=()).read_text()
    assert "because of an error in the data" in text
    assert "figure weight_intervals" in text
    assert "Success rate" in text


def test_smoke_has_its_banner_everywhere(tmp_path: Path) -> None:
    made = without_curves(make_results(seeds=2, preset="smoke", steps_per_task=2000))
    text = build(made, tmp_path, formats=()).read_text()
    assert "SMOKE — shows that things work, not results" in text
    console = Console(width=160, record=True)
    with console.capture() as capture:
        console.print(summary(made))
    assert "SMOKE" in capture.get()
    assert "preset smoke, 2,000 environment steps per task" in capture.get()


def test_paper_scale_has_no_banner_unless_cut_short(tmp_path: Path) -> None:
    for steps, words in ((1_500_000, False), (15_000, True)):
        made = make_results(("mt_sac",), seeds=1, preset="paper", steps_per_task=steps)
        made = without_curves(made)
        assert ("Reduced scale" in build(made, tmp_path, formats=()).read_text()) is words


def test_a_new_report_takes_its_predecessors_files_away(tmp_path: Path) -> None:
    first = make_results(("mt_sac",), seeds=1)
    build(first, tmp_path, formats=("svg", "md"))
    (tmp_path / "figures" / "mine.svg").write_text("kept")
    assert list(tmp_path.glob("figures/*-learning_curves.svg"))
    build(replace(first, metrics=first.metrics.iloc[:0]), tmp_path, formats=("svg", "md"))
    assert not list(tmp_path.glob("figures/*-learning_curves.svg"))
    assert (tmp_path / "figures" / "mine.svg").exists()
    listed = json.loads((tmp_path / "report.json").read_text())["files"]
    assert "index.html" in listed
    assert all((tmp_path / name).exists() for name in listed)
    # A manifest that points elsewhere takes nothing away.
    outside = tmp_path.parent / "precious.csv"
    outside.write_text("1")
    (tmp_path / "report.json").write_text('{"files": ["tables/../../precious.csv", 3]}')
    build(Results(), tmp_path)
    assert outside.exists()


def test_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown format 'pdf'; there are csv"):
        build(Results(), tmp_path, formats=("pdf",))


def test_many_long_labels_cost_no_figure() -> None:
    """A grid of settings: sixteen labels with three values each, none of them cut away."""
    labels = [
        f"mega[start_stage={stage},progress_threshold={share},solved_threshold={share / 2}]"
        for stage in range(3, 7) for share in (0.1, 0.2, 0.3, 0.4)
    ]  # fmt: skip
    (section,) = sections(make_results(tuple(labels), seeds=1))
    for name in ("genetic_cost", "learning_curves", "task_heat_map", "aggregates"):
        made = FIGURES[name](section).figure
        heights = [axes.get_position().height * made.get_figheight() for axes in made.axes]
        assert min(heights) > 0.8, name


def test_one_name_has_one_look_in_all_sections() -> None:
    several = make_results(("mega", "mega@softmax"), seeds=1) + make_results(
        ("mega", "mega@softmax", "mega[actor_lr=0.1]"), seeds=1, suite="mt10_fixed"
    )
    first, second = (section_looks(section) for section in sections(several))
    assert first == second
