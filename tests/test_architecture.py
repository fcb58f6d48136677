"""The import arrows and the forbidden constructs, read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("bench", "algorithms", "suites", "reports")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
SHARED = {
    "agent", "nn", "routing", "routing_cpu", "kernels", "sac", "pcgrad", "precision", "genetic",
    "wiring", "mega_health",
}  # fmt: skip
"""Modules of `algorithms` that the papers' files may import."""


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all modules that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module
            for alias in node.names:  # `from bench import train` imports bench.train
                if is_module(f"{node.module}.{alias.name}"):
                    yield f"{node.module}.{alias.name}"


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return name.partition(".")[0] in PACKAGES and path.with_suffix(".py").exists()


def top(name: str) -> str:
    return name.partition(".")[0]


def allowed(importer: str, imported: str) -> bool:
    """Whether design allows the arrow between two modules of ours."""
    package, target = top(importer), top(imported)
    if package == "bench":
        if target == "reports":
            return importer == "bench.cli"
        # Algorithms and suites are reached by name, through load(); their interfaces are known.
        return target == "bench" or imported in (
            "algorithms", "algorithms.agent", "suites", "suites.base",
        )  # fmt: skip
    if package == "algorithms":
        if target == "algorithms":
            return imported.removeprefix("algorithms.") in SHARED
        return imported == "suites.base"
    return target == package  # suites and reports know nothing of the rest


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_import_arrows(path: Path) -> None:
    own = {name for name in imports(path) if top(name) in PACKAGES}
    wrong = sorted(name for name in own if not allowed(name_of(path), name))
    assert not wrong, f"{name_of(path)} must not import {wrong}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_simulators_are_imported_by_suites_and_torch_not_by_reports(path: Path) -> None:
    package, found = top(name_of(path)), {top(name) for name in imports(path)}
    if package != "suites":
        assert not found & {"metaworld", "mujoco", "gymnasium", "envpool"}
    if package == "reports":
        assert "torch" not in found
    if name_of(path) == "algorithms.genetic":
        assert "torch" not in found


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_forbidden_constructs(path: Path) -> None:
    assert path.name not in ("utils.py", "helpers.py", "misc.py")
    assert not {top(name) for name in imports(path)} & {"pickle", "dill", "cloudpickle", "random"}
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{where}: bare except"
        if isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            assert call not in ("eval", "exec", "__import__"), f"{where}: {call}"
            assert not call.startswith(("np.random.seed", "np.random.rand", "torch.manual_seed")), (
                f"{where}: global random numbers"
            )
            if call == "torch.load":
                safe = [k for k in node.keywords if k.arg == "weights_only"]
                assert safe, f"{where}: unpickles"
                assert ast.unparse(safe[0].value) == "True", f"{where}: unpickles"
            if call in ("np.load", "numpy.load"):
                assert "allow_pickle=True" not in ast.unparse(node), f"{where}: unpickles"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.args.kwarg is None or node.name in KWARGS, f"{where}: **kwargs"
            for default in [*node.args.defaults, *node.args.kw_defaults]:
                mutable = isinstance(default, ast.List | ast.Dict | ast.Set)
                assert not mutable, f"{where}: mutable default"


KWARGS = {"write_status", "heartbeat", "ended"}
"""Functions whose keywords are data (of or for a file), not options passed through."""


def test_every_arrow_check_sees_the_imports() -> None:
    """The walk is not blind: these arrows exist."""
    found = set(imports(ROOT / "bench" / "train.py"))
    assert {"bench.machine", "bench.replay", "suites.base", "torch"} <= found
    assert not allowed("algorithms.mtmh_sac", "algorithms.mt_sac")
    assert not allowed("algorithms.sac", "bench.spec")
    assert not allowed("bench.train", "reports")
    assert not allowed("bench.spec", "suites.metaworld")
    assert not allowed("reports.tables", "bench.store")
    assert allowed("bench.cli", "reports.tables")


def loaded_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after ``code``."""
    script = f"{code}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


HEAVY = {
    "torch",
    "numba",
    "metaworld",
    "mujoco",
    "gymnasium",
    "pandas",
    "matplotlib",
    "scipy",
    "sklearn",
}


def test_help_needs_no_torch() -> None:
    assert not loaded_by("import bench") & HEAVY
    code = (
        "from typer.testing import CliRunner\nfrom bench.cli import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0"
    )
    assert not loaded_by(code) & HEAVY


def test_reports_and_suites_stand_alone() -> None:
    assert "torch" not in loaded_by("import reports")
    assert not loaded_by("import suites, suites.base") & HEAVY


def test_api_names_survive_the_import_of_their_modules() -> None:
    """`from bench import train` is the function, before and after bench.train is imported."""
    code = (
        "from bench import RunSpec, train\nfrom bench import train as again\n"
        "import bench.train\nassert callable(train) and callable(again)\n"
        "assert again.train is bench.train.train"
    )
    loaded_by(code)
