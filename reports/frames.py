"""What the reports are made from: tidy frames, and the sections they fall into.

A section holds the runs of one suite at one scale (preset and steps per task). No table or figure
ever averages over two scales, nor over runs of one algorithm whose configurations differ: those get
labels that say what differs.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

RUN_COLUMNS: dict[str, Any] = {
    "run": "",
    "id": "",
    "suite": "",
    "algorithm": "",
    "seed": -1,
    "state": "pending",
    "preset": "unknown",
    "full_scale": False,
    "step": 0,
    "steps_per_task": 0,
    "parameters_actor": np.nan,
    "parameters_critic": np.nan,
    "seconds": np.nan,
    "updates_per_second": np.nan,
    "peak_memory_bytes": np.nan,
    "error": "",
    "other_numerics": "",
    "command": "",
    "origin": "",
    "sweep": "",
}
_ROW = {"run": "", "suite": "", "algorithm": "", "seed": -1, "step": 0}
METRIC_COLUMNS = _ROW | {"kind": "", "task": "", "metric": "", "value": np.nan, "count": np.nan}
TIMING_COLUMNS = _ROW | {"section": "", "seconds": np.nan}
HEALTH_COLUMNS = {"run": "", "check": "", "result": "", "verdict": "", "advice": ""}

WITHOUT_TASKS = "all"
"""The task of rows that are a mean over tasks."""
REFERENCES = ("expert", "random")
"""Policies that nobody trained; they are yardsticks, never contestants."""

PAPER_ORDER = ("mega", "d2r", "soft_module", "paco", "care", "mtmh_sac", "mt_sac")
"""Row order of MEGA Table 1, MEGA first; other algorithms follow by name."""

RECIPE = (
    "gamma",
    "tau",
    "actor_lr",
    "critic_lr",
    "alpha_lr",
    "reward_scale",
    "loss_weight",
    "grad_clip",
    "critic_layer_norm",
    "reward_balance",
    "time_limit",
    "target_entropy",
    "init",
)
"""Configuration fields that a comparison expects to be alike for every algorithm."""

Snapshot = tuple[int, dict[str, np.ndarray]]


class MissingError(Exception):
    """A table or figure that cannot be had from these results; the message says why."""


def _complete(frame: pd.DataFrame, columns: dict[str, Any]) -> pd.DataFrame:
    """A copy that has every column, of the default's kind, whatever the frame came with."""
    out = frame.reset_index(drop=True).copy()
    for name, default in columns.items():
        if name not in out:
            out[name] = default
        if isinstance(default, str) and isinstance(out[name].dtype, pd.StringDtype):
            out[name] = out[name].fillna(default)
        elif isinstance(default, str):
            out[name] = out[name].astype(object).where(out[name].notna(), default).map(str)
        else:
            numbers = pd.to_numeric(out[name], errors="coerce")
            out[name] = numbers.fillna(default).astype(type(default))
    return out


