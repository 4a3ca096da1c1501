"""The lowered graph through Inductor on a GPU; on a CPU it runs as it is, by the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .options import Options
from .runtime import Program


def compile_lowered(
    lowered: Program,
    example_inputs: Sequence[Any],
    options: Options,
    mode: str | None,
) -> Callable[..., Any]:
    """The callable of ``lowered``'s graph; ``example_inputs`` are one per input of that graph.

    ``mode`` is Inductor's and means nothing on a CPU.
    """
    tensors = [value for value in example_inputs if isinstance(value, Tensor)]
    if not any(tensor.is_cuda for tensor in tensors):
        return lowered.lowered
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = list_mode_options(mode) if mode else None
    return compile_fx(lowered.lowered, list(example_inputs), config_patches=patches)  # type: ignore[return-value]
