"""A wrong rule is seen: each of these breaks one line of the table, and a toy's output changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from passes import indexing, joining, operators, views
from passes.axes import Value
from passes.calls import Call
from passes.equations import read
from passes.propagate import random_orders
from passes.rules import POINTWISE, RULES
from tests.graphs import Traced, relative_error
from tests.test_propagate import traced


def equation(text: str) -> Callable[..., Value]:
    """A rule that reads ``text`` with the op's tensors, whatever its other arguments."""

    def rule(call: Call, *args: Any, **_: Any) -> Value:
        values = [one for one in args if isinstance(one, Value)]
        return read(text, values, call.shape, call.why)

    return rule


def unpinned_padding(call: Call, x: Value, *_: Any) -> Value:
    return Value(call.shape, tuple(None if dim is x.dims[-1] else dim for dim in x.dims))


def swapped_cat(call: Call, values: Any, dim: int = 0) -> Value:
    return joining.cat(call, values[::-1], dim)


def first_half(call: Call, x: Value, _: Any, dim: int = 0) -> Any:
    first = indexing.narrow(call, x, dim, 0, call.shapes[0][dim])
    return (first,) * len(call.shapes)


MUTANTS: list[tuple[str, Any, str]] = [
    ("aten.cumsum", POINTWISE, "unknown_op"),
    ("aten.linear", "... k, n j, n -> ... n", "plain_mlp"),
    ("aten.linear", "... k, n k, m -> ... n", "gated_mlp"),
    ("aten.mul", equation("... a, ... b -> ... a"), "gated_mlp"),
    ("aten.add", equation("... a, ... b -> ... a"), "residual_chain"),
    ("aten.embedding", "r c, ... -> ... c", "embedding_table"),
    ("aten.view_as_complex", "... r -> ...", "rotate_complex"),
    ("aten.matmul", equation("... m j, ... k n -> ... m n"), "attention"),
    ("aten.conv2d", equation("b i x y, o j x y, p -> b o x y"), "patchify"),
    ("aten.group_norm", equation("b c x y, c, c -> b c x y"), "group_norm"),
    ("aten.layer_norm", equation("... c, d, c -> ... c"), "norms"),
    (
        "aten.scaled_dot_product_attention",
        equation("... q d, ... k f, ... k e -> ... q e"),
        "qk_norm",
    ),
    ("aten.slice", operators.keep, "linear_attention"),
    ("aten.select", views.reshape, "sliced_channels"),
    ("aten.arange", operators.constant, "position_in_graph"),
    ("aten.pad", unpinned_padding, "padded"),
    ("aten.cat", swapped_cat, "concatenated_inputs"),
    ("aten.chunk", first_half, "depthwise_glu"),
    ("aten.repeat_interleave", operators.constant, "repeated_key_heads"),
    ("aten.index", operators.constant, "embedding_table"),
    ("aten.sum", operators.constant, "two_uses_of_a_weight"),
]


@pytest.mark.parametrize(("op", "rule", "toy"), MUTANTS)
def test_a_wrong_rule_changes_an_output(
    op: str, rule: Any, toy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = traced(toy)
    right = whole.groups
    monkeypatch.setitem(RULES, op, rule)
    broken = Traced(whole.graph, whole.inputs)
    assert broken.groups != right
    worst = max(
        relative_error(broken.run(random_orders(broken.groups, seed)), whole.run())
        for seed in range(3)
    )
    assert worst > 1e-6