@dataclass(kw_only=True)
class Results:
    """The frames of a results folder; absent columns and empty frames are allowed."""

    runs: pd.DataFrame = field(default_factory=pd.DataFrame)
    """One row per run: see ``RUN_COLUMNS``, and ``protocol.*``, ``config.*``, ``hardware.*``,
    ``versions.*``. ``step`` and ``steps_per_task`` count environment steps of each task;
    ``full_scale``: trained and evaluated as a paper does. ``seconds`` is training wall-clock,
    ``command`` what trains the run again, ``origin`` the file that somebody else's
    curves came from, ``sweep`` tells the sweeps of a comparison apart. Runs of one ``id`` and seed
    are copies."""
    metrics: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Tidy rows; those of training (kind ``train``) are gathered to few. Of ``success``, value and
    count are successes and episodes; of ``return``, the mean episode return and episodes; of
    anything else, a mean and its samples. Without a count, ``success`` is a rate."""
    timing: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Cumulative seconds per section of the training loop."""
    health: pd.DataFrame = field(default_factory=pd.DataFrame)
    """The algorithms' verdicts on their runs: ``result`` is good, note or bad."""
    probes: dict[str, list[Snapshot]] = field(default_factory=dict)
    """Per run, the agent's own arrays by step."""
    traces: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    """Per run, arrays computed on observations of the final evaluation."""
    tasks: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Task names of a suite in the order of the task axis; without it, the order in metrics."""
    ablations: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name -> ``description``, ``paper`` and ``algos``, the labels that it compares."""
    clips: dict[str, dict[str, Path]] = field(default_factory=dict)
    """Per run and task, a GIF or MP4 of the learned policy."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Run directories that could not be read, and why."""

    def __post_init__(self) -> None:
        self.runs = _complete(self.runs, RUN_COLUMNS).drop_duplicates("run", keep="last")
        self.metrics = _complete(self.metrics, METRIC_COLUMNS)
        self.timing = _complete(self.timing, TIMING_COLUMNS)
        self.health = _complete(self.health, HEALTH_COLUMNS)

    def __add__(self, other: Results) -> Results:
        """Both; of runs, suites and ablations that both name, the other's."""

        def both(mine: pd.DataFrame, theirs: pd.DataFrame) -> pd.DataFrame:
            return _stacked(mine[~mine["run"].isin(other.runs["run"])], theirs)

        return Results(
            runs=both(self.runs, other.runs),
            metrics=both(self.metrics, other.metrics),
            timing=both(self.timing, other.timing),
            health=both(self.health, other.health),
            probes=self.probes | other.probes,
            traces=self.traces | other.traces,
            tasks=self.tasks | other.tasks,
            ablations=self.ablations | other.ablations,
            clips=self.clips | other.clips,
            unreadable=self.unreadable | other.unreadable,
        )

    def named(self, sweep: str) -> Results:
        """The same with ``sweep`` in the labels, to be compared with another sweep's.

        >>> before, after = (Results(**load(name)) for name in ("before", "after"))
        >>> build(before.named("before") + after.named("after"), "comparison")
        """

        def inside(frame: pd.DataFrame) -> pd.DataFrame:
            return frame.assign(run=[f"{sweep}/{run}" for run in frame["run"]])

        def renamed(runs: dict[str, Any]) -> dict[str, Any]:
            return {f"{sweep}/{run}": value for run, value in runs.items()}

        return replace(
            self,
            runs=inside(self.runs).assign(sweep=sweep),
            metrics=inside(self.metrics),
            timing=inside(self.timing),
            health=inside(self.health),
            probes=renamed(self.probes),
            traces=renamed(self.traces),
            clips=renamed(self.clips),
            unreadable=renamed(self.unreadable),
        )


