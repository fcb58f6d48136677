"""One self-contained page from everything the registry holds, and the files beside it.

Nothing here computes or draws. A table or figure that cannot be had is listed with its reason; the
page is always written.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from reports.figures import ABLATION_FIGURES, FIGURES, Drawing
from reports.frames import MissingError, Results, Section, published, sections, text
from reports.registry import Source
from reports.tables import (
    ABLATION_TABLES,
    OVERVIEWS,
    TABLES,
    Table,
    comparisons,
    last_line,
    run_table,
    setting_warnings,
)
from reports.writers import to_csv, to_latex, to_markdown

TABLE_WRITERS: dict[str, Callable[[Table], str]] = {
    "csv": to_csv,
    "md": to_markdown,
    "tex": to_latex,
}
FIGURE_FORMATS = ("png", "svg")
FORMATS = (*TABLE_WRITERS, *FIGURE_FORMATS)
MANIFEST = "report.json"
MAX_INLINE_SVG = 350_000
"""Bytes; a larger drawing is embedded as PNG so that the page stays quick to load."""

MAX_INLINE_CSV = 200_000
"""Bytes; more numbers are embedded compressed."""

Thing = TypeVar("Thing", Table, Drawing)


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A table or an embedded image as the template wants it."""

    anchor: str
    table: Table | None = None
    drawing: Drawing | None = None
    image: str = ""
    csv: str = ""
    suffix: str = "csv"

    @property
    def title(self) -> str:
        """What it is called."""
        made = self.table or self.drawing
        assert made is not None
        return made.title

    @property
    def folded(self) -> bool:
        """Whether it is shown only on demand."""
        return self.table is not None and self.table.details


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What trained the runs of one label."""

    label: str
    settings: str
    """Protocol and configuration, as JSON."""
    commands: tuple[tuple[str, str], ...]
    """Run and command each."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A video of a learned policy."""

    task: str
    kind: str
    """``image`` or ``video``."""
    uri: str


