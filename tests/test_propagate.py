"""Random permutations in every free group of a toy change nothing; the groups are as expected."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from passes.constraints import constraint_graph, every_pin, why
from passes.fold import moved
from passes.propagate import propagate, random_orders, spread
from passes.storage import storage_of, written
from pq_compile.plan import Axis
from pq_compile.show import show
from tests.graphs import Traced, relative_error, trace
from tests.toys import INEXACT, TOYS, Net, linear, tokens

NOTHING_MOVES = {
    *("in_place_halves", "position_in_graph", "tied_weights", "written_buffer", "unknown_op"),
    *("returned_parameter", "returned_middle", "strided_channels", "aliased_buffer"),
}


@cache
def traced(name: str) -> Traced:
    model, inputs = TOYS[name]()
    return trace(model, *inputs)


def free(name: str) -> str:
    """The free groups, one a line."""
    groups = traced(name).groups
    return "\n".join(
        f"{' '.join(map(str, group.axes))}: {group.structure}"
        for group in groups.groups
        if group.free
    )


def pins(name: str, axis: str) -> set[str]:
    """The reasons that pin some leaf of an axis."""
    parameter, _, dim = axis.rstrip("]").rpartition("[")
    groups = traced(name).groups
    segments = groups.segments[Axis(parameter, int(dim))]
    return {reason for one in segments for reason in groups.owners[one.leaf].pinned_by}


@pytest.mark.parametrize("name", TOYS)
def test_random_permutations_of_free_groups_are_invisible(name: str) -> None:
    toy = traced(name)
    assert toy.graph.view_error is None
    expected = toy.run()
    for seed in range(3):
        found = toy.run(random_orders(toy.groups, seed))
        if name in INEXACT:
            assert relative_error(found, expected) <= 1e-12
        else:
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", TOYS)
def test_toys_move_unless_they_are_meant_not_to(name: str) -> None:
    toy = traced(name)
    names = moved(toy.groups, random_orders(toy.groups, 0))
    assert bool(names) != (name in NOTHING_MOVES)


@pytest.mark.parametrize("name", sorted(set(TOYS) - NOTHING_MOVES))
def test_a_moved_parameter_left_unpermuted_changes_the_output(name: str) -> None:
    toy = traced(name)
    orders = random_orders(toy.groups, 0)
    expected = toy.run()
    softmax = name in ("softmax_attention", "causal_attention", "grouped_query_attention")
    invisible = {"k.bias"} if softmax else set()  # softmax ignores what all scores have in common
    for parameter in moved(toy.groups, orders):
        found = toy.run(orders, except_for=parameter)
        assert (relative_error(found, expected) < 1e-9) == (parameter in invisible), parameter


@pytest.mark.parametrize("name", TOYS)
def test_no_rule_fails(name: str) -> None:
    groups = traced(name).groups
    assert not [r for g in groups.groups for r in g.pinned_by if "its rule failed" in r]


@pytest.mark.parametrize("name", TOYS)
def test_groups_partition_the_axes(name: str) -> None:
    toy = traced(name)
    sizes = {
        Axis(parameter, dim): size
        for parameter, index in toy.graph.positions.items()
        for dim, size in enumerate(toy.inputs[index].shape)
    }
    groups = toy.groups
    assert set(groups.segments) == set(sizes)
    for axis, segments in groups.segments.items():
        assert sum(segment.size for segment in segments) == sizes[axis]
        for segment in segments:
            group = groups.owners[segment.leaf]
            assert axis in group.axes
            assert group.size == segment.size
    leaves = [leaf for group in groups.groups for leaf in group.leaves]
    assert len(leaves) == len(set(leaves))
    assert len({group.name for group in groups.groups}) == len(groups.groups)


def test_propagating_twice_gives_the_same_value() -> None:
    toy = traced("adaln_zero")
    assert propagate(toy.graph, toy.inputs) == propagate(toy.graph, toy.inputs)


@pytest.mark.parametrize("name", ["attention", "fused_gate_up", "patchify", "adaln_zero"])
def test_symbolic_sizes_change_no_group(name: str) -> None:
    model, inputs = TOYS[name]()
    symbolic = trace(model, *inputs, dynamic=True)
    assert show(symbolic.groups) == show(traced(name).groups)


def test_propagation_adds_no_guard_and_specialises_no_symbol() -> None:
    model, inputs = TOYS["attention"]()
    compiled = []

    def backend(module: torch.fx.GraphModule, examples: list[object]) -> object:
        from passes.capture import capture

        compiled.append(propagate(capture(module, examples), examples))
        return module.forward

    torch._dynamo.reset()
    run = torch.compile(model, backend=backend, dynamic=True)
    run(*inputs)
    run(inputs[0][:, :3].repeat(2, 1, 1))
    assert len(compiled) == 1


# ---------------------------------------------------------------- what must be found


def test_gate_and_up_share_one_permutation() -> None:
    axes = "gate.weight[0] gate.bias[0] up.weight[0] up.bias[0] down.weight[1]: 12"
    assert free("gated_mlp") == axes


def test_both_halves_of_a_fused_gate_up_share_one_permutation() -> None:
    assert free("fused_gate_up") == "gate_up.weight[0] gate_up.bias[0] down.weight[1]: 12"
    first, second = traced("fused_gate_up").groups.segments[Axis("gate_up.weight", 0)]
    assert first == second


def test_each_head_has_a_permutation_of_its_own() -> None:
    lines = free("attention").splitlines()
    assert lines[1:] == [
        "q.weight[0] q.bias[0] k.weight[0] k.bias[0]: 2 x 4",
        "v.weight[0] v.bias[0] out.weight[1]: 2 x 4",
    ]


def test_query_heads_of_one_key_head_share_its_permutation() -> None:
    groups = traced("grouped_query_attention").groups
    q, v, out = (
        [segment.leaf for segment in groups.segments[Axis(name, dim)]]
        for name, dim in (("q.weight", 0), ("v.weight", 0), ("out.weight", 1))
    )
    assert len(v) == 2
    assert out == [v[0], v[0], v[1], v[1]]
    assert q == [q[0], q[0], q[2], q[2]]
    assert free("repeated_key_heads") == free("grouped_query_attention")


def test_joint_attention_ties_both_streams() -> None:
    axes = "v.weight[0] v.bias[0] add_v.weight[0] add_v.bias[0] out.weight[1] add_out.weight[1]"
    assert f"{axes}: 2 x 4" in free("joint_attention").splitlines()


def test_qk_norm_is_shared_by_the_heads() -> None:
    line = "q.weight[0] q.bias[0] k.weight[0] k.bias[0] norm_q.weight[0] norm_k.weight[0]: 4"
    assert line in free("qk_norm").splitlines()


@pytest.mark.parametrize(
    "name", ["rotate_half", "rotate_pairs", "rotate_complex", "rotate_in_place"]
)
def test_rotary_embeddings_pin_queries_and_keys_but_not_values(name: str) -> None:
    assert free(name) == "v.weight[0] v.bias[0] out.weight[1]: 2 x 4"


def test_the_residual_stream_is_one_group() -> None:
    stream = free("residual_chain").splitlines()[0]
    assert stream == (
        "embed.weight[0] embed.bias[0] ups.0.weight[1] downs.0.weight[0] downs.0.bias[0] "
        "ups.1.weight[1] downs.1.weight[0] downs.1.bias[0] head.weight[1]: 8"
    )


def test_an_addition_in_place_keeps_the_residual_stream_free() -> None:
    stream = "embed.weight[0] embed.bias[0] up.weight[1] down.weight[0] down.bias[0] head.weight[1]"
    assert f"{stream}: 8" in free("in_place_residual").splitlines()


def test_modulation_rows_move_with_the_stream_they_modulate() -> None:
    groups = traced("adaln_zero").groups
    (stream,) = {segment.leaf for segment in groups.segments[Axis("embed.weight", 0)]}
    chunks = [segment.leaf for segment in groups.segments[Axis("modulation.weight", 0)]]
    assert chunks == [stream] * 6
    assert "table[1]" in free("scale_shift_table").splitlines()[0]


def test_concatenated_inputs_are_free_segment_by_segment() -> None:
    groups = traced("concatenated_inputs").groups
    segments = groups.segments[Axis("out.weight", 1)]
    assert [segment.size for segment in segments] == [4, 4, 12]
    assert all(groups.owners[segment.leaf].free for segment in segments)


def test_channels_move_within_their_norm_group() -> None:
    line = "up.weight[0] up.bias[0] norm.weight[0] norm.bias[0] down.weight[1]: 3 x 4"
    assert free("group_norm") == line


def test_a_depthwise_convolution_passes_both_halves() -> None:
    line = "up.weight[0] up.bias[0] depth.weight[0] depth.bias[0] down.weight[1]: 12"
    assert free("depthwise_glu") == line


def test_heads_merged_into_the_batch_keep_their_permutations() -> None:
    assert (
        free("merged_batch_heads").splitlines()[1] == "v.weight[0] v.bias[0] out.weight[1]: 2 x 4"
    )


# ---------------------------------------------------------------- every pin has its sentence


@pytest.mark.parametrize(
    ("name", "axis", "reason"),
    [
        ("plain_mlp", "up.weight[1]", "graph input 0"),
        ("plain_mlp", "down.weight[0]", "graph output 0"),
        ("returned_middle", "up.weight[0]", "graph output 1"),
        ("returned_parameter", "up.weight[0]", "graph output 1"),
        ("unknown_op", "down.weight[1]", "aten.cumsum (node cumsum)"),
        ("position_in_graph", "embed.weight[0]", "constant aten.arange (node arange)"),
        ("aliased_buffer", "up.weight[0]", "memory that up.weight and shadow share"),
        ("aliased_buffer", "shadow[1]", "memory that up.weight and shadow share"),
        ("written_buffer", "mean[0]", "written in place by aten.add_ (node add_)"),
        ("in_place_halves", "a.weight[0]", "written in place by aten.copy_ (node setitem)"),
        ("rotate_complex", "q.weight[0]", "aten.view_as_complex (node z)"),
        ("rotate_pairs", "q.weight[0]", "aten.unbind (node unbind)"),
        ("strided_channels", "up.weight[0]", "aten.slice (node getitem)"),
        ("sliced_channels", "up.weight[0]", "aten.select (node getitem_2)"),
        ("embedding_table", "table.weight[0]", "aten.embedding (node embedding, in table)"),
        ("embedding_table", "extra[0]", "aten.index (node getitem_1)"),
        ("patchify", "patch.weight[2]", "aten.conv2d (node conv2d, in patch)"),
        ("padded", "down.weight[1]", "aten.pad (node pad)"),
        ("expanded", "scalar[0]", "a size of one channel"),
        ("tied_weights", "first.weight[0]", "graph input 0"),
    ],
)
def test_what_is_pinned_names_its_culprit(name: str, axis: str, reason: str) -> None:
    assert reason in pins(name, axis)


def test_the_module_of_a_culprit_is_named() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.cumsum(-1)

    def run(m: Any, x: torch.Tensor) -> Any:
        out = m.down(m.blocks[0](m.up(x)))
        return out

    model = Net(run, up=linear(), blocks=nn.ModuleList([Odd()]), down=linear())
    (segment,) = (toy := trace(model, tokens())).groups.segments[Axis("up.weight", 0)]
    reasons = toy.groups.owners[segment.leaf].pinned_by
    assert reasons == ("aten.cumsum (node cumsum, in blocks.0)",)


def test_without_a_view_everything_is_pinned_and_says_why() -> None:
    from dataclasses import replace

    toy = traced("plain_mlp")
    blind = replace(toy.graph, view=None, view_error="a graph that could not be traced")
    groups = propagate(blind, toy.inputs)
    assert {group.pinned_by for group in groups.groups} == {("a graph that could not be traced",)}


def test_the_constraint_graph_tells_the_way_to_the_culprit() -> None:
    toy = traced("unknown_op")
    rows = spread(toy.graph, toy.inputs)
    way = why(constraint_graph(rows), Axis("up.bias", 0))
    assert way[0] == "up.bias[0]"
    assert way[1].startswith("aten.linear (node linear, in up) ties it to ")
    assert way[-1] == "pinned by aten.cumsum (node cumsum)"
    free = traced("plain_mlp")
    assert why(constraint_graph(spread(free.graph, free.inputs)), Axis("up.bias", 0)) == []
    assert " <- ".join(way) in every_pin(rows)
    assert Axis("down.weight", 1) in constraint_graph(rows)


def test_a_free_part_beside_a_pinned_one_is_not_blamed_on_it() -> None:
    toy = traced("sliced_channels")
    rows = spread(toy.graph, toy.inputs)
    assert why(constraint_graph(rows), Axis("down.weight", 1)) == []
    assert (
        why(constraint_graph(rows), Axis("up.weight", 0))[-1]
        == "pinned by aten.select (node getitem_2)"
    )


def test_the_way_to_a_culprit_names_a_repeated_step_once() -> None:
    toy = traced("rotate_pairs")
    way = why(constraint_graph(spread(toy.graph, toy.inputs)), Axis("q.weight", 0))
    assert len(way) == len(set(way))
    assert way[-1].startswith("pinned by ")
    with pytest.raises(KeyError, match="absent"):
        why(constraint_graph(spread(toy.graph, toy.inputs)), Axis("absent", 0))


def test_a_kernel_of_the_users_may_write_to_what_it_is_given() -> None:
    from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_mutation

    kernel: Any = triton_kernel_wrapper_mutation
    settings = {"kernel_idx": 0, "constant_args_idx": 0, "tma_descriptor_metadata": {}}

    def run(x: torch.Tensor) -> torch.Tensor:
        given, kept = torch.zeros_like(x), torch.zeros_like(x)
        kernel(**settings, grid=[(1, 1, 1)], kwargs={"x": x, "out": given})
        return given + kept

    view = make_fx(run, pre_dispatch=True, tracing_mode="fake")(tokens())
    zeros = [node.meta["val"] for node in view.graph.nodes if "zeros_like" in node.name]
    assert [storage_of(value) in written(view) for value in zeros] == [True, False]
