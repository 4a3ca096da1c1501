"""A report as one HTML page: nothing is loaded, nothing needs scripts, every name is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from . import svg
from .html_table import breakable, cell, error_cells, html_table, name_cell, number_cell
from .page_assets import SCRIPT, STYLE
from .plan import Group, Groups, Plan
from .show import error
from .table import Fold, change, feeding, fold, not_quantised, not_reordered, size

FIGURES, LEAVES = 12, 4  # accepted groups drawn, and leaves of each

Report = Mapping[str, Any]
Units = Sequence[tuple[Plan, Groups]]


def page(report: Report, units: Units) -> str:
    """The whole page, from ``Report.to_dict()`` and what its figures are drawn from."""
    parts = {
        "Overview": _cards(report) + _warnings(report),
        "By kind of block": _kinds(report),
        "Axis groups of a block": _blocks(units),
        "Permutations": _permutations(units),
        "Groups": _groups(report),
        "Linears": _linears(report),
        "Not reordered": _reasons(
            not_reordered(report), "Every group that feeds a linear is reordered."
        ),
        "Not quantised": _reasons(not_quantised(report), "Every linear is."),
        "Memory and time": _costs(report),
    }
    parts = {title: body for title, body in parts.items() if body}
    links = "".join(f'<a href="#{_anchor(title)}">{title}</a>' for title in parts)
    sections = "".join(
        f'<section id="{_anchor(title)}"><h2>{title}</h2>{body}</section>\n'
        for title, body in parts.items()
    )
    summary = report["summary"]
    line = f"recipe {summary['recipe']} · format {summary['format']} · scheme {summary['scheme']}"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>permuquant report</title>\n<style>{STYLE}</style></head>\n<body>\n"
        f'<header><h1>permuquant <span class="phase">{escape(summary["phase"])}</span></h1>'
        f"<p>{escape(line)}</p><nav>{links}</nav></header>\n<main>\n{sections}</main>\n"
        f"<script>{SCRIPT}</script>\n</body></html>\n"
    )


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _cards(report: Report) -> str:
    summary = report["summary"]
    before, after = summary["weight_bytes_before"], summary["weight_bytes_after"]
    errors = summary["error_before"], summary["error_after"]
    share = f"{summary['free_flop_share']:.1%}"
    cards = [
        (
            f"{summary['linears_quantised']} / {summary['linears_total']}",
            "linears quantised",
            f"{summary['linears_reordered']} reordered",
        ),
        (share, "of block FLOPs free", "linears that read an axis nothing pins"),
        (
            f"{before / after:.2f}×" if after else "-",
            "smaller weights",
            f"{size(before)} → {size(after)}",
        ),
        (
            change(*errors),
            "output error by reordering",
            f"{error(errors[0])} → {error(errors[1])}, mean by FLOPs",
        ),
        (str(summary["calibration_calls"]), "calibration calls", "observed in own precision"),
    ]
    return f'<div class="cards">{"".join(map(_card, cards))}</div>'


def _card(card: tuple[str, str, str]) -> str:
    figure, what, note = map(escape, card)
    return f'<div class="card"><b>{figure}</b><span>{what}</span><small>{note}</small></div>'


def _warnings(report: Report) -> str:
    items = "".join(f"<li>{escape(warning)}</li>" for warning in report["summary"]["warnings"])
    return f'<div class="warnings"><h3>Warnings</h3><ul>{items}</ul></div>' if items else ""


def _kinds(report: Report) -> str:
    folds = fold(report["linears"], lambda e: (e["in_features"], e["out_features"], e["route"]))
    top = max((part.mean("error_before") or 0 for part in folds), default=0)
    return _key() + html_table(
        ["linear", "in × out", "route", "reordered", "before", "after", "change", "error"],
        [_kind(part, top) for part in folds],
    )


def _kind(part: Fold, top: float) -> list[str]:
    first, before, after = part.entries[0], part.mean("error_before"), part.mean("error_after")
    return [
        name_cell(part.name),
        number_cell(f"{first['in_features']} × {first['out_features']}", first["in_features"]),
        cell(first["route"]),
        number_cell(part.reordered(), sum(entry["accepted"] for entry in part.entries)),
        *error_cells(before, after, top),
    ]


def _key() -> str:
    return (
        '<p class="key"><svg class="bars" viewBox="0 0 24 15" style="width:24px" '
        'aria-hidden="true"><rect class="before" x="1" y="1.5" width="20" height="4.5"/>'
        '<rect class="after" x="1" y="8.5" width="15" height="5"/></svg> '
        "Relative squared output error on held-out rows: outlined before reordering, "
        "filled after.</p>"
    )


def _blocks(units: Units) -> str:
    drawn = [svg.block(plan, groups) for plan, groups in units]
    seen = {block.name: block for block in reversed(drawn) if block.modules}
    return "".join(_block(block) for block in reversed(seen.values()))


def _block(block: svg.Block) -> str:
    rows = [
        [
            f'<td class="hue{i % 8}"><b class="rail-letter">{svg.letter_of(i)}</b></td>',
            name_cell(group.name),
            cell(group.structure),
            f'<td class="why">{escape(_state(group, block))}</td>',
        ]
        for i, group in enumerate(block.groups)
    ]
    modules, more = block.left_out
    note = f"<p>Not drawn: modules {modules}, groups {more}.</p>" if modules + more else ""
    return (
        f"<h3>{escape(block.name or 'the model')}</h3>"
        '<p class="key">One rail is one permutation (or one per head). An arrow into a box reads '
        "that order, an arrow onto a rail writes it, a dot moves along. Thick: reordered. "
        "Thin: free. Dashed: pinned.</p>"
        f'<div class="beside"><div class="figure">{svg.rails(block)}{note}</div>'
        f"{html_table(['rail', 'first axis', 'channels', 'state'], rows)}</div>"
    )


def _state(group: Group, block: svg.Block) -> str:
    if group.pinned_by:
        return f"pinned by {'; '.join(group.pinned_by)}"
    return "free, reordered" if group.name in block.accepted else "free, order kept"


def _permutations(units: Units) -> str:
    accepted = [
        {"name": verdict.group, "plan": plan, "group": group}
        for plan, groups in units
        for verdict in plan.verdicts
        for group in groups.groups
        if verdict.accepted and group.name == verdict.group
    ]
    if not accepted:
        return ""
    kinds = fold(accepted, lambda entry: entry["group"].structure)
    figures = "".join(_figure(part.entries[0]) for part in kinds[:FIGURES])
    left_out = len(accepted) - min(len(kinds), FIGURES)
    more = f" More reordered groups, not drawn: {left_out}." if left_out else ""
    return (
        '<p class="key">One dot is one channel: across, its place now; down, its place before. '
        f"Unmoved channels lie on the diagonal. Drawn is one group of each kind.{more}</p>"
        f'<div class="orders">{figures}</div>'
    )


def _figure(entry: Mapping[str, Any]) -> str:
    orders, group = entry["plan"].orders, entry["group"]
    leaves = [leaf for leaf in group.leaves if leaf in orders]
    drawn = "".join(svg.permutation(orders[leaf]) for leaf in leaves[:LEAVES])
    more = f", {LEAVES} drawn" if len(leaves) > LEAVES else ""
    caption = f"{breakable(group.name)}<br><small>{escape(group.structure)} channels{more}</small>"
    kind = "many" if len(leaves) > 1 else "one"
    return f'<figure><div class="{kind}">{drawn}</div><figcaption>{caption}</figcaption></figure>'


def _groups(report: Report) -> str:
    feeds = feeding(report["groups"])
    rest = len(report["groups"]) - len(feeds)
    top = _top(feeds)
    rows = [
        [
            name_cell(group["name"]),
            cell(group["structure"]),
            number_cell(str(len(group["axes"])), len(group["axes"])),
            number_cell(str(len(group["feeds"])), len(group["feeds"])),
            cell("accepted" if group["accepted"] else "free" if group["free"] else "pinned"),
            number_cell("-" if group["alpha"] is None else f"{group['alpha']:g}", group["alpha"]),
            *error_cells(group["error_before"], group["error_after"], top),
        ]
        for group in feeds
    ]
    heads = [
        "first axis",
        "channels",
        "axes",
        "linears fed",
        "state",
        "alpha",
        "before",
        "best order",
    ]
    note = f'<p class="key">Not listed: {rest} that feed no linear, so no error changes.</p>'
    return html_table([*heads, "change", "error"], rows, scroll=True) + (note if rest else "")


def _linears(report: Report) -> str:
    top = _top(report["linears"])
    rows = [
        [
            name_cell(linear["name"]),
            number_cell(
                f"{linear['in_features']} × {linear['out_features']}", linear["in_features"]
            ),
            cell(_route(linear)),
            number_cell(_bits(linear["bits_per_weight"]), linear["bits_per_weight"]),
            cell("reordered" if linear["accepted"] else "free" if linear["free"] else "pinned"),
            *error_cells(linear["error_before"], linear["error_after"], top),
            f'<td class="why">{escape(linear["reason"])}</td>',
        ]
        for linear in report["linears"]
    ]
    heads = ["linear", "in × out", "route", "bits", "input", "before", "after", "change", "error"]
    return html_table([*heads, "why"], rows, scroll=True)


def _route(linear: Mapping[str, Any]) -> str:
    """``w4a4, reference``: the route and the code that runs it, where that is known."""
    kernel = "" if linear["route"] == "keep" else linear["kernel"]
    return f"{linear['route']}, {kernel}" if kernel else str(linear["route"])


def _reasons(reasons: Iterable[tuple[str, str]], nothing: str) -> str:
    rows = [[name_cell(name), f'<td class="why">{escape(why)}</td>'] for name, why in reasons]
    if not rows:
        return f'<p class="key">{nothing}</p>'
    return html_table(["name", "reason"], rows)


def _costs(report: Report) -> str:
    memory = {what: (count, size(count)) for what, count in report["memory"].items()}
    seconds = {step: (taken, f"{taken:.1f} s") for step, taken in report["timings"].items()}
    return _costs_of("memory", memory) + _costs_of("step", seconds)


def _costs_of(head: str, costs: Mapping[str, tuple[float, str]]) -> str:
    top = max((value for value, _ in costs.values()), default=0) or 1
    rows = [
        [
            name_cell(what),
            number_cell(text, value),
            f'<td><svg class="bars" viewBox="0 0 152 15" aria-hidden="true"><rect class="after" '
            f'x="1" y="4" width="{150 * max(value, 0) / top:.1f}" height="7"/></svg></td>',
        ]
        for what, (value, text) in costs.items()
    ]
    return html_table([head, "", ""], rows) if rows else ""


def _top(entries: Iterable[Mapping[str, Any]]) -> float:
    return max((e[k] or 0 for e in entries for k in ("error_before", "error_after")), default=0)


def _bits(bits: float | None) -> str:
    return "-" if bits is None else f"{bits:.3g}"
