"""How far a quantised model is from the original, and the table that says so."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """One line of the table: what a method did and how far it is from the original."""

    method: str
    linears_total: int
    linears_quantised: int
    groups_found: int
    groups_free: int
    groups_accepted: int
    weight_bytes_before: int
    weight_bytes_after: int
    velocity_error: float  # mean of |v_q - v|^2 / |v|^2
    psnr: float  # dB, mean over the pictures


def velocity_error(
    call: Callable[[Tensor, float], Tensor], reference: Iterable[tuple[Tensor, float, Tensor]]
) -> float:
    """Mean over states and samples of |v_q - v|^2 / |v|^2, where ``reference`` holds (z, t, v)."""
    errors = [
        (call(z, t) - v).square().sum((1, 2)) / v.square().sum((1, 2)) for z, t, v in reference
    ]
    return float(torch.cat(errors).mean())


def psnr(original: Tensor, other: Tensor) -> float:
    """Mean over pictures [B, 3, H, W] in [-1, 1] of 10 log10(peak^2 / mean squared error), dB."""
    error = (original.clamp(-1, 1) - other.clamp(-1, 1)).square().mean((1, 2, 3))
    return float((10 * torch.log10(4 / error)).mean())


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most ``count`` of ``items``, evenly spaced, the first among them."""
    stride = max(1, -(-len(items) // count))
    return list(items[::stride])


def method_name(recipe: str) -> str:
    return recipe if recipe in ("rtn", "permuquant") else f"permuquant ({recipe})"


def table_row(method: str, facts: dict[str, Any], error: float, decibels: float) -> Row:
    """A row from ``Report.to_dict()`` and the two measures."""
    summary = facts["summary"]
    return Row(
        method=method,
        linears_total=summary["linears_total"],
        linears_quantised=summary["linears_quantised"],
        groups_found=len(facts["groups"]),
        groups_free=sum(not group["pinned_by"] for group in facts["groups"]),
        groups_accepted=len({row["group"] for row in facts["linears"] if row["accepted"]}),
        weight_bytes_before=summary["weight_bytes_before"],
        weight_bytes_after=summary["weight_bytes_after"],
        velocity_error=error,
        psnr=decibels,
    )


def table(rows: Sequence[Row]) -> str:
    """The rows as text, columns aligned."""
    head = (
        "method",
        "linears lowered",
        "groups found",
        "free",
        "accepted",
        "weights",
        "velocity error",
        "PSNR",
    )
    body = [
        (
            row.method,
            f"{row.linears_quantised} of {row.linears_total}",
            str(row.groups_found),
            str(row.groups_free),
            str(row.groups_accepted),
            f"{row.weight_bytes_before / 1e6:.1f} -> {row.weight_bytes_after / 1e6:.1f} MB",
            f"{row.velocity_error:.5f}",
            f"{row.psnr:.2f} dB",
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in (head, *body)
    )
