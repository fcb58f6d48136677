"""Where runs are trained: in processes of this machine, on a Ray cluster, or by SLURM.

A launcher starts `Order`s and hands back a handle for each, to ask whether it has ended and to ask
it to. Every launcher does the same thing in the end: it runs ``python -m bench.train RUN`` on some
machine that shares the output directory, and hears its exit code. What a run is, how far it is and
whether it may be trained are questions for its directory.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bench.spec import SpecError, explain, parse_overrides
from bench.store import RunStore
from bench.train import EXIT_FAILED, EXIT_INTERRUPTED
from suites.base import unknown

ROOT = Path(__file__).resolve().parent.parent
"""Where this package is imported from."""
INSTALLED = str(ROOT) in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
"""Whether that is among the installed packages, which every process finds."""
POLL_SECONDS = 0.2
REMOTE_WAIT_SECONDS = 120.0
"""How long a run started again elsewhere waits for its orphan, which ends with its episode."""


class Order(NamedTuple):
    """A run to train."""

    run: Path
    options: tuple[str, ...]
    """Of ``python -m bench.train``."""
    threads: int

    def start(self, gpu: str | None = None) -> subprocess.Popen[bytes]:
        """The run's process, on this machine, which sees all GPUs or just one of them.

        Raises OSError if its log cannot be written.
        """
        # Linear algebra libraries read their thread counts before torch is told its own.
        limits = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        if gpu is not None:
            limits["CUDA_VISIBLE_DEVICES"] = gpu
        # -P and the path: the code that runs here, not what the working directory has by its name.
        if not INSTALLED:
            paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
            limits["PYTHONPATH"] = os.pathsep.join(paths)
        command = [sys.executable, "-P", "-m", "bench.train", str(self.run), *self.options]
        command += ["--parent", str(os.getpid())]
        with (self.run / "log.txt").open("ab") as log:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env=os.environ | limits, start_new_session=True,
            )  # fmt: skip


class Exit(NamedTuple):
    """How an order ended."""

    code: int
    """That of `bench.train.main`; negative: the signal that ended the process."""
    reason: str = ""
    """What the launcher knows beyond the code."""


class Handle(Protocol):
    """An order under way."""

    def poll(self) -> Exit | None:
        """How it ended; None before."""

    def stop(self) -> None:
        """Ask it to save and end; a second time, to end at once."""


class Launcher(Protocol):
    """A place where runs are trained."""

    slots: float
    """Orders that it takes at a time."""

    def start(self, orders: Sequence[Order]) -> list[Handle]:
        """Start or queue them. Raises OSError or RuntimeError if it cannot."""

    def close(self) -> None:
        """Let go of what the launcher holds; runs under way are none of it."""


# ----------------------------------------------------------------------------------- this machine


class Local:
    """Processes of this machine, shared out evenly over its GPUs if it has any."""

    def __init__(self, workers: int, gpus: Sequence[str] = ()) -> None:
        """``workers``: runs at a time. ``gpus``: as CUDA_VISIBLE_DEVICES names them."""
        self.slots: float = workers
        self._on: dict[str, list[subprocess.Popen[bytes]]] = {gpu: [] for gpu in gpus}

    def start(self, orders: Sequence[Order]) -> list[Handle]:
        """See `Launcher.start`."""
        started: list[Handle] = []
        try:
            started.extend(_Process(self._start(order)) for order in orders)
        except OSError:  # nobody would hear of the others
            for handle in started:
                handle.stop()
            raise
        return started

    def _start(self, order: Order) -> subprocess.Popen[bytes]:
        if not self._on:
            return order.start()
        alive = {gpu: [p for p in runs if p.poll() is None] for gpu, runs in self._on.items()}
        gpu = min(alive, key=lambda gpu: len(alive[gpu]))
        self._on = alive | {gpu: [*alive[gpu], process := order.start(gpu)]}
        return process

    def close(self) -> None:
        """Nothing is held."""


class _Process:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def poll(self) -> Exit | None:
        code = self.process.poll()
        return None if code is None else Exit(code)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)


# -------------------------------------------------------------------------------- other machines


class Remote:
    """An order carried out where another program calls it: a Ray worker, a SLURM job."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        """Train to the end; the exit code."""
        waiting = ("--wait-seconds", str(REMOTE_WAIT_SECONDS))
        order = self.order._replace(options=(*self.order.options, *waiting))
        self._process = process = order.start()
        while True:
            try:
                while (code := process.poll()) is None:
                    time.sleep(POLL_SECONDS)
                return code
            except KeyboardInterrupt:  # asked to stop
                process.send_signal(signal.SIGINT)

    def checkpoint(self) -> Any:
        """Submitit calls this when the time limit is near: save, and be queued again."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait()
        return DelayedSubmission(Remote(self.order))


