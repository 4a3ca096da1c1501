"""Which code multiplies: one table, read from the top; the first row that serves is taken.

A *scheme* is what is computed (4-bit weights by activations in 4, 8 or 16 bits), a *route* how.
``auto`` is the scheme that is fastest on a device; the option ``route`` names another row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .errors import Refused
from .formats import NVFP4
from .kernels import FP4_SINCE
from .options import Options
from .plan import Linear
from .rows import Target

OLDEST_TRITON = (3, 6)
FP8 = ((8, 9), (9, 0))
"""Capabilities without FP4 units whose vendor GEMM takes e4m3 with a scale a row and a column."""

FEW_ROWS, MANY_ROWS = 16, 256


class Where(NamedTuple):
    """What a route depends on."""

    capability: tuple[int, int] | None  # of the CUDA device; None elsewhere
    triton: tuple[int, ...]
    format: str
    dtype: torch.dtype  # of the activation
    rows: int | None = None  # None: not known when the graph is compiled


@dataclass(frozen=True)
class Route:
    """One row of the table."""

    name: str  # what the option ``route`` calls it
    scheme: str
    kind: str  # of the kernel, or of the scratch, that multiplies
    target: Target | None = None  # what activations are quantised to before it; None: nothing

    def serves(self, where: Where) -> bool:
        """Whether this code runs there."""
        if self.kind == "reference":
            return True
        c, rows = where.capability, where.rows
        if c is None or c < (8, 0) or where.triton < OLDEST_TRITON or where.format != NVFP4.name:
            return False
        match self.kind:
            case "fp8":
                return c in FP8 and where.dtype == torch.bfloat16
            case "half":
                return where.dtype == torch.bfloat16 and (rows is None or rows > FEW_ROWS)
            case "w4a4_native" | "w4a4_fastest":
                halves = where.dtype in (torch.bfloat16, torch.float16)
                reached = c in FP4_SINCE and where.triton >= FP4_SINCE[c]
                return reached and (halves or self.kind == "w4a4_native")
            case "w4a16_vector":
                return rows is not None and rows <= FEW_ROWS
            case _:
                return True


TABLE = (
    Route("fp8", "w4a8", "fp8", "fp8"),
    Route("reference", "w4a8", "reference"),
    Route("native", "w4a4", "w4a4_native", "nvfp4"),
    Route("fastest", "w4a4", "w4a4_fastest", "nvfp4"),
    Route("half", "w4a4", "half", "nvfp4_half"),
    Route("in_loop", "w4a4", "w4a4_portable", "nvfp4"),
    Route("fp8", "w4a4", "fp8", "nvfp4_fp8"),
    Route("reference", "w4a4", "reference"),
    Route("vector", "w4a16", "w4a16_vector"),
    Route("half", "w4a16", "half"),
    Route("in_loop", "w4a16", "w4a16_portable"),
    Route("reference", "w4a16", "reference"),
)
"""fp8 under w4a4 is an emulation, within 2.5 % of the exact product: never taken unasked."""


def choose(scheme: str, where: Where, wish: str = "auto") -> Route:
    """The row of ``scheme`` that is named ``wish`` if it serves; else the first one that does."""
    rows = [row for row in TABLE if row.scheme == scheme and row.serves(where)]
    if any(row.name == wish for row in rows):
        return next(row for row in rows if row.name == wish)
    if scheme == "w4a16" and where.rows is not None and where.rows <= MANY_ROWS:
        rows = [row for row in rows if row.kind != "half"] or rows
    return rows[0]


@cache
def at(
    device: torch.device, format: str, dtype: torch.dtype, rows: int, scheme: str, wish: str
) -> Route:
    """``choose`` for a tensor on ``device``; looked up, as it is asked at every call."""
    return choose(scheme, here(device, format, dtype, rows), wish)


def here(device: torch.device, format: str, dtype: torch.dtype, rows: int | None = None) -> Where:
    """``Where`` of a tensor on ``device``, with the Triton that is installed."""
    cuda = device.type == "cuda" and torch.cuda.is_available()
    capability = torch.cuda.get_device_capability(device) if cuda else None
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    return Where(capability, version, format, dtype, rows)


def settle(options: Options, where: Where) -> Options:
    """``options`` with ``auto`` replaced by the scheme for this place.

    Raises ``Refused`` for a route that no scheme has there.
    """
    scheme = options.scheme
    if scheme == "auto":
        scheme = _fastest(where)
    known = {row.name for row in TABLE if row.scheme == scheme and row.serves(where)}
    if options.route not in ("auto", *known):
        raise Refused(
            f"permuquant: route={options.route!r} does not serve {scheme} in {where.dtype} on "
            f"{_device(where)}; there: {', '.join(sorted(known))}"
        )
    return replace(options, scheme=scheme)


def settle_for(
    options: Options, linears: Sequence[Linear], tensors: Mapping[str, Tensor]
) -> Options:
    """``settle`` where the weights of ``linears`` are; as it is if none of them is at hand."""
    known = (tensors[one.weight] for one in linears if one.weight in tensors)
    weight = next(known, None)
    if weight is None:
        return options
    return settle(options, here(weight.device, options.format, weight.dtype))


def _fastest(where: Where) -> str:
    if where.capability is None:
        return "w4a4"
    for scheme, kind in (("w4a4", "w4a4_native"), ("w4a8", "fp8")):
        if any(r.scheme == scheme and r.kind == kind and r.serves(where) for r in TABLE):
            return scheme
    return "w4a4" if where.format != NVFP4.name or where.dtype != torch.bfloat16 else "w4a16"


def _device(where: Where) -> str:
    if where.capability is None:
        return "a device without CUDA"
    return "a device of compute capability {}.{}".format(*where.capability)
