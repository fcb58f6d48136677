"""What makes long sweeps pleasant: watching, trackers, notice at the end, disk space."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from test_cli import bench, start

from bench import track
from bench.spec import SpecError
from bench.store import RunStore
from bench.sweep import Job, notify, parse_size
from bench.tidy import keep_within, removable, remove, used
from bench.track import Follower, by_step, sinks

Finished = Callable[[str], RunStore]


def out_of(store: RunStore) -> Path:
    return store.path.parents[2]


# -------------------------------------------------------------------------------------- watching


def test_watching_ends_when_all_is_done_and_tells_what_is_left(copy: RunStore) -> None:
    done = bench("status", "--watch", "--out", str(out_of(copy)))
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "1 done"
    status = copy.status() | {"step": 100, "steps_per_second": 50.0, "time": 0.0}
    with copy.locked():
        copy.write_status("running", **{k: v for k, v in status.items() if k != "state"})
        shown = bench("status", "--out", str(out_of(copy))).stdout
    assert "100/250" in shown
    assert "1 running; about 3 s left at the present rate" in shown


def test_status_waits_for_a_sweep_only_when_it_watches(copy: RunStore, tmp_path: Path) -> None:
    later = tmp_path / "later"
    once = bench("status", "--out", str(later))
    assert once.returncode == 1
    assert f"--out {later}: no such directory" in once.stderr
    watching = start("status", "--watch", "--every", "0.2", "--out", str(later))
    assert watching.stdout is not None
    assert "no runs below" in watching.stdout.readline()
    out_of(copy).rename(later)
    assert watching.communicate(timeout=60)[0].splitlines()[-1] == "1 done"
    assert watching.returncode == 0


# -------------------------------------------------------------------------------------- trackers


class Recorder:
    """A sink that keeps what it is given."""

    def __init__(self, store: RunStore, out: Path) -> None:
        self.seen: dict[int, dict[str, float]] = {}
        self.closed = 0
        RECORDERS.append(self)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        assert not scalars.keys() & self.seen.get(step, {}).keys(), "passed on twice"
        self.seen.setdefault(step, {}).update(scalars)

    def close(self) -> None:
        self.closed += 1


RECORDERS: list[Recorder] = []


def test_every_row_is_passed_on_once_also_over_sessions_and_resumptions(
    copy: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    RECORDERS.clear()
    monkeypatch.setitem(track.SINKS, "recorder", Recorder)  # type: ignore[arg-type]
    metrics = copy.path / "metrics.csv"
    whole = metrics.read_bytes()
    lines = whole.splitlines(keepends=True)
    cuts = [5, 12, 9, 30, len(lines)]  # the third: the run was resumed from an older checkpoint
    for lengths in (cuts[:2], cuts[2:4], cuts[4:]):
        follower = Follower([copy], out_of(copy), ["recorder"])
        for length in lengths:
            copy.write_status("done" if length == len(lines) else "running")
            metrics.write_bytes(b"".join(lines[:length]) + (b"7,tra" if length == 12 else b""))
            follower.pass_on()
        follower.close()
    assert [recorder.closed for recorder in RECORDERS] == [1, 1, 1]
    rows = {(step, name) for r in RECORDERS for step, s in r.seen.items() for name in s}
    expected = {(step, name) for step, s in by_step(whole.decode()) for name in s}
    assert rows == expected


def test_scalars_are_rates_and_means_over_tasks() -> None:
    text = "step,kind,task,metric,value,count\n5,eval,a,success,1,4\n5,eval,b,success,3,4\n"
    ((step, scalars),) = by_step(text)
    assert step == 5
    assert scalars == {"eval/success/a": 0.25, "eval/success/b": 0.75, "eval/success": 0.5}


def test_tensorboard_reads_what_was_measured(copy: RunStore) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    follower = Follower([copy], out_of(copy), ["tensorboard"])
    follower.close()
    folder = out_of(copy) / "tensorboard" / copy.path.relative_to(out_of(copy))
    events = EventAccumulator(str(folder))
    events.Reload()
    (final,) = events.Scalars("final/success")
    assert final.step == 250
    assert final.value == pytest.approx(copy.status()["success"])


def test_which_trackers_there_are() -> None:
    assert sinks("none") == []
    assert sinks("auto") in ([], ["tensorboard"])
    with pytest.raises(SpecError, match="unknown sink 'tensorbord'; did you mean 'tensorboard'"):
        sinks("tensorbord")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", None)
        with pytest.raises(
            RuntimeError, match=r"wandb is not installed; pip install -e '\.\[wandb\]'"
        ):
            sinks("wandb")


# ------------------------------------------------------------------------------ notice at the end


def test_the_command_at_the_end_learns_what_happened(copy: RunStore, tmp_path: Path) -> None:
    jobs = [Job(copy.spec(), copy, outcome=outcome) for outcome in ("done", "skipped", "failed")]
    note = tmp_path / "note"
    command = f'echo "$BENCH_STATE $BENCH_DONE $BENCH_FAILED $BENCH_RUNS: $BENCH_MESSAGE" > {note}'
    assert notify(command, jobs, tmp_path, interrupted=False) == ""
    assert note.read_text().startswith("failed 2 1 3: sweep failed: 2 of 3 runs done, 1 failed in")
    assert "ended with 3" in notify("exit 3", jobs, tmp_path, interrupted=True)


# -------------------------------------------------------------------------------------- disk space


def test_cleaning_leaves_results_and_what_is_needed(copy: RunStore) -> None:
    results = {
        p: p.read_bytes() for p in copy.path.rglob("*") if p.is_file() and "state" not in p.parts
    }
    (copy.path / "status.json.1.tmp").write_bytes(b"half")
    shown = bench("clean", "--dry-run", "--json", "--out", str(out_of(copy)))
    whys = [row["why"] for row in json.loads(shown.stdout)["rows"]]
    assert sorted(whys) == [
        "left behind by an interrupted write", "older checkpoint of a finished run",
    ]  # fmt: skip
    with copy.locked():
        assert removable([copy]) == [], "a run that is held is left alone"
    assert bench("clean", "--out", str(out_of(copy))).returncode == 0
    assert copy.checkpoint_steps() == [250]
    assert bench("clean", "--checkpoints", "--out", str(out_of(copy))).returncode == 0
    assert copy.checkpoint_steps() == []
    assert {path: path.read_bytes() for path in results} == results
    assert copy.damaged() == []
    assert copy.done


def test_an_unfinished_run_keeps_its_checkpoints(copy: RunStore) -> None:
    facts = {key: value for key, value in copy.status().items() if key != "state"}
    copy.write_status("interrupted", **facts)
    assert remove(removable([copy], checkpoints=True)) == 0
    assert copy.checkpoint_steps() == [250, 200]
    keep_within(out_of(copy), 0)
    assert copy.checkpoint_steps() == [250, 200]


def test_space_is_counted_behind_links_once(copy: RunStore, tmp_path: Path) -> None:
    elsewhere = tmp_path / "linked"
    elsewhere.mkdir()
    (elsewhere / "toy").symlink_to(copy.path.parents[1])
    (copy.path / "loop").symlink_to(copy.path)
    assert used(elsewhere) == used(copy.path.parents[1]) > 0


def test_a_budget_is_kept_as_gently_as_it_can_be(copy: RunStore) -> None:
    out = out_of(copy)
    assert keep_within(out, used(out)) == []
    (gone,) = keep_within(out, used(out) - 1)
    assert gone.why == "older checkpoint of a finished run"
    assert copy.checkpoint_steps() == [250]
    (gone,) = keep_within(out, 0)
    assert gone.why == "last checkpoint of a finished run"
    assert copy.damaged() == []


@pytest.mark.parametrize(
    ("text", "size"), [("20GB", 20e9), ("500M", 5e8), ("1.5 TB", 1.5e12), ("7", 7), ("3kb", 3000)]
)
def test_sizes(text: str, size: float) -> None:
    assert parse_size(text, "--disk-budget") == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "20 PB", "1e9", "many"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(SpecError, match="expected a size such as 20GB"):
        parse_size(text, "--disk-budget")
