"""Which kind of work a kernel does, told by its name: one table, read from the top.

Kernels of ours are Triton functions ``rows_*``, ``quantise*``, ``peak*``, ``decode_*`` and
``matmul_*``; those of Inductor begin with ``triton_``; the others are vendors' or PyTorch's own.
Where Inductor fuses a quantiser into elementwise work, as for the fp8 baseline, its kernel counts
as elementwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

KINDS = ("gemm", "attention", "elementwise", "quantise", "decode", "matvec", "other")

TABLE: tuple[tuple[str, str], ...] = (
    ("matvec", r"^matmul_w4a16_(vector|half|integer)"),
    ("gemm", r"^matmul_"),
    ("decode", r"^decode"),
    ("quantise", r"^(rows|quantise|peak)"),
    ("gemm", r"^triton_tem_.*(mm|conv)"),  # Inductor's templates
    ("attention", r"^triton_tem_.*attention"),
    ("elementwise", r"^triton_"),
    ("gemm", r"convolve|conv2d|cudnn::cnn|xmma_fprop|implicit_gemm|nchwToNhwc|nhwcToNchw"),
    ("attention", r"sdpa|flash|fmha|mem_eff|attention|cudnn"),
    ("matvec", r"gemv"),
    ("gemm", r"nvjet|cutlass|gemm|cublas|scaled_mm|splitk|s\d+x\d+x\d+"),
    (
        "elementwise",
        r"at::native|elementwise|vectorized|reduce_kernel|layer_norm|CatArray|RowwiseMoments|copy_",
    ),
)

FEW_ROWS = 16
"""Up to here a product reads weights and computes next to nothing: a matrix-vector product."""


class Launch(NamedTuple):
    """A kernel of one step: total milliseconds, launches, and the rows of its GEMM if known."""

    name: str
    milliseconds: float
    times: float
    rows: int | None = None


def kind(name: str, rows: int | None = None) -> str:
    """The kind of the kernel ``name``; ``rows`` are those of the product that launched it.

    A vendor's kernel for one row often has the name of any other GEMM (or is a split-K pair), so
    its name alone does not tell a matrix-vector product: the shapes that the profiler recorded of
    the operator that launched it do.
    """
    found = next((kind for kind, pattern in TABLE if re.search(pattern, name, re.IGNORECASE)), "")
    if found == "gemm" and rows is not None and rows <= FEW_ROWS:
        return "matvec"
    return found or "other"


def split(launches: Iterable[Launch]) -> dict[str, float]:
    """Milliseconds by kind, every kind present."""
    total = dict.fromkeys(KINDS, 0.0)
    for launch in launches:
        total[kind(launch.name, launch.rows)] += launch.milliseconds
    return total
