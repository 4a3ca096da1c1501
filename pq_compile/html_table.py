"""Tables of the HTML report, cell by cell; all text is escaped here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from . import svg
from .show import error
from .table import change

NUMBER = ' class="number"'


def error_cells(before: float | None, after: float | None, top: float) -> list[str]:
    """Before, after, their change, and both as bars on a scale that ends at ``top``."""
    ratio = after / before - 1 if before and after is not None else None
    return [
        number_cell(error(before), before),
        number_cell(error(after), after),
        number_cell(change(before, after), ratio),
        f"<td>{svg.bars(before, after, top)}</td>",
    ]


def name_cell(name: str) -> str:
    return f'<td class="name">{breakable(name)}</td>'


def breakable(name: str) -> str:
    """A long name may go on in the next line after a dot."""
    return escape(name).replace(".", ".<wbr>")


def cell(text: str) -> str:
    return f"<td>{escape(text)}</td>"


def number_cell(text: str, value: float | None) -> str:
    """A right-aligned cell; ``value`` is what it sorts by."""
    key = "" if value is None else f' data-value="{value:.9g}"'
    return f"<td{NUMBER}{key}>{escape(text)}</td>"


def html_table(heads: Sequence[str], rows: Iterable[Sequence[str]], scroll: bool = False) -> str:
    """A table of ready-made cells; heads of number columns stand right; ``scroll`` bounds it."""
    rows = list(rows)
    first = next(iter(rows), heads)
    kinds = [NUMBER if one.startswith(f"<td{NUMBER}") else "" for one in first]
    head = "".join(
        f'<th scope="col"{kind}>{escape(title)}</th>'
        for title, kind in zip(heads, kinds, strict=True)
    )
    body = "\n".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    kind = "scroll tall" if scroll else "scroll"
    return (
        f'<div class="{kind}"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )
