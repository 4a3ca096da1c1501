"""The formats against ml_dtypes, against their definition by brute force, and on hard tensors."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from pq_compile import formats
from pq_compile.errors import Refused
from pq_compile.formats import (
    FORMATS,
    INT3,
    INT4,
    MXFP4,
    NVFP4,
    SMALLEST_TENSOR_SCALE,
    Format,
)
from pq_compile.minifloat import E2M1, E4M3, Integer, Minifloat
from tests.near_ties import near_ties

ORACLES = [(E2M1, ml_dtypes.float4_e2m1fn), (E4M3, ml_dtypes.float8_e4m3fn)]
ALL = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
MINIFLOATS = pytest.mark.parametrize(("minifloat", "oracle"), ORACLES, ids=["e2m1", "e4m3"])
NAN, INF = math.nan, math.inf


def bytes_of(x: Tensor) -> Tensor:
    return x.contiguous().view(x.shape or 1).view(torch.uint8)


def every_half(dtype: torch.dtype) -> Tensor:
    return torch.arange(-32768, 32768).to(torch.int16).view(dtype)


def within(minifloat: Minifloat, x: Tensor) -> Tensor:
    """Where ours and ml_dtypes must agree: below the point where rounding would exceed largest."""
    if minifloat is E2M1:
        return ~x.isnan()
    return x.abs() <= 464


def oracle_codes(oracle: type, x: Tensor) -> Tensor:
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(x.numpy().astype(oracle).view(np.uint8))


def midpoints(minifloat: Minifloat) -> Tensor:
    values = minifloat.values()[: 2 ** (minifloat.bits - 1)]
    values = values[values.isfinite()]
    middle = (values[1:] + values[:-1]) / 2
    up, down = middle.nextafter(torch.tensor(INF)), middle.nextafter(torch.tensor(-INF))
    positive = torch.cat([values, middle, up, down])
    return torch.cat([positive, -positive])


@MINIFLOATS
def test_every_code_decodes_as_in_ml_dtypes(minifloat: Minifloat, oracle: type) -> None:
    codes = np.arange(2**minifloat.bits, dtype=np.uint8)
    expected = torch.from_numpy(codes.view(oracle).astype(np.float32))
    assert torch.equal(minifloat.values().nan_to_num(nan=-1), expected.nan_to_num(nan=-1))
    assert torch.equal(minifloat.values().signbit()[:-1], expected.signbit()[:-1])


@MINIFLOATS
def test_every_code_survives_decode_and_encode(minifloat: Minifloat, oracle: type) -> None:
    codes = torch.arange(2**minifloat.bits, dtype=torch.uint8)
    finite = minifloat.values().isfinite()
    assert torch.equal(minifloat.encode(minifloat.values())[finite], codes[finite])


@MINIFLOATS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_precision_input_encodes_as_in_ml_dtypes(
    minifloat: Minifloat, oracle: type, dtype: torch.dtype
) -> None:
    x = every_half(dtype).float()
    same = minifloat.encode(x) == oracle_codes(oracle, x)
    assert same[within(minifloat, x)].all()


@MINIFLOATS
def test_midpoints_and_their_neighbours_encode_as_in_ml_dtypes(
    minifloat: Minifloat, oracle: type
) -> None:
    x = midpoints(minifloat)
    assert torch.equal(minifloat.encode(x), oracle_codes(oracle, x))


@MINIFLOATS
def test_rounding_takes_the_nearest_value_and_the_even_code_of_two(
    minifloat: Minifloat, oracle: type
) -> None:
    x = torch.cat([every_half(torch.float16).float()[::3], midpoints(minifloat)])
    x = x[within(minifloat, x) & x.isfinite()].double()
    values = minifloat.values()[: 2 ** (minifloat.bits - 1)].double()
    values = values[values.isfinite()]
    distance = (x.abs()[:, None] - values).abs()
    odd = torch.arange(len(values)) % 2
    candidate = distance == distance.amin(1, keepdim=True)
    nearest = values[torch.where(candidate, odd, 2).argmin(1)]
    assert torch.equal(minifloat.round_(x.float()).double().abs(), nearest)


@pytest.mark.parametrize(
    ("x", "e2m1", "e4m3"),
    [
        (NAN, 0x0, 0x7F),
        (-NAN, 0x0, 0x7F),
        (INF, 0x7, 0x7E),
        (-INF, 0xF, 0xFE),
        (464.0, 0x7, 0x7E),
        (465.0, 0x7, 0x7E),
        (1e30, 0x7, 0x7E),
        (0.0, 0x0, 0x00),
        (-0.0, 0x8, 0x80),
        (-1e-30, 0x8, 0x80),
        (1e-45, 0x0, 0x00),
        (2.0**-10, 0x0, 0x00),
        (1.5 * 2**-9, 0x0, 0x02),
    ],
)
def test_the_policy_for_what_the_grid_does_not_hold(x: float, e2m1: int, e4m3: int) -> None:
    given = torch.tensor([x])
    assert (E2M1.encode(given).item(), E4M3.encode(given).item()) == (e2m1, e4m3)


def test_integers_are_symmetric_and_saturate() -> None:
    x = torch.tensor([-9.0, -3.5, -2.5, -0.5, 0.5, 1.5, 2.5, 9.0])
    assert Integer(3).round_(x.clone()).tolist() == [-3, -3, -2, -0.0, 0, 2, 2, 3]
    assert Integer(4).encode(x).tolist() == [9, 12, 14, 0, 0, 2, 2, 7]


def test_the_even_column_is_the_low_nibble() -> None:
    x = torch.zeros(1, 16)
    x[0, 0], x[0, 1], x[0, 15] = 6.0, -1.0, 0.5
    packed, scales, tensor_scale = NVFP4.quantize(x)
    assert [f"{byte:02x}" for byte in packed[0].tolist()] == ["a7", *["00"] * 6, "10"]
    assert bytes_of(scales).item() == 0x7E
    assert tensor_scale == torch.tensor(6 / 2688)


def test_three_bit_integers_fill_three_bytes_from_the_lowest_bit_up() -> None:
    elements = torch.tensor([1.0, 2.0, 3.0, -1.0, -2.0, -3.0, 0.0, 1.0])
    word = sum(int(e) % 8 << 3 * i for i, e in enumerate(elements))
    assert INT3.pack(elements).tolist() == [word & 255, word >> 8 & 255, word >> 16]


@ALL
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_shapes_dtypes_and_the_size_that_is_promised(form: Format, dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 128, dtype=dtype)
    packed, scales, tensor_scale = form.quantize(x)
    assert packed.shape == (3, 5, 128 * form.bits // 8)
    assert scales.shape == (3, 5, 128 // form.group)
    assert (packed.dtype, scales.dtype) == (torch.uint8, form.scale_dtype)
    assert (tensor_scale.dtype, tensor_scale.shape) == (torch.float32, ())
    stored = packed.nbytes + scales.nbytes + (4 if form.has_tensor_scale else 0)
    assert form.bits_per_weight(15, 128) == stored * 8 / (15 * 128)
    decoded = form.dequantize(packed, scales, tensor_scale)
    assert (decoded.shape, decoded.dtype) == (x.shape, torch.float32)


def test_bits_per_weight_counts_the_padding() -> None:
    assert NVFP4.bits_per_weight(1, 120) == (128 / 2 + 128 / 16 + 4) * 8 / 120
    assert MXFP4.bits_per_weight(4, 32) == 4.25
    assert INT4.bits_per_weight(4, 64) == 4.25


def hard_tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(8, 256)
    outlier = x.clone()
    outlier[3, 17] = 3e4
    holes = x.clone()
    holes[0] = 0
    holes[:, 64:128] = 0
    return {
        "random": x,
        "wide": x * torch.exp(4 * torch.randn(8, 256)),
        "zero": torch.zeros(8, 256),
        "holes": holes,
        "tiny": x * 1e-30,
        "subnormal": x * 1e-41,
        "below the tensor scale": x * 1e-35,
        "huge": x / x.abs().max() * 3e38,
        "outlier": outlier,
        "small scales": x * torch.logspace(0, -6, 8)[:, None],
        "no rows": torch.zeros(0, 256),
    }


@ALL
@pytest.mark.parametrize("name", hard_tensors())
def test_finite_tensors_stay_finite_and_fake_is_the_round_trip(form: Format, name: str) -> None:
    x = hard_tensors()[name]
    packed, scales, tensor_scale = form.quantize(x)
    decoded = form.dequantize(packed, scales, tensor_scale)
    assert decoded.isfinite().all()
    assert tensor_scale.item() > 0
    assert torch.equal(form.fake(x), decoded)
    assert torch.equal(form.fake(x.bfloat16()), form.fake(x.bfloat16().float()).bfloat16())


@ALL
def test_the_error_is_within_half_a_step_of_each_group(form: Format) -> None:
    x = hard_tensors()["random"].double()
    scale = form.quantize(x)[1].double() * form.quantize(x)[2]
    step = 2.0 if form.element is E2M1 else 1.0
    clipped = 2.0 if form is MXFP4 else 0.5  # a power of two leaves up to 8 for a grid up to 6
    error = (form.fake(x) - x).abs().view(8, -1, form.group).amax(-1)
    assert (error <= scale * max(step / 2, clipped) * (1 + 1e-6)).all()


@ALL
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_group_that_is_not_finite_decodes_to_nan_and_no_other_does(
    form: Format, bad: float
) -> None:
    x = hard_tensors()["random"]
    expected = form.quantize(x)
    x[5, 70] = bad
    packed, scales, tensor_scale = form.quantize(x)
    decoded = form.dequantize(packed, scales, tensor_scale)
    hit = torch.zeros(8, 256, dtype=torch.bool)
    start = 70 // form.group * form.group
    hit[5, start : start + form.group] = True
    assert torch.equal(decoded.isnan(), hit)
    assert torch.equal(tensor_scale, expected[2])
    assert torch.equal(decoded[~hit], form.dequantize(*expected)[~hit])
    if form is NVFP4:
        assert bytes_of(scales)[5, 70 // 16].item() == 0x7F


def test_the_tensor_scale_has_a_floor_and_a_zero_tensor_decodes_to_zero() -> None:
    packed, scales, tensor_scale = NVFP4.quantize(torch.zeros(2, 32))
    assert tensor_scale.item() == SMALLEST_TENSOR_SCALE
    assert not bytes_of(scales).any()
    assert not packed.any()


def test_a_tensor_that_is_all_nan_has_a_finite_tensor_scale() -> None:
    packed, scales, tensor_scale = NVFP4.quantize(torch.full((2, 32), NAN))
    assert tensor_scale.item() == SMALLEST_TENSOR_SCALE
    assert (bytes_of(scales) == 0x7F).all()
    assert not packed.any()


SEEDS = pytest.mark.parametrize("seed", range(4))


@SEEDS
def test_the_nvfp4_scales_are_what_the_definition_says(seed: int) -> None:
    x = near_ties(seed)
    peak = x.numpy().reshape(-1, 16, 16).__abs__().max(-1)
    tensor_scale = np.float32(peak.max()) / np.float32(2688)
    reciprocal = np.float32(1) / (np.float32(6) * tensor_scale)
    expected = (peak * reciprocal).clip(max=448).astype(ml_dtypes.float8_e4m3fn)
    _, scales, found = NVFP4.quantize(x)
    assert found.item() == tensor_scale
    assert torch.equal(bytes_of(scales), torch.from_numpy(expected.view(np.uint8)))


@SEEDS
def test_the_nvfp4_codes_are_what_the_definition_says(seed: int) -> None:
    x = near_ties(seed)
    packed, scales, tensor_scale = NVFP4.quantize(x)
    scale = scales.float().numpy()
    with np.errstate(divide="ignore"):
        inverse = np.where(scale > 0, np.float32(1) / tensor_scale.numpy() / scale, 0)
    scaled = x.numpy().reshape(-1, 16, 16) * inverse[..., None].astype(np.float32)
    codes = scaled.reshape(-1, 256).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    assert np.array_equal(packed.numpy(), codes[:, 0::2] | codes[:, 1::2] << 4)


def test_a_power_of_two_scale_holds_the_exponent_of_the_group() -> None:
    x = torch.zeros(4, 32)
    x[:, 5] = torch.tensor([4.0, 7.99, 8.0, 0.75])
    assert MXFP4.quantize(x)[1].view(torch.uint8)[:, 0].tolist() == [127, 127, 128, 124]


@ALL
def test_a_k_that_does_not_fit_is_refused_with_the_remedy(form: Format) -> None:
    x = torch.randn(2, 120)
    with pytest.raises(Refused, match=rf"K=120 is not a multiple of {form.group}; pad it"):
        form.quantize(x)
    assert form.pad(x).shape == (2, 128)
    assert torch.equal(form.fake(form.pad(x))[:, 120:], torch.zeros(2, 8))
    assert form.pad(x[:, :64]) is not x
    assert (form.padded(120), form.padded(128), form.padded(0)) == (128, 128, 0)


def test_integers_and_numbers_are_refused() -> None:
    with pytest.raises(Refused, match=r"floating point, not torch\.int64"):
        NVFP4.quantize(torch.zeros(16, dtype=torch.int64))
    with pytest.raises(Refused, match="a number has none"):
        NVFP4.quantize(torch.tensor(1.0))


@ALL
def test_views_quantise_as_their_copies(form: Format) -> None:
    torch.manual_seed(1)
    for view in (torch.randn(64, 6).T, torch.randn(1, 64).expand(6, 64), torch.randn(12, 64)[::2]):
        for seen, copied in zip(form.quantize(view), form.quantize(view.clone()), strict=True):
            assert torch.equal(bytes_of(seen), bytes_of(copied))


@ALL
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_quantising_by_rows_gives_the_same_bits(
    form: Format, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last chunk is short; the loudest group, a group of NaN and a zero row lie in others."""
    torch.manual_seed(2)
    x = (torch.randn(2, 53, 192) * torch.randn(53, 1).exp()).to(dtype)
    x[0, 50, 3], x[1, 9, 70], x[1, 30] = 200, NAN, 0
    expected = form.quantize(x)
    for rows in (1, 2, 7, 105):
        monkeypatch.setattr(formats, "CHUNK", rows * 192 + 191)
        for view in (x, x.mT.contiguous().mT):
            found = form.quantize_by_rows(view)
            assert [one.shape for one in found] == [one.shape for one in expected]
            assert [one.dtype for one in found] == [one.dtype for one in expected]
            for one, other in zip(found, expected, strict=True):
                assert torch.equal(bytes_of(one), bytes_of(other))


