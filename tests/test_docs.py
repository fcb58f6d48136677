"""The documentation: its site builds without a warning, and its commands are commands."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from test_cli import bench

import algorithms
from algorithms.agent import Plan
from bench import speed
from bench.cli import app
from bench.launch import launcher_options
from bench.spec import parse_overrides, parse_seeds
from bench.sweep import Request, ablations, expand, names, parse_size
from suites.base import Suite, SuiteSpec

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = (
    "python3 start.py",
    "python tests/campaign.py --kills",
    "pip install",
    "tensorboard --logdir",
)
"""How commands may begin that are not ours."""


def snippets() -> Iterator[tuple[str, str]]:
    """(page, command) of every line of a shell block."""
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if command := line.partition(" #")[0].strip():
                    yield page.name, command


COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize(("page", "command"), sorted(set(snippets())))
def test_a_command_of_the_documentation_is_one(page: str, command: str) -> None:
    if not command.startswith("bench "):
        assert command.startswith(OTHERS), f"{page}: {command}"
        return
    _, name, *arguments = shlex.split(command)
    options = COMMANDS[name].make_context(name, list(arguments)).params
    if name in ("run", "ablate"):
        seeds = parse_seeds(options["seeds"] or "5")
        overrides = parse_overrides(options["set_"] or [])
        launcher_options(options["launcher"], options["launcher_set"] or [])
        if options["disk_budget"]:
            parse_size(options["disk_budget"], "--disk-budget")
        if name == "ablate":
            assert options["ablation"] in (*ablations(), "all")
        elif options["grid"] is None:
            request = Request(
                names(options["algos"], "--algos"), names(options["suite"], "--suite"), seeds,
                options["preset"] or "cpu", overrides,
            )  # fmt: skip
            assert expand([request])
    elif name in ("list", "show"):
        assert bench(name, *arguments).returncode == 0


def test_every_block_says_what_it_is() -> None:
    """A block without a language would not be checked."""
    for page in PAGES:
        fences = re.findall(r"^```(.*)$", page.read_text("utf-8"), re.MULTILINE)
        assert all(fences[::2]), f"{page.name}: a code block has no language"
        assert not any(fences[1::2]), page.name


def test_every_command_and_algorithm_is_documented() -> None:
    text = "".join(page.read_text("utf-8") for page in PAGES)
    for name in COMMANDS:
        assert f"bench {name}" in text, f"no page shows bench {name}"
    shown = re.findall(r"^::: algorithms\.(\w+)", (ROOT / "docs/algorithms.md").read_text(), re.M)
    of_papers = {
        path.stem
        for path in (ROOT / "algorithms").glob("*.py")
        if "PAPER = " in path.read_text("utf-8") or "PAPER: " in path.read_text("utf-8")
    } - {"agent"}
    assert of_papers <= set(shown)


def examples(page: str) -> list[str]:
    """The Python blocks of a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text("utf-8"), re.DOTALL)


def test_the_documented_suite_is_one() -> None:
    """Its episodes step in lockstep, its expert solves them, and their state goes on."""
    (code,) = (code for code in examples("extending.md") if "class Lines" in code)
    mine: dict[str, Any] = {}
    exec(code, mine)
    suite = mine["load"]("mine", goals="fresh", reward_version="v2", horizon=20)
    assert isinstance(suite, Suite)
    with contextlib.closing(suite.make(seed=0, envs_per_task=2)) as envs:
        obs = envs.reset()
        state = json.loads(json.dumps(envs.state_dict()))
        for _ in range(20):
            step = envs.step(suite.expert(obs))
            obs = step.obs
        assert [episode.success for episode in step.episodes] == [True] * 4
        assert envs.load_state_dict(state).shape == (2, 2, 1)


def test_the_documented_algorithm_stores_what_it_says() -> None:
    (code,) = (code for code in examples("extending.md") if "class Remember" in code)
    mine: dict[str, Any] = {}
    exec(code, mine)
    shape = SuiteSpec(name="x", task_names=("a", "b"), obs_dim=3, action_dim=2, horizon=10)
    remember = mine["Remember"]
    agent = remember(shape, remember.Config(width=8, depth=1), Plan(100, 10, 0), seed=0)
    stored = [agent.act(np.zeros((2, 1, 3), np.float32), explore=True).extras for _ in range(3)]
    assert [each["when"].flatten().tolist() for each in stored] == [[0, 0], [1, 1], [2, 2]]
    assert agent.extras_spec == {"when": ((1,), "float32")}


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Links between pages and to headings included."""
    if not importlib.util.find_spec("mkdocstrings"):
        pytest.skip("mkdocs is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "algorithms" / "index.html").exists()


def test_the_benchmark_page_shows_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    path = ROOT / "docs" / "benchmarks" / "measure.py"
    spec = importlib.util.spec_from_file_location("measure", path)
    assert spec is not None
    assert spec.loader is not None
    measure = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(measure)
    found = json.loads(path.with_name("measured.json").read_text("utf-8"))
    page = (ROOT / "docs" / "benchmarks.md").read_text("utf-8")
    assert measure.with_tables(page, found) == page
    assert {row["algorithm"] for row in found["paper"]["rows"]} >= set(algorithms.names())
    assert all(panel.get_xlabel() for panel in measure.drawn(found).axes)
    timed: list[str] = []
    monkeypatch.setattr(speed, "_simulators", lambda spec, _: timed.append(spec.suite) or [])
    assert measure.PARTS["simulators"]() == []
    assert timed == ["mt10_rand"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", ["results/studies/reference/README.md", "README.md", "docs/benchmarks.md"]
)
def test_a_page_shows_the_runs_of_the_reference_study(page: str, tmp_path: Path) -> None:
    study = tmp_path / "results" / "studies" / "reference"
    shutil.copytree(ROOT / "results" / "studies" / "reference", study)
    copy = tmp_path / page
    copy.parent.mkdir(exist_ok=True)
    shown = (ROOT / page).read_text("utf-8")
    copy.write_text(shown, "utf-8")
    script = ROOT / "results" / "studies" / "publish.py"
    done = subprocess.run(
        [sys.executable, str(script), str(study), str(copy)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert copy.read_text("utf-8") == shown
    figures = re.findall(r"\]\(([^)]*figures/[^)]*)\)", shown)
    assert all((copy.parent / figure).exists() for figure in figures)
    assert "<!-- study:" in shown
