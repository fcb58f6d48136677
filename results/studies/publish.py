"""Put tables and figures of a study's finished runs on its page.

    python results/studies/publish.py results/studies/reference
    python results/studies/publish.py results/studies/reference README.md

On the page (the study's README.md unless another is named) the lines between ``<!-- mt10_rand:
success_rates -->`` and ``<!-- end -->`` become that table or figure of ``bench report``, made of
the runs of that suite; figures are written to ``figures/`` of the study. ``<!-- grid: runs -->`` is
how many runs of the study's grid are finished. What the results do not support yet becomes a line
that says why.
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from bench.frames import load
from bench.spec import RunSpec
from bench.sweep import expand, plan, read_grid
from reports import FIGURES, TABLES, MissingError, Results, Section, sections
from reports.writers import to_markdown


def publish(study: Path, page: Path) -> None:
    """Renew every marked place of ``page``. Raises ValueError at a mark that means nothing."""
    found = {section.suite: section for section in sections(Results(**load(study)))}
    figures = study / "figures"

    def renewed(mark: re.Match[str]) -> str:
        suite, name = mark["suite"], mark["name"]
        if (suite, name) == ("grid", "runs"):
            content = finished(study)
        elif suite in found:
            content = made(found[suite], name, figures, page)
        else:
            content = f"*No run of {suite} is finished yet.*"
        return f"<!-- {suite}: {name} -->\n{content}\n<!-- end -->"

    marked = re.compile(r"<!-- (?P<suite>\w+): (?P<name>\w+) -->\n.*?<!-- end -->", re.DOTALL)
    page.write_text(marked.sub(renewed, page.read_text()))


def made(section: Section, name: str, figures: Path, page: Path) -> str:
    """A table, or a figure with its caption, in Markdown."""
    try:
        if name in TABLES:
            _title, _, rest = to_markdown(TABLES[name](section)).partition("\n\n")
            return estimator(rest)
        if name not in FIGURES:
            raise ValueError(f"no table or figure is called {name!r}")
        drawing = FIGURES[name](section)
    except MissingError as reason:
        return f"*Not to be had yet: {reason}.*"
    figures.mkdir(exist_ok=True)
    image = figures / f"{section.suite}-{name}.png"
    image.write_bytes(drawing.png())
    shown = f"![{drawing.title}]({os.path.relpath(image, page.parent)})"
    return f"{shown}\n\n{estimator(drawing.caption)}"


def estimator(caption: str) -> str:
    """A caption without the seeds and the scale, which the page states once for all."""
    return caption.rpartition(" Seeds: ")[0]


def finished(study: Path) -> str:
    """Finished and missing runs of the grid, an algorithm of a suite per row."""
    specs = expand(*read_grid(study / "grid.toml"))
    done: Mapping[tuple[str, str], int] = Counter(
        _key(job.spec) for job in plan(specs, study) if job.outcome == "skipped"
    )
    wanted = Counter(_key(spec) for spec in specs)
    rows = ["| suite | algorithm | runs finished | of |", "|---|---|---|---|"]
    rows += [f"| {s} | `{label}` | {done[s, label]} | {n} |" for (s, label), n in wanted.items()]
    total = sum(done.values())
    return "\n".join([*rows, f"| | **all** | **{total}** | **{len(specs)}** |"])


def _key(spec: RunSpec) -> tuple[str, str]:
    return spec.suite, spec.title


if __name__ == "__main__":
    place = Path(sys.argv[1])
    for name in sys.argv[2:] or [str(place / "README.md")]:
        publish(place, Path(name))
