"""What the command line says and how: errors that end it, tables, JSON, durations."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Mapping
from typing import Any

SCHEMA = 1
"""Version of the --json outputs."""


class UsageError(Exception):
    """What the user asked for cannot be; the message says why. Exit code 2."""


class WorkError(Exception):
    """What the user asked for was tried and failed. Exit code 1."""


def resolved_device(name: str) -> str:
    """`--device`, resolved. Raises UsageError for one that is not here."""
    from bench import machine

    try:
        return machine.resolve_device(name)
    except ValueError as error:
        raise UsageError(str(error)) from None


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3 h 20 min``, ``9 days``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 72 else f"{hours / 24:.0f} days"


def new_console() -> Any:
    """A rich Console for standard output."""
    from rich.console import Console

    # Files and pipes have no width; tables fit without broken words in this one.
    width = None if sys.stdout.isatty() else 120
    return Console(soft_wrap=True, highlight=False, markup=False, width=width)


def spinner(console: Any, text: str) -> Any:
    """A spinner on a terminal, nothing elsewhere."""
    from rich.text import Text

    # As Text: a label's brackets are no markup.
    return console.status(Text(text)) if console.is_terminal else contextlib.nullcontext()


def print_json(
    kind: str, rows: list[dict[str, Any]], more: Mapping[str, Any] | None = None
) -> None:
    """Print ``rows`` as a document of a kind and a schema, with what else there is to say."""
    content = {"schema": SCHEMA, "kind": kind, "rows": rows} | dict(more or {})
    print(json.dumps(_finite(content), indent=1, allow_nan=False))


def _finite(content: Any) -> Any:
    """With null for numbers that JSON does not know."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    unknown = isinstance(content, float) and not math.isfinite(content)
    return None if unknown else content


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """A table on a terminal; tab-separated elsewhere, for other programs."""
    console = new_console()
    if not console.is_terminal:
        for row in [header, *rows]:
            print("\t".join(row))
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table, soft_wrap=False)


def short(value: Any) -> str:
    """A value as a cell of a table."""
    if value is None:
        return ""
    return f"{value:,.2f}" if isinstance(value, float) else str(value)
