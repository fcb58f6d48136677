"""What a run's numbers may depend on besides its specification: software, hardware, threads."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

PACKAGES = ("mega-bench", "torch", "numba", "scipy", "metaworld", "mujoco", "gymnasium", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of every package that can change a number."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def hardware(device: str) -> dict[str, Any]:
    """Processor, cores and memory of this machine, and the accelerator in use."""
    facts: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.startswith("cuda"):
        import torch

        facts["accelerator"] = torch.cuda.get_device_name(device)
    return facts


def cores() -> int:
    """Cores that this process may use, of those that the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def git_commit() -> str:
    """The commit of the source tree this runs from (``+changes`` if it was edited), or ``""``."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return ""
    try:
        commit = _git(root, "rev-parse", "HEAD")
        edited = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return ""
    return commit + ("+changes" if edited else "")


def keep_freed_memory() -> None:
    """Have the C library keep what an update frees for the next one, where it is glibc.

    Left alone it returns large blocks to the system and takes fresh pages for the next tensor: up
    to 8 % of an update's time at the papers' sizes on MT10, a quarter of MOORE's on MT50.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    trim_threshold, mmap_max = -1, -4
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_max, 0)  # a threshold instead would leave out blocks above 32 MiB


def give_back_memory(device: str) -> None:
    """Return to the system, and to ``device``, what is no longer used."""
    gc.collect()
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no glibc
        ctypes.CDLL(None).malloc_trim(0)


def compiler_problem(device: str) -> str:
    """Why `torch.compile` makes nothing that runs on ``device``, in a line, or "" if it does."""
    import torch

    mode = "reduce-overhead" if device.startswith("cuda") else "default"
    try:
        function = torch.compile(lambda x: (x.sin() + x).sum(), mode=mode)
        x = torch.ones(8, device=device, requires_grad=True)
        for _ in range(3):  # a CUDA graph is made the second time, and used the third
            function(x).backward()
    except Exception as error:  # noqa: BLE001  (torch has no one name for all that may be missing)
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return ""


@contextlib.contextmanager
def told_of_compiling(callback: Callable[[], None]) -> Iterator[None]:
    """Call ``callback`` after each piece that `torch.compile` made: a network takes it minutes."""
    from torch._dynamo.callback import callback_handler

    def compiled(*_: object) -> None:
        with contextlib.suppress(Exception):  # raised here it would pass for one of the compiler's
            callback()

    callback_handler.register_end_callback(compiled)
    try:
        yield
    finally:
        callback_handler.remove_end_callback(compiled)


def numerics(device: str, threads: int, compiled: bool = False) -> dict[str, str]:
    """What makes equal specifications give equal bytes; a run is resumed only under the same."""
    software = versions()
    return {
        "threads": str(threads),
        "device": device.partition(":")[0],
        "torch": software["torch"],
        "numba": software["numba"],
        "scipy": software["scipy"],
        "simulator": f"metaworld {software['metaworld']}, mujoco {software['mujoco']}",
        **({"compiled": "yes"} if compiled else {}),
    }


def plugins() -> dict[str, str]:
    """Algorithms and suites of other installed packages: what registers them, and which package.

    ``"algorithm deep"`` -> ``"deep:Deep of deep 0.1"``. The prefix of its suites' names stands for
    a package's suites.
    """
    return {
        f"{kind} {point.name}": f"{point.value} of "
        + (f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown package")
        for kind in ("algorithm", "suite")
        for point in entry_points(group=f"mega_bench.{kind}s")
    }


def origin() -> dict[str, Any]:
    """What is known of a run's environment before it is known where it will be trained."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    for place, word in enumerate(words):  # what is run then may hold a secret
        if word.startswith("--notify="):
            words[place] = "--notify=..."
        elif words[place - 1] == "--notify":
            words[place] = "..."
    return {"command": shlex.join(words)}


def changed_numerics(
    began: Mapping[str, str], device: str, threads: int, compiled: bool = False
) -> list[str]:
    """How today's `numerics` differ from those that a run began under, in words."""
    plain = {"compiled": "no"}
    before, now = plain | dict(began), plain | numerics(device, threads, compiled)
    return [f"{k} {before.get(k)} -> {v}" for k, v in now.items() if before.get(k) != v]


def environment(device: str, threads: int, compiled: bool = False) -> dict[str, Any]:
    """Everything above, for spec.json."""
    return {
        "versions": versions(),
        "hardware": hardware(device),
        "git_commit": git_commit(),
        "plugins": plugins(),
        "numerics": numerics(device, threads, compiled),
        **origin(),
    }


def peak_memory_bytes() -> int:
    """The most memory this process has held at once."""
    with contextlib.suppress(OSError, StopIteration):  # no /proc
        lines = Path("/proc/self/status").read_text("utf-8").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    # Linux counts that of the process which started this one, too, were it read from here.
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def resolve_device(device: str) -> str:
    """``auto``: CUDA where there is one, else the CPU. Raises ValueError for one not here."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    known = re.fullmatch(r"cpu|cuda(?::(\d{1,4}))?", device)
    if known is None:
        raise ValueError(f"unknown device {device!r}; known: auto, cpu, cuda, cuda:<index>")
    if device != "cpu" and int(known[1] or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {device!r} is not here: torch sees {torch.cuda.device_count()} CUDA devices"
        )
    return device


def gpus(device: str) -> list[str]:
    """The GPUs that ``device`` (as `resolve_device` returns it) stands for, as
    CUDA_VISIBLE_DEVICES names them."""
    import torch

    kind, _, index = device.partition(":")
    if kind != "cuda":
        return []
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    every = visible or [str(number) for number in range(torch.cuda.device_count())]
    return [every[int(index)]] if index else every


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
