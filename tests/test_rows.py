"""Row programs: their spelling, their definition, and what becomes of rows at each target."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pq_compile.errors import Refused
from pq_compile.formats import NVFP4
from pq_compile.minifloat import E2M1, E4M3
from pq_compile.rows import (
    FOLD,
    OPS,
    SMALLEST_PEAK,
    Kept,
    Step,
    Target,
    fold,
    parse,
    quantise_rows,
    reference,
    values,
)
from tests.programs import inputs_of, random_program, strays

QUANTISING: tuple[Target, ...] = ("fp8", "nvfp4", "nvfp4_fp8", "nvfp4_half")

# ---------------------------------------------------------------- spelling


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from(get_args(Target)), st.booleans())
def test_a_program_is_what_its_text_spells(seed: int, target: Target, exact: bool) -> None:
    program = random_program(seed, target, (48, 16), exact)
    assert parse(str(program)) == program
    assert str(parse(str(program))) == str(program)


def test_the_spelling_is_one_line_that_can_be_read() -> None:
    program = parse(
        "row 32 | row 32 | sample 32 | mul 1 2 | add 0 3 | layer_norm 4 1e-06 | mean 5 | mul 5 -2.0"
        " | keep 4 bfloat16 | fp8 5 7"
    )
    assert [one.kind for one in program.inputs] == ["row", "row", "sample"]
    assert program.steps[2] == Step("layer_norm", (4, 1e-06))
    assert program.steps[4] == Step("mul", (5, -2.0))
    assert program.kept == (Kept(4, torch.bfloat16),)
    assert program.widths == (32, 32, 32, 32, 32, 32, 1, 32)
    assert program.width == 64


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("row 32 | cosine 0 | fp8 1", "'cosine' is no operation of a row program"),
        ("row 32 | int8 0", "'int8' is nothing that a row program can quantise to"),
        ("row 24 | fp8 0", "quantises groups of 16 channels, and value 0 has 24"),
        ("row 32 | mean 0 | nvfp4 1", "quantises groups of 16 channels, and value 1 has 1"),
    ],
)
def test_what_is_no_program_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(Refused, match=sentence):
        parse(text)


# ---------------------------------------------------------------- values

UNARY: dict[str, Any] = {
    "neg": torch.neg,
    "square": torch.square,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "exp": torch.exp,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "mean": lambda x: x.mean(-1, keepdim=True),
}
BINARY: dict[str, Any] = {"add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div}
NORMS: dict[str, Any] = {
    "layer_norm": lambda x: F.layer_norm(x, (32,), eps=1e-3),
    "rms_norm": lambda x: F.rms_norm(x, (32,), eps=1e-3),
}


def test_every_operation_is_tested() -> None:
    assert {*UNARY, *BINARY, *NORMS} == set(OPS)


def kept(steps: str, *inputs: Tensor) -> Tensor:
    """The last value of the program."""
    last = len(inputs) + steps.count("|")
    lines = " | ".join(["row 32"] * len(inputs))
    (found,) = reference(parse(f"{lines} | {steps} | keep {last} float64 | none"), inputs)
    return found


@pytest.mark.parametrize("name", OPS)
def test_an_operation_is_that_of_torch(name: str) -> None:
    torch.manual_seed(0)
    x, y = torch.rand(2, 3, 32, dtype=torch.float64) + 0.1, torch.randn(2, 3, 32).double()
    if name in BINARY:
        assert torch.equal(kept(f"{name} 0 1", x, y), BINARY[name](x, y))
        assert torch.equal(kept(f"{name} 0 2.5", x), BINARY[name](x, 2.5))
        other_way = BINARY[name](torch.full_like(x, 2.5), x)
        torch.testing.assert_close(kept(f"{name} 2.5 0", x), other_way, rtol=1e-15, atol=0)
    elif name in NORMS:
        torch.testing.assert_close(
            kept(f"{name} 0 0.001", x), NORMS[name](x), rtol=1e-12, atol=1e-12
        )
    else:
        assert torch.equal(kept(f"{name} 0", x), UNARY[name](x).expand(-1, -1, -1))


def test_values_are_fp32_for_16_bit_inputs_and_fp64_for_fp64() -> None:
    program = parse("row 16 | sample 16 | mul 0 1 | add 2 1.0 | fp8 3")
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        x = torch.randn(2, 3, 16, dtype=dtype), torch.randn(16, dtype=dtype)
        found = values(program, x)
        assert {one.dtype for one in found} == {wide}
        assert torch.equal(found[-1], x[0].to(wide) * x[1].to(wide) + 1.0)


@pytest.mark.parametrize("shape", [(16,), (1, 1, 16), (2, 1, 16)], ids=str)
def test_a_sample_input_serves_all_rows_of_its_sample(shape: tuple[int, ...]) -> None:
    x, y = torch.randn(2, 3, 16), torch.randn(shape)
    program = parse("row 16 | sample 16 | mul 0 1 | keep 1 float32 | keep 2 float32 | none")
    shared, product = reference(program, [x, y])
    assert torch.equal(product, x * y)
    assert torch.equal(shared, y.expand(2, 3, 16))
    assert shared.is_contiguous()


# ---------------------------------------------------------------- what becomes of rows


def test_parts_lie_side_by_side() -> None:
    x, y = torch.randn(2, 3, 32), torch.randn(2, 3, 16)
    for target in QUANTISING:
        parts = reference(parse(f"row 32 | row 16 | neg 0 | {target} 2 1"), [x, y])
        whole = reference(parse(f"row 48 | {target} 0"), [torch.cat([-x, y], -1)])
        for one, other in zip(parts, whole, strict=True):
            assert torch.equal(one.float(), other.float())


@settings(derandomize=True, max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from(QUANTISING))
def test_codes_are_the_nearest(seed: int, target: Target) -> None:
    program = random_program(seed, target, (32, 16), exact=False)
    inputs = inputs_of(program, 2, 3, seed=seed)
    found = reference(program, inputs)
    assert strays(program, inputs, found)[:2] == (0, 0)


@pytest.mark.parametrize("target", QUANTISING)
def test_a_code_beside_the_nearest_is_seen(target: Target) -> None:
    """What the tests on a device rest on."""
    program, x = parse(f"row 64 | {target} 0"), torch.randn(4, 64)
    found = reference(program, [x])
    peak = int(x.abs().flatten().argmax())
    codes = found[0].view(torch.uint8).flatten()
    byte = {"nvfp4": peak // 2, "nvfp4_half": 2 * peak + 1}.get(target, peak)
    codes[byte] ^= 0x08 if target == "nvfp4" and peak % 2 == 0 else 0x80  # its sign
    assert strays(program, [x], found).codes == 1


def test_rows_are_e4m3_of_a_scale_each() -> None:
    torch.manual_seed(1)
    x = torch.randn(50, 64) * torch.logspace(-20, 20, 50)[:, None]
    codes, scale = quantise_rows(x)
    assert (codes.dtype, scale.dtype, scale.shape) == (torch.float8_e4m3fn, torch.float32, (50, 1))
    assert torch.equal(scale, x.abs().amax(-1, keepdim=True) / torch.tensor(448.0))
    assert (codes.float().abs().amax(-1) == 448).all()
    error = (codes.double() * scale - x).abs()
    assert (error <= x.abs() * (2.0**-4 + 1e-6) + scale * 2.0**-10).all()


@pytest.mark.parametrize("shape", [(64,), (0, 64), (2, 0, 64), (3, 0), (2, 3, 64)], ids=str)
def test_rows_of_any_shape_are_quantised(shape: tuple[int, ...]) -> None:
    codes, scale = quantise_rows(torch.randn(shape))
    assert (codes.shape, scale.shape) == (shape, (*shape[:-1], 1))


def test_rows_that_are_zero_or_tiny_have_a_finite_scale() -> None:
    x = torch.zeros(3, 16)
    x[1], x[2, 3] = 1e-45, 2.0**-101
    codes, scale = quantise_rows(x)
    assert (scale == SMALLEST_PEAK / 448).all()
    assert (codes[0].float() == 0).all()
    assert codes[2, 3].float() == 224
    assert (1.0 / scale).isfinite().all()


def test_a_nan_stays_and_an_infinity_becomes_one() -> None:
    x = torch.ones(3, 16)
    x[0, 4], x[1, 5] = math.nan, -math.inf
    codes, scale = quantise_rows(x)
    assert codes[0].float().isnan().nonzero().tolist() == [[4]]
    assert (codes[0, :4].float() == 448).all()  # a NaN is no peak
    assert codes[1].float().isnan().nonzero().tolist() == [[5]]
    assert (codes[1, 6:].float() == 0).all()
    assert scale[1] == math.inf
    assert (codes[2].double() * scale[2]).sub(1).abs().max() < 1e-6


def test_a_sixth_is_exact_for_what_is_three_times_a_power_of_two() -> None:
    """±6, ±3 and ±1.5 of every group; and nothing exceeds the largest e4m3 number."""
    scales = E4M3.values()[1:127].view(-1, 1).to(torch.float8_e4m3fn)
    elements = E2M1.values().repeat(126, 1)
    folded = fold(elements, scales).float()
    assert folded.abs().max() == 448
    for i, element in enumerate(E2M1.values().tolist()):
        exact = element * scales.double()[:, 0] / 6
        if abs(element) in (6, 3, 1.5):
            normal = exact.abs() >= 2.0**-6
            assert torch.equal(folded[normal, i].double(), exact[normal])
        assert ((folded[:, i] - exact).abs() <= exact.abs() / 16 + 2.0**-10).all()


def test_the_targets_of_nvfp4_hold_the_same_elements() -> None:
    torch.manual_seed(2)
    x = torch.randn(5, 64)
    x[3, 16:32] = 0
    packed, scales, tensor_scale = reference(parse("row 64 | nvfp4 0"), [x])
    for one, other in zip((packed, scales, tensor_scale), NVFP4.quantize(x), strict=True):
        assert torch.equal(one.float(), other.float())
    decoded = NVFP4.decode(packed, scales)
    half, same = reference(parse("row 64 | nvfp4_half 0"), [x])
    assert half.dtype == torch.bfloat16
    assert torch.equal(half.float(), decoded)
    assert same == tensor_scale
    folded, six = reference(parse("row 64 | nvfp4_fp8 0"), [x])
    sixths = NVFP4.times(NVFP4.unpack(packed), scales.float() * FOLD)
    assert torch.equal(folded.float(), E4M3.round_(sixths))
    assert torch.equal(six, (6.0 * tensor_scale).expand(5, 1))
    assert not (folded.view(torch.uint8) == 0x80).any()  # a zero has no sign


def test_a_group_with_a_nan_is_nan_at_every_target_of_nvfp4() -> None:
    x = torch.randn(4, 64)
    x[1, 20], x[2, 40] = math.nan, math.inf
    hurt = torch.zeros(4, 4, dtype=torch.bool)
    hurt[1, 1] = hurt[2, 2] = True
    for target in ("nvfp4_fp8", "nvfp4_half"):
        found = reference(parse(f"row 64 | {target} 0"), [x])
        assert torch.equal(
            found[0].float().isnan().view(4, 4, 16), hurt[..., None].expand(4, 4, 16)
        )
        assert found[1].isfinite().all()
