"""A SLURM of this one machine: sbatch, squeue, scancel, scontrol and srun as scripts on the PATH.

``install(folder)`` makes them. Jobs run as process groups; what is known of them lies in files of
the folder, so that the scripts share it: ``<array>_<index>`` holds state and process group of each.
Only what the launcher uses is there, and of the output only what it reads.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


def install(folder: Path) -> Path:
    """The directory to put in front of the PATH."""
    tools = folder / "bin"
    tools.mkdir(parents=True)
    for name in TOOLS:
        script = f"#!/bin/sh\nexec {sys.executable} {Path(__file__).resolve()} {name} {folder} "
        (tools / name).write_text(f'{script}"$@"\n')
        (tools / name).chmod(0o755)
    return tools


def jobs(folder: Path) -> dict[str, tuple[str, int]]:
    """State and process group by job id."""
    found = {}
    for path in sorted(folder.glob("[0-9]*")):
        with contextlib.suppress(FileNotFoundError):  # it has just ended
            state, _, group = path.read_text().partition(" ")
            found[path.name] = state, int(group or 0)
    return found


def calls(folder: Path, tool: str) -> list[str]:
    """The arguments of each call so far."""
    log = folder / "calls"
    lines = log.read_text().splitlines() if log.exists() else []
    return [line.partition(" ")[2] for line in lines if line.partition(" ")[0] == tool]


def note(folder: Path, job: str, state: str, group: int = 0) -> None:
    """Atomically, as readers do not wait."""
    new = folder / f".{job}.{os.getpid()}"
    new.write_text(f"{state} {group}")
    new.replace(folder / job)


def begin(folder: Path, job: str) -> None:
    """Run a job's script in a group of its own, and note its end unless it is queued again."""
    if os.fork():
        return
    os.setsid()
    for stream in (1, 2):  # whoever called sbatch waits for the end of its output
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    note(folder, job, "RUNNING", os.getpid())
    array, _, index = job.partition("_")
    facts = {"SLURM_JOB_ID": job, "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1",
             "SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}  # fmt: skip
    if index:
        facts |= {"SLURM_ARRAY_JOB_ID": array, "SLURM_ARRAY_TASK_ID": index}
    with (folder / f"output-{job}").open("ab") as output:
        subprocess.run(
            ["bash", str(folder / f"script-{array}")], env=os.environ | facts, check=False,
            stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        )  # fmt: skip
    state, _ = jobs(folder).get(job, ("", 0))
    if state == "REQUEUED":
        begin(folder, job)
    else:
        (folder / job).unlink(missing_ok=True)
    os._exit(0)


def sbatch(folder: Path, script: str) -> None:
    text = Path(script).read_text()
    if (folder / "full-after").exists() and len(calls(folder, "sbatch")) > 1:
        sys.exit("sbatch: error: Job violates accounting/QOS policy (job submit limit)")
    array = f"{4242 + len(list(folder.glob('script-*')))}"
    (folder / f"script-{array}").write_text(text)
    found = re.search(r"--array=0-(\d+)%(\d+)", text)
    names = [f"{array}_{i}" for i in range(int(found[1]) + 1)] if found else [array]
    for place, job in enumerate(names):
        note(folder, job, "PENDING")
        if not (folder / "full").exists() and (found is None or place < int(found[2])):
            begin(folder, job)
    print(f"Submitted batch job {array}")


def squeue(folder: Path, *_: str) -> None:
    for job, (state, _) in jobs(folder).items():
        print(job, state)


def scancel(folder: Path, *names: str) -> None:
    for job in names:
        state, group = jobs(folder).get(job, ("", 0))
        (folder / job).unlink(missing_ok=True)
        if state == "RUNNING":
            kill(group)


def kill(group: int) -> None:
    """A job's processes, if there are any left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def scontrol(folder: Path, action: str, job: str) -> None:
    assert action == "requeue"
    _, group = jobs(folder)[job]
    note(folder, job, "REQUEUED", group)


def srun(_: Path, *command: str) -> None:
    words = list(command)
    while words[0].startswith("-"):
        del words[: 2 if words[0] in ("--output", "--error") else 1]
    os.execvp(words[0], words)


def main(tool: str, folder: Path, arguments: list[str]) -> None:
    with (folder / "calls").open("a") as log:
        log.write(f"{tool} {' '.join(arguments)}\n")
    if (folder / f"no-{tool}").exists():
        sys.exit(f"{tool}: error: not now")
    TOOLS[tool](folder, *arguments)


TOOLS: dict[str, Callable[..., None]] = {
    "sbatch": sbatch, "squeue": squeue, "scancel": scancel, "scontrol": scontrol, "srun": srun,
}  # fmt: skip

if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
