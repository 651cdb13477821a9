"""What commands print: tables for people, JSON for programs."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvtier.cli.app import one_line


def print_json(value: Any) -> None:
    """One JSON value on one line of stdout; dataclasses become objects."""
    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[str] = ()
) -> None:
    """A table on stdout. numbers: columns that stand to the right.

    Texts are shown as they are, since names come from outside: no markup, no control characters.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(one_line(cell)) for cell in row))
    _console().print(table)


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Names and values, one pair on a line."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, Text(one_line(value)))
    _console().print(table)


def print_line(text: str) -> None:
    """A line for people on stdout, unless it is empty."""
    if text:
        sys.stdout.write(one_line(text) + "\n")


def print_progress(text: str) -> None:
    """A line on stderr about what goes on."""
    sys.stderr.write(f"kvtier: {one_line(text)}\n")
    sys.stderr.flush()


@contextmanager
def working(text: str) -> Iterator[None]:
    """Show a person at a terminal that something takes its time."""
    if not sys.stderr.isatty():
        yield
        return
    with Console(stderr=True).status(Text(one_line(text))):
        yield


def size(value: int) -> str:
    """Bytes for people: 1536 -> '1.5 KiB'."""
    amount = float(value)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(amount) < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def duration(value_s: float) -> str:
    """Seconds for people: 0.0042 -> '4.2 ms', 5400 -> '1.5 h'."""
    if abs(value_s) < 1:
        return f"{value_s * 1e3:.1f} ms"
    for unit, length_s in (("d", 86400), ("h", 3600), ("min", 60)):
        if abs(value_s) >= 2 * length_s:
            return f"{value_s / length_s:.1f} {unit}"
    return f"{value_s:.1f} s"


def _console() -> Console:
    # Cut to the terminal's width for people; whole lines where a program reads.
    return Console(width=None if sys.stdout.isatty() else 200, highlight=False)
