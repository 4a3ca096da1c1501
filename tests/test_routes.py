"""The route table, row by row: who serves where, what ``auto`` becomes, what is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch

from pq_compile import routes
from pq_compile.errors import Refused
from pq_compile.options import CHOICES, Options
from pq_compile.plan import Linear
from pq_compile.routes import FEW_ROWS, MANY_ROWS, TABLE, Route, Where, choose, settle, settle_for
from pq_compile.rows import Target

AMPERE, ADA, HOPPER = (8, 0), (8, 9), (9, 0)
BLACKWELL = ((10, 0), (10, 3), (12, 0), (12, 1))
NEW = (3, 9)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def where(
    capability: tuple[int, int] | None, rows: int | None = None, dtype: torch.dtype = BF16
) -> Where:
    return Where(capability, NEW, "nvfp4", dtype, rows)


def row(scheme: str, name: str) -> Route:
    (found,) = (one for one in TABLE if (one.scheme, one.name) == (scheme, name))
    return found


# ---------------------------------------------------------------- the table

FULL, FLOATS = (*(AMPERE, (8, 6), ADA, HOPPER), *BLACKWELL), (BF16, FP16, FP32)
SERVED: dict[tuple[str, str], dict[str, Any]] = {
    ("w4a8", "fp8"): {"on": (ADA, HOPPER), "in": (BF16,), "rows": (1, 16, 17, 4608, None)},
    ("w4a4", "native"): {"on": BLACKWELL, "in": FLOATS, "rows": (1, 16, 17, 4608, None)},
    ("w4a4", "fastest"): {"on": BLACKWELL, "in": (BF16, FP16), "rows": (1, 16, 17, 4608, None)},
    ("w4a4", "half"): {"on": FULL, "in": (BF16,), "rows": (17, 4608, None)},
    ("w4a4", "in_loop"): {"on": FULL, "in": FLOATS, "rows": (1, 16, 17, 4608, None)},
    ("w4a4", "fp8"): {"on": (ADA, HOPPER), "in": (BF16,), "rows": (1, 16, 17, 4608, None)},
    ("w4a16", "vector"): {"on": FULL, "in": FLOATS, "rows": (1, 16)},
    ("w4a16", "half"): {"on": FULL, "in": (BF16,), "rows": (17, 4608, None)},
    ("w4a16", "in_loop"): {"on": FULL, "in": FLOATS, "rows": (1, 16, 17, 4608, None)},
}


def test_every_row_is_told_here() -> None:
    assert {*SERVED} | {(scheme, "reference") for scheme in ("w4a4", "w4a8", "w4a16")} == {
        (one.scheme, one.name) for one in TABLE
    }


@pytest.mark.parametrize("key", SERVED, ids="-".join)
def test_a_row_serves(key: tuple[str, str]) -> None:
    told = SERVED[key]
    for capability in (None, (7, 5), *FULL):
        for dtype in (*FLOATS, torch.float64):
            for rows in (1, 16, 17, 4608, None):
                there = where(capability, rows, dtype)
                floats = (*told["in"], torch.float64) if told["in"] == FLOATS else told["in"]
                wanted = capability in told["on"] and dtype in floats and rows in told["rows"]
                assert row(*key).serves(there) == wanted, there


@pytest.mark.parametrize("key", SERVED, ids="-".join)
def test_nothing_but_the_reference_serves_other_formats_and_old_tritons(
    key: tuple[str, str],
) -> None:
    for capability in FULL:
        for rows in (1, 4608):
            there = where(capability, rows)
            assert not row(*key).serves(there._replace(format="mxfp4"))
            assert not row(*key).serves(there._replace(triton=(3, 5)))
            assert choose(key[0], there._replace(triton=(3, 5))).kind == "reference"


def test_the_fp4_units_of_12_1_need_a_newer_triton() -> None:
    native = row("w4a4", "native")
    assert not native.serves(where((12, 1))._replace(triton=(3, 7)))
    assert native.serves(where((12, 0))._replace(triton=(3, 6)))


def test_every_row_quantises_to_what_its_kind_multiplies() -> None:
    targets = {(one.kind, one.target) for one in TABLE}
    assert targets == {
        ("fp8", "fp8"),
        ("fp8", "nvfp4_fp8"),
        ("half", "nvfp4_half"),
        ("half", None),
        ("w4a4_native", "nvfp4"),
        ("w4a4_fastest", "nvfp4"),
        ("w4a4_portable", "nvfp4"),
        ("w4a16_vector", None),
        ("w4a16_portable", None),
        ("reference", None),
    }
    assert {target for _, target in targets if target} <= set(get_args(Target))


def test_names_are_those_of_the_option() -> None:
    assert {one.name for one in TABLE} - {"vector"} == set(CHOICES["route"]) - {"auto"}
    assert {one.scheme for one in TABLE} == set(CHOICES["scheme"]) - {"auto"}


# ---------------------------------------------------------------- choosing


@pytest.mark.parametrize(
    ("scheme", "capability", "rows", "dtype", "kind"),
    [
        ("w4a4", None, 4608, BF16, "reference"),
        ("w4a4", (7, 5), 4608, BF16, "reference"),
        ("w4a4", AMPERE, 4608, BF16, "half"),
        ("w4a4", AMPERE, 4608, FP16, "w4a4_portable"),
        ("w4a4", HOPPER, 4608, BF16, "half"),
        ("w4a4", HOPPER, None, BF16, "half"),
        ("w4a4", HOPPER, FEW_ROWS, BF16, "w4a4_portable"),
        ("w4a4", HOPPER, 4608, FP32, "w4a4_portable"),
        ("w4a4", (10, 0), 1, BF16, "w4a4_native"),
        ("w4a4", (12, 0), 4608, FP16, "w4a4_native"),
        ("w4a8", HOPPER, 1, BF16, "fp8"),
        ("w4a8", ADA, 4608, BF16, "fp8"),
        ("w4a8", HOPPER, 4608, FP16, "reference"),
        ("w4a8", AMPERE, 4608, BF16, "reference"),
        ("w4a8", (10, 0), 4608, BF16, "reference"),
        ("w4a16", HOPPER, 1, BF16, "w4a16_vector"),
        ("w4a16", HOPPER, FEW_ROWS, FP32, "w4a16_vector"),
        ("w4a16", HOPPER, FEW_ROWS + 1, BF16, "w4a16_portable"),
        ("w4a16", HOPPER, MANY_ROWS, BF16, "w4a16_portable"),
        ("w4a16", HOPPER, MANY_ROWS + 1, BF16, "half"),
        ("w4a16", HOPPER, None, BF16, "half"),
        ("w4a16", HOPPER, MANY_ROWS + 1, FP16, "w4a16_portable"),
        ("w4a16", (12, 0), 4608, BF16, "half"),
        ("w4a16", None, 1, BF16, "reference"),
    ],
)
def test_unasked_the_first_row_that_serves_is_taken(
    scheme: str,
    capability: tuple[int, int] | None,
    rows: int | None,
    dtype: torch.dtype,
    kind: str,
) -> None:
    assert choose(scheme, where(capability, rows, dtype)).kind == kind


def test_the_emulation_is_never_taken_unasked() -> None:
    for capability in (None, (7, 5), *FULL):
        for rows in (1, 100, 4608, None):
            for dtype in FLOATS:
                assert choose("w4a4", where(capability, rows, dtype)).target != "nvfp4_fp8"


@pytest.mark.parametrize(
    ("scheme", "wish", "rows", "kind"),
    [
        ("w4a4", "fp8", 4608, "fp8"),
        ("w4a4", "in_loop", 4608, "w4a4_portable"),
        ("w4a4", "reference", 4608, "reference"),
        ("w4a4", "native", 4608, "half"),  # has no FP4 units
        ("w4a4", "half", 4, "w4a4_portable"),  # not worth decoding for
        ("w4a8", "reference", 1, "reference"),
        ("w4a16", "half", 100, "half"),
        ("w4a16", "in_loop", 1, "w4a16_portable"),
        ("w4a16", "fp8", 1, "w4a16_vector"),  # modulation beside fp8 products
    ],
)
def test_a_route_by_name_is_taken_where_it_serves(
    scheme: str, wish: str, rows: int, kind: str
) -> None:
    assert choose(scheme, where(HOPPER, rows), wish).kind == kind


@pytest.mark.parametrize("scheme", ["w4a4", "w4a8", "w4a16"])
def test_a_choice_always_serves(scheme: str) -> None:
    for capability in (None, (7, 5), *FULL):
        for rows in (1, 16, 17, 256, 257, None):
            for dtype in (*FLOATS, torch.float64):
                for wish in CHOICES["route"]:
                    there = where(capability, rows, dtype)
                    found = choose(scheme, there, wish)
                    assert found.serves(there)
                    assert found.scheme == scheme


# ---------------------------------------------------------------- settling


@pytest.mark.parametrize(
    ("capability", "dtype", "scheme"),
    [
        (None, FP32, "w4a4"),
        (None, BF16, "w4a4"),
        ((7, 5), BF16, "w4a16"),
        (AMPERE, BF16, "w4a16"),
        ((8, 6), BF16, "w4a16"),
        (ADA, BF16, "w4a8"),
        (HOPPER, BF16, "w4a8"),
        (HOPPER, FP32, "w4a4"),
        ((10, 0), BF16, "w4a4"),
        ((12, 1), FP16, "w4a4"),
    ],
)
def test_auto_is_the_fastest_scheme_of_a_device(
    capability: tuple[int, int] | None, dtype: torch.dtype, scheme: str
) -> None:
    assert settle(Options(), where(capability, dtype=dtype)).scheme == scheme


def test_auto_is_w4a4_for_formats_without_kernels() -> None:
    assert settle(Options(format="int4"), where(HOPPER)._replace(format="int4")).scheme == "w4a4"


@pytest.mark.parametrize("scheme", ["w4a4", "w4a8", "w4a16"])
def test_a_scheme_that_was_asked_for_stays(scheme: str) -> None:
    for capability in (None, *FULL):
        assert settle(Options(scheme=scheme), where(capability)).scheme == scheme


@pytest.mark.parametrize(
    ("options", "there", "sentence"),
    [
        (
            {"route": "fp8"},
            where(None),
            "route='fp8' does not serve w4a4 in torch.bfloat16 on a device without CUDA; there: "
            "reference",
        ),
        (
            {"route": "half"},
            where(HOPPER),
            "route='half' does not serve w4a8 in torch.bfloat16 on a device of compute capability "
            "9.0; there: fp8, reference",
        ),
        (
            {"route": "native", "scheme": "w4a4"},
            where(HOPPER),
            "route='native' does not serve w4a4 in torch.bfloat16 on a device of compute "
            "capability 9.0; there: fp8, half, in_loop, reference",
        ),
        (
            {"route": "fp8", "scheme": "w4a4"},
            where((12, 0)),
            "route='fp8' does not serve w4a4 in torch.bfloat16 on a device of compute capability "
            "12.0; there: fastest, half, in_loop, native, reference",
        ),
        (
            {"route": "half", "scheme": "w4a4"},
            where(HOPPER, dtype=FP16),
            "route='half' does not serve w4a4 in torch.float16",
        ),
    ],
)
def test_a_route_that_no_row_has_there_is_refused(
    options: dict[str, Any], there: Where, sentence: str
) -> None:
    with pytest.raises(Refused, match=re.escape(sentence)):
        settle(Options(**options), there)


@pytest.mark.parametrize(
    ("options", "capability"),
    [
        ({"route": "fp8"}, HOPPER),
        ({"route": "fp8", "scheme": "w4a4"}, ADA),
        ({"route": "half", "scheme": "w4a16"}, AMPERE),
        ({"route": "native"}, (10, 3)),
        ({"route": "reference"}, None),
        ({"route": "in_loop", "scheme": "w4a4"}, HOPPER),
    ],
)
def test_a_route_that_serves_is_kept(
    options: dict[str, Any], capability: tuple[int, int] | None
) -> None:
    asked = Options(**options)
    found = settle(asked, where(capability))
    assert replace(found, scheme=asked.scheme) == asked


# ---------------------------------------------------------------- the device at hand


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    routes.at.cache_clear()
    yield
    routes.at.cache_clear()


@pytest.mark.usefixtures("hopper")
def test_a_device_is_asked_for_its_capability() -> None:
    cuda, cpu = torch.device("cuda:1"), torch.device("cpu")
    assert routes.here(cuda, "nvfp4", BF16).capability == (9, 0)
    assert routes.here(cpu, "nvfp4", BF16).capability is None
    assert routes.at(cuda, "nvfp4", BF16, 4608, "w4a8", "auto").kind == "fp8"
    assert routes.at(cuda, "nvfp4", BF16, 4608, "w4a4", "fp8").target == "nvfp4_fp8"
    assert routes.at(cpu, "nvfp4", BF16, 4608, "w4a8", "auto").kind == "reference"


def test_without_a_driver_a_cuda_tensor_has_no_capability() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert routes.here(torch.device("cuda"), "nvfp4", BF16).capability is None


def test_the_weights_decide_where_a_model_is() -> None:
    one = Linear("a", "a.weight", None, 64, 64, rows=32, per_sample=False)
    weight = torch.zeros(64, 64)
    assert settle_for(Options(), [one], {}) == Options()
    assert settle_for(Options(), [one], {"a.weight": weight}).scheme == "w4a4"
    with pytest.raises(Refused, match=r"does not serve w4a4 in torch\.float32 on a device"):
        settle_for(Options(route="half"), [one], {"a.weight": weight})


@pytest.mark.parametrize(
    ("version", "known"), [("3.6.0", (3, 6)), ("3.10.1", (3, 10)), ("3.9.0+git1234", (3, 9))]
)
def test_the_version_of_triton_is_that_of_its_first_two_numbers(
    version: str, known: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("triton.__version__", version)
    assert routes.here(torch.device("cpu"), "nvfp4", torch.bfloat16).triton == known
