"""Chains: what is computed while a row is quantised, what ends one, and that nothing changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from passes import fuse
from passes.lower import FIELDS
from pq_compile import backend
from pq_compile.options import Options
from pq_compile.routes import Route, here
from pq_compile.rows import parse
from pq_compile.show import show
from tests.conftest import Golden
from tests.lowering import FUSED, ROUTES, Captured, calls, captured, served

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

FP8, HALF, NATIVE = ROUTES["w4a8", "fp8"], ROUTES["w4a4", "half"], ROUTES["w4a4", "native"]


class Toy(nn.Module):
    """Linears by name, and ``body(self, x, *others)``."""

    def __init__(self, body: Callable[..., Any], **linears: tuple[int, int]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = body
        for name, (k, n) in linears.items():
            setattr(self, name, nn.Linear(k, n))
        self.double().requires_grad_(False)

    def forward(self, *inputs: Tensor) -> Any:
        return self.body(self, *inputs)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).double()


def programs(found: Captured, route: Route = FP8) -> list[str]:
    """The programs of the lowered graph, which computes what the unfused one does."""
    lowered = found.lowered(route.scheme, route)
    lowered.module.graph.lint()
    plain = found.run(found.lowered(route.scheme, None))
    for one, other in zip(found.run(lowered), plain, strict=True):
        assert one.dtype == other.dtype
        near = 1e-12 if route.scheme == "w4a8" else 1e-6
        torch.testing.assert_close(one, other, rtol=near, atol=near)
    nodes = lowered.module.graph.nodes
    return [node.args[1] for node in nodes if "permuquant.rows" in str(node.target)]


def chain(body: Callable[..., Any], *inputs: Tensor, k: int = 64, **how: Any) -> str:
    """The one program of ``body(self, x, ...)`` with a linear ``self.up``."""
    (program,) = programs(captured(Toy(body, up=(k, 32)), *inputs, **how))
    return program


# ---------------------------------------------------------------- before and after


class Block(nn.Module):
    """One stream, attention and an MLP beside each other: FLUX's single block in small."""

    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 3 * width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(5 * width, width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(F.silu(condition)).unsqueeze(1).chunk(3, -1)
        h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
        q, k, v = (
            to(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for to in (self.q, self.k, self.v)
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        mlp = F.gelu(self.up(h), approximate="tanh")
        out: Tensor = x + gate * self.down(torch.cat([attended, mlp], -1))
        return out


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.double().requires_grad_(False)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, condition)
        return x


def test_the_graph_before_and_after(golden: Golden) -> None:
    found = captured(Stack(), randn(2, 6, 32), randn(2, 32))
    lowered = found.lowered("w4a8", FP8)
    names = dict(found.graph.parameters)
    packed = {
        f"{node}{field}": f"{name}.{field}" for node, name in names.items() for field in FIELDS
    }
    after = show(lowered.module, names | packed)
    golden(f"before\n{show(found.graph.module, names)}\nafter\n{after}")
    assert len(programs(found)) == 4


def test_the_residual_stream_is_computed_once_and_kept() -> None:
    found = captured(Stack(), randn(2, 6, 32), randn(2, 32))
    first, _, second, _ = map(parse, programs(found))
    assert first.kept == ()  # the stream is an input of the model
    assert [one.value for one in second.kept] == [len(second.inputs) + 1]  # x + gate * y
    assert [step.op for step in second.steps[:2]] == ["mul", "add"]


@pytest.mark.parametrize("key", FUSED, ids="-".join)
def test_every_route_computes_what_it_did(key: tuple[str, str]) -> None:
    found = captured(Stack(), randn(2, 6, 32), randn(2, 32))
    lowered = found.lowered(key[0], ROUTES[key])
    (fused,), (plain,) = found.run(lowered), found.run(found.lowered(key[0], None))
    error = (fused - plain).norm() / plain.norm()
    if key == ("w4a8", "fp8"):
        assert torch.equal(fused, plain)
    elif key == ("w4a4", "fp8"):
        assert 0 < error < 0.1  # another numeric
    else:
        assert error < 1e-6


# ---------------------------------------------------------------- what a chain is


def test_a_chain_of_nothing_quantises_what_is_there() -> None:
    assert chain(lambda s, x: s.up(x), randn(2, 3, 64)) == "row 64 | fp8 0"


def test_what_is_described_is_computed() -> None:
    def body(s: Any, x: Tensor, y: Tensor) -> Any:
        return s.up(F.gelu(F.rms_norm(x, (64,), eps=1e-6) * y + 1.0))

    expected = "row 64 | row 64 | rms_norm 0 1e-06 | mul 2 1 | add 3 1.0 | gelu 4 | fp8 5"
    assert chain(body, randn(2, 3, 64), randn(2, 3, 64)) == expected


def test_a_norm_by_hand_is_one_too() -> None:
    def body(s: Any, x: Tensor, w: Tensor) -> Any:
        wide = x.to(torch.float64)
        return s.up(w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)))

    expected = "row 64 | sample 64 | square 0 | mean 2 | add 3 1e-06 | rsqrt 4 | mul 0 5 | mul 1 6 "
    assert chain(body, randn(2, 3, 64), randn(64)) == expected + "| fp8 7"