def _stacked(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    present = [frame for frame in (first, second) if len(frame)]
    return pd.concat(present, ignore_index=True) if present else first


@cache
def published(name: str) -> pd.DataFrame:
    """The papers' numbers ``published/<name>.csv``, with each row's ``citation``.

    Raises:
        ValueError: no such table.
    """
    folder = Path(__file__).parent / "published"
    path = folder / f"{name}.csv"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.csv")))
        raise ValueError(f"no published table {name!r}; there are {known}")
    frame = pd.read_csv(path)
    if name == "sources":
        return frame
    sources = pd.read_csv(folder / "sources.csv")
    citations = dict(zip(sources["source"], sources["citation"], strict=True))
    return frame.assign(citation=[citations.get(source, source) for source in frame["source"]])


def generator(*names: object) -> np.random.Generator:
    """A random stream of its own for each thing, so that no interval depends on another's."""
    return np.random.default_rng([zlib.crc32(str(name).encode()) for name in names])


def text(value: object) -> str:
    """A configuration value as people write it; what is absent is empty."""
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return ""
    if isinstance(value, (bool, np.bool_)):
        return str(bool(value)).lower()
    if isinstance(value, (int, np.integer)):
        return str(int(value))
    if isinstance(value, (float, np.floating)):
        return text(int(value)) if float(value).is_integer() else f"{value:g}"
    if isinstance(value, (list, tuple, np.ndarray)):
        return ", ".join(text(item) for item in value)
    return str(value)


def counted(count: int, noun: str) -> str:
    """``1 run``, ``2,000 runs``."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def slug(*names: str) -> str:
    """A file name and anchor for any words, unique and short also for strange ones."""
    words = "-".join(names)
    plain = re.sub(r"[^A-Za-z0-9_]+", "-", words).strip("-").lower()
    if plain == words.lower() and len(plain) <= 100:
        return plain
    return f"{plain[:90]}-{zlib.crc32(words.encode()):08x}"


def tails(paths: Iterable[str]) -> dict[str, str]:
    """Each path's file name, with as many folders before it as tell them all apart."""
    parts = {path: Path(path).parts for path in paths}
    for count in range(1, max(map(len, parts.values()), default=0) + 1):
        found = {path: "/".join(each[-count:]) for path, each in parts.items()}
        if len(set(found.values())) == len(found):
            return found
    return {path: path for path in parts}


def order_key(label: str) -> tuple[int, str]:
    """Sorts labels in the papers' order, variants after their algorithm."""
    base = base_name(label)
    rank = PAPER_ORDER.index(base) if base in PAPER_ORDER else len(PAPER_ORDER)
    return rank, label


def base_name(label: str) -> str:
    """``mega`` of ``mega@softmax [tau=0.01]``."""
    return label.split("[")[0].split("@")[0].strip()


def _shortened(algorithms: list[str]) -> dict[str, str]:
    """``mega[a=1,b=2,c=3]`` by as few of its settings as tell it apart: ``mega[b=2,…]``."""
    out = {name: name for name in algorithms}
    families: dict[str, dict[str, dict[str, str]]] = {}
    for name in out:
        stem, bracket, settings = name.removesuffix("]").partition("[")
        if bracket and all("=" in pair for pair in settings.split(",")):
            pairs = dict(pair.split("=", 1) for pair in settings.split(","))
            families.setdefault(stem, {})[name] = pairs
    for stem, family in families.items():
        keys = list(dict.fromkeys(key for pairs in family.values() for key in pairs))
        chosen: list[str] = []

        def told_apart(by: list[str], family: dict[str, dict[str, str]] = family) -> int:
            return len({tuple(pairs.get(key) for key in by) for pairs in family.values()})

        while told_apart(chosen) < len(family) and set(keys) - set(chosen):
            best = max(keys, key=lambda key: told_apart([*chosen, key]))
            if told_apart([*chosen, best]) == told_apart(chosen):
                break
            chosen.append(best)
        if told_apart(chosen) < len(family) or len(family) == 1:
            continue
        for name, pairs in family.items():
            shown = [f"{key}={pairs[key]}" for key in keys if key in chosen and key in pairs]
            more = ["…"] if len(shown) < len(pairs) else []
            out[name] = f"{stem}[{','.join([*shown, *more])}]"
    return out


def _labels(runs: pd.DataFrame) -> list[str]:
    """Algorithm labels; runs of one algorithm whose settings differ say in which value."""
    shortened = _shortened(list(runs["algorithm"].unique()))
    settings = [
        str(name)
        for name in runs.columns
        if str(name).startswith(("protocol.", "config."))
        and str(name).split(".", 1)[1] not in ("seed", "steps_per_task")
    ]
    settings += ["sweep", "origin"]
    marks = pd.Series("", index=runs.index)
    for _, group in runs.groupby("algorithm"):
        for name in settings:
            values = group[name].map(text)
            if name == "origin":
                values = values.map(tails(values))
            if len(set(values) - {""}) > 1:
                short = name.split(".", 1)[-1]
                marks.loc[group.index] += [f", {short}={value or '?'}" for value in values]
    return [
        f"{shortened[algorithm]} [{mark[2:]}]" if mark else shortened[algorithm]
        for algorithm, mark in zip(runs["algorithm"], marks, strict=True)
    ]


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbedRun:
    """One run with what its agent recorded."""

    label: str
    run: str
    seed: int
    finished: bool
    snapshots: list[Snapshot]

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps ``(S,)`` and values ``(S, ...)`` of one array over training."""
        kept = [(step, arrays[key]) for step, arrays in self.snapshots if key in arrays]
        return np.array([s for s, _ in kept]), np.stack([v for _, v in kept])


def labels_of(runs: Iterable[ProbedRun]) -> list[str]:
    """Their labels in display order."""
    return sorted({run.label for run in runs}, key=order_key)


@dataclass(frozen=True, kw_only=True, eq=False)
class Section:
    """The runs of one suite at one scale, with what was measured on them."""

    suite: str
    preset: str
    steps_per_task: int
    runs: pd.DataFrame
    """Rows of ``Results.runs`` with ``label``, ``finished`` (done, with a final success rate on
    every task) and ``taskless`` (measured as a mean over the tasks only)."""
    metrics: pd.DataFrame
    """Evaluation rows of these runs, with ``label`` and ``finished``."""
    references: pd.DataFrame
    """(policies x tasks) success rate, empty where none was recorded."""
    timing: pd.DataFrame
    tasks: tuple[str, ...]
    copies: tuple[str, ...]
    """Runs that are copies of others, which do not count again."""
    everywhere: frozenset[str] = frozenset()
    """The labels of all sections of the report, which share their colours."""
    results: Results

    @property
    def title(self) -> str:
        """Suite and scale, as the heading has it."""
        return f"{self.suite} · {self.preset} · {self.steps_per_task:,} steps per task"

    @property
    def place(self) -> str:
        """The suite, in the words that a figure's title or a sentence has room for."""
        kind, _, listed = self.suite.partition(":")
        if not listed:
            return kind
        names = [name.removesuffix("-v3") for name in listed.split("+")]
        shown = names if len(", ".join(names)) <= 40 else names[:2]
        more = f" and {len(names) - len(shown)} more" if len(shown) < len(names) else ""
        return f"{kind}: {', '.join(shown)}{more}"

    @property
    def anchor(self) -> str:
        """Where a page has the section, and how the names of its files begin."""
        return slug(self.suite, self.preset, str(self.steps_per_task))

    @cached_property
    def labels(self) -> list[str]:
        """Every label of the section in display order, also of runs without results."""
        return sorted(set(self.runs["label"]), key=order_key)

    def labels_in(self, rows: pd.DataFrame) -> list[str]:
        """The labels that have rows, in display order."""
        present = set(rows["label"])
        return [label for label in self.labels if label in present]

    @cached_property
    def ablations(self) -> list[Ablation]:
        """Ablations of which at least two variants have runs here, none within another."""
        here = set(self.runs["algorithm"])
        changed: dict[str, list[str]] = {}  # variants that were run with values of the user's
        for algo in sorted(here):
            changed.setdefault(algo.partition("[")[0], []).append(algo)

        def foreign(name: str) -> bool:
            return str(self.results.ablations[name].get("suite", self.suite)) != self.suite

        found: dict[frozenset[str], Ablation] = {}
        for name in sorted(self.results.ablations, key=foreign):
            entry = self.results.ablations[name]
            present = [
                run_as
                for algo in entry["algos"]
                for run_as in ([algo] if algo in here else changed.get(algo, []))
            ]
            if len(present) < 2 or not any("@" in algo for algo in present):
                continue
            key = frozenset(present)
            # What is asked of another suite describes these runs only where nothing else does.
            if foreign(name) and any(other <= key for other in found):
                continue
            part = self.only(present)
            rank = part.runs["algorithm"].map(present.index)
            labels = part.runs["label"].loc[rank.sort_values(kind="stable").index]
            ablation = Ablation(
                name=name,
                description=str(entry.get("description", name)),
                paper=str(entry.get("paper", "")),
                labels=tuple(dict.fromkeys(labels)),
                section=part,
            )
            found.setdefault(key, ablation)
        return [a for key, a in found.items() if not any(key < other for other in found)]

    def only(self, algorithms: Iterable[str]) -> Section:
        """The part of the section with runs of these algorithms."""
        chosen = set(algorithms)
        return replace(
            self,
            runs=self.runs[self.runs["algorithm"].isin(chosen)],
            metrics=self.metrics[self.metrics["algorithm"].isin(chosen)],
            timing=self.timing[self.timing["algorithm"].isin(chosen)],
        )

    @cached_property
    def paper_steps(self) -> int | None:
        """Steps per task in the papers' experiments on this suite."""
        rows = published("success_rates").query("suite == @self.suite").dropna()
        return int(rows["steps_per_task"].iloc[0]) if len(rows) else None

    @property
    def full_scale(self) -> bool:
        """Whether every run of ours was trained and evaluated as a paper does."""
        ours = self.runs[self.runs["origin"] == ""]
        return len(ours) > 0 and bool(ours["full_scale"].all())

    @property
    def imported(self) -> bool:
        """Whether all runs are somebody else's."""
        return bool((self.runs["origin"] != "").all())

    @property
    def scale(self) -> str:
        """The scale in words; it stands wherever the numbers do."""
        words = f"preset {self.preset}, {self.steps_per_task:,} environment steps per task"
        if self.imported:
            return f"imported curves, {self.steps_per_task:,} environment steps per task"
        if self.full_scale:
            return words
        paper = f"; the papers train {self.paper_steps:,}" if self.paper_steps else ""
        return f"{words} (not the papers' scale{paper})"

    @cached_property
    def unfinished(self) -> pd.DataFrame:
        """The runs without a result, their state in words."""
        out = self.runs[~self.runs["finished"]]
        partly = "done without a whole final evaluation"
        return out.assign(state=out["state"].where(out["state"] != "done", partly))

    @cached_property
    def missing(self) -> str:
        """How many of the section's runs have no result, by state."""
        out = self.unfinished
        counts = ", ".join(f"{n} {s}" for s, n in sorted(out["state"].value_counts().items()))
        if len(out):
            words = f"{len(out)} of {counted(len(self.runs), 'run')} missing ({counts})"
        elif len(self.runs) > 1:
            words = f"all {len(self.runs)} runs finished"
        else:
            words = "the run finished"
        lost = counted(len(self.unreadable), "run")
        return f"{words}; {lost} beside them cannot be read" if self.unreadable else words

    @cached_property
    def unreadable(self) -> list[str]:
        """Runs of the section's suite that cannot be read: of which scale, nobody knows."""
        places = {Path(run).parent.parent for run in self.runs["run"] if run.count("/") > 1}
        return [run for run in self.results.unreadable if Path(run).parent.parent in places]

    def seeds(self, label: str, runs: Iterable[str] | None = None) -> int:
        """How many runs of the label are finished, of all or of these."""
        of_label = self.runs[self.runs["finished"] & (self.runs["label"] == label)]
        return len(of_label) if runs is None else int(of_label["run"].isin(set(runs)).sum())

    @cached_property
    def _final(self) -> pd.DataFrame:
        rows = self.metrics
        rows = rows[(rows["kind"] == "final") & (rows["metric"] == "success") & rows["finished"]]
        return rows[rows["task"].isin(self.tasks)]

    @cached_property
    def episodes(self) -> str:
        """Episodes per task of the final evaluation, empty where there was none or nobody says."""
        counts = self._final["count"].dropna()
        if counts.empty:
            return ""
        low, high = int(counts.min()), int(counts.max())
        return str(low) if low == high else f"{low}–{high}"

    @property
    def graded(self) -> bool:
        """Whether scores are more than zeros and ones, of which an interquartile mean tells only
        their mean."""
        return self.episodes != "1"

    @property
    def evaluated(self) -> str:
        """``episodes`` in words."""
        if not self.episodes:
            return "none yet" if self._final.empty else "of as many episodes as its source had"
        return f"{self.episodes} episode{'s' * (self.episodes != '1')} per task"

    @cached_property
    def rules(self) -> str:
        """The world of the runs in words: horizon, goals and reward, where all agree."""
        known = {
            name: set(self.runs[f"protocol.{name}"].map(text)) - {""}
            for name in ("horizon", "goals", "reward_version")
            if f"protocol.{name}" in self.runs
        }
        words = {"horizon": "horizon {}", "goals": "goals {}", "reward_version": "reward {}"}
        shown = [words[name].format(*found) for name, found in known.items() if len(found) == 1]
        return ", ".join([*shown, "success at any step"] if shown else [])

    def scores(self, label: str) -> pd.DataFrame:
        """Final success rates of the finished runs, seeds x tasks.

        Index: seed, ascending. The rate is successes over episodes of the last policy. Runs that
        were measured without tasks have none.
        """
        of_label = self._scores.get(label)
        return pd.DataFrame(columns=list(self.tasks), dtype=float) if of_label is None else of_label

    @cached_property
    def _scores(self) -> dict[str, pd.DataFrame]:
        rows = self._final
        frame = rows[["label", "run", "seed", "task"]].assign(rate=rates(rows))
        wide = frame.pivot_table(index=["label", "seed", "run"], columns="task", values="rate")
        whole = wide.reindex(columns=list(self.tasks)).dropna()
        return {
            str(label): of_label.droplevel(["label", "run"])
            for label, of_label in whole.groupby(level="label")
        }

    @cached_property
    def scored(self) -> list[str]:
        """Labels with at least one finished run, in display order."""
        return [label for label in self.labels if len(self.scores(label))]

    @cached_property
    def hardware(self) -> list[str]:
        """The machines of the runs, in words."""
        columns = [c for c in self.runs.columns if str(c).startswith("hardware.")]
        names = [str(c).removeprefix("hardware.").replace("_", " ") for c in columns]
        described = {
            ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True) if value)
            for values in zip(*(self.runs[c].map(text) for c in columns), strict=True)
        }
        return sorted(described - {""})

    @cached_property
    def parameters(self) -> dict[str, float]:
        """Parameters of actor and one critic per label, where recorded."""
        both = self.runs["parameters_actor"] + self.runs["parameters_critic"]
        return dict(both.groupby(self.runs["label"]).mean().dropna())

    def curves(self, metric: str) -> pd.DataFrame:
        """Evaluations during training and the final one: label, run, finished, step, task, value.

        Their mean over tasks is the run's curve, also where nothing but a mean was recorded: of
        each run the steps at which all of its tasks were evaluated. ``success`` comes as a rate;
        ``return`` as the mean over the evaluation's episodes.
        """
        return self._evaluations(metric)[0]

    def task_curves(self, metric: str) -> pd.DataFrame:
        """The same of each task by itself, at whatever steps it was evaluated."""
        rows = self._evaluations(metric)[1]
        return rows[rows["task"].isin(self.tasks)]

    @cached_property
    def _known(self) -> dict[str, tuple[pd.DataFrame, pd.DataFrame]]:
        return {}

    def _evaluations(self, metric: str) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The rows at steps where a run has all of its tasks, and all rows."""
        if metric not in self._known:
            rows = self._evaluation_rows(metric)
            here = rows.groupby(["run", "step"])["task"].transform("nunique")
            whole = rows[here == rows.groupby("run")["task"].transform("nunique")]
            self._known[metric] = whole, rows
        return self._known[metric]

    def _evaluation_rows(self, metric: str) -> pd.DataFrame:
        rows = self.metrics
        rows = rows[rows["kind"].isin(["eval", "final"]) & (rows["metric"] == metric)]
        value = rates(rows) if metric == "success" else rows["value"]
        # The final evaluation, of more episodes, stands for the one during training at its step.
        rows = rows.assign(value=value).dropna(subset="value").sort_values("kind", kind="stable")
        rows = rows.drop_duplicates(["run", "step", "task"], keep="last").sort_index()
        return rows[["label", "run", "finished", "step", "task", "value"]]

    def probed(self, key: str) -> list[ProbedRun]:
        """Runs whose agent recorded ``key`` during training, in display order."""
        return [
            run
            for run in self._probed
            if run.snapshots and any(key in arrays for _, arrays in run.snapshots)
        ]

    @cached_property
    def _probed(self) -> list[ProbedRun]:
        rows = [
            ProbedRun(
                label=row["label"],
                run=row["run"],
                seed=row["seed"],
                finished=row["finished"],
                snapshots=self.results.probes.get(row["run"], []),
            )
            for row in self.runs.to_dict("records")
        ]
        return sorted(rows, key=lambda run: (order_key(run.label), run.seed, run.run))

    def traced(self, key: str) -> Iterator[tuple[ProbedRun, np.ndarray]]:
        """Finished runs whose agent traced ``key`` on the final evaluation, with the array."""
        for run in self._probed:
            arrays = self.results.traces.get(run.run, {})
            if run.finished and key in arrays:
                yield run, arrays[key]

    def caption(
        self,
        estimator: str,
        labels: list[str] | None = None,
        runs: Iterable[str] | None = None,
    ) -> str:
        """Estimator, seeds, episodes, scale and missing runs, as under every table and figure.

        ``runs`` are those shown, where that is not every one.
        """
        names = self.labels if labels is None else labels
        seeds = ", ".join(f"{name} n = {self.seeds(name, runs)}" for name in names)
        return (
            f"{estimator} Seeds: {seeds or 'none'}. Final evaluation: {self.evaluated}. "
            f"Suite {self.suite}{f' ({self.rules})' if self.rules else ''}, {self.scale}; "
            f"{self.missing}."
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Ablation:
    """The part of a section that one ablation compares."""

    name: str
    description: str
    paper: str
    labels: tuple[str, ...]
    """In the ablation's own order."""
    section: Section

    @property
    def base(self) -> str:
        """What the others are compared with: the algorithm without a variant, else the first."""
        scored = [label for label in self.labels if label in self.section.scored]
        return next((label for label in scored if "@" not in label), (*scored, *self.labels)[0])


