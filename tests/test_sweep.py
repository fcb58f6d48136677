"""What a sweep expands to, and grids read from files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.spec import RunSpec, SpecError
from bench.speed import Cost
from bench.store import RunStore
from bench.sweep import (
    Job,
    Request,
    ablations,
    check_room,
    expand,
    names,
    plan,
    prepare,
    read_grid,
)
from bench.train import train


def request(*algorithms: str, seeds: tuple[int, ...] = (0,), **overrides: object) -> Request:
    return Request(algorithms, ["toy"], seeds, "smoke", overrides)


def test_a_sweep_is_the_product_and_advances_seed_by_seed() -> None:
    specs = expand([request("mt_sac", "mtmh_sac", seeds=(3, 1))])
    found = [(spec.algorithm, spec.seed) for spec in specs]
    assert found == [("mt_sac", 3), ("mtmh_sac", 3), ("mt_sac", 1), ("mtmh_sac", 1)]
    assert len({spec.id for spec in specs}) == 4


def test_seeds_share_everything_but_id_and_seed() -> None:
    first, second = expand([request("mt_sac", seeds=(0, 1))])
    assert first.model_copy(update={"id": second.id, "seed": 1}) == second


def test_a_run_asked_for_twice_is_trained_once() -> None:
    both = [request("mega", "mega@fixed8"), request("mega", start_stage=8, evolve=False)]
    labels = [spec.label for spec in expand(both)]
    assert labels == ["mega", "mega@fixed8"]


def test_all_problems_of_a_sweep_are_told_at_once() -> None:
    with pytest.raises(SpecError) as caught:
        expand([request("mt_sak", "mt_sac@x"), request("mt_sac", gama=1)])
    text = str(caught.value)
    assert all(word in text for word in ("'mt_sak'", "'mt_sac'", "mt_sac@x", "'gama'", "'gamma'"))


def test_a_setting_for_an_algorithm_outside_the_sweep_is_refused() -> None:
    with pytest.raises(SpecError, match=r"mega\.start_stage: no algorithm 'mega' in this sweep"):
        expand([request("mt_sac", **{"mega.start_stage": 4})])


def test_a_setting_over_all_requests_is_for_those_it_concerns(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    runs = '[[runs]]\nalgos = ["mega"]\n[[runs]]\nalgos = ["mt_sac"]\n'
    top = 'suite = "toy"\nseeds = 1\nset = { "mega.start_stage" = 4 }\n'
    path.write_text(top + runs)
    mega, mt_sac = expand(*read_grid(path))
    assert (mega.config["start_stage"], mt_sac.changed) == (4, {})
    path.write_text(top.replace("mega.", "d2r.") + runs)
    with pytest.raises(SpecError, match="no algorithm 'd2r' in this sweep"):
        expand(*read_grid(path))
    path.write_text(top + runs + 'set = { "mega.window" = 4 }\n')  # of the table of mt_sac
    with pytest.raises(SpecError, match=r"runs\[2\]: set mega\.window: no algorithm 'mega'"):
        expand(*read_grid(path))


def test_only_seeds_share_a_cost() -> None:
    short, again = expand([request("mt_sac", seeds=(0, 1), steps_per_task=4_000)])
    (long,) = expand([request("mt_sac", steps_per_task=2_000_000)])
    groups = [Job(spec, RunStore(Path("out"))).group for spec in (short, again, long)]
    assert groups[0] == groups[1] != groups[2]


def test_what_a_run_already_holds_is_not_asked_of_the_disk_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (job,) = plan(expand([request("mt_sac")]), tmp_path)
    costs = {job.group: Cost(seconds=1.0, working_bytes=10_000_000)}
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: SimpleNamespace(total=0, used=0, free=4_000_000)
    )
    assert "4.0 MB free, 1 runs at a time need 10.0 MB" in check_room(tmp_path, costs, [job], 2)
    job.store.state_path.mkdir(parents=True)
    with job.store.replay_path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 8_000_000)
    assert check_room(tmp_path, costs, [job], 2) == ""


def test_planning_touches_no_disk(tmp_path: Path) -> None:
    jobs = plan(expand([request("mt_sac")]), tmp_path / "out")
    assert [job.outcome for job in jobs] == ["pending"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("values", ['"mega.start_stage=4"', '["gamma=0.9"]', "7"])
def test_a_grids_set_must_be_a_table(values: str, tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    for text in (f"set = {values}\n", f"[[runs]]\nset = {values}\n"):
        path.write_text('algos = ["mega"]\nsuite = "toy"\nseeds = 1\n' + text)
        with pytest.raises(SpecError, match="is not a table; write set ="):
            expand(*read_grid(path))


def test_every_shipped_ablation_resolves() -> None:
    for entry in ablations().values():
        assert {"description", "paper", "algos"} <= entry.keys() <= {
            "description", "paper", "algos", "suite", "set",
        }  # fmt: skip
        rows, suite = set(entry["algos"]), entry.get("suite", "mt10_rand")
        for preset in ("cpu", "paper", "metaworld_plus"):
            request = Request(entry["algos"], [suite], [0], preset, entry.get("set", {}))
            specs = expand([request])
            specs[0].make_suite()
            found = {spec.label for spec in specs}
            assert found <= rows  # a report has a row for every run
            # And a run for every row, but for one that sets what the plain algorithm has here.
            assert len(rows - found) <= 1
            assert all(row.partition("@")[0] in found for row in rows - found)
        assert entry["paper"]
        assert entry["description"]


def test_a_configuration_that_is_there_by_another_name_is_not_trained_again(tmp_path: Path) -> None:
    def runs(label: str, **overrides: Any) -> list[RunSpec]:
        return expand([Request([label], ["toy"], [0], "smoke", overrides)])

    pairs = [
        (runs("mega@tuned"), runs("mega@trigger_patient")),
        (runs("mega@softmax", start_stage=4), runs("mega@stage4", weights="softmax")),
    ]
    for (first,), (second,) in pairs:
        assert first.id == second.id
        (begun,) = prepare([first], tmp_path, {})
        (found,) = plan([second], tmp_path)
        assert found.store.path == begun.store.path
        assert found.spec.title == first.title


def test_many_tasks_have_time_for_generations_and_growth() -> None:
    """Otherwise its share of the genetic algorithm would be that of drawing genotypes alone."""
    entry = ablations()["many_tasks"]
    (spec,) = expand([Request(["mega"], [entry["suite"]], [0], "cpu", entry["set"])])
    plan, config = spec.protocol.plan, spec.config
    counted = (plan.steps_per_task - plan.warmup_steps) // plan.horizon
    assert counted // (config["population_size"] * config["max_evaluate_times"]) >= 3
    assert counted >= 3 * config["window"]  # the third window may already follow an increase


@pytest.mark.slow
@pytest.mark.parametrize("label", sorted({a for e in ablations().values() for a in e["algos"]}))
def test_every_row_of_the_shipped_ablations_trains(
    label: str, toy_run: dict[str, int], open_store: Callable[..., RunStore], tmp_path: Path
) -> None:
    """To its end, on the toy suite."""
    spec = RunSpec.resolve(label, "toy", 0, preset_name="smoke", overrides=toy_run)
    store = open_store(tmp_path, spec)
    train(spec, store)
    assert store.done
    rows = [line.split(",") for line in (store.path / "metrics.csv").read_text().splitlines()]
    final = [float(row[4]) for row in rows if row[1] == "final" and row[3] == "return"]
    assert len(final) == 3
    assert np.isfinite(final).all()


def test_a_grid_lays_runs_over_its_top(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(
        'suite = ["toy", "toy4"]\nseeds = [2, 5]\npreset = "smoke"\nset = { gamma = 0.9 }\n'
        '[[runs]]\nalgos = ["mt_sac"]\n'
        '[[runs]]\nalgos = "mega"\nseeds = 1\nset = { mega = { start_stage = 4 } }\n'
    )
    specs = expand(*read_grid(path))
    assert [(s.suite, s.label, s.seed) for s in specs] == [
        ("toy", "mt_sac", 2), ("toy4", "mt_sac", 2), ("toy", "mt_sac", 5), ("toy4", "mt_sac", 5),
        ("toy", "mega", 0), ("toy4", "mega", 0),
    ]  # fmt: skip
    assert {s.config["gamma"] for s in specs} == {0.9}
    assert {s.config.get("start_stage") for s in specs} == {None, 4}


def test_a_grid_tells_all_its_errors_with_their_place(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(
        'sute = "toy"\n[[runs]]\nalgos = "mega"\n[[runs]]\nsuite = "toy"\nseeds = "4-2"\n'
    )
    with pytest.raises(SpecError) as caught:
        expand(*read_grid(path))
    text = str(caught.value)
    assert "'sute'" in text
    assert "'suite'" in text
    assert "runs[1]: suite missing" in text
    assert "runs[1]: seeds missing" in text
    assert "runs[2]: algos missing" in text
    assert "runs[2]: seeds '4-2'" in text


@given(st.text(max_size=80))
def test_a_grid_file_of_anything_is_read_or_refused_clearly(text: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "grid.toml"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(SpecError):
            expand(*read_grid(path))


@pytest.mark.parametrize(
    ("text", "words"), [("", "nothing named"), ("a,b,a", "'a' is named twice")]
)
def test_lists_of_names(text: str, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        names(text, "--algos")
