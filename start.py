#!/usr/bin/env python3
"""From a bare machine with Python to a result, in one command.

    python3 start.py          make the environment, run the smoke job and print its report
    python3 start.py test     make the environment and run the fast tests
    python3 start.py test slow            ... the slow tests (learning, kills)
    python3 start.py bench ARGUMENTS...   make the environment and run the bench command in it

The environment is .venv beside this file; it is made once and again when the pinned set changes.
Needs nothing but the standard library.
"""

import hashlib
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
SMOKE_OUT = ROOT / "results" / "smoke"
SMOKE = ["--algos", "mega,d2r", "--suite", "mt10_rand", "--seeds", "2", "--preset", "smoke"]


def main(arguments: list[str]) -> int:
    """Dispatch; returns the exit code of what was run."""
    if not (3, 11) <= sys.version_info[:2] < (3, 14):
        print(f"Python 3.11 to 3.13 is needed; this is {sys.version.split()[0]}", file=sys.stderr)
        return 2
    what, rest = (arguments[0], arguments[1:]) if arguments else ("smoke", [])
    if what not in ("smoke", "test", "bench") or (what == "test" and rest not in ([], ["slow"])):
        print(__doc__, file=sys.stderr)
        return 0 if what in ("-h", "--help") else 2
    install()
    bench = str(VENV / "bin" / "bench")
    if what == "bench":
        return call(bench, *rest)
    if what == "test":
        tier = "slow" if rest else "not slow"
        spread = ["-n", "auto", "--maxprocesses", "4", "--dist", "loadgroup"]
        return call(str(VENV / "bin" / "pytest"), "-m", tier, *spread)
    code = call(bench, "run", *SMOKE, "--out", str(SMOKE_OUT))
    return code or call(bench, "report", "--out", str(SMOKE_OUT))


def install() -> None:
    """Make the environment unless it matches the pinned set already."""
    pinned = (ROOT / "pyproject.toml").read_bytes() + (ROOT / "constraints.txt").read_bytes()
    stamp, wanted = VENV / "installed", hashlib.sha256(pinned).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print(f"Making the environment in {VENV} (a few minutes the first time) ...", flush=True)
    venv.create(VENV, with_pip=True)
    python = str(VENV / "bin" / "python")
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "--disable-pip-version-check",
         "-c", "constraints.txt", "-e", ".[dev]"],
        cwd=ROOT, check=True,
    )  # fmt: skip
    stamp.write_text(wanted)


def call(*command: str) -> int:
    """Run a command in the project's folder and return its exit code."""
    try:
        return subprocess.run(command, cwd=ROOT, check=False).returncode
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
