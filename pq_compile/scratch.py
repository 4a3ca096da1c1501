"""NVFP4 weights decoded into a scratch, which the vendor's GEMM then multiplies by.

On GPUs without FP4 units this is the fastest road: a kernel that decodes inside its loop over K
reaches a third of the rate. The scratch lives for one product and holds at most the weights of one
product; the caching allocator hands the same memory to the next.

    fp8   a sixth of element * scale in e4m3, six times the tensor scale beside it
    half  element * scale in bfloat16, exactly, the tensor scale beside it
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .formats import NVFP4
from .generated import Launch, Spec, empty, remember, spec
from .rows import fold
from .scratch_text import DecodeKernel, Precision, load

LONG = 8192
"""Channels from which sums need the slow accumulation, 7 % slower there: the fast one keeps some 14
bits, measured on a Hopper GPU as a relative error of 2e-3 at 3072 channels and 3e-3 at 12288."""

SIDE = 16
"""Outputs that the vendor's fp8 product takes at a time."""

MOST_PARTS = 4
"""Weights that one launch decodes."""


Weight = tuple[Tensor, Tensor, Tensor]


def decode(
    weights: Sequence[Weight],
    biases: Sequence[Tensor],
    precision: Precision,
    *factor: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``decode_reference`` by one kernel, bit for bit; ``factor`` [] is of every row as well."""
    packed = weights[0][0]
    shapes, dtypes = [w[0].shape for w in weights], [b.dtype for b in biases]
    key = (precision, packed.device, len(factor), *shapes, *dtypes)
    plan = _PLANS.get(key)
    if plan is None:
        plan = remember(_PLANS, key, _plan(weights, biases, precision, bool(factor)))
    launch, specs = plan
    out, column, *joined = [empty(one, packed.device) for one in specs]
    bias = joined[0] if joined else biases[0] if biases else None
    arguments: list[Tensor] = []
    addresses = 0
    for i, weight in enumerate(weights):
        arguments += weight
        arguments.append(biases[i] if joined else weight[2])
        addresses |= arguments[-1].data_ptr()
    launch([*arguments, out, column, joined[0] if joined else column, *factor], addresses)
    return out, column, bias


_PLANS: dict[Any, tuple[Launch, list[Spec]]] = {}


def _plan(
    weights: Sequence[Weight], biases: Sequence[Tensor], precision: Precision, factor: bool
) -> tuple[Launch, list[Spec]]:
    """The launch, and what it writes: the weights, their factors, and biases laid side by side."""
    packed = weights[0][0]
    outputs, k = tuple(len(w[0]) for w in weights), 2 * packed.shape[1]
    fast, joined = precision == "fp8" and packed.is_cuda, len(weights) > 1 and bool(biases)
    kernel = DecodeKernel(precision, k, outputs, joined, factor, instruction=fast)
    launch = Launch(load(kernel), (sum(kernel.blocks),), num_warps=kernel.warps)
    n, dtype = sum(outputs), torch.float8_e4m3fn if precision == "fp8" else torch.bfloat16
    specs = [spec((n, k), dtype), spec((1, n), torch.float32)]
    return launch, [*specs, *([spec((n,), biases[0].dtype)] if joined else [])]


def decode_reference(
    weights: Sequence[Weight],
    biases: Sequence[Tensor],
    precision: Precision,
    *factor: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weights [N_i, K] below each other, [N, K]; the factor of each of those rows, fp32 [1, N],
    times ``factor`` [] if one is given; and the biases [N].
    """
    found, columns = [], []
    for packed, scales, tensor_scale in weights:
        if precision == "fp8":
            found.append(fold(NVFP4.unpack(packed), scales))
        else:
            found.append(NVFP4.decode(packed, scales).to(torch.bfloat16))
        times = 6.0 if precision == "fp8" else 1.0
        columns.append((tensor_scale * times).expand(len(packed)))
    column = torch.cat(columns)[None]
    for one in factor:
        column = column * one
    return torch.cat(found), column, torch.cat(list(biases)) if biases else None


def matmul_fp8(
    a: Tensor, a_scale: Tensor, weights: Sequence[Weight], biases: Sequence[Tensor]
) -> Tensor:
    """``a`` e4m3 [M, K] with scales [M, 1] by the weights: bfloat16 [M, N], on sm_89 and sm_90."""
    w, column, bias = decode(weights, biases, "fp8")
    n = len(w)
    if n % SIDE:
        w, column, bias = _widened(w, column, bias, -n % SIDE)
    y = torch._scaled_mm(
        a,
        w.t(),
        scale_a=a_scale,
        scale_b=column,
        bias=bias if bias is None else bias.to(torch.bfloat16),
        out_dtype=torch.bfloat16,
        use_fast_accum=a.shape[1] <= LONG,
    )
    return y[:, :n].contiguous() if n % SIDE else y


def _widened(
    w: Tensor, column: Tensor, bias: Tensor | None, missing: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``missing`` outputs more, all zero: the vendor's product has them by ``SIDE``."""
    wide = pad(w.view(torch.uint8), (0, 0, 0, missing)).view(w.dtype)
    return wide, pad(column, (0, missing)), None if bias is None else pad(bias, (0, missing))


def matmul_half(
    a: Tensor, scale: Sequence[Tensor], weights: Sequence[Weight], biases: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """fp32 [M, N] products of ``a`` [M, K] in bfloat16, the factor that each column still lacks,
    the tensor scale of ``a`` included if there is one, and the bias.
    """
    w, column, bias = decode(weights, biases, "half", *scale)
    return torch.mm(a, w.t(), out_dtype=torch.float32), column, bias
