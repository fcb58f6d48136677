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
import shlex
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from bench.spec import SpecError, explain, parse_overrides
from bench.store import RunStore
from bench.train import EXIT_FAILED, EXIT_INTERRUPTED
from suites.base import unknown

ROOT = Path(__file__).resolve().parent.parent
"""Where this package is imported from."""
INSTALLED = str(ROOT) in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
"""Whether that is among the installed packages, which every process finds."""
POLL_SECONDS = 0.2
REMOTE_WAIT_SECONDS = 900.0
"""How long a run started again elsewhere waits for its orphan, which ends with its episode."""
REMOTE_HEARTBEAT_SECONDS = 5.0
"""Between signs of life of a run elsewhere: hundreds of them share one file system."""


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
        # torch.compile's helpers, otherwise one per core of the machine for each run.
        helpers = "TORCHINDUCTOR_COMPILE_THREADS"
        limits[helpers] = os.environ.get(helpers, str(max(4, self.threads)))
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
    poll_seconds: float
    """How often its handles are worth asking."""

    def start(self, orders: Sequence[Order]) -> list[Handle]:
        """Start or queue them. Raises OSError or RuntimeError if it cannot."""

    def close(self) -> None:
        """Let go of what the launcher holds; runs under way are none of it."""


# ----------------------------------------------------------------------------------- this machine


class Local:
    """Processes of this machine, shared out evenly over its GPUs if it has any."""

    poll_seconds = 0.25

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

    def __init__(self, order: Order, *, save_seconds: float = math.inf) -> None:
        """``save_seconds``: how long `checkpoint` may take."""
        self.order, self.save_seconds = order, save_seconds
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        """Train to the end; the exit code."""
        here = (
            "--wait-seconds", str(REMOTE_WAIT_SECONDS),
            "--heartbeat-seconds", str(REMOTE_HEARTBEAT_SECONDS),
        )  # fmt: skip
        order = self.order._replace(options=(*self.order.options, *here))
        self._process = process = order.start()
        while True:
            try:
                while (code := process.poll()) is None:
                    time.sleep(POLL_SECONDS)
                return code
            except KeyboardInterrupt:  # asked to stop
                process.send_signal(signal.SIGINT)

    def checkpoint(self) -> Any:
        """Submitit calls this when the time limit is near: save, and be queued again.

        A run that does not end its episode in time goes on from its last checkpoint.
        """
        from submitit.helpers import DelayedSubmission

        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            # Always with a limit: this interrupts `__call__`, which may hold the lock of `wait`.
            try:
                self._process.wait(self.save_seconds)
            except subprocess.TimeoutExpired:
                self._process.kill()
        return DelayedSubmission(Remote(self.order, save_seconds=self.save_seconds))


def _whole_above_one(value: float | None) -> float | None:
    """Ray shares one processor or GPU out, not several."""
    if value is not None and value > 1 and value % 1:
        raise ValueError("above 1, whole numbers only")
    return value


