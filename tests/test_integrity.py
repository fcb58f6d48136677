"""What a run's directory says is what was measured, and nothing in it is ever executed."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_cli import bench

import suites
from bench import frames
from bench.doctor import run_checks
from bench.spec import RunSpec
from bench.store import RunStore, StoreError
from bench.sweep import prepare
from suites.base import plugins

Finished = Callable[[str], RunStore]


def bad(store: RunStore) -> dict[str, str]:
    return {row["check"]: row["value"] for row in run_checks(store) if row["result"] == "bad"}


def test_a_whole_run_is_found_whole(copy: RunStore) -> None:
    rows = {row["check"]: row for row in run_checks(copy)}
    assert not bad(copy)
    assert rows["checksums"]["value"] == "all results are as they were recorded"
    assert rows["checkpoints"]["value"] == "whole: step 250, 200"
    assert rows["id"]["result"] == rows["held"]["result"] == rows["leftovers"]["result"] == "good"


def test_the_checksums_are_those_of_coreutils(copy: RunStore) -> None:
    tool = shutil.which("sha256sum")
    if tool is None:
        pytest.skip("no sha256sum here")
    done = subprocess.run([tool, "-c", "SHA256SUMS"], cwd=copy.path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "metrics.csv: OK" in done.stdout


def edit(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


HARM: dict[str, tuple[Callable[[RunStore], object], str, str]] = {
    "a changed success": (
        lambda s: edit(s.path / "metrics.csv", b"final,point-0,s", b"final,point-1,s"),
        "checksums", "metrics.csv was changed",
    ),
    "a line that is none": (
        lambda s: edit(s.path / "metrics.csv", b",train,", b";train,"), "metrics.csv", "line ",
    ),
    "a cut file": (
        lambda s: os.truncate(s.path / "metrics.csv", 500), "metrics.csv", " lines",
    ),
    "no final evaluation": (
        lambda s: (s.path / "metrics.csv").write_text("step,kind,task,metric,value,count\n"),
        "metrics.csv", "the final evaluation has 0 of 3 tasks",
    ),
    "another seed": (
        lambda s: edit(s.path / "spec.json", b'"seed": 0', b'"seed": 1'), "id", "its values give",
    ),
    "a damaged checkpoint": (
        lambda s: flip(max(s.state_path.glob("checkpoint-*.pt"))), "checkpoint", "checksum",
    ),
    "a lost file": (
        lambda s: (s.path / "timing.csv").unlink(), "checksums", "timing.csv is gone",
    ),
    "damaged checksums": (
        lambda s: (s.path / "SHA256SUMS").write_text("nonsense\n"), "checksums", "is damaged",
    ),
}  # fmt: skip


@pytest.mark.parametrize("harm", HARM)
def test_the_doctor_finds(harm: str, copy: RunStore) -> None:
    do, check, words = HARM[harm]
    do(copy)
    found = bad(copy)
    assert words in found.get(check, ""), found
    assert bench("doctor", str(copy.path)).returncode == 1


def test_a_report_says_that_results_were_changed(copy: RunStore) -> None:
    flip(copy.path / "metrics.csv")
    out = copy.path.parents[2]
    health = frames.load(out)["health"].set_index("check")
    assert health.loc["files", "result"] == "bad"
    assert "metrics.csv was changed since the run was done" in health.loc["files", "verdict"]


DAMAGE = {
    "status of other types": ("status.json", b'{"state": 5, "step": "x", "time": "y"}'),
    "deep status": ("status.json", b"[" * 100_000),
    "deep specification": ("spec.json", b"[" * 100_000),
    "specification gone": ("spec.json", None),
    "suite that is not here": ("spec.json", b"../../x"),
    "bytes that are no text": ("metrics.csv", b"step,kind\n\xff\xfe\xfa\n"),
    "probe cut": ("probe/trace.npz", b"PK"),
    "metrics a folder": ("metrics.csv", "folder"),
    "status a folder": ("status.json", "folder"),
    "specification a folder": ("spec.json", "folder"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_run_costs_itself_alone(name: str, copy: RunStore, tmp_path: Path) -> None:
    """Every command goes on with the other runs, or says in a line what is wrong with this one."""
    file, content = DAMAGE[name]
    out, path = copy.path.parents[2], copy.path / file
    shutil.copytree(copy.path, copy.path.with_name("1-beside"))
    old = path.read_bytes() if path.exists() else b""
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    if content == "folder":
        path.mkdir()
    elif name == "suite that is not here":
        path.write_bytes(old.replace(b'"suite": "toy"', b'"suite": "../../x"'))
    elif content is not None:
        path.write_bytes(content)  # type: ignore[arg-type]
    listed = bench("status", "--out", str(out))
    assert listed.returncode == 0
    assert "1-beside" in listed.stdout
    assert str(copy.path.relative_to(out)) in listed.stdout
    reported = bench("report", "--out", str(out), "--to", str(tmp_path / "report"))
    assert reported.returncode == 0
    # A sealed run needs no status.
    assert (str(copy.path.relative_to(out)) in reported.stderr) == (file != "status.json")
    for command in ("doctor", "verify", "eval"):
        done = bench(command, str(copy.path), *(["--steps", "25"] if command == "verify" else []))
        assert done.returncode in (0, 1, 2)
        assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("content", ['{"schema": 1, "spec": {}}', '{"schema": 1, "spec": null}'])
def test_a_specification_of_another_shape_costs_its_run_alone(content: str, copy: RunStore) -> None:
    out = copy.path.parents[2]
    shutil.copytree(copy.path, other := copy.path.parent / "9-0000000000")
    (other / "spec.json").write_text(content)
    shown = bench("status", "--out", str(out))
    assert shown.returncode == 0, shown.stderr
    assert "done" in shown.stdout
    made = frames.load(out)
    assert list(made["runs"]["run"]) == [str(copy.path.relative_to(out))]
    assert "damaged" in made["unreadable"][str(other.relative_to(out))]


def test_a_sweep_goes_on_beside_a_damaged_run(copy: RunStore, toy_spec: Any) -> None:
    out, damaged = copy.path.parents[2], toy_spec("mtmh_sac")
    folder = out / damaged.directory
    folder.mkdir(parents=True)
    (folder / "spec.json").write_text('{"schema": 1, "sp')
    jobs = prepare([copy.spec(), damaged, toy_spec("sac")], out, {})
    assert [job.outcome for job in jobs] == ["skipped", "failed", "pending"]
    assert f"{folder / 'spec.json'} is damaged" in jobs[1].error


def test_a_sealed_run_that_lost_its_status_is_done(copy: RunStore) -> None:
    (copy.path / "status.json").unlink()
    shutil.rmtree(copy.state_path)
    assert copy.status() == {"state": "done", "step": 250, "steps": 250}
    (copy.path / "status.json").write_text('{"state": "running"}')
    before = (copy.path / "metrics.csv").read_bytes()
    with pytest.raises(StoreError, match="was trained to its end"):
        copy.resume()
    assert (copy.path / "metrics.csv").read_bytes() == before


def test_results_are_not_taken_for_another_specification(copy: RunStore) -> None:
    spec = copy.spec()
    (copy.path / "spec.json").unlink()
    with pytest.raises(StoreError, match="has results but no spec"):
        RunStore.create(copy.path.parents[2], spec, {})


class Payload:
    """Makes a folder when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_crafted_probe_is_refused_and_runs_nothing(copy: RunStore, tmp_path: Path) -> None:
    """An array of objects is a pickle inside the archive."""
    trap = tmp_path / "executed"
    copy.probe_path.mkdir(exist_ok=True)
    crafted = copy.probe_path / "0000000100.npz"
    np.savez(crafted, allow_pickle=True, x=np.array([Payload(trap)], dtype=object))
    assert "Object arrays cannot be loaded" in bad(copy)["probe"]
    loaded = frames.load(copy.path.parents[2])
    (why,) = loaded["unreadable"].values()
    assert why == f"{crafted} cannot be read: an array of objects"
    assert not trap.exists()


