"""A graph seen after freezing may allow less than the first: correct, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pq_compile
from pq_compile.errors import Refused
from tests.models import CLOSE as QUANTISED
from tests.models import denoiser, inputs, relative_error, run, served_by_hand, unit_of
from tests.tiny_models import tiny

pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore"),  # diffusers warns of what it deprecates
]

CLOSE = 1e-6
"""FLUX turns queries and keys to fp32 for the rotary embedding, whatever the model's precision."""


def reordered(model: nn.Module, **options: Any) -> Any:
    options = {"recipe": "random", "format": "none", "progress": False, **options}
    return torch.compile(model, backend="permuquant", options=options)


def flux() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model, given = tiny("flux")
    return model.double().requires_grad_(False).eval(), {**given, "return_dict": False}


def call(model: Any, given: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**given)[0]
    return out


def controlnet(given: dict[str, Any]) -> dict[str, Any]:
    samples = [torch.randn(2, 16, 32, dtype=torch.float64)]
    return {
        **given,
        "controlnet_block_samples": samples,
        "controlnet_single_block_samples": samples,
    }


def masked(given: dict[str, Any]) -> dict[str, Any]:
    mask = torch.rand(2, 1, 28, 28) > 0.3
    return {**given, "joint_attention_kwargs": {"attention_mask": mask}}


def longer_text(given: dict[str, Any]) -> dict[str, Any]:
    return {
        **given,
        "encoder_hidden_states": torch.randn(2, 20, 32, dtype=torch.float64),
        "txt_ids": torch.randn(20, 3, dtype=torch.float64),
    }


def more_image(given: dict[str, Any]) -> dict[str, Any]:
    return {
        **given,
        "hidden_states": torch.randn(2, 25, 4, dtype=torch.float64),
        "img_ids": torch.randn(25, 3, dtype=torch.float64),
    }


@pytest.mark.parametrize("change", [controlnet, masked, longer_text, more_image])
def test_a_frozen_flux_is_right_in_a_second_graph_and_again_in_the_first(change: Any) -> None:
    model, given = flux()
    fast = reordered(model)
    assert relative_error(call(fast, given), call(model, given)) < CLOSE
    before = len(unit_of(model).orders)
    assert before
    for arguments in (change(given), given, change(given)):
        assert relative_error(call(fast, arguments), call(model, arguments)) < CLOSE
    after = len(unit_of(model).orders)
    given_up = pq_compile.report(fast).to_dict()["summary"]["warnings"]
    if change is controlnet:
        assert after < before
        assert any("controlnet_block_samples" in sentence for sentence in given_up)
    else:
        assert after == before
        assert not given_up


class Adaptable(nn.Module):
    """Adds what a caller gives to the hidden channels of its feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([denoiser().blocks[0]])
        self.late = nn.Linear(64, 256).double().requires_grad_(False)

    def forward(
        self, x: Tensor, condition: Tensor, extra: Tensor | None = None, late: bool = False
    ) -> Tensor:
        block: Any = self.blocks[0]
        h = block.up(block.norm(x))
        if extra is not None:
            h = h + extra
        if late:
            h = h + self.late(condition)[:, None]
        out: Tensor = block.down(torch.relu(h))
        return out


def adaptable(**options: Any) -> tuple[Any, Any, tuple[Tensor, Tensor], Tensor]:
    torch.manual_seed(0)
    model = Adaptable()
    given = (torch.randn(2, 12, 64).double(), torch.randn(2, 64).double())
    fast = reordered(model, format="nvfp4", **options)
    return model, fast, given, torch.randn(2, 12, 256).double()


@pytest.mark.parametrize("release", ["backup", "keep"])
def test_packed_weights_are_packed_again_in_an_order_that_both_graphs_allow(release: str) -> None:
    model, fast, given, extra = adaptable(release_weights=release)
    run(fast, *given)
    assert unit_of(model).orders
    for arguments in ((*given, extra), given, (*given, extra)):
        found = run(fast, *arguments)
        copied = Adaptable()
        copied.load_state_dict(model.state_dict())
        with served_by_hand(copied, model):
            assert relative_error(found, run(copied, *arguments)) < QUANTISED
    (order,) = [g for g in unit_of(model).needs.groups.groups if g.name == "blocks.0.up.weight[0]"]
    assert order.pinned_by == ("graph input extra",)
    linears = {one["name"]: one for one in pq_compile.report(fast).to_dict()["linears"]}
    assert not linears["blocks.0.down"]["accepted"]


def test_without_originals_a_graph_that_needs_another_order_is_refused() -> None:
    _, fast, given, extra = adaptable(release_weights="drop")
    expected = run(fast, *given)
    with pytest.raises(
        Refused,
        match=r"needs blocks\.0\.\S+ in another order .*graph input extra.* original was dropped",
    ):
        run(fast, *given, extra)
    assert torch.equal(run(fast, *given), expected)


def test_linears_first_seen_after_freezing_follow_the_orders_in_force() -> None:
    model, fast, given, _ = adaptable()
    run(fast, *given)
    orders = dict(unit_of(model).orders)
    found = run(fast, *given, None, True)
    copied = Adaptable()
    copied.load_state_dict(model.state_dict())
    with served_by_hand(copied, model):
        assert relative_error(found, run(copied, *given, None, True)) < QUANTISED
    assert len(unit_of(model).orders) == len(orders)
    linears = {one["name"]: one for one in pq_compile.report(fast).to_dict()["linears"]}
    assert linears["late"]["reason"] == "first seen after freezing: order kept"


def test_units_that_meet_in_one_graph_are_observed_anew_as_one() -> None:
    model = denoiser()
    for block in model.blocks:
        block.compile(backend="permuquant", options={"recipe": "random", "progress": False})
    run(model, *inputs(0))
    apart = [unit_of(block) for block in model.blocks]
    assert apart[0] is not apart[1]
    for module in model.modules():
        module._compiled_call_impl = None
    fast = reordered(model, format="nvfp4")
    for _ in range(2):
        found = run(fast, *inputs(0))
    assert unit_of(model.blocks[0]) is unit_of(model.blocks[1])
    plain = denoiser()
    with served_by_hand(plain, model):
        assert relative_error(found, run(plain, *inputs(0))) < QUANTISED


class Tied(nn.Module):
    """Its second weight is read by a linear, by something else, or written to."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 256).requires_grad_(False)
        self.down = nn.Linear(256, 64).requires_grad_(False)

    def forward(self, x: Tensor, how: str = "linear") -> Tensor:
        h = torch.relu(self.up(x))
        if how == "einsum":
            return torch.einsum("...k,nk->...n", h, self.down.weight) + self.down.bias
        if how == "both":
            return torch.cat([self.down(h), self.down.weight.expand(2, -1, -1)[..., :64]], 1)
        if how == "written":
            self.down.weight.mul_(0.5)
        out: Tensor = self.down(h)
        return out


