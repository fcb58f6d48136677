"""Metrics to other programs: TensorBoard event files, Weights & Biases, MLflow.

The sweep follows the runs' metrics.csv and passes on what is new; training knows nothing of it, so
that neither numbers nor faults depend on a tracker. How far each file was passed on is kept beside
it. A resumed run writes the same bytes again that were cut off, so a place in the file stays right.
"""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from bench.launch import import_extra
from bench.spec import SpecError
from bench.store import RunStore, write_atomically
from suites.base import unknown

Scalars = dict[str, float]
"""``kind/metric/task``, and ``kind/metric`` for the mean over tasks, to value."""


class Sink(Protocol):
    """Where one run's scalars go."""

    def write(self, step: int, scalars: Scalars) -> None:
        """Pass on what was measured at a step."""

    def close(self) -> None:
        """Pass on what is buffered."""


class TensorBoard:
    """An event file per session, below ``OUT/tensorboard``."""

    def __init__(self, store: RunStore, out: Path) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        folder = out / "tensorboard" / store.path.relative_to(out)
        self._writer: Any = SummaryWriter(str(folder))

    def write(self, step: int, scalars: Scalars) -> None:
        """See `Sink.write`."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """See `Sink.close`."""
        self._writer.close()


class WeightsAndBiases:
    """A run of the project "mega-bench"; WANDB_MODE and the like are wandb's own."""

    def __init__(self, store: RunStore, out: Path) -> None:
        spec = store.spec()
        self._run = import_extra("wandb", "wandb").init(
            project="mega-bench", id=spec.id, name=spec.directory,
            group=f"{spec.suite} {spec.title}", config=spec.model_dump(mode="json"),
            dir=str(out), resume="allow", reinit="create_new",
        )  # fmt: skip

    def write(self, step: int, scalars: Scalars) -> None:
        """See `Sink.write`."""
        self._run.log(scalars, step=step)

    def close(self) -> None:
        """See `Sink.close`."""
        self._run.finish()


class MLflow:
    """A run of the experiment "mega-bench", where MLFLOW_TRACKING_URI says."""

    def __init__(self, store: RunStore, out: Path) -> None:
        mlflow = import_extra("mlflow", "mlflow")
        spec = store.spec()
        self._client = mlflow.MlflowClient()
        found = self._client.get_experiment_by_name("mega-bench")
        experiment = found.experiment_id if found else self._client.create_experiment("mega-bench")
        ours = self._client.search_runs([experiment], f"tags.bench_id = '{spec.id}'")
        if ours:
            self._id = ours[0].info.run_id
        else:
            made = self._client.create_run(
                experiment, run_name=spec.directory, tags={"bench_id": spec.id}
            )
            self._id = made.info.run_id
            for name, value in {"suite": spec.suite, "algorithm": spec.title,
                                "seed": spec.seed, "preset": spec.preset}.items():  # fmt: skip
                self._client.log_param(self._id, name, value)

    def write(self, step: int, scalars: Scalars) -> None:
        """See `Sink.write`."""
        for name, value in scalars.items():
            self._client.log_metric(self._id, name, value, step=step)

    def close(self) -> None:
        """See `Sink.close`."""
        self._client.set_terminated(self._id)


SINKS: dict[str, type[TensorBoard] | type[WeightsAndBiases] | type[MLflow]] = {
    "tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": MLflow,
}  # fmt: skip


def sinks(names: str) -> list[str]:
    """The sinks that ``names`` asks for: ``auto`` is TensorBoard if it is installed, ``none`` none.

    Raises SpecError for an unknown name, RuntimeError for one whose package is not installed.
    """
    if names == "none":
        return []
    if names == "auto":
        return ["tensorboard"] if find_spec("tensorboard") else []
    chosen = [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in SINKS:
            raise SpecError("--track: " + unknown("sink", name, ["auto", "none", *SINKS]))
        import_extra(name, name)
    return list(dict.fromkeys(chosen))


class Follower:
    """Passes what some runs measure on to the sinks."""

    def __init__(self, stores: Sequence[RunStore], out: Path, names: Sequence[str]) -> None:
        self._stores, self._out, self._names = stores, out, names
        self._open: dict[tuple[Path, str], Sink] = {}

    def pass_on(self) -> None:
        """Everything that is new. Whatever a tracker raises is raised."""
        for store in self._stores:
            for name in self._names:
                self._pass_on(store, name)

    def close(self) -> None:
        """Pass on the last, and close the sinks."""
        self.pass_on()
        for sink in self._open.values():
            sink.close()
        self._open.clear()

    def _pass_on(self, store: RunStore, name: str) -> None:
        place, ended, done = store.state_path / f"tracked-{name}.json", store.done, 0
        with suppress(OSError, ValueError):  # none yet, or one that a crash has emptied: all anew
            done = int(place.read_text("utf-8"))
        text, end = new_lines(store.path / "metrics.csv", done, ended=ended)
        key = (store.path, name)
        if text:
            if key not in self._open:
                self._open[key] = SINKS[name](store, self._out)
            for step, scalars in by_step(text):
                self._open[key].write(step, scalars)
            write_atomically(place, str(end).encode(), sync=False)
        if ended and key in self._open:  # hundreds of open files would be too many
            self._open.pop(key).close()


def new_lines(path: Path, start: int, *, ended: bool) -> tuple[str, int]:
    """The lines of metrics.csv after byte ``start``, and where they end. Until the run has ended,
    the last step is kept back: more of it may follow."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            data = file.read()
    except OSError:
        return "", start
    lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
    if lines and not ended:
        last = lines[-1].partition(b",")[0]
        while lines and lines[-1].partition(b",")[0] == last:
            lines.pop()
    text = b"".join(lines)
    return text.decode(), start + len(text)


def by_step(text: str) -> Iterator[tuple[int, Scalars]]:
    """Lines of metrics.csv as scalars, step by step."""
    values: dict[int, dict[str, float]] = defaultdict(dict)
    means: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for at, kind, task, metric, value, count in csv.reader(io.StringIO(text)):
        if not at.isdigit():  # the header
            continue
        shown = float(value) / float(count) if metric == "success" else float(value)
        values[int(at)][f"{kind}/{metric}/{task}"] = shown
        means[int(at)][f"{kind}/{metric}"].append(shown)
    for step, scalars in values.items():
        yield step, scalars | {name: sum(v) / len(v) for name, v in means[step].items()}
