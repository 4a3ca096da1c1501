"""Operands of single kernels: quantised weights and rows, as the lowered graph hands them over."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pq_compile.formats import NVFP4

Packed = tuple[Tensor, Tensor, Tensor]


class Shape(NamedTuple):
    """A linear: M rows of K channels become N channels; how often it stands in one step."""

    m: int
    n: int
    k: int
    times: int = 1

    def __str__(self) -> str:
        return f"{self.m} x {self.n} x {self.k}"

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k


def rows(m: int, k: int, device: str) -> Tensor:
    """bf16 [1, M, K]."""
    return torch.randn(1, m, k, device=device, dtype=torch.bfloat16)


def weight(n: int, k: int, device: str) -> Packed:
    """Random packed codes [N, K/2], scales [N, K/16] of about 1/K**0.5, tensor scale []."""
    packed = torch.randint(0, 256, (n, k // 2), device=device, dtype=torch.uint8)
    scales = (torch.rand(n, k // 16, device=device) + 0.5).to(torch.float8_e4m3fn)
    return packed, scales, torch.full((), k**-0.5 / 3, device=device)


def bytes_of(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def dense(packed: Packed) -> Tensor:
    """bf16 [N, K]."""
    return NVFP4.dequantize(*packed).to(torch.bfloat16)
