"""Tables of numbers that fit a terminal."""

import textwrap
from collections.abc import Sequence

from ._compare import Spread

WIDTH = 100
_NAME_WIDTH = 40


def number(x: float) -> str:
    """Three digits, without an exponent below ten million."""
    return f"{x:,.0f}" if 1000 <= abs(x) < 1e7 else f"{x:.3g}"


def spread_text(spread: Spread) -> str:
    """The median and the quartiles."""
    median, lower, upper = map(number, spread)
    return f"{median} ({lower}–{upper})"


def fit(names: Sequence[str], groups: Sequence[Sequence[Sequence[str]]]) -> str:
    """Groups of columns of text, the headers first, beside the names of their rows. Long names are
    wrapped; a group that does not fit beside those before it starts another table."""
    wrapped = [_wrap(name) for name in names]
    left = max(len(line) for lines in wrapped for line in lines)
    tables: list[list[Sequence[str]]] = [[]]
    for group in groups:
        if tables[-1] and left + _width([*tables[-1], *group]) > WIDTH:
            tables.append([])
        for column in group:
            if tables[-1] and left + _width([*tables[-1], column]) > WIDTH:
                tables.append([])
            tables[-1].append(column)
    return "\n\n".join(_table(wrapped, left, table) for table in tables)


def _width(columns: Sequence[Sequence[str]]) -> int:
    return sum(2 + max(map(len, column)) for column in columns)


def fill(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), WIDTH, break_on_hyphens=False)


def _wrap(name: str) -> list[str]:
    return textwrap.wrap(name, _NAME_WIDTH, subsequent_indent="    ", break_on_hyphens=False)


def _table(wrapped: Sequence[list[str]], left: int, columns: Sequence[Sequence[str]]) -> str:
    """All but the first column aligned to the right."""
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for i, name in enumerate(wrapped):
        cells = [column[i].rjust(width) for column, width in zip(columns, widths, strict=True)]
        lines.append("  ".join([name[0].ljust(left), *cells]).rstrip())
        lines += name[1:]
    return "\n".join(lines)
