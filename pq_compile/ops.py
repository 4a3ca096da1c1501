"""``permuquant::linear``, the operator that lowered graphs call: ``x @ decode(W).T + bias``.

One function for every format, scheme and device. Where no kernel of the route table serves, the
plain torch reference does: on the CPU, for the formats other than NVFP4, on old devices.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from . import kernels
from .errors import Refused
from .formats import FORMATS, NVFP4, Format

SCHEMES = ("w4a4", "w4a16")


@torch.library.custom_op("permuquant::linear", mutates_args=())
def linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    tensor_scale: Tensor,
    bias: Tensor | None,
    format: str,
    scheme: str,
) -> Tensor:
    """``x`` [..., K] times the packed weight [N, K], plus ``bias`` [N], in the dtype of ``x``.

    ``scheme`` "w4a4" quantises ``x`` in ``format``, its tensor scale that of this call; "w4a16"
    leaves it. A weight padded to K' channels takes an ``x`` of K as if zeros followed it. Sums in
    fp32; in fp64 for an fp64 ``x`` where the reference computes. Raises ``Refused`` for an unknown
    format or scheme, and for a K that the weight doesn't have.
    """
    weight = (packed, scales, tensor_scale)
    of = _checked(x, packed, format, scheme)
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    empty = x.numel() == 0 or packed.numel() == 0
    how = "reference" if empty else where(x.device, format, scheme, rows.shape[0])
    y = _multiply(how, of, scheme, rows, weight, bias)
    return y.view(*x.shape[:-1], packed.shape[0])


@linear.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    tensor_scale: Tensor,
    bias: Tensor | None,
    format: str,
    scheme: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


def where(device: torch.device, format: str, scheme: str, rows: int) -> str:
    """The route that ``linear`` takes: the kind of a kernel, or "reference"."""
    if device.type != "cuda" or format != NVFP4.name:
        return "reference"
    capability = torch.cuda.get_device_capability(device)
    return kernels.route(capability, triton.__version__, scheme, rows)


def specs(
    device: torch.device, format: str, scheme: str, rows: int, **shape: Any
) -> tuple[kernels.KernelSpec, ...]:
    """The kernels that ``linear`` launches for a product of ``shape`` (k, n, dtype, bias)."""
    kind: Any = where(device, format, scheme, rows)
    if kind == "reference":
        return ()
    capability = torch.cuda.get_device_capability(device)
    shape["dtype"] = kernels.narrow(shape["dtype"])
    if scheme == "w4a16":
        return (kernels.tuned(kind, capability, rows, **shape),)
    product = kernels.tuned(kind, capability, rows, **shape | {"k": NVFP4.padded(shape["k"])})
    return (*kernels.quantise_specs(capability, rows, shape["k"]), product)


def reference(
    of: Format, scheme: str, x: Tensor, weight: tuple[Tensor, Tensor, Tensor], bias: Tensor | None
) -> Tensor:
    """``linear`` of ``x`` [M, K] in plain torch, without making codes of the activation.

    Element times scale is what is multiplied; the tensor scales come after the sum.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    dtype, k, scale = x.dtype, x.shape[1], weight[2]
    if scheme == "w4a4":
        x = of.pad(x)
        scales, tensor_scale = of.scales(x)
        x = of.times(of.elements(x, scales, tensor_scale), scales)[:, :k]
        scale = scale * tensor_scale
    w = of.decode(weight[0], weight[1])[:, :k]
    y = torch.mm(x.to(wide), w.to(wide).T).mul_(scale)
    return (y if bias is None else y.add_(bias)).to(dtype)


def _multiply(
    how: str,
    of: Format,
    scheme: str,
    x: Tensor,
    weight: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
) -> Tensor:
    match how:
        case "w4a4_native" | "w4a4_portable":
            a = kernels.quantise(x.to(kernels.narrow(x.dtype)))
            return kernels.matmul_w4a4(a, weight, bias, x.dtype, how)
        case "w4a16_vector" | "w4a16_portable":
            return kernels.matmul_w4a16(x, weight, bias, how)
        case _:
            return reference(of, scheme, x, weight, bias)


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
