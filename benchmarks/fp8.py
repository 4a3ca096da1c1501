"""The baseline with fp8 linears: torchao's dynamic row-wise recipe, in plain torch for Inductor.

``y = (x / s_x) (w / s_w)' * s_x s_w`` with ``s = max |row| / 448`` for each token and each output
channel; ``torch._scaled_mm`` multiplies, Inductor fuses the quantiser with what stands before it.
Weights are cast once. Linears that see one row per sample and embedders stay in bf16.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .kinds import FEW_ROWS

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
SMALLEST = 1e-12  # of a peak


def by_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` [M, K] as e4m3 [M, K] and fp32 scales [M, 1]."""
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=SMALLEST) / LARGEST
    return (wide / scale).clamp(-LARGEST, LARGEST).to(E4M3), scale


class Fp8Linear(nn.Module):
    """A linear whose weight is kept in e4m3, one scale per output channel."""

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = by_rows(linear.weight)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.T.contiguous())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows, scale = by_rows(x.reshape(-1, x.shape[-1]))
        y = torch._scaled_mm(
            rows,
            self.weight.t(),
            scale_a=scale,
            scale_b=self.scale,
            bias=self.bias,
            out_dtype=x.dtype,
            use_fast_accum=True,
        )
        return y.view(*x.shape[:-1], -1)


def convert(model: nn.Module, step: Callable[[], object]) -> list[str]:
    """Replace, in place, the linears of repeated blocks that see many rows in a ``step``.

    Returns their names.
    """
    rows: dict[str, int] = {}

    def see(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            rows[name] = given[0].numel() // given[0].shape[-1]

        return hook

    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    hooks = [module.register_forward_pre_hook(see(name)) for name, module in linears.items()]
    step()
    for hook in hooks:
        hook.remove()
    chosen = [
        name
        for name, linear in linears.items()
        if re.search(r"\.\d+\.", f"{name}.")
        and rows.get(name, 0) > FEW_ROWS
        and not (linear.in_features % 16 or linear.out_features % 16)
    ]
    for name in chosen:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Fp8Linear(linears[name]))
    return chosen
