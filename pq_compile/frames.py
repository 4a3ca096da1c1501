"""What Dynamo's frames tell of the graph that it is compiling."""

from __future__ import annotations

import sys
from typing import Any


def is_whole_model() -> bool:
    """Whether Dynamo sees all of the user's call in one graph: no break, no enclosing frame.

    Where Dynamo's internals cannot tell, the answer is no: a part of a model may hold no linear.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        tx: Any = InstructionTranslator.current_tx()
        broken = tx.output.compile_subgraph_reason.graph_break
        resumed = tx.f_code.co_name.startswith("torch_dynamo_resume_in")
    except AttributeError:
        return False
    return not broken and not resumed and not _called_by_a_compiled_frame()


def _called_by_a_compiled_frame() -> bool:
    """Between Dynamo's entry and its compiler the stack holds a frame that is not torch's own."""
    frame, below = sys._getframe(), []
    while frame is not None and frame.f_code.co_name != "compile_wrapper":
        below.append(frame.f_code.co_filename)
        frame = frame.f_back  # type: ignore[assignment]
    ours = ("/torch/", "/pq_compile/", "/passes/")
    return not all(any(part in name for part in ours) for name in below)
