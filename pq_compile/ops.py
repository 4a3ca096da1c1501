"""The operators that lowered graphs call. One function each for every format, scheme and device.

    linear  x @ decode(W).T + bias
    rows    a row program: a fused chain that ends in quantised rows
    matmul  quantised rows by one or more weights that read them
    site    both in one: the rows, and every product of them

Where no row of the route table serves, the plain torch reference does: on the CPU, for the formats
other than NVFP4, on old devices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from . import kernels, products, routes, row_kernels
from .errors import Refused
from .formats import FORMATS, NVFP4, Format
from .rows import lead_of, parse, quantise_rows
from .rows import reference as rows_reference
from .scratch import Weight

QUANTISED = {"fp8": 2, "half": 2}  # tensors that the rows are for a kind of product; others: 3
SCHEMES = ("w4a4", "w4a8", "w4a16")
_library: Any = torch.library  # which has no types
LIBRARY = _library.Library("permuquant", "DEF")
LIBRARY.define(
    "linear(Tensor x, Tensor packed, Tensor scales, Tensor tensor_scale, Tensor? bias, str format,"
    ' str scheme, str route="auto") -> Tensor'
)
LIBRARY.define("rows(Tensor[] inputs, str program) -> Tensor[]")
LIBRARY.define(
    "matmul(Tensor[] a, Tensor[] packed, Tensor[] scales, Tensor[] tensor_scales, Tensor[] biases,"
    " str kind, ScalarType dtype) -> Tensor"
)
LIBRARY.define(
    "site(Tensor[] inputs, Tensor[] weights, Tensor[] biases, str program, str kind, int[] teams,"
    " int[] biased, ScalarType dtype) -> Tensor[]"
)


def linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    tensor_scale: Tensor,
    bias: Tensor | None,
    format: str,
    scheme: str,
    route: str = "auto",
) -> Tensor:
    """``x`` [..., K] times the packed weight [N, K], plus ``bias`` [N], in the dtype of ``x``.

    ``scheme`` "w4a4" quantises ``x`` in ``format``, its tensor scale that of this call; "w4a8" to
    e4m3 with a scale a row; "w4a16" leaves it. A weight padded to K' channels takes an ``x`` of K
    as if zeros followed it. Sums in fp32; in fp64 for an fp64 ``x`` where the reference computes.
    Raises ``Refused`` for an unknown format or scheme, and for a K that the weight doesn't have.
    """
    of = _checked(x, packed, format, scheme)
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    weight, biases = (packed, scales, tensor_scale), [] if bias is None else [bias]
    if x.numel() == 0 or packed.numel() == 0:
        how = routes.Route("reference", scheme, "reference")
    else:
        few = min(rows.shape[0], routes.MANY_ROWS + 1)
        how = routes.at(x.device, format, x.dtype, few, scheme, route)
    match how.kind:
        case "reference":
            y = reference(of, scheme, rows, weight, bias)
        case "w4a16_vector" | "w4a16_portable":
            kind: Any = how.kind
            y = kernels.matmul_w4a16(rows, weight, bias, kind)
        case _ if how.target is None:
            y = products.multiply([NVFP4.pad(rows)], [weight], biases, how.kind, x.dtype)
        case _:
            given = NVFP4.pad(rows.to(kernels.narrow(x.dtype)))
            a = row_kernels.run(f"row {given.shape[1]} | {how.target} 0", [given])
            y = products.multiply(a, [weight], biases, how.kind, x.dtype)
    return y.view(*x.shape[:-1], packed.shape[0])


def rows(inputs: Sequence[Tensor], program: str) -> list[Tensor]:
    """``rows.reference`` of the program spelled ``program``: quantised rows, then values kept."""
    if inputs[0].is_cuda:
        return row_kernels.run(program, inputs)
    return rows_reference(parse(program), inputs)


def matmul(
    a: Sequence[Tensor],
    packed: Sequence[Tensor],
    scales: Sequence[Tensor],
    tensor_scales: Sequence[Tensor],
    biases: Sequence[Tensor],
    kind: str,
    dtype: torch.dtype,
) -> Tensor:
    """[..., N] in ``dtype``: the quantised rows ``a`` by every weight, side by side, N in all.

    ``a`` as ``rows`` returns it for the target of ``kind``; ``biases`` one a weight, or none.
    """
    weights = list(zip(packed, scales, tensor_scales, strict=True))
    first = a[0]
    flat = [x.view(-1, x.shape[-1]) if x.ndim > 2 else x for x in a]
    y = _product_of(first)(flat, weights, biases, kind, dtype)
    return y if first.ndim == 2 else y.view(*first.shape[:-1], y.shape[1])


def site(
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    program: str,
    kind: str,
    teams: Sequence[int],
    biased: Sequence[int],
    dtype: torch.dtype,
) -> list[Tensor]:
    """``rows`` of the program, then ``matmul`` of them with each team of weights; the products
    [..., N], then the values kept.

    ``weights``: packed, scales and tensor scale of each; ``teams`` says how many belong together,
    ``biased`` how many of the ``biases`` are theirs.
    """
    quantised: list[Tensor]
    if inputs[0].is_cuda:
        quantised, kept, lead = row_kernels.run_flat(program, inputs)
    else:
        made, split = rows(inputs, program), QUANTISED.get(kind, 3)
        kept, lead = made[split:], tuple(made[0].shape[:-1])
        quantised = [x.reshape(-1, x.shape[-1]) if x.ndim else x for x in made[:split]]
    multiply = _product_of(quantised[0])
    found, first, bias = [], 0, 0
    for count, several in zip(teams, biased, strict=True):
        team = [
            (weights[i], weights[i + 1], weights[i + 2]) for i in range(first, first + 3 * count, 3)
        ]
        y = multiply(quantised, team, biases[bias : bias + several], kind, dtype)
        found.append(y.view(*lead, y.shape[1]))
        first, bias = first + 3 * count, bias + several
    return [*found, *kept]


def _product_of(rows: Tensor) -> Callable[..., Tensor]:
    """What multiplies quantised ``rows``; kernels and vendors take none of no rows."""
    return products.multiply if rows.is_cuda and rows.numel() else products.reference


def where(device: torch.device, format: str, scheme: str, rows: int, dtype: Any = None) -> str:
    """The kind of the route that ``linear`` takes unasked."""
    return routes.choose(scheme, routes.here(device, format, dtype or torch.bfloat16, rows)).kind


def specs(
    device: torch.device, format: str, scheme: str, rows: int, **shape: Any
) -> tuple[kernels.KernelSpec, ...]:
    """The kernels with a ``KernelSpec`` that ``linear`` launches for a product of ``shape`` (k, n,
    dtype, bias).
    """
    kind: Any = where(device, format, scheme, rows, shape["dtype"])
    if not kind.startswith("w4a"):
        return ()
    capability = torch.cuda.get_device_capability(device)
    shape["dtype"] = kernels.narrow(shape["dtype"])
    if scheme == "w4a16":
        return (kernels.tuned(kind, capability, rows, **shape),)
    return (kernels.tuned(kind, capability, rows, **shape | {"k": NVFP4.padded(shape["k"])}),)


def reference(of: Format, scheme: str, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """``linear`` of ``x`` [M, K] in plain torch, without making codes of the activation.

    Element times scale is what is multiplied; the tensor scales come after the sum.
    """
    if scheme == "w4a8" and of is NVFP4:
        biases = [] if bias is None else [bias]
        return products.reference(quantise_rows(of.pad(x)), [weight], biases, "fp8", x.dtype)
    wide = torch.promote_types(x.dtype, torch.float32)
    dtype, k, scale = x.dtype, x.shape[1], weight[2]
    if scheme == "w4a8":
        codes, row_scale = quantise_rows(x)
        x = codes.to(wide) * row_scale
    if scheme == "w4a4":
        x = of.pad(x)
        scales, tensor_scale = of.scales(x)
        x = of.times(of.elements(x, scales, tensor_scale), scales)[:, :k]
        scale = scale * tensor_scale
    w = of.decode(weight[0], weight[1])[:, :k]
    y = torch.mm(x.to(wide), w.to(wide).T).mul_(scale)
    return (y if bias is None else y.add_(bias)).to(dtype)


def _checked(x: Tensor, packed: Tensor, format: str, scheme: str) -> Format:
    if format not in FORMATS:
        raise Refused(f"permuquant: no format {format!r}; there are {', '.join(FORMATS)}")
    if scheme not in SCHEMES:
        raise Refused(f"permuquant: no scheme {scheme!r}; there are {', '.join(SCHEMES)}")
    of = FORMATS[format]
    channels = packed.shape[-1] * 8 // of.bits
    if x.ndim == 0 or of.padded(x.shape[-1]) != channels:
        raise Refused(
            f"permuquant: a {format} weight of {channels} channels does not fit an input of shape "
            f"{list(x.shape)}; its last dimension must be {channels}, or fewer by less than "
            f"{of.group}"
        )
    return of


# ---------------------------------------------------------------- registration


def _fake_linear(x: Tensor, packed: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


def _fake_rows(inputs: Sequence[Tensor], program: str) -> list[Tensor]:
    return row_kernels.outputs(parse(program), lead_of(inputs), inputs[0])


def _fake_matmul(a: Sequence[Tensor], packed: Sequence[Tensor], *rest: Any) -> Tensor:
    n = sum(weight.shape[0] for weight in packed)
    return a[0].new_empty((*a[0].shape[:-1], n), dtype=rest[-1])


def _fake_site(
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    program: str,
    kind: str,
    teams: Sequence[int],
    biased: Sequence[int],
    dtype: torch.dtype,
) -> list[Tensor]:
    parsed, lead = parse(program), lead_of(inputs)
    widths = [weight.shape[0] for weight in weights[::3]]
    ends = list(accumulate(teams, initial=0))
    sizes = [sum(widths[a:b]) for a, b in pairwise(ends)]
    found = [inputs[0].new_empty((*lead, size), dtype=dtype) for size in sizes]
    return found + row_kernels.outputs(parsed, lead, inputs[0])[QUANTISED.get(kind, 3) :]


for name, function, fake in (
    ("linear", linear, _fake_linear),
    ("rows", rows, _fake_rows),
    ("matmul", matmul, _fake_matmul),
    ("site", site, _fake_site),
):
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    _library.register_fake(f"permuquant::{name}", fake, lib=LIBRARY)
