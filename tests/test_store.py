"""The run directory: what it holds, and what happens when it is damaged, full or held."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import resource
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import machine
from bench.spec import RunSpec, SpecError
from bench.store import (
    BusyError,
    Row,
    RunStore,
    StoreError,
    find,
    naming,
    open_run,
    write_atomically,
)

ToySpec = Callable[..., RunSpec]
Open = Callable[[Path, RunSpec], RunStore]


@pytest.fixture
def store(toy_spec: ToySpec, open_store: Open, tmp_path: Path) -> Iterator[RunStore]:
    found = open_store(tmp_path, toy_spec())
    with found.locked():
        yield found


def rows(step: int, number: int = 2) -> list[Row]:
    return [Row(step, "train", "point-0", "return", step + k / 3, 5) for k in range(number)]


def write(store: RunStore, step: int) -> None:
    """What a run leaves behind on its way to ``step``."""
    store.append_metrics(rows(step))
    store.append_timing(step, {"update": step / 7, "total": step / 3})
    store.write_probe(f"{step:010d}", {"stage": np.array([step])})


def train_to(store: RunStore, *steps: int) -> None:
    """Write up to each step and save there."""
    store.replay_path.write_bytes(bytes(1000))
    for step in steps:
        write(store, step)
        store.save_checkpoint(step, {"x": torch.tensor([step]), "text": "a"})


def checkpoints(store: RunStore) -> list[Path]:
    return sorted(store.state_path.glob("checkpoint-*.pt"))


def contents(store: RunStore) -> dict[str, bytes]:
    files = [p for p in store.path.rglob("*") if p.is_file()]
    return {str(p.relative_to(store.path)): p.read_bytes() for p in files}


# ---------------------------------------------------------------------------- what the run is


def test_spec_json_tells_what_ran_where(store: RunStore, toy_spec: ToySpec) -> None:
    content = store.description()
    assert content["schema"] == 1
    assert content["spec"]["seed"] == 0
    environment = content["environment"]
    assert environment["versions"]["torch"].startswith("2.")
    assert environment["hardware"]["cores"] >= 1
    assert environment["numerics"]["threads"] == "1"
    assert {"git_commit", "command"} <= environment.keys()
    assert store.spec() == toy_spec()
    assert store.path.parts[-3:-1] == ("toy", "mt_sac")
    assert store.path.name == f"0-{toy_spec().id}"


def test_the_same_run_has_the_same_directory(
    toy_spec: ToySpec, open_store: Open, tmp_path: Path
) -> None:
    first = open_store(tmp_path, toy_spec())
    before = contents(first)
    assert contents(open_store(tmp_path, toy_spec())) == before
    assert open_store(tmp_path, toy_spec(gamma=0.5)).path != first.path


def test_an_edited_directory_is_left_alone(
    toy_spec: ToySpec, open_store: Open, tmp_path: Path
) -> None:
    store = open_store(tmp_path, toy_spec())
    file = store.path / "spec.json"
    content = json.loads(file.read_text())
    content["spec"]["config"]["gamma"] = 0.5
    file.write_text(json.dumps(content))
    before = contents(store)
    with pytest.raises(StoreError, match=r"another configuration \(gamma: 0\.99 and 0\.5\)"):
        open_store(tmp_path, toy_spec())
    assert contents(store) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "it has no spec.json"),
        ('{"schema": 1', "is damaged"),
        ("", "is damaged"),
        ("[]", "schema"),
        ('{"schema": 99}', "has schema 99; this version reads 1"),
        ('{"schema": 1}', "cannot be read"),
        ('{"schema": 1, "spec": {"id": 3}}', "cannot be read"),
        ('{"schema": 1, "spec": 7}', "cannot be read"),
    ],
)
def test_a_damaged_spec_is_a_clear_error(store: RunStore, text: str | None, message: str) -> None:
    file = store.path / "spec.json"
    file.unlink()
    if text is not None:
        file.write_text(text)
    with pytest.raises(StoreError, match=message):
        store.spec()


def test_creating_where_nothing_can_be_written(toy_spec: ToySpec, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        RunStore.create(tmp_path / "file", toy_spec(), machine.environment("cpu", 1))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_creating_in_a_read_only_folder(
    toy_spec: ToySpec, open_store: Open, tmp_path: Path
) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match=str(tmp_path)):
        open_store(tmp_path, toy_spec())
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("text", [None, "", "{", "[]", "7"])
def test_without_a_readable_status_a_run_is_pending(store: RunStore, text: str | None) -> None:
    if text is not None:
        (store.path / "status.json").write_text(text)
    assert store.status() == {"state": "pending"}
    assert not store.done
    store.write_status("done", step=3)
    assert store.status() == {"state": "done", "step": 3}
    assert store.done


# ---------------------------------------------------------------------------- what it measured


def test_metrics_are_tidy_and_free_of_the_clock(store: RunStore) -> None:
    store.append_metrics([Row(5, "eval", "point-0", "success", 3, 10)])
    store.append_metrics([Row(7, "update", "point-1", "q", 1 / 3, 200)])
    assert (store.path / "metrics.csv").read_text() == (
        "step,kind,task,metric,value,count\n"
        "5,eval,point-0,success,3,10\n7,update,point-1,q,0.333333333,200\n"
    )
    store.append_timing(7, {"total": 1.23456})
    assert (store.path / "timing.csv").read_text() == "step,section,seconds\n7,total,1.235\n"


def test_equal_probes_are_equal_bytes_and_hold_no_objects(store: RunStore) -> None:
    arrays = {"stage": np.arange(3), "names": np.array(["a", "bc"])}
    store.write_probe("1", arrays)
    store.write_probe("2", arrays)
    store.write_probe("3", {})
    assert sorted(p.name for p in store.probe_path.iterdir()) == ["1.npz", "2.npz"]
    assert (store.probe_path / "1.npz").read_bytes() == (store.probe_path / "2.npz").read_bytes()
    with np.load(store.probe_path / "1.npz") as loaded:
        np.testing.assert_array_equal(loaded["names"], arrays["names"])
    with pytest.raises(ValueError, match="pickle"):
        store.write_probe("4", {"x": np.array([{}])})
    assert not list(store.probe_path.glob("4*"))


# ------------------------------------------------------------------------------- checkpoints


def test_the_newest_two_are_kept_and_the_newest_is_loaded(store: RunStore) -> None:
    assert store.load_checkpoint() is None
    train_to(store, 10, 20, 30)
    assert [int(p.name.split("-")[1]) for p in checkpoints(store)] == [20, 30]
    loaded = store.load_checkpoint()
    assert loaded is not None
    step, content = loaded
    assert step == 30
    assert content["text"] == "a"
    assert torch.equal(content["x"], torch.tensor([30]))


def test_resuming_cuts_off_what_came_after(store: RunStore) -> None:
    train_to(store, 10, 20)
    before = contents(store)
    write(store, 30)
    store.write_probe("trace", {"x": np.zeros(2)})
    (store.state_path / "checkpoint-0000000030-00000000.pt.77.tmp").write_bytes(b"half")
    (store.path / "metrics.csv").open("ab").write(b"40,train,poi")  # killed while writing
    resumed = store.resume()
    assert resumed is not None
    assert resumed[0] == 20
    assert contents(store) == before
    assert store.resume() is not None  # again: nothing changes
    assert contents(store) == before


def test_without_a_checkpoint_a_run_starts_anew(store: RunStore) -> None:
    write(store, 10)
    store.replay_path.write_bytes(b"old rows")
    assert store.resume() is None
    assert (store.path / "metrics.csv").read_bytes() == b""
    assert not list(store.probe_path.iterdir())
    assert not store.replay_path.exists()
    write(store, 10)
    assert (store.path / "metrics.csv").read_text().count("step,kind") == 1


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "flipped":
        middle = len(data) // 2
        data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    path.write_bytes({"empty": b"", "half": data[: len(data) // 2]}.get(how, data))


@pytest.mark.parametrize("how", ["empty", "half", "flipped"])
def test_a_damaged_newest_checkpoint_is_skipped_with_a_warning(store: RunStore, how: str) -> None:
    train_to(store, 10)
    old = contents(store)
    train_to(store, 20)
    damaged = checkpoints(store)[-1]
    damage(damaged, how)
    with pytest.warns(RuntimeWarning, match=r"skipping .*0000000020.*checksum"):
        loaded = store.load_checkpoint()
    assert loaded is not None
    assert loaded[0] == 10
    with pytest.warns(RuntimeWarning, match="checksum"):
        resumed = store.resume()
    assert resumed is not None
    assert resumed[0] == 10
    now = contents(store)
    assert (
        now.pop(f"state/{damaged.name}.damaged")
        == damaged.with_name(damaged.name + ".damaged").read_bytes()
    )  # kept, but out of the way: the next two checkpoints are whole ones
    assert now == old
    train_to(store, 15)
    assert [int(p.name.split("-")[1]) for p in checkpoints(store)] == [10, 15]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.resume() is not None


def test_if_all_are_damaged_nothing_is_touched(store: RunStore) -> None:
    train_to(store, 10, 20)
    for path in checkpoints(store):
        damage(path, "half")
    before = contents(store)
    with pytest.warns(RuntimeWarning), pytest.raises(StoreError, match=r"none of the 2 checkp"):
        store.resume()
    assert contents(store) == before


@pytest.mark.parametrize("name", ["metrics.csv", "timing.csv", "state/replay.bin"])
def test_files_shorter_than_the_checkpoint_knew_them(store: RunStore, name: str) -> None:
    """A zero-filled or silently restarted file would be worse than any error."""
    train_to(store, 10, 20)
    file = store.path / name
    whole = file.read_bytes()
    newest = 0
    if name != "state/replay.bin":  # cut into what the newest alone had: the older one serves
        newest = len(whole) - 3
        os.truncate(file, newest)
        with pytest.warns(RuntimeWarning, match=f"{name} lost"):
            resumed = store.resume()
        assert resumed is not None
        assert resumed[0] == 10
        assert whole.startswith(file.read_bytes())
        train_to(store, 20)
    for change in (lambda: os.truncate(file, 5), file.unlink):
        change()
        before = contents(store)
        with pytest.warns(RuntimeWarning), pytest.raises(StoreError, match="none of the"):
            store.resume()
        assert contents(store) == before


class Payload:
    """Runs code when unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.file),))