def rates(rows: pd.DataFrame) -> pd.Series:
    """Success rates of rows of ``success``."""
    rate: pd.Series = rows["value"] / rows["count"].fillna(1)
    return rate


def _task_order(
    known: tuple[str, ...], runs: pd.DataFrame, metrics: pd.DataFrame
) -> tuple[str, ...]:
    """The suite's tasks as our own runs name them, or else as imported ones do."""
    # Rows about all tasks together carry no task name.
    named = metrics[~metrics["task"].isin(["", WITHOUT_TASKS])]
    ours = runs.loc[runs["origin"] == "", "run"]
    of_ours = named[named["run"].isin(ours)]
    told = pd.unique((of_ours if len(of_ours) else named)["task"]).tolist()
    place = {name: k for k, name in enumerate(known)}
    if len(ours):
        told = [*known, *told]
    if not told and len(metrics):
        told = [WITHOUT_TASKS]
    return tuple(dict.fromkeys(sorted(told, key=lambda name: place.get(name, len(place)))))


def _evaluated(metrics: pd.DataFrame, tasks: tuple[str, ...]) -> tuple[set[str], set[str]]:
    """Runs with a final success rate on each of ``tasks``, or on their mean where that is all the
    run was measured on; and the runs of which it is."""
    final = (metrics["kind"] == "final") & (metrics["metric"] == "success")
    measured, rated = (
        {str(run): set(seen) for run, seen in rows.groupby("run")["task"].unique().items()}
        for rows in (metrics, metrics[final & rates(metrics).notna()])
    )
    taskless = {run for run, seen in measured.items() if seen.isdisjoint(tasks)}
    whole = {run for run, seen in rated.items() if run in taskless or seen.issuperset(tasks)}
    return whole, taskless


