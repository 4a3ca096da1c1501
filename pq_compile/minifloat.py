"""Elements of a format: a grid of numbers, its codes, and rounding to nearest even.

Rounding is arithmetic, the same on every device and in every version of torch: adding
``1.5 * 2**23 * step`` to a float32 leaves its nearest multiple of ``step``, ties to even, and
subtracting it again is exact. ``step`` is read off the exponent of the number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EXPONENT = 0x7F800000  # of a float32
MAGNITUDE = 0x7FFFFFFF


@dataclass(frozen=True)
class Minifloat:
    """A sign bit, ``exponent_bits`` and ``mantissa_bits``, with subnormals and without infinities.

    ``largest`` is the greatest finite magnitude; ``nan`` the code of NaN, if there is one.
    """

    exponent_bits: int
    mantissa_bits: int
    bias: int
    largest: float
    nan: int | None = None

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def smallest_normal(self) -> float:
        return 2.0 ** (1 - self.bias)

    def round_(self, x: Tensor) -> Tensor:
        """Float32 ``x``, in place, to the nearest value of the grid; beyond ``largest`` saturates.

        The sign of zero and of what rounds to zero is kept; NaN stays NaN; infinity saturates.
        """
        lowest = 127 + 1 - self.bias
        highest = 127 + (2**self.exponent_bits - 1) - self.bias
        bits = torch.bitwise_and(x.view(torch.int32), EXPONENT)
        bits.clamp_(lowest << 23, highest << 23)
        bits.add_(((23 - self.mantissa_bits) << 23) + 0x400000)
        magic = bits.view(torch.float32)
        rounded = (x + magic).sub_(magic).clamp_(-self.largest, self.largest)
        return torch.copysign(rounded, x, out=x)

    def encode(self, x: Tensor) -> Tensor:
        """The uint8 codes, [...], of float32 ``x`` [...] rounded to the grid.

        NaN gets the code ``nan``, or that of +0 where the grid has no NaN.
        """
        x = self.round_(x.clone())
        missing = x.isnan()
        bits = x.view(torch.int32)
        sign = (bits < 0).to(torch.int32) << (self.bits - 1)
        normal = (bits & MAGNITUDE) >> (23 - self.mantissa_bits)
        normal -= (127 - self.bias) << self.mantissa_bits
        step = self.smallest_normal / 2**self.mantissa_bits
        subnormal = x.abs().nan_to_num_(nan=0.0).div_(step).to(torch.int32)
        codes = torch.where(x.abs() < self.smallest_normal, subnormal, normal) | sign
        return codes.masked_fill_(missing, self.nan or 0).to(torch.uint8)

    def values(self) -> Tensor:
        """Float32 [2**bits]: the value of every code."""
        code = torch.arange(2**self.bits, dtype=torch.int64)
        mantissa = (code & (2**self.mantissa_bits - 1)).double()
        exponent = (code >> self.mantissa_bits) & (2**self.exponent_bits - 1)
        hidden = (exponent > 0).double() * 2**self.mantissa_bits
        power = exponent.clamp(min=1) - self.bias - self.mantissa_bits
        value = torch.ldexp(mantissa + hidden, power)
        value = torch.where(code >> (self.bits - 1) == 1, -value, value)
        if self.nan is not None:
            value[[self.nan, self.nan | 1 << (self.bits - 1)]] = torch.nan
        return value.float()


@dataclass(frozen=True)
class Integer:
    """Two's complement of ``bits`` bits, used symmetrically: ``-largest .. largest``."""

    bits: int

    @property
    def largest(self) -> float:
        return 2.0 ** (self.bits - 1) - 1

    def round_(self, x: Tensor) -> Tensor:
        """Float32 ``x``, in place, to the nearest integer, ties to even, saturating."""
        return x.round_().clamp_(-self.largest, self.largest)

    def encode(self, x: Tensor) -> Tensor:
        """The uint8 codes, [...], of float32 ``x`` [...] rounded to the grid; NaN as 0."""
        whole = self.round_(x.nan_to_num(nan=0.0)).to(torch.int8)
        return whole.view(torch.uint8).bitwise_and_(2**self.bits - 1)

    def values(self) -> Tensor:
        """Float32 [2**bits]: the value of every code."""
        code = torch.arange(2**self.bits)
        return torch.where(code < 2 ** (self.bits - 1), code, code - 2**self.bits).float()


E2M1 = Minifloat(exponent_bits=2, mantissa_bits=1, bias=1, largest=6.0)
E4M3 = Minifloat(exponent_bits=4, mantissa_bits=3, bias=7, largest=448.0, nan=0x7F)
