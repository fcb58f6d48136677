"""The command line. Heavy imports live inside the commands, so that ``--help`` is instant."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from bench.console import (
    UsageError,
    WorkError,
    duration,
    new_console,
    print_json,
    print_table,
    resolved_device,
    short,
)

if TYPE_CHECKING:
    from bench.evaluate import Policy
    from bench.sweep import Request
    from reports import Results
    from suites.base import VectorEnv

app = typer.Typer(
    name="bench",
    help="Compare MEGA with other multi-task RL algorithms on Meta-World.\n\n"
    "Start with: bench run --algos mega,d2r --suite mt10_rand --seeds 2 --preset smoke",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Out = Annotated[Path, typer.Option("--out", help="Directory of the runs.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Suites = Annotated[
    str, typer.Option("--suite", help="Suites, comma-separated (bench list suites).")
]
Preset = Annotated[str, typer.Option("--preset", help="Scale and recipe (bench list presets).")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE",
        help="A field of the protocol or of the algorithms' configuration; mega.start_stage=4 "
        "for one algorithm. Repeatable.",
    ),
]  # fmt: skip
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:<index>.")]
Workers = Annotated[
    str, typer.Option("--workers", help="Runs at a time: auto (cores) or a number.")
]
Threads = Annotated[int, typer.Option("--threads", min=1, max=1024, help="Threads of each run.")]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="Networks by torch.compile, on a GPU as CUDA graphs: after minutes of compiling fewer "
        "and larger operations. Made for GPUs; on a CPU it is slower.",
    ),
]
RunsPerDevice = Annotated[
    int,
    typer.Option(
        "--runs-per-device", min=1, help="Local and ray: runs that share a GPU, if there is one."
    ),
]
Launcher = Annotated[
    str, typer.Option("--launcher", help="Where runs are trained: local, ray or slurm.")
]
LauncherSet = Annotated[
    list[str] | None,
    typer.Option(
        "--launcher-set", metavar="KEY=VALUE",
        help="A setting of ray or slurm, such as partition=gpu or gpus_per_run=0.25. Repeatable.",
    ),
]  # fmt: skip
Retries = Annotated[
    int,
    typer.Option("--retries", min=0, help="Start a run again whose process was killed or hung."),
]
SimWorkers = Annotated[
    int, typer.Option("--sim-workers", min=0, max=1024, help="Processes each run simulates in.")
]
Hang = Annotated[
    float,
    typer.Option(
        "--hang-seconds",
        min=0.0,
        max=1e7,
        help="End a run that shows no sign of life for this many seconds; 0: never.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")]
Steps = Annotated[int | None, typer.Option("--steps", min=1, help="Training steps per task.")]
Seeds = Annotated[
    str | None,
    typer.Option(
        "--seeds",
        help="5 means seeds 0 to 4; 0-9, 3,7 and 3-3 name them. Default: as many as the preset's "
        "source asks for, or 5.",
    ),
]
Track = Annotated[
    str,
    typer.Option(
        "--track",
        help="Pass metrics on to tensorboard, wandb, mlflow (comma-separated), or none; auto: to "
        "TensorBoard event files in OUT/tensorboard if that is installed.",
    ),
]
Notify = Annotated[
    str | None,
    typer.Option("--notify", metavar="COMMAND", help="Run at the end, with $BENCH_MESSAGE."),
]
DiskBudget = Annotated[
    str | None,
    typer.Option(
        "--disk-budget", metavar="SIZE",
        help="Thin the checkpoints of finished runs while OUT holds more than this, such as 20GB.",
    ),
]  # fmt: skip
OtherNumerics = Annotated[
    bool,
    typer.Option(
        "--allow-other-numerics",
        help="Resume runs that began under other threads, device, torch or simulator versions.",
    ),
]

DEFAULT_OUT = Path("results/runs")


# ----------------------------------------------------------------------------------- training


@app.command()
def run(
    algos: Annotated[
        str | None,
        typer.Option("--algos", help="Algorithms and variants, such as mega,d2r,mega@softmax."),
    ] = None,
    suite: Annotated[
        str | None, typer.Option("--suite", help="Suites, comma-separated (bench list suites).")
    ] = None,
    seeds: Seeds = None,
    preset: Annotated[
        str | None,
        typer.Option("--preset", help="Scale and recipe (bench list presets); default: cpu."),
    ] = None,
    steps: Steps = None,
    set_: Set = None,
    grid: Annotated[Path | None, typer.Option("--grid", help="A TOML file of what to run.")] = None,
    out: Out = DEFAULT_OUT,
    workers: Workers = "auto",
    threads: Threads = 1,
    device: Device = "auto",
    compile_: Compile = False,
    runs_per_device: RunsPerDevice = 4,
    launcher: Launcher = "local",
    launcher_set: LauncherSet = None,
    retries: Retries = 0,
    sim_workers: SimWorkers = 0,
    hang_seconds: Hang = 900.0,
    track: Track = "auto",
    notify: Notify = None,
    disk_budget: DiskBudget = None,
    allow_other_numerics: OtherNumerics = False,
    dry_run: DryRun = False,
) -> None:
    """Train algorithms x suites x seeds. The same command again continues where it stopped.

    Example: bench run --algos mega,d2r --suite mt10_rand --seeds 5
    """
    from bench.conduct import How, conduct
    from bench.sweep import expand, read_grid, read_options

    overrides = _overrides(set_, steps)
    if grid is not None:
        requests, mistakes = read_grid(grid, algos=algos, suite=suite, seeds=seeds, preset=preset)
    elif algos is None or suite is None:
        raise UsageError(
            "say what to run: --algos mega,d2r --suite mt10_rand --seeds 5, or --grid FILE.toml"
        )
    else:
        scale = "cpu" if preset is None else preset
        requests, mistakes = read_options(algos, suite, _seeds(seeds, scale), scale)
    requests = [_with_overrides(request, overrides) for request in requests]
    how = How(
        out=out, workers=workers, threads=threads, device=device, compile=compile_,
        runs_per_device=runs_per_device, launcher=launcher, launcher_set=launcher_set or [],
        retries=retries, sim_workers=sim_workers, hang_seconds=hang_seconds, track=track,
        notify=notify, disk_budget=disk_budget, allow_other_numerics=allow_other_numerics,
    )  # fmt: skip
    conduct(expand(requests, mistakes), how, dry_run=dry_run, of_papers=_suites_of_papers)


@app.command()
def ablate(
    ablation: Annotated[str, typer.Argument(help="bench list ablations, or all.")],
    suite: Annotated[
        str | None,
        typer.Option(
            "--suite", help="Suites, comma-separated; default: the ablation's, mt10_rand."
        ),
    ] = None,
    seeds: Seeds = None,
    preset: Preset = "cpu",
    steps: Steps = None,
    set_: Set = None,
    out: Out = DEFAULT_OUT,
    workers: Workers = "auto",
    threads: Threads = 1,
    device: Device = "auto",
    compile_: Compile = False,
    runs_per_device: RunsPerDevice = 4,
    launcher: Launcher = "local",
    launcher_set: LauncherSet = None,
    retries: Retries = 0,
    sim_workers: SimWorkers = 0,
    hang_seconds: Hang = 900.0,
    track: Track = "auto",
    notify: Notify = None,
    disk_budget: DiskBudget = None,
    allow_other_numerics: OtherNumerics = False,
    dry_run: DryRun = False,
) -> None:
    """Train a shipped ablation of the papers; runs it shares with others are trained once.

    Example: bench ablate halfsoftmax --suite mt10_rand --seeds 5
    """
    from bench.conduct import How, conduct
    from bench.spec import parse_seeds
    from bench.sweep import Request, ablations, expand, names
    from suites.base import unknown

    shipped = ablations()
    if ablation not in (*shipped, "all"):
        raise UsageError(unknown("ablation", ablation, [*shipped, "all"]))
    overrides = _overrides(set_, steps)
    requests = [
        Request(
            entry["algos"],
            names(entry.get("suite", "mt10_rand") if suite is None else suite, "--suite"),
            parse_seeds(_seeds(seeds, preset)), preset,
            # Its values are for its suite.
            (entry.get("set", {}) if suite in (None, entry.get("suite")) else {}) | overrides,
            shared=overrides,
        )
        for name, entry in shipped.items()
        if ablation in (name, "all")
    ]  # fmt: skip
    how = How(
        out=out, workers=workers, threads=threads, device=device, compile=compile_,
        runs_per_device=runs_per_device, launcher=launcher, launcher_set=launcher_set or [],
        retries=retries, sim_workers=sim_workers, hang_seconds=hang_seconds, track=track,
        notify=notify, disk_budget=disk_budget, allow_other_numerics=allow_other_numerics,
    )  # fmt: skip
    conduct(expand(requests), how, dry_run=dry_run, of_papers=_suites_of_papers)


def _overrides(set_: list[str] | None, steps: int | None) -> dict[str, Any]:
    """What ``--set`` and ``--steps`` change together."""
    from bench.spec import parse_overrides

    overrides = parse_overrides(set_ or [])
    if steps is not None:
        if "steps_per_task" in overrides:
            raise UsageError("--steps and --set steps_per_task are the same; give one")
        overrides["steps_per_task"] = steps
    return overrides


def _suites_of_papers() -> set[str]:
    from reports import published

    return set(published("success_rates")["suite"])


def _seeds(given: str | None, scale: str) -> str:
    """``--seeds``, or as many as the preset's source asks for (5 where it does not, or the preset
    is unknown, of which others complain)."""
    from bench import spec

    if given is not None:
        return given
    known = scale in spec.preset_names()
    return str((spec.preset(scale).seeds if known else None) or 5)


def _with_overrides(request: Request, overrides: dict[str, Any]) -> Request:
    from dataclasses import replace

    shared = {*request.shared, *overrides}
    return replace(request, overrides=dict(request.overrides) | overrides, shared=shared)


# ------------------------------------------------------------------------------------- results


@app.command()
def report(
    out: Out = DEFAULT_OUT,
    to: Annotated[
        Path | None, typer.Option("--to", help="Where to write it; default: OUT/report.")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--compare", metavar="DIR_A DIR_B", help="Two sweeps instead of OUT: B - A."),
    ] = None,
    curves: Annotated[
        list[Path] | None,
        typer.Option(
            "--import",
            metavar="FILE.csv",
            help="Curves of somebody else: columns algorithm, step, success (a rate), and if you "
            "have them suite, seed, task, return, episodes, preset, steps_per_task. Repeatable.",
        ),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Renew it while runs are in training; Ctrl-C ends.")
    ] = False,
    every: Annotated[
        int | None, typer.Option("--every", min=1, help="Seconds between renewals; default: 30.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No summary on screen.")] = False,
) -> None:
    """Write tables, figures and one self-contained index.html from the runs so far.

    Example: bench report --out results/runs
    """  # fmt: skip
    import reports

    if compare and out != DEFAULT_OUT:
        raise UsageError(f"--out {out} and --compare: a report is of one or the other; see --to")
    if every is not None and not watch:
        raise UsageError(f"--every {every} is for --watch")
    every = 30 if every is None else every
    sources = list(compare) if compare else [out]
    for source in sources:
        _existing(source, "--compare" if compare else "--out")
    place = to or (Path("results/comparison") if compare else out / "report")
    while True:
        seen = _last_change(sources)
        results = _results(sources, curves or [], named=compare is not None)
        waiting = watch and bool(results.runs["state"].isin(["running", "pending"]).any())
        try:
            page = reports.build(results, place, refresh=every if waiting else None)
        except OSError as error:
            raise WorkError(f"cannot write the report: {error}") from None
        if not waiting:
            break
        print(f"{time.strftime('%H:%M:%S')} {page}", flush=True)
        while _last_change(sources) == seen:
            time.sleep(every)
        time.sleep(every)
    if not quiet:
        new_console().print(reports.summary(results))
    print(page)


def _results(sources: list[Path], curves: list[Path], *, named: bool = False) -> Results:
    """All runs below the directories, and imported curves; ``named`` tells the directories apart.

    Warns of what cannot be read.
    """
    import reports
    from bench import frames

    results = reports.Results()
    names = _names_apart(sources)
    for source, name in zip(sources, names, strict=True):
        found = reports.Results(**frames.load(source))
        for run, why in found.unreadable.items():
            print(f"warning: skipping {run}: {why}", file=sys.stderr)
        for line in found.health[found.health["check"] == "files"].itertuples():
            print(f"warning: {line.run}: {line.verdict}", file=sys.stderr)
        results += found.named(name) if named else found
    for path in curves:
        try:
            results += reports.read_curves(path)
        except (OSError, ValueError) as error:
            raise UsageError(f"--import {error}") from None
    return results


def _names_apart(sources: list[Path]) -> list[str]:
    """Each directory by as much of its path's end as tells it apart."""
    parts = [source.resolve().parts for source in sources]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise UsageError("--compare: both directories are the same")


