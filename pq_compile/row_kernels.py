"""Row programs on a device: the kernels of ``row_text``, loaded once and launched.

``run`` is ``rows.reference`` by one kernel, or by two where NVFP4 needs the peak of all rows first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from .generated import function
from .row_text import Phase, RowKernel, source
from .rows import Program, Target

WAVES = 8
"""Instances an SM is given at least, before one takes more rows."""

MOST_ROWS = 8


@cache
def load(kernel: RowKernel) -> Any:
    """The Triton function of ``kernel``."""
    return function(kernel.name, source(kernel))


@cache
def tuned(program: Program, phase: Phase, rows: int, instruction: bool, processors: int) -> RowKernel:
    """How many rows an instance takes and how many warps hold them, for ``rows`` in all."""
    widest = max(program.width, *program.widths)
    warps = 4 if widest <= 4096 else 8 if widest <= 8192 else 16
    each = 1
    while each < MOST_ROWS and rows >= 2 * each * WAVES * processors:
        each *= 2
    return RowKernel(program, phase, each, warps, instruction)


def run(program: Program, inputs: Sequence[Tensor]) -> list[Tensor]:
    """``rows.reference`` on a CUDA device (or by Triton's interpreter); same shapes and dtypes.

    Inputs need a last dimension of stride 1, or are copied. Codes equal the reference's but where
    the fp32 arithmetic of the steps, in another order, falls on the other side of a tie.
    """
    lead = torch.broadcast_shapes(*(x.shape[:-1] for x in inputs))
    x = inputs[0]
    samples, rows = (1, lead[0]) if len(lead) == 1 else (math.prod(lead[:-1]), lead[-1])
    results = outputs(program, lead, x)
    if samples * rows == 0:
        return results
    split = len(results) - len(program.kept)
    quantised, kept = results[:split], results[split:]
    given = [part for one in inputs for part in _strided(one, len(lead) + 1)]
    on_gpu = x.is_cuda
    how = (
        samples * rows,
        on_gpu and torch.cuda.get_device_capability(x.device) >= (8, 9),
        torch.cuda.get_device_properties(x.device).multi_processor_count if on_gpu else 1,
    )
    if program.target in ("fp8", "none"):
        written = map(_bytes, quantised)
        _launch(tuned(program, "once", *how), samples, rows, *given, *kept, *written)
        return results
    peak = torch.zeros((), dtype=torch.int32, device=x.device)
    _launch(tuned(program, "peak", *how), samples, rows, *given, *kept, peak)
    codes, scales, tensor = (_bytes(quantised[min(i, split - 1)]) for i in range(3))
    _launch(tuned(program, "codes", *how), samples, rows, *given, peak, codes, scales, tensor)
    return results


def outputs(program: Program, lead: Sequence[int], x: Tensor) -> list[Tensor]:
    """Room for what ``run`` returns, for rows of shape ``lead``, on the device of ``x``."""
    k = program.width
    quantised: dict[Target, list[tuple[tuple[int, ...], torch.dtype]]] = {
        "none": [],
        "fp8": [((*lead, k), torch.float8_e4m3fn), ((*lead, 1), torch.float32)],
        "nvfp4_fp8": [((*lead, k), torch.float8_e4m3fn), ((*lead, 1), torch.float32)],
        "nvfp4_half": [((*lead, k), torch.bfloat16), ((), torch.float32)],
        "nvfp4": [
            ((*lead, k // 2), torch.uint8),
            ((*lead, k // 16), torch.float8_e4m3fn),
            ((), torch.float32),
        ],
    }
    kept = [((*lead, program.widths[value]), dtype) for value, dtype in program.kept]
    return [x.new_empty(shape, dtype=dtype) for shape, dtype in [*quantised[program.target], *kept]]


def _bytes(x: Tensor) -> Tensor:
    """Kernels write the codes of e4m3 numbers, not the numbers."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def _strided(x: Tensor, rank: int) -> tuple[Tensor, int, int]:
    """An input, and its strides over samples and rows: 0 where it is shared."""
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        x = x.contiguous()
    sizes = (1,) * (rank - x.ndim) + tuple(x.shape)
    steps = (0,) * (rank - x.ndim) + x.stride()
    row = steps[-2] if sizes[-2] != 1 else 0
    sample = steps[0] if rank == 3 and sizes[0] != 1 else 0
    return x, sample, row


def _launch(kernel: RowKernel, samples: int, rows: int, *arguments: Any) -> None:
    grid = (triton.cdiv(rows, kernel.rows), samples)
    x = arguments[0]
    # NOTE a fused multiply-add would round a scale of NVFP4 once, its definition rounds twice.
    fuse = kernel.phase == "once" and kernel.instruction
    with torch.cuda.device(x.device.index if x.is_cuda else -1):
        load(kernel)[grid](*arguments, rows, num_warps=kernel.warps, enable_fp_fusion=fuse)
