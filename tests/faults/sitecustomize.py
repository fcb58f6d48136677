"""Put on PYTHONPATH, injects faults into whatever Python process finds FAULT in its environment.

``FAULT=<call>:<number>[:after]``: the process kills itself (SIGKILL) at its ``number``-th call of
``fsync`` or ``replace``, before or after that did its work. Only processes that train are counted:
it is in saving a checkpoint that they make these calls.
"""

import os
import signal
import sys


def _die_at(name: str, number: int, after: bool) -> None:
    original, calls = getattr(os, name), 0

    def dying(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(os, name, dying)


if (fault := os.environ.get("FAULT")) and "bench.train" in sys.orig_argv:
    call, count, *when = fault.split(":")
    _die_at(call, int(count), when == ["after"])