@ALL
@pytest.mark.parametrize("name", hard_tensors())
def test_hard_tensors_give_the_same_bits_by_rows(
    form: Format, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "CHUNK", 1)
    x = hard_tensors()[name]
    for one, other in zip(form.quantize_by_rows(x), form.quantize(x), strict=True):
        assert torch.equal(bytes_of(one), bytes_of(other))


@ALL
def test_shapes_are_known_without_values(form: Format) -> None:
    with FakeTensorMode():
        seen = [(x.shape, x.dtype) for x in form.quantize(torch.empty(6, 128))]
    assert seen == [(x.shape, x.dtype) for x in form.quantize(torch.randn(6, 128))]


def test_a_given_tensor_scale_is_used_as_it_is() -> None:
    x = torch.randn(4, 32)
    scales, tensor_scale = NVFP4.scales(x, torch.tensor(0.25))
    assert tensor_scale.item() == 0.25
    assert torch.equal(scales, NVFP4.scales(x * 4, torch.tensor(1.0))[0])


elements = st.lists(st.sampled_from(E2M1.values().tolist()), min_size=32, max_size=32)


@settings(max_examples=60, deadline=None)
@given(elements, st.integers(0x08, 0x7E), st.integers(-100, 100))
def test_what_the_format_holds_comes_back_bit_for_bit(
    grid: list[float], code: int, exponent: int
) -> None:
    elements = torch.tensor(grid)
    elements[[0, 16]] = 6.0  # each group reaches its scale
    scales = E4M3.values()[torch.tensor([code, 0x7E])]
    tensor_scale = torch.tensor(2.0**exponent)
    x = NVFP4.times(elements.clone(), scales).mul_(tensor_scale)
    again = NVFP4.quantize(x)
    assert torch.equal(again[0], NVFP4.pack(elements))
    assert torch.equal(again[1].float(), scales)
    assert torch.equal(NVFP4.dequantize(*again), x)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), st.integers(0, 2**31), st.integers(-60, 60))
def test_a_power_of_two_passes_through(name: str, seed: int, exponent: int) -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed))
    packed, _, _ = FORMATS[name].quantize(x)
    scaled, _, _ = FORMATS[name].quantize(x * 2.0**exponent)
    assert torch.equal(packed, scaled)
    assert torch.equal(FORMATS[name].fake(x * 2.0**exponent), FORMATS[name].fake(x) * 2.0**exponent)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31))
def test_quantising_twice_with_the_same_scales_changes_nothing(seed: int) -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed))
    scales, tensor_scale = NVFP4.scales(x)
    once = NVFP4.elements(x, scales, tensor_scale)
    decoded = NVFP4.times(once.clone(), scales).mul_(tensor_scale)
    assert torch.equal(NVFP4.elements(decoded, scales, tensor_scale), once)
