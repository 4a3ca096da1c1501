"""NVFP4 kernels: a frozen spec -> Triton source text (pure) -> loaded once -> launched.

The torch reference of each kernel stands beside it and has its signature. Operands: packed uint8
[rows, K/2], e4m3 scales [rows, K/16], tensor scale fp32 []; K is the padded one, a multiple of 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache, lru_cache
from typing import Any, Literal

import torch
import triton
from torch import Tensor

from . import templates, vector
from .errors import Refused
from .formats import NVFP4
from .generated import Launch, empty, function, remember
from .generated import spec as spec_of

Product = Literal["w4a4_native", "w4a4_portable", "w4a16_portable", "w4a16_vector"]
Kind = Literal["peak", "quantise"] | Product | vector.Vector

TEMPLATES: dict[str, str] = {
    "peak": templates.PEAK,
    "quantise": templates.QUANTISE,
    "w4a4_native": templates.W4A4_NATIVE,
    "w4a4_portable": templates.W4A4_PORTABLE,
    "w4a16_portable": templates.W4A16_PORTABLE,
    "w4a16_vector": templates.W4A16_VECTOR,
}
TYPES = {torch.float16: "tl.float16", torch.bfloat16: "tl.bfloat16", torch.float32: "tl.float32"}

FP4_SINCE = {(10, 0): (3, 6), (10, 3): (3, 6), (12, 0): (3, 6), (12, 1): (3, 8)}
"""Compute capabilities with FP4 units, and the first Triton whose ``dot_scaled`` reaches them."""


@dataclass(frozen=True)
class KernelSpec:
    """All that the text of a kernel depends on, and how it is launched.

    ``tile`` is (rows, columns) of x for ``peak`` and ``quantise``, (M, N, K) for the products.
    """

    kind: Kind
    k: int  # channels of the activation, before padding for those that read it unpacked
    n: int = 0  # output channels
    dtype: torch.dtype = torch.bfloat16  # of the output
    tile: tuple[int, ...] = (16, 256)
    bias: bool = False
    instruction: bool = False  # pack by cvt.e2m1x2, decode scales by cvt.e4m3x2
    warps: int = 4
    stages: int = 2

    @property
    def name(self) -> str:
        return "matmul_" + self.kind if self.kind.startswith("w4") else self.kind

    def __str__(self) -> str:
        shown = (getattr(self, field.name) for field in fields(self)[1:])
        return f"{self.name}({', '.join(str(value).removeprefix('torch.') for value in shown)})"


def source(spec: KernelSpec) -> str:
    """The text of the kernel of ``spec``: a pure function."""
    if spec.kind in vector.DESIGNS:
        return f"# {spec}\n{templates.HEADER}{vector.text(spec)}"
    padded = NVFP4.padded(spec.k)
    known = {"K": spec.k, "N": spec.n, "BYTES": padded // 2, "GROUPS": padded // 16}
    if spec.kind in ("peak", "quantise"):
        known |= dict(zip(("ROWS", "COLUMNS"), spec.tile, strict=True))
        pack = templates.PACK_INSTRUCTION if spec.instruction else templates.PACK_INTEGER
        text = TEMPLATES[spec.kind].replace("{PACK}", pack)
    else:
        known |= dict(zip(("BM", "BN", "BK"), spec.tile, strict=True))
        known |= {"BLOCKS": -(-padded // spec.tile[2]), "STAGES": spec.stages}
        text = TEMPLATES[spec.kind]
    words = {"NAME": spec.name, "BIAS": spec.bias, "DTYPE": TYPES[spec.dtype]}
    return f"# {spec}\n" + (templates.HEADER + text).format(**known, **words)


@cache
def load(spec: KernelSpec) -> Any:
    """The Triton function of ``spec``."""
    return function(spec.name, source(spec))


@lru_cache(4096)
def tuned(kind: Kind, capability: tuple[int, int], rows: int, **shape: Any) -> KernelSpec:
    """The spec of ``kind`` with the tile, warps and stages for a device and a number of rows.

    Raises ``Refused`` for the native product on a device without FP4 tensor cores.
    """
    if kind == "w4a4_native" and capability not in FP4_SINCE:
        raise Refused(
            f"permuquant: a device of compute capability {capability[0]}.{capability[1]} has no "
            "FP4 tensor cores that Triton reaches; routes.choose gives one that it can run"
        )
    if design := vector.choose(kind, capability, **shape):
        return KernelSpec(**shape, **vector.tuned(design, capability, rows))
    tile: tuple[int, ...]
    few = 16 if rows <= 16 else 64 if rows <= 64 else 128
    in_registers = capability[0] not in (9, 10)  # there, operands decoded for tensor cores
    if kind == "w4a4_portable" and in_registers:
        few = min(few, 64)
    match kind:
        case "peak" | "quantise":
            tile, warps, stages = (16, 256), 4, 1
        case "w4a16_vector":
            few = triton.next_power_of_2(rows)
            tile, warps, stages = (few, 16, 512 // few), 4, 2
        case "w4a4_native" if capability[0] == 10:  # below M=128 it would not be the FP4 unit
            tile, warps, stages = (128, 128, 256), 4, 3
        case "w4a4_native":
            tile, warps, stages = (few, 128, 256), 8 if few == 128 else 4, 2
        case "w4a16_portable" if shape["dtype"] == torch.float32:  # no tensor core: few sums
            tile, warps, stages = (16, 32, 32), 4, 2
        case _ if few < 128 or in_registers:
            tile, warps, stages = (few, 64, 64), 8 if few > 16 else 4, 3
        case _:
            tile, warps, stages = (128, 128, 64), 8, 3
    return KernelSpec(kind, **shape, tile=tile, warps=warps, stages=stages)


def quantise_specs(capability: tuple[int, int], rows: int, k: int) -> tuple[KernelSpec, KernelSpec]:
    """The two kernels of ``quantise``; the second packs by instruction where there is one."""
    native = {"k": k, "instruction": capability in FP4_SINCE}
    return tuned("peak", capability, rows, k=k), tuned("quantise", capability, rows, **native)


def quantise_reference(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``x`` [M, K] -> packed [M, K'/2], scales [M, K'/16], tensor scale; K' is K padded."""
    return NVFP4.quantize(NVFP4.pad(x))


