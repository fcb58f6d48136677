"""``python tests/other_machine.py NAME RUN [OPTIONS]``: train RUN as if on the machine NAME.

A machine that shares the directory but not the kernel: it sees no file lock of the others and has a
name of its own.
"""

from __future__ import annotations

import fcntl
import os
import sys

from bench import lease
from bench.train import main


def unshared(name: str) -> None:
    """Make this process one of the machine ``name``."""

    def no_lock(*_: object) -> None:
        raise OSError(95, os.strerror(95))

    fcntl.flock = no_lock
    lease.machine = lambda: f"{name}/"


if __name__ == "__main__":
    unshared(sys.argv[1])
    sys.exit(main(sys.argv[2:]))
