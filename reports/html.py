"""One self-contained page from everything the registry holds, and the files beside it.

Nothing here computes or draws. A table or figure that cannot be had is listed with its reason; the
page is always written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from reports.comparing import comparisons
from reports.figures import ABLATION_FIGURES, FIGURES, Drawing
from reports.frames import Results, Section, published, sections, slug, tails, text
from reports.making import FORMATS, Job, Shown, cores, data_uri, do_all, produce
from reports.registry import Source
from reports.running import last_line, run_table
from reports.tables import ABLATION_TABLES, OVERVIEWS, TABLES, Table
from reports.tabling import setting_warnings

MANIFEST = "report.json"
MANY_RUNS = 100
"""From this many runs on, several processes pay off."""


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


class _Writer:
    """Writes a report's files, and takes away those of the report before that are not renewed."""

    def __init__(self, to: Path) -> None:
        self.to = to
        self.written: list[str] = []

    def write(self, name: str, content: bytes) -> None:
        """Replaces one file whole."""
        path = self.to / name
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_name(f".{path.name}.part")
        half.write_bytes(content)
        half.replace(path)
        self.written.append(name)

    def finish(self) -> None:
        """Drops what the last report wrote and this one did not, then records what stands."""
        for name in _previous(self.to / MANIFEST):
            if name not in self.written:
                (self.to / name).unlink(missing_ok=True)
        manifest = {"schema": 1, "files": sorted(self.written)}
        self.write(MANIFEST, json.dumps(manifest, indent=1).encode())


def _previous(manifest: Path) -> list[str]:
    try:
        names = json.loads(manifest.read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    kinds = "|".join(FORMATS)
    own = re.compile(rf"(tables|figures)/[A-Za-z0-9_-]+\.({kinds})")
    return [str(name) for name in names if own.fullmatch(str(name))]


def mixed(section: Section) -> list[str]:
    """What differs between runs of a section: code, versions, hardware, and seeds."""
    out = []
    for column in section.runs.columns:
        if str(column).startswith(("versions.", "hardware.", "numerics.", "git_commit")):
            values = sorted(set(section.runs[column].map(text)) - {""})
            if column == "git_commit":
                values = [re.sub(r"\b([0-9a-f]{10})[0-9a-f]{30}\b", r"\1", v) for v in values]
            if len(values) > 1:
                out.append(f"Runs differ in {column}: {', '.join(values)}.")
    out += [
        f"{row['run']} was resumed under other numerics: {row['other_numerics']}."
        for row in section.runs[section.runs["other_numerics"] != ""].to_dict("records")
    ]
    seeds = {label: tuple(section.scores(label).index) for label in section.scored}
    if len(set(seeds.values())) > 1:
        out.append(
            "Algorithms were finished on different seeds: "
            + "; ".join(f"{k}: {', '.join(map(str, v))}" for k, v in seeds.items())
            + "."
        )
    if section.references.empty and section.scored:
        out.append("The scripted experts and a random policy have not been evaluated yet.")
    out += [
        f"{label} has more than one run of the same seed."
        for label, s in seeds.items()
        if len(set(s)) < len(s)
    ]
    imported = section.runs[section.runs["origin"] != ""]
    names = tails(imported["origin"])
    out += [
        f"{label} was imported from {names[file]}: its protocol is not known."
        for label, file in imported.groupby("label")["origin"].first().items()
    ]
    return out


def _banners(found: list[Section]) -> list[tuple[str, str]]:
    out = []
    if any(section.preset == "smoke" for section in found):
        out.append(("smoke", "SMOKE — shows that things work, not results."))
    reduced = [s for s in found if not (s.full_scale or s.imported or s.preset == "smoke")]
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
        for row in section.unfinished.to_dict("records")
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
                uri=data_uri(kinds[path.suffix], path.read_bytes()),
            )
            for task, path in section.results.clips.get(row["run"], {}).items()
            if path.suffix in kinds
        )
        if of_run:
            out.append((f"{row['label']}, seed {row['seed']}", of_run))
    return tuple(out)