def _last_change(sources: list[Path]) -> tuple[float, int]:
    """When the newest status or metrics below the directories were written, and how many runs are
    in training: one that is killed writes nothing any more."""
    from bench.frames import state_of
    from bench.store import find

    stores = [store for source in sources for store in find(source)]
    files = [store.path / name for store in stores for name in ("status.json", "metrics.csv")]
    written = max((file.stat().st_mtime for file in files if file.exists()), default=0.0)
    return written, sum(state_of(store)["state"] == "running" for store in stores)


@app.command()
def export(
    format_: Annotated[
        str, typer.Option("--format", help="csv, parquet, marl-eval (JSON) or latex.")
    ] = "csv",
    out: Out = DEFAULT_OUT,
    to: Annotated[Path | None, typer.Option("--to", help="A folder; default: OUT/export.")] = None,
) -> None:
    """Write the results for other programs: tidy tables, booktabs, or MARL-eval's JSON.

    Example: bench export --format marl-eval --out results/runs
    """
    import reports
    from suites.base import unknown

    if format_ not in reports.EXPORTS:
        raise UsageError(unknown("format", format_, reports.EXPORTS))
    _existing(out)
    try:
        paths = reports.export(_results([out], []), to or out / "export", format_)
    except ImportError as error:
        why = str(error).splitlines()[0]
        raise WorkError(f"{format_} needs pyarrow (pip install pyarrow): {why}") from None
    except (OSError, reports.MissingError) as error:
        raise WorkError(f"cannot export: {error}") from None
    for path in paths:
        print(path)