@pytest.mark.parametrize("wrap", ["pickle", "torch"])
def test_a_crafted_checkpoint_is_refused_and_runs_nothing(
    store: RunStore, tmp_path: Path, wrap: str
) -> None:
    train_to(store, 10)
    trap = tmp_path / "executed"
    partial = store.state_path / "x"
    content = {"step": 20, "lengths": {}, "content": Payload(trap)}
    if wrap == "pickle":
        partial.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, partial)
    crc = zlib.crc32(partial.read_bytes())
    partial.rename(store.state_path / f"checkpoint-0000000020-{crc:08x}.pt")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        loaded = store.load_checkpoint()
    assert loaded is not None
    assert loaded[0] == 10
    (warning,) = (str(w.message) for w in seen if "UnpicklingError" in str(w.message))
    assert "weights_only" not in warning  # torch's advice on how to load it all the same
    assert not trap.exists()


def test_reading_while_the_run_replaces_its_checkpoints(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_to(store, 10)
    gone = store.state_path / "checkpoint-0000000020-00000000.pt"
    there = checkpoints(store)
    monkeypatch.setattr(RunStore, "checkpoint_files", lambda _: [gone, *there])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = store.load_checkpoint()
    assert loaded is not None
    assert loaded[0] == 10


@settings(max_examples=15)
@given(life=st.lists(st.sampled_from(["write", "save", "kill", "damage"]), max_size=20))
def test_whatever_happens_what_was_measured_is_that_of_the_step(
    tmp_path_factory: pytest.TempPathFactory, life: list[str]
) -> None:
    """After any sequence of writing, saving, damage and death: the files of a clean run."""
    store = RunStore(tmp_path_factory.mktemp("life"))
    store.state_path.mkdir()
    store.replay_path.write_bytes(b"rows")
    clean = RunStore(tmp_path_factory.mktemp("clean"))
    step = 0
    for event in life:
        if event == "write":
            step += 1
            write(store, step)
        elif event == "save" and step:
            write(store, step := step + 1)
            store.save_checkpoint(step, {"step": step})
        elif event in ("kill", "damage"):
            if event == "damage" and len(checkpoints(store)) == 2:
                damage(checkpoints(store)[-1], "half")
            with warnings.catch_warnings(record=True):
                warnings.simplefilter("always")
                resumed = store.resume()
            step = resumed[0] if resumed else 0
            store.replay_path.write_bytes(b"rows")
    for number in range(1, step + 1):
        write(clean, number)
    for name in ("metrics.csv", "timing.csv"):
        mine, theirs = store.path / name, clean.path / name
        assert (mine.read_bytes() if mine.exists() else b"") == (
            theirs.read_bytes() if theirs.exists() else b""
        )
    assert {p.name for p in store.probe_path.glob("*")} == {
        p.name for p in clean.probe_path.glob("*")
    }


# ---------------------------------------------------------------------- full disks, other holders


def test_a_failed_write_keeps_the_old_content_and_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    write_atomically(file, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        with pytest.raises(OSError, match=r"x\.json"):
            write_atomically(file, bytes(200_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    with pytest.raises(OSError, match=r"No space left on device: 'here'"), naming(Path("here")):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_one_process_at_a_time(store: RunStore) -> None:
    other = RunStore(store.path)
    assert other.busy
    with pytest.raises(BusyError, match="being trained by another process"), other.locked():
        pass


def test_the_lock_ends_with_its_process(
    toy_spec: ToySpec, open_store: Open, tmp_path: Path
) -> None:
    store = open_store(tmp_path, toy_spec())
    assert not store.busy
    code = (
        "import fcntl, sys, time\nfile = open(sys.argv[1], 'a')\n"
        "fcntl.flock(file, fcntl.LOCK_EX)\nprint('held', flush=True)\ntime.sleep(60)"
    )
    store.state_path.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(store.state_path / "lock")], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    assert store.busy
    process.kill()
    process.wait()
    process.stdout.close()
    assert not store.busy
    with store.locked():
        pass


@pytest.mark.parametrize("name", ["metrics.csv", "timing.csv", "probe/0000000005.npz"])
def test_what_was_measured_before_a_checkpoint_must_be_as_it_was(
    store: RunStore, name: str
) -> None:
    """Else what somebody edited in between would be sealed with the rest in the end."""
    store.append_metrics([Row(5, "train", "a", "success", 0, 1)])
    store.append_timing(5, {"total": 1.0})
    store.write_probe("0000000005", {"x": np.zeros(3)})
    store.save_checkpoint(5, {})
    content = bytearray((store.path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (store.path / name).write_bytes(content)
    with (
        pytest.warns(RuntimeWarning, match=f"{name} changed since"),
        pytest.raises(StoreError, match="can be used"),
    ):
        store.resume()


@pytest.mark.parametrize("content", [{"step": "no", "lengths": [1], "content": 5}, 7])
def test_a_whole_file_that_is_no_checkpoint_is_skipped(store: RunStore, content: Any) -> None:
    store.save_checkpoint(5, {"a": 1})
    buffer = io.BytesIO()
    torch.save(content, buffer)
    name = f"checkpoint-{9:010d}-{zlib.crc32(buffer.getbuffer()):08x}.pt"
    (store.state_path / name).write_bytes(buffer.getvalue())
    with pytest.warns(RuntimeWarning, match="skipping the damaged checkpoint"):
        assert store.load_checkpoint() == (5, {"a": 1})


# ----------------------------------------------------------------------------------- finding


def test_finding_runs_by_part_of_their_path(
    toy_spec: ToySpec, open_store: Open, tmp_path: Path
) -> None:
    stores = [open_store(tmp_path, toy_spec(seed=seed)) for seed in (0, 1)]
    assert {s.path for s in find(tmp_path)} == {s.path for s in stores}
    assert find(tmp_path / "nowhere") == []
    assert open_run(tmp_path, stores[1].path.name).path == stores[1].path
    assert open_run(tmp_path, str(stores[0].path)).path == stores[0].path
    with pytest.raises(SpecError, match="names 2 runs"):
        open_run(tmp_path, "mt_sac")
    elsewhere = tmp_path.with_name(f"{tmp_path.name}-disk")
    (tmp_path / "toy").rename(elsewhere)
    (tmp_path / "toy").symlink_to(elsewhere)
    (elsewhere / "round").symlink_to(tmp_path)
    assert [s.path for s in find(tmp_path)] == [s.path for s in stores]
    with pytest.raises(SpecError, match="no run named 'nothing'"):
        open_run(tmp_path, "nothing")