@pytest.mark.parametrize("shape", [(64,), (1, 64), (1, 1, 64), (2, 1, 64)], ids=str)
def test_what_all_rows_share_is_read_once_for_a_sample(shape: tuple[int, ...]) -> None:
    found = chain(lambda s, x, y: s.up(x * (1 + y)), randn(2, 3, 64), randn(*shape))
    assert found in (
        "row 64 | sample 64 | add 1.0 1 | mul 0 2 | fp8 3",
        "sample 64 | row 64 | add 1.0 0 | mul 1 2 | fp8 3",
    )


def test_rows_of_two_dimensions_are_one_sample() -> None:
    found = chain(lambda s, x, y: s.up(x * y), randn(5, 64), randn(64))
    assert found == "row 64 | sample 64 | mul 0 1 | fp8 2"


@pytest.mark.parametrize("dim", [-1, 2])
def test_parts_are_quantised_side_by_side(dim: int) -> None:
    def body(s: Any, x: Tensor, y: Tensor) -> Any:
        return s.up(torch.cat([x, F.silu(y)], dim))

    found = chain(body, randn(2, 3, 16), randn(2, 3, 48))
    assert found == "row 48 | row 16 | silu 0 | fp8 1 2"


def test_the_target_is_the_routes() -> None:
    found = captured(Toy(lambda s, x: s.up(-x), up=(64, 32)), randn(2, 3, 64))
    for scheme, name in FUSED:
        (node,) = (
            node
            for node in found.lowered(scheme, ROUTES[scheme, name]).module.graph.nodes
            if "permuquant.rows" in str(node.target)
        )
        assert parse(node.args[1]).target == ROUTES[scheme, name].target


def test_a_dynamic_size_adds_no_guard() -> None:
    def body(s: Any, x: Tensor, y: Tensor) -> Any:
        return s.up(F.layer_norm(x, (64,)) * y[:, None])

    static = chain(body, randn(2, 3, 64), randn(2, 64))
    found = captured(Toy(body, up=(64, 32)), randn(2, 3, 64), randn(2, 64), dynamic=True)
    nodes = found.graph.module.graph.nodes
    values = [node.meta.get("example_value") for node in nodes]
    (shapes,) = {one.fake_mode.shape_env for one in values if isinstance(one, FakeTensor)}
    assert shapes is not None
    before = len(shapes.guards)
    lowered = found.lowered("w4a8", FP8)
    assert len(shapes.guards) == before
    (node,) = (n for n in lowered.module.graph.nodes if "permuquant.rows" in str(n.target))
    assert node.args[1] == static


# ---------------------------------------------------------------- what ends a chain


def test_an_undescribed_operation_ends_it() -> None:
    found = chain(lambda s, x: s.up(F.silu((2 * x).cos())), randn(2, 3, 64))
    assert found == "row 64 | silu 0 | fp8 1"


