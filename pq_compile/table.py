"""A report's dict as text: at most 100 columns, the blocks of one kind on one line."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .show import WIDTH, error

Entry = Mapping[str, Any]
NUMBER = re.compile(r"(?:(?<!\S)-)?\d+(?:\.\d+)?")  # a sign stands after a space


class Fold(NamedTuple):
    """Entries that differ in nothing but the index of their block."""

    name: str  # "transformer_blocks.{0..18}.attn.to_q"
    entries: tuple[Entry, ...]

    def mean(self, key: str) -> float | None:
        values = [entry[key] for entry in self.entries if entry[key] is not None]
        return sum(values) / len(values) if values else None

    def reordered(self) -> str:
        """``16 of 19``, or what rules it out for all of them."""
        if all(entry.get("route") == "keep" for entry in self.entries):
            return "-"
        if not any(entry["free"] for entry in self.entries):
            return "pinned"
        count = sum(entry["accepted"] for entry in self.entries)
        return f"{count} of {len(self.entries)}"


def text(report: Mapping[str, Any]) -> str:
    """The whole report; last, a sentence for all that is not reordered or not quantised."""
    parts = [
        _head(report),
        _linear_table(report["linears"]),
        _group_table(feeding(report["groups"])),
        _list("warnings", report["summary"]["warnings"]),
        _list("not reordered", [f"{name}: {why}" for name, why in not_reordered(report)]),
        _list("not quantised", [f"{name}: {why}" for name, why in not_quantised(report)]),
    ]
    return "\n".join(part for part in parts if part)


def feeding(groups: Iterable[Entry]) -> list[Entry]:
    """The groups that order the input of a linear; the others cost nothing where they stay."""
    return [group for group in groups if group["feeds"]]


def not_reordered(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What keeps its order, folded, each with its sentence."""
    groups = [group for group in feeding(report["groups"]) if not group["accepted"]]
    lonely = [
        {**linear, "reason": "its input belongs to no group of axes"}
        for linear in report["linears"]
        if linear["route"] != "keep" and linear["group"] is None
    ]
    return _reasons([*groups, *lonely])


def not_quantised(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The linears that stay in their own precision, folded, each with its sentence."""
    return _reasons([linear for linear in report["linears"] if linear["route"] == "keep"])


def fold(entries: Iterable[Entry], key: Callable[[Entry], Any]) -> list[Fold]:
    """Entries with the same ``key`` and the same name up to the block's index, as one."""
    together: dict[Any, list[Entry]] = {}
    for entry in entries:
        prefix, index, rest = split(entry["name"])
        together.setdefault((prefix, index is None, rest, key(entry)), []).append(entry)
    return [Fold(_folded_name(part), tuple(part)) for part in together.values()]


def split(name: str) -> tuple[str, int | None, str]:
    """("transformer_blocks.", 3, ".attn.to_q"): a name around its first index, if it has one."""
    parts = name.split(".")
    for position, part in enumerate(parts):
        if position and part.isascii() and part.isdigit():
            prefix, rest = ".".join(parts[:position]), parts[position + 1 :]
            return f"{prefix}.", int(part), "".join(f".{piece}" for piece in rest)
    return name, None, ""


def ranges(indices: Iterable[int]) -> str:
    """``{0..3,7}``; a single index stands alone."""
    runs: list[list[int]] = []
    for index in sorted(set(indices)):
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    shown = ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}..{r[-1]}" for r in runs)
    return shown if shown.isdigit() else f"{{{shown}}}"