class RayOptions(BaseModel):
    """``--launcher-set`` of Ray."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    address: str | None = None
    """Of the cluster. Default: RAY_ADDRESS, else a cluster that runs on this machine, else a new
    one of this machine alone."""
    cpus_per_run: Annotated[float | None, Field(gt=0), AfterValidator(_whole_above_one)] = None
    """Default: --threads or --sim-workers, whichever is more."""
    gpus_per_run: Annotated[float | None, Field(ge=0), AfterValidator(_whole_above_one)] = None
    """0.25 lets four runs share a GPU. Default: by --runs-per-device with --device cuda, else
    none."""
    memory_gb: Annotated[float, Field(gt=0)] | None = None
    """Of a run; as many share a node as have room. Default: nothing is said, and processors alone
    decide."""
    retries: Annotated[int, Field(ge=-1)] = 20
    """How often a run whose node was lost is started again, from its checkpoint; -1: always."""


class Ray:
    """Tasks of a Ray cluster: one run is one task, started again elsewhere if its node is lost."""

    slots = math.inf
    poll_seconds = 1.0

    def __init__(self, options: RayOptions, *, cores: int, device: str, runs_per_gpu: int) -> None:
        self._ray = ray = import_extra("ray", "ray")
        if not ray.is_initialized():
            try:
                ray.init(address=options.address, log_to_driver=False, logging_level=logging.ERROR)
            except ConnectionError as error:
                raise RuntimeError(f"no Ray cluster: {error}") from None
        cpus, gpus, memory = options.cpus_per_run, options.gpus_per_run, options.memory_gb
        needed = {
            "CPU": cores if cpus is None else cpus,
            "GPU": device.startswith("cuda") / runs_per_gpu if gpus is None else gpus,
            "memory": int(1e9 * (memory or 0)),
        }
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(all(node.get(k, 0) >= v for k, v in needed.items()) for node in nodes):
            words = [f"{needed[kind]:g} {kind}" for kind in ("CPU", "GPU") if needed[kind]]
            words += [f"{memory:g} GB"] if memory else []
            print(f"bench: no node of the Ray cluster has the {', '.join(words)} that a run asks "
                  "for: runs wait until one joins", file=sys.stderr)  # fmt: skip
        self._train = ray.remote(
            num_cpus=needed["CPU"], num_gpus=needed["GPU"], memory=needed["memory"] or None,
            max_retries=options.retries,
        )(_carry_out)  # fmt: skip

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
            lines = str(error).strip().splitlines() or [""]
            raised = isinstance(error, self._ray.exceptions.RayTaskError)  # a traceback
            words = lines[-1 if raised else 0]
            return Exit(EXIT_FAILED, f"Ray: {type(error).__name__}: {words}")

    def stop(self) -> None:
        self._stopped = True
        _ask_to_stop(self._store)  # Ray's cancelling does not reach a task that is under way
        self._ray.cancel(self._task, force=False)


_SET_BY = {
    "time": "minutes", "signal": "signal_seconds", "mem": "memory_gb", "mem_per_cpu": "memory_gb",
    "mem_per_gpu": "memory_gb", "cpus_per_task": "cpus_per_run", "array": "at_once",
    "partition": "partition", "account": "account", "qos": "qos", "constraint": "constraint",
    "requeue": "requeues", "no_requeue": "requeues", "output": "", "error": "",
}  # fmt: skip
"""Options of sbatch that have a setting of their own, or are the launcher's."""


def _sbatch_options(text: str) -> dict[str, Any]:
    """``--gres=gpu:a100:1 --exclusive`` by name, as submitit writes names. Raises ValueError."""
    options: dict[str, Any] = {}
    for word in shlex.split(text):
        option, equals, value = word.removeprefix("--").partition("=")
        name = option.replace("-", "_")
        if not word.startswith("--") or not name:
            raise ValueError(f"sbatch: {word!r} is not of the form --option or --option=value")
        if name in _SET_BY:
            by = f"--launcher-set {_SET_BY[name]}=..." if _SET_BY[name] else "the launcher itself"
            raise ValueError(f"sbatch: --{option} is set by {by}")
        options[name] = value if equals else True
    return options


class SlurmOptions(BaseModel):
    """``--launcher-set`` of SLURM."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    sbatch: str = ""
    """More options of ``sbatch``: "--gres=gpu:a100:1 --reservation=mine"."""
    setup: str | None = None
    """Shell commands that a job begins with: "module load cuda"."""
    minutes: Annotated[int, Field(ge=1)] = 240
    """Time limit of a job; a run that needs longer saves before and is queued again."""
    signal_seconds: Annotated[int, Field(ge=1)] = 300
    """So long before the limit it is told to save, which it does at the end of its episode; if that
    is not over in time, it goes on from its last checkpoint, a minute or so before."""
    requeues: Annotated[int, Field(ge=0)] = 1_000
    """How often a run may reach the time limit."""
    memory_gb: Annotated[float, Field(gt=0)] = 4.0
    cpus_per_run: Annotated[int, Field(ge=1)] | None = None
    """Default: --threads or --sim-workers, whichever is more."""
    gpus_per_run: Annotated[int, Field(ge=0)] | None = None
    """Default: 1 with --device cuda, unless ``sbatch`` asks for some; else none."""
    at_once: Annotated[int, Field(ge=1)] = 256
    """Of the jobs submitted together, those that run at a time; of each array, one at least."""
    array_size: Annotated[int, Field(ge=1)] = 1_000
    """Jobs in one array, which SLURM limits (MaxArraySize); more runs are several arrays."""

    @model_validator(mode="after")
    def _can_be(self) -> Self:
        _sbatch_options(self.sbatch)
        if self.signal_seconds >= 60 * self.minutes:
            raise ValueError(
                f"signal_seconds={self.signal_seconds}: the limit is {60 * self.minutes} seconds "
                f"(minutes={self.minutes}), and a job is to train before it saves"
            )
        return self


class SlurmQueue:
    """The user's jobs in SLURM's queue: one that is not there any more has ended.

    ``squeue`` is asked now and then, once for all jobs; accounting, which not every cluster has,
    never.
    """

    SECONDS = 20.0
    """Between looks."""

    def __init__(self) -> None:
        self.looked = -math.inf
        """When the last look that succeeded began, by the monotonic clock."""
        self._tried = -math.inf
        self._states: dict[str, str] = {}
        self._doomed: list[str] = []
        self.cancelled: list[str] = []

    def look(self, within: float) -> None:
        """Ask, unless that was tried in the last ``within`` seconds. A controller that does not
        answer changes nothing."""
        began = time.monotonic()
        if began - self._tried < within:
            return
        command = ["squeue", "--all", "--noheader", "--array", f"--user={os.getuid()}"]
        try:
            lines = _tool(*command, "--format=%i %T").splitlines()
        except (OSError, subprocess.SubprocessError):
            return
        finally:
            self._tried = time.monotonic()
        pairs = (line.split(maxsplit=1) for line in lines if " " in line.strip())
        self._states, self.looked = {job: state.strip() for job, state in pairs}, began

    def state(self, job_id: str) -> str:
        """PENDING, RUNNING, COMPLETING, ...; empty for a job that was not in the queue."""
        return self._states.get(job_id, "")

    def cancel(self, job_id: str) -> None:
        """Take a job out with the next `flush`."""
        self._doomed.append(job_id)

    def flush(self) -> None:
        """Carry out what `cancel` noted: one command for hundreds, as SLURM asks for."""
        while self._doomed:
            some, self._doomed = self._doomed[:500], self._doomed[500:]
            self.cancelled += some
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                _tool("scancel", *some)

    def left(self) -> list[str]:
        """Jobs that were cancelled and are in the queue all the same, as far as it tells."""
        self.look(0)
        return [job for job in self.cancelled if self.state(job) not in ("", "COMPLETING")]


def _tool(*command: str) -> str:
    """The output of one of SLURM's programs, which no Ctrl-C in the terminal reaches, nor a user's
    filters."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("SQUEUE_", "SCANCEL_"))}
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=60, env=plain,
        start_new_session=True,
    ).stdout  # fmt: skip