def test_a_value_that_is_needed_before_ends_it() -> None:
    def body(s: Any, x: Tensor) -> Any:
        h = F.silu(x)
        early = h.cumsum(1)
        return s.up(torch.tanh(h) * early[:, -1:]), early

    found = chain(body, randn(2, 3, 64))
    assert found == "row 64 | sample 64 | tanh 0 | mul 2 1 | fp8 3"


def test_a_value_that_is_needed_later_is_kept() -> None:
    def body(s: Any, x: Tensor) -> Any:
        h = F.silu(x)
        return s.up(torch.tanh(h)) + h.sum(-1, keepdim=True)

    assert chain(body, randn(2, 3, 64)) == "row 64 | silu 0 | tanh 1 | keep 1 float64 | fp8 2"


def test_what_the_linears_read_is_kept_if_others_read_it() -> None:
    found = captured(Toy(lambda s, x: (s.up(-x), -x), up=(64, 64)), randn(2, 3, 64))
    assert programs(found) == ["row 64 | neg 0 | fp8 1"]  # each has a negation of its own

    def body(s: Any, x: Tensor) -> Any:
        h = -x
        return s.up(h), h

    assert chain(body, randn(2, 3, 64)) == "row 64 | neg 0 | keep 1 float64 | fp8 1"


FIT: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], str]] = {
    "a number a row": (
        lambda s, x, y: s.up((2 * x) * y),
        (randn(2, 3, 64), randn(2, 3, 1)),
        "row 64 | fp8 0",
    ),
    "a number a sample": (
        lambda s, x, y: s.up((2 * x) * y),
        (randn(2, 3, 64), randn(2, 1, 1)),
        "row 64 | fp8 0",
    ),
    "rows that all samples share": (
        lambda s, x, y: s.up((2 * x) + y),
        (randn(2, 3, 64), randn(3, 64)),
        "row 64 | fp8 0",
    ),
    "a mean of more channels": (
        lambda s, x, y: s.up(F.silu(x * y.mean(-1, keepdim=True))),
        (randn(2, 3, 64), randn(2, 3, 128)),
        "row 64 | silu 0 | fp8 1",
    ),
    "a number": (
        lambda s, x, y: s.up(F.silu(x * y)),
        (randn(2, 3, 64), torch.tensor(3.0).double()),
        "row 64 | silu 0 | fp8 1",
    ),
    "a norm over fewer channels": (
        lambda s, x: s.up(F.silu(F.layer_norm(x.unflatten(-1, (2, 32)), (32,)).flatten(-2))),
        (randn(2, 3, 64),),
        "row 64 | silu 0 | fp8 1",
    ),
}


@pytest.mark.parametrize("name", FIT)
def test_a_shape_that_does_not_fit_ends_it(name: str) -> None:
    body, inputs, expected = FIT[name]
    assert chain(body, *inputs) == expected


def test_a_number_a_row_is_computed_within_or_not_at_all() -> None:
    """A program reads and keeps values for every channel."""

    def early(s: Any, x: Tensor) -> Any:
        r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        before = r.cumsum(1)
        return s.up(F.silu(x * r)) + before

    def later(s: Any, x: Tensor) -> Any:
        r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return s.up(F.silu(x * r)) * r

    def twice(s: Any, x: Tensor) -> Any:
        return s.up(F.silu(x * x.mean(-1, keepdim=True).mean(-1, keepdim=True)))

    for body in (early, later, twice):
        assert chain(body, randn(2, 3, 64)) == "row 64 | silu 0 | fp8 1"


def test_integers_and_conversions_to_them_end_it() -> None:
    def body(s: Any, x: Tensor) -> Any:
        return s.up(F.silu((4 * x).to(torch.int32).to(torch.float64)))

    assert chain(body, randn(2, 3, 64)) == "row 64 | silu 0 | fp8 1"


