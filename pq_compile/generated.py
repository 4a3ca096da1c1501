"""Generated text becomes a Triton function, once; and its launches, which should cost little.

Triton binds and specialises the arguments of every launch anew, 30 us and more on a slow host. A
``Launch`` does it once for the dtypes of its tensors: its integers never change, and pointers are
multiples of 16 as they were then, or take the long way again.
"""

from __future__ import annotations

import hashlib
import linecache
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
    """One kernel with its grid and options, launched with the same integers each time.

    Triton's launch hooks see the first launch only.
    """

    def __init__(self, function: Any, grid: tuple[int, ...], **options: Any) -> None:
        self.function, self.options = function, options
        self.grid = (*grid, 1, 1)[:3]
        self._ready: dict[Any, tuple[Any, ...]] = {}  # device and dtypes -> how to launch

    def __call__(self, *arguments: Tensor | int) -> None:
        """``arguments`` are those of the kernel, in order; the first is a tensor."""
        device = arguments[0].get_device()  # type: ignore[union-attr]
        key, addresses = [device], 0
        for one in arguments:
            if type(one) is not int:
                key.append(one.dtype)  # type: ignore[union-attr]
                addresses |= one.data_ptr()  # type: ignore[union-attr]
        ready = None if addresses % 16 else self._ready.get(tuple(key))
        if ready is not None and device == torch._C._cuda_getDevice():
            run, *known = ready
            stream = torch._C._cuda_getCurrentRawStream(device)
            run(*self.grid, stream, *known, None, None, None, *arguments)
            return
        with torch.cuda.device(device):
            compiled = self.function[self.grid](*arguments, **self.options)
        if device >= 0 and addresses % 16 == 0:
            self._ready[tuple(key)] = (compiled.run, compiled.function, compiled.packed_metadata)


def remember(memory: dict[Any, Any], key: Any, value: Any, most: int = 4096) -> Any:
    """``memory[key] = value``; a memory that grew beyond ``most`` begins anew."""
    if len(memory) >= most:
        memory.clear()
    memory[key] = value
    return value
