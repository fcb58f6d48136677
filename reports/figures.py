"""All figures, in the order of the page.

To add one, write a function from ``Section`` to ``Drawing`` under ``@figure("name")`` in the module
of its kind; raise ``MissingError`` with the reason where the results do not support it. What they
share is in ``reports.drawing``.
"""

from __future__ import annotations

from reports import curves  # isort: split

from reports import aggregates  # isort: split

from reports import evolution  # isort: split

from reports import routes
from reports.drawing import ABLATION_FIGURES, FIGURES, Drawing, figure

__all__ = ["ABLATION_FIGURES", "FIGURES", "Drawing", "aggregates", "curves", "evolution", "figure"]
__all__ += ["routes"]