class Slurm:
    """Jobs of SLURM, submitted with submitit. A job that is in the queue already, because the
    command that submitted it was killed, is followed instead of submitted again."""

    slots = math.inf
    poll_seconds = 5.0
    SPARE_SECONDS = 30
    """Of the time between warning and limit, what queuing a job again may take."""

    def __init__(self, options: SlurmOptions, folder: Path, *, cores: int, device: str) -> None:
        """``folder``: shared, for submitit's scripts and logs."""
        submitit = import_extra("submitit", "slurm")
        self._folder, self._options, self._queue = folder.resolve(), options, SlurmQueue()
        self._executor = submitit.SlurmExecutor(self._folder, max_num_timeout=options.requeues)
        gpus, cpus = options.gpus_per_run, options.cpus_per_run or cores
        more = _sbatch_options(options.sbatch)
        if gpus is None and not any(name.startswith(("gres", "gpus")) for name in more):
            gpus = int(device.startswith("cuda"))
        named = {"partition", "account", "qos", "constraint"}
        self._executor.update_parameters(
            job_name="bench",
            time=options.minutes,
            signal_delay_s=options.signal_seconds,
            mem=f"{round(1024 * options.memory_gb)}MB",
            cpus_per_task=cpus,
            # Between 22.05 and 23.02 a step does not take it over from its job.
            srun_args=[f"--cpus-per-task={cpus}"],
            gpus_per_node=gpus,
            stderr_to_stdout=True,
            setup=None if options.setup is None else [options.setup],
            # Queued again also when its node fails.
            additional_parameters={"requeue": True} | more,
            **options.model_dump(include=named, exclude_none=True),
        )

    def start(self, orders: Sequence[Order]) -> list[Handle]:
        """See `Launcher.start`."""
        began = time.monotonic()
        self._queue.look(0)
        if self._queue.looked < began and any(self._place(order).exists() for order in orders):
            raise RuntimeError("squeue does not answer, and some of the runs may be in the queue")
        jobs = {order.run: job for order in orders if (job := self._in_queue(order)) is not None}
        new = [order for order in orders if order.run not in jobs]
        size = self._options.array_size
        arrays = [new[first : first + size] for first in range(0, len(new), size)]
        save_seconds = max(1, self._options.signal_seconds - self.SPARE_SECONDS)
        for array in arrays:
            at_once = max(1, self._options.at_once // len(arrays))
            self._executor.update_parameters(array_parallelism=at_once)
            try:
                with self._executor.batch():
                    submitted = [
                        self._executor.submit(Remote(order, save_seconds=save_seconds))
                        for order in array
                    ]
            except Exception as error:
                for job in jobs.values():  # nobody would hear of them
                    self._queue.cancel(job.job_id)
                self._queue.flush()
                raise RuntimeError(f"sbatch: {str(error).strip()}") from error
            for order, job in zip(array, submitted, strict=True):
                jobs[order.run] = job
                with contextlib.suppress(OSError):  # it trains all the same
                    self._place(order).parent.mkdir(parents=True, exist_ok=True)
                    self._place(order).write_text(f"{job.job_id}\n", "ascii")
        return [_Job(jobs[order.run], RunStore(order.run), self._queue) for order in orders]

    def close(self) -> None:
        """The jobs are the cluster's; those that were to be cancelled are."""
        self._queue.flush()
        if self._queue.cancelled and (left := self._queue.left()):
            print(f"bench: still in the queue: scancel {' '.join(left)}", file=sys.stderr)

    @staticmethod
    def _place(order: Order) -> Path:
        """Where a run's job is noted."""
        return RunStore(order.run).state_path / "slurm-job"

    def _in_queue(self, order: Order) -> Any | None:
        """The run's job, if it waits or runs."""
        try:
            job_id = self._place(order).read_text("ascii").strip()
        except (OSError, ValueError):
            return None
        if self._queue.state(job_id) in ("", "COMPLETING"):
            return None
        job = self._executor.job_class(self._folder, job_id)
        over = not job.paths.submitted_pickle.exists() or job.paths.result_pickle.exists()
        return None if over else job


class _Job:
    GONE_SECONDS = 90.0
    """A result may be so much later to be seen, on a shared file system, than its job is gone."""

    def __init__(self, job: Any, store: RunStore, queue: SlurmQueue) -> None:
        self.job, self._store, self._queue = job, store, queue
        self._stopped = self._cancelled = False
        self._since, self._gone = time.monotonic(), math.inf

    def poll(self) -> Exit | None:
        self._queue.flush()
        if os.path.exists(self.job.paths.result_pickle):  # whatever errors a file server has
            return self._result()
        if self._cancelled:
            return Exit(EXIT_INTERRUPTED)
        if self._stopped:
            _ask_to_stop(self._store)
        self._queue.look(SlurmQueue.SECONDS)
        now = time.monotonic()
        if self._queue.looked <= self._since or self._queue.state(self.job.job_id):
            self._gone = math.inf
            return None
        self._gone = min(self._gone, now)
        if now - self._gone < self.GONE_SECONDS:
            return None
        if self._store.done:
            return Exit(0)
        if self._stopped:
            return Exit(EXIT_INTERRUPTED)
        return Exit(
            EXIT_FAILED,
            f"job {self.job.job_id} left the queue without a result (cancelled, killed for its "
            f"memory, or past its time limit?); its output is {self.job.paths.stdout}",
        )

    def _result(self) -> Exit:
        try:
            return Exit(self.job.result())
        except Exception as error:  # noqa: BLE001  (submitit raises what it found in the job)
            if self._stopped:
                return Exit(EXIT_INTERRUPTED)
            trace = str(error).rpartition("\n---")[0] or str(error)  # below it: where the log is
            last = trace.strip().rpartition("\n")[2]
            return Exit(EXIT_FAILED, f"job {self.job.job_id}: {last}")

    def stop(self) -> None:
        # Cancelling leaves a job half a minute, an episode at the papers' scale takes longer.
        again, self._stopped = self._stopped, True
        if not again and self._runs():
            _ask_to_stop(self._store)
        else:
            self._cancelled = True
            self._queue.cancel(self.job.job_id)

    def _runs(self) -> bool:
        self._queue.look(SlurmQueue.SECONDS / 4)
        if self._queue.looked <= self._since:  # no answer
            return self._store.busy or bool(self._store.elsewhere)
        return self._queue.state(self.job.job_id) not in ("", "PENDING", "REQUEUED")


# ---------------------------------------------------------------------------------------- by name

NAMES = ("local", "ray", "slurm")
_OPTIONS: dict[str, type[BaseModel]] = {"ray": RayOptions, "slurm": SlurmOptions}


def launcher(
    name: str,
    settings: Sequence[str],
    *,
    out: Path,
    workers: int,
    cores: int,
    device: str,
    gpus: Sequence[str] = (),
    runs_per_gpu: int = 1,
) -> Launcher:
    """The launcher ``name`` with ``KEY=VALUE`` settings; ``gpus`` are this machine's, ``cores``
    those that a run uses.

    Raises SpecError for what is unknown or out of range, RuntimeError if it cannot be had here.
    """
    options = launcher_options(name, settings)
    if isinstance(options, RayOptions):
        return Ray(options, cores=cores, device=device, runs_per_gpu=runs_per_gpu)
    if isinstance(options, SlurmOptions):
        return Slurm(options, out / ".submitit", cores=cores, device=device)
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
