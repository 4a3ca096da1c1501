"""Diffusers' own transformers, lowered by every route: the same numbers, and fewer kernels."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from pq_compile import backend
from pq_compile.rows import parse
from tests.conftest import Golden
from tests.graphs import double_precision
from tests.lowering import FUSED, ROUTES, Captured, calls, captured
from tests.models import CLOSE, denoiser, inputs, relative_error, run
from tests.tiny_models import TINY, flux, tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # diffusers warns of what it deprecates
    pytest.mark.usefixtures("fresh_dynamo"),
]

FUSES = {  # programs of all linears that are not per sample, products
    "flux": (12, 12),
    "sd3": (31, 31),
    "pixart": (8, 8),
    "sana": (7, 7),
    "z_image": (10, 10),
    "qwen_image": (19, 19),
    "wan": (3, 3),  # most of its widths here are no multiple of 16
    "hunyuan_video": (4, 4),
    "ltx": (10, 10),
    "aura_flow": (15, 18),
    "dit": (9, 9),
}


@cache
def traced(name: str) -> Captured:
    """The model's graph with every cast to float32 made one to float64."""
    pytest.importorskip("diffusers")
    model, given = tiny(name)
    if name == "z_image":  # builds its rotary tables on first use, which Dynamo cannot trace
        run(lambda: model(**given)[0])
    found = captured(model, **given)
    double_precision(found)  # type: ignore[arg-type]
    return found


def error(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    pairs = zip(found, expected, strict=True)
    return max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs)


@pytest.mark.parametrize("name", TINY)
def test_every_route_computes_what_the_linears_by_themselves_do(name: str) -> None:
    model = traced(name)
    plain = {s: model.run(model.lowered(s, None)) for s in ("w4a8", "w4a4")}
    for scheme, route in FUSED:
        lowered = model.lowered(scheme, ROUTES[scheme, route])
        lowered.module.graph.lint()
        found = model.run(lowered)
        if scheme == "w4a8":
            assert all(map(torch.equal, found, plain[scheme]))
        elif route == "fp8":
            assert error(found, plain[scheme]) < 0.25  # an emulation, layer upon layer
        else:
            assert error(found, plain[scheme]) < 1e-7


@pytest.mark.parametrize("name", TINY)
def test_as_much_is_fused_as_can(name: str) -> None:
    model = traced(name)
    found = calls(model.lowered("w4a8", ROUTES["w4a8", "fp8"]).module)
    assert (found["rows"], found["matmul"]) == FUSES[name]


@pytest.mark.parametrize("name", TINY)
def test_folded_orders_are_fused_alike(name: str) -> None:
    """A program knows no channel: the order of channels lies in the weights alone."""
    model = traced(name)
    given = model.folded(seed=0)
    for scheme, route in (("w4a8", "fp8"), ("w4a4", "half")):
        lowered = model.lowered(scheme, ROUTES[scheme, route])
        plain = model.run(model.lowered(scheme, None), given)
        assert error(model.run(lowered, given), plain) < (1e-14 if scheme == "w4a8" else 1e-7)


def test_the_programs_of_flux(golden: Golden) -> None:
    pytest.importorskip("diffusers")
    model, given = flux(single_layers=2)
    found = captured(model.double().eval(), **given).lowered("w4a8", ROUTES["w4a8", "fp8"])
    nodes = found.module.graph.nodes
    texts = [node.args[1] for node in nodes if "permuquant.rows" in str(node.target)]
    golden("".join(f"{text}\n" for text in texts))
    assert all(str(parse(text)) == text for text in texts)


# ---------------------------------------------------------------- through the backend


def served(monkeypatch: pytest.MonkeyPatch, key: tuple[str, str] | None, **options: Any) -> Tensor:
    """What a compiled model serves if the device had this route; None: by linears alone."""
    torch._dynamo.reset()
    chosen = None if key is None else ROUTES[key]
    monkeypatch.setattr(backend, "route", lambda *_: chosen)
    told = {"calibration_calls": 1, "progress": False, **options}
    fast = torch.compile(denoiser(), backend="permuquant", options=told)
    for _ in range(2):
        y = run(fast, *inputs(0))
    return y


@pytest.mark.parametrize("recipe", ["random", "rtn"])
def test_a_compiled_model_serves_the_same_by_every_route(
    monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    for scheme, route in (("w4a8", "fp8"), ("w4a4", "half")):
        how = {"recipe": recipe, "scheme": scheme}
        plain = served(monkeypatch, None, **how)
        assert relative_error(served(monkeypatch, (scheme, route), **how), plain) < CLOSE
    own = run(denoiser(), *inputs(0))
    assert 0 < relative_error(plain, own) < 0.3


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_fused_graph_goes_through_aot_autograd(
    monkeypatch: pytest.MonkeyPatch, dynamic: bool
) -> None:
    """As on a GPU, where Inductor takes what AOTAutograd makes of it."""
    from torch._dynamo.backends.debugging import aot_eager

    monkeypatch.setattr(backend, "route", lambda *_: ROUTES["w4a8", "fp8"])
    graphs: list[fx.GraphModule] = []

    def compile_(lowered: Any, given: Any, *_: Any) -> Any:
        graphs.append(lowered.lowered)
        return aot_eager(lowered.lowered, given)

    monkeypatch.setattr(backend, "compile_lowered", compile_)
    how: Any = {"recipe": "rtn", "progress": False, "scheme": "w4a8", "release_weights": "keep"}
    model: nn.Module = denoiser()
    fast = torch.compile(model, backend="permuquant", options=how, dynamic=dynamic)
    counts = []
    for tokens in (12, 20, 28):
        given = inputs(0, tokens=tokens)
        assert 0 < relative_error(run(fast, *given), run(model, *given)) < 0.2
        counts.append(len(graphs))
    assert len(set(counts)) == (1 if dynamic else 3)
    for graph in graphs:
        held = calls(graph)
        assert held["rows"] + held["site"] == 8
