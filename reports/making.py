"""Makes tables and figures into what a page embeds and the files beside it, one by one or at once.

What cannot be had is a line saying why; it never takes the rest along.
"""

from __future__ import annotations

import base64
import gc
import gzip
import multiprocessing
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from reports.drawing import Drawing
from reports.frames import MissingError
from reports.tables import Table
from reports.writers import to_csv, to_latex, to_markdown

TABLE_WRITERS: dict[str, Callable[[Table], str]] = {
    "csv": to_csv,
    "md": to_markdown,
    "tex": to_latex,
}
FIGURE_FORMATS = ("png", "svg")
FORMATS = (*TABLE_WRITERS, *FIGURE_FORMATS)
MAX_INLINE_SVG = 350_000
"""Bytes; a larger drawing is embedded as PNG so that the page stays quick to load."""

MAX_INLINE_CSV = 200_000
"""Bytes; more numbers are embedded compressed."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A table or an embedded image as the template wants it."""

    anchor: str
    title: str
    caption: str
    csv: str
    suffix: str
    table: Table | None = None
    image: str = ""

    @property
    def folded(self) -> bool:
        """Whether it is shown only on demand."""
        return self.table is not None and self.table.details


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one table or figure."""

    what: str
    shown: Shown | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    """Path below the report -> content."""
    gap: str = ""
    """Why the results do not support it."""
    failure: str = ""
    """What in the data broke it."""


Job = Callable[[], Outcome]


def produce(
    what: str, anchor: str, make: Callable[[], Table | Drawing], formats: Collection[str]
) -> Outcome:
    """The outcome of ``make``, in these formats.

    Frames come from disk, also half-written and from older versions: what they break is reported
    on the page and must not take the rest of it along.
    """
    try:
        made = make()
        if isinstance(made, Table):
            return _table_outcome(what, made, anchor, formats)
        return _drawing_outcome(what, made, anchor, formats)
    except MissingError as reason:
        return Outcome(what=what, gap=str(reason))
    except Exception as error:  # noqa: BLE001  (also what a layout cannot be solved with)
        return Outcome(what=what, failure=f"{type(error).__name__}: {error}")


def _table_outcome(what: str, source: Table, name: str, formats: Collection[str]) -> Outcome:
    csv, suffix = _csv_uri(to_csv(source))
    return Outcome(
        what=what,
        shown=Shown(
            anchor=name, title=source.title, caption=source.caption, table=source,
            csv=csv, suffix=suffix,
        ),
        files={
            f"tables/{name}.{kind}": write(source).encode()
            for kind, write in TABLE_WRITERS.items()
            if kind in formats
        },
    )  # fmt: skip


def _drawing_outcome(what: str, source: Drawing, name: str, formats: Collection[str]) -> Outcome:
    svg = source.svg()
    small = len(svg) <= MAX_INLINE_SVG
    png = b"" if small and "png" not in formats else source.png()
    data = source.data.to_csv(index=False, lineterminator="\n")
    csv, suffix = _csv_uri(data)
    image = data_uri("image/svg+xml", svg) if small else data_uri("image/png", png)
    every = {"svg": svg, "png": png, "csv": data.encode()}
    return Outcome(
        what=what,
        shown=Shown(
            anchor=name, title=source.title, caption=source.caption, image=image,
            csv=csv, suffix=suffix,
        ),
        files={f"figures/{name}.{kind}": every[kind] for kind in every if kind in formats},
    )  # fmt: skip


def data_uri(kind: str, content: bytes) -> str:
    """The content as an address that needs no network."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _csv_uri(content: str) -> tuple[str, str]:
    """The numbers as a download and its suffix; what is large comes compressed."""
    data = content.encode()
    if len(data) <= MAX_INLINE_CSV:
        return data_uri("text/csv", data), "csv"
    return data_uri("application/gzip", gzip.compress(data, mtime=0)), "csv.gz"


_waiting: Sequence[Job] = ()
"""What forked processes work off; they hold the frames already, and copies would not fit."""


def _do(index: int) -> Outcome:
    return _waiting[index]()


def do_all(jobs: Sequence[Job], processes: int) -> list[Outcome]:
    """Every job's outcome, in order; with several processes where the system can fork."""
    global _waiting
    if processes < 2 or "fork" not in multiprocessing.get_all_start_methods():
        return [job() for job in jobs]
    _waiting = jobs
    gc.freeze()  # no collection in the processes goes over, and so copies, all the frames
    try:
        with multiprocessing.get_context("fork").Pool(processes) as pool:
            return pool.map(_do, range(len(jobs)), chunksize=1)
    finally:
        gc.unfreeze()
        _waiting = ()


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