class RayOptions(BaseModel):
    """``--launcher-set`` of Ray."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    address: str | None = None
    """Of the cluster. Default: RAY_ADDRESS, else a cluster that runs on this machine, else a new
    one of this machine alone."""
    cpus_per_run: Annotated[float, Field(gt=0)] | None = None
    """Default: --threads."""
    gpus_per_run: Annotated[float, Field(ge=0)] | None = None
    """0.25 lets four runs share a GPU. Default: by --runs-per-device with --device cuda, else
    none."""
    retries: Annotated[int, Field(ge=-1)] = 20
    """How often a run whose node was lost is started again, from its checkpoint; -1: always."""


class Ray:
    """Tasks of a Ray cluster: one run is one task, started again elsewhere if its node is lost."""

    slots = math.inf

    def __init__(
        self, options: RayOptions, *, threads: int, device: str, runs_per_gpu: int
    ) -> None:
        self._ray = ray = import_extra("ray", "ray")
        if not ray.is_initialized():
            try:
                ray.init(address=options.address, log_to_driver=False, logging_level=logging.ERROR)
            except ConnectionError as error:
                raise RuntimeError(f"no Ray cluster: {error}") from None
        gpus = options.gpus_per_run
        self._train = ray.remote(
            num_cpus=threads if options.cpus_per_run is None else options.cpus_per_run,
            num_gpus=device.startswith("cuda") / runs_per_gpu if gpus is None else gpus,
            max_retries=options.retries,
        )(_carry_out)

    def start(self, orders: Sequence[Order]) -> list[Handle]:
        """See `Launcher.start`."""
        return [
            _RayTask(self._ray, self._train.remote(Remote(order)), RunStore(order.run))
            for order in orders
        ]

    def close(self) -> None:
        """Leave the cluster, or end it if it was started for this sweep."""
        self._ray.shutdown()


def _carry_out(order: Remote) -> int:
    return order()


def _ask_to_stop(store: RunStore) -> None:
    """Ask a run elsewhere to stop: one that only just starts takes no notice of a request before
    it, and the disk may have no room for one."""
    with contextlib.suppress(OSError):
        store.ask_to_stop()


class _RayTask:
    def __init__(self, ray: Any, task: Any, store: RunStore) -> None:
        self._ray, self._task, self._store, self._stopped = ray, task, store, False

    def poll(self) -> Exit | None:
        ready, _ = self._ray.wait([self._task], timeout=0)
        if not ready:
            if self._stopped:
                _ask_to_stop(self._store)
            return None
        try:
            return Exit(self._ray.get(self._task))
        except self._ray.exceptions.TaskCancelledError:
            return Exit(EXIT_INTERRUPTED)
        except self._ray.exceptions.RayError as error:
            first = str(error).strip().partition("\n")[0]
            return Exit(EXIT_FAILED, f"Ray: {type(error).__name__}: {first}")

    def stop(self) -> None:
        self._stopped = True
        _ask_to_stop(self._store)  # Ray's cancelling does not reach a task that is under way
        self._ray.cancel(self._task, force=False)


class SlurmOptions(BaseModel):
    """``--launcher-set`` of SLURM."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    minutes: Annotated[int, Field(ge=1)] = 240
    """Time limit of a job; a run that needs longer saves before and is queued again."""
    signal_seconds: Annotated[int, Field(ge=1)] = 180
    """So long before the limit it is told to save, which it does at the end of its episode."""
    requeues: Annotated[int, Field(ge=0)] = 1_000
    """How often a run may reach the time limit."""
    memory_gb: Annotated[float, Field(gt=0)] = 4.0
    cpus_per_run: Annotated[int, Field(ge=1)] | None = None
    """Default: --threads."""
    gpus_per_run: Annotated[int, Field(ge=0)] | None = None
    """Default: 1 with --device cuda, else none."""
    at_once: Annotated[int, Field(ge=1)] = 256
    """Jobs of the array that run at a time."""


