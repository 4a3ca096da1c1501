"""Names, linears and the view of Dynamo's graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from passes.capture import TAG, capture, user_path
from passes.propagate import random_orders
from tests.graphs import relative_error, trace
from tests.toys import TOYS, Net, linear, tokens


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("L['self']._modules['up']._parameters['weight']", "up.weight"),
        ("L['self']._modules['blocks']._modules['0']._buffers['pos']", "blocks.0.pos"),
        ("L['fn']._modules['0']._parameters['weight']", "0.weight"),
        ("G['model']._modules['up']._parameters['bias']", "up.bias"),
        ("L['self'].__dict__['_modules']['up']._parameters['weight']", "up.weight"),
        ("L['self'].up.weight", "up.weight"),
        ("L['self'].blocks[0].up.weight", "blocks.0.up.weight"),
        ("L['self'].blocks.0.up", "blocks.0.up"),
        ("L['x']", ""),
    ],
)
def test_both_spellings_of_a_source_give_the_users_name(source: str, name: str) -> None:
    assert user_path(source) == name


def test_a_source_whose_name_is_a_method_is_understood() -> None:
    class Source:
        def name(self) -> str:
            return "L['self']._modules['up']._parameters['weight']"

    found: list[tuple[fx.GraphModule, list[Any]]] = []

    def backend(module: fx.GraphModule, inputs: list[Any]) -> Any:
        found.append((module, list(inputs)))
        return module.forward

    torch._dynamo.reset()
    compiled: Any = torch.compile(nn.Sequential(linear()), backend=backend)
    compiled(torch.ones(2, 8))
    (module, inputs) = found[0]
    for node in module.graph.find_nodes(op="placeholder"):
        node._dynamo_source = Source()
    names = set(capture(module, inputs).positions)
    assert names == {"up.weight", "up.weight#2", "up.weight#3"}


def test_parameters_and_buffers_have_names_and_positions() -> None:
    model, inputs = TOYS["position_buffer"]()
    toy = trace(model, *inputs)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert set(toy.graph.positions) == set(tensors)
    for name, index in toy.graph.positions.items():
        assert toy.inputs[index] is tensors[name]
    assert set(toy.graph.parameters.values()) == set(toy.graph.positions)


def test_linears_are_described_in_graph_order() -> None:
    def run(m: Any, x: Tensor, t: Tensor) -> Any:
        h = m.blocks[0](x) * m.time(t)[:, None]
        result = m.out(h) + m.gate(h)
        return result

    parts = {"time": linear(4, 12), "out": linear(12, 8, bias=False), "gate": linear(12, 8)}
    model = Net(run, blocks=nn.ModuleList([linear(8, 12)]), **parts)
    graph = trace(model, tokens().fill_(0), tokens(2, 4).fill_(0)).graph
    block, time, out, gate = graph.linears
    assert (block.name, block.weight, block.bias) == (
        "blocks.0",
        "blocks.0.weight",
        "blocks.0.bias",
    )
    assert (block.in_features, block.out_features, block.rows) == (8, 12, 10)
    assert (block.in_block, time.in_block) == (True, False)
    assert (block.per_sample, time.per_sample) == (False, True)
    assert time.rows == 2
    assert out.bias is None
    assert out.reads == gate.reads != block.reads
    assert list(graph.nodes.values()) == ["blocks.0", "time", "out", "gate"]
    assert graph.kept == {}


def test_a_linear_on_rows_only_is_not_per_sample() -> None:
    graph = trace(nn.Sequential(linear(), linear()), torch.zeros(3, 8)).graph
    assert [one.per_sample for one in graph.linears] == [False, False]


def test_a_shared_weight_is_one_name_under_two_nodes() -> None:
    model, inputs = TOYS["two_uses_of_a_weight"]()
    graph = trace(model, *inputs).graph
    assert sorted(graph.nodes.values()) == ["down", "down", "other", "up"]


def test_a_parameter_of_another_name_keeps_it() -> None:
    def run(m: Any, x: Tensor) -> Any:
        return F.linear(x, m.matrix)

    graph = trace(Net(run, matrix=torch.zeros(12, 8)), tokens().fill_(0)).graph
    assert [one.name for one in graph.linears] == ["matrix"]


def test_what_only_looks_like_a_linear_is_kept_with_a_reason() -> None:
    def run(m: Any, x: Tensor) -> Any:
        x = F.linear(x, m.weight * 2) @ m.matrix
        x = m.conv(x.transpose(1, 2)).transpose(1, 2)
        result = m.attention(x, x, x)[0]
        return result

    parts = {"weight": torch.zeros(8, 8), "matrix": torch.zeros(8, 8), "conv": nn.Conv1d(8, 8, 1)}
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    toy = trace(Net(run, attention=attention, **parts).train(), tokens().fill_(0))
    assert toy.graph.linears == ()
    assert set(toy.graph.kept.values()) == {
        "its weight is computed in the graph",
        "it multiplies by a parameter outside a linear",
        "it is a convolution",
        "its projections are inside multi_head_attention_forward",
    }


def test_every_node_of_the_view_names_its_node() -> None:
    model, inputs = TOYS["norms"]()
    graph = trace(model, *inputs).graph
    assert graph.view is not None
    names = {node.name for node in graph.module.graph.nodes}
    calls = [node for node in graph.view.graph.nodes if node.op == "call_function"]
    assert calls
    assert all(node.meta["custom"][TAG] in names for node in calls)
    assert {"aten.linear.default", "aten.rms_norm.default"} <= {str(node.target) for node in calls}


def test_a_graph_that_cannot_be_traced_says_why() -> None:
    model, inputs = TOYS["plain_mlp"]()
    toy = trace(model, *inputs)
    silu = next(node for node in toy.graph.module.graph.nodes if "relu" in node.name)

    def relu(x: Tensor) -> Tensor:
        raise NotImplementedError("no such thing")

    silu.target = relu
    graph = capture(toy.graph.module, toy.inputs)
    assert graph.view is None
    assert graph.view_error == (
        "a graph that could not be traced to ATen (NotImplementedError: no such thing)"
    )


def test_a_view_that_loses_track_of_a_parameter_is_none() -> None:
    up, down = linear(), linear()

    def run(x: Tensor) -> Any:
        return down(torch.vmap(torch.sin)(up(x)))

    lost = trace(run, tokens())
    if lost.graph.view is None:
        error = "a graph that could not be traced to ATen past node batched_outputs"
        assert lost.graph.view_error == error
    for seed in range(3):  # older versions of torch do not lose it
        found = lost.run(random_orders(lost.groups, seed))
        assert relative_error(found, lost.run()) <= 1e-12


def test_a_view_may_lose_track_of_constants() -> None:
    up, down = linear(), linear()

    def run(x: Tensor) -> Any:
        mask = torch.vmap(torch.sin)(torch.arange(8.0)).cos()
        return down(up(x) * mask)

    toy = trace(run, tokens())
    assert toy.graph.view is not None
    assert not any(group.free for group in toy.groups.groups if group.size == 8)


def test_rows_of_symbolic_sizes_are_those_of_the_example() -> None:
    model, inputs = TOYS["plain_mlp"]()
    toy = trace(model, *inputs, dynamic=True)
    assert [one.rows for one in toy.graph.linears] == [10, 10]
    assert any(isinstance(value, int | torch.SymInt) for value in toy.inputs)