CATS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], str]] = {
    "rows": (
        lambda s, x, y: s.up(torch.cat([x, F.silu(y)], 1)),
        (randn(2, 3, 64), randn(2, 3, 64)),
        "row 64 | fp8 0",
    ),
    "parts that are not whole groups": (
        lambda s, x, y: s.up(torch.cat([x, F.silu(y)], -1)),
        (randn(2, 3, 24), randn(2, 3, 40)),
        "row 64 | fp8 0",
    ),
    "channels that something else reads too": (
        lambda s, x, y: (lambda h: s.up(h) + h.sum())(torch.cat([x, F.silu(y)], -1)),
        (randn(2, 3, 16), randn(2, 3, 48)),
        "row 64 | fp8 0",
    ),
}


@pytest.mark.parametrize("name", CATS)
def test_a_concatenation_ends_it_of(name: str) -> None:
    body, inputs, expected = CATS[name]
    assert chain(body, *inputs) == expected


def test_a_chain_has_so_many_inputs_and_steps_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    def many(s: Any, *inputs: Tensor) -> Any:
        return s.up(F.silu(sum(inputs[1:], inputs[0])))

    inputs = [randn(2, 3, 64) for _ in range(fuse.MOST_INPUTS + 1)]
    assert len(parse(chain(many, *inputs[:-1])).inputs) == fuse.MOST_INPUTS
    assert chain(many, *inputs) == "row 64 | fp8 0"
    monkeypatch.setattr(fuse, "MOST_STEPS", 2)
    assert (
        chain(lambda s, x: s.up(F.silu(-x)), randn(2, 3, 64)) == "row 64 | neg 0 | silu 1 | fp8 2"
    )
    assert chain(lambda s, x: s.up(F.silu(-x) * 2), randn(2, 3, 64)) == "row 64 | fp8 0"


ALONE: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], int]] = {
    "channels that are not whole groups": (lambda s, x: s.up(-x), (randn(2, 3, 24),), 24),
    "more dimensions": (lambda s, x: s.up(-x), (randn(2, 2, 3, 64),), 64),
    "one row alone": (lambda s, x: s.up(-x), (randn(64),), 64),
}


@pytest.mark.parametrize("name", ALONE)
def test_a_linear_stays_alone_with(name: str) -> None:
    body, inputs, k = ALONE[name]
    found = captured(Toy(body, up=(k, 32)), *inputs)
    assert programs(found) == []
    held = calls(found.lowered("w4a8", FP8).module)
    assert held == {"linear": 1, "rows": 0, "matmul": 0, "site": 0}


def test_rows_that_are_too_wide_stay_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse, "WIDEST", 48)
    assert programs(captured(Toy(lambda s, x: s.up(-x), up=(64, 32)), randn(2, 3, 64))) == []


# ---------------------------------------------------------------- several chains


def test_what_two_chains_share_of_a_sample_stays_for_both() -> None:
    def body(s: Any, x: Tensor, c: Tensor) -> Any:
        m = 1 + c[:, None]
        h = s.up(F.layer_norm(x, (64,)) * m)
        return s.down(F.layer_norm(h, (64,)) * m) * m.cos()

    toy = Toy(body, up=(64, 64), down=(64, 64))
    first, second = programs(captured(toy, randn(2, 3, 64), randn(2, 64)))
    assert first == second
    assert "add 1.0 0" in first


def test_a_value_kept_by_one_chain_is_read_by_the_next() -> None:
    def body(s: Any, x: Tensor) -> Any:
        h = F.silu(x)
        other = torch.tanh(h)  # nobody needs h before this
        return s.up(h) + s.down(other)

    found = captured(Toy(body, up=(64, 64), down=(64, 64)), randn(2, 3, 64))
    assert programs(found) == [
        "row 64 | silu 0 | keep 1 float64 | fp8 1",
        "row 64 | tanh 0 | fp8 1",
    ]


def test_nothing_is_computed_twice_of_a_row() -> None:
    found = captured(Stack(), randn(2, 6, 32), randn(2, 32))
    for route in (FP8, HALF, NATIVE):
        names = [str(node.target) for node in found.lowered(route.scheme, route).module.graph.nodes]
        assert not any("layer_norm" in name or "gelu" in name for name in names)