def quantise(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``quantise_reference`` by two kernels: the peak of x, then codes and scales, bit for bit."""
    x = x.contiguous()
    (rows, k), padded = x.shape, NVFP4.padded(x.shape[1])
    peak = torch.zeros((), dtype=torch.int32, device=x.device)
    packed = x.new_empty((rows, padded // 2), dtype=torch.uint8)
    scales = x.new_empty((rows, padded // 16), dtype=torch.uint8)
    tensor_scale = x.new_empty((), dtype=torch.float32)
    first, second = quantise_specs(_capability(x), rows, k)
    launch(first, rows, padded, x, peak)
    launch(second, rows, padded, x, peak, packed, scales, tensor_scale)
    return packed, scales.view(torch.float8_e4m3fn), tensor_scale


def matmul_w4a4_reference(
    a: tuple[Tensor, Tensor, Tensor],
    w: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """``(elements @ elements.T) * (tensor scale * tensor scale) + bias`` [M, N] in ``dtype``."""
    y = NVFP4.decode(a[0], a[1]) @ NVFP4.decode(w[0], w[1]).T
    return _finish(y, a[2] * w[2], bias, dtype)


def matmul_w4a4(
    a: tuple[Tensor, Tensor, Tensor],
    w: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    dtype: torch.dtype,
    kind: Literal["w4a4_native", "w4a4_portable"],
) -> Tensor:
    """``matmul_w4a4_reference`` by the kernel ``kind``; sums in fp32 in another order."""
    rows, n, k = len(a[0]), len(w[0]), 2 * w[0].shape[1]
    shape = {"k": k, "n": n, "dtype": narrow(dtype), "bias": bias is not None}
    spec = tuned(kind, _capability(a[0]), rows, **shape)
    y = a[0].new_empty((rows, n), dtype=spec.dtype)
    launch(spec, rows, n, *_bytes(a), *_bytes(w), y if bias is None else bias, y)
    return y.to(dtype)


def matmul_w4a16_reference(
    x: Tensor, w: tuple[Tensor, Tensor, Tensor], bias: Tensor | None
) -> Tensor:
    """``(x @ elements.T) * tensor scale + bias`` [M, N] in the dtype of ``x`` [M, K]."""
    elements = NVFP4.decode(w[0], w[1])[:, : x.shape[1]]
    wide = torch.promote_types(x.dtype, torch.float32)
    return _finish(x.to(wide) @ elements.to(wide).T, w[2], bias, x.dtype)


def matmul_w4a16(
    x: Tensor,
    w: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    kind: Literal["w4a16_vector", "w4a16_portable"] | vector.Vector,
) -> Tensor:
    """``matmul_w4a16_reference`` by the kernel ``kind``; fp64 is computed in fp32."""
    dtype, x = x.dtype, x.to(narrow(x.dtype)).contiguous()
    key = (kind, x.shape, x.dtype, x.device, w[0].shape, None if bias is None else bias.dtype)
    known = _LAUNCHES.get(key)
    if known is None:
        rows, k, n = *x.shape, len(w[0])
        shape = {"k": k, "n": n, "dtype": x.dtype, "bias": bias is not None}
        made = launcher(tuned(kind, _capability(x), rows, **shape), rows, n)
        known = remember(_LAUNCHES, key, (made, spec_of((rows, n), x.dtype)))
    run, of = known
    y = empty(of, x.device)
    given = (x, *_bytes(w), y if bias is None else bias)
    run([*given, y, x.shape[0]], _addresses(given))
    return y.to(dtype)


def _finish(y: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = y.mul_(scale)
    return (y if bias is None else y.add_(bias)).to(dtype)


def launch(spec: KernelSpec, rows: int, columns: int, *tensors: Tensor) -> None:
    """One program a tile of [rows, columns]; the number of rows is the kernel's last argument."""
    key = (spec, rows, columns, *[one.dtype for one in tensors])
    known = _LAUNCHES.get(key) or remember(_LAUNCHES, key, launcher(spec, rows, columns))
    known([*tensors, rows], _addresses(tensors))


def launcher(spec: KernelSpec, rows: int, columns: int) -> Launch:
    """The launch of ``spec`` on [rows, columns], for tensors of some dtypes."""
    grid = (-(-rows // spec.tile[0]), -(-columns // spec.tile[1]))
    how = {"num_warps": spec.warps, "num_stages": spec.stages}
    # NOTE a fused multiply-add would round a scale once where the definition rounds twice.
    return Launch(load(spec), grid, **how, enable_fp_fusion=False)


_LAUNCHES: dict[Any, Any] = {}


def _addresses(tensors: Sequence[Tensor]) -> int:
    together = 0
    for one in tensors:
        together |= one.data_ptr()
    return together


def _bytes(operand: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    packed, scales, tensor_scale = operand
    return packed.contiguous(), scales.contiguous().view(torch.uint8), tensor_scale


def narrow(dtype: torch.dtype) -> torch.dtype:
    """The dtype that kernels compute an fp64 product in; any other is kept."""
    return torch.float32 if dtype == torch.float64 else dtype


def _capability(x: Tensor) -> tuple[int, int]:
    """(0, 0) on the CPU, where Triton interprets portable kernels."""
    return _capability_of(x.device.index) if x.is_cuda else (0, 0)


_capability_of = cache(torch.cuda.get_device_capability)
