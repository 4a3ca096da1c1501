"""Number formats as data, with their definition in plain torch: quantise, pack, decode.

``x ~ element * scale * tensor_scale``: each group of ``group`` neighbouring channels (the last
axis) shares one scale, all groups share one tensor scale. ``docs/nvfp4.md`` defines every bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from .errors import Refused
from .minifloat import E2M1, E4M3, Integer, Minifloat

SMALLEST_TENSOR_SCALE = 2.0**-112
"""Keeps every product of quantising and decoding a normal float32, or a zero by rounding, so that
hardware that flushes subnormals agrees with hardware that does not."""

SMALLEST_SCALE = 2.0**-126
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CHUNK = 1 << 21
"""Elements that ``quantize_by_rows`` has in fp32 at a time; each takes under 32 bytes meanwhile."""


@dataclass(frozen=True)
class Format:
    """A group-scaled format of ``bits`` bits an element.

    Shapes throughout: ``x`` and elements [..., K], scales [..., K / group], packed
    [..., K * bits / 8], tensor scale []. K must be a multiple of ``group``; ``pad`` makes it one.
    """

    name: str
    element: Minifloat | Integer
    group: int
    scale_dtype: torch.dtype
    scale: Callable[[Tensor, Tensor], Tensor] = field(repr=False, compare=False)
    has_tensor_scale: bool = False

    @property
    def bits(self) -> int:
        return self.element.bits

    def padded(self, k: int) -> int:
        """The least multiple of ``group`` that holds ``k`` channels."""
        return -(-k // self.group) * self.group

    def pad(self, x: Tensor) -> Tensor:
        """``x`` with zero channels appended up to ``padded(K)``; ``x`` itself if none are due."""
        missing = self.padded(x.shape[-1]) - x.shape[-1]
        return torch.nn.functional.pad(x, (0, missing)) if missing else x

    def bits_per_weight(self, n: int, k: int) -> float:
        """What a weight [n, k] takes once packed, in bits for each of its n * k elements."""
        groups = n * self.padded(k) // self.group
        tensor_scale = 32 if self.has_tensor_scale else 0
        stored = groups * (self.group * self.bits + 8 * self.scale_dtype.itemsize) + tensor_scale
        return stored / (n * k)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``x`` [..., K] as (packed uint8, scales of ``scale_dtype``, tensor scale fp32 []).

        fp16, bf16, fp32 or fp64; a group with a NaN or an infinity decodes to NaN. Raises
        ``Refused`` if K is not a multiple of ``group`` or ``x`` is not floating point.
        """
        scales, tensor_scale = self.scales(x)
        elements = self.elements(x, scales, tensor_scale)
        return self.pack(elements), scales.to(self.scale_dtype), tensor_scale

    def quantize_by_rows(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``quantize(x)``, bit for bit, a few rows at a time, for a weight that fills its device.

        Beside the result and ``x`` it holds 64 MiB, or what one row takes. The tensor scale is a
        rounded quotient and a floor of the peak, both monotone, so the largest of the chunks'
        tensor scales is that of the whole.
        """
        self._check(x)
        if x.numel() <= CHUNK:
            return self.quantize(x)
        k = x.shape[-1]
        step = max(1, CHUNK // k)
        chunks = torch.split(x.reshape(-1, k), step)
        tensor_scale = torch.stack([self.scales(rows)[1] for rows in chunks]).amax()
        packed = x.new_empty((*x.shape[:-1], k * self.bits // 8), dtype=torch.uint8)
        scales = x.new_empty((*x.shape[:-1], k // self.group), dtype=self.scale_dtype)
        into = (torch.split(out.view(-1, out.shape[-1]), step) for out in (packed, scales))
        for rows, codes, rounded in zip(chunks, *into, strict=True):
            exact, _ = self.scales(rows, tensor_scale)
            codes.copy_(self.pack(self.elements(rows, exact, tensor_scale)))
            rounded.copy_(exact)
        return packed, scales, tensor_scale

    def dequantize(self, packed: Tensor, scales: Tensor, tensor_scale: Tensor) -> Tensor:
        """Fp32 [..., K]: ``(element * scale) * tensor_scale``, rounded once at NVFP4 and MXFP4."""
        return self.decode(packed, scales).mul_(tensor_scale)

    def fake(self, x: Tensor) -> Tensor:
        """``dequantize(*quantize(x))`` in ``x``'s dtype, without making codes; same refusals."""
        scales, tensor_scale = self.scales(x)
        elements = self.elements(x, scales, tensor_scale)
        return self.times(elements, scales).mul_(tensor_scale).to(x.dtype)

    def scales(self, x: Tensor, tensor_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The scale of each group, fp32 and already rounded, and the tensor scale.

        ``tensor_scale`` given: used as it is. NaN is the scale of a group that is not finite.
        """
        self._check(x)
        peak = _group_peak(x, self.group)
        missing = ~peak.isfinite()
        if tensor_scale is None:
            tensor_scale = self._tensor_scale(peak.masked_fill(missing, 0.0))
        return self.scale(peak, tensor_scale).masked_fill_(missing, torch.nan), tensor_scale

    def elements(self, x: Tensor, scales: Tensor, tensor_scale: Tensor) -> Tensor:
        """Fp32 [..., K] on the grid: ``x * ((1 / tensor_scale) / scale)`` rounded.

        Zero where the scale is 0 or NaN. ``scales`` as ``scales()`` gives them, or any others.
        """
        inverse = (1.0 / tensor_scale) / scales
        inverse.masked_fill_(~(scales > 0), 0.0)
        groups = x.reshape(*scales.shape, self.group).to(torch.float32)
        scaled = (groups * inverse.unsqueeze(-1)).nan_to_num_(nan=0.0)
        return self.element.round_(scaled).view(x.shape)

    def pack(self, elements: Tensor) -> Tensor:
        """Elements [..., K] on the grid as uint8; channel order from the lowest bit up.

        At 4 bits the even channel is the low nibble; at 3 bits 8 channels fill 3 bytes.
        """
        codes = self.element.encode(elements)
        if self.bits == 4:
            return codes[..., 0::2] | codes[..., 1::2] << 4
        low, high = (
            codes[..., i::8]
            | codes[..., i + 1 :: 8].int() << 3
            | codes[..., i + 2 :: 8].int() << 6
            | codes[..., i + 3 :: 8].int() << 9
            for i in (0, 4)
        )
        triple = torch.stack([low & 255, low >> 8 | (high & 15) << 4, high >> 4], -1)
        return triple.flatten(-2).to(torch.uint8)

    def unpack(self, packed: Tensor) -> Tensor:
        """Elements fp32 [..., K] of ``pack``'s bytes."""
        if self.bits == 4:
            index = packed.reshape(-1).to(torch.int32)
        else:
            low, middle, high = packed.reshape(-1, 3).to(torch.int32).unbind(-1)
            index = torch.stack([low | (middle & 15) << 8, middle >> 4 | high << 4], -1).view(-1)
        values = _values(self, packed.device).index_select(0, index)
        return values.view(*packed.shape[:-1], packed.shape[-1] * 8 // self.bits)

    def decode(self, packed: Tensor, scales: Tensor) -> Tensor:
        """Fp32 [..., K]: element times scale, without the tensor scale; exact at NVFP4, MXFP4."""
        return self.times(self.unpack(packed), scales.to(torch.float32))

    def times(self, elements: Tensor, scales: Tensor) -> Tensor:
        """``elements`` [..., K], in place, each times the scale of its group."""
        groups = elements.view(*scales.shape, self.group)
        return groups.mul_(scales.unsqueeze(-1)).view(elements.shape)

    def _tensor_scale(self, peak: Tensor) -> Tensor:
        """``peak / (element.largest * 448)``, kept at or above ``SMALLEST_TENSOR_SCALE``."""
        if not self.has_tensor_scale:
            return peak.new_ones(())
        if peak.numel() == 0:
            return peak.new_full((), SMALLEST_TENSOR_SCALE)
        # NOTE a tensor divisor: on CUDA, torch multiplies by the reciprocal of a Python number.
        ceiling = peak.new_full((), self.element.largest * E4M3.largest)
        return peak.amax().div_(ceiling).clamp_(min=SMALLEST_TENSOR_SCALE)

    def _check(self, x: Tensor) -> None:
        if x.dtype not in FLOATS:
            raise Refused(f"permuquant: {self.name} quantises floating point, not {x.dtype}")
        if x.ndim == 0:
            raise Refused(f"permuquant: {self.name} quantises channels, and a number has none")
        if x.shape[-1] % self.group:
            raise Refused(
                f"permuquant: {self.name} scales groups of {self.group} channels, and K="
                f"{x.shape[-1]} is not a multiple of {self.group}; pad it: FORMATS['{self.name}']"
                f".pad(x) has K={self.padded(x.shape[-1])}"
            )


def _group_peak(x: Tensor, group: int) -> Tensor:
    """Fp32 [..., K / group]: the largest magnitude of each group; NaN if it holds one."""
    peak = x.reshape(*x.shape[:-1], x.shape[-1] // group, group).to(torch.float32).abs()
    while peak.shape[-1] > 1:
        left, right = peak.chunk(2, -1)
        peak = torch.maximum(left, right)
    return peak.squeeze(-1)


@cache
def _values(of: Format, device: torch.device) -> Tensor:
    """Fp32: the elements a byte holds, [256, 2], at 4 bits; those of 12 bits, [4096, 4], at 3."""
    count = 8 // of.bits if of.bits == 4 else 4
    index = torch.arange(2 ** (of.bits * count))
    codes = torch.stack([index >> of.bits * i & (2**of.bits - 1) for i in range(count)], -1)
    return of.element.values()[codes].to(device)


def _e4m3_scale(peak: Tensor, tensor_scale: Tensor) -> Tensor:
    """The e4m3 number nearest ``peak / (6 * tensor_scale)``, which is at most 448."""
    return E4M3.round_(peak * (1.0 / (E2M1.largest * tensor_scale)))


def _power_of_two_scale(peak: Tensor, _: Tensor) -> Tensor:
    """OCP MX: the exponent of ``peak`` less that of the largest element, 2 for 6."""
    power = (peak * 0.25).view(torch.int32).bitwise_and_(0x7F800000).view(torch.float32)
    return power.clamp_(min=SMALLEST_SCALE)


def _bfloat16_scale(largest: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The bfloat16 nearest ``peak / largest``; 0 where it would have no finite reciprocal."""

    def scale(peak: Tensor, _: Tensor) -> Tensor:
        scales = (peak * (1.0 / largest)).to(torch.bfloat16).to(torch.float32)
        return scales.masked_fill_(scales < SMALLEST_SCALE, 0.0)

    return scale


NVFP4 = Format("nvfp4", E2M1, 16, torch.float8_e4m3fn, _e4m3_scale, has_tensor_scale=True)
MXFP4 = Format("mxfp4", E2M1, 32, torch.float8_e8m0fnu, _power_of_two_scale)
INT4 = Format("int4", Integer(4), 64, torch.bfloat16, _bfloat16_scale(7))
INT3 = Format("int3", Integer(3), 64, torch.bfloat16, _bfloat16_scale(3))

FORMATS: dict[str, Format] = {each.name: each for each in (NVFP4, MXFP4, INT4, INT3)}