def test_per_sample_linears_take_no_part() -> None:
    found = captured(Stack(), randn(2, 6, 32), randn(2, 32))
    assert found.schemes("w4a8")["linear"] == "w4a16"
    assert calls(found.lowered("w4a8", FP8).module)["linear"] == 2


# ---------------------------------------------------------------- linears that read one tensor


def products(found: Captured, route: Route = FP8) -> list[int]:
    """How many weights each product has."""
    programs(found, route)
    nodes = found.lowered(route.scheme, route).module.graph.nodes
    return [len(node.args[1]) for node in nodes if "permuquant.matmul" in str(node.target)]


def every(*names: str) -> Callable[..., Any]:
    return lambda s, x: tuple(getattr(s, name)(x) for name in names)


def test_linears_that_read_one_tensor_are_one_product_within_the_largest_weight() -> None:
    sizes = {"a": (64, 16), "b": (64, 80), "c": (64, 16), "d": (64, 32), "e": (64, 32)}
    found = captured(Toy(every(*sizes), **sizes), randn(2, 3, 64))
    assert sorted(products(found)) == [1, 1, 3]  # 16 + 16 + 32 of the 80; 32; 80
    assert products(found, ROUTES["w4a4", "half"])[0] == 3


def test_packed_products_are_one_each() -> None:
    sizes = {"a": (64, 16), "b": (64, 80), "c": (64, 16)}
    found = captured(Toy(every(*sizes), **sizes), randn(2, 3, 64))
    assert products(found, ROUTES["w4a4", "in_loop"]) == [1, 1, 1]


def test_linears_with_and_without_bias_are_multiplied_apart() -> None:
    toy = Toy(every("a", "b", "c"), a=(64, 16), b=(64, 16), c=(64, 80))
    toy.register_module("b", nn.Linear(64, 16, bias=False).double().requires_grad_(False))
    assert products(captured(toy, randn(2, 3, 64))) == [1, 1, 1]


def test_a_bias_that_is_computed_is_waited_for() -> None:
    def body(s: Any, x: Tensor) -> Any:
        y = s.a(x)
        return y, F.linear(x, s.b.weight, y.mean((0, 1))), s.c(x)

    toy = Toy(body, a=(64, 16), b=(64, 16), c=(64, 80))
    assert products(captured(toy, randn(2, 3, 64))) == [1, 1, 1]


# ---------------------------------------------------------------- graphs that write


def test_a_graph_that_writes_is_lowered_linear_by_linear() -> None:
    def body(s: Any, x: Tensor) -> Any:
        h = 2 * x
        y = s.up(h)
        h.add_(1)
        return y + s.down(h)

    found = captured(Toy(body, up=(64, 64), down=(64, 64)), randn(2, 3, 64))
    options = Options(scheme="w4a8")
    tensors = {name: found.inputs[i] for name, i in found.graph.positions.items()}
    assert backend.route(found.graph, options, tensors) is None
    (fused,) = served(found.lowered("w4a8", None), found.inputs)
    y = Toy(body, up=(64, 64), down=(64, 64))(randn(2, 3, 64))
    assert (fused - y).norm() / y.norm() < 0.2


def test_the_route_is_that_of_the_device_and_the_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    found = captured(Stack().bfloat16(), randn(2, 6, 32).bfloat16(), randn(2, 32).bfloat16())
    tensors = {name: found.inputs[i] for name, i in found.graph.positions.items()}
    assert (
        backend.route(found.graph, Options(scheme="w4a8"), tensors) == ROUTES["w4a8", "reference"]
    )
    there = here(torch.device("cpu"), "nvfp4", torch.bfloat16)._replace(capability=(9, 0))
    monkeypatch.setattr("pq_compile.backend.here", lambda *_: there)
    for scheme, wish, name in (
        ("w4a8", "auto", "fp8"),
        ("w4a4", "auto", "half"),
        ("w4a4", "fp8", "fp8"),
    ):
        options = Options(scheme=scheme, route=wish)
        assert backend.route(found.graph, options, tensors) == ROUTES[scheme, name]
