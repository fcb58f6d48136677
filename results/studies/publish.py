"""Put tables and figures of a study's finished runs on its page.

    python results/studies/publish.py results/studies/reference
    python results/studies/publish.py results/studies/reference README.md docs/benchmarks.md

On the page (the study's README.md unless another is named) the lines between ``<!-- study:
mt10_rand success_rates -->`` and ``<!-- end -->`` become that table or figure of ``bench report``,
made of the runs of that suite; ``<!-- study: mt10_rand comparisons mega d2r -->`` of those
algorithms alone. Figures are written to ``figures/`` of the study. ``<!-- study: mt10_rand scale
-->`` is what holds for all of a suite's tables, ``headline`` the success rates in short, ``<!--
study: grid runs -->`` how many runs of the study's grid are finished. What the results do not
support yet becomes a line that says why.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from bench.frames import load
from bench.spec import RunSpec
from bench.sweep import expand, plan, read_grid
from reports import FIGURES, TABLES, MissingError, Results, Section, sections
from reports.frames import slug
from reports.html import mixed
from reports.writers import fill, markdown_escape, to_markdown


def publish(study: Path, pages: Sequence[Path]) -> None:
    """Renew every marked place of the pages. Raises ValueError at a mark that means nothing."""
    specs = expand(*read_grid(study / "grid.toml"))
    suites = {spec.suite for spec in specs}
    results = Results(**load(study))
    # Largest scale first, and that is the study's.
    found = {section.suite: section for section in reversed(sections(results))}

    def content(page: Path, words: str) -> str:
        suite, name, *only = words.split()
        if (suite, name) == ("grid", "runs"):
            return finished(specs, study)
        if suite not in suites:
            raise ValueError(f"{page}: the grid has no suite {suite!r}")
        if suite not in found:
            return f"*No run of {suite} is finished yet.*"
        if name == "scale":
            return scale(found[suite])
        section = found[suite].only(only) if only else found[suite]
        image = study / "figures" / f"{slug(suite, name, *only)}.png"
        return made(section, name, image, page)

    for page in pages:
        text = fill(page.read_text("utf-8"), "study", partial(content, page))
        page.write_text(text, "utf-8")


def made(section: Section, name: str, image: Path, page: Path) -> str:
    """A table, or a figure with its caption, in Markdown."""
    if name not in (*TABLES, *FIGURES, "headline"):
        raise ValueError(f"{page}: no table or figure is called {name!r}")
    try:
        if name == "headline":
            return headline(section)
        if name in TABLES:
            table = TABLES[name](section)
            shown = to_markdown(replace(table, caption=estimator(table.caption)))
            return shown.partition("\n\n")[2].strip()  # the page has headings of its own
        if name == "learning_curves" and len(set(section.metrics["label"])) < 2:
            raise MissingError(f"curves of two algorithms are to be compared ({section.missing})")
        drawing = FIGURES[name](section)
    except MissingError as reason:
        return f"*Not to be had yet: {reason}.*"
    image.parent.mkdir(exist_ok=True)
    image.write_bytes(drawing.png())
    shown = f"![{drawing.title}]({os.path.relpath(image, page.parent)})"
    return f"{shown}\n\n{markdown_escape(estimator(drawing.caption))}"


def headline(section: Section) -> str:
    """The success rates for a reader in a hurry, beside those of MEGA's and D2R's papers."""
    whole = TABLES["success_rates"](section)
    columns = {
        "Algorithm": section.suite,
        "Mean ± std": "success here",
        "Seeds": "seeds",
        "Published: MEGA Table 1": "MEGA Table 1",
        "Published: D2R Table 8": "D2R Table 8",
    }
    places = [whole.columns.index(column) for column in columns if column in whole.columns]
    kept = replace(
        whole,
        columns=tuple(columns[whole.columns[place]] for place in places),
        rows=[tuple(row[place] for place in places) for row in whole.rows],
    )
    scale = markdown_escape(f"Here: {section.scale}. The papers' columns do not compare with it.")
    return f"{to_markdown(kept).split(chr(10) * 2)[-2]}\n\n{scale}"


def estimator(caption: str) -> str:
    """A caption without the seeds and the scale, which the page states once for all."""
    return caption.partition(" Seeds: ")[0]


def scale(section: Section) -> str:
    """What holds for every table of the section, and what its runs do not have in common."""
    lines = [
        f"{section.scale[0].upper()}{section.scale[1:]}; final evaluation {section.evaluated}; "
        f"{section.missing}.",
        *mixed(section),
    ]
    return markdown_escape(" ".join(lines))


def finished(specs: list[RunSpec], study: Path) -> str:
    """Finished and missing runs of the grid, an algorithm of a suite per row."""
    done: Mapping[tuple[str, str], int] = Counter(
        (job.spec.suite, job.spec.title) for job in plan(specs, study) if job.outcome == "skipped"
    )
    wanted = Counter((spec.suite, spec.title) for spec in specs)
    rows = ["| suite | algorithm | runs finished | of |", "|---|---|---|---|"]
    rows += [f"| {s} | `{label}` | {done[s, label]} | {n} |" for (s, label), n in wanted.items()]
    total = sum(done.values())
    return "\n".join([*rows, f"| | **all** | **{total}** | **{len(specs)}** |"])


if __name__ == "__main__":
    place = Path(sys.argv[1])
    publish(place, [Path(name) for name in sys.argv[2:]] or [place / "README.md"])