@pytest.mark.parametrize("release", ["backup", "keep"])
@pytest.mark.parametrize(
    "order", [("linear", "both"), ("einsum", "linear"), ("linear", "einsum")], ids=" then ".join
)
@pytest.mark.parametrize("recipe", ["random", "rtn"])
def test_a_weight_may_be_read_in_another_form_later(
    order: tuple[str, str], release: str, recipe: str
) -> None:
    torch.manual_seed(0)
    model, x = Tied(), torch.randn(2, 12, 64)
    fast = reordered(model, format="nvfp4", release_weights=release, recipe=recipe)
    plain = Tied()
    for how in (*order, *order, *order):
        found = run(fast, x, how)
        plain.load_state_dict(model.state_dict())
        with served_by_hand(plain, model):
            assert relative_error(found, run(plain, x, how)) < 2e-3
        if how == "both":
            assert torch.equal(found[:, 12:], model.down.weight.expand(2, -1, -1)[..., :64])


def test_a_dropped_weight_that_is_read_as_it_was_is_refused_and_goes_on_serving() -> None:
    torch.manual_seed(0)
    model, x = Tied(), torch.randn(2, 12, 64)
    fast = reordered(model, format="nvfp4", release_weights="drop", recipe="rtn")
    expected = run(fast, x)
    with pytest.raises(Refused, match=r"needs down\.weight as it was before packing, but its orig"):
        run(fast, x, "both")
    assert torch.equal(run(fast, x), expected)


def test_a_weight_that_its_graph_writes_to_stays_in_its_own_precision() -> None:
    torch.manual_seed(0)
    model, plain, x = Tied(), Tied(), torch.randn(2, 12, 64)
    plain.load_state_dict(model.state_dict())
    fast = reordered(model, format="nvfp4", skip=("up",), recipe="rtn")
    with pytest.raises(Refused, match=r"down: the graph writes to its weight"):
        run(fast, x, "written")
    fast = reordered(model, format="nvfp4", recipe="rtn")
    for _ in range(3):
        found = run(fast, x, "written")
        with served_by_hand(plain, model):
            assert relative_error(found, run(plain, x, "written")) < 2e-3


@pytest.mark.parametrize("calls", [1, 4])
def test_a_layer_may_be_replaced_by_one_of_another_size(calls: int) -> None:
    torch.manual_seed(0)
    model, x = Tied(), torch.randn(2, 12, 64)
    fast = reordered(model, format="nvfp4", recipe="permuquant", calibration_calls=3)
    for _ in range(calls):
        run(fast, x)
    model.up, model.down = nn.Linear(64, 128), nn.Linear(128, 64)
    model.requires_grad_(False)
    for _ in range(4):
        found = run(fast, x)
    plain = Tied()
    plain.up, plain.down = nn.Linear(64, 128), nn.Linear(128, 64)
    plain.load_state_dict(model.state_dict())
    with served_by_hand(plain, model):
        assert relative_error(found, run(plain, x)) < 2e-3
