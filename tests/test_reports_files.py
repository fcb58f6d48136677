"""Results in and out: rliable's numbers, imports, comparisons, exports, old and damaged runs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_results import MT10, make_results, without_curves
from PIL import Image
from test_cli import BENCH, bench

from bench import frames, video
from bench.spec import RunSpec, parse_overrides
from bench.store import RunStore, StoreError
from bench.sweep import ablations
from reports import (
    FIGURES,
    TABLES,
    MissingError,
    Results,
    build,
    comparisons,
    export,
    read_curves,
    sections,
    stats,
)

# Statistics --------------------------------------------------------------------------------------

# rliable 1.2.0 on these matrices; its intervals are of 20,000 to 50,000 replicates.
A = np.array(
    [[0.9, 0.1, 0.5, 0.0], [0.8, 0.3, 0.5, 0.2], [1.0, 0.2, 0.6, 0.0], [0.7, 0.1, 0.4, 0.1],
     [0.9, 0.0, 0.7, 0.0]]
)  # fmt: skip
B = np.array([[0.6, 0.1, 0.5, 0.1], [0.5, 0.2, 0.3, 0.0], [0.8, 0.2, 0.4, 0.0]])


@pytest.mark.parametrize(
    ("scores", "name", "value", "low", "high"),
    [
        (A, "IQM", 0.36, 0.30, 0.42),
        (A, "Median", 0.34, 0.28, 0.40),
        (A, "Mean", 0.40, 0.36, 0.445),
        (B, "IQM", 0.28333, 0.23333, 0.33333),
        (B, "Median", 0.28333, 0.23333, 0.33333),
        (B, "Mean", 0.30833, 0.26667, 0.35833),
    ],
)
def test_aggregates_are_those_of_rliable(
    scores: np.ndarray, name: str, value: float, low: float, high: float
) -> None:
    found = stats.stratified_interval(
        scores, stats.AGGREGATES[name], np.random.default_rng(0), 20_000
    )
    assert found.value == pytest.approx(value, abs=1e-5)
    assert found.low == pytest.approx(low, abs=0.011)
    assert found.high == pytest.approx(high, abs=0.011)


def test_probability_of_improvement_is_that_of_rliable() -> None:
    found = stats.probability_of_improvement(A, B, np.random.default_rng(0), 20_000)
    assert found.value == pytest.approx(0.675)
    assert (found.low, found.high) == pytest.approx((0.51667, 0.825), abs=0.01)


def test_performance_profile_is_that_of_rliable() -> None:
    thresholds = [0, 0.1, 0.25, 0.5, 0.75, 0.95]
    value, low, high = stats.performance_profile(A, thresholds, np.random.default_rng(0), 20_000)
    assert value == pytest.approx([0.8, 0.65, 0.55, 0.35, 0.2, 0.05])
    assert low == pytest.approx([0.65, 0.5, 0.5, 0.25, 0.1, 0.0], abs=0.051)
    assert high == pytest.approx([0.95, 0.8, 0.65, 0.45, 0.25, 0.15], abs=0.051)
    assert np.isnan(stats.performance_profile(A[:2], thresholds, np.random.default_rng(0))[1]).all()


def test_area_is_the_mean_height_of_the_curve() -> None:
    # 0 to 10 over the first half, 10 over the second: (5 + 10) / 2, steps apart as they are.
    assert stats.area_under_curve([0, 100, 200], [0.0, 10.0, 10.0]) == 7.5
    assert stats.area_under_curve([100, 120, 200], [10.0, 10.0, 10.0]) == 10
    assert stats.area_under_curve([5], [3.0]) == 3


# Curves of somebody else -------------------------------------------------------------------------


def test_imported_curves_stand_beside_ours(tmp_path: Path) -> None:
    ours = make_results(("mega",), seeds=3)
    path = tmp_path / "theirs.csv"
    rows = [
        {"algorithm": "d2r", "suite": "mt10_rand", "seed": seed, "task": task, "step": step}
        | {"success": step / 200_000, "preset": "cpu", "steps_per_task": 100_000}
        for seed in range(3) for task in MT10[::3] for step in (50_000, 100_000)
    ]  # fmt: skip
    pd.DataFrame(rows).to_csv(path, index=False)
    (section,) = sections(ours + read_curves(path))
    assert section.scored == ["mega", "d2r"]
    assert (section.scores("d2r") == 0.5).all(axis=None)
    text = build(ours + read_curves(path), tmp_path / "page", formats=()).read_text()
    assert "d2r was imported from theirs.csv: its protocol is not known" in text
    assert "because of an error" not in text


def test_means_without_tasks_are_a_section_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "means.csv"
    path.write_text("algorithm,step,success,seed\nx,10,0.1,0\nx,20,0.3,0\nx,10,0.2,1\nx,20,0.5,1\n")
    (section,) = sections(read_curves(path))
    assert section.scores("x").to_numpy().tolist() == [[0.3], [0.5]]


_HEAD = "algorithm,step,success"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("algorithm,step\nx,1\n", "column 'success' is missing"),
        (f"{_HEAD}\nx,1,83\n", "line 2: success 83 is no rate"),
        (f"{_HEAD}\nx,1,nan\n", "line 2: success nan is no rate"),
        (f"{_HEAD}\nx,1,.5\n\nx,,.5\n", r"line 4: step \(empty\) is no whole number"),
        (f"{_HEAD}\nx,-1,.5\n", "line 2: step -1 is no whole number"),
        (f"{_HEAD}\nx,1.5,.5\n", "line 2: step 1.5 is no whole number"),
        (f"{_HEAD}\nx,inf,.5\n", "line 2: step inf is no whole number"),
        (f"{_HEAD}\nx,1e30,.5\n", "line 2: step 1e30 is no whole number"),
        (f"{_HEAD}\n,1,.5\n", "line 2: algorithm is empty"),
        (f"{_HEAD}\nx,1,.5\nrandom,1,.5\n", "line 3: expert and random are the reference"),
        (f"{_HEAD},return\nx,1,.5,high\n", "line 2: return high is no number"),
        (f"{_HEAD},episodes\nx,1,.5,0\n", "line 2: episodes 0 is no positive whole number"),
        (f"{_HEAD},episodes\nx,1,.5,2.5\n", "line 2: episodes 2.5 is no positive whole number"),
        (f"{_HEAD},seed\nx,1,.5,a\n", "line 2: seed a is no whole number"),
        (f"{_HEAD}\nx,1,.5\nx,1,.6\n", "line 3: step 1 is there twice for algorithm x"),
        (f"{_HEAD},task\nx,1,.5,a\nx,2,.6,\n", "line 3: task is empty, other rows"),
        (f"{_HEAD}\nx,1,.5,9\n", "line 2: 4 values under 3 columns"),
        (f"{_HEAD}\nx,1\n", "line 2: 2 values under 3 columns"),
        (f"{_HEAD},step\nx,1,.5,1\n", "column 'step' is there twice"),
        (f"{_HEAD}\n", "there is no row below the header"),
        ("", "column 'algorithm' is missing"),
        (f'{_HEAD}\nx,1,".5\n', "after line 2: unexpected end of data"),
        (f"{_HEAD}\nx\xe9,1,.5\n", "after line .: 'utf-8' codec can't decode"),
    ],
)
def test_what_is_no_table_of_curves_is_refused(content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "theirs.csv"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=rf"theirs\.csv: {words}") as refused:
        read_curves(path)
    assert "\n" not in str(refused.value)


def test_the_last_row_of_each_task_is_its_final_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "theirs.csv"
    path.write_text(f"{_HEAD},task,seed\nx,10,0.1,a,\nx,20,0.3,a,\nx,15,0.2,b,\n")
    (section,) = sections(read_curves(path))
    assert section.scores("x").loc[0].to_dict() == {"a": 0.3, "b": 0.2}


def test_means_without_tasks_stand_beside_curves_with_tasks(tmp_path: Path) -> None:
    path = tmp_path / "theirs.csv"
    rows = "".join(f"theirs,{s},0.5,mt10_rand,cpu,100000\n" for s in (0, 50_000, 100_000))
    path.write_text(f"{_HEAD},suite,preset,steps_per_task\n{rows}")
    both = make_results(("mega",), seeds=3) + read_curves(path)
    (section,) = sections(both)
    assert section.missing == "all 4 runs finished"
    assert section.scored == ["mega"]
    curves = FIGURES["learning_curves"](section)
    assert set(curves.data["label"]) == {"mega", "theirs"}
    assert "theirs n = 1" in curves.caption
    for name in ("sample_efficiency", "task_success"):
        assert set(FIGURES[name](section).data["label"]) == {"mega"}, name
    made = TABLES["success_rates"](section)
    (warning,) = made.warnings
    assert "theirs was imported and has no tasks: it is in the curves, not in the" in warning
    assert "Final evaluation: 50 episodes per task" in made.caption


def test_imports_with_other_task_names_cost_none_of_our_runs(tmp_path: Path) -> None:
    path = tmp_path / "theirs.csv"
    rows = "".join(f"theirs,100000,0.5,{task[:-1]}2\n" for task in MT10[::3])
    path.write_text(f"{_HEAD},task\n{rows}")
    theirs = read_curves(path)
    theirs.runs = theirs.runs.assign(suite="mt10_rand", preset="cpu")
    (section,) = sections(make_results(("mega",), seeds=3) + theirs)
    assert section.tasks == MT10[::3]
    assert section.seeds("mega") == 3
    (warning,) = TABLES["success_rates"](section).warnings
    assert (
        "theirs was imported and names tasks that are not ours (button-press-topdown-v2," in warning
    )


def test_imports_of_one_file_name_are_not_averaged(tmp_path: Path) -> None:
    found = []
    for name, success in (("a", 0.2), ("b", 0.9)):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "results.csv"
        path.write_text(f"{_HEAD}\nx,10,0.1\nx,20,{success}\n")
        found.append(read_curves(path))
    (section,) = sections(found[0] + found[1])
    assert {label: float(section.scores(label).iloc[0, 0]) for label in section.scored} == {
        "x [origin=a/results.csv]": 0.2, "x [origin=b/results.csv]": 0.9,
    }  # fmt: skip
    again = sections(found[0] + found[0])[0]
    assert again.scores("x").to_numpy().tolist() == [[0.2]]
    # Nobody said of how many episodes .2 is a rate.
    made = TABLES["success_rates"](again)
    assert "0 or 1" not in made.caption
    assert "of as many episodes as its source had" in made.caption


def test_a_curve_is_the_mean_of_one_set_of_tasks(tmp_path: Path) -> None:
    path = tmp_path / "theirs.csv"
    path.write_text(f"{_HEAD},task\nx,10,0.1,a\nx,20,0.3,a\nx,20,0.5,b\nx,15,0.9,b\n")
    (section,) = sections(read_curves(path))
    means = section.curves("success").groupby("step")["value"].mean()
    assert means.to_dict() == {20: 0.4}
    assert len(section.task_curves("success")) == 4


def test_imports_change_neither_our_scale_nor_wait_for_our_tasks(tmp_path: Path) -> None:
    path = tmp_path / "theirs.csv"
    path.write_text(f"{_HEAD},suite,preset,steps_per_task\nx,9,0.5,mt10_rand,paper,1500000\n")
    ours = make_results(("mega",), seeds=1, preset="paper", steps_per_task=1_500_000)
    (section,) = sections(ours + read_curves(path))
    assert section.full_scale
    begun = replace(ours, metrics=pd.DataFrame(), probes={}, traces={}, tasks={})
    (section,) = sections(begun + read_curves(path))
    assert section.scores("x").to_numpy().tolist() == [[0.5]]


def test_a_copied_run_is_no_further_seed() -> None:
    results = make_results(("mega", "d2r"), seeds=3)
    runs = results.runs.assign(id=[f"{k:x}" for k in range(len(results.runs))])
    results = replace(results, runs=runs)
    backup = replace(
        results,
        runs=runs.assign(run="old/" + runs["run"]),
        metrics=results.metrics.assign(run="old/" + results.metrics["run"]),
    )
    (section,) = sections(results + backup)
    assert section.seeds("mega") == 3
    assert any("Copies of runs count once" in w for w in TABLES["success_rates"](section).warnings)


# Two sweeps --------------------------------------------------------------------------------------


def test_two_sweeps_are_compared_algorithm_by_algorithm(tmp_path: Path) -> None:
    before, after = (without_curves(make_results(("mega", "d2r"), seeds=4)) for _ in range(2))
    better = after.metrics["run"].str.contains("mega") & (after.metrics["metric"] == "success")
    after.metrics.loc[better, "value"] = after.metrics.loc[better, "count"]
    both = before.named("before") + after.named("after")
    (section,) = sections(both)
    found = {c.reference: c for c in comparisons(section)}
    assert set(found) == {"mega [sweep=after]", "d2r [sweep=after]"}
    assert found["mega [sweep=after]"].other == "mega [sweep=before]"
    assert "after] is better" in found["mega [sweep=after]"].verdict
    assert found["d2r [sweep=after]"].difference.estimate.value == 0
    text = build(both, tmp_path, formats=()).read_text()
    assert "Difference between the sweeps" in text


# Ablations ---------------------------------------------------------------------------------------


def test_an_ablation_is_judged_against_its_base() -> None:
    made = make_results(("mega", "mega@softmax", "d2r"), seeds=3)
    (section,) = sections(made)
    (ablation,) = section.ablations
    assert (ablation.name, ablation.base) == ("halfsoftmax", "mega")
    assert ablation.labels == ("mega", "mega@softmax")
    assert set(ablation.section.metrics["algorithm"]) == {"mega", "mega@softmax"}
    (alone,) = sections(make_results(("mega", "d2r"), seeds=3))
    assert alone.ablations == []


def test_an_ablation_made_for_another_suite_hides_none_of_this_one() -> None:
    """`many_tasks` asks of 200 toy tasks what `ga` asks of any suite."""
    every = ablations()
    made = replace(make_results(("mega", "mega@no_ga", "mt_sac"), seeds=3), ablations=every)
    (section,) = sections(made)
    assert [ablation.name for ablation in section.ablations] == ["ga"]
    there = make_results(("mega", "mega@no_ga", "mt_sac"), seeds=3, suite="toy200")
    (section,) = sections(replace(there, ablations=every))
    assert [ablation.name for ablation in section.ablations] == ["many_tasks"]
    plain = make_results(("mtmh_sac", "mtmh_sac@wide4"), seeds=3)
    (section,) = sections(replace(plain, ablations=every))
    assert [ablation.name for ablation in section.ablations] == ["capacity"]


def test_an_ablation_finds_variants_that_were_run_with_values_of_their_own() -> None:
    made = make_results(("mt_sac@ars[resets=1]", "mega@ars[resets=1]", "mega"), seeds=3)
    (section,) = sections(replace(made, ablations=ablations()))
    (ablation,) = section.ablations
    assert ablation.name == "ars"
    assert set(ablation.labels) == {"mt_sac@ars[resets=1]", "mega@ars[resets=1]"}


def test_long_labels_are_cut_to_what_tells_them_apart() -> None:
    names = ("x[a=1,b=1,c=7]", "x[a=2,b=2,c=7]", "x[a=2,b=2,c=8]", "y[a=1]")
    (section,) = sections(without_curves(make_results(names, seeds=1)))
    assert section.labels == ["x[a=1,c=7,…]", "x[a=2,c=7,…]", "x[a=2,c=8,…]", "y[a=1]"]


# Exports -----------------------------------------------------------------------------------------


def test_exports(tmp_path: Path) -> None:
    made = make_results(("mega", "d2r"), seeds=2, states={("d2r", 1): "failed"})
    written = export(made, tmp_path, "csv")
    assert [path.name for path in written] == [
        "runs.csv",
        "scores.csv",
        "metrics.csv",
        "timing.csv",
    ]
    scores = pd.read_csv(tmp_path / "scores.csv")
    (section,) = sections(made)
    mega = scores[scores["algorithm"] == "mega"].pivot_table("success", "seed", "task")
    assert np.allclose(mega[list(section.tasks)], section.scores("mega"))
    (path,) = export(made, tmp_path, "marl-eval")
    tree = json.loads(path.read_text())["mt10_rand"]["reach-v3"]
    assert set(tree["d2r"]) == {"seed_0"}  # the failed run has no final evaluation
    steps = tree["mega"]["seed_1"]
    assert steps["step_2"]["step_count"] == 10_000
    rate = section.scores("mega").loc[1, "reach-v3"]
    assert steps["absolute_metrics"]["success"] == [pytest.approx(rate)]
    names = {path.name for path in export(made, tmp_path, "latex")}
    assert "mt10_rand-cpu-100000-success_rates.tex" in names
    with pytest.raises(ValueError, match="unknown format 'xml'"):
        export(made, tmp_path, "xml")
    with pytest.raises(MissingError):
        export(Results(), tmp_path, "marl-eval")
    (theirs := tmp_path / "theirs.csv").write_text("algorithm,step,success\nx,1,.5\n")
    (path,) = export(read_curves(theirs), tmp_path / "more", "marl-eval")
    assert "NaN" not in path.read_text()


# Run directories of all sorts --------------------------------------------------------------------


@pytest.fixture
def runs(finished: Callable[[str], RunStore], tmp_path: Path) -> Path:
    """One finished run of MEGA below a folder of its own."""
    store = finished("mega")
    shutil.copytree(store.path, tmp_path / "runs" / "toy" / "mega" / store.path.name)
    return tmp_path / "runs"


def test_a_command_trains_the_same_run_again(runs: Path) -> None:
    row = frames.load(runs)["runs"].iloc[0]
    assert row["command"].startswith(
        "bench run --algos mega --suite toy --seeds 0-0 --preset smoke"
    )
    words = shlex.split(row["command"])
    overrides = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    again = RunSpec.resolve(
        "mega", "toy", 0, preset_name="smoke", overrides=parse_overrides(overrides)
    )
    assert again.id == row["id"]


def test_older_foreign_and_damaged_runs(runs: Path) -> None:
    (original,) = runs.glob("toy/mega/*")
    for name in ("older", "foreign", "damaged", "empty"):
        shutil.copytree(original, original.with_name(name))
    old = json.loads((original / "spec.json").read_text())
    older = old["spec"] | {"seed": 7, "no_longer": 1}
    del older["protocol"]["eval_seed"]
    spec = original.with_name("older") / "spec.json"
    spec.write_text(json.dumps({"schema": 0, "spec": older}))
    foreign = old | {"spec": old["spec"] | {"algorithm": "gone", "label": "gone", "seed": 8}}
    (original.with_name("foreign") / "spec.json").write_text(json.dumps(foreign))
    (original.with_name("damaged") / "spec.json").write_text("{")
    (original.with_name("empty") / "spec.json").write_text("{}")
    loaded = Results(**frames.load(runs))
    assert sorted(loaded.unreadable) == ["toy/mega/damaged", "toy/mega/empty"]
    assert "spec.json is damaged" in loaded.unreadable["toy/mega/damaged"]
    (section,) = sections(loaded)
    (gone,) = (label for label in section.scored if label.startswith("gone"))
    assert len(section.scores(gone)) == 1
    assert 7 in set(section.runs["seed"])
    text = build(loaded, runs / "page", formats=()).read_text()
    assert "2 run directories could not be read" in text
    assert "because of an error" not in text


def test_a_cut_snapshot_costs_one_run(runs: Path) -> None:
    snapshot = next(runs.rglob("probe/0*.npz"))
    snapshot.write_bytes(snapshot.read_bytes()[:-30])
    assert len(frames.load(runs)["unreadable"]) == 1


@pytest.mark.parametrize(
    ("damage", "noticed"),
    [
        (lambda text: text.partition("\n")[2], True),
        (lambda text: text.replace("kind", "knd", 1), True),
        (lambda text: text + "4000,eval,reach,success,0x5,10\n", True),
        (lambda text: text + "many,eval,reach,success,5,10\n", True),
        (lambda text: text[:-3], False),  # half of a line: as if it were not there yet
    ],
)
def test_damaged_metrics_cost_one_run(
    runs: Path, damage: Callable[[str], str], noticed: bool
) -> None:
    (original,) = runs.glob("toy/mega/*")
    shutil.copytree(original, damaged := original.with_name("9-0123456789"))
    (damaged / "SHA256SUMS").unlink()
    metrics = damaged / "metrics.csv"
    metrics.write_text(damage(metrics.read_text()))
    loaded = Results(**frames.load(runs))
    assert list(loaded.unreadable) == ["toy/mega/9-0123456789"] * noticed
    assert len(loaded.runs) + len(loaded.unreadable) == 2
    assert "because of an error" not in build(loaded, runs / "page", formats=()).read_text()


@pytest.mark.parametrize("tail", ["1200,train,poi", "12", "900,eval,point-2,success,7"])
def test_a_line_cut_by_a_full_disk_costs_nothing_else(runs: Path, tail: str) -> None:
    (original,) = runs.glob("toy/mega/*")
    shutil.copytree(original, failed := original.with_name("8-0123456789"))
    (failed / "SHA256SUMS").unlink()
    (failed / "status.json").write_text('{"state": "failed", "step": 900}')
    whole = Results(**frames.load(runs))
    with (failed / "metrics.csv").open("a") as file:
        file.write(tail)
    cut = Results(**frames.load(runs))
    pd.testing.assert_frame_equal(cut.metrics, whole.metrics)
    assert [s.tasks for s in sections(cut)] == [s.tasks for s in sections(whole)]
    assert len(sections(cut)[0].scored) == 1


def test_a_snapshot_with_any_byte_wrong_costs_one_run(runs: Path) -> None:
    snapshot = next(runs.rglob("probe/0*.npz"))
    whole = snapshot.read_bytes()
    for place in range(0, min(len(whole), 400), 3):
        for bit in (1, 8, 64):
            snapshot.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
            with contextlib.suppress(StoreError):
                frames.read_probes(RunStore(snapshot.parent.parent))


def test_report_compares_imports_and_exports(runs: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(runs, other)
    done = bench("report", "--compare", str(runs), str(other), "--to", str(tmp_path / "page"))
    assert done.returncode == 0, done.stderr
    assert re.search(r"sweep=other\] − mega\S* \[sweep=runs\] on toy: \+0\.00", done.stdout)
    curves = tmp_path / "c.csv"
    curves.write_text("algorithm,step,success\nx,1,2\n")
    done = bench("report", "--out", str(runs), "--import", str(curves))
    assert done.returncode == 2
    assert "no rate" in done.stderr
    done = bench("export", "--format", "nope", "--out", str(runs))
    assert done.returncode == 2
    assert "marl-eval" in done.stderr
    done = bench("export", "--format", "csv", "--out", str(runs))
    assert (runs / "export" / "scores.csv").exists()


def test_a_watched_report_is_renewed_until_the_runs_are_done(runs: Path) -> None:
    (run,) = runs.glob("toy/mega/*")
    status = run / "status.json"
    finished = status.read_text()
    status.write_text(json.dumps(json.loads(finished) | {"state": "pending"}))
    process = subprocess.Popen(
        [*BENCH, "report", "--out", str(runs), "--watch", "--every", "1"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    page = runs / "report" / "index.html"
    try:
        while not page.exists():
            assert process.poll() is None
            time.sleep(0.2)
        assert 'http-equiv="refresh" content="1"' in page.read_text()
        status.write_text(finished)
        os.utime(status, (time.time() + 5, time.time() + 5))
        assert process.wait(timeout=120) == 0
    finally:
        process.kill()
    assert "http-equiv" not in page.read_text()
    assert "The run finished" in page.read_text()


def test_a_policy_is_filmed_and_the_clips_are_in_the_report(runs: Path, tmp_path: Path) -> None:
    (run,) = runs.glob("toy/mega/*")
    done = bench("eval", str(run), "--episodes", "1", "--video")
    assert done.returncode == 0, done.stderr
    clips = sorted((run / "video").glob("*"))
    assert [clip.stem for clip in clips] == ["point-0", "point-1", "point-2"]
    assert Image.open(clips[0]).n_frames > 5
    text = build(Results(**frames.load(runs)), tmp_path / "page", formats=()).read_text()
    assert text.count('<img class="clip"') == 3
    film = tmp_path / "film.gif"
    assert bench("eval", str(run), str(film), "--episodes", "1", "--video").returncode == 0
    assert Image.open(film).size == (192, 192)  # 3 tasks in a square
    wrong = bench("eval", str(run), "film.avi", "--video")
    assert wrong.returncode == 2
    assert ".gif" in wrong.stderr


def test_without_a_renderer_the_message_says_what_to_install(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(video, "BACKENDS", ("no-such-renderer",))
    (run,) = runs.glob("toy/mega/*")
    done = bench("eval", str(run), "--episodes", "1", "--video")
    assert done.returncode == 1
    assert "neither EGL nor OSMesa" in done.stderr
    assert "apt-get install libosmesa6" in done.stderr


@pytest.mark.parametrize(
    ("value", "options", "code", "words"),
    [
        ("bogus", ("--video",), 2, "MUJOCO_GL is 'bogus', which MuJoCo does not know"),
        ("bogus", (), 2, "MUJOCO_GL is 'bogus', which MuJoCo does not know"),
        ("disabled", ("--video",), 1, "MUJOCO_GL is 'disabled', which renders nothing here"),
        ("glfw", ("--video",), 1, "MUJOCO_GL is 'glfw', which renders nothing here"),
    ],
)
def test_a_renderer_that_is_none_is_named(
    runs: Path, monkeypatch: pytest.MonkeyPatch, value: str, options: tuple[str, ...], code: int,
    words: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("MUJOCO_GL", value)
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    (run,) = runs.glob("toy/mega/*")
    done = bench("eval", str(run), "--episodes", "1", *options)
    assert done.returncode == code
    assert words in done.stderr
    assert "set it to egl, osmesa or glfw (which needs a screen), or unset it" in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2


def test_a_renderer_that_is_none_is_named_where_mujoco_is_imported_first() -> None:
    bogus = os.environ | {"MUJOCO_GL": "bogus"}
    command = [*BENCH, "run", "--algos", "mega", "--suite", "mt1_rand:reach-v3", "--dry-run"]
    done = subprocess.run(command, env=bogus, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("bench: invalid value for environment variable MUJOCO_GL: bogus;")
    command = [*BENCH, "doctor", "--json"]
    done = subprocess.run(command, env=bogus, capture_output=True, text=True, check=False)
    checks = {row["check"]: row for row in json.loads(done.stdout)["rows"]}
    assert checks["renderer"]["result"] == checks["simulator"]["result"] == "bad"
    assert "set it to egl" in checks["renderer"]["advice"]
    assert "reinstall" not in checks["simulator"]["advice"]


# Notebooks ---------------------------------------------------------------------------------------


def test_tables_and_figures_show_themselves() -> None:
    (section,) = sections(make_results(("mega", "d2r"), seeds=3))
    assert "<table" in TABLES["success_rates"](section)._repr_html_()
    assert FIGURES["aggregates"](section)._repr_png_().startswith(b"\x89PNG")


def test_the_example_notebook_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).resolve().parent.parent
    monkeypatch.chdir(root)
    cells = json.loads((root / "examples" / "report.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    names: dict[str, object] = {}
    for source in code:
        exec(source, names)
    assert len(code) > 5
    assert "section" in names