WORLD = tuple(f"protocol.{name}" for name in ("goals", "reward_version", "horizon", "eval_seed"))
"""What makes two evaluations of a suite comparable."""


def _references(results: Results, runs: pd.DataFrame, tasks: tuple[str, ...]) -> pd.DataFrame:
    """Success rates (policy, task) of the reference policies in the worlds of ``runs``."""
    known = [column for column in WORLD if column in runs and runs[column].notna().any()]
    wanted = runs[["suite", *known]].drop_duplicates()
    of_policies = results.runs[results.runs["algorithm"].isin(REFERENCES)]
    mine = of_policies.merge(wanted, on=["suite", *known])["run"]
    metrics = results.metrics
    rows = metrics[(metrics["kind"] == "reference") & metrics["run"].isin(mine)]
    rows = rows[rows["metric"] == "success"]
    sums = rows.groupby(["algorithm", "task"])[["value", "count"]].sum()
    rate = (sums["value"] / sums["count"]).unstack()
    present = [name for name in REFERENCES if name in rate.index]
    return rate.reindex(index=present, columns=list(tasks))


def _without_copies(runs: pd.DataFrame) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """The runs, of copies of one the furthest; and the copies' names."""
    whose = ["sweep", "algorithm", "seed", "id"]
    furthest = runs.assign(done=runs["state"] == "done").sort_values(
        ["done", "step"], ascending=False, kind="stable"
    )
    again = furthest.index[furthest.duplicated(whose) & (furthest["id"] != "")]
    return runs.drop(index=again), tuple(runs.loc[again, "run"])