@dataclass(frozen=True, kw_only=True)
class Chapter:
    """A part of the page."""

    anchor: str
    title: str
    lead: str = ""
    warnings: tuple[str, ...] = ()
    verdicts: tuple[str, ...] = ()
    shown: list[Shown] = field(default_factory=list)
    recipes: tuple[Recipe, ...] = ()
    clips: tuple[tuple[str, tuple[Clip, ...]], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Something the reader might look for in vain, and why."""

    what: str
    why: str


def slug(*names: str) -> str:
    """A file name and anchor for any words, unique and short also for strange ones."""
    words = "-".join(names)
    plain = re.sub(r"[^A-Za-z0-9_]+", "-", words).strip("-").lower()
    if plain == words.lower() and len(plain) <= 100:
        return plain
    return f"{plain[:90]}-{zlib.crc32(words.encode()):08x}"


class _Writer:
    """Writes a report's files, and takes away those of the report before that are not renewed."""

    def __init__(self, to: Path) -> None:
        self.to = to
        self.written: list[str] = []

    def write(self, name: str, content: str | bytes) -> None:
        """Replaces one file whole."""
        path = self.to / name
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_name(f".{path.name}.part")
        half.write_bytes(content.encode() if isinstance(content, str) else content)
        half.replace(path)
        self.written.append(name)

    def finish(self) -> None:
        """Drops what the last report wrote and this one did not, then records what stands."""
        for name in _previous(self.to / MANIFEST):
            if name not in self.written:
                (self.to / name).unlink(missing_ok=True)
        self.write(MANIFEST, json.dumps({"schema": 1, "files": sorted(self.written)}, indent=1))


def _previous(manifest: Path) -> list[str]:
    try:
        names = json.loads(manifest.read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    kinds = "|".join(FORMATS)
    own = re.compile(rf"(tables|figures)/[A-Za-z0-9_-]+\.({kinds})")
    return [str(name) for name in names if own.fullmatch(str(name))]


def _attempt(
    what: str, make: Callable[[], Thing], gaps: list[Gap], failures: list[Gap]
) -> Thing | None:
    """The thing, or a line saying why it could not be had.

    Frames come from disk, also half-written and from older versions: what they break is reported
    on the page and must not take the rest of it along.
    """
    try:
        return make()
    except MissingError as reason:
        gaps.append(Gap(what=what, why=str(reason)))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        failures.append(Gap(what=what, why=f"{type(error).__name__}: {error}"))
    return None


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _csv_uri(content: str) -> tuple[str, str]:
    """The numbers as a download and its suffix; what is large comes compressed."""
    data = content.encode()
    if len(data) <= MAX_INLINE_CSV:
        return _data_uri("text/csv", data), "csv"
    return _data_uri("application/gzip", gzip.compress(data, mtime=0)), "csv.gz"


def _show_table(source: Table, name: str, formats: Collection[str], out: _Writer) -> Shown:
    for kind in formats:
        if kind in TABLE_WRITERS:
            out.write(f"tables/{name}.{kind}", TABLE_WRITERS[kind](source))
    csv, suffix = _csv_uri(to_csv(source))
    return Shown(anchor=name, table=source, csv=csv, suffix=suffix)


def _show_drawing(drawing: Drawing, name: str, formats: Collection[str], out: _Writer) -> Shown:
    svg = drawing.svg()
    small = len(svg) <= MAX_INLINE_SVG
    png = b"" if small and "png" not in formats else drawing.png()
    data = drawing.data.to_csv(index=False, lineterminator="\n")
    for kind, content in (("svg", svg), ("png", png), ("csv", data)):
        if kind in formats:
            out.write(f"figures/{name}.{kind}", content)
    image = _data_uri("image/svg+xml", svg) if small else _data_uri("image/png", png)
    drawing.figure.clear()
    csv, suffix = _csv_uri(data)
    return Shown(anchor=name, drawing=drawing, image=image, csv=csv, suffix=suffix)


def _mixed(section: Section) -> list[str]:
    """Versions and hardware that differ between runs of a section, and seeds that do."""
    out = []
    for column in section.runs.columns:
        if str(column).startswith(("versions.", "hardware.")):
            values = sorted(set(section.runs[column].map(text)) - {""})
            if len(values) > 1:
                out.append(f"Runs differ in {column}: {', '.join(values)}.")
    seeds = {label: tuple(section.scores(label).index) for label in section.scored}
    if len(set(seeds.values())) > 1:
        out.append(
            "Algorithms were finished on different seeds: "
            + "; ".join(f"{k}: {', '.join(map(str, v))}" for k, v in seeds.items())
            + "."
        )
    out += [
        f"{label} has more than one run of the same seed."
        for label, s in seeds.items()
        if len(set(s)) < len(s)
    ]
    imported = section.runs[section.runs["origin"] != ""]
    out += [
        f"{label} was imported from {file}: its protocol is not known."
        for label, file in imported.groupby("label")["origin"].first().items()
    ]
    return out


def _banners(found: list[Section]) -> list[tuple[str, str]]:
    out = []
    if any(section.preset == "smoke" for section in found):
        out.append(("smoke", "SMOKE — shows that things work, not results."))
    reduced = [s for s in found if not s.full_scale and s.preset != "smoke"]
    if reduced:
        scales = "; ".join(dict.fromkeys(f"{s.suite}: {s.scale}" for s in reduced))
        out.append(
            ("scale", f"Reduced scale — do not set these beside the published numbers. {scales}.")
        )
    if len({(section.preset, section.steps_per_task) for section in found}) > 1:
        out.append(
            (
                "warn",
                "Several scales: each has a chapter of its own; their numbers do not mix.",
            )
        )
    return out


def _unfinished(found: list[Section]) -> list[Gap]:
    return [
        Gap(
            what=f"{row['suite']} / {row['label']} / seed {row['seed']}",
            why=f"{row['state']} at step {row['step']:,} of {row['steps_per_task']:,}"
            + (f": {last_line(row['error'])}" if row["error"] else ""),
        )
        for section in found
        for row in section.runs[~section.runs["finished"]].to_dict("records")
    ]


def _recipes(section: Section) -> tuple[Recipe, ...]:
    """Command and settings of every run; runs of one label share their settings."""
    out = []
    for label in section.labels:
        runs = section.runs[section.runs["label"] == label]
        settings: dict[str, dict[str, object]] = {"protocol": {}, "config": {}}
        for column, value in runs.iloc[0].items():
            group, _, name = str(column).partition(".")
            if group in settings and (plain := text(value)):
                settings[group][name] = plain
        commands = zip(runs["run"], runs["command"], strict=True)
        out.append(
            Recipe(
                label=label,
                settings=json.dumps(settings, indent=1),
                commands=tuple((run, command) for run, command in commands if command),
            )
        )
    return tuple(out)


def _clips(section: Section) -> tuple[tuple[str, tuple[Clip, ...]], ...]:
    kinds = {".gif": "image/gif", ".webp": "image/webp", ".mp4": "video/mp4"}
    out = []
    for row in section.runs.to_dict("records"):
        of_run = tuple(
            Clip(
                task=task,
                kind=kinds[path.suffix].partition("/")[0],
                uri=_data_uri(kinds[path.suffix], path.read_bytes()),
            )
            for task, path in section.results.clips.get(row["run"], {}).items()
            if path.suffix in kinds
        )
        if of_run:
            out.append((f"{row['label']}, seed {row['seed']}", of_run))
    return tuple(out)


@dataclass(kw_only=True)
class _Maker:
    """Makes what the registries hold, file by file, and remembers what could not be made."""

    formats: Collection[str]
    out: _Writer
    gaps: list[Gap] = field(default_factory=list)
    failures: list[Gap] = field(default_factory=list)

    def make(
        self,
        makers: Mapping[str, Callable[[Source], Thing]],
        source: Source,
        anchor: str,
        where: str,
    ) -> Iterator[Shown]:
        """Each of ``makers`` applied to ``source``, where it supports it."""
        for name, maker in makers.items():
            made = _attempt(f"{where}: {name}", partial(maker, source), self.gaps, self.failures)
            if isinstance(made, Table):
                yield _show_table(made, f"{anchor}-{name}", self.formats, self.out)
            elif made is not None:
                yield _show_drawing(made, f"{anchor}-{name}", self.formats, self.out)

    def chapter(self, section: Section) -> Chapter:
        """All about one suite at one scale."""
        anchor = slug(section.suite, section.preset, str(section.steps_per_task))
        shown = [
            *self.make(TABLES, section, anchor, f"{section.title}: table"),
            *self.make(FIGURES, section, anchor, f"{section.title}: figure"),
        ]
        for ablation in section.ablations:
            place = slug(anchor, ablation.name)
            where = f"{section.title}: ablation {ablation.name}"
            shown += self.make(ABLATION_TABLES, ablation, place, f"{where}, table")
            shown += self.make(ABLATION_FIGURES, ablation, f"{place}-curves", f"{where}, figure")
        return Chapter(
            anchor=anchor,
            title=section.title,
            lead=f"{section.missing[0].upper()}{section.missing[1:]}.",
            warnings=(*setting_warnings(section), *_mixed(section)),
            verdicts=tuple(comparison.sentence for comparison in comparisons(section)),
            shown=sorted(shown, key=lambda s: s.folded),
            recipes=_recipes(section),
            clips=_clips(section),
        )

    def overview(self, preset: str, found: list[Section]) -> Chapter:
        """The papers' own tables, over all suites at one preset."""
        made = self.make(OVERVIEWS, found, slug("papers", preset), f"The papers' tables, {preset}")
        return Chapter(
            anchor=slug("papers", preset),
            title=f"The papers' tables · {preset}",
            lead="Algorithms × suites, ours beside what the papers print.",
            shown=list(made),
        )


def build(
    results: Results,
    to: Path,
    formats: Collection[str] = FORMATS,
    refresh: int | None = None,
) -> Path:
    """Writes the report and returns the path of its ``index.html``.

    ``to/tables`` and ``to/figures`` take the chosen formats; the page embeds all it shows. Files
    of an earlier report in ``to`` that this one does not renew are removed. With ``refresh`` an
    open page loads itself anew every so many seconds.

    Raises:
        ValueError: an unknown format.
        OSError: ``to`` cannot be written.
    """
    unknown = sorted(set(formats) - set(FORMATS))
    if unknown:
        raise ValueError(f"unknown format {unknown[0]!r}; there are {', '.join(FORMATS)}")
    maker = _Maker(formats=formats, out=_Writer(Path(to)))
    found = sections(results)
    chapters = [maker.chapter(section) for section in found]
    for preset in dict.fromkeys(section.preset for section in found):
        of_preset = [section for section in found if section.preset == preset]
        overview = maker.overview(preset, of_preset)
        chapters += [overview] if overview.shown else []
    runs = _attempt("table of runs", partial(run_table, results), maker.gaps, maker.failures)
    page = _template().render(
        chapters=chapters,
        banners=_banners(found),
        runs=_show_table(runs, "runs", formats, maker.out) if runs is not None else None,
        unfinished=_unfinished(found),
        unreadable=[Gap(what=run, why=why) for run, why in results.unreadable.items()],
        gaps=maker.gaps,
        failures=maker.failures,
        citations=[str(row.citation) for row in published("sources").itertuples(index=False)],
        refresh=refresh,
    )
    maker.out.write("index.html", page)
    maker.out.finish()
    return maker.out.to / "index.html"


def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html")
