"""Kill a small sweep again and again, then compare it byte by byte with an undisturbed one.

    python tests/campaign.py --kills 120 --minutes 8

Every attempt is the same ``bench run`` command. In turn the sweep itself, one of its runs, a
process that simulates, or (by fault injection) a run in the middle of writing a checkpoint is
killed with SIGKILL at a random moment. In the end the command must finish by itself, with the bytes
of a sweep that nothing happened to; no run may be lost, and none trained again once it was done.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SWEEP = [
    "run", "--algos", "mt_sac,mega", "--suite", "toy", "--preset", "smoke", "--seeds", "2",
    *("--set", "horizon=25", "--set", "eval_every=500", "--set", "eval_episodes=2"),
    *("--set", "final_episodes=2", "--set", "warmup_steps=50", "--set", "width=16"),
    *("--set", "replay_per_task=300", "--steps", "3000"),
    *("--workers", "2", "--sim-workers", "1", "--track", "none"),
]  # fmt: skip
"""Four runs whose replay rings wrap."""
PLACES = ("sweep", "run", "simulator", "checkpoint")


def start(out: Path, fault: str = "") -> subprocess.Popen[str]:
    """The sweep's command, whose processes find ``fault`` in their environment."""
    path = os.pathsep.join([str(ROOT / "tests" / "faults"), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path, "FAULT": fault, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "bench.cli", *SWEEP, "--out", str(out)],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def measured(out: Path) -> dict[str, bytes]:
    """What all runs below ``out`` measured."""
    paths = [*out.rglob("metrics.csv"), *out.rglob("probe/*.npz")]
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


def sealed(out: Path) -> dict[str, int]:
    """Finished runs and when their metrics were last written."""
    runs = [path.parent for path in out.rglob("SHA256SUMS")]
    done = [run for run in runs if _status(run).get("state") == "done"]
    return {str(r.relative_to(out)): (r / "metrics.csv").stat().st_mtime_ns for r in done}


def steps(out: Path) -> int:
    """Steps that all runs together have behind them, as their statuses say."""
    return sum(_status(path.parent).get("step", 0) for path in out.rglob("status.json"))


def _status(run: Path) -> dict[str, int]:
    try:
        status: dict[str, int] = json.loads((run / "status.json").read_text())
    except (OSError, ValueError):
        return {}
    return status


def descendants(pid: int) -> dict[str, list[int]]:
    """Processes below ``pid``: those that train and those that simulate."""
    parents: dict[int, list[int]] = {}
    lines: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
                lines[int(entry.name)] = (entry / "cmdline").read_text()
            except OSError:
                continue
            parents.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    below, waiting = [], [pid]
    while waiting:
        found = parents.get(waiting.pop(), [])
        below += found
        waiting += found
    return {
        "run": [p for p in below if "bench.train" in lines.get(p, "")],
        "simulator": [p for p in below if "spawn_main" in lines.get(p, "")],
    }


def attack(out: Path, place: str, rng: random.Random, patience: float) -> bool:
    """Run the command and kill something of it; whether anything was killed."""
    fault = ""
    if place == "checkpoint":
        call = rng.choice(["fsync", "replace"])
        fault = f"{call}:{rng.randint(1, 25)}" + rng.choice(["", ":after"])
    sweep = start(out, fault)
    killed = False
    moment = time.monotonic() + rng.random() * patience
    while sweep.poll() is None:
        time.sleep(0.02)
        if place == "checkpoint" or time.monotonic() < moment or killed:
            if killed and place == "sweep":
                break
            continue
        below = descendants(sweep.pid)
        victims = [sweep.pid] if place == "sweep" else below[place]
        if victims and (place == "sweep" or steps(out)):
            with_id = rng.choice(victims)
            try:
                os.kill(with_id, signal.SIGKILL)
                killed = True
            except ProcessLookupError:
                continue
    output = sweep.communicate()[0]
    return killed or "SIGKILL" in output


def campaign(kills: int, seconds: float, seed: int, folder: Path) -> dict[str, object]:
    """The facts of one campaign; ``seconds`` bound the killing, not the end of the sweep."""
    rng, started = random.Random(seed), time.monotonic()
    quiet, out = folder / "undisturbed", folder / "killed"
    calm = start(quiet)
    output = calm.communicate()[0]
    assert calm.returncode == 0, output
    alone = time.monotonic() - started
    done_kills: Counter[str] = Counter()
    again: list[str] = []
    finished: dict[str, int] = {}
    rounds = 0
    while sum(done_kills.values()) < kills and time.monotonic() - started < seconds:
        place = PLACES[rounds % len(PLACES)]
        rounds += 1
        done_kills[place] += attack(out, place, rng, alone / 2)
        now = sealed(out)
        again += [run for run, at in finished.items() if now.get(run) != at]
        finished = now
        if len(finished) == 6:  # the sweep is over: begin another, and keep what this one was
            assert measured(out) == measured(quiet), "a finished sweep differs"
            out, finished = folder / f"killed-{rounds}", {}
    attempts = 0
    while True:  # orphans of a killed sweep end with their episode; until then they are busy
        attempts += 1
        last = start(out)
        output = last.communicate()[0]
        if len(sealed(out)) == 6 or attempts == 20:
            break
        time.sleep(1)
    now = sealed(out)
    again += [run for run, at in finished.items() if now.get(run) != at]
    return {
        "kills": dict(done_kills), "total": sum(done_kills.values()),
        "identical": measured(out) == measured(quiet), "runs_lost": 6 - len(now),
        "trained_twice": again, "commands_to_finish": attempts, "exit_code": last.returncode,
        "seconds": round(time.monotonic() - started), "seed": seed,
        "output": "" if last.returncode == 0 else output,
    }  # fmt: skip


def main() -> int:
    """Run a campaign and print its facts as JSON; 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        facts = campaign(options.kills, 60 * options.minutes, options.seed, Path(folder))
    print(json.dumps(facts, indent=1))
    return int(not facts["identical"] or bool(facts["runs_lost"]) or bool(facts["trained_twice"]))


if __name__ == "__main__":
    sys.exit(main())
