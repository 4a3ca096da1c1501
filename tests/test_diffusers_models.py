"""Diffusers' own transformers: folding is invisible, and reaches what it should."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache

import pytest
import torch
from torch.utils import _pytree as pytree

from passes.fold import fold, moved
from passes.propagate import random_orders
from pq_compile.plan import Axis
from tests.graphs import Traced, double_precision, relative_error, trace
from tests.tiny_models import TINY, tiny

pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers warns of what it deprecates

MOVED = {  # parameters and buffers that random orders move, of all
    "flux": (49, 62),
    "sd3": (122, 123),
    "pixart": (32, 33),
    "sana": (34, 35),
    "z_image": (50, 58),
    "qwen_image": (59, 77),
    "wan": (62, 71),
    "hunyuan_video": (79, 92),
    "ltx": (35, 40),
    "aura_flow": (35, 35),
    "dit": (44, 45),
}


@cache
def traced(name: str) -> Traced:
    """The model's graph with every cast to float32 made one to float64."""
    model, inputs = tiny(name)
    if name == "z_image":  # builds its rotary tables on first use, which Dynamo cannot trace
        with torch.no_grad():
            model(**inputs)
    found = trace(model, **inputs)
    assert found.groups.groups
    double_precision(found)
    return found


@pytest.mark.parametrize("name", TINY)
def test_random_permutations_of_free_groups_are_invisible(name: str) -> None:
    model = traced(name)
    expected = model.run()
    for seed in range(2):
        found = model.run(random_orders(model.groups, seed))
        assert relative_error(found, expected) <= 1e-10


@pytest.mark.parametrize("name", TINY)
def test_as_many_parameters_move_as_can(name: str) -> None:
    model = traced(name)
    names = moved(model.groups, random_orders(model.groups, 0))
    assert (len(names), len(model.graph.positions)) == MOVED[name]
    assert not [r for g in model.groups.groups for r in g.pinned_by if "its rule failed" in r]


@pytest.mark.parametrize("name", ["flux", "sd3", "pixart"])
def test_names_are_those_of_the_users_model(name: str) -> None:
    model, inputs = tiny(name)
    groups = traced(name).groups
    orders = random_orders(groups, 0)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert set(traced(name).graph.positions) <= set(tensors)
    folded = {key: fold(key, tensor, groups, orders) for key, tensor in tensors.items()}
    with torch.no_grad():
        expected = pytree.tree_leaves(dict(model(**inputs)))
        found = pytree.tree_leaves(dict(torch.func.functional_call(model, folded, (), inputs)))
    assert relative_error(found, expected) < 1e-4  # diffusers computes some parts in float32


UNSEEN = {
    "flux": set[str](),
    "sd3": {
        # the last block drops what its text queries find
        *(f"transformer_blocks.3.attn.add_q_proj.{part}" for part in ("weight", "bias")),
    },
    # softmax ignores what all scores of a query have in common
    "pixart": {f"transformer_blocks.0.attn{i}.to_k.bias" for i in (1, 2)},
}


@pytest.mark.parametrize("name", UNSEEN)
def test_a_moved_parameter_left_unpermuted_changes_the_output(name: str) -> None:
    model = traced(name)
    orders = random_orders(model.groups, 0)
    expected = model.run()
    unseen = {
        parameter
        for parameter in moved(model.groups, orders)
        if relative_error(model.run(orders, except_for=parameter), expected) < 1e-9
    }
    assert unseen == UNSEEN[name]


def test_flux_has_one_residual_stream_and_a_permutation_per_head() -> None:
    groups = traced("flux").groups
    stream = groups.owners[groups.segments[Axis("x_embedder.weight", 0)][0].leaf]
    assert stream.free
    assert Axis("context_embedder.weight", 0) in stream.axes
    assert Axis("single_transformer_blocks.0.proj_mlp.weight", 1) in stream.axes
    single = groups.segments[Axis("single_transformer_blocks.0.proj_out.weight", 1)]
    assert [segment.size for segment in single] == [16, 16, 128]
    assert all(groups.owners[segment.leaf].free for segment in single)


@pytest.mark.slow
def test_flux_dev_is_free_at_its_real_size_within_a_minute() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.flux_dev"],
        capture_output=True,
        text=True,
        check=True,
        timeout=400,
    )
    figures = json.loads(done.stdout)
    assert figures["linears"] == 504
    assert figures["free_share"] >= 0.99
    assert figures["seconds"] < 60  # of CPU, Dynamo's part included
    assert figures["peak_gib"] < 4
