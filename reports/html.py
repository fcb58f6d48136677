"""One self-contained page from everything the registry holds, and the files beside it.

Nothing here computes or draws. A table or figure that cannot be had is listed with its reason; the
page is always written.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from reports.figures import FIGURES, Drawing
from reports.frames import MissingError, Results, Section, published, sections, text
from reports.tables import (
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

Thing = TypeVar("Thing", Table, Drawing)


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A table or an embedded image as the template wants it."""

    anchor: str
    table: Table | None = None
    drawing: Drawing | None = None
    image: str = ""
    csv: str = ""


@dataclass(frozen=True, kw_only=True)
class Chapter:
    """A section of the page."""

    anchor: str
    section: Section
    warnings: tuple[str, ...]
    verdicts: list[str]
    tables: list[Shown] = field(default_factory=list)
    figures: list[Shown] = field(default_factory=list)


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


def _show_table(source: Table, name: str, formats: Collection[str], out: _Writer) -> Shown:
    for kind in formats:
        if kind in TABLE_WRITERS:
            out.write(f"tables/{name}.{kind}", TABLE_WRITERS[kind](source))
    return Shown(anchor=name, table=source, csv=_data_uri("text/csv", to_csv(source).encode()))


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
    return Shown(anchor=name, drawing=drawing, image=image)


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


def _chapter(
    section: Section, formats: Collection[str], out: _Writer, gaps: list[Gap], failures: list[Gap]
) -> Chapter:
    anchor = slug(section.suite, section.preset, str(section.steps_per_task))
    chapter = Chapter(
        anchor=anchor,
        section=section,
        warnings=(*setting_warnings(section), *_mixed(section)),
        verdicts=[comparison.sentence for comparison in comparisons(section)],
    )
    for name, make in TABLES.items():
        what = f"{section.title}: table {name}"
        made = _attempt(what, partial(make, section), gaps, failures)
        if made is not None:
            chapter.tables.append(_show_table(made, f"{anchor}-{name}", formats, out))
    for name, draw in FIGURES.items():
        what = f"{section.title}: figure {name}"
        drawn = _attempt(what, partial(draw, section), gaps, failures)
        if drawn is not None:
            chapter.figures.append(_show_drawing(drawn, f"{anchor}-{name}", formats, out))
    return chapter


def build(results: Results, to: Path, formats: Collection[str] = FORMATS) -> Path:
    """Writes the report and returns the path of its ``index.html``.

    ``to/tables`` and ``to/figures`` take the chosen formats; the page embeds all it shows. Files
    of an earlier report in ``to`` that this one does not renew are removed.

    Raises:
        ValueError: an unknown format.
        OSError: ``to`` cannot be written.
    """
    unknown = sorted(set(formats) - set(FORMATS))
    if unknown:
        raise ValueError(f"unknown format {unknown[0]!r}; there are {', '.join(FORMATS)}")
    out = _Writer(Path(to))
    gaps: list[Gap] = []
    failures: list[Gap] = []
    found = sections(results)
    chapters = [_chapter(section, formats, out, gaps, failures) for section in found]
    runs = _attempt("table of runs", partial(run_table, results), gaps, failures)
    sources = published("sources").itertuples(index=False)
    page = _template().render(
        chapters=chapters,
        banners=_banners(found),
        runs=_show_table(runs, "runs", formats, out) if runs is not None else None,
        unfinished=_unfinished(found),
        gaps=gaps,
        failures=failures,
        citations=[str(row.citation) for row in sources],
    )
    out.write("index.html", page)
    out.finish()
    return out.to / "index.html"


def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html")