def test_a_crafted_checkpoint_with_a_right_checksum_runs_nothing(
    copy: RunStore, tmp_path: Path
) -> None:
    """A whole torch archive whose pickle was replaced, named as its own checksum asks."""
    trap = tmp_path / "executed"
    newest = max(copy.state_path.glob("checkpoint-*.pt"))
    crafted = tmp_path / "crafted.pt"
    with zipfile.ZipFile(newest) as old, zipfile.ZipFile(crafted, "w") as new:
        for item in old.infolist():
            data = old.read(item)
            if item.filename.endswith("data.pkl"):
                data = pickle.dumps(Payload(trap), protocol=2)
            new.writestr(item, data)
    newest.unlink()
    crc = zlib.crc32(crafted.read_bytes())
    crafted.rename(copy.state_path / f"checkpoint-0000000250-{crc:08x}.pt")
    assert "UnpicklingError" in bad(copy)["checkpoint"]
    done = bench("eval", str(copy.path), "--episodes", "1")
    assert done.returncode == 0, "the checkpoint before it serves"
    assert "step 200" in done.stdout
    assert not trap.exists()


def test_a_report_escapes_what_it_prints(copy: RunStore, tmp_path: Path) -> None:
    """Names of tasks and algorithms are text, whatever they hold."""
    evil = "<script>alert(1)</script>"
    content = json.loads((copy.path / "spec.json").read_text())
    content["spec"] |= {"label": f"mt_sac@{evil}", "suite": f"toy{evil}"}
    (copy.path / "spec.json").write_text(json.dumps(content))
    metrics = copy.path / "metrics.csv"
    metrics.write_text(metrics.read_text().replace("point-0", f"point{evil}"))
    (copy.path / "SHA256SUMS").unlink()
    done = bench("report", "--out", str(copy.path.parents[2]), "--to", str(tmp_path / "page"))
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page" / "index.html").read_text()
    assert evil not in page
    assert "&lt;script&gt;alert(1)" in page


