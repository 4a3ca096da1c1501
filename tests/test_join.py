"""Rows and their products as one operator: the same numbers from fewer calls."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, fx

from passes.join import join
from tests.lowering import FUSED, ROUTES, Captured, calls, captured
from tests.tiny_models import flux


@cache
def traced() -> Captured:
    model, given = flux(single_layers=2)
    return captured(model.double().eval(), **given)


def sites(module: fx.GraphModule) -> int:
    target = torch.ops.permuquant.site.default
    return len(module.graph.find_nodes(op="call_function", target=target))


@pytest.mark.parametrize("key", FUSED)
def test_a_joined_graph_computes_the_same(key: tuple[str, str]) -> None:
    one = traced()
    lowered = one.lowered(key[0], ROUTES[key])
    rows, expected = calls(lowered.module)["rows"], one.run(lowered)
    assert join(lowered.module) is lowered.module
    lowered.module.graph.lint()
    found = one.run(lowered)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert sites(lowered.module) == rows > 0
    assert calls(lowered.module)["rows"] == calls(lowered.module)["matmul"] == 0


def test_what_it_says_it_returns_it_returns() -> None:
    lowered = traced().lowered("w4a8", ROUTES["w4a8", "fp8"])
    join(lowered.module)
    seen: list[tuple[list[Tensor], list[Tensor]]] = []

    class Watch(fx.Interpreter):
        def call_function(self, target, args, kwargs):  # type: ignore[no-untyped-def]
            made = super().call_function(target, args, kwargs)
            if target is torch.ops.permuquant.site.default:
                with torch.device("meta"):
                    bare = fx.node.map_aggregate(
                        args, lambda x: x.to("meta") if isinstance(x, Tensor) else x
                    )
                seen.append((made, target(*bare)))
            return made

    lowered.module.forward = Watch(lowered.module).run
    traced().run(lowered)
    assert seen
    for made, said in seen:
        for x, y in zip(made, said, strict=True):
            assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())


def test_rows_that_something_else_reads_stay_by_themselves() -> None:
    lowered = traced().lowered("w4a8", ROUTES["w4a8", "fp8"])
    graph = lowered.module.graph
    rows = graph.find_nodes(op="call_function", target=torch.ops.permuquant.rows.default)[0]
    codes = next(user for user in rows.users if user.args[1] == 0)
    with graph.inserting_after(codes):
        graph.call_function(torch.ops.aten.neg.default, (codes,))
    join(lowered.module)
    assert calls(lowered.module)["rows"] == 1
