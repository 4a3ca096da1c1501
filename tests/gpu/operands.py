"""Operands of checks on a device, and outputs that show what nobody writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from pq_compile.formats import NVFP4
from pq_compile.rows import parse
from pq_compile.scratch import Weight


@contextmanager
def poisoned() -> Iterator[None]:
    """What ``torch.empty`` and ``new_empty`` give holds NaN, and 255 where it is bytes."""
    empty, new_empty = torch.empty, Tensor.new_empty

    def spoilt(x: Tensor) -> Tensor:
        if x.numel() and x.device.type != "meta":
            flat = x.view(x.shape or 1).view(torch.uint8)
            flat.fill_(255)  # of every floating dtype here that is a NaN
        return x

    with (
        mock.patch.object(torch, "empty", lambda *a, **k: spoilt(empty(*a, **k))),
        mock.patch.object(Tensor, "new_empty", lambda *a, **k: spoilt(new_empty(*a, **k))),
    ):
        yield


def poison_pool(size: int, device: str) -> None:
    """Leave 255 where libraries will allocate ``size`` outputs of 16 and of 32 bits."""
    for each in (2 * size, 4 * size):
        torch.full((each,), 255, dtype=torch.uint8, device=device)


def packed(n: int, k: int, device: str) -> Weight:
    weight = torch.randn(n, k, device=device) * torch.rand(n, 1, device=device)
    packed, scales, tensor_scale = NVFP4.quantize(NVFP4.pad(weight))
    return packed, scales, tensor_scale


def drawn(text: str, batch: int, tokens: int, device: str) -> list[Tensor]:
    """Inputs in bfloat16; every second row input is a part of something wider."""
    found = []
    for i, (kind, width) in enumerate(parse(text).inputs):
        shape = (batch, tokens if kind == "row" else 1, width * (1 + i % 2))
        found.append(torch.randn(shape, device=device).bfloat16()[..., :width])
    return found
