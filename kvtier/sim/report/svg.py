"""Bar and scatter plots as SVG text, the same text for the same numbers.

A plotting library would bring megabytes of script into each report, or ids and dates that differ from run
to run; the three kinds of plot here need neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

COLOURS: Final = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")
_WIDTH, _HEIGHT = 720.0, 300.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 64.0, 12.0, 30.0, 46.0
Words = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class Series:
    """One colour: a value for each group, None for none."""

    name: str
    values: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Point:
    """One dot. on_line: it is joined with the others of its kind."""

    x: float
    y: float
    label: str
    on_line: bool = False
    marked: bool = False


class _Axis:
    """From values to places; in logarithms where that is asked for."""

    def __init__(self, values: Sequence[float], low: float, high: float, *, log: bool) -> None:
        found = [value for value in values if not log or value > 0] or [1.0]
        self._log = log
        if log:
            self._least = 10 ** math.floor(math.log10(min(found)))
            self._most = max(10 ** math.ceil(math.log10(max(found))), self._least * 10)
        else:
            self._least, self._most = 0.0, _round_up(max([*found, 0.0]))
        self._low, self._high = low, high

    def at(self, value: float) -> float:
        """The place of a value; what is below the axis lies at its start."""
        if self._log:
            part = math.log(max(value, self._least) / self._least) / math.log(self._most / self._least)
        else:
            part = (value - self._least) / (self._most - self._least)
        return self._low + part * (self._high - self._low)

    def ticks(self) -> list[float]:
        """Where to put lines."""
        if not self._log:
            return [self._most * i / 4 for i in range(5)]
        first, last = round(math.log10(self._least)), round(math.log10(self._most))
        step = max((last - first) // 6, 1)
        return [10.0**power for power in range(first, last + 1, step)]


def bars(
    title: str,
    groups: Sequence[str],
    series: Sequence[Series],
    words: Words,
    *,
    stacked: bool = False,
    log: bool = False,
    marks: Sequence[float] = (),
) -> str:
    """Bars side by side or on top of each other. marks: a line across each group."""
    if stacked:
        highest = [sum(s.values[i] or 0.0 for s in series) for i in range(len(groups))]
    else:
        highest = [value for s in series for value in s.values if value is not None]
    axis = _Axis([*highest, *marks], _HEIGHT - _BOTTOM, _TOP, log=log)
    parts = [_grid(axis, words)]
    width = (_WIDTH - _LEFT - _RIGHT) / max(len(groups), 1)
    for index, group in enumerate(groups):
        left = _LEFT + index * width
        parts.append(_text(left + width / 2, _HEIGHT - _BOTTOM + 16, group, "middle"))
        parts += _group(axis, series, index, left, width, words, stacked)
        if marks:
            y = axis.at(marks[index])
            ends = f'x1="{left + 4:.1f}" x2="{left + width - 4:.1f}"'
            parts.append(f'<line {ends} y1="{y:.1f}" y2="{y:.1f}" class="mark"/>')
    return _figure(title, [*parts, _legend([s.name for s in series], COLOURS, _LEFT, _HEIGHT - 7)])


def scatter(
    title: str,
    points: Sequence[Point],
    x_name: str,
    y_name: str,
    x_words: Words,
    y_words: Words,
    *,
    on_line: str,
    off_line: str,
) -> str:
    """Dots, those on the line joined in order of x; marked ones have a ring and a label. y is logarithmic.

    on_line, off_line: what the legend calls either kind.
    """
    x_axis = _Axis([p.x for p in points], _LEFT, _WIDTH - _RIGHT, log=False)
    y_axis = _Axis([p.y for p in points], _HEIGHT - _BOTTOM, _TOP, log=True)
    parts = [_grid(y_axis, y_words)]
    for index, tick in enumerate(x_axis.ticks()):
        anchor = ("start", "middle", "middle", "middle", "end")[index]
        parts.append(_text(x_axis.at(tick), _HEIGHT - _BOTTOM + 16, x_words(tick), anchor))
    line = " ".join(
        f"{x_axis.at(p.x):.1f},{y_axis.at(p.y):.1f}"
        for p in sorted((p for p in points if p.on_line), key=lambda p: p.x)
    )
    parts.append(f'<polyline points="{line}" fill="none" stroke="{COLOURS[0]}" stroke-width="1.5"/>')
    for p in points:
        x, y = x_axis.at(p.x), y_axis.at(p.y)
        colour = COLOURS[0] if p.on_line else COLOURS[-1]
        title = f"<title>{escape(p.label)}</title>"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}">{title}</circle>')
        if p.marked:
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="9" fill="none" stroke="{COLOURS[1]}"/>')
            # On the side where there is room for it.
            right = x < (_LEFT + _WIDTH) / 2
            parts.append(_text(x + 12 if right else x - 12, y - 8, p.label, "start" if right else "end"))
    parts.append(_text((_WIDTH + _LEFT) / 2, _HEIGHT - 8, x_name, "middle"))
    parts.append(_text(_LEFT, _TOP - 12, y_name, "start"))
    parts.append(_legend((on_line, off_line), (COLOURS[0], COLOURS[-1]), _WIDTH / 2, _TOP - 12))
    return _figure(title, parts)


def _group(
    axis: _Axis,
    series: Sequence[Series],
    index: int,
    left: float,
    width: float,
    words: Words,
    stacked: bool,
) -> list[str]:
    parts: list[str] = []
    base = 0.0
    each = width * 0.8 / (1 if stacked else max(len(series), 1))
    for number, one in enumerate(series):
        value = one.values[index]
        if value is None:
            continue
        x = left + width * 0.1 + (0 if stacked else number * each)
        top = axis.at(base + value if stacked else value)
        bottom = axis.at(base) if stacked else _HEIGHT - _BOTTOM
        label = escape(f"{one.name}: {words(value)}")
        parts.append(
            f'<rect x="{x:.1f}" y="{top:.1f}" width="{each * 0.94:.1f}" height="{max(bottom - top, 0):.1f}" '
            f'fill="{COLOURS[number % len(COLOURS)]}"><title>{label}</title></rect>'
        )
        base += value
    return parts


def _grid(axis: _Axis, words: Words) -> str:
    parts = []
    for tick in axis.ticks():
        y = axis.at(tick)
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
            + _text(_LEFT - 6, y + 4, words(tick), "end")
        )
    return "".join(parts)


def _legend(names: Sequence[str], colours: Sequence[str], x: float, y: float) -> str:
    """From x on, with its text at y; colours are used again where they are fewer."""
    parts = []
    for number, name in enumerate(names):
        colour = colours[number % len(colours)]
        parts.append(f'<rect x="{x:.1f}" y="{y - 9:.1f}" width="10" height="10" fill="{colour}"/>')
        parts.append(_text(x + 14, y, name, "start"))
        x += 26 + 7 * len(name)
    return "".join(parts)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _figure(title: str, parts: Sequence[str]) -> str:
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" '
        f'role="img" aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )


def _round_up(value: float) -> float:
    """The next of 1, 2, 2.5, 4, 5, 8, 10 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 4, 5, 8, 10) if step * power >= value * (1 - 1e-12))
