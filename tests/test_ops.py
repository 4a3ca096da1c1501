"""Our operators: their results, their shapes under every kind of input, their refusals."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from pq_compile import kernels, ops
from pq_compile.errors import Refused
from pq_compile.formats import FORMATS, INT4, NVFP4, Format
from pq_compile.rows import fold, quantise_rows

ALL = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
SCHEMES = pytest.mark.parametrize("scheme", ops.SCHEMES)
HALF_ULP = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}

linear: Any = torch.ops.permuquant.linear


def weight(form: Format, n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    return form.quantize(form.pad(torch.randn(n, k)))


def expected(
    form: Format, scheme: str, x: Tensor, w: tuple[Tensor, Tensor, Tensor], bias: Tensor | None
) -> Tensor:
    """In fp64, from the definitions alone."""
    k, seen, held = x.shape[-1], x.double(), form.dequantize(*w).double()
    if scheme == "w4a4":
        seen = form.dequantize(*form.quantize(form.pad(x))).double()[..., :k]
    if scheme == "w4a8":
        codes, scales = quantise_rows(x)
        seen = codes.double() * scales.double()
        if form is NVFP4:  # which is rounded to e4m3 after dividing by 6
            sixth = fold(form.unpack(w[0]), w[1]).double()
            held = sixth * 6 * w[2].double()
    y = seen @ held[:, :k].T
    return y if bias is None else y + bias.double()


@ALL
@SCHEMES
@pytest.mark.parametrize("dtype", HALF_ULP, ids=str)
@pytest.mark.parametrize("shape", [(120,), (3, 120), (2, 3, 128), (2, 1, 3, 64)], ids=str)
def test_it_is_the_product_with_the_decoded_weight(
    form: Format, scheme: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(shape, dtype=dtype), weight(form, 24, shape[-1])
    bias = torch.randn(24, dtype=dtype)
    y = linear(x, *w, bias, form.name, scheme)
    wanted = expected(form, scheme, x, w, bias)
    assert (y.shape, y.dtype) == (wanted.shape, dtype)
    scale = wanted.abs() + wanted.abs().mean()
    assert ((y.double() - wanted).abs() <= scale * (HALF_ULP[dtype] + 4e-6)).all()


@SCHEMES
def test_fp64_is_summed_in_fp64(scheme: str) -> None:
    torch.manual_seed(1)
    x, w = torch.randn(5, 64, dtype=torch.float64), weight(NVFP4, 24, 64)
    w = (*w[:2], torch.ones(()))
    if scheme == "w4a4":  # with a peak of 6 * 448 the tensor scale is 1
        x = torch.randint(-6, 7, (5, 64)).double()
        x[:, ::16] = 6 * 448
    y = linear(x, *w, None, "nvfp4", scheme)
    torch.testing.assert_close(
        y, expected(NVFP4, scheme, x, w, None), rtol=1e-12, atol=1e-12 * y.abs().max().item()
    )


def test_integers_come_out_exactly() -> None:
    x = torch.randint(-3, 4, (7, 32)).float()
    x[:, ::16] = 6.0
    x[0, 0] = 6 * 448
    w = NVFP4.quantize(x)
    held = NVFP4.dequantize(*w)
    assert torch.equal(linear(x, *w, None, "nvfp4", "w4a4"), held @ held.T)


@ALL
@SCHEMES
def test_no_rows_give_no_rows(form: Format, scheme: str) -> None:
    w = weight(form, 24, 64)
    for shape in ((0, 64), (2, 0, 64)):
        y = linear(torch.randn(shape), *w, None, form.name, scheme)
        assert y.shape == (*shape[:-1], 24)
    assert linear(torch.randn(5, 64), *weight(form, 0, 64), None, form.name, scheme).shape == (5, 0)
    w, bias = weight(form, 24, 0), torch.randn(24)
    assert torch.equal(linear(torch.randn(5, 0), *w, bias, form.name, scheme), bias.expand(5, 24))


@SCHEMES
def test_views_give_what_their_copies_give(scheme: str) -> None:
    torch.manual_seed(2)
    w = weight(NVFP4, 24, 64)
    for view in (
        torch.randn(64, 6).T,
        torch.randn(1, 64).expand(6, 64),
        torch.randn(3, 4, 128)[:, ::2, ::2],
        torch.randn(2, 64, 3).transpose(1, 2),
    ):
        y = linear(view, *w, None, "nvfp4", scheme)
        assert y.is_contiguous()
        assert torch.equal(y, linear(view.clone(), *w, None, "nvfp4", scheme))


def test_the_activation_scale_is_that_of_the_whole_input() -> None:
    torch.manual_seed(3)
    x, w = torch.randn(4, 64), weight(NVFP4, 24, 64)
    x[0] *= 1e4
    together = linear(x, *w, None, "nvfp4", "w4a4")
    apart = torch.cat([linear(row[None], *w, None, "nvfp4", "w4a4") for row in x])
    assert torch.equal(together[0], apart[0])
    assert not torch.equal(together[1:], apart[1:])


def test_a_row_that_is_not_finite_spoils_its_own_outputs_only() -> None:
    x, w = torch.randn(4, 64), weight(NVFP4, 24, 64)
    x[1, 7] = torch.inf
    y = linear(x, *w, None, "nvfp4", "w4a4")
    assert y[1].isnan().all()
    assert y[[0, 2, 3]].isfinite().all()


def test_its_inputs_are_left_alone() -> None:
    given = [torch.randn(4, 64), *weight(NVFP4, 24, 64), torch.randn(24)]
    before = [x.clone() for x in given]
    for scheme in ops.SCHEMES:
        linear(*given, "nvfp4", scheme)
    for x, was in zip(given, before, strict=True):
        assert torch.equal(
            x.view(x.shape or 1).view(torch.uint8), was.view(x.shape or 1).view(torch.uint8)
        )


def test_torch_finds_nothing_wrong_with_the_operator() -> None:
    arguments = (torch.randn(2, 3, 64), *weight(INT4, 24, 64), torch.randn(24))
    for scheme in ops.SCHEMES:
        torch.library.opcheck(linear.default, (*arguments, "int4", scheme))


def test_torch_finds_nothing_wrong_with_float8_scales() -> None:
    """Less ``test_schema``, which compares its inputs in a way that torch lacks for float8."""
    utilities = (
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_static",
        "test_aot_dispatch_dynamic",
    )
    for shape in ((128,), (3, 120), (0, 128), (2, 3, 128)):
        arguments = (torch.randn(shape), *weight(NVFP4, 24, 128), None, "nvfp4", "w4a4")
        torch.library.opcheck(linear.default, arguments, test_utils=utilities)


def test_one_graph_serves_every_number_of_rows() -> None:
    w = weight(NVFP4, 24, 64)
    graphs = []

    def remember(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=remember, fullgraph=True, dynamic=True)
    def compiled(x: Tensor) -> Any:
        return linear(x, *w, None, "nvfp4", "w4a4")

    with torch.no_grad():
        for rows in (2, 3, 17):
            x = torch.randn(5, rows, 64)
            assert torch.equal(compiled(x), linear(x, *w, None, "nvfp4", "w4a4"))
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("shape", "form", "scheme", "sentence"),
    [
        ((2, 64), "nvfp5", "w4a4", "no format 'nvfp5'; there are nvfp4, mxfp4, int4, int3"),
        ((2, 64), "nvfp4", "w8a8", "no scheme 'w8a8'; there are w4a4, w4a8, w4a16"),
        ((2, 48), "nvfp4", "w4a4", "a nvfp4 weight of 64 channels does not fit"),
        ((2, 65), "nvfp4", "w4a16", "an input of shape [2, 65]; its last dimension must be 64"),
    ],
)
def test_what_does_not_fit_is_refused(
    shape: tuple[int, ...], form: str, scheme: str, sentence: str
) -> None:
    with pytest.raises(Refused, match=re.escape(sentence)):
        linear(torch.randn(shape), *weight(NVFP4, 24, 64), None, form, scheme)


def test_the_cpu_computes_by_the_reference() -> None:
    assert ops.where(torch.device("cpu"), "nvfp4", "w4a4", 100) == "reference"
    assert ops.where(torch.device("cuda"), "int4", "w4a4", 100) == "reference"


HOPPER = [
    ("w4a4", 4608, "half", "w4a4_portable"),
    ("w4a4", 16, "w4a4_portable", "w4a4_portable"),
    ("w4a8", 4608, "fp8", "reference"),
    ("w4a16", 2, "w4a16_vector", "w4a16_vector"),
    ("w4a16", 200, "w4a16_portable", "w4a16_portable"),
    ("w4a16", 300, "half", "w4a16_portable"),
]


@pytest.mark.parametrize(("scheme", "rows", "of_bf16", "of_fp64"), HOPPER)
def test_the_kernels_of_a_product_are_known_before_it_runs(
    monkeypatch: pytest.MonkeyPatch, scheme: str, rows: int, of_bf16: str, of_fp64: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    device = torch.device("cuda")
    for dtype, kind in ((torch.bfloat16, of_bf16), (torch.float64, of_fp64)):
        assert ops.where(device, "nvfp4", scheme, rows, dtype) == kind
        shape = {"k": 128, "n": 64, "bias": True, "dtype": dtype}
        specs = ops.specs(device, "nvfp4", scheme, rows, **shape)
        assert len(specs) == kind.startswith("w4a")
        assert all(spec.kind.startswith(kind[:5]) and kernels.source(spec) for spec in specs)
        assert ops.specs(torch.device("cpu"), "nvfp4", scheme, rows, **shape) == ()


# ---------------------------------------------------------------- rows and matmul


PROGRAM = "row 64 | sample 64 | add 1 1.0 | mul 0 2 | keep 3 float32 | "
TARGETS = {"fp8": "fp8", "nvfp4_fp8": "fp8", "nvfp4_half": "half", "nvfp4": "w4a4_native"}
DISPATCHED = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")


def quantised(target: str, x: Tensor) -> list[Tensor]:
    found: list[Tensor] = torch.ops.permuquant.rows([x], f"row {x.shape[-1]} | {target} 0")
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_torch_finds_nothing_wrong_with_rows_and_their_products(target: str) -> None:
    torch.manual_seed(4)
    for shape in ((3, 64), (2, 3, 64)):
        given = [torch.randn(shape), torch.randn(64)]
        how = (given, f"{PROGRAM}{target} 3")
        torch.library.opcheck(torch.ops.permuquant.rows.default, how, test_utils=DISPATCHED)
        fields = zip(*(weight(NVFP4, n, 64) for n in (24, 8)), strict=True)
        packed = [list(field) for field in fields]
        biases = [torch.randn(24), torch.randn(8)]
        call = (quantised(target, given[0]), *packed, biases, TARGETS[target], torch.float32)
        torch.library.opcheck(torch.ops.permuquant.matmul.default, call, test_utils=DISPATCHED)


def test_what_rows_keep_is_a_copy() -> None:
    x = torch.randn(3, 64)
    *_, kept = torch.ops.permuquant.rows([x], "row 64 | keep 0 float32 | fp8 0")
    assert torch.equal(kept, x)
    assert kept.data_ptr() != x.data_ptr()
    transposed = torch.randn(64, 3).T
    *_, kept = torch.ops.permuquant.rows([transposed], "row 64 | keep 0 float32 | fp8 0")
    assert kept.is_contiguous()


SAME = [("w4a8", "fp8"), ("w4a4", "nvfp4"), ("w4a4", "nvfp4_half")]


@pytest.mark.parametrize(("scheme", "target"), SAME)
def test_rows_and_matmul_are_what_linear_is(scheme: str, target: str) -> None:
    torch.manual_seed(5)
    x, bias = torch.randn(2, 3, 64, dtype=torch.float64), torch.randn(24, dtype=torch.float64)
    w = weight(NVFP4, 24, 64)
    fields = [[part] for part in w]
    a = quantised(target, x)
    for biases in ([], [bias]):
        y = torch.ops.permuquant.matmul(a, *fields, biases, TARGETS[target], x.dtype)
        expected = linear(x, *w, biases[0] if biases else None, "nvfp4", scheme)
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
        assert scheme == "w4a4" or torch.equal(y, expected)


@pytest.mark.parametrize("target", TARGETS)
def test_weights_that_are_multiplied_together_are_multiplied_each(target: str) -> None:
    torch.manual_seed(6)
    a, dtype = quantised(target, torch.randn(2, 3, 64)), torch.float64
    each = [weight(NVFP4, n, 64) for n in (24, 8, 40)]
    biases = [torch.randn(n, dtype=dtype) for n in (24, 8, 40)]
    fields = [list(field) for field in zip(*each, strict=True)]
    together = torch.ops.permuquant.matmul(a, *fields, biases, TARGETS[target], dtype)
    apart = [
        torch.ops.permuquant.matmul(a, *([part] for part in w), [bias], TARGETS[target], dtype)
        for w, bias in zip(each, biases, strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(apart, -1), rtol=1e-14, atol=1e-14)


def test_the_emulation_is_near_the_exact_product() -> None:
    """Within the 2.5 % that two roundings of products to e4m3 cost."""
    torch.manual_seed(7)
    x, fields = torch.randn(64, 1024), [[part] for part in weight(NVFP4, 256, 1024)]
    exact, emulated = (
        torch.ops.permuquant.matmul(quantised(target, x), *fields, [], TARGETS[target], x.dtype)
        for target in ("nvfp4", "nvfp4_fp8")
    )
    assert 0.01 < (emulated - exact).norm() / exact.norm() < 0.025


@pytest.mark.parametrize("target", TARGETS)
def test_products_of_no_rows_are_empty(target: str) -> None:
    fields = [[part] for part in weight(NVFP4, 24, 64)]
    a = quantised(target, torch.randn(2, 0, 64))
    y = torch.ops.permuquant.matmul(a, *fields, [], TARGETS[target], torch.float32)
    assert y.shape == (2, 0, 24)
