"""Bars as standalone SVG, light or dark as the reader's page is; every bar has its number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

STYLE = """
svg { --card: #fff; --ink: #1b2330; --soft: #5b6676; --line: #d9dee6;
  --h0: #2563c9; --h1: #c2410c; --h2: #15803d; --h3: #7e22ce; --h4: #b91c5c; --h5: #0e7490;
  --h6: #8a6d00; --h7: #94a3b8; }
@media (prefers-color-scheme: dark) {
  svg { --card: #1b212a; --ink: #e5e9f0; --soft: #9aa6b6; --line: #323b48;
    --h0: #6ea8ff; --h1: #fb923c; --h2: #4ade80; --h3: #c084fc; --h4: #f472b6; --h5: #22d3ee;
    --h6: #eab308; --h7: #64748b; }
}
text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  fill: var(--ink); }
.card { fill: var(--card); stroke: var(--line); } .title { font-size: 16px; font-weight: 600; }
.soft { fill: var(--soft); font-size: 12px; } .head { font-weight: 600; }
.number { font-size: 12px; font-variant-numeric: tabular-nums; }
.rule { stroke: var(--soft); stroke-dasharray: 3 3; } .axis { stroke: var(--line); }
"""

WIDTH, RIGHT, MARGIN = 900, 190, 22
BAR, STEP, THIN, THIN_STEP = 18, 26, 11, 15
CHARACTER = 7.6
SUBTITLE = 128  # characters of a line
HUES = 8


@dataclass(frozen=True)
class Row:
    """A label and its bar: parts one after the other, and what is written behind it.

    A row without parts is a heading.
    """

    label: str
    parts: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Group:
    """A label and several bars below each other, by series; None where nothing was measured."""

    label: str
    bars: Mapping[str, float | None]


@dataclass(frozen=True)
class Frame:
    """Where bars begin, and which value fills the width."""

    left: float
    top: float

    def wide(self, value: float) -> float:
        return (WIDTH - self.left - RIGHT) * value / self.top

    def label(self, text: str, y: float) -> str:
        at = self.left - 10
        return f'<text text-anchor="end" x="{at:.0f}" y="{y:.0f}">{escape(text)}</text>'


def framed(labels: Sequence[str], top: float) -> Frame:
    """Room for the longest label."""
    longest = max(map(len, labels), default=0)
    return Frame(max(180.0, MARGIN + 10 + CHARACTER * longest), top or 1.0)


def stacked(title: str, subtitle: str, rows: Sequence[Row], names: Sequence[str]) -> str:
    """One bar a row, its parts in the order and colours of ``names``."""
    top = max((sum(row.parts.values()) for row in rows), default=0.0)
    frame = framed([row.label for row in rows if row.parts], top)
    y = _header(subtitle, names)
    body: list[str] = []
    for row in rows:
        if not row.parts:
            body.append(f'<text class="head" x="{MARGIN}" y="{y + 18}">{escape(row.label)}</text>')
            y += STEP
            continue
        body.append(frame.label(row.label, y + BAR - 4))
        x = frame.left
        for i, name in enumerate(names):
            value = row.parts.get(name, 0.0)
            said = f"{row.label}, {name}: {value:.4g}"
            body.append(_bar(x, y, frame.wide(value), BAR, i, said))
            x += frame.wide(value)
        body.append(_number(x, y + BAR - 4, row.note))
        y += STEP
    return _page(title, subtitle, names, body, y, frame)


def grouped(
    title: str,
    subtitle: str,
    groups: Sequence[Group],
    unit: str,
    rule: tuple[float, str] | None = None,
) -> str:
    """A bar for each series of each group; ``rule`` draws a line at a value, with its name."""
    names = list(dict.fromkeys(name for group in groups for name in group.bars))
    values = [v for group in groups for v in group.bars.values() if v is not None]
    frame = framed([g.label for g in groups], max([*values, rule[0] if rule else 0.0]))
    shown = names if len(names) > 1 else []
    first = y = _header(subtitle, shown) + (14 if rule else 0)
    body: list[str] = []
    for group in groups:
        bars = [(names.index(name), name, v) for name, v in group.bars.items() if v is not None]
        middle = y + len(bars) * THIN_STEP / 2 + 3
        body.append(frame.label(group.label, middle))
        for i, name, value in bars:
            said = f"{group.label}, {name}: {value:.4g} {unit}"
            body.append(_bar(frame.left, y, frame.wide(value), THIN, i, said))
            x = frame.left + frame.wide(value)
            body.append(_number(x, y + THIN - 1, f"{_short(value)} {unit}"))
            y += THIN_STEP
        y += 8
    if rule:
        x = frame.left + frame.wide(rule[0])
        body.append(f'<path class="rule" d="M{x:.1f} {first - 4}V{y - 6}"/>')
        body.append(
            f'<text class="soft" text-anchor="middle" x="{x:.1f}" y="{first - 8}">'
            f"{escape(rule[1])}</text>"
        )
    return _page(title, subtitle, shown, body, y, frame)


def _header(subtitle: str, names: Sequence[str]) -> int:
    """Where the first bar begins."""
    return 46 + 16 * len(_wrapped(subtitle)) + 20 * len(_legend_rows(names)) + 10


def _wrapped(text: str) -> list[str]:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > SUBTITLE:
            lines.append("")
        lines[-1] += f"{word} "
    return lines


def _legend_rows(names: Sequence[str]) -> list[list[tuple[int, float, str]]]:
    """(hue, x, name) of the legend's entries, line by line."""
    rows: list[list[tuple[int, float, str]]] = []
    x = float(WIDTH)
    for i, name in enumerate(names):
        wide = 24 + CHARACTER * len(name) + 18
        if x + wide > WIDTH - MARGIN:
            rows.append([])
            x = float(MARGIN)
        rows[-1].append((i, x, name))
        x += wide
    return rows


def _page(
    title: str,
    subtitle: str,
    names: Sequence[str],
    body: Sequence[str],
    bottom: float,
    frame: Frame,
) -> str:
    height = bottom + 14
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
        f'width="{WIDTH}" height="{height:.0f}" role="img" aria-label="{escape(title)}">',
        f"<title>{escape(title)}</title><style>{STYLE}</style>",
        f'<rect class="card" x=".5" y=".5" width="{WIDTH - 1}" height="{height - 1:.0f}" rx="10"/>',
        f'<text class="title" x="{MARGIN}" y="32">{escape(title)}</text>',
    ]
    y = 52
    for line in _wrapped(subtitle):
        parts.append(f'<text class="soft" x="{MARGIN}" y="{y}">{escape(line.strip())}</text>')
        y += 16
    for row in _legend_rows(names):
        for i, x, name in row:
            parts.append(_bar(x, y - 6, 14, 12, i, name))
            parts.append(f'<text x="{x + 20:.0f}" y="{y + 5}">{escape(name)}</text>')
        y += 20
    axis = f'<path class="axis" d="M{frame.left:.0f} {y - 6}V{bottom - 4:.0f}"/>'
    return "\n".join([*parts, axis, *body, "</svg>"]) + "\n"


def _bar(x: float, y: float, wide: float, high: int, hue: int, said: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(wide, 0):.1f}" height="{high}" '
        f'style="fill: var(--h{hue % HUES})"><title>{escape(said)}</title></rect>'
    )


def _number(x: float, y: float, text: str) -> str:
    return f'<text class="number" x="{x + 6:.1f}" y="{y:.0f}">{escape(text)}</text>'


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
