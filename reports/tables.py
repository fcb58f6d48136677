"""All tables, in the order of the page.

To add one, write a function from ``Section`` to ``Table`` under ``@table("name")`` in the module of
its kind; raise ``MissingError`` with the reason where the results do not support it. Every writer
escapes. What they share is in ``reports.tabling``.
"""

from __future__ import annotations

from reports import scores  # isort: split

from reports import comparing  # isort: split

from reports import running
from reports.tabling import ABLATION_TABLES, OVERVIEWS, TABLES, Table, table

__all__ = ["ABLATION_TABLES", "OVERVIEWS", "TABLES", "Table", "comparing", "running", "scores"]
__all__ += ["table"]
