"""Lowering swaps linears for quantised ones, and leaves everything else to the compiler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from passes.lower import Lowered, example_inputs, fake_packed, lower
from pq_compile import ops
from pq_compile.formats import FORMATS, NVFP4
from pq_compile.show import show

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

assert ops.SCHEMES


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.silu(self.up(x)))
        return out


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 32)

    def forward(self, index: Tensor) -> Tensor:
        return F.linear(self.embed(index), self.embed.weight)


def captured(model: nn.Module, *args: Tensor) -> fx.GraphModule:
    found: list[fx.GraphModule] = []

    def record(module: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        found.append(module)
        return module.forward

    with torch.no_grad():
        torch.compile(model, backend=record)(*args)
    return found[0]


def routes_of(module: fx.GraphModule, route: str = "w4a4") -> dict[str, str]:
    return {n.name: route for n in module.graph.nodes if n.target is torch._C._nn.linear}


def test_the_graph_before_and_after(golden: Callable[[str], None]) -> None:
    module = captured(Gated(), torch.randn(2, 5, 32))
    first, second = routes_of(module)
    routes = {first: "w4a4", second: "w4a16"}
    lowered = lower(module, routes, "nvfp4")
    golden(f"before\n{show(module)}\nafter\n{show(lowered.module)}")
    assert len(lowered.packed) == 2


def test_a_linear_without_a_route_stays() -> None:
    module = captured(Gated(), torch.randn(2, 5, 32))
    _, second = routes_of(module)
    lowered = lower(module, {second: "w4a4"}, "nvfp4")
    assert show(lowered.module).count("permuquant.linear") == 1
    assert show(lowered.module).count("= linear(") == 1
    assert len(lowered.packed) == 1


def test_a_route_that_was_asked_for_is_asked_of_every_linear() -> None:
    module = captured(Gated(), torch.randn(2, 5, 32))
    first, second = routes_of(module)
    lowered = lower(module, {first: "w4a4", second: "w4a16"}, "nvfp4", None, "in_loop")
    nodes = [node for node in lowered.module.graph.nodes if "permuquant" in str(node.target)]
    assert [node.args[6:] for node in nodes] == [("w4a4", "in_loop"), ("w4a16", "in_loop")]
    auto = lower(module, {first: "w4a4"}, "nvfp4", None, "auto")
    assert show(auto.module) == show(lower(module, {first: "w4a4"}, "nvfp4").module)


def test_without_routes_nothing_changes() -> None:
    module = captured(Gated(), torch.randn(2, 5, 32))
    lowered = lower(module, {}, "nvfp4")
    assert show(lowered.module) == show(module)
    assert not lowered.packed
    assert [source.argument for source in lowered.sources] == list(range(len(lowered.sources)))


def test_a_weight_that_something_else_reads_stays_an_input_beside_its_packed_form() -> None:
    module = captured(Tied(), torch.tensor([[1, 2, 3]]))
    lowered = lower(module, routes_of(module), "nvfp4")
    (weight,) = lowered.packed
    fields = [source.field for source in lowered.sources if source.argument == weight]
    assert fields == [None, 0, 1, 2]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("k", [64, 120])
def test_fake_packed_tensors_look_like_packed_ones(name: str, k: int) -> None:
    weight = torch.randn(24, k, dtype=torch.bfloat16)
    real = FORMATS[name].quantize(FORMATS[name].pad(weight))
    for fake, tensor in zip(fake_packed(weight, FORMATS[name], None), real, strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (
            tensor.shape,
            tensor.dtype,
            tensor.stride(),
        )


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_lowered_graph_goes_through_aot_autograd(dynamic: bool) -> None:
    from torch._dynamo.backends.debugging import aot_eager

    model = Gated().requires_grad_(False)
    seen: list[Lowered] = []

    def backend(module: fx.GraphModule, given: Sequence[Any]) -> Callable[..., Any]:
        lowered = lower(module, routes_of(module), "nvfp4")
        seen.append(lowered)
        context = torch._guards.TracingContext.get()
        compiled = aot_eager(
            lowered.module, example_inputs(lowered, given, "nvfp4", context.fake_mode)
        )

        def serve(*args: Any) -> Any:
            packed = {i: NVFP4.quantize(args[i]) for i in lowered.packed}
            return compiled(
                *(
                    args[s.argument] if s.field is None else packed[s.argument][s.field]
                    for s in lowered.sources
                )
            )

        return serve

    fast = torch.compile(model, backend=backend, dynamic=dynamic)
    with torch.no_grad():
        for rows in (5, 9):
            x = torch.randn(2, rows, 32)
            h = F.silu(F.linear(NVFP4.fake(x), NVFP4.fake(model.up.weight), model.up.bias))
            expected = F.linear(NVFP4.fake(h), NVFP4.fake(model.down.weight))
            torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-4)
    assert len(seen) == (1 if dynamic else 2)