@app.command()
def status(
    out: Out = DEFAULT_OUT,
    watch: Annotated[bool, typer.Option("--watch", help="Show it anew until all is done.")] = False,
    every: Annotated[
        float, typer.Option("--every", min=0.1, help="Seconds between looks of --watch.")
    ] = 2.0,
    json: Json = False,
) -> None:
    """One row per run: state, step, success, speed, time left, age of the last heartbeat, error.

    Example: bench status --out results/runs --watch
    """
    if not watch:
        _existing(out)
    console = new_console()
    while True:
        rows = _status_rows(out)
        if watch and console.is_terminal:
            console.clear()
        if json:
            print_json("status", rows)
        elif rows:
            print_table(STATUS_COLUMNS, [_status_cells(row) for row in rows])
            print(_outlook(rows))
        else:
            print(f"no runs below {out}")
        over = rows and all(row["state"] in ("done", "failed", "unreadable") for row in rows)
        if over or not watch:
            return
        sys.stdout.flush()
        time.sleep(every)


def _existing(folder: Path, option: str = "--out") -> None:
    """Raises WorkError where there is no such directory."""
    if not folder.is_dir():
        raise WorkError(
            f"{option} {folder}: no such directory; train something first (bench run --help)"
        )


STATUS_COLUMNS = [
    "run",
    "state",
    "step",
    "success",
    "steps/s per task",
    "left",
    "heartbeat",
    "error",
]