def sections(results: Results) -> list[Section]:
    """The report's sections: one per suite and scale, ordered by suite, largest scale first."""
    runs = results.runs[~results.runs["algorithm"].isin(REFERENCES)]
    measured = results.metrics[results.metrics["kind"].isin(["eval", "final"])]
    out = []
    for key, group in runs.groupby(["suite", "preset", "steps_per_task"]):
        suite, preset, steps = cast(tuple[str, str, int], key)
        group, copies = _without_copies(group)
        metrics = measured[measured["run"].isin(group["run"])]
        tasks = _task_order(results.tasks.get(suite, ()), group, metrics)
        evaluated, taskless = _evaluated(metrics, tasks)
        group = group.assign(
            label=_labels(group),
            finished=(group["state"] == "done") & group["run"].isin(evaluated),
            taskless=group["run"].isin(taskless),
        )
        facts = group.set_index("run")[["label", "finished"]]
        out.append(
            Section(
                suite=suite,
                preset=preset,
                steps_per_task=steps,
                runs=group.sort_values(["algorithm", "seed", "run"]),
                metrics=metrics.join(facts, on="run"),
                references=_references(results, group, tasks),
                timing=results.timing[results.timing["run"].isin(group["run"])].join(
                    facts, on="run"
                ),
                tasks=tasks,
                copies=copies,
                results=results,
            )
        )
    everywhere = frozenset(label for section in out for label in section.labels)
    out = [replace(section, everywhere=everywhere) for section in out]
    return sorted(out, key=lambda s: (s.suite, -s.steps_per_task, s.preset))