def slurm_executor(options: SlurmOptions, folder: Path, *, threads: int, device: str) -> Any:
    """Submitit's executor for SLURM. ``folder``: shared, for its scripts and logs."""
    submitit = import_extra("submitit", "slurm")
    executor = submitit.SlurmExecutor(folder.resolve(), max_num_timeout=options.requeues)
    gpus = options.gpus_per_run
    queue = options.model_dump(
        include={"partition", "account", "qos", "constraint"}, exclude_none=True
    )
    executor.update_parameters(
        job_name="bench",
        time=options.minutes,
        signal_delay_s=options.signal_seconds,
        mem=f"{round(1024 * options.memory_gb)}MB",
        cpus_per_task=options.cpus_per_run or threads,
        gpus_per_node=int(device.startswith("cuda")) if gpus is None else gpus,
        array_parallelism=options.at_once,
        stderr_to_stdout=True,
        additional_parameters={"requeue": True},  # also when its node fails
        **queue,
    )
    return executor


class Submitit:
    """Jobs of one of submitit's executors; those started together are one array."""

    slots = math.inf

    def __init__(self, executor: Any) -> None:
        self._executor = executor

    def start(self, orders: Sequence[Order]) -> list[Handle]:
        """See `Launcher.start`."""
        with self._executor.batch():
            jobs = [self._executor.submit(Remote(order)) for order in orders]
        stores = [RunStore(order.run) for order in orders]
        return [_Job(job, store) for job, store in zip(jobs, stores, strict=True)]

    def close(self) -> None:
        """The jobs are the cluster's."""


class _Job:
    def __init__(self, job: Any, store: RunStore) -> None:
        self.job, self._store, self._stopped = job, store, False

    def poll(self) -> Exit | None:
        if not self.job.done():
            if self._stopped:
                _ask_to_stop(self._store)
            return None
        try:
            return Exit(self.job.result())
        except Exception as error:  # noqa: BLE001  (submitit raises what it found in the job)
            if self._stopped:
                return Exit(EXIT_INTERRUPTED)
            last = str(error).strip().rpartition("\n")[2]
            return Exit(EXIT_FAILED, f"job {self.job.job_id} ({self.job.state}): {last}")

    def stop(self) -> None:
        # Cancelling leaves a job half a minute, an episode at the papers' scale takes longer.
        again, self._stopped = self._stopped, True
        if again or self.job.state != "RUNNING":
            self.job.cancel()
        else:
            _ask_to_stop(self._store)


# ---------------------------------------------------------------------------------------- by name

NAMES = ("local", "ray", "slurm")
_OPTIONS: dict[str, type[BaseModel]] = {"ray": RayOptions, "slurm": SlurmOptions}


def launcher(
    name: str,
    settings: Sequence[str],
    *,
    out: Path,
    workers: int,
    threads: int,
    device: str,
    gpus: Sequence[str] = (),
    runs_per_gpu: int = 1,
) -> Launcher:
    """The launcher ``name`` with ``KEY=VALUE`` settings; ``gpus`` are this machine's.

    Raises SpecError for what is unknown or out of range, RuntimeError if it cannot be had here.
    """
    options = launcher_options(name, settings)
    if isinstance(options, RayOptions):
        return Ray(options, threads=threads, device=device, runs_per_gpu=runs_per_gpu)
    if isinstance(options, SlurmOptions):
        folder = out / ".submitit"
        return Submitit(slurm_executor(options, folder, threads=threads, device=device))
    return Local(workers, gpus)


def launcher_options(name: str, settings: Sequence[str]) -> BaseModel | None:
    """The validated settings of a launcher; None if it has none to make. Raises SpecError."""
    if name not in NAMES:
        raise SpecError(unknown("launcher", name, NAMES))
    given = parse_overrides(settings, "--launcher-set")
    model = _OPTIONS.get(name)
    if model is None:
        if given:
            raise SpecError(f"--launcher-set: --launcher {name} takes no settings")
        return None
    if strange := [key for key in given if key not in model.model_fields]:
        raise SpecError(
            "\n".join(
                f"--launcher-set: {unknown('setting', key, model.model_fields)}" for key in strange
            )
        )
    try:
        return model(**given)
    except ValidationError as error:
        raise SpecError(
            "\n".join(explain(f"--launcher {name}", problem) for problem in error.errors())
        ) from None


def import_extra(module: str, extra: str) -> Any:
    """A package of an optional extra. Raises RuntimeError saying how to install it."""
    try:
        return import_module(module)
    except ImportError:
        raise RuntimeError(
            f"{module} is not installed; pip install -e '.[{extra}]' -c constraints.txt"
        ) from None
