"""A concatenation of all slices of a tensor, in order, is the tensor; any other is left alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from passes.simplify import captured, simplify
from pq_compile.show import show
from tests.lowering import captured as graph_of
from tests.tiny_models import flux

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

Function = Callable[..., Any]
X = torch.arange(2 * 6 * 16).view(2, 6, 16).double()


def simplified(function: Function, *inputs: Any, dynamic: bool | None = False) -> tuple[str, str]:
    """The graph before and after, as text; what it computes stays the same."""
    found = graph_of(function, *inputs, simplified=False, dynamic=dynamic)
    before = found.graph.module
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after = simplify(before)
        after.graph.lint()
    given = [x.clone() if isinstance(x, Tensor) else x for x in found.inputs]
    for one, other in zip(after(*given), before(*found.inputs), strict=True):
        assert torch.equal(one, other)
    return show(before), show(after)


def test_a_stream_that_is_parted_and_joined_stays_whole() -> None:
    def function(x: Tensor) -> Tensor:
        text, image = x[:, :2], x[:, 2:]
        return torch.cat([text, image], dim=1) * 2

    before, after = simplified(function, X)
    assert before.count("l_x_[:") == 2
    assert after.splitlines()[1:] == ["mul: f64[2, 6, 16] = mul(l_x_, 2)", "return mul"]


WHOLE: dict[str, Function] = {
    "three slices": lambda x: torch.cat([x[:, :1], x[:, 1:4], x[:, 4:]], 1) * 2,
    "channels": lambda x: torch.cat([x[:, :, :3], x[:, :, 3:]], dim=2) * 2,
    "a cut at the start": lambda x: torch.cat([x[:, :0], x[:, 0:]], 1) * 2,
    "a cut at the end": lambda x: torch.concat([x[:, 0:6], x[:, 6:]], dim=1) * 2,
    "by keywords": lambda x: torch.cat(tensors=[x[:, :2], x[:, 2:]], dim=1) * 2,
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_put_together_again_is_whole(name: str) -> None:
    _, after = simplified(WHOLE[name], X)
    assert "cat" not in after


def test_slices_that_something_else_reads_stay() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        text, image = x[:, :2], x[:, 2:]
        return torch.cat([text, image], 1) * 2, text.cos()

    _, after = simplified(function, X)
    assert "cat" not in after
    assert after.count("l_x_[:") == 1


def test_slices_that_are_joined_twice_are_dropped_once() -> None:
    def function(x: Tensor) -> Tensor:
        text, image = x[:, :2], x[:, 2:]
        return torch.cat([text, image], 1) * torch.cat([text, image], 1)

    _, after = simplified(function, X)
    assert "cat" not in after


def test_what_is_joined_may_be_parted_again() -> None:
    def function(x: Tensor) -> Tensor:
        y = torch.cat([x[:, :2], x[:, 2:]], 1)
        return torch.cat([y[:, :3], y[:, 3:]], 1) * 2

    _, after = simplified(function, X)
    assert "cat" not in after


OTHERS: dict[str, Function] = {
    "another order": lambda x: torch.cat([x[:, 2:], x[:, :2]], 1) * 2,
    "a gap": lambda x: torch.cat([x[:, :2], x[:, 3:]], 1) * 2,
    "an overlap": lambda x: torch.cat([x[:, :3], x[:, 2:]], 1) * 2,
    "cuts that cross": lambda x: torch.cat([x[:, :4], x[:, 4:2], x[:, 2:]], 1) * 2,
    "a cut outside": lambda x: torch.cat([x[:, :9], x[:, 9:]], 1) * 2,
    "a cut from the end": lambda x: torch.cat([x[:, :-2], x[:, -2:]], 1) * 2,
    "no first part": lambda x: torch.cat([x[:, 1:3], x[:, 3:]], 1) * 2,
    "no last part": lambda x: torch.cat([x[:, :3], x[:, 3:5]], 1) * 2,
    "another dimension": lambda x: torch.cat([x[:, :3], x[:, 3:]], 0) * 2,
    "steps": lambda x: torch.cat([x[:, :2:2], x[:, 2::2]], 1) * 2,
    "samples": lambda x: torch.cat([x[:1], x[1:]]) * 2,
    "one part": lambda x: torch.cat([x[:, :]], 1) * 2,
    "a number among the indices": lambda x: torch.cat([x[0, :2], x[0, 2:]], 0) * 2,
    "a part of the other dimension": lambda x: torch.cat([x[:1, :2], x[:1, 2:]], 1) * 2,
    "a part that was changed": lambda x: torch.cat([x[:, :2] * 2, x[:, 2:]], 1) * 2,
    "an output": lambda x: torch.cat([x[:, :2], x[:, 2:]], 1),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_put_together_otherwise_is_left_alone(name: str) -> None:
    before, after = simplified(OTHERS[name], X)
    assert before == after


def test_slices_of_two_tensors_are_left_alone() -> None:
    before, after = simplified(lambda x, y: torch.cat([x[:, :2], y[:, 2:]], 1) * 2, X, X + 1)
    assert before == after


def test_a_cut_that_is_not_known_is_left_alone() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        n = y.shape[0]
        return torch.cat([x[:, :n], x[:, n:]], 1) * 2

    before, after = simplified(function, X, torch.zeros(3), dynamic=True)
    assert before == after


def test_nothing_to_simplify_is_the_module_itself() -> None:
    module = graph_of(lambda x: x * 2, X, simplified=False).graph.module
    assert simplify(module) is module


def test_a_graph_that_writes_is_left_alone() -> None:
    """What was a copy would be the input itself, which ``add_`` changes."""

    def function(x: Tensor) -> Tensor:
        y = torch.cat([x[:, :2], x[:, 2:]], 1)
        y.add_(1)
        return y * x

    def backend(module: fx.GraphModule, inputs: Sequence[Any]) -> Function:
        graph = captured(module, inputs)
        assert graph.module is module
        assert graph.view is not None
        return graph.module.forward

    x = X.clone()
    assert torch.equal(torch.compile(function, backend=backend)(x), (X + 1) * X)
    assert torch.equal(x, X)


# ---------------------------------------------------------------- what Dynamo noted


class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 16).double()

    def forward(self, x: Tensor) -> Any:
        return self.up(torch.cat([x[:, :2], x[:, 2:]], 1))


def test_all_that_dynamo_noted_is_kept() -> None:
    """Of which parameters have their names, and Inductor what is static."""

    def backend(module: fx.GraphModule, _: Sequence[Any]) -> Function:
        after: Any = simplify(module)
        assert after is not module
        assert after.meta == module.meta
        assert after._param_name_to_source == module._param_name_to_source
        inputs = (one.graph.find_nodes(op="placeholder") for one in (module, after))
        for one, other in zip(*inputs, strict=True):
            assert other._dynamo_source is one._dynamo_source
            assert other.meta.keys() == one.meta.keys()
        return module.forward

    with torch.no_grad():
        torch.compile(Joined(), backend=backend)(X)


@pytest.mark.filterwarnings("ignore")  # diffusers warns of what it deprecates
def test_parameters_keep_the_names_of_the_users_model() -> None:
    pytest.importorskip("diffusers")
    model, inputs = flux(single_layers=2)
    found = graph_of(model.double().eval(), **inputs)
    assert set(found.graph.positions) <= dict(model.named_parameters()).keys()
    assert "single_transformer_blocks.1.proj_out" in {one.name for one in found.graph.linears}
    cats = [node for node in found.graph.module.graph.nodes if node.target is torch.cat]
    whole = graph_of(model, **inputs, simplified=False).graph.module
    assert len(cats) == sum(node.target is torch.cat for node in whole.graph.nodes) - 1
