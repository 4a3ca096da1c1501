"""The kernels that are bound by memory, as shares of a device-to-device copy in the same run.

Counted is each input read once and each output written once; buffers rotate beyond the L2 cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pq_compile import ops, scratch
from pq_compile.rows import Program, parse

from . import timing
from .operands import bytes_of, weight

Record = dict[str, Any]

WIDTH = 3072
LARGE_COPY = 2 << 30  # bytes read and written by the copy that all are compared with

MODULATE = "row {k} | sample {k} | sample {k} | layer_norm 0 1e-06 | add 1 1.0 | mul 3 4 | add 5 2"
RESIDUAL = (
    "row {k} | row {k} | sample {k} | sample {k} | sample {k} | mul 1 2 | add 0 5 | "
    "layer_norm 6 1e-06 | add 3 1.0 | mul 7 8 | add 9 4 | keep 6 bfloat16"
)
HALF_FULL = "row {k} | row {4k} | gelu_tanh 1"

PROGRAMS = {
    "norm + modulate": MODULATE + " | {target} 6",
    "gate * y + residual + norm + modulate": RESIDUAL + " | {target} 10",
    "GELU": "row {4k} | gelu_tanh 0 | {target} 1",
    "attention, GELU side by side": HALF_FULL + " | {target} 0 2",
    "no producer": "row {k} | {target} 0",
}
"""What is computed of the rows before they are quantised: the producers of a FLUX block."""

CASES = (
    *((name, "fp8", 4608) for name in PROGRAMS),
    ("norm + modulate", "fp8", 512),
    *(
        (name, target, 4608)
        for target in ("nvfp4_fp8", "nvfp4_half", "nvfp4")
        for name in ("norm + modulate", "attention, GELU side by side")
    ),
)
"""(program, what it is quantised to, tokens); all pairs would compile for minutes."""

MATRICES = (
    (9216, 3072, "fp8"),
    (12288, 3072, "fp8"),
    (3072, 15360, "fp8"),
    (3072, 3072, "fp8"),
    (9216, 3072, "half"),
)
"""Weights [N, K] that are decoded, and to what."""


def program(text: str, width: int, target: str) -> Program:
    words = text.replace("{k}", str(width)).replace("{4k}", str(4 * width))
    return parse(words.replace("{target}", target))


def measure(
    device: str,
    cases: Sequence[tuple[str, str, int]] = CASES,
    matrices: Sequence[tuple[int, int, str]] = MATRICES,
    width: int = WIDTH,
    large: int = LARGE_COPY,
) -> Record:
    """GB/s of every kernel, its share of the large copy's, and of a copy of as many bytes."""
    copy = timing.copy_rate(large, device)
    table = [
        _row(f"{name} -> {target}", program(PROGRAMS[name], width, target), tokens, device, copy)
        for name, target, tokens in cases
    ]
    table += [_decoded(n, k, precision, device, copy) for n, k, precision in matrices]
    return {"copy_gb_per_s": copy, "copy_bytes": large, "kernels": table}


def _row(name: str, of: Program, m: int, device: str, copy: float) -> Record:
    text = str(of)

    def fresh() -> list[Tensor]:
        return [
            torch.randn(1, m if kind == "row" else 1, width, device=device).to(torch.bfloat16)
            for kind, width in of.inputs
        ]

    def call(given: list[Tensor]) -> Callable[[], list[Tensor]]:
        return lambda: ops.rows(given, text)

    return _record(name, [m, of.width], fresh, call, device, copy)


def _decoded(n: int, k: int, precision: Any, device: str, copy: float) -> Record:
    def fresh() -> list[Tensor]:
        return list(weight(n, k, device))

    def call(given: list[Tensor]) -> Callable[[], list[Tensor]]:
        packed, scales, tensor_scale = given
        return lambda: list(scratch.decode([(packed, scales, tensor_scale)], [], precision)[:2])

    return _record(f"decode -> {precision}", [n, k], fresh, call, device, copy)


def _record(
    name: str,
    shape: list[int],
    fresh: Callable[[], list[Tensor]],
    call: Callable[[list[Tensor]], Callable[[], list[Tensor]]],
    device: str,
    copy: float,
) -> Record:
    first = fresh()
    moved = bytes_of(*first, *call(first)())
    calls = [call(fresh()) for _ in range(timing.sets(moved))]
    found = timing.rotating(calls)
    rate = moved / found["median"] / 1e6
    return {
        "kernel": name,
        "shape": shape,
        "us": 1e3 * found["median"],
        "bytes": moved,
        "gb_per_s": rate,
        "share_of_copy": rate / copy,
        "share_of_equal_copy": rate / timing.copy_rate(moved, device),
    }
