"""Generated text becomes a Triton function, once; and its launches, which should cost little.

Triton binds and specialises the arguments of every launch anew, 30 us and more on a slow host. A
``Launch`` does it once: dtypes and integers never change, and pointers are multiples of 16 as they
were then, or take the long way again.
"""

from __future__ import annotations

import hashlib
import linecache
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def function(name: str, text: str) -> Any:
    """The Triton function ``name`` of ``text``, which is kept in ``linecache``."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = f"<permuquant {name} {digest}>"
    linecache.cache[path] = (len(text), None, text.splitlines(keepends=True), path)
    namespace: dict[str, Any] = {"__name__": "pq_compile.generated_code"}
    exec(compile(text, path, "exec"), namespace)
    return namespace[name]


class Launch:
    """One kernel with its grid and options, for tensors of the same dtypes and the same integers
    each time: whoever makes one sees to that.

    Triton's launch hooks see the first launch only.
    """

    def __init__(self, function: Any, grid: tuple[int, ...], **options: Any) -> None:
        self.function, self.options = function, options
        self.grid = (*grid, 1, 1)[:3]
        self._ready: dict[int, tuple[Any, Any, Any]] = {}  # device -> how to launch on it

    @property
    def instances(self) -> int:
        """Of the program, in all."""
        return math.prod(self.grid)

    def __call__(self, arguments: Sequence[Tensor | int], addresses: int = 0) -> None:
        """``arguments`` are those of the kernel, in order; the first is a tensor.

        ``addresses``: of the tensors that may lie anywhere, bit by bit together; torch's allocator
        gives multiples of 16.
        """
        device = arguments[0].get_device()  # type: ignore[union-attr]
        if device in self._ready and addresses % 16 == 0 and device == torch._C._cuda_getDevice():
            run, function, metadata = self._ready[device]
            stream = torch._C._cuda_getCurrentRawStream(device)
            run(*self.grid, stream, function, metadata, None, None, None, *arguments)
            return
        with torch.cuda.device(device):
            compiled = self.function[self.grid](*arguments, **self.options)
        if device >= 0 and addresses % 16 == 0:
            self._ready[device] = (compiled.run, compiled.function, compiled.packed_metadata)


Spec = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
"""Shape, strides and dtype of a tensor to be made."""


def spec(shape: Sequence[int], dtype: torch.dtype) -> Spec:
    """Of a contiguous tensor."""
    steps = [1] * len(shape)
    for i in range(len(shape) - 2, -1, -1):
        steps[i] = steps[i + 1] * max(shape[i + 1], 1)
    return tuple(shape), tuple(steps), dtype


_cuda_memory = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)


def empty(of: Spec, device: torch.device) -> Tensor:
    """A tensor without values; on a CUDA device as Inductor's code makes one, in a fifth of the
    host's time.
    """
    if device.type == "cuda" and _cuda_memory and device.index == torch._C._cuda_getDevice():
        made: Tensor = _cuda_memory(*of)
        return made
    return torch.empty_strided(of[0], of[1], dtype=of[2], device=device)


def remember(memory: dict[Any, Any], key: Any, value: Any, most: int = 4096) -> Any:
    """``memory[key] = value``; a memory that grew beyond ``most`` begins anew."""
    if len(memory) >= most:
        memory.clear()
    memory[key] = value
    return value
