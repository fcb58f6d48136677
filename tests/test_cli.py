"""The command line from the outside, as a user meets it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest

import algorithms
import suites
import suites.base
from bench import references
from bench.cli import app, main
from bench.spec import RunSpec

BENCH = [sys.executable, "-m", "bench.cli"]
TOY = [
    "--suite", "toy", "--preset", "smoke",
    *("--set", "horizon=25", "--set", "eval_every=100", "--set", "eval_episodes=2"),
    *("--set", "final_episodes=2", "--set", "warmup_steps=50", "--set", "width=16"),
]  # fmt: skip


class Done(NamedTuple):
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def bench(*arguments: str) -> Done:
    """Run the command line in this process, which spares the imports."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["bench", *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    return Done(int(ended.value.code or 0), out.getvalue(), err.getvalue())


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*BENCH, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def statuses(out: Path) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = json.loads(bench("status", "--out", str(out), "--json").stdout)[
        "rows"
    ]
    return rows


def wait_for_step(out: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found = [json.loads(path.read_text()) for path in out.rglob("status.json")]
        if any(status.get("step", 0) >= step for status in found):
            return
        time.sleep(0.05)
    raise AssertionError(f"no run reached step {step}")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of two algorithms on toy, trained by the command line."""
    out = tmp_path_factory.mktemp("finished")
    done = bench(
        "run", "--algos", "mt_sac,mega", *TOY, "--seeds", "1", "--steps", "300", "--out", str(out)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def shown_commands() -> list[str]:
    return [info.name or info.callback.__name__ for info in app.registered_commands]  # type: ignore[union-attr]


def test_help_needs_no_torch_and_names_every_command() -> None:
    code = (
        "import sys, bench.cli as c; from typer.testing import CliRunner;"
        "r = CliRunner().invoke(c.app, ['--help']); print(r.output);"
        "heavy = {'torch', 'metaworld', 'pandas', 'matplotlib'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert shown.returncode == 0, shown.stderr
    commands = shown_commands()
    assert {"run", "report", "export", "clean", "verify"} <= set(commands)
    for command in commands:
        assert command in shown.stdout
        assert "Example: bench" in bench(command, "--help").stdout, command


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("run --algos megga --suite toy", ["'megga'", "'mega'"]),
        ("run --algos mega@softmx --suite toy", ["mega@softmx", "mega@softmax"]),
        ("run --algos mega --suite mt10_rnd", ["'mt10_rnd'", "mt10_rand"]),
        ("run --algos mega --suite mt1_rand:reech-v3", ["reech-v3", "reach-v3"]),
        ("run --algos mega --suite toy --preset cpo", ["'cpo'", "'cpu'"]),
        ("run --algos mega --suite toy --set gama=1", ["'gama'", "'gamma'"]),
        ("run --algos mega --suite toy --set gamma=2", ["gamma", "2", "less than 1"]),
        ("run --algos mega --suite toy --set gamma", ["key=value"]),
        ("run --algos mega --suite toy --seeds 0", ["seeds '0'"]),
        ("run --algos mega --suite toy --seeds 3,3", ["3 is named twice"]),
        ("run --algos mega@fixed --suite toy", ["mega@fixed{start_stage}'?"]),
        ("run --algos mega --suite mt1_rand", ["mt1_rand:<task>'?"]),
        ("run --algos mega --suite toy --set batch_per_task=1e9", ["batch_per_task", "100000"]),
        ("run --algos mega@fixed999 --suite toy", ["start_stage=999", "256"]),
        ("run --algos mega,mega --suite toy", ["'mega' is named twice"]),
        ("run --algos mega --suite toy --steps 301", ["301", "200 or 400"]),
        ("run --algos mega --suite toy --workers none", ["'none'", "auto"]),
        ("run --algos mega --suite toy --device tpu", ["'tpu'", "cuda"]),
        ("run --algos mega --suite toy --launcher slrm", ["'slrm'", "local"]),
        ("run --suite toy", ["--algos"]),
        ("run --grid missing.toml", ["missing.toml"]),
        ("ablate gaa", ["'gaa'", "'ga'"]),
        ("list algo", ["'algo'", "'algos'"]),
        ("eval nothing", ["'nothing'"]),
        ("show d2rr", ["'d2rr'", "'d2r'"]),
    ],
)
def test_a_mistake_is_named_with_what_is_allowed(arguments: str, words: Sequence[str]) -> None:
    done = bench(*arguments.split())
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert 1 <= len(done.stderr.splitlines()) <= 2, done.stderr
    for word in words:
        assert word in done.stderr


def test_no_seeds_named_is_no_default() -> None:
    done = bench("run", "--algos", "mega", "--suite", "toy", "--seeds", "")
    assert done.returncode == 2
    assert "seeds ''" in done.stderr


def test_a_broken_plug_in_costs_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def plugins(kind: str) -> dict[str, str]:
        return {"broken": "no_such_package.deep:Deep"} if kind == "algorithm" else {}

    for module in (algorithms, suites.base):
        monkeypatch.setattr(module, "plugins", plugins)
    for listing in ("algos", "variants"):
        shown = bench("list", listing)
        assert shown.returncode == 0
        assert "mega" in shown.stdout
        assert "broken" not in shown.stdout
        assert "no_such_package.deep:Deep" in shown.stderr
    done = bench("run", "--algos", "broken", "--suite", "toy", "--dry-run")
    assert done.returncode == 2
    assert "No module named 'no_such_package'" in done.stderr


def test_a_run_that_is_not_there_is_named_with_those_that_are(finished: Path) -> None:
    done = bench("doctor", "megga", "--out", str(finished))
    assert done.returncode == 2
    assert "no run named 'megga'" in done.stderr
    assert "toy/mega/0-" in done.stderr


def test_an_output_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = bench("run", "--algos", "mt_sac", *TOY, "--out", str(tmp_path / "file" / "runs"))
    assert done.returncode == 1
    assert "file/runs" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_dry_run_prints_the_plan_and_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = bench("run", "--algos", "mt_sac", *TOY, "--seeds", "3", "--dry-run", "--out", str(out))
    assert done.returncode == 0, done.stderr
    first = done.stdout.splitlines()[0]
    assert first.startswith("Reduced scale but for eval_episodes=2, ")
    assert "--preset paper" in first
    assert "3 runs" in done.stdout
    assert "3 to train" in done.stdout
    assert "Estimated" in done.stdout
    assert not out.exists()


def test_the_same_command_again_trains_nothing(finished: Path) -> None:
    before = {p: p.read_bytes() for p in finished.rglob("metrics.csv")}
    done = bench(
        "run", "--algos", "mt_sac,mega", *TOY, "--seeds", "1", "--steps", "300",
        "--out", str(finished),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 done, 0 to train" in done.stdout
    assert before == {p: p.read_bytes() for p in finished.rglob("metrics.csv")}


def test_references_stand_beside_the_runs(finished: Path) -> None:
    rows = {str(row["run"]).split("/")[1]: row for row in statuses(finished)}
    assert rows.keys() == {"expert", "random", "mega", "mt_sac"}
    assert {row["state"] for row in rows.values()} == {"done"}
    assert rows["expert"]["success"] == 1.0


def test_references_that_cannot_be_measured_have_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not waited for, and tried again by the next sweep."""

    def none(*_: object) -> None:
        raise ValueError("there is no expert")

    spec = RunSpec.resolve("mt_sac", "toy", 0, preset_name="smoke")
    with monkeypatch.context() as patch:
        patch.setattr("suites.toy.Toy.expert", none)
        (problem,) = references.ensure([spec], tmp_path, {})
    assert "there is no expert" in problem
    rows = {str(row["run"]).split("/")[1]: row for row in statuses(tmp_path)}
    assert rows["expert"]["state"] == "failed"
    assert rows["random"]["state"] == "done"
    assert references.ensure([spec], tmp_path, {}) == []


def test_references_serve_runs_of_every_length(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    expert = next(out.rglob("expert/*/metrics.csv")).read_bytes()
    for more in (["--steps", "200"], ["--steps", "300", "--set", "batch_per_task=8"]):
        done = bench("run", "--algos", "mt_sac", *TOY, *more, "--seeds", "1", "--out", str(out))
        assert done.returncode == 0, done.stderr
        assert "reference" not in done.stderr
    (kept,) = out.rglob("expert/*/metrics.csv")
    assert kept.read_bytes() == expert


def test_the_shortest_episodes_can_be_planned(tmp_path: Path) -> None:
    for horizon in ("1", "2"):
        done = bench(
            "run", "--algos", "mt_sac", "--suite", "toy", "--preset", "smoke", "--seeds", "1",
            "--set", f"horizon={horizon}", "--dry-run", "--out", str(tmp_path),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "Estimated" in done.stdout


@pytest.mark.parametrize("device", ["tpu", "cpu:", "cpu:0", "cuda:x", "cuda:9"])
def test_a_device_that_is_not_here_is_a_usage_error(device: str, finished: Path) -> None:
    for command in (
        ["run", "--algos", "mt_sac", "--suite", "toy", "--out", str(finished)],
        ["eval", "toy/mt_sac/0", "--out", str(finished)],
        ["verify", "toy/mt_sac/0", "--out", str(finished)],
    ):
        done = bench(*command, "--device", device)
        assert done.returncode == 2, done.stderr
        assert repr(device) in done.stderr


def test_the_presets_source_says_how_many_seeds(tmp_path: Path) -> None:
    asked = ["run", "--algos", "mt_sac", "--dry-run", "--out", str(tmp_path)]
    plus = bench(*asked, "--suite", "mt1_rand:reach-v3", "--preset", "metaworld_plus")
    assert "10 runs" in plus.stdout, plus.stderr
    assert "5 runs" in bench(*asked, "--suite", "toy", "--preset", "smoke").stdout


def test_speed_measures_each_algorithm_in_its_own_world() -> None:
    done = bench(
        "speed", "--algos", "mt_sac,mega", "--suite", "toy", "--preset", "smoke", "--seconds", "0",
        "--set", "mega.envs_per_task=5", "--set", "mt_sac.horizon=2", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout, parse_constant=pytest.fail)["rows"]
    assert [row["algorithm"] for row in rows] == ["mt_sac", "mega"]
    assert all(row["step_ms"] > 0 for row in rows)


def test_the_status_ends_with_the_final_success(finished: Path) -> None:
    for run in (path.parent for path in finished.rglob("m*/*/spec.json")):
        rows = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
        final = [float(r[4]) / float(r[5]) for r in rows if r[1] == "final" and r[3] == "success"]
        status = json.loads((run / "status.json").read_text())
        assert status["success"] == pytest.approx(sum(final) / len(final))
        assert status["parameters"].keys() == {"actor", "critic"}


def test_a_report_is_one_page(finished: Path, tmp_path: Path) -> None:
    done = bench("report", "--out", str(finished), "--to", str(tmp_path / "page"))
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page" / "index.html").read_text()
    assert "SMOKE" in page
    assert "mega" in page
    assert "mega" in done.stdout


def test_a_checkpoint_is_evaluated_again_as_it_was(finished: Path) -> None:
    run = next(path.parent for path in finished.rglob("mega/*/spec.json"))
    done = bench("eval", str(run), "--episodes", "2", "--json")
    assert done.returncode == 0, done.stderr
    rows = {row["task"]: row["successes"] for row in json.loads(done.stdout)["rows"]}
    final = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    assert rows == {r[2]: int(r[4]) for r in final if r[1] == "final" and r[3] == "success"}


def test_the_doctor_judges_a_run(finished: Path) -> None:
    done = bench("doctor", "mega", "--out", str(finished), "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["check"]: row for row in json.loads(done.stdout)["rows"]}
    assert {"spec.json", "metrics.csv", "updates", "population", "growth", "clones"} <= rows.keys()
    assert "of their bits" in rows["population"]["value"]
    assert all(row["result"] in ("good", "note") for row in rows.values())


def test_speed_sets_algorithms_side_by_side() -> None:
    done = bench("speed", "--suite", "toy", "--algos", "mt_sac,mega@fixed8", "--preset", "smoke",
                 "--set", "batch_per_task=20", "--set", "updates_per_step=3", "--seconds", "0.5",
                 "--set", "horizon=150", "--set", "eval_every=900", "--set", "steps_per_task=3000",
                 "--simulators", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    first, second = report["rows"]
    assert first["ratio"] == 1.0
    assert second["ratio"] == pytest.approx(second["update_ms"] / first["update_ms"])
    assert (first["algorithm"], second["batch"], second["threads"]) == ("mt_sac", 60, 1)
    assert all(0 < row["peak_share"] < 1 for row in (first, second))
    step_ms = first["step_ms"] + first["act_ms"] + 3 * first["update_ms"]
    assert first["steps_per_second"] == pytest.approx(3 * 1000 / step_ms)
    # Layers of 64 on 60 rows. Two critics: forward at the target, the value and the policy; the
    # value's backward pass to the weights and to the inputs of all layers but the first, the
    # policy's to all inputs. Actor: forward at s' and s, backward likewise.
    spec = suites.load("toy").spec
    first_layer, hidden = (spec.obs_dim + spec.action_dim) * 64, 2 * 64 * 64 + 64
    critic = 2 * (6 * (first_layer + hidden) - first_layer)
    first_layer, hidden = spec.obs_dim * 64, 2 * 64 * 64 + 64 * 2 * spec.action_dim
    actor = 4 * (first_layer + hidden) - first_layer
    assert first["gflop"] == pytest.approx(2e-9 * 60 * (critic + actor))
    assert report["simulators"][0]["steps_per_second"] > 0
    assert {row["horizon"] for row in report["simulators"]} == {150}
    assert report["hardware"]["cores"] >= 1


def test_speed_times_real_training() -> None:
    done = bench("speed", "--suite", "toy", "--algos", "mt_sac", "--preset", "smoke",
                 "--seconds", "0", "--set", "horizon=150", "--set", "eval_every=900",
                 "--set", "steps_per_task=3000", "--train", "400", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["training"]
    assert row["steps"] == 450  # whole episodes
    assert sum(row[part] for part in ("update", "simulator", "act", "rest")) == pytest.approx(1)
    assert all(row[part] > 0 for part in ("update", "simulator", "act", "rest"))
    assert 0 < row["slowest"] <= row["steps_per_second"] <= row["fastest"]
    assert row["evaluation_steps_per_second"] > 0


def test_speed_finds_what_is_wrong_before_it_measures() -> None:
    done = bench("speed", "--suite", "toy,mt10_rnd", "--algos", "mt_sac", "--seconds", "1000")
    assert done.returncode == 2
    assert "mt10_rnd" in done.stderr


def test_speed_names_the_threads_that_are_possible() -> None:
    done = bench("speed", "--threads", "1,9999")
    assert done.returncode == 2
    assert "'9999'" in done.stderr
    assert "all" in done.stderr


def test_listings_have_a_schema(finished: Path) -> None:
    for arguments in (
        ["list", "algos"], ["list", "variants"], ["list", "suites"], ["list", "presets"],
        ["list", "ablations"], ["show", "mega@softmax"], ["params", "--suite", "mt10_rand"],
        ["status", "--out", str(finished)],
    ):  # fmt: skip
        content = json.loads(bench(*arguments, "--json").stdout)
        assert content["schema"] == 1
        assert content["rows"], arguments


def test_parameters_round_to_the_published_ones() -> None:
    done = bench("params", "--suite", "mt10_rand,mt50_rand", "--json")
    for row in json.loads(done.stdout)["rows"]:
        if row["published_millions"] is not None:
            assert round(row["sum"] / 1e6, 2) == row["published_millions"], row


def test_show_tells_where_values_come_from() -> None:
    rows = json.loads(bench("show", "mega@fixed8", "--preset", "cpu", "--json").stdout)["rows"]
    by_field = {row["field"]: row for row in rows}
    assert by_field["start_stage"]["value"] == 8
    assert by_field["start_stage"]["from"] == "variant fixed8"
    assert by_field["width"]["from"] == "preset cpu"
    assert by_field["gamma"]["from"] == "default"
    assert all(row["meaning"] for row in rows)


def test_interrupt_saves_and_the_same_command_continues(tmp_path: Path) -> None:
    command = [
        "run", "--algos", "mt_sac", *TOY, "--seeds", "1", "--steps", "20000",
        "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    process = start(*command)
    try:
        wait_for_step(tmp_path / "out", 200)
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=120)[0]
    finally:
        process.kill()
    assert process.returncode == 130, output
    (row,) = (row for row in statuses(tmp_path / "out") if "/mt_sac/" in str(row["run"]))
    assert row["state"] == "interrupted"
    assert 0 < int(str(row["step"])) < 20000
    again = bench(*command, "--dry-run")
    assert "1 of them continued" in again.stdout


def test_a_killed_run_is_recorded_and_the_others_go_on(tmp_path: Path) -> None:
    process = start(
        "run", "--algos", "mt_sac,mtmh_sac", *TOY, "--seeds", "1", "--steps", "1500",
        "--out", str(tmp_path), "--workers", "1",
    )  # fmt: skip
    try:
        wait_for_step(tmp_path, 100)
        status = next(
            json.loads(path.read_text()) for path in tmp_path.rglob("mt_sac/*/status.json")
        )
        os.kill(status["pid"], signal.SIGKILL)
        output = process.communicate(timeout=200)[0]
    finally:
        process.kill()
    assert process.returncode == 1
    assert "SIGKILL" in output
    rows = {str(row["run"]).split("/")[1]: row for row in statuses(tmp_path)}
    assert rows["mt_sac"]["state"] == "failed"
    assert rows["mtmh_sac"]["state"] == "done"


PLUGIN = Path(__file__).resolve().parent / "plugin"


def test_the_readme_shows_the_plug_in_that_is_tested() -> None:
    readme = (PLUGIN.parent.parent / "README.md").read_text(encoding="utf-8")
    for name in ("deep.py", "pyproject.toml"):
        assert f"# deep/{name}\n" + (PLUGIN / name).read_text(encoding="utf-8") in readme


@pytest.mark.slow
def test_a_third_partys_algorithm_is_compared_like_any_other(tmp_path: Path) -> None:
    """The README's example, installed as it says, trained, and in the report."""
    source, site, out = tmp_path / "deep", tmp_path / "site", tmp_path / "out"
    shutil.copytree(PLUGIN, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install"]
    subprocess.run([*pip, "--no-deps", "--target", str(site), str(source)], check=True)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "bench.cli", *arguments], capture_output=True, text=True,
            cwd=PLUGIN.parent.parent, env=os.environ | {"PYTHONPATH": str(site)}, check=False,
        )  # fmt: skip

    assert "me, tonight" in run("list", "algos").stdout
    trained = run(
        "run", "--algos", "deep,mt_sac", *TOY, "--seeds", "1", "--steps", "300", "--out", str(out)
    )
    assert trained.returncode == 0, trained.stderr
    parameters = run("params", "--suite", "toy", "--algos", "deep,mt_sac", "--json")
    deep, plain = json.loads(parameters.stdout)["rows"]
    assert deep["actor"] > plain["actor"]
    assert deep["critic"] == plain["critic"]
    shown = run("report", "--out", str(out))
    assert shown.returncode == 0, shown.stderr
    assert "deep" in (out / "report" / "tables" / "toy-smoke-300-success_rates.csv").read_text()


@pytest.mark.slow
def test_an_installed_wheel_works_from_another_folder(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parent.parent
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(tmp_path), str(root)], check=True)
    wheel = next(tmp_path.glob("*.whl"))
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    code = (
        "import bench, reports, bench.spec as s, bench.sweep as w, sys;"
        "assert bench.__file__.startswith(sys.argv[1]), bench.__file__;"
        "import algorithms.care as c; assert 'reach-v3' in c._embedded();"
        "print(s.preset_names(), list(w.ablations()), len(reports.published('success_rates')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(site)], capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "smoke" in done.stdout
    assert "halfsoftmax" in done.stdout