def test_an_evil_name_stays_inside_the_output_directory(toy_spec: Any, tmp_path: Path) -> None:
    spec: RunSpec = toy_spec()
    evil = spec.model_copy(update={"suite": "../../x", "label": "/etc/passwd", "id": "../y"})
    store = RunStore.create(tmp_path / "out", evil, {})
    assert (tmp_path / "out") in store.path.resolve().parents
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert len(store.path.relative_to(tmp_path / "out").parts) == 3


@contextmanager
def installed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, entry: str, kind: str = "algorithms"
) -> Iterator[None]:
    """A package of one entry point, which its metadata alone makes known."""
    info = folder / "deep-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: deep\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(f"[mega_bench.{kind}]\n{entry}\n")
    shutil.copy(Path(__file__).parent / "plugin" / "deep.py", folder)
    monkeypatch.syspath_prepend(str(folder))
    plugins.cache_clear()
    try:
        yield
    finally:
        monkeypatch.undo()
        plugins.cache_clear()


def planned(algos: str, out: Path) -> subprocess.CompletedProcess[str]:
    return bench("run", "--algos", algos, "--suite", "toy", "--preset", "smoke", "--seeds", "1",
                 "--dry-run", "--out", str(out))  # fmt: skip


def test_plug_ins_are_named_in_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with installed(tmp_path, monkeypatch, "deep = deep:Deep"):
        done = planned("deep,mt_sac", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "third-party algorithm deep: deep:Deep of deep 0.1" in done.stdout


def test_a_plug_in_cannot_take_a_built_in_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with installed(tmp_path, monkeypatch, "mega = deep:Deep"):
        refused = planned("mega,mt_sac", tmp_path / "out")
        others = planned("mt_sac", tmp_path / "out")
    assert refused.returncode == 2
    assert "'mega' is built in" in refused.stderr
    assert "deep:Deep" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert others.returncode == 0, others.stderr


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("toy = deep:Deep", "suite 'toy' is built in"),
        ("deepsea = nowhere:load", "cannot be loaded: ModuleNotFoundError"),
        ("deepsea = deep:load", "cannot be loaded: AttributeError"),
        ("deepsea = unittest.mock:Mock", "made a Mock and no Suite"),
    ],
)
def test_a_plug_ins_faulty_suites_cost_themselves_alone(
    entry: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = entry.partition(" ")[0]
    with installed(tmp_path, monkeypatch, entry, "suites"):
        with pytest.raises(ValueError, match=re.escape(words)):
            suites.load(prefix)
        assert suites.load("mt1_rand:reach-v3").spec.num_tasks == 1
        assert "toy" in suites.names()