def _status_rows(out: Path) -> list[dict[str, Any]]:
    from bench.frames import run_row
    from bench.store import StoreError, find

    rows: list[dict[str, Any]] = []
    for store in find(out):
        name = str(store.path.relative_to(out))
        try:
            row = run_row(store, name)
        except StoreError as error:
            rows.append({"run": name, "state": "unreadable", "error": str(error)})
            continue
        rate, left = row["steps_per_second"], row["steps_per_task"] - row["step"]
        running = row["state"] == "running"
        rows.append(
            {key: row[key] for key in ("run", "state", "step", "steps_per_task", "success")}
            | {
                "steps_per_second": rate,
                "eta_seconds": left / rate if running and rate else None,
                "heartbeat_age_seconds": time.time() - row["heartbeat"] if running else None,
                "error": row["error"],
            }
        )
    return rows


def _status_cells(row: dict[str, Any]) -> list[str]:
    def shown(key: str, form: str) -> str:
        return "" if row.get(key) is None else format(row[key], form)

    left, age = row.get("eta_seconds"), row.get("heartbeat_age_seconds")
    return [
        row["run"], row["state"], f"{row.get('step', 0):,}/{row.get('steps_per_task', 0):,}",
        shown("success", ".2f"), shown("steps_per_second", ".0f"),
        "" if left is None else duration(left), "" if age is None else f"{age:.0f} s ago",
        row["error"],
    ]  # fmt: skip


def _outlook(rows: list[dict[str, Any]]) -> str:
    """How many runs are done, and how long the rest takes at the rate measured now."""
    states = [row["state"] for row in rows]
    counts = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(sorted(states)))
    rates = [r["steps_per_second"] for r in rows if r["state"] == "running"]
    rates = [rate for rate in rates if rate]
    if not rates:
        return counts
    open_ = [r for r in rows if r["state"] in ("running", "pending", "interrupted")]
    left = sum(r["steps_per_task"] - r["step"] for r in open_) / sum(rates)
    longest = max(r["eta_seconds"] or 0.0 for r in rows if r["state"] == "running")
    return f"{counts}; about {duration(max(left, longest))} left at the present rate"


