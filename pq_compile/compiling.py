"""The lowered graph through Inductor on a GPU; on a CPU it runs as it is, by the reference.

Inductor is told of the lowered graph what Dynamo told of the original: where each input comes from,
and that parameters, packed or not, are *static*: CUDA graphs read them where they are, not from
copies made in every call. Static does not mean fixed. A recorded CUDA graph is replayed only if
every static input is at the address that it was recorded with (``CUDAGraphNode.check_invariants``
of Inductor's CUDA graph trees), so weights that were replaced are recorded anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .options import Options
from .runtime import Program

UNCHECKED = {"size_asserts": False}
"""For our graphs alone, as three thousand checks in every call cost a millisecond.

Dynamo's guards have seen the layout of each argument before Inductor's code would. A packed weight
is contiguous, as it was compiled for, and a reordered copy is laid out as its original. What our
operators return is compared with what they say they return in tests.
"""


def compile_lowered(
    lowered: Program,
    example_inputs: Sequence[Any],
    options: Options,
    mode: str,
) -> Callable[..., Any]:
    """The callable of ``lowered``'s graph; ``example_inputs`` are one per input of that graph.

    ``mode`` is Inductor's and means nothing on a CPU.
    """
    if not on_gpu([value for value in example_inputs if isinstance(value, Tensor)]):
        return lowered.lowered
    from torch._inductor import config, list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = list_mode_options(mode)
    if config.triton.cudagraph_trees:  # CUDA graphs of the older kind don't look at addresses
        tell_sources(lowered)
        patches = {**patches, **UNCHECKED}
    return compile_fx(lowered.lowered, list(example_inputs), config_patches=patches)  # type: ignore[return-value]


def on_gpu(tensors: Sequence[Tensor]) -> bool:
    return any(tensor.is_cuda for tensor in tensors)


def tell_sources(lowered: Program) -> None:
    """Give the lowered graph, in place, what AOTAutograd reads of a graph of Dynamo's.

    Does nothing for one that is not Dynamo's.
    """
    from torch._dynamo.source import AttrSource, LocalSource

    original, module = lowered.module, lowered.lowered
    if "dynamo_compile_id" not in original.meta:
        return
    theirs = original.graph.find_nodes(op="placeholder")
    ours = module.graph.find_nodes(op="placeholder")
    for node, (argument, field) in zip(ours, lowered.sources, strict=True):
        source = theirs[argument]._dynamo_source
        node._dynamo_source = source if field is None else AttrSource(source, node.name)
        if argument in lowered.parameters:
            told = node.meta.get("tensor_dict", {})
            node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded", **told}
    constants = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    known: Any = original._param_name_to_source
    named: Any = {name: known.get(name, LocalSource(name)) for name in constants}
    module._param_name_to_source = named
    module.meta |= original.meta
