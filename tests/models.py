"""Small transformers to compile, and what serving them must compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pq_compile.formats import FORMATS
from pq_compile.permutation import Permutation
from pq_compile.plan import axis_order
from pq_compile.unit import OWNERS, Unit


class Block(nn.Module):
    """Attention and a feed-forward, modulated per sample: a diffusion block in small."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.modulation(F.silu(condition)).chunk(2, -1)
        h = self.norm(x) * (1 + scale[:, None]) + shift[:, None]
        q, k, v = (
            to(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for to in (self.to_q, self.to_k, self.to_v)
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        x = x + self.to_out(attended)
        out: Tensor = x + self.down(F.gelu(self.up(self.norm(x)), approximate="tanh"))
        return out


class Denoiser(nn.Module):
    """Embedder, blocks and final projection: ``(latents [B, T, 8], condition [B, 64])``."""

    def __init__(self, blocks: int = 2, width: int = 64) -> None:
        super().__init__()
        self.x_embedder = nn.Linear(8, width)
        self.blocks: Any = nn.ModuleList(Block(width) for _ in range(blocks))
        self.proj_out = nn.Linear(width, 8)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        x = self.x_embedder(x)
        for block in self.blocks:
            x = block(x, condition)
        out: Tensor = self.proj_out(x)
        return out


CLOSE = 1e-5
"""In float64, the default here, sums in another order do not reach the codes, which are made in
float32; what is left is where the scales are multiplied in."""


def denoiser(seed: int = 0, dtype: torch.dtype = torch.float64, **sizes: int) -> Denoiser:
    torch.manual_seed(seed)
    return Denoiser(**sizes).to(dtype).requires_grad_(False).eval()


def inputs(
    seed: int, batch: int = 2, tokens: int = 12, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, tokens, 8, generator=generator, dtype=torch.float64)
    condition = torch.randn(batch, 64, generator=generator, dtype=torch.float64)
    return latents.to(dtype), condition.to(dtype)


def unit_of(model: nn.Module) -> Unit:
    """The unit of the model's parameters (of those of its first block, under regional compile)."""
    found = [OWNERS[p][0] for p in model.parameters() if p in OWNERS]
    unit: Unit = found[0]
    return unit


@contextmanager
def served_by_hand(model: nn.Module, like: nn.Module) -> Iterator[nn.Module]:
    """``model`` with every linear computed as the plan of ``like`` says, in plain torch.

    The input channels of a linear are put in order, both operands quantised and decoded.
    """
    plans = {name: _plan(module) for name, module in like.named_modules() if _plan(module)}
    handles = [
        model.get_submodule(name).register_forward_hook(_by_hand(*plan))  # type: ignore[misc]
        for name, plan in plans.items()
    ]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def _plan(module: nn.Module) -> tuple[str, str, Permutation] | None:
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear) or weight not in OWNERS:
        return None
    unit, name = OWNERS[weight]
    planned = next((one for one in unit.plan.linears if one.linear.weight == name), None)
    if planned is None:  # its weight was only read by something else so far
        return None
    order = axis_order(planned.linear.input_axis, unit.needs.groups, unit.orders)
    return (planned.route, unit.options.format, order) if planned.route != "keep" else None


def _by_hand(route: str, format_name: str, order: Permutation) -> Any:
    format_ = FORMATS[format_name]

    def hook(module: nn.Linear, args: tuple[Tensor], _: Tensor) -> Tensor:
        x = order.apply(args[0], -1)
        w = format_.fake(order.apply(module.weight.detach(), 1))
        a = format_.fake(x) if route == "w4a4" else x
        return F.linear(a, w, module.bias)

    return hook


def run(model: Any, *args: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(*args)
    return out


def relative_error(found: Tensor, expected: Tensor) -> float:
    difference = (found.double() - expected.double()).norm() / expected.double().norm()
    return float(difference)