def size(count: int) -> str:
    """Bytes for people: ``6.4 GiB``."""
    value = float(count)
    for unit in ("bytes", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def change(before: float | None, after: float | None) -> str:
    """``-17.5%``."""
    if not before or after is None:
        return "-"
    shown = f"{after / before - 1:+.1%}"
    return "0.0%" if shown in ("+0.0%", "-0.0%") else shown


def _folded_name(entries: Sequence[Entry]) -> str:
    prefix, index, rest = split(entries[0]["name"])
    if index is None:
        return prefix
    indices = (split(entry["name"])[1] for entry in entries)
    return f"{prefix}{ranges(i for i in indices if i is not None)}{rest}"


def _reasons(entries: Iterable[Entry]) -> list[tuple[str, str]]:
    """(names, sentence): each sentence once; blocks fold also where theirs differ in numbers."""
    names: dict[str, list[str]] = {}
    for part in fold(entries, lambda entry: NUMBER.sub("0", _of_any_block(entry))):
        why = _sentence(_merged(map(_of_any_block, part.entries)))
        names.setdefault(why, []).append(part.name)
    return [(", ".join(shared), why) for why, shared in names.items()]


def _of_any_block(entry: Entry) -> str:
    """The entry's reason; where it names the entry's own block, ``*`` stands for the index."""
    prefix, index, _ = split(entry["name"])
    reason = str(entry["reason"])
    return reason if index is None else reason.replace(f"{prefix}{index}.", f"{prefix}*.")


def _merged(sentences: Iterable[str]) -> str:
    """Sentences that differ in numbers alone as one: ``gain -0.2..1.9% is not above tau 2.0%``."""
    same = list(dict.fromkeys(sentences))
    pieces = NUMBER.split(same[0])
    columns = zip(*(NUMBER.findall(sentence) for sentence in same), strict=True)
    numbers = [sorted(set(column), key=float) for column in columns]
    spans = [f"{n[0]}..{n[-1]}" if len(n) > 1 else n[0] for n in numbers]
    return "".join(a + b for a, b in zip(pieces, [*spans, ""], strict=True))


def _sentence(reason: str) -> str:
    return reason if reason.endswith((".", "!", "?")) else f"{reason or 'no reason was given'}."


def _head(report: Mapping[str, Any]) -> str:
    summary = report["summary"]
    before, after = summary["weight_bytes_before"], summary["weight_bytes_after"]
    smaller = f" ({before / after:.2f} times smaller)" if after else ""
    recipe = f"recipe {summary['recipe']}, format {summary['format']}, scheme {summary['scheme']}"
    lines = [
        f"permuquant: {summary['phase']}",
        f"  {recipe}",
        f"  linears      {summary['linears_quantised']} of {summary['linears_total']} quantised, "
        f"{summary['linears_reordered']} reordered; "
        f"{summary['free_flop_share']:.1%} of block FLOPs free to reorder",
        f"  weights      {size(before)} -> {size(after)}{smaller}",
    ]
    if summary["error_before"] is not None:
        errors = summary["error_before"], summary["error_after"]
        lines.append(f"  error        {error(errors[0])} -> {error(errors[1])} ({change(*errors)})")
    lines.append(f"  calibration  {summary['calibration_calls']} calls")
    if report["memory"]:
        shown = ", ".join(f"{what} {size(count)}" for what, count in report["memory"].items())
        lines.append(_wrap(shown, "  memory       ", " " * 15))
    if report["timings"]:
        shown = ", ".join(f"{step} {taken:.1f} s" for step, taken in report["timings"].items())
        lines.append(_wrap(shown, "  time         ", " " * 15))
    return "\n".join([*lines, ""])


def _linear_table(linears: Sequence[Entry]) -> str:
    folds = fold(linears, lambda e: (e["in_features"], e["out_features"], e["route"]))
    heads = ("linear", "in x out", "route", "reordered", "error", "after", "change")
    rows = [
        (
            part.name,
            f"{part.entries[0]['in_features']} x {part.entries[0]['out_features']}",
            part.entries[0]["route"],
            part.reordered(),
            *_errors(part),
        )
        for part in folds
    ]
    return _table(heads, (13, 5, 9, 8, 8, 7), rows)


def _group_table(groups: Sequence[Entry]) -> str:
    folds = fold(groups, lambda e: (e["structure"], e["free"]))
    heads = ("group of axes", "channels", "reordered", "error", "best", "change")
    rows = [
        (
            part.name,
            part.entries[0]["structure"],
            part.reordered(),
            *_errors(part),
        )
        for part in folds
    ]
    return _table(heads, (13, 9, 8, 8, 7), rows)


def _errors(part: Fold) -> tuple[str, str, str]:
    before, after = part.mean("error_before"), part.mean("error_after")
    return error(before), error(after), change(before, after)


def _table(heads: Sequence[str], widths: Sequence[int], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    wide = WIDTH - sum(widths) - len(widths)
    lines = [_row(heads, wide, widths), "-" * WIDTH]
    return "\n".join([*lines, *(_row(row, wide, widths) for row in rows), ""])


def _row(cells: Sequence[str], wide: int, widths: Sequence[int]) -> str:
    """One line; a name that is wider than its column has a line of its own."""
    name, *values = cells
    right = "".join(f" {value:>{width}}" for value, width in zip(values, widths, strict=True))
    if len(name) <= wide:
        return f"{name:<{wide}}{right}"
    return f"{_wrap(name, '', '    ')}\n{'':<{wide}}{right}"


def _list(title: str, lines: Sequence[str]) -> str:
    if not lines:
        return ""
    return "\n".join([title, *(_wrap(line, "  ", "    ") for line in lines), ""])


def _wrap(line: str, first: str, following: str) -> str:
    return "\n".join(
        textwrap.wrap(
            line, WIDTH, initial_indent=first, subsequent_indent=following, break_on_hyphens=False
        )
    )
