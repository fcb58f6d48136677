"""The evidence: frames in; tables, figures and one HTML page out.

>>> from reports import Results, build, summary
>>> build(Results(runs=..., metrics=..., timing=..., probes=..., traces=...), Path("report"))

Knows nothing of algorithms, suites or torch. A table or figure is one registered function in
``reports.tables`` or ``reports.figures``.
"""

from reports.frames import Results, published
from reports.html import build
from reports.tables import summary

__all__ = ["Results", "build", "published", "summary"]
