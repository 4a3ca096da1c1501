"""The ways diffusers compiles: repeated blocks, in place, with its own pipelines' calls."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import pq_compile
from tests import tiny_models
from tests.models import relative_error, served_by_hand

pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore"),  # diffusers warns of what it deprecates
]


CLOSE = 1e-2
"""FLUX turns queries and keys to fp32 for the rotary embedding: now and then a code flips."""


def flux() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    model, given = tiny_models.flux(layers=2, single_layers=3, heads=4)
    return model.double().requires_grad_(False).eval(), {**given, "return_dict": False}


def call(model: Any, given: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**given)[0]
    return out


def uncompiled(model: Any) -> Any:
    plain = copy.deepcopy(model)
    for module in plain.modules():
        module._compiled_call_impl = None
    return plain


@pytest.mark.parametrize("release", ["backup", "keep"])
def test_repeated_blocks_are_served_each_by_its_own_weights(release: str) -> None:
    model, given = flux()
    own = call(model, given)
    options = {"recipe": "random", "release_weights": release, "progress": False}
    model.compile_repeated_blocks(backend="permuquant", fullgraph=True, options=options)
    found = [call(model, given) for _ in range(3)][-1]
    with served_by_hand(uncompiled(model), model) as plain:
        assert relative_error(found, call(plain, given)) < CLOSE
    assert relative_error(found, own) > 1e-3
    report = pq_compile.report(model).to_dict()
    names = {one["name"] for one in report["linears"] if one["route"] != "keep"}
    assert {"transformer_blocks.1.attn.to_q", "single_transformer_blocks.2.proj_mlp"} <= names
    accepted = {one["name"] for one in report["linears"] if one["accepted"]}
    assert "transformer_blocks.0.attn.to_out.0" in accepted
    assert "transformer_blocks.0.attn.to_q" not in accepted  # the stream enters from outside


def test_repeated_blocks_are_observed_each_for_itself() -> None:
    model, given = flux()
    options = {"calibration_calls": 2, "progress": False}
    model.compile_repeated_blocks(backend="permuquant", options=options)
    plain = flux()[0]
    for _ in range(2):
        assert torch.equal(call(model, given), call(plain, given))
    assert not torch.equal(call(model, given), call(plain, given))
    phase = pq_compile.report(model).to_dict()["summary"]["phase"]
    assert phase == "serving"


def test_a_model_compiled_in_place_is_found_and_served() -> None:
    model, given = flux()
    model.compile(backend="permuquant", fullgraph=True, options={"recipe": "random"})
    found = [call(model, given) for _ in range(2)][-1]
    with served_by_hand(uncompiled(model), model) as plain:
        assert relative_error(found, call(plain, given)) < CLOSE
    summary = pq_compile.report(model).to_dict()["summary"]
    assert summary["free_flop_share"] == 1.0
    assert summary["phase"] == "serving"
