"""NVFP4 weights by a few rows of 16-bit activations at the speed of memory: the text of kernels.

A group of 16 channels is one 64-bit word of a weight. One warp computes a few outputs: its lanes
stand side by side along a row of the weight, a group each, so that loads are whole lines and the
sum of a group never leaves its lane. Scales and the sum over groups are float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from .errors import Refused
from .vector_ptx import DESIGNS, DTYPES, PREFETCH, SCALE, SCALE_BY_INTEGERS, Design

__all__ = ["DESIGNS", "Vector", "choose", "text", "tuned"]

if TYPE_CHECKING:
    from .kernels import KernelSpec

Vector = Literal["w4a16_half", "w4a16_integer"]

LANES = 32
CHANNELS = 16 * LANES
"""That a warp reads of each of its rows at once."""

MOST_ROWS = 4
"""Of a program; more rows are spread over programs."""

WORDS = """
@triton.jit
def words(four):
    even, odd = tl.split(four.reshape(32, 2, 2))
    zero, two = tl.split(even)
    one, three = tl.split(odd)
    return zero, one, two, three
"""

START = '''
@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["w_ptr", "w_scale_ptr"])
def {NAME}(x_ptr, w_ptr, w_scale_ptr, w_tensor_scale_ptr, bias_ptr, y_ptr, M):
    """y [M, {N}] = x @ w.T, {ROWS} rows and {BN} columns a warp."""
    lane = tl.arange(0, 32)
    row = tl.program_id(0) * {ROWS}
    first = tl.program_id(1) * {BN}
    columns = first + tl.arange(0, {BN})
    offsets = (tl.arange(0, {BN}) * {GROUPS})[:, None] + lane[None, :]
    w_at = w_ptr.to(tl.pointer_type(tl.int64)) + first.to(tl.int64) * {GROUPS} + offsets
    scale_at = w_scale_ptr + first.to(tl.int64) * {GROUPS} + offsets
    channels = (lane * 8)[:, None] + tl.arange(0, 4)[None, :]
    x_at = x_ptr.to(tl.pointer_type(tl.int32)) + row.to(tl.int64) * {WORDS} + channels
'''


def choose(kind: str, capability: tuple[int, int], **shape: Any) -> Vector | None:
    """The design that serves a ``shape`` by "w4a16_vector" or by its own kind; None if none does.

    They take 16-bit activations in whole groups of channels, on devices that Triton compiles for.
    Raises ``Refused`` for a design by its own kind that can't take the shape.
    """
    if kind not in ("w4a16_vector", *DESIGNS):
        return None
    fits = shape["k"] % 16 == 0 and str(shape["dtype"]) in DTYPES
    if kind == "w4a16_vector":
        return "w4a16_half" if fits and capability >= (8, 0) else None
    if not fits:
        raise Refused(
            f"permuquant: {kind} takes bfloat16 and float16 in groups of 16 channels, not "
            f"{shape['dtype']} of {shape['k']}; w4a16_vector takes any"
        )
    return "w4a16_half" if kind == "w4a16_half" else "w4a16_integer"


def tuned(design: str, capability: tuple[int, int], rows: int) -> dict[str, Any]:
    """What a ``KernelSpec`` says of a design beside the shape: measured on a Hopper GPU, where more
    warps at work bring more than asking for memory ahead.
    """
    few = 1 << max(rows - 1, 0).bit_length()
    return {
        "kind": design,
        "tile": (min(few, MOST_ROWS), 4 if few == 1 else 8, CHANNELS),
        "instruction": capability >= (8, 9),
        "warps": 1,
        "stages": 1,
    }


def text(spec: KernelSpec) -> str:
    """The kernel of ``spec``: its tile is (rows, columns, channels read at once) of a warp.

    One stage reads as it goes. More ask L2 for what the program will read, by an instruction of
    compute capability 9.0: at two for all of it; from three on for scales, and weights are copied
    to shared memory so many spans ahead.
    """
    design, (rows, columns, width) = DESIGNS[spec.kind], spec.tile
    k, n, groups = spec.k, spec.n, spec.k // 16
    parts, spans = width // CHANNELS, -(-k // width)
    known = {"NAME": spec.name, "N": n, "ROWS": rows, "BN": columns}
    known |= {"GROUPS": groups, "WORDS": k // 2}
    lines = [f"acc{m} = tl.zeros(({columns}, 32), tl.float32)" for m in range(rows)]
    lines += _ahead(spec, columns * groups)
    deep = f", num_stages={spec.stages}" if spec.stages > 2 else ""
    lines.append(f"for span in tl.range(0, {spans}{deep}):")
    edges = (n % columns != 0, groups % (LANES * parts) != 0)
    steps = [line for part in range(parts) for line in _reads(part, parts, groups, n, edges)]
    for part in range(parts):
        steps += _products(design, part, k, rows, edges[1])
    lines += [f"    {step}" for step in steps]
    lines += _writes(rows, n, spec.bias)
    helpers = (SCALE if spec.instruction else SCALE_BY_INTEGERS) + design.unfold + design.dot
    helpers += PREFETCH if spec.stages > 1 else ""
    body = "".join(f"    {line}\n" for line in lines)
    return helpers + design.fold[str(spec.dtype)] + WORDS + START.format(**known) + body


def _ahead(spec: KernelSpec, groups: int) -> Iterable[str]:
    """Ask L2 for the scales, and at two stages for the weights, of all rows of the program."""
    asked = {"w_scale_ptr": groups} if spec.stages > 1 else {}
    asked |= {"w_ptr": 8 * groups} if spec.stages == 2 else {}
    for name, size in asked.items():
        if size >= 64:
            at = f"({name} + first.to(tl.int64) * {size // spec.tile[1]}).to(tl.int64)"
            yield f"prefetch({at}, {size - 15}, tl.where(first <= {spec.n - spec.tile[1]}, 0, -1))"


def _reads(part: int, parts: int, groups: int, n: int, edges: tuple[bool, bool]) -> Iterable[str]:
    """Weights and scales of one width of the warp; masked only where the shape is ragged."""
    yield f"at{part} = (span * {parts} + {part}) * 32"
    masks = []
    if edges[0]:
        masks.append(f"(columns < {n})[:, None]")
    if edges[1]:
        yield f"inside{part} = lane + at{part} < {groups}"
        masks.append(f"inside{part}[None, :]")
    masked = f", {' & '.join(masks)}, other=0" if masks else ""
    yield f"w{part} = tl.load(w_at + at{part}{masked})"
    yield f"scale{part} = tl.load(scale_at + at{part}{masked})"


def _products(design: Design, part: int, k: int, rows: int, ragged: bool) -> Iterable[str]:
    """One width of each row of x, folded, by the unfolded weights."""
    codes = ", ".join(f"c{i}" for i in range(design.codes))
    folded = ", ".join(f"f{i}" for i in range(design.channels))
    beside = ", ".join(f"f{i}[None, :]" for i in range(design.channels))
    yield f"{codes} = unfold(w{part})"
    yield f"scale = scale_of(scale{part}.to(tl.int32))"
    for m in range(rows):
        masked = f", inside{part}[:, None], other=0" if ragged else ""
        if rows > 1:
            yield f"there = lane + at{part} < tl.where(row + {m} < M, {k // 16}, 0)"
            masked = ", there[:, None], other=0"
        x = f"x_at + ({m * k // 2} + at{part} * 8"
        yield f"x0, x1, x2, x3 = words(tl.load({x}){masked}))"
        yield f"x4, x5, x6, x7 = words(tl.load({x} + 4){masked}))"
        yield f"{folded}, power = fold(x0, x1, x2, x3, x4, x5, x6, x7)"
        yield f"product = dot({codes}, {beside})"
        yield f"acc{m} = tl.fma(product * scale, power[None, :], acc{m})"


def _writes(rows: int, n: int, bias: bool) -> Iterable[str]:
    yield "tensor_scale = tl.load(w_tensor_scale_ptr)"
    if bias:
        yield f"bias = tl.load(bias_ptr + columns, columns < {n}, other=0.0).to(tl.float32)"
    for m in range(rows):
        yield f"y = tl.sum(acc{m}, 1) * tensor_scale" + (" + bias" if bias else "")
        yield f"kept = columns < tl.where(row + {m} < M, {n}, 0)"
        at = f"y_ptr + (row + {m}).to(tl.int64) * {n} + columns"
        yield f"tl.store({at}, y.to(y_ptr.dtype.element_ty), kept)"
