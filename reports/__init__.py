"""The evidence: frames in; tables, figures and one HTML page out.

In a notebook, where tables and figures show themselves:

>>> from bench.frames import load
>>> from reports import FIGURES, TABLES, Results, sections
>>> results = Results(**load("results/runs"))
>>> section = sections(results)[0]  # the runs of one suite at one scale
>>> TABLES["success_rates"](section)
>>> FIGURES["learning_curves"](section)
>>> section.scores("mega")  # final success, seeds x tasks

A table's or figure's ``data`` holds its numbers, ``list(FIGURES)`` names them all, and ``build``
writes the page (``examples/report.ipynb`` shows more). Knows nothing of algorithms, suites or
torch: a table or figure is one registered function of frames.
"""

from reports.comparing import comparisons
from reports.export import EXPORTS, export
from reports.figures import ABLATION_FIGURES, FIGURES, Drawing
from reports.frames import (
    Ablation,
    MissingError,
    Results,
    Section,
    published,
    sections,
)
from reports.html import build
from reports.imported import read_curves
from reports.running import summary
from reports.tables import ABLATION_TABLES, OVERVIEWS, TABLES, Table

__all__ = [
    "ABLATION_FIGURES",
    "ABLATION_TABLES",
    "EXPORTS",
    "FIGURES",
    "OVERVIEWS",
    "TABLES",
    "Ablation",
    "Drawing",
    "MissingError",
    "Results",
    "Section",
    "Table",
    "build",
    "comparisons",
    "export",
    "published",
    "read_curves",
    "sections",
    "summary",
]
