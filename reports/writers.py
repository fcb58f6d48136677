"""Tables as Markdown, LaTeX and CSV; every writer escapes."""

from __future__ import annotations

import html
import re
from collections.abc import Callable

from reports.tables import Table

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "−": r"$-$",
    "×": r"$\times$",
    "–": "--",
    "·": r"$\cdot$",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "…": r"\ldots{}",
    "τ": r"$\tau$",
    "α": r"$\alpha$",
    "[": "{[}",
    "]": "{]}",
    "⚠": "",
} | {c: f"\\{c}" for c in "&%$#_{}"}


def latex_escape(value: str) -> str:
    """Text that LaTeX prints as it stands."""
    return "".join(_LATEX.get(c, c) for c in " ".join(value.split()))


def markdown_escape(value: str) -> str:
    """Text that Markdown shows literally inside a table cell."""
    plain = html.escape(" ".join(value.split()), quote=False)
    return "".join(f"\\{c}" if c in "\\|`*_[]~" else c for c in plain)


def _right(source: Table) -> list[bool]:
    """Which columns stand to the right: numbers do, names and words do not."""
    return [k > 0 and name not in source.words for k, name in enumerate(source.columns)]


def to_markdown(source: Table) -> str:
    """A GitHub-flavoured table under its title, the caption below."""
    rule = ["---:" if right else "---" for right in _right(source)]
    lines = [[markdown_escape(cell) for cell in row] for row in [source.columns, *source.rows]]
    grid = "\n".join("| " + " | ".join(row) + " |" for row in [lines[0], rule, *lines[1:]])
    warnings = "".join(f"> **Warning:** {markdown_escape(w)}\n\n" for w in source.warnings)
    title, caption = markdown_escape(source.title), markdown_escape(source.caption)
    return f"## {title}\n\n{warnings}{grid}\n\n{caption}\n"


def to_latex(source: Table) -> str:
    """A ``table`` environment for the packages booktabs and graphicx, no wider than the text."""
    title = latex_escape(source.title)
    rows = [" & ".join(latex_escape(cell) for cell in row) + r" \\" for row in source.rows]
    notes = "".join(f" Warning: {latex_escape(w)}" for w in source.warnings)
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption[{title}]{{{title}. {latex_escape(source.caption)}{notes}}}",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{{''.join('r' if right else 'l' for right in _right(source))}}}",
            r"\toprule",
            " & ".join(latex_escape(cell) for cell in source.columns) + r" \\",
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}}",
            r"\end{table}",
            "",
        ]
    )


def to_csv(source: Table) -> str:
    """The tidy numbers behind the table."""
    return source.data.to_csv(index=False, lineterminator="\n")


def fill(page: str, kind: str, content: Callable[[str], str]) -> str:
    """``page`` with ``content(words)`` between every ``<!-- kind: words -->`` and the next
    ``<!-- end -->``."""
    mark = re.compile(rf"(<!-- {kind}: ([^\n]+) -->)\n.*?(<!-- end -->)", re.DOTALL)
    return mark.sub(lambda found: f"{found[1]}\n{content(found[2])}\n{found[3]}", page)
