"""The kernels of row programs in Triton's CPU interpreter against their definition, and their text.

The interpreter rounds once where a device does, so that programs of operations that are rounded
once give the same bits; others may differ where a number lies at a tie.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pq_compile import row_kernels
from pq_compile.errors import Refused
from pq_compile.row_text import MOST_CHUNKS, RowKernel, chunks, source
from pq_compile.rows import Target, parse, reference, values
from tests.conftest import Golden
from tests.interpreting import Interpreter, interpreter
from tests.near_ties import near_ties
from tests.programs import differing, inputs_of, random_program, strays

TARGETS: tuple[Target, ...] = get_args(Target)
QUANTISING = tuple(target for target in TARGETS if target != "none")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDTHS = [(16,), (48,), (80, 32), (112,), (64, 16, 144), (272,)]


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Interpreter]:
    with interpreter() as run:
        yield run


def run_by(rows: int, text: str, inputs: Sequence[Tensor]) -> list[Tensor]:
    """``run`` with so many rows a program."""
    with pytest.MonkeyPatch.context() as patch:
        tuned = row_kernels.tuned
        patch.setattr(row_kernels, "tuned", lambda *args: replace(tuned(*args), rows=rows))
        patch.setattr(row_kernels, "_PLANS", {})
        return row_kernels.run(text, inputs)


# ---------------------------------------------------------------- against the definition


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    target=st.sampled_from(TARGETS),
    widths=st.sampled_from(WIDTHS),
    shape=st.sampled_from([(1, 1), (2, 3), (1, 5), (3, 1)]),
    dtype=st.sampled_from(DTYPES),
)
def test_programs_that_are_rounded_once_give_the_same_bits(
    interpreted: Interpreter,
    seed: int,
    target: Target,
    widths: tuple[int, ...],
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    program = random_program(seed, target, widths, exact=True)
    inputs = inputs_of(program, *shape, dtype=dtype, seed=seed)
    found = interpreted(row_kernels.run, str(program), inputs)
    assert differing(found, reference(program, inputs)) == 0


@settings(max_examples=25, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    target=st.sampled_from(TARGETS),
    widths=st.sampled_from(WIDTHS),
)
@example(seed=51160, target="fp8", widths=(112,))
@example(seed=6975, target="fp8", widths=(80, 32))
def test_other_programs_give_the_nearest_codes(
    interpreted: Interpreter, seed: int, target: Target, widths: tuple[int, ...]
) -> None:
    program = random_program(seed, target, widths, exact=False)
    inputs = inputs_of(program, 2, 3, seed=seed)
    found = interpreted(row_kernels.run, str(program), inputs)
    expected = reference(program, inputs)
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in expected]
    if target != "none":
        assert strays(program, inputs, found)[:2] == (0, 0)
    exact = values(program, [x.double() for x in inputs])
    first = len(found) - len(program.kept)
    for one, other, (value, dtype) in zip(
        found[first:], expected[first:], program.kept, strict=True
    ):
        truth = exact[value]
        largest = torch.stack([v.abs().amax().double() for v in exact]).max()  # before terms cancel
        rounding = 2e-3 if dtype == torch.float16 else 2e-6
        size = truth.abs() + truth.abs().amax(-1, keepdim=True)
        lost = (other.double() - truth).abs().amax(-1, keepdim=True)  # to fp32, where terms cancel
        assert ((one.double() - truth).abs() <= rounding * size + 4 * lost + 1e-6 * largest).all()


FLUX = (
    "row 320 | row 320 | sample 320 | sample 320 | sample 320 | mul 1 2 | add 0 5"
    " | layer_norm 6 1e-06 | add 3 1.0 | mul 7 8 | add 9 4 | keep 6 float32 | "
)


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("target", QUANTISING)
def test_residual_norm_and_modulation_for_any_rows_a_program(
    interpreted: Interpreter, target: Target, rows: int
) -> None:
    program = parse(f"{FLUX}{target} 10")
    inputs = inputs_of(program, 2, 5, seed=rows)
    found = interpreted(run_by, rows, str(program), inputs)
    assert strays(program, inputs, found)[:2] == (0, 0)
    assert torch.equal(found[-1], inputs[0] + inputs[1] * inputs[2])


# ---------------------------------------------------------------- inputs as they come


def views() -> Iterator[tuple[str, Tensor]]:
    """Tensors [2, 5, 48], each in memory of its own kind."""
    yield "contiguous", torch.randn(2, 5, 48)
    yield "part of the channels", torch.randn(2, 5, 112)[..., 32:80]
    yield "part of the rows", torch.randn(2, 9, 48)[:, 2:7]
    yield "every second sample and row", torch.randn(4, 10, 48)[::2, ::2]
    yield "samples within rows", torch.randn(5, 2, 48).transpose(0, 1)
    yield "channels with gaps", torch.randn(2, 5, 96)[..., ::2]
    yield "channels outside", torch.randn(48, 2, 5).permute(1, 2, 0)
    yield "one row for all", torch.randn(2, 1, 48).expand(2, 5, 48)
    yield "one sample for all", torch.randn(1, 5, 48).expand(2, 5, 48)
    yield "one number for all", torch.randn(2, 5, 1).expand(2, 5, 48)


@pytest.mark.parametrize("name", [name for name, _ in views()])
def test_views_are_read_as_they_lie(interpreted: Interpreter, name: str) -> None:
    torch.manual_seed(1)
    x = dict(views())[name]
    program = parse("row 48 | row 48 | sub 0 1 | keep 2 float32 | fp8 2")
    for inputs in ([x, torch.randn(2, 5, 48)], [torch.randn(2, 5, 48), x]):
        found = interpreted(row_kernels.run, str(program), inputs)
        assert differing(found, reference(program, inputs)) == 0


def test_tensors_of_two_dimensions_are_one_sample(interpreted: Interpreter) -> None:
    program = parse("row 48 | sample 48 | mul 0 1 | fp8 2")
    for shared in (torch.randn(48), torch.randn(1, 48)):
        inputs = [torch.randn(5, 48), shared]
        found = interpreted(row_kernels.run, str(program), inputs)
        assert found[0].shape == (5, 48)
        assert differing(found, reference(program, inputs)) == 0


def test_tensors_of_more_dimensions_are_refused() -> None:
    with pytest.raises(Refused, match=r"rows of 2 or 3 dimensions, not of shape \[2, 3, 5, 48\]"):
        row_kernels.run("row 48 | fp8 0", [torch.randn(2, 3, 5, 48)])


@pytest.mark.parametrize("target", TARGETS)
def test_no_rows_are_no_launch(interpreted: Interpreter, target: Target) -> None:
    text = f"row 48 | keep 0 float32 | {target}" + (" 0" if target != "none" else "")
    for shape in ((0, 48), (2, 0, 48), (0, 3, 48)):
        found = interpreted(row_kernels.run, text, [torch.randn(shape)])
        expected = reference(parse(text), [torch.randn(shape)])
        assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in expected]


# ---------------------------------------------------------------- hard rows


@pytest.mark.parametrize("target", QUANTISING)
@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16", "fp32"])
def test_hard_rows_are_those_of_the_definition(
    interpreted: Interpreter, target: Target, dtype: torch.dtype
) -> None:
    torch.manual_seed(2)
    x = torch.randn(12, 80, dtype=dtype)
    x[0], x[1] = 0, -0.0
    x[2, 3], x[3, 20], x[4, 79] = math.nan, math.inf, -math.inf
    x[5] *= 1e-3
    x[6] *= 1e-7
    x[7] = torch.finfo(dtype).smallest_normal / 4
    x[8] = -x[8].abs()
    x[9], x[10, :16], x[10, 16:] = math.nan, math.inf, 0
    x[11, ::16] = 60000.0
    found = interpreted(row_kernels.run, f"row 80 | {target} 0", [x])
    assert differing(found, reference(parse(f"row 80 | {target} 0"), [x])) == 0


@pytest.mark.parametrize("target", QUANTISING)
@pytest.mark.parametrize("factor", [0.0, 1e-41, 1e-35, 1e-31, 1e34, math.nan], ids=str)
def test_tensors_at_the_ends_of_the_range_are_those_of_the_definition(
    interpreted: Interpreter, target: Target, factor: float
) -> None:
    torch.manual_seed(3)
    x = torch.randn(4, 48) * factor
    found = interpreted(row_kernels.run, f"row 48 | {target} 0", [x])
    assert differing(found, reference(parse(f"row 48 | {target} 0"), [x])) == 0


@pytest.mark.parametrize("target", QUANTISING)
def test_ties_and_their_neighbours_are_those_of_the_definition(
    interpreted: Interpreter, target: Target
) -> None:
    x = near_ties()
    found = interpreted(row_kernels.run, f"row 256 | {target} 0", [x])
    assert differing(found, reference(parse(f"row 256 | {target} 0"), [x])) == 0


def test_a_row_of_e4m3_ties_is_rounded_to_even(interpreted: Interpreter) -> None:
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (values[1:] + values[:-1]) / 2
    near = torch.cat([ties, ties.nextafter(ties * 2), ties.nextafter(ties * 0), -ties])
    x = torch.cat([torch.tensor([448.0]), near, torch.zeros(7)])[None]
    (codes, scale) = interpreted(row_kernels.run, f"row {x.shape[1]} | fp8 0", [x])
    assert scale.item() == 1.0
    assert torch.equal(codes.float(), x.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("width", [16, 3072, 3088, 15360])
def test_idle_lanes_take_no_part(interpreted: Interpreter, width: int) -> None:
    """exp(0) = 1 would be the peak of a row of lesser numbers, and count in a mean."""
    program = parse(f"row {width} | exp 0 | mean 1 | mul 1 2 | keep 3 float32 | fp8 3")
    x = [-3 - torch.rand(1, width)]
    codes, scale, kept = interpreted(row_kernels.run, str(program), x)
    assert strays(program, x, [codes, scale])[:2] == (0, 0)
    torch.testing.assert_close(kept, reference(program, x)[-1], rtol=2e-6, atol=0)


# ---------------------------------------------------------------- text


@given(st.integers(1, 40000))
def test_chunks_cover_a_row_once(width: int) -> None:
    found = chunks(width)
    assert len(found) <= MOST_CHUNKS
    assert [chunk.start for chunk in found] == [
        sum(c.size for c in found[:i]) for i in range(len(found))
    ]
    assert sum(chunk.valid for chunk in found) == width
    assert all(chunk.size & (chunk.size - 1) == 0 and chunk.valid > 0 for chunk in found)
    assert len({chunk.size for chunk in found}) == 1
    assert sum(chunk.size for chunk in found) <= max(width + 15, 1.25 * width)


@pytest.mark.parametrize("width", [3072, 12288, 6144, 1536, 3584])
def test_no_lane_is_idle_at_the_widths_of_real_models(width: int) -> None:
    assert not any(chunk.masked for chunk in chunks(width))


KERNELS: dict[str, RowKernel] = {
    "norm_and_modulate_to_fp8": RowKernel(
        parse(FLUX.replace("320", "3072").replace("float32", "bfloat16") + "fp8 10"),
        "once",
        rows=2,
        instruction=True,
    ),
    "parts_to_nvfp4": RowKernel(
        parse("row 48 | row 32 | gelu_tanh 1 | nvfp4 0 2"), "codes", rows=1, warps=2
    ),
}


@pytest.mark.parametrize("name", KERNELS)
def test_source_of(golden: Golden, name: str) -> None:
    golden(source(KERNELS[name]))


def test_a_kernel_loads_once_and_carries_its_text() -> None:
    for kernel in KERNELS.values():
        loaded: Any = row_kernels.load(kernel)
        assert loaded is row_kernels.load(kernel)
        assert loaded.fn.__name__ == kernel.name
        assert loaded.src in source(kernel)


def test_the_text_says_what_it_computes() -> None:
    for kernel in KERNELS.values():
        assert source(kernel).startswith(f"# {kernel.program}\n# {kernel.phase}, ")