@app.command()
def clean(
    out: Out = DEFAULT_OUT,
    checkpoints: Annotated[
        bool,
        typer.Option("--checkpoints", help="Also the last checkpoints, which bench eval reads."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would go, and stop.")
    ] = False,
    json: Json = False,
) -> None:
    """Remove what finished runs no longer need and interrupted writes left behind; never results.

    Example: bench clean --dry-run
    """
    from bench.store import find
    from bench.sweep import size
    from bench.tidy import removable, remove

    _existing(out)
    found = removable(find(out), checkpoints=checkpoints)
    try:
        freed = sum(removal.size for removal in found) if dry_run else remove(found)
    except OSError as error:
        raise WorkError(f"cannot remove {error.filename}: {error.strerror}") from None
    rows = [{"file": str(r.path), "bytes": r.size, "why": r.why} for r in found]
    if json:
        print_json("clean", rows)
        return
    for removal in found:
        print(f"{removal.path}  {size(removal.size)}  {removal.why}")
    print(f"{len(found)} files, {size(freed)} " + ("would be removed" if dry_run else "removed"))


@app.command("eval")
def eval_(
    run: Annotated[str, typer.Argument(help="A run's directory, or a part of its path below OUT.")],
    film: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FILE]", help="With --video: all tasks in one film (.gif, .webp or .mp4)."
        ),
    ] = None,
    episodes: Annotated[int, typer.Option("--episodes", min=1, help="Episodes per task.")] = 100,
    policy: Annotated[
        str, typer.Option("--policy", help="agent (the run's newest checkpoint), expert or random.")
    ] = "agent",
    video: Annotated[
        bool,
        typer.Option("--video", help="Film an episode of each task, into the run for the report."),
    ] = False,
    out: Out = DEFAULT_OUT,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Evaluate a run's newest checkpoint, or a reference policy on the same episodes.

    Example: bench eval mt10_rand/mega/0 --episodes 100

    Example: bench eval mt10_rand/mega/0 --video, or --video policy.gif
    """
    if film is not None and not video:
        raise UsageError(f"{film}: a file is for --video")
    _prepare_rendering(film, video=video)
    from bench import references
    from bench.evaluate import evaluate
    from bench.store import StoreError, open_run
    from suites.base import SimulatorError, unknown

    known = ["agent", *references.POLICIES]
    if policy not in known:
        raise UsageError(unknown("policy", policy, known))
    store, chosen = open_run(out, run), resolved_device(device)
    try:
        spec = store.spec()
        suite = spec.make_suite()
        if video and film is None and policy not in ("agent", spec.algorithm):
            raise UsageError(
                f"--video of {policy}: name a FILE, the run keeps its own policy's clips"
            )
        if policy == "agent":
            checkpoint = store.load_checkpoint()
            if checkpoint is None:
                raise WorkError(f"{store.path} has no checkpoint to evaluate")
            agent = spec.make_agent(chosen)
            agent.load_state_dict(checkpoint[1]["agent"])
            step = checkpoint[0]
            act: Policy = lambda obs: agent.act(obs, explore=False).action  # noqa: E731
        else:
            step, act = 0, references.policy(policy, suite, spec)
    except StoreError as error:
        raise WorkError(str(error)) from None
    count = references.episodes_of(policy, suite, episodes)
    try:
        with contextlib.closing(suite.make(seed=spec.seed, autoreset=False)) as envs:
            outcome = evaluate(act, envs, count, spec.protocol.eval_seed)
    except SimulatorError as error:
        raise WorkError(str(error)) from None
    rows: list[dict[str, Any]] = [
        {
            "task": task, "successes": int(outcome.success[i].sum()), "episodes": count,
            "return": float(outcome.return_[i].mean()), "step": step,
        }
        for i, task in enumerate(suite.spec.task_names)
    ]  # fmt: skip
    if json:
        print_json("eval", rows)
    else:
        if count < episodes:
            print(f"goals are frozen: all {episodes} episodes of this policy are alike, 1 was run")
        print_table(
            ["task", "success", "return"],
            [[r["task"], f"{r['successes']}/{r['episodes']}", f"{r['return']:.1f}"] for r in rows],
        )
        print(f"mean success {outcome.success.mean():.3f} at step {step:,} per task")
    if video:
        filmed = suite.make(seed=spec.seed, autoreset=False)
        for path in _film(act, filmed, spec.protocol.eval_seed, store.path, film):
            print(path, file=sys.stderr)


def _prepare_rendering(file: Path | None, *, video: bool) -> None:
    """Check MUJOCO_GL, and for a video choose a renderer, before anything imports MuJoCo."""
    from bench.video import backend_setting, check_format, choose_backend
    from suites.base import RenderError

    try:
        backend_setting()
        if file is not None:
            check_format(file)
        if video:
            choose_backend()
    except RenderError as error:
        raise WorkError(str(error)) from None
    except ValueError as error:
        raise UsageError(str(error)) from None


def _film(
    policy: Policy, envs: VectorEnv, seed: int, run: Path, together: Path | None
) -> list[Path]:
    """Film the policy: all tasks into the file ``together``, or a clip per task into the run."""
    from bench import video
    from bench.frames import VIDEO
    from suites.base import RenderError

    try:
        films = video.film(policy, envs, seed)
    except RenderError as error:
        raise WorkError(str(error)) from None
    finally:
        envs.close()
    if together is not None:
        clips = {together: video.mosaic(films)}
    else:
        names = [run / VIDEO / f"{task}.webp" for task in envs.spec.task_names]
        clips = dict(zip(names, films, strict=True))
    for path, pictures in clips.items():
        try:
            video.write(pictures, path)
        except OSError as error:
            raise WorkError(f"cannot write {path}: {error.strerror or error}") from None
    return list(clips)


# ------------------------------------------------------------------------------------- looking


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(help="algos, variants, suites, presets or ablations.")],
    json: Json = False,
) -> None:
    """What there is, one line each with its source.

    Example: bench list variants
    """
    import algorithms
    import suites
    from bench.spec import preset, preset_names
    from bench.sweep import ablations
    from suites.base import unknown

    rows: list[dict[str, Any]]
    if what in ("algos", "variants"):
        loaded = {}
        for name in algorithms.names():
            try:
                loaded[name] = algorithms.load(name)
            except ValueError as error:
                print(f"bench: {error}", file=sys.stderr)
        rows = [{"name": name, "paper": agent.PAPER} for name, agent in loaded.items()]
        if what == "variants":
            rows = [
                {"name": f"{name}@{v}", "changes": ", ".join([
                    *(f"{k}={x}" for k, x in values.items()),
                    *(f"{k}=the number in the name" for k in re.findall("{(.+?)}", v)),
                ]) or "nothing: it is the plain algorithm", "paper": agent.PAPER}
                for name, agent in loaded.items()
                for v, values in agent.VARIANTS.items()
            ]  # fmt: skip
    elif what == "suites":
        rows = [{"name": name, "what": what} for name, what in suites.described().items()]
    elif what == "presets":
        rows = [{"name": n, "description": preset(n).description} for n in preset_names()]
    elif what == "ablations":
        rows = [
            {"name": n, "description": e["description"], "paper": e["paper"],
             "suite": e.get("suite", "mt10_rand"), "algos": ",".join(e["algos"])}
            for n, e in ablations().items()
        ]  # fmt: skip
    else:
        raise UsageError(
            unknown("listing", what, ["algos", "variants", "suites", "presets", "ablations"])
        )
    if json:
        print_json(what, rows)
    else:
        print_table(list(rows[0]), [[str(v) for v in row.values()] for row in rows])


@app.command()
def show(
    algorithm: Annotated[str, typer.Argument(help="Such as mega@softmax.")],
    suite: Annotated[str, typer.Option("--suite", help="The suite.")] = "mt10_rand",
    preset: Preset = "cpu",
    set_: Set = None,
    json: Json = False,
) -> None:
    """The resolved configuration: each field's value, where it comes from and what it means.

    Example: bench show mega@softmax --suite mt10_rand --preset paper
    """
    from bench.spec import Protocol, RunSpec, parse_overrides

    spec = RunSpec.resolve(
        algorithm, suite, 0, preset_name=preset, overrides=parse_overrides(set_ or [])
    )
    rows = []
    for group, model, values in (
        ("protocol", Protocol, spec.protocol.model_dump(mode="json")),
        (spec.algorithm, spec.agent.Config, spec.config),
    ):
        for name, info in model.model_fields.items():
            source = spec.sources.get(name) or (
                "default" if values[name] == info.default else "default, for this suite and length"
            )
            meaning = " ".join((info.description or "").split())
            rows.append(
                {"group": group, "field": name, "value": values[name], "from": source,
                 "meaning": meaning}
            )  # fmt: skip
    if json:
        print_json("show", rows)
        return
    print(f"{spec.label} on {spec.suite}, preset {spec.preset}, id of seed 0: {spec.id}")
    print_table(
        ["group", "field", "value", "from", "meaning"],
        [[r["group"], r["field"], str(r["value"]), r["from"], r["meaning"]] for r in rows],
    )


@app.command()
def params(
    suite: Suites = "mt10_rand",
    algos: Annotated[str | None, typer.Option("--algos", help="Default: all algorithms.")] = None,
    preset: Preset = "paper",
    json: Json = False,
) -> None:
    """Parameters of each algorithm (actor, one critic, sum) beside the published figures.

    Example: bench params --suite mt10_rand,mt50_rand
    """
    import algorithms
    import reports
    from bench.spec import RunSpec
    from bench.sweep import names

    published = reports.published("parameters").set_index("algorithm")
    rows: list[dict[str, Any]] = []
    for suite_name in names(suite, "--suite"):
        for label in algorithms.names() if algos is None else names(algos, "--algos"):
            spec = RunSpec.resolve(label, suite_name, 0, preset_name=preset)
            counts = spec.make_agent().parameter_counts()
            published_for = re.match(r"mt(10|50)_", suite_name)
            column = published_for and f"{published_for[0][:-1]}_millions"
            printed = None
            if column and label in published.index:
                printed = float(published[column].loc[label])
            rows.append(
                {"algorithm": label, "suite": suite_name, **counts,
                 "sum": sum(counts.values()), "published_millions": printed}
            )  # fmt: skip
    if json:
        print_json("params", rows)
        return
    print_table(
        ["algorithm", "suite", "actor", "critic", "sum", "published"],
        [
            [r["algorithm"], r["suite"], f"{r['actor']:,}", f"{r['critic']:,}", f"{r['sum']:,}",
             "" if r["published_millions"] is None else f"{r['published_millions']:.2f} M"]
            for r in rows
        ],
    )  # fmt: skip


@app.command()
def speed(
    suite: Annotated[str, typer.Option("--suite", help="Suites, comma-separated.")] = "mt10_rand",
    algos: Annotated[str | None, typer.Option("--algos", help="Default: all algorithms.")] = None,
    preset: Annotated[str, typer.Option("--preset", help="Presets, comma-separated.")] = "paper",
    threads: Annotated[
        str, typer.Option("--threads", help="Threads, comma-separated; all: every core.")
    ] = "1",
    device: Device = "auto",
    compile_: Annotated[
        bool,
        typer.Option("--compile", help="Each algorithm twice: the second time by torch.compile."),
    ] = False,
    set_: Set = None,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0.0, help="Of measuring, per row.")
    ] = 6.0,
    simulators: Annotated[
        bool, typer.Option("--simulators", help="Also simulators, beside the suite's own.")
    ] = False,
    training: Annotated[
        int,
        typer.Option(
            "--train", min=0, help="Also train this many steps per task, thrice, to time the loop."
        ),
    ] = 0,
    sim_workers: SimWorkers = 0,
    json: Json = False,
) -> None:
    """Milliseconds per update, action and simulator step, and steps/s, on this machine.

    Algorithms are measured in turns; "ratio" is an update's time to that of the first, "gflop" the
    work of its matrix products, "peak_share" their rate against that of one large product.

    --train runs the real loop for a while, three times, in turns: the median rate, and the shares
    of update, simulator, acting and the rest, without evaluations. It is the slower of the two:
    "steps_per_second" above adds up parts that were measured alone, with all caches theirs.

    Example: bench speed --algos mt_sac,mega,d2r --preset cpu,paper --threads 1,all
    """
    import algorithms
    from bench import machine
    from bench.spec import RunSpec, parse_overrides
    from bench.speed import simulator_rows, speed_rows, training_rows
    from bench.sweep import names

    cores = machine.cores()
    counts = []
    for text in names(threads, "--threads"):
        if text != "all" and not (text.isdecimal() and 1 <= int(text) <= cores):
            raise UsageError(f"--threads {text!r}: allowed are 1 to {cores}, and all")
        counts.append(cores if text == "all" else int(text))
    chosen = resolved_device(device)
    labels = algorithms.names() if algos is None else names(algos, "--algos")
    if sim_workers and not training:
        raise UsageError(f"--sim-workers {sim_workers} is for --train")
    if compile_ and (problem := machine.compiler_problem(chosen)):
        raise WorkError(f"--compile: {problem}")
    suites, presets = names(suite, "--suite"), names(preset, "--preset")
    overrides = parse_overrides(set_ or [])
    rows = speed_rows(labels, suites, presets, chosen, counts, seconds, overrides, compile_)
    worlds = simulator_rows(
        [
            RunSpec.resolve(labels[0], name, 0, preset_name=scale, overrides=overrides)
            for name, scale in itertools.product(suites, presets)
            if simulators
        ]
    )
    try:
        trained = [
            row
            for name, scale, count in itertools.product(suites, presets, counts)
            if training
            for row in training_rows(
                labels, name, scale, chosen, count, training, overrides, sim_workers, compile_
            )
        ]
    except (RuntimeError, OSError) as error:  # training that diverges, a simulator, a full disk
        raise WorkError(f"--train: {error}") from None
    facts, versions = machine.hardware(chosen), machine.versions()
    if json:
        more = {"simulators": worlds, "training": trained, "hardware": facts, "versions": versions}
        print_json("speed", rows, more)
        return
    for table in filter(None, (rows, worlds, trained)):
        columns = list(table[0])
        print_table(columns, [[short(row[c]) for c in columns] for row in table])
    software = ", ".join(f"{name} {versions[name]}" for name in machine.PACKAGES)
    print(f"{facts['processor']}, {cores} cores, device {chosen}; {software}")


@app.command()
def doctor(
    run: Annotated[
        str | None, typer.Argument(help="A run to check; default: this machine.")
    ] = None,
    out: Out = DEFAULT_OUT,
    json: Json = False,
) -> None:
    """Check this machine, or the integrity of a run, and say what to do about each problem.

    Example: bench doctor
    """
    from bench import doctor as checks
    from bench.store import open_run

    rows = checks.machine_checks(out) if run is None else checks.run_checks(open_run(out, run))
    if json:
        print_json("doctor", rows)
    else:
        print_table(
            ["check", "result", "value", "what to do"],
            [[r["check"], r["result"], r["value"], r["advice"]] for r in rows],
        )
    if any(row["result"] == "bad" for row in rows):
        raise typer.Exit(1)


@app.command()
def verify(
    run: Annotated[str, typer.Argument(help="A run's directory, or a part of its path below OUT.")],
    steps: Annotated[
        int | None,
        typer.Option("--steps", min=1, help="Per task; default: until updates were logged twice."),
    ] = None,
    out: Out = DEFAULT_OUT,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Train the first steps of a recorded run again and compare every byte that they measure.

    Example: bench verify mt10_rand/mega/0
    """
    from bench.store import open_run
    from bench.verify import steps_to_verify
    from bench.verify import verify as again

    store, chosen = open_run(out, run), resolved_device(device)
    try:
        verdict = again(store, steps or steps_to_verify(store.spec()), chosen)
    except (RuntimeError, OSError) as error:  # of the store, of training, of the simulator
        raise WorkError(str(error)) from None
    if json:
        print_json("verify", [verdict._asdict()])
    else:
        compared = f"{verdict.rows:,} rows and {verdict.probes} probes up to step {verdict.steps:,}"
        print(f"{verdict.difference or 'equal to the byte'} ({compared})")
        for change in verdict.numerics:
            print(f"other numerics than recorded, which may change bytes: {change}")
    if verdict.difference:
        raise typer.Exit(1)


def main() -> NoReturn:
    """Run the command line: errors on stderr, 2 bad usage, 1 failed work, 130 interrupted."""

    try:
        app(standalone_mode=True)
    except UsageError as error:
        _fail(error, 2)
    except WorkError as error:
        _fail(error, 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except MemoryError as error:
        _fail(WorkError(f"out of memory: {error}"), 1)
    except OSError as error:  # a name too long, a full disk
        _fail(WorkError(str(error)), 1)
    except ValueError as error:
        from bench.spec import SpecError

        if not isinstance(error, SpecError):
            raise
        _fail(error, 2)
    except RuntimeError as error:
        from bench.video import ADVICE

        if "MUJOCO_GL" not in str(error):  # MuJoCo's own complaint, wherever it is imported first
            raise
        _fail(UsageError(f"{error}; {ADVICE}"), 2)
    sys.exit(0)


def _fail(error: Exception, code: int) -> NoReturn:
    for line in str(error).splitlines():
        print(f"bench: {line}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
