"""A tensor whose every rounding is a tie, or one unit in the last place from it."""

from __future__ import annotations

import torch
from torch import Tensor

from pq_compile.formats import NVFP4
from pq_compile.minifloat import E2M1, E4M3


def near_ties(seed: int = 0) -> Tensor:
    """Fp32 [R, 256] where the order of the quantiser's operations decides codes and scales."""
    generator = torch.Generator().manual_seed(seed)
    largest = 1000 + 1000 * torch.rand((), generator=generator)
    whole = torch.zeros(16)
    whole[0] = largest
    _, tensor_scale = NVFP4.scales(whole)
    peak = _neighbours(_ties(E4M3.values()[:127]) * (6 * tensor_scale))
    peak = peak[: len(peak) // 16 * 16]
    groups = torch.zeros(len(peak), 16)
    groups[:, 0] = peak
    scales, _ = NVFP4.scales(groups, tensor_scale)
    ties = _ties(E2M1.values()[:7])[None, :] * scales.view(-1, 1) * tensor_scale
    near = _neighbours(ties.T).view(3, 6, -1)[:, :5].flatten(0, 1).T
    groups[:, 1:] = torch.minimum(near, peak[:, None])
    return torch.cat([whole.repeat(16).view(1, 256), groups.view(-1, 256)])


def _ties(values: Tensor) -> Tensor:
    return (values[1:] + values[:-1]) / 2


def _neighbours(x: Tensor) -> Tensor:
    """``x``, and the next float32 above and below."""
    up, down = torch.tensor(torch.inf), torch.tensor(0.0)
    return torch.cat([x, x.nextafter(up), x.nextafter(down)])
