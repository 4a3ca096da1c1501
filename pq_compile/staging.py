"""Copies from a GPU to ordinary memory, through a small piece of pinned memory.

The driver copies to pageable memory in one thread and meets every page for the first time; here
it fills a pinned buffer at the speed of the bus, and torch's threads empty it into the new pages.
"""

from __future__ import annotations

import torch
from torch import Tensor

STAGE = 1 << 26
"""Bytes of the buffer. Torch's pinned allocator keeps it, so every copy meets the same one."""


def to_host(tensor: Tensor) -> Tensor:
    """A copy of ``tensor`` in CPU memory, pageable and with the same strides."""
    stage = _stage(min(STAGE, tensor.nbytes)) if tensor.is_cuda else None
    if stage is None or not tensor.is_contiguous():
        return tensor.to("cpu", copy=True)
    copy = torch.empty(tensor.shape, dtype=tensor.dtype)
    for part, room in zip(_pieces(tensor), _pieces(copy), strict=True):
        room.copy_(stage[: len(part)].copy_(part))
    return copy


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    return torch.split(tensor.view(-1).view(torch.uint8), STAGE)


def _stage(size: int) -> Tensor | None:
    """Pinned memory, if there is any to be had."""
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:
        return None