@dataclass(kw_only=True)
class _Plan:
    """All that the registries can make of the results, chapter by chapter."""

    formats: Collection[str]
    jobs: list[Job] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    """The chapter of each job."""

    def add(
        self,
        chapter: str,
        makers: Mapping[str, Callable[[Source], Table | Drawing]],
        source: Source,
        anchor: str,
        where: str,
    ) -> None:
        """Each of ``makers`` on ``source``."""
        for name, maker in makers.items():
            made = partial(maker, source)
            self.jobs.append(
                partial(produce, f"{where} {name}", f"{anchor}-{name}", made, self.formats)
            )
            self.places.append(chapter)

    def add_section(self, section: Section) -> None:
        """All about one suite at one scale."""
        anchor = section.anchor
        self.add(anchor, TABLES, section, anchor, f"{section.title}: table")
        self.add(anchor, FIGURES, section, anchor, f"{section.title}: figure")
        for ablation in section.ablations:
            place = slug(anchor, ablation.name)
            where = f"{section.title}: {ablation.name},"
            self.add(anchor, ABLATION_TABLES, ablation, place, f"{where} table")
            self.add(anchor, ABLATION_FIGURES, ablation, f"{place}-curves", f"{where} figure")


def _chapter(section: Section, shown: list[Shown]) -> Chapter:
    return Chapter(
        anchor=section.anchor,
        title=section.title,
        lead=f"{section.missing[0].upper()}{section.missing[1:]}.",
        warnings=(*setting_warnings(section), *mixed(section)),
        verdicts=tuple(comparison.sentence for comparison in comparisons(section)),
        shown=sorted(shown, key=lambda s: s.folded),
        recipes=_recipes(section),
        clips=_clips(section),
    )


def _overview(preset: str, shown: list[Shown]) -> Chapter:
    return Chapter(
        anchor=slug("papers", preset),
        title=f"The papers' tables · {preset}",
        lead="Algorithms × suites, ours beside what the papers print.",
        shown=shown,
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
    found = sections(results)
    plan = _Plan(formats=formats)
    for section in found:
        plan.add_section(section)
    presets = list(dict.fromkeys(section.preset for section in found))
    for preset in presets:
        of_preset = [section for section in found if section.preset == preset]
        anchor = slug("papers", preset)
        plan.add(anchor, OVERVIEWS, of_preset, anchor, f"The papers' tables, {preset}:")
    plan.jobs.append(
        partial(produce, "table of runs", "runs", partial(run_table, results), formats)
    )
    plan.places.append("runs")
    outcomes = do_all(plan.jobs, cores() if len(results.runs) >= MANY_RUNS else 1)

    shown: dict[str, list[Shown]] = {place: [] for place in plan.places}
    out = _Writer(Path(to))
    for place, outcome in zip(plan.places, outcomes, strict=True):
        shown[place] += [outcome.shown] if outcome.shown else []
        for name, content in outcome.files.items():
            out.write(name, content)
    chapters = [_chapter(section, shown[section.anchor]) for section in found]
    overviews = [_overview(preset, shown[slug("papers", preset)]) for preset in presets]
    page = _template().render(
        chapters=chapters + [overview for overview in overviews if overview.shown],
        banners=_banners(found),
        runs=next(iter(shown["runs"]), None),
        unfinished=_unfinished(found),
        unreadable=[Gap(what=run, why=why) for run, why in results.unreadable.items()],
        gaps=[Gap(what=o.what, why=o.gap) for o in outcomes if o.gap],
        failures=[Gap(what=o.what, why=o.failure) for o in outcomes if o.failure],
        citations=[str(row.citation) for row in published("sources").itertuples(index=False)],
        refresh=refresh,
    )
    out.write("index.html", page.encode())
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
