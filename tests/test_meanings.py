"""What nodes of Dynamo's graph mean, however they are spelled; and what is not described."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from passes.meanings import LAST, steps_of
from pq_compile.rows import OPS
from tests.lowering import captured

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

X, Y = torch.rand(2, 3, 16) + 0.1, torch.rand(2, 3, 16) + 0.1
Function = Callable[..., Any]


def last_of(function: Function, *inputs: Any) -> fx.Node:
    """The node whose result ``function`` returns."""
    module = captured(function, *inputs, simplified=False).graph.module
    found = module.graph.output_node().args[0]
    return found[0] if isinstance(found, tuple | list) else found  # type: ignore[return-value]


def described(function: Function, *inputs: Any) -> list[tuple[Any, ...]] | None:
    """The steps of the last node; its operands as "x", "y", a number, or "last"."""
    node = last_of(function, *inputs)
    names = {one: "xyz"[i] for i, one in enumerate(node.graph.find_nodes(op="placeholder"))}
    steps = steps_of(node)
    if steps is None:
        return None

    def shown(value: Any) -> Any:
        return "last" if value is LAST else names.get(value, value)

    return [(op, *map(shown, operands)) for op, operands in steps]


TWO: dict[str, tuple[Function, ...]] = {
    "add": (lambda x, y: x + y, torch.add, lambda x, y: x.add(y)),
    "sub": (lambda x, y: x - y, torch.sub, lambda x, y: x.sub(y)),
    "mul": (lambda x, y: x * y, torch.mul, lambda x, y: x.mul(y)),
    "div": (lambda x, y: x / y, torch.div, lambda x, y: x.div(y)),
}
ONE: dict[str, tuple[Function, ...]] = {
    "neg": (lambda x: -x, torch.neg, lambda x: x.neg()),
    "square": (
        torch.square,
        lambda x: x.square(),
        lambda x: x**2,
        lambda x: x.pow(2),
        lambda x: torch.pow(x, 2.0),
        lambda x: x.pow(exponent=2),
    ),
    "sqrt": (torch.sqrt, lambda x: x.sqrt()),
    "rsqrt": (torch.rsqrt, lambda x: x.rsqrt()),
    "exp": (torch.exp, lambda x: x.exp()),
    "tanh": (torch.tanh, lambda x: x.tanh(), F.tanh, nn.Tanh()),
    "sigmoid": (torch.sigmoid, lambda x: x.sigmoid(), F.sigmoid, nn.Sigmoid()),
    "relu": (torch.relu, lambda x: x.relu(), F.relu, nn.ReLU()),
    "silu": (F.silu, nn.SiLU()),
    "gelu": (F.gelu, nn.GELU(), lambda x: F.gelu(x, approximate="none")),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), nn.GELU(approximate="tanh")),
    "mean": (
        lambda x: x.mean(-1, keepdim=True),
        lambda x: x.mean(dim=-1, keepdim=True),
        lambda x: torch.mean(x, -1, True),
        lambda x: x.mean((-1,), keepdim=True),
    ),
    "same": (
        lambda x: x.float().double().float() if x.dtype == torch.float32 else x,
        lambda x: x.to(torch.bfloat16),
        lambda x: x.to(dtype=torch.float64),
        lambda x: x.half(),
        lambda x: x.bfloat16(),
        lambda x: x.contiguous(),
        lambda x: x.clone(),
        lambda x: F.dropout(x, 0.0),
        lambda x: F.dropout(x, 0.5, training=False),
    ),
}
SPELLED = [(op, i) for op, ways in (TWO | ONE).items() for i in range(len(ways))]


@pytest.mark.parametrize(("op", "way"), SPELLED)
def test_every_spelling_means_the_operation(op: str, way: int) -> None:
    function = (TWO | ONE)[op][way]
    if op in TWO:
        assert described(function, X, Y) == [(op, "x", "y")]
    elif op == "same" and way == 0:
        assert [op for op, _ in steps_of(last_of(function, X)) or ()] == ["same"]
    else:
        assert described(function, X) == [(op, "x")]


def test_numbers_may_stand_on_either_side() -> None:
    assert described(lambda x: x * 2, X) == [("mul", "x", 2)]
    assert described(lambda x: 1 + x, X) == [("add", 1, "x")]
    assert described(lambda x: 0.5 - x, X) == [("sub", 0.5, "x")]


@pytest.mark.parametrize("affine", [True, False])
def test_a_layer_norm_is_itself_times_weight_plus_bias(affine: bool) -> None:
    weight = torch.rand(16)
    if not affine:
        for function in (nn.LayerNorm(16, 1e-6, False), lambda x: F.layer_norm(x, (16,), eps=1e-6)):
            assert described(function, X) == [("layer_norm", "x", 1e-6)]
        return
    found = described(lambda x, y, z: F.layer_norm(x, (16,), y, z), X, weight, weight.clone())
    assert found == [("layer_norm", "x", 1e-5), ("mul", "last", "y"), ("add", "last", "z")]
    assert described(lambda x, y: F.layer_norm(x, (16,), weight=y), X, weight) == [
        ("layer_norm", "x", 1e-5),
        ("mul", "last", "y"),
    ]


def test_an_rms_norm_is_itself_times_weight() -> None:
    weight = torch.rand(16)
    assert described(lambda x: F.rms_norm(x, (16,), eps=1e-6), X) == [("rms_norm", "x", 1e-6)]
    assert described(lambda x, y: torch.rms_norm(x, (16,), y, 1e-6), X, weight) == [
        ("rms_norm", "x", 1e-6),
        ("mul", "last", "y"),
    ]


SILENT: dict[str, Function] = {
    "a view": lambda x: x.view(6, 16),
    "another function": torch.cos,
    "a sum": lambda x: x.sum(-1, keepdim=True),
    "a factor of the second": lambda x: torch.add(x, x, alpha=2),
    "rounding": lambda x: torch.div(x, x, rounding_mode="floor"),
    "another power": lambda x: x**3,
    "a power of two": lambda x: 2**x,
    "a mean over rows": lambda x: x.mean(1, keepdim=True),
    "a mean over two dimensions": lambda x: x.mean((-2, -1), keepdim=True),
    "a mean over all": lambda x: x.mean(),
    "a mean without its dimension": lambda x: x.mean(-1),
    "a norm over two dimensions": lambda x: F.layer_norm(x, (3, 16)),
    "a norm with the epsilon of the dtype": lambda x: F.rms_norm(x, (16,)),
    "a dropout": lambda x: F.dropout(x, 0.5, training=True),
    "integers": lambda x: x.to(torch.int32),
    "from integers": lambda x: x.to(torch.int32).to(torch.float32),
    "softmax": lambda x: x.softmax(-1),
    "a comparison": lambda x: x > 0,
    "an infinity": lambda x: x + float("inf"),
}


@pytest.mark.parametrize("name", SILENT)
def test_what_is_not_described_has_no_meaning(name: str) -> None:
    assert described(SILENT[name], X) is None


def in_place(x: Tensor) -> Any:
    return F.relu(x * 2, inplace=True)


def added_in_place(x: Tensor, y: Tensor) -> Any:
    z = x * 2
    z += y
    return z


def written(x: Tensor) -> Any:
    z = x * 2
    return z.add_(1)


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (in_place, [X]),
        (added_in_place, [X, Y]),
        (written, [X]),
        (lambda x: F.silu(x * 2, True), [X]),
        (lambda x: F.dropout(x * 2, 0.0, inplace=True), [X]),
    ],
)
def test_what_writes_has_no_meaning(function: Function, inputs: list[Tensor]) -> None:
    assert described(function, *inputs) is None


def test_every_step_is_an_operation_of_row_programs() -> None:
    assert {op for op in (*TWO, *ONE) if op != "same"} | {"layer_norm", "rms_norm"} == set(OPS)
