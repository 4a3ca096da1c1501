"""What Inductor is told of a lowered graph, and that what it makes of it serves the same."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch._inductor.compile_fx as inductor
from torch import Tensor, nn

import pq_compile
from pq_compile import backend, compiling
from pq_compile.runtime import Program
from tests.models import (
    CLOSE,
    Denoiser,
    denoiser,
    inputs,
    relative_error,
    run,
    served_by_hand,
    unit_of,
)

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "through_inductor")

OPTIONS: dict[str, Any] = {"recipe": "random", "progress": False}


@pytest.fixture
def through_inductor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs on the CPU are compiled as if on a GPU, and none as it was in an earlier run."""
    monkeypatch.setattr(compiling, "on_gpu", lambda tensors: True)
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield


class Told(Exception):
    """Raised in place of compiling."""


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What reaches the innermost function of Inductor, which does nothing more."""
    found: dict[str, Any] = {}
    lower = compiling.compile_lowered

    def remember(program: Program, *rest: Any) -> Any:
        found["program"] = program
        return lower(program, *rest)

    def stop(graph: Any, examples: Any, **how: Any) -> Any:
        found.update(how, inputs=len(examples), asserts=torch._inductor.config.size_asserts)
        raise Told

    monkeypatch.setattr(backend, "compile_lowered", remember)
    monkeypatch.setattr(inductor, "_compile_fx_inner", stop)
    yield found
    assert torch._inductor.config.size_asserts


def compile_once(mode: str | None, more: dict[str, Any] | None = None) -> None:
    options = {**OPTIONS, **(more or {})}
    fast: Any = torch.compile(
        denoiser(blocks=1), backend=partial(backend.permuquant, mode=mode, options=options)
    )
    run(fast, *inputs(0))  # observes, and freezes at its end
    with pytest.raises(Exception, match="Told"):
        run(fast, *inputs(0))


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_parameters_and_packed_weights_are_static_for_cuda_graphs(
    mode: str | None, told: dict[str, Any]
) -> None:
    compile_once(mode)
    program = told["program"]
    parameters = [i for i, (arg, _) in enumerate(program.sources) if arg in program.parameters]
    assert list(told["static_input_idxs"]) == parameters
    assert told["inputs"] - len(parameters) == 2  # latents and condition
    assert any(program.sources[i][1] is not None for i in parameters)
    assert bool(told["cudagraphs"]) == (mode is not None)
    assert not told["asserts"]


def test_the_mode_may_be_an_option_too(told: dict[str, Any]) -> None:
    compile_once(None, {"mode": "reduce-overhead"})
    assert told["cudagraphs"]


def test_without_cuda_graph_trees_packed_weights_are_copied_in_each_call(
    told: dict[str, Any],
) -> None:
    with torch._inductor.config.patch({"triton.cudagraph_trees": False}):
        compile_once("reduce-overhead")
    packed = [i for i, (_, field) in enumerate(told["program"].sources) if field is not None]
    assert packed
    assert not set(packed) & set(told["static_input_idxs"])
    assert told["asserts"]


def oddly_laid_out() -> Denoiser:
    """Weights that are transposed in memory, biases with gaps."""
    model = denoiser(blocks=1)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.T.contiguous().T, False)
            gaps = torch.stack([module.bias, module.bias], 1)
            module.bias = nn.Parameter(gaps[:, 0], False)
    return model


@pytest.mark.parametrize("recipe", ["rtn", "random"])
@pytest.mark.parametrize("make", [partial(denoiser, blocks=1), oddly_laid_out])
def test_a_compiled_graph_serves_what_the_plan_says(make: Any, recipe: str) -> None:
    model, plain = make(), make()
    options = {**OPTIONS, "recipe": recipe}
    fast: Any = torch.compile(model, backend="permuquant", options=options)
    for seed in range(3):
        found = run(fast, *inputs(seed))
    with served_by_hand(plain, model):
        assert relative_error(found, run(plain, *inputs(2))) < CLOSE
    entries = unit_of(model)._entries.values()
    assert all(field.is_contiguous() for entry in entries for field in entry.packed or ())


class Reread(nn.Module):
    """Reads its second weight as it is, if asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 256).double().requires_grad_(False)
        self.down = nn.Linear(256, 64).double().requires_grad_(False)

    def forward(self, x: Tensor, again: bool = False) -> Tensor:
        out: Tensor = self.down(torch.relu(self.up(x)))
        return out + self.down.weight.sum(1) if again else out


@pytest.mark.parametrize("recipe", ["rtn", "random"])
def test_a_released_weight_that_comes_back_in_a_call_is_read_as_it_was(recipe: str) -> None:
    torch.manual_seed(0)
    model, plain, x = Reread(), Reread(), torch.randn(2, 12, 64, dtype=torch.float64)
    model.down.weight = nn.Parameter(model.down.weight.T.contiguous().T, False)
    plain.load_state_dict(model.state_dict())
    options = {**OPTIONS, "recipe": recipe}
    fast: Any = torch.compile(model, backend="permuquant", options=options)
    run(fast, x)
    for again in (False, True, True, False):
        found = run(fast, x, again)
        with served_by_hand(plain, model):
            assert relative_error(found, run(plain, x, again)) < CLOSE


def _nothing(model: Denoiser) -> None:
    pass


def _merge(model: Denoiser) -> None:
    for block in model.blocks:
        block.up.weight.data += 0.1


def _load(model: Denoiser) -> None:
    model.load_state_dict(denoiser(5, dtype=torch.bfloat16).state_dict())


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # how Inductor begins its trees
def test_cuda_graphs_read_packed_weights_in_place_and_none_that_was_replaced() -> None:
    counted = torch._dynamo.utils.counters["inductor"]
    counted.clear()
    options = {**OPTIONS, "scheme": "w4a16"}
    model = denoiser(dtype=torch.bfloat16).to("cuda")
    fast: Any = torch.compile(
        model, backend=partial(backend.permuquant, mode="reduce-overhead", options=options)
    )
    given = [x.to("cuda") for x in inputs(0, dtype=torch.bfloat16)]
    for change in (_nothing, _merge, pq_compile.refresh, _load):
        change(model)
        for _ in range(5):  # packs, warms up, records, replays
            found = run(fast, *given).clone()
        with served_by_hand(copy.deepcopy(model), model) as plain:
            assert relative_error(found, run(plain, *given)) < 2e-2
    assert counted["cudagraph_skips"] == 0
    one_recording = sum(map(len, unit_of(model).served().values()))
    assert 0 < counted["cudagraph_recorded_non_static_inputs"] < one_recording
