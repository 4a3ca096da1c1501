"""NVFP4 weights by one to eight rows of 16-bit activations, at the speed of memory: kernel texts.

A group of 16 channels is one 64-bit word of a weight. One warp computes ``BN`` outputs; its lanes
stand side by side along a row of the weight, a group each, so loads are whole lines, and a group's
sum never leaves its lane. What a design says is how the 16 codes of a word become factors, how the
16 channels of x become theirs, and how the two are summed: ``unfold``, ``fold`` and ``dot``.

"half": an e2m1 code shifted into place is its value * 2**-14 as a float16, two to a register. x is
normalised by a power of two a group, so that its largest channel lies in 2**13 .. 2**14: nothing
overflows, bfloat16 is exact, and 2 * 8 products are summed in float16, then scaled in float32.

"integer": a byte permutation looks 128 + 2 * e2m1 up, four at a time. x becomes 16-bit integers of
one power of two a group, in two planes of bytes; sums of four products of bytes are exact.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

LANES = 32
"""Groups that a warp reads at once: 512 channels."""

EXACT_ROWS = 8
"""The most rows a program of these kernels takes; more are spread over programs."""


def assembly(outputs: str, inputs: str, lines: Iterable[str]) -> str:
    """A call of ``tl.inline_asm_elementwise``; "r" words are int32, "f" float32, "l" int64.

    Registers are named by letters: outputs first, then inputs, each ``%0``, ``%1``, ....
    """
    names = [f"a{i}" for i in range(len(inputs))]
    types = {"r": "tl.int32", "f": "tl.float32"}
    constraints = ",".join([*(f"=&{one}" for one in outputs), *inputs])
    body = "\n        ".join(line.replace("%", "$") for line in lines)
    kinds = ", ".join(types[one] for one in outputs)
    returned = kinds if len(outputs) == 1 else f"({kinds})"
    return f'''({", ".join(names)}):
    return tl.inline_asm_elementwise(
        """
        {{
        {body}
        }}
        """,
        "{constraints}",
        [{", ".join(names)}],
        dtype={returned},
        is_pure=True,
        pack=1,
    )
'''
